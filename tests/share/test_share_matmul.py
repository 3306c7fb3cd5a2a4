"""The product with a shared leaf in plain XLA: both forms against the expanded weight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxgen import share
from jaxgen.share import gather
from jaxgen.share.kernels import xla

FORMS = ("xla_loop", "xla_expand")


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def second_leaf(k, n, m, *, before=0, tile=None, **options):
    """The spec of a ``(k, n)`` leaf behind one of ``before`` weights."""
    tree = {"w": shape(k, n)}
    if before:
        tree["a"] = shape(1, before)
    layout = share.plan(tree, m, tile=tile, scale={"a": 1.0, "w": 0.3}, pool_std=0.5, **options)
    return share.leaf(layout, "w")


def weight_and_slots(spec, pool):
    """The weight in float64 and the slot and signed scale of each entry, in numpy."""
    slots, signs = gather.slots(spec, np.arange(spec.size))
    factor = spec.scale * signs
    return (factor * np.asarray(pool, np.float64)[slots]).reshape(spec.shape), slots, factor


def check(found, x, pool, dy, spec, rounding=2**-24):
    """Output and gradients of one form against numpy in float64, term by term."""
    y, dx, dpool = (np.asarray(part, np.float64) for part in found)
    weight, slots, factor = weight_and_slots(spec, pool)
    x, dy = (np.asarray(v, np.float64).reshape(-1, v.shape[-1]) for v in (x, dy))

    def transposed(dw, factor):
        return np.bincount(slots, dw.ravel() * factor, minlength=spec.m)

    expected = (x @ weight, dy @ weight.T, transposed(x.T @ dy, factor))
    a, w, b = np.abs(x), np.abs(weight), np.abs(dy)
    sizes = (a @ w, b @ w.T, transposed(a.T @ b, np.abs(factor)))
    terms = (len(weight), dy.shape[1], len(x) * spec.size / spec.m)
    for name, got, want, size, count in zip(
        ("y", "dx", "dpool"), (y, dx, dpool), expected, sizes, terms, strict=True
    ):
        bound = (count + 8) * rounding * size + 1e-30
        worst = np.max(np.abs(got.reshape(want.shape) - want) / bound)
        assert worst <= 1, f"{name} of {spec}: {worst} times its bound"


def product(form, spec):
    """``f(x, pool, dy)``: the product and its gradients in x and the pool."""

    def f(x, pool, dy):
        y, back = jax.vjp(
            lambda x, pool: share.hashed_matmul(x, pool, spec, implementation=form), x, pool
        )
        return y, *back(dy)

    return f


def draw(spec, batch=(2, 3), seed=0):
    rng = np.random.default_rng(seed)
    sizes = ((*batch, spec.shape[0]), (spec.m,), (*batch, spec.shape[1]))
    return tuple(rng.normal(size=s).astype(np.float32) for s in sizes)


@pytest.fixture
def blocks_of(monkeypatch):
    return lambda weights: monkeypatch.setattr(xla, "_BLOCK", weights)


# --- every way to cut a leaf ------------------------------------------------------------------

# (entries of a block, spec). Seeds differ so that no two cases share a trace.
CUTS = {
    "whole": (999, second_leaf(10, 8, 9, before=5, seed=2)),
    "one window": (32, second_leaf(10, 8, 64, seed=3)),
    "two windows": (40, second_leaf(13, 8, 57, before=63, seed=4)),
    "two windows of a long row": (4, second_leaf(5, 11, 13, before=7, sign=False, seed=5)),
    "exact windows": (32, second_leaf(14, 8, 16, seed=6)),
    "many windows": (40, second_leaf(13, 8, 9, before=5, seed=7)),
    "many windows of a long row": (4, second_leaf(5, 31, 7, before=8, sign=False, seed=8)),
    "one slot": (16, second_leaf(7, 5, 1, seed=9)),
    "full": (40, second_leaf(13, 7, 100, before=9, seed=10)),
    "one row": (40, second_leaf(1, 9, 5, seed=12)),
    "one column": (3, second_leaf(11, 1, 4, before=3, seed=13)),
    "tiles, one window": (64, second_leaf(13, 7, 64, tile=(2, 4), seed=14)),
    "tiles, two windows": (64, second_leaf(21, 7, 72, before=9, tile=(2, 4), seed=15)),
    "tiles, many windows": (64, second_leaf(21, 7, 24, before=9, tile=(4, 2), seed=16)),
    "tiles wider than the leaf": (64, second_leaf(5, 3, 64, before=9, tile=(4, 8), seed=17)),
}


def kind(block, spec):
    """What the loop does on a leaf: (scans, has a remainder, windows, they are exact)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "_BLOCK", block)
        cut = xla._Blocks(spec)
        rows = cut.rows if cut.full else cut.left
        starts = cut.starts()[: max(cut.full, 1)]
        windows, exact = xla._windows(spec, starts, cut.entries(rows))
    return cut.full > 1, cut.left > 0, min(windows, 3), exact


