"""The `deepinv` package, spoken to over a pipe: it lives in an environment of its own."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parent / "golden" / "deepinv_worker.py"
VARIABLE = "JAXGEN_DEEPINV"


class Peer:
    """A running worker with a mixture as its prior; ``ask`` returns its answer to one command."""

    def __init__(self, python: str, modes: Any, var: float):
        self._process = subprocess.Popen(
            [python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._send({"modes": modes.tolist(), "var": var})

    def _send(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command and wait; ``seconds`` is measured in the worker."""
        assert self._process.stdout is not None
        self._send(command)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{WORKER.name} ended with code {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the worker."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def find(modes: Any, var: float) -> Peer | None:
    """The peer, where the environment variable names a Python that has it."""
    python = os.environ.get(VARIABLE)
    return Peer(python, modes, var) if python else None
