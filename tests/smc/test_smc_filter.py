"""Particle filters against Kalman and enumeration, the online form, and the doors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jaxgen.particles.resample import METHODS
from jaxgen.smc.filter import (
    Filter,
    FilterState,
    filter_init,
    filter_step,
    particle_filter,
    particle_keys,
)
from jaxgen.smc.kalman import simulate
from jaxgen.smc.oracle import hmm_enumerate, kalman_filter, linear_gaussian
from jaxgen.smc.state_space import StateSpaceModel

ONE = jnp.eye(1)
WALK = linear_gaussian(jnp.zeros(1), 1.3 * ONE, 0.9 * ONE, 0.25 * ONE, ONE, 0.09 * ONE)
Y = jnp.array([0.5, 1.4, 0.2, -0.9, -1.3, -1.2])[:, None]
OBSERVED = jnp.array([True, True, False, False, True, True])
MOVE = jnp.array([[0.8, 0.2], [0.3, 0.7]])
SEE = jnp.array([[0.9, 0.1], [0.2, 0.8]])


def four_dimensions():
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    return linear_gaussian(
        *(jnp.asarray(v, jnp.float32) for v in (
            np.ones(4), np.eye(4), 0.9 * turn, 0.3 * np.eye(4) + 0.1, rng.normal(size=(2, 4)),
            0.5 * np.eye(2))),
        transition_offset=jnp.full(4, 0.1),
    )  # fmt: skip


def hidden_markov():
    """Integer particles."""
    return StateSpaceModel(
        init=lambda key: jax.random.bernoulli(key).astype(jnp.int32),
        transition=lambda key, x, t: jax.random.bernoulli(key, MOVE[x, 1]).astype(jnp.int32),
        log_potential=lambda x, y, t: jnp.log(SEE[x, y]),
    )


def within(values, truth, k=4.0):
    """The mean of replicas ``(runs, ...)`` is ``truth`` within k standard errors and rounding."""
    values = np.asarray(values, np.float64)
    error = values.std(0, ddof=1) / np.sqrt(len(values)) + 2e-6 * (1 + np.abs(truth))
    worst = np.max(np.abs(values.mean(0) - truth) / error)
    assert worst < k, f"{worst:.2f} standard errors, at most {np.max(error):.2g}"


@jax.jit
def exact_filter(params, y, observed=None):
    return kalman_filter(params, y, observed=observed)


def hold_to_kalman(params, y, *, runs, n, seed=0, model=None, observed=None, **options):
    """exp(log_z) and exp(log_z) times any mean are unbiased at every step, for any n."""
    model = params.model() if model is None else model
    run = jax.jit(jax.vmap(lambda key: particle_filter(
        key, model, y, n, observed=observed, functions=lambda x: x, **options)))  # fmt: skip
    done = run(jax.random.split(jax.random.key(seed), runs))
    exact = jax.tree.map(np.asarray, exact_filter(params, y, observed))
    done = jax.tree.map(np.asarray, done)
    ratio = np.exp(done.log_z_steps.astype(np.float64) - exact.log_z_steps)
    within(ratio, 1)
    within(ratio[:, :, None] * (done.means - exact.means), 0)
    np.testing.assert_array_equal(done.log_z, done.log_z_steps[:, -1])
    np.testing.assert_allclose(np.exp(done.log_weights).mean(1), 1, rtol=1e-5)
    return ratio[:, -1].std(), done


# --- the law ----------------------------------------------------------------------------------


def test_guided_and_auxiliary_filters_are_unbiased_and_better():
    spread = {}
    for name, options in {
        "guided": {"proposal": "optimal"},
        "auxiliary": {"auxiliary": True},
        "adapted": {"proposal": "optimal", "auxiliary": True},
    }.items():
        spread[name], done = hold_to_kalman(
            WALK, Y, runs=1500, n=16, model=WALK.model(**options), observed=OBSERVED
        )
        if name == "auxiliary":
            # After the unobserved step 2 all weights are equal.
            np.testing.assert_array_equal(done.resampled.mean(0), [0, 1, 1, 0, 1, 1])
        if name == "adapted":
            np.testing.assert_allclose(done.ess, 16, rtol=1e-4)
    assert spread["adapted"] < spread["guided"] < 0.7 * spread["auxiliary"]


@pytest.mark.parametrize("method", METHODS)
def test_every_scheme_is_unbiased(method):
    # Missing observations, and resampling on some of the runs' steps alone.
    _, done = hold_to_kalman(
        WALK, Y, runs=1500, n=16, observed=OBSERVED, resample=method, ess_threshold=0.4
    )
    share = np.asarray(done.resampled).mean(0)
    # Weights that were not used up at step 2 are as even at step 3.
    assert 0.5 < share[1] < 0.999 and 0.5 < share[2] < 0.999 and share[3] == 0


@pytest.mark.parametrize(
    "params, y",
    [
        pytest.param(WALK, Y, marks=pytest.mark.slow, id="1-d"),
        pytest.param(four_dimensions(), jnp.tile(Y, (1, 2)), id="4-d"),
    ],
)
def test_filtering_means(params, y):
    # n so large that the bias of order 1/n is far below the standard error.
    model = params.model()
    f = jax.jit(jax.vmap(lambda key: particle_filter(
        key, model, y, 1000, functions={"x": lambda x: x, "square": jnp.square})))  # fmt: skip
    done = f(jax.random.split(jax.random.key(1), 30))
    exact = jax.tree.map(np.asarray, exact_filter(params, y))
    within(done.means["x"], exact.means)
    variances = np.diagonal(exact.covs, axis1=1, axis2=2)
    within(done.means["square"], variances + exact.means**2)


def test_integer_particles_against_enumeration():
    y = jnp.array([0, 1, 1, 0, 1])
    model = hidden_markov()
    f = jax.jit(jax.vmap(lambda key: particle_filter(key, model, y, 8, functions=lambda x: x)))
    done = f(jax.random.split(jax.random.key(2), 1000))
    exact = jax.tree.map(np.asarray, jax.jit(hmm_enumerate)(jnp.full(2, 0.5), MOVE, SEE.T[y]))
    ratio = np.exp(np.asarray(done.log_z) - float(exact.log_z))
    within(ratio, 1)
    within(ratio * (done.means[:, -1] - exact.marginals[-1, 1]), 0)
    assert done.x.dtype == jnp.int32


def test_a_thousand_steps_in_float32():
    steps, n = 1000, 50
    _, y = jax.jit(simulate, static_argnums=2)(jax.random.key(9), WALK, steps)
    model = WALK.model(proposal="optimal", auxiliary=True)
    f = jax.jit(jax.vmap(lambda key: particle_filter(key, model, y, n, ess_threshold=0.5).log_z))
    log_z = np.asarray(f(jax.random.split(jax.random.key(3), 10)), np.float64)
    exact = exact_filter(WALK, y).log_z
    # log of an unbiased estimate is below by half its variance.
    within(log_z + log_z.var() / 2, float(exact))
    assert log_z.std() < 3


# --- its forms agree --------------------------------------------------------------------------


def tree_model():
    """Particles of two arrays, time-dependent, with observations of two arrays."""

    def transition(key, x, t):
        k1, k2 = jax.random.split(key)
        level = x["level"] + x["slope"][0] + 0.1 * jax.random.normal(k1)
        slope = x["slope"] * jnp.cos(0.1 * t) + 0.1 * jax.random.normal(k2, (2,))
        return {"level": level, "slope": slope}

    return StateSpaceModel(
        init=lambda key: {"level": 0.0, "slope": jax.random.normal(key, (2,))},
        transition=transition,
        log_potential=lambda x, y, t: (
            -0.5 * jnp.sum((y["a"] - x["slope"]) ** 2) - jnp.abs(y["b"] - x["level"])
        ),
    )


def test_online_jit_and_vmap_equal_the_batch():
    model, n = tree_model(), 50
    y = {"a": jnp.tile(Y, (1, 2)), "b": Y[:, 0]}
    options = {"resample": "stratified", "ess_threshold": 0.9}
    functions = (lambda x: x["level"], lambda x: x)
    batch = functools.partial(particle_filter, model=model, n=n, functions=functions, **options)
    keys = jax.random.split(jax.random.key(4), 2)
    mapped = jax.jit(
        jax.vmap(lambda key, obs: batch(key, observations=y, observed=obs), in_axes=(0, None))
    )(keys, OBSERVED)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    one = jax.tree.map(lambda v: v[1], mapped)
    for t in range(len(Y)):
        at = jax.tree.map(lambda v, t=t: v[t], y)
        key = jax.random.fold_in(keys[1], t)
        if t == 0:
            state, info = filter_init(key, model, at, n, observed=OBSERVED[0], functions=functions)
        else:
            state, info = filter_step(
                key, model, state, at, observed=OBSERVED[t], functions=functions, **options
            )
        close(info.ess, one.ess[t])
        close(state.log_z, one.log_z_steps[t])
        jax.tree.map(lambda a, b, t=t: close(a, b[t]), info.means, one.means)
    assert int(state.t) == len(Y) - 1
    jax.tree.map(close, (state.x, state.log_weights), (one.x, one.log_weights))


def test_parameters_are_closed_over_and_compile_once():
    traced = []

    def log_z(key, a):
        traced.append(1)
        params = WALK._replace(transition_matrix=a * ONE)
        return particle_filter(key, params.model(), Y, 20).log_z

    f = jax.jit(jax.value_and_grad(log_z, argnums=1))
    first, slope = f(jax.random.key(0), 0.9)
    second, _ = f(jax.random.key(0), 0.5)
    assert len(traced) == 1 and first != second and np.isfinite(slope)

    calls = []

    def potential(x, y, t):
        calls.append(1)
        return -jnp.sum((y - x) ** 2)

    model = StateSpaceModel(WALK.model().init, WALK.model().transition, potential)
    particle_filter(jax.random.key(0), model, Y, 20)
    count = len(calls)
    particle_filter(jax.random.key(1), model, Y + 1, 20)
    assert len(calls) == count


@pytest.mark.parametrize("kind", ["Explicit", pytest.param("Auto", marks=pytest.mark.slow)])
def test_eight_devices_equal_one(kind):
    model = WALK.model(auxiliary=True)
    options = {"observed": OBSERVED, "functions": lambda x: x, "store": "all"}
    one = particle_filter(jax.random.key(0), model, Y, 64, **options)
    axis = jax.sharding.AxisType[kind]
    mesh = jax.make_mesh((8,), ("p",), axis_types=(axis,))
    split, same = jax.P("p"), jax.P()
    stored = type(one.genealogy)(jax.P(None, "p"), jax.P(None, "p"))
    specs = Filter(split, split, same, same, same, same, same, stored)
    f = jax.shard_map(
        lambda key: particle_filter(key, model, Y, 64, axis_name="p", **options),
        mesh=mesh,
        in_specs=same,
        out_specs=specs,
    )
    with jax.set_mesh(mesh):
        eight = jax.jit(f)(jax.random.key(0))
    np.testing.assert_array_equal(eight.genealogy.ancestors, one.genealogy.ancestors)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), eight, one)


def test_a_filter_on_each_device_from_a_known_start():
    """Under the default check of what varies over devices, though all start alike."""
    model = StateSpaceModel(
        init=lambda key: 0.0,
        transition=lambda key, x, t: x + jax.random.normal(key),
        log_potential=lambda x, y, t: -0.5 * (y - x) ** 2,
    )

    def paths(keys):
        return particle_filter(keys[0], model, Y[:3, 0], 4, store="tree").genealogy.paths(3)[None]

    mesh = jax.make_mesh((8,), ("p",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.P("p")
    f = jax.jit(jax.shard_map(paths, mesh=mesh, in_specs=split, out_specs=split))
    keys = jax.random.split(jax.random.key(0), 8)
    np.testing.assert_allclose(f(keys)[3], paths(keys[3:4])[0], rtol=1e-5)


def test_particle_keys():
    key = jax.random.key(3)
    whole = jax.random.key_data(particle_keys(key, 1000))
    part = jax.random.key_data(particle_keys(key, 10, offset=jnp.int32(500)))
    np.testing.assert_array_equal(whole[500:510], part)
    assert len(np.unique(whole, axis=0)) == 1000
    other = particle_keys(jax.random.key(3, impl="rbg"), 4, offset=7)
    assert other[1] == jax.random.fold_in(jax.random.key(3, impl="rbg"), 8)
    # Neighbours' draws: no correlation, and the moments of a standard normal.
    z = np.asarray(jax.jit(jax.vmap(jax.random.normal))(particle_keys(key, 200_000)))
    lagged = [np.mean(z[:-k] * z[k:]) for k in (1, 2, 8, 256)]
    assert np.max(np.abs([*lagged, z.mean(), (np.mean(z**2) - 1) / 2**0.5])) < 4 / len(z) ** 0.5
    with pytest.raises(TypeError, match="typed key"):
        particle_keys(jnp.zeros(2, jnp.uint32), 4)


def test_neighbouring_keys_share_no_particles():
    """Runs' keys count up, and so do particles' keys from a run's."""
    model = StateSpaceModel(jax.random.normal, lambda key, x, t: x, lambda x, y, t: 0.0)
    runs = [filter_init(jax.random.key(seed), model, 0.0, 8)[0].x for seed in range(2)]
    plain = jax.vmap(lambda i: jax.random.normal(jax.random.key(i)))(jnp.arange(8))
    assert len(np.unique(np.concatenate([*runs, plain]))) == 24


