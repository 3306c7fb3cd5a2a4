"""The past by trace-back, in the pruned tree and carried along: all the same paths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jaxgen.smc.filter import particle_filter
from jaxgen.smc.genealogy import (
    default_capacity,
    trace,
    tree_init,
    tree_update,
    with_functional,
    with_lag,
)
from jaxgen.smc.oracle import kalman_smoother, linear_gaussian

STEPS, N, LAG = 40, 32, 3
Y = jnp.sin(0.7 * jnp.arange(STEPS))[:, None]
EYE = jnp.eye(1)
WALK = linear_gaussian(jnp.zeros(1), EYE, 0.9 * EYE, 0.25 * EYE, EYE, 0.09 * EYE)


def product(x, z, t):
    return jnp.sum(x * z) + 0.01 * t


def carrying(model):
    # The noise of a filter depends on keys alone, so that all of these are the same run.
    return with_lag(with_functional(model, product, lambda x: x[0] ** 2), LAG)


@pytest.fixture(scope="module")
def runs():
    model = WALK.model(proposal="optimal", auxiliary=True)
    f = functools.partial(
        particle_filter,
        jax.random.key(0),
        observations=Y,
        n=N,
        ess_threshold=0.7,
        observed=jnp.arange(STEPS) % 7 != 3,
    )
    both = jax.jit(
        lambda: (
            f(model=model, store="all"),
            f(model=model, store=STEPS * N // 2),
            f(model=carrying(model), functions=lambda p: p.x.statistic),
        )
    )
    return both()


def test_the_three_ways_agree(runs):
    stored, pruned, carried = runs
    # Another program rounds the same noise otherwise, in the last bit.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    paths = np.asarray(stored.genealogy.paths())
    assert paths.shape == (STEPS, N, 1)
    np.testing.assert_array_equal(paths[-1], stored.x)
    close(pruned.genealogy.paths(STEPS), paths)
    slots = jnp.array([5, 0, 5], jnp.int32)
    np.testing.assert_array_equal(stored.genealogy.paths(slots), paths[:, np.array(slots)])
    close(pruned.genealogy.paths(4, slots), paths[-4:, np.array(slots)])
    # Ancestors of a step are slots of the step before: the path through them, by hand.
    slot, ancestors = 7, np.asarray(stored.genealogy.ancestors)
    for t in range(STEPS - 1, -1, -1):
        assert paths[t, 7] == stored.genealogy.x[t, slot]
        slot = ancestors[t, slot]
    steps = 0.01 * np.arange(1, STEPS)[:, None]
    sums = paths[0, :, 0] ** 2 + np.sum(paths[:-1, :, 0] * paths[1:, :, 0] + steps, axis=0)
    np.testing.assert_allclose(carried.x.x.statistic, sums, rtol=1e-5)
    close(carried.x.x.x, stored.x)
    for back in range(LAG):
        close(carried.x.past.x[:, back], paths[-2 - back])
    weights = np.exp(carried.log_weights) / N
    np.testing.assert_allclose(carried.means[-1], np.sum(weights * sums), rtol=1e-5)


def test_the_tree_is_pruned(runs):
    stored, pruned, _ = runs
    # Nodes in use are the distinct particles on the paths.
    traced = trace(stored.genealogy.ancestors, jnp.arange(N, dtype=jnp.int32))
    distinct = sum(len(np.unique(row)) for row in np.asarray(traced))
    assert int(pruned.genealogy.size) == distinct < STEPS * N / 2
    assert default_capacity(N, STEPS) < STEPS * N


def test_a_full_tree_gives_nan():
    x = jnp.arange(4.0)
    tree = tree_init(x, 6)
    keep = jnp.arange(4, dtype=jnp.int32)
    full = tree_update(tree, keep, x + 10)
    paths = np.asarray(full.paths(2))
    assert np.isnan(paths[:, 2:]).all()
    np.testing.assert_array_equal(paths[:, :2], [[0, 1], [10, 11]])
    error, _ = checkify.checkify(jax.jit(tree_update))(tree, keep, x + 10)
    with pytest.raises(checkify.JaxRuntimeError, match="full at step 1: 2 particles"):
        error.throw()
    # One ancestor for all: three roots go, and their nodes serve again.
    fits = tree_update(tree, jnp.full(4, 2, jnp.int32), x + 10)
    np.testing.assert_array_equal(fits.paths(2), [[2] * 4, [10, 11, 12, 13]])
    assert int(fits.size) == 5
    # Without an ancestor there is no path.
    lost = tree_update(tree_init(x, 8), jnp.full(4, 4, jnp.int32), x + 10)
    assert np.isnan(lost.paths(2)[0]).all() and int(lost.size) == 4
    # More steps than there were.
    assert np.isnan(fits.paths(3)[0]).all()


@pytest.mark.slow
def test_memory_is_bounded():
    # 300 steps in a buffer of a tenth of all particles.
    steps, n = 300, 64
    y = jnp.sin(0.7 * jnp.arange(steps))[:, None]
    f = jax.jit(lambda: particle_filter(jax.random.key(1), WALK.model(), y, n, store="tree"))
    tree = f().genealogy
    assert tree.parent.shape[0] == default_capacity(n, steps) < steps * n / 10
    assert tree.size < steps + n * np.log(n)
    assert np.isfinite(jax.jit(lambda tree: tree.paths(steps))(tree)).all()


@pytest.mark.slow
def test_fixed_lag_smoothing_mean():
    # At the last step: the mean of x_{T-1-lag} given all observations.
    y, lag = Y[:8], 2
    model = with_lag(WALK.model(), lag)
    f = jax.jit(jax.vmap(lambda key: particle_filter(
        key, model, y, 200, functions=lambda p: p.past[lag - 1]).means[-1]))  # fmt: skip
    means = np.asarray(f(jax.random.split(jax.random.key(0), 100)))
    exact = jax.jit(kalman_smoother)(WALK, y).means[-1 - lag]
    assert abs(means.mean() - exact[0]) < 4 * means.std() / 10


def test_bad_input():
    with pytest.raises(ValueError, match="capacity is 3; expected an integer of at least 4"):
        tree_init(jnp.zeros(4), 3)
    with pytest.raises(ValueError, match="lag is 0"):
        with_lag(WALK.model(), 0)
    mesh = jax.make_mesh((8,), ("p",))
    run = jax.shard_map(
        lambda key: particle_filter(key, WALK.model(), Y, 8, store="tree", axis_name="p").log_z,
        mesh=mesh,
        in_specs=jax.P(),
        out_specs=jax.P(),
    )
    with pytest.raises(ValueError, match="store is 'tree' with axis_name"):
        jax.eval_shape(run, jax.random.key(0))
