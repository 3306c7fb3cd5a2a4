"""Shapes and dtypes: broadcasting from the left, event axes, safe roots, wide sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.core import arrays


@pytest.mark.parametrize(
    ("dtype", "real", "wide"),
    [
        (jnp.bfloat16, jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.float32, jnp.float32),
        (jnp.int32, jnp.float32, jnp.float32),
        (jnp.complex64, jnp.float32, jnp.float32),
    ],
)
def test_dtypes_of_parts_and_of_sums(dtype, real, wide):
    assert arrays.real_dtype(dtype) == real
    assert arrays.at_least_f32(dtype) == wide


def test_wide_dtypes_stay_wide():
    with jax.enable_x64(True):
        assert arrays.real_dtype(jnp.complex128) == np.float64
        assert arrays.at_least_f32(jnp.float64) == np.float64


def test_strong_scalar_keeps_numbers_strong_and_arrays_theirs():
    assert arrays.strong_scalar(1).dtype == np.float32
    assert arrays.strong_scalar(jnp.bfloat16(1)).dtype == np.float32
    assert arrays.strong_scalar(np.float64(1)).dtype == np.float32
    assert arrays.strong_scalar(jnp.arange(3)).dtype == np.float32
    for module in (np, jnp):
        anchor = module.array([1 + 2j], module.complex64)
        np.testing.assert_array_equal(arrays.strong_scalar(anchor), anchor)
    with jax.enable_x64(True):
        assert arrays.strong_scalar(0.1) == np.float64(0.1)
        assert arrays.strong_scalar(np.float64(0.1)).dtype == np.float64
    marker = object()
    assert arrays.strong_scalar(marker) is marker


def test_left_broadcast_aligns_the_batch_axis():
    x = jnp.ones((3, 2, 3))
    out = arrays.left_broadcast(jnp.arange(3.0), x) * x
    np.testing.assert_array_equal(out[:, 0, 0], [0, 1, 2])
    assert arrays.left_broadcast(jnp.float32(2), x).shape == (1, 1, 1)


@pytest.mark.parametrize("shape", [(2,), (3, 2, 3, 1)])
def test_left_broadcast_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"coefficient of shape .* does not broadcast"):
        arrays.left_broadcast(jnp.ones(shape), jnp.ones((3, 2, 3)))


def test_cast_coefficient_takes_the_real_dtype():
    x = jnp.ones((2, 3), jnp.bfloat16)
    assert arrays.cast_coefficient(jnp.ones(2), x).dtype == jnp.bfloat16
    assert arrays.cast_coefficient(jnp.ones(2), x.astype(jnp.complex64)).dtype == jnp.float32


def test_batch_event_splits_by_the_rule():
    x = jnp.ones((4, 2, 3))
    assert arrays.batch_event(x, None) == ((4,), (2, 3))
    assert arrays.batch_event((4, 2, 3), 3) == ((), (4, 2, 3))
    assert arrays.batch_event((), 0) == ((), ())
    assert arrays.event_size(x) == 6
    with pytest.raises(ValueError, match="event_ndim is 1"):
        arrays.batch_event(x, 1)
    with pytest.raises(ValueError, match="scalar"):
        arrays.batch_event(jnp.float32(0), None)


def test_sum_event_adds_reduced_precision_in_float32():
    x = jnp.full((2, 4096), 0.01, jnp.bfloat16)
    out = arrays.sum_event(x)
    assert out.dtype == jnp.float32 and out.shape == (2,)
    np.testing.assert_allclose(out, 4096 * float(jnp.bfloat16(0.01)), rtol=1e-5)
    assert arrays.sum_event(x, event_ndim=2).shape == ()


def test_safe_sqrt_has_a_finite_gradient_at_zero():
    x = jnp.array([-1.0, 0.0, 4.0])
    np.testing.assert_array_equal(arrays.safe_sqrt(x), [0, 0, 2])
    np.testing.assert_array_equal(jax.vmap(jax.grad(arrays.safe_sqrt))(x), [0, 0, 0.25])
    assert np.isnan(arrays.safe_sqrt(jnp.nan * x)).all()
