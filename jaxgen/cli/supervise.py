"""Each process of a distributed run under a small supervisor.

When a process of a run dies, jax's runtime aborts the others from C++, with a stack and exit code
134, where no Python can catch it. So the command that a person starts does no work itself: it
starts the same command as a worker, hands signals on to it, and says in one line what became of it.

* The worker's file descriptors 1 and 2 are pipes to the supervisor, which keeps the last lines of
  the runtime's talk and shows them only when a worker dies in a way it does not know. What Python
  prints goes straight to the real standard output and error.
* Over one more pipe the worker tells what it is at. A worker that goes on hanging after the runtime
  has told of a failure, whose steps stop coming, or that a signal does not reach, is killed.
* The worker dies with its supervisor: by the kernel's parent death signal on Linux, and everywhere
  by the end of a pipe that the supervisor holds open.

This file imports nothing heavy: there is a supervisor beside every worker.
"""

import contextlib
import logging
import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

__all__ = ["LOST", "end", "is_needed", "is_worker", "supervise", "tell", "work"]

LOST = 75
"""Exit code: a process of the run has gone. EX_TEMPFAIL: the same command goes on."""

_VARIABLE = "JAXGEN_WORKER"
_GRACE = 10.0
_STALL = 900.0
# While the runtime waits for the others Python sees no signal; there is nothing to lose yet.
_JOINING = ("", "attached", "joining")
_JOINING_GRACE = 3.0
# The runtime's last words before it aborts a worker because of another one.
_FATAL = (
    "JAX distributed service detected fatal errors",
    "Polled an error from coordination service",
    "Failed to send RPC to coordination service",
    "heartbeat timeout",
)


def is_worker() -> bool:
    """Whether this process was started by a supervisor."""
    return _VARIABLE in os.environ


def is_needed(words: Sequence[str]) -> bool:
    """Whether a command asks for a distributed run, and this process is not its worker yet."""
    return "--distributed" in words and not is_worker() and os.name == "posix"


# --- the worker's side ----------------------------------------------------------------------------

_status: int | None = None


def work(name: str, run: Callable[[], int], guard: Callable[[Callable[[], int]], int]) -> int:
    """Carry out a worker's command.

    Args:
      name: of the command, for messages.
      run: the command; its exit code is returned.
      guard: turns the errors of ``run`` that a person can act on into a line and an exit code.

    Returns:
      0. Any other code ends the process at once: the others must not wait for one that has failed.
    """
    from jaxgen.train import distributed

    _attach()

    def guarded() -> int:
        try:
            return run()
        except Exception as error:
            if isinstance(error, distributed.DistributedError) or not distributed.is_lost(
                str(error)
            ):
                raise
            end(LOST)

    try:
        code = guard(guarded)
    except Exception:
        traceback.print_exc()
        code = 1
    if code:
        distributed.leave()
        end(code)
    return code


def end(code: int) -> NoReturn:
    """End this process now, without the runtime's farewells."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def tell(line: str) -> None:
    """Tell the supervisor what the worker is at; does nothing without one."""
    if _status is not None:
        with contextlib.suppress(OSError):
            os.write(_status, (line + "\n").encode())


def _attach() -> None:
    """Take up the pipes, and die with the supervisor."""
    global _status
    status, life, out, error, parent = map(int, os.environ[_VARIABLE].split(","))
    sys.stdout, sys.stderr = (
        os.fdopen(handle, "w", encoding="utf-8", errors="replace", buffering=1)
        for handle in (out, error)
    )
    # What libraries log, stacks of a lost process too, goes the way of the runtime's talk.
    logging.basicConfig(stream=os.fdopen(2, "w", errors="replace", closefd=False))

    def watch() -> None:
        os.read(life, 1)
        os._exit(128 + signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="jaxgen-life").start()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            import ctypes

            ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)
    _status = status
    tell("attached")


# --- the supervisor's side ------------------------------------------------------------------------


class _Watch:
    """What is known of a worker, from what it tells and what its runtime says."""

    def __init__(self) -> None:
        self.talk: deque[str] = deque(maxlen=60)
        self.stage, self.folder = "", ""
        self.is_stalled = False
        self._failed_at: float | None = None
        self._beat: float | None = None
        self._longest: float | None = None
        self.signal = 0
        self.is_deaf = False
        self._signal_at = 0.0
        self._is_urgent = False

    def hears(self, line: str) -> None:
        """One line of the runtime's."""
        self.talk.append(line)
        if self._failed_at is None and any(sign in line for sign in _FATAL):
            self._failed_at = time.monotonic()

    def learns(self, line: str) -> None:
        """One line of the worker's."""
        word, _, value = line.partition(" ")
        if word == "folder":
            self.folder = value
        elif word == "report":
            now = time.monotonic()
            if self._beat is not None:
                self._longest = max(self._longest or 0.0, now - self._beat)
            self._beat = now
        else:
            self.stage = word
            self._beat = None

    def hands_on(self, number: int) -> None:
        """A signal goes to the worker; a second one means at once."""
        now = time.monotonic()
        if self.signal and now - self._signal_at < 1:
            return
        self._is_urgent = bool(self.signal)
        self.signal, self._signal_at = number, now

    def must_end(self) -> bool:
        """Whether the worker hangs: the runtime has failed, or no step or answer comes any more.

        How long steps take is known from the second report on; the first may come early or late.
        """
        now = time.monotonic()
        if self._beat is not None and self._longest is not None:
            self.is_stalled |= now - self._beat > max(_STALL, 20 * self._longest)
        if self.signal:
            waited = now - self._signal_at
            self.is_deaf |= self._is_urgent and waited > _GRACE
            self.is_deaf |= self.stage in _JOINING and waited > _JOINING_GRACE
        has_failed = self._failed_at is not None and now - self._failed_at > _GRACE
        return has_failed or self.is_stalled or self.is_deaf

    @property
    def is_lost(self) -> bool:
        """Whether the runtime has spoken of another process' end."""
        return self._failed_at is not None

    def again(self) -> str:
        """What to do: start again, and from where that goes on."""
        newest = _newest_step(Path(self.folder)) if self.folder else None
        where = "" if newest is None else f" to go on from step {newest}"
        return f"start the same command again{where}"


