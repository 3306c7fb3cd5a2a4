r"""IR-SDE: reversion to a degraded image at the rates of its released tables.

Luo et al., arXiv 2301.11699: dx = theta_t (mu - x) dt + sigma_t dw with sigma_t^2 = 2 sigma_inf^2
theta_t (there lambda^2 theta_t), equations (2) and (3), so that with Theta = int theta

    alpha = exp(-Theta),      sigma^2 = sigma_inf^2 (1 - alpha^2)                           (1)

The released code has T + 1 rates at the times t = 0 .. T, in steps of dt,

    Theta_t = sum_{i <= t} theta_i dt,      dt = -log(eps) / sum_{i <= T} theta_i,

so that alpha_T = eps, and the time t = 0 comes after a first step already. With T + 1 = n and
s = 0.008 the rates are

| kind     | theta_i                                                             |
|----------|---------------------------------------------------------------------|
| cosine   | 1 - u_{i+1}/u_0,  u_j = cos((j/(n + 1) + s) / (1 + s) pi/2)^2       |
| linear   | from 0.1/n to 20/n, equally spaced                                  |
| constant | 1                                                                   |

Between integers log alpha is linear here: the rate is theta_t within the step that ends at t, (1)
holds at every time, and log-SNR falls strictly. The released sampler interpolates alpha, sigma and
log-SNR linearly, each for itself. The two agree at integers; in between (1) does not hold there:
for the cosine tables of 100 steps sigma is up to 5 % too small in the first step and 0.5 % after
the fifth, and half of log-SNR is off by up to 0.11 and 0.01.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgen.core import checks
from jaxgen.core.arrays import safe_sqrt
from jaxgen.process.linear import LinearSDE
from jaxgen.process.tables import log_alpha_at, time_of

__all__ = ["IRSDETables", "ir_sde", "ir_sde_tables"]

_KINDS = ("cosine", "linear", "constant")
_OFFSET = 0.008

_elementwise = functools.partial(jax.jit, inline=True)


class IRSDETables(NamedTuple):
    """The released tables at the times 0 .. T, in NumPy's float64.

    Attributes:
      alpha: signal coefficient, ``(T + 1,)``.
      sigma: standard deviation of the noise, ``(T + 1,)``.
      theta: rate of the step that ends at this time, in units of ``1 / dt``, ``(T + 1,)``.
      lam: ``log(alpha / sigma)``, ``(T + 1,)``.
      dt: length of a step.
      sigma_inf: stationary standard deviation.
    """

    alpha: np.ndarray
    sigma: np.ndarray
    theta: np.ndarray
    lam: np.ndarray
    dt: float
    sigma_inf: float


def _rates(kind: str, steps: int) -> np.ndarray:
    n = steps + 1
    if kind == "constant":
        return np.ones(n)
    if kind == "linear":
        return np.linspace(0.1, 20.0, n) / n
    angle = (np.arange(n + 1) / (n + 1) + _OFFSET) / (1 + _OFFSET) * (0.5 * math.pi)
    u = np.cos(angle) ** 2
    return 1 - u[1:] / u[0]


def ir_sde_tables(
    kind: str = "cosine", *, steps: int = 100, max_sigma: float = 50.0, eps: float = 0.005
) -> IRSDETables:
    """The tables of the released IR-SDE code (module docstring).

    Args:
      kind: ``"cosine"``, ``"linear"`` or ``"constant"``.
      steps: T, the last time; the tables have T + 1 entries.
      max_sigma: stationary standard deviation; from 1 up in units of 1/255, as published.
      eps: share of the data left at T, in (0, 1).

    Raises:
      ValueError: an argument out of range.

    Example:
      >>> tables = ir_sde_tables()
      >>> [round(float(tables.lam[i]), 3) for i in (0, 100)]
      [6.111, -3.669]
    """
    checks.one_of("kind", kind, _KINDS)
    steps = checks.positive_int("steps", steps)
    if not 0 < max_sigma < math.inf:
        raise ValueError(f"max_sigma is {max_sigma}; expected a finite positive number")
    if not 0 < eps < 1:
        raise ValueError(f"eps is {eps}; expected a number between 0 and 1")
    sigma_inf = float(max_sigma) / 255 if max_sigma >= 1 else float(max_sigma)
    theta = _rates(kind, steps)
    total = np.cumsum(theta)
    dt = -math.log(eps) / total[-1]
    log_alpha = -total * dt
    sigma = sigma_inf * np.sqrt(-np.expm1(2 * log_alpha))
    return IRSDETables(
        np.exp(log_alpha), sigma, theta, log_alpha - np.log(sigma), float(dt), sigma_inf
    )


@_elementwise
def _log_alpha(t: jax.Array, table: jax.Array, sigma_inf: jax.Array) -> jax.Array:
    del sigma_inf
    return log_alpha_at(t, table)


@_elementwise
def _sigma(t: jax.Array, table: jax.Array, sigma_inf: jax.Array) -> jax.Array:
    return sigma_inf * safe_sqrt(-jnp.expm1(2 * log_alpha_at(t, table)))


@_elementwise
def _inverse(value: jax.Array, table: jax.Array, sigma_inf: jax.Array) -> jax.Array:
    return time_of(-0.5 * jax.nn.softplus(-value - 2 * jnp.log(sigma_inf)), table)


def ir_sde(
    mu: ArrayLike | None,
    *,
    kind: str = "cosine",
    steps: int = 100,
    max_sigma: float = 50.0,
    eps: float = 0.005,
) -> LinearSDE:
    """The process of an IR-SDE network, called with times in [0, steps]: prior N(mu, sigma_inf^2).

    At integers it has the released tables' values; see the module docstring for the times in
    between. The rate at an integer is that of the step before it. A sampler ends at t = 0, where
    the tables have a little noise; t = -1, one step on, is the proper end without any, which a
    grid may have as its last time (no network was trained there).

    Args:
      mu: anchor, the degraded image, of the event's or the batch's shape; ``None`` for the
        schedule alone, which ``solve.mr_sample`` takes.
      kind: see ``ir_sde_tables``, as the others.
      steps: T.
      max_sigma: stationary standard deviation, over 255 from 1 up.
      eps: share of the data left at T.

    Raises:
      ValueError: an argument out of range.

    Example:
      >>> sde = ir_sde(None)
      >>> round(float(sde.alpha(100.0)), 4), round(float(sde.alpha(0.0)), 5)
      (0.005, 0.99994)
    """
    tables = ir_sde_tables(kind, steps=steps, max_sigma=max_sigma, eps=eps)
    # The first entry, alpha = 1 at t = -1, has the sign by which sigma is a positive zero there.
    log_alpha: Any = np.concatenate([[-0.0], -np.cumsum(tables.theta) * tables.dt])
    return LinearSDE(
        _log_alpha,
        _sigma,
        params=(log_alpha, tables.sigma_inf),
        mu=mu,
        t_min=0.0,
        t_max=float(steps),
        prior_std=tables.sigma_inf,
        kind="ir_sde",
        inverse_fn=_inverse,
        ends=(-1.0, float(steps)),
    )
