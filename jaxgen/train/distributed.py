"""Several processes as one run: how they meet, agree on what they run, and stop together.

Each process is started with the same command, finds the others through one coordinator (process
0), and works on its share of every batch. What only one may decide or write is done by process 0,
and every process learns how that went: a process that waits for one that has given up would wait
for ever. Nothing here does anything, or costs anything, in a run of one process.

Within the training loop nothing waits for an answer: ``Agreement`` asks about twice a second by a
collective of three integers, and reads the answer at the next question.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

__all__ = [
    "Agreement",
    "DistributedError",
    "agree",
    "barrier",
    "choose",
    "everywhere",
    "first",
    "initialize",
    "is_lost",
    "join_errors",
    "leave",
    "part",
]

T = TypeVar("T")

_TEXT = 1024
_CONFIG = 16_384
# What XLA's runtimes say when a process of the run has gone.
_LOST = (
    "gloo",
    "coordination service",
    "coordinationservice",
    "heartbeat",
    "unavailable:",
    "deadline_exceeded",
    "connection reset by peer",
    "connection closed by peer",
    "nccl",
)


class DistributedError(RuntimeError):
    """The processes of a run could not meet, or one of them could not go on."""


def is_lost(text: str) -> bool:
    """Whether an error's text says that a process of the run has gone.

    >>> is_lost("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
    True
    """
    return any(word in text.lower() for word in _LOST)


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: float = 60.0,
    heartbeat: int = 30,
) -> None:
    """Meet the other processes, by ``jax.distributed.initialize``; call it before anything else.

    What is not given is what SLURM, Open MPI, Kubernetes or Cloud TPU say, as far as jax detects
    them. Every process but the first waits for the coordinator's port to open before it joins.

    Args:
      coordinator: ``"host:port"`` of process 0.
      processes: how many there are.
      process: which of them this is, from 0.
      timeout: seconds to wait for the coordinator, and then for all processes to come.
      heartbeat: seconds without a sign of life after which a process counts as gone.

    Raises:
      DistributedError: there is nothing to detect, the coordinator does not answer, its port is
        taken, or not all processes came in time.
      ValueError: an argument out of range.
    """
    if not 1 <= timeout < float("inf") or heartbeat < 1:
        raise ValueError(f"timeout is {timeout} and heartbeat {heartbeat}; expected at least 1 s")
    for name, value, least in (("processes", processes, 1), ("process", process, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; expected at least {least}")
    if processes is not None and process is not None and process >= processes:
        raise ValueError(f"process is {process} of {processes}; expected less than {processes}")
    if None in (coordinator, processes, process):
        coordinator, processes, process = _detected(coordinator, processes, process, timeout)
    host, _, port = (coordinator or "").rpartition(":")
    if coordinator and (not host or not port.isdecimal() or not 0 < int(port) < 65_536):
        raise ValueError(f"coordinator is {coordinator!r}; expected HOST:PORT, a port to 65535")
    if coordinator and process is not None:
        (_check_free if process == 0 else _probe)(host.strip("[]"), int(port), timeout)
    # Its C++ handler would swallow SIGTERM; the loop has its own.
    jax.config.update("jax_enable_preemption_service", False)
    if jax.config.jax_cpu_collectives_implementation is None:  # type: ignore[attr-defined]
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=round(timeout),
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=heartbeat,
        )
        # The first collective makes the connections, each of which has a time-out of its own.
        counts = _gathered(str(processes), 16) if jax.process_count() > 1 else []
    except Exception as error:
        if not is_lost(str(error)):
            raise
        raise DistributedError(
            f"not all of the {processes} processes came together at {coordinator} within "
            f"{timeout:g} s; start every one of them, with the same --coordinator and --processes"
        ) from error
    if len(set(counts)) > 1:
        raise DistributedError(
            f"the processes were told of {', '.join(counts)} processes; give every one of them the "
            "same --processes"
        )


def _detected(
    coordinator: str | None, processes: int | None, process: int | None, timeout: float
) -> tuple[str | None, int | None, int | None]:
    """What the environment says of the values not given.

    jax has no public name for its detection. Should this one go, ``initialize`` detects for itself,
    and only the wait for the port is lost.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        from jax._src.clusters import ClusterEnv
    except ImportError:
        return coordinator, processes, process
    found = ClusterEnv.auto_detect_unset_distributed_params(
        coordinator, processes, process, None, None, round(timeout)
    )[:3]
    missing = [
        flag
        for flag, value in zip(("--coordinator", "--processes", "--process-id"), found, strict=True)
        if value is None
    ]
    if missing:
        raise DistributedError(
            "no cluster was found (SLURM, Open MPI, Kubernetes, Cloud TPU); give "
            f"{', '.join(missing)}"
        )
    return found


def _probe(host: str, port: int, timeout: float) -> None:
    """Wait for the coordinator's port to open."""
    end, reason = time.monotonic() + timeout, "no answer"
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=max(left, 0.1)):
                return
        except OSError as error:
            reason = (error.strerror or str(error) or reason).lower()
        time.sleep(min(0.2, max(left, 0)))
    raise DistributedError(
        f"the coordinator {host}:{port} did not answer within {timeout:g} s ({reason}); start "
        "process 0 there first, or check the address and what lies between"
    )


