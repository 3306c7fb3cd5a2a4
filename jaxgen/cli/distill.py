"""``jaxgen distill``: a trained run turned into a generator of one step."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from jaxgen.cli.flags import parse
from jaxgen.cli.runs import explained
from jaxgen.train.recipes.distill import DistillConfig

__all__ = ["run"]

PROG = "jaxgen distill"


@dataclasses.dataclass(frozen=True)
class Distill:
    """Turn a trained run into a small generator that needs one evaluation a sample (SlimFlow).

    The run makes pairs of noise and sample by its probability flow. A smaller network learns the
    flow between them, its pairing annealed from independent to the run's, and is then distilled to
    one step, guided by its own flow's two-step samples of fresh noise. At the end all are held
    against the data, and against the run in 50 evaluations from the same noise.

    The new folder (RUN-one-step, or --out) is a run's: jaxgen sample draws from it. Ctrl-C saves,
    and the same command goes on.

    For example:

      jaxgen distill runs/digits-vp --steps 1
      jaxgen distill runs/digits-vp --width 32 --pairs 20000 --out runs/as-wide
      jaxgen distill runs/moons-ve --first teacher
      jaxgen sample runs/digits-vp-one-step --n 1000 --out digits.npz
    """

    dir: tyro.conf.Positional[Path]
    """The trained run's folder."""
    distill: tyro.conf.OmitArgPrefixes[DistillConfig]
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show no progress."""


def run(words: Sequence[str]) -> int:
    """Carry out ``jaxgen distill``."""
    args = parse(Distill, words, prog=PROG)

    from jaxgen.train.recipes.distill import distill_run, prepare_distillation

    def say(line: str) -> None:
        if not args.quiet:
            print(line, file=sys.stderr, flush=True)

    job = prepare_distillation(args.dir, args.distill)
    with explained():
        figures = distill_run(job, progress=False if args.quiet else None, say=say)
    print(_table(figures))
    out = job.out
    print(f"see {out / 'samples.png'}, {out / 'curves.png'} and {out / 'metrics.json'}")
    print(f"draw from it by jaxgen sample {out}")
    return 0


def _table(figures: Mapping[str, Any]) -> str:
    """The generators side by side."""
    about = figures["distilled"]
    rows = about["rows"]
    kind = "frechet" if "frechet" in rows[0] else "sliced_wasserstein"
    lines = [
        f"{figures['parameters']:,} parameters for the teacher's {about['teacher_parameters']:,}; "
        f"{kind} to the data (data to data {rows[0]['data_to_data']}, "
        f"{figures['samples']['count']} samples), RMSE to {about['rmse_to']}",
        f"  {'':<20}{'evaluations':>12}{kind:>20}{'RMSE':>10}{'ms a sample':>14}",
    ]
    for row in rows:
        each = row["seconds_per_sample"]
        shown = "-" if each is None else f"{1e3 * each:.3g}"
        lines.append(
            f"  {row['generator']:<20}{row['evaluations']:>12}{row[kind]:>20}{row['rmse']:>10}"
            f"{shown:>14}"
        )
    seconds = figures["seconds"]
    lines.append(
        f"time: {seconds['pairs']} s pairs, {seconds['training']} s training, "
        f"{seconds['evaluation']} s measuring"
    )
    return "\n".join(lines)
