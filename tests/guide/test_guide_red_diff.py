"""RED-diff against its objective in closed form, and what it must not do: differentiate the field.

Figures of the objective's minimum are for the 1000 betas of DDPM, a Gaussian of two dimensions of
which the first is observed without noise, float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify

from jaxgen import process, score
from jaxgen.guide import operators
from jaxgen.guide.inverse import times_of
from jaxgen.guide.posterior import dps
from jaxgen.guide.red_diff import SNR_POWERS, red_diff, red_diff_gradient

BETAS = np.linspace(1e-4, 0.02, 1000)
SDE = process.discrete_betas(BETAS)
ABAR = np.cumprod(1 - BETAS)
COV, MEAN, Y = np.array([[0.25, 0.2], [0.2, 0.25]]), np.array([0.1, -0.3]), 0.6
PRIOR = score.closed_form.gaussian(SDE, jnp.asarray(MEAN), jnp.asarray(COV))
FIRST = operators.linear(np.array([[1.0, 0.0]]))


def curvature(power):
    """K of the known optimum: the prior's Hessian over the weight."""
    a, s = np.sqrt(ABAR), np.sqrt(1 - ABAR)
    h = np.asarray(SNR_POWERS[power](jnp.asarray(s / a, jnp.float32)), np.float64)
    inverse = np.linalg.inv(ABAR[:, None, None] * COV + (1 - ABAR)[:, None, None] * np.eye(2))
    return np.mean((h * a * s)[:, None, None] * inverse, axis=0)


def slope(mu, power, weight=0.25):
    """The gradient of the objective (2)."""
    return np.array([mu[0] - Y, 0]) + weight / 2 * curvature(power) @ (mu - MEAN)


@functools.partial(jax.jit, static_argnames=("power", "repeats"))
def gradients(key, mu, power, repeats):
    t = jnp.tile(jnp.arange(1000.0), repeats)
    mus, ys = jnp.broadcast_to(mu, (t.size, 2)), jnp.full((t.size, 1), Y)
    return red_diff_gradient(key, PRIOR.noise, SDE, mus, t, ys, FIRST, snr_power=power).reshape(
        repeats, 1000, 2
    )


@pytest.mark.parametrize(
    ("power", "stationary"),
    [("linear", (0.552281, -0.266939)), ("const", (0.575965, -0.149996))],
)
def test_the_mean_gradient_is_that_of_the_objective(key, power, stationary):
    np.testing.assert_allclose(slope(np.array(stationary), power), 0, atol=2e-6)
    # Far from the posterior mean (0.6, 0.1), and the gradient says so.
    for mu in (stationary, (0.6, 0.1), (-1.0, 0.8)):
        drawn = np.asarray(gradients(key, jnp.asarray(mu), power, 100), np.float64)
        error = drawn.std(axis=0, ddof=1) / np.sqrt(len(drawn))
        total = np.sqrt((error**2).sum(axis=0)) / 1000
        gap = np.abs(drawn.mean(axis=(0, 1)) - slope(np.array(mu), power))
        assert (gap < 4 * total).all(), (mu, gap, total)
        assert (total < 0.01).all()


def test_the_curvature_is_the_published_one():
    np.testing.assert_allclose(
        curvature("linear"), [[0.848586, -0.062029], [-0.062029, 0.848586]], atol=2e-6
    )


def test_the_gradient_for_an_operator_and_a_prior_that_are_not_linear(key):
    """Against the objective (2) by Gauss-Hermite quadrature and automatic differentiation."""
    sde = process.cosine()
    prior = score.closed_form.mixture(
        sde, jnp.array([0.3, 0.7]), jnp.array([[-1.0], [0.5]]), jnp.array([0.05, 0.2])
    )
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights /= weights.sum()
    levels, y = jnp.array([0.1, 0.4, 0.8]), jnp.array([0.3])

    def operator(x):
        return jnp.sin(2 * x)

    def objective(mu):
        alpha, sigma = sde.alpha(levels), sde.sigma(levels)
        x = alpha[:, None] * mu + sigma[:, None] * jnp.asarray(nodes)[None]
        log_p = jax.vmap(lambda x, t: prior.log_prob(x[:, None], t))(x, levels)
        lam = 0.25 * sigma / alpha
        prior_part = jnp.mean(lam * sigma / alpha * (log_p @ jnp.asarray(weights)))
        return 0.5 * 0.7 * jnp.sum((y - operator(mu)) ** 2) - prior_part

    n = 20_000
    mu = jnp.array([-0.3])
    t = jnp.repeat(levels, n)

    @jax.jit
    def estimate(key):
        return red_diff_gradient(
            key,
            prior.score,
            sde,
            jnp.broadcast_to(mu, (3 * n, 1)),
            t,
            jnp.broadcast_to(y, (3 * n, 1)),
            operator,
            obs_weight=0.7,
            prediction="score",
        ), jax.grad(lambda m: objective(m[0]).sum())(mu)

    drawn, truth = estimate(key)
    drawn = np.asarray(drawn, np.float64)[:, 0].reshape(3, n)
    error = np.sqrt((drawn.var(axis=1, ddof=1) / n).sum()) / 3
    assert abs(drawn.mean() - float(truth[0])) < 4 * error and error < 0.01
    assert abs(float(truth[0])) > 20 * error


