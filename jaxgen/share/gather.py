r"""From a pool to the weights and back: theta = A psi, A^T, and the least-squares inverse.

A has one entry lambda g per row, so it is never stored: the slots are computed. ``"stable"`` moves
whole windows. With the pool written twice in a row, partition q is the contiguous window that
starts at u(q), and A^T adds each partition's gradient to the window that it came from: a fixed
order of sums, no atomics, no index. ``"roast"`` and ``"hashednet"`` compute the slot of each weight
where it is read, and on the way back for a block of weights at a time.

Left out: forward-mode derivatives in the pool (reverse mode works to any order).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxgen.core import arrays, keys
from jaxgen.share.hashing import quadratic31, sign
from jaxgen.share.layout import Layout, Spec, named_leaves

__all__ = ["Shared", "compress", "expand", "expand_leaf", "init", "slots"]

# Weights whose slots the gradients of "roast" and "hashednet" compute at a time.
_BLOCK = 1 << 16


class Shared(NamedTuple):
    """The parameters that are trained: a pytree in place of the model's own.

    Attributes:
      pool: ``(m,)``, floating.
      rest: the leaves that pass through, by name.
    """

    pool: jax.Array
    rest: dict[str, jax.Array]


def _split(spec: Spec) -> tuple[list[tuple[int, int]], tuple[int, int], list[tuple[int, int]]]:
    """Windows ``(start, length)`` before, the full partitions ``[q0, q1)``, windows after."""
    m, end = spec.m, spec.offset + spec.padded
    q0, q1 = -(-spec.offset // m), end // m

    def window(at: int, until: int) -> tuple[int, int]:
        q, t = divmod(at, m)
        return (int(spec.shift(q)) * spec.unit + t) % m, until - at

    if q1 <= q0:
        cuts = [spec.offset, q1 * m, end] if spec.offset < q1 * m < end else [spec.offset, end]
        return [window(a, b) for a, b in itertools.pairwise(cuts)], (0, 0), []
    before = [window(spec.offset, q0 * m)] if spec.offset < q0 * m else []
    after = [window(q1 * m, end)] if q1 * m < end else []
    return before, (q0, q1), after


def _full_starts(spec: Spec, q0: int, q1: int) -> jax.Array:
    shifts = spec.shift(lax.iota(jnp.uint32, q1 - q0) + np.uint32(q0))
    return (shifts * np.uint32(spec.unit)).astype(jnp.int32)


def _hashed_slots(spec: Spec, place: jax.Array) -> jax.Array:
    """The slots of the places of a ``"roast"`` or ``"hashednet"`` leaf's order, uint32 to int32.

    The released code of ROAST hashes row and column of a chunk by a linear function, whose loads
    vary widely from seed to seed: at m = n between a fifth and a half of the pool is left unused.
    """
    if spec.scheme == "hashednet":
        index = place + np.uint32(spec.offset % 2**32)
        h = quadratic31(index, spec.key(7), spec.key(8, 1), spec.key(9))
        return (h % np.uint32(spec.m)).astype(jnp.int32)
    size = math.prod(spec.tile or ())
    number = place // np.uint32(size) + np.uint32(spec.offset // size % 2**32)
    h = quadratic31(number, spec.key(4), spec.key(5, 1), spec.key(6))
    return (h % np.uint32(spec.m - size + 1) + place % np.uint32(size)).astype(jnp.int32)


def _check_size(spec: Spec) -> None:
    # Places in a leaf are int32.
    if spec.padded >= 2**31:
        raise NotImplementedError(
            f"{spec.path} has {spec.padded} weights, more than are built at once; expected less "
            "than 2^31: look them up by slots, or multiply by hashed_matmul"
        )


def _gather(pool: jax.Array, doubled: jax.Array, spec: Spec) -> jax.Array:
    """The weights of a leaf, in its order: ``(padded,)``."""
    _check_size(spec)
    if spec.scheme != "stable":
        at = _hashed_slots(spec, lax.iota(jnp.uint32, spec.padded))
        return _made(pool.at[at].get(mode="promise_in_bounds"), spec)

    before, (q0, q1), after = _split(spec)
    if q0 == q1 and len(before) == 1:
        (start, length), *_ = before
        return _made(lax.slice(doubled, (start,), (start + length,)), spec)
    if q0 == q1 and spec.padded <= spec.m:
        # Two windows and a choice between them: a concatenation would be fused into branches.
        (first, cut), (second, _) = before
        second = (second - cut) % spec.m
        one, other = (lax.slice(doubled, (s,), (s + spec.padded,)) for s in (first, second))
        return _made(jnp.where(lax.iota(jnp.int32, spec.padded) < cut, one, other), spec)
    if q0 == q1:
        parts = [lax.slice(doubled, (s,), (s + k,)) for s, k in before]
        return _made(lax.optimization_barrier(jnp.concatenate(parts)), spec)
    if not before and not after:
        starts = _full_starts(spec, q0, q1)
        rows = jax.vmap(lambda s: lax.dynamic_slice(doubled, (s,), (spec.m,)))(starts)
        return _made(rows.reshape(-1), spec)
    # Whole windows written in place, one after the other: on a CPU a part of a concatenation or of
    # a gather of windows compiles to a loop over single entries, several times as slow. The parts
    # at the ends come first, as whole windows too; the full partitions then write over what they
    # have too much.
    m, head = spec.m, sum(length for _, length in before)
    ends = [((start + length) % m, spec.padded - m) for start, length in after]
    ends += [(start, 0) for start, _ in before]
    end_starts, end_places = jnp.array(ends, jnp.int32).T
    starts = jnp.concatenate([end_starts, _full_starts(spec, q0, q1)])
    places = jnp.concatenate([end_places, head + m * lax.iota(jnp.int32, q1 - q0)])

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        window = lax.dynamic_slice(doubled, (starts[i],), (m,))
        return lax.dynamic_update_slice(out, _made(window, spec, places[i]), (places[i],))

    out = arrays.varying_zeros((spec.padded,), doubled.dtype, doubled)
    return lax.fori_loop(0, len(ends) + q1 - q0, body, out)


def _ones(spec: Spec, at: Any, length: int, dtype: np.dtype) -> jax.Array:
    """One for each weight from place ``at`` on, zero for padding."""
    place = jnp.asarray(at, jnp.int32) + lax.iota(jnp.int32, length)
    if spec.tile is None:
        return (place < spec.padded).astype(dtype)
    (_, across), (bk, bn), (k, n) = spec.grid, spec.tile, spec.matrix
    chunk, within = place // (bk * bn), place % (bk * bn)
    row = chunk // across * bk + within // bn
    column = chunk % across * bn + within % bn
    return ((row < k) & (column < n)).astype(dtype)


def _scatter(total: jax.Array, flat: jax.Array | None, spec: Spec) -> jax.Array:
    """Add what a leaf's entries weigh to their slots in ``total``: ``(2m,)`` under ``"stable"``.

    Entries ``None`` are ones, which are not built.
    """
    wide = total.dtype
    if spec.scheme != "stable":
        block = min(_BLOCK, spec.padded)
        count = -(-spec.padded // block)
        blocks = None
        if flat is not None:
            blocks = jnp.pad(flat, (0, count * block - flat.size)).reshape(-1, block)

        def add_block(total: jax.Array, xs: tuple[jax.Array, Any]) -> tuple[jax.Array, None]:
            first = xs[0] * np.uint32(block)
            at = total.at[_hashed_slots(spec, first + lax.iota(jnp.uint32, block))]
            entries = _ones(spec, first, block, wide) if xs[1] is None else xs[1].astype(wide)
            return at.add(_made(entries, spec, first), mode="promise_in_bounds"), None

        return lax.scan(add_block, total, (lax.iota(jnp.uint32, count), blocks))[0]

    def add(total: jax.Array, start: Any, length: int, at: Any) -> jax.Array:
        if flat is None:
            entries = _ones(spec, at, length, wide)
        else:
            entries = lax.dynamic_slice(flat, (at,), (length,)).astype(wide)
        old = lax.dynamic_slice(total, (start,), (length,))
        return lax.dynamic_update_slice(total, old + _made(entries, spec, at), (start,))

    before, (q0, q1), after = _split(spec)
    at = 0
    for start, length in before:
        total, at = add(total, start, length, at), at + length
    if q1 > q0:
        starts, first = _full_starts(spec, q0, q1), at
        total = lax.fori_loop(
            0, q1 - q0, lambda i, t: add(t, starts[i], spec.m, first + i * spec.m), total
        )
        at += (q1 - q0) * spec.m
    for start, length in after:
        total, at = add(total, start, length, at), at + length
    return total


def _from_order(flat: jax.Array, spec: Spec) -> jax.Array:
    """From the layout's order to the leaf, padding dropped."""
    if spec.tile is None:
        return flat.reshape(spec.shape)
    (rows, columns), (bk, bn), (k, n) = spec.grid, spec.tile, spec.matrix
    tiles = flat.reshape(rows, columns, bk, bn).transpose(0, 2, 1, 3)
    return tiles.reshape(rows * bk, columns * bn)[:k, :n].reshape(spec.shape)


