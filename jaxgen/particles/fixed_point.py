"""Cumulative weights in exact fixed point, so that resampling is right at a million particles.

A float32 running sum of n weights that ends at 1 has steps of 6e-8: at n = 1e6 a weight of one
slot is off by up to 6 %, and a zero weight at the end can come out positive. Here every particle's
expected number of slots, ``n w_i / sum w``, is rounded once to a whole number and a fraction of
2^-32, and all sums after that are integers: exact in any order, so the same bits on any number of
devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = [
    "MAX_PARTICLES",
    "Fixed",
    "cumulative",
    "differences",
    "multiply",
    "prefix_sum",
    "running",
]

MAX_PARTICLES = 2**24
_BLOCK = 32
_ONE = 2.0**32


class Fixed(NamedTuple):
    """The number ``whole + part / 2^32``, elementwise.

    Attributes:
      whole: int32.
      part: uint32.
    """

    whole: jax.Array
    part: jax.Array


def _blocks(x: jax.Array) -> jax.Array:
    width = min(_BLOCK, x.shape[0])
    rows = -(-x.shape[0] // width)
    return jnp.pad(x, (0, rows * width - x.shape[0])).reshape(rows, width)


def _row_sums(x: jax.Array) -> jax.Array:
    # Whole numbers below 2^24 are exact in float32, if it is float32.
    triangle = jnp.triu(jnp.ones((x.shape[1],) * 2, jnp.float32))
    exact = jax.lax.Precision.HIGHEST
    return jnp.matmul(x.astype(jnp.float32), triangle, precision=exact).astype(x.dtype)


def _exclusive(x: jax.Array) -> jax.Array:
    return jnp.pad(x[:-1], (1, 0))


def _with_first(block: jax.Array, before: jax.Array) -> jax.Array:
    return block + jnp.pad(before[:, None], ((0, 0), (0, block.shape[1] - 1)))


def prefix_sum(x: jax.Array) -> jax.Array:
    """Inclusive running sum of int32 ``(n,)``, exact up to 2^24.

    Blocks of 32: the sums of whole blocks first, in the same way, each added to the first of the
    next block; then a product with a triangle of ones. On a CPU several times as fast as XLA's own
    cumulative sum (adding the sums afterwards would cost more than all the rest), and at home on a
    matrix unit.
    """
    if x.shape[0] <= 1:
        return x
    block = _blocks(x)
    if block.shape[0] > 1:
        before = _exclusive(prefix_sum(jnp.sum(block, axis=1, dtype=x.dtype)))
        block = _with_first(block, before)
    return _row_sums(block).reshape(-1)[: x.shape[0]]


def multiply(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """High and low halves of the 64-bit product of two uint32."""
    a_low, a_high = a & 0xFFFF, a >> 16
    b_low, b_high = b & 0xFFFF, b >> 16
    low, cross = a_low * b_low, a_high * b_low
    # Three terms below 2^16, 2^32 - 2^17 + 1 and 2^16: no overflow.
    middle = (low >> 16) + (cross & 0xFFFF) + a_low * b_high
    return a_high * b_high + (cross >> 16) + (middle >> 16), a * b


def _add(a: Fixed, b: Fixed) -> Fixed:
    part = a.part + b.part
    return Fixed(a.whole + b.whole + (part < b.part), part)


def _subtract(a: Fixed, b: Fixed) -> Fixed:
    return Fixed(a.whole - b.whole - (a.part < b.part), a.part - b.part)


def _carried(whole: jax.Array, high: jax.Array, low: jax.Array) -> Fixed:
    """Sums of whole parts and of both halves of the fractions, put together."""
    high = high + (low >> 16)
    return Fixed(whole + (high >> 16).astype(jnp.int32), (high << 16) | (low & 0xFFFF))


def _running(x: Fixed) -> tuple[Fixed, Fixed]:
    """Running sums and their last, not read off them: on a CPU that costs a second pass."""
    n = x.part.shape[0]
    if n <= 1:
        return x, Fixed(x.whole[0], x.part[0])
    # Halves of 16 bits: 32 of them and what came before add up below 2^22.
    blocks = [_blocks(v) for v in (x.whole, x.part >> 16, x.part & 0xFFFF)]
    totals = _carried(*(jnp.sum(v, axis=1, dtype=v.dtype) for v in blocks))
    ends, total = _running(totals)
    if blocks[0].shape[0] > 1:
        before = Fixed(*(_exclusive(v) for v in ends))
        first = before.whole, before.part >> 16, before.part & 0xFFFF
        blocks = [_with_first(v, add) for v, add in zip(blocks, first, strict=True)]
    sums = _carried(*(_row_sums(v) for v in blocks))
    return Fixed(*(v.reshape(-1)[:n] for v in sums)), total


def running(x: Fixed, axis_name: str | None = None) -> tuple[Fixed, Fixed, Fixed]:
    """Inclusive running sums of ``x`` ``(n,)``, the sum before the first, and the last.

    With ``axis_name``, inside ``shard_map`` or ``pmap``, sums run over all devices in order; two
    numbers a device are exchanged.
    """
    sums, total = _running(x)
    start = Fixed(jnp.zeros_like(total.whole), jnp.zeros_like(total.part))
    if axis_name is None:
        return sums, start, total
    ends, over_all = _running(Fixed(*(jax.lax.all_gather(v, axis_name) for v in total)))
    here = jax.lax.axis_index(axis_name)
    start = _subtract(Fixed(ends.whole[here], ends.part[here]), total)
    return _add(sums, Fixed(*(v[None] for v in start))), start, over_all


def _sum_of_weights(weights: jax.Array, axis_name: str | None) -> jax.Array:
    # Byte by byte in uint32, which up to 2^24 terms is exact: the same on any number of devices.
    scaled = jnp.round(weights * 2.0**31).astype(jnp.uint32)
    total = jnp.zeros((), weights.dtype)
    for shift in (24, 16, 8, 0):
        byte = jnp.sum((scaled >> shift) & 0xFF, dtype=jnp.uint32)
        if axis_name is not None:
            byte = jax.lax.psum(byte, axis_name)
        total = total + byte.astype(weights.dtype) * 2.0 ** (shift - 31)
    return total


def _rescale(x: Fixed, total: Fixed, target: int) -> Fixed:
    """``x * target / total`` for a ratio next to one: linear and rounded one way, so monotone."""
    gap = _subtract(Fixed(jnp.int32(target), jnp.uint32(0)), total)
    # In units of 2^-32: at most a few thousand, unless the weights span more than float32 does.
    gap_float = gap.whole.astype(jnp.float32) * _ONE + gap.part.astype(jnp.float32)
    per_slot = jnp.round(gap_float / target)
    grow = per_slot >= 0
    step = jnp.minimum(jnp.abs(per_slot), 2.0**31).astype(jnp.uint32)
    high, low = multiply(x.whole.astype(jnp.uint32), step)
    of_part, _ = multiply(x.part, step)
    change = _add(Fixed(high.astype(jnp.int32), low), Fixed(jnp.zeros_like(x.whole), of_part))
    bigger, smaller = _add(x, change), _subtract(x, change)
    return Fixed(
        jnp.where(grow, bigger.whole, smaller.whole), jnp.where(grow, bigger.part, smaller.part)
    )


def _finish(x: Fixed, total: Fixed, n: int) -> Fixed:
    scaled = _rescale(x, total, n)
    ended = ((x.whole == total.whole) & (x.part == total.part)) | (scaled.whole >= n)
    return Fixed(jnp.where(ended, n, scaled.whole), jnp.where(ended, 0, scaled.part))


def cumulative(weights: jax.Array, n: int, axis_name: str | None = None) -> tuple[Fixed, Fixed]:
    """Where each particle's share of ``n`` slots ends, from weights whose largest is 1.

    It never falls, ends at exactly ``n``, and rises nowhere at a weight of zero. A weight below
    2^-33 of a slot counts as zero.

    Args:
      weights: ``(N,)`` in [0, 1], float32 or wider.
      n: slots.
      axis_name: the mapped axis over which the particles are split; then of the local share.

    Returns:
      ``(N,)`` running sums, and the ``()`` sum before the first of them.
    """
    expected = weights * (n / _sum_of_weights(weights, axis_name))
    whole = jnp.floor(expected)
    part = ((expected - whole) * _ONE).astype(jnp.uint32)
    sums, start, total = running(Fixed(whole.astype(jnp.int32), part), axis_name)
    return _finish(sums, total, n), _finish(start, total, n)


def differences(sums: Fixed, start: Fixed) -> Fixed:
    """Each particle's own share, ``(N,)``: running sums less the ones before them."""
    before = Fixed(*(jnp.concatenate([s[None], v[:-1]]) for v, s in zip(sums, start, strict=True)))
    return _subtract(sums, before)
