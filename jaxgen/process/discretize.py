r"""Linear processes as chains of N steps: the published discrete kernels, carried by index.

A step is ``x_i = mu + a_i (x_{i-1} - mu) + G_i z``, i = 0 .. N-1, with (Song et al., arXiv
2011.13456, appendix E):

- vp (DDPM): beta_i = linspace(beta_min/N, beta_max/N, N), a_i = sqrt(1 - beta_i), G_i =
  sqrt(beta_i); marginals from the cumulative products.
- ve (SMLD): N geometric sigmas from sigma_min to sigma_max, a_i = 1, G_i^2 = sigma_i^2 -
  sigma_{i-1}^2 with sigma_{-1} = 0.
- discrete_betas: a_i = alpha(t_i)/alpha(t_{i-1}), G_i^2 = 1 - a_i^2; with as many steps as betas
  these are the betas given.
- any other: Euler-Maruyama, a_i = 1 + (d log alpha/dt) dt, G_i = g sqrt(dt), at t_i, with dt =
  span/N (1/N for those that end at 1).

The index is carried, never derived from a time: at N = 1000 rounding a float time visits 999 of
the indices. Times are t_i = linspace(t_end, t_max, N).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import checks
from jaxgen.core.arrays import left_broadcast, safe_sqrt
from jaxgen.process.linear import LinearSDE

__all__ = ["DiscreteKernel", "discretize", "span"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DiscreteKernel:
    """A chain of ``n`` linear Gaussian steps (module docstring); every array has shape ``(n,)``.

    Attributes:
      sde: the process that was discretised.
      t: the times of the indices, rising.
      decay: ``a_i``.
      noise_std: ``G_i``.
      alpha: signal coefficient of the marginal after step ``i``.
      sigma: standard deviation of the marginal after step ``i``.
    """

    sde: LinearSDE
    t: jax.Array
    decay: jax.Array
    noise_std: jax.Array
    alpha: jax.Array
    sigma: jax.Array

    @property
    def n(self) -> int:
        """Number of steps."""
        return self.t.shape[0]

    @property
    def beta(self) -> jax.Array:
        """``G_i^2``: for vp the published ``beta_i``."""
        return self.noise_std**2

    def step(self, x: jax.Array, i: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Mean and standard deviation of ``x_i`` given ``x_{i-1} = x``.

        Args:
          x: states ``(batch, *event)`` or one.
          i: index in [0, n), ``()`` or ``(batch,)``; out of range gives NaN.

        Returns:
          The mean, like ``x``, and the standard deviation, of ``i``'s shape.
        """
        decay = self.decay.at[i].get(mode="fill", fill_value=jnp.nan)
        std = self.noise_std.at[i].get(mode="fill", fill_value=jnp.nan)
        mu = self.sde.centre(x)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        scaled = left_broadcast(decay, x) * (wide if mu is None else wide - mu)
        return (scaled if mu is None else mu + scaled).astype(x.dtype), std


def span(sde: LinearSDE) -> jax.Array:
    """Length of time from the proper end on the data's side, or ``t_min``, to ``t_max``."""
    return jnp.asarray(sde.t_max) - (sde.t_min if sde.ends is None else sde.ends[0])


def _chain(sde: LinearSDE, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``a_i``, ``G_i`` and the marginal variance of a chain from data, by recursion."""
    t = jnp.linspace(sde.t_end, sde.t_max, n)
    dt = span(sde) / n
    decay, noise_std = 1 + sde.log_alpha_dot(t) * dt, sde.diffusion(t) * jnp.sqrt(dt)

    def advance(variance, step):
        a, g = step
        variance = a**2 * variance + g**2
        return variance, variance

    _, variance = jax.lax.scan(advance, jnp.zeros((), t.dtype), (decay, noise_std))
    return decay, noise_std, variance


def discretize(sde: LinearSDE, n: int) -> DiscreteKernel:
    """The chain of ``n`` steps of a process.

    Raises:
      ValueError: ``n < 2``, or a vp process with ``n <= beta_max``, where ``1 - beta`` reaches
        zero (at least ``beta_max + 1`` steps are needed). A traced ``beta_max`` gives NaN instead.
    """
    n = checks.positive_int("n", n, least=2)
    t = jnp.linspace(sde.t_end, sde.t_max, n)
    if sde.kind == "vp":
        beta_min, beta_max = sde.params
        known = checks.concrete(beta_max)
        if known is not None and n <= known:
            raise ValueError(
                f"n is {n} steps for a vp process with beta_max {float(known)}; expected at least "
                f"{int(known) + 1}, since 1 - beta_max/n must stay positive"
            )
        beta = jnp.linspace(beta_min / n, beta_max / n, n)
        beta = jnp.where(beta < 1, beta, jnp.nan)
        log_alpha = 0.5 * jnp.cumsum(jnp.log1p(-beta))
        decay, noise_std = jnp.sqrt(1 - beta), jnp.sqrt(beta)
        alpha, sigma = jnp.exp(log_alpha), jnp.sqrt(-jnp.expm1(2 * log_alpha))
    elif sde.kind == "ve":
        sigma_min, sigma_max = sde.params
        sigma = jnp.exp(jnp.linspace(jnp.log(sigma_min), jnp.log(sigma_max), n))
        before = jnp.concatenate([jnp.zeros((1,), sigma.dtype), sigma[:-1]])
        # The difference of squares by its factors: neighbouring sigmas are close.
        noise_std = safe_sqrt((sigma - before) * (sigma + before))
        decay = alpha = jnp.ones_like(sigma)
    elif sde.kind == "discrete_betas":
        log_alpha = sde.log_alpha(t)
        fall = jnp.diff(log_alpha, prepend=jnp.zeros((1,), log_alpha.dtype))
        decay, noise_std = jnp.exp(fall), jnp.sqrt(-jnp.expm1(2 * fall))
        alpha, sigma = jnp.exp(log_alpha), jnp.sqrt(-jnp.expm1(2 * log_alpha))
    else:
        decay, noise_std, variance = _chain(sde, n)
        alpha, sigma = jnp.cumprod(decay), safe_sqrt(variance)
    return DiscreteKernel(sde, t, decay, noise_std, alpha, sigma)
