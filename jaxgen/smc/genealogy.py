"""Where particles come from: paths by trace-back, the pruned tree, and functionals carried along.

Three ways to know the past of the last particles, at three costs in memory:

* ``Genealogy`` keeps all particles and int32 ancestors, ``steps x n``; a path is read backwards by
  ``i_{t-1} = A_t(i_t)``.
* ``PathTree`` keeps only particles that have descendants now. Jacob, Murray and Rubenthaler 2015:
  under resampling at each step their expected number is at most ``steps + C n log n``. Slots of
  dead branches are used again, in a buffer of fixed size.
* ``with_functional`` and ``with_lag`` put what is wanted of the past into the particle: a running
  additive functional ``(n,)``, or the last ``lag`` states ``(n, lag)``; constant in time.

All of them see the past through the surviving ancestors, and far back those are one: such estimates
have a variance that grows with the square of the number of steps. ``smc.paris`` is the cure.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgen.core import checks
from jaxgen.core.arrays import varying_zeros
from jaxgen.particles.resample import take
from jaxgen.smc.state_space import StateSpaceModel

__all__ = [
    "Genealogy",
    "Lagged",
    "PathTree",
    "Tracked",
    "default_capacity",
    "trace",
    "tree_init",
    "tree_update",
    "with_functional",
    "with_lag",
]


# --- everything -----------------------------------------------------------------------------------


def trace(ancestors: jax.Array, slots: jax.Array) -> jax.Array:
    """Slots along the paths that end in ``slots``.

    Args:
      ancestors: int32 ``(steps, n)``; row ``t`` leads from the slots of ``t`` to those of
        ``t - 1``, so that row 0 is not read.
      slots: int32 ``(k,)``, at the last step.

    Returns:
      int32 ``(steps, k)``; ``n`` (out of range) from where an ancestor is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> trace(jnp.array([[0, 1], [1, 1], [0, 0]]), jnp.array([0, 1])).tolist()
      [[1, 1], [0, 0], [0, 1]]
    """
    n = ancestors.shape[1]

    def back(now: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        before = row.at[now].get(mode="fill", fill_value=n)
        return before, before

    last = slots.astype(ancestors.dtype)
    _, earlier = jax.lax.scan(back, last, ancestors[1:], reverse=True)
    return jnp.concatenate([earlier, last[None]])


class Genealogy(NamedTuple):
    """All particles of all steps.

    Attributes:
      x: particles, each leaf ``(steps, n, *event)``.
      ancestors: int32 ``(steps, n)``; row ``t`` holds the slots at ``t - 1``, row 0 counts up.
    """

    x: Any
    ancestors: jax.Array

    def paths(self, slots: jax.Array | None = None) -> Any:
        """Paths that end in ``slots`` (all of them by default), each leaf ``(steps, k, *event)``.

        Args:
          slots: int32 ``(k,)``, particles of the last step.
        """
        if slots is None:
            slots = jnp.arange(self.ancestors.shape[1], dtype=jnp.int32)
        return jax.vmap(take)(self.x, trace(self.ancestors, slots))


# --- the pruned tree ------------------------------------------------------------------------------


class PathTree(NamedTuple):
    """Particles that have descendants among the last ones, in a buffer of ``capacity`` nodes.

    Attributes:
      x: nodes' particles, each leaf ``(capacity, *event)``.
      parent: int32 ``(capacity,)``, the node one step before; ``capacity`` for none.
      children: int32 ``(capacity,)``, living children; 0 for a free node and for a leaf.
      leaves: int32 ``(n,)``, the nodes of the last particles; ``capacity`` where the buffer was
        full, and a path from there on is NaN.
      t: int32 ``()``, the step of the leaves.
    """

    x: Any
    parent: jax.Array
    children: jax.Array
    leaves: jax.Array
    t: jax.Array

    def paths(self, steps: int, slots: jax.Array | None = None) -> Any:
        """The last ``steps`` states of the paths that end in ``slots``, oldest first.

        Args:
          steps: how many, at most the number of steps so far; NaN beyond.
          slots: int32 ``(k,)``, particles of the last step; all of them by default.

        Returns:
          Each leaf ``(steps, k, *event)``.
        """
        capacity = self.parent.shape[0]
        start = self.leaves if slots is None else _read(self.leaves, slots, capacity)

        def back(node: jax.Array, _: None) -> tuple[jax.Array, Any]:
            return _read(self.parent, node, capacity), take(self.x, node)

        _, path = jax.lax.scan(back, start, None, length=steps, reverse=True)
        return path

    @property
    def size(self) -> jax.Array:
        """Nodes in use, int32 ``()``."""
        in_use = jnp.sum(self.children > 0, dtype=jnp.int32)
        return in_use + jnp.sum(self.leaves < self.parent.shape[0], dtype=jnp.int32)


def _read(array: jax.Array, index: jax.Array, fill: int) -> jax.Array:
    return array.at[index].get(mode="fill", fill_value=fill)


def default_capacity(n: int, steps: int) -> int:
    """Nodes that hold the tree of ``n`` particles over ``steps`` steps of resampling.

    ``steps + 3 n log n``, at least ``2 n``, at most ``steps n``. Rarer resampling lets branches
    live for longer and needs more.
    """
    return min(steps * n, max(2 * n, steps + math.ceil(3 * n * math.log(max(n, 2)))))


def tree_init(x: Any, capacity: int) -> PathTree:
    """A tree whose roots are the particles ``x``, each leaf ``(n, *event)``.

    Args:
      x: the particles of the first step.
      capacity: number of nodes, at least ``n``.

    Raises:
      ValueError: ``capacity`` below ``n``.
    """
    n = jax.tree.leaves(x)[0].shape[0]
    capacity = checks.positive_int("capacity", capacity, least=n)

    def widen(leaf: jax.Array) -> jax.Array:
        return jnp.pad(leaf, [(0, capacity - n)] + [(0, 0)] * (leaf.ndim - 1))

    zero = varying_zeros((), jnp.int32, jax.tree.leaves(x)[0])
    return PathTree(
        jax.tree.map(widen, x),
        jnp.full(capacity, capacity, jnp.int32) + zero,
        jnp.zeros(capacity, jnp.int32) + zero,
        jnp.arange(n, dtype=jnp.int32) + zero,
        jnp.zeros((), jnp.int32),
    )


def tree_update(tree: PathTree, ancestors: jax.Array, x: Any) -> PathTree:
    """The tree one step later: dead branches go, the new particles become leaves.

    A buffer that is full leaves the particles that found no node without a past or a present:
    their paths are NaN, and ``checkify.checkify`` reports it.

    Args:
      tree: the tree at the step before.
      ancestors: int32 ``(n,)``, slots at the step before; out of range for no ancestor.
      x: the new particles, each leaf ``(n, *event)``.
    """
    capacity, n = tree.parent.shape[0], tree.leaves.shape[0]
    born = jnp.zeros(n, jnp.int32).at[ancestors].add(1, mode="drop")
    children = tree.children.at[tree.leaves].set(born, mode="drop")
    children = _prune(tree.parent, children, jnp.where(born == 0, tree.leaves, capacity))
    # Of the nodes in use none is childless now, so that the childless are free.
    free = jnp.nonzero(children == 0, size=n, fill_value=capacity)[0].astype(jnp.int32)
    parents = _read(tree.leaves, ancestors, capacity)
    missing = jnp.sum(free == capacity, dtype=jnp.int32)
    checks.debug_check(
        missing == 0,
        "the tree of paths is full at step {t}: {missing} particles find no node; expected a "
        "greater capacity",
        t=tree.t + 1,
        missing=missing,
    )
    return PathTree(
        jax.tree.map(lambda nodes, new: nodes.at[free].set(new, mode="drop"), tree.x, x),
        tree.parent.at[free].set(parents, mode="drop"),
        children,
        free,
        tree.t + 1,
    )


def _prune(parent: jax.Array, children: jax.Array, dead: jax.Array) -> jax.Array:
    """Children's numbers without the branches that end in the ``dead`` nodes ``(n,)``."""
    capacity, n = parent.shape[0], dead.shape[0]
    mine = jnp.arange(n, dtype=jnp.int32)

    def level(state: Any) -> Any:
        dead, children, claimed = state
        above = _read(parent, dead, capacity)
        children = children.at[above].add(-1, mode="drop")
        # A node whose last children die together is followed once, by who claims it last.
        claimed = claimed.at[above].set(mine, mode="drop")
        follows = (_read(children, above, 1) == 0) & (_read(claimed, above, -1) == mine)
        return jnp.where(follows, above, capacity), children, claimed

    state = (dead, children, varying_zeros((capacity,), jnp.int32, dead))
    return jax.lax.while_loop(lambda s: jnp.any(s[0] < capacity), level, state)[1]


