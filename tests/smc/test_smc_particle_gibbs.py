"""The PaRIS Gibbs sampler: exact laws on two states, scores, learning."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from scipy import optimize, stats

from jaxgen.smc.conditional import conditional_smc
from jaxgen.smc.learning import fisher_functional, markov_score_climbing, score_ascent
from jaxgen.smc.oracle import hmm_enumerate, kalman_filter, kalman_smoother, linear_gaussian
from jaxgen.smc.paris import conditional_paris, paris
from jaxgen.smc.particle_gibbs import particle_gibbs
from jaxgen.smc.state_space import StateSpaceModel

MOVE = jnp.array([[0.8, 0.2], [0.3, 0.7]])
SEE = jnp.array([[0.9, 0.1], [0.2, 0.8]])
SEEN = jnp.array([0, 1, 1, 0, 1])
TWO_STATES = StateSpaceModel(
    init=lambda key: jax.random.bernoulli(key, 0.5).astype(jnp.int32),
    transition=lambda key, x, t: jax.random.bernoulli(key, MOVE[x, 1]).astype(jnp.int32),
    log_potential=lambda x, y, t: jnp.log(SEE[x, y]),
    log_transition=lambda x, x_next, t: jnp.log(MOVE[x, x_next]),
    log_transition_bound=lambda t: jnp.log(0.8),
)
Y = np.float32(
    [
        [0.106, 0.474, 0.178, 0.498, 0.356, 0.286, 0.661, 0.992, 0.653, 0.144],
        [-0.544, -0.259, -1.387, -1.152, -1.742, -1.885, -2.261, -2.055, -1.374, -0.479],
    ]
).ravel()
STATIONARY = 0.5 / np.sqrt(0.19)


def walk(a):
    """The linear-Gaussian model with coefficient ``a``, its first law that of a = 0.9."""
    return StateSpaceModel(
        init=lambda key: STATIONARY * jax.random.normal(key),
        transition=lambda key, x, t: a * x + 0.5 * jax.random.normal(key),
        log_potential=lambda x, y, t: -0.5 * ((y - x) / 0.3) ** 2,
        log_transition=lambda x, x_next, t: -0.5 * ((x_next - a * x) / 0.5) ** 2,
        log_init=lambda x: 0.0,
    )


def log_likelihood(a, y=Y):
    eye = jnp.eye(1)
    params = linear_gaussian(
        jnp.zeros(1), STATIONARY**2 * eye, a * eye, 0.25 * eye, eye, 0.09 * eye
    )
    return kalman_filter(params, y[:, None]).log_z


def products(x_prev, x_next, t):
    return (x_prev * x_next).astype(jnp.float32)[None]


@functools.cache
def two_states():
    done = hmm_enumerate(
        jnp.array([0.5, 0.5]),
        MOVE,
        SEE[:, SEEN].T,
        lambda path: jnp.sum(path[1:] * path[:-1]).astype(jnp.float32),
    )
    return np.asarray(done.paths), np.exp(np.asarray(done.log_probs, float)), float(done.estimate)


# --- stationarity ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "options", "sd"),
    [
        (2, {}, None),
        pytest.param(4, {"draws": 1}, 1.059, marks=pytest.mark.slow),
        pytest.param(4, {}, 0.897, marks=pytest.mark.slow),
        pytest.param(4, {"draws": 4}, 0.821, marks=pytest.mark.slow),
        pytest.param(4, {"draws": 16}, 0.764, marks=pytest.mark.slow),
        pytest.param(4, {"backward": "rejection", "max_trials": 2}, 0.897, marks=pytest.mark.slow),
        pytest.param(2, {"resample": "systematic"}, None, marks=pytest.mark.slow),
        pytest.param(4, {"resample": "ssp"}, None, marks=pytest.mark.slow),
        pytest.param(3, {"resample": "killing"}, None, marks=pytest.mark.slow),
    ],
)
def test_from_the_smoothing_law_a_sweep_is_unbiased_and_its_path_of_that_law(n, options, sd):
    paths, probs, mean = two_states()
    start = np.repeat(np.arange(32), np.round(probs * 12_000).astype(int))

    @jax.jit
    @jax.vmap
    def sweep(key, reference):
        out = conditional_paris(key, TWO_STATES, SEEN, reference, n, products, **options)
        return out.estimate[0], jnp.sum(out.path * 2 ** jnp.arange(4, -1, -1))

    keys = jax.random.split(jax.random.key(0), len(start))
    estimates, new = map(np.asarray, sweep(keys, jnp.asarray(paths[start])))
    # References in proportion, with a rounding of at most half a path each.
    offset = np.bincount(start, minlength=32) / len(start) - probs
    error = estimates.std() / np.sqrt(len(start))
    assert abs(estimates.mean() - mean) < 4 * error + 4 * np.abs(offset).sum(), error
    counts = np.bincount(new, minlength=32)
    common = probs * len(start) > 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(probs[common], probs[~common].sum())
    expected = expected / expected.sum() * len(start)
    assert stats.chisquare(observed, expected).pvalue > 1e-3
    if sd is not None:
        assert abs(estimates.std() - sd) < 0.025, estimates.std()


def test_the_path_follows_the_backward_draws():
    # Along the ancestors a path of twenty steps and six particles keeps its first state.
    model, n, chains = walk(0.9), 6, 400
    start = jnp.zeros(20)

    @jax.jit
    @jax.vmap
    def kept(key):
        backward = conditional_paris(key, model, Y, start, n, products).path
        forward = conditional_smc(key, model, Y, start, n, path="ancestors").path
        return backward[0] == 0, forward[0] == 0

    backward, forward = (float(a.mean()) for a in kept(jax.random.split(jax.random.key(0), chains)))
    assert forward > 0.9 and backward < 0.6, (backward, forward)


def test_the_estimate_is_the_mean_of_the_sweeps_after_the_burn_in():
    out = particle_gibbs(
        jax.random.key(0), walk(0.9), Y, 10, products, sweeps=3, burn_in=1, reference=np.zeros(20)
    )
    assert out.per_sweep.shape == (3, 1) and out.reference.shape == (20,)
    np.testing.assert_allclose(out.estimate, out.per_sweep[1:].mean(0), rtol=1e-6)


def test_what_particle_gibbs_refuses():
    def run(**options):
        options = {"sweeps": 3, "burn_in": 1} | options
        return particle_gibbs(jax.random.key(0), walk(0.9), Y, 4, products, **options)

    for options, message in (
        ({"burn_in": 3}, "burn_in is 3 for 3 sweeps"),
        ({"burn_in": -1}, "burn_in is -1"),
        ({"sweeps": 0, "burn_in": 0}, "sweeps is 0"),
        ({"reference": jnp.zeros(19)}, "reference has shapes"),
        ({"draws": 0}, "draws is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**options)


# --- the score ------------------------------------------------------------------------------------


def test_score_of_the_linear_gaussian_model():
    exact = float(jax.grad(log_likelihood)(0.9))
    assert exact == pytest.approx(1.705, abs=2e-3)
    functional, initial = fisher_functional(walk, 0.9, Y)

    @jax.jit
    @jax.vmap
    def run(key):
        out = particle_gibbs(
            key,
            walk(0.9),
            Y,
            10,
            functional,
            initial_functional=initial,
            sweeps=2,
            burn_in=1,
        )
        return out.estimate[0]

    scores = np.asarray(run(jax.random.split(jax.random.key(0), 1200)), float)
    assert abs(scores.mean() - exact) < 4 * scores.std() / np.sqrt(1200)


def model_of(theta):
    """Everything learned: coefficient, spreads and the first state's mean, in a dictionary."""
    spread, noise = jnp.exp(theta["spread"]), jnp.exp(theta["noise"])
    return StateSpaceModel(
        init=lambda key: theta["mean"] + jax.random.normal(key),
        transition=lambda key, x, t: theta["a"] * x + spread * jax.random.normal(key),
        log_potential=lambda x, y, t: -0.5 * ((y - x) / noise) ** 2 - jnp.log(noise),
        log_transition=lambda x, x_next, t: (
            -0.5 * ((x_next - theta["a"] * x) / spread) ** 2 - jnp.log(spread)
        ),
        log_init=lambda x: -0.5 * (x - theta["mean"]) ** 2,
    )


