"""Fokker-Planck residuals: zero on exact densities, known on wrong ones; unbiased estimates."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jaxgen import process, score
from jaxgen.nets.potential import PotentialMLP, softplus
from jaxgen.process import LinearSDE
from jaxgen.score import fokker_planck as fp

MEANS = [[-1.0, 0.5, 0.0], [1.2, 0.0, -0.7], [0.0, -1.5, 1.0], [0.4, 0.9, 0.3]]
COVS = [
    np.diag([0.3, 0.5, 0.2]),
    [[0.6, 0.2, 0.0], [0.2, 0.4, -0.1], [0.0, -0.1, 0.5]],
    np.eye(3) * 0.25,
    np.diag([1.0, 0.1, 0.4]),
]
WEIGHTS = [0.1, 0.4, 0.3, 0.2]


def _log_alpha(t):
    return -t


def _sigma(t):
    return jnp.sqrt(-jnp.expm1(-2 * t) / 2)


def ornstein_uhlenbeck(t_max=1.0):
    """f = -x, g = 1, the process of the published experiments."""
    return LinearSDE(_log_alpha, _sigma, t_min=1e-5, t_max=t_max, prior_std=0.5**0.5)


PROCESSES = {
    "ou": ornstein_uhlenbeck,
    "vp": process.vp,
    "sub_vp": process.sub_vp,
    "ve": lambda: process.ve(0.05, 5.0),
}


def truth(sde, dtype=jnp.float32):
    return score.closed_form.mixture(
        sde, jnp.asarray(WEIGHTS, dtype), jnp.asarray(MEANS, dtype), jnp.asarray(COVS, dtype)
    )


@jax.jit
def residuals(form, x, t):
    r = fp.log_density_residual(form.log_prob, form.sde)(x, t)
    rate = score.derivatives.scalar_derivatives(form.log_prob, x, t).in_time
    return r, rate, fp.score_residual(form.score, form.sde)(x, t)


def points(sde, dtype):
    x = jax.random.normal(jax.random.key(1), (9, 3), dtype) * 1.5
    return x, jnp.repeat(jnp.asarray([0.05, 0.3, 0.9], dtype), 3)


@pytest.mark.parametrize("name", PROCESSES)
def test_residuals_vanish_on_exact_densities(name):
    for wide in (True, False):
        with jax.enable_x64(wide):
            dtype = jnp.float64 if wide else jnp.float32
            sde = PROCESSES[name]()
            x, t = points(sde, dtype)
            r, rate, s = residuals(truth(sde, dtype), x, t)
            assert r.dtype == dtype and s.shape == x.shape
            if wide:
                assert np.abs(r).max() < 1e-8 and np.abs(s).max() < 1e-8
            else:
                assert (np.abs(r) < 2e-4 * (1 + np.abs(rate))).all()
                assert (np.abs(s) < 2e-3 * (1 + np.abs(rate))[:, None]).all()


T = 5.0


def wrong(x, t, delta=0.2):
    """log N(x; 0, c) with c = c0 (1 + delta sin^2(3 pi t/T)), c0 = 1/2 + exp(-2t)."""
    c = (0.5 + jnp.exp(-2 * t)) * (1 + delta * jnp.sin(3 * jnp.pi * t / T) ** 2)
    return jnp.sum(-(x**2) / (2 * (c[..., None])) - 0.5 * jnp.log(2 * jnp.pi * c[..., None]), -1)


def drifting(x, t):
    """The wrong one with a function of time on top, whose derivative is cos t."""
    return wrong(x, t) + jnp.sin(t)


def test_residual_of_a_wrong_density_is_the_known_one():
    sde = ornstein_uhlenbeck(T)
    r = jax.jit(fp.log_density_residual(wrong, sde))
    found = r(jnp.asarray([[0.7]]), jnp.asarray([1.3]))
    np.testing.assert_allclose(found, [0.0223119], rtol=1e-4)
    one = fp.log_density_residual(wrong, sde, event_ndim=1)(jnp.asarray([0.7]), 1.3)
    np.testing.assert_allclose(one, found[0], rtol=1e-5)
    # What time alone adds is its derivative; the score does not see it.
    shifted = fp.log_density_residual(drifting, sde)(jnp.asarray([[0.7]]), jnp.asarray([1.3]))
    np.testing.assert_allclose(shifted - found, np.cos(1.3), rtol=1e-4)
    x, t = jnp.asarray([[0.7], [-0.2]]), jnp.asarray([1.3, 0.4])
    through_score = jax.jit(fp.score_residual(fp.potential_score(wrong), sde))(x, t)
    slope = jax.grad(lambda x: r(x, t).sum())(x)
    np.testing.assert_allclose(through_score, slope, rtol=1e-4, atol=1e-6)
    # rms over t and N(0, c), as tabulated for delta = 0.2.
    t = jnp.linspace(1e-4, T, 2001)
    c = (0.5 + jnp.exp(-2 * t)) * (1 + 0.2 * jnp.sin(3 * jnp.pi * t / T) ** 2)
    # E[(x^2/c - 1)^2] = 2, so that one x with x^2/c - 1 = sqrt 2 gives the mean square.
    x = jnp.sqrt(c * (1 + 2**0.5))[:, None]
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(r(x, t) ** 2)), 0.214947, rtol=1e-3)


@jax.jit
def estimates(keys, x, t):
    sde = process.vp()
    residual = fp.log_density_residual(cubic, sde, laplacian="hutchinson")
    one = jax.vmap(lambda k: residual(x, t, k))(keys)
    options = {"laplacian": "hutchinson", "probe": "gaussian"}
    square = jax.vmap(lambda k: fp.penalty(k, cubic, sde, x, t, **options))(keys)
    spread = jax.vmap(lambda k: fp.penalty(k, cubic, sde, x, t[0], centred=True, **options))(keys)
    score_of = fp.score_residual(fp.potential_score(cubic), sde, **options)
    return one, square, spread, jax.vmap(lambda k: score_of(x, t, k))(keys)


def cubic(x, t):
    """Its Hessian is full and depends on x."""
    return jnp.sum(x, -1) ** 3 / 9 + jnp.prod(x, -1) * t - 0.5 * jnp.sum(x**2, -1)


def test_estimates_are_unbiased_and_so_is_the_square_by_two_probes():
    x = 0.5 * jax.random.normal(jax.random.key(5), (4, 3))
    t = jnp.full((4,), 0.4)
    sde = process.vp()
    exact, gradient, square_of_all = jax.jit(
        lambda x: (
            fp.log_density_residual(cubic, sde)(x, t),
            fp.score_residual(fp.potential_score(cubic), sde)(x, t),
            fp.penalty(None, cubic, sde, x, t),
        )
    )(x)
    n = 4000
    one, square, spread, of_score = estimates(jax.random.split(jax.random.key(2), n), x, t)
    for found, known in (
        (one, exact),
        (square, jnp.mean(exact**2)),
        (spread, jnp.var(exact, ddof=1)),
        (of_score, gradient),
    ):
        error = np.asarray(found).std(0) / n**0.5
        assert (np.abs(found.mean(0) - known) < 4 * error + 1e-4).all()
    # One probe squared is off by its variance, five standard errors and more.
    naive = np.asarray(one**2).mean(1)
    assert naive.mean() - np.mean(exact**2) > 5 * naive.std() / n**0.5
    np.testing.assert_allclose(square_of_all, np.mean(exact**2), rtol=1e-5)


def test_penalty_by_power_weighting_and_centre():
    sde = ornstein_uhlenbeck(T)
    x = jnp.linspace(-2, 2, 7)[:, None]
    t = jnp.full((7,), 1.3)
    r = np.asarray(fp.log_density_residual(drifting, sde)(x, t))
    take = functools.partial(fp.penalty, None, drifting, sde, x)
    np.testing.assert_allclose(take(t, power=1), np.abs(r).mean(), rtol=1e-5)
    np.testing.assert_allclose(take(t, power=3), (np.abs(r) ** 3).mean(), rtol=1e-5)
    known = fp.log_density_residual(wrong, sde)(x, t)
    np.testing.assert_allclose(take(1.3, centred=True), np.var(known, ddof=1), rtol=1e-3)
    # Per log noise level R does not know the clock: OU at t is VP's marginal, times 1/sqrt 2.
    level = fp.per_log_level(t, sde)
    rates = sde.rates(t)
    slope = rates.sigma_dot / rates.sigma - rates.alpha_dot / rates.alpha
    np.testing.assert_allclose(level, 1 / slope**2, rtol=1e-5)
    found = take(t, weighting=fp.per_log_level)
    np.testing.assert_allclose(found, (r**2 / slope**2).mean(), rtol=1e-5)
    slow = LinearSDE(_slow_log_alpha, _slow_sigma, t_min=1e-5, t_max=2 * T)
    again = fp.penalty(
        None, lambda x, t: drifting(x, t / 2), slow, x, 2 * t, weighting=fp.per_log_level
    )
    np.testing.assert_allclose(again, found, rtol=1e-3)


def _slow_log_alpha(t):
    return _log_alpha(t / 2)


def _slow_sigma(t):
    return _sigma(t / 2)


def test_collocation_points_lie_where_they_should():
    key = jax.random.key(0)
    low, high = jnp.asarray([-1.0, 2.0]), jnp.asarray([1.0, 3.0])
    x, t = jax.jit(lambda k: fp.collocation_box(k, 4000, low, high, 1e-5, 10.0))(key)
    assert ((x >= low[None]) & (x <= high[None])).all() and (t >= 1e-5).all() and (t <= 10).all()
    width = (high - low) / np.sqrt(12 * 4000)
    assert (np.abs(x.mean(0) - np.array([0.0, 2.5])) < 4 * width).all()
    assert abs(t.mean() - 5) < 4 * 10 / np.sqrt(12 * 4000)
    few = fp.collocation_box(key, 3, low, high, 1e-5, 10.0)
    np.testing.assert_allclose(few[0], x[:3], rtol=1e-6)

    sde = process.vp()
    x0 = jnp.asarray([[3.0, -1.0], [5.0, 1.0]])
    x, t = jax.jit(lambda k: fp.collocation_paths(k, x0, sde, 4000, time="importance"))(key)
    assert x.shape == (4000, 2) and t.shape == (4000,)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    centred = (x - alpha[:, None] * jnp.asarray([[4.0, 0.0]])) / jnp.sqrt(alpha**2 + sigma**2)[
        :, None
    ]
    assert (np.abs(centred.mean(0)) < 4 / np.sqrt(4000)).all()
    np.testing.assert_allclose(np.square(centred).mean(), 1.0, atol=4 * np.sqrt(2 / 8000))
    level = np.asarray(sde.log_snr(t))
    top, bottom = float(sde.log_snr(sde.t_min)), float(sde.log_snr(1.0))
    assert abs(level.mean() - (top + bottom) / 2) < 4 * (top - bottom) / np.sqrt(12 * 4000)


def test_loss_is_denoising_plus_the_weighted_penalty_and_trains_under_vmap():
    sde = process.vp()
    key, x0 = jax.random.key(4), jax.random.normal(jax.random.key(1), (6, 2))
    box = functools.partial(
        fp.collocation_box, n=5, low=[-2.0, -2.0], high=[2.0, 2.0], t_min=1e-3, t_max=1.0
    )

    def loss(weight, shape=1.0):
        return fp.regularised_loss(
            key, lambda x, t: shape * wrong(x, t), sde, x0, weight=weight,
            collocation=lambda k, x: box(k),
        )  # fmt: skip

    plain, *with_penalty = jax.jit(lambda: (loss(0), loss(0.5), loss(2.0)))()
    key_loss, key_points, _ = jax.random.split(key, 3)
    bare = score.denoising_loss(key_loss, fp.potential_score(wrong), sde, x0, prediction="score")
    np.testing.assert_allclose(plain, bare, rtol=1e-5)
    extra = fp.penalty(None, wrong, sde, *box(key_points))
    for weight, found in zip((0.5, 2.0), with_penalty, strict=True):
        np.testing.assert_allclose(found, bare + weight * extra, rtol=1e-5)
    mapped = jax.jit(jax.vmap(lambda w: loss(w)))(jnp.asarray([0.0, 0.5]))
    np.testing.assert_allclose(mapped, jnp.stack([plain, with_penalty[0]]), rtol=1e-5)
    # Third-order derivatives: the gradient of the penalty against a difference quotient.
    f = jax.jit(lambda a: loss(2.0, a).mean())
    slope = jax.jit(jax.grad(f))(1.0)
    np.testing.assert_allclose(slope, (f(1.01) - f(0.99)) / 0.02, rtol=1e-3)


def test_points_of_the_data_are_the_default():
    sde = process.vp()
    x0 = jax.random.normal(jax.random.key(1), (6, 2))
    key = jax.random.key(4)
    loss = fp.regularised_loss(key, wrong, sde, x0, weight=1.0, time="importance")
    bare = fp.regularised_loss(key, wrong, sde, x0, weight=0, time="importance")
    _, key_points, _ = jax.random.split(key, 3)
    at = fp.collocation_paths(key_points, x0, sde, 6, time="importance")
    np.testing.assert_allclose(loss - bare, fp.penalty(None, wrong, sde, *at), rtol=1e-4)


def relu(x, t):
    return jnp.sum(jnp.abs(x - 0.3), axis=-1) * t


def test_piecewise_linear_potentials_are_found_out():
    x, t = jax.random.normal(jax.random.key(1), (6, 2)), jnp.full((6,), 0.5)
    with pytest.raises(ValueError, match="Laplacian of u is zero at every point"):
        fp.check_curvature(relu, x, t)
    assert fp.check_curvature(wrong, x, t) > 0.1
    assert np.isnan(jax.jit(lambda x, t: fp.check_curvature(relu, x, t))(x, t))
    checked = checkify.checkify(jax.jit(lambda x, t: fp.check_curvature(relu, x, t)))
    with pytest.raises(checkify.JaxRuntimeError, match="Laplacian of u is zero"):
        checked(x, t)[0].throw()


def test_a_residual_that_is_no_number_spreads_and_is_reported():
    sde, x, t = process.vp(), jnp.ones((3, 2)), jnp.full((3,), 0.5)
    assert np.isnan(fp.penalty(None, lambda x, t: wrong(x, t) * jnp.nan, sde, x, t))
    bad = jnp.asarray([0.5, jnp.nan, 0.5])
    checked = checkify.checkify(jax.jit(lambda t: fp.penalty(None, wrong, sde, x, t)))
    with pytest.raises(checkify.JaxRuntimeError):
        checked(bad)[0].throw()
    assert np.isnan(fp.penalty(None, wrong, sde, x, bad))


def test_potential_score_on_batches_and_on_one_example():
    x, t = jax.random.normal(jax.random.key(1), (3, 3)), jnp.asarray([0.2, 0.5, 0.9])
    form = truth(process.vp())
    field = jax.jit(fp.potential_score(form.log_prob))
    np.testing.assert_allclose(field(x, t), form.score(x, t), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(field(x[1], t[1]), form.score(x[1], t[1]), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(field(x, 0.5), form.score(x, 0.5), rtol=1e-3, atol=1e-4)
    low = fp.potential_score(cubic)(x.astype(jnp.bfloat16), t[:, None][:, 0])
    assert low.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", PROCESSES)
def test_a_vanishing_network_is_gaussian_data_under_every_process(name):
    sde = dataclasses.replace(PROCESSES[name](), mu=jnp.asarray([0.5, -1.0]))
    u = fp.precondition_potential(lambda x, t: 0 * t, sde, 1.3)
    x = 3 * jax.random.normal(jax.random.key(1), (6, 2))
    t = jnp.asarray([0.01, 0.1, 0.3, 0.6, 0.9, 1.0])
    form = score.closed_form.gaussian(sde, sde.mu, 1.3**2)
    ours, true, alone = jax.jit(lambda x, t: (u(x, t), form.log_prob(x, t), jax.vmap(u)(x, t)))(
        x, t
    )
    np.testing.assert_allclose(ours - np.log(2 * np.pi), true, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(alone, ours, rtol=1e-5)


def test_a_network_sees_numbers_of_order_one_and_its_score_is_conservative():
    net, sde = PotentialMLP(width=8, depth=2, activation=softplus(5.0)), process.ve()
    seen = []

    def spy(x, t):
        seen.append((x, t))
        return net.apply(params, x, t)

    x, t = 40 * jax.random.normal(jax.random.key(1), (64, 2)), jnp.full((64,), 0.97)
    params = net.init(jax.random.key(0), x, t)
    u = fp.precondition_potential(spy, sde, 1.0)
    u(x, t)
    scaled, level = seen[0]
    assert 0.8 < scaled.std() < 1.4 and (np.abs(level) < 2).all()
    assert fp.check_curvature(u, x, t) > 0
    jacobian = jax.jacfwd(lambda y: fp.potential_score(u)(y[None], t[:1])[0])(x[0])
    np.testing.assert_allclose(jacobian, jacobian.T, rtol=1e-4, atol=1e-7)
    assert net.apply(params, x, t).shape == (64,)
    assert softplus() is softplus(100) is softplus(sharpness=100.0)
    np.testing.assert_allclose(
        softplus(100.0)(jnp.asarray([-1.0, 0.0, 1.0])), [0.0, np.log(2) / 100, 1.0], atol=1e-6
    )
    with pytest.raises(ValueError, match="sharpness is 0"):
        softplus(0)
    with pytest.raises(ValueError, match="label"):
        net.apply(params, x, t, jnp.zeros(64, int))


def test_bad_input_is_named():
    sde, key = process.vp(), jax.random.key(0)
    x, t = jnp.ones((4, 2)), jnp.full((4,), 0.5)
    vector = lambda x, t: -x  # noqa: E731
    for call in (
        lambda: fp.log_density_residual(vector, sde)(x, t),
        lambda: fp.potential_score(vector)(x, t),
        lambda: fp.penalty(None, vector, sde, x, t),
        lambda: fp.check_curvature(vector, x, t),
        lambda: fp.potential_score(vector)(x[0], t[0]),
    ):
        with pytest.raises(ValueError, match="see score_residual"):
            call()
    with pytest.raises(ValueError, match=r"u\(x, t\) returned shape \(\)"):
        fp.log_density_residual(lambda x, t: jnp.sum(x), sde)(x, t)
    with pytest.raises(TypeError, match=r"u\(x, t\) has dtype int32"):
        fp.potential_score(lambda x, t: jnp.ones(4, int))(x, t)
    with pytest.raises(ValueError, match="laplacian is 'trace'; expected one of exact"):
        fp.log_density_residual(wrong, sde, laplacian="trace")
    with pytest.raises(ValueError, match="key is None"):
        fp.log_density_residual(wrong, sde, laplacian="hutchinson")(x, t)
    with pytest.raises(ValueError, match="key is None"):
        fp.score_residual(vector, sde, laplacian="hutchinson")(x, t)
    with pytest.raises(ValueError, match=r"power is 0\.5"):
        fp.penalty(None, wrong, sde, x, t, power=0.5)
    with pytest.raises(ValueError, match="power is 3; expected 2 with laplacian='hutchinson'"):
        fp.penalty(key, wrong, sde, x, t, power=3, laplacian="hutchinson")
    with pytest.raises(ValueError, match=r"times has shape \(4,\); expected \(\) with centred"):
        fp.penalty(None, wrong, sde, x, t, centred=True)
    with pytest.raises(ValueError, match="at least 2 with centred"):
        fp.penalty(None, wrong, sde, x[:1], 0.5, centred=True)
    with pytest.raises(ValueError, match=r"weighting\(t, sde\) returned shape \(\)"):
        fp.penalty(None, wrong, sde, x, t, weighting=lambda t, sde: jnp.ones(()))
    for weight in (-0.1, np.nan, [0.1, 0.2]):
        with pytest.raises(ValueError, match="expected one number of at least 0"):
            fp.regularised_loss(key, wrong, sde, x, weight=weight)
    box = functools.partial(fp.collocation_box, key, 5)
    with pytest.raises(ValueError, match=r"t_min is 0\.0; expected a time above 0"):
        box([-1.0], [1.0], 0.0, 1.0)
    with pytest.raises(ValueError, match="expected t_min < t_max"):
        box([-1.0], [1.0], 1.0, 1.0)
    with pytest.raises(ValueError, match="expected low < high"):
        box([-1.0, 1.0], [1.0, 1.0], 0.1, 1.0)
    with pytest.raises(ValueError, match=r"shapes \(1,\) and \(2,\)"):
        box([-1.0], [1.0, 1.0], 0.1, 1.0)
    with pytest.warns(UserWarning, match="uniform points miss the mass; use collocation_paths"):
        box([-1.0] * 4, [1.0] * 4, 0.1, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        box([-1.0] * 3, [1.0] * 3, 0.1, 1.0)
    with pytest.raises(ValueError, match=r"x0 has shape \(0, 2\)"):
        fp.collocation_paths(key, x[:0], sde, 3)
