"""The smaller dense network of the same budget: what sharing and pruning have to beat."""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from jaxgen.core.checks import one_of, positive_int

__all__ = ["width_for_budget"]


def width_for_budget(
    family: Callable[[int], Any],
    m: int,
    *,
    multiple_of: int = 1,
    count: Literal["selected", "all"] = "selected",
    select: Callable[[str, Any], bool] | None = None,
) -> int:
    """The largest width whose network has at most ``m`` parameters.

    Only shapes are worked out, and no network is built.

    Args:
      family: ``f(width) -> params``, a pytree of arrays or of their shapes, such as
        ``lambda width: UNet(width=width).init(key, x, t)["params"]``. Leaves that are no
        arrays do not count. The number of parameters must grow with the width.
      m: the budget, a count of at least 1.
      multiple_of: widths are multiples of this one.
      count: ``"selected"`` counts selected leaves, as the budget of ``share.plan`` and of pruning
        does; ``"all"`` every leaf.
      select: ``f(path, leaf) -> bool``, which leaves are selected, ``path`` such as
        ``"dense/kernel"``; by default floating leaves of two or more axes.

    Returns:
      The width.

    Raises:
      ValueError: the narrowest network has more than ``m`` parameters, or a network twice as wide
        has no more than the narrower one; an unknown ``count``, or ``m`` or ``multiple_of`` is not
        an integer of at least 1.

    Example:
      >>> shapes = lambda width: {"first": np.zeros((64, width)), "last": np.zeros((width, 10))}
      >>> width_for_budget(shapes, 800)
      10
    """
    m = positive_int("m", m)
    unit = positive_int("multiple_of", multiple_of)
    one_of("count", count, ("selected", "all"))
    counted = _is_weight if select is None else select

    def size(units: int) -> int:
        # Traced, so that a family may well build its arrays: none comes to be.
        found: dict[str, Any] = {}

        def trace() -> None:
            pairs = jax.tree_util.tree_flatten_with_path(family(unit * units))[0]
            found.update({jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in pairs})

        jax.eval_shape(trace)
        return sum(
            math.prod(leaf.shape)
            for path, leaf in found.items()
            if hasattr(leaf, "dtype") and (count == "all" or counted(path, leaf))
        )

    low, high = 1, 2
    if (narrowest := size(low)) > m:
        raise ValueError(
            f"m is {m}, and the narrowest network, of width {unit}, has {narrowest} parameters"
        )
    below = narrowest
    while (above := size(high)) <= m:
        if above <= below:
            raise ValueError(
                f"family has {below} parameters at width {unit * low} and {above} at width "
                f"{unit * high}; expected more at more width"
            )
        low, high, below = high, 2 * high, above
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= m else (low, middle)
    return unit * low


def _is_weight(path: str, leaf: Any) -> bool:
    del path
    return jax.numpy.issubdtype(leaf.dtype, np.floating) and len(leaf.shape) >= 2
