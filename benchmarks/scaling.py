"""What one chip holds and sends on 1 to 256 chips, from compiled programs; nothing of that runs.

The training step of a run (``jaxgen plan``) is compiled for slices of TPU v5e that are not there
(libtpu, the extra ``tpu-compile``), the quick mode for virtual CPU devices. The batch is the same
whatever the number of chips. Dense and in a pool of a tenth of the weights, the mesh ``data`` (the
state whole on every chip) and ``fsdp`` (split as well).

- ``peak``, ``state``: memory of one chip, by the compiler and by the shards of weights, optimiser
  and average; the peer is one chip. A ratio of the number of chips is all that there is to win.
- ``exchange``: bytes of collectives of one chip and step; the peer is the gradient, dense and in
  float32, which data parallelism must exchange once.

And what really runs, the same step at the same batch, reported for what it is: two virtual devices,
and two processes with one device each, against one device. All share the cores of one machine,
which one device uses already, so there is nothing to win, and the ratio says what splitting costs.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.measure import PAIRS, Missing, Result, summarise
from jaxgen.train.topology import environment, parse_topology

SHARES = {"dense": None, "share0.1": 0.1}
CHIPS = {1: "1x1", 4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"}
DIGITS = {"data": "digits", "batch_size": 1024}
MOONS = {"data": "moons", "width": 64, "blocks": 1, "batch_size": 256}
MIB, KIB = 2**20, 2**10
_STATE = ("weights", "optimiser", "average")


def run(*, quick: bool) -> Iterator[Result | Missing]:
    """Compiled memory and exchange by number of chips, and steps that run split on this machine."""
    yield from _plans("cpu", {1: "cpu:1", 8: "cpu:8"}, MOONS)
    if not quick:
        yield from _plans("v5e", {chips: f"v5e:{size}" for chips, size in CHIPS.items()}, DIGITS)
    for config in [MOONS] if quick else [MOONS, {"data": "digits", "batch_size": 128}]:
        yield _virtual(config)
    if not quick:
        yield _processes(MOONS)


# --- compiled -------------------------------------------------------------------------------------


def _plans(kind: str, slices: dict[int, str], config: dict) -> Iterator[Result | Missing]:
    largest = parse_topology(slices[max(slices)])
    try:
        more = environment(largest)
    except ModuleNotFoundError:
        yield Missing("scaling", f"{kind}_all", "libtpu (the extra tpu-compile)")
        return
    cases = [
        {"share": share, "mesh": mesh, "chips": chips, "topology": topology}
        for share in SHARES
        for chips, topology in slices.items()
        for mesh in (("data",) if chips == 1 else ("data", "fsdp"))
    ]
    if kind == "cpu":
        # Compiled in a hurry: neither the state nor the exchange knows the difference.
        more["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
    plans = _worker("plans", {"config": config, "cases": cases}, more)
    keys = [(case["share"], case["mesh"], case["chips"]) for case in cases]
    yield from _compared(kind, dict(zip(keys, plans, strict=True)))


def _compared(kind: str, found: dict[tuple[str, str, int], dict]) -> Iterator[Result]:
    """Each plan, by share, mesh and chips, against one chip and against the dense gradient."""
    gradient = _weights(found["dense", "data", 1])
    for (share, mesh, chips), plan in found.items():
        if chips == 1:
            continue
        one, case = found[share, "data", 1], f"{kind}_{mesh}_{share}_{chips}"
        note = f"compiled in {plan['compile_seconds']:.0f} s"
        yield _result(f"peak_{case}", _peak(plan), _peak(one), "one chip", "MiB", MIB, note)
        yield _result(f"state_{case}", _state(plan), _state(one), "one chip", "MiB", MIB)
        wire = sum(each["wire_bytes"] for each in plan["collectives"])
        kinds = ", ".join(f"{each['count']} {each['kind']}" for each in plan["collectives"])
        yield _result(
            f"exchange_{case}",
            sum(each["bytes"] for each in plan["collectives"]),
            gradient,
            "the dense gradient once",
            "KiB",
            KIB,
            f"{kinds}; {wire / KIB:.4g} KiB on the wire",
        )


def _peak(plan: dict) -> int:
    return plan["memory"]["peak"]


def _weights(plan: dict) -> int:
    return plan["memory"]["parts"]["weights"]


def _state(plan: dict) -> int:
    return sum(plan["memory"]["parts"][name] for name in _STATE)


def _result(
    case: str, ours: float, peer: float, peer_name: str, unit: str, scale: int, note: str = ""
) -> Result:
    return Result(
        bench="scaling",
        case=case,
        ours=ours / scale,
        peer=peer / scale,
        peer_name=peer_name,
        unit=unit,
        ratio=peer / ours,
        device="compiled for it, not run",
        note=note,
    )


# --- run ------------------------------------------------------------------------------------------


def _virtual(config: dict) -> Result:
    """A step on two virtual devices against one, in alternation in one process."""
    two, one = _worker("virtual", {"config": config}, environment(parse_topology("cpu:2")))
    return _summary("2_virtual_devices", config, two, one)


def _processes(config: dict) -> Result:
    """A step of two processes against one process, in alternation."""
    two, one = [], []
    for _ in range(3):
        # A free port; the chance that another takes it before the coordinator does is small.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        more = environment(parse_topology("cpu:1"))
        request = {"config": config, "coordinator": address}
        both = [_start("process", {**request, "process": i}, more) for i in (0, 1)]
        first, _ = map(_answer, both)
        two += first
        one += _worker("process", {**request, "coordinator": None, "process": 0}, more)
    return _summary("2_processes", config, two, one)


def _summary(case: str, config: dict, two: list[float], one: list[float]) -> Result:
    import numpy as np

    return summarise(
        "scaling",
        f"step_{config['data']}_{case}",
        np.array(two),
        np.array(one),
        peer_name="one device",
        note=f"one machine of {os.cpu_count()} cores; one device uses them all already",
    )


# --- in processes of their own, started with their devices ----------------------------------------


def _start(name: str, request: dict, more: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.scaling", name, json.dumps(request)],
        env=os.environ | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _answer(worker: subprocess.Popen) -> Any:
    out, errors = worker.communicate()
    if worker.returncode:
        raise RuntimeError(errors[-2000:])
    return json.loads(out.splitlines()[-1])


def _worker(name: str, request: dict, more: dict[str, str]) -> Any:
    return _answer(_start(name, request, more))


def _experiment(config: dict, share: float | None = None) -> Any:
    from jaxgen.train import data as datasets
    from jaxgen.train.recipes.config import ScoreConfig, from_mapping, resolve
    from jaxgen.train.recipes.score import build

    asked = from_mapping({**config, "share": share}, ScoreConfig())
    data = datasets.load(asked.data)
    return build(resolve(asked, data.event), data)


def plans(request: dict) -> list[dict]:
    """A plan of each case, as plain values."""
    from jaxgen.train.mesh import make_mesh
    from jaxgen.train.recipes.plan import plan_experiment
    from jaxgen.train.topology import topology_devices

    experiments = {name: _experiment(request["config"], share) for name, share in SHARES.items()}
    found = []
    for case in request["cases"]:
        topology = parse_topology(case["topology"])
        devices = topology_devices(topology)
        mesh = make_mesh(f"{case['mesh']}={case['chips']}", devices)
        plan = plan_experiment(experiments[case["share"]], mesh, chip=topology.chip)
        print(f"{case}: {plan.compile_seconds:.0f} s", file=sys.stderr, flush=True)
        found.append(plan.to_dict())
    return found


def _stepper(experiment: Any, mesh: Any, process: int = 0, processes: int = 1) -> Any:
    """A function that takes one step and waits for it; the state is kept."""
    import jax

    from jaxgen.train import data as datasets
    from jaxgen.train.mesh import place, shard_batch

    config = experiment.config
    read = datasets.batches(
        experiment.train, config.batch_size, seed=0, process=process, processes=processes
    )
    step, batch = experiment.make_step(), shard_batch(next(read(0)), mesh)
    kept = [place(experiment.state(), mesh)]

    def take() -> Any:
        kept[0], metrics = step(kept[0], batch)
        return jax.block_until_ready(metrics.loss)

    return take


def _timed(take: Any) -> float:
    import time

    start = time.perf_counter()
    take()
    return 1e3 * (time.perf_counter() - start)


def virtual(request: dict) -> tuple[list[float], list[float]]:
    """Milliseconds of a step on two devices and on one, in turns."""
    import jax

    from jaxgen.train.mesh import make_mesh

    experiment = _experiment(request["config"])
    takes = [_stepper(experiment, make_mesh(f"data={n}", jax.devices()[:n])) for n in (2, 1)]
    for take in takes:
        _timed(take), _timed(take)
    pairs = [[_timed(take) for take in takes] for _ in range(PAIRS)]
    return [two for two, _ in pairs], [one for _, one in pairs]


def process(request: dict) -> list[float]:
    """Milliseconds of a step of this process, which may be one of two."""
    import jax

    from jaxgen.train import distributed
    from jaxgen.train.mesh import make_mesh

    if request["coordinator"]:
        distributed.initialize(request["coordinator"], 2, request["process"])
    count = jax.process_count()
    take = _stepper(_experiment(request["config"]), make_mesh("data=-1"), request["process"], count)
    for _ in range(2):
        _timed(take)
    times = [_timed(take) for _ in range(PAIRS)]
    distributed.part()
    return times


def main(words: Sequence[str]) -> None:
    """Answer one request on the last line of standard output."""
    work = {"plans": plans, "virtual": virtual, "process": process}[words[0]]
    print(json.dumps(work(json.loads(words[1]))))


if __name__ == "__main__":
    main(sys.argv[1:])
