"""The k largest, exactly: by rank, never by a threshold, which ties would overrun."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgen.core.arrays import at_least_f32

__all__ = ["count_kept", "top_k_mask"]


def count_kept(name: str, keep: int | float, n: int) -> int:
    """How many of ``n`` a budget means: an ``int`` is the count, a ``float`` a share in (0, 1].

    A share is rounded to the nearest count.

    Raises:
      ValueError: a share outside (0, 1], or a count below 1 or above ``n``.
      TypeError: neither an int nor a float.
    """
    if isinstance(keep, np.integer | np.floating):
        keep = keep.item()
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise TypeError(f"{name} is {keep!r}; expected a count (int) or a share (float)")
    if isinstance(keep, float):
        if not 0 < keep <= 1:
            raise ValueError(f"{name} is {keep}; expected a share in (0, 1]")
        keep = round(keep * n)
    if not 1 <= keep <= n:
        raise ValueError(f"{name} comes to {keep} of {n}; expected at least 1 and at most {n}")
    return keep


def top_k_mask(values: ArrayLike, k: ArrayLike) -> jax.Array:
    """Where the ``k`` largest values stand: exactly ``k``, the lower index first among equals.

    Args:
      values: real, any shape, ordered row-major; NaN ranks below everything.
      k: how many, ``()``; may be traced.

    Returns:
      bool, of ``values``' shape.

    Example:
      >>> import jax.numpy as jnp
      >>> top_k_mask(jnp.array([1.0, 3.0, 3.0, 3.0]), 2).tolist()
      [False, True, True, False]
    """
    values = jnp.asarray(values)
    flat = values.reshape(-1).astype(at_least_f32(values.dtype))
    # Sorts put NaN last, so that it takes part only when there is nothing else left.
    order = jnp.argsort(-flat, stable=True)
    chosen = jnp.arange(flat.size) < k
    return (
        jnp.zeros(flat.shape, bool).at[order].set(chosen, unique_indices=True).reshape(values.shape)
    )
