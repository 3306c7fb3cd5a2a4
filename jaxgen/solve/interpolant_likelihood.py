r"""Likelihoods under a stochastic interpolant, by its flow or by its backward SDE.

With the fields b and s of an interpolant, for a state x at t = 1 (Albergo, Boffi and
Vanden-Eijnden, arXiv 2303.08797, theorem 2.18 and corollaries): along the flow from X_1 = x down to
t = 0,

    log rho_1(x) = log rho_0(X_0) - int_0^1 div b(X_t, t) dt                                (1)

and along the backward SDE of any epsilon from X_1 = x, with the noise dW in its direction,

    log rho_1(x) = log rho_0(X_0) - int_0^1 [div(b + epsilon s) + epsilon |s|^2] dt
                   - int sqrt(2 epsilon) s . dW                                             (2)

on every path. The last integral has mean zero, so the paper leaves it out; it is the perfect
control variate, after which only the error of the steps is left in the spread over paths: the
standard deviation falls as the square root of a step. The mean's own error is of the order of a
step, and no standard error shows it: take more steps until it no longer moves.

With learnt fields (1) is the density of the flow's law, exactly to the solver's tolerance. (2) is
an estimate for the SDE's law only up to the error of the score: read it so.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import (
    at_least_f32,
    batch_event,
    safe_sqrt,
    sum_event,
    unsharded,
    varying_zeros,
)
from jaxgen.process.interpolant import Interpolant
from jaxgen.score.derivatives import PROBES, probes, value_and_divergence
from jaxgen.score.prediction import Field, per_example
from jaxgen.solve.drivers import scan_carry
from jaxgen.solve.interpolant import Epsilon, Marginal, is_noisy, marginal, travel_times
from jaxgen.solve.path import GridPath, fold_each
from jaxgen.solve.terms import on_single, with_batch_of
from jaxgen.solve.transport import Plan, integrate, plan_solve, real_state

__all__ = ["InterpolantLikelihood", "interpolant_log_likelihood"]


class InterpolantLikelihood(NamedTuple):
    """What ``interpolant_log_likelihood`` returns; each array ``(batch,)``, or ``()``.

    Attributes:
      log_prob: nats per example, float32 or wider; NaN where the solve failed.
      stderr: standard error over the paths of the SDE, without the error of the steps; 0 for the
        flow.
      nfe: evaluations of both fields, int32, over all paths; derivatives are not counted.
      result: diffrax's ``RESULTS``, of shape ``nfe.shape``.
    """

    log_prob: jax.Array
    stderr: jax.Array
    nfe: jax.Array
    result: Any


class _Augmented(eqx.Module):
    """The right-hand side of (1) for one example."""

    fields: Marginal
    probe: jax.Array | None

    def __call__(self, t: Any, state: Any, args: Any) -> tuple[jax.Array, jax.Array]:
        del args
        x, _ = state
        return value_and_divergence(self.fields.b, x, t, self.probe, event_ndim=x.ndim)


def _by_flow(
    make: Callable[[Any], Marginal],
    x: jax.Array,
    probe: jax.Array | None,
    ends: tuple[Any, Any],
    plan: Plan,
    is_batched: bool,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array, Any]:
    """States at t = 0 and the integrals of the divergence, evaluations and results."""

    def one(x: jax.Array, probe: jax.Array | None) -> Any:
        term = diffrax.ODETerm(_Augmented(make(x.ndim), probe))
        start, stop = (jnp.asarray(t, x.dtype) for t in ends)
        return integrate(term, (x, jnp.zeros((), x.dtype)), stop, start, plan)

    if not is_batched:
        return one(x, probe)
    return jax.vmap(one)(*with_batch_of(x, (x, probe)))


def _by_sde(
    fields: Marginal,
    key: jax.Array,
    x: jax.Array,
    probe: jax.Array | None,
    times: jax.Array,
    control_variate: bool,
) -> tuple[jax.Array, jax.Array]:
    """States at t = 0 and what (2) takes from their log-density, by Euler-Maruyama steps.

    Args:
      fields: of a batched state.
      key: one per state.
      x: one state for each path of each example.
      probe: like ``x``, or ``None`` for exact divergences.
      times: falling.
      control_variate: whether the Ito integral is in it.
    """
    clock = -times
    path = GridPath(key, x.shape[1:], x.dtype, times.shape[0] - 1, clock)

    def body(carry: Any, inputs: Any) -> Any:
        x, total = carry
        t, t_next = inputs
        h, epsilon = t - t_next, fields.diffusion(t)
        first, first_divergence = value_and_divergence(fields.first, x, t, probe)
        second, second_divergence = value_and_divergence(fields.second, x, t, probe)
        # Both are multiples of these two with coefficients of time alone.
        excess = fields.factor(t, fields.excess(t))
        factor = fields.factor(t, jnp.ones_like(t))
        b, s = first + excess * second, factor * second
        divergence = first_divergence + (excess + epsilon * factor) * second_divergence
        noise = safe_sqrt(2 * epsilon) * path.evaluate(-t, -t_next)
        total = total + h * (divergence + epsilon * sum_event(s**2))
        if control_variate:
            total = total + sum_event(s * noise)
        return (x - h * (b - epsilon * s) + noise, total), None

    start = (x, varying_zeros(x.shape[:1], x.dtype, x))
    return scan_carry(body, start, (times[:-1], times[1:]))


def _checked(
    log_rho0: Callable[[jax.Array], jax.Array], like: jax.ShapeDtypeStruct
) -> Callable[[jax.Array], jax.Array]:
    """``log_rho0``, seen to give one number for each state, in the states' dtype."""
    out = jax.eval_shape(lambda x: checks.floating("log_rho0(x)", log_rho0(x)), like)
    if out.shape != like.shape[:1]:
        raise ValueError(
            f"log_rho0 returned shape {out.shape} for states of shape {like.shape}; expected "
            f"{like.shape[:1]}"
        )
    return lambda x: jnp.asarray(log_rho0(x)).astype(x.dtype)


