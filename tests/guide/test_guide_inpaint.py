"""Imputation against its law, and inpainting and colouring against their own linear recursions."""

import functools
import math

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jaxgen import guide, process
from jaxgen.score.closed_form import gaussian

VE = process.ve()
STEPS = 60


def reverse_diffusion(cov, mean, known, steps=STEPS):
    """Mean and variance of entry 1 of two under ve, entry 0 imputed: exact, in float64.

    The known entry is fresh at each step, so the other's mean and variance are a linear recursion.
    """
    sigma = np.geomspace(0.01, 50, steps)
    before = np.concatenate([[0.0], sigma[:-1]])
    m, v, first = 0.0, sigma[-1] ** 2, 0.0
    for i in range(steps - 1, -1, -1):
        precision = np.linalg.inv(cov + sigma[i] ** 2 * np.eye(2))
        d = sigma[i] ** 2 - before[i] ** 2
        keep = 1 - d * precision[1, 1]
        pull = -d * precision[1, 0]
        m_mean = m + d * precision[1] @ mean - d * precision[1, 1] * m + pull * known
        v_mean = keep**2 * v + pull**2 * first
        m, v, first = m_mean, v_mean + d, sigma[i] ** 2
    return m_mean, v_mean


def field_of(cov, mean):
    """Noise of a two-dimensional Gaussian under ve."""
    values, axes = np.linalg.eigh(np.asarray(cov, np.float64))
    values, axes = values.astype(np.float32), axes.astype(np.float32)

    def field(x, t):
        s = VE.sigma(t)[:, None]
        return s * (((x - jnp.asarray(mean)[None]) @ axes) / (values[None] + s**2)) @ axes.T

    return field


COV = np.array([[1.0, 0.9], [0.9, 1.0]], np.float32)
MEAN = np.array([0.2, -0.1], np.float32)


@functools.cache
def inpainter():
    field = field_of(COV, MEAN)
    return jax.jit(
        lambda key, y, mask: guide.inpaint(key, field, VE, y, mask, corrector=None, steps=STEPS)
    )


N = 20_000
Y = jnp.broadcast_to(jnp.array([1.5, jnp.nan]), (N, 2))
MASK = jnp.array([1, 0])


def test_inpainting_by_a_predictor_follows_its_recursion(key):
    out = inpainter()(key, Y, MASK)
    mean, variance = reverse_diffusion(COV.astype(np.float64), MEAN.astype(np.float64), 1.5)
    x = np.asarray(out.x, np.float64)
    np.testing.assert_array_equal(x[:, 0], 1.5)
    assert abs(x[:, 1].mean() - mean) < 4 * math.sqrt(variance / N)
    assert abs(x[:, 1].var() - variance) < 4 * variance * math.sqrt(2 / N)
    assert int(out.nfe) == STEPS
    assert out.corrector is None


def test_a_mask_that_is_no_mask(key):
    out = inpainter()(key, Y, jnp.array([1.0, 0.5]).astype(jnp.float32))
    assert np.isnan(out.x[:, 1]).all()
    assert bool(jnp.all(out.result == diffrax.RESULTS.nonfinite))
    error, _ = checkify.checkify(jax.jit(lambda m: guide.impute(VE, Y[:2], m).known))(
        jnp.array([1.0, 0.5])
    )
    with pytest.raises(checkify.JaxRuntimeError, match="mask"):
        error.throw()


def test_an_example_keeps_its_noise_in_another_batch(key):
    x, t = jnp.zeros((5, 2)), jnp.full(5, 0.4)

    @jax.jit
    def run(key):
        whole, _ = guide.impute(VE, Y[:5], MASK)(key, x, x, t)
        part, _ = guide.impute(VE, Y[2:4], MASK, first_index=2)(key, x[2:4], x[2:4], t[2:4])
        single, _ = guide.impute(VE, Y[0], MASK, event_ndim=1)(
            jax.random.fold_in(key, 0), x[0], x[0], t[0]
        )
        return whole, part, single

    whole, part, single = run(key)
    assert len(np.unique(whole[:, 0])) == 5
    np.testing.assert_allclose(part, whole[2:4], rtol=1e-6)
    np.testing.assert_allclose(single, whole[0], rtol=1e-6)


