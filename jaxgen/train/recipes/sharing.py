r"""A network's weights in pools of a given size: layouts, start, and Adam in units of the weights.

Weights that start at random share one pool, and weights that start at zero (the last layer of each
residual block) another that starts at zero, planned from what passes through the first: so the
network starts as its dense form does. In one pool a block's last layer would start as large as
the others and stay so, since its slots are theirs too; left out, these layers would be a third of
the digits U-Net uncompressed. Measured there, 300 steps, two seeds, loss on held-out digits: at a
tenth of the weights 0.421 and 0.422 with two pools, 0.440 and 0.436 with one; dense 0.393 and
0.392. A last layer of fewer than 512 weights is too small for a pool and passes through.

Scales are those of the initialisers, by shape, so that a network too large to build can be laid
out. A pool at full budget holds the dense network's own start.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxgen import share
from jaxgen.share import Kept, Layout, Shared
from jaxgen.share.layout import named_leaves

__all__ = ["Sharing", "plan_sharing"]

MIN_SIZE = 512


def _constant(init: Callable[[jax.Array], Any]) -> tuple[Any, set[str]]:
    """The shapes of ``init(key)`` and the names of leaves that do not depend on the key."""
    closed, shapes = jax.make_jaxpr(init, return_shape=True)(jax.random.key(0))
    drawn = set(closed.jaxpr.invars)
    for equation in closed.jaxpr.eqns:
        # Literals are not hashable, and depend on nothing.
        if any(not hasattr(v, "val") and v in drawn for v in equation.invars):
            drawn.update(equation.outvars)
    outputs = zip(named_leaves(shapes), closed.jaxpr.outvars, strict=True)
    return shapes, {name for name, v in outputs if hasattr(v, "val") or v not in drawn}


def _scale(path: str, leaf: Any) -> float:
    """Standard deviations of this library's initialisers: LeCun's, and one for embeddings."""
    if path.rpartition("/")[2] == "embedding":
        return 1.0
    return math.prod(leaf.shape[:-1]) ** -0.5


def plan_sharing(
    init: Callable[[jax.Array], Any], budget: float, *, scheme: str = "stable", seed: int = 0
) -> "Sharing":
    """Lay the parameters of a network out in pools; nothing of their size is made.

    Args:
      init: ``f(key) -> params``, traced only. Leaves that do not depend on the key start at zero
        if they have two or more axes.
      budget: up to 1 the share of the shared weights, above it a number of slots in all.
      scheme: ``"stable"``, ``"roast"`` or ``"hashednet"``.
      seed: of the hashes.

    Raises:
      ValueError: the budget is out of range, or too small for the scheme; nothing is
        shared.
    """
    shapes, constant = _constant(init)
    leaves = {path: x for path, x in named_leaves(shapes).items() if len(x.shape) > 1}
    drawn = leaves.keys() - constant
    zero = {path for path in leaves.keys() & constant if leaves[path].size >= MIN_SIZE}
    total, part = (sum(leaves[path].size for path in paths) for paths in (drawn | zero, zero))
    slots: list[float | int] = [float(budget)] * 2
    if budget > 1:
        if budget != int(budget) or budget > total:
            raise ValueError(
                f"budget is {budget:g}; expected a share in (0, 1], or a whole number of slots up "
                f"to {total}, the weights that are shared"
            )
        slots[1] = max(1, round(budget * part / total)) if zero else 0
        slots[0] = int(budget) - int(slots[1])
    options: dict[str, Any] = {"scheme": scheme, "seed": seed % 2**32, "scale": _scale}
    outer = share.plan(shapes, slots[0], select=lambda path, _: path in drawn, **options)
    outer = dataclasses.replace(outer, kept=tuple(map(_explained, outer.kept)))
    if not zero:
        return Sharing((outer,))
    rest = {kept.path: jax.ShapeDtypeStruct(kept.shape, kept.dtype) for kept in outer.kept}
    return Sharing((outer, share.plan(rest, slots[1], min_size=MIN_SIZE, **options)))


def _explained(kept: Kept) -> Kept:
    """Why a leaf was not selected."""
    axes = len(kept.shape)
    reason = "starts at zero" if axes > 1 else "one axis" if axes else "a scalar"
    return dataclasses.replace(kept, reason=reason)


@dataclasses.dataclass(frozen=True)
class Sharing:
    """How a network lives in pools; made by ``plan_sharing``.

    What is trained is ``Shared(pool, rest)``, ``rest`` being another ``Shared`` where there are
    two pools.

    Attributes:
      layouts: the pools' layouts, each after the first planned from what passes through the one
        before it; ``train.save`` and ``share.describe`` take them as they are.
    """

    layouts: tuple[Layout, ...]

    @property
    def weights(self) -> int:
        """Number of the network's weights, those that pass through included."""
        return sum(each.n for each in self.layouts) + sum(k.size for k in self.layouts[-1].kept)

    def start(self, key: jax.Array, params: Any) -> Shared:
        """The pools before the first step: drawn, or the dense start itself at full budget.

        Args:
          key: typed key, draws the pool.
          params: the network's first parameters. Under ``jit`` the shared ones are never made
            below full budget.
        """
        outer, *inner = self.layouts
        is_dense = outer.scheme == "stable" and outer.m == outer.n
        shared = share.compress(params, outer) if is_dense else share.init(key, outer, params)
        for layout in inner:
            rest: Any = share.init(key, layout, shared.rest)
            shared = Shared(shared.pool, rest._replace(pool=jnp.zeros_like(rest.pool)))
        return shared

    def expand(self, shared: Shared) -> Any:
        """The network's parameters, in the pools' dtype."""
        outer, *inner = self.layouts
        rest: Any = shared.rest
        for layout in inner:
            rest = share.expand(rest, layout)
        return share.expand(Shared(shared.pool, rest), outer)

    def in_units_of_weights(
        self, rule: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        """Apply a rule to pools measured in weights: slot j times sqrt(mean lambda^2).

        Adam then moves each weight by about its learning rate, as in the dense network, and a norm
        to clip at means what it means there. At full budget it is the dense rule.
        """

        def init(params: Shared) -> _UnitsState:
            roots = jax.jit(
                lambda: tuple(jnp.sqrt(share.pool_scale(each, "mean")) for each in self.layouts)
            )()
            return _UnitsState(roots, rule.init(params))

        def update(updates: Shared, state: _UnitsState, params: Any = None) -> tuple[Any, Any]:
            updates, inner = rule.update(_divided(updates, state.roots), state.inner, params)
            return _divided(updates, state.roots), _UnitsState(state.roots, inner)

        return optax.GradientTransformation(init, update)


class _UnitsState(NamedTuple):
    """Per pool ``(m,)`` float32, and the rule's own state."""

    roots: tuple[jax.Array, ...]
    inner: Any


def _divided(shared: Any, roots: tuple[jax.Array, ...]) -> Any:
    rest = _divided(shared.rest, roots[1:]) if len(roots) > 1 else shared.rest
    return Shared(shared.pool / roots[0].astype(shared.pool.dtype), rest)