# --- the past carried in the particle -------------------------------------------------------------


def _lift(
    model: StateSpaceModel,
    start: Callable[[Any], Any],
    grow: Callable[[Any, Any, jax.Array], Any],
) -> StateSpaceModel:
    """The model on particles ``p`` that carry a past; ``p.x`` is the model's own particle.

    ``start(x)`` makes the first one, ``grow(p, x_next, t)`` the next.
    """

    def optional(f: Callable[..., Any] | None, lifted: Callable[..., Any]) -> Any:
        return None if f is None else lifted

    m: Any = model
    return dataclasses.replace(
        model,
        init=lambda key: start(m.init(key)),
        transition=lambda key, p, t: grow(p, m.transition(key, p.x, t), t),
        log_potential=lambda p, y, t: m.log_potential(p.x, y, t),
        log_transition=optional(m.log_transition, lambda p, q, t: m.log_transition(p.x, q.x, t)),
        log_init=optional(m.log_init, lambda p: m.log_init(p.x)),
        propose_init=optional(m.propose_init, lambda key, y: start(m.propose_init(key, y))),
        log_propose_init=optional(m.log_propose_init, lambda p, y: m.log_propose_init(p.x, y)),
        propose=optional(m.propose, lambda key, p, y, t: grow(p, m.propose(key, p.x, y, t), t)),
        log_propose=optional(m.log_propose, lambda p, q, y, t: m.log_propose(p.x, q.x, y, t)),
        log_auxiliary=optional(m.log_auxiliary, lambda p, y, t: m.log_auxiliary(p.x, y, t)),
    )


