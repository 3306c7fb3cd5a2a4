"""Increments of the grid path: their law, their keys, and what lies between knots."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.solve import GridPath


def test_increments_are_drawn_by_sample_and_interval(key):
    keys = jax.random.split(key, 3)
    times = jnp.array([0.0, 0.1, 0.5, 1.0])
    path = GridPath(keys, (2,), jnp.float32, 3, times)
    want = jax.random.normal(jax.random.fold_in(keys[1], 2), (2,)) * jnp.sqrt(0.5)
    np.testing.assert_allclose(path.evaluate(0.5, 1.0)[1], want, rtol=1e-6)
    late = GridPath(keys, (2,), jnp.float32, 3, times, ahead=False)
    np.testing.assert_allclose(path.evaluate(0.1, 0.5), late.evaluate(0.1, 0.5), rtol=1e-6)
    one = GridPath(keys[1], (2,), jnp.float32, 3, times)
    np.testing.assert_allclose(one.evaluate(0.5, 1.0), want, rtol=1e-6)


def test_unknown_intervals_are_nan(key):
    path = GridPath(key, (2,), jnp.float32, 10)
    assert bool(jnp.isfinite(path.evaluate(0.3, 0.4)).all())
    assert bool(jnp.isnan(path.evaluate(0.3, 0.35)).all())
    assert bool(jnp.isnan(path.evaluate(0.3, 0.5)).all())
    with pytest.raises(ValueError, match="increments only"):
        path.evaluate(0.3)


@pytest.mark.parametrize("steps", [7, 1000])
def test_every_interval_of_equal_steps_is_found(key, steps):
    path = GridPath(key, (), jnp.float32, steps)
    u = jnp.arange(steps + 1, dtype=jnp.float32) / steps
    out = jax.vmap(path.evaluate)(u[:-1], u[1:])
    np.testing.assert_allclose(out, path.drawn[0] / steps**0.5, rtol=1e-3)


def test_moments_with_levy_area(key):
    n, dt = 20000, 0.25
    path = GridPath(
        jax.random.split(key, n),
        (1,),
        jnp.float32,
        4,
        levy_area=diffrax.SpaceTimeTimeLevyArea,
        ahead=False,
    )
    area = path.evaluate(0.25, 0.5, use_levy=True)
    for value, var in ((area.W, dt), (area.H, dt / 12), (area.K, dt / 720)):
        assert abs(float(value.mean())) < 4 * (var / n) ** 0.5
        assert abs(float(value.var()) / var - 1) < 4 * (2 / n) ** 0.5
    cross = jnp.mean(area.W * area.H)
    assert abs(float(cross)) < 4 * (dt * dt / 12 / n) ** 0.5


def test_complex_and_half_precision(key):
    path = GridPath(key, (4000,), jnp.complex64, 2)
    value = path.evaluate(0.0, 0.5)
    assert value.dtype == jnp.complex64
    assert abs(float(jnp.mean(jnp.abs(value) ** 2)) - 0.5) < 4 * 0.5 / 4000**0.5
    half = GridPath(key, (3,), jnp.bfloat16, 2).evaluate(0.0, 0.5)
    full = GridPath(key, (3,), jnp.float32, 2).evaluate(0.0, 0.5)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), full, rtol=1e-2)
