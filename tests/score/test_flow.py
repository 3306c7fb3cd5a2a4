"""Flow matching, annealed pairing and guided distillation against closed forms."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jaxgen import process, score
from jaxgen.score.flow import (
    anneal_noise,
    anneal_schedule,
    flow_guided_loss,
    flow_matching_loss,
)

# Linear pairs in one dimension: x1 = M + S x0.
M, S = 0.7, 0.5


def pull(beta, t):
    """``k`` of the best velocity ``M + k (x - t M)``, and the variances of x_t and of the rest."""
    c = math.sqrt(1 - beta**2)
    var = (1 - t) ** 2 + t**2 * S**2 + 2 * t * (1 - t) * c * S
    k = ((1 - t) * (c * S - 1) + t * (S**2 - c * S)) / var
    return k, var, S**2 + 1 - 2 * c * S - k**2 * var


def test_annealed_pairs_have_the_velocity_of_the_closed_form(key):
    n, t = 100_000, 0.5
    published = {0.0: -0.666667, 0.3: -0.680600, 0.7: -0.763692, 1.0: -1.2}
    x0 = jax.random.normal(key, (n, 1))

    def fit(beta):
        """The loss is a square in the line's two numbers, so one Newton step is its minimum."""
        noise = anneal_noise(jax.random.fold_in(key, 1), x0, beta)

        def loss(line):
            field = lambda x, t: line[0] + line[1] * x  # noqa: E731
            losses = flow_matching_loss(key, field, noise, M + S * x0, t_min=t, t_schedule="start")
            return jnp.mean(losses)

        zero = jnp.zeros(2)
        return -jnp.linalg.solve(jax.hessian(loss)(zero), jax.grad(loss)(zero))

    fitted = jax.jit(jax.vmap(fit))(jnp.asarray(list(published)))
    for (beta, known), line in zip(published.items(), np.asarray(fitted), strict=True):
        k, var, rest = pull(beta, t)
        assert abs(k - known) < 1e-6
        # Pairs at beta = 0 lie on a line; what is left is the rounding of sums of 1e5 numbers.
        bound = 4 * math.sqrt(max(rest, 0.0) / (n * var)) + 2e-4
        assert abs(line[1] - k) < bound, (beta, line, k, bound)
        assert abs(line[0] - (M - k * t * M)) < bound * (1 + abs(t * M)), (beta, line)


@pytest.mark.parametrize("beta", [0.0, 0.6, 1.0])
def test_annealed_noise_keeps_its_variance(key, beta):
    n = 40_000
    x0 = jax.random.normal(key, (n, 2))
    out = np.asarray(jax.jit(anneal_noise)(jax.random.fold_in(key, 1), x0, beta), np.float64)
    # Standard errors of a variance and of a correlation of 2 n normals.
    assert abs(out.var() - 1) < 4 * math.sqrt(2 / (2 * n))
    kept = np.mean(out * np.asarray(x0, np.float64))
    assert abs(kept - math.sqrt(1 - beta**2)) < 4 * math.sqrt(2 / (2 * n))
    if beta == 0:
        np.testing.assert_array_equal(out, x0)


def test_annealed_noise_is_drawn_per_example_and_keeps_its_dtype(key):
    x0 = jax.random.normal(key, (5, 3))
    whole = anneal_noise(key, x0, 0.4)
    single = jax.vmap(lambda i, x: anneal_noise(jax.random.fold_in(key, i), x, 0.4, event_ndim=1))
    np.testing.assert_allclose(whole, single(jnp.arange(5), x0), rtol=1e-6)
    assert anneal_noise(key, x0.astype(jnp.bfloat16), 0.4).dtype == jnp.bfloat16
    # The slope of the root is infinite at 1.
    slope = jax.jit(jax.grad(lambda b: jnp.sum(anneal_noise(key, x0, b))))
    assert np.isfinite([slope(1.0), slope(0.0)]).all()


def test_a_share_of_noise_that_is_none_gives_nan(key):
    x0 = jnp.ones((2, 2))
    for beta in (-0.1, 1.1, math.nan):
        assert np.isnan(jax.jit(anneal_noise)(key, x0, beta)).all()
    error, _ = checkify.checkify(jax.jit(anneal_noise))(key, x0, -0.1)
    assert "outside [0, 1]" in str(error.get())


