r"""Absorbing discrete diffusion: every token turns into the mask on its own, and stays there.

Tokens are 0 .. V - 1, the mask is M = V. With the total noise sb(t), the integral of a rate
sigma(t), a token is masked by time t with probability

    lam(t) = 1 - exp(-sb(t))                                                               (1)

    log_linear   lam = (1 - eps) t,                 sigma = (1 - eps) / (1 - (1 - eps) t)
    geometric    sb = s_min^(1-t) s_max^t,          sigma = sb log(s_max / s_min)

For x_t with token i masked and y equal to it but for y_i = v, Ou et al. (arXiv 2406.03736, theorem
1) find

    p_t(y) / p_t(x_t) = exp(-sb) / (1 - exp(-sb)) p_0(x^i = v | unmasked tokens of x_t)    (2)

so that what a network must know, the conditionals of clean data, has no time in it. Backwards a
masked token turns into v at the rate sigma(t) exp(-sb) / (1 - exp(-sb)) p_0(v | ...), and an
unmasked one never changes. Over a step from t down to s a token unmasks with probability

    tweedie      (exp(-sb(s)) - exp(-sb(t))) / (1 - exp(-sb(t))) = 1 - lam(s) / lam(t)     (3)
    euler        (t - s) sigma(t) exp(-sb(t)) / (1 - exp(-sb(t))), cut at 1                (4)

Time runs from data at 0 to noise at 1. Left out: the uniform noise of SEDD, learned schedules.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import at_least_f32, batch_event, left_broadcast, strong_scalar

__all__ = [
    "METHODS",
    "SCHEDULES",
    "Absorbing",
    "absorbing",
    "expected_nfe",
    "mask_tokens_k",
    "mask_tokens_lambda",
    "mask_tokens_t",
]

METHODS = ("tweedie", "euler")
COUNTS = ("lazy", "eager")


class Noise(NamedTuple):
    """Total noise sb, its rate, and d lam/dt = rate exp(-sb), each of ``t``'s shape."""

    total: jax.Array
    rate: jax.Array
    mask_rate: jax.Array


def _log_linear(t: jax.Array, eps: Any) -> Noise:
    # Exact at t = 1, where 1 - (1 - eps) t would lose eps.
    kept = (1 - t) + eps * t
    total = jnp.where(t < 0.5, -jnp.log1p(-(1 - eps) * t), -jnp.log(kept))
    return Noise(total, (1 - eps) / kept, jnp.full_like(t, 1 - eps))


def _geometric(t: jax.Array, low: Any, high: Any) -> Noise:
    log_ratio = jnp.log(high) - jnp.log(low)
    total = low * jnp.exp(t * log_ratio)
    rate = total * log_ratio
    return Noise(total, rate, rate * jnp.exp(-total))


