"""Likelihoods, codes and bits against the exact flow of a Gaussian, which is linear."""

import functools
import math

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jaxgen import process, solve
from jaxgen.process import PROCESSES
from jaxgen.score.closed_form import gaussian
from jaxgen.score.derivatives import probes

MEAN, VARIANCE, ANCHOR = 1.0, 0.25, 0.4
X = np.array([[0.3], [2.0], [-0.4]], np.float32)
# Nats at x = 0.3 and 2.0 of the exact flow with the prior, worked out in float64.
PUBLISHED = {
    "vp": (-1.1965945, -2.2389048),
    "sub_vp": (-1.1965759, -2.2388458),
    "ve": (-1.1778516, -2.2655355),
}
COV = np.array([[1.0, 0.6], [0.6, 0.5]], np.float32)
X2 = np.array([0.7, -0.3], np.float32)


@functools.cache
def make_process(name):
    anchored = name in ("mean_reverting", "ouve")
    return PROCESSES[name](ANCHOR) if anchored else PROCESSES[name]()


def spread(sde, t, variance):
    return float(sde.alpha(t)) ** 2 * variance + float(sde.sigma(t)) ** 2


def exact_code(sde, x, mu):
    """Code and change of log-density: the flow scales each direction by its marginal spread."""
    t0, t1 = sde.t_min, sde.t_max
    scale = math.sqrt(spread(sde, t1, VARIANCE) / spread(sde, t0, VARIANCE))
    m0, m1 = (mu + float(sde.alpha(t)) * (MEAN - mu) for t in (t0, t1))
    return m1 + scale * (x - m0), math.log(scale)


@functools.cache
def solver_of(name):
    """A jitted likelihood of one process, whose field can be poisoned without a new compile."""
    sde = make_process(name)
    form = gaussian(sde, jnp.full(1, MEAN), VARIANCE)

    def run(x, poison):
        def field(y, t):
            assert y.shape == (1, 1)  # a batch of one, with its time
            assert t.shape == (1,)
            return form.noise(y, t) + poison

        return solve.log_likelihood(None, field, sde, x, estimator="exact")

    return jax.jit(run)


# --- against the exact flow ---------------------------------------------------------------------


# With the noise as its field, a process whose alpha vanishes divides rounding by it near t_max; the
# solver's own error at tolerance 1e-5 adds up to 2e-4 on ouve.
LOOSE = ("cosine", "rectified", "ouve")


# Of exploding and preserved variance, from pure noise, and with an anchor; the rest are slow.
QUICK = ("vp", "ve", "rectified", "mean_reverting", "ouve")


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        pytest.param(
            n, 4e-4 if n in LOOSE else 1e-4, marks=[] if n in QUICK else [pytest.mark.slow]
        )
        for n in PROCESSES
    ],
)
def test_every_process_meets_the_exact_flow(name, tolerance):
    sde = make_process(name)
    out = solver_of(name)(jnp.asarray(X), 0.0)
    mu = ANCHOR if sde.mu is not None else 0.0
    z, change = exact_code(sde, X.astype(np.float64), mu)
    np.testing.assert_allclose(out.z, z, rtol=tolerance, atol=tolerance)
    truth = np.asarray(sde.prior_log_prob(jnp.asarray(z, jnp.float32))) + change
    np.testing.assert_allclose(out.log_prob, truth, atol=tolerance)
    assert bool(jnp.all(out.result == diffrax.RESULTS.successful))
    assert out.nfe.shape == (3,)
    assert out.nfe.dtype == jnp.int32
    assert 20 < int(out.nfe.min()) <= int(out.nfe.max()) < 200
    if name in PUBLISHED:
        np.testing.assert_allclose(out.log_prob[:2], PUBLISHED[name], atol=1e-4)


@functools.cache
def correlated(noise):
    sde = make_process("vp")
    field = gaussian(sde, jnp.zeros(2), jnp.asarray(COV)).noise
    return jax.jit(lambda key, x: solve.log_likelihood(key, field, sde, x, noise=noise))


