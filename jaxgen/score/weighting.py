r"""How much a prediction error counts at each time, in one currency for all prediction kinds.

The state being known, an error in one kind of prediction is a multiple of the error in another.
With e the error of the noise and c_k of the table, the error of kind k has |e_k| = c_k |e|:

    noise 1,   data sigma/alpha,   score 1/sigma,   v (alpha^2 + sigma^2)/alpha,
    velocity sigma_dot - alpha_dot sigma/alpha = g^2/(2 sigma)                             (1)

A weighting is a function ``w(t, sde)`` of shape ``t``, the weight of the *squared noise error*. A
loss for a network of kind k is therefore w |e_k|^2/c_k^2, and its expectation does not depend on
the kind. The rows of ``WEIGHTINGS``, with s = sigma/alpha:

| name       | on the noise error | what it is                                    | source |
|------------|--------------------|-----------------------------------------------|--------|
| simple     | by kind            | plain squared error of what is predicted; of  | [1]    |
|            |                    | a score that of sigma times it, the noise     |        |
| likelihood | g^2/sigma^2        | g^2 times the squared score error             | [2]    |
| edm        | 1 + s^2/d^2        | (s^2 + d^2)/(s d)^2 times that of the data    | [3]    |
| min_snr    | min(1, gamma s^2)  | min(1/s^2, gamma) times that of the data      | [4]    |

[1] Ho et al., arXiv 2006.11239, equation 14; Song et al., arXiv 2011.13456, equation 7, [2] Song et
al., arXiv 2101.09258, equation 7, [3] Karras et al., arXiv 2206.00364, table 1, [4] Hang et al.,
arXiv 2303.09556, section 3.4. ``edm`` uses d = 0.5 and ``min_snr`` gamma = 5; their functions here
take others.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import checks
from jaxgen.process.linear import LinearSDE, Rates

__all__ = ["WEIGHTINGS", "Weighting", "edm", "error_scale", "likelihood", "min_snr", "weight"]

Weighting = Callable[[jax.Array, LinearSDE], jax.Array]


def error_scale(prediction: str, rates: Rates) -> jax.Array:
    """``c_k`` of equation (1), of the rates' shape: the kind's error per error of the noise."""
    alpha, sigma, alpha_dot, sigma_dot = rates
    if prediction == "noise":
        return jnp.ones_like(sigma)
    if prediction == "data":
        return sigma / alpha
    if prediction == "score":
        return 1 / sigma
    if prediction == "v":
        return (alpha**2 + sigma**2) / alpha
    return sigma_dot - alpha_dot * sigma / alpha


def likelihood(t: jax.Array, sde: LinearSDE) -> jax.Array:
    """``g^2/sigma^2``: half the loss then bounds the negative log-likelihood up to a constant."""
    rates = sde.rates(t)
    return 2 * (rates.sigma_dot / rates.sigma - rates.alpha_dot / rates.alpha)


def edm(sigma_data: ArrayLike = 0.5) -> Weighting:
    """EDM's weighting, which gives the preconditioned network a target of unit variance.

    Args:
      sigma_data: standard deviation of the data about the anchor.
    """

    def weighting(t: jax.Array, sde: LinearSDE) -> jax.Array:
        return 1 + jnp.exp(-sde.log_snr(t)) / sigma_data**2

    return weighting


def min_snr(gamma: ArrayLike = 5.0) -> Weighting:
    """Min-SNR: ``min(snr, gamma)`` on the data error, ``min(1, gamma/snr)`` on the noise error.

    Args:
      gamma: the signal-to-noise ratio beyond which the data error counts no more.
    """

    def weighting(t: jax.Array, sde: LinearSDE) -> jax.Array:
        return jnp.minimum(1.0, gamma * jnp.exp(-sde.log_snr(t)))

    return weighting


# None: the kind's own squared error.
WEIGHTINGS: dict[str, Weighting | None] = {
    "simple": None,
    "likelihood": likelihood,
    "edm": edm(),
    "min_snr": min_snr(),
}


def weight(weighting: str | Weighting, prediction: str, t: jax.Array, sde: LinearSDE) -> jax.Array:
    """The factor of the squared error of a network of this kind, of ``t``'s shape.

    Args:
      weighting: a row of ``WEIGHTINGS`` or a function ``(t, sde) -> weight`` of the squared noise
        error.
      prediction: the network's kind.
      t: times.
      sde: the process.

    Raises:
      ValueError: an unknown name, or a function's result of another shape than ``t``.
    """
    if callable(weighting):
        function: Weighting | None = weighting
    else:
        checks.one_of("weighting", weighting, WEIGHTINGS)
        function = WEIGHTINGS[weighting]
    if function is None:
        return sde.sigma(t) ** 2 if prediction == "score" else jnp.ones_like(t)
    value = jnp.asarray(function(t, sde))
    if value.shape != t.shape:
        raise ValueError(
            f"weighting(t, sde) returned shape {value.shape} for t of shape {t.shape}; expected "
            "the same"
        )
    return value / error_scale(prediction, sde.rates(t)) ** 2
