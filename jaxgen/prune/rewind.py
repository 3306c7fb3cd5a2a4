r"""Lottery-ticket rewinding (Frankle et al., ICML 2020, arXiv 1912.05671), with iterative pruning.

Train; of the weights that are left prune a share by magnitude; set the others back to what they
were at the start, or early in training; repeat until the budget is met.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxgen.core import checks, keys
from jaxgen.core import progress as progress_meter
from jaxgen.prune.masks import Select, Selected, apply_mask, split

__all__ = ["rewind"]


def _counts(n: int, k: int, rate: float) -> list[int]:
    """Survivors after each round, from below ``n`` down to ``k``."""
    counts = []
    while n > k:
        n = max(k, n - max(1, round(rate * n)))
        counts.append(n)
    return counts


def _check_structure(name: str, tree: Any, params: Any) -> None:
    found: Any = jax.tree.structure(tree)
    expected: Any = jax.tree.structure(params)
    if found != expected:
        raise ValueError(f"{name} has another structure than params: {found}; expected {expected}")


def _checked(
    r: int, rounds: int, trained: list[jax.Array], kept: list[jax.Array], goal: Selected
) -> Any:
    """``goal`` as a pytree: NaN, or an error, where a weight that is kept trained to NaN or inf."""
    is_bad = [m & ~jnp.isfinite(w) for m, w in zip(kept, trained, strict=True)]
    bad = jnp.sum(jnp.stack([jnp.sum(b, dtype=jnp.int32) for b in is_bad]))
    message = "round {r} of {rounds} trained {bad} of the weights left to NaN or infinity"
    known = checks.concrete(bad)
    if known is not None and known > 0:
        raise ValueError(message.format(r=r, rounds=rounds, bad=known))
    checks.debug_check(bad == 0, message, r=r, rounds=rounds, bad=bad)
    nan = [jnp.full((), jnp.nan, leaf.dtype) for leaf in goal.leaves]
    return goal.tree([jnp.where(bad == 0, w, x) for w, x in zip(goal.leaves, nan, strict=True)])


def rewind(
    key: jax.Array,
    train_fn: Callable[[jax.Array, Any, Any], Any],
    params: Any,
    keep: int | float,
    *,
    rate: float = 0.2,
    rewind_params: Any = None,
    select: Select | None = None,
    progress: bool | None = None,
) -> tuple[Any, Any]:
    """Find a sparse network that trains from its own start.

    Args:
      key: typed key; round ``r`` trains with ``fold_in(key, r)``.
      train_fn: ``f(key, params, mask) -> params`` trained, pruned weights kept at zero (``masked``
        does that); called once a round.
      params: pytree of parameters at the start.
      keep: see ``top_k``.
      rate: share of the survivors that a round prunes, in (0, 1).
      rewind_params: parameters to go back to, early in training; ``params`` if ``None``.
      select: see ``top_k``.
      progress: ``False`` shows nothing; else a bar over the rounds, plain lines off a terminal.

    Returns:
      The mask, and the parameters gone back to, under the mask: train them once more.

    Raises:
      ValueError: ``rate`` outside (0, 1), trees that differ, a round that trained a weight to NaN
        or infinity (where values are traced: an error under ``checkify``, and NaN parameters), or
        as ``top_k``.
      TypeError: a raw key, or as ``top_k``.
    """
    keys.check(key)
    if not 0 < rate < 1:
        raise ValueError(f"rate is {rate}; expected a share in (0, 1)")
    selected, k = split(params, keep, select)
    goal = params if rewind_params is None else rewind_params
    _check_structure("rewind_params", goal, params)
    kept = [jnp.ones(leaf.shape, bool) for leaf in selected.leaves]
    mask, start = selected.mask(kept), params
    counts = _counts(selected.n, k, rate)
    with progress_meter.meter(
        len(counts), description="rewinding", unit="round", enabled=progress
    ) as meter:
        for r, count in enumerate(counts):
            trained = train_fn(jax.random.fold_in(key, r), start, mask)
            _check_structure("what train_fn returned", trained, params)
            after = Selected(trained, select).leaves
            goal = _checked(r + 1, len(counts), after, kept, Selected(goal, select))
            kept = selected.survivors([jnp.abs(w) for w in after], kept, count)
            mask = selected.mask(kept)
            start = apply_mask(goal, mask)
            meter.update(1, kept=count)
    return mask, apply_mask(goal, mask)
