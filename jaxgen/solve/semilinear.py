r"""The semi-linear term that the fast solvers integrate, and what such a solver must provide.

Every prediction kind is linear in state and output: with x' = x - mu, noise and data are

    noise = a x' + b out',     data' = a x' + b out'                                        (1)

with coefficients (a, b) of the level alone. A solver on this term is therefore a set of numbers for
each interval of a grid (``coefficients``), made of the levels around it (``Window``) and known
before the loop runs, and a cheap step that uses them (``advance``).

The term is integrated *forwards* in the progress u from 0 (noise) to 1 (data): diffrax negates
time on a backward solve, and log-SNR may be infinite at both ends and start at another level for
each sample. Times, levels and noise are read through the term; nothing else knows the schedule.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

from jaxgen.core.arrays import at_least_f32, cast_coefficient
from jaxgen.process.linear import LinearSDE
from jaxgen.score.prediction import convert
from jaxgen.solve.terms import FieldCall

__all__ = ["GridSolver", "Level", "SemiLinearTerm", "Window", "tabulate"]


class Level(NamedTuple):
    """A noise level; every entry is ``()``, or ``(batch,)`` where samples differ.

    Attributes:
      t: time.
      alpha: signal coefficient.
      sigma: noise coefficient.
      alpha_dot: time derivative of ``alpha``.
      sigma_dot: time derivative of ``sigma``.
      lam: ``log(alpha / sigma)``, half of log-SNR.
    """

    t: jax.Array
    alpha: jax.Array
    sigma: jax.Array
    alpha_dot: jax.Array
    sigma_dot: jax.Array
    lam: jax.Array


class Window(NamedTuple):
    """The levels around one interval, for a solver that looks back ``depth`` knots.

    Attributes:
      past: entries ``(depth, ...)``, newest first: the level at the interval's start, then those at
        the starts of the intervals before it, the first knot again where there are none.
      last: the level at the interval's end.
      begun: intervals begun, this one among them; int32 ``()``.
      left: intervals left, this one among them; int32 ``()``.
    """

    past: Level
    last: Level
    begun: jax.Array
    left: jax.Array

    @property
    def first(self) -> Level:
        """The level at the interval's start."""
        return self.at(0)

    def at(self, j: int) -> Level:
        """The level at the start of the ``j``-th interval before this one."""
        return Level(*(v[j] for v in self.past))


