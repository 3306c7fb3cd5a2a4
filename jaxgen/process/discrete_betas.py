r"""The process of a DDPM's discrete betas: integer time, log alpha linear in between.

A network trained on n steps with rates beta_0 .. beta_{n-1} (Ho et al., arXiv 2006.11239) is called
with the integers t = 0 .. n - 1, where

    alpha(t)^2 = prod_{i <= t} (1 - beta_i)         (``alphas_cumprod[t]`` of Hugging Face)

Between integers log alpha is piecewise linear, the "discrete" schedule of DPM-Solver (Lu et al.,
arXiv 2206.00927, appendix D.3), which any real time serves. The product is empty at t = -1: alpha =
1 and sigma = 0 there, the proper end on the data's side. Between -1 and 0 no network was trained.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgen.core import checks
from jaxgen.core.arrays import safe_sqrt
from jaxgen.process.linear import LinearSDE
from jaxgen.process.tables import log_alpha_at, time_of

__all__ = ["discrete_betas"]

_elementwise = functools.partial(jax.jit, inline=True)


@_elementwise
def _sigma(t: jax.Array, table: jax.Array) -> jax.Array:
    return safe_sqrt(-jnp.expm1(2 * log_alpha_at(t, table)))


@_elementwise
def _inverse(value: jax.Array, table: jax.Array) -> jax.Array:
    """The time of a log-SNR: its log alpha, -softplus(-value)/2, looked up in the table."""
    return time_of(-0.5 * jax.nn.softplus(-value), table)


def _table(betas: np.ndarray) -> np.ndarray:
    """Log alpha at t = -1, 0, .., n - 1."""
    bad = ~((betas > 0) & (betas < 1))
    if bad.any():
        i = int(bad.argmax())
        raise ValueError(f"betas[{i}] is {betas[i]}; expected numbers between 0 and 1")
    # The first one's sign makes sigma(-1) a positive zero, by which alpha is +inf.
    return np.concatenate([[-0.0], 0.5 * np.cumsum(np.log1p(-betas))])


def _traced_table(betas: jax.Array) -> jax.Array:
    known = jnp.where((betas > 0) & (betas < 1), betas, jnp.nan)
    steps = 0.5 * jnp.cumsum(jnp.log1p(-known))
    return jnp.concatenate([jnp.full((1,), -0.0, steps.dtype), steps])


def discrete_betas(betas: ArrayLike) -> LinearSDE:
    """The variance-preserving process of a network with discrete betas and integer time steps.

    Time t in [0, n - 1] means ``alphas_cumprod[t]``, so that a network of Hugging Face's kind is
    called with the time as it is; times between integers interpolate log alpha. A grid may end at
    the proper end -1, where sigma is 0 (``final_sigmas_type="zero"`` of ``diffusers``); the default
    end is 0 (``"sigma_min"``). The prior is N(0, I).

    Args:
      betas: ``(n,)``, n >= 2, each in (0, 1), in the order of time; NumPy arrays are summed up in
        float64. From cumulative products ``a`` alone: ``1 - a / concatenate([[1], a[:-1]])``.

    Raises:
      ValueError: ``betas`` is not one axis of at least two, or a known value is not in (0, 1): a
        schedule rescaled to zero terminal SNR needs a last beta just below 1. A traced one gives
        NaN.

    Example:
      >>> import numpy as np
      >>> sde = discrete_betas(np.linspace(1e-4, 0.02, 1000))
      >>> round(float(sde.alpha(499) ** 2), 4)
      0.0786
    """
    known = checks.concrete(betas)
    given: Any = jnp.asarray(betas) if known is None else known.astype(np.float64)
    if given.ndim != 1 or given.shape[0] < 2:
        raise ValueError(f"betas has shape {given.shape}; expected (n,) with n of at least 2")
    last = given.shape[0] - 1
    return LinearSDE(
        log_alpha_at,
        _sigma,
        params=(_traced_table(given) if known is None else _table(given),),
        t_min=0.0,
        t_max=float(last),
        prior_std=1.0,
        kind="discrete_betas",
        inverse_fn=_inverse,
        ends=(-1.0, float(last)),
    )
