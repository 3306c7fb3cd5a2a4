"""Checks at the public door: what is known at trace time raises, values go to checkify.

``checkify.debug_check`` does nothing unless the caller wraps with ``checkify.checkify``.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jax.typing import ArrayLike

__all__ = [
    "cast_field_output",
    "concrete",
    "debug_check",
    "field_time",
    "floating",
    "one_of",
    "positive_int",
]


@functools.partial(jax.jit, static_argnames="message", inline=True)
def _staged_check(pred: jax.Array, values: dict[str, jax.Array], *, message: str) -> None:
    checkify.debug_check(pred, message, **values)


def debug_check(pred: jax.Array, message: str, **values: ArrayLike) -> None:
    """``checkify.debug_check``: an error under ``checkify.checkify``, nothing otherwise.

    Left out on arrays of an Explicit mesh, where a mapped check would sort a sharded axis, which
    that mesh refuses; the NaN that goes with every check remains.

    Args:
      pred: ``()``, true where all is well.
      message: a format string.
      values: what it formats.
    """
    # checkify traces all that it checks, so that on a known value nothing listens.
    if not isinstance(pred, jax.core.Tracer):
        return
    axes = jax.typeof(pred).sharding.mesh.axis_types
    if jax.sharding.AxisType.Explicit not in axes:
        # In a small trace of its own: checkify's time for each value grows with the trace.
        _staged_check(pred, values, message=message)


def one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Raise ``ValueError`` naming the argument unless ``value`` is one of ``allowed``."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")


def positive_int(name: str, value: Any, *, least: int = 1) -> int:
    """``value`` as an int of at least ``least``; anything else raises ``ValueError``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}")
    return int(value)


def floating(name: str, x: ArrayLike, *, allow_complex: bool = False) -> jax.Array:
    """``x`` as an array of a floating dtype; integers raise ``TypeError``, naming the argument."""
    array = jnp.asarray(x)
    kinds = (jnp.inexact,) if allow_complex else (jnp.floating,)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
        raise TypeError(f"{name} has dtype {array.dtype}; expected a floating dtype")
    return array


def concrete(x: Any) -> np.ndarray | None:
    """``x`` as a NumPy array where its values are known, ``None`` where it is traced."""
    return None if isinstance(x, jax.core.Tracer) else np.asarray(x)


def cast_field_output(out: Any, x: jax.Array, name: str = "field") -> jax.Array:
    """The field's output in ``x``'s dtype.

    Raises:
      ValueError: the output has another shape than ``x``.
      TypeError: it is an integer or bool, or complex where ``x`` is real.
    """
    out = jnp.asarray(out)
    if out.shape != x.shape:
        raise ValueError(
            f"{name}(x, t) returned shape {out.shape} for x of shape {x.shape}; expected the same"
        )
    wrong_kind = not jnp.issubdtype(out.dtype, jnp.inexact) or (
        jnp.iscomplexobj(out) and not jnp.iscomplexobj(x)
    )
    if wrong_kind:
        raise TypeError(
            f"{name}(x, t) returned dtype {out.dtype} for x of dtype {x.dtype}; expected a real "
            "floating dtype"
        )
    return out.astype(x.dtype)


def field_time(t: ArrayLike, x: jax.Array, event_ndim: int | None = None) -> jax.Array:
    """Time as a field is called with it: ``(batch,)`` for a batched ``x``, ``()`` for one example.

    Raises:
      ValueError: ``t`` is neither ``()`` nor ``(batch,)``.
    """
    batch = x.shape[: x.ndim - (x.ndim - 1 if event_ndim is None else event_ndim)]
    t = jnp.asarray(t)
    if t.shape not in ((), batch):
        raise ValueError(f"t has shape {t.shape}; expected () or {batch} for x of shape {x.shape}")
    return jnp.broadcast_to(t, batch)
