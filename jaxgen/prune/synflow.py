r"""SynFlow (Tanaka et al., NeurIPS 2020, arXiv 2006.05467): prune by conserved flow, without data.

With every parameter replaced by its absolute value and an input of ones, ``R`` is the sum of the
outputs and the score of weight w ``|w dR/dw|``. It is taken anew under the mask in each of T
rounds, of which round t keeps the share ``keep^(t/T)``: that is what keeps a layer from vanishing.
Ranks do not change if all scores are divided by R, so the gradient of ``log R`` is used.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.core import checks
from jaxgen.prune.masks import Select, split

__all__ = ["synflow"]


def synflow(
    apply: Callable[[Any], jax.Array],
    params: Any,
    keep: int | float,
    *,
    rounds: int = 100,
    select: Select | None = None,
) -> Any:
    """Keep the weights that carry the most flow from ones at the input to the output.

    Args:
      apply: ``f(params) -> outputs`` of the network on an input of ones, with normalisation in
        evaluation mode; any shape.
      params: pytree of real parameters.
      keep: a count (int) or a share in (0, 1] (float) of the selected weights.
      rounds: T.
      select: see ``top_k``.

    Returns:
      A mask, see ``top_k``.

    Raises:
      ValueError, TypeError: as ``top_k``; ``rounds`` below 1; ``R`` is not finite (deep networks
        overflow float32: use float64, or scale the parameters).
    """
    selected, k = split(params, keep, select)
    rounds = checks.positive_int("rounds", rounds)
    positive = selected.tree([jnp.abs(leaf) for leaf in selected.leaves])
    positive = jax.tree.map(
        lambda leaf: jnp.abs(leaf) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) else leaf,
        positive,
    )
    weights = type(selected)(positive, select)

    def log_flow(leaves: list[jax.Array]) -> jax.Array:
        return jnp.log(jnp.sum(apply(weights.tree(leaves))))

    # The shares in float64: at many weights float32 would miss counts.
    shares = (k / selected.n) ** (np.arange(1, rounds + 1) / rounds)
    counts = np.maximum(np.round(selected.n * shares), k).astype(np.int32)

    def one_round(mask: list[jax.Array], count: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        kept = [jnp.where(m, w, 0) for m, w in zip(mask, weights.leaves, strict=True)]
        value, grads = jax.value_and_grad(log_flow)(kept)
        scores = [
            jnp.where(m, jnp.abs(w * g), -jnp.inf)
            for m, w, g in zip(mask, kept, grads, strict=True)
        ]
        return selected.largest(scores, count), value

    start = [jnp.ones(leaf.shape, bool) for leaf in weights.leaves]
    mask, values = jax.lax.scan(one_round, start, jnp.asarray(counts))
    is_finite = jnp.all(jnp.isfinite(values))
    known = checks.concrete(is_finite)
    if known is not None and not known:
        raise ValueError(
            "the flow of this network is zero or overflows; use float64, or scale its parameters"
        )
    checks.debug_check(is_finite, "the flow of this network is zero or overflows")
    return selected.mask(mask)
