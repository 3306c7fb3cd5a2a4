"""SlimFlow (Zhu, Liu and Liu, ECCV 2024, arXiv 2407.12718).

The claims: distillation to one step is better when it is guided by the flow's own two-step samples
of fresh noise, and reflow from random initialisation is better when its pairing is annealed. The
teacher is the exact velocity of ten modes; a network of two hidden layers learns from n of its
pairs, 4000 steps a stage. Mean squared errors on 5000 fresh noises against the teacher's map, three
seeds (earlier figures, of other seeds, in brackets):

    d = 8, n = 500, width 32
      one step: naive distillation      0.762, 0.776, 0.798   (0.726, 0.756, 0.720)
                guided, student first   0.583, 0.581, 0.588   (0.570, 0.592, 0.545)
                guided, teacher twice   0.575, 0.557, 0.593   (0.570, 0.582, 0.553)
                the flow, undistilled   0.686, 0.670, 0.720   (0.689, 0.702, 0.672)
      50 steps: from scratch            0.530, 0.497, 0.563   (0.517, 0.551, 0.529)
                annealed                0.548, 0.495, 0.532   (0.489, 0.504, 0.547)
                1-flow, then reflow     0.574, 0.498, 0.521   (0.477, 0.525, 0.502)
    d = 16, n = 300, width 96
      one step: naive distillation      1.523, 1.557, 1.530
                guided, student first   1.292, 1.481, 1.309
                guided, teacher twice   1.043, 1.091, 1.034
                the flow, undistilled   1.104, 1.140, 1.115
      50 steps: from scratch            1.171, 1.269, 1.122   (1.216, 1.135, 1.370)
                annealed                1.014, 1.169, 1.080   (1.059, 1.054, 1.247)
                1-flow, then reflow     0.838, 0.960, 0.946   (0.844, 0.869, 1.068)

So guidance pays on every seed. Annealing is ahead of no warm start where pairs are few and
dimensions many, and within seed noise of it otherwise. It does not take the place of a warm start
that can be had: a small 1-flow for half of the steps, then reflow, is as good in the first setting
and better in the second. Where 300 pairs are learned by heart, distillation to the pairs makes the
flow's one-step map worse, and only the teacher's own two half-steps mend it.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import process, score
from jaxgen.adapt.slimflow import distillation_loss, one_step, reflow_loss
from jaxgen.score.flow import anneal_schedule
from jaxgen.solve.reflow import Pairs
from jaxgen.train.state import TrainState
from jaxgen.train.step import make_train_step

STD, MODES = 0.2, 10
BATCH, RATE, EMA = 256, 1e-3, 0.999
SHARE = 0.3  # of the steps, over which the pairing is annealed


def exact(d):
    """The velocity of ten modes in flow time."""
    means = np.random.default_rng(5).normal(size=(MODES, d)) * 2
    mixture = score.closed_form.mixture(
        process.rectified(),
        jnp.ones(MODES),
        jnp.asarray(means, jnp.float32),
        jnp.full(MODES, STD**2),
    )
    return score.from_flow(mixture.velocity)


def rk4(field, x, steps):
    """The flow's end, by the classical Runge-Kutta method."""

    def step(x, i):
        t, h = i / steps, 1 / steps

        def f(x, t):
            return field(x, jnp.full(x.shape[0], t))

        a = f(x, t)
        b = f(x + 0.5 * h * a, t + 0.5 * h)
        c = f(x + 0.5 * h * b, t + 0.5 * h)
        d = f(x + h * c, t + h)
        return x + h / 6 * (a + 2 * b + 2 * c + d), None

    return jax.lax.scan(step, x, jnp.arange(steps, dtype=x.dtype))[0]


def euler(field, x, steps=50):
    def step(x, i):
        return x + field(x, jnp.full(x.shape[0], i / steps)) / steps, None

    return jax.lax.scan(step, x, jnp.arange(steps, dtype=x.dtype))[0]


def init(key, sizes):
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"w": jax.random.normal(k, (a, b)) / math.sqrt(a), "b": jnp.zeros(b)}
        for k, a, b in zip(keys, sizes, sizes[1:], strict=False)
    ]


def velocity(params, x, t):
    """A network of two hidden layers."""
    angles = 0.5 * jnp.pi * t[:, None] * jnp.asarray([[1.0, 2.0, 4.0, 8.0]])
    h = jnp.concatenate([x, jnp.sin(angles), jnp.cos(angles)], axis=-1)
    for layer in params[:-1]:
        h = jax.nn.silu(h @ layer["w"] + layer["b"][None])
    return h @ params[-1]["w"] + params[-1]["b"][None]


