"""Exact Wasserstein distances against closed forms, and against POT as a named reference.

Golden numbers: ``ot.emd2`` of POT 0.9.7.post1 with ``ot.dist`` (squared Euclidean), square root.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.metrics.wasserstein import wasserstein2, wasserstein2_histograms

N = np.arange(40)
X = np.stack([np.cos(1.7 * N), np.sin(2.3 * N) + 0.025 * N], 1).astype(np.float32)
Y = np.stack([1.2 * np.sin(0.9 * N) + 0.5, np.cos(3.1 * N) ** 3], 1).astype(np.float32)
POINTS, HISTOGRAMS, SOLIDS = 0.8660077917852519, 0.7006844703190078, 0.801687332114996

assignment = jax.jit(lambda x, y: wasserstein2(x, y, method="assignment"))
histograms = jax.jit(wasserstein2_histograms, static_argnames="spacing")


def bumps():
    g = np.arange(12.0)
    a, b = np.meshgrid(g, g, indexing="ij")
    p = np.exp(-((a - 3) ** 2 + (b - 4) ** 2) / 6)
    p += 0.5 * np.exp(-((a - 9) ** 2 + (b - 8) ** 2) / 2)
    q = np.exp(-((a - 6) ** 2 + (b - 6) ** 2) / 10) * (1 + 0.5 * np.sin(a * b))
    return p.astype(np.float32), q.astype(np.float32)


def test_points_and_histograms_agree_with_pot():
    np.testing.assert_allclose(assignment(X, Y), POINTS, rtol=1e-5)
    np.testing.assert_allclose(histograms(*bumps(), spacing=0.25), HISTOGRAMS, rtol=1e-5)
    a, b, c = np.meshgrid(*[np.arange(6.0)] * 3, indexing="ij")
    p = 1 + np.sin(1.3 * a + 0.7 * b + 2 * c)
    p[p < 0.5] = 0
    q = 1 + np.cos(0.9 * a - b + c**2)
    found = wasserstein2_histograms(p.astype(np.float32), q.astype(np.float32))
    np.testing.assert_allclose(found, SOLIDS, rtol=1e-5)


def test_a_shifted_cloud_is_at_the_shift_by_every_method():
    shift = np.array([[0.5, -0.25]], np.float32)
    np.testing.assert_allclose(assignment(X, X[::-1] + shift), np.hypot(0.5, 0.25), rtol=1e-5)
    np.testing.assert_allclose(wasserstein2(X[:, :1], X[::-1, :1] + 0.5), 0.5, rtol=1e-5)
    # Cells of 1/8, so that the shift is whole cells and counting does not change it.
    grid = wasserstein2(X, X + shift, method="grid", bins=32, bounds=(-2.0, 2.0))
    np.testing.assert_allclose(grid, np.hypot(0.5, 0.25), rtol=1e-4)


def test_on_the_line_all_methods_are_one_and_gaussians_have_a_closed_form():
    # Midpoint quantiles of two Gaussians: W2 tends to the root of (m1-m2)^2 + (s1-s2)^2.
    z = jax.scipy.stats.norm.ppf((np.arange(300) + 0.5) / 300).astype(np.float32)[:, None]
    x, y = z, 1.5 * z + 2.0
    found = [float(wasserstein2(x, y, method=m)) for m in ("sorted", "assignment")]
    # Midpoints leave out half a per cent of the variance, in the tails.
    np.testing.assert_allclose(found, np.hypot(2.0, 0.5), rtol=2e-3)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    grid = wasserstein2(x, y, method="grid", bins=200)
    assert abs(float(grid) - found[0]) < 11 / 200  # twice half a cell of the range
    few = wasserstein2(x[:3], jnp.concatenate([x[:3], x[:3]]))
    np.testing.assert_allclose(few, 0.0, atol=1e-6)


def test_a_grid_moves_the_distance_by_at_most_a_cell_diagonal():
    exact = float(assignment(X, Y))
    for bins in (8, 24):
        grid = float(wasserstein2(X, Y, method="grid", bins=bins))
        side = float(np.ptp(np.concatenate([X, Y]), 0).max())
        assert abs(grid - exact) <= side / bins * np.sqrt(2)
    wider = wasserstein2(X, Y, method="grid", bins=48, bounds=(-4.0, 4.0))
    assert abs(float(wider) - exact) <= 8 / 48 * np.sqrt(2)


def test_the_method_is_chosen_by_size_and_dimension():
    np.testing.assert_allclose(wasserstein2(X, Y), POINTS, rtol=1e-5)
    unequal = wasserstein2(X, Y[:30])
    np.testing.assert_array_equal(unequal, wasserstein2(X, Y[:30], method="grid"))
    np.testing.assert_allclose(wasserstein2(X, X[::-1]), 0.0, atol=1e-6)


def test_vmap_gradient_and_precision():
    pairs = jnp.stack([X, X + 1, Y]), jnp.stack([Y, X, Y])
    mapped = jax.vmap(assignment)(*pairs)
    np.testing.assert_allclose(mapped, [POINTS, np.sqrt(2), 0], rtol=1e-5, atol=1e-6)
    slope = jax.jit(jax.grad(lambda s: wasserstein2(X + s, X, method="assignment")))
    np.testing.assert_allclose(slope(0.5), np.sqrt(2), rtol=1e-5)
    np.testing.assert_allclose(slope(0.0), 0.0, atol=1e-6)
    on_line = jax.jit(jax.grad(lambda s: wasserstein2(X[:, :1] + s, X[:, :1])))
    np.testing.assert_allclose([on_line(0.5), on_line(0.0)], [1.0, 0.0], rtol=1e-5)
    assert wasserstein2(X.astype(jnp.bfloat16), Y.astype(jnp.bfloat16)).dtype == jnp.float32
    both = jax.vmap(lambda p, q: histograms(p, q, spacing=0.25))(
        *(jnp.stack([b] * 2) for b in bumps())
    )
    np.testing.assert_allclose(both, HISTOGRAMS, rtol=1e-5)


def test_no_number_gives_no_distance():
    holed = X.copy()
    holed[3, 1] = np.nan
    for method in ("assignment", "grid"):
        assert np.isnan(wasserstein2(holed, Y, method=method))
    p, q = bumps()
    assert np.isnan(wasserstein2_histograms(p, q * 0))
    assert np.isnan(wasserstein2_histograms(p - 0.5, q))


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="x has dtype int32"):
        wasserstein2(X.astype(int), Y)
    with pytest.raises(ValueError, match=r"shapes \(40, 2\) and \(40, 1\)"):
        wasserstein2(X, Y[:, :1])
    with pytest.raises(ValueError, match="method is 'exact'; expected one of sorted"):
        wasserstein2(X, Y, method="exact")
    with pytest.raises(ValueError, match="method='sorted' is for one"):
        wasserstein2(X, Y, method="sorted")
    with pytest.raises(ValueError, match="40 and 30 points; method='assignment' needs equally"):
        wasserstein2(X, Y[:30], method="assignment")
    with pytest.raises(ValueError, match="method='grid' is for at most 3"):
        wasserstein2(np.zeros((5, 4), np.float32), np.zeros((4, 4), np.float32), method="grid")
    with pytest.raises(ValueError, match=r"bounds is \(1.0, 1.0\)"):
        wasserstein2(X, Y, method="grid", bounds=(1.0, 1.0))
    with pytest.raises(ValueError, match=r"p and q have shapes \(12, 12\) and \(12,\)"):
        wasserstein2_histograms(bumps()[0], bumps()[1][0])
