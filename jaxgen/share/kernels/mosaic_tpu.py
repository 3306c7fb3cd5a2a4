r"""The product with a shared weight on a TPU: its tiles are made on chip and never leave it.

With W_rc the tile (r, c) of the weight, lambda S_j * psi_p by its pool tile p and signs S_j:

    forward      Y = X W                grid (rows of X, columns of W, rows of W)
    grad_x       dX = dY W^T            grid (rows of X, rows of W, columns of W)
    grad_pool    dpsi_p = lambda sum over the tiles (r, c) made of p of S_j * (X_r^T dY_c),
                                        grid (pool tiles, partitions, rows of X)

The last axis is summed over in float32 in VMEM. Index maps compute in the scalar core which pool
tile, or for ``grad_pool`` which blocks of X and dY, a step takes: at most one tile of a partition
is made of a pool tile, so that each part of the gradient is written once, in a fixed order.

A block is several tiles, so that small tiles fill the matrix unit too. Either each tile of a block
is fetched alone, or the whole pool is ``resident`` in VMEM and the weight costs no bandwidth. The
pool is seen as rows of 128 slots, which is how it lies in memory: a wider view would copy it.
Sizes that are no multiple of a block are masked in the kernel, nothing is padded in memory.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from jaxgen.core import arrays
from jaxgen.share.hashing import fmix32
from jaxgen.share.kernels.tiles import Tiles, output_type, served, tiles_of, untiled
from jaxgen.share.layout import Spec

__all__ = ["forward", "grad_pool", "grad_x", "is_resident", "supports", "weight_bytes"]

_LANES = 128
# Lengths of a block: rows of X, the axis summed over, the axis kept. At these a product in float32
# is bound by arithmetic, by memory at the small ones; tiles of a block at most.
_SMALL, _LARGE = (512, 512, 512), (1024, 512, 1024)
_MOST_TILES = 16
_MOST_SLOTS = 1 << 19
# Bytes of VMEM: every chip's, and what a kernel may take of it with a pool in it.
_VMEM = 16 << 20
_MOST_RESIDENT = 64 << 20


def supports(
    shape: tuple[int, ...], dtype: DTypeLike, spec: Spec, pool_dtype: DTypeLike | None = None
) -> str | None:
    """Why the kernels cannot serve an ``x`` of this shape and dtype, or ``None``."""
    del shape
    if (reason := untiled(spec, pool_dtype)) is not None:
        return reason
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"x has dtype {np.dtype(dtype)}; the TPU kernels take float32 and bfloat16"
    (bk, bn), rows = spec.tile or (0, 0), 8 if dtype == jnp.float32 else 16
    if bk % rows or bn % _LANES or (_LANES % bk and bk % _LANES):
        return (
            f"tile is {(bk, bn)}; the TPU kernels take columns in multiples of 128 and, for "
            f"{np.dtype(dtype)}, rows that are a power of two from {rows} to 64 or a multiple of "
            "128"
        )
    if bk * bn > _MOST_SLOTS:
        return f"tile is {(bk, bn)}; the TPU kernels take at most {_MOST_SLOTS} slots"
    return None


def _interpreter(interpret: Any) -> Any:
    """The strict interpreter for ``True``: races and reads out of bounds are found."""
    if interpret is True:
        return pltpu.InterpretParams(detect_races=True, random_seed=0)
    return interpret


def _call(kernel: Callable[..., None], *operands: jax.Array, interpret: Any, **options: Any) -> Any:
    """``pl.pallas_call``, whose strict interpreter cannot be mapped: there, one by one."""
    interpret = _interpreter(interpret)
    call = pl.pallas_call(kernel, interpret=interpret, **options)
    if isinstance(interpret, pltpu.InterpretParams):
        call = jax.custom_batching.sequential_vmap(call)
    return call(*operands)


def _chip_vmem() -> int:
    """VMEM of the chip at hand, or what every chip has."""
    if jax.default_backend() != "tpu":
        return _VMEM
    return pltpu.get_tpu_info().vmem_capacity_bytes


def _target(target: tuple[int, int, int] | None) -> tuple[int, int, int]:
    if target is not None:
        return target
    return _LARGE if _chip_vmem() >= 4 * _VMEM else _SMALL


def is_resident(
    rows: int, pool_dtype: DTypeLike, spec: Spec, target: tuple[int, int, int] | None = None
) -> bool:
    """Whether the pool is held in VMEM where it is not said.

    The pool must take a quarter of VMEM at most (of 16 MiB where no TPU is at hand), and be
    smaller than what fetching the leaf's tiles once for each block of rows would move.
    """
    slots = spec.padded * pl.cdiv(rows, _target(target)[0])
    return spec.m * np.dtype(pool_dtype).itemsize <= _chip_vmem() // 4 and spec.m < slots


def _even(count: int, most: int, step: int = 1) -> int:
    """A size of blocks that cut ``count`` evenly: a multiple of ``step``, about ``most``."""
    blocks = pl.cdiv(count, max(step, most))
    return pl.cdiv(pl.cdiv(count, blocks), step) * step


def _row_block(rows: int, most: int) -> int:
    """Rows of a block: all of them, or a multiple of 16, which may be more than there are."""
    return rows if 16 <= rows <= most else _even(rows, most, 16)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Sizes of a block: ``rows`` of X, and ``down`` by ``across`` tiles of W."""

    rows: int
    down: int
    across: int


