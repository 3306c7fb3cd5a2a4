r"""Where a sampler stops on its way: named grids of falling times, and grids that a user gives.

From a start s (noise) to an end e (data) in N intervals, n = 0 .. N:

| name      | equally spaced in                                                                  |
|-----------|------------------------------------------------------------------------------------|
| time      | t                                                                                  |
| log_snr   | log(alpha^2 / sigma^2) (Lu et al., arXiv 2206.00927)                               |
| karras    | (sigma / alpha)^(1/rho), rho = 7 (Karras et al., arXiv 2206.00364, equation (5))   |

Where an end is proper (alpha = 0 at the start, sigma = 0 at the end) the last two place their
knots between ``t_max`` and ``t_min`` and add the end itself, as EDM does with sigma = 0. The
published ``"score_sde"`` grid belongs to the predictor-corrector loop.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgen.core import checks
from jaxgen.core.arrays import at_least_f32
from jaxgen.process.linear import LinearSDE

__all__ = ["GRIDS", "finite_ends", "make_grid"]

_RHO = 7.0


def _levels(
    sde: LinearSDE,
    steps: int,
    start: jax.Array,
    end: jax.Array,
    warp: Callable[[jax.Array], jax.Array],
    unwarp: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Knots equally spaced in ``warp(log_snr)``, with proper ends added."""
    first, last = sde.log_snr(start), sde.log_snr(end)
    opens, closes = jnp.isneginf(first), jnp.isposinf(last)
    first = jnp.where(opens, sde.log_snr(sde.t_max), first)
    last = jnp.where(closes, sde.log_snr(sde.t_min), last)
    n = jnp.arange(steps + 1, dtype=first.dtype).reshape((-1,) + (1,) * first.ndim)
    inner = jnp.maximum(steps - opens.astype(n.dtype) - closes.astype(n.dtype), 1)
    share = jnp.clip((n - opens.astype(n.dtype)[None]) / inner[None], 0, 1)
    high, low = warp(first)[None], warp(last)[None]
    return sde.inverse_log_snr(unwarp(high + share * (low - high)))


def _time(sde: LinearSDE, steps: int, start: jax.Array, end: jax.Array) -> jax.Array:
    del sde
    return jnp.linspace(start, end, steps + 1)


def _log_snr(sde: LinearSDE, steps: int, start: jax.Array, end: jax.Array) -> jax.Array:
    return _levels(sde, steps, start, end, lambda v: v, lambda v: v)


def _karras(sde: LinearSDE, steps: int, start: jax.Array, end: jax.Array) -> jax.Array:
    return _levels(
        sde,
        steps,
        start,
        end,
        lambda v: jnp.exp(-0.5 * v / _RHO),
        lambda v: -2 * _RHO * jnp.log(v),
    )


GRIDS: dict[str, Callable[[LinearSDE, int, jax.Array, jax.Array], jax.Array]] = {
    "time": _time,
    "log_snr": _log_snr,
    "karras": _karras,
}


def _in_range(sde: LinearSDE, times: np.ndarray, *, is_end: bool) -> np.ndarray:
    """Which times a process knows; the proper ends only where asked. All if bounds are traced."""
    low, high = checks.concrete(sde.t_min), checks.concrete(sde.t_max)
    if low is None or high is None:
        return np.ones(times.shape, bool)
    slack = 1e-6 * (high - low)
    ok = (times >= low - slack) & (times <= high + slack)
    if is_end and sde.ends is not None:
        ok |= (times == sde.ends[0]) | (times == sde.ends[1])
    return ok


def _check_end(name: str, value: Any, sde: LinearSDE, batch: tuple[int, ...], dtype: Any) -> Any:
    known = checks.concrete(value)
    shape = jnp.shape(value)
    if shape not in ((), batch):
        raise ValueError(f"{name} has shape {shape}; expected () or {batch}")
    if known is not None and not _in_range(sde, known, is_end=True).all():
        raise ValueError(f"{name} is {known}; expected times in {_range(sde)}")
    return jnp.asarray(value, dtype)


def _range(sde: LinearSDE) -> str:
    ends = "" if sde.ends is None else f", a proper end {sde.ends} at either end"
    return f"[{sde.t_min}, {sde.t_max}]{ends}"


