"""Brownian increments on a fixed grid: the same noise in every driver and under every adjoint.

Increment ``n`` of sample ``i`` is ``sqrt(dt) normal(fold_in(fold_in(key, i), n))``, where ``n`` is
the interval of the grid that is asked for. Increments do not depend on the batch, and may be drawn
all at once before a loop. A path of single increments knows nothing between the knots: an interval
that is not one of the grid's gives NaN (use ``diffrax.VirtualBrownianTree`` there).
"""

import functools
import math
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core.arrays import at_least_f32, real_dtype

__all__ = ["AHEAD", "GridPath", "fold_each", "normals"]

# Entries that are drawn before a loop rather than inside it.
AHEAD = 2**21

# Variances of W, H and K over an interval of length one.
_VARIANCES = (1.0, 1 / 12, 1 / 720)


@functools.partial(jax.jit, inline=True)
def fold_each(keys: jax.Array, numbers: jax.Array) -> jax.Array:
    """``fold_in(key, n)`` for each number and key: ``(*numbers, *keys)``."""
    flat = keys.reshape(-1)
    each = jax.vmap(lambda n: jax.vmap(lambda k: jax.random.fold_in(k, n))(flat))
    return each(numbers.reshape(-1)).reshape(numbers.shape + keys.shape)


@functools.partial(jax.jit, static_argnames=("event", "dtype"), inline=True)
def normals(keys: jax.Array, event: tuple[int, ...], dtype: Any) -> jax.Array:
    """Standard normals ``(*keys, *event)``, one draw for each key.

    One flat map over the keys: nested ones compile twice as long.
    """
    drawn = jax.vmap(lambda k: jax.random.normal(k, event, dtype))(keys.reshape(-1))
    return drawn.reshape(keys.shape + tuple(event))


def _orders(levy_area: type) -> int:
    if issubclass(levy_area, diffrax.SpaceTimeTimeLevyArea):
        return 3
    return 2 if issubclass(levy_area, diffrax.SpaceTimeLevyArea) else 1


class GridPath(diffrax.AbstractBrownianPath):
    """A Brownian path on the intervals of a grid (module docstring).

    Args:
      keys: one typed key per sample, ``(batch,)``, or one key ``()`` for a state without a batch.
      event: the event's shape.
      dtype: the state's dtype; a complex one gives circular noise with ``E|dW|^2 = dt``.
      steps: number of intervals.
      times: the knots, ``(steps + 1,)``, rising or falling; ``None`` for ``steps`` equal intervals
        of [0, 1].
      levy_area: ``BrownianIncrement``, ``SpaceTimeLevyArea`` or ``SpaceTimeTimeLevyArea``.
      ahead: draw every increment now; by default if there are at most 2^21 entries.
      drawn: the normals of the increments, ``(steps, *keys, *event)``, where they are known.

    Example:
      >>> import jax
      >>> path = GridPath(jax.random.key(0), (3,), jax.numpy.float32, 10)
      >>> path.evaluate(0.2, 0.3).shape
      (3,)
    """

    # Diffrax declares its abstract fields as class variables to type checkers.
    t0: Any  # type: ignore[misc]
    t1: Any  # type: ignore[misc]
    keys: jax.Array
    times: jax.Array | None
    drawn: tuple[jax.Array, ...] | None
    event: tuple[int, ...] = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)
    steps: int = eqx.field(static=True)
    levy_area: type = eqx.field(static=True)

    def __init__(
        self,
        keys: jax.Array,
        event: tuple[int, ...],
        dtype: Any,
        steps: int,
        times: ArrayLike | None = None,
        *,
        levy_area: type = diffrax.BrownianIncrement,
        ahead: bool | None = None,
        drawn: jax.Array | None = None,
    ):
        self.keys, self.event, self.dtype = keys, tuple(event), jnp.dtype(dtype)
        self.steps, self.levy_area = steps, levy_area
        self.times = None if times is None else jnp.asarray(times)
        self.t0, self.t1 = 0.0, 1.0
        if self.times is not None:
            self.t0 = jnp.minimum(self.times[0], self.times[-1])
            self.t1 = jnp.maximum(self.times[0], self.times[-1])
        if drawn is not None:
            self.drawn = (drawn,)
            return
        if ahead is None:
            size = steps * keys.size * math.prod(self.event) * _orders(levy_area)
            ahead = size <= AHEAD
        self.drawn = self._draw(jnp.arange(steps)) if ahead else None

    def _draw(self, n: jax.Array) -> tuple[jax.Array, ...]:
        """Standard normals of intervals ``n``, one array for each of W, H and K in use."""
        wide = jnp.promote_types(self.dtype, jnp.float32)
        keys = fold_each(self.keys, n)
        orders = range(1, _orders(self.levy_area))
        levy = (fold_each(keys, jnp.asarray(k)) for k in orders)
        return tuple(normals(k, self.event, wide) for k in (keys, *levy))

    def _interval(self, t0: jax.Array, t1: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Index of the interval and whether ``[t0, t1]`` is one of the grid's."""
        if self.times is None:
            n = jnp.clip(jnp.round(t0 * self.steps), 0, self.steps - 1).astype(jnp.int32)
            low, high = n / self.steps, (n + 1) / self.steps
        else:
            first = jnp.minimum(self.times[:-1], self.times[1:])
            last = jnp.maximum(self.times[:-1], self.times[1:])
            middle = 0.5 * (t0 + t1)
            n = jnp.argmax((first <= middle) & (middle < last)).astype(jnp.int32)
            low, high = first[n], last[n]
        slack = 0.01 * (high - low)
        return n, (jnp.abs(t0 - low) <= slack) & (jnp.abs(t1 - high) <= slack)

    def evaluate(
        self,
        t0: Any,
        t1: Any | None = None,
        left: bool = True,
        use_levy: bool = False,
    ) -> Any:
        """The increment over one interval of the grid, ``t0 < t1``; NaN over any other.

        Args:
          t0: the interval's start.
          t1: its end; required.
          left: ignored, there are no jumps.
          use_levy: return a ``levy_area`` with the Levy areas, not the increment alone.

        Returns:
          ``(batch, *event)`` or the event.

        Raises:
          ValueError: ``t1`` is ``None``: the path is known by its increments only.
        """
        del left
        if t1 is None:
            raise ValueError("GridPath knows increments only; evaluate it over an interval t0, t1")
        wide = at_least_f32(self.dtype)
        t0, t1 = jnp.asarray(t0, wide), jnp.asarray(t1, wide)
        n, known = self._interval(t0, t1)
        normals = self._draw(n) if self.drawn is None else tuple(d[n] for d in self.drawn)
        dt = t1 - t0
        scales = (jnp.where(known, jnp.sqrt(v * dt), jnp.nan) for v in _VARIANCES)
        real = real_dtype(self.dtype)
        parts = [
            (z * s.astype(real_dtype(z.dtype))).astype(self.dtype)
            for z, s in zip(normals, scales, strict=False)
        ]
        if not use_levy:
            return parts[0]
        return self.levy_area(dt.astype(real), *parts)
