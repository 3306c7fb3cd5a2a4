"""Working blocks out again in the backward pass: the same parameters and numbers, less to keep.

What a backward pass keeps is read from the residuals that jax's linearisation hands over; XLA's CPU
compiler drops the barriers that hold the second computation back, and saves nothing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import nets
from jaxgen.nets.radd import RADDTransformer, TimedTransformer

X, T = jax.random.normal(jax.random.key(1), (4, 8, 8, 1)), jnp.linspace(0.1, 0.9, 4)
IDS = jnp.arange(24).reshape(4, 6) % 5
UNET = functools.partial(
    nets.UNet, width=4, channel_mults=(1,), attention=(8,), num_classes=3, dropout=0.3
)
MLP = functools.partial(nets.MLP, width=16, depth=2, dropout=0.3)
TRANSFORMER = {"vocabulary": 5, "width": 16, "depth": 2, "heads": 2, "dropout": 0.3}
CASES = {
    "unet": (UNET, (X, T, jnp.arange(4) % 3)),
    "mlp": (MLP, (X[:, 0, :2, 0], T)),
    "radd": (functools.partial(RADDTransformer, **TRANSFORMER), (IDS,)),
    "timed": (functools.partial(TimedTransformer, **TRANSFORMER), (IDS, T)),
}


def loss_of(net, args):
    """The mean square of the network under dropout, as a function of its parameters."""

    def loss(params):
        out = net.apply(params, *args, train=True, rngs={"dropout": jax.random.key(7)})
        return jnp.mean(out**2)

    return loss


def stirred(shapes):
    """Parameters of these shapes, none of them zero."""
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(s.dtype), shapes)


def kept_bytes(net, args):
    """Bytes that the backward pass holds at a batch so large that activations are most of them."""
    args = [jax.ShapeDtypeStruct((1024, *a.shape[1:]), a.dtype) for a in args]

    def backward(key, *args):
        return jax.vjp(loss_of(net, args), net.init(key, *args))[1]

    kept = jax.eval_shape(backward, jax.random.key(0), *args)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


# The timed transformer has the plain one's body.
@pytest.mark.parametrize("name", ["unet", "mlp", "radd"])
def test_parameters_and_numbers_are_those_without_it(name):
    make, args = CASES[name]
    plain, remat = make(), make(remat=True)
    shapes = [
        jax.eval_shape(lambda net=net: net.init(jax.random.key(0), *args)) for net in (plain, remat)
    ]
    assert shapes[0] == shapes[1]
    params = stirred(shapes[0])
    (value, grads), (value_remat, grads_remat) = (
        jax.jit(jax.value_and_grad(loss_of(net, args)))(params) for net in (plain, remat)
    )
    # The same sums, fused in another way: some 100 roundings of 2^-24 each, of the largest entry.
    bound = 100 * 2.0**-24
    np.testing.assert_allclose(value_remat, value, rtol=bound)
    largest = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(grads))
    for a, b in zip(jax.tree.leaves(grads_remat), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * largest)


def test_it_starts_from_the_same_numbers():
    make, args = CASES["mlp"]
    first, second = (jax.jit(make(remat=on).init)(jax.random.key(0), *args) for on in (False, True))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_the_backward_pass_keeps_less(name, dtype):
    make, args = CASES[name]
    plain, remat = (kept_bytes(make(dtype=dtype, remat=on), args) for on in (False, True))
    assert remat < 0.6 * plain, (remat, plain)
