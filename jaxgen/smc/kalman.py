"""Linear-Gaussian state-space models: exact filter and smoother, and the model for particles.

    x_0 ~ N(m_0, P_0),   x_t = F_t x_{t-1} + b_t + N(0, Q_t),   y_t = H_t x_t + c_t + N(0, R_t)

Kalman 1960 in the covariance form with Joseph's update, Rauch, Tung and Striebel 1965 for the
smoother with the covariance of neighbours (Sarkka 2013, sections 4.3 and 8.2). All are one
``lax.scan``, differentiable in the parameters.

With the proposal p(x_t | x_{t-1}, y_t) and the auxiliary weight p(y_t | x_{t-1}), both Gaussian
here, all weights of a particle filter are equal (the fully adapted filter of Pitt and Shephard).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import checks
from jaxgen.core import keys as keys_
from jaxgen.core.arrays import matmul
from jaxgen.smc.state_space import StateSpaceModel

__all__ = [
    "KalmanFilter",
    "KalmanSmoother",
    "LinearGaussian",
    "kalman_filter",
    "kalman_smoother",
    "linear_gaussian",
    "simulate",
]


class LinearGaussian(NamedTuple):
    """Parameters of a linear-Gaussian state-space model, state of size d, observation of size k.

    Made by ``linear_gaussian``, which checks. Each matrix or offset of a step may have a leading
    axis ``steps``; entry t then leads to, or observes, step t (a transition's at 0 is unused).

    Attributes:
      initial_mean: ``(d,)``.
      initial_cov: ``(d, d)``.
      transition_matrix: ``(d, d)`` or ``(steps, d, d)``.
      transition_cov: like it.
      observation_matrix: ``(k, d)`` or ``(steps, k, d)``.
      observation_cov: ``(k, k)`` or ``(steps, k, k)``.
      transition_offset: ``(d,)`` or ``(steps, d)``.
      observation_offset: ``(k,)`` or ``(steps, k)``.
    """

    initial_mean: jax.Array
    initial_cov: jax.Array
    transition_matrix: jax.Array
    transition_cov: jax.Array
    observation_matrix: jax.Array
    observation_cov: jax.Array
    transition_offset: jax.Array
    observation_offset: jax.Array

    def at(self, t: ArrayLike) -> tuple[jax.Array, ...]:
        """``(F, b, Q, H, c, R)`` of step ``t``."""

        def pick(array: jax.Array, ndim: int) -> jax.Array:
            return array if array.ndim == ndim else array[jnp.asarray(t)]

        return (
            pick(self.transition_matrix, 2),
            pick(self.transition_offset, 1),
            pick(self.transition_cov, 2),
            pick(self.observation_matrix, 2),
            pick(self.observation_offset, 1),
            pick(self.observation_cov, 2),
        )

    def model(self, *, proposal: str = "bootstrap", auxiliary: bool = False) -> StateSpaceModel:
        """The state-space model for particles ``(d,)``, with all its densities.

        Covariances must be positive definite (NaN otherwise).

        Args:
          proposal: ``"bootstrap"`` draws from the transition, ``"optimal"`` from the laws of x_t
            given x_{t-1} and y_t, and of x_0 given y_0.
          auxiliary: give the first-stage log-weight ``log p(y_t | x_{t-1})``.
        """
        return _model(self, proposal, auxiliary)


def linear_gaussian(
    initial_mean: ArrayLike,
    initial_cov: ArrayLike,
    transition_matrix: ArrayLike,
    transition_cov: ArrayLike,
    observation_matrix: ArrayLike,
    observation_cov: ArrayLike,
    *,
    transition_offset: ArrayLike | None = None,
    observation_offset: ArrayLike | None = None,
) -> LinearGaussian:
    """A ``LinearGaussian`` of checked shapes and one dtype; offsets are zero by default.

    Args:
      initial_mean: ``(d,)``.
      initial_cov: ``(d, d)``.
      transition_matrix: ``(d, d)`` or ``(steps, d, d)``.
      transition_cov: like it.
      observation_matrix: ``(k, d)`` or ``(steps, k, d)``.
      observation_cov: ``(k, k)`` or ``(steps, k, k)``.
      transition_offset: ``(d,)`` or ``(steps, d)``.
      observation_offset: ``(k,)`` or ``(steps, k)``.

    Raises:
      TypeError: a parameter of integer dtype.
      ValueError: shapes that do not fit together.

    Example:
      >>> import jax.numpy as jnp
      >>> eye = jnp.eye(1)
      >>> walk = linear_gaussian(jnp.zeros(1), eye, eye, 0.25 * eye, eye, 0.09 * eye)
      >>> done = kalman_filter(walk, jnp.array([[0.3], [0.1]]))
      >>> done.means.shape, done.covs.shape, done.log_z.shape
      ((2, 1), (2, 1, 1), ())
    """
    given = {
        "initial_mean": initial_mean,
        "initial_cov": initial_cov,
        "transition_matrix": transition_matrix,
        "transition_cov": transition_cov,
        "observation_matrix": observation_matrix,
        "observation_cov": observation_cov,
        "transition_offset": transition_offset,
        "observation_offset": observation_offset,
    }
    arrays = {name: checks.floating(name, v) for name, v in given.items() if v is not None}
    if arrays["initial_mean"].ndim != 1 or arrays["observation_matrix"].ndim < 2:
        raise ValueError(
            f"initial_mean has shape {arrays['initial_mean'].shape} and observation_matrix "
            f"{arrays['observation_matrix'].shape}; expected (d,) and (k, d) or (steps, k, d)"
        )
    d, k = arrays["initial_mean"].shape[0], arrays["observation_matrix"].shape[-2]
    expected = {
        "initial_mean": (d,),
        "initial_cov": (d, d),
        "transition_matrix": (d, d),
        "transition_cov": (d, d),
        "observation_matrix": (k, d),
        "observation_cov": (k, k),
        "transition_offset": (d,),
        "observation_offset": (k,),
    }
    steps: dict[str, int] = {}
    for name, array in arrays.items():
        shape = expected[name]
        fits = array.shape == shape
        if not name.startswith("initial") and array.shape[1:] == shape:
            steps[name], fits = array.shape[0], True
        if not fits:
            raise ValueError(
                f"{name} has shape {array.shape}; expected {shape} for a state of size {d} and an "
                f"observation of size {k}"
                + ("" if name.startswith("initial") else ", or the same with steps in front")
            )
    if len(set(steps.values())) > 1:
        raise ValueError(f"parameters have unequal numbers of steps: {steps}")
    dtype = jnp.result_type(jnp.float32, *arrays.values())
    arrays.setdefault("transition_offset", jnp.zeros(d))
    arrays.setdefault("observation_offset", jnp.zeros(k))
    return LinearGaussian(**{name: a.astype(dtype) for name, a in arrays.items()})


# --- exact filtering and smoothing ----------------------------------------------------------------


class KalmanFilter(NamedTuple):
    """Exact filtering laws.

    Attributes:
      log_z: ``()``, log-likelihood of all observations, in nats.
      log_z_steps: ``(steps,)``, the same up to each step.
      means: ``(steps, d)``, of x_t given y_{0:t}.
      covs: ``(steps, d, d)``.
      predicted_means: ``(steps, d)``, of x_t given y_{0:t-1}.
      predicted_covs: ``(steps, d, d)``.
    """

    log_z: jax.Array
    log_z_steps: jax.Array
    means: jax.Array
    covs: jax.Array
    predicted_means: jax.Array
    predicted_covs: jax.Array


class KalmanSmoother(NamedTuple):
    """Exact smoothing laws.

    Attributes:
      log_z: ``()``, log-likelihood of all observations, in nats.
      means: ``(steps, d)``, of x_t given all observations.
      covs: ``(steps, d, d)``.
      cross_covs: ``(steps - 1, d, d)``, of ``(x_t, x_{t+1})``: rows are x_t's, columns x_{t+1}'s.
    """

    log_z: jax.Array
    means: jax.Array
    covs: jax.Array
    cross_covs: jax.Array


def _log_normal(residual: jax.Array, cov: jax.Array) -> jax.Array:
    chol = jnp.linalg.cholesky(cov)
    white = jax.scipy.linalg.solve_triangular(chol, residual, lower=True)
    return _log_white(white, _half_log_det(chol))


def _log_white(white: jax.Array, half_log_det: jax.Array) -> jax.Array:
    size = white.shape[-1]
    return -0.5 * jnp.sum(white**2, axis=-1) - half_log_det - 0.5 * size * math.log(2 * math.pi)


def _half_log_det(chol: jax.Array) -> jax.Array:
    return jnp.sum(jnp.log(jnp.diagonal(chol, axis1=-2, axis2=-1)), axis=-1)


def _gain(cov: jax.Array, h: jax.Array, r: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Kalman's gain and the covariance of the innovation."""
    s = matmul(h, cov, h.T) + r
    factor = (jnp.linalg.cholesky(s), True)
    return jax.scipy.linalg.cho_solve(factor, matmul(h, cov)).T, s


def _joseph(cov: jax.Array, gain: jax.Array, h: jax.Array, r: jax.Array) -> jax.Array:
    left = jnp.eye(cov.shape[0], dtype=cov.dtype) - matmul(gain, h)
    return matmul(left, cov, left.T) + matmul(gain, r, gain.T)


def _inputs(
    params: LinearGaussian, observations: ArrayLike, observed: ArrayLike | None
) -> tuple[jax.Array, jax.Array]:
    y = checks.floating("observations", observations)
    k = params.observation_matrix.shape[-2]
    if y.ndim != 2 or y.shape[0] == 0 or y.shape[1] != k:
        raise ValueError(f"observations has shape {y.shape}; expected (steps, {k})")
    for name, array in params._asdict().items():
        extra = name.endswith(("matrix", "cov")) + 1
        if array.ndim > extra and array.shape[0] != y.shape[0]:
            raise ValueError(
                f"{name} holds {array.shape[0]} steps and observations {y.shape[0]}; expected "
                "the same"
            )
    seen = jnp.ones(y.shape[0], bool) if observed is None else jnp.asarray(observed)
    if seen.dtype != bool or seen.shape != y.shape[:1]:
        raise ValueError(
            f"observed has shape {seen.shape} and dtype {seen.dtype}; expected bool {y.shape[:1]}"
        )
    return y.astype(params.initial_mean.dtype), seen


def kalman_filter(
    params: LinearGaussian, observations: ArrayLike, *, observed: ArrayLike | None = None
) -> KalmanFilter:
    """Exact filtering means, covariances and log-likelihood.

    Args:
      params: the model.
      observations: ``(steps, k)``.
      observed: bool ``(steps,)``, false where the observation is missing; its value is ignored.

    Returns:
      ``KalmanFilter``.

    Raises:
      ValueError: other shapes.
    """
    y, seen = _inputs(params, observations, observed)
    steps = jnp.arange(y.shape[0])

    def step(carry: Any, inputs: Any) -> Any:
        mean, cov = carry
        t, y, seen = inputs
        f, b, q, h, c, r = params.at(t)
        first = t == 0
        predicted = jnp.where(first, mean, matmul(f, mean) + b)
        predicted_cov = jnp.where(first, cov, matmul(f, cov, f.T) + q)
        residual = jnp.where(seen, y - matmul(h, predicted) - c, 0.0)
        gain, s = _gain(predicted_cov, h, r)
        mean = predicted + matmul(gain, residual)
        cov = jnp.where(seen, _joseph(predicted_cov, gain, h, r), predicted_cov)
        grown = jnp.where(seen, _log_normal(residual, s), 0.0)
        return (mean, cov), (grown, mean, cov, predicted, predicted_cov)

    start = (params.initial_mean, params.initial_cov)
    _, (grown, *laws) = jax.lax.scan(step, start, (steps, y, seen))
    log_z = jnp.cumsum(grown)
    return KalmanFilter(log_z[-1], log_z, *laws)


def kalman_smoother(
    params: LinearGaussian, observations: ArrayLike, *, observed: ArrayLike | None = None
) -> KalmanSmoother:
    """Exact smoothing means, covariances and the covariances of neighbours.

    With them ``E[x_t x_{t+1}^T] = cross_covs[t] + outer(means[t], means[t + 1])``.

    Args:
      params: the model.
      observations: ``(steps, k)``.
      observed: bool ``(steps,)``, false where the observation is missing; its value is ignored.

    Returns:
      ``KalmanSmoother``.

    Raises:
      ValueError: other shapes.
    """
    done = kalman_filter(params, observations, observed=observed)
    steps = jnp.arange(done.means.shape[0])

    def back(carry: Any, inputs: Any) -> Any:
        mean_next, cov_next = carry
        t, mean, cov, predicted, predicted_cov = inputs
        f = params.at(t + 1)[0]
        factor = (jnp.linalg.cholesky(predicted_cov), True)
        gain = jax.scipy.linalg.cho_solve(factor, matmul(f, cov)).T
        mean = mean + matmul(gain, mean_next - predicted)
        # In Joseph's form: cov + gain (cov_next - predicted_cov) gain^T without the difference.
        smoothed = _joseph(cov, gain, f, params.at(t + 1)[2]) + matmul(gain, cov_next, gain.T)
        return (mean, smoothed), (mean, smoothed, matmul(gain, cov_next))

    last = (done.means[-1], done.covs[-1])
    inputs = (
        steps[:-1],
        done.means[:-1],
        done.covs[:-1],
        done.predicted_means[1:],
        done.predicted_covs[1:],
    )
    _, (means, covs, cross) = jax.lax.scan(back, last, inputs, reverse=True)
    return KalmanSmoother(
        done.log_z,
        jnp.concatenate([means, last[0][None]]),
        jnp.concatenate([covs, last[1][None]]),
        cross,
    )


def simulate(key: jax.Array, params: LinearGaussian, steps: int) -> tuple[jax.Array, jax.Array]:
    """Draw states ``(steps, d)`` and observations ``(steps, k)``.

    Args:
      key: one typed key.
      params: the model.
      steps: how many.
    """
    steps = checks.positive_int("steps", steps)
    keys = jax.random.split(keys_.check(key), steps)
    dtype = params.initial_mean.dtype

    def normal(key: jax.Array, cov: jax.Array) -> jax.Array:
        return matmul(jnp.linalg.cholesky(cov), jax.random.normal(key, cov.shape[:1], dtype))

    def step(x: jax.Array, inputs: Any) -> Any:
        t, key = inputs
        state_key, observation_key = jax.random.split(key)
        f, b, q, h, c, r = params.at(t)
        first = params.initial_mean + normal(state_key, params.initial_cov)
        x = jnp.where(t == 0, first, matmul(f, x) + b + normal(state_key, q))
        return x, (x, matmul(h, x) + c + normal(observation_key, r))

    return jax.lax.scan(step, params.initial_mean, (jnp.arange(steps), keys))[1]


# --- the model for particles ----------------------------------------------------------------------


class _Normal(NamedTuple):
    """A centred Gaussian: its root, the inverse root and the half log-determinant."""

    root: jax.Array
    white: jax.Array
    half_log_det: jax.Array

    def draw(self, key: jax.Array) -> jax.Array:
        return matmul(self.root, jax.random.normal(key, self.root.shape[:1], self.root.dtype))

    def log_prob(self, residual: jax.Array) -> jax.Array:
        return _log_white(matmul(self.white, residual), self.half_log_det)


def _normal(cov: jax.Array) -> _Normal:
    root = jnp.linalg.cholesky(cov)
    eye = jnp.broadcast_to(jnp.eye(cov.shape[-1], dtype=cov.dtype), cov.shape)
    white = jax.scipy.linalg.solve_triangular(root, eye, lower=True)
    return _Normal(root, white, _half_log_det(root))


def _per_step(f: Callable[..., Any], *args: jax.Array, ndim: int = 2) -> Callable[[Any], Any]:
    """``f`` of the arguments of each step, computed once: a function of the step."""
    if all(a.ndim == ndim for a in args):
        fixed = f(*args)
        return lambda t: fixed
    steps = next(a.shape[0] for a in args if a.ndim > ndim)
    every = jax.vmap(f)(
        *(a if a.ndim > ndim else jnp.broadcast_to(a, (steps, *a.shape)) for a in args)
    )
    return lambda t: jax.tree.map(lambda a: a[t], every)


def _model(params: LinearGaussian, proposal: str, auxiliary: bool) -> StateSpaceModel:
    checks.one_of("proposal", proposal, ("bootstrap", "optimal"))
    initial = _normal(params.initial_cov)
    moves = _per_step(_normal, params.transition_cov)
    sees = _per_step(_normal, params.observation_cov)

    def mean(x: jax.Array, t: jax.Array) -> jax.Array:
        f, b, *_ = params.at(t)
        return matmul(f, x) + b

    def seen(x: jax.Array, t: jax.Array) -> jax.Array:
        *_, h, c, _ = params.at(t)
        return matmul(h, x) + c

    def init(key: jax.Array) -> jax.Array:
        return params.initial_mean + initial.draw(key)

    def transition(key: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        return mean(x, t) + moves(t).draw(key)

    def log_potential(x: jax.Array, y: jax.Array, t: jax.Array) -> jax.Array:
        return sees(t).log_prob(y - seen(x, t))

    def log_transition(x_prev: jax.Array, x_next: jax.Array, t: jax.Array) -> jax.Array:
        return moves(t).log_prob(x_next - mean(x_prev, t))

    def log_init(x: jax.Array) -> jax.Array:
        return initial.log_prob(x - params.initial_mean)

    def log_transition_bound(t: jax.Array) -> jax.Array:
        return _log_white(jnp.zeros_like(params.initial_mean), moves(t).half_log_det)

    made = functools.partial(
        StateSpaceModel,
        init,
        transition,
        log_potential,
        log_transition,
        log_init=log_init,
        log_transition_bound=log_transition_bound,
    )
    if proposal == "bootstrap" and not auxiliary:
        return made()

    def corrected(cov: jax.Array, h: jax.Array, r: jax.Array) -> Any:
        gain, s = _gain(cov, h, r)
        return gain, _normal(s), _normal(_joseph(cov, gain, h, r))

    given = _per_step(
        corrected, params.transition_cov, params.observation_matrix, params.observation_cov
    )

    def log_auxiliary(x_prev: jax.Array, y: jax.Array, t: jax.Array) -> jax.Array:
        return given(t)[1].log_prob(y - seen(mean(x_prev, t), t))

    if proposal == "bootstrap":
        return made(log_auxiliary=log_auxiliary)

    def centre(x_prev: jax.Array, y: jax.Array, t: jax.Array) -> jax.Array:
        ahead = mean(x_prev, t)
        return ahead + matmul(given(t)[0], y - seen(ahead, t))

    def propose(key: jax.Array, x_prev: jax.Array, y: jax.Array, t: jax.Array) -> jax.Array:
        return centre(x_prev, y, t) + given(t)[2].draw(key)

    def log_propose(x_prev: jax.Array, x_next: jax.Array, y: jax.Array, t: jax.Array) -> jax.Array:
        return given(t)[2].log_prob(x_next - centre(x_prev, y, t))

    *_, h0, _, r0 = params.at(0)
    gain0, _, initial0 = corrected(params.initial_cov, h0, r0)

    def centre0(y: jax.Array) -> jax.Array:
        ahead = y - seen(params.initial_mean, jnp.int32(0))
        return params.initial_mean + matmul(gain0, ahead)

    return made(
        propose=propose,
        log_propose=log_propose,
        propose_init=lambda key, y: centre0(y) + initial0.draw(key),
        log_propose_init=lambda x, y: initial0.log_prob(x - centre0(y)),
        log_auxiliary=log_auxiliary if auxiliary else None,
    )
