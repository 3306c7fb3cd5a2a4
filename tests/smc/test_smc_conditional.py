"""Backward draws, conditional SMC and FFBS against exact laws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from scipy import stats

from jaxgen.particles.resample import METHODS
from jaxgen.smc import backward
from jaxgen.smc.backward import backward_indices
from jaxgen.smc.conditional import backward_sample, conditional_smc, ffbs
from jaxgen.smc.oracle import hmm_enumerate, kalman_smoother, linear_gaussian
from jaxgen.smc.state_space import StateSpaceModel

MOVE = jnp.array([[0.8, 0.2], [0.3, 0.7]])
SEE = jnp.array([[0.9, 0.1], [0.2, 0.8]])
SEEN = jnp.array([0, 1, 1, 0, 1])
TWO_STATES = StateSpaceModel(
    init=lambda key: jax.random.bernoulli(key, 0.5).astype(jnp.int32),
    transition=lambda key, x, t: jax.random.bernoulli(key, MOVE[x, 1]).astype(jnp.int32),
    log_potential=lambda x, y, t: jnp.log(SEE[x, y]),
    log_transition=lambda x, x_next, t: jnp.log(MOVE[x, x_next]),
)
WALK = StateSpaceModel(
    init=jax.random.normal,
    transition=lambda key, x, t: 0.9 * x + 0.5 * jax.random.normal(key),
    log_potential=lambda x, y, t: -0.5 * ((y - x) / 0.3) ** 2,
    log_transition=lambda x, x_next, t: -0.5 * ((x_next - 0.9 * x) / 0.5) ** 2,
    log_transition_bound=lambda t: 0.0,
)
Y = jnp.array([0.3, 0.1, -0.4, 0.2])


def chi_square(counts, probs):
    """p-value, rare cells joined."""
    expected = counts.sum() * probs
    order = np.argsort(expected)
    rare = order[np.cumsum(expected[order]) < 5]
    keep = np.setdiff1d(np.arange(len(probs)), rare)
    if len(rare):
        counts = np.append(counts[keep], counts[rare].sum())
        expected = np.append(expected[keep], expected[rare].sum())
        if expected[-1] == 0:
            assert counts[-1] == 0
            counts, expected = counts[:-1], expected[:-1]
    return stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue


# --- backward draws -------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("model", "draws", "backward", "max_trials"))
def draw(model, x, log_weights, states, **options):
    return backward_indices(
        jax.random.key(0), model, x, log_weights, states, jnp.int32(1), **options
    )


@pytest.mark.parametrize(
    ("n", "options"),
    [
        pytest.param(10, {}, marks=pytest.mark.slow),
        (150, {}),
        (150, {"backward": "rejection", "max_trials": 2}),
        pytest.param(10, {"backward": "rejection", "max_trials": 1}, marks=pytest.mark.slow),
        pytest.param(150, {"backward": "rejection"}, marks=pytest.mark.slow),
        pytest.param(3000, {}, marks=pytest.mark.slow),
        pytest.param(3000, {"backward": "rejection", "max_trials": 9}, marks=pytest.mark.slow),
    ],
)
def test_backward_draws_have_the_exact_law(n, options):
    x = np.linspace(-2, 2, n, dtype=np.float32)
    log_weights = 0.3 * x
    log_weights[[0, n // 2, n - 1]] = -np.inf
    states, draws = np.float32([0.5, -2.5, 4.0]), 6000
    index = draw(WALK, x, log_weights, states, draws=draws, **options)
    assert index.shape == (3, draws) and index.dtype == jnp.int32
    logits = log_weights - 0.5 * ((states[:, None] - 0.9 * x) / 0.5) ** 2
    probs = np.exp(logits - logits.max(1, keepdims=True), dtype=float)
    probs /= probs.sum(1, keepdims=True)
    for row, p in zip(np.asarray(index), probs, strict=True):
        counts = np.bincount(row, minlength=n)
        assert not counts[p == 0].any()
        assert chi_square(counts, p) > 1e-3


def test_blocks_do_not_change_the_draws(monkeypatch):
    x = np.linspace(-2, 2, 70, dtype=np.float32)
    whole = draw(WALK, x, -(x**2), x, draws=2)
    monkeypatch.setattr(backward, "_PAIRS_CPU", 70 * 16)
    monkeypatch.setattr(backward, "_PAIRS", 70 * 32)
    fresh = jax.jit(draw.__wrapped__, static_argnames=("model", "draws"))
    np.testing.assert_array_equal(fresh(WALK, x, -(x**2), x, draws=2), whole)


BOX = StateSpaceModel(
    WALK.init,
    WALK.transition,
    WALK.log_potential,
    lambda x, x_next, t: jnp.where(jnp.abs(x_next - x) < 1, 0.0, -jnp.inf) + 0 * x_next,
    log_transition_bound=lambda t: 0.0,
)


@pytest.mark.parametrize("kind", ["exact", "rejection"])
def test_without_a_parent_the_index_is_out_of_range(kind):
    states = np.float32([0.5, 5.0, np.nan])
    index = draw(BOX, np.zeros(3), np.zeros(3), states, draws=4, backward=kind)
    assert (index[0] < 3).all() and (index[1] == 3).all() and (index[2] == 4).all()
    dead = draw(BOX, np.zeros(3), np.full(3, -np.inf), states, draws=4, backward=kind)
    assert (dead[:2] == 3).all()


def test_a_density_above_its_bound_is_reported():
    wrong = dataclasses.replace(WALK, log_transition_bound=lambda t: -1.0)
    x = np.linspace(-1, 1, 10, dtype=np.float32)
    checked = checkify.checkify(
        lambda: draw(wrong, x, x, x, backward="rejection"), errors=checkify.user_checks
    )
    error, index = jax.jit(checked)()
    assert "at step 1 log_transition exceeds" in str(error.get())
    assert (index == 11).all()


# --- conditional SMC ------------------------------------------------------------------------------


@functools.cache
def two_states(steps):
    done = hmm_enumerate(jnp.array([0.5, 0.5]), MOVE, SEE[:, SEEN[:steps]].T)
    return np.asarray(done.paths), np.exp(np.asarray(done.log_probs, float))


def law_of_the_new_path(n, steps, chains, **options):
    """p-value of the new path's law from references of the smoothing law."""
    paths, probs = two_states(steps)
    # Exact proportions but for rounding, so that only the sweep is random.
    start = np.repeat(np.arange(len(probs)), np.round(probs * chains).astype(int))

    @jax.jit
    @jax.vmap
    def sweep(key, reference):
        new = conditional_smc(key, TWO_STATES, SEEN[:steps], reference, n, **options).path
        return jnp.sum(new * 2 ** jnp.arange(steps - 1, -1, -1))

    new = sweep(jax.random.split(jax.random.key(0), len(start)), jnp.asarray(paths[start]))
    return chi_square(np.bincount(np.asarray(new), minlength=len(probs)), probs)


