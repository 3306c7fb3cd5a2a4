"""Classifier guidance of a mixture, where the classifier is exact and so is the answer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import guide, process
from jaxgen.score import PREDICTIONS
from jaxgen.score.closed_form import gaussian, mixture

MEANS = jnp.array([[-1.0, 0.5], [1.2, 0.3], [0.0, -1.0]])
COVS = jnp.array([[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.0], [0.0, 0.4]], [[0.2, -0.1], [-0.1, 0.2]]])
X = jnp.array([[0.4, -0.2], [-1.5, 0.8], [1.0, 1.0], [0.1, -2.0]])
T = jnp.array([0.05, 0.3, 0.6, 0.95])
LABELS = jnp.array([2, 0, 1, 1])
SDES = {
    "vp": process.vp(),
    "sub_vp": process.sub_vp(),
    "ve": process.ve(sigma_max=5.0),
    "mean_reverting": process.mean_reverting(jnp.array([0.3, -0.2]), sigma_inf=1.0),
}


def forms(sde):
    return mixture(sde, jnp.array([0.2, 0.5, 0.3]), MEANS, COVS)


def at_labels(form):
    def log_prob_y(x, t):
        log_probs = form.component_log_prob(x, t)
        return jnp.take_along_axis(log_probs, LABELS[:, None], axis=1)[:, 0]

    return log_prob_y


@functools.cache
def evaluated(name):
    """For every kind: the field, the guided field and the field of each example's component."""
    sde = SDES[name]

    def run(x, t):
        form = forms(sde)
        out = {}
        for kind in PREDICTIONS:
            plain = getattr(form, kind)
            guided = guide.class_conditional(plain, at_labels(form), sde, prediction=kind)
            truth = jax.vmap(
                lambda m, c, x, t, kind=kind: getattr(gaussian(sde, m, c), kind)(x, t)
            )(MEANS[LABELS], COVS[LABELS], x, t)
            out[kind] = plain(x, t), guided(x, t), truth
        return out

    return jax.tree.map(np.asarray, jax.jit(run)(X, T))


@pytest.mark.parametrize("name", SDES)
def test_the_guided_score_is_the_components_score(name):
    plain, guided, truth = evaluated(name)["score"]
    assert np.abs(truth - plain).max() > 0.1
    np.testing.assert_allclose(guided, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("name", SDES)
def test_every_kind_is_guided_to_the_components_field(name, kind):
    _, guided, truth = evaluated(name)[kind]
    # In units of the largest entry: data near t = 1 divide by a small alpha.
    np.testing.assert_allclose(guided, truth, rtol=2e-5, atol=2e-5 * np.abs(truth).max())


@functools.cache
def guided_noise():
    """The guided noise under vp as a function of ``(x, t, scale)``."""
    sde = SDES["vp"]
    form = forms(sde)
    return jax.jit(
        lambda x, t, scale: guide.class_conditional(form.noise, at_labels(form), sde, scale=scale)(
            x, t
        )
    )


def test_scale_multiplies_the_gradient():
    plain, once, _ = evaluated("vp")["noise"]
    run = guided_noise()
    each = jnp.array([0.0, 1.0, 3.0, 1.0])
    truth = plain + np.asarray(each)[:, None] * (once - plain)
    np.testing.assert_allclose(run(X, T, each), truth, rtol=1e-5, atol=1e-5)


def test_an_example_does_not_depend_on_its_batch():
    one = jnp.ones(4)
    whole = guided_noise()(X, T, one)
    moved = guided_noise()(X.at[1:].add(3.0), T, one)
    np.testing.assert_array_equal(whole[0], moved[0])
    form = forms(SDES["vp"])
    single = guide.class_conditional(
        form.noise, lambda x, t: form.component_log_prob(x, t)[2], SDES["vp"]
    )
    np.testing.assert_allclose(jax.jit(single)(X[0], T[0]), whole[0], atol=1e-6)


def test_dtype_in_dtype_out():
    out = guided_noise()(X.astype(jnp.bfloat16), T, jnp.ones(4))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), evaluated("vp")["noise"][1], atol=0.05)


def test_bad_input_names_the_argument():
    sde = SDES["vp"]

    def field(x, t):
        return x

    with pytest.raises(ValueError, match="prediction"):
        guide.class_conditional(field, lambda x, t: t, sde, prediction="epsilon")
    summed = guide.class_conditional(field, lambda x, t: x.sum(), sde)
    with pytest.raises(ValueError, match="one log-probability per example"):
        summed(X, T)
    counted = guide.class_conditional(field, lambda x, t: LABELS, sde)
    with pytest.raises(TypeError, match="log_prob_y"):
        counted(X, T)
    wrong = guide.class_conditional(lambda x, t: x[:, :1], lambda x, t: t, sde)
    with pytest.raises(ValueError, match="returned shape"):
        wrong(X, T)
