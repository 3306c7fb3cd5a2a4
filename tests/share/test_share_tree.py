"""The gradient scaler: its modes against a dense A, and what it does to training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import share

MODES = ("v1", "v2", "v3", "v4", "v5", "mean")


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def flat(tree):
    return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree)])


def theta(pool, layout):
    return flat(share.expand(share.Shared(pool, {}), layout))


def dense(layout):
    """A of a layout, ``(n, m)``, by unit pools."""
    eye = jnp.eye(layout.m, dtype=jnp.float64 if jax.config.jax_enable_x64 else jnp.float32)
    return np.asarray(jax.jit(jax.vmap(lambda e: theta(e, layout)))(eye), np.float64).T


# --- a quadratic ---------------------------------------------------------------------

N, M, STEPS = 4096, 512, 400
STD = {"a": 0.02, "b": 0.2}


@pytest.fixture(scope="module")
def descend():
    """Gradient descent on 1/2 sum H (theta - t)^2 in float64: ``f(pool_std, mode, eta)``."""
    rng = np.random.default_rng(0)
    hessian = rng.uniform(0.1, 1.0, N)
    target = rng.normal(size=N) * np.repeat([0.02, 0.2], N // 2)
    start = rng.normal(size=M)

    @functools.cache
    def program(pool_std):
        layout = share.plan({k: shape(32, 64) for k in STD}, M, scale=STD, pool_std=pool_std)

        def loss(shared):
            return 0.5 * jnp.sum(hessian * (theta(shared.pool, layout) - target) ** 2)

        @jax.jit
        def go(shared, state, eta):
            rule = optax.chain(share.scale_by_pool(layout), optax.sgd(eta))

            def step(carry, _):
                shared, state = carry
                updates, state = rule.update(jax.grad(loss)(shared), state)
                return (optax.apply_updates(shared, updates), state), None

            shared = jax.lax.scan(step, (shared, state), None, length=STEPS)[0][0]
            return theta(shared.pool, layout), loss(shared)

        return layout, go

    def run(pool_std, mode, eta):
        with jax.enable_x64(True):
            layout, go = program(pool_std)
            shared = share.Shared(start * pool_std, {})
            state = optax.chain(share.scale_by_pool(layout, mode or "v5"), optax.sgd(eta)).init(
                shared
            )
            if mode is None:
                state = jax.tree.map(jnp.ones_like, state)
            return jax.tree.map(np.asarray, go(shared, state, eta))

    def best():
        with jax.enable_x64(True):
            a = dense(program(0.04)[0])
        root = np.sqrt(hessian)
        pool = np.linalg.lstsq(root[:, None] * a, root * target, rcond=None)[0]
        return 0.5 * np.sum(hessian * (a @ pool - target) ** 2)

    return run, best()


@pytest.mark.parametrize("eta", [1.0, 1.9])
def test_v5_ends_at_the_optimum_whatever_the_deviation_of_the_pool(descend, eta):
    run, best = descend
    ends = [run(pool_std, "v5", eta) for pool_std in (0.004, 0.04, 0.4)]
    for end, loss in ends:
        assert np.abs(end - ends[0][0]).max() < 1e-12
        assert loss == pytest.approx(best, rel=1e-12)
    # In that draw, and far below what the target weighs.
    assert 10 < best < 25


def test_other_scalers_diverge(descend):
    run, best = descend
    for mode in (None, "v2", "v3"):
        assert not np.isfinite(run(0.004, mode, 1.0)[1]), mode
    # v1 is within the bound at 1.0 and beyond it at 1.5, where two scales share a slot.
    assert run(0.04, "v1", 1.0)[1] == pytest.approx(best, rel=1e-6)
    assert not run(0.04, "v1", 1.5)[1] < 1e6 * best


# --- the modes --------------------------------------------------------------------------------

LAYOUTS = {
    "one scale": share.plan({"a": shape(9, 7)}, 20, scale={"a": 0.3}),
    "mixed": share.plan({"a": shape(9, 7), "b": shape(2, 3, 5)}, 20, scale={"a": 0.3, "b": 2.0}),
    "tiles": share.plan({"a": shape(9, 7)}, 24, scale={"a": 0.3}, tile=(2, 4)),
    # 2^6 weights in 60 slots: some have none.
    "hashednet": share.plan({"a": shape(8, 8)}, 60, scheme="hashednet", scale={"a": 0.3}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_modes_against_the_matrix(name):
    layout = LAYOUTS[name]
    a = np.abs(dense(layout))
    count, first, second = (a > 0).sum(0), a.sum(0), (a**2).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = {
            "v1": first**2 / count,
            "v2": first,
            "v3": first / count,
            "v4": np.sqrt(second),
            "v5": second,
            "mean": second / count,
        }
    found = jax.jit(lambda: {mode: share.pool_scale(layout, mode) for mode in MODES})()
    assert (name == "hashednet") == bool(np.any(count == 0))
    for mode in MODES:
        assert found[mode].shape == (layout.m,) and found[mode].dtype == jnp.float32
        np.testing.assert_allclose(found[mode], np.where(count == 0, 1, expected[mode]), rtol=1e-5)
    # Cauchy-Schwarz, with equality where a slot has one scale.
    if name == "mixed":
        assert np.any(found["v1"] < 0.99 * found["v5"])
        assert np.all(found["v1"] <= found["v5"] * (1 + 1e-5))
    else:
        np.testing.assert_allclose(found["v1"], found["v5"], rtol=1e-5)


# --- the transform ----------------------------------------------------------------------------

MIXED = LAYOUTS["mixed"]


def test_the_pool_is_divided_and_all_else_left_alone():
    rule = share.scale_by_pool(MIXED, "v2", 0.5)
    shared = share.Shared(jnp.ones(20), {"bias": jnp.ones(20), "pool": jnp.ones(3)})
    state = rule.init(shared)
    updates, after = rule.update(shared, state)
    expected = np.asarray(share.pool_scale(MIXED, "v2")) ** -0.5
    np.testing.assert_allclose(updates.pool, expected, rtol=1e-6)
    assert updates.rest["bias"] is shared.rest["bias"] and after is state
    # Wherever the pool stands, and in its dtype.
    tree = {"net": {"shared": shared._replace(pool=jnp.ones(20, jnp.bfloat16))}, "lr": jnp.ones(())}
    updates, _ = rule.update(tree, rule.init(tree))
    pool = updates["net"]["shared"].pool
    assert pool.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(pool, np.float32), expected, rtol=2**-7)


def test_decay_of_the_pool_is_decay_of_the_weights():
    rule = optax.chain(
        share.scale_by_pool(MIXED), optax.add_decayed_weights(0.2), optax.scale(-0.1)
    )
    shared = share.init(jax.random.key(0), MIXED)
    gradient = shared._replace(pool=jnp.linspace(-1, 1, 20))

    @jax.jit
    def step(shared):
        updates, _ = rule.update(gradient, rule.init(shared), shared)
        return optax.apply_updates(shared, updates)

    a = dense(MIXED)
    projected = a @ (np.asarray(gradient.pool) / (a**2).sum(0))
    expected = (1 - 0.1 * 0.2) * (a @ np.asarray(shared.pool)) - 0.1 * projected
    np.testing.assert_allclose(theta(step(shared).pool, MIXED), expected, rtol=1e-4, atol=1e-6)


def test_an_average_of_pools_is_the_average_of_the_weights():
    pools = jax.random.normal(jax.random.key(0), (4, 20))
    rule = optax.ema(0.7)
    state = rule.init(share.Shared(pools[0], {}))
    by_hand = np.zeros(MIXED.n)
    for pool in pools:
        average, state = rule.update(share.Shared(pool, {}), state)
        by_hand = 0.7 * by_hand + 0.3 * np.asarray(theta(pool, MIXED))
    expected = by_hand / (1 - 0.7**4)
    np.testing.assert_allclose(theta(average.pool, MIXED), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["one scale", "mixed"])
def test_after_adam_each_weight_moves_by_its_rate(name):
    """The first step of Adam is the learning rate in every slot, whatever lambda is."""
    layout, lr = LAYOUTS[name], 1e-3
    rule = optax.chain(optax.adam(lr), share.scale_by_pool(layout, "mean", 0.5))
    shared = share.init(jax.random.key(0), layout)
    gradient = jax.tree.map(lambda p: 1e4 * jnp.sign(p) + p, shared)
    updates, _ = rule.update(gradient, rule.init(shared), shared)
    moved = np.abs(dense(layout)) * np.abs(np.asarray(updates.pool))
    weights = moved.sum(1)
    if name == "one scale":
        np.testing.assert_allclose(weights, lr, rtol=1e-4)
    # With two scales in a slot it is the mean square of its weights' moves.
    mean_square = (moved**2).sum(0) / (moved > 0).sum(0)
    np.testing.assert_allclose(np.sqrt(mean_square), lr, rtol=1e-4)


def test_an_apply_function_of_shared_parameters():
    params = {"a": np.ones((9, 7)), "b": np.arange(7.0)}
    layout = share.plan(params, 20, scale="flax")
    shared = share.init(jax.random.key(0), layout, params)
    applied = share.shared_apply(lambda p, x, *, power: (x @ p["a"] + p["b"]) ** power, layout)
    x = jax.random.normal(jax.random.key(1), (9,))
    weight = share.expand(shared, layout)["a"]
    np.testing.assert_allclose(
        applied(shared, x, power=2), (x @ weight + params["b"]) ** 2, rtol=1e-5
    )


def test_bad_input_is_named():
    for call in (
        lambda: share.pool_scale(MIXED, "v6"),
        lambda: share.scale_by_pool(MIXED, "v6"),
    ):
        with pytest.raises(ValueError, match="mode is 'v6'; expected one of v1, v2, v3, v4, v5"):
            call()
    rule = share.scale_by_pool(MIXED)
    state = rule.init(share.Shared(jnp.ones(20), {}))
    expected = r"expected one pool of shape \(20,\) in the tree; found "
    for tree, found in (
        ({"kernel": jnp.ones(20)}, "none"),
        (share.Shared(jnp.ones(19), {}), r"pool of shape \(19,\)"),
        ([share.Shared(jnp.ones(20), {})] * 2, r"0/pool of shape \(20,\), 1/pool of shape"),
    ):
        with pytest.raises(ValueError, match=expected + found):
            rule.init(tree)
        with pytest.raises(ValueError, match=expected + found):
            rule.update(tree, state)


@pytest.mark.parametrize(
    "options", [{"scheme": "hashednet"}, {"scheme": "roast"}, {"tile": (8, 128)}]
)
def test_the_divisor_is_found_without_an_array_of_the_weights_size(options):
    shapes = {"w": jax.ShapeDtypeStruct((2047, 1000), jnp.float32)}
    layout = share.plan(shapes, 2**13, **options)
    program = jax.jit(lambda: share.pool_scale(layout, "v5")).lower().compile()
    assert program.memory_analysis().temp_size_in_bytes < layout.n
    count = share.pool_scale(layout, "v5") / layout.leaves[0].scale ** 2
    assert float(jnp.sum(count)) == pytest.approx(layout.n, rel=1e-5), "padding is not counted"