def _newest_step(folder: Path) -> int | None:
    """The newest finished checkpoint, as ``jaxgen.train.saved_steps`` has it (without jax)."""
    found = [
        int(match[1])
        for path in folder.glob("checkpoints/step_*")
        if (match := re.fullmatch(r"step_(\d{8,})", path.name))
        and (path / "manifest.json").exists()
    ]
    return max(found, default=None)


def supervise(name: str, command: Sequence[str]) -> int:
    """Start a command as a worker, see it through, and say in a line how it ended.

    Args:
      name: of the command, for messages.
      command: a program that calls ``work``, and its arguments.

    Returns:
      The worker's exit code, ``LOST`` if a process of the run has gone.
    """
    pipes = [os.pipe() for _ in range(3)]
    (status, status_worker), (life_worker, life), (talk, talk_worker) = pipes
    out, error = os.dup(1), os.dup(2)
    handed = (status_worker, life_worker, out, error)
    sys.stdout.flush()
    worker: subprocess.Popen[bytes] | None = None
    early: list[int] = []
    watch = _Watch()

    def forward(number: int, frame: FrameType | None) -> None:
        del frame
        number = signal.SIGTERM if number == signal.SIGHUP else number
        watch.hands_on(number)
        if worker is None:
            early.append(number)
        else:
            worker.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {
        number: signal.signal(number, forward)
        for number in numbers
        # What is ignored stays so (nohup).
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        worker = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=talk_worker,
            stderr=talk_worker,
            pass_fds=handed,
            # A Ctrl-C of the terminal reaches it through here, once.
            start_new_session=True,
            env=os.environ | {_VARIABLE: ",".join(map(str, (*handed, os.getpid())))},
        )
        for number in early:
            worker.send_signal(number)
        for handle in (*handed, talk_worker):
            os.close(handle)
        _follow(worker, watch, status, talk)
        return _verdict(name, worker.wait(), watch)
    finally:
        if worker is not None and worker.poll() is None:
            worker.kill()
            worker.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
        for handle in (status, life, talk):
            os.close(handle)


def _follow(worker: subprocess.Popen[bytes], watch: _Watch, status: int, talk: int) -> None:
    """Read what comes until the worker has ended; end it if it hangs."""
    rest = {status: b"", talk: b""}
    sinks = {status: watch.learns, talk: watch.hears}
    with selectors.DefaultSelector() as selector:
        for handle in rest:
            selector.register(handle, selectors.EVENT_READ)
        has_ended = False
        while selector.get_map():
            ready = selector.select(timeout=0.0 if has_ended else 0.5)
            for key, _ in ready:
                handle = key.fd
                data = os.read(handle, 65_536)
                if not data:
                    selector.unregister(handle)
                *lines, rest[handle] = (rest[handle] + data).split(b"\n")
                for line in lines:
                    sinks[handle](line.decode(errors="replace"))
            if has_ended and not ready:
                break
            has_ended = worker.poll() is not None
            if not has_ended and watch.must_end():
                worker.kill()
    for handle, line in rest.items():
        if line:
            sinks[handle](line.decode(errors="replace"))


def _verdict(name: str, code: int, watch: _Watch) -> int:
    """The exit code, and the line where the worker could not say one itself."""

    def say(line: str) -> None:
        print(f"{name}: {line}", file=sys.stderr, flush=True)

    if watch.stage == "joining" and code == -signal.SIGABRT:
        say(
            "not all processes of the run came together in time; start every one of them, with the "
            "same --coordinator and --processes"
        )
        return 2
    if watch.signal and (code == -watch.signal or (code == -signal.SIGKILL and watch.is_deaf)):
        say(f"stopped by {signal.Signals(watch.signal).name}; the same command goes on")
        return 128 + watch.signal
    if code == LOST or (code < 0 and (watch.is_lost or watch.is_stalled)):
        what = "a process of the run has gone"
        if watch.is_stalled and not watch.is_lost:
            what = "no step has come for too long"
        say(f"{what}; {watch.again()}")
        return LOST
    if code == -signal.SIGKILL:
        say(f"the worker was killed, for want of memory perhaps; {watch.again()}")
        return 128 + signal.SIGKILL
    if code < 0 or (code and not watch.stage):
        for line in watch.talk:
            print(line, file=sys.stderr)
        if code < 0:
            say(f"the worker died of {signal.Signals(-code).name}; {watch.again()}")
    return code if code >= 0 else 128 - code
