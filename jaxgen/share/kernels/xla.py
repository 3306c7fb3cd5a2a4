r"""The product with a shared weight in plain XLA, in two forms.

``expand``: the weight is built, then multiplied. ``loop``: a scan over blocks of rows. Each is
built from the pool, which goes on with its own start, as one or a few contiguous windows,
multiplied and forgotten; its gradient is added to the windows that it came from. The loop needs
the ``"stable"`` scheme.

With a pool of m slots, entries [s, s + L) of the layout's order lie in one window, in two (a cut
falls inside) or, for L > m, in several that follow one another.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgen.core import arrays
from jaxgen.share.gather import apply_map, apply_transpose
from jaxgen.share.hashing import sign
from jaxgen.share.layout import Spec

__all__ = [
    "backward_expand",
    "backward_loop",
    "blocks",
    "forward_expand",
    "forward_loop",
    "supports_loop",
]

# Weights of one block: large enough for a full-speed product, small enough for a cache.
_BLOCK = 1 << 20


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Contract one axis of each, summed in float32 or wider."""
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        preferred_element_type=arrays.at_least_f32(a.dtype),
    )


def forward_expand(x: jax.Array, pool: jax.Array, spec: Spec) -> jax.Array:
    """``(M, K), (m,) -> (M, N)``."""
    weight = apply_map(pool, (spec,))[0].reshape(spec.matrix)
    return _dot(x, weight.astype(x.dtype), (1, 0)).astype(x.dtype)


def backward_expand(
    x: jax.Array, pool: jax.Array, dy: jax.Array, spec: Spec
) -> tuple[jax.Array, jax.Array]:
    """The gradients ``(M, K)`` in x and ``(m,)`` in the pool, of their dtypes."""
    weight = apply_map(pool, (spec,))[0].reshape(spec.matrix)
    dx = _dot(dy, weight.astype(dy.dtype), (1, 1)).astype(x.dtype)
    dw = _dot(x, dy, (0, 0)).reshape(spec.shape)
    return dx, apply_transpose((dw,), (spec,), pool.dtype)