def _given(sde: LinearSDE, grid: ArrayLike, steps: int | None, dtype: Any) -> jax.Array:
    known = checks.concrete(grid)
    shape = jnp.shape(grid if known is None else known)
    if len(shape) != 1 or shape[0] < 2:
        raise ValueError(f"grid has shape {shape}; expected (steps + 1,) falling times")
    if steps is not None and shape[0] != steps + 1:
        raise ValueError(
            f"grid has {shape[0]} times for {steps} steps; expected {steps + 1} times, or "
            "steps=None"
        )
    times = jnp.asarray(grid, dtype)
    if known is not None:
        if not (np.diff(known) < 0).all():
            raise ValueError(f"grid is {known}; expected strictly falling times")
        inner = _in_range(sde, known[1:-1], is_end=False)
        outer = _in_range(sde, known[[0, -1]], is_end=True)
        if not (inner.all() and outer.all()):
            raise ValueError(f"grid is {known}; expected times in {_range(sde)}")
        return times
    falls = jnp.all(jnp.diff(times) < 0)
    checks.debug_check(falls, "grid does not fall: {times}", times=times)
    return jnp.where(falls, times, jnp.nan)


def _ends(sde: LinearSDE, t_start: Any, t_end: Any) -> tuple[Any, Any]:
    return (sde.t_max if t_start is None else t_start), (sde.t_end if t_end is None else t_end)


@jax.jit
def _finite(sde: LinearSDE, t_start: jax.Array, t_end: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.isfinite(sde.log_snr(t_start)), jnp.isfinite(sde.log_snr(t_end))


def finite_ends(
    sde: LinearSDE,
    grid: str | ArrayLike,
    t_start: ArrayLike | None = None,
    t_end: ArrayLike | None = None,
) -> tuple[bool | None, bool | None]:
    """Whether log-SNR is finite at a grid's start and end; ``None`` where that is not known.

    A start that is finite for some samples only is not known.
    """
    if not isinstance(grid, str):
        known = checks.concrete(grid)
        if known is None:
            return None, None
        t_start, t_end = known[0], known[-1]
    known_start, known_end = (checks.concrete(t) for t in _ends(sde, t_start, t_end))
    plain = dataclasses.replace(sde, mu=None)
    is_traced = any(checks.concrete(v) is None for v in jax.tree.leaves(plain))
    if known_start is None or known_end is None or is_traced:
        return None, None
    with jax.ensure_compile_time_eval():
        first, last = (np.asarray(v) for v in _finite(plain, known_start, known_end))
    return (bool(first.all()) if first.all() or not first.any() else None), bool(last)


def make_grid(
    grid: str | ArrayLike,
    sde: LinearSDE,
    steps: int | None,
    *,
    t_start: ArrayLike | None = None,
    t_end: ArrayLike | None = None,
    batch: tuple[int, ...] = (),
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Falling times from noise to data.

    Args:
      grid: a name of ``GRIDS``, or ``(steps + 1,)`` strictly falling times, of which only the
        first and the last may be a proper end of the process.
      sde: the process.
      steps: number of intervals; for an array it may be ``None``.
      t_start: first time, ``t_max`` if ``None``; ``()``, or per sample ``(batch,)``.
      t_end: last time, the process' ``t_end`` if ``None``; ``()``.
      batch: the batch's shape.
      dtype: of the times; float32 or wider.

    Returns:
      ``(steps + 1,)``, or ``(steps + 1, batch)`` where ``t_start`` is per sample. The ends are
      exact.

    Raises:
      ValueError: an unknown name; ``t_start`` or ``t_end`` beside an array; times that do not
        fall or are out of range, where they are known. Traced ones give NaN, and an error under
        ``checkify``.
    """
    dtype = at_least_f32(dtype)
    if not isinstance(grid, str):
        if t_start is not None or t_end is not None:
            raise ValueError("t_start and t_end go with a named grid; this grid is an array")
        return _given(sde, grid, steps, dtype)
    checks.one_of("grid", grid, GRIDS)
    steps = checks.positive_int("steps", steps)
    raw_start, raw_end = _ends(sde, t_start, t_end)
    start = _check_end("t_start", raw_start, sde, batch, dtype)
    end = _check_end("t_end", raw_end, sde, (), dtype)
    known_start, known_end = checks.concrete(raw_start), checks.concrete(raw_end)
    if known_start is not None and known_end is not None and not (known_start > known_end).all():
        raise ValueError(
            f"t_start is {known_start} and t_end {known_end}; expected t_start > t_end"
        )
    falls = start > end
    checks.debug_check(jnp.all(falls), "t_start {s} is not after t_end {e}", s=start, e=end)
    start = jnp.where(falls, start, jnp.nan)
    end = jnp.broadcast_to(end, start.shape)
    times = GRIDS[grid](sde, steps, start, end).astype(dtype)
    return times.at[0].set(start).at[-1].set(end)
