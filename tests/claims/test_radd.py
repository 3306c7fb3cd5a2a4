"""RADD (Ou, Nie, Xue, Zhu, Sun, Li, Li, ICLR 2025, arXiv 2406.03736).

The claims: absorbing diffusion needs fewer evaluations of a network than it takes steps, with the
law of its samples unchanged; and a network without time bounds the likelihood as well as one of the
same size that is told the share of masks (adaLN-zero, its parameters paid for in width). The same
data, steps and loss on both sides; differences are timed minus time-free, with the standard error
over held-out examples, which both see under the same masks.

Evaluations of 32 tokens by the log-linear schedule, 500 sequences: 25.33 in 64 steps, 30.14 in 256,
31.52 in 1024, and the tokens are those of a sampler that calls the network at every step.

Characters of Python's help topics, 32 at a time, 113,000 parameters a side, 1000 steps of 32, two
seeds: 3.85 bits per character without time, 3.99 with it; timed minus time-free 0.30 and -0.02
(0.006 over examples, 0.22 between seeds), frequencies of characters alone 4.68. No difference can
be told: both leave the frequencies of characters at a step that is a matter of luck.

Whether a token unmasks does not depend on the network, so that a network with time may skip quiet
steps just as well: what the time-free one adds is that an output can be kept (the eager count).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen.nets.radd import RADDTransformer, TimedTransformer
from jaxgen.process.absorbing import absorbing, expected_nfe
from jaxgen.score.discrete import radd_loss
from jaxgen.solve.discrete import radd_sample
from jaxgen.train.text import load_text

LENGTH = 32
DRAWS = 8


def networks(size, width, narrower, depth):
    """Two networks of as many parameters: the conditioning is paid for in width."""
    return (
        RADDTransformer(size, width, depth, 2),
        TimedTransformer(size, narrower, depth, 2, condition=16),
    )


def parameters(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def trained(net, process, x, steps, batch, rate, seed):
    """Averaged parameters after ``steps`` steps of Adam on ``k_dce``."""
    timed = isinstance(net, TimedTransformer)
    given = (jnp.zeros(1),) if timed else ()
    rule = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(0.0, rate, steps // 10))
    )

    @jax.jit
    def run(key):
        key_init, key = jax.random.split(key)
        params = net.init(key_init, x[:1], *given)

        def loss(params, key):
            key_data, key = jax.random.split(key)
            x0 = x[jax.random.randint(key_data, (batch,), 0, len(x))]
            field = lambda *a: net.apply(params, *a)  # noqa: E731
            return radd_loss(
                key, field, process, x0, kind="k_dce", draws="decoupled", takes_level=timed
            ).mean()

        def step(carry, key):
            params, opt_state, mean = carry
            updates, opt_state = rule.update(jax.grad(loss)(params, key), opt_state)
            params = optax.apply_updates(params, updates)
            mean = jax.tree.map(lambda m, p: 0.98 * m + 0.02 * p, mean, params)
            return (params, opt_state, mean), None

        start = (params, rule.init(params), params)
        return jax.lax.scan(step, start, jax.random.split(key, steps))[0][2]

    return run(jax.random.key(seed))


def bounds(net, params, process, x):
    """Bits per character of each example, over the same masks whatever the network."""
    timed = isinstance(net, TimedTransformer)

    @jax.jit
    def measure(params, x):
        field = lambda *a: net.apply(params, *a)  # noqa: E731
        many = jnp.repeat(x, DRAWS, 0)
        loss = radd_loss(jax.random.key(7), field, process, many, kind="k_dce", takes_level=timed)
        return loss.reshape(-1, DRAWS).mean(1) / (x.shape[1] * math.log(2))

    return np.asarray(measure(params, x), np.float64)


def chain(n, length, size=8):
    """Walks round a ring: a step of one with probability 0.9, else anywhere; and bits per token."""
    rng = np.random.default_rng(0)
    jumps = rng.random((n, length)) < 0.1
    steps = np.where(jumps, rng.integers(0, size, (n, length)), 1)
    x = (rng.integers(0, size, (n, 1)) + np.cumsum(steps, 1)) % size
    one = 0.9 + 0.1 / size
    rate = -one * np.log2(one) - (1 - one) * np.log2(0.1 / size)
    return x.astype(np.int32), (np.log2(size) + (length - 1) * rate) / length


def compare(process, x, hidden, width, narrower, depth, steps, batch, seeds):
    """Bounds of both networks, ``(seeds, examples)`` each, and their numbers of parameters."""
    found, sizes = [], []
    for net in networks(process.vocabulary, width, narrower, depth):
        own = []
        for seed in range(seeds):
            params = trained(net, process, x, steps, batch, 5e-3, seed)
            own.append(bounds(net, params, process, hidden))
        found.append(np.stack(own))
        sizes.append(parameters(params))
    assert abs(sizes[0] / sizes[1] - 1) < 0.03, sizes
    return *found, sizes


def report(free, timed, sizes):
    """The mean difference, its standard error over examples, and the spread of seeds."""
    per_seed = (timed - free).mean(1)
    error = (timed - free).std(1).mean() / np.sqrt(free.shape[1])
    spread = np.hypot(free.mean(1).std(), timed.mean(1).std())
    print(
        f"time-free {free.mean():.4f} ({sizes[0]:,} parameters), timed {timed.mean():.4f} "
        f"({sizes[1]:,}), difference {np.round(per_seed, 4).tolist()} +- {error:.4f}, "
        f"spread of seeds {spread:.4f}"
    )
    return per_seed.mean(), error, spread


def test_a_network_without_time_bounds_as_well_as_one_with_it():
    """Walks round a ring, whose entropy is known: 16 tokens of 8 kinds."""
    x, entropy = chain(4000, 16)
    process = absorbing(8)
    x, hidden = jnp.asarray(x[:3600]), jnp.asarray(x[3600:])
    free, timed, sizes = compare(process, x, hidden, 32, 28, 1, 200, 64, 1)
    difference, error, _ = report(free, timed, sizes)
    print(f"entropy {entropy:.4f} bits per token")
    assert free.mean() < 0.5 * (entropy + 3)
    assert difference > -3 * error - 0.05, (difference, error)


@pytest.mark.slow
def test_a_network_without_time_bounds_as_well_as_one_with_it_on_text():
    text = load_text("text", length=32, held_out=0.15, seed=0)
    process = absorbing(len(text.vocabulary))
    # Spread over the stretches that were held out.
    chosen = np.linspace(0, len(text.held_out) - 1, 1000).astype(int)
    x, hidden = (jnp.asarray(v, jnp.int32) for v in (text.train.x, text.held_out.x[chosen]))
    free, timed, sizes = compare(process, x, hidden, 64, 60, 2, 1000, 32, 2)
    difference, error, spread = report(free, timed, sizes)
    single = np.bincount(text.train_tokens, minlength=process.vocabulary) + 1
    alone = -np.log2(single / single.sum())[text.held_out.x[chosen]].mean()
    print(f"frequencies of characters alone: {alone:.4f}")
    assert free.mean() < alone - 0.3
    # Not worse beyond the noise of examples and of two seeds a side.
    assert difference > -3 * np.hypot(error, spread), (difference, error, spread)


V, L = 3, 4


def test_fewer_evaluations_than_steps_at_the_same_law():
    """Exact conditionals of a law over 81 sequences, and of independent tokens, 32 of them."""
    joint = np.random.default_rng(3).dirichlet(np.full(V**L, 0.3))
    clean = jnp.asarray(np.stack(np.unravel_index(np.arange(V**L), (V,) * L), -1))
    log_p = jnp.log(jnp.asarray(joint, jnp.float32))

    def exact(x):
        """Conditionals by summing the law over the sequences that fit."""
        fits = jnp.all((x[:, None] == clean[None]) | (x[:, None] == V), -1)
        mass = jnp.where(fits, jnp.exp(log_p)[None], 0.0)
        one_hot = jax.nn.one_hot(clean, V)
        total = jnp.maximum(mass.sum(1), 1e-30)[:, None, None]
        return jnp.log(jnp.einsum("nc,clv->nlv", mass, one_hot) / total + 1e-30)

    process, n, steps = absorbing(V, eps=0.0), 20_000, 64

    @jax.jit
    def both(key):
        return [radd_sample(key, exact, process, (n, L), steps, cache=c) for c in (True, False)]

    ours, plain = both(jax.random.key(0))
    assert (ours.x == plain.x).all()
    places = V ** np.arange(L)[::-1]
    share = np.bincount(np.asarray(ours.x) @ places, minlength=V**L) / n
    floor = 0.5 * np.sqrt(2 / np.pi) * np.sqrt(joint * (1 - joint) / n).sum()
    assert 0.5 * np.abs(share - joint).sum() < 1.1 * 0.013 + floor
    assert float(ours.nfe.mean()) <= L and (plain.nfe == steps).all()
    error = float(ours.nfe.std()) / n**0.5
    assert abs(float(ours.nfe.mean()) - float(expected_nfe(process, steps, L))) < 3 * error

    @jax.jit
    def count(key):
        uniform = lambda x: jnp.zeros((*x.shape, V))  # noqa: E731
        return [radd_sample(key, uniform, process, (500, LENGTH), s).nfe for s in (64, 256, 1024)]

    for steps, nfe in zip((64, 256, 1024), count(jax.random.key(1)), strict=True):
        mean, expected = float(nfe.mean()), float(expected_nfe(process, steps, LENGTH))
        print(f"{steps} steps of {LENGTH} tokens: {mean:.2f} evaluations, expected {expected:.2f}")
        assert abs(mean - expected) < 3 * float(nfe.std()) / 500**0.5
        assert mean < 0.4 * steps and int(nfe.max()) <= LENGTH
