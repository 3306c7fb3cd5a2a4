"""Closed-form fields against NumPy and SciPy, and each field against the others."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import logsumexp

from jaxgen import process
from jaxgen.process import PROCESSES
from jaxgen.score import closed_form, convert

MU = 0.3
WEIGHTS = np.array([0.3, 0.7])
MEANS = np.array([[1.0, -0.5], [-1.0, 0.8]])
FULL = np.array([[[0.5, 0.2], [0.2, 0.3]], [[0.2, -0.1], [-0.1, 0.6]]])
COVS = {"full": FULL, "diagonal": np.array([[0.5, 0.2], [0.1, 0.4]]), "isotropic": [0.4, 0.1]}
POINTS = np.array([[0.2, -0.3], [1.5, 0.4], [-2.0, 1.0]])


def make(name):
    build = PROCESSES[name]
    return build(MU) if "mu" in inspect.signature(build).parameters else build()


def matrices(covs):
    covs = np.asarray(covs)
    if covs.ndim == 1:
        return covs[:, None, None] * np.eye(2)
    return covs if covs.ndim == 3 else np.stack([np.diag(c) for c in covs])


def joint(x, alpha, sigma, mu, covs):
    """log w_k N(x; ...), one column per component, by SciPy."""
    columns = [
        np.log(w)
        + stats.multivariate_normal(
            mu + alpha * (m - mu), alpha**2 * c + sigma**2 * np.eye(2)
        ).logpdf(x)
        for w, m, c in zip(WEIGHTS, MEANS, matrices(covs), strict=True)
    ]
    return np.stack(columns, -1)


@jax.jit
def _everything(oracle, x, t):
    grad = jax.vmap(jax.grad(lambda x, t: oracle.log_prob(x, t)))(x, t)
    fields = {k: getattr(oracle, k)(x, t) for k in ("score", "noise", "data", "v", "velocity")}
    return oracle.log_prob(x, t), oracle.component_log_prob(x, t), grad, fields


@pytest.mark.parametrize("name", PROCESSES)
def test_fields_follow_from_the_density(name):
    kind = {"vp": "diagonal", "ve": "isotropic"}.get(name, "full")
    with jax.enable_x64(True):
        sde = make(name)
        oracle = closed_form.mixture(sde, WEIGHTS, MEANS, COVS[kind])
        middle = float(sde.inverse_log_snr(0.5))
        t = jnp.array([float(sde.t_min) + 0.01, middle, 1.2 * middle])
        log_prob, components, grad, fields = _everything(oracle, jnp.array(POINTS), t)
        alpha, sigma, alpha_dot, sigma_dot = (np.asarray(c)[:, None] for c in sde.rates(t))
        mu = 0.0 if sde.mu is None else MU
        for i in range(3):
            truth = joint(POINTS[i], alpha[i], sigma[i], mu, COVS[kind])
            np.testing.assert_allclose(log_prob[i], logsumexp(truth), rtol=1e-9)
            np.testing.assert_allclose(components[i], truth - logsumexp(truth), atol=1e-9)
        # The score is the gradient; noise by its definition, data by Tweedie's formula, velocity
        # by the probability-flow equation.
        np.testing.assert_allclose(fields["score"], grad, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(fields["noise"], -sigma * grad, rtol=1e-8, atol=1e-10)
        data = mu + (POINTS - mu + sigma**2 * grad) / alpha
        np.testing.assert_allclose(fields["data"], data, rtol=1e-8, atol=1e-8)
        v = -alpha * sigma * grad - sigma * (data - mu)
        np.testing.assert_allclose(fields["v"], v, rtol=1e-8, atol=1e-8)
        rate, square = alpha_dot / alpha, 2 * sigma * (sigma_dot - alpha_dot / alpha * sigma)
        flow = rate * (POINTS - mu) - 0.5 * square * grad
        np.testing.assert_allclose(fields["velocity"], flow, rtol=1e-8, atol=1e-8)


def test_float32_fields_are_close_to_float64():
    x, t = jnp.array(POINTS, jnp.float32), jnp.array([1e-3, 0.3, 0.99])
    oracle = closed_form.mixture(process.vp(), WEIGHTS, MEANS, COVS["full"])
    found = _everything(oracle, x, t)[3]
    with jax.enable_x64(True):
        oracle = closed_form.mixture(process.vp(), WEIGHTS, MEANS, COVS["full"])
        exact = _everything(oracle, x.astype(jnp.float64), t.astype(jnp.float64))[3]
    for kind, value in found.items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, exact[kind], rtol=1e-4, atol=2e-5, err_msg=kind)
    assert oracle.data(x.astype(jnp.bfloat16), t).dtype == jnp.bfloat16


def test_fields_hold_at_both_ends_of_time():
    oracle = closed_form.gaussian(process.rectified(), np.array([1.0, -2.0]), np.diag([0.5, 2.0]))
    x = jnp.array([[0.3, 0.4]])
    np.testing.assert_allclose(oracle.data(x, 0.0), x, rtol=1e-6)
    np.testing.assert_allclose(oracle.data(x, 1.0), [[1.0, -2.0]], rtol=1e-6)
    np.testing.assert_allclose(oracle.noise(x, 1.0), x, rtol=1e-6)
    np.testing.assert_array_equal(oracle.noise(x, 0.0), 0)
    np.testing.assert_allclose(oracle.velocity(x, 1.0), x - jnp.array([[1.0, -2.0]]), rtol=1e-6)
    assert np.isnan(oracle.score(x, 0.0)).all()


@pytest.mark.parametrize("t", [None, 0.4])
def test_samples_have_the_mixtures_moments(t, key):
    sde = process.mean_reverting(MU)
    oracle = closed_form.mixture(sde, WEIGHTS, MEANS, FULL)
    n = 8000
    x = np.asarray(jax.jit(lambda k: oracle.sample(k, (n, 2), t))(key))
    alpha, sigma = (1.0, 0.0) if t is None else (float(sde.alpha(t)), float(sde.sigma(t)))
    means = MU + alpha * (MEANS - MU)
    mean = WEIGHTS @ means
    gap = means - mean
    cov = np.einsum("k,kij->ij", WEIGHTS, alpha**2 * FULL) + sigma**2 * np.eye(2)
    cov += np.einsum("k,ki,kj->ij", WEIGHTS, gap, gap)
    centred = x - mean
    assert (abs(centred.mean(0)) < 4 * x.std(0) / n**0.5).all()
    products = centred[:, :, None] * centred[:, None, :]
    assert (abs(products.mean(0) - cov) < 4 * products.std(0) / n**0.5).all()
    np.testing.assert_allclose(oracle.sample(key, (3, 2), t), x[:3], rtol=1e-5, atol=1e-6)
    one = oracle.sample(key, (2,), t)
    assert one.shape == (2,) and np.isfinite(one).all()


def test_level_posterior_is_bayes_rule_by_enumeration():
    oracle = closed_form.mixture(process.ve(), WEIGHTS, MEANS, FULL)
    x = jnp.array(POINTS, jnp.float32)
    levels = jnp.array([0.1, 0.5, 0.7, 0.9])
    prior = np.log([0.1, 0.2, 0.3, 0.4])
    sigmas = 0.01 * 5000 ** np.asarray(levels, np.float64)
    dens = np.stack([logsumexp(joint(POINTS, 1.0, s, 0.0, FULL), axis=1) for s in sigmas], -1)
    flat = dens - logsumexp(dens, axis=1, keepdims=True)
    np.testing.assert_allclose(oracle.level_log_prob(x, levels), flat, rtol=1e-4, atol=1e-4)
    weighted = dens + prior
    weighted -= logsumexp(weighted, axis=1, keepdims=True)
    found = oracle.level_log_prob(x, levels, prior.astype(np.float32))
    np.testing.assert_allclose(found, weighted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(oracle.level_log_prob(x[0], levels), flat[0], rtol=1e-4, atol=1e-4)


def test_empirical_field_is_a_softmax_over_the_data(monkeypatch):
    data = np.random.default_rng(0).normal(size=(40, 2, 3)).astype(np.float32)
    sde = process.vp()
    oracle = closed_form.empirical(sde, data)
    x = jnp.array(np.random.default_rng(1).normal(size=(7, 2, 3)), jnp.float32)
    t = jnp.linspace(0.1, 0.6, 7)
    alpha, sigma = np.asarray(sde.alpha(t)), np.asarray(sde.sigma(t))
    gap = np.asarray(x)[:, None] - alpha[:, None, None, None] * data[None]
    logits = -0.5 * (gap**2).sum((2, 3)) / sigma[:, None] ** 2
    weights = np.exp(logits - logsumexp(logits, axis=1, keepdims=True))
    truth = np.einsum("bn,nij->bij", weights, data)
    whole = oracle.data(x, t)
    np.testing.assert_allclose(whole, truth, rtol=2e-4, atol=2e-5)
    monkeypatch.setattr(closed_form, "_BLOCK", 3 * data.size)
    np.testing.assert_allclose(oracle.data(x, t), whole, rtol=1e-5, atol=1e-6)


def test_unbatched_and_vmapped_equal_batched():
    oracle = closed_form.mixture(process.cosine(), WEIGHTS, MEANS, FULL)
    x, t = jnp.array(POINTS, jnp.float32), jnp.array([0.1, 0.5, 0.9])
    batched = oracle.velocity(x, t)
    np.testing.assert_allclose(oracle.velocity(x[1], t[1]), batched[1], rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(oracle.velocity)(x, t), batched, rtol=1e-5)
    np.testing.assert_allclose(oracle.velocity(x, 0.5)[1], batched[1], rtol=1e-5)


def test_gradient_in_the_process_parameters_exists():
    def loss(sigma_max):
        oracle = closed_form.gaussian(process.ve(0.01, sigma_max), jnp.zeros(2), 1.0)
        return oracle.log_prob(jnp.ones((1, 2)), 0.5)[0]

    variance = 1 + 0.01 * 20.0
    d_variance = 0.01 * np.ones(())
    truth = (-1 / variance + 1 / variance**2) * d_variance
    np.testing.assert_allclose(jax.grad(loss)(20.0), truth, rtol=1e-4)


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda s: closed_form.mixture(s, [0.5], MEANS, FULL), "weights has shape"),
        (lambda s: closed_form.mixture(s, WEIGHTS, MEANS, np.ones((3, 3))), "covs has shape"),
        (lambda s: closed_form.mixture(s, [-0.5, 1.5], MEANS, FULL), "weights has the negative"),
        (lambda s: closed_form.mixture(s, WEIGHTS, MEANS, -FULL), "covs has the negative"),
        (lambda s: closed_form.gaussian(s, np.zeros(2), 1.0).data(jnp.ones((2, 3)), 0.5), "x has"),
        (lambda s: closed_form.gaussian(s, np.zeros(2), 1.0).data(jnp.ones((1, 1, 2)), 0.5), "x h"),
        (
            lambda s: closed_form.gaussian(s, np.zeros(2), 1.0).sample(jax.random.key(0), (3,)),
            "shape is",
        ),
    ],
)
def test_bad_input_is_named(build, word):
    with pytest.raises(ValueError, match=word):
        build(process.vp())


def test_anchor_of_a_batch_is_refused():
    oracle = closed_form.gaussian(process.ouve(jnp.ones((3, 2))), np.zeros(2), 1.0)
    with pytest.raises(ValueError, match="mu has shape"):
        oracle.data(jnp.ones((3, 2)), 0.5)


def test_convert_and_closed_form_agree_at_the_anchor():
    oracle = closed_form.gaussian(process.ouve(MU), np.array([1.0, 2.0]), 0.5)
    x = jnp.array([[0.1, 0.2]])
    out = convert(oracle.score(x, 0.5), x, 0.5, oracle.sde, "score", "data")
    np.testing.assert_allclose(out, oracle.data(x, 0.5), rtol=1e-5, atol=1e-6)
