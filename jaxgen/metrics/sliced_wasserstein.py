r"""Sliced Wasserstein distance: the mean of one-dimensional distances over random directions.

(1)  :math:`SW_p^p(x, y) = E_\theta\, W_p^p(\theta^T x, \theta^T y)`, theta uniform on the sphere

(Bonneel, Rabin, Peyre and Pfister, J. Math. Imaging Vis. 51, 2015). In one dimension the optimal
plan pairs sorted values, so that for equally many points
:math:`W_p^p = \frac1n \sum_i |x_{(i)} - y_{(i)}|^p`; for unequal numbers the two quantile functions
are compared on their common refinement, exactly.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgen.core import keys
from jaxgen.core.arrays import at_least_f32
from jaxgen.core.checks import floating, positive_int

__all__ = ["sliced_wasserstein", "wasserstein_1d"]


def _refinement(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ranks in both samples and the weight, for each piece of the two quantile functions."""
    common = n * m // math.gcd(n, m)
    ends = np.union1d(np.arange(1, n + 1) * (common // n), np.arange(1, m + 1) * (common // m))
    starts = np.concatenate([[0], ends[:-1]])
    return starts // (common // n), starts // (common // m), (ends - starts) / common


def wasserstein_1d(x: ArrayLike, y: ArrayLike, *, p: float = 2.0) -> jax.Array:
    """Exact p-Wasserstein distance between two samples on the line.

    Args:
      x: floating, ``(n,)``.
      y: floating, ``(m,)``.
      p: order, at least 1.

    Returns:
      ``()``, float32 or wider, in the units of ``x``. Its gradient where the samples coincide is
      NaN for ``p > 1``, as that of any root at zero.

    Raises:
      TypeError: not floating.
      ValueError: other shapes, an empty sample or ``p < 1``.
    """
    return _power_1d(x, y, p) ** (1 / p)


def _power_1d(x: ArrayLike, y: ArrayLike, p: float) -> jax.Array:
    x, y = floating("x", x), floating("y", y)
    if x.ndim != 1 or y.ndim != 1 or not x.size or not y.size:
        raise ValueError(f"x and y have shapes {x.shape} and {y.shape}; expected (n,) and (m,)")
    if not p >= 1:
        raise ValueError(f"p is {p}; expected a number of at least 1")
    dtype = at_least_f32(jnp.result_type(x, y))
    a, b = jnp.sort(x.astype(dtype)), jnp.sort(y.astype(dtype))
    if x.size == y.size:
        return jnp.mean(jnp.abs(a - b) ** p)
    i, j, weight = _refinement(x.size, y.size)
    gaps = jnp.abs(a[jnp.asarray(i)] - b[jnp.asarray(j)]) ** p
    return jnp.sum(jnp.asarray(weight, dtype) * gaps)


def sliced_wasserstein(
    key: jax.Array, x: ArrayLike, y: ArrayLike, *, directions: int = 128, p: float = 2.0
) -> jax.Array:
    """Sliced p-Wasserstein distance, equation (1), by ``directions`` random directions.

    Args:
      key: typed key; direction ``i`` draws from ``fold_in(key, i)``.
      x: floating, ``(n, *event)``; events are flattened.
      y: floating, ``(m, *event)``.
      directions: number of directions; the standard error falls with its square root.
      p: order, at least 1.

    Returns:
      ``()``, float32 or wider, in the units of ``x``.

    Raises:
      TypeError: not floating.
      ValueError: events differ, a sample is empty, ``directions < 1`` or ``p < 1``.

    Example:
      >>> import jax
      >>> x = jax.random.normal(jax.random.key(0), (50, 2))
      >>> float(sliced_wasserstein(jax.random.key(1), x, x))
      0.0
    """
    x, y = floating("x", x), floating("y", y)
    if x.ndim < 2 or y.ndim < 2 or x.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"x and y have shapes {x.shape} and {y.shape}; expected (n, *event) and (m, *event)"
        )
    directions = positive_int("directions", directions)
    dtype = at_least_f32(jnp.result_type(x, y))
    a, b = (v.reshape(v.shape[0], -1).astype(dtype) for v in (x, y))
    theta = keys.normal(key, (directions, a.shape[1]), dtype)
    theta = theta / jnp.linalg.norm(theta, axis=1, keepdims=True)
    along = (jnp.matmul(theta, v.T, precision="highest") for v in (a, b))
    return jnp.mean(jax.vmap(lambda s, t: _power_1d(s, t, p))(*along)) ** (1 / p)
