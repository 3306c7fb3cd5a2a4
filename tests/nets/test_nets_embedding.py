"""Embeddings against their closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import nets


def test_sinusoidal_is_its_closed_form():
    t = np.asarray([0.0, 0.5, 3.0, 100.0])
    frequencies = 10_000.0 ** (-np.arange(8) / 7)
    angles = t[:, None] * frequencies
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    # An angle of 100 carries a float32 rounding of 4e-6.
    np.testing.assert_allclose(nets.sinusoidal(jnp.asarray(t), 16), expected, atol=2e-5)


def test_sinusoidal_takes_a_period_and_float64():
    with jax.enable_x64(True):
        t = jnp.asarray([0.7, 2.0])
        out = nets.sinusoidal(t, 4, max_period=100.0)
        assert out.dtype == jnp.float64
        expected = [[np.sin(0.7), np.sin(0.007), np.cos(0.7), np.cos(0.007)]]
        np.testing.assert_allclose(out[:1], expected, rtol=1e-14)


def test_fourier_features_are_their_closed_form():
    t, frequencies = np.asarray([0.1, -2.0]), np.asarray([0.5, 3.0, -1.25])
    angles = 2 * np.pi * t[:, None] * frequencies
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    ours = nets.fourier_features(jnp.asarray(t), jnp.asarray(frequencies))
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_gaussian_fourier_draws_its_scale_and_gives_it_no_gradient():
    net = nets.GaussianFourier(size=4096, scale=16.0)
    t = jnp.asarray([0.2, 0.4])
    variables = net.init(jax.random.key(0), t)
    frequencies = variables["params"]["frequencies"]
    # The standard error of a standard deviation is scale / sqrt(2 n).
    assert abs(float(jnp.std(frequencies)) - 16.0) < 4 * 16.0 / np.sqrt(2 * 4096)
    np.testing.assert_array_equal(net.apply(variables, t), nets.fourier_features(t, frequencies))
    grads = jax.grad(lambda v: jnp.sum(net.apply(v, t) ** 3))(variables)
    assert np.all(np.asarray(grads["params"]["frequencies"]) == 0)


def test_time_is_embedded_in_float32_whatever_its_dtype():
    net = nets.TimeEmbedding(16)
    t = jnp.asarray([0.25, 0.5], jnp.bfloat16)
    variables = net.init(jax.random.key(0), t)
    out = net.apply(variables, t)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, net.apply(variables, t.astype(jnp.float32)))


def test_time_scale_multiplies_the_time():
    t = jnp.asarray([0.001, 0.7])
    variables = nets.TimeEmbedding(16, time_scale=1.0).init(jax.random.key(0), t)
    fast = nets.TimeEmbedding(16, time_scale=64.0).apply(variables, t)
    slow = nets.TimeEmbedding(16, time_scale=1.0).apply(variables, 64.0 * t)
    np.testing.assert_allclose(fast, slow, rtol=1e-5, atol=1e-6)


def test_label_embedding_has_a_null_row_and_fills_with_nan():
    net = nets.LabelEmbedding(num_classes=3, features=2)
    label = jnp.asarray([0, 2, 3, 4, -1])
    variables = net.init(jax.random.key(0), label)
    table = variables["params"]["embedding"]
    assert table.shape == (4, 2)
    out = np.asarray(net.apply(variables, label))
    np.testing.assert_array_equal(out[:3], np.asarray(table)[[0, 2, 3]])
    assert np.isnan(out[3:]).all()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"t: expected shape \(n,\), received \(\)"):
        nets.sinusoidal(jnp.float32(0.1), 8)
    with pytest.raises(ValueError, match=r"t: expected shape \(n,\), received \(2, 1\)"):
        nets.fourier_features(jnp.zeros((2, 1)), jnp.ones(3))
    for features in (2, 7):
        with pytest.raises(ValueError, match=f"features: expected an even.*received {features}"):
            nets.sinusoidal(jnp.zeros(2), features)
