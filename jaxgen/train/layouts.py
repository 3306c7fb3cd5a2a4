"""The layout of shared parameters beside a checkpoint: kept, compared, read back.

A pool says nothing about which weights it makes: under the layout of another seed it expands to
noise of the right shape. So the manifest carries the layout as JSON, with its fingerprint, and
``restore`` compares.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxgen.train.manifest import CheckpointMismatch, read_manifest

if TYPE_CHECKING:
    from jaxgen.share.layout import Layout

__all__ = ["as_tuple", "check", "entries", "read_layout", "read_layouts"]

_SHOWN = 12


def as_tuple(layout: Any) -> "tuple[Layout, ...]":
    """One layout, several or ``None``, as a tuple."""
    if layout is None:
        return ()
    return tuple(layout) if isinstance(layout, Sequence) else (layout,)


def entries(layouts: "Sequence[Layout]") -> list[dict[str, str]]:
    """What a manifest holds of layouts."""
    return [{"fingerprint": each.fingerprint, "json": each.to_json()} for each in layouts]


def check(body: Mapping[str, Any], layouts: "Sequence[Layout]", where: Path) -> None:
    """Compare a manifest's layouts with those that were asked for, none giving a warning.

    Raises:
      CheckpointMismatch: they differ; the message has both fingerprints and what differs.
    """
    saved = body.get("layout", [])
    there = ", ".join(entry["fingerprint"] for entry in saved)
    asked = ", ".join(each.fingerprint for each in layouts)
    if there == asked:
        return
    if not layouts:
        warnings.warn(
            f"{where} holds parameters shared by layout {there}, and no layout was asked for: give "
            "restore(layout=...) to have it compared, read_layout to have it",
            stacklevel=3,
        )
        return
    if not saved:
        raise CheckpointMismatch(
            f"{where} holds no layout, and layout {asked} was asked for: it was saved without "
            "layout=..., or its parameters are not shared"
        )
    lines = _differences(_read(saved), layouts)
    raise CheckpointMismatch(
        f"{where} holds parameters shared by layout {there}, and layout {asked} was asked for; "
        "plan as the run did, or use read_layout:\n" + "\n".join(lines)
    )


def read_layouts(
    directory: str | os.PathLike[str], like: Any = None, *, step: int | None = None
) -> "tuple[Layout, ...]":
    """The layouts that a checkpoint was saved with, outermost first; none if it shares nothing.

    Args:
      directory: the checkpoints' folder.
      like: the parameters, or their shapes, as the first layout was planned; without it ``expand``
        gives nested dicts by name, as Flax's parameters are.
      step: default: the newest finished one.

    Raises:
      CheckpointError: there is no such step, or its manifest cannot be used.
      ValueError: ``like`` has other leaves than the layout.
    """
    return _read(read_manifest(directory, step).get("layout", []), like)


def read_layout(
    directory: str | os.PathLike[str], like: Any = None, *, step: int | None = None
) -> "Layout":
    """The layout that a checkpoint was saved with; see ``read_layouts`` for several.

    Args:
      directory: the checkpoints' folder.
      like: as for ``read_layouts``.
      step: default: the newest finished one.

    Raises:
      CheckpointMismatch: it was saved with none, or with several.
      CheckpointError: there is no such step, or its manifest cannot be used.
      ValueError: ``like`` has other leaves than the layout.
    """
    layouts = read_layouts(directory, like, step=step)
    if len(layouts) != 1:
        raise CheckpointMismatch(f"{directory} holds {len(layouts)} layouts; expected one")
    return layouts[0]


def _read(saved: Sequence[Mapping[str, str]], like: Any = None) -> "tuple[Layout, ...]":
    from jaxgen.share.layout import Layout

    layouts: list[Layout] = []
    for entry in saved:
        layouts.append(Layout.from_json(entry["json"], like))
        # What passes through one layout, by name, is the tree of the next.
        like = {k.path: jax.ShapeDtypeStruct(k.shape, _dtype(k.dtype)) for k in layouts[-1].kept}
    return tuple(layouts)


def _dtype(name: str) -> Any:
    # A random key's dtype has no name that numpy knows; only the leaf's place counts here.
    return jnp.uint32 if name.startswith("key<") else jnp.dtype(name)


def _differences(saved: "Sequence[Layout]", asked: "Sequence[Layout]") -> list[str]:
    if len(saved) != len(asked):
        return [f"  pools: {len(saved)} there, {len(asked)} asked for"]
    lines = []
    for there, here in zip(saved, asked, strict=True):
        for name in ("scheme", "m", "tile", "pool_std", "sign", "seed"):
            a, b = getattr(there, name), getattr(here, name)
            if a != b:
                lines.append(f"  {name}: {a} there, {b} asked for")
        a, b = _leaves(there), _leaves(here)
        for path in [*a, *(p for p in b if p not in a)]:
            if a.get(path) != b.get(path):
                lines.append(
                    f"  {path}: {a.get(path, 'absent')} there, {b.get(path, 'absent')} asked for"
                )
        if not lines and there.order != here.order:
            lines.append("  the order of the leaves")
    return lines[:_SHOWN] + ([f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else [])


def _leaves(layout: "Layout") -> dict[str, str]:
    found = {s.path: f"shared, {s.shape}, scale {s.scale!r}" for s in layout.leaves}
    return found | {k.path: f"passes through, {k.dtype}{list(k.shape)}" for k in layout.kept}
