"""Resampling against exact laws: enumeration, Bayes' rule, counts, a million particles, devices."""

import functools
import itertools
import math
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jaxgen import particles
from jaxgen.particles import fixed_point, sharded

WEIGHTS = np.array([0.30, 0.02, 0.55, 0.13])
DRAWS = 40_000
N = 4


@functools.cache
def _draws(method, conditional, draws=DRAWS):
    """Ancestors of four slots, many times over."""
    function = particles.conditional_resample if conditional else particles.resample
    log_weights = jnp.log(jnp.asarray(WEIGHTS, jnp.float32))
    draw = jax.jit(jax.vmap(lambda k, w: function(k, w, method=method), (0, None)))
    return np.asarray(draw(jax.random.split(jax.random.key(17), draws), log_weights))


# Exact laws of the counts, from each scheme's definition.


def _counts(ancestors):
    return tuple(np.bincount(ancestors, minlength=N))


def _law_of_slots(probabilities):
    """Independent slots; probabilities[s] is slot s's law."""
    law = defaultdict(float)
    for slots in itertools.product(range(N), repeat=len(probabilities)):
        law[_counts(slots)] += math.prod(p[a] for p, a in zip(probabilities, slots, strict=True))
    return law


def _law_multinomial(w):
    return _law_of_slots([w] * N)


def _law_stratified(w):
    ends = np.cumsum(w) * N
    lows, highs = np.concatenate([[0], ends[:-1]]), ends
    return _law_of_slots(
        [np.clip(np.minimum(highs, k + 1) - np.maximum(lows, k), 0, None) for k in range(N)]
    )


def _law_systematic(w):
    ends = np.cumsum(w) * N
    ends[-1] = N
    breaks = np.unique(np.concatenate([[0.0, 1.0], ends % 1]))
    law = defaultdict(float)
    for low, high in itertools.pairwise(breaks):
        below = np.clip(np.ceil(ends - (low + high) / 2), 0, N).astype(int)
        law[tuple(np.diff(np.concatenate([[0], below])))] += high - low
    return law


def _law_residual(w):
    whole = np.floor(w * N + 1e-12).astype(int)
    rest = w * N - whole
    left = N - whole.sum()
    law = defaultdict(float)
    for slots in itertools.product(range(N), repeat=left):
        counts = whole + np.bincount(np.array(slots, int), minlength=N)
        law[tuple(counts)] += math.prod(rest[a] / left for a in slots)
    return law


def _duel(a, b):
    """Outcomes (settled value, which goes on, what is left, chance) of one duel."""
    if a + b < 1:
        return [(0, 0, a + b, a / (a + b)), (0, 1, a + b, b / (a + b))]
    total = 2 - a - b
    return [(1, 1, a + b - 1, (1 - b) / total), (1, 0, a + b - 1, (1 - a) / total)]


def _law_ssp(w):
    whole = np.floor(w * N + 1e-12).astype(int)
    a, b, c, d = w * N - whole
    law = defaultdict(float)
    for (s1, w1, r1, p1), (s2, w2, r2, p2) in itertools.product(_duel(a, b), _duel(c, d)):
        for s3, w3, r3, p3 in _duel(r1, r2):
            counts = whole.copy()
            on = [w1, 2 + w2]
            counts[1 - w1] += s1
            counts[2 + 1 - w2] += s2
            counts[on[1 - w3]] += s3
            counts[on[w3]] += round(r3)
            law[tuple(counts)] += p1 * p2 * p3
    return law


def _law_killing(w):
    keep = w / w.max()
    return _law_of_slots([keep[s] * np.eye(N)[s] + (1 - keep[s]) * w for s in range(N)])


LAWS = {
    "multinomial": _law_multinomial,
    "stratified": _law_stratified,
    "systematic": _law_systematic,
    "residual": _law_residual,
    "ssp": _law_ssp,
    "killing": _law_killing,
}


