"""Where the tiles of a tiled leaf lie in the pool, for kernels: scalars and small arrays alone.

Tile (r, c) of a leaf with R x C tiles of T slots has the global number j = offset / T + r C + c.
With a pool of mt tiles, j = q mt + t, it lies in pool tile (u(q) + t) mod mt, and the weight at
place i of it has the sign of the word j T + i.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxgen.core import arrays
from jaxgen.share.layout import Spec

__all__ = ["Tiles", "output_type", "served", "tiles_of", "untiled"]


def untiled(spec: Spec, pool_dtype: DTypeLike | None = None) -> str | None:
    """Why no kernel can take a leaf or a pool, or ``None``."""
    if spec.scheme != "stable":
        return f'kernels serve scheme "stable", not {spec.scheme!r}'
    if spec.tile is None:
        return "kernels serve layouts with tiles: plan(..., tile=(256, 256))"
    if pool_dtype is not None and pool_dtype not in (jnp.float32, jnp.bfloat16):
        return f"pool has dtype {np.dtype(pool_dtype)}; kernels take float32 and bfloat16"
    return None


def output_type(shape: tuple[int, ...], dtype: DTypeLike, *like: jax.Array) -> Any:
    """The type of a kernel's output, which under ``shard_map`` varies as its operands do."""
    return jax.eval_shape(lambda *like: arrays.varying_zeros(shape, dtype, *like), *like)


def _divmod(x: Any, n: int) -> tuple[Any, Any]:
    """Quotient and remainder of words by a constant, by shifts where that can be."""
    if n & (n - 1) == 0:
        return x >> np.uint32(n.bit_length() - 1), x & np.uint32(n - 1)
    quotient = x // np.uint32(n)
    return quotient, x - quotient * np.uint32(n)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A leaf's tiles, all static.

    Attributes:
      spec: the leaf.
      bk: rows of a tile.
      bn: columns of a tile.
      down: tiles down.
      across: tiles across.
      units: tiles of the pool.
      first: the partition of the leaf's first tile.
      phase: that tile's place in it.
      partitions: how many partitions the leaf touches.
    """

    spec: Spec
    bk: int
    bn: int
    down: int
    across: int
    units: int
    first: int
    phase: int
    partitions: int

    @property
    def size(self) -> int:
        """Slots of a tile."""
        return self.bk * self.bn

    @property
    def count(self) -> int:
        """Tiles of the leaf."""
        return self.down * self.across

    def shift(self, q: Any) -> Any:
        """By how many tiles the leaf's ``q``-th partition is rotated: a word."""
        if self.partitions == 1:
            return np.uint32(self.spec.shift(np.uint32(self.first % 2**32)))
        return self.spec.shift(q + np.uint32(self.first % 2**32))

    def _first_word(self, local: Any) -> Any:
        """The word of the first weight of the leaf's tile ``local``, modulo 2^32."""
        word = local * np.uint32(self.size % 2**32)
        return word + np.uint32(self.spec.offset % 2**32)

    def at(self, r: Any, c: Any) -> tuple[Any, Any]:
        """Pool tile (int32) and first word (uint32) of tile ``(r, c)``.

        Tiles past the leaf's last one have a pool tile too; mask what comes of them.
        """
        local = r.astype(jnp.uint32) * np.uint32(self.across) + c.astype(jnp.uint32)
        q, t = _divmod(local + np.uint32(self.phase), self.units)
        p = self.shift(q) + t
        p = jnp.where(p >= np.uint32(self.units), p - np.uint32(self.units), p)
        return p.astype(jnp.int32), self._first_word(local)

    def made_of(self, p: Any, q: Any) -> tuple[Any, Any, Any, Any]:
        """The tile that the leaf's ``q``-th partition makes of pool tile ``p``.

        Args:
          p: int32.
          q: int32, in ``[0, partitions)``.

        Returns:
          Whether the leaf has it; its row, column (int32, zero where it has not) and first word.
        """
        t = p - self.shift(q.astype(jnp.uint32)).astype(jnp.int32)
        t = jnp.where(t < 0, t + np.int32(self.units), t)
        local = q * np.int32(self.units) + t - np.int32(self.phase)
        has = (local >= 0) & (local < np.int32(self.count))
        word = jnp.where(has, local, 0).astype(jnp.uint32)
        r, c = _divmod(word, self.across)
        return has, r.astype(jnp.int32), c.astype(jnp.int32), self._first_word(word)

    @functools.cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """The pool tiles that the leaf touches, as runs ``(start, length)``.

        All tiles for a leaf of as many as the pool has.
        """
        if self.count >= self.units:
            return ((0, self.units),)
        is_used = np.zeros(self.units + 2, np.int8)
        start, left, phase = 0, self.count, self.phase
        for q in range(self.partitions):
            shift = int(self.spec.shift(np.uint32((self.first + q) % 2**32)))
            length = min(self.units - phase, left)
            start = (shift + phase) % self.units
            is_used[1 + start : 1 + min(start + length, self.units)] = 1
            is_used[1 : 1 + max(0, start + length - self.units)] = 1
            left, phase = left - length, 0
        edges = np.flatnonzero(np.diff(is_used)).reshape(-1, 2)
        return tuple((int(a), int(b - a)) for a, b in edges)

    @property
    def touched(self) -> int:
        """How many pool tiles the leaf touches."""
        return sum(length for _, length in self.runs)

    def touch(self, a: Any) -> Any:
        """The ``a``-th pool tile that the leaf touches, int32."""
        start, before = self.runs[0]
        p = a + np.int32(start)
        for start, length in self.runs[1:]:
            p = jnp.where(a >= np.int32(before), a + np.int32(start - before), p)
            before += length
        return p


@functools.lru_cache(maxsize=1024)
def tiles_of(spec: Spec) -> Tiles:
    """The tiles of a leaf that ``untiled`` has no objection to."""
    assert spec.tile is not None
    down, across = spec.grid
    units = spec.units
    first, phase = divmod(spec.offset // math.prod(spec.tile), units)
    partitions = (phase + down * across - 1) // units + 1
    return Tiles(spec, *spec.tile, down, across, units, first, phase, partitions)


def served(spec: Spec, reason: str | None) -> Tiles:
    """The tiles of a leaf, unless a kernel has a reason against it.

    Raises:
      NotImplementedError: the reason, with the leaf's name.
    """
    if reason is not None:
        raise NotImplementedError(f"{spec.path}: {reason}")
    return tiles_of(spec)
