r"""The product with a shared weight on a Hopper GPU: each block of it is made in shared memory.

    forward      Y = X W                a block of Y per thread block, a loop over the rows of W
    grad_x       dX = dY W^T            a block of dX per thread block, a loop over its columns
    grad_pool    dpsi = lambda sum over the tiles made of a pool tile of S * (X_r^T dY_c),
                                        a block of a pool tile per thread block

A block of the pool comes by asynchronous copies whose place is hashed on the way, gets its signs in
registers and goes to the tensor cores from shared memory; sums are in float32 registers. Nothing is
added by atomics, so that results have the same bits in every run. The tensor cores take 16-bit
operands laid out as a weight and its transpose are; float32 they take in one layout alone, so that
it is left to plain XLA. Sizes that are no multiple of a block are padded in memory.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from jaxgen.share.hashing import fmix32
from jaxgen.share.kernels.tiles import Tiles, output_type, served, untiled
from jaxgen.share.layout import Spec

__all__ = ["forward", "grad_pool", "grad_x", "supports"]

# Rows of X in a block, and steps of a sum.
_ROWS = 128
_STEP = 64
_STAGES = 3


def supports(
    shape: tuple[int, ...], dtype: DTypeLike, spec: Spec, pool_dtype: DTypeLike | None = None
) -> str | None:
    """Why the kernels cannot serve an ``x`` of this shape and dtype, or ``None``.

    The GPU is asked for its kind where there is one; without one, a Hopper is supposed.
    """
    del shape
    if (reason := untiled(spec, pool_dtype)) is not None:
        return reason
    if jax.default_backend() == "gpu":
        capability = getattr(jax.devices()[0], "compute_capability", "unknown")
        if capability != "9.0":
            return f"the GPU has compute capability {capability}; the kernels are for 9.0"
    if dtype != jnp.bfloat16:
        return f"x has dtype {np.dtype(dtype)}; the GPU kernels take bfloat16"
    (bk, bn) = spec.tile or (0, 0)
    if bk % _STEP or bn % _STEP:
        return f"tile is {(bk, bn)}; the GPU kernels take multiples of {_STEP}"
    return None


def _width(size: int) -> int:
    """The width of a block out of a tile."""
    return 2 * _STEP if size % (2 * _STEP) == 0 else _STEP


def _split(index: Any, size: int) -> tuple[Any, Any]:
    return lax.div(index, np.int32(size)), lax.rem(index, np.int32(size))


def _swizzled(dtype: DTypeLike) -> tuple[Any, Any]:
    """The layout in shared memory that copies and tensor cores share."""
    return plgpu.TilingTransform((8, 128 // np.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)


def _block(shape: tuple[int, int], dtype: DTypeLike, index: Callable[..., Any]) -> Any:
    return plgpu.BlockSpec(shape, index, transforms=_swizzled(dtype))


def _shared(shape: tuple[int, int], dtype: DTypeLike) -> Any:
    return plgpu.SMEM(shape, dtype, transforms=_swizzled(dtype))


def _padded(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """``x`` with zeros up to multiples."""
    pads = [(0, -size % step) for size, step in zip(x.shape, (rows, columns), strict=True)]
    return jnp.pad(x, pads) if any(after for _, after in pads) else x


def _signed(w: jax.Array, word: Any, row: Any, column: Any, tiles: Tiles) -> jax.Array:
    """A block of a tile with its signs, the block starting at ``(row, column)`` of the tile."""
    if not tiles.spec.sign:
        return w
    first = word + row.astype(jnp.uint32) * np.uint32(tiles.bn) + column.astype(jnp.uint32)
    place = lax.broadcasted_iota(jnp.int32, w.shape, 0) * np.int32(tiles.bn) + lax.broadcasted_iota(
        jnp.int32, w.shape, 1
    )
    is_odd = (fmix32(place.astype(jnp.uint32) + first, tiles.spec.sign_seed) & np.uint32(1)) == 1
    return jnp.where(is_odd, -w, w)


def _within(w: jax.Array, axis: int, left: Any) -> jax.Array:
    """``w`` with zeros from ``left`` on along ``axis``."""
    return jnp.where(
        lax.broadcasted_iota(jnp.int32, w.shape, axis) < left, w, jnp.zeros((), w.dtype)
    )


def _multiply(total: Any, a: Any, b: Any, transposed: str | None) -> None:
    """Add ``a @ b`` to ``total``, one of them transposed."""
    a = a.transpose((1, 0)) if transposed == "a" else a
    b = b.transpose((1, 0)) if transposed == "b" else b
    plgpu.wgmma(total, a, b)
    plgpu.wgmma_wait(0)


def _launch(body: Callable[..., None], *operands: jax.Array, interpret: Any, **options: Any) -> Any:
    """Run a kernel; batches one by one, as such kernels cannot be mapped."""
    params = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
    call = plgpu.kernel(body, compiler_params=params, interpret=interpret, **options)
    return jax.custom_batching.sequential_vmap(call)(*operands)


def _product(
    x: jax.Array, pool: jax.Array, spec: Spec, *, is_forward: bool, interpret: Any
) -> jax.Array:
    tiles = served(spec, supports(x.shape, x.dtype, spec, pool.dtype))
    rows, (length, width) = x.shape[0], spec.matrix if is_forward else spec.matrix[::-1]
    if rows == 0:
        return jnp.zeros((0, width), x.dtype)
    # Sizes of a block: summed over and kept, then down and across.
    kept = _width(tiles.bn if is_forward else tiles.bk)
    kb, nb = (_STEP, kept) if is_forward else (kept, _STEP)
    x = _padded(x, _ROWS, _STEP)
    steps = x.shape[1] // _STEP
    row_blocks, outer_blocks = x.shape[0] // _ROWS, pl.cdiv(width, kept)

    def place(outer: Any, inner: Any) -> tuple[Any, Any, Any, Any]:
        """Pool tile and first word of a block, and where it starts in its tile."""
        k, n = (inner, outer) if is_forward else (outer, inner)
        (r, row), (c, column) = _split(k, tiles.bk // kb), _split(n, tiles.bn // nb)
        return *tiles.at(r, c), row, column

    def body(x_gmem: Any, pool_gmem: Any, y_gmem: Any, w_smem: Any, y_smem: Any) -> None:
        # Neighbours share their part of the pool.
        outer, i = _split(lax.axis_index("block"), row_blocks)

        def index(inner: Any) -> tuple[Any, Any]:
            p, _, row, column = place(outer, inner)
            return p * np.int32(tiles.bk // kb) + row, column

        def step(indices: Any, x_smem: Any, slots: Any, total: Any) -> None:
            (inner,) = indices
            _, word, row, column = place(outer, inner)
            w = slots[...].astype(jnp.float32)
            w = _signed(w, word, row * np.int32(kb), column * np.int32(nb), tiles)
            if length % _STEP:
                # Beyond its last row or column the tile holds slots that are no weights.
                left = np.int32(length) - inner * np.int32(_STEP)
                w = _within(w, 0 if is_forward else 1, left)
            w_smem[...] = w.astype(w_smem.dtype)
            plgpu.commit_smem()
            _multiply(total, x_smem, w_smem, None if is_forward else "b")

        def summed(total: Any) -> jax.Array:
            plgpu.emit_pipeline(
                lambda indices, x_smem, slots: step(indices, x_smem, slots, total),
                grid=(steps,),
                in_specs=[
                    _block((_ROWS, _STEP), x.dtype, lambda inner: (i, inner)),
                    _block((kb, nb), pool.dtype, index),
                ],
                max_concurrent_steps=min(_STAGES, steps),
            )(x_gmem, pool_gmem)
            return total[...]

        y = pl.run_scoped(summed, plgpu.ACC((_ROWS, kept)))
        y_smem[...] = (y * np.float32(spec.scale)).astype(y_smem.dtype)
        plgpu.commit_smem()
        at = (pl.ds(i * np.int32(_ROWS), _ROWS), pl.ds(outer * np.int32(kept), kept))
        plgpu.copy_smem_to_gmem(y_smem, y_gmem.at[at])
        plgpu.wait_smem_to_gmem(0)

    y = _launch(
        body,
        x,
        pool.reshape(tiles.units * tiles.bk, tiles.bn),
        out_type=output_type((x.shape[0], outer_blocks * kept), x.dtype, x, pool),
        grid=(row_blocks * outer_blocks,),
        grid_names=("block",),
        scratch_types=[_shared((kb, nb), x.dtype), _shared((_ROWS, kept), x.dtype)],
        interpret=interpret,
    )
    return y[:rows, :width]


def forward(x: jax.Array, pool: jax.Array, spec: Spec, *, interpret: Any = None) -> jax.Array:
    """``x @ weight``.

    Args:
      x: ``(M, K)``, bfloat16.
      pool: ``(m,)``, bfloat16 or float32; weights are rounded to bfloat16.
      spec: a tiled leaf that ``supports`` has no objection to.
      interpret: parameters of jax's GPU interpreter.

    Returns:
      ``(M, N)``, bfloat16.

    Raises:
      NotImplementedError: what ``supports`` objects to.
    """
    return _product(x, pool, spec, is_forward=True, interpret=interpret)


def grad_x(dy: jax.Array, pool: jax.Array, spec: Spec, *, interpret: Any = None) -> jax.Array:
    """``dy @ weight.T``: ``(M, K)`` from ``dy`` of shape ``(M, N)``; otherwise as ``forward``."""
    return _product(dy, pool, spec, is_forward=False, interpret=interpret)


def grad_pool(x: jax.Array, dy: jax.Array, spec: Spec, *, interpret: Any = None) -> jax.Array:
    """The gradient in the pool, zero where the leaf has no weight.

    Args:
      x: ``(M, K)``, bfloat16.
      dy: ``(M, N)``, bfloat16.
      spec: a tiled leaf that ``supports`` has no objection to.
      interpret: parameters of jax's GPU interpreter.

    Returns:
      ``(m,)``, float32, the same bits in every run.

    Raises:
      NotImplementedError: what ``supports`` objects to.
    """
    tiles = served(spec, supports(x.shape, x.dtype, spec))
    if x.shape[0] == 0:
        return jnp.zeros((spec.m,), jnp.float32)
    (length, width), kb, nb = spec.matrix, _STEP, _width(tiles.bn)
    x, dy = _padded(x, _STEP, kb), _padded(dy, _STEP, nb)
    steps = x.shape[0] // _STEP
    down, across = np.int32(tiles.bk // kb), np.int32(tiles.bn // nb)

    def body(x_gmem: Any, dy_gmem: Any, out_gmem: Any, out_smem: Any) -> None:
        p, place = _split(lax.axis_index("block"), int(down * across))
        row, column = _split(place, int(across))

        def one(q: Any, total: jax.Array) -> jax.Array:
            has, r, c, word = tiles.made_of(p, q)
            k, n = r * down + row, c * across + column
            # Blocks of the last tiles that are all padding have no columns of X and dY.
            has &= (k * np.int32(kb) < length) & (n * np.int32(nb) < width)

            def summed(part: Any) -> jax.Array:
                def step(_: Any, x_smem: Any, dy_smem: Any) -> None:
                    _multiply(part, x_smem, dy_smem, "a")

                plgpu.emit_pipeline(
                    step,
                    grid=(jnp.where(has, steps, 0),),
                    in_specs=[
                        _block((_STEP, kb), x.dtype, lambda i: (i, k)),
                        _block((_STEP, nb), dy.dtype, lambda i: (i, n)),
                    ],
                    max_concurrent_steps=_STAGES,
                )(x_gmem, dy_gmem)
                return part[...]

            part = pl.run_scoped(summed, plgpu.ACC((kb, nb)))
            return total + _signed(part, word, row * np.int32(kb), column * np.int32(nb), tiles)

        zeros = jnp.zeros((kb, nb), jnp.float32)
        total = lax.fori_loop(0, tiles.partitions, one, zeros)
        out_smem[...] = total * np.float32(spec.scale)
        plgpu.commit_smem()
        first = (p * down + row) * np.int32(kb), column * np.int32(nb)
        plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[pl.ds(first[0], kb), pl.ds(first[1], nb)])
        plgpu.wait_smem_to_gmem(0)

    out = _launch(
        body,
        x,
        dy,
        out_type=output_type((tiles.units * tiles.bk, tiles.bn), jnp.float32, x, dy),
        grid=(tiles.units * int(down * across),),
        grid_names=("block",),
        scratch_types=[_shared((kb, nb), jnp.float32)],
        interpret=interpret,
    )
    return out.reshape(spec.m)
