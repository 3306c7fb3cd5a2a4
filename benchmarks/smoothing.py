"""PaRIS against the `particles` package, and the Gibbs sweeps against PaRIS at equal work.

The linear-Gaussian model and the twenty observations of the claim on PaRIS; the smoothed sum of
x_t x_{t+1} is 21.0803 (Kalman smoother). Time per step, and the root mean square error over
independent runs. `particles` runs in an environment of its own; its PaRIS is a loop in Python.
"""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import particles_peer
from benchmarks.measure import Missing, Result, first_call, summarise
from benchmarks.particles_peer import SIGMA, TAU, A
from jaxgen import smc

Y = np.array(
    [
        *(0.106, 0.474, 0.178, 0.498, 0.356, 0.286, 0.661, 0.992, 0.653, 0.144),
        *(-0.544, -0.259, -1.387, -1.152, -1.742, -1.885, -2.261, -2.055, -1.374, -0.479),
    ]
)
TRUTH = 21.0803
FIRST = SIGMA / math.sqrt(1 - A**2)


def _log_normal(z: jax.Array, scale: float) -> jax.Array:
    return -0.5 * (z / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)


MODEL = smc.StateSpaceModel(
    init=lambda key: FIRST * jax.random.normal(key),
    transition=lambda key, x, t: A * x + SIGMA * jax.random.normal(key),
    log_potential=lambda x, y, t: _log_normal(y - x, TAU),
    log_transition=lambda x_prev, x, t: _log_normal(x - A * x_prev, SIGMA),
    log_transition_bound=lambda t: _log_normal(jnp.zeros(()), SIGMA),
)


def _product(x_prev: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
    return (x_prev * x)[None]


@functools.partial(jax.jit, static_argnames=("n", "backward"))
def _paris(key: jax.Array, n: int, backward: str) -> jax.Array:
    out = smc.paris(key, MODEL, jnp.asarray(Y, jnp.float32), n, _product, backward=backward)
    return out.estimate[0]


@functools.partial(jax.jit, static_argnames=("n", "sweeps", "burn_in"))
def _gibbs(key: jax.Array, n: int, sweeps: int, burn_in: int) -> jax.Array:
    out = smc.particle_gibbs(
        key, MODEL, jnp.asarray(Y, jnp.float32), n, _product, sweeps=sweeps, burn_in=burn_in
    )
    return out.estimate[0]


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean((np.asarray(values, np.float64) - TRUTH) ** 2)))


def _equal_work(runs: int) -> Iterator[Result]:
    """Nine units of N = 10 for the sweeps (one PaRIS, eight sweeps, the last four kept)."""
    keys = jax.random.split(jax.random.key(0), runs)
    gibbs = np.asarray(jax.vmap(lambda k: _gibbs(k, 10, 8, 4))(keys))
    paris = np.asarray(jax.vmap(lambda k: _paris(k, 90, "exact"))(keys))
    error = [float(np.std(v) / math.sqrt(runs)) for v in (gibbs, paris)]
    bias = [float(np.mean(v) - TRUTH) for v in (gibbs, paris)]
    yield Result(
        bench="smoothing",
        case="gibbs_8_sweeps_of_10",
        ours=_rms(gibbs),
        peer=_rms(paris),
        peer_name="PaRIS with 90 particles",
        unit="root mean square error",
        ratio=_rms(paris) / _rms(gibbs),
        pairs=runs,
        note=f"bias {bias[0]:+.3f} ({error[0]:.3f}) against {bias[1]:+.3f} ({error[1]:.3f})",
    )


def run(*, quick: bool) -> Iterator[Result | Missing]:
    yield from _equal_work(200 if quick else 20_000)
    n, pairs = (100, 15) if quick else (1000, 15)
    peer = particles_peer.find()
    if peer is None:
        yield Missing("smoothing", f"paris_{n}", f"particles (set {particles_peer.VARIABLE})")
        return
    keys = jax.random.split(jax.random.key(1), pairs)
    command = {"task": "paris", "y": Y.tolist(), "n": n, "draws": 2}
    peer.ask(**command)
    theirs = [peer.ask(**command) for _ in range(pairs)]
    steps = len(Y)
    for backward in ("exact", "rejection"):
        _paris(keys[0], n, backward).block_until_ready()
        times = np.zeros((pairs, 2))
        estimates = []
        for i, key in enumerate(keys):
            times[i, 0] = 1e3 * first_call(lambda k=key, b=backward: _paris(k, n, b)) / steps
            times[i, 1] = 1e3 * theirs[i]["seconds"] / steps
            estimates.append(float(_paris(key, n, backward)))
        rms = _rms(np.array(estimates)), _rms(np.array([a["estimate"] for a in theirs]))
        yield summarise(
            "smoothing",
            f"paris_{n}_{backward}",
            times[:, 0],
            times[:, 1],
            peer_name="particles 0.4",
            unit="ms a step",
            goal=1.0,
            note=f"root mean square error {rms[0]:.3f} against {rms[1]:.3f}",
        )
    peer.close()
