"""Shared parameters in training: what a checkpoint holds, and which layout may read it."""

import dataclasses
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import share, train
from jaxgen.share import Shared
from jaxgen.share.layout import named_leaves
from jaxgen.train.data import load
from jaxgen.train.recipes.config import ConfigError, ScoreConfig, resolve
from jaxgen.train.recipes.score import Experiment, build
from jaxgen.train.recipes.sharing import MIN_SIZE, plan_sharing

PARAMS = {
    "first": {"kernel": np.linspace(-1, 1, 600, dtype=np.float32).reshape(10, 60), "bias": 0.0},
    "last": np.cos(np.arange(180, dtype=np.float32)).reshape(60, 3),
}
PARAMS = jax.tree.map(jnp.asarray, PARAMS)
LAYOUT = share.plan(PARAMS, 0.1)
OPTIMIZER = optax.chain(
    optax.scale_by_adam(),
    share.scale_by_pool(LAYOUT, "mean", 0.5),
    optax.scale_by_learning_rate(1e-2),
)


def loss(key, shared, batch):
    params = share.expand(shared, LAYOUT)
    x = batch + 0.1 * jax.random.normal(key, batch.shape)
    out = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"]) @ params["last"]
    return jnp.sum((out - batch[:, :3]) ** 2, axis=-1)


STEP = train.make_train_step(loss, OPTIMIZER)


