r"""Samplers of inverse problems that correct their estimate of the data, without derivatives.

From a level (alpha, sigma) to the next (alpha', sigma'), x0h = E[x0 | x_t]; with ``pinv(y, c)`` the
ridge pseudo-inverse of ``guide.operators`` and noise of deviation sigma_y in y,

    projection   x0h' = x0h + pinv(y - A x0h, sigma_y^2/r^2), then DDIM                     (1)
                 r^2 = v sigma^2 / (v alpha^2 + sigma^2)
    diffpir      x0h' = argmin |y - A x|^2/(2 sigma_y^2) + lam alpha^2 |x - x0h|^2/(2 sigma^2)
                      = x0h + pinv(y - A x0h, lam sigma_y^2 alpha^2/sigma^2),               (2)
                 x' = alpha' x0h' + sigma' (sqrt(1 - zeta) e + sqrt(zeta) z),
                 e = (x - alpha x0h')/sigma
    repaint      x' = known: alpha' y + noise to the level sigma', else ancestral,          (3)
                 r times, with a step of the process back to the level in between

(1) is DDNM's null-space projection (Wang, Yu and Zhang, arXiv 2212.00490) where sigma_y = 0: y is
met exactly. With noise it is the posterior mean of x0 in PiGDM's approximation without the
network's derivative, exact where the data are N(m, v I). (2) Zhu et al., arXiv 2305.08995; (3)
Lugmayr et al., arXiv 2201.09865, for masks. Their laws are approximations on any other prior.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import checks
from jaxgen.core.arrays import safe_sqrt
from jaxgen.guide.inverse import Level, Restored, ddim_step, run_levels
from jaxgen.guide.operators import Mask, Operator
from jaxgen.guide.posterior import _pose, posterior_var
from jaxgen.process.linear import LinearSDE
from jaxgen.score.prediction import Field

__all__ = ["diffpir", "projection", "repaint"]


def _need_linear(operator: Operator, method: str) -> None:
    if not (isinstance(operator, Operator) and operator.is_linear):
        raise TypeError(
            f"operator is {operator!r}; {method} expects a linear one of guide.operators"
        )


def projection(
    key: jax.Array,
    field: Field,
    sde: LinearSDE,
    y: ArrayLike,
    operator: Operator,
    *,
    steps: int = 1000,
    prior_var: ArrayLike = 1.0,
    eta: ArrayLike = 1.0,
    sigma_y: ArrayLike = 0.0,
    grid: str | ArrayLike = "ddpm",
    prediction: str = "noise",
    event_ndim: int | None = None,
    x_init: ArrayLike | None = None,
    progress: bool | None = None,
) -> Restored:
    """Sampling with every estimate of the data projected on the measurement, equation (1).

    Args:
      key: see ``posterior.dps``, as are all that are not named here.
      field: evaluated once a step, not differentiated.
      sde: likewise.
      y: likewise.
      operator: a linear one of ``guide.operators``.
      steps: likewise.
      prior_var: v, the variance of the data about its mean by entry; enters with noise alone.
      eta: likewise.
      sigma_y: deviation of the measurement's noise; may be traced.
      grid: likewise.
      prediction: likewise.
      event_ndim: likewise.
      x_init: likewise.
      progress: likewise.

    Returns:
      A ``Restored``; without noise its residual is rounding.

    Raises:
      ValueError: see ``posterior.dps``.
      TypeError: see ``posterior.dps``; an operator that is not linear.
    """
    _need_linear(operator, "projection")
    problem = _pose(key, field, sde, y, operator, prediction, event_ndim, x_init)

    def advance(x: jax.Array, level: Level) -> jax.Array:
        x0 = problem.denoise(x, level.t)
        ridge = jnp.asarray(sigma_y, x.dtype) ** 2 / posterior_var(level, prior_var)
        x0 = x0 + problem.pinv(problem.misfit(x0), ridge)
        return ddim_step(problem, x, x0, level, eta, problem.noise(level.n))

    return run_levels(
        problem,
        advance,
        method="projection",
        steps=steps,
        grid=grid,
        x_init=x_init,
        progress=progress,
    )


def diffpir(
    key: jax.Array,
    field: Field,
    sde: LinearSDE,
    y: ArrayLike,
    operator: Operator,
    *,
    steps: int = 100,
    lam: ArrayLike = 1.0,
    zeta: ArrayLike = 0.3,
    sigma_y: ArrayLike = 0.0,
    grid: str | ArrayLike = "ddpm",
    prediction: str = "noise",
    event_ndim: int | None = None,
    x_init: ArrayLike | None = None,
    progress: bool | None = None,
) -> Restored:
    """Plug-and-play restoration by half-quadratic splitting, equation (2).

    Args:
      key: see ``posterior.dps``, as are all that are not named here.
      field: evaluated once a step, not differentiated.
      sde: likewise.
      y: likewise.
      operator: a linear one of ``guide.operators``.
      steps: likewise.
      lam: weight of the denoised image against the measurement; enters with noise alone.
      zeta: share of the noise that is drawn anew at each step, in [0, 1].
      sigma_y: deviation of the measurement's noise; may be traced.
      grid: likewise.
      prediction: likewise.
      event_ndim: likewise.
      x_init: likewise.
      progress: likewise.

    Returns:
      A ``Restored``.

    Raises:
      ValueError: see ``posterior.dps``.
      TypeError: see ``posterior.dps``; an operator that is not linear.
    """
    _need_linear(operator, "diffpir")
    problem = _pose(key, field, sde, y, operator, prediction, event_ndim, x_init)

    def advance(x: jax.Array, level: Level) -> jax.Array:
        x0 = problem.denoise(x, level.t)
        rate = jnp.asarray(lam, x.dtype) * (level.alpha / level.sigma) ** 2
        x0 = x0 + problem.pinv(problem.misfit(x0), jnp.asarray(sigma_y, x.dtype) ** 2 * rate)
        mu = sde.centre(x)
        x_c, x0_c = (x, x0) if mu is None else (x - mu, x0 - mu)
        kept = (x_c - level.alpha * x0_c) / level.sigma
        share = jnp.asarray(zeta, x.dtype)
        noise = safe_sqrt(1 - share) * kept + safe_sqrt(share) * problem.noise(level.n)
        out = level.alpha_next * x0_c + level.sigma_next * noise
        return out if mu is None else mu + out

    return run_levels(
        problem, advance, method="diffpir", steps=steps, grid=grid, x_init=x_init, progress=progress
    )


def repaint(
    key: jax.Array,
    field: Field,
    sde: LinearSDE,
    y: ArrayLike,
    operator: Mask,
    *,
    steps: int = 100,
    repeats: int = 10,
    sigma_y: ArrayLike = 0.0,
    grid: str | ArrayLike = "ddpm",
    prediction: str = "noise",
    event_ndim: int | None = None,
    x_init: ArrayLike | None = None,
    progress: bool | None = None,
) -> Restored:
    """Inpainting with every step repeated, equation (3).

    Args:
      key: see ``posterior.dps``, as are all that are not named here.
      field: evaluated ``repeats`` times a step, not differentiated.
      sde: likewise.
      y: likewise.
      operator: ``operators.mask``.
      steps: noise levels.
      repeats: r.
      sigma_y: deviation of the measurement's noise, which counts as part of the level's as long as
        that is larger; the known part ends as it was measured.
      grid: likewise.
      prediction: likewise.
      event_ndim: likewise.
      x_init: likewise.
      progress: likewise.

    Returns:
      A ``Restored``; its residual is zero, and ``nfe`` is ``steps * repeats``.

    Raises:
      ValueError: see ``posterior.dps``; ``repeats < 1``.
      TypeError: see ``posterior.dps``; another operator than a mask.
    """
    repeats = checks.positive_int("repeats", repeats)
    if not isinstance(operator, Mask):
        raise TypeError(f"operator is {operator!r}; repaint expects operators.mask")
    problem = _pose(key, field, sde, y, operator, prediction, event_ndim, x_init)
    known = problem.each(operator.observed, jnp.ones_like(problem.y)) != 0

    def advance(x: jax.Array, level: Level) -> jax.Array:
        a, s, a1, s1 = level.alpha, level.sigma, level.alpha_next, level.sigma_next
        mu = sde.centre(x)
        y = problem.y.astype(x.dtype)
        y = a1 * y if mu is None else mu + a1 * (y - mu)
        own = safe_sqrt(s1**2 - (a1 * jnp.asarray(sigma_y, x.dtype)) ** 2)
        ratio = a / a1
        back = safe_sqrt(s**2 - (ratio * s1) ** 2)

        def repeat(x: jax.Array, u: jax.Array) -> tuple[jax.Array, None]:
            first = (level.n - 1) * jnp.uint32(3 * repeats) + 3 * u + 1
            behind = x if mu is None else x - mu
            again = ratio * behind + back * problem.noise(first)
            x = jnp.where(u > 0, again if mu is None else mu + again, x)
            x0 = problem.denoise(x, level.t)
            down = ddim_step(problem, x, x0, level, 1.0, problem.noise(first + 1))
            return jnp.where(known, y + own * problem.noise(first + 2), down), None

        return jax.lax.scan(repeat, x, jnp.arange(repeats, dtype=jnp.uint32))[0]

    return run_levels(
        problem,
        advance,
        method="repaint",
        steps=steps,
        grid=grid,
        x_init=x_init,
        progress=progress,
        calls=repeats,
    )
