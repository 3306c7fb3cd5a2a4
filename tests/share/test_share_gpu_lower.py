"""The GPU kernels: lowered for CUDA on any machine, and run in jax's GPU interpreter.

Lowering runs jax's part of the compiler, layouts and shared memory included, not NVIDIA's.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxgen.share import expand_leaf, leaf, plan, slots
from jaxgen.share.kernels import mosaic_gpu
from jaxgen.share.kernels.tiles import tiles_of

SHAPES = {"a": (60, 100), "b": (100, 140)}
# Of a result: its rounding to bfloat16. The products are exact and their sums of 200 terms at most
# are good to 1e-5 of the largest.
UBF16 = 2.0**-8


def spec_of(budget, tile, shapes=SHAPES):
    shapes = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    return leaf(plan(shapes, budget, tile=tile, seed=3), list(shapes)[-1])


def draw(spec, rows):
    rng = np.random.default_rng(0)
    sizes = [(rows, spec.matrix[0]), (rows, spec.matrix[1]), spec.m]
    return [jnp.asarray(rng.normal(size=size), jnp.bfloat16) for size in sizes]


@pytest.mark.parametrize("mapped", [False, True])
def test_lowers_for_cuda(mapped):
    spec = spec_of(0.4, (128, 256) if mapped else (64, 64), {"w": (500, 777)})
    pool_dtype = jnp.float32 if mapped else jnp.bfloat16

    def products(x, dy, pool):
        return (
            mosaic_gpu.forward(x, pool, spec),
            mosaic_gpu.grad_x(dy, pool, spec),
            mosaic_gpu.grad_pool(x, dy, spec),
        )

    batch = (3,) if mapped else ()
    args = [
        jax.ShapeDtypeStruct((*batch, *shape), dtype)
        for shape, dtype in (
            ((300, 500), jnp.bfloat16),
            ((300, 777), jnp.bfloat16),
            ((spec.m,), pool_dtype),
        )
    ]
    function = jax.jit(jax.vmap(products) if mapped else products)
    lowered = jax.export.export(function, platforms=["cuda"])(*args)
    assert lowered.mlir_module().count("@mosaic_gpu") >= 3
    shapes = [(*batch, *shape) for shape in ((300, 777), (300, 500), (spec.m,))]
    assert [a.shape for a in lowered.out_avals] == shapes


@pytest.fixture(scope="module")
def interpret():
    try:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
    except ImportError as error:
        pytest.skip(f"this jax has no GPU interpreter: {error}")
    return InterpretGPUParams(detect_races=True)


@pytest.fixture
def multiply(monkeypatch):
    """Transposed operands, which the interpreter does not know, as transposed copies."""

    def multiply(total, a, b, transposed):
        if transposed is None:
            plgpu.wgmma(total, a, b)
            plgpu.wgmma_wait(0)
            return
        ref = a if transposed == "a" else b

        def copied(copy):
            copy[...] = ref[...].T
            plgpu.commit_smem()
            plgpu.wgmma(total, *((copy, b) if transposed == "a" else (a, copy)))
            plgpu.wgmma_wait(0)

        pl.run_scoped(copied, plgpu.SMEM(ref.shape[::-1], ref.dtype))

    monkeypatch.setattr(mosaic_gpu, "_multiply", multiply)


def f32(x):
    return np.asarray(x.astype(jnp.float32))


def test_products_of_a_leaf_amid_others(interpret, multiply, capfd):
    # 4 tiles in a pool of 3, from its second place on: two partitions; a tile is 2 x 3 blocks.
    spec = spec_of(3 * 128 * 192, (128, 192), {"a": (60, 100), "b": (140, 200)})
    assert (tiles_of(spec).count, spec.units, tiles_of(spec).partitions) == (4, 3, 2)
    x, dy, pool = draw(spec, 150)
    w, vjp = jax.vjp(lambda pool: expand_leaf(pool, spec), pool.astype(jnp.float32))
    w = np.asarray(w)
    for function, args, expected, relative in (
        (mosaic_gpu.forward, (x, pool), f32(x) @ w, UBF16),
        (mosaic_gpu.grad_x, (dy, pool), f32(dy) @ w.T, UBF16),
        (mosaic_gpu.grad_pool, (x, dy), f32(vjp(jnp.asarray(f32(x).T @ f32(dy)))[0]), 0),
    ):
        got = jax.jit(lambda *a, f=function: f(*a, spec, interpret=interpret))(*args)
        limit = relative * np.abs(expected) + 1e-5 * np.abs(expected).max()
        np.testing.assert_array_less(np.abs(f32(got) - expected), limit)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def test_nan_in_the_padding_stays_out(interpret, multiply):
    spec = spec_of(1.0, (64, 64), {"w": (30, 40)})
    x, dy, pool = draw(spec, 10)
    used = np.zeros(spec.m, bool)
    used[np.asarray(slots(spec, jnp.arange(spec.size, dtype=jnp.uint32))[0])] = True
    pool = jnp.where(jnp.asarray(used), pool, jnp.nan)
    for function, args in ((mosaic_gpu.forward, (x, pool)), (mosaic_gpu.grad_x, (dy, pool))):
        got = jax.jit(lambda *a, f=function: f(*a, spec, interpret=interpret))(*args)
        assert np.isfinite(f32(got)).all()


def test_what_is_not_served_is_refused_with_the_reason():
    refused = {
        "float32": (jnp.float32, spec_of(0.5, (64, 64))),
        "multiples of 64": (jnp.bfloat16, spec_of(0.5, (32, 128))),
        "tiles": (jnp.bfloat16, spec_of(0.5, None)),
    }
    assert mosaic_gpu.supports((4, 100), jnp.bfloat16, spec_of(0.5, (64, 64))) is None
    for why, (dtype, spec) in refused.items():
        assert why in mosaic_gpu.supports((4, 100), dtype, spec)
        with pytest.raises(NotImplementedError, match=why):
            mosaic_gpu.forward(jnp.zeros((4, 100), dtype), jnp.zeros(spec.m), spec)
    spec = spec_of(0.5, (64, 64))
    with pytest.raises(NotImplementedError, match="pool has dtype float16"):
        mosaic_gpu.forward(jnp.zeros((4, 100), jnp.bfloat16), jnp.zeros(spec.m, jnp.float16), spec)


def test_another_kind_of_gpu_is_refused(monkeypatch):
    class Ampere:
        compute_capability = "8.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Ampere()])
    reason = mosaic_gpu.supports((4, 100), jnp.bfloat16, spec_of(0.5, (64, 64)))
    assert "8.0" in reason


def test_no_rows():
    spec = spec_of(0.5, (64, 64))
    x, dy, pool = draw(spec, 0)
    assert mosaic_gpu.forward(x, pool, spec).shape == (0, 140)
    assert mosaic_gpu.grad_x(dy, pool, spec).shape == (0, 100)
    np.testing.assert_array_equal(mosaic_gpu.grad_pool(x, dy, spec), np.zeros(spec.m))
