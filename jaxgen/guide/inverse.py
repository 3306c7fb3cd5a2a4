r"""Inverse problems y = f(x) + noise with a trained field as the prior: what every method shares.

Noise levels are those of a LinearSDE, x_t = alpha x0 + sigma z about its anchor. The ``"ddpm"``
grid is the published one: of 1000 times (those of ``process.discretize``; for ``discrete_betas``
the integers) every (1000/steps)-th from the first on. The samplers go down from level to level, and
from the lowest to the data itself (alpha 1, sigma 0), by DDIM with a noise share eta (Song et al.,
arXiv 2010.02502, (12), (16)), about their own estimate of the data.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import at_least_f32, batch_event, real_dtype, safe_sqrt, varying_zeros
from jaxgen.process.linear import LinearSDE
from jaxgen.score.prediction import PREDICTIONS, Field, convert
from jaxgen.solve.meter import Ticker
from jaxgen.solve.terms import FieldCall

__all__ = ["GRIDS", "Level", "Problem", "Restored", "ddim_step", "pose", "run_levels", "times_of"]

GRIDS = ("ddpm", "time", "log_snr")

_DDPM = 1000


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Restored:
    """What an inverse method found.

    Attributes:
      x: restored events ``(batch, *event)``, or one.
      nfe: evaluations of the field, int32 ``()``; one that is differentiated counts once.
      residual: root mean square of ``y - operator(x)`` over the measurement's entries, ``(batch,)``
        or ``()``.
      losses: the objective at each step, ``(steps, batch)`` or ``(steps,)``; ``None`` but for
        ``red_diff``.
      method: its name (static).
      steps: noise levels (static).
    """

    x: jax.Array
    nfe: jax.Array
    residual: jax.Array
    losses: jax.Array | None
    method: str = dataclasses.field(metadata={"static": True})
    steps: int = dataclasses.field(metadata={"static": True})


# --- the problem --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A measurement, its operator and the prior, checked; made by ``pose``.

    Attributes:
      keys: one for each example, ``(batch,)`` or ``()``.
      field: takes the state in float32 or wider.
      sde: the process.
      y: the measurement, without what the operator does not look at.
      operator: of one event.
      prediction: what the field predicts.
      batch: ``(n,)`` or ``()``.
      event: shape of one event.
      dtype: of the result.
    """

    keys: jax.Array
    field: FieldCall
    sde: LinearSDE
    y: jax.Array
    operator: Callable[[jax.Array], jax.Array]
    prediction: str
    batch: tuple[int, ...]
    event: tuple[int, ...]
    dtype: Any

    @property
    def wide(self) -> np.dtype:
        """What the state is kept in."""
        return at_least_f32(self.dtype)

    def each(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function`` of each example."""
        return jax.vmap(function)(*args) if self.batch else function(*args)

    def misfit(self, x: jax.Array) -> jax.Array:
        """``y - operator(x)``."""
        return self.y - self.each(self.operator, x)

    def pinv(self, y: jax.Array, ridge: ArrayLike = 0.0) -> jax.Array:
        """The operator's (ridge) pseudo-inverse of each measurement."""
        operator: Any = self.operator
        return self.each(lambda v: operator.pinv(v, ridge), y).astype(self.wide)

    def denoise(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """``E[x0 | x_t = x]``, like ``x``: the one evaluation of a step."""
        return convert(self.field(x, t), x, t, self.sde, self.prediction, "data")

    def noise(self, n: ArrayLike) -> jax.Array:
        """Standard normal noise of the events, number ``n``."""

        def one(key: jax.Array) -> jax.Array:
            return jax.random.normal(jax.random.fold_in(key, n), self.event, self.wide)

        return self.each(one, self.keys)

    def varying(self, x: jax.Array) -> jax.Array:
        """``x`` to start a loop with: under ``shard_map`` as varied as the measurement."""
        return x + varying_zeros(x.shape, x.dtype, jnp.real(self.y))

    def finish(
        self, x: jax.Array, method: str, steps: int, calls: int, losses: jax.Array | None = None
    ) -> Restored:
        """The result of a method's last state."""
        square = jnp.abs(self.misfit(x)) ** 2
        axes = tuple(range(len(self.batch), square.ndim))
        residual = jnp.sqrt(jnp.mean(square.astype(at_least_f32(square.dtype)), axis=axes))
        return Restored(
            x.astype(self.dtype), jnp.asarray(calls, jnp.int32), residual, losses, method, steps
        )


def pose(
    key: jax.Array,
    field: Field,
    sde: LinearSDE,
    y: ArrayLike,
    operator: Callable[[jax.Array], jax.Array],
    *,
    prediction: str,
    event_ndim: int | None,
    like: ArrayLike | None,
    name: str,
) -> Problem:
    """Check what every method takes.

    Args:
      key: typed key; example ``i`` of a batch draws from ``fold_in(key, i)``.
      field: ``f(x, t) -> like x``.
      sde: the process.
      y: measurements ``(batch, *measurement)``, or one if ``event_ndim=y.ndim``.
      operator: one of ``guide.operators``, or a function of one event.
      prediction: what the field predicts.
      event_ndim: see ``y``.
      like: a state of the problem, ``None`` for what the operator's ``pinv`` gives.
      name: of the argument that ``like`` is.

    Raises:
      ValueError: the measurement does not fit the operator, ``like`` has another batch, an unknown
        prediction.
      TypeError: ``y`` or ``like`` is not floating, a raw key, an operator of no kind.
    """
    keys.check(key)
    checks.one_of("prediction", prediction, PREDICTIONS)
    given = checks.floating("y", y, allow_complex=True)
    checks.debug_check(jnp.all(jnp.isfinite(given)), "y holds NaN or infinity")
    batch, measurement = batch_event(given, event_ndim)
    if not callable(operator):
        raise TypeError(f"operator is {operator!r}; expected one of guide.operators or a function")
    one = jax.ShapeDtypeStruct(measurement, given.dtype)
    if like is not None:
        state = checks.floating(name, like)
        if state.shape[: len(batch)] != batch:
            raise ValueError(
                f"{name} has shape {state.shape} and y {given.shape}; expected one batch"
            )
        event, dtype = state.shape[len(batch) :], state.dtype
    else:
        if not hasattr(operator, "pinv"):
            raise TypeError(
                f"operator is {operator!r} without a pinv, by which the shape of x would be known; "
                f"give {name} too"
            )
        event, dtype = jax.eval_shape(operator.pinv, one).shape, real_dtype(given.dtype)
    wide = at_least_f32(dtype)
    measured = jax.eval_shape(operator, jax.ShapeDtypeStruct(event, wide)).shape
    if measured != measurement:
        raise ValueError(
            f"y has shape {given.shape}, each measurement {measurement}, and operator(x) of x of "
            f"shape {event} has shape {measured}; expected the same"
        )
    if hasattr(operator, "observed"):
        observe = operator.observed
        given = jax.vmap(observe)(given) if batch else observe(given)
    given = given.astype(jnp.promote_types(given.dtype, wide))
    own = keys.fold(key, batch[0]) if batch else key
    # One example has as many axes as its event, which tells the field's caller that it is one.
    call = FieldCall(field, None if batch else len(event), dtype if dtype != wide else None)
    return Problem(own, call, sde, given, operator, prediction, batch, event, dtype)


# --- noise levels -------------------------------------------------------------------------------


def times_of(sde: LinearSDE, steps: int, grid: str | ArrayLike) -> jax.Array:
    """The noise levels' times, rising, ``(steps,)``.

    Args:
      sde: the process.
      steps: how many.
      grid: ``"ddpm"`` (module docstring; the table's own times for ``discrete_betas``), ``"time"``
        or ``"log_snr"``, equally spaced in either from ``t_end`` to ``t_max`` (where a single step
        stands); or ``(steps,)`` times in falling order.

    Raises:
      ValueError: ``steps < 1``, an unknown grid, times of another shape, or on the ``"ddpm"`` grid
        a number of steps that does not divide that of its times (which the published range would
        silently exceed).
    """
    steps = checks.positive_int("steps", steps)
    if not isinstance(grid, str):
        times = jnp.asarray(grid)
        if times.shape != (steps,):
            raise ValueError(f"grid has shape {times.shape}; expected ({steps},) falling times")
        return times[::-1]
    checks.one_of("grid", grid, GRIDS)
    if grid == "ddpm":
        is_table = sde.kind == "discrete_betas"
        whole = sde.params[0].shape[0] - 1 if is_table else _DDPM
        if whole % steps:
            raise ValueError(
                f"steps is {steps}; expected a divisor of the ddpm grid's {whole} times (or "
                'grid="time" or "log_snr", which take any number)'
            )
        if is_table:
            return jnp.arange(0, whole, whole // steps, dtype=jnp.float32)
        return jnp.linspace(sde.t_end, sde.t_max, whole)[:: whole // steps]
    if grid == "time":
        return jnp.linspace(sde.t_max, sde.t_end, steps)[::-1]
    ends = sde.log_snr(sde.t_max), sde.log_snr(sde.t_end)
    return sde.inverse_log_snr(jnp.linspace(*ends, steps))[::-1]


class Level(NamedTuple):
    """A step from one noise level to the next, each ``()``; the last goes to the data."""

    n: jax.Array
    t: jax.Array
    alpha: jax.Array
    sigma: jax.Array
    alpha_next: jax.Array
    sigma_next: jax.Array


def ddim_step(
    problem: Problem, x: jax.Array, x0: jax.Array, level: Level, eta: ArrayLike, z: jax.Array
) -> jax.Array:
    """The DDIM step from a level to the next about an estimate of the data (module docstring)."""
    mu = problem.sde.centre(x)
    if mu is not None:
        x, x0 = x - mu, x0 - mu
    a, s, a1, s1 = level.alpha, level.sigma, level.alpha_next, level.sigma_next
    r = a * s1 / (a1 * s)
    # Share of the next level's variance that is drawn anew.
    share = jnp.asarray(eta, x.dtype) ** 2 * jnp.maximum((1 - r) * (1 + r), 0)
    keep = safe_sqrt(jnp.maximum(1 - share, 0))
    out = a1 * x0 + s1 * (keep * (x - a * x0) / s + safe_sqrt(share) * z)
    return out if mu is None else mu + out


def run_levels(
    problem: Problem,
    advance: Callable[[jax.Array, Level], jax.Array],
    *,
    method: str,
    steps: int,
    grid: str | ArrayLike,
    x_init: ArrayLike | None,
    progress: bool | None,
    calls: int = 1,
) -> Restored:
    """Go down the noise levels by ``advance(x, level)``, ``calls`` evaluations each."""
    times = times_of(problem.sde, steps, grid)[::-1]
    alpha = problem.sde.alpha(times).astype(problem.wide)
    sigma = problem.sde.sigma(times).astype(problem.wide)
    after = jnp.ones_like(alpha[:1]), jnp.zeros_like(sigma[:1])
    levels = Level(
        jnp.arange(1, steps + 1, dtype=jnp.uint32),
        times,
        alpha,
        sigma,
        jnp.concatenate([alpha[1:], after[0]]),
        jnp.concatenate([sigma[1:], after[1]]),
    )
    if x_init is not None:
        x = jnp.asarray(x_init).astype(problem.wide)
    else:
        z = problem.noise(0)
        mu = problem.sde.centre(z)
        x = sigma[0] * z if mu is None else mu + sigma[0] * z
    x = problem.varying(x)
    tick = Ticker(steps, method) if progress else None

    def body(x: jax.Array, level: Level) -> tuple[jax.Array, None]:
        out = advance(x, level).astype(x.dtype)
        if tick is not None:
            tick(level.n.astype(jnp.int32) - 1)
        return out, None

    x, _ = jax.lax.scan(body, x, levels)
    return problem.finish(x, method, steps, steps * calls)
