"""Particles split over devices: who owns which slot, and a ring that moves only what is needed.

Running counts are global after two numbers a device have been exchanged. A device's slots then
belong to a contiguous run of particles, which for weights that are not far from balanced lie on the
device itself and its neighbours. So blocks travel round a ring in both directions, as many hops as
the farthest ancestor needs: no device ever holds all particles.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxgen.particles.fixed_point import prefix_sum

__all__ = ["ancestors", "exchange", "explicit_axis"]


def explicit_axis(x: jax.Array) -> tuple[str, int] | None:
    """Name and size of the one Explicit mesh axis that splits ``x``'s first axis, or ``None``."""
    sharding = jax.typeof(x).sharding
    mesh = sharding.mesh
    if jax.sharding.AxisType.Explicit not in mesh.axis_types or not sharding.spec:
        return None
    name = sharding.spec[0]
    return (name, mesh.shape[name]) if isinstance(name, str) else None


def _histogram(counts: jax.Array, low: jax.Array, slots: int) -> jax.Array:
    # Particles that are used up before a slot, slot by slot.
    bins = jnp.maximum(counts - low, 0)
    return jnp.zeros(slots, jnp.int32).at[bins].add(1, mode="drop")


def _ring(
    block: Any,
    hops: jax.Array,
    visit: Callable[[Any, jax.Array, Any], Any],
    start: Any,
    axis_name: str,
) -> Any:
    """``visit(block of device s, s, carry)`` for the own block and those up to ``hops`` away."""
    here = jax.lax.axis_index(axis_name)
    size = jax.lax.axis_size(axis_name)
    right = [(i, (i + 1) % size) for i in range(size)]
    left = [(i, (i - 1) % size) for i in range(size)]

    def hop(state: tuple[jax.Array, Any, Any, Any]) -> tuple[jax.Array, Any, Any, Any]:
        h, from_left, from_right, carry = state
        from_left = jax.tree.map(lambda v: jax.lax.ppermute(v, axis_name, right), from_left)
        from_right = jax.tree.map(lambda v: jax.lax.ppermute(v, axis_name, left), from_right)
        # A block from round the bend has a source outside the range, which no visit counts.
        carry = visit(from_left, here - h, carry)
        carry = visit(from_right, here + h, carry)
        return h + 1, from_left, from_right, carry

    state = (jnp.ones_like(hops), block, block, visit(block, here, start))
    return jax.lax.while_loop(lambda s: s[0] <= hops, hop, state)[3]


def ancestors(counts: jax.Array, n: int, axis_name: str | None) -> jax.Array:
    """The particle of each slot, from running counts ``(N,)`` that end at ``n``.

    With ``axis_name``, of the device's own ``n / devices`` slots.
    """
    if axis_name is None:
        return prefix_sum(_histogram(counts, jnp.int32(0), n))
    size = jax.lax.axis_size(axis_name)
    here = jax.lax.axis_index(axis_name)
    slots, held = n // size, counts.shape[0]
    low = here * slots
    ends = jax.lax.all_gather(counts[-1], axis_name)
    begins = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    # Devices whose particles fill some of my slots; those before them are used up altogether.
    fill = (ends > low) & (begins < low + slots)
    distance = jnp.where(fill, jnp.abs(jnp.arange(size) - here), 0)
    hops = jax.lax.pmax(jnp.max(distance), axis_name)

    def visit(block: jax.Array, source: jax.Array, carry: jax.Array) -> jax.Array:
        mine = fill.at[source].get(mode="fill", fill_value=False) & (source >= 0)
        return carry + jnp.where(mine, _histogram(block, low, slots), 0)

    start = jax.lax.pcast(jnp.zeros(slots, jnp.int32), axis_name, to="varying")
    used_up = jnp.sum(ends <= low, dtype=jnp.int32) * held
    return used_up + prefix_sum(_ring(counts, hops, visit, start, axis_name))


def exchange(x: Any, ancestors: jax.Array, axis_name: str) -> Any:
    """``take`` for particles split over devices; NaN where an ancestor is out of range.

    Args:
      x: the device's own particles, a pytree of arrays ``(N / devices, *event)``.
      ancestors: ``(n / devices,)`` of the device's own slots, counting over all devices.
      axis_name: the mapped axis.
    """
    size = jax.lax.axis_size(axis_name)
    here = jax.lax.axis_index(axis_name)
    held = jax.tree.leaves(x)[0].shape[0]
    owner = ancestors // held
    far = jnp.where(owner < size, jnp.abs(owner - here), 0)
    hops = jax.lax.pmax(jnp.max(far), axis_name)

    def visit(block: Any, source: jax.Array, carry: Any) -> Any:
        local = ancestors - source * held

        def one(leaf: jax.Array, so_far: jax.Array) -> jax.Array:
            mine = (owner == source).reshape((-1,) + (1,) * (leaf.ndim - 1))
            return jnp.where(mine, leaf.at[local].get(mode="clip"), so_far)

        return jax.tree.map(one, block, carry)

    nothing = jax.tree.map(lambda leaf: leaf.at[jnp.full_like(ancestors, held)].get(mode="fill"), x)
    return _ring(x, hops, visit, nothing, axis_name)
