"""Steps under ``shard_map`` and ``pmap``, and functions of a batch split over eight devices.

That ancestors, filters and their normalisers are the same with particles split over devices is
shown in ``tests/particles`` and ``tests/smc``.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import metrics, process, score, solve, train
from jaxgen.core import keys
from jaxgen.train.mesh import make_mesh, replicate, shard_batch
from jaxgen.train.parallel import (
    local_step,
    mean_over_batch,
    over_batch,
    pmap_step,
    shard_map_step,
)

BATCH, STEPS = 16, 3
OPTIMIZER = optax.adam(1e-2)
SDE = process.vp()
FIELD = score.closed_form.gaussian(SDE, jnp.array([1.0, -0.5]), 0.25)


def network(params, x, t):
    return jnp.tanh(jnp.concatenate([x, t[:, None]], axis=1) @ params["a"]) @ params["b"]


def loss_fn(key, params, x0):
    """A loss of the library's, which draws times and noise per example."""
    return score.denoising_loss(key, lambda x, t: network(params, x, t), SDE, x0)


def make():
    a, b = jax.random.split(jax.random.key(2))
    params = {"a": jax.random.normal(a, (3, 16)) / 2, "b": jax.random.normal(b, (16, 2)) / 4}
    return train.TrainState.create(jax.random.key(1), params, OPTIMIZER)


def batch(i):
    return np.random.default_rng(i).normal(size=(BATCH, 2)).astype(np.float32)


def run(step, state, put=lambda x: x):
    """Losses and norms of gradients, whose size Adam and clipping hide, and the last state."""
    found = []
    for i in range(STEPS):
        state, metrics = step(state, put(batch(i)))
        found.append([np.ravel(metrics.loss)[0], np.ravel(metrics.grad_norm)[0]])
    return np.array(found), state


@functools.cache
def alone(accumulate):
    losses, state = run(train.make_train_step(loss_fn, OPTIMIZER, accumulate=accumulate), make())
    return losses, jax.device_get(state.params)


def assert_same_as_alone(losses, params, accumulate):
    # Three steps of sums over 16 examples in another order: 3 sqrt(16) / 2^24 of numbers near 1,
    # five times over; in the parameters times Adam's rate of 0.01 over gradients of 0.1 and more.
    expected, there = alone(accumulate)
    np.testing.assert_allclose(losses, expected, rtol=4e-6)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(there), strict=True):
        np.testing.assert_allclose(a, b, atol=4e-6)


@pytest.mark.parametrize(
    ("words", "kind", "accumulate"),
    [
        ("data=4,fsdp=2", "auto", 2),
        pytest.param("data=8", "explicit", 1, marks=pytest.mark.slow),
    ],
)
def test_a_step_under_shard_map(words, kind, accumulate):
    mesh = make_mesh(words, axis_types=kind)
    step = shard_map_step(loss_fn, OPTIMIZER, mesh, accumulate=accumulate)
    losses, state = run(step, replicate(make(), mesh), lambda x: shard_batch(x, mesh))
    assert_same_as_alone(losses, state.params, accumulate)
    assert int(state.examples) == STEPS * BATCH


def test_a_step_under_pmap():
    def spread(leaf):
        return jnp.broadcast_to(leaf[None], (8, *leaf.shape))

    step = pmap_step(loss_fn, OPTIMIZER)
    losses, state = run(step, jax.tree.map(spread, make()), lambda x: x.reshape(8, 2, 2))
    for leaf in jax.tree.leaves(state.params):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    assert_same_as_alone(losses, jax.tree.map(lambda leaf: leaf[0], state.params), 1)
    np.testing.assert_array_equal(state.examples, [STEPS * BATCH] * 8)


def test_a_step_in_a_map_of_ones_own():
    """Two axes, one of them not the batch's: each half of it trains on its own examples."""
    mesh = jax.make_mesh((2, 4), ("run", "data"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    step = local_step(loss_fn, OPTIMIZER, "data")

    def both(state, x):
        # Runs are apart: parameters differ between them from the start.
        state = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, "run", to="varying"), state)
        state, metrics = step(state, x[0])
        return metrics.loss[None]

    rows = jax.P("run", "data")
    mapped = jax.shard_map(both, mesh=mesh, in_specs=(jax.P(), rows), out_specs=jax.P("run"))
    losses = jax.jit(mapped)(make(), np.stack([batch(0), batch(1)]))
    other, _ = train.make_train_step(loss_fn, OPTIMIZER)(make(), batch(1))[1][:2]
    np.testing.assert_allclose(losses, [alone(1)[0][0, 0], other], rtol=4e-6)


# --- draws of a part ------------------------------------------------------------------------------


def test_draws_of_a_part_are_those_of_the_batch_and_others_are_not():
    mesh = make_mesh("data=4,fsdp=2")
    key = jax.random.key(7)

    def f(key, n):
        probes = keys.normal(key, (n + 1, 2))  # another number: not the batch
        marks = jax.vmap(jax.random.bits)(keys.fold(key, n, is_batch=False))
        return (
            keys.uniform(key, (n,)),
            keys.fold(key, n),
            jnp.broadcast_to(probes[0], (n, 2)),
            marks,
        )

    u, own, probe, marks = over_batch(f, mesh)(key, 16)
    np.testing.assert_array_equal(u, keys.uniform(key, (16,)))
    np.testing.assert_array_equal(jax.random.key_data(own), jax.random.key_data(keys.fold(key, 16)))
    np.testing.assert_array_equal(probe, np.tile(keys.normal(key, (3, 2))[0], (16, 1)))
    np.testing.assert_array_equal(marks, np.tile(marks[:2], 8))
    # The same functions, traced for the same shapes without the context.
    without = jax.shard_map(
        lambda k: keys.uniform(k, (2,)), mesh=mesh, in_specs=jax.P(), out_specs=jax.P()
    )
    np.testing.assert_array_equal(without(key), keys.uniform(key, (2,)))


