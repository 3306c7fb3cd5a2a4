"""Our training step against the bare Flax and optax loop with the same network and loss.

Both sides draw times and noise, take the gradient of the noise-prediction loss, clip, run Adam and
keep an exponential average of the parameters; the bare loop is one jitted, donated function with no
counting, no guard against NaN and no per-example keys.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax

from benchmarks.measure import Result, compare
from jaxgen import nets, process, score, train

GOAL, STEPS = 0.97, 4


def _cases(quick: bool):
    yield "unet_8x8", nets.UNet(), (128, 8, 8, 1)
    if not quick:
        yield "mlp_2d", nets.MLP(), (512, 2)


def run(*, quick: bool) -> Iterator[Result]:
    sde = process.vp()
    for name, network, shape in _cases(quick):
        key = jax.random.key(0)
        batch = jax.random.normal(jax.random.key(1), shape)
        params = network.init(key, batch, jnp.zeros(shape[:1]))
        optimizer = optax.adam(1e-3)

        def loss_fn(key, params, batch, network=network):
            return score.denoising_loss(key, lambda x, t: network.apply(params, x, t), sde, batch)

        step = train.make_train_step(loss_fn, optimizer, ema=0.999, clip=1.0)

        def ours_loop(state, batch, step=step):
            for _ in range(STEPS):
                state, metrics = step(state, batch)
            return state, metrics

        bare_optimizer = optax.chain(optax.clip_by_global_norm(1.0), optimizer)

        def bare_loss(params, key, batch, network=network):
            key_time, key_noise = jax.random.split(key)
            t = jax.random.uniform(key_time, batch.shape[:1], minval=1e-5)
            noise = jax.random.normal(key_noise, batch.shape)
            log_alpha = -0.25 * t**2 * 19.9 - 0.05 * t
            by_example = (-1,) + (1,) * (batch.ndim - 1)
            alpha = jnp.exp(log_alpha).reshape(by_example)
            sigma = jnp.sqrt(-jnp.expm1(2 * log_alpha)).reshape(by_example)
            error = network.apply(params, alpha * batch + sigma * noise, t) - noise
            return jnp.mean(error**2)

        def bare_step(state, batch, bare_loss=bare_loss, optimizer=bare_optimizer):
            params, ema, opt_state, key = state
            key, key_step = jax.random.split(key)
            loss, grads = jax.value_and_grad(bare_loss)(params, key_step, batch)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            ema = optax.incremental_update(params, ema, 1e-3)
            return (params, ema, opt_state, key), loss

        bare = jax.jit(bare_step, donate_argnums=0)

        def bare_loop(state, batch, bare=bare):
            for _ in range(STEPS):
                state, loss = bare(state, batch)
            return state, loss

        def copy(tree):
            return jax.tree.map(jnp.copy, tree)

        # Donated states are threaded through, as in a real loop.
        held = {
            "ours": train.TrainState.create(key, copy(params), optimizer),
            "bare": (copy(params), copy(params), bare_optimizer.init(params), key),
        }

        def advance(side, loop, held=held, batch=batch):
            held[side], out = loop(held[side], batch)
            return out

        yield compare(
            "train_step",
            name,
            lambda ours_loop=ours_loop, advance=advance: advance("ours", ours_loop),
            lambda bare_loop=bare_loop, advance=advance: advance("bare", bare_loop),
            peer_name="the bare Flax and optax loop",
            goal=GOAL,
            note=f"{STEPS} steps a call",
        )
