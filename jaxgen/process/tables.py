"""Log alpha as a table at integer times, linear in between; shared by processes given as tables.

The table's first entry stands at t = -1. At an integer the slope is that of the segment before it,
the rate of the published step that ends there, and the one that a sampler on its way down needs.
"""

import functools

import jax
import jax.numpy as jnp

from jaxgen.core.arrays import unsharded

__all__ = ["log_alpha_at", "time_of"]

_elementwise = functools.partial(jax.jit, inline=True)


def _segment(table: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Entries ``i`` and ``i + 1``, laid out like ``i`` (a gather by sharded indices raises)."""
    sharding, i = jax.typeof(i).sharding, unsharded(i)
    pair = table.at[i].get(mode="clip"), table.at[i + 1].get(mode="clip")
    if not sharding.mesh.explicit_axes:
        return pair
    return jax.reshard(pair[0], sharding), jax.reshard(pair[1], sharding)


@_elementwise
def log_alpha_at(t: jax.Array, table: jax.Array) -> jax.Array:
    """The table at times ``t``.

    Args:
      t: times, any shape; the first and the last segment go on beyond the table.
      table: falling, ``(n,)`` for t = -1, 0, .., n - 2.
    """
    left = jnp.clip(jnp.ceil(t) - 1, -1, table.shape[0] - 3)
    first, second = _segment(table, left.astype(jnp.int32) + 1)
    return first + (t - left) * (second - first)


@_elementwise
def time_of(log_alpha: jax.Array, table: jax.Array) -> jax.Array:
    """The time at which the table has this value, any shape."""
    i = jnp.searchsorted(-table, -unsharded(log_alpha), side="right") - 1
    i = jnp.clip(i, 0, table.shape[0] - 2)
    first, second = _segment(table, i)
    return i - 1 + (first - log_alpha) / (first - second)