def test_the_noise_of_q_and_the_means_of_both_terms(key):
    """The variance tells sigma_x0's noise from the level's; no prior leaves A^T (A mu - y)/n_y."""
    c, s0, n, mu = 0.5, 0.7, 20_000, jnp.array([0.3, -0.2, 0.5, 0.1])
    sde, pool, y = process.cosine(), operators.average_pool(2), jnp.array([0.2, -0.4])
    prior = score.closed_form.gaussian(sde, jnp.zeros(4), c)

    @jax.jit
    def run(key):
        drawn = red_diff_gradient(
            key,
            prior.noise,
            sde,
            jnp.broadcast_to(mu, (n, 4)),
            0.5,
            jnp.broadcast_to(y, (n, 2)),
            pool,
            weight=1.0,
            obs_weight=0.0,
            sigma_x0=s0,
        )
        options = {"weight": 0.0, "obs_weight": 0.8, "event_ndim": 1}
        return drawn, red_diff_gradient(key, prior.noise, sde, mu, 0.5, y, pool, **options)

    drawn, fit = run(key)
    a = s = np.sqrt(0.5)
    spread = a**2 * c + s**2
    variance = ((s * a * s0 / spread) ** 2 + (1 - s**2 / spread) ** 2) / 4**2
    assert (np.abs(np.var(drawn, axis=0) - variance) < 4.5 * variance * np.sqrt(2 / n)).all()
    matrix = np.kron(np.eye(2), [[0.5, 0.5]])
    np.testing.assert_allclose(fit, 0.8 * matrix.T @ (matrix @ mu - y) / 2, atol=1e-6)


def test_particles_average_their_gradients(key):
    mu, y, t = jnp.array([[0.2, 0.1], [0.0, 0.3]]), jnp.full((2, 1), Y), jnp.array([40.0, 500, 900])
    options = {"sigma_x0": 0.1}

    @jax.jit
    def both(key):
        three = red_diff_gradient(key, PRIOR.noise, SDE, mu, t, y, FIRST, particles=3, **options)
        first = red_diff_gradient(
            key, PRIOR.noise, SDE, mu, t[:1], y, FIRST, particles=1, **options
        )
        same = red_diff_gradient(key, PRIOR.noise, SDE, mu, t[0], y, FIRST, **options)
        equal = red_diff_gradient(
            key, PRIOR.noise, SDE, mu, t[:1].repeat(2), y, FIRST, particles=2, **options
        )
        out = red_diff(key, PRIOR.noise, SDE, y, FIRST, steps=125, particles=4)
        return three, first, same, equal, out

    three, first, same, equal, out = both(key)
    np.testing.assert_allclose(first, same, rtol=1e-6)
    # Each particle has its own noise.
    assert np.abs(equal - first).min() > 1e-4 and np.abs(three - first).min() > 1e-4
    assert int(out.nfe) == 500 and out.losses.shape == (125, 2) and out.steps == 125


# --- no derivative of the network ---------------------------------------------------------------


@jax.custom_vjp
def undifferentiable(x, t):
    return PRIOR.noise(x, t)


def _raise(*args):
    raise RuntimeError("the field was differentiated")


undifferentiable.defvjp(_raise, _raise)


def test_the_field_is_never_differentiated(key):
    y = jnp.full((3, 1), Y)
    out = red_diff(key, undifferentiable, SDE, y, FIRST, steps=8)
    assert np.isfinite(out.x).all()
    with pytest.raises(RuntimeError, match="was differentiated"):
        dps(key, undifferentiable, SDE, y, FIRST, steps=8)
    # Nor by someone who differentiates the whole.
    slope = jax.grad(lambda y: red_diff(key, undifferentiable, SDE, y, FIRST, steps=8).x.sum())(y)
    assert np.isfinite(slope).all() and float(jnp.abs(slope).min()) > 0