def _assert_law(seen, law, draws=DRAWS):
    """Frequencies of each outcome within 4.5 standard errors, and no outcome outside the law."""
    assert set(seen) <= {k for k, p in law.items() if p > 1e-12}
    assert sum(law.values()) == pytest.approx(1)
    for outcome, p in law.items():
        error = 4.5 * math.sqrt(p * (1 - p) / draws) + 1e-6
        assert abs(seen.get(outcome, 0) / draws - p) < error, (outcome, p)


def _frequencies(rows):
    values, counts = np.unique(rows, axis=0, return_counts=True)
    return {tuple(int(i) for i in v): int(c) for v, c in zip(values, counts, strict=True)}


def test_every_scheme_has_a_row():
    assert set(LAWS) == set(particles.METHODS)


@pytest.mark.parametrize("method", particles.METHODS)
def test_counts_have_the_schemes_exact_law_and_are_unbiased(method):
    counts = (_draws(method, False)[:, :, None] == np.arange(N)).sum(1)
    _assert_law(_frequencies(counts), LAWS[method](WEIGHTS))
    error = np.maximum(counts.std(0), 1e-3) / math.sqrt(DRAWS)
    np.testing.assert_array_less(np.abs(counts.mean(0) - N * WEIGHTS), 4 * error)


