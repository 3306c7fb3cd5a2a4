"""Expand, its gradient and its inverse against Python integers and a dense matrix A."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxgen import prune, share
from jaxgen.share import gather, hashing

P = 2**31 - 1


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


# --- the reference: Python integers, one weight at a time -------------------------------------


def fmix(v):
    v = (v ^ (v >> 16)) * 0x85EBCA6B % 2**32
    v = (v ^ (v >> 13)) * 0xC2B2AE35 % 2**32
    return v ^ (v >> 16)


def by_hand(spec):
    """Slot and sign of every weight of a leaf, row-major: two lists."""

    def key(name, low=0):
        return low + fmix(fmix(name ^ 0x5EED) ^ spec.seed) % (P - low)

    columns = spec.shape[-1]
    bk, bn = spec.tile or (1, 1)
    across = -(-columns // bn)
    slots, signs = [], []
    for i in range(spec.size):
        at, within = i, 0
        (r, dr), (c, dc) = divmod(i // columns, bk), divmod(i % columns, bn)
        if spec.tile:
            within = dr * bn + dc
            at = (r * across + c) * bk * bn + within
        at += spec.offset
        if spec.scheme == "stable":
            q, t = divmod(at, spec.m)
            unit = bk * bn
            u = (key(1, 1) * q + key(2)) % P % (spec.m // unit)
            slots.append((u * unit + t) % spec.m)
        elif spec.scheme == "roast":
            chunk = (at - within) // (bk * bn)
            start = (key(4) * chunk + key(5, 1) * chunk * chunk + key(6)) % P
            slots.append(start % (spec.m - bk * bn + 1) + within)
        else:
            slots.append((key(7) * at + key(8, 1) * at * at + key(9)) % P % spec.m)
        word = at % 2**32 ^ fmix(fmix(3 ^ 0x5EED) ^ spec.seed)
        signs.append(1 - 2 * (fmix(word) & 1) if spec.sign else 1)
    return slots, signs


TREE = {"a": shape(7, 9), "b": shape(3, 5, 13)}  # 63 and 195 weights
STD = {"a": 0.02, "b": 0.3}
CASES = {
    "stable": {"budget": 57},  # 4.53 partitions
    "stable, full": {"budget": 1.0, "seed": 5},
    "stable, a leaf cut once": {"budget": 200, "seed": 1},
    "stable, a leaf of two parts": {"budget": 150, "seed": 4},
    "stable, many partitions": {"budget": 9, "seed": 2**32 - 1},
    "stable, one slot": {"budget": 1, "sign": False},
    "stable, tiles": {"budget": 80, "tile": (2, 4)},
    "stable, many tiles": {"budget": 24, "tile": (3, 4), "seed": 7},
    "stable, full tiles": {"budget": 1.0, "tile": (4, 8), "seed": 9},
    "roast": {"budget": 50, "scheme": "roast", "chunk": 8},
    "roast, one window": {"budget": 6, "scheme": "roast", "chunk": (2, 3), "sign": False},
    "hashednet": {"budget": 57, "scheme": "hashednet"},
    "hashednet, one slot": {"budget": 1, "scheme": "hashednet", "seed": 3},
}


# Each compiles a program of its own; these have a close relative among the others.
SIBLINGS = (
    "stable, full",
    "stable, a leaf of two parts",
    "stable, many tiles",
    "hashednet, one slot",
)
NAMES = [pytest.param(n, marks=[pytest.mark.slow] if n in SIBLINGS else []) for n in CASES]


@dataclasses.dataclass
class Case:
    layout: share.Layout
    slots: list  # per leaf
    signs: list

    @functools.cached_property
    def matrix(self):
        """A, ``(n, m)``."""
        a = np.zeros((self.layout.n, self.layout.m))
        lam = np.repeat([s.scale for s in self.layout.leaves], [s.size for s in self.layout.leaves])
        a[np.arange(self.layout.n), np.concatenate(self.slots)] = lam * np.concatenate(self.signs)
        return a


@functools.cache
def case(name):
    layout = share.plan(TREE, scale=STD, **CASES[name])
    hands = [by_hand(spec) for spec in layout.leaves]
    return Case(layout, [np.array(s) for s, _ in hands], [np.array(g) for _, g in hands])


def flat(tree):
    return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree)])


@pytest.fixture(scope="module")
def results():
    """All that a case is asked, from one compiled program each."""

    @functools.cache
    def run(name):
        layout = case(name).layout

        def theta(pool):
            return flat(share.expand(share.Shared(pool, {}), layout))

        def loss(pool, v):
            return jnp.vdot(jnp.sin(theta(pool)), v)

        def unflat(v):
            return {"a": v[:63].reshape(7, 9), "b": v[63:].reshape(3, 5, 13)}

        @jax.jit
        def all_of_it(pool, v, u):
            gradient, back = jax.vjp(lambda p: jax.grad(loss)(p, v), pool)
            return {
                "expand": theta(pool),
                "slots": [gather.slots(s, jnp.arange(s.size)) for s in layout.leaves],
                "gradient": gradient,
                "second": back(u)[0],
                "compress": share.compress(unflat(v), layout).pool,
            }

        rng = np.random.default_rng(0)
        inputs = [rng.normal(size=k).astype(np.float32) for k in (layout.m, layout.n, layout.m)]
        inputs[0] *= np.float32(layout.pool_std)
        return inputs, jax.tree.map(np.asarray, all_of_it(*inputs))

    return run


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_lambda_sign_slot(name, results):
    """Exactly: one product in float32."""
    (pool, _, _), out = results(name)
    layout, at = case(name).layout, 0
    for k, spec in enumerate(layout.leaves):
        slots, signs = case(name).slots[k], case(name).signs[k]
        expected = np.float32(spec.scale) * (signs.astype(np.float32) * pool[slots])
        np.testing.assert_array_equal(out["expand"][at : at + spec.size], expected)
        np.testing.assert_array_equal(out["slots"][k][0], slots)
        np.testing.assert_array_equal(out["slots"][k][1], signs)
        at += spec.size


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_first_and_second_order_are_the_matrix_transposed(name, results):
    (pool, v, u), out = results(name)
    a = case(name).matrix
    theta = a @ pool
    for found, size, terms in (
        (out["gradient"], v, np.cos(theta) * v),
        (out["second"], v * (a @ u), -np.sin(theta) * v * (a @ u)),
    ):
        # 258 terms at most to a sum, each of them and each sum rounded to 2^-24.
        bound = 300 * 2**-24 * (np.abs(a).T @ np.abs(size))
        assert np.all(np.abs(found - a.T @ terms) <= bound)


@pytest.mark.parametrize("name", NAMES)
def test_compress_is_least_squares(name, results):
    (_, v, _), out = results(name)
    a = case(name).matrix
    best = np.linalg.lstsq(a, v.astype(np.float64), rcond=None)[0]  # zero for an empty slot
    np.testing.assert_allclose(out["compress"], best, rtol=1e-5, atol=1e-5 * np.abs(best).max())
    assert np.all(out["compress"][np.abs(a).sum(0) == 0] == 0)
    if isinstance(CASES[name]["budget"], float):
        np.testing.assert_allclose(a @ out["compress"], v, rtol=1e-6)


def test_hashed_slots_in_several_blocks(monkeypatch):
    monkeypatch.setattr(gather, "_BLOCK", 32)  # of leaves of 63 and 195 weights
    layout = share.plan(TREE, 57, scheme="hashednet", scale=STD, seed=1234)
    pool = jnp.asarray(np.random.default_rng(1).normal(size=57), jnp.float32)
    expand = jax.jit(lambda p: flat([share.expand_leaf(p, s) for s in layout.leaves]))
    slots, signs = map(np.concatenate, zip(*map(by_hand, layout.leaves), strict=True))
    lam = np.repeat(np.float32([s.scale for s in layout.leaves]), [63, 195])
    expected = lam * (signs.astype(np.float32) * np.asarray(pool)[slots])
    np.testing.assert_array_equal(expand(pool), expected)
    gradient = jax.jit(jax.grad(lambda p: expand(p).sum()))(pool)
    expected = np.bincount(slots, lam.astype(np.float64) * signs, minlength=57)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-4)


# --- known answers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "budget", "expected", "band"),
    [
        ("stable", 1.0, 0.0, 1e-12),
        ("hashednet", 1.0, math.exp(-1), 0.012),
        ("roast", 1.0, 0.371, 0.03),  # windows of 32: three standard deviations
        ("stable", 0.5, 0.5, 0.012),
        ("hashednet", 0.5, 1 - 0.5 * (1 - math.exp(-2)), 0.012),
    ],
)
def test_share_of_a_dense_network_that_a_pool_cannot_make(scheme, budget, expected, band):
    """The squared error over the squared norm, n = 2^14: 1 - m/n, and more by empty slots."""
    params = {"w": jax.random.normal(jax.random.key(0), (128, 128))}
    layout = share.plan(params, budget, scheme=scheme)
    back = jax.jit(lambda p: share.expand(share.compress(p, layout), layout))(params)["w"]
    error = float(((back - params["w"]) ** 2).sum() / (params["w"] ** 2).sum())
    assert abs(error - expected) < band
    if expected == 0:
        np.testing.assert_allclose(back, params["w"], rtol=1e-6)


N, M, DRAWS = 1024, 128, 4000


@pytest.fixture(scope="module")
def heavy():
    """A vector with a heavy tail, of norm one."""
    x = np.arange(1, N + 1) ** -0.8
    return x / np.sqrt((x**2).sum())


def squared_norms(scheme, x):
    """``|A^T x|^2`` for 4000 seeds, A without scale; through the keys and hashes of a ``Spec``."""
    layout = share.plan({"w": shape(32, 32)}, M, scheme=scheme)
    seeds = [dataclasses.replace(layout.leaves[0], seed=seed) for seed in range(DRAWS)]
    index = np.arange(N, dtype=np.uint32)
    if scheme == "stable":
        shift = np.stack([s.shift(np.arange(N // M)) for s in seeds])
        slots = (np.repeat(shift, M, axis=1) + np.tile(index[:M], N // M)) % M
    else:
        keys = np.array([[s.key(7), s.key(8, 1), s.key(9)] for s in seeds], np.uint32)
        slots = hashing.quadratic31(index[None], *(k[:, None] for k in keys.T)) % M
    words = np.array([s.sign_seed for s in seeds], np.uint32)
    signs = hashing.sign(index[None], words[:, None])
    for k in (0, DRAWS - 1):
        at, sign = jax.jit(gather.slots, static_argnums=0)(seeds[k], index)
        np.testing.assert_array_equal(slots[k], at)
        np.testing.assert_array_equal(signs[k], sign)
    sums = np.stack([np.bincount(j, x * g, minlength=M) for j, g in zip(slots, signs, strict=True)])
    return (sums**2).sum(1)


def pruned_norms(x):
    """The same of a vector of which an eighth is kept at random, unbiased."""

    def mask(key):
        return prune.random(key, {"w": jnp.zeros((32, 32))}, M)["w"].reshape(-1)

    masks = jax.jit(jax.vmap(mask))(jax.random.split(jax.random.key(0), DRAWS))
    return np.asarray(masks) @ (x**2) * N / M


def test_variance_of_norms_under_a_budget(heavy):
    x2 = heavy**2
    theory = {
        "pruning": (N / M - 1) * (x2**2).sum(),
        # Pairs that may collide: all, or those of different partitions.
        "hashednet": 2 / M * (1 - (x2**2).sum()),
        "stable": 2 / M * (1 - (x2.reshape(-1, M).sum(1) ** 2).sum()),
    }
    stated = {"pruning": 1.60, "hashednet": 0.0121, "stable": 8.7e-4}
    assert theory == pytest.approx(stated, rel=0.01)
    draws = {"pruning": pruned_norms(heavy)}
    draws |= {scheme: squared_norms(scheme, heavy) for scheme in ("hashednet", "stable")}
    for name, found in draws.items():
        assert found.var() == pytest.approx(theory[name], rel=0.1), name
        assert abs(found.mean() - 1) < 4 * found.std() / math.sqrt(DRAWS), name


# --- what is compiled -------------------------------------------------------------------------

BIG, BIG_M = 2**22, 2**16


def compiled(layout, dtype=jnp.float32):
    """Expand and its gradient, compiled and lowered, for one leaf."""
    spec = layout.leaves[0]
    pool = jax.ShapeDtypeStruct((layout.m,), dtype)
    weight = jax.ShapeDtypeStruct(spec.shape, dtype)

    def expand(pool):
        return share.expand(share.Shared(pool, {}), layout)["w"]

    def gradient(pool, weight):
        return jax.vjp(expand, pool)[1](weight)[0]

    return jax.jit(expand).lower(pool), jax.jit(gradient).lower(pool, weight)


def constant_sizes(text):
    """Entries of each constant in a lowered program, splats left out."""
    found = re.findall(r"constant dense<[\[\"].*?> : tensor<([0-9x]+)x\w+>", text)
    return [math.prod(map(int, sizes.split("x"))) for sizes in found]


@pytest.mark.parametrize("scheme", ["stable", "roast", "hashednet"])
def test_no_index_of_the_weights_is_stored(scheme):
    """2^22 weights from 2^16 slots: temporary bytes below a quarter of the weights', both ways."""
    layout = share.plan({"w": shape(2048, 2048)}, BIG_M, scheme=scheme)
    for lowered in compiled(layout):
        assert max(constant_sizes(lowered.as_text()), default=0) < 100
        program = lowered.compile()
        assert program.memory_analysis().temp_size_in_bytes < BIG
        if scheme == "stable":
            assert "scatter" not in program.as_text()


