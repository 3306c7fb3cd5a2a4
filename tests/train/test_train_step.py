"""The training step against numbers worked out by hand or by NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen.train import TrainState, make_train_step

N = 8


def linear_loss(key, params, batch):
    del key
    x, y = batch
    return (x @ params["w"] - y) ** 2


def data(seed=0, n=N):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 3)).astype(np.float32), rng.normal(size=n).astype(np.float32)


def start(key, optimizer, w=(0.5, -1.0, 2.0)):
    return TrainState.create(key, {"w": jnp.array(w)}, optimizer)


def gradient(w, batch):
    x, y = (np.asarray(a, np.float64) for a in batch)
    return 2 * x.T @ (x @ w - y) / len(y)


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_one_step_of_gradient_descent(key):
    optimizer = optax.sgd(0.1)
    state = start(key, optimizer)
    w = np.array([0.5, -1.0, 2.0])
    g = gradient(w, data())
    x, y = data()
    state, metrics = make_train_step(linear_loss, optimizer, clip=None)(state, data())
    np.testing.assert_allclose(state.params["w"], w - 0.1 * g, rtol=1e-6)
    np.testing.assert_allclose(metrics.loss, np.mean((x @ w - y) ** 2), rtol=1e-6)
    np.testing.assert_allclose(metrics.grad_norm, np.linalg.norm(g), rtol=1e-6)
    assert (int(state.step), int(state.examples), int(state.skipped)) == (1, N, 0)


def test_compiles_once(key):
    traces = []

    def loss(key, params, batch):
        traces.append(0)
        return linear_loss(key, params, batch)

    optimizer = optax.adamw(optax.warmup_constant_schedule(0.0, 1e-2, 3))
    step, state = make_train_step(loss, optimizer), start(key, optimizer)
    for seed in range(4):
        state, _ = step(state, data(seed))
    assert len(traces) == 1
    assert step._cache_size() == 1
    assert int(state.examples) == 4 * N


def test_the_state_is_donated_and_the_callers_parameters_live(key):
    optimizer = optax.adam(1e-2)
    own = {"w": jnp.ones((3,))}
    state = TrainState.create(key, own, optimizer)
    make_train_step(linear_loss, optimizer)(state, data())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.ema)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.opt_state))
    np.testing.assert_array_equal(own["w"], np.ones(3))
    jax.random.uniform(key)


@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulation_is_the_gradient_of_the_whole_batch(key, accumulate):
    optimizer = optax.sgd(0.1)
    whole, a = make_train_step(linear_loss, optimizer, clip=None)(start(key, optimizer), data())
    parts, b = make_train_step(linear_loss, optimizer, clip=None, accumulate=accumulate)(
        start(key, optimizer), data()
    )
    np.testing.assert_allclose(parts.params["w"], whole.params["w"], rtol=2e-6)
    np.testing.assert_allclose(b.loss, a.loss, rtol=2e-6)
    np.testing.assert_allclose(b.grad_norm, a.grad_norm, rtol=2e-6)
    assert int(parts.examples) == N


def test_accumulation_draws_anew_for_each_micro_batch(key):
    def loss(key, params, batch):
        noise = jax.random.normal(key, batch.shape)
        return noise * params["w"][0]

    optimizer = optax.sgd(1.0)
    state = start(key, optimizer)
    step = make_train_step(loss, optimizer, clip=None, accumulate=2)
    state, _ = step(state, jnp.zeros(N))
    at_step = jax.random.fold_in(key, 0)
    noise = [jax.random.normal(jax.random.fold_in(at_step, j), (N // 2,)) for j in range(2)]
    np.testing.assert_allclose(state.params["w"][0], 0.5 - np.mean(noise), rtol=1e-5)


def test_step_i_draws_from_the_key_folded_with_i(key):
    def loss(key, params, batch):
        return jax.random.uniform(key, batch.shape) + 0 * params["w"][0]

    optimizer = optax.sgd(0.1)
    step, state = make_train_step(loss, optimizer), start(key, optimizer)
    for i in range(3):
        state, metrics = step(state, jnp.zeros(N))
        expected = jnp.mean(jax.random.uniform(jax.random.fold_in(key, i), (N,)))
        np.testing.assert_allclose(metrics.loss, expected, rtol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_may_see_the_step(key, accumulate):
    def loss(key, params, batch, step):
        assert step.dtype == jnp.int32 and step.shape == ()
        return step.astype(jnp.float32) ** 2 * params["w"][0] + batch

    optimizer = optax.sgd(1.0)
    step = make_train_step(loss, optimizer, clip=None, accumulate=accumulate, pass_step=True)
    state = start(key, optimizer)
    for i in range(4):
        before = float(state.params["w"][0])
        state, metrics = step(state, jnp.zeros(N))
        np.testing.assert_allclose(metrics.grad_norm, i**2, rtol=1e-6)
        np.testing.assert_allclose(state.params["w"][0], before - i**2, rtol=1e-6)
    assert step._cache_size() == 1


def test_clipping_by_the_global_norm(key):
    optimizer = optax.sgd(1.0)
    w = np.array([0.5, -1.0, 2.0])
    g = gradient(w, data())
    for clip in (0.3, 1e6):
        state, metrics = make_train_step(linear_loss, optimizer, clip=clip)(
            start(key, optimizer), data()
        )
        moved = w - g * min(1.0, clip / np.linalg.norm(g))
        np.testing.assert_allclose(state.params["w"], moved, rtol=1e-5)
        np.testing.assert_allclose(metrics.grad_norm, np.linalg.norm(g), rtol=1e-6)


def test_a_gradient_of_zero_is_clipped_to_zero(key):
    optimizer = optax.sgd(1.0)
    step = make_train_step(lambda key, params, batch: 0 * params["w"][0] + batch, optimizer)
    state, metrics = step(start(key, optimizer), jnp.zeros(N))
    np.testing.assert_array_equal(state.params["w"], [0.5, -1.0, 2.0])
    assert int(metrics.skipped) == 0


def test_average_in_closed_form(key):
    # A constant gradient of one makes the parameter -lr k after k steps.
    rate, decay, steps = 0.1, 0.5, 30
    optimizer = optax.sgd(rate)
    step = make_train_step(
        lambda key, params, batch: params["w"] + batch, optimizer, ema=decay, clip=None
    )
    state = TrainState.create(key, {"w": jnp.zeros(())}, optimizer)
    average = 0.0
    for k in range(steps):
        state, _ = step(state, jnp.zeros(N))
        d = min(decay, (1 + k) / (10 + k))
        average = d * average + (1 - d) * (-rate * (k + 1))
        np.testing.assert_allclose(state.ema["w"], average, rtol=1e-5)
    # With the decay reached, the average lags by d / (1 - d) = 1 step.
    np.testing.assert_allclose(state.ema["w"] - state.params["w"], rate, rtol=1e-3)


def test_no_average_follows_the_parameters(key):
    optimizer = optax.sgd(0.1)
    state, _ = make_train_step(linear_loss, optimizer, ema=0.0)(start(key, optimizer), data())
    np.testing.assert_allclose(state.ema["w"], state.params["w"], rtol=1e-6)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32(key):
    seen = []

    def loss(key, params, batch):
        seen.append(params["w"].dtype)
        x, y = batch
        return (x.astype(params["w"].dtype) @ params["w"] - y.astype(params["w"].dtype)) ** 2

    optimizer = optax.adam(1e-2)
    step = make_train_step(loss, optimizer, dtype=jnp.bfloat16)
    state, metrics = step(start(key, optimizer), data())
    assert seen == [jnp.bfloat16]
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.ema))} == {
        jnp.dtype("float32")
    }
    assert state.opt_state[0].mu["w"].dtype == jnp.float32
    assert metrics.loss.dtype == metrics.grad_norm.dtype == jnp.float32
    exact = np.linalg.norm(gradient(np.array([0.5, -1.0, 2.0]), data()))
    # Rounding of 2^-9 in each of a handful of operations.
    np.testing.assert_allclose(metrics.grad_norm, exact, rtol=0.03)
    assert abs(float(metrics.grad_norm) - exact) > 1e-5 * exact


def test_small_updates_are_not_lost_to_bfloat16(key):
    # 1 + 1e-4 rounds to 1 in bfloat16: only a float32 master parameter can move.
    optimizer = optax.sgd(1e-4)
    step = make_train_step(
        lambda key, params, batch: params["w"] + batch.astype(params["w"].dtype),
        optimizer,
        dtype=jnp.bfloat16,
    )
    state = TrainState.create(key, {"w": jnp.ones(())}, optimizer)
    for _ in range(10):
        state, _ = step(state, jnp.zeros(N))
    np.testing.assert_allclose(state.params["w"], 1 - 1e-3, rtol=1e-6)


def test_losses_are_averaged_in_float32(key):
    # A mean of 4096 bfloat16 values kept in bfloat16 is off by parts in a hundred.
    values = jnp.linspace(0, 1, 4096).astype(jnp.bfloat16)
    optimizer = optax.sgd(0.1)
    step = make_train_step(lambda key, p, b: b + 0 * p["w"][0].astype(b.dtype), optimizer)
    _, metrics = step(start(key, optimizer), values)
    np.testing.assert_allclose(metrics.loss, np.mean(np.asarray(values, np.float64)), rtol=1e-6)


@pytest.mark.parametrize("kind", ["nan loss", "infinite gradient"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_bad_steps_change_nothing_and_are_counted(key, kind, accumulate):
    def loss(key, params, batch):
        if kind == "nan loss":
            return linear_loss(key, params, (jnp.ones((N // accumulate, 3)), batch))
        # The square root of zero is finite, its slope is not.
        slope = jnp.where(jnp.isnan(batch), 0.0, 1.0)
        return jnp.sqrt(jnp.abs(params["w"][0]) * slope)

    optimizer = optax.adam(1e-2)
    step, state = make_train_step(loss, optimizer, accumulate=accumulate), start(key, optimizer)
    good, bad = np.ones(N, np.float32), np.full(N, np.nan, np.float32)
    state, _ = step(state, good)
    before = jax.tree.map(np.array, (state.params, state.ema, state.opt_state))
    for i in range(1, 4):
        state, metrics = step(state, bad)
        assert (int(metrics.skipped), int(metrics.skipped_in_a_row)) == (i, i)
    assert_same_bits((state.params, state.ema, state.opt_state), before)
    assert (int(state.step), int(state.examples)) == (4, 4 * N)
    state, metrics = step(state, good)
    assert (int(metrics.skipped), int(metrics.skipped_in_a_row)) == (3, 0)
    assert not np.array_equal(state.params["w"], before[0]["w"])


def test_one_nan_in_a_batch_is_enough(key):
    optimizer = optax.sgd(0.1)
    x, y = data()
    y[3] = np.nan
    state, metrics = make_train_step(linear_loss, optimizer)(start(key, optimizer), (x, y))
    assert int(metrics.skipped) == 1
    np.testing.assert_array_equal(state.params["w"], [0.5, -1.0, 2.0])


def test_keys_in_the_optimiser_state(key):
    optimizer = optax.chain(optax.add_noise(0.1, 0.55, key=1), optax.sgd(0.1))
    step, state = make_train_step(linear_loss, optimizer), start(key, optimizer)
    before = np.array(jax.random.key_data(state.opt_state[0].rng_key))
    x, y = data()
    state, _ = step(state, (x * np.nan, y))
    np.testing.assert_array_equal(jax.random.key_data(state.opt_state[0].rng_key), before)
    state, _ = step(state, (x, y))
    assert not np.array_equal(jax.random.key_data(state.opt_state[0].rng_key), before)


def test_runs_inside_scan(key):
    optimizer = optax.sgd(0.1)
    step = make_train_step(linear_loss, optimizer)
    batches = jax.tree.map(lambda *xs: jnp.stack(xs), *(data(i) for i in range(3)))
    scanned, metrics = jax.jit(lambda s: jax.lax.scan(step, s, batches))(start(key, optimizer))
    state = start(key, optimizer)
    for i in range(3):
        state, _ = step(state, data(i))
    np.testing.assert_allclose(scanned.params["w"], state.params["w"], rtol=1e-6)
    assert metrics.loss.shape == (3,)


def test_float64(key):
    with jax.enable_x64(True):
        optimizer = optax.sgd(0.1)
        state = TrainState.create(key, {"w": jnp.array([0.5, -1.0, 2.0])}, optimizer)
        batch = tuple(a.astype(np.float64) for a in data())
        step = make_train_step(linear_loss, optimizer, clip=None, accumulate=2)
        state, metrics = step(state, batch)
        w = np.array([0.5, -1.0, 2.0])
        np.testing.assert_allclose(state.params["w"], w - 0.1 * gradient(w, batch), rtol=1e-14)
        assert metrics.loss.dtype == jnp.float64


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"ema": 1.0}, "ema is 1.0"),
        ({"ema": -0.1}, "ema"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"clip": float("nan")}, "clip"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"dtype": jnp.int32}, "dtype"),
    ],
)
def test_bad_arguments(bad, match):
    with pytest.raises(ValueError, match=match):
        make_train_step(linear_loss, optax.sgd(0.1), **bad)


def test_bad_batches_and_losses(key):
    optimizer = optax.sgd(0.1)
    x, y = data()
    with pytest.raises(ValueError, match="agree in axis 0"):
        make_train_step(linear_loss, optimizer)(start(key, optimizer), (x, y[:4]))
    with pytest.raises(ValueError, match="accumulate is 3, which does not divide the batch of 8"):
        make_train_step(linear_loss, optimizer, accumulate=3)(start(key, optimizer), (x, y))
    mean = make_train_step(lambda k, p, b: jnp.mean(linear_loss(k, p, b)), optimizer)
    with pytest.raises(ValueError, match=r"shape \(\).*\(8,\)"):
        mean(start(key, optimizer), (x, y))
