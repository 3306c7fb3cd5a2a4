r"""Several expectations from one sample: adaptive importance sampling with control variates.

Estimates I_j = E_{f_j}[phi_j(X)], j = 1..J, from one sample of a mixture proposal with one
component for each expectation. The components are the control variates too (estimator (1) and
criterion (2) of ``control_variates``). A budget of N evaluations is spent in batches of m:

    0. X from f, or from the equal mixture of the f_j; alpha_j in proportion to sqrt(w_j) |I_j|,
       beta = I, V_0 the criterion V = sum_j w_j Var(summand_j)
    1. component j: the member of the family nearest in Kullback-Leibler to |phi_j| f_j, from all
       points so far, each weighted by f_j/h, h the mean of all proposals used so far
    2. alpha minimises V as estimated from all points so far
    3. m points from g_alpha
    4. beta_j = Cov(g_j/g_alpha, f_j phi_j/g_alpha) / Var(g_j/g_alpha), V_k: on the new batch
    5. go on from 1 while V_{k-1}/(N - N_{k-1}) > V_k/(N - N_k) and N_k < ``adapt_fraction`` N
    6. all that is left of the budget from the newest g_alpha: a fresh sample, hence no bias

Source: Demange-Chryst, Bachoc and Morio, "Efficient estimation of multiple expectations with the
same sample by adaptive importance sampling and control variates", arXiv 2212.00568; ``defensive``
after Owen and Zhou, "Safe and effective importance sampling", JASA 2000. Differences: step 1 takes
|phi_j|, right for a phi of either sign, where the authors take phi_j; step 2 runs the
multiplicative rule, where they call SLSQP; covariances have a prior (``shrinkage``); ``jitter`` is
in units of the law's own variances.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jax.scipy.stats import norm
from jax.typing import ArrayLike

from jaxgen.core import keys
from jaxgen.core.arrays import at_least_f32
from jaxgen.core.checks import concrete, debug_check, floating, one_of, positive_int
from jaxgen.core.progress import meter
from jaxgen.smc.control_variates import (
    Estimate,
    control_coefficients,
    delta_method,
    iscv_estimate,
    optimal_mixture_weights,
    weighted_values,
)
from jaxgen.smc.mixture import (
    Gaussian,
    GaussianMixture,
    Mixture,
    component_log_prob,
    cross_entropy_fit,
    em_fit,
    mixture_log_prob,
    mixture_sample,
    scale_tril,
)
from jaxgen.solve.meter import Ticker

__all__ = [
    "Estimate",
    "Expectations",
    "Gaussian",
    "GaussianMixture",
    "History",
    "Mixture",
    "component_log_prob",
    "control_coefficients",
    "cross_entropy_fit",
    "delta_method",
    "em_fit",
    "iscv_estimate",
    "mixture_log_prob",
    "mixture_sample",
    "multiple_expectations",
    "optimal_mixture_weights",
    "scale_tril",
    "standard_normal",
]

_NO_MASS = (
    "no mass found: phi is zero at all points of the first batch; give a sample_f (with its log_f) "
    "that reaches where phi is not zero, or a larger budget"
)


# The variance as estimated need not be minimised further than it is known.
_TOLERANCE = 1e-3


class History(NamedTuple):
    """What each batch of adaptation had; rows after the stop are NaN.

    Attributes:
      variance: the criterion ``V_k``, ``(batches,)``.
      alpha: shares of the components, ``(batches, J)``; row 0 the first guess.
      beta: coefficients, ``(batches, J)``; row 0 the first estimates.
    """

    variance: jax.Array
    alpha: jax.Array
    beta: jax.Array


class Expectations(NamedTuple):
    """Estimates of J expectations from N evaluations in dimension d.

    Attributes:
      mean: estimates, unbiased, ``(J,)``.
      std_err: their standard errors, ``(J,)``.
      beta: coefficients of the control variates, ``(J,)``.
      proposal: the ``Mixture`` of the final sample (of its part not drawn from the law itself).
      log_weights: log f/g_alpha (of the equal mixture of the laws, if several), ``(N,)``; ``-inf``
        for points of the adaptation.
      x: all points in the order of their drawing, ``(N, d)``.
      n_adapt: points spent on the adaptation, int32 ``()``; they come first.
      history: a ``History``.
      cov: covariance of the estimates, ``(J, J)``; ``delta_method`` takes it on.
      max_share: the largest share of one point in the sum of squared deviations, ``(J,)``; near
        1, ``std_err`` is not to be trusted.
      values: ``phi`` at all points, ``(N, 1)`` or ``(N, J)``.
      nfe: points at which ``phi`` was evaluated, int32 ``()``: the budget.
    """

    mean: jax.Array
    std_err: jax.Array
    beta: jax.Array
    proposal: Mixture
    log_weights: jax.Array
    x: jax.Array
    n_adapt: jax.Array
    history: History
    cov: jax.Array
    max_share: jax.Array
    values: jax.Array
    nfe: jax.Array

    def summary(self) -> str:
        """A table: for each expectation its estimate, standard error, share and coefficient."""
        n, adapt = int(self.nfe), int(self.n_adapt)
        lines = [
            f"{self.mean.shape[0]} expectations from {n} evaluations, {adapt} of them to adapt",
            f"{'':>5} {'mean':>12} {'std_err':>10} {'alpha':>8} {'beta':>12} {'max_share':>9}",
        ]
        rows = (self.mean, self.std_err, self.proposal.alpha, self.beta, self.max_share)
        for i, (mean, std_err, alpha, beta, share) in enumerate(
            zip(*map(np.asarray, rows), strict=True)
        ):
            lines.append(
                f"{i:>5} {mean:>12.6g} {std_err:>10.3g} {alpha:>8.4f} {beta:>12.6g} {share:>9.2g}"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        """The summary where values are known and of one run, else shapes."""
        if self.nfe.ndim or any(isinstance(v, jax.core.Tracer) for v in jax.tree.leaves(self)):
            return f"Expectations(mean={self.mean.shape}, x={self.x.shape})"
        return self.summary()


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Sizes and options, all static."""

    budget: int
    batches: int
    size: int  # of a batch
    family: str
    inner: int
    control_variates: bool
    diagonal: bool
    jitter: float
    simplex: str
    defensive: float
    shrinkage: float

    @property
    def pieces(self) -> list[int]:
        """Sizes of the pieces that the budget is spent in."""
        whole, rest = divmod(self.budget, self.size)
        return [self.size] * whole + [rest] * (rest > 0)


