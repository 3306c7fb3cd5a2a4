"""Where the time and the memory of a training step go: timings, the compiler's figures, a trace.

The step is the run's own, compiled once ahead of time, on the run's own batches through the loop's
feed. It is run twice: as in training, for the figures, and under ``jax.profiler``, which slows it,
for what the operations take. Nothing is read from a run's checkpoints and nothing written to them.
"""

import dataclasses
import json
import re
import time
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgen.train import data as datasets
from jaxgen.train import mesh as meshes
from jaxgen.train.feed import Feed
from jaxgen.train.hlo import read_hlo
from jaxgen.train.loop import _steps_ahead
from jaxgen.train.manifest import replace_text
from jaxgen.train.recipes.pictures import draw_operations
from jaxgen.train.recipes.run import default_mesh
from jaxgen.train.recipes.score import Experiment

__all__ = ["Operation", "Span", "busy_seconds", "operations", "profile_run", "read_spans"]

Say = Callable[[str], None]

_WARM_UP = 3
_SHOWN = 20
# Parts of an operation's source that say how it came about, not what it is.
_FRAMES = {"shard_map", "while", "body", "closed_call", "checkpoint", "rematted_computation"}


class Span(NamedTuple):
    """One run of one operation, as a trace has it.

    Attributes:
      device: which device.
      line: the thread or stream; spans of one line lie within one another or apart.
      name: of the operation in the compiled program.
      start: nanoseconds from the trace's start.
      end: likewise.
    """

    device: str
    line: str
    name: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of the compiled step.

    Attributes:
      name: in the compiled program.
      source: the layer and primitive that it came from, where XLA kept it.
      calls: in the whole trace.
      seconds: in itself, without the operations it contains, over all devices and threads.
      share: of the sum over all operations.
    """

    name: str
    source: str
    calls: int
    seconds: float
    share: float


def profile_run(
    experiment: Experiment,
    out: Path,
    *,
    steps: int = 20,
    mesh: Mesh | None = None,
    rules: meshes.Rules | Sequence[str] = meshes.RULES,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Compile a run's training step, run it, and write ``summary.json``, a trace and a picture.

    Args:
      experiment: what would be trained; it starts from its seed.
      out: the folder to write to. Open it in XProf, or its ``trace.json.gz`` in Perfetto.
      steps: steps to time, and again to trace, after a few of warm-up.
      mesh: default: as in training, every device that divides the batch.
      rules: where the parts of the state lie on it.
      say: called with lines of progress.

    Returns:
      What ``summary.json`` holds: seconds, milliseconds and bytes are of one process, and the
      compiler's FLOPs and bytes of one device.

    Raises:
      OSError: the folder cannot be written.
      ValueError: the batch does not divide over the mesh.
    """
    config = experiment.config
    out.mkdir(parents=True, exist_ok=True)
    mesh = default_mesh(config.batch_size, config.accumulate) if mesh is None else mesh
    seconds: dict[str, float] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = jax.block_until_ready(run())
        seconds[name] = time.perf_counter() - start
        return result

    def put(batch: Any) -> Any:
        return jax.device_put(batch) if mesh is None else meshes.shard_batch(batch, mesh)

    def start() -> Any:
        state = experiment.state()
        return state if mesh is None else meshes.place(state, mesh, rules)

    say("compiling")
    state = timed("state", start)
    step: Any = experiment.make_step()
    reader = datasets.batches(experiment.train, config.batch_size, seed=config.seed)
    source = timed("reader", lambda: reader(0))
    with Feed(source, put, owns_source=True) as feed:
        batch = timed("first_batch", lambda: next(feed))
        lowered = timed("trace", lambda: step.lower(state, batch))
        compiled = timed("compile", lowered.compile)
        state, metrics = timed("first_run", lambda: compiled(state, batch))
        seconds["to_first_step"] = sum(seconds.values())
        ahead = _steps_ahead(metrics)

        state, *_ = _take(compiled, state, feed, _WARM_UP, ahead)
        say(f"running {steps} steps")
        state, taken, waited = _take(compiled, state, feed, steps, ahead)
        say(f"tracing {steps} steps")
        with _trace(out):
            state, traced, _ = _take(compiled, state, feed, steps, ahead)
    spans = read_spans(_newest(out))
    text = compiled.as_text()
    found = operations(spans, _sources(text))
    mean = float(np.mean(taken))
    network, median = type(experiment.net).__name__, float(np.median(taken))
    layers = _layers(found, network)
    devices = [jax.devices()[0]] if mesh is None else list(mesh.devices.flat)
    # On GPUs what cuDNN and cuBLAS compute is not counted in the compiled program.
    is_gpu = devices[0].platform == "gpu"
    flops = _flops_asked(lowered, len(devices)) if is_gpu else _flops(compiled, text)
    summary = {
        "data": config.data,
        "process": config.process,
        "network": network,
        "parameters": experiment.parameters(),
        "batch_size": config.batch_size,
        "steps": steps,
        "traced_steps": steps + ahead,
        "device": f"{devices[0].device_kind} x {len(devices)}",
        "mesh": None if mesh is None else dict(mesh.shape),
        "jax": jax.__version__,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "step_ms": {
            "median": round(1e3 * median, 4),
            "p10": round(1e3 * float(np.quantile(taken, 0.1)), 4),
            "p90": round(1e3 * float(np.quantile(taken, 0.9)), 4),
            "traced": round(1e3 * float(np.median(traced)), 4),
        },
        "examples_per_second": round(config.batch_size / mean, 2),
        "input_wait_share": round(waited / sum(taken), 5),
        "device_busy_share": _busy_share(spans, len(devices)),
        "memory": _memory(compiled, state, devices[0]),
        "flops_per_step": flops,
        "flops_per_second": None if flops is None else round(flops / mean),
        "layers": layers,
        "operations": [dataclasses.asdict(each) for each in found[:_SHOWN]],
        "trace": str(_newest(out)),
    }
    replace_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    if found:
        shown = found[:_SHOWN]
        rows = [(each.source or each.name, each.share) for each in shown]
        share = 100 * sum(each.share for each in shown)
        longest = f"the {len(shown)} longest of {len(found)} operations, {share:.0f} % of all"
        draw_operations(
            out / "operations.png",
            f"{network} on {config.data}: a step of {1e3 * median:.3g} ms",
            [("layers", [(each["layer"], each["share"]) for each in layers]), (longest, rows)],
        )
    return summary


