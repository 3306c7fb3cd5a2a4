"""What every linear process does: marginals, noise per example, prior, transformations, errors."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from scipy import stats

from jaxgen import process
from jaxgen.process import PROCESSES, LinearSDE

MU = 0.3

# A few roundings in float32 of numbers of order one.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def make(name):
    build = PROCESSES[name]
    return build(MU) if "mu" in inspect.signature(build).parameters else build()


ROWS = {name: make(name) for name in PROCESSES}


def middle(sde):
    """The time at which signal and noise are equal."""
    return sde.inverse_log_snr(0.0)


@jax.jit
def _simulate(key, sde, x0):
    """Euler-Maruyama from t_min to the middle, 500 steps of equal time."""
    steps = 500
    t_stop = middle(sde)
    dt = (t_stop - sde.t_min) / steps
    key_start, key_path = jax.random.split(key)
    x, _ = sde.perturb(key_start, x0, sde.t_min)

    def advance(x, i):
        t = sde.t_min + i * dt
        z = jax.random.normal(jax.random.fold_in(key_path, i), x.shape)
        return x + dt * sde.drift(x, t) + jnp.sqrt(dt) * sde.diffusion(t) * z, None

    x, _ = jax.lax.scan(advance, x, jnp.arange(steps))
    return x, sde.marginal(x0, t_stop)


@pytest.mark.parametrize("name", PROCESSES)
def test_marginals_equal_a_fine_simulation(name, key):
    n = 4000
    x0 = jnp.full((n, 1), 1.5)
    x, (mean, std) = _simulate(key, ROWS[name], x0)
    std = float(std)
    error = abs(float(jnp.mean(x - mean))) / (std / n**0.5)
    spread = abs(float(jnp.var(x)) / std**2 - 1) / (2 / n) ** 0.5
    assert error < 4 and spread < 4, (error, spread)


@pytest.mark.parametrize("name", PROCESSES)
def test_perturb_is_the_marginal_and_draws_per_example(name, key):
    sde = ROWS[name]
    x0 = jnp.linspace(-1, 1, 12).reshape(4, 3)
    t = jnp.full((4,), middle(sde)) * jnp.array([0.6, 0.8, 1.0, 1.05])
    x, noise = jax.jit(lambda k, x0, t: sde.perturb(k, x0, t))(key, x0, t)
    alpha, sigma = np.asarray(sde.alpha(t))[:, None], np.asarray(sde.sigma(t))[:, None]
    centre = 0.0 if sde.mu is None else MU
    np.testing.assert_allclose(x, centre + alpha * (x0 - centre) + sigma * noise, **TOLERANCE)
    mean, std = sde.marginal(x0, t)
    np.testing.assert_allclose(mean + std[:, None] * noise, x, **TOLERANCE)
    np.testing.assert_array_equal(sde.path(x0, noise, t), sde.perturb(key, x0, t)[0])
    first, _ = sde.perturb(key, x0[:2], t[:2])
    np.testing.assert_allclose(first, x[:2], **TOLERANCE)
    one, z = sde.perturb(jax.random.fold_in(key, 3), x0[3], t[3], event_ndim=1)
    np.testing.assert_allclose(one, x[3], **TOLERANCE)
    np.testing.assert_array_equal(z, noise[3])
    low, low_noise = sde.perturb(key, x0.astype(jnp.bfloat16), t)
    assert low.dtype == low_noise.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), x, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("name", PROCESSES)
def test_prior_is_a_normal_with_the_stated_density(name, key):
    sde = ROWS[name]
    std = float(sde.sigma(sde.t_max)) if sde.prior_std is None else float(sde.prior_std)
    centre = 0.0 if sde.mu is None else MU
    x = sde.prior_sample(key, (4000, 2))
    n = x.size
    assert abs(float(x.mean()) - centre) < 4 * std / n**0.5
    assert abs(float(x.var()) / std**2 - 1) < 4 * (2 / n) ** 0.5
    truth = stats.norm(centre, std).logpdf(np.asarray(x[:5], np.float64)).sum(1)
    np.testing.assert_allclose(sde.prior_log_prob(x[:5]), truth, rtol=1e-5, atol=1e-5)
    one = sde.prior_log_prob(x[0], event_ndim=1)
    assert one.shape == () and one.dtype == jnp.float32
    np.testing.assert_allclose(one, truth[0], rtol=1e-5)


def test_priors_of_the_published_processes():
    expected = {"vp": 1, "sub_vp": 1, "ve": 50, "edm": 80, "cosine": 1, "rectified": 1}
    expected |= {"mean_reverting": 50 / 255, "ouve": 0.38898266}
    for name, std in expected.items():
        sde = ROWS[name]
        found = sde.sigma(sde.t_max) if sde.prior_std is None else sde.prior_std
        np.testing.assert_allclose(found, std, rtol=1e-6)


# --- anchors, complex data -------------------------------------------------------------------


def test_anchor_of_the_event_and_of_the_batch(key):
    event = jnp.array([1.0, -1.0])
    batch = jnp.stack([event, 2 * event, 3 * event])
    x0 = jnp.ones((3, 2))
    per_event, per_batch = process.mean_reverting(event), process.mean_reverting(batch)
    a = np.asarray(per_event.alpha(0.4))
    np.testing.assert_allclose(
        per_event.marginal(x0, 0.4)[0], event[None] + a * (x0 - event[None]), rtol=1e-6
    )
    np.testing.assert_allclose(per_batch.marginal(x0, 0.4)[0], batch + a * (x0 - batch), rtol=1e-6)
    drift = per_batch.drift(x0, 0.4)
    np.testing.assert_allclose(drift, np.log(0.005) * (x0 - batch), rtol=1e-5)
    with pytest.raises(ValueError, match=r"mu has shape \(3, 2\)"):
        per_batch.drift(jnp.ones((4, 2)), 0.4)


def test_complex_data_has_circular_noise(key):
    mu = jnp.array([0.5 + 1j, -1j], jnp.complex64)
    sde = process.ouve(mu)
    x0 = jnp.ones((2000, 2), jnp.complex64)
    x, noise = sde.perturb(key, x0, 0.5)
    assert x.dtype == jnp.complex64
    n = noise.size
    assert abs(float((jnp.abs(noise) ** 2).mean()) - 1) < 4 / n**0.5
    assert abs(complex((noise**2).mean())) < 4 * (2 / n) ** 0.5
    mean, std = sde.marginal(x0, 0.5)
    np.testing.assert_allclose(x, mean + std * noise, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(sde.drift(x, 0.5), 1.5 * (mu[None] - x), rtol=1e-4, atol=1e-5)
    prior = sde.prior_sample(key, (3, 2), dtype=jnp.complex64)
    s = float(sde.sigma(1.0)) / 2**0.5
    gap = np.asarray(prior - mu[None], np.complex128)
    truth = stats.norm(0, s).logpdf(gap.real).sum(1) + stats.norm(0, s).logpdf(gap.imag).sum(1)
    np.testing.assert_allclose(sde.prior_log_prob(prior), truth, rtol=1e-5)


# --- a user's own schedule, and what a process is as a pytree --------------------------------


def _own_log_alpha(t, rate):
    return -rate * t


def _own_sigma(t, rate):
    return jnp.sqrt(-jnp.expm1(-2 * rate * t))


def test_a_schedule_of_ones_own_is_two_functions():
    own = LinearSDE(_own_log_alpha, _own_sigma, params=(0.7,), t_min=1e-4, t_max=3.0)
    t = jnp.array([0.01, 1.0, 2.9])
    np.testing.assert_allclose(own.diffusion(t), (2 * 0.7) ** 0.5, rtol=1e-5)
    np.testing.assert_allclose(own.drift(jnp.ones((3, 1)), t), -0.7, rtol=1e-5)
    np.testing.assert_allclose(own.inverse_log_snr(own.log_snr(t)), t, rtol=2e-5)
    assert float(own.t_end) == np.float32(1e-4)


@pytest.mark.parametrize(
    ("arguments", "error", "word"),
    [
        ({"log_alpha_fn": 1.0}, TypeError, "log_alpha_fn is 1.0"),
        ({"t_min": 2.0}, ValueError, "t_min is 2.0 and t_max 1.0"),
        ({"t_end": 1.5}, ValueError, "t_end is 1.5"),
    ],
)
def test_a_process_names_what_is_wrong(arguments, error, word):
    given = {"log_alpha_fn": _own_log_alpha, "sigma_fn": _own_sigma, "t_min": 0.1, "t_max": 1.0}
    with pytest.raises(error, match=word):
        LinearSDE(**(given | {"params": (1.0,)} | arguments))


def test_equal_processes_and_sweeps_compile_once():
    traces = []

    @jax.jit
    def loss(sde, x):
        traces.append(1)
        return jnp.sum(sde.drift(x, 0.5) + sde.diffusion(0.5))

    x = jnp.ones((2, 3))
    values = [loss(process.vp(), x), loss(process.vp(), x), loss(process.vp(0.1, 10.0), x)]
    loss(process.vp(0.1, jnp.float32(5.0)), x)
    assert len(traces) == 1
    assert float(values[0]) == float(values[1]) != float(values[2])


def test_gradient_in_a_parameter_equals_a_finite_difference():
    with jax.enable_x64(True):

        def total(beta_max):
            sde = process.vp(0.1, beta_max)
            x = sde.drift(jnp.ones((2, 2)), 0.3) + sde.diffusion(0.3) + sde.log_snr(0.7)
            return jnp.sum(x) + sde.inverse_log_snr(0.0)

        h = 1e-5
        difference = (total(12.0 + h) - total(12.0 - h)) / (2 * h)
        np.testing.assert_allclose(jax.grad(total)(12.0), difference, rtol=1e-7)


# --- bad times, transformations, devices ------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSES)
def test_time_out_of_range_is_nan_and_an_error_under_checkify(name):
    sde = ROWS[name]
    outside = jnp.array([float(sde.t_max) * 1.5, -0.5])
    for method in (sde.alpha, sde.log_alpha, sde.sigma, sde.log_snr, sde.diffusion):
        assert np.isnan(method(outside)).all()
    assert np.isnan(sde.rates(outside)).all()
    assert np.isnan(sde.drift(jnp.ones((2, 1)), outside)).all()
    assert np.isnan(sde.perturb(jax.random.key(0), jnp.ones((2, 1)), outside)[0]).all()
    if name == "vp":
        error, _ = checkify.checkify(jax.jit(sde.sigma))(outside)
        assert "t is outside" in error.get()
        assert checkify.checkify(jax.jit(sde.sigma))(jnp.array([0.5, 1.0]))[0].get() is None
        error, _ = checkify.checkify(jax.jit(sde.inverse_log_snr))(1e3)
        assert "log-SNR is outside" in error.get()


def test_integers_and_wrong_times_raise(key):
    sde = process.vp()
    for call in (sde.drift, sde.marginal, lambda x, t: sde.perturb(key, x, t)):
        with pytest.raises(TypeError, match="dtype int32"):
            call(jnp.ones((2, 2), jnp.int32), 0.5)
        with pytest.raises(ValueError, match="does not broadcast from the left"):
            call(jnp.ones((2, 2)), jnp.full((3,), 0.5))
    with pytest.raises(TypeError, match="typed key"):
        sde.perturb(jax.random.PRNGKey(0), jnp.ones((2, 2)), 0.5)


def test_reduced_precision_comes_back_as_given():
    sde = process.vp()
    x = jnp.ones((2, 3), jnp.bfloat16)
    assert sde.drift(x, 0.5).dtype == jnp.bfloat16
    assert sde.marginal(x, 0.5)[0].dtype == jnp.bfloat16
    assert sde.alpha(jnp.bfloat16(0.5)).dtype == jnp.float32
    assert sde.prior_sample(jax.random.key(0), (2, 3), dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_vmap_and_eight_devices_give_the_same_states(key):
    sde = process.mean_reverting(jnp.array([0.2, -0.4]))
    x0 = jnp.linspace(-1, 1, 32).reshape(16, 2)
    t = jnp.linspace(0.1, 0.9, 16)
    x, _ = jax.jit(sde.perturb)(key, x0, t)
    folded = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(16))
    single = jax.vmap(lambda k, x, t: sde.perturb(k, x, t, event_ndim=1)[0])(folded, x0, t)
    np.testing.assert_allclose(single, x, rtol=1e-6)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sharded, _ = jax.jit(sde.perturb)(key, jax.device_put(x0, spread), jax.device_put(t, spread))
    np.testing.assert_allclose(sharded, x, rtol=1e-6)
