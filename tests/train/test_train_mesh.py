"""Meshes: the same run on one and on eight virtual devices, however they are laid out."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgen import share, train
from jaxgen.core import keys
from jaxgen.train.mesh import (
    RULES,
    gather,
    make_mesh,
    parse_rules,
    place,
    shard_batch,
    state_shardings,
)

BATCH, WIDTH, WIDE, STEPS = 16, 16, 64, 100


def init(key, width=WIDTH):
    a, b = jax.random.split(key)
    params = {
        "a": jax.random.normal(a, (3, width)) / 2,
        "b": jax.random.normal(b, (width, 2)) / width**0.5,
    }
    if width >= WIDE:
        params["c"] = jax.random.normal(jax.random.key(5), (width, width)) / width**0.5
    return params


def network(params, x, t):
    hidden = jnp.tanh(jnp.concatenate([x, t[:, None]], axis=1) @ params["a"])
    if "c" in params:
        hidden = jnp.tanh(hidden @ params["c"])
    return hidden @ params["b"]


def loss_fn(key, params, x0):
    """Noise prediction with times and noise drawn per example."""
    time_key, noise_key = jax.random.split(key)
    t = keys.uniform(time_key, x0.shape[:1], x0.dtype, event_ndim=0)
    noise = keys.normal(noise_key, x0.shape, x0.dtype)
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
    # The average lies elsewhere than the parameters that it is of.
    state = place(state, mesh, ["^(params|opt_state/0/mu)/a$=-,data"])
    for i in range(2):
        state, metrics = STEP(state, train.shard_batch(batch(i), mesh))
        np.testing.assert_allclose(metrics.loss, single[1][i], rtol=1e-5)
    for leaf in (state.params["a"], state.opt_state[0].mu["a"]):
        assert leaf.sharding.is_equivalent_to(rows, 2)
    for leaf in (state.ema["a"], state.opt_state[0].nu["a"]):
        assert leaf.sharding.is_fully_replicated


# --- meshes in words, and rules -------------------------------------------------------------------


def shapes(width=WIDE):
    params = {"Dense_0": {"kernel": jnp.zeros((16, width)), "bias": jnp.zeros(width)}}
    make = lambda: train.TrainState.create(  # noqa: E731
        jax.random.key(0), {"net": params, "pool": jnp.zeros(4096)}, OPTIMIZER
    )
    return jax.eval_shape(make)


def specs_of(mesh, rules=RULES):
    found = state_shardings(shapes(), mesh, rules)
    flat = jax.tree_util.tree_leaves_with_path(found)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): s.spec for p, s in flat}


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        ("data=8", {"data": 8}),
        ("data=4,fsdp=2", {"data": 4, "fsdp": 2}),
        ("fsdp=-1", {"fsdp": 8}),
        (" data=2, fsdp=-1 ,model=2", {"data": 2, "fsdp": 2, "model": 2}),
    ],
)
def test_a_mesh_in_words(words, sizes):
    mesh = make_mesh(words)
    assert dict(mesh.shape) == sizes and list(mesh.shape) == list(sizes)
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert set(make_mesh(words, axis_types="explicit").axis_types) == {AxisType.Explicit}
    batches = sizes.get("data", 1) * sizes.get("fsdp", 1)
    x = shard_batch(np.arange(8.0), mesh)
    assert {s.data.shape for s in x.addressable_shards} == {(8 // batches,)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data=3", "multiplies to 3, and there are 8 devices"),
        ("data=3,fsdp=-1", "expected sizes that divide 8"),
        ("data=-1,fsdp=-1", "sizes of data and fsdp open"),
        ("data=0", "no device"),
        ("data=4,data=2", "twice"),
        ("8", "expected name=size"),
        ("data=8,", "expected name=size"),
        ("data=-2", "expected name=size"),
        ("", "expected name=size"),
    ],
)
def test_a_mesh_that_cannot_be(words, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(words)


def test_a_mesh_of_some_devices():
    assert make_mesh("data=-1", jax.devices()[:3]).devices.size == 3
    with pytest.raises(ValueError, match="axis_types is 'manual'"):
        make_mesh("data=8", axis_types="manual")


def test_the_default_rules_split_what_mirrors_the_parameters():
    found = specs_of(make_mesh("data=4,fsdp=2"))
    kernel, pool = "net/Dense_0/kernel", "pool"
    for part in ("params", "ema", "opt_state/0/mu", "opt_state/0/nu"):
        assert found.pop(f"{part}/{kernel}") == PartitionSpec(None, "fsdp")
        assert found.pop(f"{part}/{pool}") == PartitionSpec("fsdp")
    assert set(found.values()) == {PartitionSpec()}  # small leaves and counters
    assert set(specs_of(make_mesh("data=8")).values()) == {PartitionSpec()}
    # 3 divides no axis.
    assert set(specs_of(make_mesh("fsdp=-1", jax.devices()[:3])).values()) == {PartitionSpec()}


def test_rules_of_the_user_come_first():
    mesh = make_mesh("data=4,fsdp=2")
    words = ["^params/pool=replicate", "pool=data+fsdp", "bias=largest:fsdp", "kernel=fsdp"]
    assert str(parse_rules(words)).splitlines() == [*words, ".=largest:fsdp"]
    found = specs_of(mesh, words)
    assert found["params/pool"] == PartitionSpec()
    assert found["ema/pool"] == PartitionSpec(("data", "fsdp"))
    assert found["params/net/Dense_0/bias"] == PartitionSpec()  # small
    assert found["params/net/Dense_0/kernel"] == PartitionSpec("fsdp")
    assert specs_of(mesh, parse_rules(words)) == found
    spaced = [rule.replace("=", " = ") for rule in words]
    assert str(parse_rules(spaced)) == str(parse_rules(words))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("kernel", "not PATTERN=PLACEMENT"),
        ("kernel=", "not PATTERN=PLACEMENT"),
        ("(=fsdp", "regular expression"),
        ("kernel=fsdp,fsdp", "twice"),
        ("kernel=-,", "names no mesh axis"),
        ("kernel=largest:", "names no mesh axis"),
        ("kernel=largest:fsdp,-", "names no mesh axis"),
        ("kernel=largest:-,fsdp", "names no mesh axis"),
        ("kernel=tensor", "names the axis 'tensor'; the mesh has 'data', 'fsdp'"),
        ("nets=fsdp", "matches none of the 18 leaves: params/net/Dense_0/bias, "),
        ("bias=-,fsdp", "speaks of 2 axes, and params/net/Dense_0/bias has shape"),
        ("^step=fsdp", r"step has shape \(\)"),
        ("kernel=-,data", "splits axis 1 of params/net/Dense_0/kernel"),
    ],
)
def test_a_rule_that_cannot_be(rule, message):
    with pytest.raises(ValueError, match=message) as error:
        state_shardings(shapes(66), make_mesh("data=4,fsdp=2"), [rule])
    assert repr(rule) in str(error.value)


def test_placed_and_gathered_again():
    state = train.TrainState.create(jax.random.key(3), init(jax.random.key(2), 64), OPTIMIZER)
    there = place(state, make_mesh("data=2,fsdp=4"))
    assert there.params["c"].sharding.spec == PartitionSpec("fsdp")
    assert there.params["c"].addressable_shards[0].data.shape == (16, 64)
    back = gather(there)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        assert a.devices() == {jax.local_devices()[0]}
        is_key = jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
        a, b = (jax.random.key_data(x) if is_key else x for x in (a, b))
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("words", ["data=8", "fsdp=8"])
def test_what_was_gathered_is_not_given_up(words):
    there = place({"w": jnp.arange(1024.0)}, make_mesh(words))
    back = gather(there)
    jax.tree.map(lambda leaf: leaf.delete(), there)
    np.testing.assert_array_equal(back["w"], np.arange(1024.0))


# --- one step for every mesh ----------------------------------------------------------------------


def wide_step(**options):
    return train.make_train_step(loss_fn, OPTIMIZER, **options)


def put_state(mesh, rules=RULES, dtype=jnp.float32):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), init(jax.random.key(2), WIDE))
    state = train.TrainState.create(jax.random.key(1), params, OPTIMIZER)
    return state if mesh is None else place(state, mesh, rules)


def losses_of(step, state, mesh, dtype=np.float32, steps=STEPS):
    """Losses, the last state and the first norm: Adam and clipping hide a gradient's size."""
    losses, norm = [], None
    for i in range(steps):
        x = batch(i).astype(dtype)
        state, metrics = step(state, x if mesh is None else shard_batch(x, mesh))
        losses.append(metrics.loss.block_until_ready())
        norm = metrics.grad_norm if norm is None else norm
    return np.array(jax.device_get(losses)), state, float(norm)


