"""The raw-time terms against closed forms: marginals, direction, anchors, gradients."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import process, score
from jaxgen.solve.terms import map_samples, on_single, probability_flow, reverse_sde

PID = diffrax.PIDController(rtol=1e-6, atol=1e-6)


def gaussian(sde, mean=(1.0, -0.5), cov=0.25):
    return score.closed_form.gaussian(sde, jnp.array(mean), cov)


def gaussian_map(sde, x, t0, t1, mean, var):
    """The probability flow of Gaussian data from t0 to t1, exactly."""
    a0, a1, s0, s1 = sde.alpha(t0), sde.alpha(t1), sde.sigma(t0), sde.sigma(t1)
    scale = jnp.sqrt((a1**2 * var + s1**2) / (a0**2 * var + s0**2))
    return a1 * mean + scale * (x - a0 * mean)


@pytest.mark.parametrize(
    "prediction",
    [
        "noise",
        "v",
        *(pytest.param(p, marks=pytest.mark.slow) for p in ("score", "data", "velocity")),
    ],
)
def test_flow_of_a_gaussian_is_exact_for_every_prediction(key, prediction):
    sde = process.vp()
    field = getattr(gaussian(sde), prediction)
    x = jax.random.normal(key, (5, 2))
    mean = jnp.array([[1.0, -0.5]])
    term = probability_flow(field, sde, prediction=prediction)
    out = diffrax.diffeqsolve(
        term, diffrax.Tsit5(), t0=1.0, t1=0.1, dt0=-0.01, y0=x, stepsize_controller=PID
    ).ys[0]
    want = gaussian_map(sde, x, 1.0, 0.1, mean, 0.25)
    np.testing.assert_allclose(out, want, atol=2e-4)


def test_reverse_sde_has_the_marginal(key):
    sde, n = process.vp(), 4000
    path = diffrax.UnsafeBrownianPath((n, 1), key)
    term = reverse_sde(gaussian(sde, (1.0,)).noise, sde, path)
    x = jax.random.normal(jax.random.key(1), (n, 1))
    out = diffrax.diffeqsolve(
        term,
        diffrax.Heun(),
        t0=1.0,
        t1=0.05,
        dt0=-0.005,
        y0=x,
        adjoint=diffrax.DirectAdjoint(),
    ).ys[0]
    a, s = float(sde.alpha(0.05)), float(sde.sigma(0.05))
    var = a**2 * 0.25 + s**2
    assert abs(float(out.mean()) - a) < 4 * (var / n) ** 0.5
    assert abs(float(out.var()) - var) < 4 * var * (2 / n) ** 0.5


def test_anchor_of_each_sample_reaches_its_own_solve(key):
    mu = jnp.array([[0.0, 1.0], [2.0, -1.0], [0.5, 0.5]])
    x = jax.random.normal(key, (3, 2))

    def solve(sde, x):
        term = probability_flow(on_single(lambda x, t: 0.1 * x), sde, event_ndim=1)
        return diffrax.diffeqsolve(term, diffrax.Euler(), t0=1.0, t1=0.5, dt0=-0.1, y0=x).ys[0]

    @jax.jit
    def all_of_them(mu, x):
        out = map_samples(solve, process.ouve(mu), x)
        shared = map_samples(solve, process.ouve(mu[:1]), x)
        return out, shared, solve(process.ouve(mu[0]), x[1]), solve(process.ouve(mu[2]), x[2])

    out, shared, first, last = all_of_them(mu, x)
    np.testing.assert_allclose(out[2], last, rtol=1e-5)
    np.testing.assert_allclose(shared[1], first, rtol=1e-5)


def test_gradient_in_the_process_by_backsolve_equals_the_default(key):
    x = jax.random.normal(key, (2, 2))

    def loss(beta_max, adjoint):
        sde = process.vp(0.1, beta_max)
        term = probability_flow(lambda x, t: 0.3 * x, sde)
        return jnp.sum(
            diffrax.diffeqsolve(
                term, diffrax.Heun(), t0=1.0, t1=0.5, dt0=-0.01, y0=x, adjoint=adjoint
            ).ys
        )

    def slope(adjoint):
        return jax.jit(jax.grad(lambda b: loss(b, adjoint)))(20.0)

    default, backsolve = slope(diffrax.DirectAdjoint()), slope(diffrax.BacksolveAdjoint())
    np.testing.assert_allclose(default, backsolve, rtol=1e-3)
    assert abs(float(default)) > 1e-3


def test_bad_fields_raise(key):
    sde = process.vp()
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="prediction is 'eps'"):
        probability_flow(lambda x, t: x, sde, prediction="eps")
    with pytest.raises(ValueError, match=r"returned shape \(3,\)"):
        probability_flow(lambda x, t: x[0], sde).vf(0.5, x, None)
    with pytest.raises(TypeError, match="int32"):
        probability_flow(lambda x, t: x.astype(jnp.int32), sde).vf(0.5, x, None)


def test_a_field_may_be_called_in_another_dtype():
    seen = []

    def field(x, t):
        seen.append((x.dtype, t.shape))
        return x

    term = probability_flow(field, process.vp(), dtype=jnp.bfloat16)
    out = term.vf(jnp.asarray(0.5), jnp.ones((4, 2)), None)
    assert seen[0] == (jnp.bfloat16, (4,)) and out.dtype == jnp.float32
