r"""The named linear processes, in forms that stay accurate in float32 near both ends of time.

With L = log alpha:

| name           | L(t)                      | sigma(t)               | source             |
|----------------|---------------------------|------------------------|--------------------|
| vp             | -(b1 - b0) t^2/4 - b0 t/2 | sqrt(-expm1(2L))       | [1] (29), (32)     |
| sub_vp         | the same                  | -expm1(2L)             | [1] (31), (33)     |
| ve             | 0                         | s_min (s_max/s_min)^t  | [1] (30)           |
| edm            | 0                         | t                      | [2] section 2      |
| cosine         | log cos(pi t/2)           | sin(pi t/2)            | [3] (17)           |
| rectified      | log(1 - t)                | t                      | [4] (1)            |
| mean_reverting | t log(alpha_end)          | s_inf sqrt(-expm1(2L)) | [5] (6), rate held |
| ouve           | -theta t                  | see ``ouve``           | [6] (9) to (11)    |

[1] Song et al., arXiv 2011.13456, [2] Karras et al., arXiv 2206.00364, [3] Nichol and Dhariwal,
arXiv 2102.09672, [4] Liu et al., arXiv 2209.03003, [5] Luo et al., arXiv 2301.11699, [6] Lemercier
et al., arXiv 2212.11851. The VE kernel takes the data as already blurred by s_min at t = 0.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.process.linear import LinearSDE

__all__ = [
    "PROCESSES",
    "cosine",
    "edm",
    "mean_reverting",
    "ouve",
    "rectified",
    "sub_vp",
    "ve",
    "vp",
]


def _number(value: Any) -> float | None:
    """The value where it is a plain number; tracers and arrays are not checked."""
    try:
        return float(value)
    except TypeError:
        return None


def _check_order(low_name: str, low: Any, high_name: str, high: Any, *, floor: float) -> None:
    a, b = _number(low), _number(high)
    if a is not None and not a >= floor:
        raise ValueError(f"{low_name} is {a}; expected at least {floor}")
    if a is not None and b is not None and not a < b:
        raise ValueError(
            f"{low_name} is {a} and {high_name} {b}; expected {low_name} < {high_name}"
        )


def _check_positive(name: str, value: Any) -> None:
    number = _number(value)
    if number is not None and not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name} is {number}; expected a finite positive number")


# One compilation where a schedule is called outside of jit, and no trace of its own inside.
_elementwise = functools.partial(jax.jit, inline=True)


# --- variance preserving, and sub ------------------------------------------------------------


@_elementwise
def _vp_log_alpha(t, beta_min, beta_max):
    return -0.25 * t**2 * (beta_max - beta_min) - 0.5 * t * beta_min


@_elementwise
def _vp_sigma(t, beta_min, beta_max):
    return jnp.sqrt(-jnp.expm1(2 * _vp_log_alpha(t, beta_min, beta_max)))


@_elementwise
def _sub_vp_sigma(t, beta_min, beta_max):
    return -jnp.expm1(2 * _vp_log_alpha(t, beta_min, beta_max))


@_elementwise
def _vp_time(minus_log_alpha, beta_min, beta_max):
    """The root of the quadratic L(t), in the form without cancellation at small t."""
    b = 2 * minus_log_alpha
    root = jnp.sqrt(beta_min**2 + 2 * (beta_max - beta_min) * b)
    return 2 * b / (beta_min + root)


@_elementwise
def _vp_inverse(value, beta_min, beta_max):
    return _vp_time(0.5 * jax.nn.softplus(-value), beta_min, beta_max)


@_elementwise
def _sub_vp_inverse(value, beta_min, beta_max):
    return _vp_time(jnp.arcsinh(0.5 * jnp.exp(-0.5 * value)), beta_min, beta_max)


def vp(beta_min: ArrayLike = 0.1, beta_max: ArrayLike = 20.0) -> LinearSDE:
    """Variance preserving: alpha^2 + sigma^2 = 1, prior N(0, I), t in [1e-5, 1], t_end 1e-3.

    Args:
      beta_min: rate of the drift at t = 0.
      beta_max: rate at t = 1.

    Raises:
      ValueError: not ``0 <= beta_min < beta_max``.
    """
    _check_order("beta_min", beta_min, "beta_max", beta_max, floor=0.0)
    return LinearSDE(
        _vp_log_alpha,
        _vp_sigma,
        params=(beta_min, beta_max),
        t_min=1e-5,
        t_max=1.0,
        t_end=1e-3,
        prior_std=1.0,
        kind="vp",
        inverse_fn=_vp_inverse,
        ends=(0.0, 1.0),
    )


def sub_vp(beta_min: ArrayLike = 0.1, beta_max: ArrayLike = 20.0) -> LinearSDE:
    """Sub-VP: the drift of ``vp`` with variance ``(1 - alpha^2)^2``, prior N(0, I).

    Arguments, times and errors are those of ``vp``.
    """
    _check_order("beta_min", beta_min, "beta_max", beta_max, floor=0.0)
    return LinearSDE(
        _vp_log_alpha,
        _sub_vp_sigma,
        params=(beta_min, beta_max),
        t_min=1e-5,
        t_max=1.0,
        t_end=1e-3,
        prior_std=1.0,
        kind="sub_vp",
        inverse_fn=_sub_vp_inverse,
        ends=(0.0, 1.0),
    )


# --- variance exploding ----------------------------------------------------------------------


@_elementwise
def _no_decay(t, *params):
    del params
    return jnp.zeros_like(t)


@_elementwise
def _ve_sigma(t, sigma_min, sigma_max):
    return sigma_min * jnp.exp(t * jnp.log(sigma_max / sigma_min))


@_elementwise
def _ve_inverse(value, sigma_min, sigma_max):
    return (-0.5 * value - jnp.log(sigma_min)) / jnp.log(sigma_max / sigma_min)


def ve(sigma_min: ArrayLike = 0.01, sigma_max: ArrayLike = 50.0) -> LinearSDE:
    """Variance exploding, geometric in time: prior N(0, sigma_max^2 I), t in [0, 1].

    Args:
      sigma_min: noise already in the data at t = 0.
      sigma_max: noise at t = 1; near the largest distance between two data points.

    Raises:
      ValueError: not ``0 < sigma_min < sigma_max``.
    """
    _check_positive("sigma_min", sigma_min)
    _check_order("sigma_min", sigma_min, "sigma_max", sigma_max, floor=0.0)
    return LinearSDE(
        _no_decay,
        _ve_sigma,
        params=(sigma_min, sigma_max),
        t_min=0.0,
        t_max=1.0,
        kind="ve",
        inverse_fn=_ve_inverse,
    )


@_elementwise
def _edm_sigma(t, *params):
    del params
    return t


@_elementwise
def _edm_inverse(value, *params):
    del params
    return jnp.exp(-0.5 * value)


def edm(sigma_min: ArrayLike = 0.002, sigma_max: ArrayLike = 80.0) -> LinearSDE:
    """Karras et al.'s process: time is the noise level, t in [sigma_min, sigma_max].

    The proper end is t = 0, which a grid may have as its last time.

    Raises:
      ValueError: not ``0 < sigma_min < sigma_max``.
    """
    _check_positive("sigma_min", sigma_min)
    _check_order("sigma_min", sigma_min, "sigma_max", sigma_max, floor=0.0)
    return LinearSDE(
        _no_decay,
        _edm_sigma,
        t_min=sigma_min,
        t_max=sigma_max,
        kind="edm",
        inverse_fn=_edm_inverse,
        ends=(0.0, math.inf),
    )


# --- cosine and rectified flow -----------------------------------------------------------------

_HALF_PI = 0.5 * math.pi


@_elementwise
def _cosine_alpha(t, *params):
    del params
    # The sine of the complement keeps relative accuracy where the cosine vanishes.
    return jnp.sin(_HALF_PI * (1 - t))


@_elementwise
def _cosine_sigma(t, *params):
    del params
    return jnp.sin(_HALF_PI * t)


@_elementwise
def _cosine_log_alpha(t, *params):
    del params
    early = t < 0.5
    sine = jnp.sin(_HALF_PI * jnp.where(early, t, 0.0))
    cosine = jnp.sin(_HALF_PI * (1 - jnp.where(early, 0.0, t)))
    return jnp.where(early, 0.5 * jnp.log1p(-(sine**2)), jnp.log(cosine))


@_elementwise
def _cosine_inverse(value, *params):
    del params
    # Each half by the arctangent of a number below one.
    late = value < 0
    small = jnp.arctan(jnp.exp(-0.5 * jnp.abs(value))) / _HALF_PI
    return jnp.where(late, 1 - small, small)


def cosine() -> LinearSDE:
    """The cosine schedule, alpha = cos(pi t/2): prior N(0, I), t in [1e-5, 1 - 1e-5].

    The proper ends are 0 and 1; at 1 the drift is infinite.
    """
    return LinearSDE(
        _cosine_log_alpha,
        _cosine_sigma,
        t_min=1e-5,
        t_max=1.0 - 1e-5,
        prior_std=1.0,
        kind="cosine",
        alpha_fn=_cosine_alpha,
        inverse_fn=_cosine_inverse,
        ends=(0.0, 1.0),
    )


@_elementwise
def _rectified_alpha(t, *params):
    del params
    return 1 - t


@_elementwise
def _rectified_log_alpha(t, *params):
    del params
    return jnp.log1p(-t)


@_elementwise
def _rectified_inverse(value, *params):
    del params
    return jax.nn.sigmoid(-0.5 * value)


def rectified(*, t_max: ArrayLike = 1.0 - 1e-5) -> LinearSDE:
    """Rectified flow, x_t = (1 - t) x0 + t z: prior N(0, I), t in [1e-5, t_max].

    Its velocity is noise minus data. The proper ends are 0 and 1; at 1 the drift is infinite.

    Args:
      t_max: last time; a network that was taught no later ones is not asked about them.

    Raises:
      ValueError: not ``1e-5 < t_max < 1``.
    """
    _check_order("1e-5", 1e-5, "t_max", t_max, floor=0.0)
    _check_order("t_max", t_max, "1", 1.0, floor=0.0)
    return LinearSDE(
        _rectified_log_alpha,
        _edm_sigma,
        t_min=1e-5,
        t_max=t_max,
        prior_std=1.0,
        kind="rectified",
        alpha_fn=_rectified_alpha,
        inverse_fn=_rectified_inverse,
        ends=(0.0, 1.0),
    )


# --- with an anchor ------------------------------------------------------------------------------


@_elementwise
def _reverting_log_alpha(t, sigma_inf, alpha_end):
    del sigma_inf
    return t * jnp.log(alpha_end)


@_elementwise
def _reverting_sigma(t, sigma_inf, alpha_end):
    return sigma_inf * jnp.sqrt(-jnp.expm1(2 * _reverting_log_alpha(t, sigma_inf, alpha_end)))


@_elementwise
def _reverting_inverse(value, sigma_inf, alpha_end):
    return -0.5 * jax.nn.softplus(-value - 2 * jnp.log(sigma_inf)) / jnp.log(alpha_end)


def mean_reverting(
    mu: ArrayLike, *, sigma_inf: ArrayLike = 50 / 255, alpha_end: ArrayLike = 0.005
) -> LinearSDE:
    """Towards the anchor ``mu`` at a constant rate: prior N(mu, sigma_inf^2 I), t in [1e-5, 1].

    Args:
      mu: anchor (for restoration: the degraded image), of the event's or the batch's shape.
      sigma_inf: stationary standard deviation.
      alpha_end: share of the data left at t = 1.

    Raises:
      ValueError: ``sigma_inf <= 0`` or ``alpha_end`` outside (0, 1).
    """
    _check_positive("sigma_inf", sigma_inf)
    _check_positive("alpha_end", alpha_end)
    _check_order("alpha_end", alpha_end, "1", 1.0, floor=0.0)
    return LinearSDE(
        _reverting_log_alpha,
        _reverting_sigma,
        params=(sigma_inf, alpha_end),
        mu=mu,
        t_min=1e-5,
        t_max=1.0,
        prior_std=sigma_inf,
        kind="mean_reverting",
        inverse_fn=_reverting_inverse,
        ends=(0.0, 1.0),
    )


@_elementwise
def _ouve_log_alpha(t, theta, sigma_min, sigma_max):
    del sigma_min, sigma_max
    return -theta * t


@_elementwise
def _ouve_growth(theta, sigma_min, sigma_max):
    """The rate 2 (theta + L) and the scale sigma_min^2 L / (theta + L), L = log(s_max/s_min)."""
    log_ratio = jnp.log(sigma_max / sigma_min)
    return 2 * (theta + log_ratio), sigma_min**2 * log_ratio / (theta + log_ratio)


@_elementwise
def _ouve_sigma(t, theta, sigma_min, sigma_max):
    rate, scale = _ouve_growth(theta, sigma_min, sigma_max)
    return jnp.exp(-theta * t) * jnp.sqrt(scale * jnp.expm1(rate * t))


@_elementwise
def _ouve_inverse(value, theta, sigma_min, sigma_max):
    rate, scale = _ouve_growth(theta, sigma_min, sigma_max)
    return jnp.log1p(jnp.exp(-value) / scale) / rate


def ouve(
    mu: ArrayLike,
    *,
    theta: ArrayLike = 1.5,
    sigma_min: ArrayLike = 0.05,
    sigma_max: ArrayLike = 0.5,
    t_min: float = 0.03,
    t_max: float = 1.0,
) -> LinearSDE:
    r"""Ornstein-Uhlenbeck towards ``mu`` with exploding variance, for real or complex data.

    ``dx = theta (mu - x) dt + g dw`` with ``g = sigma_min (sigma_max/sigma_min)^t sqrt(2 L)`` and
    ``L = log(sigma_max/sigma_min)``, so that, free of cancellation,
    ``sigma^2 = sigma_min^2 L e^{-2 theta t} expm1(2 (theta + L) t) / (theta + L)``. The prior is
    N(mu, sigma(t_max)^2 I): ``e^{-theta t_max}`` of the data is still there (StoRM's bias towards
    the anchor).

    Args:
      mu: anchor, of the event's or the batch's shape.
      theta: stiffness, at least 0.
      sigma_min: scale of the diffusion at t = 0.
      sigma_max: scale of the diffusion at t = 1.
      t_min: first time; the score is unbounded at 0.
      t_max: last time.

    Raises:
      ValueError: ``theta < 0``, or not ``0 < sigma_min < sigma_max``.
    """
    number = _number(theta)
    if number is not None and not number >= 0:
        raise ValueError(f"theta is {number}; expected at least 0")
    _check_positive("sigma_min", sigma_min)
    _check_order("sigma_min", sigma_min, "sigma_max", sigma_max, floor=0.0)
    return LinearSDE(
        _ouve_log_alpha,
        _ouve_sigma,
        params=(theta, sigma_min, sigma_max),
        mu=mu,
        t_min=t_min,
        t_max=t_max,
        kind="ouve",
        inverse_fn=_ouve_inverse,
        ends=(0.0, 1.0),
    )


PROCESSES = {
    "vp": vp,
    "sub_vp": sub_vp,
    "ve": ve,
    "edm": edm,
    "cosine": cosine,
    "rectified": rectified,
    "mean_reverting": mean_reverting,
    "ouve": ouve,
}
