"""The samplers of inverse problems against their own recursions, exact on Gaussian data.

There x0h is affine in the state, with a known slope, so that all but DPS move the state by an
affine map and noise: NumPy follows the state itself, and its mean and covariance.
"""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import process, score
from jaxgen.guide import operators
from jaxgen.guide.consistency import diffpir, projection, repaint
from jaxgen.guide.posterior import dps, pigdm
from jaxgen.guide.restore import METHODS, restore, restore_many

SDE = process.vp()
D = 3
COV = np.array([[0.5, 0.3, 0.1], [0.3, 0.4, -0.1], [0.1, -0.1, 0.3]])
MEAN = np.array([0.3, -0.2, 0.5])
A = np.array([[1.0, 0.5, 0.0], [0.0, 1.0, -1.0]])
Y = np.array([0.7, -0.4])
SIGMA_Y, V = 0.2, 0.4
TIMES = np.array([0.95, 0.7, 0.4, 0.15, 0.03])
START = np.array([0.8, -1.1, 0.4])
SEEN = np.array([1, 0, 0])


def levels(times):
    with jax.enable_x64(True):
        sde = process.vp()
        a, s = (np.asarray(f(jnp.asarray(times))) for f in (sde.alpha, sde.sigma))
    return zip(a, s, [*a[1:], 1.0], [*s[1:], 0.0], strict=True)


def estimate(a, s, cov=COV, mean=MEAN):
    """``x0h = slope x + shift``."""
    slope = a * cov @ np.linalg.inv(a**2 * cov + s**2 * np.eye(D))
    return slope, mean - a * slope @ mean


def ddim(slope, shift, a, s, a1, s1, eta):
    """``x' = F x + g + c z`` about ``x0h = slope x + shift``."""
    r = a * s1 / (a1 * s)
    c = eta * s1 * np.sqrt(1 - r**2)
    keep = np.sqrt(s1**2 - c**2)
    along = a1 - keep * a / s
    return along * slope + keep / s * np.eye(D), along * shift, c


def ridged(ridge, matrix=A):
    return matrix.T @ np.linalg.inv(matrix @ matrix.T + ridge * np.eye(len(matrix)))


def corrected(slope, shift, inverse):
    """``x0h + inverse (y - A x0h)``."""
    keep = np.eye(D) - inverse @ A
    return keep @ slope, keep @ shift + inverse @ Y


def step(name, a, s, a1, s1, cov=COV, mean=MEAN, eta=0.0, zeta=0.0, sigma_y=SIGMA_Y):
    """``(F, g, c)`` of one step of a method."""
    slope, shift = estimate(a, s, cov, mean)
    var = V * s**2 / (V * a**2 + s**2)
    if name == "projection":
        inverse = ridged(sigma_y**2 / var)
        return ddim(*corrected(slope, shift, inverse), a, s, a1, s1, eta)
    if name == "diffpir":
        slope, shift = corrected(slope, shift, ridged(1.5 * sigma_y**2 * a**2 / s**2))
        c, keep = s1 * np.sqrt(zeta), s1 * np.sqrt(1 - zeta)
        along = a1 - keep * a / s
        return along * slope + keep / s * np.eye(D), along * shift, c
    inverse = ridged(sigma_y**2 / var)
    pull, push = -slope.T @ inverse @ A @ slope, slope.T @ inverse @ (Y - A @ shift)
    if name == "pigdm":
        f, g, c = ddim(slope, shift, a, s, a1, s1, eta)
        return f + a * a1 * pull, g + a * a1 * push, c
    share = s**2 / (a * var)
    return ddim(slope + share * pull, shift + share * push, a, s, a1, s1, eta)


def dps_path(x, zeta):
    for a, s, a1, s1 in levels(TIMES):
        slope, shift = estimate(a, s)
        misfit = Y - A @ (slope @ x + shift)
        f, g, _ = ddim(slope, shift, a, s, a1, s1, 0.0)
        gradient = -slope.T @ A.T @ misfit / np.linalg.norm(misfit)
        x = f @ x + g - zeta * gradient
    return x