def test_schedules():
    step = jnp.asarray([0, 25, 50, 100, 250])
    share = np.asarray([0, 0.25, 0.5, 1, 1])
    expected = {
        "linear": 1 - share,
        "cosine": (1 + np.cos(np.pi * share)) / 2,
        "exp": np.exp(-np.asarray(step) / 100),
    }
    for kind, values in expected.items():
        beta = jax.jit(anneal_schedule(kind, 100))(step)
        np.testing.assert_allclose(beta, values, rtol=3e-6, atol=1e-12)
        assert beta.dtype == jnp.float32 and (beta <= 1).all() and (beta >= 0).all()
    assert (
        float(anneal_schedule("cosine", 100)(100))
        == float(anneal_schedule("linear", 100)(99999))
        == 0
    )
    assert anneal_schedule("constant", 0.3)(step).tolist() == [jnp.float32(0.3)] * 5


# --- flow matching -----------------------------------------------------------------------------


def times(key, n=4000, **options):
    """The times that a loss is evaluated at, by a weight that shows them."""
    x = jnp.zeros((n, 1))
    show = {"distance": lambda a, b: jnp.ones(n), "weight": lambda t: t}
    return np.asarray(flow_matching_loss(key, lambda x, t: x, x, x, **show, **options))


def test_times(key):
    assert (times(key, t_schedule="start", t_min=0.01) == np.float32(0.01)).all()
    assert (times(key, t_schedule="end") == 1).all()
    uniform = times(key, t_min=0.2)
    assert uniform.min() >= 0.2 and uniform.max() <= 1
    assert abs(uniform.mean() - 0.6) < 4 * 0.8 / math.sqrt(12 * 4000)
    starts, counts = np.unique(times(key, t_schedule=4, t_min=0.2), return_counts=True)
    np.testing.assert_allclose(starts, [0.2, 0.4, 0.6, 0.8], rtol=1e-6)
    assert abs(counts - 1000).max() < 4 * math.sqrt(4000 * 0.25 * 0.75)


def test_the_last_time_is_one_that_the_process_has(monkeypatch, key):
    # A draw of almost 1 comes once in 1e5, and NaN for it would cost the whole batch its step.
    field = score.from_flow(ring().velocity)
    monkeypatch.setattr(jax.random, "uniform", lambda k, **_: jnp.float32(1 - 2**-24))
    assert np.isfinite(flow_matching_loss(key, field, jnp.ones((2, 2)), jnp.ones((2, 2)))).all()


def test_loss_is_the_squared_error_on_the_line(key):
    x0, x1 = jax.random.normal(key, (2, 6, 2, 3))
    seen = []

    def field(x, t):
        seen.append((x, t))
        return jnp.sin(x)

    loss = flow_matching_loss(key, field, x0, x1, t_min=0.25)
    ((x_t, t),) = seen
    t = np.asarray(t)[:, None, None]
    np.testing.assert_allclose(x_t, (1 - t) * x0 + t * x1, rtol=1e-5, atol=1e-6)
    error = np.sin(np.asarray(x_t)) - (np.asarray(x1) - np.asarray(x0))
    np.testing.assert_allclose(loss, np.mean(error**2, axis=(1, 2)), rtol=1e-5)
    # The distance is between the ends that prediction and pair lead to, not between velocities.
    product = flow_matching_loss(
        key, field, x0, x1, t_min=0.25, distance=lambda a, b: jnp.sum(a * b, (1, 2))
    )
    ends = (np.asarray(x0) + np.sin(np.asarray(x_t))) * np.asarray(x1)
    np.testing.assert_allclose(product, ends.sum((1, 2)), rtol=1e-4, atol=1e-5)


