"""Noise-level classifiers and their loss, against the exact posterior of a mixture."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import process, score
from jaxgen.nets import LevelClassifier, LevelMLP
from jaxgen.score.levels import level_classification_loss, levels

GRID = levels(0.01, 50.0, 60)
LAW = score.closed_form.mixture(
    process.edm(0.01, 50.0), [0.4, 0.6], np.array([[-1.0, 0.0], [2.0, 1.0]], np.float32), [0.04] * 2
)


@functools.partial(jax.jit, static_argnames=("n",))
def draw(key, n):
    return LAW.sample(key, (n, 2))


def test_the_loss_of_known_logits():
    key, x0 = jax.random.key(0), jnp.zeros((2000, 2))
    equal = level_classification_loss(key, lambda x: jnp.zeros((2000, 60)), x0, GRID)
    np.testing.assert_allclose(equal, np.log(60), rtol=1e-6)
    # Logits that name each level in turn: the level is uniform, which the losses count.
    first = level_classification_loss(
        key, lambda x: jnp.zeros((2000, 60)).at[:, 0].set(1e3, mode="drop"), x0, GRID
    )
    share = np.mean(np.asarray(first) < 1)
    assert abs(share - 1 / 60) < 5 * np.sqrt(1 / 60 / 2000)


def test_the_loss_perturbs_each_example_by_its_level():
    seen = []

    def logits(x):
        seen.append(x)
        return jnp.zeros((4000, 2))

    level_classification_loss(jax.random.key(0), logits, jnp.full((4000, 3), 7.0), GRID[:2])
    off = np.asarray(seen[0] - 7.0, np.float64)
    # Two levels near 50, and the standard error of the variance is 1.3 %.
    assert abs(off.var() / np.mean(np.asarray(GRID[:2]) ** 2) - 1) < 0.05
    assert abs(off.mean()) < 5 * 50 / np.sqrt(12_000)


def test_an_example_does_not_know_its_batch():
    def logits(x):
        return jnp.concatenate([x, x**2], -1)

    key, x0 = jax.random.key(0), jnp.ones((5, 2)) * jnp.arange(5.0)[:, None]
    loss = level_classification_loss(key, logits, x0, GRID[::16])
    own = jax.random.fold_in(key, 3)
    one = level_classification_loss(own, logits, x0[3], GRID[::16], event_ndim=1)
    np.testing.assert_allclose(loss[3], one, rtol=1e-5)


def error(logits, level):
    """Mean ``|log sigma-hat - log sigma|`` of the posterior mean of log sigma."""
    mean = jax.nn.softmax(logits, -1) @ jnp.log(GRID)
    return float(jnp.mean(jnp.abs(mean - jnp.log(GRID)[level])))


def test_a_trained_classifier_is_within_a_tenth_of_the_posterior():
    net, steps = LevelMLP(60, widths=(64, 64)), 300
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def update(carry, key):
        params, state = carry
        key_data, key_loss = jax.random.split(key)
        x0 = LAW.sample(key_data, (256, 2))

        def loss(params):
            logits = functools.partial(net.apply, params)
            return level_classification_loss(key_loss, logits, x0, GRID).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train(key):
        params = net.init(key, jnp.zeros((1, 2)))
        keys = jax.random.split(key, steps)
        return jax.lax.scan(update, (params, optimizer.init(params)), keys)[0][0]

    params = train(jax.random.key(0))
    key_level, key_noise = jax.random.split(jax.random.key(1))
    level = jax.random.randint(key_level, (4000,), 0, 60)
    x = draw(jax.random.key(2), 4000)
    x = x + GRID[level][:, None] * jax.random.normal(key_noise, (4000, 2))
    exact = error(jax.jit(LAW.level_log_prob)(x, GRID), level)
    ours = error(jax.jit(net.apply)(params, x), level)
    print(f"posterior {exact:.4f}, network {ours:.4f}")
    assert ours < 1.1 * exact


def test_the_published_network():
    net = LevelClassifier(1000)
    x = jnp.zeros((2, 32, 32, 3))
    params = jax.eval_shape(net.init, jax.random.key(0), x)
    convolutions = sum(9 * a * b + b for a, b in ((3, 32), (32, 64), (64, 128), (128, 256)))
    count = sum(v.size for v in jax.tree.leaves(params))
    assert count == convolutions + 2 * 2 * 256 * 1000 + 1000
    assert jax.eval_shape(net.apply, params, x).shape == (2, 1000)


def test_layers_pool_by_the_mean():
    """One 1-channel kernel that only passes its input: ReLU, and the mean of each four."""
    net = LevelClassifier(4, widths=(1,))
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 1))
    params = net.init(jax.random.key(1), x)["params"]
    pass_on = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0, mode="drop")
    params["Conv3x3_0"]["kernel"] = pass_on
    params["Dense_0"]["kernel"] = jnp.eye(4)
    out = net.apply({"params": params}, x)
    expected = np.maximum(np.asarray(x), 0).reshape(2, 2, 2, 2).mean((1, 3)).reshape(1, 4)
    np.testing.assert_allclose(out, expected, rtol=1e-6)


@pytest.mark.parametrize("net", [LevelMLP(5, widths=(4,)), LevelClassifier(5, widths=(4,))])
def test_dtypes_and_bad_input(net):
    shape = (2, 3) if isinstance(net, LevelMLP) else (2, 4, 4, 1)
    x = jnp.ones(shape, jnp.bfloat16)
    params = jax.eval_shape(net.init, jax.random.key(0), x)
    assert {v.dtype for v in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    out = jax.eval_shape(net.apply, params, x)
    assert out.dtype == jnp.float32 and out.shape == (2, 5)
    with pytest.raises(ValueError, match="x: expected shape"):
        jax.eval_shape(net.apply, params, x[0])
    with pytest.raises(TypeError, match="real floating"):
        jax.eval_shape(net.apply, params, x.astype(int))


def test_bad_input_of_the_loss():
    key, x0 = jax.random.key(0), jnp.ones((3, 2))
    with pytest.raises(ValueError, match=r"expected \(3, 60\)"):
        level_classification_loss(key, lambda x: jnp.zeros((3, 59)), x0, GRID)
    with pytest.raises(ValueError, match="strictly falling"):
        level_classification_loss(key, lambda x: jnp.zeros((3, 60)), x0, GRID[::-1])
    with pytest.raises(TypeError, match="x0 has dtype"):
        level_classification_loss(key, lambda x: jnp.zeros((3, 60)), x0.astype(int), GRID)
    with pytest.raises(ValueError, match="divisible by 16"):
        LevelClassifier(5).init(key, jnp.ones((1, 8, 8, 1)))
