"""PaRIS against Kalman's smoother, its variance in time, its two kinds of backward draws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jaxgen.smc.filter import particle_filter
from jaxgen.smc.genealogy import with_functional
from jaxgen.smc.oracle import kalman_smoother, linear_gaussian
from jaxgen.smc.paris import conditional_paris, paris, paris_estimate, paris_init, paris_step
from jaxgen.smc.state_space import StateSpaceModel

EYE = np.eye(1)
EXACT = linear_gaussian(np.zeros(1), EYE, 0.9 * EYE, 0.25 * EYE, EYE, 0.09 * EYE)
WALK = StateSpaceModel(
    init=jax.random.normal,
    transition=lambda key, x, t: 0.9 * x + 0.5 * jax.random.normal(key),
    log_potential=lambda x, y, t: -0.5 * ((y - x) / 0.3) ** 2,
    log_transition=lambda x, x_next, t: -0.5 * ((x_next - 0.9 * x) / 0.5) ** 2,
    log_transition_bound=lambda t: 0.0,
)
Y = np.random.default_rng(0).normal(size=6).astype(np.float32)
SEEN = np.array([True, True, False, True, True, True])


def total(x_prev, x_next, t):
    return jnp.atleast_1d(x_next)


def each_step(x_prev, x_next, t, steps=6):
    """Every state of the path and the products of neighbours, flattened."""
    one_hot = (jnp.arange(steps) == t).astype(jnp.float32)
    return jnp.concatenate(
        [jnp.outer(one_hot, x_next).ravel(), jnp.outer(one_hot, x_prev * x_next).ravel()]
    )


def first_step(x, steps=6):
    one_hot = (jnp.arange(steps) == 0).astype(jnp.float32)
    return jnp.concatenate([jnp.outer(one_hot, x).ravel(), jnp.zeros(steps * jnp.size(x))])


def moments(exact):
    means = np.asarray(exact.means)
    cross = np.diagonal(np.asarray(exact.cross_covs), axis1=1, axis2=2)
    products = np.concatenate([np.zeros((1, means.shape[1])), means[1:] * means[:-1] + cross])
    return np.concatenate([means.ravel(), products.ravel()])


def replicas(count, n, model, y, **options):
    return jax.jit(
        jax.vmap(
            lambda key: (
                paris(
                    key, model, y, n, each_step, initial_functional=first_step, **options
                ).estimate
            )
        )
    )(jax.random.split(jax.random.key(0), count))


def within(runs, exact, k=4.0):
    runs = np.asarray(runs, float)
    error = runs.std(0) / np.sqrt(len(runs))
    gap = np.abs(runs.mean(0) - exact)
    assert np.all(gap <= k * error + 1e-6), (gap / np.maximum(error, 1e-12)).max()
    return error


# --- smoothing moments ----------------------------------------------------------------------------

KINDS = {
    "exact": {},
    "rejection": {"backward": "rejection", "max_trials": 3},
    "systematic": {"resample": "systematic"},
}


@pytest.mark.parametrize(
    "kind", [k if k == "exact" else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_smoothing_moments_in_one_dimension_with_a_missing_observation(kind):
    exact = moments(kalman_smoother(EXACT, Y[:, None], observed=SEEN))
    error = within(replicas(64, 150, WALK, Y, observed=SEEN, **KINDS[kind]), exact)
    # The missing step's own state is far from the prior's mean in units of the error.
    assert abs(exact[2]) > 4 * error[2]


def plane():
    rng = np.random.default_rng(0)
    turn = 0.9 * np.linalg.qr(rng.normal(size=(4, 4)))[0]
    eye = np.eye(4)
    return linear_gaussian(np.ones(4), eye, turn, 0.3 * eye, rng.normal(size=(2, 4)), np.eye(2))


@pytest.mark.parametrize("proposal", [pytest.param("bootstrap", marks=pytest.mark.slow), "optimal"])
def test_smoothing_moments_in_four_dimensions(proposal):
    params, y = plane(), np.random.default_rng(1).normal(size=(6, 2)).astype(np.float32)
    exact = moments(kalman_smoother(params, y))
    within(replicas(48, 64, params.model(proposal=proposal), y), exact)


def test_conditional_sweep_with_a_guided_proposal_is_unbiased_from_the_smoothing_law():
    params = linear_gaussian(np.zeros(1), EYE, 0.9 * EYE, 0.25 * EYE, EYE, 0.25 * EYE)
    y, steps, count = Y[:4, None], 4, 4000
    exact = kalman_smoother(params, y)
    means, covs, cross = (np.asarray(a, float) for a in exact[1:])
    # The smoothing law is Markov backwards: draw references from it.
    rng = np.random.default_rng(0)
    path = [means[-1] + np.sqrt(covs[-1, 0]) * rng.normal(size=(count, 1))]
    for t in range(steps - 2, -1, -1):
        gain = cross[t, 0] / covs[t + 1, 0]
        spread = np.sqrt(covs[t, 0] - gain * cross[t, 0])
        path.append(
            means[t] + gain * (path[-1] - means[t + 1]) + spread * rng.normal(size=(count, 1))
        )
    references = np.stack(path[::-1], axis=1).astype(np.float32)
    # A proposal that is wrong on purpose: the weights must put it right.
    model = dataclasses.replace(
        params.model(),
        propose=lambda key, x, y, t: y - 0.3 * x + 0.7 * jax.random.normal(key, (1,)),
        log_propose=lambda x, x_next, y, t: (
            -0.5 * jnp.sum(((x_next - y + 0.3 * x) / 0.7) ** 2) - jnp.log(0.7)
        ),
    )
    functional = functools.partial(each_step, steps=steps)
    first = functools.partial(first_step, steps=steps)
    out = jax.jit(
        jax.vmap(
            lambda key, reference: conditional_paris(
                key, model, y, reference, 3, functional, initial_functional=first
            )
        )
    )(jax.random.split(jax.random.key(0), count), references)
    within(out.estimate, moments(exact))
    within(out.path[:, :, 0], means[:, 0])
    np.testing.assert_allclose(out.path[:, :, 0].var(0), covs[:, 0, 0], rtol=0.12)


def test_the_references_weight_comes_from_its_own_last_state():
    model = dataclasses.replace(
        WALK,
        propose=lambda key, x, y, t: y - 0.3 * x + 0.7 * jax.random.normal(key),
        log_propose=lambda x, x_next, y, t: -0.5 * ((x_next - y + 0.3 * x) / 0.7) ** 2,
    )
    z, y = np.float32([2.0, 1.5]), Y[:2]
    out = jax.vmap(
        lambda key: conditional_paris(key, model, y, z, 4, total, observed=np.array([False, True]))
    )(jax.random.split(jax.random.key(0), 5))
    exact = (
        model.log_potential(z[1], y[1], 1)
        + model.log_transition(z[0], z[1], 1)
        - model.log_propose(z[0], z[1], y[1], 1)
    )
    # Undoes the scaling; the first step, without an observation, has no weight.
    np.testing.assert_allclose(out.log_weights[:, 0] + out.log_z, np.full(5, exact), rtol=1e-4)


# --- variance -------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_variance_is_linear_in_time_where_the_genealogys_is_quadratic(draws):
    # No more steps than particles: beyond, all ancestors have met and one path is left.
    n, times, count = 48, np.array([6, 12, 24, 48]), 120
    model = dataclasses.replace(WALK, log_potential=lambda x, y, t: -0.5 * (y - x) ** 2)
    y = jnp.zeros(times[-1])
    lifted = with_functional(model, total)

    @jax.jit
    @jax.vmap
    def run(key):
        keys = jax.random.split(key, times[-1])
        state = paris_init(keys[0], model, y[0], n, total)

        def body(state, inputs):
            state = paris_step(inputs[0], model, state, inputs[1], total, draws=draws)
            return state, paris_estimate(state)[0]

        _, estimates = jax.lax.scan(body, state, (keys[1:], y[1:]))
        ancestral = particle_filter(
            key, lifted, y, n, resample="multinomial", functions=lambda p: p.statistic[0]
        )
        return estimates[times - 2], ancestral.means[times - 1]

    both = run(jax.random.split(jax.random.key(0), count))
    variances = [np.asarray(estimates, float).var(0) for estimates in both]
    ours, theirs = (np.polyfit(np.log(times), np.log(v), 1)[0] for v in variances)
    # A variance is known to sqrt(2 / 120) = 13 %, the slope over eight times the length to 0.08.
    # PaRIS's last doubling is at 1.08 to 1.2 (the first steps have less to lose).
    assert 1.7 < theirs < 2.4, (ours, theirs)
    assert (0.8 < ours < 1.5) if draws == 2 else (1.6 < ours < 2.4), (ours, theirs)
    if draws == 2:
        assert variances[1][-1] > 4 * variances[0][-1], variances


# --- the forms agree ------------------------------------------------------------------------------


def test_one_observation_at_a_time_equals_the_whole():
    key = jax.random.key(3)
    whole = paris(key, WALK, Y, 10, total, observed=SEEN, path=True)
    state = paris_init(jax.random.fold_in(key, 0), WALK, Y[0], 10, total, observed=SEEN[0])
    for t in range(1, 6):
        state = paris_step(jax.random.fold_in(key, t), WALK, state, Y[t], total, observed=SEEN[t])
    np.testing.assert_allclose(paris_estimate(state), whole.estimate, rtol=1e-5)
    np.testing.assert_allclose(state.statistic, whole.statistic, rtol=1e-5)
    np.testing.assert_allclose(state.log_z, whole.log_z, rtol=1e-5)
    # The path is one of the particles' at its end, and no key of a step's was used for it.
    assert np.isclose(np.asarray(state.x), whole.path[-1]).any() and whole.path.shape == (6,)


def test_a_smoother_on_each_device():
    """Under the default check of what varies over devices."""

    def estimate(keys):
        return paris(keys[0], WALK, Y[:3], 4, total, backward="rejection").estimate

    mesh = jax.make_mesh((8,), ("p",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.P("p")
    f = jax.jit(jax.shard_map(estimate, mesh=mesh, in_specs=split, out_specs=split))
    keys = jax.random.split(jax.random.key(0), 8)
    np.testing.assert_allclose(f(keys)[3], estimate(keys[3:4])[0], rtol=1e-5)


def test_neighbouring_keys_share_no_particles():
    runs = [paris_init(jax.random.key(seed), WALK, Y[0], 8, total).x for seed in range(2)]
    assert len(np.unique(np.concatenate(runs))) == 16


def test_log_z_is_unbiased_and_particles_may_be_trees():
    tree = StateSpaceModel(
        init=lambda key: {"x": jax.random.normal(key), "steps": jnp.int32(0)},
        transition=lambda key, p, t: {"x": WALK.transition(key, p["x"], t), "steps": t},
        log_potential=lambda p, y, t: (
            WALK.log_potential(p["x"], y, t) - 0.5 * jnp.log(2 * jnp.pi * 0.09)
        ),
        log_transition=lambda p, q, t: WALK.log_transition(p["x"], q["x"], t),
    )
    run = jax.jit(
        jax.vmap(lambda key: paris(key, tree, Y, 20, lambda p, q, t: q["x"][None], path=True))
    )
    out = run(jax.random.split(jax.random.key(0), 1000))
    exact = kalman_smoother(EXACT, Y[:, None]).log_z
    within(np.exp(out.log_z - exact)[:, None], 1.0)
    assert (np.asarray(out.path["steps"]) == np.arange(6)).all()
    compiled = run._cache_size()
    run(jax.random.split(jax.random.key(1), 1000))
    assert run._cache_size() == compiled


def test_no_gradient_goes_through_the_sampler():
    def estimate(a):
        model = dataclasses.replace(
            WALK,
            transition=lambda key, x, t: a * x + 0.5 * jax.random.normal(key),
            log_transition=lambda x, x_next, t: -0.5 * ((x_next - a * x) / 0.5) ** 2,
        )
        return paris(jax.random.key(0), model, Y, 10, total).estimate[0]

    assert jax.grad(estimate)(0.9) == 0


# --- bad input and bad luck -----------------------------------------------------------------------


def test_no_weight_left_gives_nan_and_a_checkify_error():
    lost = dataclasses.replace(
        WALK, log_potential=lambda x, y, t: jnp.where(t == 2, -jnp.inf, 0.0) + 0 * x
    )

    def run(key):
        return paris(key, lost, Y, 10, total)

    error, out = jax.jit(checkify.checkify(run, errors=checkify.user_checks))(jax.random.key(0))
    assert "step 2" in str(error.get())
    assert np.isnan(out.estimate).all() and np.isnan(out.log_z)


def test_a_particle_of_weight_zero_needs_no_parent():
    # Proposals outside the transition's support have weight zero, and count for nothing.
    box = dataclasses.replace(
        WALK,
        transition=lambda key, x, t: x + jax.random.uniform(key, minval=-1.0),
        log_transition=lambda x, x_next, t: jnp.where(jnp.abs(x_next - x) < 1, 0.0, -jnp.inf),
        propose=lambda key, x, y, t: x + 20 * jax.random.bernoulli(key, 0.2),
        log_propose=lambda x, x_next, y, t: jnp.where(x_next == x, 0.0, -1.0),
    )
    out = paris(jax.random.key(0), box, 0 * Y, 20, total)
    assert np.isfinite(out.estimate).all() and np.isneginf(out.log_weights).any()


def test_what_the_model_cannot_reach():
    """A reference that jumps is left behind; a transition beyond its density leaves NaN."""
    near = StateSpaceModel(
        init=jax.random.uniform,
        transition=lambda key, x, t: x + jax.random.uniform(key),
        log_potential=lambda x, y, t: -x,
        log_transition=lambda x, z, t: jnp.where((z >= x) & (z <= x + 1), 0.0, -jnp.inf),
    )
    y, one = jnp.zeros(2), lambda x, z, t: jnp.array([z])
    with pytest.warns(RuntimeWarning, match="density zero"):
        out = conditional_paris(jax.random.key(0), near, y, jnp.array([0.5, 9.0]), 4, one)
    assert np.isfinite(out.estimate).all() and out.log_weights[0] == -jnp.inf
    far = dataclasses.replace(near, transition=lambda key, x, t: x + 9)
    lost = paris(jax.random.key(0), far, y, 4, one)
    assert np.isnan(lost.estimate).all() and np.isnan(lost.log_z)


def test_what_paris_refuses():
    def run(model=WALK, n=4, functional=total, **options):
        return paris(jax.random.key(0), model, Y, n, functional, **options)

    bare = StateSpaceModel(WALK.init, WALK.transition, WALK.log_potential)
    wide = dataclasses.replace(WALK, transition=lambda key, x, t: jnp.stack([x, x]))
    vector = dataclasses.replace(WALK, log_potential=lambda x, y, t: jnp.stack([x, x]))
    unbound = dataclasses.replace(WALK, log_transition_bound=None)
    sweep = functools.partial(conditional_paris, jax.random.key(0), WALK, Y, n=4, functional=total)
    state = paris_init(jax.random.key(0), WALK, Y[0], 4, total)
    for call, message in (
        (lambda: run(n=1), "n is 1"),
        (lambda: run(draws=0), "draws is 0"),
        (lambda: run(max_trials=0, backward="rejection"), "max_trials is 0"),
        (lambda: run(backward="fast"), "backward is 'fast'"),
        (lambda: run(resample="best"), "resample is 'best'"),
        (lambda: run(bare), "log_transition, which is None"),
        (lambda: run(unbound, backward="rejection"), "log_transition_bound, which is None"),
        (lambda: run(wide), "transition returned"),
        (lambda: run(vector), "log_potential returned shape"),
        (
            lambda: run(functional=lambda x, x_next, t: x_next),
            r"expected one array of shape \(D,\)",
        ),
        (lambda: run(initial_functional=lambda x: jnp.zeros(2)), "initial_functional returned"),
        (lambda: run(observed=np.ones(5, bool)), "observed has shape"),
        (lambda: sweep(reference=np.zeros(5)), "reference has shapes"),
        (lambda: sweep(reference=np.zeros((6, 1))), "reference has shapes"),
        (
            lambda: paris_step(
                jax.random.key(0), WALK, state, Y[1], lambda x, x_next, t: jnp.zeros(2)
            ),
            "state holds",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="functional returned dtype"):
        run(functional=lambda x, x_next, t: jnp.zeros(1, jnp.int32))
