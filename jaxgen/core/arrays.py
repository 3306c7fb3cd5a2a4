"""Shapes and dtypes: broadcasting from the left, reductions over events, safe roots.

Axis 0 is the batch and the rest is the event. Functions that act per example take
``event_ndim``: ``None`` means "all axes but the first", ``x.ndim`` means one example alone.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

__all__ = [
    "at_least_f32",
    "batch_event",
    "cast_coefficient",
    "event_size",
    "left_broadcast",
    "matmul",
    "real_dtype",
    "safe_sqrt",
    "strong_scalar",
    "sum_event",
    "unsharded",
    "varying_zeros",
]


def at_least_f32(dtype: DTypeLike) -> np.dtype:
    """The real floating dtype for sums and schedules of ``dtype`` data: float32 or wider."""
    return np.dtype(jnp.promote_types(real_dtype(dtype), jnp.float32))


def real_dtype(dtype: DTypeLike) -> np.dtype:
    """The real floating dtype under ``dtype``: of a complex its parts', of an integer float32."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.dtype(jnp.finfo(dtype).dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        return np.dtype(dtype)
    return np.dtype(jnp.float32)


def strong_scalar(value: ArrayLike) -> Any:
    """A number as a strong float32 (float64 where x64 is on), an array in float32 or wider.

    NumPy scalars serve, so that no device is started by making a process.
    """
    if isinstance(value, bool | int | float):
        wide = np.float64 if jax.config.read("jax_enable_x64") else np.float32
        return wide(value)
    if isinstance(value, np.ndarray | np.generic):
        promoted = jnp.promote_types(value.dtype, jnp.float32)
        return value.astype(jax.dtypes.canonicalize_dtype(promoted))
    if isinstance(value, jax.Array):
        return value.astype(jnp.promote_types(value.dtype, jnp.float32))
    return value


def left_broadcast(value: jax.Array, x: ArrayLike) -> jax.Array:
    """Reshape ``value`` of shape ``(k,)`` or ``()`` so that it broadcasts along ``x``'s left.

    Args:
      value: coefficients; its shape must be a prefix of ``x``'s shape up to ones.
      x: the array (or anything with a shape) that it will multiply.

    Raises:
      ValueError: ``value`` has more axes than ``x`` or its shape is no prefix of ``x``'s.
    """
    shape, target = jnp.shape(value), jnp.shape(x)
    if len(shape) > len(target) or any(
        a not in (1, b) for a, b in zip(shape, target, strict=False)
    ):
        raise ValueError(
            f"a coefficient of shape {shape} does not broadcast from the left over {target}; "
            "time is () or (batch,)"
        )
    return jnp.reshape(value, shape + (1,) * (len(target) - len(shape)))


def matmul(*factors: jax.Array) -> jax.Array:
    """The product of matrices and vectors, left to right, in the full precision of their dtype.

    By default an accelerator multiplies float32 in fewer bits (TF32 on a GPU, bfloat16 on a TPU:
    errors near 1e-3 and 1e-2), which suits networks; closed forms need all of them.
    """
    product = factors[0]
    for factor in factors[1:]:
        product = jnp.matmul(product, factor, precision="highest")
    return product


def cast_coefficient(value: jax.Array, x: jax.Array) -> jax.Array:
    """``left_broadcast`` of ``value``, cast to the real dtype of ``x``."""
    return left_broadcast(value, x).astype(real_dtype(x.dtype))


def batch_event(
    x: ArrayLike | tuple[int, ...], event_ndim: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split ``x``'s shape into ``(batch shape, event shape)`` by the library's rule.

    Args:
      x: an array, or a shape's owner.
      event_ndim: ``None`` for one batch axis in front, ``x.ndim`` for no batch.

    Raises:
      ValueError: another ``event_ndim`` than those two, or a scalar without ``event_ndim=0``.
    """
    shape = tuple(x) if isinstance(x, tuple) else jnp.shape(x)
    ndim = len(shape)
    if event_ndim is None:
        event_ndim = ndim - 1
        if event_ndim < 0:
            raise ValueError(
                "x is a scalar and so has no batch axis; pass event_ndim=0 for one scalar example"
            )
    if event_ndim not in (ndim, ndim - 1):
        raise ValueError(
            f"event_ndim is {event_ndim} for an array of {ndim} axes; expected {ndim} (one "
            f"example) or {max(ndim - 1, 0)} (one batch axis)"
        )
    split = ndim - event_ndim
    return shape[:split], shape[split:]


def event_size(x: ArrayLike | tuple[int, ...], event_ndim: int | None = None) -> int:
    """Number of entries of one example."""
    return math.prod(batch_event(x, event_ndim)[1])


def sum_event(x: jax.Array, event_ndim: int | None = None) -> jax.Array:
    """Sum over the event axes in float32 or wider: ``(batch, *event) -> (batch,)``."""
    batch, event = batch_event(x, event_ndim)
    axes = tuple(range(len(batch), len(batch) + len(event)))
    wide = x if jnp.iscomplexobj(x) else x.astype(at_least_f32(x.dtype))
    return jnp.sum(wide, axis=axes)


def safe_sqrt(x: jax.Array) -> jax.Array:
    """Square root, zero with gradient zero where ``x <= 0``; NaN stays NaN."""
    vanishes = x <= 0
    return jnp.where(vanishes, 0.0, jnp.sqrt(jnp.where(vanishes, 1.0, x))).astype(x.dtype)


def unsharded(x: jax.Array) -> jax.Array:
    """``x`` replicated on its own mesh where that mesh has Explicit axes, else as it is.

    There, slices, gathers, sorts and scatters of a sharded operand raise.
    """
    mesh = jax.typeof(x).sharding.mesh
    if jax.sharding.AxisType.Explicit not in mesh.axis_types:
        return x
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def varying_zeros(shape: tuple[int, ...], dtype: DTypeLike, *like: jax.Array) -> jax.Array:
    """Zeros to start a loop with that adds up arrays such as ``like``.

    Under ``shard_map`` they vary over the same mesh axes as ``like``, which a loop's carry must.
    """
    zeros = jnp.zeros(shape, dtype)
    for x in like:
        # Never taken, but what follows depends on x all the same.
        first = x[(0,) * x.ndim].astype(dtype)
        zeros = zeros + jnp.where(False, first, jnp.zeros((), dtype))
    return zeros