def _blocks(
    tiles: Tiles, rows: int, is_forward: bool, target: tuple[int, int, int] | None
) -> _Blocks:
    target = _target(target)
    # A block of X is a multiple of 128 columns.
    step = max(1, _LANES // tiles.bk)
    down, across = target[1:] if is_forward else target[:0:-1]
    down, across = max(step, down // tiles.bk // step * step), max(1, across // tiles.bn)
    # The axis kept goes first: it decides how often X is read.
    if is_forward:
        across = min(across, _MOST_TILES // step)
        down = min(down, max(step, _MOST_TILES // across // step * step))
    else:
        down = min(down, _MOST_TILES)
        across = min(across, max(1, _MOST_TILES // down))
    return _Blocks(
        _row_block(rows, target[0]), _even(tiles.down, down, step), _even(tiles.across, across)
    )


def weight_bytes(
    rows: int,
    pool_dtype: DTypeLike,
    spec: Spec,
    *,
    is_forward: bool = True,
    resident: bool | None = None,
    target: tuple[int, int, int] | None = None,
) -> int:
    """Bytes that ``forward`` (or ``grad_x``) reads of the pool from main memory, at most."""
    tiles, itemsize = tiles_of(spec), np.dtype(pool_dtype).itemsize
    if is_resident(rows, pool_dtype, spec, target) if resident is None else resident:
        return spec.m * itemsize
    blocks = _blocks(tiles, rows, is_forward, target)
    down = pl.cdiv(tiles.down, blocks.down) * blocks.down
    across = pl.cdiv(tiles.across, blocks.across) * blocks.across
    return pl.cdiv(rows, blocks.rows) * down * across * tiles.size * itemsize


def _signed(slots: jax.Array, word: Any, spec: Spec) -> jax.Array:
    """Slots with the signs of the words from ``word`` on, float32."""
    slots = slots.astype(jnp.float32)
    if not spec.sign:
        return slots
    row, lane = (lax.broadcasted_iota(jnp.int32, slots.shape, axis) for axis in (0, 1))
    words = (row * np.int32(_LANES) + lane).astype(jnp.uint32) + word
    is_odd = (fmix32(words, spec.sign_seed) & np.uint32(1)) == 1
    return jnp.where(is_odd, -slots, slots)


def _build(slots: Any, word: Any, w: Any, wide: Any, tiles: Tiles) -> None:
    """Write a signed tile, ``slots`` of shape ``(T / 128, 128)``, into ``w``: ``(bk, bn)``."""
    if tiles.bn == _LANES:
        w[...] = _signed(slots[...], word, tiles.spec).astype(w.dtype)
        return
    wide[...] = _signed(slots[...], word, tiles.spec)
    each = tiles.bn // _LANES
    for i in range(each):
        column = wide[pl.ds(i, tiles.bk, stride=each), :]
        w[:, i * _LANES : (i + 1) * _LANES] = column.astype(w.dtype)


def _masked(x: jax.Array, axis: int, left: Any) -> jax.Array:
    """``x`` with zeros from ``left`` on along ``axis``: what lies there may be anything."""
    index = lax.broadcasted_iota(jnp.int32, x.shape, axis)
    # By way of float32: masks of 16-bit words do not compile for one to four rows.
    return jnp.where(index < left, x.astype(jnp.float32), 0.0).astype(x.dtype)


def _product_kernel(
    x: Any,
    *refs: Any,
    tiles: Tiles,
    blocks: _Blocks,
    is_forward: bool,
    resident: bool,
    length: int,
    precision: Any,
) -> None:
    """One step of ``forward`` or ``grad_x``; ``length`` is that of the axis summed over."""
    *pools, y, total, w, wide = refs
    outer, inner = pl.program_id(1), pl.program_id(2)
    last = pl.num_programs(2) - 1
    k, n = (inner, outer) if is_forward else (outer, inner)

    @pl.when(inner == 0)
    def start() -> None:
        total[...] = jnp.zeros(total.shape, total.dtype)

    def build(a: Any, b: int, pool: Any) -> None:
        p, word = tiles.at(k * np.int32(blocks.down) + a, n * np.int32(blocks.across) + b)
        first = a * tiles.bk if isinstance(a, int) else pl.multiple_of(a * tiles.bk, tiles.bk)
        part = w.at[pl.ds(first, tiles.bk), pl.ds(b * tiles.bn, tiles.bn)]
        _build(pool.at[p] if resident else pool, word, part, wide, tiles)

    for b in range(blocks.across):
        if resident:
            pl.loop(0, blocks.down)(functools.partial(build, b=b, pool=pools[0]))
            continue
        for a in range(blocks.down):
            build(a, b, pools[a * blocks.across + b])

    axis = 0 if is_forward else 1

    def add(x: jax.Array, w: jax.Array) -> None:
        total[...] += lax.dot_general(
            x,
            w,
            (((1,), (axis,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    block = w.shape[axis]
    if length % block == 0:
        add(x[...], w[...])
    else:
        left = length - length // block * block
        pl.when(inner != last)(lambda: add(x[...], w[...]))
        pl.when(inner == last)(lambda: add(_masked(x[...], 1, left), _masked(w[...], axis, left)))

    @pl.when(inner == last)
    def finish() -> None:
        y[...] = (total[...] * np.float32(tiles.spec.scale)).astype(y.dtype)


def _limit(needed: int) -> int:
    """VMEM to ask for; a quarter more, for the compiler's own."""
    return max(_VMEM, needed * 5 // 4)


def _product(
    x: jax.Array,
    pool: jax.Array,
    spec: Spec,
    *,
    is_forward: bool,
    resident: bool | None,
    precision: Any,
    target: tuple[int, int, int] | None,
    interpret: Any,
) -> jax.Array:
    tiles = served(spec, supports(x.shape, x.dtype, spec, pool.dtype))
    rows, (length, width) = x.shape[0], spec.matrix if is_forward else spec.matrix[::-1]
    if rows == 0:
        return jnp.zeros((0, width), x.dtype)
    if resident is None:
        resident = is_resident(rows, pool.dtype, spec, target)
    pool_bytes = pool.size * pool.dtype.itemsize
    if resident and pool_bytes > _MOST_RESIDENT:
        raise NotImplementedError(
            f"the pool has {pool_bytes} bytes; at most {_MOST_RESIDENT} can be resident"
        )
    blocks = _blocks(tiles, rows, is_forward, target)
    kb, nb = blocks.down * tiles.bk, blocks.across * tiles.bn
    x_block, y_block = (kb, nb) if is_forward else (nb, kb)
    view = pool.reshape(tiles.units, tiles.size // _LANES, _LANES)

    def tile(i: int) -> Callable[..., Any]:
        a, b = divmod(i, blocks.across)

        def index(_: Any, outer: Any, inner: Any) -> tuple[Any, int, int]:
            k, n = (inner, outer) if is_forward else (outer, inner)
            p, _ = tiles.at(k * np.int32(blocks.down) + a, n * np.int32(blocks.across) + b)
            return p, 0, 0

        return index

    if resident:
        count = 1
        pools = [pl.BlockSpec(view.shape, lambda *_: (0, 0, 0))]
    else:
        count = blocks.down * blocks.across
        pools = [pl.BlockSpec((None, *view.shape[1:]), tile(i)) for i in range(count)]
    wide = (tiles.size // _LANES, _LANES) if tiles.bn > _LANES else (8, _LANES)
    held = pool_bytes if resident else 2 * count * tiles.size * pool.dtype.itemsize
    needed = (
        held
        + x.dtype.itemsize * (2 * blocks.rows * (x_block + y_block) + kb * nb)
        + 4 * (2 * blocks.rows * y_block + 3 * tiles.size)
    )
    options: dict[str, Any] = {"is_forward": is_forward, "resident": resident, "target": target}
    read = weight_bytes(rows, pool.dtype, spec, **options)
    columns = pl.cdiv(width, y_block)
    return _call(
        functools.partial(
            _product_kernel,
            tiles=tiles,
            blocks=blocks,
            is_forward=is_forward,
            resident=resident,
            length=length,
            precision=precision,
        ),
        x,
        *([view] * count),
        grid=(pl.cdiv(rows, blocks.rows), columns, pl.cdiv(length, x_block)),
        in_specs=[pl.BlockSpec((blocks.rows, x_block), lambda i, outer, inner: (i, inner)), *pools],
        out_specs=pl.BlockSpec((blocks.rows, y_block), lambda i, outer, inner: (i, outer)),
        out_shape=output_type((rows, width), x.dtype, x, pool),
        scratch_shapes=[
            pltpu.VMEM((blocks.rows, y_block), jnp.float32),
            pltpu.VMEM((kb, nb), x.dtype),
            pltpu.VMEM(wide, jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_limit(needed),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * length * width,
            transcendentals=0,
            bytes_accessed=read + x.dtype.itemsize * rows * (columns * length + width),
        ),
        interpret=interpret,
        name="hashed_forward" if is_forward else "hashed_grad_x",
    )


def forward(
    x: jax.Array,
    pool: jax.Array,
    spec: Spec,
    *,
    resident: bool | None = None,
    precision: lax.PrecisionLike = None,
    target: tuple[int, int, int] | None = None,
    interpret: Literal[False, True] | pltpu.InterpretParams = False,
) -> jax.Array:
    """``x @ weight``.

    Args:
      x: ``(M, K)``, float32 or bfloat16.
      pool: ``(m,)``, float32 or bfloat16.
      spec: a tiled leaf that ``supports`` has no objection to.
      resident: whether the pool is held in VMEM; ``None`` by ``is_resident``.
      precision: of the products, as ``jax.lax.dot_general`` has it; sums are in float32.
      target: about how long the axes of a block are: rows of ``x``, what is summed over, what is
        kept; ``None`` by the chip at hand.
      interpret: ``True`` runs under the strict TPU interpreter, on any machine.

    Returns:
      ``(M, N)`` in ``x``'s dtype.

    Raises:
      NotImplementedError: what ``supports`` objects to, or a pool too large to be resident.
    """
    return _product(
        x,
        pool,
        spec,
        is_forward=True,
        resident=resident,
        precision=precision,
        target=target,
        interpret=interpret,
    )


def grad_x(
    dy: jax.Array,
    pool: jax.Array,
    spec: Spec,
    *,
    resident: bool | None = None,
    precision: lax.PrecisionLike = None,
    target: tuple[int, int, int] | None = None,
    interpret: Literal[False, True] | pltpu.InterpretParams = False,
) -> jax.Array:
    """``dy @ weight.T``: ``(M, K)`` in ``dy``'s dtype from ``dy`` of shape ``(M, N)``.

    Arguments and errors are those of ``forward``.
    """
    return _product(
        dy,
        pool,
        spec,
        is_forward=False,
        resident=resident,
        precision=precision,
        target=target,
        interpret=interpret,
    )


def _pool_kernel(
    x: Any, dy: Any, *refs: Any, tiles: Tiles, rows: int, columns: int, precision: Any
) -> None:
    """One step of ``grad_pool``; ``rows`` are those of X, ``columns`` those of its block."""
    *_, out, total, wide = refs
    q, i = pl.program_id(1), pl.program_id(2)
    has, r, c, word = tiles.made_of(tiles.touch(pl.program_id(0)), q)
    is_last = i == pl.num_programs(2) - 1

    @pl.when((q == 0) & (i == 0))
    def start() -> None:
        out[...] = jnp.zeros(out.shape, out.dtype)

    def add(x: jax.Array, dy: jax.Array) -> None:
        total[...] += lax.dot_general(
            x,
            dy,
            (((0,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    @pl.when(has & (i == 0))
    def start_tile() -> None:
        total[...] = jnp.zeros(total.shape, total.dtype)

    left = rows - rows // x.shape[0] * x.shape[0]
    if left == 0:
        pl.when(has)(lambda: add(x[...], dy[...]))
    else:
        pl.when(has & ~is_last)(lambda: add(x[...], dy[...]))
        pl.when(has & is_last)(lambda: add(_masked(x[...], 0, left), _masked(dy[...], 0, left)))

    @pl.when(has & is_last)
    def finish_tile() -> None:
        part = total
        if columns > tiles.bk:
            at = lax.rem(r * np.int32(tiles.bk), np.int32(columns))
            part = total.at[pl.ds(pl.multiple_of(at, tiles.bk), tiles.bk), :]
        grad = part[...]
        # What the padding of the last tiles collects belongs to no weight.
        if tiles.spec.matrix[0] % tiles.bk:
            grad = _masked(grad, 0, np.int32(tiles.spec.matrix[0]) - r * np.int32(tiles.bk))
        if tiles.spec.matrix[1] % tiles.bn:
            grad = _masked(grad, 1, np.int32(tiles.spec.matrix[1]) - c * np.int32(tiles.bn))
        each = tiles.bn // _LANES
        for k in range(each):
            column = grad[:, k * _LANES : (k + 1) * _LANES]
            wide[pl.ds(k, tiles.bk, stride=each) if each > 1 else slice(None), :] = column
        out[...] += _signed(wide[...], word, tiles.spec) * np.float32(tiles.spec.scale)


def grad_pool(
    x: jax.Array,
    dy: jax.Array,
    spec: Spec,
    *,
    precision: lax.PrecisionLike = None,
    target: int = 1024,
    interpret: Literal[False, True] | pltpu.InterpretParams = False,
) -> jax.Array:
    """The gradient in the pool, zero where the leaf has no weight.

    Args:
      x: ``(M, K)``, float32 or bfloat16.
      dy: ``(M, N)``, of ``x``'s dtype.
      spec: a tiled leaf that ``supports`` has no objection to.
      precision: of the products, as ``jax.lax.dot_general`` has it; sums are in float32.
      target: about how many rows of ``x`` a block has.
      interpret: ``True`` runs under the strict TPU interpreter, on any machine.

    Returns:
      ``(m,)``, float32, the same bits in every run.

    Raises:
      NotImplementedError: what ``supports`` objects to.
    """
    tiles = served(spec, supports(x.shape, x.dtype, spec))
    if x.shape[0] == 0:
        return jnp.zeros((spec.m,), jnp.float32)
    rows = x.shape[0]
    columns = max(tiles.bk, _LANES)
    width = columns + tiles.bn
    # Two buffers of each operand in half of what every chip has.
    most = _VMEM // 2 // (2 * width * x.dtype.itemsize)
    block = _row_block(rows, max(16, min(target, most)))

    def operand(pick: Callable[[Any, Any], Any]) -> Callable[..., tuple[Any, Any]]:
        def index(a: Any, q: Any, i: Any) -> tuple[Any, Any]:
            has, r, c, _ = tiles.made_of(tiles.touch(a), q)
            return jnp.where(has, i, 0), pick(r, c)

        return index

    def pick_x(r: Any, c: Any) -> Any:
        return lax.div(r, np.int32(columns // tiles.bk))

    view = (tiles.units, tiles.size // _LANES, _LANES)
    one = (None, *view[1:])
    needed = 2 * block * width * x.dtype.itemsize + 4 * (5 * tiles.size + 2 * columns * tiles.bn)
    operands, in_specs, aliases = [x, dy], [], {}
    in_specs.append(pl.BlockSpec((block, columns), operand(pick_x)))
    in_specs.append(pl.BlockSpec((block, tiles.bn), operand(lambda r, c: c)))
    if tiles.touched < tiles.units:
        # The rest of the output is that of an array of zeros.
        operands.append(arrays.varying_zeros(view, jnp.float32, x, dy))
        in_specs.append(pl.BlockSpec((None, 8, _LANES), lambda *_: (0, 0, 0)))
        aliases = {2: 0}
    out = _call(
        functools.partial(
            _pool_kernel, tiles=tiles, rows=rows, columns=columns, precision=precision
        ),
        *operands,
        grid=(tiles.touched, tiles.partitions, pl.cdiv(rows, block)),
        in_specs=in_specs,
        out_specs=pl.BlockSpec(one, lambda a, q, i: (tiles.touch(a), 0, 0)),
        out_shape=output_type(view, jnp.float32, x, dy),
        scratch_shapes=[
            pltpu.VMEM((columns, tiles.bn), jnp.float32),
            pltpu.VMEM(one[1:], jnp.float32),
        ],
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_limit(needed),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * tiles.count * tiles.size,
            transcendentals=0,
            bytes_accessed=tiles.count * rows * width * x.dtype.itemsize + 4 * spec.m,
        ),
        interpret=interpret,
        name="hashed_grad_pool",
    )
    return out.reshape(spec.m)
