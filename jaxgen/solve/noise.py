"""The Brownian path that a solver gets: ours on a grid, diffrax's tree, or the caller's own."""

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import checks, keys
from jaxgen.solve.path import AHEAD, GridPath, fold_each
from jaxgen.solve.semilinear import GridSolver

__all__ = [
    "Brownian",
    "draws_ahead",
    "is_sde_solver",
    "needs_noise",
    "sample_keys",
    "sample_path",
]

Brownian = str | Callable[..., diffrax.AbstractBrownianPath] | None

# Resolution of a tree as a share of its interval.
_TREE_TOLERANCE = 2**-14


def is_sde_solver(solver: diffrax.AbstractSolver) -> bool:
    """Whether a diffrax solver is for SDEs (of Ito's or Stratonovich's kind)."""
    return isinstance(solver, diffrax.AbstractItoSolver | diffrax.AbstractStratonovichSolver)


def sample_keys(key: jax.Array, batch: tuple[int, ...], first_index: ArrayLike) -> jax.Array:
    """``fold_in(key, first_index + i)`` for the samples of a batch; the key itself without one."""
    if not batch:
        return key
    first = jnp.asarray(first_index, jnp.int32) + keys.first_index(batch[0])
    index = first + jnp.arange(batch[0], dtype=jnp.int32)
    return fold_each(key, index)


def needs_noise(solver: diffrax.AbstractSolver) -> bool:
    """Whether ``sample`` draws noise for a solver's steps."""
    if isinstance(solver, GridSolver):
        inner: Any = solver
        while not issubclass(type(inner), GridSolver):
            inner = inner.solver
        return inner.is_noisy
    return is_sde_solver(solver)


def _levy_area(solver: diffrax.AbstractSolver) -> Any:
    needed = getattr(solver, "minimal_levy_area", diffrax.AbstractBrownianIncrement)
    for kind in (
        diffrax.BrownianIncrement,
        diffrax.SpaceTimeLevyArea,
        diffrax.SpaceTimeTimeLevyArea,
    ):
        if issubclass(kind, needed):
            return kind
    raise ValueError(f"solver {type(solver).__name__} needs the Levy area {needed}; there is none")


def draws_ahead(solver: diffrax.AbstractSolver, steps: int, size: int) -> int:
    """Increments that the scan driver's path may draw together with a first state of ``size``.

    One draw for both compiles in half the time of two.
    """
    is_plain = needs_noise(solver) and _levy_area(solver) is diffrax.BrownianIncrement
    return steps if is_plain and 0 < steps * size <= AHEAD else 0


def sample_path(
    solver: diffrax.AbstractSolver,
    key: jax.Array,
    event: tuple[int, ...],
    x: jax.Array,
    steps: int,
    times: jax.Array | None = None,
    brownian: Brownian = None,
    controller: diffrax.AbstractStepSizeController | None = None,
    drawn: jax.Array | None = None,
) -> diffrax.AbstractBrownianPath | None:
    """The path for a solver, ``None`` where it draws no noise.

    Args:
      solver: whose noise it is.
      key: one key per sample, or one key.
      event: shape of a sample.
      x: the state, for its dtype.
      steps: intervals of the grid.
      times: rising times of the grid; ``None`` for progress in [0, 1].
      brownian: see ``sample``.
      controller: see ``sample``.
      drawn: normals of the grid's increments, where they are known (``draws_ahead``).

    Raises:
      ValueError: an unknown name; ``"grid"`` where steps do not keep to the grid.
    """
    if brownian is not None and not callable(brownian):
        checks.one_of("brownian", brownian, ("grid", "tree"))
    if not needs_noise(solver):
        return None
    keeps_grid = controller is None and not isinstance(solver, diffrax.HalfSolver)
    if brownian is None:
        brownian = "grid" if keeps_grid else "tree"
    levy_area = _levy_area(solver)
    if brownian == "grid":
        if not keeps_grid:
            raise ValueError(
                'brownian is "grid", which knows whole intervals only; expected "tree" for a '
                "controller or a HalfSolver"
            )
        return GridPath(key, event, x.dtype, steps, times, levy_area=levy_area, drawn=drawn)
    t0, t1 = (0.0, 1.0) if times is None else (times[0], times[-1])
    shape = jax.ShapeDtypeStruct(event, x.dtype)
    if callable(brownian):
        return brownian(key, shape, t0, t1)
    tolerance = (t1 - t0) * _TREE_TOLERANCE
    return diffrax.VirtualBrownianTree(t0, t1, tolerance, shape, key, levy_area=levy_area)
