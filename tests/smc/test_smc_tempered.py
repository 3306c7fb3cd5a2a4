"""Tempering against conjugate posteriors, with blackjax's kernels and one of our own."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jaxgen import smc

DATA = jnp.array([2.1, 1.4, 2.6, 1.9, 2.4])
NOISE = 0.5
D = 2


def _log_prior(x):
    return jnp.sum(-0.5 * x**2 - 0.5 * math.log(2 * math.pi))


def _log_likelihood(x):
    # Every coordinate sees the same data.
    z = (DATA[:, None] - x[None]) / NOISE
    return jnp.sum(-0.5 * z**2 - math.log(NOISE) - 0.5 * math.log(2 * math.pi))


def _truth():
    """Mean, standard deviation and log normaliser, coordinate by coordinate."""
    y = np.asarray(DATA, np.float64)
    precision = 1 + y.size / NOISE**2
    mean = y.sum() / NOISE**2 / precision
    covariance = NOISE**2 * np.eye(y.size) + 1
    log_z = -0.5 * (
        y @ np.linalg.solve(covariance, y)
        + np.linalg.slogdet(covariance)[1]
        + y.size * math.log(2 * math.pi)
    )
    return mean, precision**-0.5, D * log_z


class _State(NamedTuple):
    position: jax.Array


class _Walk:
    """A random walk with Metropolis' rule: what a sampler has to offer, no more."""

    def __init__(self, log_density, scale):
        self.log_density, self.scale = log_density, scale

    def init(self, x):
        return _State(x)

    def step(self, key, state):
        move, accept = jax.random.split(key)
        x = state.position
        y = x + self.scale * jax.random.normal(move, x.shape)
        ratio = self.log_density(y) - self.log_density(x)
        good = jnp.log(jax.random.uniform(accept)) < ratio
        return _State(jnp.where(good, y, x)), None


def _walk(log_density, x):
    return _Walk(log_density, 1.5 * jnp.std(x))


def _run(kernel, keys, n=400, **kwargs):
    def one(key):
        start, run = jax.random.split(key)
        x = jax.random.normal(start, (n, D))
        return smc.tempered(run, _log_prior, _log_likelihood, x, kernel, **kwargs)

    return jax.jit(jax.vmap(one))(keys)


def _check(out, n):
    mean, std, log_z = _truth()
    runs = out.log_z.shape[0]
    assert (out.steps < 30).all()
    last = np.asarray(out.temperatures)[np.arange(runs), np.asarray(out.steps) - 1]
    np.testing.assert_array_equal(last, np.ones(runs))
    for statistic, truth in ((out.x.mean((1, 2)), mean), (out.x.std(1).mean(1), std)):
        error = np.std(statistic) / math.sqrt(runs)
        assert abs(float(np.mean(statistic)) - truth) < 4 * error + 2 * std / n
    # In the natural scale, where it is unbiased up to the choice of the temperatures.
    ratio = np.exp(np.asarray(out.log_z, np.float64) - log_z)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(runs) + 2 / n


def test_conjugate_posterior_with_a_kernel_of_our_own():
    out = _run(_walk, jax.random.split(jax.random.key(0), 40))
    _check(out, 400)
    # Nearly half of the particles are left at every temperature but the last.
    sizes = np.asarray(out.ess)[0, : int(out.steps[0]) - 1]
    np.testing.assert_allclose(sizes, 200, atol=4)
    assert np.isnan(out.acceptance).all()


def test_conjugate_posterior_with_blackjax():
    blackjax = pytest.importorskip("blackjax")

    def kernel(log_density, x):
        return blackjax.hmc(log_density, 0.6, jnp.var(x, 0), num_integration_steps=3)

    out = _run(kernel, jax.random.split(jax.random.key(1), 20), n=200, moves=3)
    _check(out, 200)
    assert 0.5 < float(jnp.nanmean(out.acceptance)) <= 1


def test_a_cliff_in_the_likelihood():
    def inside(x):
        return jnp.where(x[0] > 0, 0.0, -jnp.inf)

    x = jax.random.normal(jax.random.key(0), (2000, 1))
    out = jax.jit(lambda k, x: smc.tempered(k, _log_prior, inside, x, _walk, moves=2))(
        jax.random.key(1), x
    )
    assert int(out.steps) == 1
    assert float(out.log_z) == pytest.approx(math.log(float(jnp.mean(x > 0))), abs=1e-5)
    assert (out.x > 0).all()


def test_a_likelihood_of_zero_everywhere_ends_at_once():
    x = jax.random.normal(jax.random.key(0), (50, D))
    out = smc.tempered(
        jax.random.key(1), _log_prior, lambda x: jnp.float32(-jnp.inf), x, _walk, moves=1
    )
    assert int(out.steps) == 1 and np.isnan(out.x).all() and np.isnan(out.log_z)


def test_too_few_temperatures_give_nan():
    def run(key):
        x = jax.random.normal(key, (50, D))
        return smc.tempered(key, _log_prior, _log_likelihood, x, _walk, moves=1, max_temperatures=2)

    error, out = jax.jit(checkify.checkify(run))(jax.random.key(0))
    assert np.isnan(out.x).all() and np.isnan(out.log_z) and int(out.steps) == 2
    with pytest.raises(checkify.JaxRuntimeError, match="max_temperatures"):
        error.throw()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"ess_target": 1.0}, "ess_target is 1.0"),
        ({"moves": 0}, "moves is 0"),
        ({"max_temperatures": 0}, "max_temperatures is 0"),
        ({"resample": "best"}, "resample is 'best'"),
        ({"kernel": lambda log_density, x: object()}, "without init"),
        ({"log_likelihood": lambda x: x}, r"log_likelihood\(x\) returned shape \(2,\)"),
        ({"log_prior": lambda x: x}, r"log_prior\(x\) returned shape \(2,\)"),
    ],
)
def test_bad_input(kwargs, words):
    arguments = {
        "log_prior": _log_prior,
        "log_likelihood": _log_likelihood,
        "x": jnp.zeros((4, D)),
        "kernel": _walk,
        **kwargs,
    }
    with pytest.raises(ValueError, match=words):
        smc.tempered(jax.random.key(0), **arguments)