def likelihood_of(theta, y, observed):
    eye = jnp.eye(1)
    params = linear_gaussian(
        theta["mean"][None],
        eye,
        theta["a"] * eye,
        jnp.exp(2 * theta["spread"]) * eye,
        eye,
        jnp.exp(2 * theta["noise"]) * eye,
    )
    return kalman_filter(params, y[:, None], observed=observed).log_z


@pytest.mark.slow
def test_score_of_every_parameter_with_missing_observations():
    theta = {
        k: jnp.float32(v) for k, v in (("a", 0.7), ("mean", 0.3), ("noise", -0.8), ("spread", -0.5))
    }
    y = Y[:8]
    observed = np.array([True, False, True, True, False, True, True, True])
    exact = jax.grad(likelihood_of)(theta, y, observed)
    functional, initial = fisher_functional(model_of, theta, y, observed=observed)

    @jax.jit
    @jax.vmap
    def run(key):
        return paris(
            key,
            model_of(theta),
            y,
            200,
            functional,
            initial_functional=initial,
            observed=observed,
        ).estimate

    scores = np.asarray(run(jax.random.split(jax.random.key(0), 400)), float)
    gap = np.abs(scores.mean(0) - np.array([float(exact[k]) for k in sorted(exact)]))
    error = scores.std(0) / 20
    # At 200 particles PaRIS has a bias of its own, below 1 % of the score's spread.
    assert np.all(gap < 4 * error + 0.01 * scores.std(0)), (gap, error)