def test_memory_is_that_of_inference(key):
    width, layers, batch = 64, 10, 128
    matrices = jnp.zeros((layers, width, width))

    def field(x, t):
        for matrix in matrices:
            x = jnp.tanh(x @ matrix)
        return x

    seen = operators.mask(np.arange(width) % 2)

    def memory(method):
        y = jax.ShapeDtypeStruct((batch, width), jnp.float32)
        run = jax.jit(lambda y: method(key, field, SDE, y, seen, steps=8).x)
        return run.lower(y).compile().memory_analysis().temp_size_in_bytes

    # DPS keeps the layers' outputs of a step.
    kept = 4 * width * batch * (layers - 1)
    assert memory(red_diff) < memory(dps) - 0.5 * kept


# --- the loop -----------------------------------------------------------------------------------


@functools.cache
def correlated():
    d, rng = 64, np.random.default_rng(0)
    i = np.arange(d)
    cov = 0.25 * np.exp(-((i[:, None] - i) ** 2) / 18) + 1e-4 * np.eye(d)
    seen = np.zeros(d)
    seen[rng.permutation(d)[:33]] = 1
    x = rng.normal(size=(24, d)) @ np.linalg.cholesky(cov).T
    y = jnp.asarray(seen * (x + 0.05 * rng.normal(size=x.shape)), jnp.float32)
    return (
        x,
        y,
        operators.mask(seen),
        score.closed_form.gaussian(SDE, jnp.zeros(d), jnp.asarray(cov)),
    )


@pytest.mark.parametrize(
    ("order", "low", "high"),
    [("descending", 0.005, 0.012), ("random", 0.05, 0.2), ("ascending", 0.1, 0.2)],
)
def test_the_order_from_coarse_to_fine_is_part_of_the_method(key, order, low, high):
    """At 1000 steps 0.0078, 0.109 and 0.132; the posterior mean has 0.0050, the start 0.127."""
    x, y, seen, prior = correlated()
    run = jax.jit(
        lambda key: red_diff(
            key,
            prior.noise,
            SDE,
            y,
            seen,
            steps=500,
            optimizer=optax.adam(0.07, b2=0.99),
            order=order,
        )
    )
    out = run(key)
    error = float(((out.x - x) ** 2).mean())
    assert low < error < high, error
    # What the loop says of itself.
    residual = np.sqrt(((np.asarray(seen(out.x)) - y) ** 2).mean(axis=1))
    np.testing.assert_allclose(out.residual, residual, rtol=1e-4)
    assert int(out.nfe) == 500 and out.method == "red_diff" and out.losses.shape == (500, 24)


def test_times_of_the_ddpm_grid():
    np.testing.assert_array_equal(times_of(SDE, 4, "ddpm"), [0, 250, 500, 750])
    np.testing.assert_allclose(SDE.alpha(times_of(SDE, 4, "ddpm")) ** 2, ABAR[::250], rtol=2e-5)
    vp = process.vp()
    np.testing.assert_allclose(times_of(vp, 1000, "ddpm"), vp.discretize(1000).t, rtol=1e-6)
    for grid in ("time", "log_snr"):
        times = np.asarray(times_of(vp, 7, grid))
        np.testing.assert_allclose(times[[0, -1]], [1e-3, 1], rtol=1e-3)
        assert (np.diff(times) > 0).all()
        # A sampler of one step starts from noise.
        np.testing.assert_allclose(times_of(vp, 1, grid), [1.0], rtol=1e-5)
    np.testing.assert_array_equal(times_of(vp, 2, jnp.array([0.9, 0.1])), jnp.array([0.1, 0.9]))


def test_an_example_is_the_same_alone_in_a_batch_and_under_vmap(key):
    y = jnp.array([[0.6], [0.1], [-0.4]])
    options = {"steps": 10, "order": "random"}

    @jax.jit
    def run(key, y):
        whole = red_diff(key, PRIOR.noise, SDE, y, FIRST, **options).x
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(3))
        each = jax.vmap(
            lambda k, y: red_diff(k, PRIOR.noise, SDE, y, FIRST, event_ndim=1, **options).x
        )(keys, y)
        part = red_diff(key, PRIOR.noise, SDE, y[:2], FIRST, **options).x
        return whole, each, part

    whole, each, part = run(key, y)
    np.testing.assert_allclose(whole, each, atol=1e-5)
    np.testing.assert_allclose(whole[:2], part, atol=1e-5)


