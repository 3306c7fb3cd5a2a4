"""Where a training state and its batch lie: meshes in words, and rules that a user can read.

The training step knows nothing of it: ``jit`` reads the shardings of its arguments and XLA adds
the collectives. A batch is split along axis 0 over the axes ``"data"`` and ``"fsdp"`` of the mesh.
The state is whole along ``"data"``; along ``"fsdp"`` parameters, their average, the optimiser's
moments and the pools of shared parameters are split too, so that no device holds them all (the
third stage of ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054; FSDP, Zhao et al. 2023,
arXiv:2304.11277).

A rule is text, ``PATTERN=PLACEMENT``. The pattern is a regular expression that is searched for in
a leaf's path, such as ``params/params/Dense_0/kernel`` or ``opt_state/0/mu/pool``; the first rule
that is found there decides, and a leaf that none speaks of is whole everywhere. Placements:

* ``replicate``: whole on every device,
* ``-,fsdp``: array axis by array axis, the mesh axes it is split over; ``-`` for none, ``a+b`` for
  two, axes left out at the end are not split,
* ``largest:fsdp``: the longest array axis that the mesh axis divides is split; a leaf that has
  none, or fewer than 1024 elements, is whole.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

__all__ = [
    "RULES",
    "Rule",
    "Rules",
    "batch_axes",
    "batch_sharding",
    "data_mesh",
    "gather",
    "make_mesh",
    "parse_rules",
    "place",
    "replicate",
    "replicated",
    "shard_batch",
    "state_shardings",
]

AXIS = "data"
_BATCH_AXES = (AXIS, "fsdp")
_SMALL = 1024
_NAME = r"[A-Za-z_]\w*"


def make_mesh(
    description: str,
    devices: Sequence[jax.Device] | None = None,
    *,
    axis_types: str = "auto",
) -> Mesh:
    """A mesh from words: ``"data=8"``, ``"data=4,fsdp=2"``, ``"fsdp=-1"``.

    Args:
      description: ``name=size`` of each axis, outermost first. One size may be -1: all that the
        others leave. ``"data"`` and ``"fsdp"`` split the batch; other names are the user's own.
      devices: default: every device present, of all processes.
      axis_types: ``"auto"`` (a loss written for one device runs unchanged) or ``"explicit"``.

    Raises:
      ValueError: what cannot be read, an axis named twice, a size of zero, two sizes of -1, or
        sizes that do not multiply to the number of devices.

    >>> dict(make_mesh("data=-1", jax.devices()[:1]).shape)
    {'data': 1}
    """
    if axis_types not in ("auto", "explicit"):
        raise ValueError(f"axis_types is {axis_types!r}; expected 'auto' or 'explicit'")
    devices = _some(devices)
    sizes: dict[str, int] = {}
    for part in description.split(","):
        found = re.fullmatch(rf"({_NAME})=(-1|\d+)", part.strip())
        if found is None:
            raise ValueError(
                f"mesh {description!r} has the part {part!r}; expected name=size, such as "
                "'data=8', 'data=4,fsdp=2' or 'fsdp=-1'"
            )
        name, size = found[1], int(found[2])
        if name in sizes:
            raise ValueError(f"mesh {description!r} names axis {name!r} twice")
        if size == 0:
            raise ValueError(f"mesh {description!r} gives axis {name!r} no device; expected 1 up")
        sizes[name] = size
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise ValueError(
            f"mesh {description!r} leaves the sizes of {' and '.join(rest)} open; expected one -1"
        )
    known = math.prod(size for size in sizes.values() if size != -1)
    if rest and len(devices) % known == 0:
        sizes[rest[0]] = len(devices) // known
        known = len(devices)
    if known != len(devices):
        raise ValueError(
            f"mesh {description!r} multiplies to {known}, and there are {len(devices)} devices; "
            f"expected sizes that {'divide' if rest else 'multiply to'} {len(devices)}"
            f"{'' if rest else ' (one of them may be -1: what the others leave)'}"
        )
    kind = AxisType.Auto if axis_types == "auto" else AxisType.Explicit
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes), devices=devices
    )


def data_mesh(devices: Sequence[jax.Device] | None = None, *, batch: int | None = None) -> Mesh:
    """A mesh over ``devices`` with the single axis ``"data"``, of type Auto.

    Args:
      devices: default: every device present.
      batch: global batch size. Then only as many devices are used as divide it: the largest
        divisor of ``batch`` that is no more than the number of devices.

    Raises:
      ValueError: no devices, or ``batch`` below one.
    """
    devices = _some(devices)
    if batch is not None:
        if batch < 1:
            raise ValueError(f"batch is {batch}; expected at least 1")
        count = max(d for d in range(1, len(devices) + 1) if batch % d == 0)
        devices = devices[:count]
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def _some(devices: Sequence[jax.Device] | None) -> list[jax.Device]:
    devices = list(jax.devices() if devices is None else devices)
    if not devices:
        raise ValueError("devices is empty; expected at least one")
    return devices


# --- rules ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rule:
    """One rule, read from text (module docstring).

    Attributes:
      pattern: regular expression, searched for in a leaf's path.
      axes: the mesh axes that each array axis is split over; for ``largest`` one entry.
      largest: split the longest array axis that divides, instead of the axes in order.
      is_default: it may name an axis that the mesh lacks, or match no leaf.
    """

    pattern: str
    axes: tuple[tuple[str, ...], ...]
    largest: bool = False
    is_default: bool = False

    def __str__(self) -> str:
        words = ",".join("+".join(names) or "-" for names in self.axes) or "replicate"
        return f"{self.pattern}={'largest:' * self.largest}{words}"


@dataclasses.dataclass(frozen=True)
class Rules:
    """Rules in order; the first that speaks of a leaf decides. ``str`` gives them back as text."""

    rules: tuple[Rule, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.rules))


RULES = Rules((Rule(".", (("fsdp",),), largest=True, is_default=True),))
"""The default: everything with 1024 elements or more split along ``"fsdp"``, if the mesh has it."""


def parse_rules(words: Sequence[str]) -> Rules:
    """Rules from text such as ``["kernel=-,fsdp", "pool=replicate"]``, the default ones after them.

    Raises:
      ValueError: a rule that cannot be read; it is named, with what was expected.

    >>> print(parse_rules(["pool=replicate", "kernel=-,fsdp"]))
    pool=replicate
    kernel=-,fsdp
    .=largest:fsdp
    """
    if isinstance(words, str):
        words = [words]
    return Rules((*map(_parse_rule, words), *RULES.rules))


def _parse_rule(word: str) -> Rule:
    pattern, equals, placement = word.rpartition("=")
    pattern, placement = pattern.strip(), placement.strip()
    if not equals or not pattern or not placement:
        raise ValueError(
            f"rule {word!r} is not PATTERN=PLACEMENT; expected such as 'kernel=-,fsdp', "
            "'pool=replicate' or 'embedding=largest:fsdp'"
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"rule {word!r} has no regular expression before '=': {error}") from None
    if placement == "replicate":
        return Rule(pattern, ())
    largest = placement.startswith("largest:")
    parts = placement.removeprefix("largest:").split(",")
    names = [part.strip() for part in parts]
    axes = tuple(() if name == "-" else tuple(name.split("+")) for name in names)
    flat = [name for names in axes for name in names]
    if not all(re.fullmatch(_NAME, name) for name in flat) or (
        largest and not len(axes) == len(flat) == 1
    ):
        raise ValueError(
            f"rule {word!r} names no mesh axis in {placement!r}; expected 'replicate', "
            "'largest:AXIS', or a mesh axis (or '-', or 'a+b') for each array axis: '-,fsdp'"
        )
    if len(set(flat)) != len(flat):
        raise ValueError(f"rule {word!r} splits over one mesh axis twice")
    return Rule(pattern, axes, largest)


def state_shardings(tree: Any, mesh: Mesh, rules: Rules | Sequence[str] = RULES) -> Any:
    """The sharding of every leaf, by the rules.

    Args:
      tree: a ``TrainState`` or another pytree, of arrays or of ``ShapeDtypeStruct``s.
      mesh: from ``make_mesh``.
      rules: from ``parse_rules``, or the text of rules.

    Returns:
      The tree with a ``NamedSharding`` in place of each leaf.

    Raises:
      ValueError: a rule names an axis that the mesh lacks, matches no leaf, has more axes than a
        leaf it decides on, or splits an axis that the mesh's does not divide.
    """
    rules = rules if isinstance(rules, Rules) else parse_rules(rules)
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    named = [(jax.tree_util.keystr(p, simple=True, separator="/"), leaf) for p, leaf in leaves]
    for rule in rules.rules:
        if not rule.is_default:
            _check_rule(rule, mesh, [path for path, _ in named])
    shardings = [
        NamedSharding(mesh, _spec(path, tuple(np.shape(leaf)), mesh, rules)) for path, leaf in named
    ]
    return jax.tree.unflatten(structure, shardings)


def _check_rule(rule: Rule, mesh: Mesh, paths: list[str]) -> None:
    for name in (name for names in rule.axes for name in names):
        if name not in mesh.shape:
            raise ValueError(
                f"rule {str(rule)!r} names the axis {name!r}; the mesh has "
                f"{', '.join(map(repr, mesh.axis_names))}"
            )
    if not any(re.search(rule.pattern, path) for path in paths):
        shown = ", ".join(paths[:8]) + (", ..." if len(paths) > 8 else "")
        raise ValueError(f"rule {str(rule)!r} matches none of the {len(paths)} leaves: {shown}")


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> PartitionSpec:
    rule = next((rule for rule in rules.rules if re.search(rule.pattern, path)), None)
    if rule is None or not rule.axes:
        return PartitionSpec()
    if rule.largest:
        ((name,),) = rule.axes
        size = mesh.shape.get(name, 1)
        fits = [axis for axis, length in enumerate(shape) if length and length % size == 0]
        if size == 1 or not fits or math.prod(shape) < _SMALL:
            return PartitionSpec()
        longest = max(fits, key=lambda axis: shape[axis])
        return PartitionSpec(*(name if axis == longest else None for axis in range(longest + 1)))
    if len(rule.axes) > len(shape):
        raise ValueError(
            f"rule {str(rule)!r} speaks of {len(rule.axes)} axes, and {path} has shape {shape}; "
            "narrow the pattern (^params/...), or use largest:AXIS"
        )
    for axis, names in enumerate(rule.axes):
        parts = math.prod(mesh.shape[name] for name in names)
        if shape[axis] % parts:
            raise ValueError(
                f"rule {str(rule)!r} splits axis {axis} of {path}, shape {shape}, into {parts} "
                "parts, which do not divide it; use another axis, or largest:AXIS"
            )
    return PartitionSpec(*(_entry(names) for names in rule.axes))


def _entry(names: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return names if len(names) > 1 else names[0] if names else None


# --- putting things there -------------------------------------------------------------------------


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes of ``mesh`` that split the batch: those named ``"data"`` and ``"fsdp"``."""
    return tuple(name for name in mesh.axis_names if name in _BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: axis 0 split over the mesh's axes ``"data"`` and ``"fsdp"``.

    On a mesh with neither the batch is whole on every device.
    """
    axes = batch_axes(mesh)
    return NamedSharding(mesh, PartitionSpec(_entry(axes)) if axes else PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Put every leaf of ``tree`` whole on every device of ``mesh``."""
    return place(tree, mesh, Rules(()))


def place(tree: Any, mesh: Mesh, rules: Rules | Sequence[str] = RULES) -> Any:
    """Put every leaf where the rules say (``state_shardings``).

    With several processes each passes the same values, and gets an array over all of them; leaves
    that lie on all processes already are moved. What lies where it should is not copied, so that a
    step which is given the result deletes ``tree`` too.

    Args:
      tree: pytree of arrays.
      mesh: from ``make_mesh``.
      rules: from ``parse_rules``, or the text of rules.

    Raises:
      ValueError: as ``state_shardings``.
    """
    shardings = state_shardings(tree, mesh, rules)
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    return jax.tree.map(_place_global, tree, shardings)


def _place_global(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array):
        if not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            # The words of a key are an axis more, which is never split.
            words = _place_global(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def gather(tree: Any) -> Any:
    """A copy of every leaf, whole, on this process' first device; no step deletes it.

    With several processes every one of them must call it, with the same tree.
    """
    leaves, structure = jax.tree.flatten(tree)
    spread = [
        i
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    ]
    if spread:
        mesh = leaves[spread[0]].sharding.mesh
        for i, leaf in zip(spread, _whole([leaves[i] for i in spread], mesh), strict=True):
            leaves[i] = leaf
    # What lies whole on every device would come back as the part that is here, not as a copy.
    here = SingleDeviceSharding(jax.local_devices()[0])
    copies = [jnp.array(jax.device_put(leaf, here), copy=True) for leaf in leaves]
    return jax.tree.unflatten(structure, copies)


def _whole(leaves: list[jax.Array], mesh: Mesh) -> list[jax.Array]:
    """The whole of arrays that lie on several processes, on a device of this one."""

    def words(leaf: jax.Array) -> jax.Array:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    everywhere = jax.jit(functools.partial(jax.tree.map, words), out_shardings=replicated(mesh))
    return [
        jax.random.wrap_key_data(here.addressable_data(0), impl=jax.random.key_impl(leaf))
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else here.addressable_data(0)
        for leaf, here in zip(leaves, everywhere(leaves), strict=True)
    ]


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Split every leaf of ``batch`` along axis 0 over the devices of ``mesh``.

    With several processes each passes its own part of the global batch.

    Raises:
      ValueError: a leaf is empty, or its axis 0 is not divisible by the number of devices that
        the batch is split over.
    """
    sharding = batch_sharding(mesh)
    shards = _local_shards(mesh)
    for leaf in jax.tree.leaves(batch):
        shape = np.shape(leaf)
        if not shape or shape[0] == 0 or shape[0] % shards:
            raise ValueError(
                f"batch has a leaf of shape {shape}, whose axis 0 does not divide over {shards} "
                f"devices; expected a multiple of {shards}: choose another batch size, or fewer "
                "devices by data_mesh(batch=...) or make_mesh(..., jax.devices()[:count])"
            )
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch
    )


@functools.lru_cache
def _local_shards(mesh: Mesh) -> int:
    """How many different parts of a batch this process' devices hold."""
    shards = math.prod(mesh.shape[name] for name in batch_axes(mesh))
    parts = batch_sharding(mesh).addressable_devices_indices_map((shards,)).values()
    return len({str(part) for part in parts})
