"""State-space models that move by an SDE between observations, at times as irregular as they come.

    dx = f(t, x) dt + g(t, x) dW,    y_i observed at times[i],    x_0 the state at times[0]

``linear_sde`` is exact for dx = (A x + a) dt + B dW: with h the time between two observations,

    F = exp(A h),   b = int_0^h exp(A s) a ds,   Q = int_0^h exp(A s) B B^T exp(A^T s) ds,

by a Taylor step of length h / 2^24 and 24 doublings, F(2h) = F(h)^2, b(2h) = b(h) + F(h) b(h),
Q(2h) = Q(h) + F(h) Q(h) F(h)^T, carried by F - I so that no bits are lost. Unlike Van Loan's block
exponential it never forms exp(-A h), which overflows for stiff systems (Sarkka and Solin 2019,
section 6.3 for the integrals).

``sde_model`` takes diffrax terms and a solver with a fixed number of steps between observations:
Euler and Maruyama's by default, whose one-step transition has a density.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from jaxgen.core import checks
from jaxgen.core.arrays import at_least_f32, matmul
from jaxgen.smc.kalman import LinearGaussian, linear_gaussian
from jaxgen.smc.state_space import StateSpaceModel
from jaxgen.solve.drivers import scan_terms
from jaxgen.solve.path import GridPath

__all__ = ["discretize_linear_sde", "linear_sde", "sde_model"]

_DOUBLINGS = 24


def _check_times(times: ArrayLike) -> jax.Array:
    array = checks.floating("times", times)
    if array.ndim != 1 or array.shape[0] == 0:
        raise ValueError(f"times has shape {array.shape}; expected (steps,)")
    known = checks.concrete(array)
    if known is not None and not np.all(np.diff(known) > 0):
        raise ValueError(f"times are {known}; expected rising times")
    checks.debug_check(jnp.all(jnp.diff(array) > 0), "times do not rise")
    return array


# --- linear: exact --------------------------------------------------------------------------------


def discretize_linear_sde(
    drift_matrix: ArrayLike,
    diffusion_matrix: ArrayLike,
    h: ArrayLike,
    drift_offset: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The exact transition of ``dx = (A x + a) dt + B dW`` over a time ``h``.

    Args:
      drift_matrix: A, ``(d, d)``.
      diffusion_matrix: B, ``(d, m)``.
      h: ``()``, at least 0.
      drift_offset: a, ``(d,)``; zero by default.

    Returns:
      ``(F, b, Q)``: matrix ``(d, d)``, offset ``(d,)`` and covariance ``(d, d)``.

    Example:
      >>> import jax.numpy as jnp
      >>> f, b, q = discretize_linear_sde(-jnp.eye(1), jnp.eye(1), 0.5)
      >>> f"{f[0, 0]:.5f} {q[0, 0]:.5f}"  # exp(-1/2), (1 - exp(-1)) / 2
      '0.60653 0.31606'
    """
    a, root = checks.floating("drift_matrix", drift_matrix), jnp.asarray(diffusion_matrix)
    if a.ndim != 2 or a.shape[0] != a.shape[1] or root.ndim != 2 or root.shape[0] != a.shape[0]:
        raise ValueError(
            f"drift_matrix has shape {a.shape} and diffusion_matrix {root.shape}; expected (d, d) "
            "and (d, m)"
        )
    offset = jnp.zeros(a.shape[0], a.dtype) if drift_offset is None else jnp.asarray(drift_offset)
    if offset.shape != a.shape[:1]:
        raise ValueError(f"drift_offset has shape {offset.shape}; expected {a.shape[:1]}")
    short = jnp.asarray(h, a.dtype) / 2**_DOUBLINGS
    # Taylor series to third order: what is left out is below rounding at that length.
    ah, q1 = a * short, matmul(root, root.T) * short
    aq1 = matmul(a, q1)
    q2 = aq1 + aq1.T
    aq2 = matmul(a, q2)
    q3 = aq2 + aq2.T
    eye = jnp.eye(a.shape[0], dtype=a.dtype)
    series = eye + matmul(ah, eye + ah / 3) / 2
    e, b = matmul(ah, series), matmul(series, offset) * short
    q = q1 + q2 * (short / 2) + q3 * (short**2 / 6)

    def double(_: Any, carry: Any) -> Any:
        e, b, q = carry
        eq = matmul(e, q)
        squared, offset = 2 * e + matmul(e, e), 2 * b + matmul(e, b)
        return squared, offset, 2 * q + eq + eq.T + matmul(eq, e.T)

    e, b, q = jax.lax.fori_loop(0, _DOUBLINGS, double, (e, b, q))
    return e + eye, b, 0.5 * (q + q.T)


