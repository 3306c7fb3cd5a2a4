"""The TPU kernels of ``hashed_matmul`` under the strict interpreter, against the dense product."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.share import expand_leaf, leaf, plan
from jaxgen.share.kernels import mosaic_tpu
from jaxgen.share.kernels.tiles import tiles_of

U32, UBF16 = 2.0**-24, 2.0**-9
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
    assert "race" not in (out := capfd.readouterr()).out.lower() + out.err.lower()


def test_products_of_a_leaf_amid_others(capfd):
    # 9 of 12 tiles, in a pool of 4, from its second place on: three partitions, one of them whole.
    spec = leaf(planned(4 * 64 * 128, (64, 128)), "b")
    assert (spec.units, spec.offset, tiles_of(spec).partitions) == (4, 64 * 128, 3)
    both = (False, True)
    check_product(
        spec, 37, jnp.float32, jnp.float32, capfd, forward=both, grad_x=both, grad_pool=True
    )
