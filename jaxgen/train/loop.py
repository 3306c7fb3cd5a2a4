"""The loop around the training step: data in, figures and checkpoints out, and a clean way to stop.

The device is never waited for within a step: the figures of one report are read while the next
step runs, and the host stays only a few steps ahead so that batches do not pile up. A run's folder
holds ``metrics.jsonl`` and ``checkpoints/``; a run that was killed at any moment and is started
again with the same arguments ends in the same bits.

Several processes may run it together (``jaxgen.train.distributed``): all take the same steps, save
and stop after the same one, and process 0 writes the figures.
"""

import contextlib
import dataclasses
import functools
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgen.core import progress as progress_meter
from jaxgen.core.checks import positive_int
from jaxgen.train import distributed
from jaxgen.train import mesh as meshes
from jaxgen.train.checkpoint import Saver, restore
from jaxgen.train.feed import Feed
from jaxgen.train.manifest import CheckpointExists, CheckpointMismatch, plain, read_manifest
from jaxgen.train.manifest import saved_steps as finished_steps
from jaxgen.train.report import Report
from jaxgen.train.signals import Signals
from jaxgen.train.state import TrainState
from jaxgen.train.step import Metrics

__all__ = ["Diverged", "Interrupted", "check_mesh", "fit"]

Batches = Callable[[int], Iterable[Any]] | Iterable[Any]
_AHEAD = 4


def _steps_ahead(metrics: Metrics) -> int:
    """How many steps may be in flight.

    The CPU devices of a process share one pool of threads, in which a waiting collective holds a
    thread: several steps in flight can leave none to go on with, and XLA then aborts the process.
    """
    devices = metrics.loss.devices()
    is_crowded = len(devices) > 1 and next(iter(devices)).platform == "cpu"
    return 0 if is_crowded else _AHEAD


class Interrupted(RuntimeError):
    """The run was stopped by a signal after its step was finished and saved.

    Attributes:
      state: the state at that moment.
      signal: the signal's name, such as ``"SIGTERM"``.
    """

    def __init__(self, message: str, state: TrainState, name: str):
        super().__init__(message)
        self.state = state
        self.signal = name


class Diverged(RuntimeError):
    """Too many steps in a row gave a NaN or infinity; their updates were skipped.

    Attributes:
      state: the state, its parameters those of the last good step.
    """

    def __init__(self, message: str, state: TrainState):
        super().__init__(message)
        self.state = state