SCHEDULES: dict[str, Callable[..., Noise]] = {
    "log_linear": _log_linear,
    "geometric": _geometric,
}
"""Name to ``f(t, *params) -> Noise``."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "t_min"),
    meta_fields=("vocabulary", "schedule"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Absorbing:
    """The process of this module; made by ``absorbing``.

    A pytree: the schedule's numbers and ``t_min`` are data, so that a sweep compiles once.

    Attributes:
      vocabulary: number V of real tokens.
      schedule: a name of ``SCHEDULES``.
      params: its numbers.
      t_min: first time that losses draw, and the last of samplers; the range is (0, 1].
    """

    vocabulary: int
    schedule: str
    params: tuple[Any, ...]
    t_min: Any

    @property
    def mask(self) -> int:
        """The id of the mask, V."""
        return self.vocabulary

    def _at(self, t: ArrayLike) -> Noise:
        """All about the noise at ``t``, NaN outside (0, 1] (an error under checkify)."""
        t = jnp.asarray(t)
        t = t.astype(at_least_f32(t.dtype))
        ok = (t > 0) & (t <= 1)
        checks.debug_check(jnp.all(ok), "t is outside (0, 1]: {t}", t=t)
        noise = SCHEDULES[self.schedule](jnp.where(ok, t, 1.0), *self.params)
        return Noise(*(jnp.where(ok, value, jnp.nan) for value in noise))

    def total(self, t: ArrayLike) -> jax.Array:
        """Total noise sb(t), of ``t``'s shape; ``t`` in (0, 1], else NaN."""
        return self._at(t).total

    def rate(self, t: ArrayLike) -> jax.Array:
        """Rate sigma(t) at which tokens turn into the mask, of ``t``'s shape."""
        return self._at(t).rate

    def mask_probability(self, t: ArrayLike) -> jax.Array:
        """Probability lam(t) that a token is masked, equation (1), of ``t``'s shape."""
        return -jnp.expm1(-self.total(t))

    def reverse_rate(self, t: ArrayLike) -> jax.Array:
        """Rate at which a masked token unmasks, of ``t``'s shape; also the loss's weight."""
        noise = self._at(t)
        return noise.mask_rate / -jnp.expm1(-noise.total)

    def unmask_probability(
        self, t: ArrayLike, s: ArrayLike, *, method: str = "tweedie"
    ) -> jax.Array:
        """Probability that a masked token unmasks on the way from ``t`` down to ``s``.

        Args:
          t: times in (0, 1].
          s: earlier times in (0, t), of ``t``'s shape.
          method: ``"tweedie"``, equation (3), or ``"euler"``, equation (4).

        Returns:
          Values in [0, 1] of ``t``'s shape.

        Raises:
          ValueError: an unknown method.
        """
        checks.one_of("method", method, METHODS)
        if method == "euler":
            return jnp.clip((jnp.asarray(t) - jnp.asarray(s)) * self.reverse_rate(t), 0.0, 1.0)
        total, before = self.total(t), self.total(s)
        # Near t = 1 of a geometric schedule lam is 1 to float32; this difference is not.
        gone = jnp.exp(-before) * -jnp.expm1(before - total)
        return jnp.clip(gone / -jnp.expm1(-total), 0.0, 1.0)

    def times(self, steps: int, *, t_end: ArrayLike | None = None) -> jax.Array:
        """Falling times ``(steps + 1,)`` from 1 to ``t_end`` (default ``t_min``), uniform.

        Raises:
          ValueError: ``steps`` below 1, or a known ``t_end`` outside (0, 1).
        """
        checks.positive_int("steps", steps)
        known = None if t_end is None else checks.concrete(t_end)
        if known is not None and not (known.shape == () and 0 < known < 1):
            raise ValueError(f"t_end is {t_end}; expected a time in (0, 1)")
        end = jnp.asarray(self.t_min if t_end is None else t_end)
        share = jnp.arange(steps + 1, dtype=at_least_f32(end.dtype)) / steps
        return (1 - share) + end * share

    def unmask_schedule(
        self, steps: int, *, method: str = "tweedie", t_end: ArrayLike | None = None
    ) -> jax.Array:
        """Probabilities ``(steps,)`` of unmasking in each step; 1 in the last, which leaves none.

        Args:
          steps: number of steps, at least 1.
          method: see ``unmask_probability``.
          t_end: last time, ``t_min`` if ``None``.

        Raises:
          ValueError: ``steps`` below 1, an unknown method, or a known ``t_end`` outside (0, 1).
        """
        times = self.times(steps, t_end=t_end)
        rho = self.unmask_probability(times[:-1], times[1:], method=method)
        return jnp.where(jnp.arange(steps) == steps - 1, jnp.ones_like(rho), rho)


def absorbing(
    vocabulary: int,
    schedule: str = "log_linear",
    *,
    eps: ArrayLike = 1e-3,
    sigma_min: ArrayLike = 1e-4,
    sigma_max: ArrayLike = 20.0,
    t_min: ArrayLike = 1e-5,
) -> Absorbing:
    """The absorbing process over a vocabulary (Ou et al., arXiv 2406.03736, section 2).

    Args:
      vocabulary: number V of real tokens, at least 2; the mask has the id V.
      schedule: ``"log_linear"`` or ``"geometric"``.
      eps: of the log-linear schedule: share of tokens that are still there at t = 1.
      sigma_min: of the geometric schedule: total noise at t = 0.
      sigma_max: total noise at t = 1.
      t_min: first time that losses draw, and the last of samplers.

    Raises:
      ValueError: ``vocabulary`` below 2, an unknown schedule, or numbers out of range.

    Example:
      >>> process = absorbing(27)
      >>> process.mask, round(float(process.mask_probability(0.5)), 4)
      (27, 0.4995)
    """
    vocabulary = checks.positive_int("vocabulary", vocabulary, least=2)
    checks.one_of("schedule", schedule, SCHEDULES)
    for name, value, low, high in (("eps", eps, 0.0, 1.0), ("t_min", t_min, 0.0, 1.0)):
        # 0 is a log-linear process that hides everything at t = 1.
        if isinstance(value, int | float) and not (
            low <= value < high and (value or name == "eps")
        ):
            raise ValueError(f"{name} is {value}; expected a number in ({low:g}, {high:g})")
    if (
        isinstance(sigma_min, int | float)
        and isinstance(sigma_max, int | float)
        and not 0 < sigma_min < sigma_max
    ):
        raise ValueError(
            f"sigma_min is {sigma_min} and sigma_max {sigma_max}; expected 0 < sigma_min < "
            "sigma_max"
        )
    numbers = (eps,) if schedule == "log_linear" else (sigma_min, sigma_max)
    params = tuple(strong_scalar(number) for number in numbers)
    return Absorbing(vocabulary, schedule, params, strong_scalar(t_min))