def trained(key, params, loss, pairs, steps, *, pass_step=False):
    """The averaged parameters after so many steps on batches drawn from the pairs."""
    key_run, key_data = jax.random.split(key)
    optimizer = optax.adam(RATE)
    step = make_train_step(loss, optimizer, ema=EMA, clip=None, pass_step=pass_step)

    def body(state, i):
        at = jax.random.randint(jax.random.fold_in(key_data, i), (BATCH,), 0, len(pairs.x0))
        return step(state, Pairs(pairs.x0[at], pairs.x1[at]))[0], None

    return jax.lax.scan(body, TrainState.create(key_run, params, optimizer), jnp.arange(steps))[
        0
    ].ema


# Thousands of steps are worth the compiler's optimisations, which the suite does without.
@functools.partial(
    jax.jit,
    static_argnames=("d", "n", "width", "steps", "stages", "fresh"),
    compiler_options={"xla_backend_optimization_level": 2},
)
def run(seeds, d, n, width, steps, stages, fresh=5000):
    """Errors of each stage asked for, an entry a seed."""
    teacher = exact(d)

    def one(seed):
        key = jax.random.key(seed)
        key_pairs, key_init, key_fresh, *keys = jax.random.split(key, 9)
        x0, z = jax.random.normal(key_pairs, (n, d)), jax.random.normal(key_fresh, (fresh, d))
        pairs, truth = Pairs(x0, rk4(teacher, x0, 200)), rk4(teacher, z, 200)
        params = init(key_init, (d + 8, width, width, d))

        def error(x):
            return jnp.mean((x - truth) ** 2)

        def reflow(key, params, beta, steps):
            loss = reflow_loss(velocity, beta)
            return trained(key, params, loss, pairs, steps, pass_step=True)

        def one_step_error(params):
            return error(one_step(functools.partial(velocity, params), z))

        def flow_error(params):
            return error(euler(functools.partial(velocity, params), z))

        found = {}
        annealed = reflow(keys[0], params, anneal_schedule("linear", SHARE * steps), steps)
        found["annealed"] = flow_error(annealed)
        found["undistilled"] = one_step_error(annealed)
        if "scratch" in stages:
            constant = anneal_schedule("constant", 0.0)
            found["scratch"] = flow_error(reflow(keys[0], params, constant, steps))
        if "two_stage" in stages:
            half = steps // 2
            first = reflow(keys[1], params, anneal_schedule("constant", 1.0), half)
            found["two_stage"] = flow_error(
                reflow(keys[2], first, anneal_schedule("constant", 0.0), steps - half)
            )
        for name, guide, by in (
            ("naive", None, "student"),
            ("student", annealed, "student"),
            ("teacher", annealed, "teacher"),
        ):
            if name in stages:
                loss = distillation_loss(velocity, guide, first=by)
                found[name] = one_step_error(trained(keys[3], annealed, loss, pairs, steps))
        return found

    return jax.vmap(one)(jnp.asarray(seeds))


def reported(found):
    found = {name: np.asarray(errors) for name, errors in found.items()}
    for name, errors in found.items():
        print(f"{name:12s}", " ".join(f"{e:.3f}" for e in errors))
    return found


def test_guided_distillation_is_ahead_of_naive():
    # The published sizes but for the steps, of which fewer show less of it.
    found = reported(run(np.array([0]), 8, 500, 32, 2500, ("naive", "student"), fresh=2000))
    assert found["student"][0] <= 0.9 * found["naive"][0]


@pytest.mark.slow
def test_guided_distillation_is_ahead_of_naive_on_every_seed():
    stages = ("naive", "student", "teacher", "scratch", "two_stage")
    found = reported(run(np.arange(3), 8, 500, 32, 4000, stages))
    assert (found["student"] <= 0.9 * found["naive"]).all()
    assert (found["teacher"] <= 0.9 * found["naive"]).all()


@pytest.mark.slow
def test_annealing_is_ahead_of_no_warm_start():
    stages = ("scratch", "two_stage", "naive", "student", "teacher")
    found = reported(run(np.arange(3), 16, 300, 96, 4000, stages))
    assert (found["annealed"] < found["scratch"]).all()
    # Reported, not required of the paper: the warm start of a small flow of its own is better here.
    assert np.isfinite(found["two_stage"]).all()