# What the conditional schemes draw is held by the tests of resampling; here is what it is for.
QUICK = ("systematic",)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_scheme_leaves_the_smoothing_law_invariant(method):
    assert law_of_the_new_path(3, 3, 30_000, resample=method) > 1e-3


@pytest.mark.parametrize(
    "method", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_so_do_paths_along_the_ancestors(method):
    # The sharper of the two: a scheme that is not conditioned shows here at once.
    assert law_of_the_new_path(3, 3, 30_000, resample=method, path="ancestors") > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("path", ["backward", "ancestors"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [2, 5])
def test_invariance_at_length(n, method, path):
    assert law_of_the_new_path(n, 5, 400_000, resample=method, path=path) > 1e-3


def test_a_reference_of_density_zero_is_left_behind_with_a_warning():
    # Allowed by the observations alone, by nothing that moves.
    with pytest.warns(RuntimeWarning, match="density zero"):
        out = conditional_smc(jax.random.key(0), BOX, Y, np.float32([0, 0, 9, 0]), 5)
    assert (np.abs(out.path) < 9).all() and np.isfinite(out.log_z)


# --- FFBS -----------------------------------------------------------------------------------------


def test_ffbs_has_the_smoothing_moments():
    seen = np.array([True, True, False, True])
    eye = jnp.eye(1)
    params = linear_gaussian(jnp.zeros(1), eye, 0.9 * eye, 0.25 * eye, eye, 0.09 * eye)
    exact = kalman_smoother(params, Y[:, None], observed=seen)
    runs = jax.jit(
        jax.vmap(
            lambda key: (lambda x: jnp.stack([x, x**2]).mean(2))(
                ffbs(key, WALK, Y, 200, 50, observed=seen)
            )
        )
    )(jax.random.split(jax.random.key(0), 64))
    runs = np.asarray(runs, float)
    means, variances = np.asarray(exact.means[:, 0]), np.asarray(exact.covs[:, 0, 0])
    gap = np.abs(runs.mean(0) - np.stack([means, means**2 + variances]))
    error = runs.std(0) / 8
    assert np.all(gap < 4 * error), (gap, error)
    assert np.any(np.abs(means) > 8 * error[0])


def test_backward_sample_of_one_step_draws_from_the_weights():
    log_weights = jnp.log(jnp.array([[0.5, 0.0, 0.3, 0.2]]))
    paths = backward_sample(jax.random.key(0), WALK, jnp.arange(4.0)[None], log_weights, 20_000)
    assert paths.shape == (1, 20_000)
    counts = np.bincount(np.asarray(paths[0], int), minlength=4)
    assert chi_square(counts, np.array([0.5, 0.0, 0.3, 0.2])) > 1e-3


def test_tracing_does_not_grow_with_the_steps():
    def size(steps):
        f = functools.partial(backward_sample, model=WALK, paths=2)
        x = jnp.zeros((steps, 3))
        return len(jax.make_jaxpr(lambda key: f(key, x=x, log_weights=x))(jax.random.key(0)).eqns)

    assert size(20) == size(3)


# --- bad input ------------------------------------------------------------------------------------


def test_what_a_sweep_refuses():
    def sweep(model=WALK, reference=None, n=4, **options):
        reference = jnp.zeros(4) if reference is None else reference
        return conditional_smc(jax.random.key(0), model, Y, reference, n, **options)

    bare = StateSpaceModel(WALK.init, WALK.transition, WALK.log_potential)
    for call, message in (
        (lambda: sweep(n=1), "n is 1"),
        (lambda: sweep(reference=jnp.zeros(3)), r"reference has shapes \(3,\)"),
        (lambda: sweep(reference=jnp.zeros((4, 2))), "reference has shapes"),
        (lambda: sweep(resample="best"), "resample is 'best'"),
        (lambda: sweep(path="forward"), "path is 'forward'"),
        (lambda: sweep(model=bare), "log_transition, which is None"),
        (lambda: ffbs(jax.random.key(0), WALK, Y, 4, 0), "paths is 0"),
        (lambda: ffbs(jax.random.key(0), WALK, Y, 4, 2, backward="fast"), "backward is 'fast'"),
        (
            lambda: backward_sample(jax.random.key(0), WALK, jnp.zeros((2, 3)), jnp.zeros(3), 1),
            "log_weights has shape",
        ),
        (
            lambda: draw(TWO_STATES, SEEN, Y, SEEN, backward="rejection"),
            "log_transition_bound",
        ),
        (lambda: draw(WALK, Y, Y, Y, draws=0), "draws is 0"),
        (lambda: draw(WALK, Y, Y[1:], Y), r"x has a leaf of shape \(4,\) for 3 log-weights"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="model is int"):
        sweep(model=3)