class SemiLinearTerm(diffrax.AbstractTerm):
    """The probability flow of a field in the progress u (module docstring).

    Attributes:
      call: the field.
      sde: the process.
      times: knots from noise to data, ``(steps + 1,)`` or ``(steps + 1, batch)``; knot ``n`` is at
        ``u = n / steps`` and time is linear in between.
      path: where solvers with noise take it, over [0, 1]; ``None`` for the deterministic ones.
      prediction: what the field predicts.
      ends: whether log-SNR is finite at the first and the last knot; ``None`` where that is not
        known at trace time.
    """

    call: FieldCall
    sde: LinearSDE
    times: jax.Array
    path: diffrax.AbstractBrownianPath | None
    prediction: str = eqx.field(static=True)
    ends: tuple[bool | None, bool | None] = eqx.field(static=True, default=(None, None))

    @property
    def steps(self) -> int:
        """Number of intervals."""
        return self.times.shape[0] - 1

    # --- levels ---------------------------------------------------------------------------------

    def level_at(self, t: jax.Array) -> Level:
        """The level of a time, of any shape."""
        return Level(t, *self.sde.rates(t), 0.5 * self.sde.log_snr(t))

    def time(self, u: jax.Array) -> jax.Array:
        """Time at progress ``u``, exact at the knots' ends."""
        position = jnp.clip(u, 0, 1) * self.steps
        n = jnp.clip(jnp.floor(position), 0, self.steps - 1).astype(jnp.int32)
        share = (position - n).astype(self.times.dtype)
        return (1 - share) * self.times[n] + share * self.times[n + 1]

    def level(self, u: jax.Array) -> Level:
        """The level at progress ``u``."""
        return self.level_at(self.time(u))

    # --- the field, linearly ----------------------------------------------------------------------

    def conversion(self, level: Level, target: str) -> tuple[jax.Array, jax.Array]:
        """``(a, b)`` of equation (1): ``target = a x' + b out'`` for the field's output."""
        one, zero = jnp.ones_like(level.t), jnp.zeros_like(level.t)
        if target == self.prediction:
            return zero, one
        plain = dataclasses.replace(self.sde, mu=None)
        return (
            convert(zero, one, level.t, plain, self.prediction, target),
            convert(one, zero, level.t, plain, self.prediction, target),
        )

    def output(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """The field's output, centred (``out'`` of equation (1)): one call of the field."""
        out = self.call(x, t)
        return self.centred(out) if self.prediction == "data" else out

    def centred(self, x: jax.Array) -> jax.Array:
        """``x - mu``."""
        mu = self._mu(x)
        return x if mu is None else x - mu

    def one_call(
        self,
        x: jax.Array,
        numbers: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
        noise: tuple[jax.Array, jax.Array] | None,
    ) -> jax.Array:
        """``a x + b f(x, t) + s dw``, the step of solvers that call the field once, like ``x``.

        Args:
          x: the state.
          numbers: ``(t, a, b, s)``, each ``()`` or ``(batch,)``.
          noise: scale and increment of the path, ``None`` without noise.
        """
        t, a, b, spread = numbers
        pairs = [(b, self.output(x, t))]
        if noise is not None:
            scale, increment = noise
            pairs.append((spread * scale, increment))
        return self.combine(x, a, *pairs)

    def combine(self, x: jax.Array, a: jax.Array, *pairs: tuple[jax.Array, jax.Array]) -> jax.Array:
        """``mu + a (x - mu) + sum b out'`` over the pairs ``(b, out')``, like ``x``."""
        mu = self._mu(x)
        total = cast_coefficient(a, x) * self.centred(x)
        for b, out in pairs:
            total = total + cast_coefficient(b, x) * out
        return total if mu is None else mu + total

    def _mu(self, x: jax.Array) -> jax.Array | None:
        mu = self.sde.centre(x)
        return None if mu is None else mu.astype(x.dtype)

    def noise(self, u0: jax.Array, u1: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Noise of an interval as ``(scale, dW)`` with ``scale dW ~ N(0, I)``."""
        if self.path is None:
            raise ValueError("this solver draws noise; its SemiLinearTerm needs a Brownian path")
        return jax.lax.rsqrt(u1 - u0), self.path.evaluate(u0, u1)

    # --- as diffrax sees it -----------------------------------------------------------------------

    def vf(self, t: Any, y: jax.Array, args: Any) -> jax.Array:
        """``dx/du`` of the probability flow."""
        del args
        time, slope = jax.jvp(self.time, (t,), (jnp.ones_like(t),))
        level = self.level_at(time)
        a, b = self.conversion(level, "velocity")
        out = self.output(y, time)
        return cast_coefficient(slope, y) * self.centred(self.combine(y, a, (b, out)))

    def contr(self, t0: Any, t1: Any, **kwargs: Any) -> jax.Array:
        """The step in ``u``."""
        del kwargs
        return t1 - t0

    def prod(self, vf: jax.Array, control: jax.Array) -> jax.Array:
        """Their product."""
        return cast_coefficient(control, vf) * vf


class GridSolver(diffrax.AbstractItoSolver):
    """A solver on a ``SemiLinearTerm``: numbers for each interval, and a step that uses them.

    Subclasses give ``coefficients`` and ``advance``, and where they need them ``depth`` and
    ``start`` (history), ``check`` and ``calls``. ``step`` computes the numbers on the way, for
    ``diffeqsolve``; the scan driver computes them for all intervals at once (``tabulate``). Marked
    as an Ito solver; noise is additive, so it is one of Stratonovich's kind too.
    """

    term_structure: ClassVar = SemiLinearTerm
    interpolation_cls: ClassVar[Callable[..., diffrax.LocalLinearInterpolation]] = (
        diffrax.LocalLinearInterpolation
    )

    @property
    def name(self) -> str:
        """What a result says it was made with."""
        return type(self).__name__

    @property
    def is_noisy(self) -> bool:
        """Whether a step draws noise."""
        return False

    @property
    def stages(self) -> int:
        """Field evaluations of a whole step."""
        return 1

    @property
    def depth(self) -> int:
        """Knots that ``coefficients`` sees: the interval's start and those before it."""
        return 1

    def times(self, sde: LinearSDE) -> jax.Array | None:
        """The grid that the solver is made for; ``None`` where any serves."""
        del sde
        return None

    def check(self, term: SemiLinearTerm) -> None:
        """Refuse a term that this solver cannot serve, at trace time.

        Raises:
          ValueError: why it cannot.
        """
        del term

    @abc.abstractmethod
    def coefficients(self, term: SemiLinearTerm, window: Window) -> Any:
        """The numbers of the step over the window's interval, a pytree."""

    @abc.abstractmethod
    def advance(
        self,
        term: SemiLinearTerm,
        numbers: Any,
        noise: tuple[jax.Array, jax.Array] | None,
        x: jax.Array,
        state: Any,
        is_full: bool | None = None,
    ) -> tuple[jax.Array, Any]:
        """One step: ``(x, state)`` at the interval's end.

        Args:
          term: calls the field and combines.
          numbers: what ``coefficients`` gave.
          noise: ``term.noise`` of the interval, ``None`` for a solver without noise or for its
            deterministic part.
          x: state, ``(batch, *event)`` or one example, float32 or wider.
          state: what ``start`` or the last step gave.
          is_full: for a solver that leaves out part of its first or last step: whether this step
            is whole; ``None`` where only the numbers tell.
        """

    def start(self, term: SemiLinearTerm, x: jax.Array) -> Any:
        """The solver's own state before the first step."""
        del term, x
        return None

    def calls(self, term: SemiLinearTerm, numbers: Any) -> jax.Array:
        """Field evaluations of the whole grid, int32; ``numbers`` have the intervals in front."""
        del numbers
        return jnp.asarray(self.stages * term.steps, jnp.int32)

    def plan(self, term: SemiLinearTerm) -> Sequence[tuple[int, bool | None]]:
        """Runs of steps as ``(count, is_full)``; see ``advance``."""
        return [(term.steps, None)]

    def additive_noise(self, numbers: Any) -> jax.Array | None:
        """Standard deviation of noise that a step adds last; ``None`` where it does not."""
        del numbers
        return None

    # --- as diffrax sees it -----------------------------------------------------------------------

    def init(self, terms: Any, t0: Any, t1: Any, y0: jax.Array, args: Any) -> Any:
        """The state before the first step: the solver's own, the levels passed, their number."""
        del t1, args
        term = _unwrap(terms)
        self.check(term)
        past = jax.tree.map(lambda v: jnp.stack([v] * self.depth), term.level(t0))
        return self.start(term, y0), past, jnp.zeros((), jnp.int32)

    def step(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: jax.Array,
        args: Any,
        solver_state: Any,
        made_jump: Any,
    ) -> tuple[jax.Array, None, dict[str, jax.Array], Any, Any]:
        """One step of ``diffeqsolve``, over any interval of progress."""
        del args, made_jump
        term = _unwrap(terms)
        own, past, count = solver_state
        first = term.level(t0)
        past = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b[:-1]]), first, past)
        left = jnp.maximum(jnp.round((1 - t0) * term.steps), 1).astype(jnp.int32)
        numbers = self.coefficients(term, Window(past, term.level(t1), count + 1, left))
        noise = term.noise(t0, t1) if self.is_noisy else None
        y1, own = self.advance(term, numbers, noise, y0, own)
        state = own, past, count + 1
        return y1, None, {"y0": y0, "y1": y1}, state, diffrax.RESULTS.successful

    def func(self, terms: Any, t0: Any, y0: jax.Array, args: Any) -> jax.Array:
        """The vector field of the term."""
        return terms.vf(t0, y0, args)