def test_one_example_in_reduced_precision_with_the_default_corrector(key):
    field = field_of(COV, MEAN)
    y = jnp.array([1.5, jnp.nan], jnp.bfloat16)
    out = guide.inpaint(
        key, lambda x, t: field(x[None], t[None])[0], VE, y, MASK, steps=4, event_ndim=1
    )
    assert out.x.shape == (2,)
    assert out.x.dtype == jnp.bfloat16
    assert float(out.x[0]) == 1.5
    assert np.isfinite(out.x.astype(jnp.float32)).all()
    assert int(out.nfe) == 8
    assert out.corrector == "langevin"


@pytest.mark.parametrize("anchored", [False, True])
def test_imputation_draws_the_marginal_of_what_is_known(key, anchored):
    mu = jnp.array([[0.5, -0.5, 1.0]])
    sde = process.mean_reverting(mu, sigma_inf=0.7) if anchored else process.vp()
    n, t = 4000, 0.3
    y = jnp.broadcast_to(jnp.array([[1.0, 2.0, jnp.nan], [3.0, 4.0, jnp.nan]]), (n, 2, 3))
    project = jax.jit(guide.impute(sde, y, jnp.array([1, 1, 0])))
    x = jnp.full((n, 2, 3), 7.0)
    new, mean = project(key, x, 2 * x, jnp.full(n, t))
    np.testing.assert_array_equal(new[..., 2], 7.0)
    np.testing.assert_array_equal(mean[..., 2], 14.0)
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    anchor = np.array([0.5, -0.5]) if anchored else np.zeros(2)
    truth = anchor + alpha * (np.array([[1.0, 2.0], [3.0, 4.0]]) - anchor)
    np.testing.assert_allclose(mean[0, :, :2], truth, rtol=1e-5)
    z = (np.asarray(new[..., :2], np.float64) - truth) / sigma
    assert np.abs(z.mean(0)).max() < 4.5 / math.sqrt(n)
    assert np.abs(z.var(0) - 1).max() < 4.5 * math.sqrt(2 / n)
    # Fresh noise by key, the same by example.
    other, _ = project(jax.random.fold_in(key, 1), x, x, jnp.full(n, t))
    assert float(jnp.abs(other - new)[..., :2].min()) > 0


def test_imputation_in_another_basis(key):
    x = jax.random.normal(key, (5, 4, 3))
    y = jnp.broadcast_to(jnp.array([0.8, jnp.nan, jnp.nan]), x.shape)
    project = guide.impute(VE, y, np.array([1, 0, 0]), basis=guide.COLOR_BASIS)
    new, mean = jax.jit(project)(key, x, x, jnp.zeros(5))
    before, after = x @ guide.COLOR_BASIS, mean @ guide.COLOR_BASIS
    np.testing.assert_allclose(after[..., 0], 0.8, atol=1e-5)
    np.testing.assert_allclose(after[..., 1:], before[..., 1:], atol=1e-5)
    # At t = 0 of ve the noise is 0.01.
    noise = (new @ guide.COLOR_BASIS)[..., 0] - 0.8
    assert 0.005 < float(noise.std()) < 0.02


@pytest.mark.parametrize("mask", [np.ones((2, 1, 1), bool), np.ones((), np.int8), np.ones((3, 1))])
def test_masks_broadcast_from_the_right(key, mask):
    y = jnp.ones((2, 3, 4))
    _, mean = guide.impute(VE, y, mask)(key, 0 * y, 0 * y, jnp.zeros(2))
    np.testing.assert_array_equal(mean, 1.0)