def _check_free(host: str, port: int, timeout: float) -> None:
    """Refuse a port on which something listens already."""
    del host, timeout
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise DistributedError(
                f"port {port} cannot be opened for the coordinator ({(error.strerror or '')}): "
                "another run may use it; choose another port"
            ) from None


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def part() -> None:
    """Leave the others: each process goes on, or ends, by itself from here on.

    Every process must call it; the computations of one process' own devices go on working.
    """
    if jax.process_count() > 1:
        jax.distributed.shutdown()


def leave(seconds: float = 5.0) -> None:
    """Part from the others if they come to it soon; the process is about to end."""
    thread = threading.Thread(target=_leave, daemon=True)
    thread.start()
    thread.join(seconds)


def _leave() -> None:
    with contextlib.suppress(Exception):
        jax.distributed.shutdown()


def _text(value: str, size: int) -> np.ndarray:
    words = value.encode()[:size]
    return np.frombuffer(words.ljust(size, b"\0"), np.uint8)


def _gathered(value: str, size: int) -> list[str]:
    """``value`` of every process, cut to ``size`` bytes."""
    rows = np.asarray(multihost_utils.process_allgather(_text(value, size)))
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]


def join_errors(error: BaseException | None) -> None:
    """Raise in every process if one has an error; every process must call it.

    Raises:
      DistributedError: with the text of another process' error; ``error`` itself is raised here.
    """
    if jax.process_count() == 1:
        if error is not None:
            raise error
        return
    texts = _gathered("" if error is None else str(error) or type(error).__name__, _TEXT)
    if error is not None:
        raise error
    for process, text in enumerate(texts):
        if text:
            raise DistributedError(f"process {process} could not go on: {text}")


def everywhere(action: Callable[[], T]) -> T:
    """``action()`` of every process; if it fails in one, it fails in all.

    Raises:
      DistributedError: where it went well; elsewhere what ``action`` raised comes out.
    """
    if jax.process_count() == 1:
        return action()
    error, result = None, None
    try:
        result = action()
    except Exception as raised:
        error = raised
    join_errors(error)
    return result  # type: ignore[return-value]


def first(action: Callable[[], T]) -> T | None:
    """``action()`` of process 0 alone; the others wait, and learn of its failure.

    Returns:
      Its result in process 0, ``None`` elsewhere.
    """
    return everywhere(lambda: action() if jax.process_index() == 0 else None)


def choose(value: int) -> int:
    """Process 0's ``value`` (32 bits, signed), in every process."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def choose_text(value: str) -> str:
    """Process 0's ``value``, up to 1024 bytes, in every process."""
    if jax.process_count() == 1:
        return value
    return _gathered(value, _TEXT)[0]


