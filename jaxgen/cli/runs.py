"""What the commands on a trained run share: the folder, the solver, where a result is written."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.cli.errors import CommandError

__all__ = [
    "WITH_STATISTICS",
    "check_out",
    "check_run",
    "check_solver",
    "check_text_solver",
    "explained",
    "is_distilled",
    "named_solver",
    "stored_process",
    "write_npz",
]

# The solver that needs statistics of the run.
WITH_STATISTICS = "dpmv3"


def check_run(folder: Path, *, one_step: bool = False) -> None:
    """Refuse a folder that holds no run, or a distilled one unless ``one_step``.

    Raises:
      CommandError: how to make one.
    """
    if not (folder / "config.yaml").is_file():
        raise CommandError(
            f"{folder} holds no run (no config.yaml); make one by jaxgen train --out {folder}"
        )
    if is_distilled(folder) and not one_step:
        raise CommandError(
            f"{folder} holds a one-step generator, which is no flow any more: jaxgen sample draws "
            "from it, its metrics.json has its figures; give the run that it was made from"
        )


def is_distilled(folder: Path) -> bool:
    """Whether a folder holds what ``jaxgen distill`` made."""
    from jaxgen.train.recipes import distill

    return distill.is_distilled(folder)


def check_solver(name: str, steps: int | None, *, more: tuple[str, ...] = ()) -> None:
    """Refuse a solver that does not exist, and a number of steps that makes none.

    ``more`` are the names that ``named_solver`` knows beside those of ``solve.SOLVERS``.

    Raises:
      CommandError: which are there.
    """
    from jaxgen import solve

    names = (*solve.SOLVERS, *more)
    if name not in names:
        raise CommandError(f"solver {name!r} is unknown; choose one of {', '.join(names)}")
    if steps is not None and steps < 1:
        raise CommandError(f"--steps is {steps}; give at least 1")


def check_text_solver(name: str, steps: int | None) -> None:
    """Refuse a rule of sampling text that does not exist, and a number of steps that makes none.

    Raises:
      CommandError: which are there.
    """
    from jaxgen.process.absorbing import METHODS

    if name not in METHODS:
        raise CommandError(f"solver {name!r} is not for text; choose one of {', '.join(METHODS)}")
    if steps is not None and steps < 1:
        raise CommandError(f"--steps is {steps}; give at least 1")


def stored_process(folder: Path) -> str:
    """The process of the run in a folder; a run on text is ``"absorbing"``."""
    from jaxgen.train.recipes.config import ScoreConfig, read_yaml

    return read_yaml(folder / "config.yaml", ScoreConfig()).process


def named_solver(name: str, trained: Any, **options: Any) -> Any:
    """What ``solve.sample`` takes for a name; for ``dpmv3``, with the run's own statistics.

    Those are estimated where the run has none yet, and kept in its folder. ``options`` are those of
    ``statistics_of_run``.
    """
    if name != WITH_STATISTICS:
        return name
    import jax

    from jaxgen import solve
    from jaxgen.train.recipes.statistics import statistics_of_run

    return solve.dpmv3(statistics_of_run(jax.random.key(0), trained, progress=True, **options))


def check_out(path: Path, suffixes: tuple[str, ...]) -> Path:
    """The file to write, refused before any work if it cannot be.

    Raises:
      CommandError: another suffix, or no folder to put it in.
    """
    if path.suffix not in suffixes:
        raise CommandError(f"--out {path} should end in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise CommandError(f"--out {path}: there is no folder {path.parent}; make it first")
    return path


@contextmanager
def explained() -> Iterator[None]:
    """A solver that does not suit the process, say, is the caller's mistake, not a fault."""
    try:
        yield
    except ValueError as error:
        raise CommandError(str(error)) from error


def write_npz(path: Path, **arrays: Any) -> None:
    """Write arrays by rename, so that no half file is left where a disk is full."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
