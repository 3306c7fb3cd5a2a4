"""Kalman and enumeration against direct conditioning of the joint Gaussian, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxgen.smc.kalman import kalman_filter, kalman_smoother, linear_gaussian, simulate
from jaxgen.smc.oracle import hmm_enumerate


def random_params(d, k, steps, *, varying, seed=0):
    """Parameters in float64, each step with its own where ``varying``."""
    rng = np.random.default_rng(seed)
    front = (steps,) if varying else ()

    def cov(*shape):
        root = rng.normal(size=(*shape, 2 * shape[-1]))
        return root @ np.swapaxes(root, -1, -2) / root.shape[-1] + 0.1 * np.eye(shape[-1])

    return {
        "initial_mean": rng.normal(size=d),
        "initial_cov": cov(d),
        "transition_matrix": 0.6 * rng.normal(size=(*front, d, d)),
        "transition_cov": cov(*front, d),
        "observation_matrix": rng.normal(size=(*front, k, d)),
        "observation_cov": cov(*front, k),
        "transition_offset": rng.normal(size=(*front, d)),
        "observation_offset": rng.normal(size=(*front, k)),
    }


def joint_law(p, steps):
    """Mean and covariance of (x_0, ..., y_0, ...) by the model's definition."""
    d, k = p["initial_mean"].size, p["observation_offset"].shape[-1]

    def at(name, t):
        ndim = 2 if name.endswith(("matrix", "cov")) else 1
        return p[name][t] if p[name].ndim > ndim else p[name]

    # The states as a linear map of independent innovations (x_0, w_1, ..., w_{T-1}).
    rows = np.zeros((steps, d, steps * d))
    mean = np.zeros((steps, d))
    noise = np.zeros((steps * d, steps * d))
    for t in range(steps):
        here = slice(t * d, (t + 1) * d)
        if t == 0:
            mean[0], noise[here, here] = p["initial_mean"], p["initial_cov"]
        else:
            f = at("transition_matrix", t)
            mean[t] = f @ mean[t - 1] + at("transition_offset", t)
            rows[t] = f @ rows[t - 1]
            noise[here, here] = at("transition_cov", t)
        rows[t][:, here] += np.eye(d)
    states = rows.reshape(steps * d, -1)
    h, r = np.zeros((steps * k, steps * d)), np.zeros((steps * k, steps * k))
    offset = np.concatenate([at("observation_offset", t) for t in range(steps)])
    for t in range(steps):
        y, x = slice(t * k, (t + 1) * k), slice(t * d, (t + 1) * d)
        h[y, x], r[y, y] = at("observation_matrix", t), at("observation_cov", t)
    cov_x = states @ noise @ states.T
    mean_x = mean.reshape(-1)
    return mean_x, cov_x, h @ mean_x + offset, h, h @ cov_x @ h.T + r


def condition(p, y, upto, observed):
    """Law of all states given the observed of the first ``upto`` observations."""
    steps, k = y.shape
    mean_x, cov_x, mean_y, h, cov_y = joint_law(p, steps)
    keep = np.repeat(observed & (np.arange(steps) < upto), k)
    if not keep.any():
        return mean_x, cov_x, 0.0
    gain = np.linalg.solve(cov_y[np.ix_(keep, keep)], (h @ cov_x)[keep]).T
    residual = (y.reshape(-1) - mean_y)[keep]
    log_z = scipy.stats.multivariate_normal.logpdf(
        residual, np.zeros(residual.size), cov_y[np.ix_(keep, keep)]
    )
    return mean_x + gain @ residual, cov_x - gain @ (h @ cov_x)[keep], log_z