# --- what goes wrong --------------------------------------------------------------------------


def vanishing(integer):
    """Nobody survives step 2."""
    kind = jnp.int32 if integer else jnp.float32
    return StateSpaceModel(
        init=lambda key: jax.random.bernoulli(key).astype(kind),
        transition=lambda key, x, t: x,
        log_potential=lambda x, y, t: jnp.where(t == 2, -jnp.inf, 0.0 * x),
    )


@pytest.mark.parametrize("integer, threshold", [(True, 1.0), (False, 0.5)])
def test_no_weight_left_is_nan_from_there_on(integer, threshold):
    f = functools.partial(
        particle_filter,
        model=vanishing(integer),
        observations=jnp.zeros(5),
        n=4,
        ess_threshold=threshold,
        functions=lambda x: x,
    )
    done = f(jax.random.key(0))
    assert np.isfinite(done.log_z_steps[:2]).all() and np.isfinite(done.means[:2]).all()
    for value in (done.log_z, done.log_z_steps[2:], done.means[2:], done.ess[2:]):
        assert np.isnan(value).all()
    assert np.isnan(done.log_weights).all()
    if threshold == 1:
        error, _ = checkify.checkify(jax.jit(lambda key: f(key)))(jax.random.key(0))
        with pytest.raises(checkify.JaxRuntimeError, match="at step 2 every particle has weight"):
            error.throw()