RUNS = {
    "dps": (dps, {"zeta": 0.2, "eta": 0.0}),
    "pigdm": (pigdm, {"eta": 0.0, "prior_var": V, "sigma_y": SIGMA_Y}),
    "tweedie": (pigdm, {"eta": 0.0, "prior_var": V, "sigma_y": SIGMA_Y, "guidance": "tweedie"}),
    "projection": (projection, {"eta": 0.0, "prior_var": V, "sigma_y": SIGMA_Y}),
    "diffpir": (diffpir, {"zeta": 0.0, "lam": 1.5, "sigma_y": SIGMA_Y}),
}


def test_each_follows_its_recursion(key):
    with jax.enable_x64(True):
        sde, seen = process.vp(), operators.linear(A)
        prior = score.closed_form.gaussian(sde, jnp.asarray(MEAN), jnp.asarray(COV))

        @jax.jit
        def run(key, x):
            return {
                name: method(
                    key, prior.noise, sde, jnp.asarray(Y), seen, steps=5, grid=jnp.asarray(TIMES),
                    x_init=x, event_ndim=1, **options,
                )
                for name, (method, options) in RUNS.items()
            }  # fmt: skip

        made = run(key, jnp.asarray(START))
    for name, out in made.items():
        x = START
        if name == "dps":
            x = dps_path(x, 0.2)
        else:
            for level in levels(TIMES):
                f, g, _ = step(name, *level)
                x = f @ x + g
        np.testing.assert_allclose(out.x, x, rtol=1e-9, atol=1e-9, err_msg=name)
        residual = np.sqrt(np.mean((Y - A @ x) ** 2))
        np.testing.assert_allclose(out.residual, residual, rtol=1e-7)
        assert int(out.nfe) == 5 and out.method == RUNS[name][0].__name__


N = 20_000
NOISY = {
    "pigdm": (pigdm, {"prior_var": V, "sigma_y": SIGMA_Y}),
    "diffpir": (diffpir, {"zeta": 0.3, "lam": 1.5, "sigma_y": SIGMA_Y}),
    "repaint": (repaint, {"repeats": 3, "sigma_y": SIGMA_Y}),
    # Repetitions wash out what a noisy measurement lends to the rest: one alone shows it.
    "repaint_once": (repaint, {"repeats": 1, "sigma_y": 0.7}),
}
GRIDS = {name: np.array([0.9, 0.2]) if name == "repaint_once" else TIMES for name in NOISY}


def law(name, start):
    """Mean and covariance of the last state, from a known start."""
    mean, cov = start, np.zeros((D, D))
    options = NOISY[name][1]
    for a, s, a1, s1 in levels(GRIDS[name]):
        if "repeats" not in options:
            f, g, c = step(name, a, s, a1, s1, eta=1.0, zeta=0.3)
            mean, cov = f @ mean + g, f @ cov @ f.T + c**2 * np.eye(D)
            continue
        for u in range(options["repeats"]):
            if u:
                ratio = a / a1
                mean = ratio * mean
                cov = ratio**2 * cov + (s**2 - (ratio * s1) ** 2) * np.eye(D)
            f, g, c = ddim(*estimate(a, s), a, s, a1, s1, 1.0)
            mean, cov = f @ mean + g, f @ cov @ f.T + c**2 * np.eye(D)
            mean[0] = a1 * Y[0]
            cov[0] = cov[:, 0] = 0
            cov[0, 0] = max(s1**2 - (a1 * options["sigma_y"]) ** 2, 0)
    return mean, cov