def test_the_score_needs_log_init():
    bare = dataclasses.replace(walk(0.9), log_init=None)
    with pytest.raises(ValueError, match="log_init, which is None"):
        fisher_functional(lambda a: bare, 0.9, Y)
    with pytest.raises(TypeError, match="model_of returned int"):
        fisher_functional(lambda a: 3, 0.9, Y)
    with pytest.raises(TypeError, match="theta has a leaf of dtype int32"):
        fisher_functional(walk, 1, Y)


def test_the_functional_of_each_step_is_its_gradient():
    theta = {k: jnp.float32(0.3) for k in ("a", "mean", "noise", "spread")}
    functional, initial = fisher_functional(model_of, theta, Y)
    x, x_next = jnp.float32(0.4), jnp.float32(-0.2)

    def first(theta):
        model = model_of(theta)
        return model.log_init(x) + model.log_potential(x, Y[0], 0)

    def third(theta):
        model = model_of(theta)
        return model.log_transition(x, x_next, 2) + model.log_potential(x_next, Y[2], 2)

    for came, function in ((initial(x), first), (functional(x, x_next, jnp.int32(2)), third)):
        exact = ravel_pytree(jax.grad(function)(theta))[0]
        np.testing.assert_allclose(came, exact, rtol=1e-5, atol=1e-6)
        assert np.any(exact != 0)


# --- learning -------------------------------------------------------------------------------------

SHRINKING = optax.sgd(lambda k: 0.02 / (1 + k / 20) ** 0.7)


@pytest.mark.parametrize("chains", [8, pytest.param(128, marks=pytest.mark.slow)])
def test_ascent_reaches_the_maximum_of_the_likelihood(chains):
    best = optimize.minimize_scalar(
        lambda a: -float(log_likelihood(a)), bounds=(0.5, 1.2), method="bounded"
    ).x
    assert best == pytest.approx(0.9196, abs=5e-4)

    @jax.jit
    @jax.vmap
    def run(key):
        start = None if chains > 100 else np.zeros(20)
        return score_ascent(key, walk, 0.3, Y, 10, steps=200, optimizer=SHRINKING, reference=start)

    out = run(jax.random.split(jax.random.key(0), chains))
    ends = np.asarray(out.theta, float)
    error = ends.std() / np.sqrt(chains)
    # The exact ascent itself is 0.0001 from its limit after 200 steps.
    assert abs(ends.mean() - best) < 4 * error + 2e-4, (ends.mean(), best, error)
    assert error < 0.0013 / np.sqrt(chains) * 2


def test_ascent_shows_its_progress_in_pieces_with_the_same_result(capsys):
    run = functools.partial(
        score_ascent,
        jax.random.key(0),
        walk,
        0.3,
        Y[:4],
        4,
        steps=60,
        optimizer=optax.adam(0.01),
        reference=np.zeros(4),
    )
    whole, shown = run(), run(progress=True)
    assert "60/60 steps" in capsys.readouterr().err
    assert whole.history.shape == (60,) and whole.score.shape == (60, 1)
    np.testing.assert_allclose(whole.history, shown.history, rtol=1e-5)
    np.testing.assert_allclose(whole.theta, whole.history[30:].mean(), rtol=1e-6)
    assert whole.last == whole.history[-1]
    # The sweeps that the burn-in leaves out.
    assert run(steps=60, burn_in=0).score[0] != whole.score[0]
    with pytest.raises(ValueError, match="steps is 0"):
        run(steps=0)