def batches(examples):
    for i in range(examples // 8, 1000):
        yield np.random.default_rng(i).normal(size=(8, 10)).astype(np.float32)


def make(layout=LAYOUT):
    shared = share.init(jax.random.key(1), layout, PARAMS)
    return train.TrainState.create(jax.random.key(0), shared, OPTIMIZER)


def fit(steps, out=None, **options):
    return train.fit(
        make(), STEP, batches, steps, out=out, progress=False, **{"layout": LAYOUT} | options
    )


def same_bits(a, b):
    a, b = (jax.tree.leaves(s.replace(key=jax.random.key_data(s.key))) for s in (a, b))
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a run of six steps, and its state."""
    out = tmp_path_factory.mktemp("shared")
    return out / "checkpoints", fit(6, out)


# --- what a checkpoint holds ----------------------------------------------------------------------


def test_there_and_back(run):
    folder, state = run
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = train.restore(folder, jax.eval_shape(make), layout=LAYOUT)
    assert same_bits(again, state)
    assert isinstance(again.params, Shared) and again.ema.pool.shape == (LAYOUT.m,)
    assert list(again.params.rest) == ["first/bias"]


def test_nothing_of_the_weights_size_is_saved(run):
    folder, state = run
    body = train.read_manifest(folder)
    sizes = {name: int(np.prod(leaf["shape"])) for name, leaf in body["leaves"].items()}
    assert LAYOUT.n == 780 and LAYOUT.m == 78 and max(sizes.values()) == 78
    # Pool, average, two moments and the scaler's divisor.
    assert sorted(name for name, size in sizes.items() if size == 78) == [
        "ema/pool",
        "opt_state/0/mu/pool",
        "opt_state/0/nu/pool",
        "opt_state/1/divisor",
        "params/pool",
    ]
    # Arrays as orbax writes them, uncompressed at worst: not one of them has room for 780 floats.
    files = [p for p in Path(folder).rglob("d/*") if p.is_file()]
    assert files and max(p.stat().st_size for p in files) < 780 * 4
    # Nor does a byte string of the weights occur.
    weights = np.asarray(share.expand(state.ema, LAYOUT)["last"])
    assert not any(
        weights.tobytes()[:64] in p.read_bytes() for p in folder.rglob("*") if p.is_file()
    )


def test_a_run_that_goes_on_ends_in_the_bits_of_one_long_run(run, tmp_path):
    fit(2, tmp_path)
    state = fit(6, tmp_path)
    assert same_bits(state, run[1])
    assert train.read_layout(tmp_path / "checkpoints").fingerprint == LAYOUT.fingerprint


def test_the_average_of_the_pool_is_the_average_of_the_weights(run):
    mean, pools = None, []
    state = make()
    source = batches(0)
    for k in range(6):
        state, _ = STEP(state, next(source))
        pools.append(share.expand(state.params, LAYOUT)["last"])
        start = share.expand(make().params, LAYOUT)["last"] if mean is None else mean
        decay = min(0.999, (1 + k) / (10 + k))
        mean = decay * start + (1 - decay) * pools[-1]
    np.testing.assert_allclose(share.expand(run[1].ema, LAYOUT)["last"], mean, rtol=1e-5, atol=1e-6)


def test_the_layout_is_read_back(run):
    folder, state = run
    layout = train.read_layout(folder, PARAMS)
    assert layout == LAYOUT
    # Without the parameters' structure: nested dicts by name, which here is the same.
    plain = train.read_layout(folder)
    assert plain.fingerprint == LAYOUT.fingerprint
    for a, b in zip(
        jax.tree.leaves(share.expand(state.ema, plain)),
        jax.tree.leaves(share.expand(state.ema, LAYOUT)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="other leaves"):
        train.read_layout(folder, {"w": jnp.ones((2, 2))})


# --- another layout -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (share.plan(PARAMS, 0.1, seed=1), "seed: 0 there, 1 asked for"),
        (share.plan(PARAMS, 0.2), "m: 78 there, 156 asked for"),
        (share.plan(PARAMS, 0.1, scheme="hashednet"), "scheme: stable there, hashednet asked for"),
        (share.plan(PARAMS, 0.1, sign=False), "sign: True there, False asked for"),
        (share.plan({"last": PARAMS["last"]}, 78), "first/kernel: shared"),
        (share.plan(PARAMS, 78, scale="flax"), "last: shared, \\(60, 3\\), scale"),
    ],
    ids=["seed", "m", "scheme", "sign", "leaves", "scale"],
)
def test_another_layout_is_refused_by_both_fingerprints(run, other, words):
    folder, _ = run
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(train.CheckpointMismatch, match=words) as error:
        train.restore(folder, jax.eval_shape(make), layout=other)
    assert isinstance(error.value, ValueError)
    assert LAYOUT.fingerprint in str(error.value) and other.fingerprint in str(error.value)
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_does_not_go_on_under_another_layout(run):
    folder, _ = run
    with pytest.raises(train.CheckpointMismatch, match="seed: 0 there, 9 asked for"):
        fit(8, folder.parent, layout=share.plan(PARAMS, 0.1, seed=9))


def test_without_a_layout_a_warning_says_what_was_not_compared(run, tmp_path):
    folder, state = run
    with pytest.warns(UserWarning, match=LAYOUT.fingerprint) as said:
        assert same_bits(train.restore(folder, jax.eval_shape(make)), state)
    assert said[0].filename == __file__
    train.save(tmp_path, state)
    with pytest.raises(train.CheckpointMismatch, match="holds no layout"):
        train.restore(tmp_path, jax.eval_shape(make), layout=LAYOUT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same_bits(train.restore(tmp_path, jax.eval_shape(make)), state)
    assert train.read_layouts(tmp_path) == ()
    with pytest.raises(train.CheckpointMismatch, match="holds 0 layouts"):
        train.read_layout(tmp_path)


# --- the recipe -----------------------------------------------------------------------------------


def experiment(data, **changes):
    config = ScoreConfig(data=data, **changes)
    dataset = load(data)
    return build(resolve(config, dataset.event), dataset)


@pytest.fixture(scope="module")
def unet():
    """A U-Net in a twentieth, the key's network and the start of its pools."""
    made = experiment("digits", width=24, channel_mults=(1,), share=0.05)
    both = jax.jit(lambda key: (made.init_network(key), made.init(key)))
    return made, *both(jax.random.key(3))


def test_layers_that_start_at_zero_have_a_pool_that_starts_at_zero(unet):
    made, dense, shared = unet
    outer, inner = made.sharing.layouts
    leaves = named_leaves(dense)
    zero = {n for n, x in leaves.items() if x.ndim > 1 and not np.any(x) and x.size >= MIN_SIZE}
    assert {spec.path for spec in inner.leaves} == zero and len(zero) == 3
    assert {spec.path for spec in outer.leaves} == {
        n for n, x in leaves.items() if x.ndim > 1 and np.any(x)
    }
    assert shared.pool.shape == (outer.m,) and shared.rest.pool.shape == (inner.m,)
    assert outer.m == round(0.05 * outer.n) and inner.m == round(0.05 * inner.n)
    small = "params/Conv3x3_1/kernel"
    assert {k.path: k.reason for k in inner.kept if len(k.shape) > 1} == {
        small: "fewer than 512 entries"
    }
    reasons = {k.path: k.reason for k in outer.kept}
    assert reasons[small] == "starts at zero" and reasons["params/Conv3x3_1/bias"] == "one axis"
    assert made.parameters() == sum(x.size for x in jax.tree.leaves(shared))
    assert made.sharing.weights == sum(x.size for x in leaves.values())


def test_the_network_starts_as_its_dense_form_does(unet):
    made, dense, shared = unet
    start = named_leaves(made.weights(shared))
    scales = {spec.path: spec.scale for spec in made.sharing.layouts[0].leaves}
    for name, leaf in named_leaves(dense).items():
        if leaf.ndim < 2 or not np.any(leaf):
            np.testing.assert_array_equal(start[name], leaf)
        else:
            truth = scales[name] * made.sharing.layouts[0].pool_std
            # Of n weights in m slots no more than m are independent.
            error = 4 * truth / np.sqrt(2 * min(leaf.size, made.sharing.layouts[0].m))
            assert abs(start[name].std() - truth) < error, (name, truth, error)
            assert abs(leaf.std() - truth) < 4 * truth / np.sqrt(2 * leaf.size), name


def test_pools_within_pools_are_saved_and_read_back(unet, tmp_path):
    made, _, shared = unet
    layouts = made.sharing.layouts
    state = train.TrainState.create(jax.random.key(0), shared, optax.sgd(0.1))
    train.save(tmp_path, state, layout=layouts)
    again = train.restore(tmp_path, state, layout=layouts)
    assert same_bits(again, state)
    read = train.read_layouts(tmp_path, jax.eval_shape(made.init_network, jax.random.key(0)))
    assert read == layouts
    found = named_leaves(dataclasses.replace(made.sharing, layouts=read).expand(again.ema))
    for name, leaf in named_leaves(made.weights(shared)).items():
        np.testing.assert_array_equal(found[name], leaf)
    with pytest.raises(train.CheckpointMismatch, match="pools: 2 there, 1 asked for"):
        train.restore(tmp_path, state, layout=layouts[0])


class Quick(Experiment):
    """An experiment with a loss that compiles in no time, on the same weights."""

    def loss(self, key, params, batch):
        leaves = jax.tree.leaves(self.weights(params))
        return sum(jnp.mean(jnp.sin(3 * w)) + jnp.sum(w**2) for w in leaves) * batch


def test_at_full_budget_training_is_dense_training():
    # A norm to clip at that is always passed, so that it must be measured in weights.
    settings = {"width": 24, "blocks": 1, "warmup_steps": 0, "clip": 0.05, "weight_decay": 0.1}
    found = []
    for budget in (None, 1.0):
        made = experiment("moons", share=budget, **settings)
        made = Quick(**{f.name: getattr(made, f.name) for f in dataclasses.fields(made)})
        state, step = made.state(), made.make_step()
        start = jax.tree.map(np.asarray, made.weights(state.params))
        for i in range(5):
            state, _ = step(state, jnp.linspace(0.5, 1.5 + i, 4))
        found.append([start, made.weights(state.params), made.weights(state.ema)])
        size = made.parameters()
        assert size == sum(x.size for x in jax.tree.leaves(start))
    dense, shared = (jax.tree.leaves(x) for x in found)
    # Five steps of 1e-3 that differ would show at 1e-4; rounding is below 1e-6.
    for a, b in zip(dense, shared, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    moved = [jnp.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, found[1][:2]), strict=True)]
    assert max(moved) > 3e-3