def test_constants_would_be_seen():
    index = np.arange(1000, dtype=np.int32)
    text = jax.jit(lambda pool: pool[index]).lower(shape(2000)).as_text()
    assert max(constant_sizes(text)) == 1000


def test_the_program_does_not_grow_with_the_partitions():
    few, many = (
        [len(p.as_text()) for p in compiled(share.plan({"w": shape(500, 40)}, m))]
        for m in (2000, 40)
    )
    for a, b in zip(few, many, strict=True):
        assert abs(a - b) < 0.03 * a


def test_the_gradient_is_the_same_to_the_bit_in_every_run():
    layout = share.plan({"w": shape(256, 256)}, 999)
    gradient = compiled(layout)[1].compile()
    weight = jax.random.normal(jax.random.key(0), (256, 256))
    first = np.asarray(gradient(jnp.zeros(999), weight))
    for _ in range(3):
        np.testing.assert_array_equal(first, gradient(jnp.zeros(999), weight))


# --- transforms and meshes --------------------------------------------------------------------

SCHEMES = {
    # Leaf "a" is less than a partition, leaf "b" a row of them.
    "stable": share.plan(TREE, 32, scale=STD, tile=(2, 2)),
    "roast": share.plan(TREE, 56, scale=STD, scheme="roast", chunk=8),
    "hashednet": share.plan(TREE, 56, scale=STD, scheme="hashednet"),
}