def test_processes_of_one_snr_are_one(key):
    """By x_t/alpha the loop knows the process by its signal-to-noise ratios alone."""

    @jax.jit
    def run(key):
        made = []
        for sde, prediction in (
            (process.vp(), "noise"),
            (process.ve(), "data"),
            (process.rectified(), "velocity"),
            (process.mean_reverting(jnp.asarray(MEAN), sigma_inf=1.0, alpha_end=0.01), "v"),
        ):
            prior = score.closed_form.gaussian(sde, jnp.asarray(MEAN), jnp.asarray(COV))
            out = red_diff(
                key,
                getattr(prior, prediction),
                sde,
                jnp.full((4, 1), Y),
                FIRST,
                steps=30,
                optimizer=optax.sgd(0.1),
                prediction=prediction,
                grid=sde.inverse_log_snr(jnp.linspace(-5.0, 5.0, 30)),
            )
            made.append(out.x)
        return made

    first, *others = run(key)
    assert np.ptp(first[:, 1]) > 0.01
    for x in others:
        np.testing.assert_allclose(x, first, atol=2e-3)


def test_complex_measurements_and_a_level_without_signal(key):
    sde = process.cosine()
    prior = score.closed_form.gaussian(sde, jnp.zeros(8), 1.0)
    x = jax.random.normal(jax.random.key(3), (2, 8))
    y = jnp.fft.fft(x)[:, :5]

    def operator(x):
        return jnp.fft.fft(x)[:5]

    # At t = 1 alpha is 0, and a field of noise or data is all that is defined there.
    out = red_diff(
        key,
        prior.noise,
        sde,
        y,
        operator,
        mu_init=jnp.zeros((2, 8)),
        steps=200,
        grid=jnp.concatenate([jnp.ones(1), jnp.linspace(0.99, 1e-3, 199)]),
        weight=1e-3,
    )
    np.testing.assert_allclose(out.x, x, atol=0.05)
    assert out.x.dtype == jnp.float32 and float(out.residual.max()) < 0.1


def test_values_that_are_no_numbers_show(key):
    y = jnp.array([[jnp.nan], [0.5]])
    error, x = checkify.checkify(
        jax.jit(lambda y: red_diff(key, PRIOR.noise, SDE, y, FIRST, steps=4).x)
    )(y)
    assert np.isnan(x[0]).all() and np.isfinite(x[1]).all()
    with pytest.raises(checkify.JaxRuntimeError, match="y holds NaN"):
        error.throw()


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (
            ValueError,
            r"y has shape \(2, 3\).*has shape \(1,\)",
            {"y": jnp.ones((2, 3)), "mu_init": jnp.ones((2, 2))},
        ),
        (ValueError, "one batch", {"mu_init": jnp.ones((3, 2))}),
        (ValueError, "returned shape", {"field": lambda x, t: x[:, :1]}),
        (ValueError, "steps is 0", {"steps": 0}),
        (ValueError, "steps is 2000.*1000 times", {"steps": 2000}),
        (ValueError, "steps is 300.*1000 times", {"steps": 300}),
        (ValueError, "grid has shape", {"grid": jnp.ones(3)}),
        (ValueError, "grid is 'karras'", {"grid": "karras"}),
        (ValueError, "weight is -1", {"weight": -1.0}),
        (ValueError, "obs_weight is -1", {"obs_weight": -1.0}),
        (ValueError, "snr_power is 'cube'", {"snr_power": "cube"}),
        (ValueError, "order is 'up'", {"order": "up"}),
        (ValueError, "particles is 0", {"particles": 0}),
        (ValueError, "prediction is 'epsilon'", {"prediction": "epsilon"}),
        (TypeError, "y has dtype int32", {"y": jnp.ones((2, 1), jnp.int32)}),
        (TypeError, "typed key", {"key": jax.random.PRNGKey(0)}),
        (TypeError, "give mu_init too", {"operator": lambda x: x[:1]}),
        (TypeError, "operator is 3", {"operator": 3}),
    ],
)
def test_bad_input_names_the_argument(key, error, words, options):
    good = {"key": key, "field": PRIOR.noise, "y": jnp.ones((2, 1)), "operator": FIRST, "steps": 4}
    with pytest.raises(error, match=words):
        red_diff(sde=SDE, **(good | options))


def test_the_gradient_takes_times_of_its_particles_only(key):
    mu, y = jnp.zeros((2, 2)), jnp.ones((2, 1))
    with pytest.raises(ValueError, match="t has shape"):
        red_diff_gradient(key, PRIOR.noise, SDE, mu, jnp.zeros(3), y, FIRST)
    with pytest.raises(ValueError, match="t has shape"):
        red_diff_gradient(key, PRIOR.noise, SDE, mu, 0.0, y, FIRST, particles=2)