def linear_sde(
    drift_matrix: ArrayLike,
    diffusion_matrix: ArrayLike,
    times: ArrayLike,
    initial_mean: ArrayLike,
    initial_cov: ArrayLike,
    observation_matrix: ArrayLike,
    observation_cov: ArrayLike,
    *,
    drift_offset: ArrayLike | None = None,
    observation_offset: ArrayLike | None = None,
) -> LinearGaussian:
    """A linear SDE observed at ``times``, exactly: for Kalman, and by ``.model()`` for particles.

    Args:
      drift_matrix: A, ``(d, d)``.
      diffusion_matrix: B, ``(d, m)``.
      times: ``(steps,)``, rising; the first is where the initial law holds.
      initial_mean: ``(d,)``.
      initial_cov: ``(d, d)``.
      observation_matrix: ``(k, d)`` or ``(steps, k, d)``.
      observation_cov: ``(k, k)`` or ``(steps, k, k)``.
      drift_offset: a, ``(d,)``.
      observation_offset: ``(k,)`` or ``(steps, k)``.

    Returns:
      ``LinearGaussian`` with one transition for each time.

    Raises:
      TypeError: a parameter of integer dtype.
      ValueError: shapes that do not fit together, times that do not rise (a checkify error where
        they are traced).
    """
    times = _check_times(times)
    # The first transition is not used; any length above zero keeps its covariance definite.
    lengths = jnp.concatenate([jnp.ones(1, times.dtype), jnp.diff(times)])
    f, b, q = jax.vmap(
        lambda h: discretize_linear_sde(drift_matrix, diffusion_matrix, h, drift_offset)
    )(lengths)
    return linear_gaussian(
        initial_mean,
        initial_cov,
        f,
        q,
        observation_matrix,
        observation_cov,
        transition_offset=b,
        observation_offset=observation_offset,
    )


# --- any SDE: a fixed number of solver steps ------------------------------------------------------


class _Given(diffrax.AbstractBrownianPath):
    """A path whose next increment is known."""

    t0: Any  # type: ignore[misc]
    t1: Any  # type: ignore[misc]
    increment: Any
    levy_area: Any

    def __init__(self, t0: Any, t1: Any, increment: Any):
        self.t0, self.t1, self.increment = t0, t1, increment
        self.levy_area = diffrax.BrownianIncrement

    def evaluate(
        self, t0: Any, t1: Any | None = None, left: bool = True, use_levy: bool = False
    ) -> Any:
        """The increment, over any interval."""
        del left, use_levy, t0, t1
        return self.increment


def _levy_area(solver: diffrax.AbstractSolver) -> type:
    """The least that the solver asks of its path."""
    least = getattr(solver, "minimal_levy_area", diffrax.AbstractBrownianIncrement)
    if issubclass(least, diffrax.AbstractSpaceTimeTimeLevyArea):
        return diffrax.SpaceTimeTimeLevyArea
    if issubclass(least, diffrax.AbstractSpaceTimeLevyArea):
        return diffrax.SpaceTimeLevyArea
    return diffrax.BrownianIncrement