def log_growth(sde):
    """The integral of the flow's Jacobian, which is symmetric with fixed axes."""
    values, axes = np.linalg.eigh(COV.astype(np.float64))
    ratio = [spread(sde, sde.t_max, v) / spread(sde, sde.t_min, v) for v in values]
    return axes @ np.diag(0.5 * np.log(ratio)) @ axes.T


@pytest.mark.parametrize("noise", ["rademacher", pytest.param("gaussian", marks=pytest.mark.slow)])
def test_hutchinson_keeps_one_probe_and_is_unbiased(key, noise):
    sde, n = make_process("vp"), 1000
    out = correlated(noise)(key, jnp.broadcast_to(X2, (n, 2)))
    growth = log_growth(sde)
    base = np.asarray(sde.prior_log_prob(out.z), np.float64)
    # One probe, kept: the integral of u . J u is u . (integral of J) . u, whatever the steps.
    u = np.asarray(probes(key, (n, 2), noise), np.float64)
    np.testing.assert_allclose(
        out.log_prob, base + np.einsum("ni,ij,nj->n", u, growth, u), atol=3e-4
    )
    estimates = np.asarray(out.log_prob, np.float64) - base
    standard_error = estimates.std() / math.sqrt(n)
    assert standard_error > 1e-3
    assert abs(estimates.mean() - np.trace(growth)) < 4 * standard_error


def test_a_sample_is_the_same_in_any_batch_and_on_eight_devices(key):
    run = correlated("rademacher")
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    x = jnp.broadcast_to(X2, (8, 2))
    many = run(key, jnp.broadcast_to(X2, (1000, 2)))
    few, shared = run(key, x), run(key, jax.device_put(x, rows))
    assert len(np.unique(np.round(np.asarray(few.log_prob), 3))) > 1  # the probes do differ
    for out in (few, shared):
        np.testing.assert_allclose(out.log_prob, many.log_prob[:8], atol=2e-5)
        np.testing.assert_array_equal(out.nfe, many.nfe[:8])


# --- codes --------------------------------------------------------------------------------------


@functools.cache
def coders():
    """Jitted codes of the vp process, whose field can be poisoned without a new compile."""
    form = gaussian(process.vp(), jnp.full(1, MEAN), VARIANCE)

    def run(code, x, poison):
        return code(lambda y, t: form.noise(y, t) + poison, form.sde, x)

    return tuple(jax.jit(functools.partial(run, c)) for c in (solve.encode, solve.decode))


def test_codes_are_the_exact_flow_both_ways():
    encode, decode = coders()
    z, _ = exact_code(make_process("vp"), X.astype(np.float64), 0.0)
    out = encode(jnp.asarray(X), 0.0)
    np.testing.assert_allclose(out.x, z, atol=1e-4)
    back = decode(out.x, 0.0)
    np.testing.assert_allclose(back.x, X, atol=1e-4)
    assert back.nfe.shape == (3,)
    assert back.nfe.dtype == jnp.int32


def test_an_anchor_per_example_goes_with_its_example():
    anchors = jnp.array([[0.1], [0.4], [0.7]])
    sde = process.mean_reverting(anchors)
    # Of a field that predicts no noise the flow is mu + alpha (x - mu) / alpha(t_min).
    out = solve.log_likelihood(None, lambda x, t: 0 * x, sde, X, estimator="exact")
    ratio = float(sde.alpha(sde.t_max) / sde.alpha(sde.t_min))
    z = anchors + ratio * (X - anchors)
    np.testing.assert_allclose(out.z, z, atol=1e-4)
    np.testing.assert_allclose(out.log_prob, sde.prior_log_prob(z) + math.log(ratio), atol=3e-4)


# --- gradients, precision, single examples --------------------------------------------------------