def family_of(theta):
    """Independent Gaussians, one a step."""
    mean, log_sd = theta

    def log_normal(x, t):
        return -0.5 * ((x - mean[t]) / jnp.exp(log_sd[t])) ** 2 - log_sd[t]

    return dataclasses.replace(
        walk(0.9),
        log_init=lambda x: log_normal(x, 0),
        log_transition=lambda x, x_next, t: log_normal(x_next, t),
    )


def test_markov_score_climbing_gets_the_smoothing_moments():
    y, steps = Y[:4], 150
    out = jax.jit(
        lambda key: markov_score_climbing(
            key,
            walk(0.9),
            family_of,
            (jnp.zeros(4), jnp.zeros(4)),
            y,
            16,
            steps=steps,
            optimizer=optax.adam(optax.exponential_decay(0.2, steps, 0.02)),
            reference=np.zeros(4),
        )
    )(jax.random.key(0))
    eye = jnp.eye(1)
    params = linear_gaussian(
        jnp.zeros(1), STATIONARY**2 * eye, 0.9 * eye, 0.25 * eye, eye, 0.09 * eye
    )
    exact = kalman_smoother(params, y[:, None])
    means, sds = exact.means[:, 0], jnp.sqrt(exact.covs[:, 0, 0])
    np.testing.assert_allclose(out.theta[0], means, atol=0.04)
    np.testing.assert_allclose(out.theta[1], jnp.log(sds), atol=0.08)


def volatility(theta):
    """Stochastic volatility: returns of standard deviation ``scale exp(x / 2)``."""
    a, spread, scale = jnp.tanh(theta[0]), jnp.exp(theta[1]), jnp.exp(theta[2])
    return StateSpaceModel(
        init=lambda key: jax.random.normal(key),
        transition=lambda key, x, t: a * x + spread * jax.random.normal(key),
        log_potential=lambda x, y, t: -0.5 * (y / scale) ** 2 * jnp.exp(-x) - 0.5 * x - theta[2],
        log_transition=lambda x, x_next, t: (
            -0.5 * ((x_next - a * x) / spread) ** 2 - jnp.log(spread)
        ),
        log_init=lambda x: 0.0,
    )


@pytest.mark.slow
def test_stochastic_volatility_is_learned_as_by_a_grid():
    # The grid's filter on 400 points is exact to five digits: its likelihood is the long run.
    rng = np.random.default_rng(0)
    x, returns = rng.normal(), []
    for _ in range(200):
        returns.append(0.8 * np.exp(x / 2) * rng.normal())
        x = 0.9 * x + 0.5 * rng.normal()
    y = np.float32(returns)
    grid = np.linspace(-8, 8, 401)

    def minus_log_likelihood(theta):
        a, spread, scale = np.tanh(theta[0]), np.exp(theta[1]), np.exp(theta[2])
        move = np.exp(-0.5 * ((grid[:, None] - a * grid) / spread) ** 2) / spread
        move *= (grid[1] - grid[0]) / np.sqrt(2 * np.pi)
        law, total = np.exp(-0.5 * grid**2), 0.0
        law /= law.sum()
        for i, value in enumerate(y):
            law = move @ law if i else law
            law = law * np.exp(-0.5 * (value / scale) ** 2 * np.exp(-grid) - 0.5 * grid) / scale
            total += np.log(law.sum())
            law /= law.sum()
        return -total

    best = optimize.minimize(minus_log_likelihood, [1.0, -1.0, 0.0], method="Nelder-Mead").x
    chains, steps = 6, 300
    run = jax.jit(
        jax.vmap(
            lambda key: (
                score_ascent(
                    key,
                    volatility,
                    jnp.array([1.0, -1.0, 0.0]),
                    y,
                    32,
                    steps=steps,
                    optimizer=optax.adam(optax.exponential_decay(0.05, steps, 0.02)),
                ).theta
            )
        )
    )
    ends = np.asarray(run(jax.random.split(jax.random.key(0), chains)), float)
    error = ends.std(0, ddof=1) / np.sqrt(chains)
    print("found", ends.mean(0), "standard errors", error, "grid", best)
    assert np.all(np.abs(ends.mean(0) - best) < 5 * error + 0.01), (ends.mean(0), best, error)
    assert minus_log_likelihood(ends.mean(0)) - minus_log_likelihood(best) < 0.02
