"""Exact answers that particle methods are held against: Kalman's, and enumeration of all paths.

Public, as tests, benchmarks and users' first notebooks need them. The Kalman filter and smoother
live in ``kalman``.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import checks
from jaxgen.smc.kalman import (
    KalmanFilter,
    KalmanSmoother,
    LinearGaussian,
    kalman_filter,
    kalman_smoother,
    linear_gaussian,
)

__all__ = [
    "Enumeration",
    "KalmanFilter",
    "KalmanSmoother",
    "LinearGaussian",
    "hmm_enumerate",
    "kalman_filter",
    "kalman_smoother",
    "linear_gaussian",
]

_MOST = 2**22


class Enumeration(NamedTuple):
    """All paths of a finite hidden Markov model.

    Attributes:
      log_z: ``()``, log-likelihood of all observations, in nats.
      paths: int32 ``(states^steps, steps)``, the paths in rising order, step 0 the slowest.
      log_probs: ``(states^steps,)``, log-probability of each path given the observations.
      marginals: ``(steps, states)``, of each state given all observations.
      estimate: mean of ``functional`` over paths given the observations, or ``None``.
    """

    log_z: jax.Array
    paths: jax.Array
    log_probs: jax.Array
    marginals: jax.Array
    estimate: jax.Array | None


def hmm_enumerate(
    initial_probs: ArrayLike,
    transition_probs: ArrayLike,
    potentials: ArrayLike,
    functional: Callable[[jax.Array], jax.Array] | None = None,
) -> Enumeration:
    """The law of a finite hidden Markov model's path given observations, by listing all paths.

    Args:
      initial_probs: ``(states,)``.
      transition_probs: ``(states, states)``, rows sum to one.
      potentials: ``(steps, states)``, likelihood of step t's observation in each state.
      functional: ``functional(path)`` of one path int32 ``(steps,)``, any shape.

    Returns:
      ``Enumeration``.

    Raises:
      TypeError: probabilities of integer dtype.
      ValueError: shapes that do not fit together, or more than 2^22 paths.

    Example:
      >>> import jax.numpy as jnp
      >>> move = jnp.array([[0.8, 0.2], [0.3, 0.7]])
      >>> see = jnp.array([[0.9, 0.1], [0.2, 0.8]])
      >>> y = jnp.array([0, 1, 1, 0, 1])
      >>> done = hmm_enumerate(
      ...     jnp.array([0.5, 0.5]), move, see.T[y], lambda x: jnp.sum(x[:-1] * x[1:])
      ... )
      >>> f"{jnp.exp(done.log_z):.6f} {done.estimate:.5f}"
      '0.012852 2.19563'
    """
    initial = checks.floating("initial_probs", initial_probs)
    move = checks.floating("transition_probs", transition_probs)
    see = checks.floating("potentials", potentials)
    states = initial.shape[0] if initial.ndim == 1 else 0
    fits = states and move.shape == (states, states) and see.ndim == 2 and see.shape[1] == states
    if not fits or see.shape[0] == 0:
        raise ValueError(
            f"initial_probs, transition_probs and potentials have shapes {initial.shape}, "
            f"{move.shape} and {see.shape}; expected (states,), (states, states), (steps, states)"
        )
    steps = see.shape[0]
    if states**steps > _MOST:
        raise ValueError(f"{states}^{steps} paths are more than {_MOST}; expected fewer")
    grids = jnp.meshgrid(*[jnp.arange(states, dtype=jnp.int32)] * steps, indexing="ij")
    paths = jnp.stack([g.reshape(-1) for g in grids], axis=1)
    log_probs = jnp.log(initial)[paths[:, 0]]
    log_probs = log_probs + jnp.sum(jnp.log(move)[paths[:, :-1], paths[:, 1:]], axis=1)
    log_probs = log_probs + jnp.sum(jnp.log(see)[jnp.arange(steps)[None], paths], axis=1)
    log_z = jax.scipy.special.logsumexp(log_probs)
    log_probs = log_probs - log_z
    probs = jnp.exp(log_probs)
    one_hot = jax.nn.one_hot(paths, states, dtype=probs.dtype)
    estimate = None
    if functional is not None:
        values = jax.vmap(functional)(paths)
        estimate = jnp.tensordot(probs, values.astype(probs.dtype), axes=1, precision="highest")
    marginals = jnp.einsum("p,pts->ts", probs, one_hot, precision="highest")
    return Enumeration(log_z, paths, log_probs, marginals, estimate)
