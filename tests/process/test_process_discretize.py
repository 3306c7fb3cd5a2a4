"""Discrete chains against the published kernels, written out again in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import process


@pytest.mark.parametrize("n", [50, 1000])
def test_ddpm_kernel(n):
    chain = process.vp().discretize(n)
    beta = np.linspace(0.1 / n, 20.0 / n, n)
    products = np.cumprod(1 - beta)
    np.testing.assert_allclose(chain.beta, beta, rtol=1e-5)
    np.testing.assert_allclose(chain.decay, np.sqrt(1 - beta), rtol=1e-6)
    np.testing.assert_allclose(chain.alpha, np.sqrt(products), rtol=2e-5)
    np.testing.assert_allclose(chain.sigma, np.sqrt(1 - products), rtol=1e-5)
    np.testing.assert_allclose(chain.t, np.linspace(1e-3, 1, n), rtol=1e-5)


@pytest.mark.parametrize("n", [50, 1000])
def test_smld_kernel(n):
    chain = process.ve().discretize(n)
    sigma = np.exp(np.linspace(np.log(0.01), np.log(50.0), n))
    square = sigma**2 - np.concatenate([[0.0], sigma[:-1]]) ** 2
    np.testing.assert_allclose(chain.sigma, sigma, rtol=1e-5)
    np.testing.assert_allclose(chain.beta, square, rtol=3e-4 if n == 1000 else 2e-5)
    np.testing.assert_array_equal(chain.decay, 1)
    np.testing.assert_array_equal(chain.alpha, 1)


@pytest.mark.parametrize("name", ["vp", "ve", "sub_vp", "ouve"])
def test_marginals_are_those_of_the_steps(name):
    n = 24
    sde = process.ouve(0.3) if name == "ouve" else getattr(process, name)()
    chain = sde.discretize(n)
    centre = 0.3 if name == "ouve" else 0.0
    mean, variance = np.float64(2.0), np.float64(0.0)
    for i in range(n):
        after, std = chain.step(jnp.full((1,), mean, jnp.float32), i)
        mean, a = float(after[0]), float(chain.decay[i])
        variance = a**2 * variance + float(std) ** 2
        np.testing.assert_allclose(variance**0.5, chain.sigma[i], rtol=2e-5)
        expected = centre + float(chain.alpha[i]) * (2.0 - centre)
        np.testing.assert_allclose(mean, expected, rtol=2e-5)


def test_other_processes_converge_to_their_marginals_at_first_order():
    def error(n):
        chain = process.sub_vp().discretize(n)
        return jnp.max(jnp.abs(chain.sigma - chain.sde.sigma(chain.t)))

    with jax.enable_x64(True):
        coarse, fine = jax.jit(lambda: (error(400), error(1600)))()
    slope = float(np.log(fine / coarse)) / np.log(400 / 1600)
    assert abs(slope - 1) < 0.25, slope


def test_a_chain_is_a_pytree_and_steps_by_traced_index():
    chain = process.vp().discretize(50)
    x = jnp.ones((3, 2))
    step = jax.jit(lambda chain, x, i: chain.step(x, i))
    mean, std = step(chain, x, jnp.array([0, 10, 49]))
    beta = np.linspace(0.1 / 50, 20.0 / 50, 50)[[0, 10, 49]]
    np.testing.assert_allclose(mean, np.sqrt(1 - beta)[:, None] * np.ones((3, 2)), rtol=1e-5)
    np.testing.assert_allclose(std, np.sqrt(beta), rtol=1e-5)
    mean, std = step(chain, x.astype(jnp.bfloat16), 50)
    assert mean.dtype == jnp.bfloat16 and np.isnan(mean.astype(jnp.float32)).all()
    assert np.isnan(std)
    assert chain.n == 50


def test_too_few_steps_raise_and_name_the_least():
    with pytest.raises(ValueError, match="at least 21"):
        process.vp().discretize(20)
    with pytest.raises(ValueError, match="n is 1"):
        process.ve().discretize(1)
    traced = jax.jit(lambda b: process.vp(0.1, b).discretize(10).decay)(20.0)
    assert np.isnan(traced[-1]) and np.isfinite(traced[0])
