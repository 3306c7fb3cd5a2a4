"""Score-based generative modelling through SDEs (Song et al., ICLR 2021, arXiv 2011.13456).

The claims: a corrector buys more than the same evaluations spent on the predictor; inpainting
needs the corrector; and one network, trained once, samples, measures likelihoods, inpaints and
obeys a classifier, each held against the truth.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import guide, process, score, solve
from jaxgen.nets import MLP
from jaxgen.score.closed_form import mixture

VE = process.ve()

# --- the corrector at equal evaluations --------------------------------------------------------

# Data N(1, 0.25) in each of 64 dimensions; the returned mean of the chain has these variances, from
# its exact linear recursion (the corrected one in the limit of many dimensions).
VARIANCES = {"predictor": 0.27272, "corrected": 0.25975}
TRUTH = 0.25


@functools.cache
def chain_end(corrected):
    def field(x, t):
        sigma = VE.sigma(t)[:, None]
        return sigma * (x - 1) / (TRUTH + sigma**2)

    corrector = solve.langevin_corrector(snr=0.16) if corrected else None
    run = jax.jit(
        lambda key: solve.predictor_corrector(
            key, field, VE, (4000, 64), corrector=corrector, steps=50 if corrected else 100
        )
    )
    return run(jax.random.key(0))


def test_a_corrector_beats_the_predictor_at_equal_evaluations():
    ends = {"predictor": chain_end(False), "corrected": chain_end(True)}
    variance = {}
    for name, end in ends.items():
        assert int(end.nfe) == 100
        x = np.asarray(end.x, np.float64)
        variance[name] = x.var()
        assert abs(x.mean() - 1) < 0.006
        # The standard error of the variance of 256,000 numbers is 8e-4.
        assert abs(variance[name] - VARIANCES[name]) < 0.003
    assert abs(variance["corrected"] - TRUTH) < 0.6 * abs(variance["predictor"] - TRUTH)


# --- inpainting and the corrector ---------------------------------------------------------------

# Unit variances, correlation 0.9, first entry known to be 1.5: mean and variance of the second.
CONDITIONAL = (1.35, 0.19)
# By corrector and levels, of 200,000 chains written out in NumPy at 250 (standard errors 0.001).
ENDS = {
    (None, 250): (0.934, 0.327),
    ("langevin", 250): (1.342, 0.195),
    (None, 1000): (0.940, 0.311),
    ("langevin", 1000): (1.350, 0.194),
}


@functools.cache
def inpainted(corrector, steps):
    def field(x, t):
        sigma = VE.sigma(t)[:, None]
        spread = 1 + sigma**2
        return sigma * (spread * x - 0.9 * x[:, ::-1]) / (spread**2 - 0.81)

    y = jnp.broadcast_to(jnp.array([1.5, jnp.nan]), (12_000, 2))
    made = None if corrector is None else solve.langevin_corrector(snr=0.16)
    run = jax.jit(
        lambda key: (
            guide.inpaint(key, field, VE, y, np.array([1, 0]), corrector=made, steps=steps).x
        )
    )
    x = np.asarray(run(jax.random.key(0)), np.float64)
    np.testing.assert_array_equal(x[:, 0], 1.5)
    return x[:, 1].mean(), x[:, 1].var()


@pytest.mark.parametrize("steps", [250, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("corrector", [None, "langevin"])
def test_inpainting_without_a_corrector_converges_to_the_wrong_mean(corrector, steps):
    mean, variance = inpainted(corrector, steps)
    # Standard errors 0.005 and 0.004 at most.
    assert abs(mean - ENDS[corrector, steps][0]) < 0.015
    assert abs(variance - ENDS[corrector, steps][1]) < 0.015
    if corrector is None:
        assert abs(mean - CONDITIONAL[0]) > 0.35
    else:
        assert abs(mean - CONDITIONAL[0]) < 0.02


# --- one network --------------------------------------------------------------------------------

SDE = process.vp()
WEIGHTS = np.array([0.4, 0.6])
MEANS = np.array([[-1.0, -0.6], [0.8, 0.9]])
COVS = np.array([[[0.3, 0.15], [0.15, 0.2]], [[0.15, -0.1], [-0.1, 0.25]]])
ROOTS = np.linalg.cholesky(COVS).astype(np.float32)
DATA = mixture(SDE, *(jnp.asarray(v, jnp.float32) for v in (WEIGHTS, MEANS, COVS)))
NET = MLP(width=64, depth=1, time_scale=2.0)
PREDICTION = "v"
N = 4000


def draw(key, n):
    key_label, key_noise = jax.random.split(key)
    label = (jax.random.uniform(key_label, (n,)) > WEIGHTS[0]).astype(jnp.int32)
    roots = jnp.asarray(ROOTS).at[label].get(mode="fill")
    means = jnp.asarray(MEANS, jnp.float32).at[label].get(mode="fill")
    return means + jnp.einsum("nij,nj->ni", roots, jax.random.normal(key_noise, (n, 2)))


def field_of(params):
    return lambda x, t: NET.apply(params, x, SDE.log_snr(t))


@pytest.fixture(scope="module")
def network():
    """Parameters (their moving average) of the network, trained in a few seconds."""
    steps = 1000
    optimizer = optax.adam(optax.cosine_decay_schedule(4e-3, steps))

    def update(carry, key):
        params, average, state = carry
        key_data, key_loss = jax.random.split(key)

        def loss(params):
            return score.denoising_loss(
                key_loss,
                field_of(params),
                SDE,
                draw(key_data, 512),
                prediction=PREDICTION,
                time="stratified",
            ).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, average, 0.01)
        return (params, average, state), None

    @jax.jit
    def train(key):
        params = NET.init(key, jnp.zeros((1, 2)), jnp.zeros(1))
        keys = jax.random.split(jax.random.fold_in(key, 1), steps)
        return jax.lax.scan(update, (params, params, optimizer.init(params)), keys)[0][1]

    return train(jax.random.key(0))


def moments(x):
    x = np.asarray(x, np.float64)
    return x.mean(0), np.cov(x.T)


def test_the_network_samples(network):
    run = jax.jit(
        lambda params, key: (
            solve.sample(key, field_of(params), SDE, (N, 2), solver="heun", prediction=PREDICTION).x
        )
    )
    x = run(network, jax.random.key(1))
    mean, cov = moments(x)
    true_mean = WEIGHTS @ MEANS
    true_cov = np.einsum("k,kij->ij", WEIGHTS, COVS) + np.einsum(
        "k,ki,kj->ij", WEIGHTS, MEANS - true_mean, MEANS - true_mean
    )
    # Four standard errors of 4000 samples are 0.06 for the mean and 0.08 for the covariance; the
    # network's own error is allowed as much again.
    assert np.abs(mean - true_mean).max() < 0.1
    assert np.abs(cov - true_cov).max() < 0.12
    shares = jax.jit(DATA.component_log_prob)(x, jnp.full(N, SDE.t_min))
    first = np.exp(np.asarray(shares))[:, 0].mean()
    assert abs(first - WEIGHTS[0]) < 0.05


def test_the_network_measures_likelihoods(network):
    x = draw(jax.random.key(2), 256)
    run = jax.jit(
        lambda params, x: (
            solve.log_likelihood(
                None,
                field_of(params),
                SDE,
                x,
                prediction=PREDICTION,
                estimator="exact",
                rtol=1e-4,
                atol=1e-4,
            ).log_prob
        )
    )
    truth = jax.jit(DATA.log_prob)(x, jnp.full(256, SDE.t_min))
    gap = np.asarray(run(network, x) - truth)
    # The mean gap is minus the Kullback-Leibler divergence, in nats, with its standard error.
    assert gap.mean() < 4 * gap.std() / math.sqrt(256)
    assert gap.mean() > -0.05
    assert np.median(np.abs(gap)) < 0.1


def test_the_network_inpaints(network):
    known = 1.0
    y = jnp.broadcast_to(jnp.array([known, jnp.nan]), (3000, 2))
    run = jax.jit(
        lambda params, key: (
            guide.inpaint(
                key, field_of(params), SDE, y, np.array([1, 0]), steps=200, prediction=PREDICTION
            ).x
        )
    )
    mean, cov = moments(run(network, jax.random.key(3)))
    variance_x, covariance, variance_y = COVS[:, 0, 0], COVS[:, 1, 0], COVS[:, 1, 1]
    off = known - MEANS[:, 0]
    weights = WEIGHTS * np.exp(-(off**2) / (2 * variance_x)) / np.sqrt(variance_x)
    weights /= weights.sum()
    means = MEANS[:, 1] + covariance / variance_x * off
    variances = variance_y - covariance**2 / variance_x
    true_mean = weights @ means
    true_variance = weights @ (variances + means**2) - true_mean**2
    # The exact field at 200 levels is itself off by 0.02 and 0.01; four standard errors are 0.035.
    assert abs(mean[1] - true_mean) < 0.07
    assert abs(cov[1, 1] - true_variance) < 0.05


def test_the_network_obeys_a_classifier(network):
    def log_prob_first(x, t):
        return DATA.component_log_prob(x, t)[:, 0]

    def run(params, key):
        guided = guide.class_conditional(
            field_of(params), log_prob_first, SDE, prediction=PREDICTION
        )
        return solve.sample(key, guided, SDE, (N, 2), solver="heun", prediction=PREDICTION).x

    mean, cov = moments(jax.jit(run)(network, jax.random.key(4)))
    # Four standard errors are 0.035 for the mean and 0.03 for the covariance.
    assert np.abs(mean - MEANS[0]).max() < 0.07
    assert np.abs(cov - COVS[0]).max() < 0.07
