"""``jaxgen search``: a solver schedule for a trained run."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from jaxgen.cli.errors import CommandError
from jaxgen.cli.flags import parse
from jaxgen.cli.runs import check_out, check_run, explained

__all__ = ["run"]

PROG = "jaxgen search"


@dataclasses.dataclass(frozen=True)
class Search:
    """Search for the solver schedule that samples a trained run best in a few evaluations.

    A schedule is good if it comes near to a fine solution from the same noise; the search is
    evolution. Every score is kept beside the result, as .jsonl: the same command goes on where it
    was stopped, and a higher --budget goes on from a lower. Use the schedule by jaxgen sample DIR
    --schedule FILE.

    For example:

      jaxgen search runs/digits-vp --nfe 5
      jaxgen search runs/digits-vp --nfe 8 --budget 600 --samples 128
    """

    dir: tyro.conf.Positional[Path]
    """The run's folder."""
    nfe: int = 5
    """Evaluations of the network for a sample."""
    budget: int = 300
    """Schedules to score, 40 plain solvers to start from among them."""
    samples: int = 64
    """Samples for a score; twice as many, of fresh noise, at the end."""
    seed: int = 0
    """Of the search and of the noise."""
    analytic: bool = False
    """Let the first output be zero or the data's mean in place of an evaluation."""
    guided: bool = False
    """After 150 scores, let a network that learns to rank schedules choose what to score; it takes
    its time and was no better on the runs tried, so it is for costlier networks."""
    out: Path | None = None
    """The schedule (.json); by default DIR/schedule-nfe<NFE>.json."""


def run(words: Sequence[str]) -> int:
    """Carry out ``jaxgen search``."""
    args = parse(Search, words, prog=PROG)
    check_run(args.dir)
    out = check_out(args.out or args.dir / f"schedule-nfe{args.nfe}.json", (".json",))
    if min(args.nfe, args.budget) < 1 or args.samples < 2 or args.seed < 0:
        raise CommandError(
            "give --nfe and --budget of at least 1, --samples of at least 2, --seed >= 0"
        )

    import jax

    from jaxgen.solve import SearchConfig, save_schedule
    from jaxgen.train.recipes.run import open_run
    from jaxgen.train.recipes.schedules import find_schedule

    trained = open_run(args.dir)
    archive = out.with_suffix(".jsonl")
    with explained():
        found = find_schedule(
            jax.random.key(args.seed),
            trained.experiment,
            trained.params,
            args.nfe,
            config=SearchConfig(budget=args.budget, guided_after=150 if args.guided else None),
            samples=args.samples,
            analytic=args.analytic,
            archive=archive,
            made_for=f"step {trained.step}",
        )
        plain = dict(sorted(found.plain.items(), key=lambda item: item[1]))
        save_schedule(
            out,
            found.result.best,
            sde=trained.experiment.sde,
            notes={
                "step": trained.step,
                "seed": args.seed,
                "scored": len(found.result.archive),
                "fresh_samples": found.fresh,
                "fresh_rmse": found.score,
                "fresh_rmse_of_plain_solvers": plain,
            },
        )
    print(_table(found, args.nfe))
    best = next(iter(plain.values()))
    print(
        f"{out}: {found.score / best:.2f} of the best plain solver's distance, on {found.fresh} "
        f"samples of fresh noise; {len(found.result.archive)} schedules scored ({archive}), of "
        f"step {trained.step} (averaged parameters)"
    )
    return 0


# Plain solvers that the table shows beside the named ones.
_SHOWN = 3
_NAMED = ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc")


def _table(found: Any, nfe: int) -> str:
    """Distances on fresh noise: the schedule, the best plain solvers, the named ones."""
    ranked = sorted(found.plain.items(), key=lambda item: item[1])
    shown = [item for item in ranked if item[0] not in _NAMED][:_SHOWN]
    rows = [("searched schedule", found.score), *shown]
    rows += [item for item in ranked if item[0] in _NAMED]
    width = max(len(name) for name, _ in rows)
    lines = [f"{nfe} evaluations: distance to a fine solution from the same noise, data units"]
    lines += [f"  {name:<{width}}  {score:.4g}" for name, score in sorted(rows, key=lambda r: r[1])]
    return "\n".join(lines)