class _State(NamedTuple):
    """The adaptation's memory; nothing in it carries a gradient."""

    x: jax.Array  # (batches size, d), the first `used` batches are filled
    y: jax.Array
    log_f: jax.Array
    proposals: Mixture  # of each batch, stacked; entry 0 is never used
    proposal: Mixture  # the newest
    law_cov: jax.Array  # (d, d), of the first batch
    beta: jax.Array
    variance: jax.Array  # ()
    used: jax.Array  # () batches
    is_stopped: jax.Array
    history: History


def standard_normal(d: int) -> tuple[Callable, Callable]:
    """``(log_f, sample_f)`` of the standard normal law in ``d`` dimensions.

    Made once for each ``d``, so that ``multiple_expectations`` compiles once too.
    """
    return _log_standard_normal, _sample_standard_normal(positive_int("d", d))


def _log_standard_normal(x: jax.Array) -> jax.Array:
    return jnp.sum(norm.logpdf(x), axis=-1, keepdims=True)


@functools.cache
def _sample_standard_normal(d: int) -> Callable[[jax.Array, int], jax.Array]:
    def sample_f(key: jax.Array, n: int) -> jax.Array:
        return keys.normal(key, (n, d), jnp.zeros(()).dtype)

    return sample_f


def _log_equal_mixture(log_f: jax.Array) -> jax.Array:
    return logsumexp(log_f, axis=1) - jnp.log(jnp.asarray(log_f.shape[1], log_f.dtype))


def _with_law(plan: _Plan, log_g: jax.Array, log_f: jax.Array) -> jax.Array:
    """Log-density of a proposal that takes its defensive share from the law; shapes agree."""
    if not plan.defensive:
        return log_g
    return jnp.logaddexp(math.log1p(-plan.defensive) + log_g, math.log(plan.defensive) + log_f)


