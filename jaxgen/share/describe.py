"""A layout as a table for people: what is shared, what passes through, what it all weighs."""

import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgen.share.layout import Kept, Layout, Spec

__all__ = ["describe"]

# What stands beside a leaf's name, and the table's width; names give way to it down to a least one.
_COLUMNS = "  {shape:<15}  {scale:>7}  {share:>7}  {how}"
_BESIDE, _WIDTH, _LEAST = len(_COLUMNS.format(shape="", scale="", share="", how="")), 100, 36


def describe(layout: Layout, *inner: Layout, dtype: DTypeLike = jnp.float32) -> str:
    """A table of a layout: each leaf, and what the weights and their training weigh.

    Per leaf its shape, its scale lambda, the share of the pool's weights that are its own, and
    whether it lives in the pool or passes through, with the reason. Then totals: n weights, m
    slots, and the bytes of weights, gradients and Adam's two moments before and after.

    Args:
      layout: from ``plan``.
      inner: for pools within pools: the layout of the leaves that pass through ``layout``, planned
        from ``Shared.rest``, then the layout of those that pass through that one, and so on.
      dtype: of the pool and of the shared weights, for the bytes.

    Returns:
      Lines of at most 100 columns, unless a shape or a reason is very long; longer names lose their
      middle.

    Raises:
      ValueError: an inner layout has other leaves than those that pass through the one before it.

    Example:
      >>> import jax, numpy as np
      >>> from jaxgen.share import plan
      >>> shapes = {"w": jax.ShapeDtypeStruct((64, 32), np.float32), "b": np.zeros(32)}
      >>> print(describe(plan(shapes, 0.25)).splitlines()[1])
      b     (32,)                  -        -  passes (one axis)
    """
    layouts = (layout, *inner)
    _check_nested(layouts)
    found: dict[str, tuple[Spec | Kept, str]] = {}
    for name, each in zip(_pool_names(layouts), layouts, strict=True):
        found.update({spec.path: (spec, name) for spec in each.leaves})
    kept = layouts[-1].kept
    found.update({k.path: (k, f"passes ({k.reason})") for k in kept})
    shared = sum(each.n for each in layouts)
    prefix = _common_prefix(layout.order)
    longest = max(len(path) - len(prefix) for path in layout.order)
    room = _WIDTH - _BESIDE - max(len(how) for how in ["lives in", *(h for _, h in found.values())])
    width = max(len("leaf"), min(longest, max(room, _LEAST)))
    header = _COLUMNS.format(shape="shape", scale="scale", share="share", how="lives in")
    lines = [f"{prefix.rstrip('/') or 'leaf':<{width}}{header}"]
    for path in layout.order:
        entry, how = found[path]
        row = _COLUMNS.format(
            shape=str(entry.shape).replace(" ", ""),
            scale=f"{entry.scale:.3g}" if isinstance(entry, Spec) else "-",
            share=f"{100 * entry.size / shared:.2f} %" if isinstance(entry, Spec) else "-",
            how=how,
        )
        lines.append(f"{_shortened(path[len(prefix) :], width):<{width}}{row}")
    return "\n".join([*lines, "", *_totals(layouts, kept), "", *_bytes(layouts, kept, dtype)])


def _pool_names(layouts: Sequence[Layout]) -> list[str]:
    return ["pool"] if len(layouts) == 1 else [f"pool {i + 1}" for i in range(len(layouts))]


def _check_nested(layouts: Sequence[Layout]) -> None:
    for outer, inner in itertools.pairwise(layouts):
        passing, found = {k.path for k in outer.kept}, set(inner.order)
        if passing != found:
            differ = ", ".join(sorted(passing ^ found)[:5])
            raise ValueError(
                "inner has other leaves than those that pass through the layout before it: "
                f"{differ}; plan it from the rest"
            )


def _common_prefix(names: Sequence[str]) -> str:
    """The folders that all names begin with, such as ``"params/"``."""
    folders = [name.split("/")[:-1] for name in names]
    shared = []
    for parts in zip(*folders, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(part + "/" for part in shared)


def _shortened(name: str, width: int) -> str:
    """A name with its middle left out where it is too long: both ends tell leaves apart."""
    if len(name) <= width:
        return name
    tail = 2 * (width - 2) // 3
    return f"{name[: width - 2 - tail]}..{name[-tail:]}"


def _totals(layouts: Sequence[Layout], kept: Sequence[Kept]) -> list[str]:
    lines = []
    for name, each in zip(_pool_names(layouts), layouts, strict=True):
        padding = f", padded to {each.padded:,}" if each.padded > each.n else ""
        lines.append(
            f"{name}: n = {each.n:,} weights of {len(each.leaves)} leaves{padding}, "
            f"m = {each.m:,} slots, n/m = {each.n / each.m:.4g}"
        )
        piece = "chunks" if each.scheme == "roast" else "tiles"
        tile = "" if each.tile is None else f", {piece} of {each.tile[0]} x {each.tile[1]}"
        signs = "signs" if each.sign else "no signs"
        lines.append(
            f"{'':<{len(name)}}  {each.scheme}{tile}, {signs}, seed {each.seed}, "
            f"standard deviation {each.pool_std:g}; fingerprint {each.fingerprint}"
        )
    entries = sum(k.size for k in kept)
    lines.append(f"passing through: {entries:,} entries of {len(kept)} leaves")
    before = entries + sum(each.n for each in layouts)
    after = entries + sum(each.m for each in layouts)
    lines.append(
        f"in all: {before:,} weights in {after:,} numbers, {before / after:.4g} times fewer"
    )
    return lines


def _bytes(layouts: Sequence[Layout], kept: Sequence[Kept], dtype: DTypeLike) -> list[str]:
    """Bytes of weights, gradients and Adam's two moments, all of the weights' dtype."""
    size = jnp.dtype(dtype).itemsize
    rest = sum(k.size * _itemsize(k.dtype) for k in kept)
    # What has no gradient has no moments.
    trained = sum(k.size * _itemsize(k.dtype) for k in kept if _is_trained(k.dtype))
    n, m = sum(each.n for each in layouts) * size, sum(each.m for each in layouts) * size
    lines = [f"{'bytes':<8}  {'weights':>10}  {'gradients':>10}  {'moments':>10}  {'in all':>10}"]
    for name, shared in (("before", n), ("after", m)):
        parts = [shared + rest, shared + trained, 2 * (shared + trained)]
        cells = "  ".join(f"{_readable(x):>10}" for x in [*parts, sum(parts)])
        lines.append(f"{name:<8}  {cells}")
    return lines


def _itemsize(dtype: str) -> int:
    # A random key has no size of its own; the common kind holds two words.
    return 8 if dtype.startswith("key<") else jnp.dtype(dtype).itemsize


def _is_trained(dtype: str) -> bool:
    return not dtype.startswith("key<") and jnp.issubdtype(jnp.dtype(dtype), jnp.inexact)


def _readable(count: float) -> str:
    if count < 1000:
        return f"{count} B"
    power = min(int(math.log10(count)) // 3, 5)
    return f"{count / 1000**power:.4g} {' kMGTP'[power]}B"