def _unwrap(term: Any) -> SemiLinearTerm:
    """The term inside diffrax's wrapper for the direction of time, which is forwards here."""
    while not isinstance(term, SemiLinearTerm):
        term = term.term
    return term


def tabulate(term: SemiLinearTerm, solver: GridSolver) -> Any:
    """The solver's numbers for every interval of the term's grid, with the intervals in front."""
    solver.check(term)
    steps = term.steps
    levels = term.level_at(term.times)

    def back(v: jax.Array) -> jax.Array:
        """The knots before each interval, ``(steps, depth, ...)``."""
        rows = [v[:-1]]
        for _ in range(1, solver.depth):
            rows.append(jnp.concatenate([v[:1], rows[-1][:-1]]))
        return jnp.stack(rows, axis=1)

    n = jnp.arange(steps, dtype=jnp.int32)
    past, last = Level(*map(back, levels)), Level(*(v[1:] for v in levels))
    windows = Window(past, last, n + 1, steps - n)
    return jax.vmap(lambda window: solver.coefficients(term, window))(windows)


def knots(term: SemiLinearTerm) -> tuple[Level, Level]:
    """Levels at the intervals' starts and ends, with the intervals in front."""
    levels = term.level_at(term.times)
    return Level(*(v[:-1] for v in levels)), Level(*(v[1:] for v in levels))


def progress_grid(steps: int, dtype: Any) -> jax.Array:
    """The knots in ``u``, ``(steps + 1,)``."""
    return jnp.arange(steps + 1, dtype=at_least_f32(dtype)) / steps
