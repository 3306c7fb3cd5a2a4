"""Devices that are not there: TPU slices to compile for, and virtual CPU devices.

``jax.experimental.topologies`` asks the TPU's compiler (the ``libtpu`` wheel, the extra
``tpu-compile``) for the devices of a named slice; programs can be compiled for them, never run. The
compiler reads its environment when it is loaded, and virtual CPU devices are counted when jax
starts, so that both belong into a process of their own, started with ``environment``.

Figures of the chips are the published ones, from the pages of Google Cloud's TPU documentation
("TPU v5e", "TPU v5p", "TPU v6e", "TPU v4"), November 2026; v4's links from Jouppi et al. 2023,
"TPU v4" (arXiv:2304.01433), table 4. All are of one chip, which is one jax device: a v4 or v5p
chip has two cores that jax shows as one (megacore).
"""

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any

__all__ = ["CHIPS", "Chip", "Topology", "environment", "parse_topology", "topology_devices"]

_GIB = 2**30
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_MOST_CPUS = 1024


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip.

    Attributes:
      name: as in a topology's name.
      flops: peak of bfloat16 matrix products, per second. XLA computes float32 products at this
        rate too, in one bfloat16 pass, unless a higher ``jax_default_matmul_precision`` is asked
        for (``"highest"`` takes six passes).
      hbm: main memory, bytes.
      hbm_bandwidth: of main memory, bytes per second.
      ici_bandwidth: of all links to other chips together, one way, bytes per second (half of what
        is published as bidirectional).
      sizes: slices that are on offer, chips along each side.
    """

    name: str
    flops: float
    hbm: int
    hbm_bandwidth: float
    ici_bandwidth: float
    sizes: tuple[str, ...]


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * _GIB, 1200e9, 300e9, _CUBES),
        Chip("v5e", 197e12, 16 * _GIB, 819e9, 200e9, _FLAT),
        Chip("v5p", 459e12, 95 * _GIB, 2765e9, 600e9, _CUBES),
        Chip("v6e", 918e12, 32 * _GIB, 1638e9, 400e9, _FLAT),
    )
}
"""Chips by name."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of devices of one kind; made by ``parse_topology``.

    Attributes:
      name: ``"v5e:4x4"``, ``"cpu:8"``.
      shape: chips along each side.
      chip: its figures; ``None`` for CPUs, which have none that a plan could go by.
    """

    name: str
    shape: tuple[int, ...]
    chip: Chip | None

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(self.shape)


def parse_topology(name: str) -> Topology:
    """Read ``"v5e:4x4"`` or ``"cpu:8"``.

    Raises:
      ValueError: no such topology; the message lists those that there are.

    >>> parse_topology("v5e:4x4").size
    16
    """
    kind, _, size = name.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", size) and int(size) <= _MOST_CPUS:
        return Topology(name, (int(size),), None)
    chip = CHIPS.get(kind)
    if chip is None or size not in chip.sizes:
        known = "; ".join(f"{each.name}:{' '.join(each.sizes)}" for each in CHIPS.values())
        raise ValueError(
            f"topology is {name!r}; expected a kind and a size, such as v5e:4x4, of {known}; or "
            f"cpu:1 to cpu:{_MOST_CPUS}"
        )
    return Topology(name, tuple(map(int, size.split("x"))), chip)


def environment(topology: Topology) -> dict[str, str]:
    """Variables that a process must be started with before it asks for ``topology_devices``.

    Raises:
      ModuleNotFoundError: the TPU's compiler is not installed; the message says what to do.
    """
    if topology.chip is None:
        flag = f"--xla_force_host_platform_device_count={topology.size}"
        # Flags that come later win.
        flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
        return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            f"topology {topology.name} needs the TPU's compiler, which runs on any machine: "
            'pip install "jaxgen[tpu-compile]"'
        )
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }


def topology_devices(
    topology: Topology, *, wait: float = 900.0, say: Callable[[str], None] = lambda line: None
) -> list[Any]:
    """The devices to compile for, in jax's order.

    Args:
      topology: which.
      wait: the TPU's compiler serves one process of a machine at a time; how long to wait for
        another one, in seconds.
      say: told once if there is one to wait for.

    Raises:
      ValueError: this process was not started with ``environment(topology)``, and lacks them.
      TimeoutError: another process kept the compiler.
    """
    import jax

    if topology.chip is None:
        found = [device for device in jax.devices() if device.platform == "cpu"]
        if len(found) < topology.size:
            raise ValueError(
                f"topology is {topology.name}, and this process has {len(found)} CPU devices; "
                f"start it with XLA_FLAGS=--xla_force_host_platform_device_count={topology.size}"
            )
        return found[: topology.size]
    from jax.experimental import topologies

    # Hosts hold 2 x 2 chips, unless the slice is smaller.
    bounds = (*(min(2, side) for side in topology.shape[:2]), 1)
    more = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
    until, told = time.monotonic() + wait, False
    while True:
        try:
            description = topologies.get_topology_desc(
                topology.name, "tpu", chips_per_host_bounds=bounds, **more
            )
            return list(description.devices)
        except jax.errors.JaxRuntimeError as error:
            if "lockfile" not in str(error):
                raise
        if time.monotonic() > until:
            raise TimeoutError(
                f"another process has kept the TPU's compiler for {wait:g} s; try again when it is "
                "done"
            )
        if not told:
            say("waiting for another process that uses the TPU's compiler")
            told = True
        time.sleep(1.0)
