r"""Frechet distance between two point sets, each taken as a Gaussian, in a stated feature space.

For Gaussians it is the 2-Wasserstein distance (Dowson and Landau, J. Multivariate Anal. 12, 1982),

(1)  :math:`d^2 = |m_1 - m_2|^2 + \mathrm{tr}(C_1 + C_2 - 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2})`.

In the features of an Inception network its square is the FID of Heusel et al. (2017, arXiv
1706.08500); here the caller brings the features and says which they are. The value depends on the
number of points (it is biased upwards by about one over it), so compare distances at equal counts
only, and against the distance between two halves of the real data.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgen.core.arrays import at_least_f32
from jaxgen.core.checks import floating

__all__ = ["frechet_distance", "gaussian_distance", "moments"]


def moments(features: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Mean and covariance (divisor ``n - 1``) of a set of points.

    Args:
      features: floating, ``(n, d)``, at least two points.

    Returns:
      Mean ``(d,)`` and covariance ``(d, d)``, in float32 or wider.

    Raises:
      TypeError: ``features`` is not floating.
      ValueError: it is not ``(n, d)`` with ``n >= 2``.
    """
    points = floating("features", features)
    if points.ndim != 2 or points.shape[0] < 2:
        raise ValueError(f"features has shape {points.shape}; expected (n, d) with n >= 2")
    points = points.astype(at_least_f32(points.dtype))
    mean = jnp.mean(points, axis=0)
    centred = points - mean[None, :]
    return mean, jnp.matmul(centred.T, centred, precision="highest") / (points.shape[0] - 1)


def _root(matrix: jax.Array) -> jax.Array:
    """The symmetric root of a positive semi-definite matrix; rounding below zero counts as zero."""
    values, vectors = jnp.linalg.eigh(matrix)
    scaled = vectors * jnp.sqrt(jnp.maximum(values, 0.0))[None, :]
    return jnp.matmul(scaled, vectors.T, precision="highest")


def gaussian_distance(
    mean_1: ArrayLike, cov_1: ArrayLike, mean_2: ArrayLike, cov_2: ArrayLike
) -> jax.Array:
    """The *squared* Frechet distance between two Gaussians, equation (1).

    The trace of the last root is taken from the eigenvalues of the symmetric product, so singular
    covariances (fewer points than features) need no jitter. The gradient at repeated eigenvalues
    is that of ``jnp.linalg.eigh``, that is, undefined.

    Args:
      mean_1: floating, ``(d,)``.
      cov_1: floating, ``(d, d)``, symmetric and positive semi-definite (not checked).
      mean_2: like ``mean_1``.
      cov_2: like ``cov_1``.

    Returns:
      ``()``, float32 or wider, not negative, in squared units of the features.

    Raises:
      TypeError: an argument is not floating.
      ValueError: shapes other than the above.

    Example:
      >>> import jax.numpy as jnp
      >>> float(gaussian_distance(jnp.zeros(2), jnp.eye(2), jnp.ones(2), 4 * jnp.eye(2)))
      4.0
    """
    names = ("mean_1", "cov_1", "mean_2", "cov_2")
    m1, c1, m2, c2 = (
        floating(name, value)
        for name, value in zip(names, (mean_1, cov_1, mean_2, cov_2), strict=True)
    )
    d = m1.shape[0] if m1.ndim == 1 else -1
    for name, value, shape in zip(names, (m1, c1, m2, c2), ((d,), (d, d)) * 2, strict=True):
        if d < 0 or value.shape != shape:
            wanted = "(d,)" if name.startswith("mean") else "(d, d)"
            raise ValueError(
                f"{name} has shape {value.shape}; expected {wanted}, d the same in all"
            )
    dtype = at_least_f32(jnp.result_type(m1, c1, m2, c2))
    m1, c1, m2, c2 = (value.astype(dtype) for value in (m1, c1, m2, c2))
    root = _root(c1)
    inner = jnp.matmul(jnp.matmul(root, c2, precision="highest"), root, precision="highest")
    cross = jnp.sum(jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(0.5 * (inner + inner.T)), 0.0)))
    squared = jnp.sum((m1 - m2) ** 2) + jnp.trace(c1) + jnp.trace(c2) - 2 * cross
    # maximum() would hide a NaN from one side on some backends; where() does not.
    return jnp.where(squared < 0, 0.0, squared)


def frechet_distance(x: ArrayLike, y: ArrayLike) -> float:
    """The squared Frechet distance between two sets of feature vectors, on the host in float64.

    Differences of nearly equal traces lose digits in float32; this figure is for reports. Inside
    ``jit`` use ``gaussian_distance(*moments(x), *moments(y))``.

    Args:
      x: floating, ``(n, d)``, ``n >= 2``.
      y: floating, ``(m, d)``, ``m >= 2``; compare only distances of equal ``n`` and ``m``.

    Returns:
      The distance as a float; NaN if a value is not finite.

    Raises:
      ValueError: other shapes.

    Example:
      >>> import numpy as np
      >>> x = np.random.default_rng(0).normal(size=(100, 3))
      >>> round(frechet_distance(x, x + 2.0), 6)
      12.0
    """
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"x and y have shapes {a.shape} and {b.shape}; expected (n, d) and (m, d), n, m >= 2"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("nan")
    c1, c2 = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    values, vectors = np.linalg.eigh(c1)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ c2 @ root), 0.0)).sum()
    gap = a.mean(axis=0) - b.mean(axis=0)
    return max(float(gap @ gap + np.trace(c1) + np.trace(c2) - 2 * cross), 0.0)
