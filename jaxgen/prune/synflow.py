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
from jaxgen.prune.masks import Select, Selected, split

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
      keep: see ``top_k``.
      rounds: T.
      select: see ``top_k``.

    Returns:
      A mask, see ``top_k``.

    Raises:
      ValueError, TypeError: as ``top_k``; ``rounds`` below 1; ``R`` is zero, or not finite
        (deep networks overflow float32: use float64, or scale the parameters).
    """
    selected, k = split(params, keep, select)
    rounds = checks.positive_int("rounds", rounds)
    positive = jax.tree.map(
        lambda leaf: jnp.abs(leaf) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) else leaf,
        params,
    )
    weights = Selected(positive, select)

    def log_flow(leaves: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        flow = jnp.sum(apply(weights.tree(leaves)))
        return jnp.log(flow), flow

    # The shares in float64: at many weights float32 would miss counts.
    shares = (k / selected.n) ** (np.arange(1, rounds + 1) / rounds)
    counts = np.maximum(np.round(selected.n * shares), k).astype(np.int32)

    def one_round(mask: list[jax.Array], count: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        kept = [jnp.where(m, w, 0) for m, w in zip(mask, weights.leaves, strict=True)]
        grads, flow = jax.grad(log_flow, has_aux=True)(kept)
        scores = [jnp.abs(w * g) for w, g in zip(kept, grads, strict=True)]
        return selected.survivors(scores, mask, count), flow

    start = [jnp.ones(leaf.shape, bool) for leaf in weights.leaves]
    mask, flows = jax.lax.scan(one_round, start, jnp.asarray(counts))
    is_sound = jnp.isfinite(flows) & (flows > 0)
    first = jnp.argmin(is_sound)
    message = (
        "the flow through this network is {flow} in round {r} of {rounds}; expected a positive "
        "number: use float64, or scale the parameters"
    )
    known = checks.concrete(first)
    if known is not None and not is_sound[known]:
        raise ValueError(message.format(flow=flows[known], r=known + 1, rounds=rounds))
    flow = flows.at[first].get(mode="promise_in_bounds")
    checks.debug_check(jnp.all(is_sound), message, flow=flow, r=first + 1, rounds=rounds)
    return selected.mask(mask)
