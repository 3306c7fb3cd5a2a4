"""Modules of Flax, NNX and Equinox in a pool, and layers with a pool of their own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxgen import share

X = jax.random.normal(jax.random.key(9), (16, 24))
TARGET = jnp.sin(3 * X[:, :3])


def close(found, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        found,
        expected,
    )


def falls(losses, share_of_first=0.7):
    losses = np.asarray(losses)
    assert np.all(np.isfinite(losses)) and losses[-1] < share_of_first * losses[0], losses


# --- linen ------------------------------------------------------------------------------------


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(20)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(3)(x)


@pytest.fixture(scope="module")
def linen():
    net = share.SharedModule(Net(), 0.25, {"seed": 3})
    return net, jax.jit(net.init)(jax.random.key(0), X), net.plan(X)


def test_a_linen_module_holds_a_pool_and_what_passes_through(linen):
    net, variables, layout = linen
    shared = variables["params"]["shared"]
    assert layout.seed == 3 and layout.m == round(0.25 * (24 * 20 + 20 * 3)) == 135
    assert shared.pool.shape == (135,) and abs(float(shared.pool.std()) / 0.04 - 1) < 0.3
    assert set(shared.rest) == {
        "BatchNorm_0/bias", "BatchNorm_0/scale", "Dense_0/bias", "Dense_1/bias"
    }  # fmt: skip
    np.testing.assert_array_equal(shared.rest["BatchNorm_0/scale"], np.ones(20))
    # Shapes alone are enough, as for every linen module.
    shapes = jax.eval_shape(net.init, jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)


def test_a_linen_module_is_the_module_of_the_expanded_parameters(linen):
    net, variables, layout = linen
    shared, stats = variables["params"]["shared"], variables["batch_stats"]["inner"]
    rngs = {"dropout": jax.random.key(4)}

    def inner(params, x, stats, train):
        return Net().apply(
            {"params": params, "batch_stats": stats}, x, train, rngs=rngs,
            mutable=["batch_stats"] if train else False,
        )  # fmt: skip

    def outer(shared, x, stats, train):
        return net.apply(
            {"params": {"shared": shared}, "batch_stats": {"inner": stats}}, x, train, rngs=rngs,
            mutable=["batch_stats"] if train else False,
        )  # fmt: skip

    plain = share.shared_apply(inner, layout)

    @jax.jit
    def both(shared, stats):
        def loss(f, shared):
            return (f(shared, X, stats, False) ** 2).sum()

        return [
            (f(shared, X, stats, False), f(shared, X, stats, True)[1], jax.grad(loss, 1)(f, shared))
            for f in (outer, plain)
        ]

    (y, new, grad), (y_plain, new_plain, grad_plain) = both(shared, stats)
    np.testing.assert_array_equal(y, y_plain)
    close(new["batch_stats"]["inner"], new_plain["batch_stats"])
    assert np.any(new["batch_stats"]["inner"]["BatchNorm_0"]["mean"] != 0)
    close(grad, grad_plain)
    assert np.any(grad.rest["Dense_1/bias"] != 0) and np.all(grad.pool != 0)
    by_hand = Net().apply({"params": share.expand(shared, layout), "batch_stats": stats}, X)
    close(y, by_hand)


def test_dropout_in_a_linen_module_follows_its_key(linen):
    net, variables, _ = linen
    apply = jax.jit(
        lambda key: net.apply(
            variables, X, True, rngs={"dropout": key}, mutable=["batch_stats"]
        )[0]
    )  # fmt: skip
    first, again, other = (apply(jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.mean(first != other) > 0.9


def test_a_linen_module_trains(linen):
    net, variables, layout = linen
    rule = optax.chain(share.scale_by_pool(layout), optax.sgd(0.02, momentum=0.9))

    @jax.jit
    def train(variables):
        def step(carry, key):
            params, stats, state = carry

            def loss(params):
                y, new = net.apply(
                    {"params": params, "batch_stats": stats}, X, True,
                    rngs={"dropout": key}, mutable=["batch_stats"],
                )  # fmt: skip
                return ((y - TARGET) ** 2).mean(), new["batch_stats"]

            (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
            updates, state = rule.update(grads, state, params)
            return (optax.apply_updates(params, updates), stats, state), value

        params = variables["params"]
        start = params, variables["batch_stats"], rule.init(params)
        return jax.lax.scan(step, start, jax.random.split(jax.random.key(0), 60))

    (params, stats, state), losses = train(variables)
    falls(losses)
    # Pool, moments and divisor have the budget's size; no leaf has the weights'.
    assert max(leaf.size for leaf in jax.tree.leaves((params, stats, state))) == layout.m


def test_a_linen_module_may_be_initialised_in_training_mode():
    shared_net = share.SharedModule(Net(), 0.25)
    key = jax.random.key(0)
    for rngs in (key, {"params": key, "dropout": key}):
        close(shared_net.init(rngs, X, train=True), shared_net.init(key, X))


# --- NNX --------------------------------------------------------------------------------------


def nnx_net():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        nnx.Linear(24, 20, rngs=rngs), nnx.BatchNorm(20, rngs=rngs), nnx.relu,
        nnx.Dropout(0.2, rngs=rngs), nnx.Linear(20, 3, rngs=rngs),
    )  # fmt: skip


def test_an_nnx_module_is_the_module_of_the_expanded_parameters():
    net = nnx_net()
    net.eval()
    graph, params, others = nnx.split(net, nnx.Param, ...)
    shared_net = share.SharedNNX(net, 0.25, rngs=nnx.Rngs(1), seed=3)
    rest = {name: value.get_value() for name, value in shared_net.rest.items()}
    shared = share.Shared(shared_net.pool.get_value(), rest)
    assert shared.pool.shape == (135,) and shared_net.layout.seed == 3
    assert set(rest) == {"layers/0/bias", "layers/1/bias", "layers/1/scale", "layers/4/bias"}
    # Scales are measured on the module's own parameters.
    kernel = nnx.to_pure_dict(params)["layers"][0]["kernel"]
    spec = share.leaf(shared_net.layout, "layers/0/kernel")
    assert spec.scale * 0.04 == pytest.approx(float(np.std(kernel)), rel=1e-5)

    def inner(params, x):
        return nnx.merge(graph, nnx.State(params), others)(x)

    plain = share.shared_apply(inner, shared_net.layout)

    @nnx.jit
    def gradient(module):
        return module(X), nnx.grad(lambda module: (module(X) ** 2).sum())(module)

    y, grad = gradient(shared_net)
    y_plain, grad_plain = jax.jit(
        lambda s: (plain(s, X), jax.grad(lambda s: (plain(s, X) ** 2).sum())(s))
    )(shared)
    close(y, y_plain)
    found = nnx.to_pure_dict(grad)
    close(
        {k: found[k] for k in ("pool", "rest")}, {"pool": grad_plain.pool, "rest": grad_plain.rest}
    )
    # The wrapped module keeps a scalar for each parameter, which nothing depends on.
    assert all(leaf.shape == () and leaf == 0 for leaf in jax.tree.leaves(found["module"]))


def test_an_nnx_module_is_switched_between_training_and_evaluation():
    net = share.SharedNNX(nnx_net(), 0.25, rngs=nnx.Rngs(1))
    assert not np.array_equal(net(X), net(X)), "dropout is on"
    net.eval()
    before = nnx.to_pure_dict(nnx.state(net, nnx.BatchStat))
    np.testing.assert_array_equal(net(X), net(X))
    close(nnx.to_pure_dict(nnx.state(net, nnx.BatchStat)), before)
    net.train()
    assert not np.array_equal(net(X), net(X))


def test_an_nnx_module_trains_and_keeps_its_statistics():
    net = share.SharedNNX(nnx_net(), 0.25, rngs=nnx.Rngs(1))
    rule = optax.chain(share.scale_by_pool(net.layout), optax.sgd(0.02, momentum=0.9))
    optimizer = nnx.Optimizer(net, rule, wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer):
        value, grads = nnx.value_and_grad(lambda net: ((net(X) - TARGET) ** 2).mean())(net)
        optimizer.update(net, grads)
        return value

    def statistics():
        return nnx.to_pure_dict(nnx.state(net, nnx.BatchStat))["module"]["layers"][1]

    before = statistics()
    keys = [nnx.to_pure_dict(nnx.state(net, nnx.RngCount))]
    falls([step(net, optimizer) for _ in range(60)])
    # Sixty times 0.99 of the old: the running mean has gone some of the way.
    assert np.all(before["mean"] == 0) and np.any(np.abs(statistics()["mean"]) > 0.01)
    keys.append(nnx.to_pure_dict(nnx.state(net, nnx.RngCount)))
    assert keys[0] != keys[1], "dropout drew the same mask in every step"
    largest = max(leaf.size for leaf in jax.tree.leaves(nnx.state((net, optimizer))))
    assert largest == net.layout.m


# --- any callable -----------------------------------------------------------------------------


def two_layers(w, b, v, x):
    return jnp.tanh(x @ w + jnp.broadcast_to(b, (*x.shape[:-1], 20))) @ v


def partial_model():
    keys = jax.random.split(jax.random.key(1), 2)
    w = jax.random.normal(keys[0], (24, 20)) * 24**-0.5
    v = jax.random.normal(keys[1], (20, 3)) * 20**-0.5
    return jax.tree_util.Partial(two_layers, w, jnp.zeros(20), v)


def equinox_model():
    eqx = pytest.importorskip("equinox")
    return eqx.nn.MLP(24, 3, 20, 1, key=jax.random.key(1))


@pytest.mark.parametrize("make", [partial_model, equinox_model])
def test_a_callable_in_a_pool(make):
    model = make()
    shared = share.share_callable(jax.random.key(0), model, 0.25, seed=3)
    assert shared.shared.pool.shape == (135,) and shared.layout.seed == 3
    whole = shared.expand()
    assert jax.tree.structure(whole) == jax.tree.structure(model) and type(whole) is type(model)

    def loss(model):
        return ((jax.vmap(model)(X) - TARGET) ** 2).mean()

    arrays = {
        name: leaf
        for name, leaf in (
            (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
            for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]
        )
        if isinstance(leaf, jax.Array)
    }
    assert all(leaf is arrays[name] for name, leaf in shared.shared.rest.items())
    assert sum(leaf.size for leaf in jax.tree.leaves(shared)) == 135 + sum(
        leaf.size for leaf in arrays.values() if leaf.ndim == 1
    )
    order = list(arrays)

    def apply(named):
        leaves = iter([named[name] for name in order])
        filled = [next(leaves) if isinstance(x, jax.Array) else x for x in jax.tree.leaves(model)]
        return loss(jax.tree.unflatten(jax.tree.structure(model), filled))

    plain = share.shared_apply(apply, shared.layout)
    rule = optax.chain(share.scale_by_pool(shared.layout), optax.sgd(0.05, momentum=0.9))

    @jax.jit
    def run(shared):
        def step(carry, _):
            shared, state = carry
            value, grads = jax.value_and_grad(loss)(shared)
            updates, state = rule.update(grads, state)
            return (optax.apply_updates(shared, updates), state), value

        first = jax.value_and_grad(loss)(shared)
        alone = jax.value_and_grad(plain)(shared.shared)
        return first, alone, jax.lax.scan(step, (shared, rule.init(shared)), length=100)[1]

    (value, grads), (value_plain, grads_plain), losses = run(shared)
    assert float(value) == float(value_plain)
    close(grads.shared, grads_plain)
    falls(losses)
    # The whole model, called from outside, is the same function.
    assert float(loss(whole)) == pytest.approx(float(value), rel=1e-5)


def test_a_callable_of_equinox_goes_through_its_filters():
    eqx = pytest.importorskip("equinox")
    shared = share.share_callable(jax.random.key(0), equinox_model(), 0.25)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(model):
        return (jax.vmap(model)(X) ** 2).sum()

    grads = gradient(shared)
    assert grads.shared.pool.shape == (135,) and bool(jnp.all(jnp.isfinite(grads.shared.pool)))


# --- layers -----------------------------------------------------------------------------------

SCHEMES = ("stable", "roast", "hashednet")


def kernel_of(variables, shape, scheme="stable", tile=None, name="kernel"):
    """The kernel that a layer's pool makes, through ``plan`` as a user would."""
    pool = variables["params"]["pool"]
    layout = share.plan(
        {name: jax.ShapeDtypeStruct(shape, pool.dtype)},
        pool.size, scheme=scheme, tile=tile, scale={name: 1.0}, pool_std=1.0,
    )  # fmt: skip
    return share.expand_leaf(pool, layout.leaves[0])