def test_gradients_reach_data_and_parameters():
    sde = make_process("vp")

    def total(x, mean):
        form = gaussian(sde, mean[None], VARIANCE)
        return solve.log_likelihood(None, form.noise, sde, x, estimator="exact").log_prob.sum()

    by_x, by_mean = jax.jit(jax.grad(total, (0, 1)))(jnp.asarray(X), jnp.array(MEAN))
    # log p = -z^2/2 + const with z linear in x and in the mean.
    z, change = exact_code(sde, X.astype(np.float64), 0.0)
    scale = math.exp(change)
    np.testing.assert_allclose(by_x, -z * scale, rtol=1e-3, atol=1e-3)
    along_mean = float(sde.alpha(sde.t_max)) - scale * float(sde.alpha(sde.t_min))
    np.testing.assert_allclose(by_mean, np.sum(-z * along_mean), rtol=1e-3, atol=1e-3)


def test_reduced_precision_and_single_examples_are_the_same_solve():
    sde = make_process("vp")
    form = gaussian(sde, jnp.full(1, MEAN), VARIANCE)

    def single(x):
        return solve.log_likelihood(None, form.noise, sde, x, estimator="exact", event_ndim=1)

    x = jnp.asarray(X, jnp.bfloat16)
    out = jax.jit(jax.vmap(single))(x)
    assert out.log_prob.dtype == jnp.float32
    assert out.z.dtype == jnp.bfloat16
    whole = solver_of("vp")(x.astype(jnp.float32), 0.0)
    np.testing.assert_allclose(out.log_prob, whole.log_prob, atol=1e-5)
    np.testing.assert_array_equal(out.nfe, whole.nfe)


# --- failure -----------------------------------------------------------------------------------


def test_a_field_that_is_nan_gives_nan_quickly():
    out = solver_of("vp")(jnp.asarray(X), jnp.nan)
    assert np.isnan(out.log_prob).all()
    assert np.isnan(out.z).all()
    assert bool(jnp.all(out.result == diffrax.RESULTS.dt_min_reached))
    assert int(out.nfe.max()) < 200
    for code in coders():
        out = code(jnp.asarray(X), jnp.nan)
        assert np.isnan(out.x).all()
        assert bool(jnp.all(out.result != diffrax.RESULTS.successful))


def test_a_bad_example_leaves_the_others_alone():
    x = X.copy()
    x[1] = np.nan
    out = solver_of("vp")(jnp.asarray(x), 0.0)
    clean = solver_of("vp")(jnp.asarray(X), 0.0)
    np.testing.assert_allclose(out.log_prob[::2], clean.log_prob[::2], atol=1e-6)
    assert np.isnan(out.log_prob[1])
    assert int(out.nfe[1]) < 200


@pytest.mark.parametrize(
    "function", ["log_likelihood", "encode", pytest.param("decode", marks=pytest.mark.slow)]
)
def test_too_few_steps_give_nan(function):
    sde = make_process("vp")
    field = gaussian(sde, jnp.full(1, MEAN), VARIANCE).noise
    if function == "log_likelihood":
        out = solve.log_likelihood(None, field, sde, X, estimator="exact", max_steps=4)
        assert np.isnan(out.log_prob).all()
        assert np.isnan(out.z).all()
    else:
        out = getattr(solve, function)(field, sde, X, max_steps=4)
        assert np.isnan(out.x).all()
    assert bool(jnp.all(out.result == diffrax.RESULTS.max_steps_reached))
    np.testing.assert_array_equal(out.nfe, 3 + 6 * 4)


BAD = [
    (TypeError, "floating dtype", {"x": np.zeros((2, 1), np.int32)}),
    (TypeError, "floating dtype", {"x": np.zeros((2, 1), np.complex64)}),
    (TypeError, "typed key", {"key": jax.random.PRNGKey(0)}),
    (TypeError, "key is None", {"key": None}),
    (ValueError, "prediction", {"prediction": "epsilon"}),
    (ValueError, "estimator", {"estimator": "skilling"}),
    (ValueError, "noise", {"noise": "uniform"}),
    (ValueError, "rtol", {"rtol": 0.0}),
    (ValueError, "atol", {"atol": math.inf}),
    (ValueError, "max_steps", {"max_steps": 0}),
    (ValueError, "t_min", {"t_min": -0.5}),
    (ValueError, "t_max", {"t_max": 1.5}),
    (ValueError, "t_min < t_max", {"t_min": 0.8, "t_max": 0.3}),
    (TypeError, "solver", {"solver": diffrax.Kvaerno5()}),
    (TypeError, "solver", {"solver": "tsit5"}),
    (TypeError, "adjoint", {"adjoint": "direct"}),
    (ValueError, "event_ndim", {"event_ndim": 5}),
]