# --- functions of a batch -------------------------------------------------------------------------

ROWS = {
    # The last figure: how far two compilations of the same solve may lie apart, 20 steps of
    # float32 rounding, amplified by at most alpha(0) / alpha(1) = 150 for the first of them.
    "dpmpp_2m": ({"solver": "dpmpp_2m", "steps": 6}, 2e-5),
    "ancestral": ({"solver": "ancestral", "steps": 6}, 2e-5),
}


@pytest.mark.parametrize(
    ("row", "words", "kind", "n"),
    [
        ("ancestral", "data=4,fsdp=2", "auto", 13),
        pytest.param("dpmpp_2m", "data=8", "explicit", 16, marks=pytest.mark.slow),
        pytest.param("dpmpp_2m", "fsdp=8", "auto", 1, marks=pytest.mark.slow),
        pytest.param("ancestral", "data=8", "explicit", 13, marks=pytest.mark.slow),
    ],
)
def test_samples_are_those_of_one_device(key, row, words, kind, n):
    options, atol = ROWS[row]

    def draw(key, n):
        return solve.sample(key, FIELD.noise, SDE, (n, 2), **options).x

    x = over_batch(draw, make_mesh(words, axis_types=kind))(key, n)
    assert x.shape == (n, 2)
    np.testing.assert_allclose(x, jax.jit(draw, static_argnums=1)(key, n), atol=atol)


@pytest.mark.slow
def test_log_likelihoods_are_those_of_one_device(key):
    # A time of its own for each example's solver, and an error of rtol in either.
    def log_prob(key, x, scale):
        field = lambda x, t: scale * FIELD.noise(x, t)  # noqa: E731
        return solve.log_likelihood(key, field, SDE, x, rtol=1e-4, atol=1e-4).log_prob

    x = np.asarray(FIELD.sample(jax.random.key(1), (9, 2), SDE.t_min))
    call = over_batch(log_prob, make_mesh("data=4,fsdp=2"), check_vma=False)
    found = call(key, x, jnp.float32(1))
    expected = jax.jit(log_prob)(key, x, jnp.float32(1))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(found, FIELD.log_prob(x, SDE.t_min), atol=0.02)


@pytest.mark.parametrize(("n", "kind"), [(1, "auto"), (5, "explicit"), (16, "auto")])
def test_means_leave_the_padding_out(key, n, kind):
    x = np.random.default_rng(0).normal(size=(n, 2)).astype(np.float32) + 100

    def f(key, x):
        return {"x": x.astype(jnp.bfloat16), "draw": keys.normal(key, x.shape), "one": x[:, 0] > 0}

    found = mean_over_batch(f, make_mesh("data=4,fsdp=2", axis_types=kind))(key, x)
    low = np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))
    assert found["x"].dtype == jnp.float32
    np.testing.assert_allclose(found["x"], low.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found["draw"], keys.normal(key, (n, 2)).mean(axis=0), atol=1e-6)
    assert float(found["one"]) == 1


def test_statistics_of_samples_that_are_split(key):
    mesh = make_mesh("data=4,fsdp=2")
    x, y = (np.random.default_rng(i).normal(size=(64, 3)).astype(np.float32) for i in range(2))
    y = y * 1.5 + 1
    split = shard_batch((x, y), mesh)
    moments = jax.jit(metrics.frechet.moments)
    for a, b in zip(moments(split[0]), moments(x), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    distance = jax.jit(functools.partial(metrics.sliced_wasserstein, directions=16))
    np.testing.assert_allclose(distance(key, *split), distance(key, x, y), rtol=1e-5)


def test_a_function_is_compiled_once():
    traces = []

    def f(key, x, scale):
        traces.append(x.shape)
        return x * scale + keys.normal(key, x.shape)

    call = over_batch(f, make_mesh("data=8"))
    for i in range(3):
        call(jax.random.key(i), batch(i), np.float32(i))
    assert traces == [(2, 2)]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (0, "batch is 0"),
        (np.zeros((0, 2)), "no example"),
        ({"x": np.zeros(3), "y": np.zeros(4)}, "agree in axis 0"),
        (np.float32(1), "agree in axis 0"),
        ({}, "agree in axis 0"),
    ],
)
def test_batches_that_are_none(key, bad, message):
    with pytest.raises(ValueError, match=message):
        over_batch(lambda key, x: x, make_mesh("data=8"))(key, bad)


def test_results_and_meshes_without_a_batch(key):
    with pytest.raises(ValueError, match=r"f gave an array of shape \(\) for a part of 2"):
        over_batch(lambda key, x: jnp.sum(x), make_mesh("data=8"))(key, batch(0))
    with pytest.raises(ValueError, match=r"shape \(3, 2\) for a part of 2"):
        mean_over_batch(lambda key, x: jnp.ones((3, 2)), make_mesh("data=8"))(key, batch(0))
    for build in (over_batch, mean_over_batch):
        with pytest.raises(ValueError, match=r"axes \('model',\); expected one named 'data'"):
            build(lambda key, x: x, make_mesh("model=8"))
    with pytest.raises(ValueError, match="expected one named 'data'"):
        shard_map_step(loss_fn, OPTIMIZER, make_mesh("model=8"))
    with pytest.raises(TypeError, match="typed key"):
        over_batch(lambda key, x: x, make_mesh("data=8"))(None, batch(0))
