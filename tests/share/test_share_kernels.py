"""The TPU kernels of ``hashed_matmul`` under the strict interpreter, against the dense product."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxgen.share import expand_leaf, leaf, plan, slots
from jaxgen.share.kernels import mosaic_tpu
from jaxgen.share.kernels.tiles import tiles_of

U32, UBF16 = 2.0**-24, 2.0**-8
# Blocks of two tiles of (64, 128) down and one across: several blocks along every axis.
TARGET = (16, 128, 128)
SHAPES = {"a": (60, 100), "b": (150, 300), "c": (100, 20)}


def planned(budget, tile, shapes=SHAPES, **options):
    shapes = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    return plan(shapes, budget, tile=tile, seed=3, **options)


def draw(spec, rows, dtype, pool_dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, spec.matrix[0]))
    dy = rng.normal(size=(rows, spec.matrix[1]))
    return (
        jnp.asarray(x, dtype),
        jnp.asarray(dy, dtype),
        jnp.asarray(rng.normal(size=spec.m), pool_dtype),
    )


def to_pool(matrix, spec):
    """A^T by the reference."""
    like = jnp.zeros(spec.m, jnp.float32)
    (out,) = jax.vjp(lambda pool: expand_leaf(pool, spec), like)[1](jnp.asarray(matrix))
    return np.asarray(out, np.float64)


def wide(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


def bound(terms, magnitude, out, dtype):
    """Rounding of so many float32 sums, and of the result to its dtype."""
    ends = UBF16 * np.abs(out) if dtype == jnp.bfloat16 else 0
    return (terms + 4) * U32 * magnitude + ends + 1e-30


def check(got, expected, limit):
    assert got.shape == expected.shape
    error = np.abs(wide(got) - expected) / limit
    assert error.max() <= 1, f"{error.max()} of the rounding bound, at {error.argmax()}"


def check_product(spec, rows, dtype, pool_dtype, capfd, *, forward, grad_x, grad_pool):
    """Each of the products in the variants that are named, against the dense layer."""
    x, dy, pool = draw(spec, rows, dtype, pool_dtype)
    w = wide(expand_leaf(pool.astype(jnp.float32), spec))
    # A float32 pool is rounded to x's dtype on the way into the product.
    cast = UBF16 if dtype != pool_dtype else 0
    kernel = {"target": TARGET, "interpret": True}
    for name, a, b, variants in (
        ("forward", x, w, forward),
        ("grad_x", dy, w.T, grad_x),
    ):
        expected, magnitude = wide(a) @ b, np.abs(wide(a)) @ np.abs(b)
        limit = bound(a.shape[1], magnitude, expected, dtype) + cast * magnitude
        for resident in variants:
            function = functools.partial(getattr(mosaic_tpu, name), resident=resident, **kernel)
            got = jax.jit(function, static_argnums=2)(a, pool, spec)
            assert got.dtype == dtype
            check(got, expected, limit)
    if grad_pool:
        got = jax.jit(lambda x, dy: mosaic_tpu.grad_pool(x, dy, spec, target=16, interpret=True))(
            x, dy
        )
        assert got.dtype == jnp.float32
        expected = to_pool(np.float32(wide(x).T @ wide(dy)), spec)
        plain = dataclasses.replace(spec, sign=False)
        magnitude = to_pool(np.float32(np.abs(wide(x)).T @ np.abs(wide(dy))), plain)
        terms = rows + 2 * tiles_of(spec).partitions
        check(got, expected, bound(terms, magnitude, 0, jnp.float32))
        # Slots without a weight of this leaf: exact zeros.
        assert not np.any(np.asarray(got)[magnitude == 0])
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def test_products_of_a_leaf_amid_others(capfd):
    # 9 of 12 tiles, in a pool of 4, from its second place on: three partitions, one of them whole.
    spec = leaf(planned(4 * 64 * 128, (64, 128)), "b")
    assert (spec.units, spec.offset, tiles_of(spec).partitions) == (4, 64 * 128, 3)
    check_product(
        spec,
        20,
        jnp.float32,
        jnp.float32,
        capfd,
        forward=[False, True],
        grad_x=[False],
        grad_pool=True,
    )


def test_products_in_bfloat16(capfd):
    # Columns of two times 128 slots, rows that share a block of 128, and a pool of the dtype.
    spec = leaf(planned(0.9, (64, 256)), "b")
    check_product(
        spec,
        20,
        jnp.bfloat16,
        jnp.bfloat16,
        capfd,
        forward=[False],
        grad_x=[True],
        grad_pool=True,
    )


def test_products_of_16_bit_activations_with_a_float32_pool(capfd):
    spec = leaf(planned(1.0, (64, 128), {"w": (60, 100)}), "w")
    check_product(
        spec, 3, jnp.bfloat16, jnp.float32, capfd, forward=[True], grad_x=[False], grad_pool=False
    )


def test_pool_tiles_without_weights_get_zeros(capfd):
    # 2 tiles of a pool of 11: the gradient is written over zeros.
    spec = leaf(planned(0.9, (64, 128)), "c")
    assert tiles_of(spec).touched < spec.units
    check_product(spec, 5, jnp.float32, jnp.float32, capfd, forward=[], grad_x=[], grad_pool=True)


def test_nan_spreads_as_in_the_dense_product_and_padding_stays_out():
    spec = leaf(planned(1.0, (64, 128), {"w": (60, 100)}), "w")
    x, dy, pool = draw(spec, 3, jnp.float32)
    # At full budget each slot is one place: the first is a weight, the last is padding.
    place = np.asarray(slots(spec, jnp.arange(1, dtype=jnp.uint32))[0])[0]
    used = np.zeros(spec.m, bool)
    used[np.asarray(slots(spec, jnp.arange(spec.size, dtype=jnp.uint32))[0])] = True
    pool = jnp.where(jnp.asarray(used), pool, jnp.nan).at[place].set(jnp.nan)

    @jax.jit
    def products(x, dy, pool):
        return (
            mosaic_tpu.forward(x, pool, spec, target=TARGET, interpret=True),
            mosaic_tpu.grad_x(dy, pool, spec, target=TARGET, interpret=True),
        )

    y, dx = products(x, dy, pool)
    assert np.isnan(y[:, 0]).all() and not np.isnan(y[:, 1:]).any()
    assert np.isnan(dx[:, 0]).all() and not np.isnan(dx[:, 1:]).any()


# The strict interpreter takes a batch one by one; the plain one runs what a TPU does.
@pytest.mark.parametrize(
    "mapped",
    ["x", "both, strictly", *(pytest.param(m, marks=pytest.mark.slow) for m in ("pool", "both"))],
)
def test_vmap(mapped, monkeypatch):
    if mapped != "both, strictly":
        monkeypatch.setattr(mosaic_tpu, "_interpreter", lambda interpret: interpret)
    # 2 tiles of a pool of 3.
    spec = leaf(planned(3 * 64 * 128, (64, 128), {"a": (60, 100), "b": (60, 140)}), "b")
    x, dy, pool = (jnp.stack([a, a[::-1] * 2]) for a in draw(spec, 3, jnp.float32))
    if mapped == "x":
        pool = pool[0]
    elif mapped == "pool":
        x, dy = x[0], dy[0]
    axes = (None if mapped == "pool" else 0,) * 2 + (None if mapped == "x" else 0,)
    kernel = {"target": TARGET, "interpret": True}

    def products(x, dy, pool):
        return (
            mosaic_tpu.forward(x, pool, spec, resident=False, **kernel),
            mosaic_tpu.grad_x(dy, pool, spec, resident=True, **kernel),
            mosaic_tpu.grad_pool(x, dy, spec, interpret=True) if mapped == "x" else 0,
        )

    def dense(x, dy, pool):
        w, vjp = jax.vjp(lambda p: expand_leaf(p, spec), pool)
        dot = functools.partial(jnp.matmul, precision="highest")
        (dpool,) = vjp(dot(x.T, dy))
        return dot(x, w), dot(dy, w.T), dpool if mapped == "x" else 0

    got = jax.jit(jax.vmap(products, axes))(x, dy, pool)
    expected = jax.vmap(dense, axes)(x, dy, pool)
    # Sums of 140 products of normals at most: 1e-4 is 20 times their rounding.
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(1.0, spec.scale))


@pytest.mark.parametrize("budget", [0.05, 0.7])
def test_tiles_are_where_the_layout_has_them(budget):
    layout = planned(budget, (8, 16), {"a": (40, 30), "b": (33, 70), "c": (9, 9)})
    for spec in layout.leaves:
        tiles = tiles_of(spec)
        r, c = (i.reshape(-1) for i in np.indices(spec.grid).astype(np.int32))
        pairs = np.indices((spec.units, tiles.partitions)).astype(np.int32)
        pool_tile, q = (i.reshape(-1) for i in pairs)

        @jax.jit
        def found(r, c, pool_tile, q, a, spec=spec, tiles=tiles):
            corner = r * 8 * spec.matrix[1] + c * 16
            made = tiles.made_of(pool_tile, q)
            return tiles.at(r, c), slots(spec, corner)[0], tiles.touch(a), made

        a = np.arange(tiles.touched, dtype=np.int32)
        (p, word), slot, touched, made = jax.tree.map(np.asarray, found(r, c, pool_tile, q, a))
        np.testing.assert_array_equal(p * 128, slot)
        np.testing.assert_array_equal(word, spec.offset + (r * spec.grid[1] + c) * 128)
        used = np.unique(p) if tiles.count < spec.units else np.arange(spec.units)
        np.testing.assert_array_equal(used, touched)
        # Turned round: every tile is found once, from its pool tile.
        has, row, column, first = made
        local = (row * spec.grid[1] + column)[has]
        np.testing.assert_array_equal(np.sort(local), np.arange(tiles.count))
        np.testing.assert_array_equal(p[local], pool_tile[has])
        np.testing.assert_array_equal(word[local], first[has])


def test_the_residence_of_the_pool_and_what_is_read_of_it():
    spec = leaf(planned(1 << 20, (256, 256), {"w": (4096, 4096)}), "w")
    assert mosaic_tpu.is_resident(512, jnp.float32, spec)
    assert not mosaic_tpu.is_resident(512, jnp.float32, dataclasses.replace(spec, m=1 << 21))
    # A leaf smaller than the pool is fetched by tiles, unless it is fetched often.
    small = leaf(planned(1 << 20, (256, 256), {"a": (4096, 4096), "b": (256, 256)}), "b")
    assert not mosaic_tpu.is_resident(512, jnp.float32, small)
    assert mosaic_tpu.is_resident(512 * 17, jnp.float32, small)
    # The pool once, or the virtual weight once for each block of rows.
    read = functools.partial(mosaic_tpu.weight_bytes, spec=spec, pool_dtype=jnp.float32)
    assert read(513) == read(513, resident=True) == 4 << 20
    assert read(512, resident=False) == 4 << 24
    assert read(513, resident=False) == read(513, resident=False, is_forward=False) == 8 << 24


def test_what_is_not_served_is_refused_with_the_reason():
    serve = functools.partial(mosaic_tpu.supports, (4, 150))
    assert serve(jnp.float32, leaf(planned(0.5, (8, 128)), "b")) is None
    refused = {
        "tiles": (jnp.float32, leaf(planned(0.5, None), "b")),
        "scheme": (jnp.float32, leaf(planned(0.5, None, scheme="roast"), "b")),
        "128": (jnp.float32, leaf(planned(0.5, (8, 64)), "b")),
        "from 16": (jnp.bfloat16, leaf(planned(0.5, (8, 128)), "b")),
        "power of two": (jnp.float32, leaf(planned(0.5, (24, 128)), "b")),
        "float16": (jnp.float16, leaf(planned(0.5, (8, 128)), "b")),
        "slots": (jnp.float32, leaf(planned(1.0, (1024, 1024)), "b")),
    }
    for why, (dtype, spec) in refused.items():
        assert why in serve(dtype, spec)
        with pytest.raises(NotImplementedError, match=why):
            mosaic_tpu.forward(jnp.zeros((4, 150), dtype), jnp.zeros(spec.m), spec)
    spec = leaf(planned(0.5, (8, 128), {"w": (8192, 8192)}), "w")
    with pytest.raises(NotImplementedError, match="resident"):
        jax.eval_shape(
            lambda x, pool: mosaic_tpu.forward(x, pool, spec, resident=True),
            jax.ShapeDtypeStruct((4, 8192), jnp.float32),
            jax.ShapeDtypeStruct((spec.m,), jnp.float32),
        )


def test_no_rows():
    spec = leaf(planned(0.5, (8, 128)), "b")
    x, dy, pool = draw(spec, 0, jnp.float32)
    assert mosaic_tpu.forward(x, pool, spec).shape == (0, 300)
    assert mosaic_tpu.grad_x(dy, pool, spec).shape == (0, 150)
    np.testing.assert_array_equal(mosaic_tpu.grad_pool(x, dy, spec), np.zeros(spec.m))


def test_traces_under_shard_map_with_its_check():
    spec = leaf(planned(0.9, (64, 128)), "c")
    x, dy, pool = draw(spec, 16, jnp.float32)

    def products(x, dy, pool):
        dpool = mosaic_tpu.grad_pool(x, dy, spec)
        return (
            mosaic_tpu.forward(x, pool, spec),
            mosaic_tpu.grad_x(dy, pool, spec),
            jax.lax.psum(dpool, "data"),
        )

    specs = (P("data"), P("data"), P())
    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("data",), (kind,))
        args = [
            jax.device_put(a, jax.NamedSharding(mesh, s))
            for a, s in zip((x, dy, pool), specs, strict=True)
        ]
        mapped = jax.shard_map(products, mesh=mesh, in_specs=specs, out_specs=specs)
        shapes = jax.eval_shape(mapped, *args)
        assert [s.shape for s in shapes] == [(16, 20), (16, 100), (spec.m,)]


@pytest.mark.parametrize("mapped", [False, True])
def test_lowers_for_tpu_without_its_compiler(mapped):
    spec = leaf(planned(0.3, (16, 128)), "b")

    def products(x, dy, pool):
        return (
            mosaic_tpu.forward(x, pool, spec, precision="highest"),
            mosaic_tpu.grad_x(dy, pool, spec, resident=True),
            mosaic_tpu.grad_pool(x, dy, spec),
        )

    args = draw(spec, 20, jnp.float32)
    args = [jnp.stack([a, a]) for a in args] if mapped else args
    function = jax.jit(jax.vmap(products) if mapped else products)
    lowered = jax.export.export(function, platforms=["tpu"])(*args)
    assert lowered.mlir_module().count("@tpu_custom_call") == 3