class _Blocks:
    """How a leaf is cut into blocks of rows, all static.

    Attributes:
      rows: rows of a full block.
      full: number of full blocks.
      left: rows of the last, smaller block, or 0.
    """

    def __init__(self, spec: Spec):
        self.spec = spec
        k, n = spec.matrix
        self.step = 1 if spec.tile is None else spec.tile[0]
        self.width = n if spec.tile is None else spec.grid[1] * spec.tile[1]
        # At high compression several whole partitions to a block, else a part of one.
        rows = max(1, _BLOCK // self.width)
        per_pool = spec.m / self.width
        if rows >= per_pool >= 1 and per_pool.is_integer():
            rows = int(rows // per_pool * per_pool)
        rows = max(self.step, rows // self.step * self.step)
        self.rows = min(rows, -(-k // self.step) * self.step)
        self.full, self.left = divmod(k, self.rows)

    def entries(self, rows: int) -> int:
        """Entries of the layout's order in a block of so many rows."""
        return -(-rows // self.step) * self.step * self.width

    @property
    def reach(self) -> int:
        """The longest window: by so many slots the pool goes on after its end."""
        return min(self.entries(self.rows), self.spec.m)

    def starts(self) -> np.ndarray:
        """Where full blocks start, ``(full + 1, 2)``: partition and place in it."""
        length = self.entries(self.rows)
        first = self.spec.offset + length * np.arange(self.full + 1, dtype=np.int64)
        return np.stack(np.divmod(first, self.spec.m), axis=1)


def _windows(spec: Spec, starts: np.ndarray, length: int) -> tuple[int, bool]:
    """How many windows the blocks need at most, and whether each is exactly these."""
    t = starts[:, 1]
    if length <= spec.m:
        crosses = bool(np.any(t + length > spec.m))
        return (2 if crosses else 1), not crosses
    exact = bool(np.all(t == 0)) and length % spec.m == 0
    return (length // spec.m if exact else -(-(length - 1) // spec.m) + 1), exact


def _slot(spec: Spec, q: jax.Array, t: jax.Array) -> jax.Array:
    """The slot of place ``t`` of partition ``q``, where ``t`` in ``[-m, m)`` may be before it."""
    shift = (spec.shift(q.astype(jnp.uint32)) * np.uint32(spec.unit)).astype(jnp.int32)
    # Never the sum of two numbers near m, which may pass an int32.
    slot = shift - jnp.where(t < 0, -t, spec.m - t)
    return jnp.where(slot < 0, slot + spec.m, slot)


def _entry_signs(spec: Spec, q: jax.Array, t: jax.Array, length: int) -> jax.Array:
    # Modulo 2^32, as the layout has it.
    first = q.astype(jnp.uint32) * np.uint32(spec.m) + t.astype(jnp.uint32)
    return sign(first + lax.iota(jnp.uint32, length), spec.sign_seed)


def _shape_block(flat: jax.Array, spec: Spec, rows: int) -> jax.Array:
    """From the layout's order to ``(rows, N)``."""
    n = spec.matrix[1]
    if spec.tile is None:
        return flat.reshape(rows, n)
    (bk, bn), across = spec.tile, spec.grid[1]
    tiles = flat.reshape(-1, across, bk, bn).transpose(0, 2, 1, 3)
    return tiles.reshape(-1, across * bn)[:rows, :n]


def _order_block(block: jax.Array, spec: Spec) -> jax.Array:
    """From ``(rows, N)`` to the layout's order, zeros in the padding."""
    if spec.tile is None:
        return block.reshape(-1)
    (bk, bn), across = spec.tile, spec.grid[1]
    rows, n = block.shape
    down = -(-rows // bk)
    padded = jnp.pad(block, ((0, down * bk - rows), (0, across * bn - n)))
    return padded.reshape(down, bk, across, bn).transpose(0, 2, 1, 3).reshape(-1)


def _read(
    extended: jax.Array, spec: Spec, q: jax.Array, t: jax.Array, length: int, windows: int
) -> jax.Array:
    """Entries ``[q m + t, q m + t + length)`` of the layout's order, signed."""
    m = spec.m

    def window(q: jax.Array, t: jax.Array, length: int) -> jax.Array:
        return lax.dynamic_slice(extended, (_slot(spec, q, t),), (length,))

    if length <= m:
        flat = window(q, t, length)
        if windows == 2:
            after = window(q + 1, t - m, length)
            flat = jnp.where(lax.iota(jnp.int32, length) < m - t, flat, after)
    else:
        parts = q + lax.iota(jnp.int32, windows)
        flat = jax.vmap(lambda p: window(p, jnp.int32(0), m))(parts).reshape(-1)
        if flat.size != length:
            flat = lax.dynamic_slice(flat, (t,), (length,))
    return flat * _entry_signs(spec, q, t, length).astype(flat.dtype) if spec.sign else flat


def _add(
    total: jax.Array, flat: jax.Array, spec: Spec, q: jax.Array, t: jax.Array, windows: int
) -> jax.Array:
    """Add entries to the slots that ``_read`` reads, in an accumulator that is as long."""
    m, length = spec.m, flat.shape[0]
    if spec.sign:
        flat = flat * _entry_signs(spec, q, t, length).astype(flat.dtype)

    def add(total: jax.Array, q: jax.Array, t: jax.Array, values: jax.Array) -> jax.Array:
        at = (_slot(spec, q, t),)
        old = lax.dynamic_slice(total, at, values.shape)
        return lax.dynamic_update_slice(total, old + values, at)

    if length <= m:
        if windows == 1:
            return add(total, q, t, flat)
        is_before = lax.iota(jnp.int32, length) < m - t
        total = add(total, q, t, jnp.where(is_before, flat, 0))
        return add(total, q + 1, t - m, jnp.where(is_before, 0, flat))
    if windows * m != length:
        padded = jnp.zeros(windows * m, flat.dtype)
        flat = lax.dynamic_update_slice(padded, flat, (t,))
    parts = q + lax.iota(jnp.int32, windows)
    return lax.scan(
        lambda total, xs: (add(total, xs[0], jnp.zeros((), jnp.int32), xs[1]), None),
        total,
        (parts, flat.reshape(windows, m)),
    )[0]


def supports_loop(spec: Spec) -> str | None:
    """Why the loop cannot serve a leaf, or ``None``."""
    if spec.scheme != "stable":
        return f'the loop serves scheme "stable", not {spec.scheme!r}'
    return None


def blocks(spec: Spec) -> int:
    """How many blocks of rows the loop runs over."""
    cut = _Blocks(spec)
    return cut.full + (cut.left > 0)


def _each_block(
    spec: Spec, carry: Any, body: Callable[..., tuple[Any, Any]]
) -> tuple[Any, Any, Any]:
    """Run ``body(carry, first_row, q, t, rows, windows)`` over all blocks of rows.

    Returns:
      The carry, the stacked outputs of the full blocks (or ``None``) and that of the last one.
    """
    cut = _Blocks(spec)
    starts = cut.starts()
    stacked = last = None
    if cut.full:
        windows, _ = _windows(spec, starts[: cut.full], cut.entries(cut.rows))
        xs = jnp.asarray(starts[: cut.full], jnp.int32)
        firsts = jnp.arange(cut.full, dtype=jnp.int32) * cut.rows

        def step(carry: Any, x: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
            return body(carry, x[0], x[1][0], x[1][1], cut.rows, windows)

        carry, stacked = lax.scan(step, carry, (firsts, xs))
    if cut.left:
        windows, _ = _windows(spec, starts[cut.full :], cut.entries(cut.left))
        q, t = (jnp.int32(v) for v in starts[cut.full])
        first = jnp.int32(cut.full * cut.rows)
        carry, last = body(carry, first, q, t, cut.left, windows)
    return carry, stacked, last


def forward_loop(x: jax.Array, pool: jax.Array, spec: Spec) -> jax.Array:
    """``(M, K), (m,) -> (M, N)``; the weight is never built."""
    cut = _Blocks(spec)
    wide = arrays.at_least_f32(x.dtype)
    extended = jnp.concatenate([pool, pool[: cut.reach]])

    def body(
        total: jax.Array, first: jax.Array, q: jax.Array, t: jax.Array, rows: int, windows: int
    ) -> tuple[jax.Array, None]:
        flat = _read(extended, spec, q, t, cut.entries(rows), windows)
        weight = _shape_block(flat, spec, rows).astype(x.dtype)
        part = lax.dynamic_slice_in_dim(x, first, rows, axis=1)
        return total + _dot(part, weight, (1, 0)), None

    start = arrays.varying_zeros((x.shape[0], spec.matrix[1]), wide, pool)
    total, _, _ = _each_block(spec, start, body)
    return (total * jnp.asarray(spec.scale, wide)).astype(x.dtype)


def backward_loop(
    x: jax.Array, pool: jax.Array, dy: jax.Array, spec: Spec
) -> tuple[jax.Array, jax.Array]:
    """The gradients ``(M, K)`` in x and ``(m,)`` in the pool, of their dtypes."""
    cut = _Blocks(spec)
    wide = arrays.at_least_f32(pool.dtype)
    extended = jnp.concatenate([pool, pool[: cut.reach]])
    scale = jnp.asarray(spec.scale, wide)

    def body(
        total: jax.Array, first: jax.Array, q: jax.Array, t: jax.Array, rows: int, windows: int
    ) -> tuple[jax.Array, jax.Array]:
        flat = _read(extended, spec, q, t, cut.entries(rows), windows)
        weight = _shape_block(flat, spec, rows).astype(dy.dtype)
        part = lax.dynamic_slice_in_dim(x, first, rows, axis=1)
        dx = (_dot(dy, weight, (1, 1)) * scale).astype(x.dtype)
        dw = _order_block(_dot(part, dy, (0, 0)).astype(wide), spec)
        return _add(total, dw, spec, q, t, windows), dx

    start = arrays.varying_zeros((spec.m + cut.reach,), wide, pool)
    total, stacked, last = _each_block(spec, start, body)
    parts = [] if last is None else [last]
    if stacked is not None:
        parts.insert(0, stacked.swapaxes(0, 1).reshape(x.shape[0], cut.full * cut.rows))
    dx = jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
    after = jnp.pad(total[spec.m :], (0, spec.m - cut.reach))
    return dx, ((total[: spec.m] + after) * scale).astype(pool.dtype)
