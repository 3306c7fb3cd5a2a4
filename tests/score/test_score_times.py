"""Time samplers: the right law, and corrections that keep the uniform expectation."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxgen import process, score
from jaxgen.process import PROCESSES
from jaxgen.score import TIMES, sample_times
from jaxgen.train.mesh import make_mesh
from jaxgen.train.parallel import over_batch


def make(name):
    build = PROCESSES[name]
    return build(0.3) if "mu" in inspect.signature(build).parameters else build()


@functools.partial(jax.jit, static_argnames="time")
def _map(sde, u, time):
    t, factor = TIMES[time].map(u, sde, jnp.asarray(sde.t_min))
    return t, factor, -0.5 * sde.log_snr(t), -0.5 * sde.log_snr(jnp.stack([sde.t_min, sde.t_max]))


@pytest.mark.parametrize("name", PROCESSES)
def test_importance_sampling_integrates_like_uniform_times(name):
    with jax.enable_x64(True):
        sde = make(name)
        u = (jnp.arange(20000) + 0.5) / 20000
        t, factor, level, ends = _map(sde, u, "importance")
        # Log-SNR is uniform between its ends ...
        np.testing.assert_allclose(level, ends[0] + (ends[1] - ends[0]) * u, rtol=1e-7, atol=1e-7)
        # ... and the factor is the ratio of the two densities.
        share = (t - sde.t_min) / (sde.t_max - sde.t_min)
        for power in range(3):
            found = float(jnp.mean(factor * share**power))
            np.testing.assert_allclose(found, 1 / (power + 1), rtol=1e-4)


@pytest.mark.parametrize("name", PROCESSES)
def test_lognormal_levels_are_those_of_edm_cut_at_the_ends(name):
    with jax.enable_x64(True):
        u = jnp.linspace(0.0, 1.0, 41)
        _, factor, level, ends = _map(make(name), u, "lognormal")
        low, high = (np.asarray(ends) + 1.2) / 1.2
        truth = stats.truncnorm(low, high, loc=-1.2, scale=1.2).ppf(np.asarray(u))
        np.testing.assert_allclose(level, truth, atol=1e-6)
        np.testing.assert_array_equal(factor, 1)


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("name", ["edm", "rectified", "ouve"])
def test_float32_times_stay_in_range(name, time):
    sde = make(name)
    u = jnp.concatenate([jnp.array([0.0, 1 - 2**-24]), jnp.linspace(0, 0.999, 500)])
    t, factor, level, _ = _map(sde, u, time)
    assert (t >= sde.t_min * (1 - 1e-6)).all() and (t <= sde.t_max).all()
    assert np.isfinite(level).all() and (factor > 0).all() and np.isfinite(factor).all()


def test_stratified_times_share_one_offset(key):
    sde = process.edm()
    t, factor = sample_times(key, sde, (16,), time="stratified")
    share = np.sort((np.asarray(t) - 0.002) / (80 - 0.002))
    np.testing.assert_allclose(np.diff(share), 1 / 16, rtol=1e-4)
    np.testing.assert_array_equal(factor, 1)
    draw = jax.jit(jax.vmap(lambda k: sample_times(k, process.vp(), (4,), time="stratified")[0]))
    first = np.asarray(draw(jax.random.split(key, 2000)))
    # Each example's time is uniform; their average varies 1/n as much or less.
    for column in first.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    assert first.mean(1).var() < 1.2 / 12 / 4**2


def test_independent_times_belong_to_their_example(key):
    draw = jax.jit(sample_times, static_argnames=("batch", "time"))
    for time in ("uniform", "importance", "lognormal"):
        t, factor = draw(key, process.vp(), (5,), time=time)
        np.testing.assert_allclose(draw(key, process.vp(), (2,), time=time)[0], t[:2], rtol=1e-5)
        one, one_factor = draw(jax.random.fold_in(key, 3), process.vp(), time=time)
        assert one.shape == ()
        np.testing.assert_allclose([one, one_factor], [t[3], factor[3]], rtol=1e-4)
    assert (draw(key, process.vp(), (100,), t_min=0.5)[0] >= 0.5).all()


def test_unknown_names_and_raw_keys_raise(key):
    with pytest.raises(ValueError, match="time is 'sobol'; expected one of uniform, stratified"):
        score.sample_times(key, process.vp(), (2,), time="sobol")
    with pytest.raises(TypeError, match="typed key"):
        score.sample_times(jax.random.PRNGKey(0), process.vp(), (2,))


def test_stratified_times_of_a_batch_in_parts_are_those_of_the_whole(key):
    sde = process.vp()

    def draw(key, n):
        return sample_times(key, sde, (n,), time="stratified")[0]

    # Positions are multiples of 1/16, so that only the last rounding may differ.
    parts = over_batch(draw, make_mesh("data=8"))(key, 16)
    np.testing.assert_allclose(parts, draw(key, 16), rtol=2**-22)
