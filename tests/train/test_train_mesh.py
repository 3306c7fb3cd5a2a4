"""Data parallelism: the same run on one and on eight virtual devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgen import train
from jaxgen.core import keys

BATCH, WIDTH, STEPS = 16, 16, 100


def init(key):
    a, b = jax.random.split(key)
    return {
        "a": jax.random.normal(a, (3, WIDTH)) / 2,
        "b": jax.random.normal(b, (WIDTH, 2)) / WIDTH**0.5,
    }


def network(params, x, t):
    return jnp.tanh(jnp.concatenate([x, t[:, None]], axis=1) @ params["a"]) @ params["b"]


def loss_fn(key, params, x0):
    """Noise prediction with times and noise drawn per example."""
    time_key, noise_key = jax.random.split(key)
    t = keys.uniform(time_key, x0.shape[:1], event_ndim=0)
    noise = keys.normal(noise_key, x0.shape)
    x_t = jnp.cos(t)[:, None] * x0 + jnp.sin(t)[:, None] * noise
    return jnp.sum((network(params, x_t, t) - noise) ** 2, axis=1)


@jax.jit
def sample(key, params, like):
    x = keys.normal(key, like.shape) + like
    for t in (0.75, 0.5, 0.25):
        x = x - 0.25 * network(params, x, jnp.full(x.shape[:1], t))
    return x


def batch(i):
    return np.random.default_rng(i).normal(size=(BATCH, 2)).astype(np.float32)


OPTIMIZER = optax.adam(1e-2)
STEP = train.make_train_step(loss_fn, OPTIMIZER)


def run(mesh, step=STEP, steps=STEPS):
    state = train.TrainState.create(jax.random.key(1), init(jax.random.key(2)), OPTIMIZER)
    state = state if mesh is None else train.replicate(state, mesh)
    losses = []
    for i in range(steps):
        x = batch(i) if mesh is None else train.shard_batch(batch(i), mesh)
        state, metrics = step(state, x)
        losses.append(metrics.loss.block_until_ready())  # see fit: one step in flight
    like = jnp.zeros((BATCH, 2))
    like = like if mesh is None else train.shard_batch(like, mesh)
    return state, np.array(jax.device_get(losses)), sample(jax.random.key(3), state.ema, like)


@pytest.fixture(scope="module")
def single():
    return run(None)


def test_eight_devices_are_there():
    assert len(jax.devices()) == 8


def test_the_mesh():
    mesh = train.data_mesh()
    assert (mesh.axis_names, mesh.devices.size) == (("data",), 8)
    assert mesh.axis_types == (AxisType.Auto,)
    assert train.data_mesh(jax.devices()[:2]).devices.size == 2
    sizes = {8: 8, 12: 6, 7: 7, 13: 1, 1: 1, 10: 5, 64: 8}
    for n, expected in sizes.items():
        assert train.data_mesh(batch=n).devices.size == expected, n
    with pytest.raises(ValueError, match="devices is empty"):
        train.data_mesh([])
    with pytest.raises(ValueError, match="batch is 0"):
        train.data_mesh(batch=0)


def test_shard_batch_puts_equal_parts_and_refuses_the_rest():
    mesh = train.data_mesh()
    x = train.shard_batch({"x": np.arange(16.0).reshape(16, 1), "y": np.arange(8)}, mesh)
    assert [s.data.shape for s in x["x"].addressable_shards] == [(2, 1)] * 8
    np.testing.assert_array_equal(x["y"], np.arange(8))
    with pytest.raises(ValueError, match=r"shape \(12,\).*8 devices"):
        train.shard_batch(np.zeros(12), mesh)
    with pytest.raises(ValueError, match="shape"):
        train.shard_batch(np.float32(1), mesh)


def test_same_losses_and_samples_on_eight_devices(single):
    state, losses, x = single
    state8, losses8, x8 = run(train.data_mesh())
    # Only the order of float32 sums differs: 1e-7 a step, a little grown over 100 steps.
    np.testing.assert_allclose(losses8, losses, rtol=1e-5)
    np.testing.assert_allclose(x8, x, atol=1e-5)
    for a, b in zip(jax.tree.leaves(state8.ema), jax.tree.leaves(state.ema), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    moved = jnp.abs(state.params["a"] - init(jax.random.key(2))["a"])
    assert float(moved.max()) > 0.2
    assert int(state8.examples) == STEPS * BATCH
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state8))
    assert {s.data.shape for s in x8.addressable_shards} == {(2, 2)}


def test_accumulation_on_a_mesh_stays_where_it_is():
    step = train.make_train_step(loss_fn, OPTIMIZER, accumulate=2)
    _, alone, _ = run(None, step, 3)
    mesh = train.data_mesh()
    _, spread, _ = run(mesh, step, 3)
    np.testing.assert_allclose(spread, alone, rtol=1e-5)
    state = train.replicate(
        train.TrainState.create(jax.random.key(1), init(jax.random.key(2)), OPTIMIZER), mesh
    )
    text = step.lower(state, train.shard_batch(batch(0), mesh)).compile().as_text()
    assert "all-reduce" in text
    assert "all-to-all" not in text and "all-gather" not in text


@pytest.mark.parametrize("accumulate", [1, 2])
def test_explicit_axes(accumulate):
    def loss(key, params, batch):
        return jnp.sum((batch @ params["a"][:2]) ** 2, axis=1)

    step = train.make_train_step(loss, OPTIMIZER, accumulate=accumulate)
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Explicit,))
    found = []
    for where in (None, mesh):
        state = train.TrainState.create(jax.random.key(1), init(jax.random.key(2)), OPTIMIZER)
        x = batch(0)
        if where is not None:
            state, x = train.replicate(state, mesh), train.shard_batch(x, mesh)
        state, metrics = step(state, x)
        found.append((metrics.loss, metrics.grad_norm, state.params["a"]))
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_sharded_parameters_keep_their_sharding(single):
    # Not data parallelism proper, but a user's own sharding must survive the step.
    mesh = train.data_mesh()
    rows = NamedSharding(mesh, PartitionSpec(None, "data"))
    state = train.TrainState.create(jax.random.key(1), init(jax.random.key(2)), OPTIMIZER)
    state = jax.tree.map(
        lambda x: jax.device_put(x, rows if x.shape == (3, WIDTH) else train.replicated(mesh)),
        state,
    )
    for i in range(2):
        state, metrics = STEP(state, train.shard_batch(batch(i), mesh))
        np.testing.assert_allclose(metrics.loss, single[1][i], rtol=1e-5)
    for leaf in (state.params["a"], state.ema["a"], state.opt_state[0].mu["a"]):
        assert leaf.sharding.is_equivalent_to(rows, 2)
