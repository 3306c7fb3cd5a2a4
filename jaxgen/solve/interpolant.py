r"""Along a stochastic interpolant: the flow and the SDEs of any noise level, in both directions.

With the fields b and s = grad log rho_t of an interpolant and any epsilon(t) >= 0 (Albergo, Boffi
and Vanden-Eijnden, arXiv 2303.08797, theorem 2.6 and corollaries),

    forward    dX = (b + epsilon s) dt + sqrt(2 epsilon) dW         from X_0 ~ rho_0         (1)
    backward   dX = (b - epsilon s) dt + sqrt(2 epsilon) dW-bar     from X_1 ~ rho_1, dt < 0 (2)

both have the marginals rho_t; epsilon = 0 is the probability flow. epsilon is half the squared
diffusion, and is chosen after training. A velocity v = E[dI/dt | x] and noise e = E[z | x], which
are what is easily learnt, enter as

    b = v - gamma gamma' s,   s = -e / gamma                                                 (3)

with their coefficients added up before the division by gamma: gamma' is infinite at the ends of
time for the Brownian gamma, gamma gamma' is not, and epsilon = gamma gamma' cancels the score in
(1). Networks that were divided by gamma want times a little inside [0, 1].
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import batch_event, cast_coefficient, safe_sqrt
from jaxgen.process.interpolant import Interpolant
from jaxgen.score.prediction import Field
from jaxgen.solve.drivers import Driven, rising, scan_terms, solve_one
from jaxgen.solve.noise import Brownian, is_sde_solver, sample_keys, sample_path
from jaxgen.solve.state import _nonfinite
from jaxgen.solve.terms import FieldCall, on_single, with_batch_of

__all__ = [
    "DIRECTIONS",
    "Epsilon",
    "InterpolantSample",
    "Marginal",
    "interpolant_sample",
    "interpolant_terms",
    "is_noisy",
    "marginal",
    "travel_times",
]

DIRECTIONS = ("forward", "backward")

Epsilon = ArrayLike | Callable[[jax.Array], jax.Array]


class Marginal(eqx.Module):
    """The fields of an interpolant as a solver needs them, whatever kinds the networks are.

    Attributes:
      velocity: b or v; ``None`` for v = 0.
      other: score or noise; ``None`` without.
      interp: the interpolant.
      kinds: what the two are.
      epsilon: ``f(t)`` or a number.
    """

    velocity: FieldCall | None
    other: FieldCall | None
    interp: Interpolant
    kinds: tuple[str, str] = eqx.field(static=True)
    epsilon: Any

    def diffusion(self, t: Any) -> jax.Array:
        """``epsilon(t)``, of ``t``'s shape; NaN where it is negative."""
        t = jnp.asarray(t)
        value = self.epsilon(t) if callable(self.epsilon) else self.epsilon
        value = jnp.broadcast_to(jnp.asarray(value, t.dtype), t.shape)
        is_fine = value >= 0
        if callable(self.epsilon) or isinstance(self.epsilon, jax.core.Tracer):
            checks.debug_check(jnp.all(is_fine), "epsilon is negative: {value}", value=value)
        # Its root would be taken for zero, and the drift would not.
        return jnp.where(is_fine, value, jnp.nan)

    @property
    def needs_both(self) -> bool:
        """Whether b takes both fields, equation (3)."""
        return self.kinds[0] == "v" and self.interp.has_noise and not self.interp.one_sided

    def factor(self, t: jax.Array, wanted: jax.Array) -> jax.Array:
        """``wanted`` times the score as a multiple of the second field, of ``t``'s shape."""
        if self.kinds[1] == "score":
            return wanted
        level, _ = self.interp.noise_rates(t)
        # Nothing of it stays nothing where the level is zero.
        nothing = wanted == 0
        return jnp.where(nothing, 0.0, -wanted / jnp.where(nothing, 1.0, level))

    def excess(self, t: jax.Array) -> jax.Array:
        """The multiple of the score that makes b of the first field, equation (3)."""
        return -self.interp.gamma_gamma_dot(t) if self.needs_both else jnp.zeros_like(t)

    def first(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """The first field; zero for ``mirror`` without one."""
        return jnp.zeros_like(x) if self.velocity is None else self.velocity(x, t)

    def second(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """The second field."""
        assert self.other is not None
        return self.other(x, t)

    def drift(self, x: jax.Array, t: jax.Array, sign: float, is_sde: bool) -> jax.Array:
        """``b + sign epsilon s``, with the two multiples of the score added up first."""
        if not (is_sde or self.needs_both):
            return self.first(x, t)
        t = jnp.asarray(t)
        wanted = self.excess(t) + (sign * self.diffusion(t) if is_sde else 0.0)
        return self.first(x, t) + cast_coefficient(self.factor(t, wanted), x) * self.second(x, t)

    def b(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """The velocity of the flow."""
        return self.drift(x, t, 0.0, False)


class _Drift(eqx.Module):
    """The drift of (1) or (2), as diffrax calls it."""

    fields: Marginal
    sign: float = eqx.field(static=True)
    is_sde: bool = eqx.field(static=True)

    def __call__(self, t: Any, x: jax.Array, args: Any) -> jax.Array:
        del args
        return self.fields.drift(x, jnp.asarray(t), self.sign, self.is_sde)


class _Diffusion(eqx.Module):
    """``sqrt(2 epsilon)``: a diagonal operator."""

    fields: Marginal

    def __call__(self, t: Any, x: jax.Array, args: Any) -> lx.DiagonalLinearOperator:
        del args
        g = cast_coefficient(safe_sqrt(2 * self.fields.diffusion(t)), x)
        return lx.DiagonalLinearOperator(jnp.broadcast_to(g, x.shape).astype(x.dtype))


def is_noisy(epsilon: Epsilon) -> bool:
    """Whether the solve is an SDE's: not for an epsilon that is known to be the number zero.

    Raises:
      ValueError: a known epsilon that is negative or no number, or an array of them.
    """
    if callable(epsilon):
        return True
    if jnp.shape(epsilon) != ():
        raise ValueError(f"epsilon has shape {jnp.shape(epsilon)}; expected a number or f(t)")
    known = checks.concrete(epsilon)
    if known is None:
        return True
    if not (float(known) >= 0 and math.isfinite(float(known))):
        raise ValueError(f"epsilon is {float(known)}; expected a finite number of at least 0")
    return float(known) > 0


def marginal(
    b: Field | None,
    s: Field | None,
    interp: Interpolant,
    epsilon: Epsilon = 0.0,
    kinds: tuple[str, str] = ("b", "score"),
    event_ndim: int | None = None,
    dtype: DTypeLike | None = None,
) -> Marginal:
    """The fields, checked; see ``interpolant_terms``."""
    if len(kinds) != 2:
        raise ValueError(f"kinds is {kinds!r}; expected two names, such as ('v', 'noise')")
    checks.one_of("kinds[0]", kinds[0], ("b", "v"))
    checks.one_of("kinds[1]", kinds[1], ("score", "noise"))
    noisy = is_noisy(epsilon)
    if b is None:
        if interp.kind != "mirror":
            raise ValueError(
                f"b is None for the interpolant {interp.kind!r}; only mirror needs none"
            )
        kinds = ("v", kinds[1])
    needs_s = kinds[0] == "v" and interp.has_noise and not interp.one_sided
    if s is None and (noisy or needs_s):
        why = "epsilon above 0" if noisy else "kinds[0] 'v' of an interpolant with noise"
        raise ValueError(f"s is None with {why}; expected a score or noise field")
    if noisy and not interp.has_noise:
        raise ValueError(
            f"epsilon is not 0 and the interpolant {interp.kind!r} has gamma zero, so no score; "
            "expected epsilon 0"
        )
    return Marginal(
        None if b is None else FieldCall(b, event_ndim, dtype),
        None if s is None else FieldCall(s, event_ndim, dtype),
        jax.tree.map(jnp.asarray, interp),
        (kinds[0], kinds[1]),
        epsilon if callable(epsilon) else jnp.asarray(epsilon),
    )


def interpolant_terms(
    b: Field | None,
    s: Field | None,
    interp: Interpolant,
    path: diffrax.AbstractBrownianPath | None = None,
    *,
    epsilon: Epsilon = 0.0,
    direction: str = "forward",
    kinds: tuple[str, str] = ("b", "score"),
    event_ndim: int | None = None,
    dtype: DTypeLike | None = None,
) -> Any:
    """Diffrax terms in raw time of the flow or the SDE, equations (1) and (2).

    Forward terms go from t = 0 to 1, backward ones with ``diffeqsolve(t0=1, t1=0, dt0<0)``.

    Args:
      b: velocity field ``f(x, t) -> like x``, called with ``t`` of shape ``(batch,)``, or ``()``
        for one example. ``None`` for ``mirror``, whose velocity is a multiple of the score.
      s: score field; ``None`` will do if ``epsilon`` is 0.
      interp: the interpolant.
      path: a Brownian path of the state's shape and dtype, for ``epsilon`` other than 0.
      epsilon: half the squared diffusion: a number, traced or not, or ``f(t)``; at least 0, NaN
        comes of less. The Python number 0 gives the flow, an ``ODETerm``.
      direction: ``"forward"`` or ``"backward"``; of the flow's term both are the same.
      kinds: what ``b`` and ``s`` are: ``"b"`` or ``"v"``, and ``"score"`` or ``"noise"``.
      event_ndim: ``None`` for a batched state; the state's ``ndim`` for one example.
      dtype: what the fields are called in, if not the state's dtype.

    Returns:
      An ``ODETerm``, or a ``MultiTerm`` of one and a ``ControlTerm`` with a diagonal operator.

    Raises:
      ValueError: an unknown name, a negative ``epsilon`` (where known), an ``epsilon`` other than 0
        without a score or without a path, or for an interpolant without noise.

    Diffrax 0.7.2 runs its stochastic Runge-Kutta solvers (``AbstractSRK``) the wrong way on a
    backward solve; ``interpolant_sample`` serves them.

    Example:
      >>> import diffrax, jax.numpy as jnp
      >>> from jaxgen.process.interpolant import interpolant
      >>> from jaxgen.score.closed_form import two_mixtures
      >>> one = (jnp.ones(1), jnp.zeros((1, 2)), jnp.ones(1))
      >>> law = two_mixtures(interpolant("linear"), one, one)
      >>> term = interpolant_terms(law.b, law.score, law.interp)
      >>> end = diffrax.diffeqsolve(
      ...     term, diffrax.Heun(), t0=0.0, t1=1.0, dt0=0.1, y0=jnp.ones((3, 2)))
      >>> end.ys.shape
      (1, 3, 2)
    """
    checks.one_of("direction", direction, DIRECTIONS)
    fields = marginal(b, s, interp, epsilon, kinds, event_ndim, dtype)
    sign = 1.0 if direction == "forward" else -1.0
    noisy = is_noisy(epsilon)
    drift = diffrax.ODETerm(_Drift(fields, sign, noisy))
    if not noisy:
        return drift
    if path is None:
        raise ValueError("path is None with epsilon other than 0; expected a Brownian path")
    return diffrax.MultiTerm(drift, diffrax.ControlTerm(_Diffusion(fields), path))


# --- sampling -------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InterpolantSample:
    """States at the other end of an interpolant, and what they were made with.

    Attributes:
      x: like ``x_init``; NaN where ``result`` is not successful.
      nfe: evaluations of the drift, int32, ``()`` or ``(batch,)``; -1 where the solver does not
        tell. Each calls the velocity once and, where the score is in it, the score once.
      result: ``diffrax.RESULTS``, ``()`` or ``(batch,)``; ``nonfinite`` where ``x`` is.
      times: the grid in order of travel, ``(steps + 1,)``; its two ends under a controller.
      solver: the solver's class (static).
      direction: ``"forward"`` or ``"backward"`` (static).
    """

    x: jax.Array
    nfe: jax.Array
    result: Any
    times: jax.Array
    solver: str = dataclasses.field(metadata={"static": True})
    direction: str = dataclasses.field(metadata={"static": True})


def travel_times(
    t_min: ArrayLike, t_max: ArrayLike, steps: int, direction: str, dtype: DTypeLike
) -> jax.Array:
    """``steps + 1`` equal times in order of travel, checked where they are known."""
    checks.positive_int("steps", steps)
    low, high = checks.concrete(t_min), checks.concrete(t_max)
    if low is not None and high is not None and not 0 <= float(low) < float(high) <= 1:
        raise ValueError(
            f"t_min is {float(low)} and t_max {float(high)}; expected 0 <= t_min < t_max <= 1"
        )
    start, stop = (t_min, t_max) if direction == "forward" else (t_max, t_min)
    return jnp.linspace(jnp.asarray(start, dtype), jnp.asarray(stop, dtype), steps + 1)


def _grid(grid: ArrayLike, direction: str, dtype: DTypeLike) -> jax.Array:
    times = jnp.asarray(grid, dtype)
    if times.ndim != 1 or times.shape[0] < 2:
        raise ValueError(f"grid has shape {times.shape}; expected (steps + 1,)")
    known = checks.concrete(times)
    if known is not None:
        steps = np.diff(known) if direction == "forward" else -np.diff(known)
        if not (steps > 0).all() or not (known.min() >= 0 and known.max() <= 1):
            order = "rise" if direction == "forward" else "fall"
            raise ValueError(f"grid is {known}; expected times in [0, 1] that {order}")
    return times


def interpolant_sample(
    key: jax.Array | None,
    b: Field | None,
    s: Field | None,
    interp: Interpolant,
    x_init: ArrayLike,
    *,
    epsilon: Epsilon = 0.0,
    steps: int = 100,
    direction: str = "forward",
    kinds: tuple[str, str] = ("b", "score"),
    solver: diffrax.AbstractSolver | None = None,
    t_min: ArrayLike = 0.0,
    t_max: ArrayLike = 1.0,
    grid: ArrayLike | None = None,
    controller: diffrax.AbstractStepSizeController | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    brownian: Brownian = None,
    max_steps: int = 4096,
    event_ndim: int | None = None,
    first_index: ArrayLike = 0,
) -> InterpolantSample:
    """Carry states from one end of an interpolant to the other (module docstring).

    The first ``k`` results of a batch of ``n`` are the same whatever ``n``, the number of devices
    and the sharding, to rounding.

    Args:
      key: typed key of the SDE's noise; sample ``i`` draws from keys folded with
        ``first_index + i``. ``None`` serves the flow.
      b: velocity field; see ``interpolant_terms``, as for ``s``, ``epsilon`` and ``kinds``.
      s: score field.
      interp: the interpolant.
      x_init: states ``(batch, *event)`` at t = 0, or at t = 1 for ``"backward"``; one example if
        ``event_ndim=x_init.ndim``.
      epsilon: half the squared diffusion.
      steps: equal steps of the grid; under a controller the first is 1/steps of the way.
      direction: ``"forward"`` or ``"backward"``.
      kinds: what ``b`` and ``s`` are.
      solver: a diffrax solver: an Ito or Stratonovich one for ``epsilon`` other than 0. ``None`` is
        Euler-Maruyama there; Heun for the flow, or Dopri5 under a controller.
      t_min: first time. Networks that are divided by gamma (a score from noise, or a learnt score)
        want about 1e-3 here, and 1 - 1e-3 for
      t_max: last time.
      grid: times in order of travel, ``(steps + 1,)``, instead of ``steps`` equal ones.
      controller: a diffrax step-size controller, for each sample its own steps;
        ``diffrax.PIDController(rtol=1e-5, atol=1e-5)`` for the flow.
      adjoint: a diffrax adjoint; this, ``controller`` and ``brownian`` choose ``diffeqsolve``.
      brownian: as in ``solve.sample``.
      max_steps: bound on the steps under a controller.
      event_ndim: see ``x_init``.
      first_index: number of the first sample, for a batch drawn in parts.

    Returns:
      An ``InterpolantSample``.

    Raises:
      ValueError: as ``interpolant_terms``; known times out of order or of [0, 1]; an SDE with a
        solver of ODEs; a controller for a solver without an error estimate.
      TypeError: a raw key, none for an SDE, integer states, or something that is no solver.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxgen.process.interpolant import interpolant
      >>> from jaxgen.score.closed_form import two_mixtures
      >>> at = lambda m: (jnp.ones(1), jnp.full((1, 2), m), jnp.full(1, 0.1))
      >>> law = two_mixtures(interpolant("linear"), at(0.0), at(3.0))
      >>> out = interpolant_sample(
      ...     jax.random.key(0), law.b, law.score, law.interp, jnp.zeros((4, 2)), epsilon=0.5,
      ...     steps=50)
      >>> out.x.shape, int(out.nfe)
      ((4, 2), 50)
    """
    checks.one_of("direction", direction, DIRECTIONS)
    x = checks.floating("x_init", x_init)
    batch, event = batch_event(x, event_ndim)
    dtype, wide = x.dtype, jnp.promote_types(x.dtype, jnp.float32)
    x = x.astype(wide)
    noisy = is_noisy(epsilon)
    if grid is None:
        times = travel_times(t_min, t_max, steps, direction, wide)
    else:
        times = _grid(grid, direction, wide)
    steps = times.shape[0] - 1
    if solver is None:
        solver = diffrax.Euler() if noisy else diffrax.Heun()
        if controller is not None and not noisy:
            solver = diffrax.Dopri5()
    if not isinstance(solver, diffrax.AbstractSolver):
        raise TypeError(f"solver is {solver!r}; expected a diffrax solver")
    if noisy and not is_sde_solver(solver):
        raise ValueError(
            f"solver {type(solver).__name__} is for ODEs and epsilon is not 0; expected an Ito or "
            "Stratonovich solver such as diffrax.Euler()"
        )
    is_adaptive = isinstance(controller, diffrax.AbstractAdaptiveStepSizeController)
    if is_adaptive and not isinstance(solver, diffrax.AbstractAdaptiveSolver):
        raise ValueError(
            f"controller is adaptive and solver {type(solver).__name__} estimates no error; "
            "expected an adaptive one, or diffrax.HalfSolver around it"
        )
    if noisy and key is None:
        raise TypeError("key is None with epsilon other than 0; expected a typed key")
    # Diffrax goes backwards by negated time: so do the terms here, whose solvers then all agree.
    is_backward = direction == "backward"
    clock = -times if is_backward else times
    field_dtype = dtype if dtype != wide else None

    def terms(own_b: Any, own_s: Any, own_key: Any, x: jax.Array, ndim: int | None) -> Any:
        path = None
        if noisy:
            path = sample_path(solver, own_key, event, x, steps, clock, brownian, controller)
        raw = interpolant_terms(
            own_b,
            own_s,
            interp,
            path,
            epsilon=epsilon,
            direction=direction,
            kinds=kinds,
            event_ndim=ndim,
            dtype=field_dtype,
        )
        return rising(raw) if is_backward else raw

    own_keys = sample_keys(keys.check(key), batch, first_index) if noisy else None
    uses_diffeq = any(v is not None for v in (controller, adjoint, brownian))
    if not uses_diffeq:
        driven = scan_terms(terms(b, s, own_keys, x, None if batch else x.ndim), solver, clock, x)
    else:
        wrapped = controller.wrap(-1) if controller is not None and is_backward else controller

        def one(x: jax.Array, own_key: Any) -> Driven:
            own_b, own_s = (f if f is None or not batch else on_single(f) for f in (b, s))
            return solve_one(
                terms(own_b, own_s, own_key, x, x.ndim),
                solver,
                clock,
                x,
                controller=wrapped,
                adjoint=adjoint,
                max_steps=max_steps,
            )

        driven = jax.vmap(one)(*with_batch_of(x, (x, own_keys))) if batch else one(x, own_keys)
    return InterpolantSample(
        x=driven.x.astype(dtype),
        nfe=driven.nfe,
        result=_nonfinite(driven.x, driven.result, batch),
        times=times[jnp.array([0, -1])] if is_adaptive else times,
        solver=type(solver).__name__,
        direction=direction,
    )
