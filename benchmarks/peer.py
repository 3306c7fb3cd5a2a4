"""A peer that lives in an environment of its own, spoken to over a pipe in lines of JSON."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["Peer", "find"]

_WORKERS = Path(__file__).parent / "golden"


class Peer:
    """A running worker of ``golden``; ``ask`` returns its answer to one command."""

    def __init__(self, python: str, worker: str):
        self._worker = worker
        self._process = subprocess.Popen(
            [python, str(_WORKERS / worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def send(self, **command: Any) -> None:
        """Send a command that has no answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command and wait; ``seconds`` is measured in the worker."""
        assert self._process.stdout is not None
        self.send(**command)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._worker} ended with code {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the worker."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def find(variable: str, worker: str) -> Peer | None:
    """The peer, where this environment variable names a Python that has it."""
    python = os.environ.get(variable)
    return Peer(python, worker) if python else None
