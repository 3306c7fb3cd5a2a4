"""What the TPU kernels of ``hashed_matmul`` cost in memory, read from programs compiled for a v5e.

No TPU is needed and none runs: libtpu compiles for a named topology in a process of its own, and
the figures are facts of the compiled program. x is (4096, 4096), the virtual weight (4096, 16384),
float32. The peer is the dense layer, compiled likewise.

- ``peak``: arguments, outputs and temporaries of the forward product, and of both gradients; a copy
  of the pool that XLA prefetches onto the chip counts too, which is what the gradients have above
  their arguments and outputs.
- ``read``: bytes of weights that the forward product reads from main memory, counted from its grid,
  at a batch of 256 rows, where the dense layer reads its weight once.

Where libtpu is absent, or the topology cannot be made, the cases are reported as missing.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata

import numpy as np

from benchmarks.measure import Missing, Result, summarise
from jaxgen.train.topology import environment, parse_topology

TOPOLOGY = "v5e:2x2"
ROWS, K, N, BATCH = 4096, 4096, 16384, 256
COMPRESSIONS = (4, 16, 64, 256)
MIB = 2**20


def run(*, quick: bool) -> Iterator[Result | Missing]:
    """Peak memory and weight traffic per compression; ``ratio`` is dense over ours."""
    if importlib.util.find_spec("libtpu") is None:
        yield Missing("hash_matmul_tpu", "all", "libtpu (the extra tpu-compile)")
        return
    compressions = [16] if quick else list(COMPRESSIONS)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.hash_matmul_tpu", *map(str, compressions)],
        env=os.environ | environment(parse_topology(TOPOLOGY)),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield Missing("hash_matmul_tpu", "all", f"a libtpu that compiles ({last[:200]})")
        return
    report = json.loads(done.stdout.splitlines()[-1])
    for compression in compressions:
        ours = report[str(compression)]
        for name in ("forward", "gradients"):
            yield _result(
                report,
                f"peak_{name}_{compression}x",
                ours[name]["peak"],
                report["dense"][name]["peak"],
                f"temporary {ours[name]['temp']} B, arguments and outputs "
                f"{ours[name]['ends'] / MIB:.1f} MiB; dense temporary "
                f"{report['dense'][name]['temp']} B",
            )
        for variant, read in ours["read"].items():
            note = "the pool once" if variant == "resident" else "tile by tile"
            yield _result(
                report, f"read_{variant}_{compression}x", read, report["dense"]["read"], note
            )


def _result(report: dict, case: str, ours: float, peer: float, note: str) -> Result:
    result = summarise(
        "hash_matmul_tpu",
        case,
        np.array([ours / MIB]),
        np.array([peer / MIB]),
        peer_name="the dense layer",
        unit="MiB",
        note=note,
    )
    versions = result.versions | {"libtpu": metadata.version("libtpu")}
    where = f"compiled for {report['device']}, run on none"
    return dataclasses.replace(result, device=where, versions=versions)


def _compile_all(compressions: list[int]) -> dict:
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from jaxgen import share
    from jaxgen.share.kernels import mosaic_tpu

    device = topologies.get_topology_desc(TOPOLOGY, "tpu").devices[0]
    where = jax.sharding.SingleDeviceSharding(device)

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    def memory_of(function, *operands):
        jitted = jax.jit(function, in_shardings=where, out_shardings=where)
        memory = jitted.lower(*operands).compile().memory_analysis()
        return {
            "temp": memory.temp_size_in_bytes,
            "peak": memory.peak_memory_in_bytes,
            "ends": memory.argument_size_in_bytes + memory.output_size_in_bytes,
        }

    x, dy, w = shape(ROWS, K), shape(ROWS, N), shape(K, N)
    report: dict = {
        "device": device.device_kind,
        "dense": {
            "forward": memory_of(jnp.matmul, x, w),
            "gradients": memory_of(lambda x, dy, w: (dy @ w.T, x.T @ dy), x, dy, w),
            "read": 4 * K * N,
        },
    }
    for compression in compressions:
        layout = share.plan({"w": w}, 1 / compression, tile=(256, 256))
        spec = share.leaf(layout, "w")

        def gradients(x, dy, pool, spec=spec):
            dx = mosaic_tpu.grad_x(dy, pool, spec)
            return dx, mosaic_tpu.grad_pool(x, dy, spec)

        report[str(compression)] = {
            "forward": memory_of(
                lambda x, pool, spec=spec: mosaic_tpu.forward(x, pool, spec), x, shape(spec.m)
            ),
            "gradients": memory_of(gradients, x, dy, shape(spec.m)),
            "read": {
                name: mosaic_tpu.weight_bytes(BATCH, jnp.float32, spec, resident=resident)
                for name, resident in (("streamed", False), ("resident", True))
            },
        }
    return report


if __name__ == "__main__":
    print(json.dumps(_compile_all([int(c) for c in sys.argv[1:]])))
