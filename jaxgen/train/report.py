"""``metrics.jsonl``: one line per report, cut to the checkpoint's step when a run goes on."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgen.train.manifest import replace_text
from jaxgen.train.step import Metrics

__all__ = ["Report", "read_lines"]


def read_lines(path: Path, up_to: int | None = None) -> list[dict[str, Any]]:
    """The whole lines of a ``metrics.jsonl`` with ``step <= up_to``; none if there is no file."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                # A run that was killed may leave half a line, at the end only.
                break
            if up_to is None or line["step"] <= up_to:
                lines.append(line)
    return lines


class Report:
    """Gathers the metrics of the steps since the last report, on the device until they are read.

    Args:
      path: the file, or ``None`` to write none.
      step: the step at which the run starts; later lines of the file are dropped.
      on_report: called with each line.
    """

    def __init__(
        self, path: Path | None, step: int, on_report: Callable[[dict[str, Any]], None] | None
    ):
        self._on_report = on_report
        self._path = path if jax.process_index() == 0 else None
        self._window: list[Metrics] = []
        self._marked: tuple[int, list[Metrics], int, float] | None = None
        self._examples, self._waited = 0, 0.0
        self._first_step: float | None = None
        before = 0.0
        if self._path is not None and self._path.exists():
            kept = read_lines(self._path, step)
            before = kept[-1]["wall_seconds"] if kept else 0.0
            replace_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._last = time.monotonic()
        self._start = self._last - before

    def restart_clock(self, first_step: float) -> None:
        """Measure the rate from now on; the next line tells what the first step took, in s."""
        self._last = time.monotonic()
        self._first_step = first_step

    def add(self, metrics: Metrics, batch: Any, waited: float) -> None:
        """Take in one step, the whole batch that it was on and the seconds waited for batches."""
        self._window.append(metrics)
        self._examples += np.shape(jax.tree.leaves(batch)[0])[0]
        self._waited += waited

    def mark(self, step: int) -> None:
        """End the window at ``step``; its figures are read by the next ``pending``."""
        if self._window:
            self._marked = (step, self._window, self._examples, self._waited)
            self._window, self._examples, self._waited = [], 0, 0.0

    def pending(self) -> dict[str, Any] | None:
        """Write the marked window's line, waiting for its last step; what a meter may show."""
        if self._marked is None:
            return None
        step, window, examples, waited = self._marked
        self._marked = None
        # np.asarray costs a tenth of jax.device_get where the arrays are scalars on the host.
        losses, norms = ([np.asarray(m[i]).item() for m in window] for i in range(2))
        skipped = np.asarray(window[-1].skipped).item()
        now = time.monotonic()
        rate = examples / max(now - self._last, 1e-9)
        self._last = now
        line = {
            "step": step,
            "loss": _finite_mean(losses),
            "grad_norm": _finite_mean(norms),
            "examples_per_second": round(rate, 3),
            "skipped": skipped,
            "wall_seconds": round(now - self._start, 3),
            "input_wait_seconds": round(waited, 4),
        }
        if self._first_step is not None:
            line["first_step_seconds"] = round(self._first_step, 3)
            self._first_step = None
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if self._on_report is not None:
            self._on_report(line)
        shown = {"loss": line["loss"], "examples/s": rate}
        return shown | ({"skipped": skipped} if skipped else {})


def _finite_mean(values: list[float]) -> float | None:
    finite = [v for v in values if math.isfinite(v)]
    return math.fsum(finite) / len(finite) if finite else None
