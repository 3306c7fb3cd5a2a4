"""``jaxgen compare``: solvers of a trained run, quality against evaluations."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from jaxgen.cli.errors import CommandError
from jaxgen.cli.flags import parse
from jaxgen.cli.runs import (
    WITH_STATISTICS,
    check_out,
    check_run,
    check_solver,
    explained,
    named_solver,
)

__all__ = ["run"]

PROG = "jaxgen compare"


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare solvers of a trained run at a few evaluations of the network each.

    All start from the same noise. The picture shows, for the deterministic ones, the distance to a
    fine solution from that noise, and for all of them the distance of the samples to the data.
    Rows that are there already are kept: the same command goes on where it was stopped.

    For example:

      jaxgen compare runs/digits-vp
      jaxgen compare runs/digits-vp --solvers heun unipc dpmpp_2m_sde --evaluations 6 12 24
      jaxgen compare runs/digits-vp --solvers unipc dpmv3 --n 500
    """

    dir: tyro.conf.Positional[Path]
    """The run's folder."""
    solvers: tuple[str, ...] = ("ddim", "heun", "dpmpp_2m", "dpmpp_3m", "unipc", "dpmpp_2m_sde")
    """Names, as for `jaxgen sample --solver`."""
    evaluations: tuple[int, ...] = (5, 8, 10, 15, 20, 50)
    """Evaluations of the network for each; a solver takes as many steps as fit."""
    n: int = 250
    """Samples of each, rounded up to whole chunks of 125."""
    seed: int = 0
    """Of the noise."""
    out: Path | None = None
    """The picture (.png); by default DIR/compare.png. The rows lie beside it, as .json."""


def run(words: Sequence[str]) -> int:
    """Carry out ``jaxgen compare``."""
    args = parse(Compare, words, prog=PROG)
    check_run(args.dir)
    out = check_out(args.out or args.dir / "compare.png", (".png",))
    for name in args.solvers:
        check_solver(name, None, more=(WITH_STATISTICS,))
    if not args.solvers or not args.evaluations or min(args.evaluations) < 1:
        raise CommandError("give at least one of --solvers, and --evaluations of at least 1")
    if args.n < 2 or args.seed < 0:
        raise CommandError(f"--n is {args.n} and --seed {args.seed}; give n >= 2 and seed >= 0")

    from jaxgen.core.progress import meter
    from jaxgen.train.recipes import pictures
    from jaxgen.train.recipes.compare import Comparison
    from jaxgen.train.recipes.run import open_run

    trained = open_run(args.dir)
    solvers = {name: named_solver(name, trained) for name in args.solvers}
    comparison = Comparison(
        trained.experiment,
        trained.params,
        out.with_suffix(".json"),
        step=trained.step,
        n=args.n,
        seed=args.seed,
    )
    evaluations = sorted(set(args.evaluations))
    total = len(solvers) * len(evaluations)
    with meter(total, description="comparing", unit="run") as bar, explained():
        rows = comparison.run(solvers, evaluations, lambda name: bar.update(1, solver=name))
    if not rows:
        raise CommandError("no solver can do with so few evaluations; give more --evaluations")
    pictures.draw_comparison(out, rows, str(comparison.settings["reference"]))
    print(_table(rows, evaluations))
    print(f"{out}: {comparison.n} samples of step {trained.step} (averaged parameters) a run")
    return 0


def _table(rows: Sequence[dict[str, Any]], evaluations: Sequence[int]) -> str:
    """The two distances of each solver, by evaluations."""
    kind = "frechet" if "frechet" in rows[0] else "sliced_wasserstein"
    titles = {
        "rmse": "distance to the fine solution from the same noise (RMSE)",
        kind: f"distance to the data ({kind}; data to data {rows[0]['data_to_data']})",
    }
    lines = []
    for key, title in titles.items():
        lines.append(f"{title}\n  {'':<14}" + "".join(f"{e:>10}" for e in evaluations))
        for name in dict.fromkeys(r["solver"] for r in rows):
            found = {r["allowed"]: r[key] for r in rows if r["solver"] == name}
            if any(v is not None for v in found.values()):
                cells = (found.get(e) for e in evaluations)
                lines.append(
                    f"  {name:<14}" + "".join(f"{'-' if c is None else c:>10}" for c in cells)
                )
    return "\n".join(lines)
