"""Data parallelism: a mesh with one axis, a replicated state, a batch split along axis 0.

The training step knows nothing of it: ``jit`` reads the shardings of its arguments and XLA adds
the all-reduce of the gradients. Axis types are Auto, so that a loss written for one device runs
unchanged.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

__all__ = ["batch_sharding", "data_mesh", "replicate", "replicated", "shard_batch"]

AXIS = "data"


def data_mesh(devices: Sequence[jax.Device] | None = None, *, batch: int | None = None) -> Mesh:
    """A mesh over ``devices`` with the single axis ``"data"``, of type Auto.

    Args:
      devices: default: every device present.
      batch: global batch size. Then only as many devices are used as divide it: the largest
        divisor of ``batch`` that is no more than the number of devices.

    Raises:
      ValueError: no devices, or ``batch`` below one.
    """
    devices = list(jax.devices() if devices is None else devices)
    if not devices:
        raise ValueError("devices is empty; expected at least one")
    if batch is not None:
        if batch < 1:
            raise ValueError(f"batch is {batch}; expected at least 1")
        count = max(d for d in range(1, len(devices) + 1) if batch % d == 0)
        devices = devices[:count]
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of the state: whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: axis 0 split over the mesh's first axis."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Put every leaf of ``tree`` whole on every device of ``mesh``."""
    return jax.device_put(tree, replicated(mesh))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Split every leaf of ``batch`` along axis 0 over the devices of ``mesh``.

    With several processes each passes its own part of the global batch.

    Raises:
      ValueError: a leaf's axis 0 is not divisible by the number of devices.
    """
    sharding = batch_sharding(mesh)
    shards = len(mesh.local_devices)
    for leaf in jax.tree.leaves(batch):
        shape = np.shape(leaf)
        if not shape or shape[0] % shards:
            raise ValueError(
                f"batch has a leaf of shape {shape}, whose axis 0 does not divide over {shards} "
                "devices; choose another batch size, or fewer devices by data_mesh(batch=...)"
            )
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch
    )
