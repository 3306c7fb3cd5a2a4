"""IR-SDE's tables against their definition, and the continuous process on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import process


@pytest.fixture(scope="module")
def sde():
    return process.ir_sde(None)


def test_the_tables_of_the_restoration_experiments():
    tables = process.ir_sde_tables()
    assert tables.alpha.shape == tables.sigma.shape == tables.theta.shape == (101,)
    assert abs(tables.alpha[0] - 0.99994) < 5e-6
    assert abs(tables.alpha[100] - 0.005) < 1e-12
    assert abs(tables.lam[0] - 6.111) < 5e-4
    assert abs(tables.lam[100] + 3.669) < 5e-4
    assert tables.sigma_inf == 50 / 255
    # The rates, from the sum of cosines itself: 103 values of u, of which 101 are used.
    u = [np.cos((j / 102 + 0.008) / 1.008 * np.pi / 2) ** 2 for j in range(103)]
    theta = 1 - np.array(u[1:-1]) / u[0]
    np.testing.assert_allclose(tables.theta, theta, rtol=1e-12)
    np.testing.assert_allclose(np.exp(-np.cumsum(theta) * tables.dt), tables.alpha, rtol=1e-12)


def test_the_other_kinds():
    linear = process.ir_sde_tables("linear", steps=50, max_sigma=0.4, eps=0.01)
    # One thousand steps from 1e-4 to 2e-2, in 51: both ends times 1000/51.
    np.testing.assert_allclose(linear.theta[[0, -1]], [0.1 / 51, 20 / 51], rtol=1e-12)
    np.testing.assert_allclose(np.diff(linear.theta, 2), 0, atol=1e-12)
    assert linear.sigma_inf == 0.4 and abs(linear.alpha[-1] - 0.01) < 1e-12
    constant = process.ir_sde_tables("constant", steps=50, max_sigma=1, eps=0.01)
    np.testing.assert_allclose(constant.alpha, 0.01 ** (np.arange(1, 52) / 51), rtol=1e-12)
    assert constant.sigma_inf == 1 / 255


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_integers_are_the_tables(kind):
    tables, sde = process.ir_sde_tables(kind), process.ir_sde(None, kind=kind)
    t = np.arange(101.0)
    np.testing.assert_allclose(sde.alpha(t), tables.alpha, rtol=2e-6)
    np.testing.assert_allclose(sde.sigma(t), tables.sigma, rtol=2e-6)
    np.testing.assert_allclose(sde.log_snr(t), 2 * tables.lam, atol=5e-6)
    # The rate is that of the step which ends at the time, and g^2 = 2 sigma_inf^2 rate.
    rate = tables.theta * tables.dt
    np.testing.assert_allclose(-sde.log_alpha_dot(t), rate, rtol=5e-4)
    np.testing.assert_allclose(sde.diffusion(t)[1:] ** 2, 2 * (50 / 255) ** 2 * rate[1:], rtol=2e-3)


def test_in_between_the_variance_is_the_one_of_reversion(sde):
    tables, t = process.ir_sde_tables(), np.array([0.5, 1.25, 40.5, 99.75])
    low = t.astype(int)
    theta = np.cumsum(tables.theta)[low] + (t - low) * tables.theta[low + 1]
    np.testing.assert_allclose(sde.log_alpha(t), -theta * tables.dt, rtol=2e-6)
    sigma = 50 / 255 * np.sqrt(1 - np.exp(-2 * theta * tables.dt))
    np.testing.assert_allclose(sde.sigma(t), sigma, rtol=1e-5)
    # The released interpolation of sigma is too small where its table bends most.
    released = np.interp(t, np.arange(101), tables.sigma)
    assert 0.04 < 1 - released[0] / sigma[0] < 0.055
    assert abs(1 - released[2] / sigma[2]) < 5e-4


def test_log_snr_falls_and_its_inverse_finds_back(sde):
    t = np.linspace(0, 100, 20_001, dtype=np.float32)
    level = np.asarray(sde.log_snr(t))
    assert (np.diff(level) < 0).all()
    # Half a unit of a float32 log-SNR of size 7, over its smallest slope of 0.15 a step.
    np.testing.assert_allclose(sde.inverse_log_snr(level), t, atol=2e-5)


def test_the_ends(sde):
    assert (float(sde.t_min), float(sde.t_end), float(sde.t_max)) == (0, 0, 100)
    assert float(sde.prior_std) == np.float32(50 / 255)
    assert float(sde.alpha(-1.0)) == 1 and float(sde.sigma(-1.0)) == 0
    assert float(sde.log_snr(-1.0)) == np.inf and float(sde.inverse_log_snr(np.inf)) == -1
    assert np.isnan(sde.sigma(np.array([-0.5, 100.5, np.nan]))).all()


def test_one_compilation_for_all_tables_of_a_length(key):
    traces = []

    @jax.jit
    def level(sde, t):
        traces.append(None)
        return sde.log_snr(t), sde.prior_sample(key, (3, 2))

    for kind in ("cosine", "linear"):
        _, x = level(process.ir_sde(jnp.ones((3, 2)), kind=kind, max_sigma=0.001), 20.0)
        np.testing.assert_allclose(x, 1, atol=0.005)
    assert len(traces) == 1


def test_bad_input():
    with pytest.raises(ValueError, match="kind is 'sine'"):
        process.ir_sde(None, kind="sine")
    with pytest.raises(ValueError, match="max_sigma is 0"):
        process.ir_sde(None, max_sigma=0)
    with pytest.raises(ValueError, match=r"eps is 1\.0"):
        process.ir_sde_tables(eps=1.0)
    with pytest.raises(ValueError, match="steps is 0"):
        process.ir_sde_tables(steps=0)
