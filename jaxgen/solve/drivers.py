"""Two drivers of one step: a scan over a fixed grid, and diffrax's ``diffeqsolve``.

Both call the solver's own ``init`` and ``step``, so their results agree to rounding. The scan
driver compiles faster, runs at the speed of a loop written by hand, is differentiable in reverse
mode, and works inside ``jax.shard_map``. ``diffeqsolve`` brings step-size control, adjoints and any
Brownian path; every sample is then its own solve, with its own steps, count and result. Inside
``jax.shard_map`` it needs ``check_vma=False``, as do diffrax's Runge-Kutta solvers in either driver
(their stages are a loop of their own).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

from jaxgen.solve.semilinear import GridSolver, SemiLinearTerm, progress_grid, tabulate

__all__ = ["Driven", "evaluations", "rising", "scan_carry", "scan_grid", "scan_terms", "solve_one"]

Tick = Callable[[jax.Array], None] | None


class Driven(NamedTuple):
    """A driver's end.

    Attributes:
      x: final state.
      nfe: field evaluations, int32 ``()``; -1 where the solver does not tell.
      result: diffrax's result code.
    """

    x: jax.Array
    nfe: jax.Array
    result: Any


# --- counting ---------------------------------------------------------------------------------

_ONE_CALL = (
    diffrax.Euler,
    diffrax.EulerHeun,
    diffrax.ItoMilstein,
    diffrax.StratonovichMilstein,
    diffrax.LeapfrogMidpoint,
)


def evaluations(solver: diffrax.AbstractSolver) -> tuple[int, int] | None:
    """Drift evaluations of one step and once per solve; ``None`` where they vary (implicit)."""
    kind, own = type(solver), cast(Any, solver)
    if issubclass(kind, diffrax.HalfSolver):
        inner = evaluations(own.solver)
        return None if inner is None else (3 * inner[0], inner[1])
    if issubclass(kind, GridSolver):
        return own.stages, 0
    if issubclass(kind, _ONE_CALL):
        return 1, 0
    if issubclass(kind, diffrax.ReversibleHeun):
        return 1, 1
    if issubclass(kind, diffrax.AbstractERK):
        stages, is_reused = own.tableau.num_stages, own.tableau.fsal
        return (stages - 1, 1) if is_reused else (stages, 0)
    if issubclass(kind, diffrax.AbstractSRK):
        skipped = own.tableau.ignore_stage_f
        return len(own.tableau.b_sol) - (0 if skipped is None else int(skipped.sum())), 0
    return None


def _count(solver: diffrax.AbstractSolver, steps: Any) -> jax.Array:
    known = evaluations(solver)
    value = -1 if known is None else known[0] * steps + known[1]
    return jnp.asarray(value, jnp.int32)


# --- the scan driver --------------------------------------------------------------------------


def _match_varying(init: Any, like: Any) -> Any:
    """Mark the leaves of ``init`` as varying over the mesh axes that ``like``'s vary over."""

    def one(a: jax.Array, b: Any) -> jax.Array:
        missing = frozenset(getattr(b, "vma", ())) - frozenset(getattr(jax.typeof(a), "vma", ()))
        return jax.lax.pcast(a, tuple(missing), to="varying") if missing else a

    return jax.tree.map(one, init, like)


def scan_carry(body: Callable[..., Any], carry: Any, xs: Any) -> Any:
    """``lax.scan`` of a body without outputs, whose carry may vary over more axes than its start.

    The carry's varying axes are found by tracing the body once; outside ``shard_map`` there are
    none and nothing is traced twice.
    """
    length = jax.tree.leaves(xs)[0].shape[0]
    if length <= 1:
        return body(carry, jax.tree.map(lambda v: v[0], xs))[0] if length else carry
    if jax.typeof(jax.tree.leaves(carry)[0]).sharding.mesh.manual_axes:
        first = jax.tree.map(lambda v: v[0], xs)
        carry = _match_varying(carry, jax.eval_shape(lambda c: body(c, first)[0], carry))
    return jax.lax.scan(body, carry, xs)[0]


def scan_grid(term: SemiLinearTerm, solver: GridSolver, x: jax.Array, tick: Tick = None) -> Driven:
    """Scan a solver of ours over its term's grid, its numbers computed before the loop.

    Args:
      term: holds field, process, grid and noise.
      solver: steps.
      x: initial state, float32 or wider.
      tick: called in the loop after each step with its number.
    """
    u = progress_grid(term.steps, x.dtype)
    numbers = tabulate(term, solver)

    def body(carry: Any, inputs: Any, is_full: bool | None) -> tuple[Any, None]:
        x, state = carry
        n, u0, u1, own = inputs
        noise = term.noise(u0, u1) if solver.is_noisy else None
        x, state = solver.advance(term, own, noise, x, state, is_full)
        if tick is not None:
            tick(n)
        return (x, state), None

    inputs = (jnp.arange(term.steps), u[:-1], u[1:], numbers)
    carry, done = (x, solver.start(term, x)), 0
    for count, is_full in solver.plan(term):
        run = jax.tree.map(lambda v, a=done, b=done + count: v[a:b], inputs)
        carry = scan_carry(functools.partial(body, is_full=is_full), carry, run)
        done += count
    x, _ = carry
    return Driven(x, solver.calls(term, numbers), diffrax.RESULTS.successful)