@pytest.mark.parametrize(
    ("scheme", "tile", "implementation"),
    [(s, None, None) for s in SCHEMES] + [("stable", (4, 8), "xla"), ("stable", None, "xla_loop")],
)
def test_dense(scheme, tile, implementation):
    layer = share.HashedDense(
        32, budget=256, scheme=scheme, tile=tile, implementation=implementation,
        bias_init=nn.initializers.normal(1.0),
    )  # fmt: skip
    variables = layer.init(jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, variables["params"]) == {"pool": (256,), "bias": (32,)}
    # The deviation of nn.Dense's kernel, to 1 / sqrt(512).
    assert abs(float(variables["params"]["pool"].std()) * 24**0.5 - 1) < 4 / 512**0.5
    weight = kernel_of(variables, (24, 32), scheme, tile)
    x = X.reshape(2, 8, 24)
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
    y = jax.jit(layer.apply)(variables, x)
    close(y, expected + np.asarray(variables["params"]["bias"]))


def test_dense_options():
    layer = share.HashedDense(8, 0.5, use_bias=False, dtype=jnp.bfloat16, hash_seed=1)
    variables = layer.init(jax.random.key(0), X)
    assert variables["params"]["pool"].dtype == jnp.float32 and len(variables["params"]) == 1
    assert layer.apply(variables, X).dtype == jnp.bfloat16
    other = share.HashedDense(8, 0.5, use_bias=False, dtype=jnp.bfloat16)
    assert np.any(other.apply(variables, X) != layer.apply(variables, X))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_embedding(scheme):
    layer = share.HashedEmbed(50, 16, budget=200, scheme=scheme)
    ids = jnp.array([[0, 49, 7], [7, -1, 50]])
    variables = layer.init(jax.random.key(0), ids)
    table = np.asarray(kernel_of(variables, (50, 16), scheme, name="table"))
    assert abs(table.std() * 4 - 1) < 4 / 400**0.5
    rows = np.asarray(jax.jit(layer.apply)(variables, ids))
    np.testing.assert_array_equal(rows[:, :1], table[ids[:, :1]])
    np.testing.assert_array_equal(rows[0], table[[0, 49, 7]])
    assert np.all(np.isnan(rows[1, 1:]))
    query = jax.random.normal(jax.random.key(1), (2, 16))
    close(layer.apply(variables, query, method="attend"), np.asarray(query) @ table.T)
    # An index of eight bits, which the number of rows does not fit.
    wide = share.HashedEmbed(300, 16, budget=200, scheme=scheme)
    np.testing.assert_array_equal(
        wide.apply(variables, jnp.uint8([0, 255])), wide.apply(variables, jnp.array([0, 255]))
    )
    with pytest.raises(TypeError, match="ids has dtype float32; expected integers"):
        layer.apply(variables, query)


