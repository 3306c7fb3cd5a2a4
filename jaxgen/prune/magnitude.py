"""Magnitude pruning (Han et al., 2015): keep the largest weights, untrained or trained."""

from typing import Any

import jax.numpy as jnp

from jaxgen.prune.masks import Select, split

__all__ = ["magnitude"]


def magnitude(params: Any, keep: int | float, *, select: Select | None = None) -> Any:
    """Keep the weights of largest absolute value over all selected leaves.

    Args:
      params: pytree of parameters.
      keep: see ``top_k``.
      select: see ``top_k``.

    Returns:
      A mask, see ``top_k``.

    Raises:
      ValueError, TypeError: as ``top_k``.
    """
    selected, k = split(params, keep, select)
    return selected.mask(selected.largest([jnp.abs(leaf) for leaf in selected.leaves], k))