@pytest.mark.parametrize("draws", [DRAWS, pytest.param(50 * DRAWS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", particles.METHODS)
def test_conditional_version_is_bayes_rule_on_the_shuffled_scheme(method, draws):
    law = defaultdict(float)
    for counts, p in LAWS[method](WEIGHTS).items():
        orders = set(itertools.permutations(np.repeat(np.arange(N), counts).tolist()))
        for slots in orders:
            if slots[0] == 0:
                law[slots] += p / len(orders)
    total = sum(law.values())
    assert total == pytest.approx(WEIGHTS[0])
    law = {slots: p / total for slots, p in law.items()}
    _assert_law(_frequencies(_draws(method, True, draws)), law, draws)


def test_order_of_the_variances():
    spread = {
        m: (_draws(m, False)[:, :, None] == np.arange(N)).sum(1).var(0).sum()
        for m in particles.METHODS
    }
    theory = N * (1 - (WEIGHTS**2).sum())
    # The variance of a variance over 40,000 draws is below 2 % of it here.
    assert spread["multinomial"] == pytest.approx(theory, rel=0.02)
    for better in ("stratified", "residual", "systematic", "ssp", "killing"):
        assert spread[better] < 0.9 * spread["multinomial"]
    # The floor: each count next to its expectation, which both of these keep.
    floor = ((N * WEIGHTS) % 1 * (1 - (N * WEIGHTS) % 1)).sum()
    assert spread["systematic"] == pytest.approx(floor, rel=0.02)
    assert spread["ssp"] == pytest.approx(floor, rel=0.02)


def _hard_weights(n, seed=0):
    """Skewed, with runs of -inf at both ends and between."""
    rng = np.random.default_rng(seed)
    log_weights = 3 * rng.standard_normal(n)
    log_weights[rng.random(n) < 0.3] = -np.inf
    log_weights[: n // 10] = log_weights[-n // 10 :] = -np.inf
    return jnp.asarray(log_weights, jnp.float32)


def _wrong_ancestors(method, n, keys):
    """Slots of weight zero or out of range, and the largest error of a count in shares."""
    log_weights = _hard_weights(n)
    share = np.exp(np.asarray(log_weights, np.float64))
    share *= n / share.sum()
    wrong, worst = 0, 0.0
    for key in jax.random.split(jax.random.key(5), keys):
        ancestors = np.asarray(particles.resample(key, log_weights, method=method))
        wrong += int((ancestors >= n).sum())
        counts = np.bincount(np.minimum(ancestors, n - 1), minlength=n)
        wrong += int(counts[share == 0].sum())
        worst = max(worst, np.abs(counts - share).max())
    return wrong, worst


MANY_THOUSANDS = 100_003


@pytest.mark.parametrize("method", particles.METHODS)
def test_no_dead_ancestor_at_a_hundred_thousand(method):
    wrong, worst = _wrong_ancestors(method, MANY_THOUSANDS, 3)
    assert wrong == 0
    if method in ("systematic", "ssp"):
        assert worst < 1.001  # the largest share is about a thousand slots


@pytest.mark.slow
@pytest.mark.parametrize("n", [10**5, 10**6])
@pytest.mark.parametrize("method", particles.METHODS)
def test_no_dead_ancestor_over_two_hundred_keys(method, n):
    wrong, worst = _wrong_ancestors(method, n, 200)
    assert wrong == 0
    if method in ("systematic", "ssp"):
        assert worst < 1.001


@pytest.mark.parametrize("method", ["systematic", "residual", "ssp", "killing"])
def test_equal_weights_are_left_as_they_are(method):
    log_weights = jnp.full(MANY_THOUSANDS, -3.7)
    ancestors = particles.resample(jax.random.key(0), log_weights, method=method)
    np.testing.assert_array_equal(ancestors, np.arange(MANY_THOUSANDS))


def test_shares_are_exact_to_float32s_rounding():
    rng = np.random.default_rng(1)
    weights = np.exp(2 * rng.standard_normal(50_000)).astype(np.float32)
    weights[rng.random(weights.size) < 0.2] = 0
    weights /= weights.max()
    for n in (7, 300_000):
        ends, start = jax.jit(fixed_point.cumulative, static_argnums=1)(weights, n)
        exact = np.asarray(ends.whole).astype(object) * 2**32 + np.asarray(ends.part).astype(object)
        shares = np.diff(np.concatenate([[0], exact]))
        assert exact[-1] == n * 2**32
        assert (shares >= 0).all()
        assert (shares[weights == 0] == 0).all()
        truth = weights.astype(np.float64) * (n / weights.astype(np.float64).sum())
        # Rounding of the sum, the scale and the product, and of every share down to a step of the
        # fixed point; what the common scale leaves over goes to the last.
        last = np.flatnonzero(weights)[-1]
        room = np.where(np.arange(weights.size) == last, n, 2) * 2.0**-32
        rounding = 4 * 2.0**-24 + weights.size / n * 2.0**-32
        came = shares.astype(float) / 2**32
        np.testing.assert_array_less(np.abs(came - truth), rounding * truth + room)
        own = fixed_point.differences(ends, start)
        np.testing.assert_array_equal(
            np.asarray(own.whole).astype(object) * 2**32 + np.asarray(own.part).astype(object),
            shares,
        )


@pytest.mark.parametrize("n", [1, 33, 1025])
def test_running_sums_carry(n):
    rng = np.random.default_rng(n)
    part = rng.integers(0, 2**32, n, dtype=np.uint32)
    whole = rng.integers(0, 5, n, dtype=np.int32)
    sums = jax.jit(fixed_point.running)(fixed_point.Fixed(whole, part))[0]
    exact = np.cumsum(whole.astype(object) * 2**32 + part.astype(object))
    came = np.asarray(sums.whole).astype(object) * 2**32 + np.asarray(sums.part).astype(object)
    assert (came == exact).all()
    np.testing.assert_array_equal(fixed_point.prefix_sum(jnp.asarray(whole)), np.cumsum(whole))


def test_the_wide_product():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2**32, (2, 1000), dtype=np.uint32)
    a[:3], b[:3] = 2**32 - 1, 2**32 - 1
    high, low = fixed_point.multiply(jnp.asarray(a), jnp.asarray(b))
    exact = a.astype(object) * b.astype(object)
    assert (np.asarray(high).astype(object) * 2**32 + np.asarray(low) == exact).all()


@pytest.mark.parametrize("n", [3, pytest.param(1, marks=pytest.mark.slow), 11])
def test_another_number_out(n):
    log_weights = jnp.log(jnp.asarray(WEIGHTS, jnp.float32))
    draw = jax.jit(jax.vmap(lambda k: particles.resample(k, log_weights, method="residual", n=n)))
    ancestors = np.asarray(draw(jax.random.split(jax.random.key(2), 20_000)))
    counts = (ancestors[:, :, None] == np.arange(N)).sum(1)
    error = np.maximum(counts.std(0), 1e-3) / math.sqrt(20_000)
    np.testing.assert_array_less(np.abs(counts.mean(0) - n * WEIGHTS), 4 * error)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_and_shifts(dtype):
    log_weights = jnp.array([0.0, -jnp.inf, 1.0, -2.0], dtype)
    ancestors = particles.resample(jax.random.key(0), log_weights)
    assert ancestors.dtype == jnp.int32
    np.testing.assert_array_equal(ancestors, particles.resample(jax.random.key(0), log_weights + 8))


@pytest.mark.parametrize("function", [particles.resample, particles.conditional_resample])
def test_unusable_weights_give_ancestors_out_of_range(function):
    checked = jax.jit(checkify.checkify(function))
    for bad in ([-jnp.inf] * 4, [0.0, jnp.nan, 0, 0], [jnp.inf, 0.0, 0, 0]):
        error, ancestors = checked(jax.random.key(0), jnp.array(bad))
        np.testing.assert_array_equal(ancestors, [4] * 4)
        np.testing.assert_array_equal(ancestors, function(jax.random.key(0), jnp.array(bad)))
        assert np.isnan(particles.take(jnp.ones((4, 2)), ancestors)).all()
        with pytest.raises(checkify.JaxRuntimeError, match="all are -inf"):
            error.throw()


def test_a_reference_of_weight_zero_keeps_its_slot():
    for method in ("multinomial", "systematic", "ssp"):
        ancestors = np.asarray(
            particles.conditional_resample(
                jax.random.key(1), jnp.log(jnp.array([0.0, 0.5, 0.5, 0.0])), method=method
            )
        )
        assert ancestors[0] == 0
        assert set(ancestors[1:]) <= {1, 2}


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"log_weights": jnp.zeros(4, jnp.int32)}, TypeError, "log_weights has dtype int32"),
        ({"log_weights": jnp.zeros((2, 2))}, ValueError, r"shape \(2, 2\); expected \(n,\)"),
        ({"log_weights": jnp.zeros(0)}, ValueError, "at least one particle"),
        ({"n": 0}, ValueError, "n is 0"),
        ({"n": 2.0}, ValueError, "n is 2.0"),
        ({"n": 2**25}, ValueError, r"expected at most 2\^24"),
        ({"method": "sistematic"}, ValueError, "'sistematic'; expected one of multinomial"),
        ({"method": "killing", "n": 3}, ValueError, "killing keeps their number"),
        ({"key": jax.random.PRNGKey(0)}, TypeError, "expected a typed key"),
    ],
)
@pytest.mark.parametrize("function", [particles.resample, particles.conditional_resample])
def test_bad_input(kwargs, error, words, function):
    arguments = {"key": jax.random.key(0), "log_weights": jnp.zeros(4), **kwargs}
    with pytest.raises(error, match=words):
        function(arguments.pop("key"), arguments.pop("log_weights"), **arguments)


