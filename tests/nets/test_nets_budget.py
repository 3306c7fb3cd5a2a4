"""The widest network within a budget, against exhaustive counts, from shapes alone."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import nets

X, T = jnp.zeros((1, 8, 8, 1)), jnp.zeros(1)


def perceptron(width):
    """64-width-width-10 with biases: width^2 + 74 width weights, 2 width + 10 biases."""
    sizes = (64, width, width, 10)
    return [
        {"kernel": jnp.zeros((a, b)), "bias": jnp.zeros(b), "step": jnp.zeros((), jnp.int32)}
        for a, b in itertools.pairwise(sizes)
    ]


def test_the_width_solves_the_quadratic():
    for m in (75, 84, 282, 845, 84_479, 84_480, 10**9):
        want = math.floor(-37 + math.sqrt(37**2 + m))
        assert nets.width_for_budget(perceptron, m) == want
        # All: the weights, the biases and three counters.
        every = math.floor(-38 + math.sqrt(38**2 + m + 1000 - 13))
        assert nets.width_for_budget(perceptron, m + 1000, count="all") == every
    assert nets.width_for_budget(perceptron, 84_480, multiple_of=100) == 200
    only_first = nets.width_for_budget(perceptron, 640, select=lambda path, _: path == "0/kernel")
    assert only_first == 10


def flax(net, x):
    return lambda width: net(width).init(jax.random.key(0), x, T)["params"]


FAMILIES = {
    "unet": (flax(lambda width: nets.UNet(width=width), X), 1),
    "ncsnpp": (
        flax(
            lambda width: nets.NCSNpp(
                dataclasses.replace(
                    nets.NCSNPP_CONFIGS["ncsnpp_cifar10"],
                    width=width,
                    channel_mults=(1, 1),
                    blocks=1,
                    attention=(),
                )
            ),
            X,
        ),
        4,
    ),
    "mlp": (flax(lambda width: nets.MLP(width=width, depth=1), jnp.zeros((1, 2))), 1),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_networks_of_the_library(name):
    family, unit = FAMILIES[name]

    def size(width):
        leaves = jax.tree.leaves(jax.eval_shape(lambda: family(width)))
        return sum(leaf.size for leaf in leaves if leaf.ndim >= 2)

    budget = size(5 * unit) + 1
    assert nets.width_for_budget(family, budget, multiple_of=unit) == 5 * unit
    assert nets.width_for_budget(family, budget - 2, multiple_of=unit) == 4 * unit


def test_networks_too_large_to_build_and_shapes():
    def shapes(width):
        return {"w": jax.ShapeDtypeStruct((width, width), np.float32), "activation": jax.nn.relu}

    assert nets.width_for_budget(shapes, 2**60 + 1) == 2**30


def test_bad_input():
    with pytest.raises(ValueError, match="m is 74, and the narrowest network, of width 1, has 75"):
        nets.width_for_budget(perceptron, 74)
    with pytest.raises(ValueError, match="75 parameters at width 1 and 75 at width 2"):
        nets.width_for_budget(lambda width: perceptron(1), 100)
    for wrong in ({"m": 0}, {"m": 0.5}, {"m": 100, "multiple_of": 0}, {"m": 100, "count": "some"}):
        with pytest.raises(ValueError, match=next(iter(reversed(wrong)))):
            nets.width_for_budget(perceptron, **wrong)