@pytest.mark.parametrize("d, k, varying", [(1, 1, False), (4, 2, True)])
def test_kalman_is_the_joint_gaussian(d, k, varying):
    steps = 6
    p = random_params(d, k, steps, varying=varying)
    y = np.random.default_rng(1).normal(size=(steps, k))
    observed = np.array([False, True, True, False, True, False])
    # A missing value is ignored, whatever it is.
    garbled = np.where(observed[:, None], y, 1e6)
    every = np.ones(steps, bool)

    @jax.jit
    def both(p, y, observed):
        params = linear_gaussian(**p)
        return [f(params, y, observed=observed) for f in (kalman_filter, kalman_smoother)]

    with jax.enable_x64(True):
        filtered, smoothed = both(p, garbled, observed)
        _, complete = both(p, y, every)
    _, narrow = both(jax.tree.map(np.float32, p), y.astype(np.float32), every)
    close = {"rtol": 1e-9, "atol": 1e-9}
    for t in range(steps):
        here = slice(t * d, (t + 1) * d)
        mean, cov, log_z = condition(p, y, t + 1, observed)
        np.testing.assert_allclose(filtered.means[t], mean[here], **close)
        np.testing.assert_allclose(filtered.covs[t], cov[here, here], **close)
        np.testing.assert_allclose(filtered.log_z_steps[t], log_z, **close)
        mean, cov, _ = condition(p, y, t, observed)
        np.testing.assert_allclose(filtered.predicted_means[t], mean[here], **close)
        np.testing.assert_allclose(filtered.predicted_covs[t], cov[here, here], **close)
    for done, seen, tolerance in ((smoothed, observed, 1e-9), (complete, every, 1e-9),
                                  (narrow, every, 2e-4)):  # fmt: skip
        mean, cov, log_z = condition(p, y, steps, seen)
        blocks = cov.reshape(steps, d, steps, d)
        close = {"rtol": tolerance, "atol": tolerance}
        np.testing.assert_allclose(done.log_z, log_z, **close)
        np.testing.assert_allclose(done.means, mean.reshape(steps, d), **close)
        np.testing.assert_allclose(done.covs, [blocks[t, :, t] for t in range(steps)], **close)
        cross = [blocks[t, :, t + 1] for t in range(steps - 1)]
        np.testing.assert_allclose(done.cross_covs, cross, **close)


def test_kalman_gradient_is_the_score():
    # d/da log Z by finite differences in float64.
    y = np.random.default_rng(3).normal(size=(8, 1))
    with jax.enable_x64(True):

        @jax.jit
        @jax.value_and_grad
        def log_z(a):
            one = jnp.eye(1)
            p = linear_gaussian(jnp.zeros(1), one, a * one, 0.25 * one, one, 0.09 * one)
            return kalman_filter(p, jnp.asarray(y)).log_z

        got = log_z(0.9)[1]
        expected = (log_z(0.9 + 1e-5)[0] - log_z(0.9 - 1e-5)[0]) / 2e-5
    np.testing.assert_allclose(got, expected, rtol=1e-7)


def test_second_opinion_of_dynamax():
    inference = pytest.importorskip("dynamax.linear_gaussian_ssm.inference")
    p = random_params(3, 2, 20, varying=False, seed=5)
    y = np.random.default_rng(6).normal(size=(20, 2))
    ours = kalman_smoother(linear_gaussian(**{n: jnp.asarray(v) for n, v in p.items()}), y)
    theirs = inference.lgssm_smoother(
        inference.make_lgssm_params(
            *(jnp.asarray(p[n]) for n in (
                "initial_mean", "initial_cov", "transition_matrix", "transition_cov",
                "observation_matrix", "observation_cov")),
            dynamics_bias=jnp.asarray(p["transition_offset"]),
            emissions_bias=jnp.asarray(p["observation_offset"]),
        ),
        jnp.asarray(y),
    )  # fmt: skip
    np.testing.assert_allclose(ours.log_z, theirs.marginal_loglik, rtol=1e-4)
    np.testing.assert_allclose(ours.means, theirs.smoothed_means, atol=2e-4)
    np.testing.assert_allclose(ours.covs, theirs.smoothed_covariances, atol=2e-4)