def test_the_cuts_are_of_every_kind():
    kinds = {kind(*case) for case in CUTS.values()}
    for windows, exact in ((1, True), (2, False), (2, True), (3, False)):
        assert {(True, left, windows, exact) for left in (False, True)} & kinds, (windows, exact)
    assert any(left for _, left, *_ in kinds) and any(not scans for scans, *_ in kinds)


@pytest.mark.parametrize("name", CUTS)
def test_the_loop_is_the_product_with_the_weight(name, blocks_of):
    block, spec = CUTS[name]
    blocks_of(block)
    inputs = draw(spec)
    check(jax.jit(product("xla_loop", spec))(*inputs), *inputs, spec)


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(
    st.integers(1, 40),
    st.integers(1, 12),
    st.floats(0.0, 1.0),
    st.integers(0, 30),
    st.integers(1, 200),
    st.sampled_from([None, None, (2, 3), (4, 4), (1, 8)]),
    st.integers(0, 2**32 - 1),
)
def test_awkward_leaves(k, n, budget, before, block, tile, seed):
    least = 1 if tile is None else tile[0] * tile[1]
    m = max(least, round(budget * (k * n + before)))
    spec = second_leaf(k, n, m, before=before, tile=tile, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "_BLOCK", block)
        inputs = draw(spec, batch=(4,), seed=seed)
        check(jax.jit(product("xla_loop", spec))(*inputs), *inputs, spec)


EXPANDED = {
    "stable": second_leaf(13, 8, 57, before=63, seed=21),
    "tiles": second_leaf(13, 7, 72, before=9, tile=(2, 4), seed=22),
    "roast": second_leaf(13, 8, 57, before=63, scheme="roast", chunk=4, seed=23),
    "hashednet": second_leaf(13, 8, 57, before=63, scheme="hashednet", seed=24),
}


@pytest.mark.parametrize("name", EXPANDED)
def test_expanding_is_the_product_with_the_weight(name):
    spec = EXPANDED[name]
    inputs = draw(spec)

    @jax.jit
    def run(x, pool, dy):
        def plain(x, pool):
            return x @ share.expand_leaf(pool, spec)

        y, back = jax.vjp(plain, x, pool)
        return product("xla_expand", spec)(x, pool, dy), (y, *back(dy))

    found, plain = run(*inputs)
    check(found, *inputs, spec)
    check(plain, *inputs, spec)


def test_places_near_the_end_of_the_largest_pool_stay_in_an_int32():
    spec = second_leaf(2**16, 2**16, 2**31 - 1)
    q = jnp.arange(5, dtype=jnp.int32)
    slot = jax.jit(lambda q, t: xla._slot(spec, q, t))
    for t in (0, 1, 2**30, spec.m - 1, -1, -(2**30), 1 - spec.m, -spec.m):
        expected = [(int(spec.shift(k)) + t) % spec.m for k in range(5)]
        np.testing.assert_array_equal(slot(q, jnp.int32(t)), expected)


# --- dtypes, NaN ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_sums_in_float32(form, blocks_of):
    """Sums of 2048 ones: in bfloat16 they would stop at 256."""
    blocks_of(1000)
    layout = share.plan(
        {"w": shape(2048, 4)}, 16, sign=False, scale={"w": 1.0}, pool_std=1.0, seed=31
    )
    spec = layout.leaves[0]
    inputs = [jnp.ones(s, jnp.bfloat16) for s in ((512, 2048), (16,), (512, 4))]
    y, dx, dpool = jax.jit(product(form, spec))(*inputs)
    assert y.dtype == dx.dtype == dpool.dtype == jnp.bfloat16
    assert np.all(y == 2048) and np.all(dx == 4) and np.all(dpool == 512 * 512)