def _log_q(plan: _Plan, proposal: Mixture, log_g: jax.Array, log_f: jax.Array) -> jax.Array:
    """Log-density ``(n,)`` that points are drawn from, given those of components and laws."""
    log_mixture = logsumexp(log_g + jnp.log(proposal.alpha)[None], axis=1)
    return _with_law(plan, log_mixture, _log_equal_mixture(log_f))


def _begin(plan: _Plan, x, y, log_f, weights) -> _State:
    """Step 0."""
    x, y, log_f, weights = jax.lax.stop_gradient((x, y, log_f, weights))
    n, d = x.shape
    values = jnp.broadcast_to(
        weighted_values(log_f, _log_equal_mixture(log_f), y), (n, weights.shape[0])
    )
    is_empty = jnp.all(values == 0)
    debug_check(~is_empty, _NO_MASS)
    mean = jnp.mean(values, axis=0)
    variance = jnp.sum(jnp.var(jnp.sqrt(weights)[None] * values, axis=0))
    alpha = _first_shares(weights, mean)
    alpha = jnp.where(is_empty, jnp.nan, alpha)

    def buffer(v: jax.Array) -> jax.Array:
        zeros = jnp.zeros((plan.batches * n, *v.shape[1:]), v.dtype)
        return jax.lax.dynamic_update_slice_in_dim(zeros, v, 0, axis=0)

    def rows(v: jax.Array) -> jax.Array:
        return jnp.full((plan.batches, *v.shape), jnp.nan, v.dtype).at[0].set(v)

    j, k = weights.shape[0], plan.inner
    proposal = Mixture(
        alpha,
        jnp.zeros((j, k), x.dtype),
        jnp.zeros((j, k, d), x.dtype),
        jnp.broadcast_to(jnp.eye(d, dtype=x.dtype), (j, k, d, d)),
    )
    return _State(
        x=buffer(x),
        y=buffer(y),
        log_f=buffer(log_f),
        proposals=jax.tree.map(lambda v: jnp.stack([v] * plan.batches), proposal),
        proposal=proposal,
        law_cov=jnp.atleast_2d(jnp.cov(x, rowvar=False)),
        beta=mean * plan.control_variates,
        variance=variance,
        used=jnp.int32(1),
        is_stopped=jnp.bool_(False),
        history=History(rows(variance), rows(alpha), rows(mean)),
    )


def _first_shares(weights: jax.Array, mean: jax.Array) -> jax.Array:
    share = jnp.sqrt(weights) * jnp.abs(mean)
    total = jnp.sum(share)
    return jnp.where(total == 0, 1 / share.size, share / jnp.where(total == 0, 1.0, total))


def _propose(plan: _Plan, key, state: _State, weights) -> _State:
    """Steps 1 and 2 from all batches so far, unless the adaptation has stopped."""
    weights = jax.lax.stop_gradient(weights)

    def propose(state: _State) -> _State:
        proposal = _next_proposal(plan, key, state, weights)
        proposals = jax.tree.map(
            lambda stack, v: stack.at[state.used].set(v, mode="drop"), state.proposals, proposal
        )
        return state._replace(proposal=proposal, proposals=proposals)

    return jax.lax.cond(state.is_stopped, lambda s: s, propose, state)


