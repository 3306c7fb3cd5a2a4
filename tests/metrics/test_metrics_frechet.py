"""Frechet distance against closed form and an independent matrix square root, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxgen.metrics import frechet_distance, gaussian_distance, moments


def spd(rng, d, rank=None):
    root = rng.normal(size=(d, rank or d))
    return root @ root.T / d


def by_scipy(m1, c1, m2, c2):
    cross = scipy.linalg.sqrtm(c1 @ c2)
    return np.sum((m1 - m2) ** 2) + np.trace(c1 + c2 - 2 * np.real(cross))


@pytest.mark.parametrize("d", [1, 3, 12])
def test_agrees_with_scipy_in_float64(d):
    rng = np.random.default_rng(d)
    m1, m2, c1, c2 = rng.normal(size=d), rng.normal(size=d), spd(rng, d), spd(rng, d)
    with jax.enable_x64(True):
        ours = float(gaussian_distance(m1, c1, m2, c2))
    np.testing.assert_allclose(ours, by_scipy(m1, c1, m2, c2), rtol=1e-9)
    np.testing.assert_allclose(
        float(gaussian_distance(*(jnp.asarray(v, jnp.float32) for v in (m1, c1, m2, c2)))),
        ours,
        rtol=1e-4,
    )


def test_commuting_covariances_are_the_distance_of_their_roots():
    # tr(C1 + C2 - 2 (C1 C2)^(1/2)) = |C1^(1/2) - C2^(1/2)|_F^2 where they commute
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    a, b = rng.uniform(0.1, 3, 5), rng.uniform(0.1, 3, 5)
    with jax.enable_x64(True):
        got = gaussian_distance(np.zeros(5), (q * a) @ q.T, np.zeros(5), (q * b) @ q.T)
    np.testing.assert_allclose(got, np.sum((np.sqrt(a) - np.sqrt(b)) ** 2), rtol=1e-10)


def test_singular_covariances_need_no_jitter():
    rng = np.random.default_rng(1)
    c = spd(rng, 6, rank=2)
    with jax.enable_x64(True):
        assert float(gaussian_distance(np.zeros(6), c, np.zeros(6), c)) < 1e-7
        zero = np.zeros((6, 6))
        got = float(gaussian_distance(np.zeros(6), c, np.zeros(6), zero))
    np.testing.assert_allclose(got, np.trace(c), rtol=1e-6)


def test_point_sets_use_the_unbiased_covariance():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(40, 4)), 2 * rng.normal(size=(30, 4)) + 1
    truth = by_scipy(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    np.testing.assert_allclose(frechet_distance(x, y), truth, rtol=1e-10)
    np.testing.assert_allclose(frechet_distance(y, x), truth, rtol=1e-10)
    assert frechet_distance(x, x) < 1e-12
    np.testing.assert_allclose(frechet_distance(x, x + 3.0), 4 * 9.0, rtol=1e-10)


def test_moments_and_jit_agree_with_the_host():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(50, 3)).astype(np.float32)
    mean, cov = jax.jit(moments)(x)
    np.testing.assert_allclose(mean, x.mean(0), atol=1e-6)
    np.testing.assert_allclose(cov, np.cov(x.T), atol=1e-5)
    y = (x * 1.5).astype(np.float32)
    got = jax.jit(lambda a, b: gaussian_distance(*moments(a), *moments(b)))(x, y)
    np.testing.assert_allclose(got, frechet_distance(x, y), rtol=1e-3)


def test_gradient_in_the_mean_is_twice_the_gap():
    gap = jax.grad(
        lambda m: gaussian_distance(m, jnp.diag(jnp.array([1.0, 2.0])), jnp.zeros(2), jnp.eye(2))
    )(jnp.array([0.5, -1.0]))
    np.testing.assert_allclose(gap, [1.0, -2.0], rtol=1e-5)


def test_nan_stays_nan():
    x = np.random.default_rng(4).normal(size=(10, 2))
    x[3, 1] = np.nan
    assert np.isnan(frechet_distance(x, x))
    assert np.isnan(gaussian_distance(jnp.array([jnp.nan]), jnp.eye(1), jnp.zeros(1), jnp.eye(1)))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: moments(jnp.ones((1, 3))), ValueError, "n >= 2"),
        (lambda: moments(jnp.ones((4, 3), jnp.int32)), TypeError, "floating"),
        (lambda: frechet_distance(np.ones((4, 3)), np.ones((4, 2))), ValueError, "shapes"),
        (
            lambda: gaussian_distance(jnp.ones(2), jnp.eye(3), jnp.ones(2), jnp.eye(2)),
            ValueError,
            "cov_1",
        ),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