@jax.jit
def both_of(pools):
    """Of every scheme, the weights and a gradient."""
    out = {}
    for name, layout in SCHEMES.items():

        def theta(pool, layout=layout):
            return flat(share.expand(share.Shared(pool, {}), layout))

        out[name] = theta(pools[name]), jax.grad(lambda p, f=theta: (f(p) ** 3).sum())(pools[name])
    return out


@pytest.fixture(scope="module")
def pools():
    keys = jax.random.split(jax.random.key(0), 8)
    return {
        name: jnp.stack([jax.random.normal(k, (layout.m,)) for k in keys])
        for name, layout in SCHEMES.items()
    }


@pytest.fixture(scope="module")
def alone(pools):
    """Each of eight pools on its own."""
    rows = [both_of(jax.tree.map(lambda p, k=k: p[k], pools)) for k in range(8)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def same(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()),
        found,
        expected,
    )


def test_mapped_over_pools(pools, alone):
    same(jax.jit(jax.vmap(both_of))(pools), alone)


def mesh(kind):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices, set before jax is imported")
    return jax.make_mesh((8,), ("data",), axis_types=(kind,))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "spec", [PartitionSpec("data"), pytest.param(PartitionSpec(), marks=pytest.mark.slow)]
)
def test_on_eight_devices(kind, spec, pools, alone):
    sharding = NamedSharding(mesh(kind), spec)
    placed = jax.device_put(jax.tree.map(lambda p: p[0], pools), sharding)
    same(both_of(placed), jax.tree.map(lambda x: x[0], alone))


