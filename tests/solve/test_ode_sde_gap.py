"""The ODE-SDE gap of a wrong Gaussian score against variances and a bound known by quadrature.

Ornstein-Uhlenbeck process f = -x, g = 1, data N(0, 1.5): the true variance is c0 = 1/2 + exp(-2t).
The model is N(0, c) with c = c0 (1 + delta sin^2(3 pi t/T)). Both samplers stay Gaussian, with
variances dV/dt = (-2 + 1/c) V (flow) and (-2 + 2/c) V - 1 (reverse SDE) from V(T) = c(T).
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from jaxgen import score
from jaxgen.process import LinearSDE
from jaxgen.solve.ode_sde_gap import ode_sde_bound, ode_sde_gap, refine_end

T = 5.0
# delta: variances of the two samplers, their distance, the bound.
KNOWN = {
    0.05: (1.862496, 1.579277, 0.108040, 0.124309),
    0.1: (2.278241, 1.661403, 0.220430, 0.255460),
    0.2: (3.279927, 1.834472, 0.456630, 0.537390),
}


def _log_alpha(t):
    return -t


def _sigma(t):
    return jnp.sqrt(-jnp.expm1(-2 * t) / 2)


# Started at the model's law. The noise's rate is infinite at the proper end, which a grid may have.
SDE = LinearSDE(
    _log_alpha,
    _sigma,
    t_min=1e-6,
    t_max=T,
    t_end=0.0,
    prior_std=np.sqrt(0.5 + np.exp(-2 * T)),
    ends=(0.0, T),
)


def variance(t, delta, xp=np):
    return (0.5 + xp.exp(-2 * t)) * (1 + delta * xp.sin(3 * xp.pi * t / T) ** 2)


def model_score(delta):
    def field(x, t):
        return -x / variance(t, delta, jnp)[:, None]

    return field


@functools.partial(jax.jit, static_argnames=("shape", "steps", "refine"))
def run(key, delta, shape=(8000, 1), steps=800, refine=(10, 10)):
    return ode_sde_gap(
        key, model_score(delta), SDE, shape, prediction="score", steps=steps, refine=refine
    )


def by_ode(delta, points=4001):
    """Variances of the two samplers at all times, from T down."""
    t = np.linspace(T, 0, points)
    options = {"t_eval": t, "rtol": 1e-10, "atol": 1e-12}
    start = [variance(T, delta)]
    flow = solve_ivp(lambda s, v: (-2 + 1 / variance(s, delta)) * v, (T, 0), start, **options)
    noisy = solve_ivp(lambda s, v: (-2 + 2 / variance(s, delta)) * v - 1, (T, 0), start, **options)
    return t[::-1], flow.y[0][::-1], noisy.y[0][::-1]


def by_euler(delta, times, is_noisy):
    """The variance that Euler's rule gives on this grid, exactly."""
    v = variance(T, delta)
    for n, (t, after) in enumerate(itertools.pairwise(times)):
        h, c = t - after, variance(t, delta)
        slope = -1 + (1 if is_noisy else 0.5) / c
        last = n == len(times) - 2
        v = (1 - h * slope) ** 2 * v + (h if is_noisy and not last else 0)
    return v


@pytest.mark.parametrize("delta", KNOWN)
def test_variances_and_bound_are_those_of_the_closed_form(delta):
    t, flow, noisy = by_ode(delta)
    v_ode, v_sde, w2, bound = KNOWN[delta]
    np.testing.assert_allclose([flow[0], noisy[0]], [v_ode, v_sde], rtol=2e-6)
    np.testing.assert_allclose(np.sqrt(flow[0]) - np.sqrt(noisy[0]), w2, atol=2e-6)
    c = variance(t, delta)
    t[0] = 1e-6
    found = ode_sde_bound(SDE, t, 1 - 0.5 / c, np.abs(1 / noisy - 1 / c) * np.sqrt(noisy))
    np.testing.assert_allclose(found, bound, rtol=2e-5)
    assert w2 < found < 1.2 * w2


@pytest.mark.parametrize("delta", [0.05, 0.2])
def test_samplers_have_those_variances_within_three_standard_errors(delta):
    out = run(jax.random.key(3), delta)
    times = np.asarray(refine_end(np.linspace(T, 0, 801), 10, 10), float)
    n = out.ode.shape[0]
    for x, known, is_noisy in ((out.ode, KNOWN[delta][0], False), (out.sde, KNOWN[delta][1], True)):
        x = np.asarray(x, float)
        exact = by_euler(delta, times, is_noisy)
        assert abs(exact / known - 1) < 0.01  # what is left to the step
        error = exact * np.sqrt(2 / n)
        assert abs(x.var() - exact) < 3 * error, (x.var(), exact, error)
        assert abs(x.mean()) < 3 * np.sqrt(exact / n)
    # W2 is above the difference of the deviations, by what two samples of one law are apart.
    least = np.std(out.ode) - np.std(out.sde)
    assert least - 1e-4 < float(out.w2) < least + 0.03
    assert out.nfe == 800 + 90 and out.ode.dtype == jnp.float32


