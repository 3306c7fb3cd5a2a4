"""A unified sampling framework for solver searching (USF and S^3; Liu et al., ICLR 2024).

The claim: with every decision of a solver free at each step, a search finds few-step solvers that
beat all the usual ones on the same model. Here the model is the exact field of a 16-dimensional
mixture under VP, five evaluations from log-SNR/2 of -5 to 3, and a score the root mean square
distance to a fine solution from the same 64 draws of noise. The rivals are 36 plain solvers, among
them DDIM, DPM-Solver(++) 2M and 3M and UniPC-1 to 3 (``baseline_schedules``). The ratio is that of
the schedule found to the best of the 36, both on 512 fresh draws.

Evolution with 600 scores, over five draws of the mixture's means and six seeds of the search: the
ratio is 0.59 in the median, at most 0.7 in 23 of 30 searches and at most 0.83 in all (552 scores).
On the means of this file it is so for every seed tried. The landscape has many valleys, and a
search ends in one of them: repeat it with another seed rather than for longer.

With 150 scores, over ten seeds: 0.88 in the median by evolution alone, 0.92 when a predictor
trained on 76 of them guides the rest (quotient 1.06, 95 % of bootstraps in 1.02 to 1.18). It ranks
150 schedules it has not seen with a Kendall tau of 0.21 in the median (-0.04 to 0.36): on this law,
where one score takes a millisecond, guidance does not pay.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import process, score, solve
from jaxgen.solve import evaluate_schedules
from jaxgen.solve.ranking import fit_predictor

STEPS, BATCH, SCORED, FRESH = 5, 5, 64, 512
SDE = process.vp()
RANGE = (-5.0, 3.0)


@functools.cache
def setting():
    """Times of the two ends, the 36 plain solvers, a score on fresh noise, the best of the 36."""
    ends = [float(SDE.inverse_log_snr(jnp.float32(2 * lam))) for lam in RANGE]
    plain = solve.baseline_schedules(STEPS, SDE, t_start=ends[0], t_end=ends[1])
    assert len(plain) == 36
    parts = [metric(ends, 9999 + i, SCORED) for i in range(FRESH // SCORED)]

    def fresh(population):
        return jnp.sqrt(jnp.mean(jnp.stack([part(population) for part in parts]) ** 2, axis=0))

    return ends, plain, fresh, evaluate_schedules(fresh, list(plain.values()), BATCH).min()


def law(seed=2):
    means = np.random.default_rng(seed).normal(0, 0.5, (4, 16))
    variances = np.broadcast_to(np.geomspace(0.01, 4, 16), (4, 16))
    arrays = (jnp.asarray(v, jnp.float32) for v in (np.full(4, 0.25), means, variances))
    return score.closed_form.mixture(SDE, *arrays)


@jax.jit
def errors(exact, x, fine, population):
    def one(schedule):
        made = solve.usf_sample(
            jax.random.key(0), exact.data, SDE, x.shape, schedule, prediction="data", x_init=x
        )
        return jnp.sqrt(jnp.mean((made.x - fine) ** 2))

    return jax.vmap(one)(population)


@functools.partial(jax.jit, static_argnames="ends")
def reference(exact, x, ends):
    return solve.sample(
        jax.random.key(0),
        exact.data,
        SDE,
        x.shape,
        solver=solve.unipc(3),
        steps=150,
        grid="log_snr",
        t_start=ends[0],
        t_end=ends[1],
        prediction="data",
        x_init=x,
    ).x


def metric(ends, seed, n):
    """The score of a population, from ``n`` draws of noise."""
    exact = law()
    x = SDE.sigma(ends[0]) * jax.random.normal(jax.random.key(seed), (n, 16))
    return functools.partial(errors, exact, x, reference(exact, x, tuple(ends)))


def searched(seed, **options):
    ends, plain, *_ = setting()
    config = solve.SearchConfig(**({"batch": BATCH, "guided_after": None} | options))
    found = solve.search(
        jax.random.key(seed),
        metric(ends, seed, SCORED),
        list(plain.values()),
        config,
        progress=False,
    )
    assert len(found.archive) == config.budget
    return found


def ratio(found):
    *_, fresh, best = setting()
    return evaluate_schedules(fresh, [found.best], BATCH)[0] / best


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_a_searched_schedule_beats_every_plain_solver(seed):
    assert ratio(searched(seed, budget=600)) <= 0.7
    # One compilation for all schedules, here and on fresh noise.
    assert errors._cache_size() == 1


def kendall(a, b):
    """Kendall's tau, pairs that tie in either left out."""
    signs = np.sign(a[:, None] - a[None]) * np.sign(b[:, None] - b[None])
    return signs.sum() / np.abs(signs).sum()


@pytest.mark.slow
def test_the_predictor_guides():
    found, guided, taus = [], [], []
    for seed in range(10):
        plain = searched(seed, budget=300)
        first, later = plain.archive[:150], plain.archive[150:]
        best = min(first, key=lambda e: e.score)
        found.append(ratio(plain._replace(best=best.schedule)))
        guided.append(ratio(searched(seed, budget=150, batch=10, guided_after=76)))
        rank = fit_predictor(
            jax.random.key(seed), [e.schedule for e in first], [e.score for e in first]
        )
        scores = np.array([e.score for e in later])
        taus.append(kendall(rank([e.schedule for e in later]), scores))
    draws = np.random.default_rng(0).integers(10, size=(2000, 10))
    quotient = np.array(guided) / np.array(found)
    interval = np.quantile(np.median(quotient[draws], axis=1), [0.025, 0.975])
    told = (
        f"plain {np.round(found, 3)}, guided {np.round(guided, 3)}, guided/plain median "
        f"{np.median(quotient):.3f} in {interval.round(3)}, tau {np.round(taus, 3)}"
    )
    print(told)
    assert np.median(guided) <= 1.1 * np.median(found), told
    assert max(np.median(guided), np.median(found)) < 1, told
    assert np.median(taus) > 0.1, told