@pytest.mark.parametrize("form", FORMS)
def test_dtypes_are_those_of_the_inputs(form, blocks_of):
    """An activation in bfloat16, a pool in float32: each gradient in its own dtype."""
    block, spec = CUTS["two windows"]
    blocks_of(block)
    spec = dataclasses.replace(spec, seed=32)
    x, pool, dy = draw(spec)
    rounded = [jnp.asarray(v, jnp.bfloat16) for v in (x, dy)]
    y, dx, dpool = jax.jit(product(form, spec))(rounded[0], pool, rounded[1])
    assert (y.dtype, dx.dtype, dpool.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    check((y, dx, dpool), rounded[0], pool, rounded[1], spec, rounding=2**-8 / 8)
    with jax.enable_x64(True):
        spec = dataclasses.replace(spec, seed=33)
        inputs = [np.asarray(v, np.float64) for v in (x, pool, dy)]
        found = jax.jit(product(form, spec))(*inputs)
        assert all(part.dtype == np.float64 for part in found)
        check(found, *inputs, spec, rounding=2**-53)


@pytest.mark.parametrize("name", ["two windows", "many windows"])
def test_nan_reaches_what_it_enters_and_nothing_else(name, blocks_of):
    block, spec = CUTS[name]
    blocks_of(block)
    spec = dataclasses.replace(spec, seed=34)
    x, pool, dy = draw(spec, batch=(3,))
    run = jax.jit(product("xla_loop", spec))
    at = np.asarray(gather.slots(spec, np.arange(spec.size))[0]).reshape(spec.shape)
    spoilt = pool.copy()
    spoilt[2] = np.nan
    y, dx, dpool = run(x, spoilt, dy)
    np.testing.assert_array_equal(np.isnan(y), np.broadcast_to((at == 2).any(0), y.shape))
    np.testing.assert_array_equal(np.isnan(dx), np.broadcast_to((at == 2).any(1), dx.shape))
    assert not np.isnan(dpool).any()
    spoilt = x.copy()
    spoilt[1, 4] = np.nan
    y, dx, dpool = map(np.isnan, run(spoilt, pool, dy))
    np.testing.assert_array_equal(y, np.arange(3)[:, None] == 1 + 0 * np.arange(8))
    assert not dx.any()
    np.testing.assert_array_equal(dpool, np.isin(np.arange(spec.m), at[4]))


# --- transforms and meshes --------------------------------------------------------------------

PAIR = {form: second_leaf(13, 8, 57, before=63, seed=40 + i) for i, form in enumerate(FORMS)}


@jax.jit
def both_forms(x, pool, dy):
    return {form: product(form, spec)(x, pool, dy) for form, spec in PAIR.items()}


def check_both(found, x, pool, dy):
    for form, spec in PAIR.items():
        check(found[form], x, pool, dy, spec)


@pytest.fixture
def small_blocks(blocks_of):
    blocks_of(40)


@pytest.fixture(scope="module")
def stacked():
    """Eight of each operand."""
    drawn = [draw(PAIR["xla_loop"], batch=(2,), seed=k) for k in range(8)]
    return [np.stack(part) for part in zip(*drawn, strict=True)]


@pytest.mark.parametrize("mapped", ["both", "pool", pytest.param("x", marks=pytest.mark.slow)])
def test_mapped(mapped, stacked, small_blocks):
    axes = (None if mapped == "pool" else 0, None if mapped == "x" else 0, 0)
    inputs = [v if axis == 0 else v[0] for v, axis in zip(stacked, axes, strict=True)]
    found = jax.jit(jax.vmap(both_forms, axes))(*inputs)
    for k in range(0, 8, 3):
        one = [v[k] if axis == 0 else v[0] for v, axis in zip(stacked, axes, strict=True)]
        check_both(jax.tree.map(lambda out, k=k: out[k], found), *one)


def mesh(kind):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices, set before jax is imported")
    return jax.make_mesh((8,), ("data",), axis_types=(kind,))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_batch_on_eight_devices(kind, stacked, small_blocks):
    xs, pools, dys = stacked
    devices = mesh(kind)
    spread, whole = (NamedSharding(devices, PartitionSpec(*p)) for p in (("data",), ()))
    x, pool, dy = xs.reshape(16, -1), pools[0], dys.reshape(16, -1)

    @jax.jit
    def run(x, pool, dy):
        def loss(form, x, pool):
            return jnp.vdot(share.hashed_matmul(x, pool, PAIR[form], implementation=form), dy)

        grads = {form: jax.grad(loss, (1, 2))(form, x, pool) for form in FORMS}
        return {
            form: (share.hashed_matmul(x, pool, PAIR[form], implementation=form), *grads[form])
            for form in FORMS
        }

    dy_placed = jax.device_put(dy, whole)
    found = run(jax.device_put(x, spread), jax.device_put(pool, whole), dy_placed)
    check_both(found, x, pool, dy)


def test_in_shard_map(stacked, small_blocks):
    """A batch to each device, the pool whole on all: its gradient is the sum over them."""
    xs, pools, dys = stacked
    data, whole = PartitionSpec("data"), PartitionSpec()
    x, pool, dy = xs.reshape(16, -1), pools[0], dys.reshape(16, -1)

    def local(x, pool, dy):
        # Of a pool that differs between devices, and summed by hand.
        varying = jax.lax.pcast(pool, "data", to="varying")
        out = both_forms(x, varying, dy)
        return {form: (y, dx, jax.lax.psum(dpool, "data")) for form, (y, dx, dpool) in out.items()}

    def loss(x, pool, dy):
        found = [share.hashed_matmul(x, pool, PAIR[f], implementation=f) for f in FORMS]
        return jax.lax.psum(sum(jnp.vdot(y, dy) for y in found), "data")

    devices = mesh(AxisType.Auto)
    mapped = jax.shard_map(
        local,
        mesh=devices,
        in_specs=(data, whole, data),
        out_specs=dict.fromkeys(FORMS, (data, data, whole)),
    )
    found = jax.jit(mapped)(x, pool, dy)
    check_both(found, x, pool, dy)
    # The same by the derivative of the mapped function, of which the pool does not vary.
    total = jax.shard_map(loss, mesh=devices, in_specs=(data, whole, data), out_specs=whole)
    gradient = jax.jit(jax.grad(total, 1))(x, pool, dy)
    expected = sum(np.asarray(found[form][2]) for form in FORMS)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_forward_mode_and_second_order_of_leaves_that_are_expanded():
    """What ``None`` takes for small leaves: exact likelihoods need a derivative of a gradient."""
    spec = PAIR["xla_expand"]
    x, pool, _ = draw(spec, batch=())
    weight = weight_and_slots(spec, pool)[0]

    @jax.jit
    def run(x):
        def f(x):
            return jnp.tanh(share.hashed_matmul(x, pool, spec))

        return jax.jacfwd(f)(x), jax.hessian(lambda x: f(x).sum())(x)

    jacobian, hessian = run(x)
    t = np.tanh(x.astype(np.float64) @ weight)
    np.testing.assert_allclose(jacobian, ((1 - t**2) * weight).T, rtol=1e-4, atol=1e-5)
    expected = (weight * (-2 * t * (1 - t**2))) @ weight.T
    np.testing.assert_allclose(hessian, expected, rtol=1e-3, atol=1e-4)


# --- what is compiled -------------------------------------------------------------------------


def test_the_loop_never_builds_the_weight():
    """4096 x 4096 from 2^20 slots, batch 256: temporary bytes below half of the weight's."""
    spec = share.plan({"w": shape(4096, 4096)}, 2**20).leaves[0]
    weight = 4 * spec.size
    inputs = shape(256, 4096), shape(2**20), shape(256, 4096)

    def temporary(form):
        program = jax.jit(product(form, spec)).lower(*inputs).compile()
        return program.memory_analysis().temp_size_in_bytes

    loop, expand = temporary("xla_loop"), temporary("xla_expand")
    assert loop < 0.5 * weight, loop / weight
    assert expand > 0.9 * weight, "the control builds it"


# --- the choice -------------------------------------------------------------------------------


def test_one_block_is_expanded_and_more_are_looped_over(blocks_of):
    spec = second_leaf(16, 8, 64)
    for block, form in ((128, "xla_expand"), (127, "xla_loop"), (32, "xla_loop")):
        blocks_of(block)
        for implementation in (None, "xla"):
            chosen = share.matmul._choose(jnp.ones((2, 16)), jnp.ones(64), spec, implementation)
            on_gpu = "xla_expand" if implementation is None else form
            assert chosen == (form, on_gpu, form)
    other = dataclasses.replace(spec, scheme="hashednet")
    chosen = share.matmul._choose(jnp.ones((2, 16)), jnp.ones(64), other, None)
    assert set(chosen) == {"xla_expand"}


def test_a_leaf_with_tiles_has_the_kernel_on_a_tpu_and_a_plain_form_elsewhere():
    spec = second_leaf(256, 256, 2**15, tile=(128, 128))
    inputs = draw(spec, batch=(8,))
    half = jnp.ones(spec.m, jnp.float16)
    assert set(share.matmul._choose(half[None], half, spec, None)) == {"xla_expand"}
    for dtype in (jnp.float32, jnp.bfloat16):
        x, pool, dy = (jnp.asarray(v, dtype) for v in inputs)
        assert share.matmul._choose(x, pool, spec, None) == (
            "mosaic_tpu",
            "xla_expand",
            "xla_expand",
        )
        y, dx, dpool = jax.jit(product(None, spec))(x, pool, dy)
        plain = jax.jit(product("xla_expand", spec))(x, pool, dy)
        for found, expected in zip((y, dx, dpool), plain, strict=True):
            assert found.dtype == dtype
            scale = float(jnp.abs(expected).max())
            error = np.abs(np.asarray(found, np.float32) - np.asarray(expected, np.float32))
            assert error.max() < 4 * jnp.finfo(dtype).eps * scale


def test_names_are_honoured_or_refused_with_the_reasons():
    spec, hashed = PAIR["xla_loop"], EXPANDED["hashednet"]
    x = jnp.ones((2, 13))
    pool = jnp.ones(57)

    def call(implementation, spec=spec):
        return share.hashed_matmul(x, pool, spec, implementation=implementation)

    for name in ("xla_lop", "pallas", ["xla_lop", "xla"]):
        with pytest.raises(ValueError, match=r"implementation is '\w+'; expected one of xla, xla_"):
            call(name)
    with pytest.raises(ValueError, match="implementation names none; expected one of xla"):
        call([])
    loop = r'xla_loop: the loop serves scheme "stable", not \'hashednet\''
    with pytest.raises(NotImplementedError, match=rf"w of shape \(13, 8\): {loop}"):
        call("xla_loop", hashed)
    with pytest.raises(NotImplementedError, match="kernels serve layouts with tiles"):
        call("mosaic_tpu")
    with pytest.raises(NotImplementedError, match=rf"{loop}; mosaic_tpu: .*; interpret: "):
        call(["xla_loop", "mosaic_tpu", "interpret"], hashed)
    # In order: the first that serves.
    y = call(["mosaic_tpu", "xla_loop"])
    np.testing.assert_array_equal(y, call("xla_loop"))
    for name in ("xla", None, ["xla_loop", "xla"]):
        np.testing.assert_allclose(call(name, hashed), call("xla_expand", hashed))


def test_bad_input_is_named():
    spec = PAIR["xla_loop"]
    cube = share.plan({"w": shape(2, 3, 4)}, 5).leaves[0]
    x, pool = jnp.ones((2, 13)), jnp.ones(57)
    for error, message, *arguments in (
        (ValueError, r"x has shape \(2, 12\); expected \(..., 13\) for w", x[:, 1:], pool, spec),
        (ValueError, r"x has shape \(\); expected \(..., 13\) for w", jnp.ones(()), pool, spec),
        (TypeError, "x has dtype int32; expected", x.astype(jnp.int32), pool, spec),
        (ValueError, r"pool has shape \(56,\); expected \(57,\)", x, pool[1:], spec),
        (TypeError, "pool has dtype int32; expected", x, pool.astype(jnp.int32), spec),
        (ValueError, r"w has shape \(2, 3, 4\); expected \(K, N\)", jnp.ones(4), pool[:5], cube),
    ):
        with pytest.raises(error, match=message):
            share.hashed_matmul(*arguments)


def test_empty_and_single_batches(small_blocks):
    spec = PAIR["xla_loop"]
    x, pool, dy = draw(spec, batch=())
    run = jax.jit(product("xla_loop", spec))
    check(run(x, pool, dy), x, pool, dy, spec)
    y, dx, dpool = run(np.ones((0, 13), np.float32), pool, np.ones((0, 8), np.float32))
    assert y.shape == (0, 8) and dx.shape == (0, 13) and np.all(dpool == 0)
