"""The training state: what it owns, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen.train import TrainState


def params():
    return {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones((3,), jnp.bfloat16)}


def pointers(tree):
    raw = (
        jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(tree)
    )
    return [x.unsafe_buffer_pointer() for x in raw]


def test_create_starts_at_the_parameters(key):
    state = TrainState.create(key, params(), optax.adam(1e-3))
    for tree in (state.params, state.ema):
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(params()), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    counters = (state.step, state.examples, state.skipped, state.skipped_in_a_row)
    assert [int(c) for c in counters] == [0, 0, 0, 0]
    assert [str(c.dtype) for c in counters] == ["int32", "uint32", "int32", "int32"]


def test_no_buffer_is_shared_with_the_caller_or_within(key):
    # An optimiser whose state is the parameters themselves is the hard case.
    keeps = optax.GradientTransformation(lambda p: (p, p), lambda g, s, p=None: (g, s))
    own = params()
    state = TrainState.create(key, own, keeps)
    found = pointers(state) + pointers(own) + pointers(key)
    assert len(set(found)) == len(found)


def test_leaves_are_strongly_typed(key):
    weak = {"w": jnp.asarray(1.0)}
    assert weak["w"].weak_type
    state = TrainState.create(key, weak, optax.sgd(lambda _: 0.1))
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state) if hasattr(leaf, "weak_type"))


def test_create_gives_shapes_under_eval_shape(key):
    def make():
        return TrainState.create(key, params(), optax.adam(1e-3))

    shapes, state = jax.eval_shape(make), make()
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(state), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_bad_arguments(key):
    with pytest.raises(TypeError, match="typed key"):
        TrainState.create(jax.random.PRNGKey(0), params(), optax.sgd(0.1))
    with pytest.raises(ValueError, match="one key"):
        TrainState.create(jax.random.split(key), params(), optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"'n/count'.*int32"):
        TrainState.create(key, {"n": {"count": jnp.int32(1)}}, optax.sgd(0.1))
    with pytest.raises(TypeError, match="floating arrays only"):
        TrainState.create(key, {"act": jax.nn.relu}, optax.sgd(0.1))


def test_replace(key):
    state = TrainState.create(key, params(), optax.sgd(0.1))
    other = state.replace(step=jnp.int32(5))
    assert (int(state.step), int(other.step)) == (0, 5)
    assert other.params is state.params
