"""Train a diffusion in a loop of one's own: score.denoising_loss, optax, solve.sample.

    python examples/train_plain_jax.py

Nothing of `jaxgen.train` is used. Half a minute on two CPU cores.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from jaxgen import metrics, nets, process, score, solve


def moons(key, n):
    """Two interleaved half circles, `(n, 2)`."""
    key_side, key_angle, key_noise = jax.random.split(key, 3)
    angle = jnp.pi * jax.random.uniform(key_angle, (n,))
    upper = jnp.stack([jnp.cos(angle) - 0.5, jnp.sin(angle) - 0.25], -1)
    x = jnp.where(jax.random.bernoulli(key_side, 0.5, (n, 1)), upper, -upper)
    return 1.4 * x + 0.06 * jax.random.normal(key_noise, (n, 2))


def main(steps=2000, width=128, n=2000):
    """Distances to data of the samples and of other data, the second being the best to be had."""
    sde = process.vp()
    net = nets.MLP(width=width)  # or a network of yours: any f(params, x, t) -> like x
    params = net.init(jax.random.key(0), jnp.zeros((1, 2)), jnp.zeros(1))
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def loss(params, key):
        key_data, key_loss = jax.random.split(key)
        field = partial(net.apply, params)
        return score.denoising_loss(key_loss, field, sde, moons(key_data, 512)).mean()

    @jax.jit
    def train(params, key):
        def step(carry, key):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, key)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), value

        carry = params, optimizer.init(params)
        (params, _), losses = jax.lax.scan(step, carry, jax.random.split(key, steps))
        return params, losses

    params, losses = train(params, jax.random.key(1))
    field = partial(net.apply, params)
    sample = jax.jit(lambda key: solve.sample(key, field, sde, (n, 2), solver="dpmpp_2m", steps=20))
    run = sample(jax.random.key(2))
    data, other = moons(jax.random.key(3), n), moons(jax.random.key(4), n)
    ours, best = (
        float(metrics.sliced_wasserstein(jax.random.key(5), x, data)) for x in (run.x, other)
    )
    print(f"loss {losses[-200:].mean():.3f}; {int(run.nfe)} evaluations a sample")
    print(f"sliced Wasserstein distance to data: samples {ours:.3f}, other data {best:.3f}")
    return ours, best


if __name__ == "__main__":
    main()
