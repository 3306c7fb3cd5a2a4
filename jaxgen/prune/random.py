"""Random pruning: the baseline that every criterion has to beat."""

from typing import Any

import jax

from jaxgen.core import keys
from jaxgen.core.arrays import real_dtype
from jaxgen.prune.masks import Select, split

__all__ = ["random"]


def random(key: jax.Array, params: Any, keep: int | float, *, select: Select | None = None) -> Any:
    """Keep a uniformly random set of weights, of exactly the size asked for.

    Args:
      key: typed key.
      params: pytree of parameters; only shapes and dtypes matter.
      keep: a count (int) or a share in (0, 1] (float) of the selected weights.
      select: see ``top_k``.

    Returns:
      A mask, see ``top_k``.

    Raises:
      ValueError, TypeError: as ``top_k``; a raw key.
    """
    selected, k = split(params, keep, select)
    own = jax.random.split(keys.check(key), len(selected.leaves))
    scores = [
        jax.random.uniform(one, leaf.shape, real_dtype(leaf.dtype))
        for one, leaf in zip(own, selected.leaves, strict=True)
    ]
    return selected.mask(selected.largest(scores, k))
