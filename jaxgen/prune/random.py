"""Random pruning: the baseline that every criterion has to beat."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxgen.core import keys
from jaxgen.prune.masks import Select, split

__all__ = ["random"]


def random(key: jax.Array, params: Any, keep: int | float, *, select: Select | None = None) -> Any:
    """Keep a uniformly random set of weights, of exactly the size asked for.

    Args:
      key: typed key.
      params: pytree of parameters; only shapes and dtypes matter.
      keep: see ``top_k``.
      select: see ``top_k``.

    Returns:
      A mask, see ``top_k``.

    Raises:
      ValueError, TypeError: as ``top_k``; a raw key.
    """
    selected, k = split(params, keep, select)
    # Not the largest of random scores: in reduced precision these would tie, and ties go in order.
    kept = jax.random.permutation(keys.check(key), jnp.arange(selected.n) < k)
    return selected.mask(selected.parts(kept))
