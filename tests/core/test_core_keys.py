"""Per-example randomness: independent of the batch's size, one key without a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.core import keys

DRAWS = {"normal": keys.normal, "rademacher": keys.rademacher, "uniform": keys.uniform}


@pytest.mark.parametrize("name", DRAWS)
def test_example_depends_on_its_index_alone(name, key):
    draw = DRAWS[name]
    batch = draw(key, (5, 3))
    np.testing.assert_array_equal(draw(key, (2, 3)), batch[:2])
    one = draw(jax.random.fold_in(key, 4), (3,), event_ndim=1)
    np.testing.assert_array_equal(one, batch[4])
    assert len(np.unique(batch, axis=0)) > 1


def test_fold_takes_an_offset(key):
    np.testing.assert_array_equal(
        jax.random.key_data(keys.fold(key, 5)[3:]), jax.random.key_data(keys.fold(key, 2, 3))
    )


def test_moments_within_four_standard_errors(key):
    n = 20000
    z = keys.normal(key, (n,))
    assert abs(z.mean()) < 4 / n**0.5 and abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    c = keys.normal(key, (n,), jnp.complex64)
    # |z|^2 is exponential with mean and standard deviation one; z^2 has mean zero.
    assert abs((jnp.abs(c) ** 2).mean() - 1) < 4 / n**0.5
    assert abs((c**2).mean()) < 4 * 2**0.5 / n**0.5
    s = keys.rademacher(key, (n,))
    assert set(np.unique(s)) == {-1.0, 1.0} and abs(s.mean()) < 4 / n**0.5
    u = keys.uniform(key, (n,))
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 4 * (1 / 12 / n) ** 0.5


def test_reduced_precision_is_the_rounded_same_noise(key):
    wide = keys.normal(key, (4, 3))
    np.testing.assert_array_equal(keys.normal(key, (4, 3), jnp.bfloat16), wide.astype(jnp.bfloat16))


def test_raw_and_many_keys_are_refused(key):
    with pytest.raises(TypeError, match="expected a typed key"):
        keys.check(jax.random.PRNGKey(0))
    with pytest.raises(TypeError, match="key is int"):
        keys.check(0)
    with pytest.raises(ValueError, match=r"key has shape \(2,\)"):
        keys.normal(jax.random.split(key), (3,))


def test_draws_work_under_jit_and_vmap(key):
    batch = keys.normal(key, (3, 2))
    np.testing.assert_array_equal(jax.jit(lambda k: keys.normal(k, (3, 2)))(key), batch)
    singles = jax.vmap(lambda k: keys.normal(k, (2,), event_ndim=1))(keys.fold(key, 3))
    np.testing.assert_array_equal(singles, batch)