class Tracked(NamedTuple):
    """A particle with the additive functional of its path.

    Attributes:
      x: the model's own particle.
      statistic: the functional's sum so far.
    """

    x: Any
    statistic: Any


def with_functional(
    model: StateSpaceModel,
    functional: Callable[[Any, Any, jax.Array], Any],
    initial_functional: Callable[[Any], Any] | None = None,
) -> StateSpaceModel:
    """The same model, each particle carrying ``h_0(x_0) + sum_t h_t(x_{t-1}, x_t)`` of its path.

    A filter of it with ``functions=lambda p: p.statistic`` gives the smoothed functional at each
    step, at the cost of one gather (module docstring: the variance).

    Args:
      model: the state-space model.
      functional: ``functional(x_prev, x_next, t)``, any pytree of floating arrays.
      initial_functional: ``initial_functional(x)``, the same structure; zero by default.

    Returns:
      A model on ``Tracked`` particles.
    """

    def start(x: Any) -> Tracked:
        like = jax.eval_shape(functional, x, x, jnp.zeros((), jnp.int32))
        if initial_functional is None:
            return Tracked(x, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like))
        value = initial_functional(x)
        return Tracked(x, jax.tree.map(lambda v, leaf: jnp.asarray(v, leaf.dtype), value, like))

    def grow(p: Tracked, x_next: Any, t: jax.Array) -> Tracked:
        term = functional(p.x, x_next, t)
        return Tracked(x_next, jax.tree.map(jnp.add, p.statistic, term))

    return _lift(model, start, grow)


class Lagged(NamedTuple):
    """A particle with its last states.

    Attributes:
      x: the model's own particle.
      past: its states one, two, ... steps before, each leaf ``(lag, *event)``; where there was no
        step yet, the first state.
    """

    x: Any
    past: Any


def with_lag(model: StateSpaceModel, lag: int) -> StateSpaceModel:
    """The same model, each particle carrying its last ``lag`` states: fixed-lag smoothing.

    A filter of it with ``functions=lambda p: f(p.past[lag - 1])`` gives, at step t, the mean of
    ``f(x_{t - lag})`` given the observations up to t.

    Args:
      model: the state-space model.
      lag: at least 1.

    Returns:
      A model on ``Lagged`` particles.

    Raises:
      ValueError: ``lag`` below 1.
    """
    lag = checks.positive_int("lag", lag)

    def start(x: Any) -> Lagged:
        return Lagged(x, jax.tree.map(lambda v: jnp.stack([jnp.asarray(v)] * lag), x))

    def grow(p: Lagged, x_next: Any, t: jax.Array) -> Lagged:
        del t

        def shift(v: Any, past: jax.Array) -> jax.Array:
            return jnp.concatenate([jnp.asarray(v)[None], past[:-1]])

        return Lagged(x_next, jax.tree.map(shift, p.x, p.past))

    return _lift(model, start, grow)
