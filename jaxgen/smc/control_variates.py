r"""Importance sampling with a mixture whose components are the control variates.

Points x_n from g_alpha = sum_k alpha_k g_k, alpha on the simplex, and coefficients beta give

    I_j = beta_j + (1/n) sum_n s_nj,   s_nj = [f_j(x_n) phi_j(x_n) - beta_j g_j(x_n)] / g_alpha(x_n)
                                                                                               (1)

without bias for any alpha, beta and g fixed beforehand, since E[g_j/g_alpha] = 1, if g_alpha is
positive wherever f_j phi_j is not zero. With g_j = phi_j f_j / I_j and beta_j = I_j every s_nj is
0. The variance in alpha is convex, and an estimate of it from points of density h is

    F(alpha) = mean_n [ r_n / (g_alpha(x_n) h(x_n)) ],   r_n = sum_j w_j (f_j phi_j - beta_j g_j)^2
                                                                                               (2)

minimised by the multiplicative rule alpha_k <- alpha_k sqrt(-dF/dalpha_k) / sum (the square root
makes F fall: Yu, Ann. Statist. 2010). At the minimum -dF/dalpha_k = F where alpha_k > 0, and is at
most F elsewhere.

Source: Demange-Chryst, Bachoc and Morio, arXiv 2212.00568; the authors solve (2) by SLSQP.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jax.typing import ArrayLike

from jaxgen.core.arrays import matmul, safe_sqrt
from jaxgen.core.checks import floating, positive_int

__all__ = [
    "Estimate",
    "control_coefficients",
    "delta_method",
    "iscv_estimate",
    "optimal_mixture_weights",
]

# A variance of g_j/g_alpha below this is rounding: the control is the constant 1.
_CONSTANT = 1e-12


class Estimate(NamedTuple):
    """Estimates (1) of J expectations.

    Attributes:
      mean: ``(J,)``.
      std_err: standard errors, ``(J,)``.
      cov: covariance of the estimates, ``(J, J)``.
      max_share: the largest share of one point in the sum of squared deviations, ``(J,)``. Near
        1, the variance is not to be trusted: it may be infinite.
    """

    mean: jax.Array
    std_err: jax.Array
    cov: jax.Array
    max_share: jax.Array


def _columns(name: str, value: ArrayLike, n: int, j: int) -> jax.Array:
    value = floating(name, value)
    if value.shape not in ((n, 1), (n, j)):
        raise ValueError(f"{name} has shape {value.shape}; expected ({n}, 1) or ({n}, {j})")
    return value


def weighted_values(log_f: jax.Array, log_q: jax.Array, phi: jax.Array) -> jax.Array:
    """``f_j phi_j / q`` at points with log-density ``log_q`` ``(n,)``: ``(n, J)``.

    Zero where ``f_j`` is, whatever ``phi`` is there; NaN where ``phi`` is NaN or infinite.
    """
    is_dead = log_f == -jnp.inf
    ratio = jnp.exp(jnp.where(is_dead, 0.0, log_f) - log_q[:, None])
    value = jnp.where(is_dead, 0.0, phi)
    return jnp.where(is_dead, 0.0, ratio) * jnp.where(jnp.isfinite(value), value, jnp.nan)


def _summands(
    log_g: ArrayLike,
    alpha: ArrayLike,
    log_f: ArrayLike,
    phi: ArrayLike,
    log_q: ArrayLike | None,
) -> tuple[jax.Array, jax.Array]:
    """``f_j phi_j / q`` and ``g_j / q``, each ``(n, J)``; q is g_alpha unless given."""
    log_g, alpha = floating("log_g", log_g), floating("alpha", alpha)
    if log_g.ndim != 2 or alpha.shape != log_g.shape[1:]:
        raise ValueError(
            f"log_g has shape {log_g.shape} and alpha {alpha.shape}; expected (n, J) and (J,)"
        )
    n, j = log_g.shape
    log_f, phi = _columns("log_f", log_f, n, j), _columns("phi", phi, n, j)
    if log_q is None:
        log_q = logsumexp(log_g + jnp.log(alpha)[None], axis=1)
    log_q = floating("log_q", log_q)
    if log_q.shape != (n,):
        raise ValueError(f"log_q has shape {log_q.shape}; expected ({n},)")
    values = jnp.broadcast_to(weighted_values(log_f, log_q, phi), (n, j))
    return values, jnp.exp(log_g - log_q[:, None])


def control_coefficients(
    log_g: ArrayLike,
    alpha: ArrayLike,
    log_f: ArrayLike,
    phi: ArrayLike,
    *,
    log_q: ArrayLike | None = None,
) -> jax.Array:
    """The coefficients ``beta`` ``(J,)`` of least variance, from points of ``g_alpha``.

    ``Cov(g_j/g_alpha, f_j phi_j/g_alpha) / Var(g_j/g_alpha)``, and 0 where that variance is
    rounding: the control is then the constant 1 and any coefficient gives the same estimate.

    Args:
      log_g: log-densities of the components, ``(n, J)``.
      alpha: their shares, ``(J,)``.
      log_f: log-densities of the laws, ``(n, 1)`` or ``(n, J)``.
      phi: values, ``(n, 1)`` or ``(n, J)``.
      log_q: the points' own log-density ``(n,)``, if not that of ``g_alpha``.

    Raises:
      TypeError: an integer dtype.
      ValueError: shapes that do not fit.
    """
    values, control = _summands(log_g, alpha, log_f, phi, log_q)
    centred = control - jnp.mean(control, axis=0, keepdims=True)
    var = jnp.mean(centred**2, axis=0)
    is_constant = var < _CONSTANT
    cov = jnp.mean(centred * values, axis=0)
    # 0 * cov, so that a NaN of phi stays.
    return jnp.where(is_constant, 0.0 * cov, cov / jnp.where(is_constant, 1.0, var))


def iscv_estimate(
    log_g: ArrayLike,
    alpha: ArrayLike,
    log_f: ArrayLike,
    phi: ArrayLike,
    beta: ArrayLike,
    *,
    log_q: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Estimate:
    """Estimates (1) with standard errors, from points of ``g_alpha``.

    Unbiased if ``alpha``, ``beta`` and the components do not depend on these points.

    Args:
      log_g: log-densities of the components, ``(n, J)``.
      alpha: their shares, ``(J,)``.
      log_f: log-densities of the laws, ``(n, 1)`` or ``(n, J)``; ``-inf`` is a weight of zero,
        whatever ``phi`` is there.
      phi: values, ``(n, 1)`` or ``(n, J)``.
      beta: coefficients, ``(J,)``; zeros for plain importance sampling.
      log_q: the points' own log-density ``(n,)``, if not that of ``g_alpha``.
      where: boolean ``(n,)``, the points to use; all if ``None``.

    Returns:
      An ``Estimate``; column ``j`` is NaN where ``phi_j`` is NaN or infinite at a point used.

    Raises:
      TypeError: an integer dtype.
      ValueError: shapes that do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.scipy.stats import norm
      >>> x = 2.0 + jax.random.normal(jax.random.key(0), (100, 1))  # of g = N(2, 1)
      >>> log_f, log_g, phi = norm.logpdf(x), norm.logpdf(x, 2.0), jnp.exp(2 * x)  # E = exp(2)
      >>> out = iscv_estimate(log_g, jnp.ones(1), log_f, phi, jnp.zeros(1))
      >>> round(float(out.mean[0]), 3), bool(out.std_err[0] < 1e-4)
      (7.389, True)
    """
    log_f, beta = floating("log_f", log_f), floating("beta", beta)
    used = jnp.ones(log_f.shape[:1], bool) if where is None else jnp.asarray(where)
    if used.shape != log_f.shape[:1] or used.dtype != bool:
        raise ValueError(
            f"where has shape {used.shape} and dtype {used.dtype}; expected bool {log_f.shape[:1]}"
        )
    # Masked here too, so that a gradient meets no overflow at a point left out.
    log_f = jnp.where(used.reshape(-1, *(1,) * (log_f.ndim - 1)), log_f, -jnp.inf)
    values, control = _summands(log_g, alpha, log_f, phi, log_q)
    if beta.shape != control.shape[1:]:
        raise ValueError(f"beta has shape {beta.shape}; expected ({control.shape[1]},)")
    n = jnp.sum(used).astype(control.dtype)
    s = jnp.where(used[:, None], values - beta[None] * control, 0.0)
    mean = jnp.sum(s, axis=0) / n
    centred = jnp.where(used[:, None], s - mean[None], 0.0)
    # In units of the largest: squares of phi may leave float32's range where phi does not.
    unit = jax.lax.stop_gradient(jnp.max(jnp.abs(centred), axis=0))
    unit = jnp.where(unit == 0, 1.0, unit)
    scaled = centred / unit[None]
    gram = matmul(scaled.T, scaled)
    squares = jnp.diagonal(gram)
    variance = squares / (n * (n - 1))
    std_err = unit * safe_sqrt(variance)
    cov = gram / (n * (n - 1)) * unit[:, None] * unit[None, :]
    share = jnp.max(scaled**2, axis=0) / jnp.where(squares == 0, 1.0, squares)
    return Estimate(beta + mean, std_err, cov, share)


def optimal_mixture_weights(
    alpha0: ArrayLike,
    r: ArrayLike,
    log_g: ArrayLike,
    log_h: ArrayLike,
    *,
    steps: int = 200,
    tolerance: float = 0.0,
) -> jax.Array:
    """The shares ``alpha`` ``(J,)`` that minimise (2) over the simplex, by the multiplicative rule.

    F does not change if a point's ``r`` is divided by c^2 and log c is taken from its ``log_g`` and
    ``log_h``: where densities vanish in float32, give all three relative to h.

    Args:
      alpha0: where to start, positive, ``(J,)``; a share of zero stays zero.
      r: non-negative terms of r_n, one for each expectation, ``(n, J)`` (any number of columns); a
        row of zeros leaves a point out.
      log_g: log-densities of the components at the points, ``(n, J)``.
      log_h: log-density that the points were drawn from, ``(n,)``.
      steps: most iterations.
      tolerance: stop when F is known to be within this share of its minimum.

    Returns:
      Shares that sum to 1; ``alpha0`` where all ``r`` are zero, NaN where one is.

    Raises:
      TypeError: an integer dtype.
      ValueError: shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> g = jnp.array([[1.0, 4.0], [4.0, 1.0]])
      >>> shares = optimal_mixture_weights(
      ...     jnp.array([0.9, 0.1]), jnp.ones((2, 1)), jnp.log(g), jnp.zeros(2)
      ... )
      >>> round(float(shares[0]), 3)
      0.5
    """
    alpha, r = floating("alpha0", alpha0), floating("r", r)
    log_g, log_h = floating("log_g", log_g), floating("log_h", log_h)
    n = r.shape[0] if r.ndim == 2 else -1
    if alpha.ndim != 1 or log_g.shape != (n, alpha.shape[0]) or log_h.shape != (n,):
        raise ValueError(
            f"alpha0 {alpha.shape}, r {r.shape}, log_g {log_g.shape} and log_h {log_h.shape} do "
            "not fit; expected (J,), (n, J), (n, J) and (n,)"
        )
    shift = jnp.max(log_g, axis=1)
    # Points along the last axis: the products below are five times as fast on a CPU.
    g = jnp.exp(log_g.T - shift[None])
    log_c = jnp.log(jnp.sum(r, axis=1)) - log_h - shift
    top = jnp.max(log_c)
    c = jnp.exp(log_c - jnp.where(top == -jnp.inf, 0.0, top))
    # A share that is zero in the rounded sum, so that no point is left without a density.
    least = jnp.finfo(alpha.dtype).eps ** 2

    def goes_on(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        i, _, gap = carry
        return (i < steps) & ~(gap <= tolerance)

    def step(
        carry: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        i, alpha, _ = carry
        slope = matmul(g, c / matmul(alpha, g) ** 2)
        new = alpha * jnp.sqrt(slope)
        total = jnp.sum(new)
        new = jnp.where(total == 0, alpha, new / jnp.where(total == 0, 1.0, total))
        new = jnp.where(alpha > 0, jnp.maximum(new, least), new)
        # F is convex and alpha @ slope is F: this share bounds F - min F before the step.
        return i + 1, new, jnp.max(slope) / matmul(alpha, slope) - 1

    steps = positive_int("steps", steps)
    start = jnp.int32(0), alpha / jnp.sum(alpha), jnp.asarray(jnp.inf, alpha.dtype)
    return jax.lax.while_loop(goes_on, step, start)[1]


def delta_method(
    function: Callable[[jax.Array], Any], mean: ArrayLike, cov: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """A smooth function of estimates and its standard errors, to first order.

    Args:
      function: ``(J,) -> (m,)`` or ``()``, differentiable.
      mean: estimates, ``(J,)``.
      cov: their covariance, ``(J, J)``.

    Returns:
      ``function(mean)`` and standard errors of the same shape.

    Example:
      >>> import jax.numpy as jnp
      >>> value, std_err = delta_method(lambda m: m[0] / m[1], jnp.array([1.0, 2.0]), jnp.eye(2))
      >>> float(value), round(float(std_err), 4)
      (0.5, 0.559)
    """
    mean, cov = floating("mean", mean), floating("cov", cov)
    slope = jax.jacobian(function)(mean)
    return function(mean), jnp.sqrt(
        jnp.einsum("...i,ij,...j->...", slope, cov, slope, precision="highest")
    )