def test_with_noise_each_has_the_law_of_its_recursion(key):
    prior = score.closed_form.gaussian(SDE, jnp.asarray(MEAN), jnp.asarray(COV))
    seen, hidden = operators.linear(A), operators.mask(SEEN)

    @jax.jit
    def run(key):
        made = {}
        for name, (method, options) in NOISY.items():
            masked = method is repaint
            # What a mask hides is not looked at.
            y = jnp.array([Y[0], jnp.nan, 7.0]) if masked else jnp.asarray(Y)
            made[name] = method(
                key, prior.noise, SDE, jnp.broadcast_to(y, (N, y.size)),
                hidden if masked else seen, steps=len(GRIDS[name]), grid=jnp.asarray(GRIDS[name]),
                x_init=jnp.broadcast_to(jnp.asarray(START), (N, D)), **options,
            )  # fmt: skip
        return made

    made = run(key)
    for name, out in made.items():
        mean, cov = law(name, START.copy())
        x = np.asarray(out.x, np.float64)
        spread = np.sqrt(np.diag(cov))
        assert (np.abs(x.mean(0) - mean) < 4 * spread / np.sqrt(N) + 2e-5).all(), name
        # The variance of a Gaussian's sample covariance.
        error = np.sqrt((np.outer(np.diag(cov), np.diag(cov)) + cov**2) / N)
        assert (np.abs(np.cov(x.T) - cov) < 4.5 * error + 2e-5).all(), name
    out = made["repaint"]
    assert int(out.nfe) == 15
    np.testing.assert_allclose(out.x[:, 0], Y[0], rtol=1e-6)
    np.testing.assert_array_equal(out.residual, 0)


def test_repaint_goes_back_to_a_level_by_the_process(key):
    times, hidden = np.array([0.4, 0.2]), operators.mask(np.array([1, 0]))
    # A field that sees no noise forgets nothing, so that what is added on the way back stays.
    out = repaint(
        key, lambda x, t: jnp.zeros_like(x), SDE, jnp.zeros((N, 2)), hidden, steps=2, repeats=2,
        grid=jnp.asarray(times), x_init=jnp.zeros((N, 2)),
    )  # fmt: skip
    var = 0.0
    for a, s, a1, s1 in levels(times):
        for u in range(2):
            if u:
                var = (a / a1) ** 2 * var + s**2 - (a / a1 * s1) ** 2
            var = (a1 / a) ** 2 * var + s1**2 * (1 - (a * s1 / (a1 * s)) ** 2)
    assert abs(float(out.x[:, 1].var()) - var) < 4 * var * np.sqrt(2 / N)


@pytest.mark.parametrize("sigma_y", [SIGMA_Y, 1e-3])
def test_tweedie_and_projection_are_exact_where_the_data_are_isotropic(sigma_y):
    """Both have the posterior as their law there, as steps grow; PiGDM as published has not."""
    cov = V * np.eye(D)
    gain = cov @ A.T @ np.linalg.inv(A @ cov @ A.T + sigma_y**2 * np.eye(2))
    truth = MEAN + gain @ (Y - A @ MEAN), cov - gain @ A @ cov
    off = {}
    for name in ("tweedie", "projection", "pigdm"):
        for steps in (250, 1000):
            # Equally spaced in log-SNR, down to sigma_y and on.
            sigma = 1 / np.sqrt(1 + np.exp(np.linspace(-9.0, 16.0, steps)))
            a = np.sqrt(1 - sigma**2)
            mean, own = np.zeros(D), sigma[0] ** 2 * np.eye(D)
            path = zip(a, sigma, [*a[1:], 1.0], [*sigma[1:], 0.0], strict=True)
            for level in path:
                f, g, _ = step(name, *level, cov=cov, sigma_y=sigma_y)
                mean, own = f @ mean + g, f @ own @ f.T
            off[name, steps] = max(np.abs(mean - truth[0]).max(), np.abs(own - truth[1]).max())
    for name in ("tweedie", "projection"):
        assert off[name, 250] < 0.03 and off[name, 1000] < 0.35 * off[name, 250]
    if sigma_y == SIGMA_Y:  # 0.031, whatever the steps
        assert off["pigdm", 1000] > 0.02 and off["projection", 1000] < 0.002


def test_without_noise_the_measurement_is_met(key):
    prior = score.closed_form.gaussian(SDE, jnp.asarray(MEAN), jnp.asarray(COV))
    y = jnp.broadcast_to(jnp.asarray(Y), (5, 2))
    for method in (projection, diffpir):
        out = method(key, prior.noise, SDE, y, operators.linear(A), steps=10)
        assert float(out.residual.max()) < 1e-5
        assert out.x.shape == (5, 3) and np.ptp(out.x[:, 1]) > 0.01


