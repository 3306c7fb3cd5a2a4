r"""Integers made continuous, and likelihoods of continuous data read back as bits of integers.

Data of ``levels`` integer values k are spread uniformly over bins of equal width w, so that the
density p of the spread data bounds the probability of the integers (Theis et al., arXiv
1511.01844, section 3.1):

    log P(k) >= E_u[log p((k + u) w)] + d log w,      w = (high - low)/levels               (1)
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import checks, keys

__all__ = ["bits_per_dim", "dequantize"]


def _check_bins(levels: int, data_range: Any) -> tuple[float, float]:
    checks.positive_int("levels", levels, least=2)
    try:
        low, high = (float(end) for end in data_range)
    except (TypeError, ValueError):
        raise ValueError(
            f"data_range is {data_range!r}; expected the two ends of the scaled data, such as "
            "(0, 1) or (-1, 1)"
        ) from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"data_range is {data_range!r}; expected two finite rising numbers")
    return low, high


def dequantize(
    key: jax.Array,
    integers: ArrayLike,
    levels: int = 256,
    *,
    data_range: tuple[float, float] = (0.0, 1.0),
    event_ndim: int | None = None,
) -> jax.Array:
    """Uniform dequantisation: integer ``k`` becomes a uniform draw from its bin of ``data_range``.

    The bins divide ``data_range`` into ``levels`` equal parts, ``(k + u)/levels`` for ``(0, 1)``.

    Args:
      key: typed key; example ``i`` of a batch uses ``fold_in(key, i)``.
      integers: integer dtype, values in [0, levels), ``(batch, *event)``, or one example if
        ``event_ndim=integers.ndim``.
      levels: number of values the data set has: 256 for 8-bit images, 17 for scikit-learn's
        digits.
      data_range: the ends of the scaled data.
      event_ndim: see above.

    Returns:
      float32 of the same shape, in ``data_range`` (both ends included, by rounding). A value out
      of range gives NaN under tracing, and an error under ``checkify``.

    Raises:
      TypeError: ``integers`` has no integer dtype, or a raw key.
      ValueError: ``levels < 2``, a wrong ``data_range``, or values out of range where known.
    """
    low, high = _check_bins(levels, data_range)
    k = jnp.asarray(integers)
    if not jnp.issubdtype(k.dtype, jnp.integer):
        raise TypeError(f"integers has dtype {k.dtype}; expected an integer dtype")
    # Compared in int32: `levels` need not fit the integers' own dtype (256 in uint8).
    okay = (k.astype(jnp.int32) >= 0) & (k.astype(jnp.int32) < levels)
    known = checks.concrete(k)
    if known is not None and known.size and not (known.min() >= 0 and known.max() < levels):
        raise ValueError(
            f"integers has values from {known.min()} to {known.max()}; expected [0, {levels})"
        )
    checks.debug_check(jnp.all(okay), "integers has values outside [0, levels)")
    uniform = keys.uniform(key, k.shape, jnp.float32, event_ndim)
    unit = (k.astype(jnp.float32) + uniform) / levels
    return jnp.where(okay, low + (high - low) * unit, jnp.nan)


def bits_per_dim(
    log_prob: ArrayLike, dims: int, levels: int, data_range: tuple[float, float]
) -> jax.Array:
    """Bits per dimension of integer data from the log-density of their dequantised values, (1).

    ``-log_prob/(dims ln 2) + log2(levels/(high - low))``: the density of a bin times its width.
    For 8-bit images the second term is 8 for data in [0, 1] and 7 for [-1, 1].

    Args:
      log_prob: nats per example of the scaled, dequantised data, any shape; floating.
      dims: entries of one example.
      levels: number of values of the data set, as for ``dequantize``.
      data_range: the ends of the scaled data, as for ``dequantize``.

    Returns:
      Bits per dimension, of ``log_prob``'s shape.

    Raises:
      TypeError: ``log_prob`` is not floating.
      ValueError: ``dims < 1``, ``levels < 2`` or a ``data_range`` that is not two rising numbers.

    Example:
      >>> float(bits_per_dim(0.0, 3, 256, (-1, 1)))  # a uniform density over a unit volume
      7.0
    """
    low, high = _check_bins(levels, data_range)
    dims = checks.positive_int("dims", dims)
    log_prob = checks.floating("log_prob", log_prob)
    return -log_prob / (dims * math.log(2)) + math.log2(levels / (high - low))
