"""Draws of tokens from logits, and the filters that people put before them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgen.core.arrays import at_least_f32
from jaxgen.core.checks import positive_int

__all__ = ["check_filters", "filter_logits"]


def check_filters(top_p: Any, top_k: Any) -> None:
    """Refuse a ``top_p`` outside (0, 1] and a ``top_k`` below 1; a traced ``top_p`` is not seen.

    Raises:
      ValueError: which of them, and what was expected.
    """
    if top_k is not None:
        positive_int("top_k", top_k)
    if isinstance(top_p, int | float | np.number) and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected a share in (0, 1]")


def filter_logits(
    logits: ArrayLike, *, top_p: ArrayLike | None = None, top_k: int | None = None
) -> jax.Array:
    """Keep the likely entries of each distribution: the rest become ``-inf``.

    ``top_k`` first, then ``top_p`` (Holtzman et al., arXiv 1904.09751) of what it leaves: the
    fewest entries, most likely first, whose probabilities sum to at least ``top_p``. Ranks decide,
    the lower index first among equals, so that ties never let more through; the likeliest always
    stays.

    Args:
      logits: floating, ``(..., V)``; they need not be normalised.
      top_p: mass to keep, ``()`` in (0, 1]; ``None`` and 1 keep all.
      top_k: entries to keep; ``None``, ``V`` and more keep all.

    Returns:
      Like ``logits``, float32 or wider, not normalised again. NaN for a distribution with a NaN,
      and for a traced ``top_p`` out of range.

    Raises:
      ValueError: ``top_p`` or ``top_k`` out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> p = jnp.array([0.1, 0.5, 0.3, 0.1])
      >>> jnp.exp(filter_logits(jnp.log(p), top_p=0.7)).round(1).tolist()
      [0.0, 0.5, 0.30000001192092896, 0.0]
    """
    check_filters(top_p, top_k)
    logits = jnp.asarray(logits)
    logits = logits.astype(at_least_f32(logits.dtype))
    top_p = None if top_p is None else jnp.asarray(top_p)
    if top_p is None and (top_k is None or top_k >= logits.shape[-1]):
        return logits
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.broadcast_to(jnp.arange(logits.shape[-1]), logits.shape)
    if top_k is not None:
        ranked = jnp.where(rank < top_k, ranked, -jnp.inf)
    if top_p is not None:
        mass = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(mass, axis=-1) - mass
        # The sum of all may be 1 before its last.
        kept = jnp.where((before < top_p) | (rank == 0) | (top_p == 1), ranked, -jnp.inf)
        ranked = jnp.where((top_p > 0) & (top_p <= 1), kept, jnp.nan)
    # A NaN has no rank.
    ranked = jnp.where(jnp.any(jnp.isnan(logits), axis=-1, keepdims=True), jnp.nan, ranked)
    return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)