def test_a_layout_can_be_made_of_a_network_too_large_to_build():
    made = experiment("moons", width=16384, blocks=4, share=1e-4)
    layout = made.sharing.layouts[0]
    assert layout.n > 4e9 and layout.m == round(1e-4 * layout.n)
    assert max(x.size for x in jax.live_arrays()) < 1e6


def test_a_number_of_slots_is_shared_out_between_the_pools():
    def init(key):
        return {"a": jax.random.normal(key, (30, 40)), "z": jnp.zeros((20, 60)), "b": jnp.ones(3)}

    sharing = plan_sharing(init, 100)
    assert [each.m for each in sharing.layouts] == [50, 50]
    shared = sharing.start(jax.random.key(0), init(jax.random.key(1)))
    params = sharing.expand(shared)
    assert not np.any(params["z"]) and np.all(params["b"] == 1) and np.std(params["a"]) > 0.1
    # Its gradient is alive from the first step, as a dense layer's that starts at zero is.
    slope = jax.grad(lambda s: jnp.sum(sharing.expand(s)["z"] * params["a"].reshape(20, 60)))
    assert np.count_nonzero(slope(shared).rest.pool) == 50


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"share": 0.0}, "share is 0;"),
        ({"share": -1.0}, "share is -1;"),
        ({"share": 2.5}, "whole number of slots"),
        ({"share": float("nan")}, "share is nan"),
        ({"share": float("inf")}, "share is inf"),
        ({"share": 1e9}, "the weights that are shared"),
        ({"share": 1e-9}, "at least 1"),
        ({"share": 40.0, "share_scheme": "roast", "width": 32, "blocks": 1}, None),
        ({"share": 20.0, "share_scheme": "roast", "width": 32, "blocks": 1}, "one chunk"),
    ],
)
def test_budgets_that_do_not_suit(changes, words):
    if words is None:
        assert experiment("moons", **changes).sharing.layouts[0].m == 40
        return
    with pytest.raises(ConfigError, match=words):
        experiment("moons", **changes)
