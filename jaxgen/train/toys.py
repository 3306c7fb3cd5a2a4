"""Two-dimensional toy distributions, for pictures that show a whole density at a glance.

Each is a function of a NumPy generator and a count that returns points ``(n, 2)`` and labels
``(n,)`` or ``None``. Points are drawn independently, so the first k of n are a sample too.
"""

from collections.abc import Callable

import numpy as np

__all__ = ["TOYS"]

Toy = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray | None]]


def _moons(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Two interleaved half circles with noise; the label says which."""
    label = rng.integers(0, 2, n)
    angle = rng.uniform(0, np.pi, n)
    x = np.where(label == 0, np.cos(angle), 1 - np.cos(angle))
    y = np.where(label == 0, np.sin(angle), 0.5 - np.sin(angle))
    return np.stack([x, y], axis=1) + rng.normal(scale=0.08, size=(n, 2)), label


def _swissroll(rng: np.random.Generator, n: int) -> tuple[np.ndarray, None]:
    """A spiral of one and a half turns with noise."""
    angle = 1.5 * np.pi * (1 + 2 * rng.uniform(size=n))
    points = angle[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return points + rng.normal(scale=0.5, size=(n, 2)), None


def _checkerboard(rng: np.random.Generator, n: int) -> tuple[np.ndarray, None]:
    """Uniform on the eight dark squares of a 4 x 4 board on [-2, 2]^2."""
    column = rng.integers(0, 4, n)
    row = 2 * rng.integers(0, 2, n) + column % 2
    return np.stack([column, row], axis=1) - 2 + rng.uniform(size=(n, 2)), None


def _gaussians(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Eight equal Gaussians of deviation 0.2 on a circle of radius 2; the label says which."""
    label = rng.integers(0, 8, n)
    angle = label * np.pi / 4
    centres = 2 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return centres + rng.normal(scale=0.2, size=(n, 2)), label


TOYS: dict[str, Toy] = {
    "moons": _moons,
    "swissroll": _swissroll,
    "checkerboard": _checkerboard,
    "gaussians": _gaussians,
}
