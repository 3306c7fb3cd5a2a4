"""Resampling against direct convolution in numpy, adjoints and constants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import nets
from jaxgen.nets.resample import fir_pad

KERNELS = [(1.0, 3.0, 3.0, 1.0), (1.0, 1.0), (1.0, 2.0, 1.0), (1.0, 4.0, 2.0, 3.0)]


def direct(image, taps, *, before, after):
    """Full-rate 2-D convolution of one padded channel, pixel by pixel."""
    kernel = np.outer(taps, taps)
    padded = np.pad(image, (before, after))
    size = len(taps)
    height, width = padded.shape[0] - size + 1, padded.shape[1] - size + 1
    out = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            out[i, j] = np.sum(padded[i : i + size, j : j + size] * kernel[::-1, ::-1])
    return out


def images(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("kernel", KERNELS)
def test_fir_down_is_the_strided_convolution(kernel):
    x = images(0, (2, 6, 8, 3))
    taps = np.asarray(kernel) / np.sum(kernel)
    spare = len(taps) - 2
    expected = np.stack(
        [
            np.stack(
                [
                    direct(x[n, :, :, c], taps, before=(spare + 1) // 2, after=spare // 2)[::2, ::2]
                    for c in range(3)
                ],
                axis=-1,
            )
            for n in range(2)
        ]
    )
    np.testing.assert_allclose(nets.fir_down(jnp.asarray(x), kernel), expected, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_fir_up_is_the_convolution_of_the_stuffed_image_with_gain_four(kernel):
    x = images(1, (1, 5, 4, 1))
    taps = np.asarray(kernel) / np.sum(kernel)
    spare = len(taps) - 2
    stuffed = np.zeros((10, 8))
    stuffed[::2, ::2] = x[0, :, :, 0]
    expected = 4 * direct(stuffed, taps, before=(spare + 1) // 2 + 1, after=spare // 2)
    np.testing.assert_allclose(nets.fir_up(jnp.asarray(x), kernel)[0, :, :, 0], expected, atol=2e-6)


def test_fir_pad_and_strided_convolution_halve():
    x = images(2, (1, 8, 8, 1))
    taps = np.asarray(KERNELS[0]) / 8
    expected = direct(x[0, :, :, 0], taps, before=2, after=2)
    ours = fir_pad(jnp.asarray(x), KERNELS[0], extra=2)[0, :, :, 0]
    assert ours.shape == (9, 9)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("kernel", [KERNELS[0], KERNELS[1]])
def test_up_is_four_times_the_transpose_of_down(kernel):
    x, y = jnp.asarray(images(3, (2, 8, 8, 2))), jnp.asarray(images(4, (2, 4, 4, 2)))
    left = jnp.vdot(nets.fir_down(x, kernel), y)
    right = jnp.vdot(x, nets.fir_up(y, kernel)) / 4
    np.testing.assert_allclose(left, right, rtol=1e-4)


def test_mean_and_nearest_are_adjoint_and_keep_constants():
    x, y = jnp.asarray(images(5, (2, 4, 6, 1))), jnp.asarray(images(6, (2, 2, 3, 1)))
    np.testing.assert_allclose(
        jnp.vdot(nets.mean_down(x), y), jnp.vdot(x, nets.nearest_up(y)) / 4, rtol=1e-5
    )
    np.testing.assert_array_equal(nets.mean_down(nets.nearest_up(y)), y)


def test_constants_survive_the_filter_inside():
    ones = jnp.ones((1, 8, 8, 1))
    np.testing.assert_allclose(nets.fir_down(ones)[:, 1:-1, 1:-1], 1, rtol=1e-6)
    np.testing.assert_allclose(nets.fir_up(ones)[:, 1:-1, 1:-1], 1, rtol=1e-6)


def test_folding_pixels_goes_there_and_back():
    x = jnp.asarray(images(7, (2, 4, 6, 3)))
    folded = nets.space_to_depth(x, 2)
    assert folded.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(folded[0, 1, 2, 3:6], x[0, 2, 5])
    np.testing.assert_array_equal(nets.depth_to_space(folded, 2), x)


def test_dtype_and_transforms_are_kept():
    x = jnp.asarray(images(8, (3, 4, 4, 1)))
    for f in (nets.fir_down, nets.fir_up, nets.mean_down, nets.nearest_up):
        assert f(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
        singles = jax.jit(jax.vmap(lambda one, f=f: f(one[None])[0]))(x)
        np.testing.assert_allclose(singles, f(x), rtol=1e-6, atol=1e-7)


def test_bad_input_is_named():
    odd = jnp.zeros((1, 3, 4, 1))
    for f in (nets.fir_down, nets.mean_down):
        with pytest.raises(ValueError, match=r"x: expected even height.*\(1, 3, 4, 1\)"):
            f(odd)
    with pytest.raises(ValueError, match=r"x: expected shape \(n, h, w, c\), received \(4, 4\)"):
        nets.fir_up(jnp.zeros((4, 4)))
    with pytest.raises(ValueError, match=r"kernel: expected .* received \(1.0, -1.0\)"):
        nets.fir_up(odd, (1.0, -1.0))
    with pytest.raises(ValueError, match="x: expected sides divisible by 2"):
        nets.space_to_depth(odd, 2)
    with pytest.raises(ValueError, match="x: expected channels divisible by 4"):
        nets.depth_to_space(odd, 2)
