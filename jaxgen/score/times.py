r"""Which times a loss is evaluated at, and the correction that keeps its expectation.

A sampler maps uniform numbers u to times and to a factor that the loss is multiplied by. With T =
t_max - t_min and Lambda = log_snr(t_min) - log_snr(t_max):

- uniform: t = t_min + T u, factor 1.
- importance: log-SNR uniform between its two ends. The density of t is then
  -(d log_snr/dt) / Lambda = g^2 / (sigma^2 Lambda), the one that makes the likelihood-weighted
  loss flat in time (Song et al., arXiv 2101.09258, section 4.3; Kingma et al., arXiv 2107.00630,
  appendix F); factor Lambda sigma^2 / (T g^2), so that the expected loss is that of uniform times.
- lognormal: log(sigma/alpha) ~ N(-1.2, 1.2^2), cut at the two ends of time (Karras et al., arXiv
  2206.00364, table 1). It is part of the loss that EDM minimises, so its factor is 1.

The uniform numbers are independent, drawn per example, or *stratified*: u_i = (u + i/n) mod 1 with
one offset u for the batch (Kingma et al., appendix I.1). Each is still uniform, and their average
has less variance, but the examples of a batch then share one random number: a batch is no longer
its examples drawn one by one.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import left_broadcast
from jaxgen.process.linear import LinearSDE

__all__ = ["TIMES", "TimeSampler", "sample_times", "stratify"]

# (u, sde, t_min) -> (t, factor), all of u's shape.
_Map = Callable[[jax.Array, LinearSDE, jax.Array], tuple[jax.Array, jax.Array]]

# EDM's distribution of log(sigma/alpha).
_LOG_LEVEL_MEAN, _LOG_LEVEL_STD = -1.2, 1.2


class TimeSampler(NamedTuple):
    """A row of ``TIMES``: the map from uniform numbers, and whether these are stratified."""

    map: _Map
    stratified: bool


def _uniform(u: jax.Array, sde: LinearSDE, t_min: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Both ends are weighted, so that rounding cannot pass them.
    return t_min * (1 - u) + sde.t_max * u, jnp.ones_like(u)


def _importance(u: jax.Array, sde: LinearSDE, t_min: jax.Array) -> tuple[jax.Array, jax.Array]:
    top, bottom = sde.log_snr(t_min), sde.log_snr(sde.t_max)
    t = jnp.clip(sde.inverse_log_snr(top * (1 - u) + bottom * u), t_min, sde.t_max)
    rates = sde.rates(t)
    slope = 2 * (rates.sigma_dot / rates.sigma - rates.alpha_dot / rates.alpha)
    return t, (top - bottom) / ((sde.t_max - t_min) * slope)


def _lognormal(u: jax.Array, sde: LinearSDE, t_min: jax.Array) -> tuple[jax.Array, jax.Array]:
    def quantile(t: ArrayLike) -> jax.Array:
        return (-0.5 * sde.log_snr(t) - _LOG_LEVEL_MEAN) / _LOG_LEVEL_STD

    low, high = quantile(t_min), quantile(sde.t_max)
    share = jax.scipy.stats.norm.cdf(low) * (1 - u) + jax.scipy.stats.norm.cdf(high) * u
    # A share that rounds to 0 or 1 lies at infinity: cut it at the end.
    normal = jnp.clip(jax.scipy.stats.norm.ppf(share), low, high)
    t = sde.inverse_log_snr(-2 * (_LOG_LEVEL_MEAN + _LOG_LEVEL_STD * normal))
    return jnp.clip(t, t_min, sde.t_max), jnp.ones_like(u)


TIMES = {
    "uniform": TimeSampler(_uniform, stratified=False),
    "stratified": TimeSampler(_uniform, stratified=True),
    "importance": TimeSampler(_importance, stratified=False),
    "stratified_importance": TimeSampler(_importance, stratified=True),
    "lognormal": TimeSampler(_lognormal, stratified=False),
}


def stratify(key: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    """Uniform numbers ``(u + i/n) mod 1`` of shape ``batch``, one offset ``u`` from ``key``."""
    offset = jax.random.uniform(key)
    place, n = keys.places(math.prod(batch))
    steps = place.astype(offset.dtype).reshape(batch) / n
    return jnp.mod(left_broadcast(offset, steps) + steps, 1.0)


def sample_times(
    key: jax.Array,
    sde: LinearSDE,
    batch: tuple[int, ...] = (),
    *,
    time: str = "uniform",
    t_min: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draw times for a loss, with the factors by which to multiply it (module docstring).

    Args:
      key: typed key; example ``i`` uses ``fold_in(key, i)``, but a stratified sampler draws one
        number for the batch from ``key``.
      sde: the process; all but ``"uniform"`` and ``"stratified"`` need its log-SNR to fall
        strictly.
      batch: ``(n,)``, or ``()`` for one example.
      time: ``"uniform"``, ``"stratified"``, ``"importance"``, ``"stratified_importance"`` or
        ``"lognormal"``.
      t_min: first time, in ``sde``'s range; ``sde.t_min`` if ``None``.

    Returns:
      ``t`` and the factors, both of shape ``batch``, float32 or wider.

    Raises:
      ValueError: an unknown ``time``.
    """
    checks.one_of("time", time, TIMES)
    sampler = TIMES[time]
    first = jnp.asarray(sde.t_min if t_min is None else t_min)
    key = keys.check(key)
    if sampler.stratified:
        u = stratify(key, batch)
    else:
        u = keys.map_batch(jax.random.uniform, key, batch)
    return sampler.map(u, sde, first)
