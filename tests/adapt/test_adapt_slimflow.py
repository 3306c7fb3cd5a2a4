"""SlimFlow's losses as the training step takes them, and its one-step sampler."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import process, score, solve
from jaxgen.adapt.slimflow import distillation_loss, flip_pairs, one_step, reflow_loss
from jaxgen.score.flow import anneal_noise, anneal_schedule, flow_guided_loss, flow_matching_loss
from jaxgen.solve.reflow import Pairs
from jaxgen.train.state import TrainState
from jaxgen.train.step import make_train_step


def velocity(params, x, t):
    return params["a"] * x + params["b"][None] + 0 * t[:, None]


PARAMS = {"a": jnp.float32(0.2), "b": jnp.asarray([0.1, -0.3])}


@pytest.fixture
def pairs(key):
    x0 = jax.random.normal(key, (16, 2))
    return Pairs(x0, 0.5 * x0 + 1)


def test_annealed_reflow_follows_the_step(key, pairs):
    loss = jax.jit(reflow_loss(velocity, anneal_schedule("linear", 10)))
    key_noise, key_time = jax.random.split(key)

    def by_hand(beta):
        noise = anneal_noise(key_noise, pairs.x0, beta)
        return flow_matching_loss(key_time, lambda x, t: velocity(PARAMS, x, t), noise, pairs.x1)

    for step, beta in ((0, 1.0), (3, 0.7), (10, 0.0), (50, 0.0)):
        found = loss(key, PARAMS, pairs, jnp.int32(step))
        np.testing.assert_allclose(found, by_hand(beta), rtol=1e-5, atol=1e-6)
    as_dict = loss(key, PARAMS, {"x0": pairs.x0, "x1": pairs.x1}, jnp.int32(3))
    np.testing.assert_allclose(as_dict, by_hand(0.7), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", ["student", "teacher"])
def test_distillation_is_the_sum_of_both_parts(key, pairs, first):
    teacher = {"a": jnp.float32(-0.4), "b": jnp.asarray([1.0, 0.5])}
    guided = jax.jit(distillation_loss(velocity, teacher, first=first))(key, PARAMS, pairs)
    naive = jax.jit(distillation_loss(velocity))(key, PARAMS, pairs)
    # Naive: the input at t_min has a little of the data in it.
    x = 0.999 * pairs.x0 + 1e-3 * pairs.x1
    away = velocity(PARAMS, x, jnp.zeros(16)) - (pairs.x1 - pairs.x0)
    np.testing.assert_allclose(naive, jnp.mean(away**2, -1), rtol=1e-5)
    fresh = flow_guided_loss(
        jax.random.split(key)[1],
        lambda x, t: velocity(PARAMS, x, t),
        lambda x, t: velocity(teacher, x, t),
        (16, 2),
        first=first,
    )
    np.testing.assert_allclose(guided, naive + fresh, rtol=1e-5)


def test_the_recipe_learns_a_straight_flow(key, pairs):
    """Independent data at first, exact pairs in the end: the line x1 = x0/2 + 1 is learned."""
    optimizer = optax.adam(0.03)
    step = make_train_step(
        reflow_loss(velocity, anneal_schedule("linear", 50)), optimizer, ema=0.9, pass_step=True
    )
    state = TrainState.create(key, PARAMS, optimizer)
    for _ in range(100):
        state, _ = step(state, pairs)
    flow = state.ema
    assert float(flow["a"]) < -0.2
    distil = make_train_step(distillation_loss(velocity, flow), optimizer, ema=0.9)
    # Parameters and average both start at the flow's average, where the warm-up is at step 0.
    student = TrainState.create(key, flow, optimizer)
    np.testing.assert_array_equal(student.ema["b"], flow["b"])
    for _ in range(100):
        student, _ = distil(student, pairs)
    made = one_step(lambda x, t: velocity(student.ema, x, t), pairs.x0)
    before = one_step(lambda x, t: velocity(flow, x, t), pairs.x0)
    errors = [float(jnp.mean((x - pairs.x1) ** 2)) for x in (made, before)]
    assert errors[0] < 0.1 < 0.3 < float(jnp.mean((pairs.x0 - pairs.x1) ** 2)), errors


def test_one_step_is_the_samplers(key):
    sde = process.rectified()
    field = score.closed_form.gaussian(sde, jnp.asarray([1.0, 2.0]), 0.25).velocity
    z = jax.random.normal(key, (5, 2))
    ours = jax.jit(lambda z: one_step(score.from_flow(field), z))(z)
    for solver in ("euler_time", "ddim"):
        theirs = solve.sample(
            key,
            field,
            sde,
            (5, 2),
            solver=solver,
            grid=np.asarray([0.999, 0.0], np.float32),
            prediction="velocity",
            x_init=z,
        )
        np.testing.assert_allclose(ours, theirs.x, rtol=1e-5, atol=1e-5)
    single = jax.vmap(lambda z: one_step(score.from_flow(field), z, event_ndim=1))(z)
    np.testing.assert_allclose(single, ours, rtol=1e-6)
    assert one_step(score.from_flow(field), z.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_the_one_step_map_of_annealed_pairs():
    # x1 = m + s x0 with pairing kept by c: in one step from the noise, m + c s x0.
    m, s, z = 0.7, 0.5, jnp.linspace(-2, 2, 5)[:, None]
    for beta in (0.0, 0.6, 1.0):
        c = math.sqrt(1 - beta**2)
        made = one_step(lambda x, t, c=c: m + (c * s - 1) * x, z, t_min=1e-6)
        np.testing.assert_allclose(made, m + c * s * z, atol=1e-5)


def test_noise_and_image_are_mirrored_together(key):
    x0, x1 = jax.random.normal(key, (2, 64, 2, 3, 1))
    flipped = jax.jit(flip_pairs)(key, x0, x1)
    coins = []
    for i in range(64):
        is_flipped = not np.array_equal(flipped[0][i], x0[i])
        coins.append(is_flipped)
        for out, x in zip(flipped, (x0, x1), strict=True):
            np.testing.assert_array_equal(out[i], jnp.flip(x[i], 1) if is_flipped else x[i])
    assert 16 < sum(coins) < 48


def test_batches_that_are_no_pairs(key, pairs):
    loss = distillation_loss(velocity)
    with pytest.raises(ValueError, match="expected x0 and x1"):
        loss(key, PARAMS, {"x": pairs.x0})
    with pytest.raises(ValueError, match="expected Pairs"):
        loss(key, PARAMS, pairs.x0)
    with pytest.raises(ValueError, match="pairs of one shape"):
        loss(key, PARAMS, Pairs(pairs.x0, pairs.x1[:4]))
    with pytest.raises(ValueError, match="pairs of one shape"):
        flip_pairs(key, pairs.x0, pairs.x1[:4])


def test_labels(key, pairs):
    def labelled(params, x, t, label):
        return velocity(params, x, t) + label[:, None].astype(x.dtype)

    batch = {"x0": pairs.x0, "x1": pairs.x1, "label": jnp.arange(16)}
    loss = jax.jit(distillation_loss(labelled, PARAMS))(key, PARAMS, batch)
    x = 0.999 * pairs.x0 + 1e-3 * pairs.x1
    away = velocity(PARAMS, x, jnp.zeros(16)) + jnp.arange(16.0)[:, None] - (pairs.x1 - pairs.x0)
    assert (np.asarray(loss) >= np.mean(np.asarray(away) ** 2, -1) * (1 - 1e-5)).all()
    with pytest.raises(ValueError, match="takes no label"):
        distillation_loss(velocity, PARAMS)(key, PARAMS, batch)
