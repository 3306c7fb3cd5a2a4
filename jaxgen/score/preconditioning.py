r"""EDM's preconditioning of a network, for any linear process.

Karras et al. (arXiv 2206.00364, equation 7 and table 1) wrap a network F of a state y = y0 + s n
with noise level s and data of standard deviation d about zero as

    D(y, s) = d^2/(s^2 + d^2) y + s d/sqrt(s^2 + d^2) F(y/sqrt(s^2 + d^2), log(s)/4)        (1)

so that F's input and target have unit variance and its errors are amplified least. Any
``LinearSDE`` is of this form with y = (x - mu)/alpha, s = sigma/alpha; multiplied out,

    D = mu + alpha d^2/q^2 (x - mu) + sigma d/q F((x - mu)/q, -log_snr/8),
    q^2 = sigma^2 + alpha^2 d^2                                                            (2)

which divides by neither alpha nor sigma and holds at both ends of time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import checks
from jaxgen.core.arrays import left_broadcast
from jaxgen.process.linear import LinearSDE
from jaxgen.score.prediction import Field

__all__ = ["precondition"]


def precondition(
    net: Callable[[jax.Array, jax.Array], jax.Array],
    sde: LinearSDE,
    sigma_data: ArrayLike = 0.5,
) -> Field:
    """A denoiser (prediction ``"data"``) from a network of standardised input and output.

    Train it by ``denoising_loss(..., prediction="data", weighting="edm", time="lognormal")``.

    Args:
      net: called as ``net(scaled, c_noise)`` with ``scaled`` like ``x`` and of unit variance, and
        ``c_noise = log(sigma/alpha)/4`` of ``t``'s shape in float32 or wider; returns an array
        like ``x``.
      sde: the process. Beyond ``[t_min, t_max]`` the network sees the nearest of the two ends'
        ``c_noise``, so that it meets no infinity.
      sigma_data: standard deviation of ``x0 - mu``.

    Returns:
      The field ``f(x, t)``, like ``x``.
    """

    def field(x: jax.Array, t: jax.Array) -> jax.Array:
        x = checks.floating("x", x, allow_complex=True)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mu = sde.centre(x)
        centred = wide if mu is None else wide - mu
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        size = jnp.sqrt(sigma**2 + (alpha * sigma_data) ** 2)
        level = jnp.clip(sde.log_snr(t), sde.log_snr(sde.t_max), sde.log_snr(sde.t_min))
        scaled = centred / left_broadcast(size, x)
        out = checks.cast_field_output(net(scaled.astype(x.dtype), -level / 8), wide, "net")
        skip = left_broadcast(alpha * sigma_data**2 / size, x) * scaled
        data = skip + left_broadcast(sigma * sigma_data / size, x) * out
        return (data if mu is None else data + mu).astype(x.dtype)

    return field