def _take(
    step: Callable[..., Any], state: Any, feed: Feed, steps: int, ahead: int
) -> tuple[Any, list[float], float]:
    """The state, the seconds of ``steps`` steps, the seconds waited for input among them.

    As in training ``ahead`` steps are in flight, and so many more are taken before the clock
    starts: a round of the loop then lasts as long as a step, whichever the host waits for.
    """
    jax.block_until_ready(state)
    running: deque[Any] = deque()
    ends: list[float] = []
    for number in range(ahead + steps):
        if number == ahead:
            feed.take_waited()
            ends.append(time.perf_counter())
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            batch = next(feed)
            state, metrics = step(state, batch)
            with jax.profiler.TraceAnnotation("read and place batches"):
                feed.fill(metrics.loss)
            running.append(metrics.loss)
            if number >= ahead:
                running.popleft().block_until_ready()
                ends.append(time.perf_counter())
    waited = feed.take_waited()
    jax.block_until_ready(state)
    return state, np.diff(ends).tolist(), waited


def _trace(out: Path) -> Any:
    options = jax.profiler.ProfileOptions()
    # Each call of a Python function would be an event, and cost more than the loop does.
    options.python_tracer_level = 0
    return jax.profiler.trace(out, profiler_options=options)


def _newest(out: Path) -> Path:
    return max(out.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime)


# --- the trace ----------------------------------------------------------------------------------


def read_spans(path: Path) -> list[Span]:
    """The runs of compiled operations in a trace's ``.xplane.pb``.

    On TPUs they are the line "XLA Ops" of each chip; elsewhere the events, of threads on a CPU and
    of streams on a GPU, that name an ``hlo_op``.
    """
    spans = []
    with warnings.catch_warnings():
        # The type of an event's figures names no module, which Python 3.13 warns of.
        warnings.simplefilter("ignore", DeprecationWarning)
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            lines = list(plane.lines)
            whole = [line for line in lines if line.name == "XLA Ops"]
            if plane.name.startswith("/device:GPU"):
                # Here that line repeats what the streams hold.
                whole, lines = [], [line for line in lines if line.name.startswith("Stream")]
            for i, line in enumerate(whole or lines):
                for event in line.events:
                    if whole:
                        name, device = event.name.partition(" = ")[0].lstrip("%"), plane.name
                    else:
                        stats: dict[str, Any] = dict(event.stats)
                        if "hlo_op" not in stats:
                            continue
                        name = str(stats["hlo_op"])
                        device = f"{plane.name}:{stats.get('device_ordinal', 0)}"
                    end = event.start_ns + event.duration_ns
                    spans.append(Span(device, f"{plane.name}/{i}", name, event.start_ns, end))
    return spans


