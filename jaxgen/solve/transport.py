r"""Data to latent code and back by the probability-flow ODE, with adaptive steps per example.

``dx/dt = f(x, t) - g(t)^2 s(x, t)/2`` (Song et al., ICLR 2021, arXiv 2011.13456, equation (13) and
section 4.3) has the marginals of the process; forward in time it takes data at ``t_min`` to codes
at ``t_max``, backward codes to data, each uniquely.

The solve of one example, which ``likelihood`` shares, is here too: diffrax with ``throw=False``,
mapped over the batch so that each example has its own step size, and NaN where it failed.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import checks
from jaxgen.core.arrays import at_least_f32, batch_event, safe_sqrt, strong_scalar
from jaxgen.process.linear import LinearSDE
from jaxgen.score.prediction import PREDICTIONS, Field
from jaxgen.solve.terms import map_samples, on_single, probability_flow

__all__ = [
    "Plan",
    "Transport",
    "decode",
    "encode",
    "integrate",
    "map_examples",
    "plan_solve",
    "real_state",
    "time_span",
]

# A step below this share of the span is a solve that has failed (a NaN field shrinks it for ever).
_SMALLEST_STEP = 1e-9


class Transport(NamedTuple):
    """What ``encode`` and ``decode`` return.

    Attributes:
      x: the state at the other end of the flow, like the input; NaN where the solve failed.
      nfe: field evaluations, int32, ``(batch,)`` or ``()``.
      result: diffrax's ``RESULTS``, of shape ``nfe.shape``.
    """

    x: jax.Array
    nfe: jax.Array
    result: diffrax.RESULTS


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one example is solved; shared by the batch."""

    solver: diffrax.AbstractERK
    adjoint: diffrax.AbstractAdjoint
    max_steps: int
    rtol: Any
    atol: Any


class _Controller(diffrax.PIDController):
    """A controller whose first step is finite even where the field is not, so that it can end."""

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        dt, state = super().init(terms, t0, t1, y0, dt0, args, func, error_order)
        return jnp.where(jnp.isfinite(dt), jnp.minimum(dt, t1 - t0), t1 - t0), state


def _largest_rms(state: Any) -> jax.Array:
    """The largest root mean square among the leaves; infinite for NaN, a step to be rejected."""
    squares = jnp.stack([jnp.mean(leaf**2) for leaf in jax.tree.leaves(state)])
    largest = jnp.max(squares)
    return jnp.where(jnp.isnan(largest), jnp.inf, safe_sqrt(largest))


def _evaluations(solver: diffrax.AbstractERK, steps: jax.Array) -> jax.Array:
    """Evaluations of ``steps`` attempted steps, with the two that choose the first step size."""
    tableau: Any = solver.tableau
    fsal, stages = bool(tableau.fsal), len(tableau.b_sol)
    return (2 + fsal + (stages - fsal) * steps).astype(jnp.int32)


def integrate(
    term: diffrax.ODETerm, state: Any, t0: jax.Array, t1: jax.Array, plan: Plan
) -> tuple[Any, jax.Array, diffrax.RESULTS]:
    """Solve for one example: final state (NaN where it failed), evaluations, result."""
    controller = _Controller(
        rtol=plan.rtol,
        atol=plan.atol,
        norm=_largest_rms,
        dtmin=_SMALLEST_STEP * jnp.abs(t1 - t0),
        force_dtmin=False,
    )
    solution = diffrax.diffeqsolve(
        term,
        plan.solver,
        t0=t0,
        t1=t1,
        dt0=None,
        y0=state,
        stepsize_controller=controller,
        adjoint=plan.adjoint,
        max_steps=plan.max_steps,
        throw=False,
    )
    end = jax.tree.map(lambda leaf: leaf[-1], solution.ys)
    finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(end)])
    okay = (solution.result == diffrax.RESULTS.successful) & jnp.all(finite)
    end = jax.tree.map(lambda leaf: jnp.where(okay, leaf, jnp.nan), end)
    return end, _evaluations(plan.solver, solution.stats["num_steps"]), solution.result


def plan_solve(solver: Any, adjoint: Any, max_steps: Any, rtol: Any, atol: Any) -> Plan:
    """The arguments of a solve, checked and with their defaults; see ``encode``."""
    solver = diffrax.Tsit5() if solver is None else solver
    if (
        not isinstance(solver, diffrax.AbstractERK)
        or getattr(solver.tableau, "b_error", None) is None
    ):
        raise TypeError(
            f"solver is {solver!r}; expected an explicit Runge-Kutta solver of diffrax with an "
            "error estimate, such as diffrax.Tsit5()"
        )
    adjoint = diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint
    if not isinstance(adjoint, diffrax.AbstractAdjoint):
        raise TypeError(f"adjoint is {adjoint!r}; expected a diffrax adjoint")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if isinstance(value, int | float) and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; expected a finite positive number")
    return Plan(solver, adjoint, checks.positive_int("max_steps", max_steps), rtol, atol)


