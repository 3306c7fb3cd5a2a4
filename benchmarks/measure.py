"""Interleaved timing of two callables: medians, their ratio and its bootstrap interval.

Ours and the peer run alternately in one process after a warm-up, so that a busy machine slows
both. The first call of each, which compiles, is timed apart.
"""

import dataclasses
import json
import platform
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import numpy as np

PAIRS = 15


@dataclasses.dataclass(frozen=True)
class Result:
    """One measured case; ``ratio`` above 1 means that ours is better."""

    bench: str
    case: str
    ours: float
    peer: float
    peer_name: str
    unit: str
    ratio: float
    interval: tuple[float, float] | None = None
    goal: float | None = None
    pairs: int = 1
    first_call_ours: float | None = None
    first_call_peer: float | None = None
    device: str = dataclasses.field(default_factory=lambda: device())
    versions: dict[str, str] = dataclasses.field(default_factory=lambda: versions())
    note: str = ""

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    def to_line(self) -> str:
        """One line for a person."""
        between = ""
        if self.interval is not None:
            between = " [{:.3f}, {:.3f}]".format(*self.interval)
        goal = ""
        if self.goal is not None:
            best = self.ratio if self.interval is None else self.interval[1]
            met = "met" if best >= self.goal else "MISSED"
            goal = f", goal {self.goal:g} {met}"
        first = ""
        if self.first_call_ours is not None and self.first_call_peer is not None:
            first = (
                f"; first call {self.first_call_ours:.2f} s against {self.first_call_peer:.2f} s"
            )
        note = f" ({self.note})" if self.note else ""
        return (
            f"{self.bench}/{self.case}: {self.ours:.4g} {self.unit} against {self.peer:.4g} "
            f"{self.unit} of {self.peer_name}, ratio {self.ratio:.3f}{between}"
            f"{goal}{first}{note}"
        )


@dataclasses.dataclass(frozen=True)
class Missing:
    """A case whose peer is not installed: reported, never guessed."""

    bench: str
    case: str
    peer_name: str

    def to_line(self) -> str:
        """One line for a person."""
        return f"{self.bench}/{self.case}: missing, {self.peer_name} is not installed"


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    names = ("jaxgen", "jax", "jaxlib", "flax", "optax", "diffrax", "scipy", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device() -> str:
    """The first device and the processor it sits in."""
    first = jax.devices()[0]
    return f"{first.platform}:{first.device_kind}, {platform.machine()}"


def first_call(run: Callable[[], Any]) -> float:
    """Seconds of the first call, compilation included."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def compile_seconds(make: Callable[[], Callable[..., Any]], *args: Any, times: int = 3) -> float:
    """Median seconds to trace, lower and compile a function, made anew each time."""
    seconds = []
    for _ in range(times):
        function = jax.jit(make())
        start = time.perf_counter()
        function.lower(*args).compile()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def _timed(run: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        out = run()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / repeats


def ratio_of_medians(
    ours: np.ndarray, peer: np.ndarray, *, draws: int = 2000
) -> tuple[float, tuple[float, float]]:
    """``median(peer) / median(ours)`` and a 95 % bootstrap interval over the pairs."""
    rng = np.random.default_rng(0)
    pick = rng.integers(0, len(ours), (draws, len(ours)))
    ratios = np.median(peer[pick], axis=1) / np.median(ours[pick], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(np.median(peer) / np.median(ours)), (float(low), float(high))


def summarise(
    bench: str,
    case: str,
    ours: np.ndarray,
    peer: np.ndarray,
    *,
    peer_name: str,
    unit: str = "ms",
    goal: float | None = None,
    first_calls: tuple[float, float] | None = None,
    note: str = "",
) -> Result:
    """The ``Result`` of paired timings already in ``unit``."""
    ratio, interval = ratio_of_medians(ours, peer)
    return Result(
        bench=bench,
        case=case,
        ours=float(np.median(ours)),
        peer=float(np.median(peer)),
        peer_name=peer_name,
        unit=unit,
        ratio=ratio,
        interval=interval,
        goal=goal,
        pairs=len(ours),
        first_call_ours=None if first_calls is None else first_calls[0],
        first_call_peer=None if first_calls is None else first_calls[1],
        note=note,
    )


def compare(
    bench: str,
    case: str,
    ours: Callable[[], Any],
    peer: Callable[[], Any],
    *,
    peer_name: str,
    goal: float | None = None,
    pairs: int = PAIRS,
    least_seconds: float = 0.02,
    note: str = "",
) -> Result:
    """Time two callables in alternation.

    Args:
      bench: the benchmark's name.
      case: which case of it.
      ours: runs our side once and returns its arrays.
      peer: likewise.
      peer_name: who the peer is.
      goal: the ratio hoped for.
      pairs: interleaved pairs, after two of warm-up.
      least_seconds: a timing repeats its call until it lasts about this long.
      note: what a reader must know.
    """
    first_calls = first_call(ours), first_call(peer)
    repeats = [max(1, round(least_seconds / max(_timed(run, 1), 1e-6))) for run in (ours, peer)]
    times = np.zeros((pairs + 2, 2))
    for i in range(pairs + 2):
        # Alternate who goes first, so that neither always inherits a warm cache.
        order = (0, 1) if i % 2 == 0 else (1, 0)
        for side in order:
            times[i, side] = 1e3 * _timed((ours, peer)[side], repeats[side])
    return summarise(
        bench,
        case,
        times[2:, 0],
        times[2:, 1],
        peer_name=peer_name,
        goal=goal,
        first_calls=first_calls,
        note=note,
    )