def test_take_gathers_trees_and_refuses_uneven_ones():
    tree = {"a": jnp.arange(3.0), "b": jnp.arange(6).reshape(3, 2)}
    out = particles.take(tree, jnp.array([2, 2, 0, 1]))
    np.testing.assert_array_equal(out["a"], [2, 2, 0, 1])
    np.testing.assert_array_equal(out["b"][:, 0], [4, 4, 0, 2])
    with pytest.raises(ValueError, match="one common"):
        particles.take({"a": jnp.zeros(3), "b": jnp.zeros(2)}, jnp.array([0]))
    with pytest.raises(ValueError, match="one common"):
        particles.take(jnp.zeros(()), jnp.array([0]))
    with pytest.raises(TypeError, match="ancestors has dtype float32"):
        particles.take(jnp.zeros(2), jnp.array([0.0]))


def test_maybe_resample_keeps_the_estimate():
    x, log_weights = jnp.arange(4.0), jnp.log(jnp.array([0.7, 0.1, 0.1, 0.1])) + 2
    move = jax.jit(particles.maybe_resample, static_argnames=("threshold", "method"))
    moved = move(jax.random.key(0), x, log_weights, threshold=0.9)
    assert moved.resampled
    assert float(moved.log_z_increment) == pytest.approx(2 - math.log(4), abs=1e-6)
    np.testing.assert_array_equal(moved.log_weights, np.zeros(4))
    np.testing.assert_array_equal(moved.x, moved.ancestors)
    stayed = move(jax.random.key(0), x, log_weights, threshold=0.3)
    assert not stayed.resampled
    assert float(stayed.log_z_increment) == 0
    np.testing.assert_array_equal(stayed.log_weights, log_weights)
    np.testing.assert_array_equal(stayed.ancestors, np.arange(4))
    held = move(jax.random.key(0), x, log_weights, threshold=1.0, when=jnp.asarray(False))
    assert not held.resampled
    lost = move(jax.random.key(0), x, jnp.full(4, -jnp.inf), threshold=0.5)
    assert np.isnan(lost.x).all() and lost.log_z_increment == -jnp.inf


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5, True])
def test_maybe_resample_bad_input(threshold):
    x = jnp.zeros(4)
    with pytest.raises(ValueError, match="threshold is"):
        particles.maybe_resample(jax.random.key(0), jnp.zeros(4), jnp.zeros(4), threshold=threshold)
    with pytest.raises(ValueError, match="for 4 log-weights"):
        particles.maybe_resample(jax.random.key(0), jnp.zeros(3), jnp.zeros(4))
    with pytest.raises(TypeError, match="threshold is traced"):
        jax.jit(lambda t: particles.maybe_resample(jax.random.key(0), x, x, threshold=t))(0.5)


