r"""Linear stochastic processes from data to noise, given by two functions of time.

With an anchor mu (zero unless given), the marginal at time t of data x0 is

    x_t = mu + alpha(t) (x0 - mu) + sigma(t) z,        z ~ N(0, I)                         (1)

and the SDE with these marginals is

    dx = (d log alpha / dt) (x - mu) dt + g(t) dw                                          (2)
    g^2 = d sigma^2/dt - 2 (d log alpha / dt) sigma^2 = -sigma^2 d log_snr / dt            (3)
    log_snr = log(alpha^2 / sigma^2)                                                       (4)

Time runs from data (``t_min``) to noise (``t_max``). Score-SDE's VP, sub-VP and VE (Song et al.,
ICLR 2021, arXiv 2011.13456, section 3.4), EDM, cosine, rectified flow, mean-reverting and OUVE
processes are all of this kind; their constructors stand in ``schedules``. Derivatives in time
come from automatic differentiation of the two functions.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import (
    at_least_f32,
    batch_event,
    left_broadcast,
    safe_sqrt,
    strong_scalar,
    sum_event,
)

if TYPE_CHECKING:
    from jaxgen.process.discretize import DiscreteKernel

__all__ = ["LinearSDE", "Rates"]

# Rounding allowed at the ends of time, as a share of its span.
_SLACK = 1e-6


class Rates(NamedTuple):
    """The coefficients of equation (1) and their time derivatives, each of ``t``'s shape."""

    alpha: jax.Array
    sigma: jax.Array
    alpha_dot: jax.Array
    sigma_dot: jax.Array


@functools.partial(jax.jit, static_argnames="ends", inline=True)
def _in_range(
    t: jax.Array, low: Any, high: Any, *, ends: tuple[float, float] | None
) -> tuple[jax.Array, jax.Array]:
    """``t`` in at least float32, NaN where it is out of range, and whether all of it is in."""
    t = t.astype(at_least_f32(t.dtype))
    slack = _SLACK * (high - low)
    ok = (t >= low - slack) & (t <= high + slack)
    if ends is not None:
        ok |= (t == ends[0]) | (t == ends[1])
    return jnp.where(ok, t, jnp.nan), jnp.all(ok)


@functools.partial(jax.jit, inline=True)
def _like_time(value: jax.Array, t: jax.Array) -> jax.Array:
    """``value``, but NaN where ``t`` is: a schedule that ignores its time must not hide it."""
    return jnp.where(jnp.isnan(t), jnp.nan, value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.floating)


