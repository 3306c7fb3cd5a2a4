"""A bootstrap filter, systematic resampling at every step, against cuthbert and `particles`.

A linear-Gaussian model in one dimension, N = 1e5, T = 100. cuthbert's step runs in a scan that
keeps its last state alone, as ours does; `particles` (NumPy and numba) runs in an environment of
its own, in alternation. Beside them the same loop without resampling: what no filter can beat.
Errors of the log-likelihood against the exact one (Kalman) are in the notes.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import particles_peer
from benchmarks.measure import PAIRS, Missing, Result, compare, first_call, summarise
from benchmarks.particles_peer import SIGMA, TAU, A
from jaxgen import smc

GOAL = 1.0
FIRST = SIGMA / math.sqrt(1 - A**2)


def _model() -> smc.StateSpaceModel:
    return smc.StateSpaceModel(
        init=lambda key: FIRST * jax.random.normal(key),
        transition=lambda key, x, t: A * x + SIGMA * jax.random.normal(key),
        log_potential=lambda x, y, t: _log_normal(y - x),
    )


def _log_normal(z: jax.Array) -> jax.Array:
    return -0.5 * (z / TAU) ** 2 - math.log(TAU) - 0.5 * math.log(2 * math.pi)


def _observations(steps: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    x, y = FIRST * rng.standard_normal(), []
    for _ in range(steps):
        y.append(x + TAU * rng.standard_normal())
        x = A * x + SIGMA * rng.standard_normal()
    return np.asarray(y, np.float32)


def exact_log_z(y: np.ndarray) -> float:
    """The log-likelihood by the scalar Kalman recursion in double precision."""
    mean, variance, total = 0.0, FIRST**2, 0.0
    for value in y.astype(np.float64):
        spread = variance + TAU**2
        total -= 0.5 * ((value - mean) ** 2 / spread + math.log(2 * math.pi * spread))
        gain = variance / spread
        mean, variance = mean + gain * (value - mean), (1 - gain) * variance
        mean, variance = A * mean, A**2 * variance + SIGMA**2
    return total


def _cuthbert(n: int) -> Any:
    from cuthbert.smc import particle_filter
    from cuthbertlib.resampling import systematic

    flt = particle_filter.build_filter(
        init_sample=lambda key: FIRST * jax.random.normal(key),
        propagate_sample=lambda key, x, y: A * x + SIGMA * jax.random.normal(key),
        log_potential=lambda x_prev, x, y: _log_normal(y - x),
        n_filter_particles=n,
        resampling_fn=systematic.resampling,
    )

    def run(key: jax.Array, y: jax.Array) -> jax.Array:
        keys = jax.random.split(key, y.shape[0])
        state = flt.init_prepare(key=keys[0])
        log_weights = jax.vmap(lambda x: _log_normal(y[0] - x))(state.particles)
        log_z = jax.nn.logsumexp(log_weights) - jnp.log(n)
        state = state._replace(
            log_weights=log_weights, log_normalizing_constant=log_z, model_inputs=y[0]
        )

        def step(state: Any, inputs: Any) -> Any:
            y, key = inputs
            return flt.filter_combine(state, flt.filter_prepare(y, key=key)), None

        return jax.lax.scan(step, state, (y[1:], keys[1:]))[0].log_normalizing_constant

    return run


def _without_resampling(n: int) -> Any:
    def run(key: jax.Array, y: jax.Array) -> jax.Array:
        start, move = jax.random.split(key)
        x = FIRST * jax.random.normal(start, (n,))

        def step(carry: Any, inputs: Any) -> Any:
            x, log_weights = carry
            y, key = inputs
            x = A * x + SIGMA * jax.random.normal(key, (n,))
            return (x, log_weights + _log_normal(y - x)), None

        carry = (x, _log_normal(y[0] - x))
        keys = jax.random.split(move, y.shape[0] - 1)
        (x, log_weights), _ = jax.lax.scan(step, carry, (y[1:], keys))
        return smc.log_mean_exp(log_weights)

    return run


def run(*, quick: bool) -> Iterator[Result | Missing]:
    n, steps = (10**4, 100) if quick else (10**5, 100)
    observations = _observations(steps)
    y, key, model = jnp.asarray(observations), jax.random.key(0), _model()
    truth = exact_log_z(observations)
    case = f"bootstrap_{n:.0e}_{steps}".replace("e+0", "e")
    ours = jax.jit(lambda key, y: smc.particle_filter(key, model, y, n).log_z)
    error = float(ours(key, y)) - truth

    try:
        theirs = jax.jit(_cuthbert(n))
    except ModuleNotFoundError:
        yield Missing("filtering", case, "cuthbert")
    else:
        yield compare(
            "filtering",
            f"{case}/cuthbert",
            lambda: ours(key, y),
            lambda: theirs(key, y),
            peer_name="cuthbert, its last state alone",
            goal=None if quick else GOAL,
            note=f"error of log Z {error:+.4f} against {float(theirs(key, y)) - truth:+.4f}",
        )
    floor = jax.jit(_without_resampling(n))
    yield compare(
        "filtering",
        f"{case}/floor",
        lambda: ours(key, y),
        lambda: floor(key, y),
        peer_name="the same loop without resampling",
        note="the floor",
    )
    peer = particles_peer.find()
    if peer is None:
        yield Missing("filtering", case, f"particles (set {particles_peer.VARIABLE})")
        return
    values = observations.astype(float).tolist()
    answer = peer.ask(task="filter", y=values, n=n)
    times = np.zeros((PAIRS, 2))
    for i in range(PAIRS):
        times[i, 0] = 1e3 * first_call(lambda: ours(key, y))
        answer = peer.ask(task="filter", y=values, n=n)
        times[i, 1] = 1e3 * answer["seconds"]
    peer.close()
    yield summarise(
        "filtering",
        f"{case}/particles",
        times[:, 0],
        times[:, 1],
        peer_name="particles 0.4",
        goal=None if quick else GOAL,
        note=f"error of log Z {error:+.4f} against {answer['log_z'] - truth:+.4f}",
    )