def _next_proposal(plan: _Plan, key, state: _State, weights) -> Mixture:
    x, y, log_f, used = state.x, state.y, state.log_f, state.used
    n, j = x.shape[0], weights.shape[0]
    log_q = jax.lax.map(lambda mixture: mixture_log_prob(mixture, x), state.proposals)
    log_bar = _log_equal_mixture(log_f)
    log_q = _with_law(plan, log_q, jnp.broadcast_to(log_bar, log_q.shape)).at[0].set(log_bar)
    is_used = jnp.arange(plan.batches) < used
    log_h = logsumexp(jnp.where(is_used[:, None], log_q, -jnp.inf), axis=0) - jnp.log(used)
    is_drawn = jnp.arange(n) < used * plan.size
    log_h = jnp.where(is_drawn, log_h, 0.0)
    log_f = jnp.where(is_drawn[:, None], log_f, -jnp.inf)

    log_ratio = jnp.broadcast_to(log_f - log_h[:, None], (n, j))
    log_w = jnp.where(log_ratio == -jnp.inf, -jnp.inf, log_ratio + jnp.log(jnp.abs(y)))
    # An expectation without mass so far has its own law for a component.
    log_w = jnp.where(jnp.all(log_w == -jnp.inf, axis=0, keepdims=True), log_ratio, log_w)
    components = _fit(plan, key, x, log_w, state.law_cov)

    values = jnp.broadcast_to(weighted_values(log_f, log_h, y), (n, j))
    if plan.simplex == "fixed":
        sums = jnp.sum(values, axis=0) / (used * plan.size)
        alpha = _first_shares(weights, sums)
    else:
        log_g = component_log_prob(components, x) - log_h[:, None]
        residual = jnp.sqrt(weights)[None] * (values - state.beta[None] * jnp.exp(log_g))
        residual = jnp.where(is_drawn[:, None], residual, 0.0)
        unit = jnp.max(jnp.abs(residual))
        r = (residual / jnp.where(unit == 0, 1.0, unit)) ** 2
        # From the interior: a share that had vanished must be able to come back.
        start = (state.proposal.alpha + 1 / j) / 2
        # The law's share is fixed, and shares sum to one: it counts as a part of each component.
        log_law = jnp.broadcast_to((log_bar - log_h)[:, None], log_g.shape)
        log_g = _with_law(plan, log_g, log_law)
        alpha = optimal_mixture_weights(
            start, r, log_g, jnp.zeros_like(log_h), tolerance=_TOLERANCE
        )
    # So that a first batch without mass stays NaN.
    return components._replace(alpha=alpha + 0.0 * state.proposal.alpha)


def _fit(plan: _Plan, key, x, log_w, law_cov) -> Mixture:
    """Components of equal shares, each fitted to a column of ``log_w`` ``(n, J)``."""
    j, d = log_w.shape[1], x.shape[1]
    options: dict[str, Any] = {
        "diagonal": plan.diagonal,
        "jitter": plan.jitter * jnp.diag(law_cov),
        "prior_cov": law_cov,
        "prior_size": plan.shrinkage * d,
    }
    if plan.family == "gaussian":
        mean, cov = jax.vmap(lambda w: cross_entropy_fit(x, w, **options))(log_w.T)
        fit = GaussianMixture(jnp.zeros((j, 1), x.dtype), mean[:, None], cov[:, None])
    else:
        fit = jax.vmap(lambda k, w: em_fit(k, x, w, plan.inner, **options))(
            jax.random.split(key, j), log_w.T
        )
    alpha = jnp.full((j,), 1 / j, x.dtype)
    return Mixture(alpha, fit.log_weights, fit.means, jax.vmap(jax.vmap(scale_tril))(fit.covs))