def fit(
    state: TrainState,
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    batches: Batches,
    steps: int,
    *,
    out: str | os.PathLike[str] | None = None,
    config: Any = None,
    progress: bool | None = None,
    mesh: Mesh | None = None,
    rules: meshes.Rules | Sequence[str] = meshes.RULES,
    report_every: int = 50,
    save_every: int = 1000,
    save_seconds: float | None = None,
    keep: int | None = 3,
    max_skipped: int = 20,
    resume: bool = True,
    layout: Any = None,
    config_may_change: Collection[str] = ("steps", "out"),
    on_report: Callable[[dict[str, Any]], None] | None = None,
) -> TrainState:
    """Train until ``state.step == steps``.

    With ``out`` a run that was interrupted goes on from its newest checkpoint, with more ``steps``
    a finished one is extended, and a finished one comes back as it is.

    Args:
      state: where to start; it is donated, so use only the state returned.
      step: from ``make_train_step``.
      batches: ``batches(examples) -> iterable`` of batches from that global position on; called
        once, so that going on reads no example twice. A plain iterable of batches is read as it
        comes, and cannot serve a run that goes on. A batch is a pytree of arrays, with several
        processes each one's own part of the global batch.
      steps: number of steps in all, those of earlier runs included.
      out: the run's folder, made if need be; ``None`` writes nothing.
      config: plain values (or a dataclass of them) kept in every checkpoint's manifest.
      progress: ``False`` shows nothing; else a bar on a terminal and plain lines elsewhere.
      mesh: where to run, from ``make_mesh`` or ``data_mesh``; default: one device. It may be
        another than the run had before. Several processes need one over all their devices.
      rules: where the parts of the state lie on it, from ``parse_rules``.
      report_every: steps between two lines of ``metrics.jsonl``.
      save_every: steps between two checkpoints; the last step is always saved.
      save_seconds: save also when this much time has passed since the last save.
      keep: number of checkpoints to keep; ``None`` keeps all.
      max_skipped: skipped steps in a row that stop the run.
      resume: ``False`` refuses a folder that holds a run.
      layout: of shared parameters, from ``share.plan``, or several: kept in every checkpoint, and
        a run that goes on must have the same.
      config_may_change: top-level names of ``config`` in which a run that goes on may differ.
      on_report: called with each line of ``metrics.jsonl``.

    Returns:
      The state after the last step.

    Raises:
      Interrupted: SIGINT or SIGTERM came; the step was finished and saved. A second signal acts at
        once, as it would without this function. Signals are watched in the main thread only.
      Diverged: ``max_skipped`` steps in a row were skipped; the last good state is saved.
      CheckpointError: the run's checkpoint cannot be used; its subclass and message say why.
      OSError: the disk is full or the folder cannot be written.
      DistributedError: another process of the run could not go on.
      ValueError: an argument out of range, a rule that does not fit, or ``batches`` ended early.
    """
    for name, value in (("report_every", report_every), ("save_every", save_every)):
        positive_int(name, value)
    positive_int("steps", steps, least=0)
    positive_int("max_skipped", max_skipped)
    start = time.monotonic()
    check_mesh(mesh)

    with contextlib.ExitStack() as stack:
        saver = None
        if out is not None:
            out = Path(out)
            folder = out / "checkpoints"
            state, resumed = _resume(
                state, folder, mesh, rules, resume, plain(config), config_may_change, layout
            )
            if resumed and not callable(batches):
                raise ValueError(
                    f"{out} holds a run at step {int(state.step)}; to go on with it batches must "
                    "be a function of the data position, not a plain iterable"
                )
            saver = stack.enter_context(Saver(folder, config=config, keep=keep, layout=layout))
        if mesh is not None:
            state = meshes.place(state, mesh, rules)
        done = int(state.step)
        if done >= steps:
            return state
        report = Report(None if out is None else out / "metrics.jsonl", done, on_report)
        meter = stack.enter_context(
            progress_meter.meter(steps, initial=done, description="training", enabled=progress)
        )
        signals = stack.enter_context(Signals(grace=1.0 if jax.process_count() > 1 else 0.0))
        runner = _Runner(
            state=state,
            step=step,
            done=done,
            steps=steps,
            mesh=mesh,
            report=report,
            meter=meter,
            saver=saver,
            report_every=report_every,
            save_every=save_every,
            save_seconds=float("inf") if save_seconds is None else save_seconds,
            max_skipped=max_skipped,
            start=start,
        )
        state, stopped = runner.run(batches, signals)
        if saver is not None:
            saver.wait()
        if stopped and int(state.step) < steps:
            name = signal.Signals(stopped).name
            where = f"; saved in {out}: start it again in the same way to go on" if out else ""
            raise Interrupted(
                f"stopped by {name} at step {int(state.step)} of {steps}{where}", state, name
            )
    return state


def _resume(
    state: TrainState,
    folder: Path,
    mesh: Mesh | None,
    rules: meshes.Rules | Sequence[str],
    resume: bool,
    config: Any,
    may_change: Collection[str],
    layout: Any,
) -> tuple[TrainState, bool]:
    """The newest saved state if it is ahead of ``state``, and whether it is."""
    saved = finished_steps(folder)
    # A folder on several hosts may show each another moment: process 0 says what is there.
    newest = distributed.choose(saved[-1] if saved else -1)
    if newest <= int(state.step):
        return state, False
    if not resume:
        raise CheckpointExists(
            f"{folder} holds a run at step {newest}; choose another folder, or resume it"
        )
    before = read_manifest(folder, newest)["config"]
    if isinstance(config, dict) and isinstance(before, dict):
        names = sorted(set(config) | set(before))
        differ = [n for n in names if n not in may_change and config.get(n) != before.get(n)]
        if differ:
            lines = "\n".join(
                f"  {n}: {before.get(n)!r} there, {config.get(n)!r} now" for n in differ
            )
            raise CheckpointMismatch(
                f"{folder} holds a run with another config; choose another folder, or use:\n{lines}"
            )
    sharding = None if mesh is None else meshes.state_shardings(state, mesh, rules)
    return restore(folder, state, sharding=sharding, step=newest, layout=layout), True


def check_mesh(mesh: Mesh | None) -> None:
    """Refuse a mesh that several processes cannot train on.

    Raises:
      ValueError: it has not all their devices, or parts of the batch that two processes share:
        each reads examples of its own.
    """
    if jax.process_count() > 1 and (mesh is None or mesh.size != jax.device_count()):
        have = "none" if mesh is None else f"one of {mesh.size}"
        raise ValueError(
            f"mesh is {have}; {jax.process_count()} processes need one over all of their "
            f"{jax.device_count()} devices (make_mesh)"
        )
    if mesh is not None and not _has_own_parts(mesh):
        sizes = ",".join(f"{name}={size}" for name, size in mesh.shape.items())
        raise ValueError(
            f"mesh is {sizes}, on which several processes would share a part of the batch; "
            "expected data and fsdp as the first axes, to multiply to a multiple of the processes"
        )


