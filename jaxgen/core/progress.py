"""Progress for long work: a bar on a terminal, plain lines elsewhere, nothing when silenced."""

import sys
import time
from typing import Any, Literal

__all__ = ["Meter", "meter"]


def _format(metrics: dict[str, Any]) -> dict[str, str]:
    return {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in metrics.items()}


class Meter:
    """Counts units of work; use it as a context manager (see ``meter``)."""

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        description: str = "",
        unit: str = "step",
        enabled: bool | Literal["bar"] | None = None,
        every: float = 10.0,
    ):
        self._total, self._done, self._initial = total, initial, initial
        self._description, self._unit, self._every = description, unit, every
        self._enabled = enabled is not False
        self._bar: Any = None
        if self._enabled and (sys.stderr.isatty() or enabled == "bar"):
            # Imported here: the library works without tqdm, only its bar does not.
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=description or None,
                unit=unit,
                dynamic_ncols=True,
                smoothing=0.1,
            )

    def __enter__(self) -> "Meter":
        self._start = self._last = time.monotonic()
        return self

    def update(self, n: int = 1, **metrics: Any) -> None:
        """Add ``n`` done units and show ``metrics`` (numbers are rounded for show)."""
        self._done += n
        if not self._enabled:
            return
        if self._bar is not None:
            if metrics:
                self._bar.set_postfix(_format(metrics), refresh=False)
            self._bar.update(n)
            return
        now = time.monotonic()
        if now - self._last >= self._every or self._done >= self._total:
            self._last = now
            self._print_line(now, metrics)

    def _print_line(self, now: float, metrics: dict[str, Any]) -> None:
        rate = (self._done - self._initial) / max(now - self._start, 1e-9)
        left = (self._total - self._done) / rate if rate > 0 else float("inf")
        shown = "".join(f", {k} {v}" for k, v in _format(metrics).items())
        name = f"{self._description}: " if self._description else ""
        print(
            f"{name}{self._done}/{self._total} {self._unit}s, {rate:.3g}/s, "
            f"{left:.0f} s left{shown}",
            file=sys.stderr,
            flush=True,
        )

    def write(self, line: str) -> None:
        """Print a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif self._enabled:
            print(line, file=sys.stderr, flush=True)

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()


def meter(
    total: int,
    *,
    initial: int = 0,
    description: str = "",
    unit: str = "step",
    enabled: bool | Literal["bar"] | None = None,
    every: float = 10.0,
) -> Meter:
    """A progress meter, as a context manager.

    Args:
      total: units of work in all.
      initial: units already done, by an earlier run.
      description: what is being done.
      unit: the name of one unit, singular.
      enabled: ``False`` shows nothing; ``None`` or ``True`` shows a bar where standard error is
        a terminal and a plain line every ``every`` seconds elsewhere; ``"bar"`` always a bar.
      every: seconds between plain lines.

    Example:
      >>> with meter(3, enabled=False) as progress:
      ...     for _ in range(3):
      ...         progress.update(1, loss=0.5)
    """
    return Meter(
        total, initial=initial, description=description, unit=unit, enabled=enabled, every=every
    )