def test_optimal_proposal_leaves_no_weight_to_the_draw():
    # g m / r is p(y | x_prev), wherever x_next is; g p_0 / r_0 is p(y_0).
    steps = 3
    p = random_params(3, 2, steps, varying=True, seed=2)
    rng = np.random.default_rng(4)
    x, x_next, y, x0 = (rng.normal(size=(5, s)) for s in (3, 3, 2, 3))
    peak = p["transition_matrix"][2] @ x[0] + p["transition_offset"][2]

    @jax.jit
    def values(p, x, x_next, y, x0, peak):
        params = linear_gaussian(**p)
        model = params.model(proposal="optimal", auxiliary=True)
        t = jnp.int32(2)

        def one(x, z, y, x0):
            weight = model.log_potential(z, y, t) + model.log_transition(x, z, t)
            first = model.log_potential(x0, y0, jnp.int32(0)) + model.log_init(x0)
            return (
                weight - model.log_propose(x, z, y, t),
                model.log_auxiliary(x, y, t),
                first - model.log_propose_init(x0, y0),
            )

        y0 = y[0]
        exact = kalman_filter(params, jnp.broadcast_to(y0, (steps, 2))).log_z_steps[0]
        ends = [model.log_transition(x[0], z, t) for z in (peak, x_next[0])]
        return *jax.vmap(one)(x, x_next, y, x0), exact, model.log_transition_bound(t), *ends

    with jax.enable_x64(True):
        weight, look, first, exact, bound, top, density = values(p, x, x_next, y, x0, peak)
    np.testing.assert_allclose(weight, look, rtol=1e-9)
    np.testing.assert_allclose(first, np.full(5, exact), rtol=1e-9)
    np.testing.assert_allclose(bound, top, rtol=1e-12)
    cov = p["transition_cov"][2]
    expected = scipy.stats.multivariate_normal.logpdf(x_next[0], peak, cov)
    np.testing.assert_allclose(density, expected, rtol=1e-9)


def test_draws_have_the_model_s_moments():
    steps, runs = 3, 20_000
    p = random_params(2, 1, steps, varying=True, seed=7)
    y = np.array([[0.4], [-0.8], [0.3]])

    @jax.jit
    def draw(keys, p):
        params = linear_gaussian(**p)
        model = params.model(proposal="optimal")
        return jax.vmap(lambda key: one(key, params, model))(keys)

    def one(key, params, model):
        # The chain of proposals, and a series; moments of both are known.
        keys = jax.random.split(key, 4)
        x = model.propose_init(keys[0], jnp.asarray(y[0]))
        x1 = model.propose(keys[1], jnp.ones(2), jnp.asarray(y[1]), jnp.int32(1))
        x2 = model.transition(keys[2], jnp.ones(2), jnp.int32(2))
        states, seen = simulate(keys[3], params, steps)
        return x, x1, x2, jnp.concatenate([states.reshape(-1), seen.reshape(-1)])

    x0, x1, x2, series = map(
        np.asarray, draw(jax.random.split(jax.random.key(0), runs), jax.tree.map(np.float32, p))
    )
    f, h = p["transition_matrix"], p["observation_matrix"]

    def posterior(mean, cov, t):
        gain = cov @ h[t].T @ np.linalg.inv(h[t] @ cov @ h[t].T + p["observation_cov"][t])
        residual = y[t] - h[t] @ mean - p["observation_offset"][t]
        return mean + gain @ residual, cov - gain @ h[t] @ cov

    moved = [f[t] @ np.ones(2) + p["transition_offset"][t] for t in range(steps)]
    mean_x, cov_x, mean_y, h_all, cov_y = joint_law(p, steps)
    cross = cov_x @ h_all.T
    cases = [
        (x0, *posterior(p["initial_mean"], p["initial_cov"], 0)),
        (x1, *posterior(moved[1], p["transition_cov"][1], 1)),
        (x2, moved[2], p["transition_cov"][2]),
        (series, np.concatenate([mean_x, mean_y]), np.block([[cov_x, cross], [cross.T, cov_y]])),
    ]
    for got, mean, cov in cases:
        error = np.sqrt(np.diag(cov) / runs)
        np.testing.assert_array_less(np.abs(got.mean(0) - mean), 4 * error)
        spread = np.sqrt((np.outer(np.diag(cov), np.diag(cov)) + cov**2) / runs)
        np.testing.assert_array_less(np.abs(np.cov(got.T) - cov), 4 * spread)