class _Reversed(eqx.Module):
    """A drift of falling time t as one of rising time -t."""

    drift: Any

    def __call__(self, t: Any, y: Any, args: Any) -> Any:
        return -self.drift(-t, y, args)


class _AtFalling(eqx.Module):
    """A diffusion of falling time t as one of rising time -t."""

    diffusion: Any

    def __call__(self, t: Any, y: Any, args: Any) -> Any:
        return self.diffusion(-t, y, args)


def rising(terms: Any) -> Any:
    """Terms in raw time as terms in rising time -t; their path then is one over -t.

    Diffrax can integrate backwards by itself, but its stochastic Runge-Kutta solvers take the
    step's length for the drift's control there and so run it the wrong way (0.7.2).
    """
    if isinstance(terms, diffrax.MultiTerm):
        drift, diffusion = terms.terms
        control = diffrax.ControlTerm(_AtFalling(diffusion.vector_field), diffusion.control)
        return diffrax.MultiTerm(rising(drift), control)
    return diffrax.ODETerm(_Reversed(terms.vector_field))


def scan_terms(
    terms: Any,
    solver: diffrax.AbstractSolver,
    times: jax.Array,
    x: jax.Array,
    tick: Tick = None,
) -> Driven:
    """Scan any diffrax solver over rising times.

    Args:
      terms: what the solver takes, see ``rising``.
      solver: any solver whose terms these are.
      times: ``(steps + 1,)``, rising.
      x: initial state, float32 or wider.
      tick: called in the loop after each step with its number.
    """
    state = solver.init(terms, times[0], times[1], x, None)
    dynamic, static = eqx.partition(state, eqx.is_array)

    def body(carry: Any, inputs: Any) -> tuple[Any, None]:
        x, dynamic, code = carry
        n, t0, t1 = inputs
        state = eqx.combine(dynamic, static)
        x, _, _, state, result = solver.step(terms, t0, t1, x, None, state, jnp.asarray(False))
        code = diffrax.RESULTS.where(code == diffrax.RESULTS.successful, result, code)
        if tick is not None:
            tick(n)
        # A solver may hand back a Python bool where it took an array.
        dynamic = jax.tree.map(lambda old, new: jnp.asarray(new, old.dtype), dynamic, state)
        return (x, dynamic, code), None

    steps = times.shape[0] - 1
    code = diffrax.RESULTS.where(jnp.asarray(True), diffrax.RESULTS.successful, _FAILED)
    inputs = (jnp.arange(steps), times[:-1], times[1:])
    x, _, code = scan_carry(body, (x, dynamic, code), inputs)
    return Driven(x, _count(solver, steps), code)


_FAILED = diffrax.RESULTS.nonfinite


# --- diffeqsolve --------------------------------------------------------------------------------


def solve_one(
    terms: Any,
    solver: diffrax.AbstractSolver,
    times: jax.Array,
    x: jax.Array,
    *,
    controller: diffrax.AbstractStepSizeController | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    max_steps: int = 4096,
    meter: diffrax.AbstractProgressMeter | None = None,
    calls: jax.Array | None = None,
) -> Driven:
    """``diffeqsolve`` for one sample; outputs are NaN where it is not successful.

    Args:
      terms: terms in progress, or in rising time -t (``rising``).
      solver: whose terms these are.
      times: the fixed grid, rising; its ends are the interval.
      x: initial state, float32 or wider.
      controller: of the step size, in the terms' time; the fixed grid if ``None``.
      adjoint: how to differentiate; diffrax's default if ``None``.
      max_steps: bound on the steps, accepted and rejected.
      meter: diffrax progress meter.
      calls: field evaluations, where the solver's steps are not what counts them.
    """
    steps = times.shape[0] - 1
    is_fixed = controller is None or isinstance(controller, diffrax.StepTo)
    solution = diffrax.diffeqsolve(
        terms,
        solver,
        t0=times[0],
        t1=times[-1],
        dt0=None if is_fixed else (times[-1] - times[0]) / steps,
        y0=x,
        stepsize_controller=diffrax.StepTo(times) if controller is None else controller,
        adjoint=diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint,
        max_steps=steps if controller is None else max_steps,
        throw=False,
        progress_meter=diffrax.NoProgressMeter() if meter is None else meter,
    )
    x = solution.ys[-1]
    code = solution.result
    x = jnp.where(code == diffrax.RESULTS.successful, x, jnp.nan)
    nfe = _count(solver, solution.stats["num_steps"]) if calls is None else calls
    return Driven(x, nfe, code)