def test_a_batch_is_its_examples(key):
    x0, x1 = jax.random.normal(key, (2, 4, 3))

    def both(key, x0, x1, event_ndim=None):
        one = flow_matching_loss(key, lambda x, t: jnp.sin(x), x0, x1, event_ndim=event_ndim)
        return one, flow_matching_loss(
            key, lambda x, t: jnp.cos(x), x0, x1, t_schedule=3, event_ndim=event_ndim
        )

    def each(i, x0, x1):
        return both(jax.random.fold_in(key, i), x0, x1, 1)

    whole = jax.jit(both)(key, x0, x1)
    single = jax.jit(jax.vmap(each))(jnp.arange(4), x0, x1)
    np.testing.assert_allclose(single, whole, rtol=1e-5)
    guided = jax.jit(
        jax.vmap(
            lambda k: flow_guided_loss(
                k, lambda x, t: jnp.sin(x), lambda x, t: jnp.cos(x), (3,), event_ndim=1
            )
        )
    )(jax.random.split(key, 2))
    assert guided.shape == (2,) and guided[0] != guided[1]
    low = flow_matching_loss(key, PLAIN, *(v.astype(jnp.bfloat16) for v in (x0, x1)))
    seen = []

    def spy(x, t):
        seen.append(x.dtype)
        return x

    flow_matching_loss(key, spy, *(v.astype(jnp.bfloat16) for v in (x0, x1)))
    flow_guided_loss(key, spy, spy, (2, 2), dtype=jnp.bfloat16)
    assert len(seen) == 3 and set(seen) == {jnp.dtype(jnp.bfloat16)}
    assert low.dtype == jnp.float32


# --- guidance ----------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["student", "teacher"])
def test_two_half_steps(key, first):
    n, a, c = 500, 0.3, -0.4
    seen = []

    def noted(x, out):
        seen.append(x)
        return out

    def losses(a):
        return flow_guided_loss(
            key,
            lambda x, t: noted((x, t), a * x),
            lambda x, t: noted((x, t), c * x + t[:, None]),
            (n, 2),
            first=first,
            t_min=0.01,
        )

    found = losses(a)
    (z, start), *calls = [[np.asarray(v) for v in call] for call in seen]
    middle, t = calls[-1]
    assert len(calls) == (2 if first == "teacher" else 1) and (start == np.float32(0.01)).all()
    assert abs(z.mean()) < 4 / math.sqrt(2 * n) and abs(z.std() - 1) < 4 / math.sqrt(4 * n)
    assert 0.2 <= t.min() < 0.21 and 0.79 < t.max() <= 0.8
    half = a * z if first == "student" else c * z + 0.01
    np.testing.assert_allclose(middle, z + t[:, None] * half, rtol=1e-5, atol=1e-6)
    end = middle + (1 - t)[:, None] * (c * middle + t[:, None])
    away = z + a * z - end
    np.testing.assert_allclose(found, np.mean(away**2, -1), rtol=1e-4, atol=1e-6)
    # No gradient through the two half-steps: the slope is that of the one-step sample alone.
    slope = jax.jit(jax.grad(lambda a: jnp.mean(losses(a))))(a)
    np.testing.assert_allclose(slope, np.mean(2 * away * z), rtol=1e-4)


def test_an_exact_straight_flow_has_no_guided_loss(key):
    # From N(0, 1) to N(3, 1) every path is the shift by 3.
    shift = lambda x, t: jnp.full_like(x, 3.0)  # noqa: E731
    assert float(jnp.max(flow_guided_loss(key, shift, shift, (8, 2)))) < 1e-10
    off = flow_guided_loss(key, lambda x, t: jnp.full_like(x, 4.0), shift, (8, 2), first="teacher")
    np.testing.assert_allclose(off, 1.0, rtol=1e-5)


def test_labels_reach_both_sides(key):
    field = lambda x, t, label: jnp.broadcast_to(label[:, None], x.shape).astype(x.dtype)  # noqa: E731
    label = jnp.arange(4)
    x0 = jnp.zeros((4, 2))
    x1 = jnp.broadcast_to(label[:, None], (4, 2)).astype(jnp.float32)
    assert float(jnp.sum(flow_matching_loss(key, field, x0, x1, label=label))) == 0
    guided = flow_guided_loss(key, field, field, (4, 2), label=label)
    np.testing.assert_allclose(guided, 0, atol=1e-10)
    plain = lambda x, t: x  # noqa: E731
    for student, teacher, given, match in (
        (field, plain, label, "teacher takes no label"),
        (plain, field, label, "student takes no label"),
        (plain, field, None, "teacher asks for a label"),
        (field, plain, None, "student asks for a label"),
    ):
        with pytest.raises(ValueError, match=match):
            flow_guided_loss(key, student, teacher, (4, 2), label=given)


# --- closed forms ------------------------------------------------------------------------------


