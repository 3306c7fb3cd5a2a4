"""The kernels compiled for TPUs that are not there: what they cost in memory beside the control.

The compiler runs in a process of its own, since it needs its environment before jax starts.
"""

import functools
import importlib.util
import json

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is missing: pip install 'jaxgen[tpu-compile]'",
)

TOPOLOGIES = ("v5e:2x2", "v6e:2x2")
DTYPES = ("float32", "bfloat16")
FUSED = ("forward", "forward resident", "grad_x", "grad_x resident", "grad_pool")
CONTROLS = ("expanded forward", "expanded gradients")
AWKWARD = ("few rows", "many rows", "small tiles", "wide tiles", "mapped", "large blocks")


@pytest.fixture(scope="module")
def compiled(compiled_for_tpu):
    return compiled_for_tpu(__file__)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_fused_products_take_no_memory_of_their_own(compiled, topology, dtype):
    cases = compiled[topology][dtype]
    for name in FUSED:
        memory = cases[name]
        assert memory["temp"] < 1e6, (name, memory)
        assert memory["peak"] <= 1.05 * memory["ends"], (name, memory)


def test_where_the_weight_is_built_the_figures_say_so(compiled):
    for name in CONTROLS:
        memory = compiled["v5e:2x2"]["float32"][name]
        assert memory["temp"] >= 1e6, (name, memory)
        assert memory["peak"] > 1.05 * memory["ends"], (name, memory)


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_shapes_compile(compiled, name):
    assert compiled["awkward"][name]["temp"] < 1e6


def main():
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from jaxgen.share import expand_leaf, leaf, plan
    from jaxgen.share.kernels import mosaic_tpu

    def shape(dtype, *sizes):
        return jax.ShapeDtypeStruct(sizes, dtype)

    def compile_for(topology, function, *operands):
        device = topologies.get_topology_desc(topology, "tpu").devices[0]
        where = jax.sharding.SingleDeviceSharding(device)
        made = jax.jit(function, in_shardings=where, out_shardings=where).lower(*operands)
        memory = made.compile().memory_analysis()
        return {
            "temp": memory.temp_size_in_bytes,
            "peak": memory.peak_memory_in_bytes,
            "ends": memory.argument_size_in_bytes + memory.output_size_in_bytes,
        }

    def spec_of(budget, tile, **shapes):
        shapes = {k: shape(jnp.float32, *s) for k, s in shapes.items()}
        return leaf(plan(shapes, budget, tile=tile), list(shapes)[-1])

    report = {}
    m, k, n = 4096, 4096, 16384
    spec = spec_of(1 << 20, (256, 256), w=(k, n))
    for topology in TOPOLOGIES:
        report[topology] = {}
        for dtype in DTYPES:
            x, dy, pool = shape(dtype, m, k), shape(dtype, m, n), shape(dtype, spec.m)
            products = {
                "forward": (mosaic_tpu.forward, x, pool),
                "grad_x": (mosaic_tpu.grad_x, dy, pool),
                "grad_pool": (mosaic_tpu.grad_pool, x, dy),
            }
            cases = report[topology][dtype] = {}
            for name, (product, *operands) in products.items():
                for resident in (False, True) if name != "grad_pool" else (None,):
                    option = {} if resident is None else {"resident": resident}
                    cases[name + " resident" * bool(resident)] = compile_for(
                        topology, functools.partial(product, spec=spec, **option), *operands
                    )
    x, dy, pool = (shape(jnp.float32, *sizes) for sizes in ((m, k), (m, n), (spec.m,)))

    def expanded(x, pool):
        return x @ expand_leaf(pool, spec)

    def gradients(x, pool, dy):
        return jax.vjp(expanded, x, pool)[1](dy)

    controls = ((expanded, x, pool), (gradients, x, pool, dy))
    for name, (function, *operands) in zip(CONTROLS, controls, strict=True):
        report["v5e:2x2"]["float32"][name] = compile_for("v5e:2x2", function, *operands)

    def awkward(rows, dtype, spec, axes=None, **options):
        x, dy = (shape(dtype, rows, size) for size in spec.matrix)
        pool = shape(jnp.float32, spec.m)

        def products(x, dy, pool):
            return (
                mosaic_tpu.forward(x, pool, spec, **options),
                mosaic_tpu.grad_x(dy, pool, spec, **options),
                mosaic_tpu.grad_pool(x, dy, spec),
            )

        if axes is not None:
            products = jax.vmap(products, axes)
            x, dy, pool = (
                a if axis is None else shape(a.dtype, 3, *a.shape)
                for a, axis in zip((x, dy, pool), axes, strict=True)
            )
        return compile_for("v5e:2x2", products, x, dy, pool)

    odd = {"a": (200, 300), "b": (1000, 777)}
    last = {"a": (1000, 777), "b": (200, 300)}
    report["awkward"] = {
        "few rows": awkward(3, jnp.bfloat16, spec_of(0.3, (128, 128), **odd)),
        "many rows": awkward(1000, jnp.float32, spec_of(0.3, (64, 256), **odd), resident=False),
        "small tiles": awkward(37, jnp.bfloat16, spec_of(0.3, (16, 128), **odd), resident=False),
        "wide tiles": awkward(37, jnp.float32, spec_of(0.3, (8, 1024), **last)),
        "mapped": awkward(37, jnp.float32, spec_of(0.9, (128, 128), **last), (0, 0, 0)),
        # What a chip with 64 MiB of VMEM or more gets.
        "large blocks": awkward(
            2500,
            jnp.float32,
            spec_of(1 << 23, (128, 128), w=(4096, 4096)),
            resident=True,
            target=mosaic_tpu._LARGE,
        ),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
