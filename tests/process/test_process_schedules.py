"""Every named process against its published closed form in float64, over all of its time.

A new process is a row of ``REFERENCE``: alpha, sigma, the drift's rate and g^2 in NumPy.
"""

import dataclasses
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from jaxgen import process
from jaxgen.process import PROCESSES

B0, B1 = 0.1, 20.0
S0, S1 = 0.01, 50.0
S_INF, A_END = 50 / 255, 0.005
THETA, O0, O1 = 1.5, 0.05, 0.5
LOG_RATIO = math.log(O1 / O0)


def _beta(t):
    return B0 + t * (B1 - B0)


def _log_mean(t):
    return -0.25 * t**2 * (B1 - B0) - 0.5 * B0 * t


def _ve_sigma(t):
    return S0 * (S1 / S0) ** t


def _ouve_sigma(t):
    spread = (O1 / O0) ** (2 * t) - np.exp(-2 * THETA * t)
    return np.sqrt(O0**2 * LOG_RATIO / (THETA + LOG_RATIO) * spread)


# name: alpha, sigma, d log alpha/dt, g^2.
REFERENCE = {
    "vp": (
        lambda t: np.exp(_log_mean(t)),
        lambda t: np.sqrt(-np.expm1(2 * _log_mean(t))),
        lambda t: -0.5 * _beta(t),
        _beta,
    ),
    "sub_vp": (
        lambda t: np.exp(_log_mean(t)),
        lambda t: -np.expm1(2 * _log_mean(t)),
        lambda t: -0.5 * _beta(t),
        lambda t: _beta(t) * -np.expm1(4 * _log_mean(t)),
    ),
    "ve": (
        np.ones_like,
        _ve_sigma,
        np.zeros_like,
        lambda t: 2 * _ve_sigma(t) ** 2 * math.log(S1 / S0),
    ),
    "edm": (np.ones_like, lambda t: t, np.zeros_like, lambda t: 2 * t),
    "cosine": (
        lambda t: np.cos(np.pi * t / 2),
        lambda t: np.sin(np.pi * t / 2),
        lambda t: -0.5 * np.pi * np.tan(np.pi * t / 2),
        lambda t: np.pi * np.tan(np.pi * t / 2),
    ),
    "rectified": (
        lambda t: 1 - t,
        lambda t: t,
        lambda t: -1 / (1 - t),
        lambda t: 2 * t / (1 - t),
    ),
    "mean_reverting": (
        lambda t: A_END**t,
        lambda t: S_INF * np.sqrt(-np.expm1(2 * t * math.log(A_END))),
        lambda t: np.full_like(t, math.log(A_END)),
        lambda t: np.full_like(t, -2 * S_INF**2 * math.log(A_END)),
    ),
    "ouve": (
        lambda t: np.exp(-THETA * t),
        _ouve_sigma,
        lambda t: np.full_like(t, -THETA),
        lambda t: 2 * LOG_RATIO * O0**2 * (O1 / O0) ** (2 * t),
    ),
}

PRESERVING = ("vp", "cosine")


def make(name):
    build = PROCESSES[name]
    return build(0.3) if "mu" in inspect.signature(build).parameters else build()


def times(sde, n=401):
    """Float32 times, dense near both ends and in the middle, the ends included."""
    low, high = float(sde.t_min), float(sde.t_max)
    near = np.geomspace(1e-6, 0.5, n)
    share = np.concatenate([[0.0], near, np.linspace(0.01, 0.99, n), 1 - near[::-1], [1.0]])
    t = np.float32(low + (high - low) * share)
    if low > 0:
        t = np.concatenate([t, np.geomspace(low, high, n).astype(np.float32)])
    return np.clip(t, np.float32(low), np.float32(high))


def _worst(value, truth, scale):
    value, truth = np.asarray(value, np.float64), np.asarray(truth)
    return np.max(np.abs(value - truth) / scale)


def test_every_process_has_a_reference():
    assert set(REFERENCE) == set(PROCESSES)


@pytest.mark.parametrize("name", PROCESSES)
def test_float32_is_accurate_from_end_to_end(name):
    sde, (alpha, sigma, rate, square) = make(name), REFERENCE[name]
    t = times(sde)
    exact = t.astype(np.float64)
    a, s = alpha(exact), sigma(exact)
    assert _worst(sde.alpha(t), a, a) < 1e-5
    assert _worst(sde.sigma(t), s, s) < 1e-5
    if name in PRESERVING:
        assert _worst(sde.sigma(t) ** 2, s**2, s**2) < 1e-5
        identity = np.asarray(sde.alpha(t), np.float64) ** 2 + np.asarray(sde.sigma(t)) ** 2
        assert _worst(identity, 1.0, 1.0) < 1e-6
    level = 2 * np.log(a / s)
    scale = np.maximum(1, np.abs(level))
    assert _worst(sde.log_snr(t), level, scale) < 1e-5
    assert _worst(sde.log_alpha(t), np.log(a), np.maximum(1, np.abs(np.log(a)))) < 1e-5
    f, g2 = rate(exact), square(exact)
    assert _worst(sde.log_alpha_dot(t), f, np.maximum(1e-30, np.abs(f))) < 2e-5
    assert _worst(sde.diffusion(t), np.sqrt(g2), np.sqrt(g2)) < 2e-5
    x = jnp.full((t.size, 1), 1.7)
    centre = 0.0 if sde.mu is None else 0.3
    np.testing.assert_allclose(sde.drift(x, t)[:, 0], f * (1.7 - centre), rtol=3e-5, atol=0)


