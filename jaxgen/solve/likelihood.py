r"""Likelihoods and codes by the probability-flow ODE (Song et al., ICLR 2021, arXiv 2011.13456).

With the velocity ``v = f - g^2 s / 2`` of section 4.3 and appendix D.2, forward in time from the
data at ``t_min`` to the prior at ``t_max``,

    dx/dt = v(x, t),   dl/dt = div v(x, t),   l(t_min) = 0                                  (1)
    log p(x(t_min)) = log prior(x(t_max)) + l(t_max)                                        (2)

The divergence is exact, or Hutchinson's ``u . (J u)`` (equation (40)) with one probe per example,
drawn once and kept for the whole solve: a probe redrawn inside would leave the step-size control
nothing smooth to control. ``J u`` comes by forward mode, one product beside each evaluation, so
nothing is stored for a backward sweep. Each example has its own step size, and the controller
looks at the larger of the state's and the log-density's scaled errors, so that many dimensions do
not drown the one number that is asked for.

(2) holds the prior's mismatch at ``t_max``, as published figures do. Left out: importance-weighted
bounds for dequantised data, and complex states.
"""

from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import checks
from jaxgen.core.arrays import at_least_f32, batch_event
from jaxgen.process.linear import LinearSDE
from jaxgen.score.derivatives import PROBES, probes, value_and_divergence
from jaxgen.score.prediction import PREDICTIONS, Field
from jaxgen.solve.terms import probability_flow
from jaxgen.solve.transport import integrate, map_examples, plan_solve, real_state, time_span

__all__ = ["Likelihood", "log_likelihood"]


class Likelihood(NamedTuple):
    """What ``log_likelihood`` returns; each array ``(batch,)``, or ``()`` for one example.

    Attributes:
      log_prob: nats per example, float32 or wider; NaN where the solve failed.
      z: the latent code ``x(t_max)``, like ``x``; NaN where the solve failed.
      nfe: field evaluations, int32; the derivatives that go with one are not counted.
      result: diffrax's ``RESULTS``, of shape ``nfe.shape``.
    """

    log_prob: jax.Array
    z: jax.Array
    nfe: jax.Array
    result: diffrax.RESULTS


class _Augmented(eqx.Module):
    """The right-hand side of equation (1) for one example."""

    flow: diffrax.ODETerm
    probe: jax.Array | None

    def __call__(self, t: Any, state: Any, args: Any) -> tuple[jax.Array, jax.Array]:
        x, _ = state
        return value_and_divergence(
            lambda y, s: self.flow.vf(s, y, args), x, t, self.probe, event_ndim=x.ndim
        )


def log_likelihood(
    key: jax.Array | None,
    field: Field,
    sde: LinearSDE,
    x: ArrayLike,
    *,
    prediction: str = "noise",
    estimator: str = "hutchinson",
    noise: str = "rademacher",
    rtol: ArrayLike = 1e-5,
    atol: ArrayLike = 1e-5,
    t_min: ArrayLike | None = None,
    t_max: ArrayLike | None = None,
    solver: diffrax.AbstractERK | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    max_steps: int = 4096,
    event_ndim: int | None = None,
) -> Likelihood:
    """Log-density of data under the model, by the probability-flow ODE (module docstring).

    Args:
      key: typed key of the Hutchinson probes; example ``i`` of a batch uses ``fold_in(key, i)``.
        Unused, and may be ``None``, with ``estimator="exact"``.
      field: ``f(x, t) -> like x``; called on batches of one, or unbatched for one example. A
        field with a condition of its own per example goes by ``vmap`` over single examples.
      sde: the process; ``mu`` may have a batch axis.
      x: data ``(batch, *event)``, or one example if ``event_ndim=x.ndim``; floating (dequantise
        integers first). Reduced precisions are computed in float32.
      prediction: what the field predicts, one of ``score.PREDICTIONS``.
      estimator: ``"hutchinson"``, unbiased, one Jacobian-vector product an evaluation, or
        ``"exact"``, one for each entry of the event.
      noise: the probes of Hutchinson's estimator, ``"rademacher"`` or ``"gaussian"``.
      rtol: relative tolerance of the state and of the log-density.
      atol: absolute tolerance of both; of the log-density in nats.
      t_min: where the data are, the process's ``t_min`` if ``None``.
      t_max: where the prior is, the process's ``t_max`` if ``None``.
      solver: an explicit Runge-Kutta solver of diffrax; ``Tsit5`` if ``None``.
      adjoint: how gradients in ``x``, in the field's parameters and in the process pass through
        the solve; ``RecursiveCheckpointAdjoint`` if ``None``.
      max_steps: attempted steps per example; an example that needs more gives NaN.
      event_ndim: ``None`` for one batch axis, ``x.ndim`` for one example.

    Returns:
      A ``Likelihood``. Where the solve failed (too many steps; a field that is NaN; tolerances
      below what the dtype can resolve) the numbers are NaN and ``result`` says why.

    Raises:
      ValueError: an unknown name, a tolerance that is not positive, times out of range or order.
      TypeError: integer or complex ``x``, a raw key, another kind of solver.

    Inside ``shard_map`` it needs ``check_vma=False``, as every ``diffeqsolve`` does.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxgen import process, score
      >>> sde = process.vp()
      >>> field = score.closed_form.gaussian(sde, jnp.ones(1), 0.25).noise
      >>> measure = jax.jit(lambda x: log_likelihood(None, field, sde, x, estimator="exact"))
      >>> out = measure(jnp.full((1, 1), 0.3))
      >>> bool(abs(out.log_prob[0] + 1.1966) < 1e-3)
      True
    """
    checks.one_of("prediction", prediction, PREDICTIONS)
    checks.one_of("estimator", estimator, ("hutchinson", "exact"))
    checks.one_of("noise", noise, PROBES)
    plan = plan_solve(solver, adjoint, max_steps, rtol, atol)
    x = real_state("x", x, "; dequantize integers first")
    batch, _ = batch_event(x, event_ndim)
    start, stop = time_span(sde, t_min, t_max)
    wide = x.astype(at_least_f32(x.dtype))
    probe = None
    if estimator == "hutchinson":
        if key is None:
            raise TypeError("key is None; Hutchinson's estimator draws its probes from a typed key")
        probe = probes(key, x.shape, noise, dtype=wide.dtype, event_ndim=event_ndim)

    def solve(one_field, own, x_i, *rest):
        flow = probability_flow(one_field, own, prediction=prediction, event_ndim=x_i.ndim)
        term = diffrax.ODETerm(_Augmented(flow, rest[0] if rest else None))
        t0, t1 = jnp.asarray(start, x_i.dtype), jnp.asarray(stop, x_i.dtype)
        return integrate(term, (x_i, jnp.zeros((), x_i.dtype)), t0, t1, plan)

    mapped = () if probe is None else (probe,)
    (z, change), nfe, result = map_examples(solve, sde, wide, bool(batch), field, *mapped)
    log_prob = sde.prior_log_prob(z, event_ndim=event_ndim) + change
    return Likelihood(log_prob, z.astype(x.dtype), nfe, result)