def test_weights():
    log_weights = jnp.array([1000.0, -jnp.inf, 1000.0])
    assert float(particles.log_sum_exp(log_weights)) == pytest.approx(1000 + math.log(2))
    assert float(particles.log_mean_exp(log_weights)) == pytest.approx(1000 + math.log(2 / 3))
    assert float(particles.ess(log_weights)) == pytest.approx(2)
    np.testing.assert_allclose(jnp.exp(particles.normalise(log_weights)), [0.5, 0, 0.5])
    assert particles.log_mean_exp(jnp.full(3, -jnp.inf)) == -jnp.inf
    assert jnp.isnan(particles.ess(jnp.full(3, -jnp.inf)))
    assert jnp.isnan(particles.log_mean_exp(jnp.array([0.0, jnp.nan])))
    gradient = jax.grad(particles.log_mean_exp)(jnp.array([0.0, -jnp.inf, 1.0]))
    np.testing.assert_allclose(gradient, jax.nn.softmax(jnp.array([0.0, -jnp.inf, 1.0])), rtol=1e-6)


# Particles split over devices.

SPLIT = 8
MANY = SPLIT * 24


@functools.cache
def _mesh(kind):
    return jax.make_mesh((SPLIT,), ("p",), axis_types=(getattr(jax.sharding.AxisType, kind),))


