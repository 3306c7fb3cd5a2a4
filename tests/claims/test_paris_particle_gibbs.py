"""State and parameter learning with PaRIS particle Gibbs (Cardoso et al., ICML 2023, 2301.00900).

The claim: the bias of the sweeps' estimates falls geometrically, where PaRIS's falls as 1 / n.

Two states, five steps, n = 4, two draws; truth 2.1956 by enumeration. Bias of PaRIS and of sweeps 1
to 5 that start from its path, 400,000 chains (standard error 0.0015), and the ratios by the sweep's
own kernel, as the test takes them (standard error 0.011 to 0.014):

    PaRIS -0.410    sweeps -0.211 -0.098 -0.043 -0.021 -0.007    ratios 0.510 0.460 0.441 0.430

Linear-Gaussian, twenty steps, n = 10; truth 21.0820 by the Kalman smoother (21.0803 is known for
these observations before rounding). 20,000 chains, standard error 0.012, PaRIS's 0.016:

    PaRIS -0.881    sweeps -0.293 -0.130 -0.049 -0.037 -0.030 -0.004 -0.018 -0.013

At equal work the two tie at first. One sweep with the run that starts it is the work of PaRIS with
20 particles: -0.293 against -0.322 (0.010). Sweeps 3 and 4 are that of 50: their mean -0.043
(0.009) against -0.104 (0.006). Sweeps 5 to 8 are that of 90: -0.016 (0.007) against -0.059 (0.004);
from there on PaRIS's bias falls as 1 / n only. (Work counts particles; the exact backward pass
costs their square, so that in densities PaRIS with 90 pays nine times more.)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.smc.oracle import hmm_enumerate, kalman_smoother, linear_gaussian
from jaxgen.smc.paris import conditional_paris, paris
from jaxgen.smc.particle_gibbs import particle_gibbs
from jaxgen.smc.state_space import StateSpaceModel

# --- two states -----------------------------------------------------------------------------------

MOVE = jnp.array([[0.8, 0.2], [0.3, 0.7]])
SEE = jnp.array([[0.9, 0.1], [0.2, 0.8]])
SEEN = jnp.array([0, 1, 1, 0, 1])
TWO_STATES = StateSpaceModel(
    init=lambda key: jax.random.bernoulli(key, 0.5).astype(jnp.int32),
    transition=lambda key, x, t: jax.random.bernoulli(key, MOVE[x, 1]).astype(jnp.int32),
    log_potential=lambda x, y, t: jnp.log(SEE[x, y]),
    log_transition=lambda x, x_next, t: jnp.log(MOVE[x, x_next]),
)


def products(x_prev, x_next, t):
    return (x_prev * x_next).astype(jnp.float32)[None]


def truth():
    done = hmm_enumerate(
        jnp.array([0.5, 0.5]),
        MOVE,
        SEE[:, SEEN].T,
        lambda path: jnp.sum(path[1:] * path[:-1]).astype(jnp.float32),
    )
    return np.asarray(done.paths), np.exp(np.asarray(done.log_probs, float)), float(done.estimate)


def number(path):
    """A path's row in the enumeration."""
    return jnp.sum(path * 2 ** jnp.arange(4, -1, -1), axis=-1)


@jax.jit
@jax.vmap
def first_runs(key):
    out = paris(key, TWO_STATES, SEEN, 4, products, path=True)
    return out.estimate[0], number(out.path)


@jax.jit
@jax.vmap
def one_sweep(key, reference):
    out = conditional_paris(key, TWO_STATES, SEEN, reference, 4, products)
    return out.estimate[0], number(out.path)


def biases(estimates, start, of_path, to_path, probs, mean):
    """Bias of PaRIS and of the sweeps that follow, by the sweep's own kernel on the 32 paths.

    Given its reference a sweep knows nothing of the past, so that the law of the l-th reference is
    the first one's times a power of the kernel, and no chain need be run. Started from the
    smoothing law the mean is the truth (asserted apart): taken off as measured, it leaves an error
    that falls with the bias.
    """
    law = np.bincount(start, minlength=32) / len(start) - probs
    kernel = np.stack([np.bincount(row, minlength=32) / len(row) for row in to_path])
    out = [estimates.mean() - mean]
    for _ in range(5):
        out.append(law @ of_path.mean(1))
        law = law @ kernel
    return np.array(out)


def test_bias_of_the_sweeps_falls_by_0_65_a_sweep():
    paths, probs, mean = truth()
    assert mean == pytest.approx(2.1956349, abs=1e-6)
    each, batches = 640, 16
    key_first, key = jax.random.split(jax.random.key(0))
    estimates, start = map(np.asarray, first_runs(jax.random.split(key_first, 32 * each)))
    references = jnp.asarray(np.repeat(paths, each, axis=0))
    of_path, to_path = one_sweep(jax.random.split(key, 32 * each), references)
    of_path, to_path = (np.asarray(a).reshape(32, each) for a in (of_path, to_path))

    # From a reference of the smoothing law: unbiased, and a path of the smoothing law.
    error = probs @ of_path.mean(1) - mean
    deviation = np.sqrt(probs**2 @ of_path.var(1) / each)
    assert abs(error) < 4 * deviation, (error, deviation)
    stays = np.stack([np.bincount(row, minlength=32) / each for row in to_path])
    spread = np.sqrt(probs.max() * probs / each)  # at least the standard error
    worst = np.max(np.abs(probs @ stays - probs) / spread)
    assert worst < 4.5, worst

    # The jackknife over batches gives each ratio its standard error.
    whole = biases(estimates, start, of_path, to_path, probs, mean)
    ratios = whole[1:5] / whole[:4]
    without = []
    for i in range(batches):
        keep, keep_first = np.arange(each) % batches != i, np.arange(32 * each) % batches != i
        b = biases(
            estimates[keep_first],
            start[keep_first],
            of_path[:, keep],
            to_path[:, keep],
            probs,
            mean,
        )
        without.append(b[1:5] / b[:4])
    errors = np.sqrt((batches - 1) * np.var(without, axis=0))
    print("biases", whole, "ratios", ratios, "standard errors", errors)
    assert np.all(np.abs(ratios) + 3 * errors < 0.65), (ratios, errors)


