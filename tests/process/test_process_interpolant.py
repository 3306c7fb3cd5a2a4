"""Interpolants: coefficients, draws, curves of one's own, splines, errors; couplings of a batch."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from scipy.optimize import linear_sum_assignment

from jaxgen.process.coupling import minibatch_coupling
from jaxgen.process.interpolant import GAMMAS, INTERPOLANTS, Interpolant, interpolant
from jaxgen.process.spline_interpolant import spline, spline_interpolant

# A few roundings in float32 of numbers of order one.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}

KINDS = {name: interpolant(name) for name in INTERPOLANTS}
TIMES = np.array([0.0, 0.1, 0.3, 0.45, 0.8, 1.0], np.float32)


def _falling(t, *params):
    del params
    return 1 - t


def _rising(t, *params):
    del params
    return t


def _brownian2(t, *params):
    del params
    return t * (1 - t)


def _quadratic2(t, *params):
    del params
    return (t * (1 - t)) ** 2


def _curved(t, x0, x1):
    return (1 - t) * x0 + t * x1 + jnp.sin(jnp.pi * t) * x0 * x1


@jax.jit
def _rates(kinds, t):
    return {
        name: (interp.rates(t), interp.gamma_dot(t), interp.noise_rates(t))
        for name, interp in kinds.items()
    }


# alpha and beta, written down anew; gamma is below.
_COEFFICIENTS = {
    "linear": (lambda t: 1 - t, lambda t: t),
    "trig": (
        lambda t: np.cos(np.pi * t / 2) * np.sqrt(1 - t * (1 - t)),
        lambda t: np.sin(np.pi * t / 2) * np.sqrt(1 - t * (1 - t)),
    ),
    "encoder_decoder": (
        lambda t: np.where(t < 0.5, np.cos(np.pi * t) ** 2, 0),
        lambda t: np.where(t > 0.5, np.cos(np.pi * t) ** 2, 0),
    ),
    "mirror": (lambda t: 0 * t, lambda t: 1 + 0 * t),
    "one_sided_linear": (lambda t: 1 - t, lambda t: t),
    "one_sided_trig": (lambda t: np.cos(np.pi * t / 2), lambda t: np.sin(np.pi * t / 2)),
    "score_based": (lambda t: np.sqrt(1 - t**2), lambda t: t),
}
_GAMMAS = {
    "brownian": lambda t: np.sqrt(t * (1 - t)),
    "quadratic": lambda t: t * (1 - t),
    "sine_squared": lambda t: np.sin(np.pi * t) ** 2,
    "zero": lambda t: 0 * t,
}


def _slope(function, t, h=1e-5):
    return (function(t + h) - function(t - h)) / (2 * h)


def test_coefficients_and_their_derivatives():
    out = _rates(KINDS, jnp.asarray(TIMES))
    t, inside = TIMES.astype(np.float64), slice(1, -1)
    for name, (r, gamma_dot, (level, product)) in out.items():
        alpha, beta = _COEFFICIENTS[name]
        gamma = _GAMMAS[INTERPOLANTS[name][2]]
        for value, function in ((r.alpha, alpha), (r.beta, beta), (r.gamma, gamma)):
            np.testing.assert_allclose(value, function(t), **TOLERANCE, err_msg=name)
        smooth = (r.alpha_dot, alpha), (r.beta_dot, beta), (gamma_dot, gamma)
        for value, function in smooth:
            # The second difference of the closed form is good to 1e-8.
            np.testing.assert_allclose(
                value[inside], _slope(function, t[inside]), rtol=1e-5, atol=1e-5, err_msg=name
            )
        np.testing.assert_allclose(
            r.gamma_gamma_dot[inside], (r.gamma * gamma_dot)[inside], **TOLERANCE
        )
        noise = alpha if KINDS[name].one_sided else gamma
        np.testing.assert_allclose(level, noise(t), **TOLERANCE)
        square = lambda s, noise=noise: noise(s) ** 2  # noqa: E731
        np.testing.assert_allclose(
            product[inside], 0.5 * _slope(square, t[inside]), rtol=1e-5, atol=1e-5, err_msg=name
        )
        for value in (*r[:3], *r[4:], level, product):
            assert np.isfinite(value).all(), name


def test_ends_of_time_where_a_derivative_is_infinite():
    gammas = ("quadratic", "sine_squared", "zero")
    kinds = KINDS | {gamma: interpolant("linear", gamma=gamma) for gamma in gammas}
    out = jax.tree.map(lambda v: v[jnp.array([0, -1])], _rates(kinds, jnp.asarray(TIMES)))
    np.testing.assert_array_equal(out["linear"][1], [np.inf, -np.inf])
    np.testing.assert_array_equal(out["linear"][0].gamma_gamma_dot, [0.5, -0.5])
    assert float(out["score_based"][0].alpha_dot[1]) == -np.inf
    np.testing.assert_array_equal(out["score_based"][2][1], [0.0, -1.0])
    for gamma in gammas:
        expected = [1.0, -1.0] if gamma == "quadratic" else [0.0, 0.0]
        np.testing.assert_allclose(out[gamma][1], expected, atol=1e-6)
    # Of one's own gamma^2 the slope of the root comes from the second derivative.
    own = Interpolant(_falling, _rising, _quadratic2)
    np.testing.assert_allclose(own.gamma_dot(jnp.array([0.0, 1.0])), [1.0, -1.0], rtol=1e-5)


def test_a_negative_scale_is_nan_where_it_is_traced():
    gamma = jax.jit(lambda a: interpolant("linear", a).gamma(0.5))(-1.0)
    assert np.isnan(gamma)


@pytest.mark.parametrize("gamma", [g for g in GAMMAS if g != "zero"])
def test_the_scale_multiplies_the_square_of_gamma(gamma):
    one, three = (interpolant("linear", a, gamma) for a in (1.0, 3.0))
    t = jnp.array([0.2, 0.5])
    np.testing.assert_allclose(three.gamma(t) ** 2, 3 * one.gamma(t) ** 2, rtol=1e-6)
    np.testing.assert_allclose(three.gamma_gamma_dot(t), 3 * one.gamma_gamma_dot(t), rtol=1e-5)


def test_a_sweep_over_the_scale_compiles_once_and_has_a_gradient():
    traces = []

    @jax.jit
    def middle(interp):
        traces.append(None)
        return interp.gamma(0.5)

    values = [float(middle(interpolant("linear", a))) for a in (1.0, 2.0, 4.0)]
    np.testing.assert_allclose(values, np.sqrt([0.25, 0.5, 1.0]), rtol=1e-6)
    assert len(traces) == 1
    slope = jax.grad(lambda a: interpolant("linear", a).gamma(0.5))(4.0)
    np.testing.assert_allclose(slope, 0.5**2 / (2 * 1.0), rtol=1e-6)


@jax.jit
def _draw(key, interp, x0, x1, t):
    return interp.draw(key, x0, x1, t)


def test_draws_are_the_path_and_per_example(key):
    interp = KINDS["trig"]
    x0, x1 = jnp.linspace(-1, 1, 12).reshape(4, 3), jnp.linspace(3, 2, 12).reshape(4, 3)
    t = jnp.array([0.0, 0.3, 0.6, 1.0])

    @jax.jit
    def forms(key, x0, x1, t):
        whole = interp.draw(key, x0, x1, t)
        return {
            "whole": whole,
            "path": interp.path(x0, x1, whole[1], t),
            "first": interp.draw(key, x0[:2], x1[:2], t[:2]),
            "one": interp.draw(jax.random.fold_in(key, 2), x0[2], x1[2], t[2], event_ndim=1),
            "mapped": jax.vmap(lambda t: interp.draw(key, x0, x1, t)[0])(t),
            "rates": interp.rates(t),
        }

    out = forms(key, x0, x1, t)
    (x_t, z, slope), r = out["whole"], jax.tree.map(lambda v: np.asarray(v)[:, None], out["rates"])
    np.testing.assert_allclose(x_t, r.alpha * x0 + r.beta * x1 + r.gamma * z, **TOLERANCE)
    np.testing.assert_allclose(slope, r.alpha_dot * x0 + r.beta_dot * x1, **TOLERANCE)
    np.testing.assert_allclose(x_t[0], x0[0], **TOLERANCE)
    np.testing.assert_allclose(x_t[3], x1[3], **TOLERANCE)
    np.testing.assert_allclose(out["path"], x_t, **TOLERANCE)
    np.testing.assert_allclose(out["first"][0], x_t[:2], **TOLERANCE)
    np.testing.assert_allclose(out["one"][0], x_t[2], **TOLERANCE)
    np.testing.assert_array_equal(out["one"][1], z[2])
    np.testing.assert_allclose(out["mapped"][2, 2], x_t[2], **TOLERANCE)
    low = _draw(key, interp, x0.astype(jnp.bfloat16), x1.astype(jnp.bfloat16), t)
    assert all(v.dtype == jnp.bfloat16 for v in low)


def test_one_sided_and_mirror_need_no_first_end(key):
    x1 = jnp.ones((5, 2))
    x_t, z, slope = _draw(key, KINDS["one_sided_linear"], None, x1, 0.25)
    np.testing.assert_allclose(x_t, 0.75 * z + 0.25, **TOLERANCE)
    np.testing.assert_allclose(slope, 1 - z, **TOLERANCE)
    x0 = 2 * jnp.ones((5, 2))
    np.testing.assert_array_equal(_draw(key, KINDS["one_sided_linear"], x0, x1, 0.5)[1], x0)
    x_t, z, slope = _draw(key, KINDS["mirror"], None, x1, 0.5)
    np.testing.assert_allclose(x_t, 1 + 0.5 * z, **TOLERANCE)
    np.testing.assert_array_equal(slope, jnp.zeros_like(x1))


def test_known_laws_in_the_middle(key):
    r = _rates(KINDS, jnp.asarray(TIMES))["trig"][0]
    np.testing.assert_allclose(r.alpha**2 + r.beta**2 + r.gamma**2, 1.0, rtol=1e-6)
    # The encoder-decoder forgets the data half-way, exactly.
    x0 = 7 * jnp.ones((5, 2))
    x_t, z, _ = _draw(key, KINDS["encoder_decoder"], x0, x0, 0.5)
    np.testing.assert_allclose(x_t, z, **TOLERANCE)


def test_a_curve_of_ones_own(key):
    interp = interpolant(_curved, a=2.0)
    x0, x1 = jnp.linspace(-1, 1, 8).reshape(4, 2), jnp.linspace(2, 3, 8).reshape(4, 2)
    t = jnp.array([0.0, 0.25, 0.5, 1.0])
    x_t, z, slope = _draw(key, interp, x0, x1, t)
    s = np.asarray(t)[:, None]
    expected = x1 - x0 + np.pi * np.cos(np.pi * s) * x0 * x1
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        x_t, _curved(s, x0, x1) + np.sqrt(2 * s * (1 - s)) * z, rtol=1e-5, atol=1e-5
    )
    one = interp.draw(key, x0[1], x1[1], t[1], event_ndim=1)[2]
    np.testing.assert_allclose(one, expected[1], rtol=1e-5)
    with pytest.raises(ValueError, match="path_fn"):
        interp.alpha(0.5)


def test_times_out_of_range_are_nan_and_seen_by_checkify():
    interp = KINDS["linear"]
    assert np.isnan(interp.alpha(jnp.array([-0.1, 1.1]))).all()
    assert np.isnan(interp.position(jnp.ones(2), jnp.ones(2), 1.2)[0]).all()
    assert np.isnan(KINDS["mirror"].beta(2.0))
    checked = checkify.checkify(jax.jit(interp.gamma), errors=checkify.user_checks)
    error, _ = checked(jnp.asarray(1.5))
    with pytest.raises(checkify.JaxRuntimeError, match="outside"):
        error.throw()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: interpolant("circle"), "name is 'circle'"),
        (lambda: interpolant("linear", gamma="square"), "gamma is 'square'"),
        (lambda: interpolant("linear", a=-1.0), "a is -1.0"),
        (lambda: interpolant("linear", a=2.0, gamma="zero"), "has no scale"),
        (lambda: interpolant("trig", a=4.0), "gamma reaches 1 "),
        (lambda: interpolant("trig", gamma="sine_squared"), "less than 1"),
        (lambda: interpolant("one_sided_trig", gamma="brownian"), "x0 is the noise"),
        (lambda: interpolant("mirror", gamma="zero"), "nothing would move"),
        (lambda: Interpolant(_falling, _rising, _rising), "gamma2_fn is 1 at t = 1"),
        (lambda: Interpolant(_rising, _falling, _brownian2), "alpha_fn is 0 at t = 0"),
        (lambda: Interpolant(_falling, None), "either alpha_fn and beta_fn, or path_fn"),
        (lambda: Interpolant(_falling, _rising, _brownian2, one_sided=True), "one_sided"),
        (lambda: interpolant("linear").ends(jnp.ones(2), jnp.ones(3)), "expected the same"),
        (lambda: interpolant("linear").ends(None, jnp.ones(3)), "x0 is None"),
        (lambda: interpolant("linear").path(jnp.ones(2), jnp.ones(2), None, 0.5), "noise"),
        (lambda: interpolant("linear", np.float32(-1.0)), "a is -1"),
        (lambda: interpolant("linear", jnp.asarray(-1.0)), "a is -1"),
        (lambda: interpolant("linear", jnp.ones(2)), "a has shape"),
        (lambda: spline_interpolant(jnp.ones(3), jnp.ones(4), jnp.ones(4)), "n >= 4"),
        (lambda: spline(0.5, jnp.ones((4, 2))), "n >= 4"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_types(key):
    with pytest.raises(TypeError, match="expected a function"):
        Interpolant(1.0, _rising)
    with pytest.raises(TypeError, match="x1 has dtype int32"):
        KINDS["linear"].draw(key, jnp.ones((2, 2)), jnp.ones((2, 2), int), 0.5)
    with pytest.raises(TypeError, match="typed key"):
        KINDS["linear"].draw(jax.random.PRNGKey(0), jnp.ones((2, 2)), jnp.ones((2, 2)), 0.5)
    with pytest.raises(ValueError, match="t has shape"):
        KINDS["linear"].draw(key, jnp.ones((2, 2)), jnp.ones((2, 2)), jnp.ones(3))


def test_splines_reproduce_cubics_and_keep_the_ends():
    # The B-spline coefficients of t^3 with one interval are its polar values at four knots.
    knots = np.array([[-2.0, -1, 0], [-1, 0, 1], [0, 1, 2], [1, 2, 3]], np.float32)

    @jax.jit
    def forms(t):
        linear = spline_interpolant(*[jnp.zeros(5)] * 2, jnp.full(5, np.log(2.0)))
        wild = spline_interpolant(jnp.arange(5.0), -jnp.arange(4.0), jnp.arange(6.0))
        return {
            "cube": spline(t, jnp.asarray(knots.prod(1))),
            "constant": spline(t, jnp.full(7, 2.5)),
            "linear": (linear.rates(t), interpolant("linear", 2.0).rates(t)),
            "wild": wild.rates(jnp.array([0.0, 1.0])),
            "slope": jax.grad(lambda interp: interp.gamma_gamma_dot(0.3))(wild).params[2],
        }

    t = np.linspace(0, 1, 9, dtype=np.float32)
    out = forms(t)
    np.testing.assert_allclose(out["cube"], t**3, atol=1e-6)
    np.testing.assert_allclose(out["constant"], 2.5, rtol=1e-6)
    for value, wanted in zip(*out["linear"], strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out["wild"].alpha, [1.0, 0.0])
    np.testing.assert_array_equal(out["wild"].beta, [0.0, 1.0])
    np.testing.assert_array_equal(out["wild"].gamma, [0.0, 0.0])
    assert np.isfinite(out["slope"]).all() and np.abs(out["slope"]).max() > 0


# --- couplings --------------------------------------------------------------------------------


def test_exact_coupling_is_the_best_assignment(key):
    key0, key1 = jax.random.split(key)
    x0 = jax.random.normal(key0, (2, 16, 2, 3))
    x1 = 1 + jax.random.normal(key1, (2, 16, 2, 3))
    out = jax.jit(jax.vmap(lambda a, b: minibatch_coupling(None, a, b)))(x0, x1)
    for a, b, paired, partner in zip(x0, x1, out.x1, out.partner, strict=True):
        cost = np.sum((np.asarray(a)[:, None] - np.asarray(b)[None]) ** 2, axis=(2, 3))
        rows, columns = linear_sum_assignment(cost)
        np.testing.assert_array_equal(partner, columns[np.argsort(rows)])
        np.testing.assert_array_equal(paired, b[partner])
    # A common shift, far above the distances, leaves the pairing as it is.
    far = jax.jit(lambda a, b: minibatch_coupling(None, a, b))(x0[0] + 1e3, x1[0] + 1e3)
    np.testing.assert_array_equal(far.partner, out.partner[0])
    # Nothing plausible comes of NaN.
    bad = jax.jit(lambda a, b: minibatch_coupling(None, a, b))(x0[0].at[3].set(jnp.nan), x1[0])
    assert np.isnan(bad.x1).all() and (np.asarray(bad.partner) == 16).all()


def test_coupling_errors(key):
    x = jnp.ones((3, 2))
    with pytest.raises(ValueError, match="method is 'best'"):
        minibatch_coupling(key, x, x, method="best")
    with pytest.raises(ValueError, match="x0 has shape"):
        minibatch_coupling(key, x, jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="epsilon"):
        minibatch_coupling(key, x, x, epsilon=0.1)
    with pytest.raises(TypeError, match="typed key"):
        minibatch_coupling(None, x, x, method="sinkhorn")


def test_sinkhorn_coupling(key):
    key0, key1 = jax.random.split(key)
    x0, x1 = jax.random.normal(key0, (64, 1)), 3 + jax.random.normal(key1, (64, 1))
    couple = jax.jit(
        lambda key, a, b: minibatch_coupling(key, a, b, method="sinkhorn", epsilon=0.1)
    )
    if importlib.util.find_spec("ott") is None:
        with pytest.raises(ImportError, match="jaxgen\\[ot\\]"):
            couple(key, x0, x1)
        return
    out = couple(key, x0, x1)
    np.testing.assert_array_equal(out.x1, x1[out.partner])
    # In one dimension the best pairing sorts both: the drawn one is within the entropy of it.
    best = float(np.mean((np.sort(x0[:, 0]) - np.sort(x1[:, 0])) ** 2))
    drawn = float(jnp.mean((out.x1 - x0) ** 2))
    independent = float(jnp.mean((x1[:, 0][None] - x0) ** 2))
    assert drawn < best + 0.15 * (independent - best), (best, drawn, independent)
