r"""Interpolants whose coefficients are learnt: cubic splines with the ends built in.

With S_c the cubic spline on [0, 1] of coefficients c over equal knots (uniform B-splines, which sum
to one),

    alpha = 1 - t + t (1 - t) S_a(t),   beta = t + t (1 - t) S_b(t)                         (1)
    gamma^2 = t (1 - t) exp(S_g(t))                                                         (2)

so that every coefficient gives an interpolant, zeros give the linear one and a constant g = log a
the Brownian gamma of that scale. The maximisation over interpolants of the Schroedinger bridge
(Albergo, Boffi and Vanden-Eijnden, arXiv 2303.08797, section 3.4) is over these.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import checks
from jaxgen.core.arrays import matmul
from jaxgen.process.interpolant import Interpolant

__all__ = ["spline", "spline_interpolant"]


def spline(t: ArrayLike, coefficients: ArrayLike) -> jax.Array:
    """The cubic spline on [0, 1] of these B-spline coefficients.

    Args:
      t: places in [0, 1], any shape.
      coefficients: ``(n,)`` with ``n >= 4``: ``n - 3`` equal intervals; equal coefficients give
        a constant.

    Returns:
      Values of ``t``'s shape, twice continuously differentiable.

    Raises:
      ValueError: fewer than four coefficients, or not one axis.
    """
    t, coefficients = jnp.asarray(t), jnp.asarray(coefficients)
    if coefficients.ndim != 1 or coefficients.shape[0] < 4:
        raise ValueError(f"coefficients has shape {coefficients.shape}; expected (n,) with n >= 4")
    n = coefficients.shape[0]
    # Distance to the middle of each B-spline's four intervals.
    middles = (jnp.arange(n) - 1).astype(t.dtype)
    distance = jnp.abs(t[..., None] * (n - 3) - jnp.expand_dims(middles, range(t.ndim)))
    near = (4 - 6 * distance**2 + 3 * distance**3) / 6
    far = jnp.maximum(2 - distance, 0.0) ** 3 / 6
    return matmul(jnp.where(distance < 1, near, far), coefficients)


def _alpha(t, a, b, g):
    del b, g
    return (1 - t) * (1 + t * spline(t, a))


def _beta(t, a, b, g):
    del a, g
    return t * (1 + (1 - t) * spline(t, b))


def _gamma2(t, a, b, g):
    del a, b
    return t * (1 - t) * jnp.exp(spline(t, g))


def spline_interpolant(alpha: ArrayLike, beta: ArrayLike, log_gamma: ArrayLike) -> Interpolant:
    """A learnable two-sided interpolant, equations (1) and (2) (module docstring).

    Args:
      alpha: spline coefficients ``(n,)``, ``n >= 4``; zeros for 1 - t.
      beta: the same for the other end; zeros for t. Its length may differ.
      log_gamma: the same for log gamma^2 / (t (1 - t)); ``log(a)`` everywhere for the Brownian
        gamma of scale ``a``.

    Returns:
      An ``Interpolant`` with ``params = (alpha, beta, log_gamma)``, floating: what an optimiser
      ascends on.

    Raises:
      ValueError: fewer than four coefficients.
      TypeError: integer coefficients.

    Example:
      >>> import jax.numpy as jnp
      >>> interp = spline_interpolant(jnp.zeros(4), jnp.zeros(4), jnp.zeros(4))
      >>> float(interp.gamma(0.5)), float(interp.alpha(0.25))
      (0.5, 0.75)
    """
    params = []
    for name, value in (("alpha", alpha), ("beta", beta), ("log_gamma", log_gamma)):
        value = checks.floating(name, value)
        if value.ndim != 1 or value.shape[0] < 4:
            raise ValueError(f"{name} has shape {value.shape}; expected (n,) with n >= 4")
        params.append(value)
    return Interpolant(_alpha, _beta, _gamma2, params=tuple(params), kind="spline")
