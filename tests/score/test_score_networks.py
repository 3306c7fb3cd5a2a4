"""Fields from Flax linen, Flax NNX, Equinox and a closure through one loss, unchanged.

Each network is one dense layer of (x, t); its loss and gradient equal those of the same layer
written out.
"""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen import process, score

X0 = jnp.array([[0.5, -1.0], [1.5, 0.3], [-0.2, 0.1], [0.7, 0.9]])
KEY = jax.random.key(3)


def inputs(x, t):
    return jnp.concatenate([x, t[..., None]], axis=-1)


def mean_loss(field):
    return score.denoising_loss(KEY, field, process.vp(), X0).mean()


def closure(kernel, bias):
    return lambda x, t: inputs(x, t) @ kernel + bias[None]


def assert_equals_closure(loss, kernel_grad, kernel, bias):
    truth, grad = jax.value_and_grad(lambda k: mean_loss(closure(k, bias)))(kernel)
    np.testing.assert_allclose(loss, truth, rtol=1e-5)
    np.testing.assert_allclose(kernel_grad, grad, rtol=1e-4, atol=1e-6)
    assert np.abs(grad).max() > 1e-3


def test_flax_linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, t):
            return nn.Dense(2)(inputs(x, t))

    net = Net()
    variables = net.init(jax.random.key(0), X0, jnp.zeros(4))
    loss, grad = jax.jit(jax.value_and_grad(lambda v: mean_loss(lambda x, t: net.apply(v, x, t))))(
        variables
    )
    layer = variables["params"]["Dense_0"]
    kernel_grad = grad["params"]["Dense_0"]["kernel"]
    assert_equals_closure(loss, kernel_grad, layer["kernel"], layer["bias"])


def test_flax_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x, t):
            return self.dense(inputs(x, t))

    net = Net(nnx.Rngs(0))
    loss, grad = nnx.jit(nnx.value_and_grad(mean_loss))(net)
    kernel, bias = net.dense.kernel[...], net.dense.bias[...]
    assert_equals_closure(loss, grad["dense"]["kernel"][...], kernel, bias)


def test_equinox():
    class Net(eqx.Module):
        dense: eqx.nn.Linear

        def __call__(self, x, t):
            return self.dense(inputs(x, t))

    net = Net(eqx.nn.Linear(3, 2, key=jax.random.key(1)))
    loss, grad = eqx.filter_jit(
        eqx.filter_value_and_grad(lambda net: mean_loss(score.per_example(net)))
    )(net)
    assert_equals_closure(loss, grad.dense.weight.T, net.dense.weight.T, net.dense.bias)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_closure_of_any_precision(dtype):
    kernel, bias = jnp.full((3, 2), 0.5), jnp.array([0.1, -0.2])

    def field(x, t):
        return closure(kernel.astype(dtype), bias.astype(dtype))(x.astype(dtype), t.astype(dtype))

    loss = mean_loss(field)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, mean_loss(closure(kernel, bias)), rtol=0.02)
