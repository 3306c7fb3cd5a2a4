"""Exactly k, whatever the ties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.core.topk import count_kept, top_k_mask


@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_exactly_k_largest_with_the_lower_index_first(levels):
    values = np.random.default_rng(0).integers(0, levels, (5, 40)).astype(np.float32)
    order = sorted(range(200), key=lambda i: (-values.ravel()[i], i))
    pick = jax.jit(top_k_mask)
    for k in (0, 1, 7, 199, 200):
        expected = np.zeros(200, bool)
        expected[order[:k]] = True
        np.testing.assert_array_equal(pick(values, k), expected.reshape(5, 40))


def test_batches_infinities_and_nan():
    values = jnp.array([[jnp.nan, -jnp.inf, jnp.inf, 0.0], [2.0, 2.0, jnp.nan, jnp.nan]])
    found = jax.vmap(lambda v: top_k_mask(v, 3))(values)
    expected = [[False, True, True, True], [True, True, True, False]]
    np.testing.assert_array_equal(found, expected)
    assert top_k_mask(jnp.array([1, 3, 2], jnp.bfloat16), 1).tolist() == [False, True, False]


def test_budgets():
    assert [count_kept("keep", b, 10) for b in (1, 10, 0.1, 1.0, 0.26)] == [1, 10, 1, 10, 3]
    for bad in (0, 11, 0.0, 1.5, -0.1, 0.01, float("nan")):
        with pytest.raises(ValueError, match="keep"):
            count_kept("keep", bad, 10)
    for bad in (True, "half", None):
        with pytest.raises(TypeError, match="keep"):
            count_kept("keep", bad, 10)
