"""Closing the ODE-SDE gap (Deveney et al., Phil. Trans. R. Soc. A 383, 2025, arXiv 2311.15996).

The claim: a penalty on the Fokker-Planck residual brings the probability flow and the reverse SDE
of one learned score together. Ornstein-Uhlenbeck process f = -x, g = 1; data a mixture at -1.5, 0
and 1.5 of deviation 0.2; a network with a potential, trained by unweighted denoising score matching
with and without 0.1 times the mean square of the residual over uniform points of a box. The same
network, keys and steps on both sides. W2 by sorting:

                               flow to SDE        SDE to the data    flow to the data
    weight                     0        0.1       0        0.1       0        0.1
    full size, seeds 0, 1      0.441    0.094     0.042    0.053     0.457    0.114
                               1.015    0.094     0.082    0.090     1.035    0.093
    short, seeds 0 to 3        1.447    0.221     0.597    0.205     1.710    0.198
                               1.293    0.259     0.159    0.168     1.388    0.356
                               0.278    0.252     0.173    0.196     0.367    0.283
                               0.959    0.125     0.177    0.164     1.003    0.157

Two samples of the data of the full size are 0.045 apart. The short form trains an eighth of the
steps on an eighth of the points; there one seed in four (2) has little gap to close, and misses the
half. What is improved is the flow; at larger weights the SDE gets worse (the paper's table, and an
earlier run at weight 1).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen.metrics.wasserstein import wasserstein2
from jaxgen.nets.potential import PotentialMLP, softplus
from jaxgen.process import LinearSDE
from jaxgen.score import fokker_planck
from jaxgen.solve.ode_sde_gap import ode_sde_gap

WEIGHTS = (0.0, 0.1)
# steps, width, batch, sharpness, learning rate, t_min, t_max, samples, steps of the samplers
FULL = (4000, 64, 1024, 20.0, 1e-3, 1e-3, 5.0, 20_000, 500)
SHORT = (500, 24, 128, 10.0, 1e-2, 1e-2, 4.0, 2000, 100)


def _log_alpha(t):
    return -t


def _sigma(t):
    return jnp.sqrt(-jnp.expm1(-2 * t) / 2)


def draw(key, n):
    key_mode, key_noise = jax.random.split(key)
    mode = jax.random.randint(key_mode, (n, 1), -1, 2)
    return 1.5 * mode + 0.2 * jax.random.normal(key_noise, (n, 1))


def unweighted(t, sde):
    """The plain squared error of the score, times drawn as t_min + (T - t_min) Beta(1, 2)."""
    share = (t - sde.t_min) / (sde.t_max - sde.t_min)
    return 2 * (1 - share) / sde.sigma(t) ** 2


def train_and_compare(weight, key, *, size):
    """Distances of flow to SDE, SDE to data and flow to data of one training run."""
    steps, width, batch, sharpness, rate, t_min, t_max, samples, solver_steps = size
    sde = LinearSDE(_log_alpha, _sigma, t_min=t_min, t_max=t_max, prior_std=0.5**0.5)
    net = PotentialMLP(width=width, activation=softplus(sharpness))
    falls = {steps // 2: 0.2, int(0.85 * steps): 0.2}
    optimizer = optax.adam(optax.piecewise_constant_schedule(rate, falls))
    key_init, key_train, key_draw, key_data = jax.random.split(key, 4)
    params = net.init(key_init, jnp.zeros((1, 1)), jnp.zeros(1))

    def box(key, x0):
        return fokker_planck.collocation_box(key, batch // 2, [-3.0], [3.0], t_min, t_max)

    def loss(params, key, x0):
        return fokker_planck.regularised_loss(
            key,
            lambda x, t: net.apply(params, x, t),
            sde,
            x0,
            weight=weight,
            collocation=box,
            weighting=unweighted,
        ).mean()

    def step(carry, key):
        params, state = carry
        key_data, key_loss = jax.random.split(key)
        updates, state = optimizer.update(
            jax.grad(loss)(params, key_loss, draw(key_data, batch)), state
        )
        return (optax.apply_updates(params, updates), state), None

    carry = params, optimizer.init(params)
    (params, _), _ = jax.lax.scan(step, carry, jax.random.split(key_train, steps))
    score = fokker_planck.potential_score(lambda x, t: net.apply(params, x, t))
    # Quadratic in time, on which both samplers run.
    grid = t_min + (t_max - t_min) * jnp.linspace(1, 0, solver_steps + 1) ** 2
    gap = ode_sde_gap(
        key_draw, score, sde, (samples, 1), prediction="score", grid=grid, refine=None
    )
    data = draw(key_data, samples)
    return gap.w2, wasserstein2(gap.sde, data), wasserstein2(gap.ode, data)


def compare(seed, size, level=0):
    """Rows of ``train_and_compare`` for both weights, trained side by side."""
    options = {"xla_backend_optimization_level": level}
    run = jax.jit(
        jax.vmap(functools.partial(train_and_compare, size=size), in_axes=(0, None)),
        compiler_options=options,
    )
    found = np.asarray(run(jnp.asarray(WEIGHTS), jax.random.key(seed)))
    print(f"seed {seed}: gap {found[0]}, SDE to data {found[1]}, flow to data {found[2]}")
    return found


def check(found):
    (plain, ours), (sde_plain, sde_ours), (ode_plain, ode_ours) = found
    assert ours <= 0.5 * plain, (plain, ours)
    assert ode_ours < ode_plain
    # The SDE pays little at this weight, and nothing where training was too short for it.
    assert sde_ours < sde_plain + 0.1


def test_the_penalty_halves_the_gap_and_more():
    check(compare(0, SHORT))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_penalty_halves_the_gap_at_full_size(seed):
    check(compare(seed, FULL, level=3))