def test_particles_without_weight_do_not_count():
    # A function that is NaN or infinite off the potential's support.
    model = StateSpaceModel(
        init=jax.random.normal,
        transition=lambda key, x, t: jax.random.normal(key),
        log_potential=lambda x, y, t: jnp.where(x > 0, 0.0, -jnp.inf),
    )
    done = particle_filter(jax.random.key(0), model, Y[:, 0], 500, functions=jnp.log)
    assert np.isfinite(done.means).all() and np.isfinite(done.log_z)
    # A potential that is NaN does.
    wrong = StateSpaceModel(model.init, model.transition, lambda x, y, t: jnp.log(x))
    assert np.isnan(particle_filter(jax.random.key(0), wrong, Y[:, 0], 50).log_z)


def test_bad_input():
    good = WALK.model()
    key = jax.random.key(0)

    def call(model=good, y=Y, n=8, key=key, **options):
        return jax.eval_shape(lambda key: particle_filter(key, model, y, n, **options), key)

    def changed(**functions):
        return dataclasses.replace(good, **functions)

    guided = WALK.model(proposal="optimal")
    for kind, match, options in (
        (ValueError, "n is 0", {"n": 0}),
        (ValueError, "n is 2.5", {"n": 2.5}),
        (ValueError, "resample is 'best'; expected one of multinomial", {"resample": "best"}),
        (ValueError, "ess_threshold is 0", {"ess_threshold": 0}),
        (
            ValueError,
            r"ess_threshold is 1.5; expected a number in \(0, 1\]",
            {"ess_threshold": 1.5},
        ),
        (ValueError, "ess_threshold is nan", {"ess_threshold": float("nan")}),
        (ValueError, "store is 'some'", {"store": "some"}),
        (ValueError, "store is 4", {"store": 4}),
        (ValueError, "observations has leaves of shapes", {"y": jnp.float32(1)}),
        (ValueError, "observations has leaves", {"y": {"a": Y, "b": Y[:2]}}),
        (ValueError, "observations has leaves", {"y": Y[:0]}),
        (ValueError, r"observed has shape \(5,\)", {"observed": OBSERVED[:5]}),
        (ValueError, "dtype int32; expected bool", {"observed": jnp.ones(6, jnp.int32)}),
        (TypeError, "expected a StateSpaceModel", {"model": good.init}),
        (TypeError, "functions holds", {"functions": [3]}),
        (TypeError, "typed key", {"key": jnp.zeros(2, jnp.uint32)}),
        (
            ValueError,
            r"log_potential returned shape \(1,\) for one particle",
            {"model": changed(log_potential=lambda x, y, t: y - x)},
        ),
        (
            TypeError,
            "log_potential returned dtype int32",
            {"model": changed(log_potential=lambda x, y, t: t)},
        ),
        (
            ValueError,
            "transition returned float32",
            {"model": changed(transition=lambda key, x, t: jnp.concatenate([x, x]))},
        ),
        (
            ValueError,
            "transition returned float16",
            {"model": changed(transition=lambda key, x, t: x.astype(jnp.float16))},
        ),
        (
            ValueError,
            r"log_auxiliary returned shape \(1,\)",
            {"model": changed(log_auxiliary=lambda x, y, t: x)},
        ),
        (
            ValueError,
            "propose returned",
            {"model": changed(propose=lambda key, x, y, t: x[0], log_propose=guided.log_propose)},
        ),
    ):
        with pytest.raises(kind, match=match):
            call(**options)
    with pytest.raises(TypeError, match="ess_threshold is traced"):
        jax.jit(lambda e: particle_filter(key, good, Y, 8, ess_threshold=e))(0.5)
    state = FilterState(jnp.zeros((5, 1)), jnp.zeros(4), jnp.zeros(()), jnp.int32(0))
    with pytest.raises(ValueError, match=r"state.log_weights has shape \(4,\)"):
        filter_step(key, good, state, Y[0])
    with pytest.raises(TypeError, match=r"state.log_weights has dtype int32"):
        filter_step(key, good, state._replace(log_weights=jnp.zeros(5, jnp.int32)), Y[0])
    mesh = jax.make_mesh((8,), ("p",))
    with pytest.raises(ValueError, match="n is 12; expected a multiple of the 8 devices"):
        jax.eval_shape(
            jax.shard_map(
                lambda key: particle_filter(key, good, Y, 12, axis_name="p").log_z,
                mesh=mesh,
                in_specs=jax.P(),
                out_specs=jax.P(),
            ),
            key,
        )