def sde_model(
    terms: Callable[[diffrax.AbstractBrownianPath], Any],
    times: ArrayLike,
    *,
    init: Callable[[jax.Array], Any],
    log_potential: Callable[[Any, Any, jax.Array], jax.Array],
    substeps: int = 1,
    solver: diffrax.AbstractSolver | None = None,
    noise_shape: tuple[int, ...] | None = None,
    log_init: Callable[[Any], jax.Array] | None = None,
    log_auxiliary: Callable[[Any, Any, jax.Array], jax.Array] | None = None,
) -> StateSpaceModel:
    """A state-space model whose transition is an SDE, solved with ``substeps`` steps a transition.

    With Euler's solver and one step a transition the model has ``log_transition``, found from the
    step's own dependence on its increment; it is NaN unless the noise moves all coordinates.

    Args:
      terms: ``terms(path)``, diffrax terms of one particle on a Brownian path, as
        ``lambda path: MultiTerm(ODETerm(drift), ControlTerm(diffusion, path))``, in raw time with
        ``args`` ``None``. Ito or Stratonovich as the solver takes them.
      times: ``(steps,)``, rising; ``init`` is the law at the first.
      init: as in ``StateSpaceModel``.
      log_potential: as in ``StateSpaceModel``.
      substeps: solver steps between two observations, equal in length, at least 1.
      solver: a diffrax solver for SDEs, of fixed step; ``diffrax.Euler()`` by default. Diffrax's
        Runge-Kutta solvers need ``check_vma=False`` inside ``shard_map``.
      noise_shape: shape of the Brownian path; by default that of a particle that is one array.
      log_init: as in ``StateSpaceModel``.
      log_auxiliary: as in ``StateSpaceModel``.

    Returns:
      ``StateSpaceModel``; a step of the solver that fails gives NaN.

    Raises:
      TypeError: times of integer dtype, or ``terms`` that is no function.
      ValueError: times that do not rise (a checkify error where they are traced), ``substeps``
        below 1, particles of several arrays without ``noise_shape``.

    Example:
      >>> import diffrax, jax, jax.numpy as jnp
      >>> def terms(path):
      ...     drift = diffrax.ODETerm(lambda t, x, args: jnp.sin(x))
      ...     return diffrax.MultiTerm(drift, diffrax.ControlTerm(lambda t, x, args: 0.5, path))
      >>> model = sde_model(
      ...     terms,
      ...     jnp.array([0.0, 0.4, 1.5]),
      ...     init=jax.random.normal,
      ...     log_potential=lambda x, y, t: -0.5 * (y - x) ** 2,
      ...     substeps=10,
      ... )
      >>> model.transition(jax.random.key(0), jnp.zeros(()), 1).shape
      ()
    """
    if not callable(terms):
        raise TypeError(f"terms is {type(terms).__name__}; expected a function of a Brownian path")
    knots = _check_times(times)
    substeps = checks.positive_int("substeps", substeps)
    method = diffrax.Euler() if solver is None else solver

    def noise_of(x: Any) -> tuple[tuple[int, ...], Any]:
        leaves = jax.tree.leaves(x)
        if noise_shape is None and len(leaves) != 1:
            raise ValueError(
                f"noise_shape is None for particles of {len(leaves)} arrays; expected the shape of "
                "the Brownian path"
            )
        shape = jnp.shape(leaves[0]) if noise_shape is None else tuple(noise_shape)
        return shape, at_least_f32(jnp.result_type(*leaves))

    def interval(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        t = jnp.asarray(t)
        return knots[jnp.maximum(t - 1, 0)], knots[t]

    def transition(key: jax.Array, x: Any, t: jax.Array) -> Any:
        shape, dtype = noise_of(x)
        start, end = interval(t)
        share = jnp.arange(1, substeps, dtype=knots.dtype) / substeps
        grid = jnp.concatenate([start[None], start + (end - start) * share, end[None]])
        path = GridPath(key, shape, dtype, substeps, grid, levy_area=_levy_area(method))
        wide = jax.tree.map(lambda v: jnp.asarray(v, at_least_f32(jnp.result_type(v))), x)
        done = scan_terms(terms(path), method, grid, wide)
        is_sound = done.result == diffrax.RESULTS.successful
        return jax.tree.map(
            lambda new, old: jnp.where(is_sound, new, jnp.nan).astype(jnp.result_type(old)),
            done.x,
            x,
        )

    def log_transition(x_prev: Any, x_next: Any, t: jax.Array) -> jax.Array:
        shape, dtype = noise_of(x_prev)
        start, end = interval(t)

        def move(noise: jax.Array) -> jax.Array:
            increment = jnp.sqrt(end - start).astype(dtype) * noise.reshape(shape)
            given = terms(_Given(start, end, increment))
            state = method.init(given, start, end, x_prev, None)
            x, *_ = method.step(given, start, end, x_prev, None, state, jnp.asarray(False))
            return ravel_pytree(x)[0]

        still = jnp.zeros(int(np.prod(shape)), dtype)
        root = jax.jacfwd(move)(still)
        residual = ravel_pytree(x_next)[0] - move(still)
        centre = jnp.zeros_like(residual)
        log_prob = jax.scipy.stats.multivariate_normal.logpdf(
            residual, centre, matmul(root, root.T)
        )
        return jnp.asarray(log_prob)

    has_density = substeps == 1 and type(method) is diffrax.Euler
    return StateSpaceModel(
        init,
        transition,
        log_potential,
        log_transition if has_density else None,
        log_init=log_init,
        log_auxiliary=log_auxiliary,
    )
