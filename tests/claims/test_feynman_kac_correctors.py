"""Feynman-Kac correctors (Skreta et al., ICML 2025, arXiv 2503.02819).

The claim: annealing, guidance and products need the weights. With them, particles that follow the
mixed score have the target's law; without them, the same particles have another. Guidance of scale
2.5 between two Gaussians and annealing of a mixture to twice its inverse temperature; the same
SDE, noise, grid and evaluations on both sides. Errors of means (guidance) and of the three modes'
masses (annealing), the largest entry of the mean over 8 keys, 200 steps of 8192 particles:

                weighted   unweighted   log Z (standard error)
    guidance    0.002      0.165        off by 0.000 (0.010)
    annealing   0.012      0.265        off by 0.049 (0.020)

What is left of log Z is the integrator's error, which weights by the trapezoid rule do not mend:
annealing in 100 steps is off by 0.17.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import process, score
from jaxgen.particles.weights import normalise
from jaxgen.smc import target
from jaxgen.smc.feynman_kac import feynman_kac

MEANS = [[-2.0, 0.0], [2.0, 1.5], [1.5, -2.0]]
COVS = [[[0.5, 0], [0, 0.5]], [[0.15, 0.05], [0.05, 0.1]], [[0.3, -0.1], [-0.1, 0.2]]]

# log Z in closed form (annealing: by quadrature), mean, masses by nearest mode.
GUIDED = 1.7287, (1.3289, -1.0382)
COLD = -2.1370, (0.3371, 0.5423, 0.1206)


def guidance():
    sde = process.edm(0.01, 10.0)
    first = score.closed_form.gaussian(sde, jnp.zeros(2), jnp.asarray([[2, 0.5], [0.5, 1.5]]))
    second = score.closed_form.gaussian(sde, jnp.asarray([1, -0.5]), jnp.asarray([0.6, 0.9]))
    return sde, target.guided(first.noise, second.noise, 2.5)


def annealing():
    sde = process.edm(0.01, 6.0)
    weights = jnp.asarray([0.5, 0.3, 0.2])
    field = score.closed_form.mixture(sde, weights, jnp.asarray(MEANS), jnp.asarray(COVS)).noise
    return sde, target.annealed(field, 2.0)


def mean_of(x, p):
    return p @ x


def masses_of(x, p):
    means = jnp.asarray(MEANS)
    nearest = jnp.argmin(jnp.sum((x[:, None] - means[None]) ** 2, -1), -1)
    return jnp.stack([jnp.sum(jnp.where(nearest == k, p, 0)) for k in range(3)])


@functools.partial(jax.jit, static_argnames=("case", "summary", "weights", "n", "steps"))
def run(keys, case, summary, weights, n, steps):
    sde, aim = case()

    def one(key):
        out = feynman_kac(key, aim, sde, (n, 2), steps=steps, weights=weights)
        return out.log_z, summary(out.x, jnp.exp(normalise(out.log_weights)))

    return jax.lax.map(one, keys)


def compare(case, summary, truth, keys, n, steps):
    """Errors with and without weights, and of ``log Z`` with its standard error."""
    keys = jax.random.split(jax.random.key(0), keys)
    (log_z, ours), (_, plain) = (
        run(keys, case, summary, w, n, steps) for w in ("trapezoid", "none")
    )
    log_z, ours, plain = (np.asarray(v) for v in (log_z, ours, plain))
    errors = [float(np.abs(v.mean(0) - np.asarray(truth[1])).max()) for v in (ours, plain)]
    error = abs(log_z.mean() - truth[0]), log_z.std(ddof=1) / np.sqrt(len(log_z))
    figures = f"weighted {errors[0]:.4f}, unweighted {errors[1]:.4f}, log Z off by {error[0]:.4f}"
    print(f"{case.__name__}: {figures} (standard error {error[1]:.4f})")
    assert errors[0] <= errors[1] / 3, figures
    assert error[0] < 4 * error[1] + 0.06, figures


CASES = [(guidance, mean_of, GUIDED), (annealing, masses_of, COLD)]


@pytest.mark.parametrize(("case", "summary", "truth"), CASES)
def test_the_weights_mend_the_law(case, summary, truth):
    compare(case, summary, truth, 4, 3000, 200)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "summary", "truth"), CASES)
def test_the_weights_mend_the_law_at_full_size(case, summary, truth):
    compare(case, summary, truth, 8, 8192, 200)
