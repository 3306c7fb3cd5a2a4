"""The named solvers: what makes one, on which grid, with how many steps, in which loop.

A new solver is a file with a class and a row here.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import diffrax

from jaxgen.core import checks
from jaxgen.solve.ddim import DDIM
from jaxgen.solve.euler_maruyama import EulerMaruyama
from jaxgen.solve.euler_time import EulerTime
from jaxgen.solve.heun import Heun
from jaxgen.solve.heun_time import HeunTime
from jaxgen.solve.multistep import deis, dpm, dpmpp, unipc
from jaxgen.solve.semilinear import GridSolver
from jaxgen.solve.singlestep import dpm_2, dpm_3, dpmpp_2s

__all__ = ["SOLVERS", "Entry", "resolve"]


class Entry(NamedTuple):
    """A solver as ``sample`` uses it.

    Attributes:
      make: makes the solver object; ``None`` for an indexed kernel, which only the
        predictor-corrector loop runs.
      grid: default grid.
      steps: default number of steps.
    """

    make: Callable[[], diffrax.AbstractSolver] | None
    grid: str
    steps: int


SOLVERS: dict[str, Entry] = {
    "euler_maruyama": Entry(EulerMaruyama, "time", 20),
    "reverse_diffusion": Entry(None, "time", 1000),
    "ancestral": Entry(None, "time", 1000),
    "ddim": Entry(DDIM, "log_snr", 20),
    "euler_time": Entry(EulerTime, "time", 20),
    "heun_time": Entry(HeunTime, "time", 20),
    "heun": Entry(Heun, "karras", 20),
    "dpm_2": Entry(dpm_2, "log_snr", 20),
    "dpm_3": Entry(dpm_3, "log_snr", 20),
    "dpmpp_2s": Entry(dpmpp_2s, "log_snr", 20),
    "dpm_2m": Entry(functools.partial(dpm, 2), "log_snr", 20),
    "dpm_3m": Entry(functools.partial(dpm, 3), "log_snr", 20),
    "dpmpp_2m": Entry(functools.partial(dpmpp, 2), "log_snr", 20),
    "dpmpp_3m": Entry(functools.partial(dpmpp, 3), "log_snr", 20),
    "dpmpp_2m_sde": Entry(functools.partial(dpmpp, 2, eta=1.0), "log_snr", 20),
    "dpmpp_3m_sde": Entry(functools.partial(dpmpp, 3, eta=1.0), "log_snr", 20),
    "unipc": Entry(unipc, "log_snr", 20),
    "deis": Entry(deis, "log_snr", 20),
}


def resolve(solver: Any) -> tuple[str, Entry, diffrax.AbstractSolver | None]:
    """The name, row and object of a solver given by name or as a diffrax solver.

    An object of a named class has that row's defaults; another solver on a ``SemiLinearTerm`` has
    the grid ``"log_snr"``, any other ``"time"``. The object is ``None`` for an indexed kernel.

    Raises:
      ValueError: an unknown name.
      TypeError: neither a name nor a diffrax solver.
    """
    if isinstance(solver, str):
        if solver == "dpmv3":
            raise ValueError(
                'solver "dpmv3" needs statistics of the model; pass solve.dpmv3(statistics), with '
                "statistics from solve.estimate_statistics"
            )
        checks.one_of("solver", solver, SOLVERS)
        entry = SOLVERS[solver]
        return solver, entry, None if entry.make is None else entry.make()
    if not isinstance(solver, diffrax.AbstractSolver):
        raise TypeError(
            f"solver is {solver!r}; expected a diffrax solver object or one of {', '.join(SOLVERS)}"
        )
    for name, entry in SOLVERS.items():
        if entry.make is type(solver):
            return name, entry, solver
    is_ours = isinstance(solver, GridSolver)
    # HalfSolver passes isinstance for the solver it wraps, and has its own name.
    name = cast(GridSolver, solver).name if issubclass(type(solver), GridSolver) else ""
    name = name or type(solver).__name__
    return name, Entry(lambda: solver, "log_snr" if is_ours else "time", 20), solver
