"""Plans against Python integers: loads, budgets, scales, round trips and what they refuse."""

import dataclasses
import json
import math

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgen import share
from jaxgen.share import gather
from jaxgen.share import layout as layout_module

P = 2**31 - 1
F32 = jnp.float32


def shape(*sizes, dtype=F32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def slots_of(layout):
    """The slots of every weight, leaf after leaf, in numpy."""
    return np.concatenate([gather.slots(s, np.arange(s.size))[0] for s in layout.leaves])


# --- the map ----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    st.floats(0.001, 1.0),
    st.integers(0, 2**32 - 1),
)
def test_loads_differ_by_one_at_most(sizes, budget, seed):
    n = sum(a * b for a, b in sizes)
    m = max(1, round(budget * n))
    layout = share.plan([shape(*s) for s in sizes], m, seed=seed)
    load = np.bincount(slots_of(layout), minlength=m)
    assert (layout.n, layout.padded, layout.m) == (n, n, m)
    assert load.sum() == n and load.size == m
    assert set(load) <= {n // m, -(-n // m)}


@settings(max_examples=20, deadline=None)
@given(st.tuples(st.integers(1, 4), st.integers(1, 4)), st.integers(0, 99), st.floats(0.01, 1.0))
def test_tiles_move_whole_and_fill_the_pool_evenly(tile, seed, budget):
    shapes = {"a": shape(5, 7), "b": shape(2, 3, 4)}
    layout = share.plan(shapes, 1.0, tile=tile, seed=seed)
    unit = math.prod(tile)
    grids = [(-(-5 // tile[0]), -(-7 // tile[1])), (-(-6 // tile[0]), -(-4 // tile[1]))]
    tiles = sum(a * b for a, b in grids)
    assert layout.m == layout.padded == tiles * unit
    assert len(set(slots_of(layout))) == layout.n == 59

    layout = share.plan(shapes, budget, tile=tile, seed=seed)
    assert layout.m % unit == 0 and layout.m - unit < max(1, budget * layout.padded) + 1
    spec = layout.leaves[0]
    slot = gather.slots(spec, np.arange(35))[0].reshape(5, 7)
    bk, bn = tile
    for r in range(0, 5, bk):
        for c in range(0, 7, bn):
            block = slot[r : r + bk, c : c + bn]
            rows, columns = np.indices(block.shape)
            assert block[0, 0] % unit == 0
            np.testing.assert_array_equal(block - block[0, 0], rows * bn + columns)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_a_full_budget_is_a_permutation(seed):
    layout = share.plan({"a": shape(7, 9), "b": shape(13, 5)}, 1.0, seed=seed)
    assert sorted(slots_of(layout)) == list(range(63 + 65))


def test_rotations_are_drawn_evenly_and_differ_between_seeds():
    """Chi-square of the shifts of 4000 seeds over 16 bins: 15 +- 5.5."""
    spec = share.plan({"a": shape(64, 64)}, 1024).leaves[0]
    shifts = np.array([dataclasses.replace(spec, seed=s).shift(np.arange(4)) for s in range(4000)])
    assert shifts.max() < 1024
    for q in range(4):
        count = np.bincount(shifts[:, q] // 64, minlength=16)
        assert ((count - 250) ** 2 / 250).sum() < 15 + 5 * 5.5
    # Independent between partitions: their difference is as even.
    count = np.bincount((shifts[:, 1] - shifts[:, 0]) % 1024 // 64, minlength=16)
    assert ((count - 250) ** 2 / 250).sum() < 15 + 5 * 5.5


# --- a model too large to build ---------------------------------------------------------------


class Huge(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(10):
            x = nn.Dense(100_000)(x)
        return nn.Dense(1000, name="last")(x)


def fmix(v):
    v = (v ^ (v >> 16)) * 0x85EBCA6B % 2**32
    v = (v ^ (v >> 13)) * 0xC2B2AE35 % 2**32
    return v ^ (v >> 16)


def hash_key(name, low, seed):
    return low + fmix(fmix(name ^ 0x5EED) ^ seed) % (P - low)


@pytest.fixture(scope="module")
def huge():
    return jax.eval_shape(Huge().init, jax.random.key(0), shape(1, 100_000))["params"]


@pytest.mark.parametrize("tile", [None, (256, 128)])
def test_a_hundred_billion_weights(huge, tile):
    seed = 77
    layout = share.plan(huge, 0.01, tile=tile, seed=seed)
    spec = share.leaf(layout, "last/kernel")
    rows, columns = (100_000, 1000) if tile is None else (100_096, 1024)
    wide = 100_000 * 100_000 if tile is None else 100_096 * 100_096
    assert layout.n == 10 * 10**10 + 10**8
    assert spec.offset == 10 * wide > 2**36
    padded, unit = 10 * wide + rows * columns, 1 if tile is None else 256 * 128
    assert layout.padded == padded and layout.m == -(-round(0.01 * padded) // unit) * unit

    last = np.arange(10**8 - 5, 10**8, dtype=np.uint32)
    slots, signs = gather.slots(spec, last)
    jitted = jax.jit(lambda i: gather.slots(spec, i))(last)
    for i, slot, sign in zip(last.tolist(), slots.tolist(), signs.tolist(), strict=True):
        at = i
        if tile is not None:
            (r, dr), (c, dc) = divmod(i // 1000, 256), divmod(i % 1000, 128)
            at = (r * 8 + c) * unit + dr * 128 + dc
        q, t = divmod(spec.offset + at, layout.m)
        u = (hash_key(1, 1, seed) * q + hash_key(2, 0, seed)) % P % (layout.m // unit) * unit
        assert slot == (u + t) % layout.m
        word = (spec.offset + at) % 2**32 ^ fmix(fmix(3 ^ 0x5EED) ^ seed)
        assert sign == 1 - 2 * (fmix(word) & 1)
    np.testing.assert_array_equal(jitted[0], slots)
    np.testing.assert_array_equal(jitted[1], signs)
    assert share.Layout.from_json(layout.to_json(), huge) == layout


def test_indices_of_one_leaf_may_use_all_of_a_word():
    """The last of 2^32 - 1 weights behind half a partition of others."""
    spec = share.plan([shape(1, 2**30), shape(1, 2**32 - 1)], 2**31 - 1, sign=False).leaves[1]
    i = np.array([0, 2**31, 2**32 - 2], np.uint32)
    found = gather.slots(spec, i)[0]
    for at, slot in zip(i.tolist(), found.tolist(), strict=True):
        q, t = divmod(2**30 + at, spec.m)
        assert slot == (int(spec.shift(q)) + t) % spec.m


# --- budgets ----------------------------------------------------------------------------------


def test_budgets_count_or_take_a_share():
    tree = {"w": shape(10, 20), "b": shape(20)}
    assert share.plan(tree, 7).m == 7
    assert share.plan(tree, 0.25).m == 50
    assert share.plan(tree, 1).m == 1
    assert share.plan(tree, 1.0).m == share.plan(tree, 200).m == 200
    assert share.plan(tree, 0.5, count="all").m == 110 - 20
    assert share.plan(tree, 30, count="all").m == 10
    assert share.plan(tree, 1.0, count="all").m == 200
    # Tiles: 2 x 3 of (8, 8) is 384 padded slots; a count rounds down, a share up.
    assert share.plan(tree, 1.0, tile=(8, 8)).m == 384
    assert share.plan(tree, 0.5, tile=(8, 8)).m == 192
    assert share.plan(tree, 0.4, tile=(8, 8)).m == 192
    assert share.plan(tree, 191, tile=(8, 8)).m == 128
    assert share.plan(tree, 0.01, tile=(8, 8)) == share.plan(tree, 64, tile=(8, 8))
    # No more than the selected weights.
    assert share.plan({"w": shape(10, 20), "b": shape(20)}, 32, scheme="roast").m == 32


def test_selection_and_reasons():
    tree = {
        "conv": shape(3, 3, 2, 4),
        "bias": shape(4),
        "temperature": shape(),
        "steps": shape(2, 2, dtype=jnp.int32),
        "phase": shape(2, 2, dtype=jnp.complex64),
        "mask": shape(2, 2, dtype=bool),
        "none": shape(0, 3),
        "small": shape(2, 2),
        "half": shape(5, 5, dtype=jnp.bfloat16),
    }
    layout = share.plan(tree, 0.5, min_size=10)
    assert [s.path for s in layout.leaves] == ["conv", "half"]
    assert {k.path: k.reason for k in layout.kept} == {
        "bias": "one axis",
        "temperature": "a scalar",
        "steps": "dtype int32",
        "phase": "dtype complex64",
        "mask": "dtype bool",
        "none": "no entries",
        "small": "fewer than 10 entries",
    }
    assert {k.path: k.dtype for k in layout.kept}["phase"] == "complex64"
    assert sorted(k.size for k in layout.kept) == [0, 1, 4, 4, 4, 4, 4]
    chosen = share.plan(tree, 0.5, select=lambda path, leaf: path == "bias" or leaf.ndim == 4)
    assert [s.path for s in chosen.leaves] == ["bias", "conv"]
    assert {k.path: k.reason for k in chosen.kept}["small"] == "not selected"
    for name in ("steps", "phase", "mask"):
        with pytest.raises(TypeError, match=rf"{name} has dtype \w+; expected floating"):
            share.plan({"w": shape(2, 2), name: tree[name]}, 0.5, other="error")
    share.plan({"w": shape(2, 2), "b": shape(2)}, 0.5, other="error")


# --- scales -----------------------------------------------------------------------------------


def stds(layout):
    return {s.path: s.scale * layout.pool_std for s in layout.leaves}


def test_arrays_are_measured_and_constants_pass_through():
    w = np.random.default_rng(0).normal(3.0, 0.5, (40, 50)).astype(np.float32)
    half = jnp.asarray(w[:8], jnp.bfloat16)
    tree = {"w": w, "ones": np.ones((4, 4), np.float32), "half": half}
    layout = share.plan(tree, 0.1, pool_std=0.3)
    assert layout.kept == (share.Kept("ones", (4, 4), "float32", "constant"),)
    expected = {"w": w.astype(np.float64).std(), "half": np.asarray(half, np.float64).std()}
    assert stds(layout) == pytest.approx(expected, rel=1e-12)
    # A constant that no sum in floating point makes zero.
    tree["ones"] = np.full((7, 9), 0.1, np.float32)
    assert share.plan(tree, 0.1).kept[0].reason == "constant"
    assert stds(share.plan(tree, 0.1, scale="flax"))["ones"] == pytest.approx(7**-0.5)


class FlaxNet(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(100, 64)(ids)
        x = nn.Conv(48, (3, 5))(x)
        x = nn.MultiHeadDotProductAttention(num_heads=4)(x, x)
        return nn.Dense(96)(x)


def test_presets_are_the_libraries_own():
    """The measured deviation of n draws is off by less than 1 / sqrt(2 n) of itself."""
    params = jax.jit(FlaxNet().init)(jax.random.key(0), jnp.zeros((1, 8, 8), jnp.int32))["params"]
    keys = jax.random.split(jax.random.key(1), 3)
    outside = {
        "linear": eqx.nn.Linear(64, 96, key=keys[0]),
        "conv": eqx.nn.Conv2d(16, 48, (3, 5), key=keys[1]),
        "embedding": eqx.nn.Embedding(100, 64, key=keys[2]),
    }
    outside = {name: module.weight for name, module in outside.items()}
    for tree, preset in ((params, "flax"), (outside, "equinox"), (outside, "torch")):
        shapes = jax.eval_shape(lambda tree: tree, tree)
        given_by_rule = stds(share.plan(shapes, 0.1, scale=preset))
        for path, measured in stds(share.plan(tree, 0.1)).items():
            n = {s.path: s.size for s in share.plan(tree, 0.1).leaves}[path]
            assert abs(measured / given_by_rule[path] - 1) < 4 / math.sqrt(2 * n), path
    # Attention keeps biases of two axes, which start at zero.
    kept = {k.path for k in share.plan(params, 0.1, scale="flax").kept}
    assert kept == {name for name in layout_module.named_leaves(params) if name.endswith("bias")}
    assert share.plan(jax.eval_shape(lambda tree: tree, params), 0.1) == share.plan(
        params, 0.1, scale="flax"
    )


def test_presets_see_through_boxes_and_stacks():
    tree = {"embedding": {"value": shape(100, 16)}, "norm": {"scale": shape(4, 16)}}
    layout = share.plan(tree, 0.1, scale="flax")
    assert stds(layout) == pytest.approx({"embedding/value": 16**-0.5})
    assert [(k.path, k.reason) for k in layout.kept] == [("norm/scale", "constant")]


def test_scales_may_be_given():
    tree = {"a": {"w": shape(4, 4)}, "b": shape(2, 3)}
    by_name = share.plan(tree, 5, scale={"a/w": 0.5, "b": 2.0}, pool_std=0.25)
    assert [s.scale for s in by_name.leaves] == [2.0, 8.0]
    by_call = share.plan(tree, 5, scale=lambda path, leaf: leaf.shape[0] / 4, pool_std=0.25)
    assert [s.scale for s in by_call.leaves] == [4.0, 2.0]


# --- static data ------------------------------------------------------------------------------

TREE = {"dense": {"kernel": shape(6, 5), "bias": shape(5)}, "out": [shape(5, 3), shape(3)]}
OPTIONS = [
    {"budget": 0.25},
    {"budget": 20, "tile": (2, 4), "sign": False, "seed": 2**32 - 1},
    {"budget": 0.5, "scheme": "roast", "chunk": (2, 2), "pool_std": 1 / 3},
    {"budget": 0.5, "scheme": "roast", "chunk": 4},
    {"budget": 1.0, "scheme": "hashednet", "scale": {"dense/kernel": 0.1, "out/0": 1e-7}},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_json_round_trip(options):
    layout = share.plan(TREE, **options)
    text = layout.to_json()
    assert "\n" not in text and isinstance(json.loads(text), dict)
    back = share.Layout.from_json(text, TREE)
    assert back == layout and hash(back) == hash(layout) and back.leaves == layout.leaves
    assert (back.kept, back.order, back.pool_std) == (layout.kept, layout.order, layout.pool_std)
    bare = share.Layout.from_json(text)
    assert bare.structure is None and bare != layout
    assert bare.fingerprint == layout.fingerprint and bare.leaves == layout.leaves


def test_a_layout_without_structure_makes_nested_dicts():
    tree = {"dense": {"kernel": np.ones((6, 5)), "bias": np.ones(5)}, "out": {"kernel": np.eye(4)}}
    layout = share.plan(tree, 0.5, scale="flax")
    bare = share.Layout.from_json(layout.to_json())
    shared = share.init(jax.random.key(0), layout, tree)
    same = jax.tree.map(np.array_equal, share.expand(shared, bare), share.expand(shared, layout))
    assert jax.tree.structure(same) == jax.tree.structure(tree) and all(jax.tree.leaves(same))


def test_the_fingerprint_tells_layouts_apart():
    def make(tree=TREE, budget=20, **options):
        return share.plan(tree, budget, **options)

    base = make()
    assert base.fingerprint == make().fingerprint and base == make() and len({base, make()}) == 1
    assert len(base.fingerprint) == 16 and int(base.fingerprint, 16) >= 0
    others = [
        make(seed=1),
        make(budget=21),
        make(scheme="hashednet"),
        make(scheme="roast", chunk=4),
        make(scheme="roast", chunk=5),
        make(tile=(2, 2)),
        make(sign=False),
        make(pool_std=0.05),
        make(scale="torch"),
        make({**TREE, "more": shape(2, 2)}),
        make({**TREE, "more": shape(2)}),
        make({**TREE, "out": [shape(3, 5), shape(3)]}),
    ]
    assert len({layout.fingerprint for layout in (base, *others)}) == len(others) + 1
    assert base not in others
    # The same leaves in another structure: the same pool, another pytree.
    tupled = make({**TREE, "out": tuple(TREE["out"])})
    assert tupled.fingerprint == base.fingerprint and tupled != base
    # Why a leaf passes through is for people, and may be worded anew.
    reworded = [dataclasses.replace(kept, reason="other words") for kept in base.kept]
    assert dataclasses.replace(base, kept=tuple(reworded)).fingerprint == base.fingerprint
    assert base != "layout"


def test_leaves_by_name():
    layout = share.plan(TREE, 20, seed=3)
    assert share.leaf(layout, "out/0") is layout.leaves[1]
    assert layout.leaves[1].offset == 30 and layout.leaves[1].matrix == (5, 3)
    assert share.plan([shape(3), shape(2, 2)], 2, select=lambda *_: True).leaves[0].matrix == (1, 3)
    with pytest.raises(ValueError, match=r"named 'out/1'; expected one of dense/kernel, out/0"):
        share.leaf(layout, "out/1")


# --- bad input --------------------------------------------------------------------------------

BAD_PLANS = {
    "zero": (ValueError, "budget comes to 0 of 45", {"budget": 0}),
    "zero share": (ValueError, r"budget is 0.0; expected a share in \(0, 1\]", {"budget": 0.0}),
    "negative": (ValueError, "budget comes to -3 of 45", {"budget": -3}),
    "share above one": (ValueError, r"budget is 1.5; expected a share", {"budget": 1.5}),
    "nan": (ValueError, r"budget is nan; expected a share", {"budget": math.nan}),
    "too many": (ValueError, "budget comes to 46 of 45", {"budget": 46}),
    "tiny share": (ValueError, "budget comes to 0 of 45", {"budget": 0.001}),
    "bool": (TypeError, "budget is True; expected a count", {"budget": True}),
    "text": (TypeError, "budget is 'half'; expected a count", {"budget": "half"}),
    "below a tile": (ValueError, "7 slots, less than one tile of 8", {"budget": 7, "tile": (2, 4)}),
    "below a chunk": (
        ValueError,
        "pool of 11 slots, less than one chunk of 32",
        {"budget": 0.25, "scheme": "roast"},
    ),
    "all of it passes": (ValueError, "comes to -1 slots, the 8", {"budget": 7, "count": "all"}),
    "scheme": (ValueError, "scheme is 'fold'; expected one of stable, roast", {"scheme": "fold"}),
    "count": (ValueError, "count is 'some'; expected one of selected, all", {"count": "some"}),
    "other": (ValueError, "other is 'drop'; expected one of pass, error", {"other": "drop"}),
    "pool_std": (ValueError, "pool_std is 0; expected a positive", {"pool_std": 0}),
    "pool_std nan": (ValueError, "pool_std is nan; expected a positive", {"pool_std": math.nan}),
    "seed": (ValueError, "seed is -1; expected an integer", {"seed": -1}),
    "seed of more bits": (ValueError, r"seed is 4294967296; expected .* 2\^32", {"seed": 2**32}),
    "seed of no integer": (ValueError, "seed is 0.5; expected an integer", {"seed": 0.5}),
    "tile for roast": (
        ValueError,
        "which scheme 'roast' does not take",
        {"scheme": "roast", "tile": (2, 2)},
    ),
    "tile for hashednet": (
        ValueError,
        "which scheme 'hashednet' does not take",
        {"scheme": "hashednet", "tile": (2, 2)},
    ),
    "tile of three": (ValueError, r"tile is \(2, 2, 2\); expected", {"tile": (2, 2, 2)}),
    "tile of one": (ValueError, "tile is 2; expected", {"tile": 2}),
    "empty tile": (ValueError, r"tile\[1\] is 0; expected", {"tile": (2, 0)}),
    "chunk": (ValueError, r"chunk\[1\] is 0; expected", {"scheme": "roast", "chunk": 0}),
    "chunk share": (ValueError, r"chunk\[1\] is 0.5; expected", {"scheme": "roast", "chunk": 0.5}),
    "scale": (ValueError, "scale is 'he'; expected one of std, flax", {"scale": "he"}),
    "scale lacks": (ValueError, "scale has no entry for out/0", {"scale": {"dense/kernel": 1.0}}),
    "scale zero": (
        ValueError,
        "scale of dense/kernel is 0.0; expected a positive",
        {"scale": lambda path, leaf: 0.0},
    ),
    "scale negative": (ValueError, "is -1.0; expected a positive", {"scale": lambda *_: -1}),
    "scale nan": (ValueError, "is nan; expected a positive", {"scale": lambda *_: math.nan}),
    "measured shapes": (TypeError, "dense/kernel is a shape or traced", {"scale": "std"}),
    "none selected": (
        ValueError,
        "no leaf is selected .*dense/bias: not selected",
        {"select": lambda path, leaf: False},
    ),
    "all small": (ValueError, "dense/kernel: fewer than 99 entries", {"min_size": 99}),
    "empty": (ValueError, r"no leaf is selected .*the tree is empty", {"tree": {}}),
    "no array": (
        TypeError,
        "act is builtin_function_or_method; expected an array",
        {"tree": {"act": sum}},
    ),
    "a number alone": (TypeError, "the tree is float; expected an array", {"tree": 1.0}),
    "one name twice": (
        ValueError,
        "two leaves are named a/b",
        {"tree": {"a": {"b": shape(2, 2)}, "a/b": shape(3, 3)}},
    ),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_bad_plans_say_what_came_and_what_was_expected(case):
    error, message, options = BAD_PLANS[case]
    with pytest.raises(error, match=message):
        share.plan(**{"tree": TREE, "budget": 0.5, **options})


@pytest.mark.parametrize("scheme", ["stable", "roast", "hashednet"])
def test_one_pool_has_less_than_two_to_the_31_slots(huge, scheme):
    with pytest.raises(ValueError, match=r"slots; expected less than 2\^31 for one pool"):
        share.plan(huge, 0.5, scheme=scheme)
    assert share.plan(huge, P, scheme=scheme).m == P


def test_values_that_cannot_be_measured():
    with pytest.raises(ValueError, match="w has a standard deviation of nan; expected a finite"):
        share.plan({"w": np.full((2, 2), np.nan)}, 0.5)
    with pytest.raises(TypeError, match="w is a shape or traced"):
        jax.eval_shape(lambda w: share.plan({"w": w}, 0.5) and w, shape(2, 2))


def test_texts_that_are_no_layout():
    text = share.plan(TREE, 20, tile=(2, 2)).to_json()
    data = json.loads(text)
    for bad in ("", "{}", "[]", "3", '{"format": 1}', json.dumps({**data, "tile": [2]})):
        with pytest.raises(ValueError, match="this is no layout"):
            share.Layout.from_json(bad)
    with pytest.raises(ValueError, match="format 2; expected 1"):
        share.Layout.from_json(json.dumps({**data, "format": 2}))
    with pytest.raises(ValueError, match="scheme is 'fold'"):
        share.Layout.from_json(json.dumps({**data, "scheme": "fold"}))
    with pytest.raises(ValueError, match="like has other leaves than the layout: dense/bias"):
        share.Layout.from_json(text, {**TREE, "dense": {"kernel": shape(6, 5)}})
    with pytest.raises(ValueError, match="like has other leaves than the layout: more"):
        share.Layout.from_json(text, {**TREE, "more": shape(2)})