def interpolant_log_likelihood(
    key: jax.Array | None,
    b: Field | None,
    s: Field | None,
    interp: Interpolant,
    x: ArrayLike,
    log_rho0: Callable[[jax.Array], jax.Array],
    *,
    epsilon: Epsilon = 0.0,
    steps: int = 200,
    paths: int = 16,
    control_variate: bool = True,
    kinds: tuple[str, str] = ("b", "score"),
    estimator: str = "hutchinson",
    noise: str = "rademacher",
    t_min: ArrayLike = 0.0,
    t_max: ArrayLike = 1.0,
    rtol: ArrayLike = 1e-5,
    atol: ArrayLike = 1e-5,
    solver: diffrax.AbstractERK | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    max_steps: int = 4096,
    event_ndim: int | None = None,
) -> InterpolantLikelihood:
    """Log-density of states at t = 1 (module docstring).

    Args:
      key: typed key of the probes and the paths; example ``i`` of a batch uses ``fold_in(key, i)``.
        ``None`` serves the flow with ``estimator="exact"``.
      b: velocity field, see ``interpolant_terms``, as for ``s`` and ``kinds``. The flow calls it
        on batches of one, the SDE on ``batch * paths`` states at once.
      s: score field; the SDE needs it.
      interp: the interpolant.
      x: states at t = 1, ``(batch, *event)``, or one example if ``event_ndim=x.ndim``.
      log_rho0: log-density at t = 0: of a batch of states, ``(n, *event) -> (n,)``.
      epsilon: half the squared diffusion of the backward SDE, a number or ``f(t)``; the Python
        number 0 chooses the flow, with adaptive steps.
      steps: equal Euler-Maruyama steps of the SDE.
      paths: paths of the SDE per example, at least 2; all are in memory at once.
      control_variate: subtract the Ito integral of (2). Without it the estimate has the same
        mean, and far more spread.
      kinds: what ``b`` and ``s`` are.
      estimator: ``"hutchinson"``, one Jacobian-vector product an evaluation and a probe for each
        example and path, or ``"exact"``, one for each entry of the event.
      noise: the probes, ``"rademacher"`` or ``"gaussian"``.
      t_min: time of ``log_rho0``; networks that are divided by gamma want about 1e-3.
      t_max: time of ``x``, likewise 1 - 1e-3.
      rtol: relative tolerance of the flow.
      atol: absolute tolerance of the flow, of the log-density in nats.
      solver: an explicit Runge-Kutta solver of diffrax for the flow; Tsit5 if ``None``.
      adjoint: how gradients pass through the flow's solve.
      max_steps: bound on the flow's steps per example.
      event_ndim: see ``x``.

    Returns:
      An ``InterpolantLikelihood``.

    Raises:
      ValueError: unknown names, an ``epsilon`` or times out of range (where known), fewer than two
        paths, a ``log_rho0`` of another shape; as ``interpolant_terms``.
      TypeError: integer ``x``, no key where one is needed, another kind of solver.

    Inside ``shard_map`` the flow needs ``check_vma=False``, as every ``diffeqsolve`` does.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxgen.process.interpolant import interpolant
      >>> from jaxgen.score.closed_form import two_mixtures
      >>> at = lambda m: (jnp.ones(1), jnp.full((1, 1), m), jnp.full(1, 0.25))
      >>> law = two_mixtures(interpolant("linear"), at(0.0), at(2.0))
      >>> out = interpolant_log_likelihood(
      ...     None, law.b, None, law.interp, jnp.array([[1.8]]), lambda x: law.log_prob(x, 0.0),
      ...     estimator="exact")
      >>> bool(abs(out.log_prob[0] + 0.3058) < 1e-3)
      True
    """
    checks.one_of("estimator", estimator, ("hutchinson", "exact"))
    checks.one_of("noise", noise, PROBES)
    x = real_state("x", x)
    batch, event = batch_event(x, event_ndim)
    wide = x.astype(at_least_f32(x.dtype))
    is_sde = is_noisy(epsilon)
    if key is None and (is_sde or estimator == "hutchinson"):
        raise TypeError("key is None; the probes and the SDE's noise come from a typed key")
    dtype = x.dtype if x.dtype != wide.dtype else None
    log_start = _checked(log_rho0, jax.ShapeDtypeStruct((*(batch or (1,)), *event), wide.dtype))
    times = travel_times(t_min, t_max, steps, "backward", wide.dtype)
    key_probe: Any = None
    key_path: Any = None
    if key is not None:
        key_probe, key_path = jax.random.split(keys.check(key))

    if not is_sde:
        plan = plan_solve(solver, adjoint, max_steps, rtol, atol)
        own_b, own_s = (f if f is None or not batch else on_single(f) for f in (b, s))

        def make(ndim: int) -> Marginal:
            return marginal(own_b, own_s, interp, epsilon, kinds, ndim, dtype)

        make(len(event))  # its errors come from outside of the solve
        probe = None
        if estimator == "hutchinson":
            probe = probes(key_probe, x.shape, noise, dtype=wide.dtype, event_ndim=event_ndim)
        (end, change), nfe, result = _by_flow(make, wide, probe, (t_min, t_max), plan, bool(batch))
        start = end if batch else end[None]
        # Against the clock: the integral of (1) with its sign turned.
        log_prob = log_start(start).reshape(batch) + change
        return InterpolantLikelihood(log_prob, jnp.zeros_like(log_prob), nfe, result)

    paths = checks.positive_int("paths", paths, least=2)
    if not batch:
        b, s = (None if f is None else per_example(f) for f in (b, s))
    fields = marginal(b, s, interp, epsilon, kinds, None, dtype)
    n = batch[0] if batch else 1
    flat = jnp.repeat(unsharded(wide) if batch else wide[None], paths, axis=0)

    def each(key: jax.Array) -> jax.Array:
        """One key for each path of each example, ``(n * paths,)``."""
        own = keys.fold(key, n) if batch else key[None]
        return fold_each(own, jnp.arange(paths)).T.reshape(-1)

    probe = None
    if estimator == "hutchinson":
        draw = jax.vmap(lambda k: PROBES[noise](k, event, wide.dtype, len(event)))
        probe = draw(each(key_probe))
    end, taken = _by_sde(fields, each(key_path), flat, probe, times, control_variate)
    values = (log_start(end) - taken).reshape(n, paths)
    log_prob = jnp.mean(values, axis=1).reshape(batch)
    stderr = (jnp.std(values, axis=1, ddof=1) / paths**0.5).reshape(batch)
    nfe = jnp.full(batch, steps * paths, jnp.int32)

    def result_of(is_finite: jax.Array) -> Any:
        fine, failed = diffrax.RESULTS.successful, diffrax.RESULTS.nonfinite
        return diffrax.RESULTS.where(is_finite, fine, failed)

    is_finite = jnp.isfinite(log_prob)
    result = jax.vmap(result_of)(is_finite) if batch else result_of(is_finite)
    return InterpolantLikelihood(log_prob, stderr, nfe, result)