# --- hiding tokens ------------------------------------------------------------------------------


def check_tokens(name: str, x: Any, largest: int) -> tuple[jax.Array, jax.Array]:
    """``x`` as int32, and whether each example's ids all lie in [0, ``largest``].

    Known values out of range raise; traced ones are an error under checkify.

    Raises:
      TypeError: ``x`` is not of an integer dtype.
      ValueError: an id out of range, where the array is concrete.
    """
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} has dtype {array.dtype}; expected integer token ids")
    fits = (array >= 0) & (array <= largest)
    known = checks.concrete(fits)
    if known is not None and not known.all():
        bad = np.asarray(array)[~known][0]
        raise ValueError(f"{name} holds the token {bad}; expected ids in [0, {largest}]")
    checks.debug_check(
        jnp.all(fits), name + " holds ids outside [0, {largest}]: {x}", largest=largest, x=array
    )
    return array.astype(jnp.int32), jnp.all(fits, axis=-1)


def _check_event(name: str, x: Any, event_ndim: int | None) -> tuple[int, ...]:
    """The batch shape of sequences ``(n, l)`` or of one sequence ``(l,)``."""
    batch, event = batch_event(x, event_ndim)
    if len(event) != 1 or not event[0]:
        raise ValueError(
            f"{name} has shape {jnp.shape(x)}; expected sequences (n, length), or one (length,) "
            f"with event_ndim=1"
        )
    return batch


def _hide(
    key: jax.Array,
    process: Absorbing,
    x0: Any,
    level: jax.Array,
    draw: Callable[[jax.Array, jax.Array, int], jax.Array],
    is_level: jax.Array,
    event_ndim: int | None,
) -> jax.Array:
    """``x0`` with the tokens that ``draw(key, level, length)`` picks turned into the mask."""
    batch = _check_event("x0", x0, event_ndim)
    x0, fits = check_tokens("x0", x0, process.mask)
    if level.shape not in ((), batch):
        raise ValueError(f"the level has shape {level.shape}; expected () or {batch}")
    length = x0.shape[-1]
    levels = jnp.broadcast_to(level, batch)
    if batch:
        hidden = jax.vmap(lambda k, a: draw(k, a, length))(
            keys.fold(keys.check(key), batch[0]), levels
        )
    else:
        hidden = draw(keys.check(key), levels, length)
    ok = left_broadcast(jnp.broadcast_to(is_level, batch) & fits, x0)
    # No such token: an embedding or a loss that meets it answers NaN.
    return jnp.where(ok, jnp.where(hidden, process.mask, x0), process.mask + 1)


def mask_tokens_lambda(
    key: jax.Array,
    process: Absorbing,
    x0: ArrayLike,
    lam: ArrayLike,
    *,
    event_ndim: int | None = None,
) -> jax.Array:
    """Mask each token on its own with probability ``lam``.

    Args:
      key: typed key; sequence ``i`` of a batch uses ``fold_in(key, i)``.
      process: whose mask is put in.
      x0: integer ids in [0, V], ``(n, l)``, or ``(l,)`` with ``event_ndim=1``; masks stay masks.
      lam: in [0, 1], ``()`` or ``(n,)``.
      event_ndim: see above.

    Returns:
      int32 of ``x0``'s shape. A sequence whose ids or ``lam`` are out of range (an error under
      checkify) is filled with V + 1, which is no token.

    Raises:
      TypeError: ids that are not integer.
      ValueError: shapes that do not fit, or a concrete id out of range.
    """
    lam = checks.floating("lam", lam)
    ok = (lam >= 0) & (lam <= 1)
    checks.debug_check(jnp.all(ok), "lam is outside [0, 1]: {lam}", lam=lam)

    def draw(k: jax.Array, level: jax.Array, length: int) -> jax.Array:
        return jax.random.uniform(k, (length,)) < level

    return _hide(key, process, x0, lam, draw, ok, event_ndim)


