"""Masks as pytrees of bools, like the parameters: made from scores, applied, kept in training.

One threshold serves all selected leaves together (global pruning); leaves that are not selected,
such as biases and norms, stay whole and do not count.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxgen.core.arrays import at_least_f32
from jaxgen.core.topk import count_kept, top_k_mask

__all__ = ["Selected", "apply_mask", "masked", "select_weights", "split", "top_k"]

Select = Callable[[str, Any], bool]


def select_weights(path: str, leaf: Any) -> bool:
    """The default selection: floating or complex leaves of two or more axes."""
    del path
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) and jnp.ndim(leaf) >= 2


class Selected:
    """The leaves of a pytree that are pruned, and the way back.

    Attributes:
      leaves: the selected leaves, in the order of the tree.
      n: how many entries they have together.
    """

    def __init__(self, tree: Any, select: Select | None):
        select = select_weights if select is None else select
        with_path, self._structure = jax.tree_util.tree_flatten_with_path(tree)
        self._all = [leaf for _, leaf in with_path]
        names = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in with_path]
        for name, leaf in zip(names, self._all, strict=True):
            if not isinstance(leaf, int | float | complex) and not hasattr(leaf, "dtype"):
                raise TypeError(
                    f"{name or 'the tree'} is {type(leaf).__name__}; expected an array: partition "
                    "other leaves out (equinox.partition)"
                )
        pairs = zip(names, self._all, strict=True)
        self._at = [i for i, (name, leaf) in enumerate(pairs) if select(name, leaf)]
        if not self._at:
            raise ValueError(f"no leaf is selected for pruning among {', '.join(names) or 'none'}")
        self.leaves = [jnp.asarray(self._all[i]) for i in self._at]
        self.n = sum(leaf.size for leaf in self.leaves)

    def tree(self, leaves: list[Any]) -> Any:
        """The whole pytree with other selected leaves."""
        new = list(self._all)
        for i, leaf in zip(self._at, leaves, strict=True):
            new[i] = leaf
        return jax.tree.unflatten(self._structure, new)

    def mask(self, leaves: list[Any]) -> Any:
        """A mask: these leaves, and all true elsewhere."""
        new = [jnp.ones(jnp.shape(leaf), bool) for leaf in self._all]
        for i, leaf in zip(self._at, leaves, strict=True):
            new[i] = leaf
        return jax.tree.unflatten(self._structure, new)

    def largest(self, scores: list[jax.Array], k: Any) -> list[jax.Array]:
        """Where the ``k`` largest scores over all selected leaves stand."""
        return self.parts(top_k_mask(jnp.concatenate([s.reshape(-1) for s in scores]), k))

    def survivors(self, scores: list[jax.Array], kept: list[jax.Array], k: Any) -> list[jax.Array]:
        """Where the ``k`` largest scores among those kept stand; NaN is the least of them."""

        def rank(score: jax.Array, kept: jax.Array) -> jax.Array:
            score = score.astype(at_least_f32(score.dtype))
            score = jnp.where(jnp.isnan(score), jnp.finfo(score.dtype).min, score)
            return jnp.where(kept, score, -jnp.inf)

        return self.largest([rank(s, m) for s, m in zip(scores, kept, strict=True)], k)

    def parts(self, flat: jax.Array) -> list[jax.Array]:
        """An array ``(n,)`` cut into the shapes of the selected leaves."""
        start, out = 0, []
        for leaf in self.leaves:
            out.append(flat[start : start + leaf.size].reshape(leaf.shape))
            start += leaf.size
        return out


def split(params: Any, keep: int | float, select: Select | None) -> tuple[Selected, int]:
    """The leaves to prune and how many of their entries stay."""
    selected = Selected(params, select)
    return selected, count_kept("keep", keep, selected.n)


def top_k(scores: Any, keep: int | float, *, select: Select | None = None) -> Any:
    """Keep the entries of largest score: exactly as many as asked, ties by position.

    Args:
      scores: pytree of real arrays, like the parameters; NaN ranks last.
      keep: a count (int) or a share in (0, 1] (float) of the selected entries.
      select: ``f(path, leaf) -> bool``, which leaves are pruned, ``path`` such as
        ``"dense/kernel"``; ``select_weights`` if ``None``.

    Returns:
      A mask: pytree of bool arrays, like ``scores``; all true where not selected.

    Raises:
      ValueError: no leaf is selected, or ``keep`` is out of range.
      TypeError: ``keep`` is neither int nor float.

    Example:
      >>> import jax.numpy as jnp
      >>> top_k({"w": jnp.array([[3.0, 1.0], [2.0, 0.0]])}, 0.5)["w"].tolist()
      [[True, False], [True, False]]
    """
    selected, k = split(scores, keep, select)
    return selected.mask(selected.largest(selected.leaves, k))


def apply_mask(tree: Any, mask: Any) -> Any:
    """Zero what the mask leaves out.

    Args:
      tree: parameters, gradients or updates.
      mask: pytree of bool arrays of the same structure.

    Raises:
      ValueError: the trees differ in structure, or a leaf in shape.
    """

    def one(path: Any, leaf: Any, kept: Any) -> jax.Array:
        if jnp.shape(leaf) != jnp.shape(kept):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"{name or 'the leaf'} has shape {jnp.shape(leaf)} and its mask {jnp.shape(kept)}"
            )
        leaf = jnp.asarray(leaf)
        return jnp.where(kept, leaf, jnp.zeros((), leaf.dtype))

    return jax.tree_util.tree_map_with_path(one, tree, mask)


def masked(mask: Any) -> optax.GradientTransformation:
    """An optax transform that updates only what is kept; put it last in the chain.

    Pruned weights then stay at zero under any rule, weight decay and momentum included.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> mask = {"w": jnp.array([[True, False]])}
      >>> rule = optax.chain(optax.adam(1e-3), masked(mask))
    """
    return optax.stateless(lambda updates, params: apply_mask(updates, mask))