def test_guidance_through_an_operator_that_is_not_linear(key):
    """One step to the data: the pull-back is the slope, as ``pinv(y) - pinv(f(x0h))`` moves it."""
    prior = score.closed_form.gaussian(SDE, jnp.asarray(MEAN), jnp.asarray(COV))
    y, t = jnp.array([[0.5, -0.9, 0.1]]), 0.5
    out = pigdm(
        key, prior.noise, SDE, y, operators.hdr(), steps=1, grid=jnp.array([t]), x_init=START[None]
    )
    a, s = float(SDE.alpha(t)), float(SDE.sigma(t))
    slope, shift = estimate(a, s)
    x0 = slope @ START + shift
    gap = (np.asarray(y[0]) - np.clip(2 * x0, -1, 1)) / 2
    np.testing.assert_allclose(out.x[0], x0 + a * slope.T @ gap, atol=1e-5)


# --- cost ---------------------------------------------------------------------------------------


def test_the_field_is_evaluated_once_a_step(key):
    calls = []

    def field(x, t):
        jax.debug.callback(lambda t: calls.append(float(t[0])), t)
        return x * jnp.tanh(t)[:, None]

    y = jnp.ones((4, 3))
    for name in METHODS:
        calls.clear()
        options = {"repeats": 2} if name == "repaint" else {}
        out = restore(key, field, SDE, y, operators.mask(SEEN), method=name, steps=4, **options)
        jax.block_until_ready(out)
        jax.effects_barrier()
        assert len(calls) == int(out.nfe) == 4 * options.get("repeats", 1), name


# --- one door -----------------------------------------------------------------------------------


def test_one_signature_serves_all():
    shared = ["key", "field", "sde", "y", "operator", "steps", "sigma_y", "grid", "prediction",
              "event_ndim", "x_init", "progress"]  # fmt: skip
    for name, method in METHODS.items():
        names = list(inspect.signature(method).parameters)
        wanted = [n for n in shared if name != "red_diff" or n not in ("sigma_y", "x_init")]
        assert names[:5] == shared[:5] and set(wanted) <= set(names), name


def test_an_example_is_the_same_alone_in_a_batch_and_under_vmap(key):
    prior = score.closed_form.gaussian(SDE, jnp.asarray(MEAN), jnp.asarray(COV))
    y = jnp.array([[0.6, 0.0, 0.2], [0.1, 0.0, 0.3]])

    @jax.jit
    def run(key, y):
        made = []
        for name in ("dps", "repaint"):
            solve = functools.partial(restore, method=name, steps=4)
            whole = solve(key, prior.noise, SDE, y, operators.mask(SEEN)).x
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(2))

            def one(k, y, solve=solve):
                return solve(k, prior.noise, SDE, y, operators.mask(SEEN), event_ndim=1).x

            made.append((whole, jax.vmap(one)(keys, y)))
        return made

    for whole, each in run(key, y):
        np.testing.assert_allclose(whole, each, atol=1e-5)


def test_inside_shard_map(key):
    prior = score.closed_form.gaussian(SDE, jnp.asarray(MEAN), jnp.asarray(COV))
    y = jnp.linspace(-1.0, 1.0, 8)[:, None] * jnp.array([[1.0, 0.0, 0.0]])
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("data",), auto, devices=jax.devices()[:2])

    def run(y, i):
        own = jax.random.fold_in(key, i)
        return [
            restore(own, prior.noise, SDE, y, seen, method=name, steps=4).x
            for name, seen in (
                ("red_diff", operators.mask(SEEN)),
                ("pigdm", operators.compose(operators.mask(SEEN), iterations=2)),
                ("repaint", operators.mask(SEEN)),
            )
        ]

    spec = jax.P("data")
    whole = jax.jit(
        jax.shard_map(
            lambda y: run(y, jax.lax.axis_index("data")), mesh=mesh, in_specs=spec, out_specs=spec
        )
    )(y)
    second = jax.jit(run)(y[4:], 1)
    for ours, truth in zip(whole, second, strict=True):
        np.testing.assert_allclose(ours[4:], truth, atol=1e-5)