def test_enumeration_equals_the_card_and_the_forward_recursion():
    start, move = (
        np.array([0.5, 0.3, 0.2]),
        np.array([[0.8, 0.1, 0.1], [0.3, 0.7, 0], [0, 0.5, 0.5]]),
    )
    see = np.random.default_rng(0).uniform(0.1, 1, size=(5, 3))
    done = jax.jit(lambda *args: hmm_enumerate(*args, jnp.sum))(
        *(v.astype(np.float32) for v in (start, move, see))
    )
    forward, alphas = start * see[0], []
    for row in see[1:]:
        alphas.append(forward)
        forward = (forward @ move) * row
    backward, marginals = np.ones(3), [forward / forward.sum()]
    for alpha, row in zip(alphas[::-1], see[:0:-1], strict=True):
        backward = move @ (row * backward)
        marginals.insert(0, alpha * backward / forward.sum())
    np.testing.assert_allclose(done.log_z, np.log(forward.sum()), rtol=1e-5)
    np.testing.assert_allclose(done.marginals, marginals, atol=1e-5)
    np.testing.assert_allclose(done.estimate, np.sum(marginals @ np.arange(3)), rtol=1e-5)
    np.testing.assert_allclose(jnp.sum(jnp.exp(done.log_probs)), 1, rtol=1e-5)
    assert done.paths.shape == (243, 5) and done.paths.dtype == jnp.int32


def test_bad_input():
    one = jnp.eye(1)
    good = [jnp.zeros(1), one, one, one, one, one]
    for place, wrong, name in (
        (0, jnp.zeros((1, 1)), "initial_mean"),
        (1, jnp.eye(2), "initial_cov"),
        (2, jnp.eye(2), "transition_matrix"),
        (5, jnp.ones((3, 2, 2)), "observation_cov"),
    ):
        args = [*good]
        args[place] = wrong
        with pytest.raises(ValueError, match=name):
            linear_gaussian(*args)
    with pytest.raises(TypeError, match="transition_cov"):
        linear_gaussian(*good[:3], jnp.eye(1, dtype=jnp.int32), *good[4:])
    with pytest.raises(TypeError, match="expected a typed key"):
        simulate(jax.random.PRNGKey(0), linear_gaussian(*good), 3)
    with pytest.raises(ValueError, match="unequal numbers of steps"):
        linear_gaussian(*good[:2], jnp.ones((3, 1, 1)), jnp.ones((4, 1, 1)), *good[4:])
    params = linear_gaussian(*good[:2], jnp.ones((3, 1, 1)), *good[3:])
    with pytest.raises(ValueError, match=r"observations has shape \(3,\)"):
        kalman_filter(params, jnp.zeros(3))
    with pytest.raises(ValueError, match="transition_matrix holds 3 steps and observations 4"):
        kalman_filter(params, jnp.zeros((4, 1)))
    with pytest.raises(ValueError, match="observed has shape"):
        kalman_filter(params, jnp.zeros((3, 1)), observed=jnp.ones(3))
    with pytest.raises(ValueError, match="proposal is 'best'"):
        params.model(proposal="best")
    half = jnp.full(2, 0.5)
    with pytest.raises(ValueError, match="more than"):
        hmm_enumerate(half, jnp.full((2, 2), 0.5), jnp.ones((30, 2)))
    with pytest.raises(ValueError, match="transition_probs"):
        hmm_enumerate(half, jnp.ones((2, 3)), jnp.ones((3, 2)))
