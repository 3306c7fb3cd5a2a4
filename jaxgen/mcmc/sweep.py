r"""One sweep of denoising Langevin Gibbs, in the coordinates x/alpha; see ``denoising_gibbs``.

The state of a process with marginals mu + alpha (x0 - mu) + sigma n is held as

    mu + (x_t - mu)/alpha = x0 + s n,      s = sigma/alpha                                  (1)

and its score is -n/s for the predicted noise n, whatever the process.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgen.core import checks
from jaxgen.core.arrays import at_least_f32, cast_coefficient
from jaxgen.process.linear import LinearSDE
from jaxgen.score.levels import check_levels
from jaxgen.score.prediction import PREDICTIONS, Field, convert
from jaxgen.solve.path import fold_each, normals
from jaxgen.solve.terms import FieldCall

__all__ = [
    "SCALINGS",
    "SELECTS",
    "GibbsState",
    "LevelLogits",
    "Sweeper",
    "check_state",
    "check_step_size",
    "level_of",
    "predict",
    "rescale",
    "sweeper",
    "time_of",
]

LevelLogits = Callable[[jax.Array], jax.Array]

SELECTS = ("sample", "argmax")
SCALINGS = ("fixed", "relative")

# Rounding allowed where levels meet the ends of a process.
_SLACK = 1e-4


class GibbsState(NamedTuple):
    """Where the chains are.

    Attributes:
      x: ``(chains, *event)`` or one chain's ``(*event,)``, in x/alpha (module docstring).
      level: index of the level, int32, ``(chains,)`` or ``()``; the number of levels, out of
        range, where none could be drawn. It then makes the next state NaN.
    """

    x: jax.Array
    level: jax.Array


# --- coordinates ----------------------------------------------------------------------------------


def level_of(sde: LinearSDE, t: ArrayLike) -> jax.Array:
    """``sigma/alpha`` at a time."""
    return jnp.exp(-0.5 * sde.log_snr(t))


def time_of(sde: LinearSDE, sigma: jax.Array) -> jax.Array:
    """The time at which ``sigma/alpha`` has this value; NaN out of the process' range."""
    return sde.inverse_log_snr(-2 * jnp.log(sigma))


def rescale(sde: LinearSDE, x: jax.Array, factor: jax.Array) -> jax.Array:
    """``mu + factor (x - mu)``, like ``x``."""
    mu = sde.centre(x)
    factor = cast_coefficient(factor, x)
    return factor * x if mu is None else (mu + factor * (x - mu)).astype(x.dtype)


def predict(
    call: FieldCall,
    sde: LinearSDE,
    prediction: str,
    x: jax.Array,
    t: jax.Array,
    target: str = "noise",
) -> jax.Array:
    """One call of the field at a state in x/alpha, its output turned into ``target``."""
    x_t = rescale(sde, x, sde.alpha(t))
    return convert(call(x_t, t), x_t, t, sde, prediction, target)


# --- the sweep ------------------------------------------------------------------------------------


class Sweeper(NamedTuple):
    """What a sweep needs, checked; see ``denoising_gibbs.step``.

    Attributes:
      call: the field.
      sde: its process.
      prediction: what it predicts.
      level_logits: classifier of the levels.
      levels: ``(n,)``, falling.
      times: the process' times of the levels, ``(n,)``.
      log_prior: of the levels, ``(n,)``.
      select: one of ``SELECTS``.
      scaling: one of ``SCALINGS``.
    """

    call: FieldCall
    sde: LinearSDE
    prediction: str
    level_logits: LevelLogits
    levels: jax.Array
    times: jax.Array
    log_prior: jax.Array
    select: str
    scaling: str

    @property
    def n(self) -> int:
        """Number of levels."""
        return self.levels.shape[0]

    def at(self, values: jax.Array, level: jax.Array) -> jax.Array:
        """The levels' own of ``values``; NaN for an index out of range."""
        return values.at[level].get(mode="fill", fill_value=jnp.nan)

    def draw_level(self, key: jax.Array, x: jax.Array) -> jax.Array:
        """A level's index for each chain, int32, with a key per chain."""
        logits = jnp.asarray(self.level_logits(x))
        shape = (*key.shape, self.n)
        if logits.shape != shape:
            raise ValueError(
                f"level_logits(x) returned shape {logits.shape} for x of shape {x.shape} and "
                f"{self.n} levels; expected {shape}"
            )
        joint = logits.astype(at_least_f32(logits.dtype))
        joint = joint + jnp.broadcast_to(self.log_prior.astype(joint.dtype), shape)
        is_known = jnp.isfinite(jnp.max(joint, axis=-1))
        if self.select == "sample":  # the largest of logits with Gumbel noise is a draw
            draw = jax.vmap(lambda k: jax.random.gumbel(k, (self.n,), joint.dtype))
            joint = joint + draw(key.reshape(-1)).reshape(shape)
        return jnp.where(is_known, jnp.argmax(joint, axis=-1), self.n).astype(jnp.int32)

    def __call__(self, key: jax.Array, state: GibbsState, step_size: jax.Array) -> GibbsState:
        """One sweep, with a key per chain; the state keeps its dtype."""
        key_noise, key_level = fold_each(key, jnp.arange(2))
        x = state.x.astype(at_least_f32(state.x.dtype))
        sigma, t = self.at(self.levels, state.level), self.at(self.times, state.level)
        score = -predict(self.call, self.sde, self.prediction, x, t) / cast_coefficient(sigma, x)
        eta = cast_coefficient(step_size * (sigma**2 if self.scaling == "relative" else 1), x)
        noise = normals(key_noise, x.shape[key.ndim :], x.dtype)
        x = (x + 0.5 * eta * score + jnp.sqrt(eta) * noise).astype(state.x.dtype)
        return GibbsState(x, self.draw_level(key_level, x))


