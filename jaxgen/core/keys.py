"""Randomness per example: example ``i`` of a batch draws from ``fold_in(key, i)``.

A sample then does not change with the size of its batch or with the number of devices. An
example without a batch uses its key as it is.

Inside ``shard_map`` or ``pmap`` a function sees its device's part of the batch only. Within
``part_of_batch`` a draw for as many examples as that part holds counts them over all devices, so
that example ``i`` draws what it would have drawn on one.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgen.core.arrays import batch_event, real_dtype

__all__ = [
    "check",
    "first_index",
    "fold",
    "map_batch",
    "normal",
    "part_of_batch",
    "places",
    "rademacher",
    "uniform",
]

# A context that jit's caches know of: what is traced within it is not used outside.
_part = jax.make_user_context(None)


def part_of_batch(axis_name: str | tuple[str, ...], n: int) -> AbstractContextManager[None]:
    """Within it, a draw for ``n`` examples is one for this device's part of a batch.

    Args:
      axis_name: the mapped axes that split the batch, outermost first.
      n: how many examples each device holds. Draws for another number (of probes, say, or of
        directions) are left as they are; so is ``fold(..., is_batch=False)``.
    """
    return _part((axis_name, n))


def first_index(n: int) -> jax.Array | int:
    """The number of the first of ``n`` examples: 0 but within ``part_of_batch``."""
    if _part.value is None or _part.value[1] != n:
        return 0
    return jax.lax.axis_index(_part.value[0]) * n


def places(n: int) -> tuple[jax.Array, int]:
    """Numbers ``(n,)`` of ``n`` examples within the whole batch, and how many that has."""
    if _part.value is None or _part.value[1] != n:
        return jnp.arange(n), n
    return first_index(n) + jnp.arange(n), n * jax.lax.axis_size(_part.value[0])


def check(key: Any) -> jax.Array:
    """Return ``key`` if it is one typed key.

    Raises:
      TypeError: it is a raw ``uint32`` key, or something else.
      ValueError: it is an array of keys.
    """
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"key is {type(key).__name__}"
            f"{f' of dtype {key.dtype}' if hasattr(key, 'dtype') else ''}; expected a typed key "
            "such as jax.random.key(0)"
        )
    if key.shape != ():
        raise ValueError(f"key has shape {key.shape}; expected one key of shape ()")
    return key


@functools.partial(jax.jit, static_argnames=("n", "offset", "is_batch"), inline=True)
def fold(key: jax.Array, n: int, offset: int = 0, *, is_batch: bool = True) -> jax.Array:
    """Keys ``(n,)``: ``fold_in(key, offset + i)``; ``is_batch``: see ``part_of_batch``."""
    index = jnp.arange(offset, offset + n)
    if is_batch:
        index = index + first_index(n)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def map_batch(draw: Callable[[jax.Array], Any], key: jax.Array, batch: tuple[int, ...]) -> Any:
    """``draw(key)`` for no batch, ``vmap(draw)`` over per-example keys for a batch ``(n,)``."""
    return jax.vmap(draw)(fold(check(key), batch[0])) if batch else draw(check(key))


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4), inline=True)
def _draw(
    sampler: Callable[..., jax.Array],
    key: jax.Array,
    batch: tuple[int, ...],
    event: tuple[int, ...],
    dtype: Any,
) -> jax.Array:
    return map_batch(lambda k: sampler(k, event, dtype), key, batch)


def normal(
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: DTypeLike = jnp.float32,
    event_ndim: int | None = None,
) -> jax.Array:
    """Standard normal draws of ``shape``, per example (module docstring).

    A complex dtype gives circular normals with ``E|z|^2 = 1``. Reduced precisions are drawn in
    float32 and rounded, so the same key gives the same noise at every precision.
    """
    batch, event = batch_event(tuple(shape), event_ndim)
    draw_dtype = jnp.promote_types(dtype, jnp.float32)
    return _draw(jax.random.normal, check(key), batch, event, draw_dtype).astype(dtype)


def rademacher(
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: DTypeLike = jnp.float32,
    event_ndim: int | None = None,
) -> jax.Array:
    """Independent signs of ``shape``, per example (module docstring)."""
    batch, event = batch_event(tuple(shape), event_ndim)
    return _draw(jax.random.rademacher, check(key), batch, event, dtype)


def uniform(
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: DTypeLike = jnp.float32,
    event_ndim: int | None = None,
) -> jax.Array:
    """Uniform draws on [0, 1) of ``shape``, per example (module docstring)."""
    batch, event = batch_event(tuple(shape), event_ndim)
    return _draw(jax.random.uniform, check(key), batch, event, real_dtype(dtype))
