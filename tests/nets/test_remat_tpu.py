"""A deep network's training step compiled for a TPU that is not there: less memory with remat.

The compiler runs in a process of its own, since it needs its environment before jax starts. (On a
CPU there is nothing to see: XLA drops the barriers that hold the second forward pass back.)
"""

import importlib.util
import json

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is missing: pip install 'jaxgen[tpu-compile]'",
    ),
]


@pytest.fixture(scope="module")
def compiled(compiled_for_tpu):
    return compiled_for_tpu(__file__)


def test_memory_falls_and_arithmetic_grows_by_a_forward_pass_at_most(compiled):
    plain, remat = compiled["float32"], compiled["float32 remat"]
    assert remat["peak"] < 0.7 * plain["peak"], (remat, plain)
    assert remat["temporary"] < 0.5 * plain["temporary"], (remat, plain)
    # A forward pass is a third of a step.
    assert 1.1 * plain["flops"] < remat["flops"] < 1.34 * plain["flops"], (remat, plain)


def test_bfloat16_takes_less_than_float32(compiled):
    assert compiled["bfloat16"]["peak"] < 0.75 * compiled["float32"]["peak"]


def main():
    import jax
    import jax.numpy as jnp
    import optax
    from jax.experimental import topologies

    from jaxgen import nets, process, score, train

    device = topologies.get_topology_desc("v5e:2x2", "tpu").devices[0]
    where = jax.sharding.SingleDeviceSharding(device)

    def placed(tree):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree
        )

    report = {}
    optimizer, sde = optax.adam(1e-3), process.vp()
    batch = jax.ShapeDtypeStruct((4096, 2), jnp.float32)
    for dtype, remat in ((None, False), (None, True), (jnp.bfloat16, False)):
        net = nets.MLP(width=256, depth=16, dtype=dtype, remat=remat)

        def loss(key, params, x0, net=net):
            return score.denoising_loss(key, lambda x, t: net.apply(params, x, t), sde, x0)

        def start(net=net):
            params = net.init(jax.random.key(0), jnp.zeros((1, 2)), jnp.zeros((1,)))
            return train.TrainState.create(jax.random.key(1), params, optimizer)

        step = train.make_train_step(loss, optimizer, dtype=dtype)
        made = step.lower(placed(jax.eval_shape(start)), placed(batch)).compile()
        name = ("float32" if dtype is None else "bfloat16") + " remat" * remat
        report[name] = {
            "peak": made.memory_analysis().peak_memory_in_bytes,
            "temporary": made.memory_analysis().temp_size_in_bytes,
            "flops": made.cost_analysis()["flops"],
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