def sweeper(
    field: Field,
    sde: LinearSDE,
    level_logits: LevelLogits,
    levels: ArrayLike,
    event_ndim: int | None,
    *,
    prediction: str = "noise",
    select: str = "sample",
    scaling: str = "fixed",
    log_prior: ArrayLike | None = None,
    sigma_cap: ArrayLike | None = None,
) -> Sweeper:
    """Check what every sweep takes; see ``denoising_gibbs.step``."""
    checks.one_of("prediction", prediction, PREDICTIONS)
    checks.one_of("select", select, SELECTS)
    checks.one_of("scaling", scaling, SCALINGS)
    if not callable(level_logits):
        raise TypeError(f"level_logits is {level_logits!r}; expected a function of the states")
    grid = _known_to(sde, check_levels(levels))
    prior = jnp.zeros_like(grid)
    if log_prior is not None:
        prior = jnp.asarray(log_prior, grid.dtype)
        if prior.shape != grid.shape:
            raise ValueError(f"log_prior has shape {prior.shape}; expected {grid.shape}, as levels")
    if sigma_cap is not None:
        cap, lowest = checks.concrete(sigma_cap), checks.concrete(grid[-1])
        if cap is not None and lowest is not None and not cap >= lowest:
            raise ValueError(
                f"sigma_cap is {sigma_cap}; expected at least the lowest level, {lowest:.4g}"
            )
        prior = jnp.where(grid <= sigma_cap, prior, -jnp.inf)
    call = FieldCall(field, event_ndim)
    times = time_of(sde, grid)
    return Sweeper(call, sde, prediction, level_logits, grid, times, prior, select, scaling)


def _known_to(sde: LinearSDE, levels: jax.Array) -> jax.Array:
    """Levels that the process knows; its ends, but for rounding, are its ends."""
    low, high = level_of(sde, sde.t_min), level_of(sde, sde.t_max)
    grid, bottom, top = (checks.concrete(v) for v in (levels, low, high))
    if grid is None or bottom is None or top is None:
        return levels
    if not (grid[-1] >= bottom * (1 - _SLACK) and grid[0] <= top * (1 + _SLACK)):
        raise ValueError(
            f"levels run from {grid[0]:.6g} to {grid[-1]:.6g}; expected values of sigma/alpha "
            f"that the process knows, in [{bottom:.6g}, {top:.6g}]"
        )
    return jnp.clip(levels, low, high)


def check_step_size(name: str, value: ArrayLike) -> jax.Array:
    """A positive number, float32 or wider; a traced one that is not positive gives NaN."""
    known = checks.concrete(value)
    if jnp.shape(value) != ():
        raise ValueError(f"{name} has shape {jnp.shape(value)}; expected a number")
    if known is not None and not (known > 0 and np.isfinite(known)):
        raise ValueError(f"{name} is {value}; expected a positive number")
    array = jnp.asarray(value)
    array = array.astype(at_least_f32(array.dtype))
    checks.debug_check(array > 0, "the step size is not positive: {v}", v=array)
    return jnp.where(array > 0, array, jnp.nan)


def check_state(state: Any, n: int) -> GibbsState:
    """A state of chains with ``n`` levels; the index ``n``, out of range, marks a lost chain."""
    x, level = checks.floating("state.x", state.x), jnp.asarray(state.level)
    if not jnp.issubdtype(level.dtype, jnp.integer):
        raise TypeError(f"state.level has dtype {level.dtype}; expected integers")
    if level.ndim > 1 or x.shape[: level.ndim] != level.shape:
        raise ValueError(
            f"state.level has shape {level.shape} and state.x {x.shape}; expected (chains,) and "
            "(chains, *event), or () and the event"
        )
    known = checks.concrete(state.level)
    if known is not None and known.size and not (known.min() >= 0 and known.max() <= n):
        raise ValueError(f"state.level is {known}; expected indices of {n} levels, in [0, {n})")
    is_inside = (level >= 0) & (level < n)
    checks.debug_check(jnp.all(is_inside), "level out of range: {level}", level=level)
    return GibbsState(x, jnp.where(is_inside, level, n).astype(jnp.int32))