def test_several_keys_tell_the_spread(key):
    prior = score.closed_form.gaussian(SDE, jnp.asarray(MEAN), jnp.asarray(COV))
    y = jnp.array([[0.6, 0.0, 0.0]])
    seen = operators.mask(SEEN)
    options = {"method": "projection", "steps": 20, "sigma_y": 1e-3}

    @jax.jit
    def run(key):
        many = restore_many(key, prior.noise, SDE, y, seen, 6, **options)
        second = jax.random.fold_in(key, 1)
        return many, restore(second, prior.noise, SDE, y, seen, **options)

    many, second = run(key)
    assert many.x.shape == (6, 1, 3) and many.residual.shape == (6, 1)
    np.testing.assert_allclose(many.x[1], second.x, atol=1e-5)
    np.testing.assert_allclose(many.std, np.std(many.x, axis=0), atol=1e-5)
    np.testing.assert_allclose(many.mean, np.mean(many.x, axis=0), atol=1e-5)
    least = np.asarray(many.residual)[:, 0].argmin()
    np.testing.assert_array_equal(many.best(), many.x[least])
    failed = dataclasses.replace(many, residual=many.residual.at[least].set(jnp.nan))
    second_best = np.delete(np.asarray(many.residual)[:, 0], least).min()
    chosen = np.asarray(many.residual)[:, 0] == second_best
    np.testing.assert_array_equal(failed.best(), many.x[chosen.argmax()])
    # What is seen is agreed on, but for its noise of 1e-3.
    assert float(many.std[0, 0]) < 2e-3 < 0.05 < float(many.std[0, 1:].min())
    assert int(many.nfe) == 120 and many.method == "projection"


def test_a_state_in_reduced_precision(key):
    y = jnp.ones((2, 3), jnp.bfloat16)
    seen = []

    def field(x, t):
        seen.append(x.dtype)
        return x

    out = dps(key, field, SDE, y, operators.mask(SEEN), steps=2)
    assert out.x.dtype == jnp.bfloat16 and set(seen) == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, "method is 'magic'", {"method": "magic"}),
        (ValueError, "guidance is 'bayes'", {"method": "pigdm", "guidance": "bayes"}),
        (TypeError, "repaint expects", {"method": "repaint", "operator": operators.hdr()}),
        (TypeError, "projection expects", {"method": "projection", "operator": operators.hdr()}),
        (
            TypeError,
            "diffpir expects",
            {"method": "diffpir", "operator": lambda x: x, "x_init": jnp.ones((2, 3))},
        ),
        (
            TypeError,
            "pigdm needs",
            {"method": "pigdm", "operator": lambda x: x, "x_init": jnp.ones((2, 3))},
        ),
        (TypeError, "give x_init too", {"method": "dps", "operator": lambda x: x}),
        (
            ValueError,
            r"y has shape \(2, 3\).*shape \(2,\)",
            {"method": "dps", "operator": lambda x: x[:2], "x_init": jnp.ones((2, 3))},
        ),
        (ValueError, "mask has shape", {"method": "dps", "operator": operators.mask(np.ones(4))}),
        (ValueError, "repeats is 0", {"method": "repaint", "repeats": 0}),
        (ValueError, "returned shape", {"method": "dps", "field": lambda x, t: x[:1]}),
        (ValueError, "steps is 7", {"method": "diffpir", "steps": 7}),
        (TypeError, "x_init has dtype", {"method": "dps", "x_init": jnp.ones((2, 3), int)}),
    ],
)
def test_bad_input_names_the_argument(key, error, words, call):
    good = {"field": lambda x, t: x, "operator": operators.mask(SEEN), "steps": 4}
    with pytest.raises(error, match=words):
        restore(key, sde=SDE, y=jnp.ones((2, 3)), **(good | call))


def test_a_spread_of_nothing(key):
    with pytest.raises(ValueError, match="n is 0"):
        restore_many(key, lambda x, t: x, SDE, jnp.ones((2, 3)), operators.mask(SEEN), 0)
