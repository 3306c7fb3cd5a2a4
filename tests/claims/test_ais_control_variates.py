"""One sample for several expectations (Demange-Chryst, Bachoc and Morio, arXiv 2212.00568).

The claim: with components that serve as proposal and as control variates, one adaptive sample
estimates all expectations better than one run for each, at equal evaluations. Here: ten moments of
a normal law against ten adaptive runs of a tenth of the budget, and the mean of one function under
twenty laws against twenty plain samples and against the same sampler without control variates.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm

from jaxgen.smc import importance

POWERS = 2 * np.arange(1, 11)
MOMENTS = np.cumprod(2.0 * np.arange(1, 11) - 1)  # E x^2j = (2j - 1)!!


def criterion(mean, truth):
    """Sum over expectations of the mean squared relative error."""
    return np.sum(np.mean((mean / truth - 1) ** 2, axis=0))


def mapped(run, seed, n):
    """``run`` for ``n`` keys, one after another in one program."""
    keys = jax.random.split(jax.random.key(seed), n)
    return jax.tree.map(np.asarray, jax.jit(lambda keys: jax.lax.map(run, keys))(keys))


def joint_moments(key):
    log_f, sample_f = importance.standard_normal(1)

    def phi(x):
        return jnp.power(x, POWERS[None])

    weights = jnp.asarray(1 / MOMENTS**2, jnp.float32)
    out = importance.multiple_expectations(key, phi, log_f, sample_f, 20000, weights=weights)
    return out.mean, out.std_err, out.nfe


def separate_moments(key):
    """Ten adaptive runs, one for each moment, with a tenth of the budget each."""
    log_f, sample_f = importance.standard_normal(1)

    def one(inputs):
        key, power = inputs
        return importance.multiple_expectations(
            key, lambda x: jnp.power(x, power), log_f, sample_f, 2000
        ).mean[0]

    return jax.lax.map(one, (jax.random.split(key, 10), jnp.asarray(POWERS)))


def check_moments(seed, n):
    """The joint runs' criterion, after a look at their means and standard errors."""
    mean, std_err, nfe = mapped(joint_moments, seed, n)
    joint, sd = criterion(mean, MOMENTS), mean.std(0, ddof=1)
    z, ratio = (mean.mean(0) - MOMENTS) / (sd / np.sqrt(n)), std_err.mean(0) / sd
    print(f"joint {joint:.3g}, z {z}, std_err/sd {ratio}")
    assert np.all(nfe == 20000)
    assert 1.6e-3 / 1.6 < joint < 1.6e-3 * 1.6  # one plain sample has 49.75 exactly
    assert np.all(np.abs(z) < 4)
    # 4 standard errors of an estimated sd.
    assert np.all(np.abs(np.log(ratio)) < 4 / np.sqrt(2 * n))
    return joint


def test_ten_moments_from_one_sample():
    check_moments(0, 24)


@pytest.mark.slow
def test_joint_sample_beats_one_adaptive_run_for_each_moment():
    joint = check_moments(100, 60)
    separate = criterion(mapped(separate_moments, 101, 60), MOMENTS)
    print(f"separate {separate:.3g}")
    assert separate > 100 * joint


@functools.cache
def laws():
    draw = np.random.default_rng(5)
    means, stds = draw.uniform(-0.5, 0.5, (20, 2)), draw.uniform(0.6, 1, (20, 2))
    c = np.array([1, 0.5])
    log_truth = means @ c + 0.5 * np.sum((c * stds) ** 2, axis=1)
    # Twenty plain samples of N/20 points: relative variances exp(|c s|^2) - 1 each.
    separate = np.sum((np.exp(np.sum((c * stds) ** 2, axis=1)) - 1) * 20 / 10000)
    return means.astype(np.float32), stds.astype(np.float32), np.exp(log_truth), separate


def joint_laws(key, *, control_variates):
    means, stds, truth, _ = laws()

    def log_f(x):
        return jnp.sum(norm.logpdf(x[:, None], means[None], stds[None]), axis=-1)

    def sample_f(key, n):
        key_law, key_x = jax.random.split(key)
        at = jax.random.randint(key_law, (n,), 0, 20)
        return jnp.asarray(means)[at] + jnp.asarray(stds)[at] * jax.random.normal(key_x, (n, 2))

    def phi(x):
        return jnp.exp(x[:, :1] + x[:, 1:] / 2)

    return importance.multiple_expectations(
        key,
        phi,
        log_f,
        sample_f,
        10000,
        weights=jnp.asarray(1 / truth**2, jnp.float32),
        control_variates=control_variates,
    ).mean


def check_laws(seed, n):
    _, _, truth, separate = laws()
    runs = {
        name: mapped(functools.partial(joint_laws, control_variates=name), seed, n)
        for name in (True, False)
    }
    joint, without = (criterion(mean, truth) for mean in runs.values())
    z = (runs[True].mean(0) - truth) / (runs[True].std(0, ddof=1) / np.sqrt(n))
    print(f"joint {joint:.3g}, without controls {without:.3g}, separate {separate:.3g}, z {z}")
    assert np.all(np.abs(z) < 4)
    assert separate > 1000 * joint
    assert without > 20 * joint


def test_joint_sample_beats_one_sample_for_each_law():
    check_laws(0, 8)


@pytest.mark.slow
def test_joint_sample_beats_one_sample_for_each_law_on_other_keys():
    check_laws(100, 40)