def no_field(x, t):
    raise AssertionError("bad input must not reach the field")


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (ValueError, "mask has shape", {"mask": np.ones(3)}),
        (ValueError, "mask has shape", {"mask": np.ones((1, 2, 2))}),
        (ValueError, "mask has other values", {"mask": np.array([1.0, 0.5])}),
        (ValueError, "mask has other values", {"mask": np.array([1.0, np.nan])}),
        (TypeError, "y has dtype", {"y": np.ones((2, 2), np.int32)}),
        (TypeError, "typed key", {"key": jax.random.PRNGKey(0)}),
        (ValueError, "steps", {"steps": 1}),
        (ValueError, "prediction", {"prediction": "epsilon"}),
        (ValueError, "event_ndim", {"event_ndim": 0}),
        (ValueError, "solver|predictor", {"predictor": "magic"}),
        (TypeError, "corrector", {"corrector": "langevin"}),
    ],
)
def test_bad_input_names_the_argument(key, error, words, arguments):
    good = {"key": key, "y": np.ones((2, 2), np.float32), "mask": np.array([1, 0])}
    with pytest.raises(error, match=words):
        guide.inpaint(field=no_field, sde=VE, **(good | arguments))


@pytest.mark.parametrize("basis", [np.eye(2), np.ones((3, 3)), np.diag([1.0, 1.0, 0.9])])
def test_a_basis_must_be_orthonormal(basis):
    with pytest.raises(ValueError, match="basis"):
        guide.impute(VE, np.ones((2, 3), np.float32), np.ones(3), basis=basis)


# --- colour --------------------------------------------------------------------------------------


def test_the_colour_basis_is_the_published_one():
    columns = [(1, 1, 1), (-2, 1, 1), (0, 1, -1)]
    roots = [math.sqrt(3), math.sqrt(6), math.sqrt(2)]
    truth = np.stack([np.array(c) / r for c, r in zip(columns, roots, strict=True)], axis=1)
    np.testing.assert_allclose(guide.COLOR_BASIS, truth, atol=1e-7)


def test_colours_follow_their_recursion_and_keep_the_grey(key):
    # In the basis' coordinates the data are independent: grey tells nothing of colour.
    variances = np.array([2.0, 0.5, 0.1])
    means = np.array([0.3, -0.4, 0.2])
    basis = guide.COLOR_BASIS.astype(np.float64)
    form = gaussian(VE, basis @ means, basis @ np.diag(variances) @ basis.T)
    n = 8000
    gray = jnp.linspace(-1.0, 1.0, n)[:, None, None]
    colours = gray + jnp.array([[[-0.1, 0.1, 0.0]]])  # of which the mean over the channels counts

    def field(x, t):
        return form.noise(x[:, 0], t)[:, None]

    run = jax.jit(lambda g: guide.colorize(key, field, VE, g, corrector=None, steps=STEPS).x)
    out = run(colours)
    assert out.shape == (n, 1, 3)
    np.testing.assert_allclose(out.mean(-1), gray[..., 0], atol=1e-4)
    colours = np.asarray(out, np.float64)[:, 0] @ basis
    for j in (1, 2):
        mean, variance = reverse_diffusion(
            np.diag([1.0, variances[j]]), np.array([0.0, means[j]]), 0.0
        )
        assert abs(colours[:, j].mean() - mean) < 4 * math.sqrt(variance / n)
        assert abs(colours[:, j].var() - variance) < 4 * variance * math.sqrt(2 / n)
    assert abs(np.corrcoef(colours.T)[0, 1]) < 4 / math.sqrt(n)


def test_grey_may_come_as_one_channel(key):
    def run(gray):
        return guide.colorize(key, lambda x, t: x, VE, gray, corrector=None, steps=2).x

    gray = jnp.array([[[0.2]], [[0.5]]])
    # The prior is of size 50, and so is the rounding of the two maps.
    np.testing.assert_allclose(run(gray).mean(-1), gray[..., 0], atol=1e-4)
    with pytest.raises(ValueError, match="gray has shape"):
        run(jnp.zeros((2, 4, 2)))
    with pytest.raises(TypeError, match="gray has dtype"):
        run(jnp.zeros((2, 4, 1), jnp.uint8))