def agree(config: Mapping[str, Any]) -> None:
    """Make sure that every process was started with the same configuration.

    Hashes are compared; only if they differ do the processes show one another their values.

    Args:
      config: plain values by name.

    Raises:
      DistributedError: in every process, naming which differ from process 0, and in what.
    """
    if jax.process_count() == 1:
        return
    import hashlib

    text = json.dumps(config, sort_keys=True, default=str)
    digests = _gathered(hashlib.sha256(text.encode()).hexdigest(), 64)
    others = [i for i, digest in enumerate(digests) if digest != digests[0]]
    if not others:
        return
    configs = _gathered(text, _CONFIG)
    raise DistributedError(
        "the processes were started with different configurations: "
        + "; ".join(_difference(i, configs[i], configs[0]) for i in others[:8])
        + (f"; and {len(others) - 8} more" if len(others) > 8 else "")
        + ". Give every process the same settings"
    )


def _difference(process: int, there: str, expected: str) -> str:
    try:
        mine, first_one = json.loads(there), json.loads(expected)
    except json.JSONDecodeError:
        return f"process {process} from process 0"
    names = [n for n in sorted({*mine, *first_one}) if mine.get(n) != first_one.get(n)]
    values = ", ".join(f"{n} {mine.get(n)!r} for {first_one.get(n)!r}" for n in names)
    return f"process {process} has {values} in process 0"


class Agreement:
    """What any process wishes, known to all of them at the same step.

    A signal reaches one process, and clocks differ; but all must stop and save after the same
    step. So each ``look`` of a given step posts this process' wishes in one small collective and
    reads the answer to the question before: nothing waits. The number of steps from one look to the
    next follows the pace of the slowest process, and is part of what is agreed.

    Args:
      seconds: about how long from one look to the next; steps that take longer are looked at one
        by one. A wish is granted two looks after it at the latest.
    """

    def __init__(self, seconds: float = 0.5):
        self._seconds, self._next, self._every = seconds, 0, 1
        self._asked: jax.Array | None = None
        self._last, self._step = time.monotonic(), 0
        if jax.process_count() == 1:
            return
        mesh = Mesh(np.array(jax.devices()), ("all",))
        self._rows = NamedSharding(mesh, PartitionSpec("all"))
        whole = NamedSharding(mesh, PartitionSpec())
        self._largest = jax.jit(lambda rows: rows.max(axis=0), out_shardings=whole)

    def look(self, step: int, *, stop: int = 0, save: bool = False) -> tuple[int, bool]:
        """Whether to stop and whether to save after ``step``; called by all after every step.

        Args:
          step: steps taken, the same in every process.
          stop: a positive number if this process wishes to stop.
          save: whether it wishes to save.

        Returns:
          The largest ``stop``, 0 if none; and whether any wished to save.
        """
        if jax.process_count() == 1:
            return stop, save
        if step < self._next:
            return 0, False
        granted = (0, False)
        if self._asked is not None:
            number, is_time, pace = np.asarray(self._asked).tolist()
            granted = number, bool(is_time)
            self._every = min(max(int(self._seconds * 1e6 / max(pace, 1)), 1), 1000)
        now, taken = time.monotonic(), max(step - self._step, 1)
        pace = min(int(1e6 * (now - self._last) / taken), 2**31 - 1)
        self._last, self._step, self._next = now, step, step + self._every
        row = np.array([[stop, int(save and not granted[1]), pace]], np.int32)
        rows = np.repeat(row, jax.local_device_count(), axis=0)
        self._asked = self._largest(jax.make_array_from_process_local_data(self._rows, rows))
        if jax.local_devices()[0].platform == "cpu":
            # Collectives of CPU devices hold threads that the step needs; see loop._steps_ahead.
            self._asked.block_until_ready()
        return granted
