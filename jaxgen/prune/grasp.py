r"""GraSP (Wang et al., ICLR 2020, arXiv 2002.07376): keep the flow of gradients.

To first order, removing weight w changes ``|g|^2`` by ``-2 w (H g)``, with g the gradient and H the
Hessian of the loss; the weights of largest ``w (H g)`` stay. ``H g`` comes by one forward
derivative of the gradient, so no Hessian is built.
"""

from collections.abc import Callable
from typing import Any

import jax

from jaxgen.prune.masks import Select, split

__all__ = ["grasp"]


def grasp(
    loss_fn: Callable[[Any], jax.Array],
    params: Any,
    keep: int | float,
    *,
    select: Select | None = None,
) -> Any:
    """Keep the weights of largest ``w (H g)``.

    Args:
      loss_fn: ``f(params) -> ()``, the loss on some examples; published with logits divided by a
        temperature of 200.
      params: pytree of real parameters.
      keep: see ``top_k``.
      select: see ``top_k``.

    Returns:
      A mask, see ``top_k``.

    Raises:
      ValueError, TypeError: as ``top_k``; a loss that is no real scalar.
    """
    selected, k = split(params, keep, select)
    gradient = jax.grad(lambda leaves: loss_fn(selected.tree(leaves)))
    grads = gradient(selected.leaves)
    _, flow = jax.jvp(gradient, (selected.leaves,), (grads,))
    scores = [w * f for w, f in zip(selected.leaves, flow, strict=True)]
    return selected.mask(selected.largest(scores, k))
