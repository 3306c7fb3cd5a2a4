"""SNIP (Lee et al., ICLR 2019, arXiv 1810.02340): keep what the loss depends on most.

The sensitivity of weight w is ``|w dL/dw|``, on a few examples of every class, before training.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxgen.prune.masks import Select, split

__all__ = ["snip"]


def snip(
    loss_fn: Callable[[Any], jax.Array],
    params: Any,
    keep: int | float,
    *,
    select: Select | None = None,
) -> Any:
    """Keep the weights of largest ``|w dL/dw|``.

    Args:
      loss_fn: ``f(params) -> ()``, the loss on some examples (about ten of a class).
      params: pytree of parameters.
      keep: see ``top_k``.
      select: see ``top_k``.

    Returns:
      A mask, see ``top_k``.

    Raises:
      ValueError, TypeError: as ``top_k``; a loss that is no real scalar.
    """
    selected, k = split(params, keep, select)
    grads = jax.grad(lambda leaves: loss_fn(selected.tree(leaves)))(selected.leaves)
    scores = [jnp.abs(w * g) for w, g in zip(selected.leaves, grads, strict=True)]
    return selected.mask(selected.largest(scores, k))
