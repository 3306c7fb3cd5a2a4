"""Log-weights of particles: their mean, their normalised form and how many they are worth."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core.arrays import at_least_f32
from jaxgen.core.checks import floating

__all__ = ["check_log_weights", "ess", "log_mean_exp", "log_sum_exp", "normalise"]


def check_log_weights(log_weights: ArrayLike) -> jax.Array:
    """Log-weights as an array in float32 or wider.

    Raises:
      TypeError: an integer dtype.
      ValueError: another shape than ``(n,)`` with at least one particle.
    """
    array = floating("log_weights", log_weights)
    if array.ndim != 1 or array.shape[0] == 0:
        raise ValueError(
            f"log_weights has shape {array.shape}; expected (n,) with at least one particle "
            "(vmap for several populations)"
        )
    return array.astype(at_least_f32(array.dtype))


def _max(array: jax.Array, axis_name: str | None) -> jax.Array:
    top = jnp.max(array)
    return top if axis_name is None else jax.lax.pmax(top, axis_name)


def _sum(array: jax.Array, axis_name: str | None) -> jax.Array:
    total = jnp.sum(array)
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def _shifted(array: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
    # Without a shift where the largest is infinite: inf - inf would be NaN.
    top = jax.lax.stop_gradient(_max(array, axis_name))
    shift = jnp.where(jnp.isfinite(top), top, 0.0)
    return jnp.exp(array - shift), shift


def log_sum_exp(log_weights: ArrayLike, *, axis_name: str | None = None) -> jax.Array:
    """``log sum_i exp(log_weights_i)``, ``()``; -inf where all are -inf, NaN where one is NaN.

    Args:
      log_weights: ``(n,)``.
      axis_name: inside ``shard_map`` or ``pmap``, the mapped axis over which particles are split.
    """
    weights, shift = _shifted(check_log_weights(log_weights), axis_name)
    return jnp.log(_sum(weights, axis_name)) + shift


def log_mean_exp(log_weights: ArrayLike, *, axis_name: str | None = None) -> jax.Array:
    """``log((1/n) sum_i exp(log_weights_i))``, ``()``: an increment of a log normaliser.

    -inf where all are -inf, NaN where one is NaN.

    Args:
      log_weights: ``(n,)``.
      axis_name: inside ``shard_map`` or ``pmap``, the mapped axis over which particles are split.

    Example:
      >>> import jax.numpy as jnp
      >>> float(log_mean_exp(jnp.array([0.0, -jnp.inf])))
      -0.6931471824645996
    """
    array = check_log_weights(log_weights)
    n = array.shape[0] if axis_name is None else array.shape[0] * jax.lax.axis_size(axis_name)
    return log_sum_exp(array, axis_name=axis_name) - jnp.log(jnp.asarray(n, array.dtype))


def normalise(log_weights: ArrayLike, *, axis_name: str | None = None) -> jax.Array:
    """Log-weights shifted so that the weights sum to one; all NaN where all are -inf.

    Args:
      log_weights: ``(n,)``.
      axis_name: inside ``shard_map`` or ``pmap``, the mapped axis over which particles are split.
    """
    array = check_log_weights(log_weights)
    weights, shift = _shifted(array, axis_name)
    # In two steps: a large shift would round away what the sum says.
    return (array - shift) - jnp.log(_sum(weights, axis_name))


def ess(log_weights: ArrayLike, *, axis_name: str | None = None) -> jax.Array:
    """Effective sample size ``(sum w)^2 / sum w^2``, ``()``, between 1 and n.

    NaN where all log-weights are -inf or one is NaN.

    Args:
      log_weights: ``(n,)``, normalised or not.
      axis_name: inside ``shard_map`` or ``pmap``, the mapped axis over which particles are split.

    Example:
      >>> import jax.numpy as jnp
      >>> float(ess(jnp.zeros(4))), float(ess(jnp.array([0.0, -jnp.inf])))
      (4.0, 1.0)
    """
    weights, _ = _shifted(check_log_weights(log_weights), axis_name)
    return _sum(weights, axis_name) ** 2 / _sum(weights**2, axis_name)
