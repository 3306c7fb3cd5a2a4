"""Sliced Wasserstein distance: one dimension against scipy, higher ones against closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxgen.metrics import sliced_wasserstein, wasserstein_1d


@pytest.mark.parametrize(("n", "m"), [(50, 50), (30, 45), (7, 1), (64, 3)])
def test_first_order_agrees_with_scipy_for_unequal_counts(n, m):
    rng = np.random.default_rng(n)
    x, y = rng.exponential(size=n), rng.normal(size=m) - 1
    with jax.enable_x64(True):
        got = float(wasserstein_1d(x, y, p=1.0))
    np.testing.assert_allclose(got, scipy.stats.wasserstein_distance(x, y), rtol=1e-10)


def test_second_order_of_repeated_points_is_that_of_the_points():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=6), rng.normal(size=4) ** 2
    with jax.enable_x64(True):
        short = float(wasserstein_1d(x, y))
        long = float(wasserstein_1d(np.repeat(x, 2), np.repeat(y, 3)))
    np.testing.assert_allclose(short, long, rtol=1e-12)


def test_a_shift_costs_its_length_over_root_d():
    # W_2 along theta is |theta . shift|, whose mean square over the sphere is |shift|^2 / d
    x = jax.random.normal(jax.random.key(0), (32, 4))
    shift = jnp.array([1.0, -2.0, 0.5, 3.0])
    directions = 4000
    got = float(sliced_wasserstein(jax.random.key(1), x, x + shift[None], directions=directions))
    truth = float(jnp.sum(shift**2)) / 4
    # var (theta . s)^2 = |s|^4 (3/(d (d + 2)) - 1/d^2) on the sphere
    error = float(jnp.sum(shift**2)) * np.sqrt((3 / 24 - 1 / 16) / directions)
    assert abs(got**2 - truth) < 4 * error, (got**2, truth, error)


def test_identity_symmetry_events_and_jit():
    key, x = jax.random.key(0), jax.random.normal(jax.random.key(1), (20, 2, 3))
    y = jax.random.normal(jax.random.key(2), (15, 2, 3)) + 1
    assert float(sliced_wasserstein(key, x, x)) == 0.0
    forth = sliced_wasserstein(key, x, y)
    np.testing.assert_allclose(forth, sliced_wasserstein(key, y, x), rtol=1e-5)
    np.testing.assert_allclose(forth, jax.jit(sliced_wasserstein)(key, x, y), rtol=1e-5)
    flat = sliced_wasserstein(key, x.reshape(20, 6), y.reshape(15, 6))
    np.testing.assert_allclose(forth, flat, rtol=1e-6)


def test_first_directions_do_not_depend_on_their_number():
    key, x = jax.random.key(0), jax.random.normal(jax.random.key(1), (9, 2))
    y = x * 2
    one = float(sliced_wasserstein(key, x, y, directions=1)) ** 2
    two = float(sliced_wasserstein(key, x, y, directions=2)) ** 2
    other = 2 * two - one
    assert other > 0 and abs(other - one) > 1e-4


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda k: sliced_wasserstein(k, jnp.ones((3, 2)), jnp.ones((3, 4))), ValueError, "event"),
        (
            lambda k: sliced_wasserstein(k, jnp.ones((3, 2)), jnp.ones((3, 2)), directions=0),
            ValueError,
            "directions",
        ),
        (lambda k: wasserstein_1d(jnp.ones(3), jnp.ones(3), p=0.5), ValueError, "p is"),
        (lambda k: wasserstein_1d(jnp.ones(0), jnp.ones(3)), ValueError, "shapes"),
        (lambda k: wasserstein_1d(jnp.ones(3, jnp.int32), jnp.ones(3)), TypeError, "floating"),
    ],
)
def test_bad_input(key, call, error, words):
    with pytest.raises(error, match=words):
        call(key)