def operations(spans: Iterable[Span], sources: Mapping[str, str] | None = None) -> list[Operation]:
    """Operations by the time they take in themselves, the longest first.

    Args:
      spans: from ``read_spans``.
      sources: from an operation's name to where it came from.

    >>> spans = [Span("cpu", "1", "loop", 0, 100), Span("cpu", "1", "dot", 10, 40)]
    >>> [(each.name, each.share) for each in operations(spans)]
    [('loop', 0.7), ('dot', 0.3)]
    """
    calls: dict[str, int] = defaultdict(int)
    own: dict[str, float] = defaultdict(float)
    lines: dict[tuple[str, str], list[Span]] = defaultdict(list)
    for span in spans:
        lines[span.device, span.line].append(span)
    for line in lines.values():
        open_spans: list[Span] = []
        # Of two that start together the longer one is around the other.
        for span in sorted(line, key=lambda span: (span.start, -span.end)):
            while open_spans and open_spans[-1].end <= span.start:
                open_spans.pop()
            if open_spans:
                # Clocks of one line are read one after another: an end may pass its parent's.
                own[open_spans[-1].name] -= min(span.end, open_spans[-1].end) - span.start
            own[span.name] += span.end - span.start
            calls[span.name] += 1
            open_spans.append(span)
    total = sum(own.values()) or 1.0
    found = [
        Operation(name, (sources or {}).get(name, ""), calls[name], 1e-9 * value, value / total)
        for name, value in own.items()
    ]
    return sorted(found, key=lambda each: -each.seconds)


def _layers(found: Sequence[Operation], network: str) -> list[dict[str, Any]]:
    """Operations summed by the layer of the network they came from, the longest first."""
    sums: dict[str, float] = defaultdict(float)
    for each in found:
        path, comma, direction = each.source.partition(", ")
        parts = path.split("/")
        if parts[0] == network:
            name = "/".join(parts[:2]) + comma + direction
        else:
            name = "update of the state" if parts[0] == "cond" else "loss, noise and the rest"
        sums[name] += each.share
    return [
        {"layer": name, "share": round(share, 5)}
        for name, share in sorted(sums.items(), key=lambda item: -item[1])[:_SHOWN]
    ]


def busy_seconds(spans: Iterable[Span]) -> dict[str, float]:
    """Seconds in which each device runs at least one operation, on whatever thread or stream.

    >>> busy_seconds([Span("a", "1", "x", 0, 2e9), Span("a", "2", "y", 1e9, 3e9)])
    {'a': 3.0}
    """
    by_device: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        by_device[span.device].append(span)
    busy = {}
    for device, found in by_device.items():
        total, until = 0.0, float("-inf")
        for span in sorted(found, key=lambda span: span.start):
            total += max(0.0, span.end - max(span.start, until))
            until = max(until, span.end)
        busy[device] = 1e-9 * total
    return busy


def _busy_share(spans: Sequence[Span], devices: int) -> float | None:
    """Mean share of the time from the first operation to the last that a device is at work."""
    if not spans:
        return None
    length = max(span.end for span in spans) - min(span.start for span in spans)
    return round(sum(busy_seconds(spans).values()) / (devices * 1e-9 * length), 4)


def _sources(text: str) -> dict[str, str]:
    """From the operations of a compiled program to the layer and primitive they came from."""
    pattern = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"', re.MULTILINE)
    return {name: _readable(source) for name, source in pattern.findall(text)}


def _readable(source: str) -> str:
    """``UNet/Dense_0/dot_general, backward`` of ``jit(step)/transpose(jvp(UNet))/Dense_0/...``."""
    inner = re.sub(r"^p?jit\(\w+\)/", "", source)
    parts = [part for part in re.sub(r"\w+\(|\)", "", inner).split("/") if part]
    kept = [part for part in parts if part not in _FRAMES] or parts
    kept = [part for i, part in enumerate(kept) if i == 0 or part != kept[i - 1]]
    return "/".join(kept) + (", backward" if "transpose(" in source else "")


# --- what the compiler says ---------------------------------------------------------------------


def _flops(compiled: Any, text: str) -> int | None:
    """XLA's count for one device and step, with the rounds of loops, which it counts once."""
    costs = compiled.cost_analysis() or {}
    costs = costs[0] if isinstance(costs, list) else costs
    flops = costs.get("flops", 0.0)
    return round(flops * read_hlo(text).flops_in_loops) if flops > 0 else None


def _flops_asked(lowered: Any, devices: int) -> int | None:
    """The same before compiling, where each loop counts as one round of it."""
    flops = (lowered.cost_analysis() or {}).get("flops", 0.0)
    return round(flops / devices) if flops > 0 else None


def _memory(compiled: Any, state: Any, device: jax.Device) -> dict[str, int]:
    """Bytes on one device: what a step needs, and what came of the state it was given."""
    analysis = compiled.memory_analysis()
    arguments, outputs = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
    temporary, reused = analysis.temp_size_in_bytes, analysis.alias_size_in_bytes
    peak = getattr(analysis, "peak_memory_in_bytes", 0)
    if device.platform == "cpu" or not peak:
        # XLA's CPU compiler leaves temporary memory out of its peak.
        peak = arguments + outputs - reused + temporary
    memory = {
        "peak": peak,
        "arguments": arguments,
        "temporary": temporary,
        "outputs": outputs,
        "reused": reused,
        "state": sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(state)
            for shard in leaf.addressable_shards
            if shard.device == device and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
        ),
    }
    used = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return memory | ({} if used is None else {"measured_peak": used})