def tolerance(dtype, growth):
    """How far two orders of summation may drive the losses of ``STEPS`` steps apart.

    A sum of m terms in another order moves by about u sqrt(m) of its size, a run by that at each
    of its steps, independently; what moves early has grown by ``growth`` at the end. Five times
    over, for five standard deviations.
    """
    terms = BATCH + WIDE + 4
    return 5 * growth * np.finfo(dtype).eps / 2 * (terms * STEPS) ** 0.5


@pytest.fixture(scope="module")
def alone64():
    """Losses on one device in float64, and by how much a change of the start grows in them."""
    with jax.enable_x64(True):
        step = wide_step()
        losses, _, norm = losses_of(step, put_state(None, dtype=jnp.float64), None, np.float64)
        nudged = put_state(None, dtype=jnp.float64)
        size = 1e-9
        nudged = nudged.replace(params=jax.tree.map(lambda p: p * (1 + size), nudged.params))
        moved, _, _ = losses_of(step, nudged, None, np.float64)
    growth = max(1.0, float(np.max(np.abs(moved - losses))) / size)
    assert growth < 100 and np.ptp(losses) > 0.5
    return losses, growth, norm


MESHES = [
    ("data=4,fsdp=2", "auto", True),
    ("data=8", "explicit", True),
    ("fsdp=8", "auto", False),
    pytest.param("data=4,fsdp=2", "auto", False, marks=pytest.mark.slow),
    pytest.param("data=4,fsdp=2", "explicit", True, marks=pytest.mark.slow),
    pytest.param("fsdp=8", "auto", True, marks=pytest.mark.slow),
    pytest.param("fsdp=8", "explicit", True, marks=pytest.mark.slow),
    pytest.param("data=8", "auto", False, marks=pytest.mark.slow),
    pytest.param("data=8", "auto", True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("words", "kind", "per_example"), MESHES)
def test_the_same_losses_on_every_mesh(alone64, words, kind, per_example, caplog):
    mesh = make_mesh(words, axis_types=kind)
    step = wide_step(per_example=per_example)
    with jax.enable_x64(True), jax.log_compiles(True), caplog.at_level(logging.WARNING):
        state = put_state(mesh, dtype=jnp.float64)
        losses, after, norm = losses_of(step, state, mesh, np.float64)
    bound = tolerance(np.float64, alone64[1])
    assert bound < 1e-11
    np.testing.assert_allclose(losses, alone64[0], rtol=0, atol=bound)
    np.testing.assert_allclose(norm, alone64[2], rtol=bound)
    # Compiled once, the state where it was, and the old one given up for the new.
    assert len(re.findall(r"Compiling jit\(step\)", caplog.text)) == 1
    expected = state_shardings(state, mesh)
    for leaf, where in zip(jax.tree.leaves(after), jax.tree.leaves(expected), strict=True):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert ("fsdp" in words) == (not after.ema["c"].sharding.is_fully_replicated)
    assert int(after.examples) == STEPS * BATCH


@pytest.mark.parametrize("words", ["data=4,fsdp=2", pytest.param("data=8", marks=pytest.mark.slow)])
def test_the_same_losses_in_float32(alone64, words):
    mesh = make_mesh(words)
    losses, _, _ = losses_of(wide_step(per_example=True), put_state(mesh), mesh)
    alone, _, _ = losses_of(wide_step(), put_state(None), None)
    bound = tolerance(np.float32, alone64[1])
    assert bound < 1e-3
    np.testing.assert_allclose(losses, alone, rtol=0, atol=bound)


POOL = ["pool=fsdp", pytest.param("pool=replicate", marks=pytest.mark.slow)]


@pytest.mark.parametrize("rule", POOL)
def test_shared_parameters_on_a_mesh(rule):
    dense = jax.eval_shape(lambda: init(jax.random.key(2), WIDE))
    layout = share.plan(dense, 1024)

    def loss(key, shared, x):
        return loss_fn(key, share.expand(shared, layout), x)

    def run(mesh):
        shared = share.init(jax.random.key(2), layout)
        state = train.TrainState.create(jax.random.key(1), shared, OPTIMIZER)
        state = state if mesh is None else place(state, mesh, [rule])
        return losses_of(
            train.make_train_step(loss, OPTIMIZER, per_example=True), state, mesh, steps=20
        )

    losses, state, norm = run(make_mesh("data=4,fsdp=2"))
    alone, _, alone_norm = run(None)
    assert state.params.pool.sharding.is_fully_replicated == (rule == "pool=replicate")
    # 20 steps of float32 sums over at most 4096 / 1024 * 1024 terms of a slot's gradient.
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
    np.testing.assert_allclose(norm, alone_norm, rtol=1e-5)


def test_the_parts_are_summed_in_float32():
    """What is summed between devices, before XLA has had its way with it."""
    mesh = make_mesh("data=4,fsdp=2")

    def loss(key, params, x):
        del key
        x = jnp.concatenate([x, x[:, :1]], axis=1).astype(jnp.bfloat16)
        out = jnp.tanh(jnp.tanh(x @ params["a"]) @ params["c"]) @ params["b"]
        assert out.dtype == jnp.bfloat16
        return jnp.sum(out.astype(jnp.float32) ** 2, axis=1)

    step = train.make_train_step(loss, OPTIMIZER, dtype=jnp.bfloat16, per_example=True)
    text = step.lower(put_state(mesh), shard_batch(batch(0), mesh)).as_text()
    sums = re.findall(
        r"stablehlo\.(all_reduce|reduce_scatter)\".*?\}\) : \((tensor<.*?>)\)", text, re.DOTALL
    )
    # The network gets them gathered, and they travel in its dtype.
    assert re.search(r"sharding_constraint .* tensor<64x64xbf16>", text)
    # Two small gradients and the loss, a scatter of the large one and its sum over "data".
    assert sorted(name for name, _ in sums) == ["all_reduce"] * 4 + ["reduce_scatter"]
    assert {kind.rpartition("x")[2].strip(">").rpartition("<")[2] for _, kind in sums} == {"f32"}


def test_batches_that_a_mesh_cannot_take():
    mesh = make_mesh("data=4,fsdp=2")
    for n, message in ((12, "multiple of 8"), (4, "multiple of 8"), (0, "multiple of 8")):
        with pytest.raises(ValueError, match=message):
            shard_batch(np.zeros((n, 2), np.float32), mesh)
    with pytest.raises(ValueError, match="no example"):
        STEP(put_state(None), np.zeros((0, 2), np.float32))
    step = wide_step(per_example=True)
    with pytest.raises(ValueError, match="batch has 12 examples for 8 devices; expected a multip"):
        step(put_state(mesh), np.zeros((12, 2), np.float32))
    with pytest.raises(ValueError, match="accumulate is 4, which does not divide the 2 examples"):
        wide_step(per_example=True, accumulate=4)(put_state(mesh), shard_batch(batch(0), mesh))
