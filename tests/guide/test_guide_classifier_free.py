"""Classifier-free guidance: its scale, its kinds, and both halves in one call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import guide, process
from jaxgen.score import PREDICTIONS, convert
from jaxgen.score.closed_form import gaussian, mixture

SDE = process.vp()
MEANS = jnp.array([[-1.0, 0.5], [1.2, 0.3]])
WHOLE = mixture(SDE, jnp.ones(2), MEANS, jnp.array([0.2, 0.3]))
FIRST = gaussian(SDE, MEANS[0], 0.2)
NOISES = jax.jit(lambda x, t: (WHOLE.noise(x, t), FIRST.noise(x, t)))


def whole(x, t):
    return NOISES(x, t)[0]


def first(x, t):
    return NOISES(x, t)[1]


X = jnp.array([[0.4, -0.2], [-1.5, 0.8], [1.0, 1.0]])
T = jnp.array([0.05, 0.3, 0.9])


def test_scale_zero_and_one_are_the_two_fields():
    for scale, truth in ((0.0, whole), (1.0, first)):
        guided = guide.classifier_free(first, whole, scale)
        np.testing.assert_allclose(guided(X, T), truth(X, T), atol=1e-6)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_every_kind_means_the_same_guided_score(kind):
    scale = 2.5
    # Ho and Salimans' strength w: (1 + w) conditional - w unconditional.
    w = scale - 1

    def run(x, t):
        guided = guide.classifier_free(getattr(FIRST, kind), getattr(WHOLE, kind), scale)
        score = convert(guided(x, t), x, t, SDE, kind, "score")
        return score, (1 + w) * FIRST.score(x, t) - w * WHOLE.score(x, t)

    score, truth = jax.jit(run)(X, T)
    np.testing.assert_allclose(score, truth, rtol=1e-4, atol=1e-4)


def test_a_scale_per_example():
    guided = guide.classifier_free(first, whole, jnp.array([0.0, 1.0, 2.0]))(X, T)
    a, b = whole(X, T), first(X, T)
    np.testing.assert_allclose(guided, jnp.stack([a[0], b[1], 2 * b[2] - a[2]]), atol=1e-5)


def test_labels_go_through_one_call_of_the_network():
    calls = []

    def net(x, t, y):
        calls.append((x.shape, t.shape, y.shape))
        assert y.dtype == jnp.int32
        return jnp.where((y == 2)[:, None], whole(x, t), first(x, t) + y[:, None])

    guided = guide.classifier_free_labels(net, jnp.array([0, 1, 0]), 2, 3.0)(X, T)
    assert calls == [((6, 2), (6,), (6,))]
    conditional = first(X, T) + jnp.array([0.0, 1.0, 0.0])[:, None]
    truth = guide.classifier_free(lambda x, t: conditional, whole, 3.0)(X, T)
    np.testing.assert_allclose(guided, truth, atol=1e-5)
    shared = guide.classifier_free_labels(net, 0, 2, 3.0)(X, jnp.array(0.3))
    truth = guide.classifier_free(first, whole, 3.0)(X, jnp.full(3, 0.3))
    np.testing.assert_allclose(shared, truth, atol=1e-5)


def test_labels_may_be_vectors():
    def net(x, t, y):
        return x * y[:, :1]

    y = jnp.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    guided = guide.classifier_free_labels(net, y, jnp.zeros(2), 2.0)(X, T)
    np.testing.assert_allclose(guided, 2 * X * y[:, :1], atol=1e-6)


def test_dtype_in_dtype_out():
    x = X.astype(jnp.bfloat16)
    out = guide.classifier_free(first, whole, 2.0)(x, T)
    assert out.dtype == jnp.bfloat16


def test_gradient_in_the_scale():
    def total(scale):
        return guide.classifier_free(first, whole, scale)(X, T).sum()

    slope = (first(X, T) - whole(X, T)).sum()
    np.testing.assert_allclose(jax.grad(total)(2.0), slope, rtol=1e-5)


def test_bad_input_names_the_argument():
    for scale in (np.nan, np.inf, np.ones((2, 2))):
        with pytest.raises(ValueError, match="scale"):
            guide.classifier_free(first, whole, scale)
    with pytest.raises(ValueError, match="unconditional"):
        guide.classifier_free(first, lambda x, t: x[:1], 2.0)(X, T)
    with pytest.raises(ValueError, match="broadcast"):
        guide.classifier_free(first, whole, jnp.ones(2))(X, T)
    with pytest.raises(ValueError, match="y has shape"):
        guide.classifier_free_labels(lambda x, t, y: x, jnp.arange(2), 2, 1.0)(X, T)
