"""Checks at the public door: each names the argument, what came and what was expected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jaxgen.core import checks


def test_one_of_lists_the_allowed_names():
    checks.one_of("kind", "a", ("a", "b"))
    with pytest.raises(ValueError, match="kind is 'c'; expected one of a, b"):
        checks.one_of("kind", "c", ("a", "b"))


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3", None])
def test_positive_int_refuses(value):
    with pytest.raises(ValueError, match=r"steps is .*expected an integer of at least 1"):
        checks.positive_int("steps", value)


def test_positive_int_takes_numpy_integers():
    assert checks.positive_int("steps", np.int64(3)) == 3


def test_floating_refuses_integers_and_complex_unless_allowed():
    assert checks.floating("x", 1.0).dtype == jnp.float32
    with pytest.raises(TypeError, match="x has dtype int32"):
        checks.floating("x", jnp.arange(3))
    with pytest.raises(TypeError, match="x has dtype complex64"):
        checks.floating("x", jnp.ones(2, jnp.complex64))
    checks.floating("x", jnp.ones(2, jnp.complex64), allow_complex=True)


def test_concrete_sees_values_only_outside_tracing():
    assert checks.concrete(jnp.float32(2)) == 2
    seen = []
    jax.jit(lambda x: seen.append(checks.concrete(x)))(1.0)
    assert seen == [None]


def test_field_output_is_cast_or_refused():
    x = jnp.ones((2, 3), jnp.bfloat16)
    assert checks.cast_field_output(jnp.ones((2, 3)), x).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"returned shape \(2,\) for x of shape \(2, 3\)"):
        checks.cast_field_output(jnp.ones(2), x)
    for dtype in (jnp.int32, jnp.bool_, jnp.complex64):
        with pytest.raises(TypeError, match="returned dtype"):
            checks.cast_field_output(jnp.ones((2, 3), dtype), x)


def test_field_time_is_one_number_per_example():
    x = jnp.ones((2, 3))
    np.testing.assert_array_equal(checks.field_time(0.5, x), [0.5, 0.5])
    assert checks.field_time(0.5, x, event_ndim=2).shape == ()
    with pytest.raises(ValueError, match=r"t has shape \(3,\)"):
        checks.field_time(jnp.ones(3), x)


def test_debug_check_speaks_only_under_checkify():
    def root(x):
        checks.debug_check(x >= 0, "x is negative: {x}", x=x)
        return jnp.sqrt(x)

    assert np.isnan(jax.jit(root)(-1.0))
    error, _ = checkify.checkify(jax.jit(root))(-1.0)
    assert "x is negative: -1.0" in error.get()
    assert checkify.checkify(jax.jit(root))(1.0)[0].get() is None