def _to_order(leaf: jax.Array, spec: Spec) -> jax.Array:
    """From the leaf to the layout's order, zeros in the padding."""
    if spec.tile is None:
        return leaf.reshape(-1)
    (rows, columns), (bk, bn), (k, n) = spec.grid, spec.tile, spec.matrix
    matrix = jnp.pad(leaf.reshape(k, n), ((0, rows * bk - k), (0, columns * bn - n)))
    return matrix.reshape(rows, bk, columns, bn).transpose(0, 2, 1, 3).reshape(-1)


def _made(flat: jax.Array, spec: Spec, at: Any = 0) -> jax.Array:
    """Signed and scaled entries of a leaf, from place ``at`` on."""
    # In reduced precision lambda itself would be rounded, for a whole leaf the same way.
    wide = arrays.at_least_f32(flat.dtype)
    out = flat.astype(wide) * jnp.asarray(spec.scale, wide)
    if spec.sign:
        first = jnp.asarray(at, jnp.uint32) + np.uint32(spec.offset % 2**32)
        signs = sign(first + lax.iota(jnp.uint32, flat.size), spec.sign_seed)
        out = out * signs.astype(wide)
    return out.astype(flat.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def apply_map(pool: jax.Array, specs: tuple[Spec, ...]) -> tuple[jax.Array, ...]:
    """A psi, leaf by leaf."""
    doubled = jnp.concatenate([pool, pool]) if specs[0].scheme == "stable" else pool
    return tuple(_from_order(_gather(pool, doubled, spec), spec) for spec in specs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def apply_transpose(
    leaves: tuple[jax.Array, ...], specs: tuple[Spec, ...], dtype: np.dtype
) -> jax.Array:
    """A^T theta, summed in float32 or wider."""
    flats = [_to_order(leaf, spec) for leaf, spec in zip(leaves, specs, strict=True)]
    return _summed(flats, specs, arrays.at_least_f32(dtype)).astype(dtype)


def _summed(
    flats: Sequence[jax.Array | None], specs: tuple[Spec, ...], dtype: DTypeLike
) -> jax.Array:
    """Per slot the sum of what the leaves' entries weigh, ``None`` for ones: ``(m,)``."""
    m, is_doubled = specs[0].m, specs[0].scheme == "stable"
    like = [flat for flat in flats if flat is not None]
    total = arrays.varying_zeros((2 * m if is_doubled else m,), dtype, *like)
    for flat, spec in zip(flats, specs, strict=True):
        total = _scatter(total, flat, spec)
    return total[:m] + total[m:] if is_doubled else total


def _map_fwd(pool: jax.Array, specs: tuple[Spec, ...]) -> tuple[tuple[jax.Array, ...], Any]:
    return apply_map(pool, specs), jnp.zeros((0,), pool.dtype)


def _map_bwd(specs: tuple[Spec, ...], like: jax.Array, cotangents: Any) -> tuple[jax.Array]:
    return (apply_transpose(tuple(cotangents), specs, like.dtype),)


def _transpose_fwd(
    leaves: tuple[jax.Array, ...], specs: tuple[Spec, ...], dtype: np.dtype
) -> tuple[jax.Array, Any]:
    return apply_transpose(leaves, specs, dtype), tuple(jnp.zeros((0,), x.dtype) for x in leaves)


def _transpose_bwd(
    specs: tuple[Spec, ...], dtype: np.dtype, like: Any, cotangent: jax.Array
) -> tuple[tuple[jax.Array, ...]]:
    leaves = apply_map(cotangent, specs)
    return (tuple(leaf.astype(x.dtype) for leaf, x in zip(leaves, like, strict=True)),)


apply_map.defvjp(_map_fwd, _map_bwd)
apply_transpose.defvjp(_transpose_fwd, _transpose_bwd)


def check_pool(pool: ArrayLike, m: int) -> jax.Array:
    """The pool as a replicated array.

    Raises:
      ValueError: another shape than ``(m,)``.
      TypeError: a dtype that is not floating.
    """
    pool = jnp.asarray(pool)
    if pool.shape != (m,):
        raise ValueError(f"pool has shape {pool.shape}; expected ({m},), as the layout has it")
    if not jnp.issubdtype(pool.dtype, jnp.floating):
        raise TypeError(f"pool has dtype {pool.dtype}; expected a floating dtype")
    return arrays.unsharded(pool)


def _check_rest(rest: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The leaves that pass through, out of a mapping that may hold more."""
    for kept in layout.kept:
        if kept.path not in rest:
            raise ValueError(f"rest lacks {kept.path}, which passes through ({kept.reason})")
        if jnp.shape(rest[kept.path]) != kept.shape:
            raise ValueError(
                f"{kept.path} has shape {jnp.shape(rest[kept.path])}; expected {kept.shape}"
            )
    return {kept.path: rest[kept.path] for kept in layout.kept}


def init(
    key: jax.Array, layout: Layout, rest: Any = None, dtype: DTypeLike = jnp.float32
) -> Shared:
    """Draw a pool: every leaf starts with its own standard deviation.

    Args:
      key: typed key.
      layout: from ``plan``.
      rest: where the leaves that pass through come from: the whole pytree of parameters, or a
        mapping by name.
      dtype: of the pool, floating.

    Returns:
      ``Shared``: a pool of normals of standard deviation ``layout.pool_std``, and the rest.

    Raises:
      ValueError: leaves pass through and ``rest`` is absent, lacks one, or has another shape.
      TypeError: a raw key, or a dtype that is not floating.

    Source: Desai and Shrivastava (2024).

    Example:
      >>> from jaxgen.share import plan
      >>> params = {"w": jax.random.normal(jax.random.key(0), (64, 32)), "b": jnp.zeros(32)}
      >>> shared = init(jax.random.key(1), plan(params, 0.25), params)
      >>> shared.pool.shape, list(shared.rest)
      ((512,), ['b'])
    """
    keys.check(key)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype is {dtype}; expected a floating dtype")
    named = {} if rest is None else named_leaves(rest)
    pool = jax.random.normal(key, (layout.m,), dtype) * jnp.asarray(layout.pool_std, dtype)
    return Shared(pool, _check_rest(named, layout))


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _expand(pool: jax.Array, specs: tuple[Spec, ...]) -> tuple[jax.Array, ...]:
    return apply_map(pool, specs)


def expand(shared: Shared, layout: Layout) -> Any:
    """The whole pytree of parameters: theta = A psi, and what passes through.

    Its gradient in the pool is the sum over each slot's weights, in a fixed order, in float32 or
    wider. Differentiable in reverse mode to any order.

    Args:
      shared: pool and rest.
      layout: from ``plan``.

    Returns:
      A pytree as it was planned (nested dicts for a layout read from JSON without ``like``); shared
      leaves have the pool's dtype.

    Raises:
      ValueError: the pool is not ``(m,)``, the rest does not fit, or names of a layout without
        structure make no dicts.
      TypeError: ``shared`` is no ``Shared``, or the pool's dtype is not floating.
      NotImplementedError: a leaf of 2^31 weights or more.

    Source: Desai and Shrivastava (2024); HashedNets and ROAST for their schemes.

    Example:
      >>> from jaxgen.share import plan
      >>> params = {"w": jnp.arange(6.0).reshape(2, 3)}
      >>> layout = plan(params, 1.0)
      >>> bool(jnp.allclose(expand(compress(params, layout), layout)["w"], params["w"]))
      True
    """
    if not hasattr(shared, "pool") or not hasattr(shared, "rest"):
        raise TypeError(
            f"shared is {type(shared).__name__}; expected Shared(pool, rest), from init or compress"
        )
    pool = check_pool(shared.pool, layout.m)
    named = _check_rest(shared.rest, layout)
    leaves = _expand(pool, layout.leaves)
    named.update({spec.path: x for spec, x in zip(layout.leaves, leaves, strict=True)})
    if layout.structure is not None:
        return jax.tree.unflatten(layout.structure, [named[name] for name in layout.order])
    tree: dict[str, Any] = {}
    for name in layout.order:
        if any(other.startswith(name + "/") for other in layout.order):
            raise ValueError(f"{name} is a leaf and a folder; read the layout with like=")
        *folders, last = name.split("/")
        functools.reduce(lambda at, folder: at.setdefault(folder, {}), folders, tree)[last] = named[
            name
        ]
    return tree


def expand_leaf(pool: ArrayLike, spec: Spec) -> jax.Array:
    """One leaf alone, as ``expand`` makes it.

    Args:
      pool: ``(m,)``, floating.
      spec: from ``leaf``.

    Raises:
      ValueError: the pool is not ``(m,)``.
      TypeError: its dtype is not floating.
    """
    return _expand(check_pool(pool, spec.m), (spec,))[0]


def fold(
    specs: tuple[Spec, ...], of: Callable[[float], float], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Per slot the sum of ``of(lambda)`` over its weights: ``(m,)``, summed in ``dtype``."""
    for spec in specs:
        _check_size(spec)
    plain = tuple(dataclasses.replace(s, scale=of(s.scale), sign=False) for s in specs)
    return _summed([None] * len(specs), plain, dtype)


def compress(params: Any, layout: Layout) -> Shared:
    """The pool that makes the given parameters best, in least squares; exact at m = n.

    psi_j = sum_i lambda_i g_i theta_i / sum_i lambda_i^2 over the weights i of slot j; zero for a
    slot without weights.

    Args:
      params: a pytree as it was planned.
      layout: from ``plan``.

    Returns:
      ``Shared``, its pool of the shared leaves' common dtype.

    Raises:
      ValueError: a leaf is missing or has another shape: it is named.
      TypeError: a shared leaf that is not floating.

    Source: Desai and Shrivastava (2024), whose mapping makes it exact at full budget.
    """
    named = named_leaves(params)
    for spec in layout.leaves:
        _check_size(spec)
        if spec.path not in named:
            raise ValueError(f"params lack {spec.path}, which the layout shares")
        entry = named[spec.path]
        if jnp.shape(entry) != spec.shape:
            raise ValueError(f"{spec.path} has shape {jnp.shape(entry)}; expected {spec.shape}")
        if not jnp.issubdtype(jnp.result_type(entry), jnp.floating):
            raise TypeError(
                f"{spec.path} has dtype {jnp.result_type(entry)}; expected a floating dtype"
            )
    leaves = [arrays.unsharded(jnp.asarray(named[spec.path])) for spec in layout.leaves]
    return Shared(_compress(tuple(leaves), layout.leaves), _check_rest(named, layout))


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _compress(leaves: tuple[jax.Array, ...], specs: tuple[Spec, ...]) -> jax.Array:
    dtype = jnp.result_type(*leaves)
    wide = arrays.at_least_f32(dtype)
    projected = apply_transpose(leaves, specs, wide)
    weight = fold(specs, lambda lam: lam * lam, wide)
    return jnp.where(weight > 0, projected / jnp.where(weight > 0, weight, 1), 0).astype(dtype)


def slots(spec: Spec, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Slot and sign of single weights of a leaf of at most 2^32, for lookups that need a few.

    Args:
      spec: from ``leaf``.
      index: int32 or uint32, any shape: row-major positions in the leaf, in ``[0, size)``; not
        checked.

    Returns:
      The slots (int32) and the signs (int32, +1 or -1), both of ``index``'s shape.
    """
    index = index.astype(jnp.uint32)
    if spec.tile is not None:
        (_, across), (bk, bn), (_, n) = spec.grid, spec.tile, spec.matrix
        row, column = index // np.uint32(n), index % np.uint32(n)
        chunk = row // np.uint32(bk) * np.uint32(across) + column // np.uint32(bn)
        within = row % np.uint32(bk) * np.uint32(bn) + column % np.uint32(bn)
        index = chunk * np.uint32(bk * bn) + within
    if spec.scheme == "stable":
        first, phase = divmod(spec.offset, spec.m)
        m = np.uint32(spec.m)
        # Sums of two numbers below m stay below 2^32, which index + phase may pass.
        place = index % m + np.uint32(phase)
        shift = spec.shift(index // m + place // m + np.uint32(first)) * np.uint32(spec.unit)
        slot = ((shift + place % m) % m).astype(jnp.int32)
    else:
        slot = _hashed_slots(spec, index)
    if not spec.sign:
        return slot, jnp.ones(slot.shape, jnp.int32)
    return slot, sign(index + np.uint32(spec.offset % 2**32), spec.sign_seed)