def _absorb(plan: _Plan, state: _State, k, x, y, log_f, weights) -> _State:
    """Steps 4 and 5 with batch ``k`` (from 1), unless the adaptation has stopped."""
    x, y, log_f, weights = jax.lax.stop_gradient((x, y, log_f, weights))

    def filled(buffer: jax.Array, v: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(buffer, v, k * plan.size, axis=0)

    def absorb(state: _State) -> _State:
        alpha = state.proposal.alpha
        log_g = component_log_prob(state.proposal, x)
        log_q = _log_q(plan, state.proposal, log_g, log_f)
        beta = jnp.zeros_like(state.beta)
        if plan.control_variates:
            beta = control_coefficients(log_g, alpha, log_f, y, log_q=log_q)
        std_err = iscv_estimate(log_g, alpha, log_f, y, beta, log_q=log_q).std_err
        variance = plan.size * jnp.sum((jnp.sqrt(weights) * std_err) ** 2)
        before = state.variance / (plan.budget - k * plan.size)
        after = variance / (plan.budget - (k + 1) * plan.size)
        now = History(variance, alpha, beta)
        return state._replace(
            x=filled(state.x, x),
            y=filled(state.y, y),
            log_f=filled(state.log_f, log_f),
            beta=beta,
            variance=variance,
            used=jnp.int32(k + 1),
            is_stopped=(before <= after) | (k == plan.batches - 1),
            history=jax.tree.map(
                lambda rows, v: rows.at[k].set(v, mode="drop"), state.history, now
            ),
        )

    return jax.lax.cond(state.is_stopped, lambda s: s, absorb, state)


def _finish(plan: _Plan, state: _State, x, y, log_f) -> Expectations:
    """Step 6 from all points, those of the adaptation left out."""
    n_adapt = state.used * plan.size
    is_final = jnp.arange(plan.budget) >= n_adapt
    alpha = state.proposal.alpha
    log_g = component_log_prob(state.proposal, x)
    # Weights have a gradient where the law does; the proposal counts as given.
    log_q = jax.lax.stop_gradient(_log_q(plan, state.proposal, log_g, log_f))
    out = iscv_estimate(log_g, alpha, log_f, y, state.beta, log_q=log_q, where=is_final)
    is_met = (log_f > -jnp.inf) & (y != 0) & is_final[:, None]
    has_mass = jnp.broadcast_to(jnp.any(is_met, axis=0), alpha.shape)
    debug_check(
        jnp.all(has_mass), "no mass found: an expectation's phi is zero in all of the final sample"
    )
    log_weights = jnp.where(is_final, _log_equal_mixture(log_f) - log_q, -jnp.inf)
    return Expectations(
        mean=jnp.where(has_mass, out.mean, jnp.nan),
        std_err=jnp.where(has_mass, out.std_err, jnp.nan),
        beta=state.beta,
        proposal=state.proposal,
        log_weights=log_weights,
        x=x,
        n_adapt=n_adapt,
        history=state.history,
        cov=out.cov,
        max_share=out.max_share,
        values=y,
        nfe=jnp.int32(plan.budget),
    )


def _points(x: ArrayLike, n: int, plan: _Plan) -> jax.Array:
    x = floating("sample_f(key, n)", x)
    if x.ndim != 2 or x.shape[0] != n:
        raise ValueError(f"sample_f returned shape {x.shape} for n = {n}; expected ({n}, d)")
    if plan.size <= x.shape[1] + 1:
        raise ValueError(
            f"budget {plan.budget} gives batches of {plan.size} points; expected more than d + 1 = "
            f"{x.shape[1] + 1} in each"
        )
    return x.astype(at_least_f32(x.dtype))


def _draw(plan: _Plan, sample_f, sample, key, state: _State, n: int) -> jax.Array:
    """Step 3: ``n`` points of the newest proposal, a defensive share of them from the law."""
    if not plan.defensive:
        return sample(key, state.proposal, n)
    key_mixture, key_law, key_choice = jax.random.split(key, 3)
    x, law = sample(key_mixture, state.proposal, n), _points(sample_f(key_law, n), n, plan)
    return jnp.where(keys.uniform(key_choice, (n, 1), x.dtype) < plan.defensive, law, x)


def _columns(name: str, value: Any, x: jax.Array) -> jax.Array:
    if value is None:
        raise TypeError(f"{name} returned None; expected an array")
    value = jnp.asarray(value)
    if jnp.issubdtype(value.dtype, jnp.complexfloating):
        raise TypeError(f"{name} returned dtype {value.dtype}; expected real numbers")
    n = x.shape[0]
    if value.ndim not in (1, 2) or value.shape[0] != n or value.size == 0:
        raise ValueError(
            f"{name} returned shape {value.shape} for {n} points; expected ({n}, 1) or ({n}, J)"
        )
    return value.reshape(n, -1).astype(x.dtype)


def _expectations(plan: _Plan, weights: jax.Array | None, y: jax.Array, log_f: jax.Array) -> int:
    """J, after a look at whether it is the same everywhere."""
    shapes = {"phi": y.shape[1], "log_f": log_f.shape[1]}
    j = max(shapes.values()) if weights is None else weights.shape[0]
    for name, columns in shapes.items():
        if columns not in (1, j):
            named = "" if weights is None else ", the length of weights"
            raise ValueError(
                f"{name} returned {columns} columns for J = {j} expectations{named}; expected 1 or "
                f"{j}"
            )
    if max(shapes.values()) != j:
        raise ValueError(f"weights has length {j}, but phi and log_f have one column; expected 1")
    if plan.size <= j:
        raise ValueError(
            f"budget {plan.budget} gives batches of {plan.size} points; expected more than J = {j} "
            "in each"
        )
    return j


def _check_values(y: jax.Array, log_f: jax.Array) -> None:
    is_fine = jnp.isfinite(y) | (log_f == -jnp.inf)
    debug_check(jnp.all(is_fine), "phi is NaN or infinite where its law has density")
    debug_check(
        jnp.all(log_f < jnp.inf), "log_f is NaN or inf; expected finite log-densities or -inf"
    )


def _run(key, weights, phi, log_f, sample_f, plan: _Plan, progress: bool) -> Expectations:
    """The whole run as one JAX program."""
    key_x, key_fit = jax.random.split(key)
    tick = Ticker(len(plan.pieces), "expectations") if progress else lambda k: None

    def evaluate(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, logs = _columns("phi", phi(x), x), _columns("log_f", log_f(x), x)
        _expectations(plan, weights, y, logs)
        _check_values(y, logs)
        return y, logs

    def drawn(state: _State, k: ArrayLike, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        x = _draw(plan, sample_f, mixture_sample, jax.random.fold_in(key_x, k), state, n)
        record = (x, *evaluate(x))
        # Tied to the state, so that the last piece does not report before the loop. The first piece
        # does not report by itself: nothing would keep it in front.
        tick(jnp.where(state.used > 0, k, 0))
        return record

    x = _points(sample_f(jax.random.fold_in(key_x, 0), plan.size), plan.size, plan)
    first = (x, *evaluate(x))
    if weights is None:
        weights = jnp.ones((_expectations(plan, None, *first[1:]),), x.dtype)
    weights = weights.astype(x.dtype)

    def step(state: _State, k: jax.Array) -> tuple[_State, Any]:
        state = _propose(plan, jax.random.fold_in(key_fit, k), state, weights)
        record = drawn(state, k, plan.size)
        return _absorb(plan, state, k, *record, weights), record

    whole = plan.budget // plan.size
    state, more = jax.lax.scan(step, _begin(plan, *first, weights), jnp.arange(1, whole))
    records = [first, jax.tree.map(lambda v: v.reshape(-1, v.shape[-1]), more)]
    if len(plan.pieces) > whole:
        records.append(drawn(state, whole, plan.pieces[-1]))
    return _finish(plan, state, *(jnp.concatenate(v) for v in zip(*records, strict=True)))


_static = ("phi", "log_f", "sample_f", "plan", "progress")
_run_compiled = jax.jit(_run, static_argnames=_static)
_begin_compiled = jax.jit(_begin, static_argnames="plan")
_propose_compiled = jax.jit(_propose, static_argnames="plan")
_absorb_compiled = jax.jit(_absorb, static_argnames="plan")
_finish_compiled = jax.jit(_finish, static_argnames="plan")
_sample_compiled = jax.jit(mixture_sample, static_argnames="n")


def _run_host(
    key, weights, phi, log_f, sample_f, plan: _Plan, batch_size: int | None, progress: bool | None
) -> Expectations:
    """The same run with ``phi``, ``log_f`` and ``sample_f`` called from Python."""
    key_x, key_fit = jax.random.split(key)
    records: list[tuple[jax.Array, jax.Array, jax.Array]] = []
    state: Any = None
    with meter(
        plan.budget, description="expectations", unit="evaluation", enabled=bool(progress)
    ) as bar:

        def values(x: np.ndarray) -> Iterator[np.ndarray]:
            size = len(x) if batch_size is None else batch_size
            for start in range(0, len(x), size):
                piece = x[start : start + size]
                yield np.asarray(_columns("phi", phi(piece), jnp.asarray(piece)))
                shown = {} if state is None else {"criterion": float(state.variance)}
                bar.update(len(piece), **shown)

        for k, n in enumerate(plan.pieces):
            key_k = jax.random.fold_in(key_x, k)
            if k == 0:
                x = _points(sample_f(key_k, n), n, plan)
            else:
                fold = jax.random.fold_in(key_fit, k)
                state = _propose_compiled(plan, fold, state, weights)
                x = _draw(plan, sample_f, _sample_compiled, key_k, state, n)
            points = np.asarray(x)
            logs = _columns("log_f", log_f(points), x)
            y = jnp.asarray(np.concatenate(list(values(points))))
            j = _expectations(plan, weights, y, logs)
            weights = jnp.ones((j,), x.dtype) if weights is None else weights.astype(x.dtype)
            _refuse(points, y, logs, is_first=k == 0)
            records.append((x, y, logs))
            if k == 0:
                state = _begin_compiled(plan, x, y, logs, weights)
            elif k < plan.batches:
                state = _absorb_compiled(plan, state, k, x, y, logs, weights)
    return _finish_compiled(plan, state, *(jnp.concatenate(v) for v in zip(*records, strict=True)))


def _refuse(x: np.ndarray, y: jax.Array, log_f: jax.Array, *, is_first: bool) -> None:
    """Raise on values that would make the result NaN, before more of the budget is spent."""
    is_bad = np.any(~np.isfinite(y) & (np.asarray(log_f) > -np.inf), axis=1)
    if is_bad.any():
        raise ValueError(
            f"phi is NaN or infinite at {is_bad.sum()} of {len(x)} points, first at "
            f"{x[is_bad.argmax()].tolist()}; expected finite values wherever its law has density"
        )
    if not np.all(np.asarray(log_f) < np.inf):
        raise ValueError("log_f is NaN or inf; expected finite log-densities or -inf")
    if is_first and not np.any((np.asarray(y) != 0) & (np.asarray(log_f) > -np.inf)):
        raise ValueError(_NO_MASS)


def _checked_weights(weights: ArrayLike | None) -> jax.Array | None:
    if weights is None:
        return None
    weights = floating("weights", weights)
    if weights.ndim != 1 or weights.size == 0:
        raise ValueError(f"weights has shape {weights.shape}; expected (J,)")
    known = concrete(weights)
    if known is not None and not np.all((known > 0) & np.isfinite(known)):
        raise ValueError(f"weights is {known.tolist()}; expected positive numbers")
    is_fine = (weights > 0) & (weights < jnp.inf)
    debug_check(jnp.all(is_fine), "weights must be positive")
    return jnp.where(is_fine, weights, jnp.nan)


def multiple_expectations(
    key: jax.Array,
    phi: Callable[[Any], Any],
    log_f: Callable[[Any], Any],
    sample_f: Callable[[jax.Array, int], Any],
    budget: int,
    *,
    weights: ArrayLike | None = None,
    family: str = "gaussian",
    batches: int = 5,
    adapt_fraction: float = 0.5,
    control_variates: bool = True,
    diagonal: bool = False,
    jitter: float = 1e-6,
    simplex: str = "multiplicative",
    inner: int = 3,
    defensive: float = 0.0,
    shrinkage: float = 1.0,
    host: bool = False,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Expectations:
    """Estimate several expectations from one adaptive importance sample (module docstring).

    The functions are static under ``jit``: pass the same objects again and nothing is compiled
    anew. Estimates are differentiable in what ``phi`` and ``log_f`` close over, and the gradient is
    unbiased too: the proposal counts as given.

    Args:
      key: typed key.
      phi: ``phi(x) -> (n, J)`` for points ``x`` ``(n, d)``: real numbers, integers or booleans,
        one column for each expectation; one column ``(n, 1)`` or ``(n,)`` serves all.
      log_f: ``log_f(x) -> (n, 1)`` or ``(n,)``, the normalised log-density of the input law, or
        ``(n, J)``, that of one law for each expectation. ``-inf`` is fine, whatever ``phi`` is
        there.
      sample_f: ``sample_f(key, n) -> (n, d)``, draws of that law, or of the equal mixture of the
        J laws.
      budget: evaluations of ``phi``, at ``budget`` points exactly.
      weights: positive ``(J,)``, of the variances in the criterion; 1 if ``None``. A guess of
        ``1/I_j^2`` serves relative errors.
      family: of a component, ``"gaussian"`` or ``"mixture"``, ``inner`` Gaussians fitted by EM: for
        a ``phi_j f_j`` of several modes.
      batches: most batches of the adaptation, at least 2.
      adapt_fraction: most of the budget that the adaptation may spend, in (0, 1).
      control_variates: ``False`` for plain importance sampling from the mixture.
      diagonal: components with diagonal covariances.
      jitter: added to the components' variances, in units of the first batch's own.
      simplex: ``"multiplicative"`` minimises the variance over the shares; ``"fixed"`` keeps them
        in proportion to ``sqrt(w_j) |I_j|``.
      inner: see ``family``.
      defensive: share of all points after the first batch that is drawn from the law itself, in
        [0, 1). A share such as 0.1 bounds the weights f/g: worth its price where tails of
        ``phi_j f_j`` are heavier than a Gaussian's fit to it (indicators of rare events), or where
        ``max_share`` comes out near 1.
      shrinkage: the covariances have a prior at the law's own, worth ``shrinkage * d`` points:
        without it (0, as published) the first fits, often from two or three points that count,
        can be needles.
      host: ``phi``, ``log_f`` and ``sample_f`` are any Python code, called outside ``jit`` with
        NumPy arrays (``sample_f`` with the key). Same points and, to rounding, same estimates.
      batch_size: most points in one call of ``phi`` under ``host``; a batch at a time if ``None``.
      progress: ``True`` shows a bar on a terminal and plain lines elsewhere.

    Returns:
      ``Expectations``. All NaN where ``phi`` is zero in the whole first batch, column ``j`` where
      ``phi_j`` is zero in the whole final sample: no mass was found, and 0 would be a guess. NaN
      where ``phi`` is NaN or infinite. Each is an error under ``checkify``; with ``host`` the first
      and the last raise ``ValueError`` at once, before more is spent.

    Raises:
      TypeError: a raw key, integer weights, complex values, traced arguments with ``host``.
      ValueError: a budget whose batches hold no more than ``d + 1`` or ``J`` points; numbers of
        columns that do not agree; weights that are not positive or not J; unknown names; options
        out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> log_f, sample_f = standard_normal(1)
      >>> out = multiple_expectations(
      ...     jax.random.key(0), lambda x: x ** jnp.array([[2, 4]]), log_f, sample_f, 2000
      ... )  # the second and fourth moment, 1 and 3
      >>> bool(jnp.all(jnp.abs(out.mean - jnp.array([1.0, 3.0])) < 0.02)), int(out.nfe)
      (True, 2000)
    """
    keys.check(key)
    budget = positive_int("budget", budget)
    batches = positive_int("batches", batches, least=2)
    one_of("family", family, ("gaussian", "mixture"))
    one_of("simplex", simplex, ("multiplicative", "fixed"))
    if not 0 < adapt_fraction < 1:
        raise ValueError(f"adapt_fraction is {adapt_fraction!r}; expected a number in (0, 1)")
    for name, value in (("jitter", jitter), ("shrinkage", shrinkage)):
        if not (isinstance(value, int | float) and 0 <= value < float("inf")):
            raise ValueError(f"{name} is {value!r}; expected a number of at least 0")
    if not 0 <= defensive < 1:
        raise ValueError(f"defensive is {defensive!r}; expected a number in [0, 1)")
    size = int(adapt_fraction * budget) // batches
    if size < 3 or budget - batches * size < 2:
        raise ValueError(
            f"budget {budget} with adapt_fraction {adapt_fraction} gives {batches} batches of "
            f"{size} points; expected at least 3 in each, and 2 points left"
        )
    if batch_size is not None:
        batch_size = positive_int("batch_size", batch_size)
        if not host:
            raise ValueError("batch_size is for host=True; expected None without it")
    inner = positive_int("inner", inner) if family == "mixture" else 1
    weights = _checked_weights(weights)
    plan = _Plan(
        budget=budget,
        batches=batches,
        size=size,
        family=family,
        inner=inner,
        control_variates=bool(control_variates),
        diagonal=bool(diagonal),
        jitter=float(jitter),
        simplex=simplex,
        defensive=float(defensive),
        shrinkage=float(shrinkage),
    )
    is_traced = any(isinstance(v, jax.core.Tracer) for v in (key, weights))
    if host:
        if is_traced:
            raise TypeError("host=True runs in Python; expected to be called outside jit and vmap")
        return _run_host(key, weights, phi, log_f, sample_f, plan, batch_size, progress)
    run = _run if is_traced else _run_compiled
    return run(
        key, weights, phi=phi, log_f=log_f, sample_f=sample_f, plan=plan, progress=bool(progress)
    )