@pytest.mark.parametrize("name", PROCESSES)
def test_inverse_log_snr_comes_back(name):
    sde = make(name)
    t = times(sde, 101)
    level = sde.log_snr(t)
    back = sde.log_snr(sde.inverse_log_snr(level))
    # Beside rounding of the level, that of the time itself: near t = 1 a float32 is coarse.
    rates = sde.rates(t)
    slope = 2 * np.abs(rates.sigma_dot / rates.sigma - rates.alpha_dot / rates.alpha)
    allowed = 2e-5 * np.maximum(1, np.abs(level)) + slope * np.spacing(t)
    assert _worst(back, np.asarray(level, np.float64), allowed) < 1
    outside = sde.inverse_log_snr(jnp.array([float(level.max()) + 1, float(level.min()) - 1]))
    assert np.isnan(outside).all()


@jax.jit
def _inverse(sde, level):
    def total(sde, level):
        t = sde.inverse_log_snr(level)
        return jnp.sum(t), t

    (_, t), (in_sde, in_level) = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(sde, level)
    a, s, da, ds = sde.rates(t)
    return t, in_level, in_sde.params, 1 / (2 * (da / a - ds / s))


@pytest.mark.parametrize("name", PROCESSES)
def test_bisection_equals_the_closed_inverse(name):
    with jax.enable_x64(True):
        sde = make(name)
        level = jnp.linspace(sde.log_snr(sde.t_max), sde.log_snr(sde.t_min), 33)[1:-1]
        t, slope, in_params, truth = _inverse(sde, level)
        np.testing.assert_allclose(slope, truth, rtol=1e-6)
        bisected = _inverse(dataclasses.replace(sde, inverse_fn=None), level)
        for found, closed in zip(bisected, (t, slope, in_params, truth), strict=True):
            np.testing.assert_allclose(found, closed, rtol=1e-6, atol=1e-12)


def test_infinite_levels_are_the_proper_ends():
    for name in ("cosine", "rectified"):
        sde = make(name)
        assert float(sde.inverse_log_snr(jnp.inf)) == 0 and float(sde.log_snr(0.0)) == np.inf
        assert float(sde.inverse_log_snr(-jnp.inf)) == 1 and float(sde.log_snr(1.0)) == -np.inf
        assert float(sde.alpha(1.0)) == 0 and float(sde.sigma(0.0)) == 0
    assert float(process.edm().sigma(0.0)) == 0


def test_ouve_has_the_published_numbers_and_solves_its_equation():
    truth = {0.03: 0.01883010, 0.1: 0.03574612, 0.5: 0.12165733, 1.0: 0.38898266}
    sde = process.ouve(0.0)
    for t, s in truth.items():
        assert abs(float(sde.sigma(t)) - s) < 1e-6 * s + 5e-9
    assert abs(float(sde.alpha(1.0)) - 0.2231) < 1e-4
    with jax.enable_x64(True):
        exact = process.ouve(0.0, t_min=1e-12)
        ode = solve_ivp(
            lambda t, v: -2 * THETA * v + REFERENCE["ouve"][3](t),
            (0, 1),
            [0.0],
            rtol=1e-12,
            atol=1e-14,
            t_eval=list(truth),
        )
        np.testing.assert_allclose(
            np.sqrt(ode.y[0]), exact.sigma(jnp.array(list(truth))), atol=1e-8
        )


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: process.vp(20.0, 0.1), "beta_min is 20.0 and beta_max 0.1"),
        (lambda: process.vp(-1.0), "beta_min is -1.0"),
        (lambda: process.sub_vp(2.0, 2.0), "expected beta_min < beta_max"),
        (lambda: process.ve(0.0), "sigma_min is 0.0"),
        (lambda: process.ve(5.0, 1.0), "expected sigma_min < sigma_max"),
        (lambda: process.edm(1.0, 0.5), "expected sigma_min < sigma_max"),
        (lambda: process.mean_reverting(0.0, sigma_inf=0.0), "sigma_inf is 0.0"),
        (lambda: process.mean_reverting(0.0, alpha_end=1.5), "alpha_end is 1.5"),
        (lambda: process.ouve(0.0, theta=-1.0), "theta is -1.0"),
        (lambda: process.ouve(0.0, sigma_min=1.0), "expected sigma_min < sigma_max"),
        (lambda: process.ouve(0.0, t_min=2.0), "expected t_min < t_max"),
        (lambda: process.ve(float("nan")), "sigma_min is nan"),
        (lambda: process.rectified(t_max=1.5), "t_max is 1.5"),
        (lambda: process.rectified(t_max=0.0), "expected 1e-5 < t_max"),
    ],
)
def test_constructors_name_what_is_wrong(build, word):
    with pytest.raises(ValueError, match=word):
        build()


def test_rectified_flow_may_end_early():
    sde = process.rectified(t_max=0.999)
    np.testing.assert_allclose(sde.sigma(sde.t_max), 0.999, rtol=1e-6)
    assert np.isnan(sde.sigma(0.9995)) and float(sde.sigma(1.0)) == 1.0
    np.testing.assert_array_equal(
        sde.prior_sample(jax.random.key(0), (2, 3)),
        process.rectified().prior_sample(jax.random.key(0), (2, 3)),
    )


def test_constructors_take_tracers():
    out = jax.jit(lambda b: process.vp(0.1, b).alpha(0.5))(20.0)
    np.testing.assert_allclose(out, np.exp(_log_mean(0.5)), rtol=1e-5)
