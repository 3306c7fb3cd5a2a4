"""The process of discrete betas against the products themselves, in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import process, score, solve

BETAS = np.linspace(1e-4, 0.02, 1000)
LOG_ALPHA = 0.5 * np.cumsum(np.log1p(-BETAS))
LOG_SNR = 2 * LOG_ALPHA - np.log(-np.expm1(2 * LOG_ALPHA))


@pytest.fixture(scope="module")
def sde():
    return process.discrete_betas(BETAS)


def test_integers_are_the_cumulative_products(sde):
    t = np.arange(1000.0)
    np.testing.assert_allclose(sde.alpha(t) ** 2, np.cumprod(1 - BETAS), rtol=2e-6)
    np.testing.assert_allclose(sde.sigma(t), np.sqrt(-np.expm1(2 * LOG_ALPHA)), rtol=2e-6)
    np.testing.assert_allclose(sde.log_snr(t), LOG_SNR, rtol=1e-6, atol=1e-6)
    assert (float(sde.t_min), float(sde.t_end), float(sde.t_max)) == (0, 0, 999)


def test_log_alpha_is_linear_in_between(sde):
    t = np.array([0.25, 17.5, 998.75])
    low = t.astype(int)
    expected = LOG_ALPHA[low] + (t - low) * (LOG_ALPHA[low + 1] - LOG_ALPHA[low])
    np.testing.assert_allclose(sde.log_alpha(t), expected, rtol=2e-6)
    # g^2 = -d log alpha^2/dt under variance preservation: the rate -log(1 - beta) of the segment.
    rate = -np.log1p(-BETAS[low + 1])
    np.testing.assert_allclose(sde.diffusion(t) ** 2, rate, rtol=2e-3)


def test_inverse(sde):
    t = np.arange(1000.0)
    found = sde.inverse_log_snr(LOG_SNR)
    # A float32 log-SNR at t = 0, of slope 1 per step and size 9, fixes t to 1e-6, at 999 to 1e-4.
    np.testing.assert_allclose(found, t, atol=1e-4)
    np.testing.assert_allclose(found[:5], t[:5], atol=5e-6)
    with jax.enable_x64(True):
        wide = process.discrete_betas(BETAS)
        t = np.linspace(0.0, 999.0, 57)

        @jax.jit
        def there_and_back(t):
            level, slope = jax.jvp(wide.log_snr, (t,), (jnp.ones_like(t),))
            return *jax.jvp(wide.inverse_log_snr, (level,), (jnp.ones_like(level),)), slope

        back, rate, slope = there_and_back(t)
    np.testing.assert_allclose(back, t, atol=1e-9)
    np.testing.assert_allclose(rate[1:-1] * slope[1:-1], 1, rtol=1e-9)


def test_the_proper_end_has_no_noise_and_beyond_is_nan(sde):
    assert float(sde.alpha(-1.0)) == 1
    assert float(sde.sigma(-1.0)) == 0 and not np.signbit(sde.sigma(-1.0))
    assert float(sde.log_snr(-1.0)) == np.inf
    assert float(sde.inverse_log_snr(np.inf)) == -1
    assert np.isnan(sde.alpha(np.array([-0.5, -2.0, 1000.0, np.nan]))).all()


def test_a_sampler_ends_without_noise(sde, key):
    field = score.closed_form.gaussian(sde, jnp.ones(2), 0.25).noise
    x_init = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    out = solve.sample(key, field, sde, (4, 2), solver="ddim", steps=200, x_init=x_init, t_end=-1)
    # The flow of a Gaussian is affine, mean to mean and deviation to deviation.
    alpha, sigma = float(sde.alpha(999.0)), float(sde.sigma(999.0))
    expected = 1 + (x_init - alpha) * 0.5 / np.sqrt(0.25 * alpha**2 + sigma**2)
    np.testing.assert_allclose(out.x, expected, atol=0.02)


def test_one_compilation_for_all_betas_and_gradients_in_them():
    traces = []

    @jax.jit
    def level(sde, t):
        traces.append(None)
        return sde.log_snr(t)

    for top in (0.01, 0.02):
        level(process.discrete_betas(np.linspace(1e-4, top, 50)), 20.0)
    assert len(traces) == 1

    def log_alpha(betas):
        return process.discrete_betas(betas).log_alpha(3.0)

    slope = jax.jit(jax.grad(log_alpha))(jnp.full((6,), 0.1))
    np.testing.assert_allclose(slope, [-0.5 / 0.9] * 4 + [0, 0], rtol=1e-6)


def test_bad_betas():
    with pytest.raises(ValueError, match=r"betas has shape \(\)"):
        process.discrete_betas(0.1)
    with pytest.raises(ValueError, match=r"betas has shape \(1,\)"):
        process.discrete_betas([0.1])
    with pytest.raises(ValueError, match=r"betas\[2\] is 1.0"):
        process.discrete_betas([0.1, 0.2, 1.0])
    with pytest.raises(ValueError, match=r"betas\[0\] is nan"):
        process.discrete_betas([np.nan, 0.2])
    traced = jax.jit(lambda b: process.discrete_betas(b).alpha(1.0))(jnp.array([0.1, 1.0]))
    assert np.isnan(traced)


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_sharded_times(sde, kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    layout = jax.NamedSharding(mesh, jax.P("data"))
    times = np.linspace(0.0, 999.0, 8, dtype=np.float32)
    sharded = jax.device_put(times, layout)
    with jax.set_mesh(mesh):
        alpha = jax.jit(sde.alpha)(sharded)
        back = jax.jit(sde.inverse_log_snr)(jax.jit(sde.log_snr)(sharded))
    np.testing.assert_allclose(alpha, sde.alpha(times), rtol=1e-6)
    np.testing.assert_allclose(back, times, atol=1e-4)


def test_the_chain_of_all_steps_has_the_betas_themselves():
    betas = np.linspace(1e-4, 0.02, 50)
    chain = process.discrete_betas(betas).discretize(50)
    np.testing.assert_allclose(chain.beta, betas, rtol=2e-5)
    np.testing.assert_allclose(chain.decay, np.sqrt(1 - betas), rtol=1e-6)
    np.testing.assert_allclose(chain.alpha**2, np.cumprod(1 - betas), rtol=1e-5)


def test_a_chain_of_fewer_steps_has_the_same_marginals():
    sde = process.discrete_betas(np.linspace(1e-4, 0.02, 50))
    chain = sde.discretize(8)
    variance = 0.0
    for a, g in zip(np.asarray(chain.decay), np.asarray(chain.noise_std), strict=True):
        variance = a**2 * variance + g**2
    np.testing.assert_allclose(variance, sde.sigma(49.0) ** 2, rtol=1e-5)
    np.testing.assert_allclose(chain.alpha, sde.alpha(chain.t), rtol=1e-5)


def test_a_span_of_time_that_is_not_one_goes_into_the_euler_chain():
    # From a point, EDM's variance is t^2; a chain of Euler steps sums 2 t dt.
    chain = process.edm(sigma_max=4.0).discretize(2000)
    np.testing.assert_allclose(chain.sigma[-1], 4.0, rtol=2e-3)