def test_in_shard_map(pools, alone):
    """A pool to each device, and one for all of them; ``check_vma`` is on by default."""
    devices = mesh(AxisType.Auto)
    data = PartitionSpec("data")

    def local(pools, shared):
        one = jax.tree.map(lambda p: p[0], pools)
        add_axis = functools.partial(jax.tree.map, lambda x: x[None])
        return add_axis(both_of(one)), both_of(shared)

    mapped = jax.shard_map(
        local, mesh=devices, in_specs=(data, PartitionSpec()), out_specs=(data, PartitionSpec())
    )
    found, shared = jax.jit(mapped)(pools, jax.tree.map(lambda p: p[0], pools))
    same(found, alone)
    same(shared, jax.tree.map(lambda x: x[0], alone))


# --- dtypes, NaN ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["stable", "hashednet", pytest.param("roast", marks=pytest.mark.slow)]
)
def test_bfloat16_pools_round_once_and_sum_in_float32(name):
    layout = share.plan({"w": shape(64, 64)}, 4096 // 512, **rule(name))
    pool = jax.random.normal(jax.random.key(0), (layout.m,), jnp.bfloat16)
    ones = jnp.ones((64, 64), jnp.bfloat16)

    @jax.jit
    def run(pool, ones):
        back = jax.vjp(lambda p: share.expand_leaf(p, layout.leaves[0]), pool)
        at = gather.slots(layout.leaves[0], jnp.arange(4096))
        return back[0], back[1](ones)[0], at, share.compress({"w": ones}, layout).pool

    weight, gradient, (slots, signs), compressed = run(pool, ones)
    lam = np.float32(layout.leaves[0].scale)
    exact = lam * np.asarray(pool, np.float32)[slots] * signs
    np.testing.assert_array_equal(weight.reshape(-1), jnp.asarray(exact, jnp.bfloat16))
    # Sums of some 512 ones: in bfloat16 they would stop at 256.
    total = lam * np.bincount(slots, minlength=layout.m)
    assert weight.dtype == gradient.dtype == compressed.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(gradient, np.float32), total, rtol=2**-8)
    np.testing.assert_allclose(np.asarray(compressed, np.float32), 1 / lam, rtol=2**-8)