def _split_weights(kind):
    rng = np.random.default_rng(3)
    one = np.full(MANY, -np.inf)
    one[MANY - 5] = 0.0
    table = {"mild": rng.standard_normal(MANY), "one": one, "none": np.full(MANY, -np.inf)}
    return jnp.asarray(table[kind], jnp.float32)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(m, marks=[] if m in ("systematic", "multinomial", "ssp") else pytest.mark.slow)
        for m in particles.METHODS
    ],
)
def test_devices_resample_their_share_as_one_would(method):
    x = jnp.stack([jnp.arange(MANY) * 1.0, -jnp.arange(MANY)], axis=1)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=_mesh("Auto"),
        in_specs=(jax.P(), jax.P("p"), jax.P("p")),
        out_specs=jax.P("p"),
    )
    def split(key, log_weights, x):
        ancestors = particles.resample(key, log_weights, method=method, axis_name="p")
        return ancestors, sharded.exchange(x, ancestors, "p")

    for kind in ("mild", "one", "none"):
        log_weights = _split_weights(kind)
        ancestors, moved = split(jax.random.key(4), log_weights, x)
        np.testing.assert_array_equal(moved, particles.take(x, ancestors))
        if method in ("ssp", "killing") and kind == "mild":  # the same law, other draws
            counts = np.bincount(ancestors, minlength=MANY)
            assert counts.sum() == MANY
            share = MANY * np.exp(particles.normalise(log_weights))
            if method == "ssp":
                assert (np.abs(counts - share) < 1).all()
        else:
            alone = particles.resample(jax.random.key(4), log_weights, method=method)
            np.testing.assert_array_equal(ancestors, alone)


def test_explicit_and_auto_meshes_agree_with_one_device():
    log_weights = _split_weights("mild")
    x = jnp.stack([jnp.arange(MANY) * 1.0, -jnp.arange(MANY)], axis=1)
    alone = jax.jit(particles.maybe_resample)(jax.random.key(4), x, log_weights)
    for kind in ("Explicit", "Auto"):
        place = jax.NamedSharding(_mesh(kind), jax.P("p"))
        move = functools.partial(particles.maybe_resample, threshold=0.99)
        # Not compiled as a whole: branches that close over known arrays are the harder case.
        move = move if kind == "Explicit" else jax.jit(move)
        with jax.set_mesh(_mesh(kind)):
            moved = move(
                jax.random.key(4), jax.device_put(x, place), jax.device_put(log_weights, place)
            )
        np.testing.assert_array_equal(moved.ancestors, alone.ancestors)
        np.testing.assert_array_equal(moved.x, alone.x)
        if kind == "Explicit":
            assert moved.x.sharding.is_equivalent_to(place, 2)


def test_only_neighbours_exchange_particles():
    """Two numbers a device are gathered; particles move by permutes of one device's block."""
    held, width = MANY // SPLIT, 5

    def split(key, log_weights, x):
        moved = particles.maybe_resample(key, x, log_weights, axis_name="p")
        return moved.x, moved.ess, moved.log_z_increment

    function = jax.shard_map(
        split,
        mesh=_mesh("Auto"),
        in_specs=(jax.P(), jax.P("p"), jax.P("p")),
        out_specs=(jax.P("p"), jax.P(), jax.P()),
    )
    x = jnp.zeros((MANY, width))
    jaxpr = str(jax.make_jaxpr(function)(jax.random.key(0), jnp.zeros(MANY), x))
    text = jax.jit(function).lower(jax.random.key(0), jnp.zeros(MANY), x).compile().as_text()
    gathered = [line for line in text.splitlines() if " all-gather(" in line]
    permuted = [line for line in text.splitlines() if " collective-permute(" in line]
    assert gathered and all(f"[{SPLIT}]" in line for line in gathered), gathered
    assert permuted and all(f"[{held}" in line for line in permuted), permuted
    assert "all_to_all" not in jaxpr


def test_pmap_draws_the_same_ancestors():
    log_weights = _split_weights("mild")
    split = jax.pmap(
        lambda k, w: particles.resample(k, w, axis_name="p"), axis_name="p", in_axes=(None, 0)
    )
    ancestors = split(jax.random.key(4), log_weights.reshape(SPLIT, -1))
    alone = particles.resample(jax.random.key(4), log_weights)
    np.testing.assert_array_equal(ancestors.reshape(-1), alone)
