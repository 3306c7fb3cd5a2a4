r"""Gaussian mixtures as proposals: densities, draws, cross-entropy fits and weighted EM.

A proposal has J components, one for each expectation, and a component is one Gaussian or a
mixture of K:

    g_alpha = sum_j alpha_j g_j,    g_j = sum_k pi_jk N(m_jk, L_jk L_jk^T)                      (1)

The member of a family nearest in Kullback-Leibler to a target known by weighted points maximises
sum_n p_n log g(x_n): for one Gaussian the weighted moments (2), for a mixture EM with weighted
points, whose M-step is (2) with the weights p_n r_nk of component k.

    m = sum_n p_n x_n,    C = sum_n p_n (x_n - m)(x_n - m)^T + jitter                           (2)

Source of the use: Demange-Chryst, Bachoc and Morio, arXiv 2212.00568. EM's covariances carry an
inverse-Wishart prior (Fraley and Raftery, J. Classification 2007), without which a component
collapses onto one heavy point.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import logsumexp
from jax.typing import ArrayLike

from jaxgen.core import keys
from jaxgen.core.arrays import at_least_f32, matmul
from jaxgen.core.checks import floating, positive_int

__all__ = [
    "Gaussian",
    "GaussianMixture",
    "Mixture",
    "component_log_prob",
    "cross_entropy_fit",
    "em_fit",
    "mixture_log_prob",
    "mixture_sample",
    "scale_tril",
]


class Gaussian(NamedTuple):
    """Moments of a fitted Gaussian: ``mean`` ``(d,)`` and ``cov`` ``(d, d)``."""

    mean: jax.Array
    cov: jax.Array


class GaussianMixture(NamedTuple):
    """A fitted mixture: normalised ``log_weights`` ``(k,)``, ``means`` ``(k, d)``, ``covs``."""

    log_weights: jax.Array
    means: jax.Array
    covs: jax.Array


class Mixture(NamedTuple):
    """A proposal (1).

    Attributes:
      alpha: shares of the components, on the simplex, ``(J,)``.
      log_inner: normalised log-weights within each component, ``(J, K)``.
      means: ``(J, K, d)``.
      scale_tril: lower Cholesky factors of the covariances, ``(J, K, d, d)``.
    """

    alpha: jax.Array
    log_inner: jax.Array
    means: jax.Array
    scale_tril: jax.Array


def scale_tril(cov: ArrayLike) -> jax.Array:
    """Lower Cholesky factor of a covariance ``(d, d)``, through its correlation matrix.

    The correlations get a few roundings on the diagonal, so that a covariance of fewer points than
    dimensions factors in float32 whatever its units.
    """
    cov = floating("cov", cov)
    d = cov.shape[-1]
    std = jnp.sqrt(jnp.diagonal(cov))
    correlation = cov / (std[:, None] * std[None, :])
    slack = 4 * d * jnp.finfo(cov.dtype).eps
    return std[:, None] * jnp.linalg.cholesky(correlation + slack * jnp.eye(d, dtype=cov.dtype))


def _points(x: ArrayLike, log_w: ArrayLike) -> tuple[jax.Array, jax.Array]:
    x, log_w = floating("x", x), floating("log_w", log_w)
    if x.ndim != 2 or log_w.shape != x.shape[:1]:
        raise ValueError(
            f"x has shape {x.shape} and log_w {log_w.shape}; expected (n, d) and (n,), n points"
        )
    dtype = at_least_f32(jnp.promote_types(x.dtype, log_w.dtype))
    return x.astype(dtype), log_w.astype(dtype)


def cross_entropy_fit(
    x: ArrayLike,
    log_w: ArrayLike,
    *,
    diagonal: bool = False,
    jitter: ArrayLike = 1e-6,
    prior_cov: ArrayLike | None = None,
    prior_size: float = 0.0,
) -> Gaussian:
    """The Gaussian nearest in Kullback-Leibler to weighted points: their moments (2).

    With a prior the covariance is (ess C + prior_size prior_cov) / (ess + prior_size), C that of
    (2) and ess the points' effective number: a few points then give no needle.

    Args:
      x: points, ``(n, d)``.
      log_w: their log-weights, unnormalised, ``(n,)``; ``-inf`` leaves a point out.
      diagonal: keep the variances alone.
      jitter: added to the variances, ``()`` or ``(d,)``, in the units of ``x`` squared.
      prior_cov: ``(d, d)``; no prior if ``None``.
      prior_size: how many points the prior is worth.

    Returns:
      ``Gaussian(mean, cov)``; NaN where all log-weights are ``-inf`` or one is NaN.

    Raises:
      TypeError: an integer dtype.
      ValueError: shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> fit = cross_entropy_fit(jnp.array([[0.0], [4.0]]), jnp.log(jnp.array([3.0, 1.0])))
      >>> round(float(fit.mean[0]), 4), round(float(fit.cov[0, 0]), 4)
      (1.0, 3.0)
    """
    x, log_w = _points(x, log_w)
    p = jax.nn.softmax(log_w)
    mean = matmul(p, x)
    centred = x - mean[None]
    extra = jnp.broadcast_to(jnp.asarray(jitter, x.dtype), mean.shape)
    cov = jnp.diag(matmul(p, centred**2)) if diagonal else matmul((centred * p[:, None]).T, centred)
    if prior_cov is not None:
        ess = 1 / jnp.sum(p**2)
        prior_cov = floating("prior_cov", prior_cov)
        if prior_cov.shape != cov.shape:
            raise ValueError(f"prior_cov has shape {prior_cov.shape}; expected {cov.shape}")
        prior = jnp.diag(jnp.diag(prior_cov)) if diagonal else prior_cov
        cov = (ess * cov + prior_size * prior) / (ess + prior_size)
    return Gaussian(mean, cov + jnp.diag(extra))


def _seeds(key: jax.Array, points: jax.Array, log_w: jax.Array, k: int) -> jax.Array:
    """``k`` of the points ``(k, d)``, drawn far from one another (k-means++ with weights)."""

    def draw(i: int, among: jax.Array) -> jax.Array:
        at = jax.random.categorical(jax.random.fold_in(key, i), among)
        return points.at[at].get(mode="clip")

    seeds = [draw(0, log_w)]
    nearest = jnp.full(log_w.shape, jnp.inf, log_w.dtype)
    for i in range(1, k):
        nearest = jnp.minimum(nearest, jnp.sum((points - seeds[-1][None]) ** 2, axis=-1))
        seeds.append(draw(i, log_w + jnp.log(nearest)))
    return jnp.stack(seeds)


def em_fit(
    key: jax.Array,
    x: ArrayLike,
    log_w: ArrayLike,
    k: int,
    *,
    steps: int = 30,
    diagonal: bool = False,
    jitter: ArrayLike = 1e-6,
    prior_cov: ArrayLike | None = None,
    prior_size: float = 0.0,
) -> GaussianMixture:
    """A mixture of ``k`` Gaussians near weighted points in Kullback-Leibler: weighted EM.

    Starts from ``k`` points drawn far apart in the metric of the overall covariance C. Each
    covariance has a prior worth one point at C / k^(2/d); a component that loses its mass becomes
    the overall Gaussian with a small share.

    Args:
      key: typed key, for the start.
      x: points, ``(n, d)``.
      log_w: their log-weights, unnormalised, ``(n,)``; ``-inf`` leaves a point out.
      k: number of Gaussians.
      steps: EM steps.
      diagonal: keep the variances alone.
      jitter: added to the variances, ``()`` or ``(d,)``, in the units of ``x`` squared.
      prior_cov: prior of the overall covariance C, as in ``cross_entropy_fit``.
      prior_size: how many points that prior is worth.

    Returns:
      A ``GaussianMixture``; NaN where all log-weights are ``-inf`` or one is NaN.

    Raises:
      TypeError: an integer dtype or a raw key.
      ValueError: shapes that do not fit, or ``k`` or ``steps`` below 1.
    """
    x, log_w = _points(x, log_w)
    k, steps = positive_int("k", k), positive_int("steps", steps)
    d = x.shape[1]
    whole = cross_entropy_fit(
        x,
        log_w,
        diagonal=diagonal,
        jitter=jitter,
        prior_cov=prior_cov,
        prior_size=prior_size,
    )
    log_p = jax.nn.log_softmax(log_w)
    size = 1 / jnp.sum(jnp.exp(2 * log_p))
    part_cov = whole.cov / k ** (2 / d)

    def fitted(log_share: jax.Array) -> GaussianMixture:
        """The M-step, ``log_share`` ``(n, k)`` being log r_nk."""
        joint = log_p[:, None] + log_share
        total = jnp.exp(logsumexp(joint, axis=0))
        alive = total > 1e-3 / size
        fit = jax.vmap(lambda w: cross_entropy_fit(x, w, diagonal=diagonal, jitter=jitter))(
            jnp.where(alive[None], joint, log_p[:, None]).T
        )
        points = jnp.where(alive, total * size, 0.0)[:, None, None]
        mixed = (points * fit.cov + part_cov[None]) / (points + 1)
        covs = jnp.where(alive[:, None, None], mixed, whole.cov[None])
        log_weights = jnp.log(jnp.where(alive, total, 1e-3 / size))
        return GaussianMixture(jax.nn.log_softmax(log_weights), fit.mean, covs)

    def step(_: int, mixture: GaussianMixture) -> GaussianMixture:
        scales = jax.vmap(scale_tril)(mixture.covs)
        logs = _gaussian_log_prob(mixture.means, scales, x) + mixture.log_weights[None]
        return fitted(logs - logsumexp(logs, axis=1, keepdims=True))

    whitened = solve_triangular(scale_tril(whole.cov), (x - whole.mean[None]).T, lower=True).T
    seeds = _seeds(keys.check(key), whitened, log_w, k)
    distances = jnp.sum((whitened[:, None] - seeds[None]) ** 2, axis=-1)
    first = jax.nn.one_hot(jnp.argmin(distances, axis=1), k, dtype=x.dtype)
    return jax.lax.fori_loop(0, steps, step, fitted(jnp.log(first)))


def _gaussian_log_prob(means: jax.Array, scales: jax.Array, x: jax.Array) -> jax.Array:
    """Log-densities of Gaussians ``(c, d)``, ``(c, d, d)`` at ``x`` ``(n, d)``: ``(n, c)``."""
    d = x.shape[1]
    eye = jnp.eye(d, dtype=scales.dtype)
    inverse = jax.vmap(lambda scale: solve_triangular(scale, eye, lower=True))(scales)
    z = jnp.einsum("cij,ncj->nci", inverse, x[:, None] - means[None], precision="highest")
    log_det = jnp.sum(jnp.log(jnp.diagonal(scales, axis1=1, axis2=2)), axis=1)
    return -0.5 * jnp.sum(z**2, axis=-1) - (log_det + 0.5 * d * math.log(2 * math.pi))[None]


def component_log_prob(mixture: Mixture, x: ArrayLike) -> jax.Array:
    """Log-densities of the components ``log g_j(x_n)``, ``(n, J)``, of points ``(n, d)``."""
    x = floating("x", x)
    j, k, d = mixture.means.shape
    if x.ndim != 2 or x.shape[1] != d:
        raise ValueError(f"x has shape {x.shape}; expected (n, {d}) for this mixture")
    logs = _gaussian_log_prob(
        mixture.means.reshape(j * k, d), mixture.scale_tril.reshape(j * k, d, d), x
    )
    return logsumexp(logs.reshape(-1, j, k) + mixture.log_inner[None], axis=-1)


def mixture_log_prob(mixture: Mixture, x: ArrayLike) -> jax.Array:
    """Log-density of the mixture ``log g_alpha(x_n)``, ``(n,)``, of points ``(n, d)``."""
    return logsumexp(component_log_prob(mixture, x) + jnp.log(mixture.alpha)[None], axis=-1)


def mixture_sample(key: jax.Array, mixture: Mixture, n: int) -> jax.Array:
    """``n`` draws of the mixture, ``(n, d)``; draw ``i`` uses ``fold_in(key, i)``."""
    j, k, d = mixture.means.shape
    means, scales = mixture.means.reshape(j * k, d), mixture.scale_tril.reshape(j * k, d, d)
    edges = jnp.cumsum((mixture.alpha[:, None] * jnp.exp(mixture.log_inner)).reshape(-1))
    # Open at both ends, so that no normal is infinite and no component of share 0 is drawn.
    least = jnp.nextafter(jnp.asarray(-1, means.dtype), jnp.asarray(0, means.dtype))

    def draw(key: jax.Array) -> jax.Array:
        u = jax.random.uniform(key, (d + 1,), means.dtype, least, 1.0)
        level = edges[-1] * (1 - u[0]) / 2
        at = jnp.minimum(jnp.sum(edges < level), j * k - 1)
        z = math.sqrt(2) * jax.lax.erf_inv(u[1:])
        return means.at[at].get(mode="clip") + matmul(scales.at[at].get(mode="clip"), z)

    return keys.map_batch(draw, key, (n,))
