"""A layer of shared parameters inside somebody else's Flax NNX model.

    python examples/shared_layer_nnx.py

Two matrices of a digits classifier live in one pool of a twentieth of their weights; the products
are `share.hashed_matmul`, which makes the weight as it multiplies. The pool is one `nnx.Param`
that both layers refer to. Half a minute on two CPU cores.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from jaxgen import share

WIDTH = 512


class SharedLinear(nnx.Module):
    """`nnx.Linear` whose kernel is a leaf of a pool."""

    def __init__(self, pool, spec):
        self.pool, self.spec = pool, nnx.static(spec)
        self.bias = nnx.Param(jnp.zeros(spec.shape[1]))

    def __call__(self, x):
        """Map `(n, K)` to `(n, N)`."""
        return share.hashed_matmul(x, self.pool[...], self.spec) + self.bias[None]


class Classifier(nnx.Module):
    """The model: it asks its layers for nothing but a call."""

    def __init__(self, first, second, rngs):
        self.first, self.second = first, second
        self.last = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, x):
        """Logits `(n, 10)` of images `(n, 64)`."""
        return self.last(nnx.relu(self.second(nnx.relu(self.first(x)))))


def dense_model(seed=0):
    """The model as it was."""
    rngs = nnx.Rngs(seed)
    return Classifier(nnx.Linear(64, WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs), rngs)


def shared_model(budget=0.05, seed=0):
    """The model with its first two matrices in one pool, and the pool's layout."""
    shapes = {
        "first": jax.ShapeDtypeStruct((64, WIDTH), jnp.float32),
        "second": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32),
    }
    layout = share.plan(shapes, budget)
    pool = nnx.Param(share.init(jax.random.key(seed), layout).pool)
    first, second = (SharedLinear(pool, share.leaf(layout, name)) for name in shapes)
    return Classifier(first, second, nnx.Rngs(seed)), layout


def digits():
    """Images `(n, 64)` in [0, 1] and labels of training and test."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = jnp.asarray(images[order] / 16, jnp.float32), jnp.asarray(labels[order])
    return (images[:1257], labels[:1257]), (images[1257:], labels[1257:])


def fit(model, rule, train, steps):
    """A loop that does not know what it trains."""
    optimizer = nnx.Optimizer(model, rule, wrt=nnx.Param)
    x, y = train

    @nnx.jit
    def step(model, optimizer, rows):
        def loss(model):
            logits = model(x[rows])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    for key in jax.random.split(jax.random.key(1), steps):
        step(model, optimizer, jax.random.randint(key, (128,), 0, len(x)))
    return model


def report(name, model, test):
    """Print and return accuracy in per cent, and the number of parameters."""
    accuracy = float(100 * jnp.mean(model(test[0]).argmax(-1) == test[1]))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(f"{name}: {accuracy:.1f} % of test digits, {count:,} parameters")
    return accuracy, count


def main(steps=500, budget=0.05):
    """Train both and compare them."""
    train, test = digits()
    rule = optax.sgd(0.1, momentum=0.9)
    dense = fit(dense_model(), rule, train, steps)
    model, layout = shared_model(budget)
    # The gradient of a slot is divided by what its weights weigh: one rate serves both models.
    shared = fit(model, optax.chain(share.scale_by_pool(layout), rule), train, steps)
    return report("dense", dense, test), report("shared", shared, test)


if __name__ == "__main__":
    main()