def test_a_table_past_the_words_of_the_hash_is_refused():
    layer = share.HashedEmbed(2**24, 2**9, budget=100)
    with pytest.raises(ValueError, match="the table has 8589934592 entries; expected at most 2"):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.array([1]))


def test_embedding_gradient_reaches_the_rows_that_were_looked_up():
    layer = share.HashedEmbed(50, 16, budget=1.0)
    ids = jnp.array([3, 3, 8])
    variables = layer.init(jax.random.key(0), ids)
    grad = jax.jit(jax.grad(lambda v: (layer.apply(v, ids) ** 2).sum()))(variables)
    table, moved = (np.asarray(kernel_of(v, (50, 16), name="table")) for v in (variables, grad))
    expected = np.zeros_like(table)
    expected[3], expected[8] = 4 * table[3], 2 * table[8]
    close(moved, expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_convolution(scheme):
    options = {"strides": (2, 1), "padding": "VALID", "kernel_dilation": 2}
    if scheme == "stable":
        options = {"feature_group_count": 2, "padding": "CIRCULAR", "use_bias": False}
    layer = share.HashedConv(6, (3, 2), budget=40, scheme=scheme, **options)
    x = jax.random.normal(jax.random.key(1), (2, 9, 7, 4))
    variables = layer.init(jax.random.key(0), x)
    shape = (3, 2, 4 // options.get("feature_group_count", 1), 6)
    kernel = kernel_of(variables, shape, scheme)
    params = {"kernel": kernel}
    if "bias" in variables["params"]:
        params["bias"] = jnp.zeros(6)
        assert variables["params"]["bias"].shape == (6,)
    expected = nn.Conv(6, (3, 2), **options).apply({"params": params}, x)
    close(jax.jit(layer.apply)(variables, x), expected)
    fan_in = shape[0] * shape[1] * shape[2]
    assert abs(float(variables["params"]["pool"].std()) * fan_in**0.5 - 1) < 4 / 80**0.5
