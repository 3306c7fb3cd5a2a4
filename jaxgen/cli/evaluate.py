"""``jaxgen evaluate``: the figures of a trained run, anew."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from jaxgen.cli.errors import CommandError
from jaxgen.cli.flags import parse
from jaxgen.cli.report import figures_text
from jaxgen.cli.runs import (
    check_run,
    check_solver,
    check_text_solver,
    explained,
    stored_process,
)

__all__ = ["run"]

PROG = "jaxgen evaluate"


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Measure a trained run again, and write its metrics.json and samples anew.

    For example:

      jaxgen evaluate runs/digits-vp
      jaxgen evaluate runs/digits-vp --n 700 --likelihood 256 --solver ddim --steps 50
    """

    dir: tyro.conf.Positional[Path]
    """The run's folder."""
    n: int | None = None
    """Samples to judge; by default as in training."""
    likelihood: int | None = None
    """Held-out examples whose likelihood is measured; by default as in training."""
    solver: str | None = None
    """Solver of the samples; by default as in training."""
    steps: int | None = None
    """Its steps; by default as in training, or the solver's own if one is given."""


def run(words: Sequence[str]) -> int:
    """Carry out ``jaxgen evaluate``."""
    args = parse(Evaluate, words, prog=PROG)
    check_run(args.dir)
    is_text = stored_process(args.dir) == "absorbing"
    if is_text:
        check_text_solver(args.solver or "tweedie", args.steps)
    elif args.solver is not None or args.steps is not None:
        check_solver(args.solver or "heun", args.steps)
    if (args.n is not None and args.n < 2) or (args.likelihood is not None and args.likelihood < 1):
        raise CommandError("give --n of at least 2 and --likelihood of at least 1")

    from jaxgen import solve
    from jaxgen.train.recipes.run import measure, open_run, open_text_run

    trained = open_text_run(args.dir, text=True) if is_text else open_run(args.dir)
    steps = args.steps
    if steps is None and args.solver is not None and not is_text:
        steps = solve.SOLVERS[args.solver].steps
    changes = {
        "eval_samples": args.n,
        "eval_likelihood": args.likelihood,
        "solver": args.solver,
        "solver_steps": steps,
    }
    experiment = trained.experiment
    given: dict[str, Any] = {name: v for name, v in changes.items() if v is not None}
    config = dataclasses.replace(experiment.config, **given)
    experiment = dataclasses.replace(experiment, config=config)
    with explained():
        figures, _ = measure(
            trained._replace(experiment=experiment), say=lambda line: print(line, file=sys.stderr)
        )
    print(figures_text(figures))
    return 0