# --- linear-Gaussian ------------------------------------------------------------------------------

Y = np.float32(
    [
        [0.106, 0.474, 0.178, 0.498, 0.356, 0.286, 0.661, 0.992, 0.653, 0.144],
        [-0.544, -0.259, -1.387, -1.152, -1.742, -1.885, -2.261, -2.055, -1.374, -0.479],
    ]
).ravel()
LINEAR = StateSpaceModel(
    init=lambda key: 0.5 / np.sqrt(0.19) * jax.random.normal(key),
    transition=lambda key, x, t: 0.9 * x + 0.5 * jax.random.normal(key),
    log_potential=lambda x, y, t: -0.5 * ((y - x) / 0.3) ** 2,
    log_transition=lambda x, x_next, t: -0.5 * ((x_next - 0.9 * x) / 0.5) ** 2,
)


def sum_of_products():
    eye = np.eye(1)
    exact = linear_gaussian(np.zeros(1), eye * 0.25 / 0.19, 0.9 * eye, 0.25 * eye, eye, 0.09 * eye)
    done = kalman_smoother(exact, Y[:, None])
    means = np.asarray(done.means[:, 0])
    return float(np.sum(means[1:] * means[:-1] + np.asarray(done.cross_covs[:, 0, 0])))


@functools.partial(jax.jit, static_argnames=("n", "sweeps"))
@functools.partial(jax.vmap, in_axes=(0, None, None))
def linear_runs(key, n, sweeps):
    key_first, key = jax.random.split(key)
    first = paris(key_first, LINEAR, Y, n, products, path=sweeps > 0)
    if not sweeps:
        return first.estimate[0], None
    chain = particle_gibbs(
        key, LINEAR, Y, n, products, sweeps=sweeps, burn_in=0, reference=first.path
    )
    return first.estimate[0], chain.per_sweep[:, 0]


def summary(estimates, mean):
    estimates = np.asarray(estimates, float)
    return estimates.mean(0) - mean, estimates.std(0) / np.sqrt(len(estimates))


def test_bias_after_four_sweeps_is_below_a_quarter_of_paris():
    mean = sum_of_products()
    assert mean == pytest.approx(21.0820, abs=1e-3)
    first, sweeps = linear_runs(jax.random.split(jax.random.key(0), 3000), 10, 4)
    (bias, error), (after, errors) = summary(first, mean), summary(sweeps, mean)
    print("PaRIS", bias, error, "sweeps", after, errors, "ratios", after[1:] / after[:-1])
    assert abs(bias) > 10 * error
    assert abs(after[3]) + 3 * errors[3] < abs(bias) / 4, (after, errors, bias)


# --- the figures above ----------------------------------------------------------------------------


@pytest.mark.slow
def test_chains_of_the_two_state_model():
    _, _, mean = truth()

    @jax.jit
    @jax.vmap
    def chain(key):
        key_first, key = jax.random.split(key)
        first = paris(key_first, TWO_STATES, SEEN, 4, products, path=True)
        sweeps = particle_gibbs(
            key, TWO_STATES, SEEN, 4, products, sweeps=5, burn_in=0, reference=first.path
        )
        return jnp.concatenate([first.estimate, sweeps.per_sweep[:, 0]])

    keys = jax.random.split(jax.random.key(0), (8, 50_000))
    bias, error = summary(np.concatenate([chain(k) for k in keys]), mean)
    print("bias", bias, "standard errors", error)
    assert np.all(np.abs(bias[1:5]) + 3 * error[1:5] < 0.65 * np.abs(bias[:4]) + 3 * error[:4])
    # The figures of an independent program, in NumPy.
    published = [-0.4143, -0.2127, -0.1000, -0.0436, -0.0171, -0.0096]
    assert np.all(np.abs(bias - published) < 4 * np.sqrt(2) * error), (bias, published)


@pytest.mark.slow
def test_at_equal_work_they_tie_and_then_part():
    mean = sum_of_products()
    keys = jax.random.split(jax.random.key(1), (5, 4000))

    def figures(n, sweeps):
        out = [linear_runs(k, n, sweeps) for k in keys]
        first = np.concatenate([a for a, _ in out])
        return first, np.concatenate([b for _, b in out]) if sweeps else None

    first, sweeps = figures(10, 8)
    rivals = {n: summary(figures(n, 0)[0], mean) for n in (20, 50, 90)}
    bias, error = summary(first, mean)
    after, errors = summary(sweeps, mean)
    middle, late = (summary(sweeps[:, a:b].mean(1), mean) for a, b in ((2, 4), (4, 8)))
    print("PaRIS 10", bias, error, "sweeps", after, errors)
    print("PaRIS 20, 50, 90", rivals, "sweeps 3-4", middle, "sweeps 5-8", late)
    assert abs(after[0] - rivals[20][0]) < 0.1
    assert abs(middle[0] - rivals[50][0]) < 0.1
    assert abs(late[0]) + 2 * late[1] < abs(rivals[90][0])
