"""Signals that ask a run to stop: noted, so that the step under way is finished and saved."""

import signal
import threading
import time
from types import FrameType
from typing import Any

__all__ = ["Signals"]


class Signals:
    """Notes SIGINT and SIGTERM while it is entered; a second one acts as it would have before.

    Args:
      grace: seconds in which the same signal counts as one. A scheduler may send it to a process
        and to the one that watches over it, which hands it on.
    """

    def __init__(self, grace: float = 0.0) -> None:
        self.received = ""
        self.number = 0
        self._grace, self._at = grace, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == self.number and time.monotonic() - self._at < self._grace:
            return
        if self.received:
            self._restore()
            signal.raise_signal(number)
        self.received, self.number = signal.Signals(number).name, number
        self._at = time.monotonic()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            # None stands for a handler that was not installed from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def __exit__(self, *exc: object) -> None:
        self._restore()
