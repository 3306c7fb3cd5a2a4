"""The training step compiled for TPUs that are not there: in what dtype gradients are summed.

XLA for CPUs sums bfloat16 in float32 of itself, so that only this compiler shows the difference.
It runs in a process of its own, since it needs its environment before jax starts.
"""

import importlib.util
import json
import re

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is missing: pip install 'jaxgen[tpu-compile]'",
    ),
]

MESHES = ("data=8", "data=4,fsdp=2")
# What crosses the chips: name of the operation and the types of its results.
COLLECTIVE = re.compile(r"= (.*?) (all-reduce|reduce-scatter|all-gather|all-to-all)(?:-start)?\(")


@pytest.fixture(scope="module")
def compiled(compiled_for_tpu):
    return compiled_for_tpu(__file__)


def dtypes(found, *names):
    return {
        dtype
        for shapes, name in found
        if name in names
        for dtype in re.findall(r"\b([a-z]+\d+)\[", shapes)
    }


@pytest.mark.parametrize("words", MESHES)
def test_gradients_of_examples_apart_are_summed_in_float32(compiled, words):
    found = compiled[words]["per_example"]
    assert dtypes(found, "all-reduce", "reduce-scatter") == {"f32"}
    # Nothing of the batch moves; parameters that are split are gathered as the network reads them.
    assert dtypes(found, "all-to-all") == set()
    assert dtypes(found, "all-gather") == ({"bf16"} if "fsdp" in words else set())
    names = {name for _, name in found}
    assert ("reduce-scatter" in names) == ("fsdp" in words)


@pytest.mark.parametrize("words", MESHES)
def test_xla_alone_sums_a_bfloat16_network_in_bfloat16(compiled, words):
    """The control, and the reason for ``per_example``."""
    assert "bf16" in dtypes(compiled[words]["whole"], "all-reduce", "reduce-scatter")


def main():
    import jax
    import jax.numpy as jnp
    import optax
    from jax.experimental import topologies

    from jaxgen import train
    from jaxgen.train.mesh import batch_sharding, make_mesh, state_shardings

    optimizer = optax.adam(1e-3)

    def loss(key, params, x):
        del key
        hidden = jnp.tanh(x.astype(jnp.bfloat16) @ params["a"] + params["b"])
        return jnp.sum((hidden @ params["c"]).astype(jnp.float32) ** 2, axis=1)

    def make():
        sizes = {"a": (64, 256), "b": (1, 256), "c": (256, 64)}
        params = {name: jnp.zeros(shape) for name, shape in sizes.items()}
        return train.TrainState.create(jax.random.key(0), params, optimizer)

    shapes = jax.eval_shape(make)
    devices = topologies.get_topology_desc("v5e:2x4", "tpu").devices
    report = {}
    for words in MESHES:
        mesh = make_mesh(words, devices)
        state = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            shapes,
            state_shardings(shapes, mesh),
        )
        batch = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=batch_sharding(mesh))
        report[words] = {}
        for name in ("per_example", "whole"):
            step = train.make_train_step(
                loss, optimizer, dtype=jnp.bfloat16, per_example=name == "per_example"
            )
            text = step.lower(state, batch).compile().as_text()
            report[words][name] = COLLECTIVE.findall(text)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