@pytest.mark.parametrize(("error", "words", "changed"), BAD)
def test_bad_input_names_the_argument(key, error, words, changed):
    arguments = {"key": key, "x": X} | changed
    sde = make_process("vp")
    with pytest.raises(error, match=words):
        solve.log_likelihood(field=lambda x, t: x, sde=sde, **arguments)


def test_a_field_of_another_shape_raises(key):
    with pytest.raises(ValueError, match="returned shape"):
        solve.log_likelihood(key, lambda x, t: x[:, :0], make_process("vp"), X)
    with pytest.raises(ValueError, match="returned shape"):
        solve.encode(lambda x, t: x[:, :0], make_process("vp"), X)


# --- integers and bits -------------------------------------------------------------------------


def test_dequantized_integers_fill_their_bins(key):
    k = jnp.broadcast_to(jnp.arange(17, dtype=jnp.uint8), (4000, 17))
    x = solve.dequantize(key, k, 17, data_range=(-1.0, 1.0))
    assert x.shape == (4000, 17)
    assert x.dtype == jnp.float32
    u = (np.asarray(x, np.float64) + 1) / 2 * 17 - np.arange(17)
    assert -1e-5 < u.min() < u.max() < 1 + 1e-5
    # The mean and variance of a uniform, to 5 standard errors.
    n = u.size
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
    assert abs(u.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    np.testing.assert_array_equal(x[:5], solve.dequantize(key, k[:5], 17, data_range=(-1.0, 1.0)))


def test_the_top_level_of_a_byte_is_in_range(key):
    x = solve.dequantize(key, jnp.full((2000,), 255, jnp.uint8), event_ndim=1)
    assert 255 / 256 <= float(x.min()) <= float(x.max()) <= 1


def test_values_beyond_the_levels(key):
    with pytest.raises(ValueError, match="integers has values"):
        solve.dequantize(key, np.array([[17]]), 17)
    run = jax.jit(lambda k: solve.dequantize(key, k, 17))
    np.testing.assert_array_equal(np.isnan(run(np.array([[17], [16], [-1]])))[:, 0], [1, 0, 1])
    error, _ = checkify.checkify(run)(np.array([[17]]))
    with pytest.raises(checkify.JaxRuntimeError, match="integers has values"):
        error.throw()


@pytest.mark.parametrize(
    ("levels", "data_range", "bits"),
    [(256, (0, 1), 8.0), (256, (-1, 1), 7.0), (17, (0, 1), math.log2(17)), (2, (0, 2), 0.0)],
)
def test_bits_of_a_uniform_density_over_the_range(levels, data_range, bits):
    # Density one: the bits are the number of levels per unit of length.
    assert float(solve.bits_per_dim(0.0, 5, levels, data_range)) == pytest.approx(bits, abs=1e-6)
    shifted = solve.bits_per_dim(jnp.array([-5 * math.log(2)]), 5, levels, data_range)
    np.testing.assert_allclose(shifted, [bits + 1], atol=1e-5)


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (TypeError, "log_prob", (np.array([3]), 5, 256, (0, 1))),
        (ValueError, "dims", (0.0, 0, 256, (0, 1))),
        (ValueError, "levels", (0.0, 5, 1, (0, 1))),
        (ValueError, "data_range", (0.0, 5, 256, None)),
        (ValueError, "data_range", (0.0, 5, 256, (1, 0))),
    ],
)
def test_bits_refuse_bad_input(error, words, arguments):
    with pytest.raises(error, match=words):
        solve.bits_per_dim(*arguments)


def test_dequantize_refuses_floats(key):
    with pytest.raises(TypeError, match="integer dtype"):
        solve.dequantize(key, np.zeros((2, 3)))