def rule(name):
    options = {"scheme": name, "sign": False, "scale": {"w": 0.0237}}
    return {**options, "chunk": 4} if name == "roast" else options


@pytest.mark.parametrize("name", ["stable", "hashednet"])
def test_float64_pools(name):
    with jax.enable_x64(True):
        layout = share.plan({"w": shape(16, 16)}, 37, scheme=name)
        pool = jax.random.normal(jax.random.key(0), (37,), jnp.float64)
        expand = jax.jit(lambda p: share.expand_leaf(p, layout.leaves[0]))
        weight = np.asarray(expand(pool)).reshape(-1)
        slots, signs = map(np.array, by_hand(layout.leaves[0]))
        lam = layout.leaves[0].scale
        np.testing.assert_allclose(weight, lam * signs * pool[slots], rtol=1e-15)
        gradient = jax.jit(jax.grad(lambda p: (expand(p) ** 2).sum()))(pool)
        expected = np.bincount(slots, 2 * lam * signs * weight, minlength=37)
        np.testing.assert_allclose(gradient, expected, rtol=1e-13)
        assert weight.dtype == gradient.dtype == np.float64
        assert share.init(jax.random.key(0), layout, dtype=jnp.float64).pool.dtype == np.float64


def test_nan_reaches_the_weights_of_its_slot_and_no_other(pools):
    spoilt = {name: np.array(p[0]) for name, p in pools.items()}
    for pool in spoilt.values():
        pool[3] = np.nan
    for name, (theta, gradient) in both_of(spoilt).items():
        slots = np.concatenate([by_hand(spec)[0] for spec in SCHEMES[name].leaves])
        assert np.any(slots == 3)
        np.testing.assert_array_equal(np.isnan(theta), slots == 3)
        # And back: the gradient of a weight that is NaN is NaN too.
        np.testing.assert_array_equal(np.isnan(gradient), np.arange(len(gradient)) == 3)


# --- trees and bad input ----------------------------------------------------------------------

PARAMS = {
    "dense": {"kernel": np.full((4, 6), 2.0, np.float32), "bias": np.arange(6.0)},
    "steps": np.array(3),
}
LAYOUT = share.plan(PARAMS, 0.5, scale="flax")


def test_what_passes_through_is_kept_as_it_is():
    shared = share.init(jax.random.key(0), LAYOUT, PARAMS)
    assert list(shared.rest) == ["dense/bias", "steps"]
    back = share.expand(shared, LAYOUT)
    assert jax.tree.structure(back) == jax.tree.structure(PARAMS)
    assert back["steps"] is PARAMS["steps"] and back["dense"]["bias"] is PARAMS["dense"]["bias"]
    assert share.compress(PARAMS, LAYOUT).rest == shared.rest
    by_name = share.init(jax.random.key(0), LAYOUT, {"dense/bias": np.zeros(6), "steps": 1})
    np.testing.assert_array_equal(by_name.pool, shared.pool)


