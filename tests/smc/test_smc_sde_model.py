"""Models that move by an SDE, against matrix exponentials and Kalman."""

import diffrax
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from jaxgen.smc.filter import particle_filter
from jaxgen.smc.oracle import kalman_filter
from jaxgen.smc.sde_model import discretize_linear_sde, linear_sde, sde_model

TIMES = jnp.array([0.0, 0.1, 0.7, 0.75, 2.0])
Y = jnp.array([0.2, 0.5, -0.3, -0.1, 0.8])[:, None]
# A damped oscillator pushed by noise in its velocity alone, and drawn to a point.
A = np.array([[0.0, 1.0], [-2.0, -0.5]])
B = np.array([[0.0], [0.7]])
PUSH = np.array([0.0, 1.0])
FIRST = (np.zeros(2), np.eye(2), np.array([[1.0, 0.0]]), np.array([[0.1]]))


def van_loan(a, root, h, offset):
    d = len(a)
    block = np.block([[-a, root @ root.T], [np.zeros((d, d)), a.T]]) * h
    e = scipy.linalg.expm(block)
    f = e[d:, d:].T
    wide = scipy.linalg.expm(np.block([[a, offset[:, None]], [np.zeros((1, d + 1))]]) * h)
    return f, wide[:d, d], f @ e[:d, d:]


@jax.jit
def several(a, root, lengths, offset):
    return jax.vmap(lambda h: discretize_linear_sde(a, root, h, offset))(lengths)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_exact_transition_is_van_loan_s(scale):
    lengths = np.array([1e-4, 0.1, 2.0 / scale])
    args = (scale * A, B, lengths, PUSH)
    with jax.enable_x64(True):
        wide = several(*args)
    narrow = several(*(v.astype(np.float32) for v in args))
    for i, h in enumerate(lengths):
        for k, expected in enumerate(van_loan(scale * A, B, h, PUSH)):
            size = np.abs(expected).max()
            np.testing.assert_allclose(wide[k][i], expected, atol=1e-11 * size, rtol=1e-9)
            np.testing.assert_allclose(narrow[k][i], expected, atol=2e-6 * size)


def test_a_stiff_system_reaches_its_stationary_law():
    # exp(-A h) would overflow: rates of 1000 over a time of 5.
    a = -np.diag([1000.0, 1.0]).astype(np.float32)
    f, b, q = discretize_linear_sde(a, jnp.eye(2), 5.0, jnp.ones(2))
    # Of the slow one exp(-5) is left.
    np.testing.assert_allclose(np.diag(q), [1 / 2000, (1 - np.exp(-10)) / 2], rtol=1e-5)
    np.testing.assert_allclose(b, [1e-3, 1 - np.exp(-5)], rtol=1e-5)
    np.testing.assert_allclose(f, np.diag([0, np.exp(-5)]), atol=1e-6)


def test_an_unobserved_time_in_between_changes_nothing():
    @jax.jit
    def log_z(times, y, observed):
        params = linear_sde(A, B, times, *FIRST, drift_offset=PUSH)
        return kalman_filter(params, y, observed=observed).log_z

    with jax.enable_x64(True):
        whole = log_z(np.asarray(TIMES, float), np.asarray(Y, float), np.ones(5, bool))
        times, y = np.insert(np.asarray(TIMES, float), 4, 1.3), np.insert(Y, 4, 99.0, axis=0)
        split = log_z(times, np.asarray(y, float), np.arange(6) != 4)
    np.testing.assert_allclose(split, whole, rtol=1e-10)


def oscillator(path):
    drift = diffrax.ODETerm(lambda t, x, args: jnp.asarray(A, x.dtype) @ x + PUSH.astype(x.dtype))
    spread = diffrax.ControlTerm(lambda t, x, args: jnp.asarray(B, x.dtype), path)
    return diffrax.MultiTerm(drift, spread)