def ring():
    angles = np.arange(8) * np.pi / 4
    means = 3 * np.stack([np.cos(angles), np.sin(angles)], -1)
    sde = process.rectified()
    return score.closed_form.mixture(sde, jnp.ones(8), jnp.asarray(means), jnp.full(8, 0.09))


def test_velocity_of_the_ring():
    field = jax.jit(score.from_flow(ring().velocity))
    x = jnp.asarray([[0.5, -0.2], [0.5, -0.2], [0.5, -0.2]])
    out = field(x, jnp.asarray([0.3, 0.7, 0.0]))
    np.testing.assert_allclose(out[0], [1.034080, -0.413631], atol=1e-5)
    np.testing.assert_allclose(out[1], [4.850579, -1.906951], atol=1e-5)
    # At the noise all paths go to the mean of the data, here the origin: one step collapses.
    np.testing.assert_allclose(x[2] + out[2], [0, 0], atol=1e-6)


def test_velocity_of_a_finite_data_set(key):
    data = jax.random.normal(key, (7, 2))
    x, t = jax.random.normal(jax.random.fold_in(key, 1), (5, 2)), jnp.linspace(0.1, 0.8, 5)
    found = score.from_flow(score.closed_form.empirical(process.rectified(), data).velocity)(x, t)
    x, t, data = (np.asarray(v, np.float64) for v in (x, t, data))
    square = np.sum((x[:, None] - t[:, None, None] * data[None]) ** 2, -1)
    weights = np.exp(-square / (2 * (1 - t)[:, None] ** 2))
    weights /= weights.sum(1, keepdims=True)
    expected = (weights @ data - x) / (1 - t)[:, None]
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


# --- what cannot be ----------------------------------------------------------------------------


def PLAIN(x, t):
    return x


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"x1": jnp.zeros((4, 3))}, r"x0 has shape \(4, 2\) and x1 \(4, 3\)"),
        ({"t_min": 0.0}, "t_min is 0.0"),
        ({"t_min": 1.0}, "t_min is 1.0"),
        ({"t_schedule": 0}, "t_schedule is 0"),
        ({"t_schedule": "middle"}, "uniform, start, end"),
        ({"weight": "edm"}, "weight is 'edm'"),
        ({"weight": lambda t: 1.0}, "weight returned shape"),
        ({"distance": lambda a, b: jnp.mean((a - b) ** 2)}, r"distance returned shape \(\)"),
        ({"field": lambda x, t: x[:, :1]}, r"shape \(4, 1\)"),
    ],
)
def test_bad_flow_matching(key, options, match):
    x0 = jnp.zeros((4, 2))
    given = {"field": PLAIN, "x0": x0, "x1": x0, **options}
    with pytest.raises(ValueError, match=match):
        flow_matching_loss(key, **given)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"t_range": (0.8, 0.2)}, "t_range"),
        ({"t_range": (0.0, 0.5)}, "t_range"),
        ({"t_range": (0.5, 1.0)}, "t_range"),
        ({"first": "both"}, "student, teacher"),
        ({"t_min": 1.5}, "t_min is 1.5"),
        ({"teacher": lambda x, t: x[:1]}, r"teacher\(x, t\) returned shape"),
        ({"student": lambda x, t: x[:1]}, r"student\(x, t\) returned shape"),
        ({"distance": lambda a, b: a - b}, "distance returned shape"),
    ],
)
def test_bad_guidance(key, options, match):
    given = {"student": PLAIN, "teacher": PLAIN, "shape": (4, 2), **options}
    with pytest.raises(ValueError, match=match):
        flow_guided_loss(key, **given)


def test_bad_annealing(key):
    x0 = jnp.zeros((2, 2))
    for beta, match in ((-0.1, "beta is -0.1"), (1.5, "beta is 1.5"), (jnp.zeros(2), "one number")):
        with pytest.raises(ValueError, match=match):
            anneal_noise(key, x0, beta)
    with pytest.raises(TypeError, match="dtype int32"):
        anneal_noise(key, jnp.zeros((2, 2), int), 0.5)
    for make, match in (
        (functools.partial(anneal_schedule, "step", 10), "linear, exp, cosine, constant"),
        (functools.partial(anneal_schedule, "linear", 0), "horizon is 0"),
        (functools.partial(anneal_schedule, "constant", 2), "horizon is 2"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