def test_a_new_pool_starts_every_leaf_at_its_own_deviation():
    """Three leaves of 2^14 weights from 2^13 normals, off by 1 / sqrt(2^14) of themselves."""
    tree = {"a": shape(128, 128), "b": shape(16384, 1), "c": shape(2, 2, 4096)}
    std = {"a": 0.02, "b": 3.0, "c": 0.5}
    layout = share.plan(tree, 2**13, scale=std, pool_std=0.1)
    shared = share.init(jax.random.key(0), layout)
    assert shared.pool.dtype == jnp.float32 and shared.rest == {}
    bound = 4 / math.sqrt(2**14)
    assert abs(shared.pool.std() / 0.1 - 1) < bound
    for name, leaf in jax.jit(lambda s: share.expand(s, layout))(shared).items():
        assert abs(float(leaf.std()) / std[name] - 1) < bound
        assert abs(float(leaf.mean())) < 4 * std[name] / math.sqrt(2**13)


def test_bad_input_is_named():
    key, good = jax.random.key(0), share.init(jax.random.key(0), LAYOUT, PARAMS)
    spec = LAYOUT.leaves[0]
    dense = PARAMS["dense"]
    transposed = {**PARAMS, "dense": {**dense, "kernel": dense["kernel"].T}}
    whole = {**PARAMS, "dense": {**dense, "kernel": np.ones((4, 6), int)}}
    bad_bias = {**PARAMS, "dense": {**dense, "bias": np.zeros(5)}}
    cases = [
        (ValueError, r"pool has shape \(11,\); expected \(12,\)", share.expand,
         (good._replace(pool=jnp.zeros(11)), LAYOUT)),
        (ValueError, r"pool has shape \(12, 1\); expected \(12,\)", share.expand_leaf,
         (jnp.zeros((12, 1)), spec)),
        (TypeError, "pool has dtype int32; expected a floating", share.expand,
         (good._replace(pool=jnp.zeros(12, jnp.int32)), LAYOUT)),
        (TypeError, "pool has dtype complex64; expected a floating", share.expand_leaf,
         (jnp.zeros(12, jnp.complex64), spec)),
        (ValueError, r"rest lacks dense/bias, which passes through \(one axis\)", share.expand,
         (good._replace(rest={"steps": 3}), LAYOUT)),
        (ValueError, r"dense/bias has shape \(5,\); expected \(6,\)", share.expand,
         (good._replace(rest={"steps": 3, "dense/bias": jnp.zeros(5)}), LAYOUT)),
        (ValueError, "rest lacks dense/bias", share.init, (key, LAYOUT)),
        (ValueError, r"dense/bias has shape \(5,\); expected \(6,\)", share.init,
         (key, LAYOUT, bad_bias)),
        (TypeError, "dtype is .*int32.*; expected a floating", share.init,
         (key, LAYOUT, PARAMS, jnp.int32)),
        (TypeError, "key", share.init, (jnp.zeros(2, jnp.uint32), LAYOUT, PARAMS)),
        (ValueError, "params lack dense/kernel, which the layout shares", share.compress,
         ({"dense": {"bias": np.zeros(6)}, "steps": 1}, LAYOUT)),
        (ValueError, r"dense/kernel has shape \(6, 4\); expected \(4, 6\)", share.compress,
         (transposed, LAYOUT)),
        (TypeError, "dense/kernel has dtype int.*; expected a floating", share.compress,
         (whole, LAYOUT)),
        (ValueError, r"dense/bias has shape \(5,\); expected \(6,\)", share.compress,
         (bad_bias, LAYOUT)),
    ]  # fmt: skip
    for error, message, function, arguments in cases:
        with pytest.raises(error, match=message):
            function(*arguments)


def test_a_leaf_too_large_to_build_says_so():
    layout = share.plan({"w": shape(2**16, 2**15)}, 100)
    with pytest.raises(NotImplementedError, match="w has 2147483648 weights, more than are built"):
        share.expand(share.init(jax.random.key(0), layout), layout)


def test_what_cannot_be_expanded_is_named():
    layout = share.plan({"a": shape(4, 3)}, 5)
    with pytest.raises(TypeError, match=r"shared is dict; expected Shared\(pool, rest\)"):
        share.expand({"a": jnp.ones((4, 3))}, layout)
    clash = share.plan({"a": shape(4, 3), "a/b": shape(4, 3)}, 5)
    bare = share.Layout.from_json(clash.to_json())
    with pytest.raises(ValueError, match="a is a leaf and a folder; read the layout with like="):
        share.expand(share.init(jax.random.key(0), bare), bare)
    large = share.plan({"w": shape(2**16, 2**15)}, 100)
    with pytest.raises(NotImplementedError, match="w has 2147483648 weights"):
        share.pool_scale(large)