@pytest.mark.slow
def test_euler_steps_approach_the_exact_filter():
    exact = linear_sde(*(v.astype(np.float32) for v in (A, B)), TIMES, *map(jnp.asarray, FIRST),
                       drift_offset=PUSH)  # fmt: skip
    log_z = float(kalman_filter(exact, Y).log_z)
    base = exact.model()
    errors = []
    for substeps in (1, 16):
        model = sde_model(oscillator, TIMES, init=base.init, log_potential=base.log_potential,
                          substeps=substeps, noise_shape=(1,))  # fmt: skip
        f = jax.jit(jax.vmap(lambda key, m=model: particle_filter(key, m, Y, 32).log_z))
        ratio = np.exp(np.asarray(f(jax.random.split(jax.random.key(0), 200))) - log_z)
        errors.append((ratio.mean() - 1, ratio.std() / 200**0.5))
    # One step a transition is far off; with 16 a bias of first order is left, below 4 per cent.
    assert abs(errors[0][0]) > 8 * errors[0][1] and abs(errors[0][0]) > 0.1
    assert abs(errors[1][0]) < 4 * errors[1][1] + 0.04


def test_exact_transitions_in_the_filter():
    exact = linear_sde(*(v.astype(np.float32) for v in (A, B)), TIMES, *map(jnp.asarray, FIRST),
                       drift_offset=PUSH)  # fmt: skip
    log_z = float(kalman_filter(exact, Y).log_z)
    f = jax.jit(jax.vmap(lambda key: particle_filter(key, exact.model(), Y, 32).log_z))
    ratio = np.exp(np.asarray(f(jax.random.split(jax.random.key(1), 500))) - log_z)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / 500**0.5


def bistable(path):
    """Its noise grows with the state; two coordinates, three Brownian motions."""
    mix = np.array([[1.0, 0.2, 0.0], [0.0, 0.5, 0.3]])

    def diffusion(t, x, args):
        return (1 + 0.1 * x[0] ** 2 + t) * jnp.asarray(mix, x.dtype)

    drift = diffrax.ODETerm(lambda t, x, args: x - x**3)
    return diffrax.MultiTerm(drift, diffrax.ControlTerm(diffusion, path))


def test_one_euler_step_has_its_density():
    model = sde_model(
        bistable,
        TIMES,
        init=lambda key: jax.random.normal(key, (2,)),
        log_potential=lambda x, y, t: 0.0,
        noise_shape=(3,),
    )
    x, z = np.array([0.7, -0.4], np.float32), np.array([0.1, 0.3], np.float32)

    @jax.jit
    def run(x, z):
        move = jax.vmap(lambda key: model.transition(key, x, jnp.int32(2)))
        return model.log_transition(x, z, jnp.int32(2)), move(
            jax.random.split(jax.random.key(0), 10_000)
        )

    got, draws = run(x, z)
    h, start = 0.6, 0.1
    mix = (1 + 0.1 * x[0] ** 2 + start) * np.array([[1.0, 0.2, 0.0], [0.0, 0.5, 0.3]])
    mean, cov = x + h * (x - x**3), h * mix @ mix.T
    np.testing.assert_allclose(got, scipy.stats.multivariate_normal.logpdf(z, mean, cov), rtol=1e-5)
    error = np.sqrt(np.diag(cov) / len(draws))
    np.testing.assert_array_less(np.abs(np.mean(draws, 0) - mean), 4 * error)
    spread = np.sqrt((np.outer(np.diag(cov), np.diag(cov)) + cov**2) / len(draws))
    np.testing.assert_array_less(np.abs(np.cov(np.asarray(draws).T) - cov), 4 * spread)
    more = sde_model(bistable, TIMES, init=model.init, log_potential=model.log_potential,
                     substeps=2, noise_shape=(3,))  # fmt: skip
    assert more.log_transition is None


def geometric(path):
    drift = diffrax.ODETerm(lambda t, x, args: 0.3 * x)
    return diffrax.MultiTerm(drift, diffrax.ControlTerm(lambda t, x, args: 0.5 * x, path))


