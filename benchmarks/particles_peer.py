"""The `particles` package, spoken to over a pipe: it lives in an environment of its own."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parent / "golden" / "particles_worker.py"
VARIABLE = "JAXGEN_PARTICLES"

# The linear-Gaussian model that the worker knows: x_t = A x + SIGMA e, y = x + TAU e, stationary.
A, SIGMA, TAU = 0.9, 0.5, 0.3


class Peer:
    """A running worker; ``ask`` returns its answer to one command."""

    def __init__(self, python: str):
        self._process = subprocess.Popen(
            [python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command and wait; ``seconds`` is measured in the worker."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{WORKER.name} ended with code {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the worker."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def find() -> Peer | None:
    """The peer, where the environment variable names a Python that has it."""
    python = os.environ.get(VARIABLE)
    return Peer(python) if python else None