def mask_tokens_t(
    key: jax.Array,
    process: Absorbing,
    x0: ArrayLike,
    t: ArrayLike,
    *,
    event_ndim: int | None = None,
) -> jax.Array:
    """Run the process to time ``t``: mask each token with probability ``lam(t)``, equation (1).

    Args:
      key: typed key; sequence ``i`` of a batch uses ``fold_in(key, i)``.
      process: the process.
      x0: see ``mask_tokens_lambda``.
      t: in (0, 1], ``()`` or ``(n,)``.
      event_ndim: see ``mask_tokens_lambda``.

    Returns:
      See ``mask_tokens_lambda``.
    """
    return mask_tokens_lambda(key, process, x0, process.mask_probability(t), event_ndim=event_ndim)


def mask_tokens_k(
    key: jax.Array,
    process: Absorbing,
    x0: ArrayLike,
    k: ArrayLike,
    *,
    event_ndim: int | None = None,
) -> jax.Array:
    """Mask exactly ``k`` tokens, every set of them equally likely.

    Args:
      key: typed key; sequence ``i`` of a batch uses ``fold_in(key, i)``.
      process: whose mask is put in.
      x0: see ``mask_tokens_lambda``.
      k: integer in [0, l], ``()`` or ``(n,)``; may be traced.
      event_ndim: see ``mask_tokens_lambda``.

    Returns:
      See ``mask_tokens_lambda``.

    Raises:
      TypeError: ``k`` or ids that are not integer. ValueError: shapes that do not fit.
    """
    k = jnp.asarray(k)
    if not jnp.issubdtype(k.dtype, jnp.integer):
        raise TypeError(f"k has dtype {k.dtype}; expected an integer dtype")
    ok = (k >= 0) & (k <= jnp.shape(x0)[-1])
    checks.debug_check(jnp.all(ok), "k is outside [0, length]: {k}", k=k)

    def draw(one: jax.Array, level: jax.Array, length: int) -> jax.Array:
        return jax.random.permutation(one, length) < level

    return _hide(key, process, x0, k, draw, ok, event_ndim)


# --- evaluations --------------------------------------------------------------------------------


def expected_nfe(
    process: Absorbing,
    steps: int,
    length: int,
    *,
    count: str = "lazy",
    method: str = "tweedie",
    t_end: ArrayLike | None = None,
) -> jax.Array:
    """Expected evaluations of a network by a sampler that skips those it does not need.

    With q_i the probability that a token unmasks in step i,

        lazy     sum_i 1 - (1 - q_i)^l                 steps in which some token unmasks
        eager    1 - (1 - q_i)^l over all but the last, and one more for the first

    *Lazy* draws which tokens unmask first, and calls the network where there are any. *Eager*
    (Ou et al., section 3.2) calls it at the start of a step whenever the last one changed the
    tokens. The log-linear schedule with eps = 0 has q_i = 1/steps: n (1 - (1 - 1/n)^l) lazy
    evaluations, never above ``min(steps, length)``.

    Args:
      process: the process.
      steps: of the sampler, at least 1.
      length: tokens that start masked, at least 1.
      count: ``"lazy"`` or ``"eager"``.
      method: see ``Absorbing.unmask_probability``.
      t_end: the sampler's last time, ``process.t_min`` if ``None``.

    Returns:
      ``()``, in evaluations per sequence.

    Raises:
      ValueError: a number below 1, or an unknown name.

    Example:
      >>> round(float(expected_nfe(absorbing(2, eps=0.0), 64, 32)), 2)
      25.33
    """
    checks.positive_int("length", length)
    checks.one_of("count", count, COUNTS)
    rho = process.unmask_schedule(steps, method=method, t_end=t_end)
    survival = jnp.cumprod(1 - rho)
    before = jnp.concatenate([jnp.ones_like(rho[:1]), survival[:-1]])
    # log1p(-1), of one step that unmasks all, is -inf, and its power 0.
    quiet = jnp.exp(length * jnp.log1p(-before * rho))
    busy = jnp.sum(1 - quiet)
    return busy if count == "lazy" else busy + quiet[-1]