@pytest.mark.parametrize("solver", [diffrax.ItoMilstein(), diffrax.SPaRK()])
def test_other_solvers_and_pytrees(solver):
    # Geometric Brownian motion: log x is Gaussian. SPaRK is Stratonovich's and asks for Levy areas.
    shift = 0.0 if isinstance(solver, diffrax.SPaRK) else 0.5 * 0.5**2
    model = sde_model(
        geometric,
        jnp.array([0.0, 1.0]),
        init=jnp.ones,
        log_potential=lambda x, y, t: 0.0,
        substeps=16,
        solver=solver,
    )
    move = jax.vmap(lambda key: model.transition(key, jnp.ones(()), jnp.int32(1)))
    logs = np.log(np.asarray(jax.jit(move)(jax.random.split(jax.random.key(0), 4000))))
    assert abs(logs.mean() - (0.3 - shift)) < 4 * 0.5 / 4000**0.5 + 0.003
    assert abs(logs.std() - 0.5) < 4 * 0.5 / 8000**0.5 + 0.003


def test_particles_of_several_arrays():
    # One Brownian motion drives both; each keeps its dtype.
    def terms(path):
        drift = diffrax.ODETerm(lambda t, x, args: jax.tree.map(jnp.zeros_like, x))

        def diffusion(t, x, args):
            like = jax.eval_shape(lambda: x)
            spread = {"a": jnp.ones(()), "b": jnp.array([2.0, 3.0], x["b"].dtype)}
            return lineax.PyTreeLinearOperator(spread, like)

        return diffrax.MultiTerm(drift, diffrax.ControlTerm(diffusion, path))

    start = {"a": jnp.zeros(()), "b": jnp.ones(2, jnp.bfloat16)}
    model = sde_model(terms, TIMES, init=lambda key: start, log_potential=lambda x, y, t: 0.0,
                      noise_shape=())  # fmt: skip
    x = model.transition(jax.random.key(0), start, jnp.int32(1))
    assert x["b"].dtype == jnp.bfloat16 and x["a"].dtype == jnp.float32
    moved = np.asarray(x["b"], float) - 1
    np.testing.assert_allclose(moved, float(x["a"]) * np.array([2, 3]), atol=0.02)


def test_a_failed_step_is_nan():
    def terms(path):
        drift = diffrax.ODETerm(lambda t, x, args: jnp.where(t > 0.5, jnp.nan, x))
        return diffrax.MultiTerm(drift, diffrax.ControlTerm(lambda t, x, args: 1.0, path))

    model = sde_model(
        terms,
        TIMES,
        init=jax.random.normal,
        log_potential=lambda x, y, t: -jnp.abs(x - y[0]),
        substeps=4,
    )
    done = particle_filter(jax.random.key(0), model, Y, 8, functions=lambda x: x)
    assert np.isfinite(done.means[:2]).all() and np.isnan(done.means[2:]).all()
    assert np.isnan(done.log_z)


def test_bad_input():
    given = {"init": jax.random.normal, "log_potential": lambda x, y, t: 0.0}
    key = jax.random.key(0)
    with pytest.raises(TypeError, match="terms is MultiTerm"):
        sde_model(geometric(None), TIMES, **given)
    with pytest.raises(TypeError, match="times has dtype int32"):
        sde_model(geometric, jnp.arange(3), **given)
    with pytest.raises(ValueError, match="expected rising times"):
        sde_model(geometric, TIMES[::-1], **given)
    with pytest.raises(ValueError, match=r"times has shape \(5, 1\)"):
        sde_model(geometric, TIMES[:, None], **given)
    with pytest.raises(ValueError, match="substeps is 0"):
        sde_model(geometric, TIMES, substeps=0, **given)
    with pytest.raises(ValueError, match="noise_shape is None for particles of 2 arrays"):
        sde_model(geometric, TIMES, **given).transition(key, (1.0, 1.0), 1)
    with pytest.raises(ValueError, match="drift_matrix has shape"):
        discretize_linear_sde(jnp.zeros((2, 3)), jnp.eye(2), 1.0)
    with pytest.raises(ValueError, match="drift_offset has shape"):
        discretize_linear_sde(jnp.zeros((2, 2)), jnp.eye(2), 1.0, jnp.zeros(3))