@dataclasses.dataclass(frozen=True, eq=False)
class LinearSDE:
    """A process with marginals ``mu + alpha(t) (x0 - mu) + sigma(t) z`` (module docstring).

    A pytree: parameters, times, ``mu`` and ``prior_std`` are data, so that a sweep over them
    compiles once and gradients in them exist; the functions and ``kind`` are static, so define
    them at module level (a lambda made anew compiles anew).

    Attributes:
      log_alpha_fn: ``f(t, *params) -> log alpha``, elementwise.
      sigma_fn: ``f(t, *params) -> sigma``, a standard deviation, elementwise.
      params: arguments of the functions; Python numbers become strong float32 (or wider).
      mu: anchor, ``None`` for zero; broadcasts against the event, or against the whole batch if
        it has as many axes as ``x``.
      t_min: first time, data side. Losses and likelihoods use ``[t_min, t_max]``.
      t_max: last time, noise side.
      t_end: where a sampler stops, ``t_min`` unless given.
      prior_std: standard deviation of the prior, ``sigma(t_max)`` if ``None``.
      kind: a name; published kernels are looked up by it.
      alpha_fn: ``alpha`` itself, where ``exp(log_alpha)`` loses accuracy or its derivative.
      inverse_fn: ``f(log_snr, *params) -> t``; without it ``inverse_log_snr`` bisects.
      ends: the two times, beyond ``[t_min, t_max]``, at which the process properly begins and
        ends; only there may log-SNR be infinite. ``None``: none.

    Values of ``t`` outside ``[t_min, t_max]`` and other than ``ends`` give NaN, and an error under
    ``checkify``.

    Raises:
      TypeError: a function is not callable.
      ValueError: ``t_min >= t_max``, or ``t_end`` lies outside, where they are plain numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> sde = LinearSDE(lambda t: -t, lambda t: jnp.sqrt(-jnp.expm1(-2 * t)), t_min=1e-4, t_max=5)
      >>> round(float(sde.diffusion(1.0)), 4)  # Ornstein-Uhlenbeck: sqrt(2)
      1.4142
    """

    log_alpha_fn: Callable[..., jax.Array] = dataclasses.field(metadata={"static": True})
    sigma_fn: Callable[..., jax.Array] = dataclasses.field(metadata={"static": True})
    _: dataclasses.KW_ONLY
    params: tuple[Any, ...] = ()
    mu: Any = None
    t_min: Any
    t_max: Any
    t_end: Any = None
    prior_std: Any = None
    kind: str | None = dataclasses.field(default=None, metadata={"static": True})
    alpha_fn: Callable[..., jax.Array] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    inverse_fn: Callable[..., jax.Array] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    ends: tuple[float, float] | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        for name in ("log_alpha_fn", "sigma_fn"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name} is {getattr(self, name)!r}; expected a function of t")
        times = (self.t_min, self.t_max, self.t_min if self.t_end is None else self.t_end)
        if all(_is_number(t) for t in times):
            low, high, end = (float(t) for t in times)
            if not low < high:
                raise ValueError(f"t_min is {low} and t_max {high}; expected t_min < t_max")
            first = low if self.ends is None else min(low, self.ends[0])
            if not first <= end < high:
                raise ValueError(f"t_end is {end}; expected a time in [{first}, {high})")

        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("params", tuple(strong_scalar(p) for p in self.params))
        if self.t_end is None:
            put("t_end", self.t_min)
        for name in ("mu", "t_min", "t_max", "t_end", "prior_std"):
            if getattr(self, name) is not None:
                put(name, strong_scalar(getattr(self, name)))

    # --- coefficients -----------------------------------------------------------------------

    def _time(self, t: ArrayLike) -> jax.Array:
        """``t`` in at least float32, NaN where it is out of range (an error under checkify)."""
        known, is_fine = _in_range(jnp.asarray(t), self.t_min, self.t_max, ends=self.ends)
        checks.debug_check(
            is_fine,
            "t is outside [{low}, {high}]: {t}",
            low=jnp.asarray(self.t_min),
            high=jnp.asarray(self.t_max),
            t=jnp.asarray(t),
        )
        return known

    def _alpha(self, t: jax.Array) -> jax.Array:
        if self.alpha_fn is not None:
            return self.alpha_fn(t, *self.params)
        return jnp.exp(self.log_alpha_fn(t, *self.params))

    def log_alpha(self, t: ArrayLike) -> jax.Array:
        """Logarithm of the signal coefficient, of ``t``'s shape."""
        t = self._time(t)
        return _like_time(self.log_alpha_fn(t, *self.params), t)

    def alpha(self, t: ArrayLike) -> jax.Array:
        """Signal coefficient, of ``t``'s shape."""
        t = self._time(t)
        return _like_time(self._alpha(t), t)

    def sigma(self, t: ArrayLike) -> jax.Array:
        """Standard deviation of the noise, of ``t``'s shape."""
        t = self._time(t)
        return _like_time(self.sigma_fn(t, *self.params), t)

    def log_snr(self, t: ArrayLike) -> jax.Array:
        """``log(alpha^2 / sigma^2)``, of ``t``'s shape; falls with time."""
        t = self._time(t)
        sigma = self.sigma_fn(t, *self.params)
        # At sigma = 0 the value is infinite, and a gradient of it would be no number.
        log_sigma = jnp.where(sigma == 0, -jnp.inf, jnp.log(jnp.where(sigma == 0, 1.0, sigma)))
        return _like_time(2 * (self.log_alpha_fn(t, *self.params) - log_sigma), t)

    def rates(self, t: ArrayLike) -> Rates:
        """``alpha``, ``sigma`` and their time derivatives, each of ``t``'s shape."""
        t = self._time(t)
        one = jnp.ones_like(t)
        alpha, alpha_dot = jax.jvp(self._alpha, (t,), (one,))
        sigma, sigma_dot = jax.jvp(lambda s: self.sigma_fn(s, *self.params), (t,), (one,))
        return Rates(*(_like_time(c, t) for c in (alpha, sigma, alpha_dot, sigma_dot)))

    def log_alpha_dot(self, t: ArrayLike) -> jax.Array:
        """``d log alpha / dt``, the linear rate of the drift, of ``t``'s shape."""
        t = self._time(t)
        one = jnp.ones_like(t)
        slope = jax.jvp(lambda s: self.log_alpha_fn(s, *self.params), (t,), (one,))[1]
        return _like_time(slope, t)

    def diffusion_squared(self, t: ArrayLike) -> jax.Array:
        """``g(t)^2`` by equation (3), of ``t``'s shape."""
        _, sigma, _, sigma_dot = self.rates(t)
        return 2 * sigma * sigma_dot - 2 * self.log_alpha_dot(t) * sigma**2

    def diffusion(self, t: ArrayLike) -> jax.Array:
        """``g(t)`` by equation (3), of ``t``'s shape."""
        return safe_sqrt(self.diffusion_squared(t))

    def inverse_log_snr(self, value: ArrayLike) -> jax.Array:
        """The time at which ``log_snr`` has this value, where ``log_snr`` falls strictly.

        Args:
          value: log-SNR, any shape; infinite where the process has such an end.

        Returns:
          Times of ``value``'s shape; NaN (an error under checkify) beyond the two ends.
        """
        value = jnp.asarray(value)
        value = value.astype(at_least_f32(value.dtype))
        low, high = self.t_min, self.t_max
        top, bottom = self.log_snr(low), self.log_snr(high)
        tolerance = 1e-5
        ok = value <= top + tolerance * jnp.maximum(1.0, jnp.abs(top))
        ok &= value >= bottom - tolerance * jnp.maximum(1.0, jnp.abs(bottom))
        if self.inverse_fn is not None:
            t = self.inverse_fn(value, *self.params)
        else:
            t = self._bisect(jnp.clip(value, bottom, top))
        t = jnp.clip(t, low, high)
        if self.ends is not None:
            for end in self.ends:
                if math.isfinite(end):
                    at_end = value == self.log_snr(end)
                    t, ok = jnp.where(at_end, end, t), ok | at_end
        checks.debug_check(
            jnp.all(ok),
            "log-SNR is outside [{low}, {high}]: {value}",
            low=bottom,
            high=top,
            value=value,
        )
        return jnp.where(ok, t, jnp.nan)

    def _bisect(self, value: jax.Array) -> jax.Array:
        low = jnp.broadcast_to(jnp.asarray(self.t_min, value.dtype), value.shape)
        high = jnp.broadcast_to(jnp.asarray(self.t_max, value.dtype), value.shape)

        def halve(_, bounds):
            low, high = bounds
            middle = 0.5 * (low + high)
            noisier = self.log_snr(middle) < value
            return jnp.where(noisier, low, middle), jnp.where(noisier, middle, high)

        low, high = jax.lax.fori_loop(0, 64, halve, jax.lax.stop_gradient((low, high)))
        root = jax.lax.stop_gradient(0.5 * (low + high))
        # One Newton step, which also carries the derivatives in the value and the parameters.
        level, slope = jax.jvp(self.log_snr, (root,), (jnp.ones_like(root),))
        return root - (level - value) / jax.lax.stop_gradient(slope)

    # --- data, noise and the prior ------------------------------------------------------------

    def centre(self, x: jax.Array) -> jax.Array | None:
        """``mu`` with the axes of ``x``, ready to broadcast; ``None`` if there is no anchor.

        Raises:
          ValueError: ``mu`` does not broadcast against ``x``.
        """
        if self.mu is None:
            return None
        mu = jnp.asarray(self.mu)
        if mu.ndim > x.ndim or any(
            a not in (1, b) for a, b in zip(mu.shape[::-1], x.shape[::-1], strict=False)
        ):
            raise ValueError(f"mu has shape {mu.shape}, which does not broadcast over {x.shape}")
        return jnp.reshape(mu, (1,) * (x.ndim - mu.ndim) + mu.shape)

    def marginal(self, x0: ArrayLike, t: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Mean and standard deviation of ``x_t`` given data, equation (1).

        Args:
          x0: data ``(batch, *event)`` or one example.
          t: times, ``()`` or ``(batch,)``.

        Returns:
          The mean, like ``x0``, and the standard deviation, of ``t``'s shape in float32 or wider.
        """
        x0 = checks.floating("x0", x0, allow_complex=True)
        return self._mean(x0, self.alpha(t)).astype(x0.dtype), self.sigma(t)

    def _mean(self, x0: jax.Array, alpha: jax.Array) -> jax.Array:
        wide = x0.astype(jnp.promote_types(x0.dtype, jnp.float32))
        coefficient = left_broadcast(alpha, x0)
        mu = self.centre(x0)
        return coefficient * wide if mu is None else mu + coefficient * (wide - mu)

    def perturb(
        self, key: jax.Array, x0: ArrayLike, t: ArrayLike, *, event_ndim: int | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Draw ``x_t`` given data, equation (1).

        Args:
          key: typed key; example ``i`` of a batch uses ``fold_in(key, i)``.
          x0: data ``(batch, *event)``; one example if ``event_ndim=x0.ndim``. For complex data
            the noise is circular with ``E|z|^2 = 1``.
          t: times, ``()`` or ``(batch,)``.
          event_ndim: see above.

        Returns:
          ``x_t`` and the noise ``z``, both like ``x0``.
        """
        x0 = checks.floating("x0", x0, allow_complex=True)
        noise = keys.normal(key, x0.shape, x0.dtype, event_ndim)
        return self.path(x0, noise, t), noise

    def path(self, x0: ArrayLike, noise: ArrayLike, t: ArrayLike) -> jax.Array:
        """The state ``x_t`` on the path of given data and noise, equation (1).

        Args:
          x0: data ``(batch, *event)`` or one example.
          noise: of ``x0``'s shape.
          t: times, ``()`` or ``(batch,)``.

        Returns:
          ``x_t``, like ``x0``.
        """
        x0 = checks.floating("x0", x0, allow_complex=True)
        mean = self._mean(x0, self.alpha(t))
        x_t = mean + left_broadcast(self.sigma(t), x0) * jnp.asarray(noise).astype(mean.dtype)
        return x_t.astype(x0.dtype)

    def drift(self, x: ArrayLike, t: ArrayLike) -> jax.Array:
        """Drift of equation (2), like ``x``; ``t`` is ``()`` or ``(batch,)``."""
        x = checks.floating("x", x, allow_complex=True)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mu = self.centre(x)
        centred = wide if mu is None else wide - mu
        return (left_broadcast(self.log_alpha_dot(t), x) * centred).astype(x.dtype)

    def _prior_std(self) -> jax.Array:
        return self.sigma(self.t_max) if self.prior_std is None else jnp.asarray(self.prior_std)

    def prior_sample(
        self,
        key: jax.Array,
        shape: tuple[int, ...],
        *,
        dtype: DTypeLike = jnp.float32,
        event_ndim: int | None = None,
    ) -> jax.Array:
        """Draw from the prior ``N(mu, prior_std^2 I)``.

        Args:
          key: typed key; example ``i`` of a batch uses ``fold_in(key, i)``.
          shape: ``(batch, *event)``, or the event alone if ``event_ndim=len(shape)``.
          dtype: floating or complex.
          event_ndim: see above.
        """
        noise = keys.normal(key, shape, jnp.promote_types(dtype, jnp.float32), event_ndim)
        x = self._prior_std() * noise
        mu = self.centre(x)
        return (x if mu is None else mu + x).astype(dtype)

    def prior_log_prob(self, x: ArrayLike, *, event_ndim: int | None = None) -> jax.Array:
        """Log-density of the prior in nats, ``(batch,)`` or ``()``, in float32 or wider."""
        x = checks.floating("x", x, allow_complex=True)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mu = self.centre(x)
        scaled = (wide if mu is None else wide - mu) / self._prior_std()
        size = math.prod(batch_event(x, event_ndim)[1])
        squares = sum_event(jnp.real(scaled * jnp.conj(scaled)), event_ndim)
        log_std = jnp.log(self._prior_std())
        if jnp.iscomplexobj(x):
            return -squares - size * (math.log(math.pi) + 2 * log_std)
        return -0.5 * squares - size * (0.5 * math.log(2 * math.pi) + log_std)

    def discretize(self, n: int) -> "DiscreteKernel":
        """The process as a chain of ``n`` steps; see ``process.discretize``."""
        from jaxgen.process.discretize import discretize

        return discretize(self, n)


_STATIC = tuple(f.name for f in dataclasses.fields(LinearSDE) if f.metadata.get("static"))
_DATA = tuple(f.name for f in dataclasses.fields(LinearSDE) if f.name not in _STATIC)


def _flatten(sde: LinearSDE) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return tuple(getattr(sde, n) for n in _DATA), tuple(getattr(sde, n) for n in _STATIC)


def _flatten_with_keys(sde: LinearSDE) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    data, static = _flatten(sde)
    names = (jax.tree_util.GetAttrKey(n) for n in _DATA)
    return tuple(zip(names, data, strict=True)), static


def _unflatten(static: tuple[Any, ...], data: Iterable[Any]) -> LinearSDE:
    """Rebuild without ``__post_init__``: leaves may be masks or placeholders, not numbers."""
    sde = object.__new__(LinearSDE)
    for name, value in zip(_DATA + _STATIC, (*data, *static), strict=True):
        object.__setattr__(sde, name, value)
    return sde


jax.tree_util.register_pytree_with_keys(LinearSDE, _flatten_with_keys, _unflatten, _flatten)
