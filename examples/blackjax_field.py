"""A field inside blackjax samplers: a posterior whose prior is known by samples only.

    python examples/blackjax_field.py

200 points say what the prior is: their exact field at noise level t has the log-density
`prior.log_prob(x, t)` and the gradient `prior.score(x, t)`. Then one coordinate is measured. At the
smallest level, blackjax's NUTS stays in the mode where it starts. Through the levels, from noise to
data, weighted chains of blackjax's HMC find every mode with its mass. 20 seconds on two CPU cores.

A log-density learned by score matching serves the same way, but its masses of far modes are not to
be trusted at small levels: score matching does not see them, unless it is trained with
`score.fokker_planck.regularised_loss`.
"""

import blackjax
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import process, score, smc

SDE = process.vp()
LAST = 0.03  # time of the smallest level, where sigma is 0.11
CENTRES = jnp.array([[-2.0, 1.0], [0.3, -1.6], [2.0, 1.2]])
MEASURED, NOISE = 0.6, 1.5  # of the first coordinate


def prior(points=200):
    """The field of points that fall around three centres, in shares 0.5, 0.3 and 0.2."""
    law = score.closed_form.mixture(SDE, [0.5, 0.3, 0.2], CENTRES, jnp.full(3, 0.3**2))
    return score.closed_form.empirical(SDE, law.sample(jax.random.key(0), (points, 2)))


def log_likelihood(x):
    """Of one point `(2,)`."""
    return -0.5 * ((x[0] - MEASURED) / NOISE) ** 2


def masses(x, log_weights):
    """Shares of the modes, `(3,)`, of weighted points `(n, 2)`."""
    nearest = jnp.argmin(jnp.sum((x[:, None] - CENTRES[None]) ** 2, -1), 1)
    of = jnp.where(jnp.isfinite(x).all(1, keepdims=True), jax.nn.one_hot(nearest, 3), jnp.nan)
    return jax.nn.softmax(log_weights) @ of


def annealed(key, log_prior, n=500, levels=40, moves=2):
    """Masses of the posterior's modes by `n` chains, moved from level to level."""
    times = jnp.linspace(SDE.t_max, LAST, levels)

    def level(carry, inputs):
        x, log_weights, before = carry
        key, t = inputs
        key_resample, *key_moves = jax.random.split(key, moves + 1)
        gain = jax.vmap(lambda one: log_prior(one, t) - log_prior(one, before))(x)
        kept = smc.maybe_resample(key_resample, x, log_weights + gain, threshold=0.5)
        step_size = 0.6 * jnp.sqrt(SDE.sigma(t) ** 2 + (0.2 * SDE.alpha(t)) ** 2)
        hmc = blackjax.hmc(
            lambda one: log_prior(one, t) + log_likelihood(one), step_size, jnp.ones(2), 4
        )
        state = jax.vmap(hmc.init)(kept.x)
        for key_move in key_moves:
            state, _ = jax.vmap(hmc.step)(jax.random.split(key_move, n), state)
        return (state.position, kept.log_weights, t), None

    key_noise, key = jax.random.split(key)
    x = SDE.prior_sample(key_noise, (n, 2))
    start = x, jax.vmap(log_likelihood)(x), times[0]
    (x, log_weights, _), _ = jax.lax.scan(
        level, start, (jax.random.split(key, levels - 1), times[1:])
    )
    return masses(x, log_weights)


def one_nuts(key, log_prior, steps=1000):
    """Masses by one chain of NUTS at the smallest level, started in the first mode."""
    nuts = blackjax.nuts(lambda x: log_prior(x, LAST) + log_likelihood(x), 0.1, jnp.ones(2))

    def step(state, key):
        state, _ = nuts.step(key, state)
        return state, state.position

    _, x = jax.lax.scan(step, nuts.init(CENTRES[0]), jax.random.split(key, steps))
    return masses(x, jnp.zeros(steps))


def exact(log_prior):
    """The posterior's masses at the smallest level, by a grid finer than its noise."""
    axis = np.linspace(-4, 4, 161, dtype=np.float32)
    x = jnp.asarray(np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2))
    return masses(x, log_prior(x, LAST) + jax.vmap(log_likelihood)(x))


def main(points=200, repeats=8, steps=1000, **options):
    """The masses: exact, by NUTS, and by annealed HMC with their standard errors over runs."""
    log_prior = prior(points).log_prob
    truth = exact(log_prior)
    stuck = jax.jit(lambda key: one_nuts(key, log_prior, steps))(jax.random.key(1))
    run = jax.jit(jax.vmap(lambda key: annealed(key, log_prior, **options)))
    found = run(jax.random.split(jax.random.key(2), repeats))
    mean, error = found.mean(0), found.std(0, ddof=1) / repeats**0.5
    for name, values in (
        ("exact", truth),
        ("one chain of NUTS", stuck),
        ("annealed HMC", mean),
        ("  standard error", error),
    ):
        print(f"{name:<20}" + "  ".join(f"{v:.3f}" for v in np.asarray(values)))
    return tuple(np.asarray(v) for v in (truth, stuck, mean, error))


if __name__ == "__main__":
    main()