def time_span(sde: LinearSDE, t_min: Any, t_max: Any) -> tuple[Any, Any]:
    """The ends of time, checked where they are known."""
    low = sde.t_min if t_min is None else strong_scalar(t_min)
    high = sde.t_max if t_max is None else strong_scalar(t_max)
    known = [checks.concrete(t) for t in (sde.t_min, low, high, sde.t_max)]
    first, a, b, last = (None if t is None else float(t) for t in known)
    for name, t in (("t_min", a), ("t_max", b)):
        if t is not None and first is not None and last is not None:
            slack = 1e-6 * (last - first)
            if not first - slack <= t <= last + slack:
                raise ValueError(f"{name} is {t}; expected a time in [{first}, {last}]")
    if a is not None and b is not None and not a < b:
        raise ValueError(f"t_min is {a} and t_max {b}; expected t_min < t_max")
    return low, high


def real_state(name: str, x: ArrayLike, hint: str = "") -> jax.Array:
    """``x`` as an array of a real floating dtype; anything else raises ``TypeError``."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} has dtype {x.dtype}; expected a real floating dtype{hint}")
    return x


def map_examples(
    solve: Callable[..., Any],
    sde: LinearSDE,
    x: jax.Array,
    is_batched: bool,
    field: Field,
    *mapped: Any,
) -> Any:
    """``solve(field, sde, x, *mapped)`` on one example, or on each of a batch."""
    if not is_batched:
        return solve(field, sde, x, *mapped)
    single = on_single(field)
    return map_samples(lambda own, *rest: solve(single, own, *rest), sde, x, *mapped)


def _transport(
    field: Field,
    sde: LinearSDE,
    x: jax.Array,
    start: Any,
    stop: Any,
    prediction: str,
    plan: Plan,
    event_ndim: int | None,
) -> Transport:
    batch, _ = batch_event(x, event_ndim)
    wide = x.astype(at_least_f32(x.dtype))

    def solve(one_field, own, x_i):
        flow = probability_flow(one_field, own, prediction=prediction, event_ndim=x_i.ndim)
        t0, t1 = jnp.asarray(start, x_i.dtype), jnp.asarray(stop, x_i.dtype)
        return integrate(flow, x_i, t0, t1, plan)

    end, nfe, result = map_examples(solve, sde, wide, bool(batch), field)
    return Transport(end.astype(x.dtype), nfe, result)


def encode(
    field: Field,
    sde: LinearSDE,
    x: ArrayLike,
    *,
    prediction: str = "noise",
    rtol: ArrayLike = 1e-5,
    atol: ArrayLike = 1e-5,
    t_min: ArrayLike | None = None,
    t_max: ArrayLike | None = None,
    solver: diffrax.AbstractERK | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    max_steps: int = 4096,
    event_ndim: int | None = None,
) -> Transport:
    """The latent code of data: the probability-flow ODE from ``t_min`` to ``t_max``.

    Args:
      field: see ``log_likelihood``, as are the other arguments.
      sde: the process.
      x: data ``(batch, *event)``, or one example if ``event_ndim=x.ndim``.
      prediction: what the field predicts.
      rtol: relative tolerance.
      atol: absolute tolerance.
      t_min: where the data are.
      t_max: where the codes are.
      solver: an explicit Runge-Kutta solver of diffrax.
      adjoint: how gradients pass through the solve.
      max_steps: attempted steps per example.
      event_ndim: ``None`` for one batch axis, ``x.ndim`` for one example.

    Returns:
      A ``Transport``; its ``x`` is the code, which ``decode`` takes back to the data.

    Raises:
      ValueError, TypeError: as ``log_likelihood``.
    """
    checks.one_of("prediction", prediction, PREDICTIONS)
    plan = plan_solve(solver, adjoint, max_steps, rtol, atol)
    start, stop = time_span(sde, t_min, t_max)
    return _transport(field, sde, real_state("x", x), start, stop, prediction, plan, event_ndim)


def decode(
    field: Field,
    sde: LinearSDE,
    z: ArrayLike,
    *,
    prediction: str = "noise",
    rtol: ArrayLike = 1e-5,
    atol: ArrayLike = 1e-5,
    t_min: ArrayLike | None = None,
    t_max: ArrayLike | None = None,
    solver: diffrax.AbstractERK | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    max_steps: int = 4096,
    event_ndim: int | None = None,
) -> Transport:
    """Data from a latent code: the probability-flow ODE from ``t_max`` to ``t_min``.

    The inverse of ``encode`` within the tolerances, with the same arguments; ``z`` is
    ``(batch, *event)``, or one example if ``event_ndim=z.ndim``.

    Returns:
      A ``Transport``; its ``x`` is the data.

    Raises:
      ValueError, TypeError: as ``log_likelihood``.
    """
    checks.one_of("prediction", prediction, PREDICTIONS)
    plan = plan_solve(solver, adjoint, max_steps, rtol, atol)
    start, stop = time_span(sde, t_min, t_max)
    return _transport(field, sde, real_state("z", z), stop, start, prediction, plan, event_ndim)