def test_the_very_last_step_of_the_sde_is_without_noise_and_the_others_are_not():
    times = np.asarray([T, 4.0, 2.0, 1.0])
    key = jax.random.key(0)
    out = ode_sde_gap(
        key, model_score(0.0), SDE, (4000, 1), prediction="score", grid=times, refine=None
    )
    assert out.nfe == 3
    for x, is_noisy in ((out.ode, False), (out.sde, True)):
        exact = by_euler(0.0, times, is_noisy)
        assert abs(np.var(x) - exact) < 4 * exact * np.sqrt(2 / 4000)
    # One step only: no noise at all but the start's, of which each sampler has its own.
    one = ode_sde_gap(
        key,
        lambda x, t: 0 * x,
        SDE,
        (50, 2),
        prediction="score",
        grid=np.array([T, 4.0]),
        refine=None,
    )
    first = SDE.prior_sample(jax.random.key(0), (50, 2))
    assert not np.allclose(one.ode, one.sde) and one.ode.shape == first.shape
    np.testing.assert_allclose(np.var(one.sde) / np.var(one.ode), 1.0, atol=0.6)


def test_an_exact_score_leaves_the_floor_alone():
    truth = score.closed_form.gaussian(SDE, jnp.zeros(1), 1.5)
    draw = jax.jit(lambda key: ode_sde_gap(key, truth.noise, SDE, (4000, 1), steps=300).w2)
    # W2^2 of two samples of a Gaussian in one dimension is about v (log log n)/n.
    assert draw(jax.random.key(1)) < 0.1


def test_refined_grids_keep_their_knots():
    times = jnp.linspace(1.0, 0.0, 6)
    fine = refine_end(times, 2, 4)
    assert fine.shape == (12,)
    np.testing.assert_array_equal(fine[:4], times[:4])
    np.testing.assert_array_equal(fine[jnp.array([7, 11])], times[4:])
    np.testing.assert_allclose(jnp.diff(fine)[3:], -0.05, rtol=1e-5)
    np.testing.assert_array_equal(refine_end(times, 0, 4), times)
    both = jax.vmap(lambda v: refine_end(v, 2, 4))(jnp.stack([times, 2 * times]))
    np.testing.assert_allclose(both[1], 2 * fine, rtol=1e-6)


def test_under_vmap_and_by_index():
    keys = jax.random.split(jax.random.key(2), 2)
    few = jax.vmap(lambda k: run(k, 0.1, (6, 1), 5, (2, 2)))(keys)
    one = run(keys[1], 0.1, (6, 1), 5, (2, 2))
    np.testing.assert_allclose(few.ode[1], one.ode, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(few.sde[1], one.sde, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(few.w2[1], one.w2, rtol=1e-4)
    # The first samples do not depend on how many there are.
    np.testing.assert_allclose(run(keys[1], 0.1, (3, 1), 5, (2, 2)).sde, one.sde[:3], rtol=1e-5)
    t = jnp.linspace(0.1, 1.0, 5)
    bound = jax.jit(jax.vmap(lambda m: ode_sde_bound(SDE, t, jnp.zeros(5), m)))
    np.testing.assert_allclose(bound(jnp.ones((2, 5))), 0.45, rtol=1e-5)


def test_bad_input_is_named():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"shape is \(3,\); expected \(batch"):
        ode_sde_gap(key, model_score(0.1), SDE, (3,), prediction="score")
    with pytest.raises(ValueError, match=r"refine\[0\] is -1"):
        ode_sde_gap(key, model_score(0.1), SDE, (3, 1), refine=(-1, 2))
    with pytest.raises(ValueError, match="grid is"):
        ode_sde_gap(key, model_score(0.1), SDE, (3, 1), grid=np.array([1.0, 2.0]))
    with pytest.raises(TypeError, match="typed key"):
        ode_sde_gap(jnp.zeros(2, jnp.uint32), model_score(0.1), SDE, (3, 1))
    with pytest.raises(ValueError, match=r"times has shape \(3,\); expected \(3 \+ 1"):
        refine_end(jnp.ones(3), 3, 2)
    with pytest.raises(ValueError, match=r"shapes \(3,\), \(3,\), \(2,\)"):
        ode_sde_bound(SDE, jnp.arange(3.0), jnp.ones(3), jnp.ones(2))
    assert np.isnan(ode_sde_bound(SDE, jnp.array([2.0, 1.0]), jnp.ones(2), jnp.ones(2)))
    # A field that is no number somewhere leaves no number.
    out = ode_sde_gap(
        key, lambda x, t: x * jnp.nan, SDE, (3, 1), prediction="score", steps=2, refine=None
    )
    assert np.isnan(out.ode).all() and np.isnan(out.w2)
