"""Losses: their values by hand, minima at the closed-form field, agreement with one another.

A new prediction kind, weighting, time sampler or process is a row of the minimum test.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import process, score
from jaxgen.process import PROCESSES
from jaxgen.score import (
    PREDICTIONS,
    TIMES,
    WEIGHTINGS,
    closed_form,
    denoising_loss,
    implicit_loss,
    sliced_loss,
)

MU = 0.3
N = 4000


def make(name):
    build = PROCESSES[name]
    return build(MU) if "mu" in inspect.signature(build).parameters else build()


def mixture(sde):
    return closed_form.mixture(
        sde, [0.3, 0.7], np.array([[1.0, 0.4], [-1.0, 0.9]], np.float32), [0.1, 0.3]
    )


ROWS = {
    *((name, "noise", "simple", "uniform") for name in PROCESSES),
    *(("vp", prediction, "simple", "uniform") for prediction in PREDICTIONS),
    *(("rectified", "velocity", weighting, "importance") for weighting in WEIGHTINGS),
    *(("mean_reverting", "data", "min_snr", time) for time in TIMES),
}


# Processes, a kind and a sampler that are close relatives of a row that stays.
SLOW_ROWS = {
    *((name, "noise", "simple", "uniform") for name in ("sub_vp", "edm", "cosine")),
    ("vp", "v", "simple", "uniform"),
    ("mean_reverting", "data", "min_snr", "stratified"),
    ("mean_reverting", "data", "min_snr", "importance"),
}
assert SLOW_ROWS < ROWS


@functools.partial(jax.jit, static_argnames=("prediction", "weighting", "time"))
def _slopes(key, oracle, x0, prediction, weighting, time):
    """Per-example gradients in (scale, shift), at the exact field and at four around it."""

    def losses(theta):
        def field(x, t):
            return (1 + theta[0]) * getattr(oracle, prediction)(x, t) + theta[1]

        return denoising_loss(
            key, field, oracle.sde, x0, prediction=prediction, weighting=weighting, time=time
        )

    return jax.lax.map(jax.jacfwd(losses), _AROUND)


# Visited one by one: XLA's CPU compiler under jax 0.10.2 drops the last of five in a batch.
_AROUND = jnp.array([[0.0, 0.0], [0.3, 0.0], [-0.3, 0.0], [0.0, 0.3], [0.0, -0.3]])


def assert_minimum_at_first(slopes):
    """``slopes`` is (5, n, 2), at the points of ``_AROUND``."""
    slopes = np.asarray(slopes, np.float64)
    z = slopes.mean(1) / (slopes.std(1) / slopes.shape[1] ** 0.5)
    assert (abs(z[0]) < 4).all(), z
    # From each side the slope points back.
    assert z[1, 0] > 5 and z[2, 0] < -5 and z[3, 1] > 5 and z[4, 1] < -5, z


@pytest.mark.parametrize(
    ("name", "prediction", "weighting", "time"),
    [pytest.param(*r, marks=[pytest.mark.slow] if r in SLOW_ROWS else []) for r in sorted(ROWS)],
)
def test_closed_form_field_is_the_minimum(name, prediction, weighting, time):
    oracle = mixture(make(name))
    x0 = oracle.sample(jax.random.key(1), (N, 2))
    assert_minimum_at_first(_slopes(jax.random.key(2), oracle, x0, prediction, weighting, time))


# --- values by hand --------------------------------------------------------------------------


def capture(sde, x0, **options):
    """Loss of the zero field, with what it was called with and the parts of its path."""
    seen = []

    def zero(x, t):
        seen.append((np.asarray(x), np.asarray(t)))
        return jnp.zeros_like(x)

    loss = np.asarray(denoising_loss(jax.random.key(7), zero, sde, x0, **options))
    x, t = seen[0]
    alpha, sigma, alpha_dot, sigma_dot = (np.asarray(c)[:, None] for c in sde.rates(t))
    mu = 0 if sde.mu is None else MU
    centred = np.asarray(x0) - mu
    noise = (x - mu - alpha * centred) / sigma
    targets = {
        "noise": noise,
        "data": np.asarray(x0),
        "score": -noise / sigma,
        "v": alpha * noise - sigma * centred,
        "velocity": alpha_dot * centred + sigma_dot * noise,
    }
    g2 = 2 * sigma * (sigma_dot - alpha_dot / alpha * sigma)
    return loss, targets, (alpha[:, 0], sigma[:, 0], g2[:, 0])


X0 = jnp.array([[0.5, -1.0, 2.0], [1.5, 0.3, -0.7], [-0.2, 0.1, 0.9]])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_simple_loss_is_the_mean_square_of_what_is_predicted(prediction):
    loss, targets, (_, sigma, _) = capture(process.ouve(MU), X0, prediction=prediction, t_min=0.2)
    square = np.mean(targets[prediction] ** 2, axis=1)
    expected = sigma**2 * square if prediction == "score" else square
    np.testing.assert_allclose(loss, expected, rtol=2e-4)


def test_weightings_by_their_published_formulas():
    sde = process.ouve(MU)
    options = {"prediction": "data", "reduce": "sum", "t_min": 0.2}
    for name in WEIGHTINGS:
        loss, targets, (alpha, sigma, g2) = capture(sde, X0, weighting=name, **options)
        data, score_error = (np.sum(targets[k] ** 2, axis=1) for k in ("data", "score"))
        # The zero field's error in the data is x0 itself, and (alpha/sigma^2) x0 in the score.
        level = sigma / alpha
        score_error = data * (alpha / sigma**2) ** 2
        expected = {
            "simple": data,
            "likelihood": g2 * score_error,
            "edm": (level**2 + 0.25) / (0.5 * level) ** 2 * data,
            "min_snr": np.minimum(level**-2, 5.0) * data,
        }[name]
        np.testing.assert_allclose(loss, expected, rtol=1e-4, err_msg=name)
    own = capture(sde, X0, weighting=lambda t, sde: t, prediction="noise", t_min=0.2)
    unit = capture(sde, X0, prediction="noise", t_min=0.2)
    t = np.asarray(sde.inverse_log_snr(2 * np.log(own[2][0] / own[2][1])))
    np.testing.assert_allclose(own[0], t * unit[0], rtol=1e-4)
    factory = capture(sde, X0, weighting=score.weighting.min_snr(2.0), prediction="noise")
    snr = (factory[2][0] / factory[2][1]) ** 2
    expected = np.minimum(1, 2 / snr) * np.mean(factory[1]["noise"] ** 2, axis=1)
    np.testing.assert_allclose(factory[0], expected, rtol=2e-3)


def test_reductions():
    mean, total, half = (
        capture(process.vp(), X0, reduce=r)[0] for r in ("mean", "sum", "sum_half")
    )
    np.testing.assert_allclose(total, 3 * mean, rtol=1e-6)
    np.testing.assert_allclose(half, 1.5 * mean, rtol=1e-6)


@jax.jit
def _by_kind(key, oracle, x0):
    def noise(x, t):
        return 0.7 * oracle.noise(x, t) + 0.1

    def loss(kind, weighting):
        def field(x, t):
            return score.convert(noise(x, t), x, t, oracle.sde, "noise", kind)

        return denoising_loss(key, field, oracle.sde, x0, prediction=kind, weighting=weighting)

    names = [n for n in WEIGHTINGS if n != "simple"]
    return {n: jnp.stack([loss(k, n) for k in PREDICTIONS]) for n in names}


@pytest.mark.parametrize("name", ["rectified", "ouve"])
def test_a_weighting_means_the_same_for_every_kind(name):
    with jax.enable_x64(True):
        oracle = mixture(make(name))
        for losses in _by_kind(jax.random.key(0), oracle, X0[:, :2]).values():
            np.testing.assert_allclose(losses, losses[:1].repeat(5, 0), rtol=1e-6)


# --- samplers, keys, precision ---------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="time")
def _mean_loss(key, oracle, x0, time):
    def field(x, t):
        return 0.8 * oracle.noise(x, t)

    loss = denoising_loss(key, field, oracle.sde, x0, weighting="min_snr", time=time)
    return loss.mean(), loss.std() / loss.size**0.5


@pytest.mark.parametrize("name", ["rectified"])
def test_time_samplers_leave_the_expected_loss(name, key):
    oracle = mixture(make(name))
    x0 = oracle.sample(jax.random.key(1), (5 * N, 2))
    mean, error = _mean_loss(key, oracle, x0, "uniform")
    for time in ("stratified", "importance", "stratified_importance"):
        other, other_error = _mean_loss(key, oracle, x0, time)
        assert abs(mean - other) < 4 * np.hypot(error, other_error), (time, mean, other)


def test_importance_sampling_flattens_the_likelihood_loss(key):
    """The weight left on the noise error is constant: the span of log-SNR over that of time."""
    sde = process.vp()
    loss, targets, _ = capture(sde, X0, weighting="likelihood", time="importance")
    span = float(sde.log_snr(sde.t_min) - sde.log_snr(sde.t_max)) / (1 - 1e-5)
    expected = span * np.mean(targets["noise"] ** 2, axis=1)
    # The noise is recovered from the state, coarsely where sigma is small.
    np.testing.assert_allclose(loss, expected, rtol=1e-2)


def test_examples_are_their_own_under_every_batching(key):
    sde = process.mean_reverting(MU)

    def loss(key, x0, **options):
        return denoising_loss(key, lambda x, t: jnp.tanh(x), sde, x0, **options)

    batched = jax.jit(loss)(key, X0)
    np.testing.assert_allclose(loss(key, X0[:2]), batched[:2], rtol=1e-5)
    folded = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(3))
    single = jax.vmap(functools.partial(loss, event_ndim=1))(folded, X0)
    np.testing.assert_allclose(single, batched, rtol=1e-5)


def test_the_field_is_called_with_a_time_per_example(key):
    shapes = []

    def field(x, t):
        shapes.append((x.shape, t.shape, t.dtype))
        return x

    denoising_loss(key, field, process.vp(), X0)
    denoising_loss(key, field, process.vp(), X0[0], event_ndim=1)
    assert shapes == [((3, 3), (3,), jnp.float32), ((3,), (), jnp.float32)]


def test_reduced_precision_and_complex_data(key):
    sde = process.vp()
    low = denoising_loss(key, lambda x, t: x, sde, X0.astype(jnp.bfloat16))
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, denoising_loss(key, lambda x, t: x, sde, X0), rtol=0.05)
    complex_sde = process.ouve(jnp.complex64(MU))
    x0 = (X0 + 1j * X0[::-1]).astype(jnp.complex64)
    loss, targets, _ = capture(complex_sde, x0)
    assert loss.dtype == np.float32
    np.testing.assert_allclose(loss, np.mean(abs(targets["noise"]) ** 2, axis=1), rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"prediction": "eps"}, ValueError, "prediction is 'eps'; expected one of score, noise"),
        ({"weighting": "snr"}, ValueError, "weighting is 'snr'; expected one of simple, likelih"),
        ({"time": "sobol"}, ValueError, "time is 'sobol'"),
        ({"reduce": "max"}, ValueError, "reduce is 'max'; expected one of mean, sum, sum_half"),
        ({"weighting": lambda t, sde: 1.0}, ValueError, r"returned shape \(\) for t of shape"),
        ({"event_ndim": 0}, ValueError, "event_ndim is 0"),
        ({"field": lambda x, t: t}, ValueError, r"field\(x, t\) returned shape"),
        ({"field": lambda x, t: x.astype(int)}, TypeError, "returned dtype int32"),
        ({"x0": jnp.ones((2, 2), int)}, TypeError, "x0 has dtype int32"),
        ({"key": jax.random.PRNGKey(0)}, TypeError, "typed key"),
    ],
)
def test_bad_input_is_named(options, error, word):
    given = {"key": jax.random.key(0), "field": lambda x, t: x, "sde": process.vp(), "x0": X0}
    with pytest.raises(error, match=word):
        denoising_loss(**(given | options))


# --- implicit and sliced ---------------------------------------------------------------------

IMPLICIT = {
    "exact": functools.partial(implicit_loss, estimator="exact"),
    "hutchinson": implicit_loss,
    "gaussian": functools.partial(implicit_loss, probe="gaussian", n_probes=2),
    "sliced": functools.partial(sliced_loss, variance_reduced=False, n_probes=2),
    "sliced_reduced": functools.partial(sliced_loss, probe="gaussian"),
}


def _perturbed(oracle, theta):
    return lambda x, t: (1 + theta[0]) * oracle.score(x, t) + theta[1]


@functools.partial(jax.jit, static_argnames="name")
def _implicit(key, oracle, x, t, name):
    def losses(theta):
        return IMPLICIT[name](key, _perturbed(oracle, theta), x, t)

    def with_slope(theta):
        return losses(theta), jax.jacfwd(losses)(theta)

    return jax.lax.map(with_slope, _AROUND)


@jax.jit
def _denoising(key, oracle, x0):
    def losses(theta):
        return denoising_loss(
            key,
            _perturbed(oracle, theta),
            oracle.sde,
            x0,
            prediction="score",
            weighting=_unit_on_the_score,
            reduce="sum_half",
            t_min=0.6,
        )

    return jax.lax.map(losses, _AROUND)


def _unit_on_the_score(t, sde):
    return sde.sigma(t) ** -2


@pytest.fixture(scope="module")
def noisy():
    """States of a process with times in [0.6, 1], and the denoising losses on such states."""
    oracle = mixture(process.ve(0.1, 2.0))
    x0 = oracle.sample(jax.random.key(1), (N, 2))
    t, _ = score.sample_times(jax.random.key(2), oracle.sde, (N,), t_min=0.6)
    x, _ = oracle.sde.perturb(jax.random.key(3), x0, t)
    return oracle, x, t, np.asarray(_denoising(jax.random.key(4), oracle, x0), np.float64)


@pytest.mark.parametrize(
    "name",
    [
        *("exact", "hutchinson", "sliced_reduced"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gaussian", "sliced")),
    ],
)
def test_implicit_losses_share_minimum_and_differences_with_denoising(name, noisy):
    oracle, x, t, denoising = noisy
    losses, slopes = _implicit(jax.random.key(5), oracle, x, t, name)
    assert_minimum_at_first(slopes)
    losses = np.asarray(losses, np.float64)
    ours, theirs = losses[1:] - losses[:1], denoising[1:] - denoising[:1]
    error = np.hypot(ours.std(1), theirs.std(1)) / N**0.5
    z = (ours.mean(1) - theirs.mean(1)) / error
    assert (abs(z) < 4).all(), z
    assert (ours.mean(1) > 5 * ours.std(1) / N**0.5).all()


def test_implicit_loss_of_a_normal_by_hand(key):
    x = jnp.array([[1.0, 2.0], [0.5, -1.0]])
    expected = -2 / 4 + 0.5 * (x**2).sum(1) / 16
    for loss in (IMPLICIT["exact"], IMPLICIT["hutchinson"]):
        np.testing.assert_allclose(loss(key, lambda x, t: -x / 4, x, 0.0), expected, rtol=1e-6)
    one = implicit_loss(None, lambda x, t: -x / 4, x[0], 0.0, estimator="exact", event_ndim=1)
    np.testing.assert_allclose(one, expected[0], rtol=1e-6)
    low = implicit_loss(key, lambda x, t: -x / 4, x.astype(jnp.bfloat16), 0.0)
    assert low.dtype == jnp.float32
    v = score.derivatives.probes(key, (2, 2), "gaussian", n=1)[0]
    sliced = sliced_loss(key, lambda x, t: -x / 4, x, 0.0, variance_reduced=False, probe="gaussian")
    by_hand = -(v**2).sum(1) / 4 + 0.5 * ((v * x).sum(1) / 4) ** 2
    np.testing.assert_allclose(sliced, by_hand, rtol=1e-5)


def test_implicit_losses_name_bad_input(key):
    x = jnp.ones((2, 2))
    with pytest.raises(ValueError, match="estimator is 'fast'; expected one of exact, hutch"):
        implicit_loss(key, lambda x, t: x, x, 0.0, estimator="fast")
    with pytest.raises(ValueError, match="kind is 'sobol'"):
        sliced_loss(key, lambda x, t: x, x, 0.0, probe="sobol")
    with pytest.raises(TypeError, match="key is NoneType"):
        implicit_loss(None, lambda x, t: x, x, 0.0)
    with pytest.raises(TypeError, match="x has dtype int32"):
        sliced_loss(key, lambda x, t: x, x.astype(int), 0.0)