def _has_own_parts(mesh: Mesh) -> bool:
    """Whether all devices that hold one part of the batch belong to one process."""
    axes = [mesh.axis_names.index(name) for name in meshes.batch_axes(mesh)]
    owners = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    rows = np.moveaxis(owners, axes, range(len(axes)))
    rows = rows.reshape(*rows.shape[: len(axes)], -1)
    return bool((rows == rows[..., :1]).all())


@dataclasses.dataclass
class _Runner:
    """The loop proper, with what it needs at hand."""

    state: TrainState
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    done: int
    steps: int
    mesh: Mesh | None
    report: Report
    meter: progress_meter.Meter
    saver: Saver | None
    report_every: int
    save_every: int
    save_seconds: float
    max_skipped: int
    start: float
    saved: int = -1

    def run(self, batches: Batches, signals: Signals) -> tuple[TrainState, int]:
        """Take steps up to ``steps`` or to a signal, save the last one; the state, the signal."""
        position = int(self.state.examples)
        source = batches(position) if callable(batches) else batches
        left = self.steps - self.done
        with Feed(source, self.put, limit=left, owns_source=callable(batches)) as feed:
            return self.take_steps(feed, position, signals)

    def take_steps(self, feed: Feed, position: int, signals: Signals) -> tuple[TrainState, int]:
        look_every = max(1, min(self.report_every, self.max_skipped // 2))
        ahead: deque[Metrics] = deque()
        self.saved, last_save, first, most_ahead = self.done, time.monotonic(), True, _AHEAD
        # All processes stop at one signal to one of them, and save by one clock.
        agreement = distributed.Agreement()
        stopped = signals.number if jax.process_count() == 1 else 0
        guard: Callable[[], Any] = contextlib.nullcontext
        while self.done < self.steps and not stopped:
            batch = next(feed, None)
            if batch is None:
                self.finish()
                raise ValueError(f"batches ended after step {self.done}, before step {self.steps}")
            if first:
                _check_position(position, batch, self.steps - self.done)
            with guard():
                self.state, metrics = self.step(self.state, batch)
            self.done += 1
            # The next batches are read and placed while this step runs.
            feed.fill(metrics.loss)
            if first:
                # Compiling is over; it is no part of the rate.
                metrics.loss.block_until_ready()
                self.report.restart_clock(first_step=time.monotonic() - self.start)
                feed.take_waited()
                first, most_ahead = False, _steps_ahead(metrics)
                if hasattr(self.step, "lower"):
                    # A compiled step has all that it needs where it needs it.
                    guard = functools.partial(jax.transfer_guard, "disallow")
            # The report of an earlier step is read here, while this one runs.
            shown = self.report.pending()
            self.report.add(metrics, batch, feed.take_waited())
            if self.done % self.report_every == 0:
                self.report.mark(self.done)
            if self.done < self.steps:
                self.meter.update(1, **(shown or {}))
            ahead.append(metrics)
            if len(ahead) > most_ahead:
                oldest = ahead.popleft()
                oldest.loss.block_until_ready()
                if self.done % look_every == 0:
                    self.check_skipped(oldest)
            is_time = time.monotonic() - last_save > self.save_seconds
            stopped, is_time = agreement.look(self.done, stop=signals.number, save=is_time)
            if self.done % self.save_every == 0 or is_time:
                last_save = time.monotonic()
                self.save()
        if ahead:
            self.check_skipped(ahead[-1])
        self.finish()
        return self.state, stopped

    def put(self, batch: Any) -> Any:
        """The batch on the device or over the mesh."""
        if self.mesh is None:
            return jax.device_put(batch)
        return meshes.shard_batch(batch, self.mesh)

    def save(self) -> None:
        # The figures up to a checkpoint are on disk before it is.
        self.report.pending()
        if self.saver is not None and self.saved != self.done:
            self.saver.save(self.state)
            self.saved = self.done

    def finish(self) -> None:
        self.report.mark(self.done)
        self.meter.update(int(self.done == self.steps), **(self.report.pending() or {}))
        self.save()

    def check_skipped(self, metrics: Metrics) -> None:
        in_a_row = np.asarray(metrics.skipped_in_a_row).item()
        if in_a_row < self.max_skipped:
            return
        self.finish()
        if self.saver is not None:
            # All processes are here; after an error none waits for a save any more.
            self.saver.wait()
        where = "" if self.saver is None else f" and are saved in {self.saver.directory}"
        raise Diverged(
            f"{in_a_row} steps in a row gave a loss or gradient that is NaN or infinite; the "
            f"parameters are those of the last good step{where}: try a lower learning rate or "
            "float32, or look at the data",
            self.state,
        )


def _check_position(position: int, batch: Any, steps: int) -> None:
    n = np.shape(jax.tree.leaves(batch)[0])[0]
    if position + n * steps > np.iinfo(np.uint32).max:
        raise ValueError(
            f"{steps} steps of {n} examples from position {position} pass 2^32 - 1, the largest "
            "data position"
        )
