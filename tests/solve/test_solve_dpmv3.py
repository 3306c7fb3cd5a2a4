"""DPM-Solver-v3 and its statistics: closed forms, orders, equivalences, bad input."""

import dataclasses
import functools
import json

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jaxgen import process, score, solve
from jaxgen.solve.dpm_solver_v3 import dpmv3
from jaxgen.solve.multistep import ExponentialMultistep
from jaxgen.solve.semilinear import SemiLinearTerm, tabulate
from jaxgen.solve.statistics import (
    Statistics,
    degenerate_statistics,
    estimate_statistics,
    load_statistics,
    save_statistics,
)
from jaxgen.solve.terms import FieldCall

SDE = process.vp()
MEAN, VAR = np.array([1.5, -2.0, 0.3]), np.array([0.25, 4.0, 0.01])
# A skewed mixture in two dimensions, from lam -3 to 1.
WEIGHTS = np.array([0.3, 0.7])
MEANS = np.array([[1.5, -2.0], [-1.0, 1.0]])
COVS = np.array([[0.25, 1.0], [0.3, 0.2]])


def mixture(sde=SDE):
    return score.closed_form.mixture(sde, *map(jnp.asarray, (WEIGHTS, MEANS, COVS)))


@functools.cache
def problem():
    """Float64: the mixture's ends of time, states, and statistics from data alone."""
    sde = process.vp()
    start, end = (float(sde.inverse_log_snr(jnp.float64(v))) for v in (-6, 2))
    exact = mixture(sde)
    key_data, key_x, key_made = jax.random.split(jax.random.key(5), 3)
    data = exact.sample(key_data, (512, 2))
    made = jax.jit(
        lambda x: estimate_statistics(
            key_made, exact.noise, sde, x, n_grid=60, n_samples=512, t_start=start, t_end=end
        )
    )(data)
    return sde, exact, exact.sample(key_x, (32, 2), start), start, end, made


@functools.partial(jax.jit, static_argnames="steps")
def run64(solver, x, steps):
    sde, exact, _, start, end, _ = problem()
    options = {"t_start": start, "t_end": end, "x_init": x, "grid": "log_snr"}
    key = jax.random.key(0)
    return solve.sample(key, exact.noise, sde, x.shape, solver=solver, steps=steps, **options).x


@pytest.fixture(scope="module")
def small():
    """Float32 statistics of the mixture over the whole range of times."""
    exact = mixture()
    data = exact.sample(jax.random.key(1), (128, 2)).astype(jnp.float32)
    make = jax.jit(
        lambda x: estimate_statistics(
            jax.random.key(2), exact.noise, SDE, x, n_grid=60, n_samples=128
        )
    )
    return make(data)


# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prediction"),
    [
        ("vp", "noise"),
        ("mean_reverting", "velocity"),
        pytest.param("edm", "data", marks=pytest.mark.slow),
    ],
)
def test_statistics_of_gaussian_data_are_known(name, prediction):
    with jax.enable_x64(True):
        mu = jnp.array([0.5, -0.5, 1.0])
        sde = process.PROCESSES[name](*([mu] if name == "mean_reverting" else []))
        exact = score.closed_form.gaussian(sde, jnp.asarray(MEAN), jnp.asarray(VAR))
        x0 = exact.sample(jax.random.key(0), (16, 3))
        own = jax.jit(
            lambda x: estimate_statistics(
                jax.random.key(1),
                getattr(exact, prediction),
                sde,
                x,
                prediction=prediction,
                n_grid=120,
                n_samples=16,
                t_end=sde.t_min + 0.01 * (sde.t_max - sde.t_min),
            )
        )(x0)
        lam = np.asarray(own.lam)[:, None]
        want = 1 / (1 + np.exp(2 * lam) * VAR)
        np.testing.assert_allclose(own.l, want, atol=1e-10)
        np.testing.assert_array_equal(own.s, 0)
        # f is -l m, for the centred mean m.
        centred = MEAN - (0 if sde.mu is None else np.asarray(mu))
        slope = 2 * want * (1 - want) * centred
        np.testing.assert_allclose(own.b, slope, atol=5 * (lam[1] - lam[0])[0] ** 4)
        assert dict(own.made)["n_samples"] == 16 and dict(own.made)["process"] == name


def test_slope_and_offset_are_the_regression_along_the_flow():
    """Held against f at two levels next to a node, by steps of the flow itself."""
    with jax.enable_x64(True):
        sde = process.vp()
        exact = score.closed_form.mixture(
            sde, jnp.array([0.3, 0.7]), jnp.array([[1.5], [-1.0]]), jnp.array([0.25, 0.6])
        )
        n = 8000
        x0 = exact.sample(jax.random.key(0), (n, 1))
        span = {"t_start": 0.8, "t_end": 0.2}
        own = jax.jit(
            lambda x: estimate_statistics(
                jax.random.key(1), exact.noise, sde, x, n_grid=24, n_samples=n, **span
            )
        )(x0)
        node, d = own.lam[12], 1e-3
        t, t_near = (sde.inverse_log_snr(2 * v) for v in (node, node + d))
        x = sde.perturb(jax.random.key(2), x0, t)[0]

        def f(x, t, lam):
            y, e = x / sde.alpha(t), jnp.exp(-lam) * exact.noise(x, t)
            return np.asarray(e - own.at(lam)[0][None] * y)[:, 0]

        # Heun's step of y' = -e^{-lam} eps.
        y = x / sde.alpha(t)
        k1 = -jnp.exp(-node) * exact.noise(x, t)
        k2 = -jnp.exp(-node - d) * exact.noise(sde.alpha(t_near) * (y + d * k1), t_near)
        x_near = sde.alpha(t_near) * (y + 0.5 * d * (k1 + k2))
        f0, f1 = f(x, t, node), f(x_near, t_near, node + d)
        change = (f1 - f0) / d
        s = np.cov(f0, change)[0, 1] / f0.var(ddof=1)
        b = change.mean() - s * f0.mean()
        residual = change - s * f0 - b
        error = residual.std() / f0.std() / n**0.5
        # Two independent sets of noise.
        assert abs(float(own.s[12, 0]) - s) < 8 * error + 0.01, (own.s[12], s, error)
        assert abs(float(own.b[12, 0]) - b) < 8 * error * f0.std() + 0.01, (own.b[12], b)


def test_statistics_do_not_depend_on_batches_nor_on_the_prediction(small):
    exact = mixture()
    data = exact.sample(jax.random.key(1), (128, 2)).astype(jnp.float32)
    make = functools.partial(estimate_statistics, jax.random.key(2), n_grid=60, n_samples=128)
    other = jax.jit(lambda x: make(exact.data, SDE, x, prediction="data", batch_size=50))(data)
    np.testing.assert_allclose(other.l, small.l, atol=2e-5)
    # Rounding: of the noise at the first levels, of the data at the last.
    np.testing.assert_allclose(other.s, small.s, atol=0.05)
    np.testing.assert_allclose(other.b, small.b, atol=0.05)


def test_hutchinson_agrees_with_the_basis():
    sde = process.ve()
    cov = np.array([[1.0, 0.6, 0.0], [0.6, 0.8, -0.3], [0.0, -0.3, 0.5]])
    exact = score.closed_form.gaussian(sde, jnp.zeros(3), jnp.asarray(cov, jnp.float32))
    n, probes = 512, 4
    data = exact.sample(jax.random.key(0), (64, 3))

    def make(estimator):
        return jax.jit(
            lambda x: estimate_statistics(
                jax.random.key(1),
                exact.noise,
                sde,
                x,
                n_grid=8,
                n_samples=n,
                n_probes=probes,
                estimator=estimator,
                t_start=1.0,
            )
        )(data)

    known, estimated = make("exact"), make("hutchinson")
    ratio = np.exp(-2 * np.asarray(known.lam))
    jacobian = ratio[:, None, None] * np.linalg.inv(cov + ratio[:, None, None] * np.eye(3))
    diagonal = np.diagonal(jacobian, axis1=1, axis2=2)
    np.testing.assert_allclose(known.l, diagonal, atol=2e-5)
    off = (jacobian**2).sum(-1) - diagonal**2
    assert (np.abs(estimated.l - diagonal) < 5 * np.sqrt(off / (n * probes)) + 2e-5).all()


def coarse_curves(field, spacing):
    data = mixture().sample(jax.random.key(1), (64, 2)).astype(jnp.float32)
    options = {"n_grid": 12, "n_samples": 64, "spacing": spacing}

    @jax.jit
    def run(data):
        made = estimate_statistics(jax.random.key(2), field, SDE, data, **options)
        return made.s, made.b

    return run(data)


@pytest.mark.slow
def test_ripples_in_time_spoil_the_derivative():
    exact = mixture()

    def ripples(x, t):
        """Nearly the field, but its derivative in time is noise, as between whole times."""
        return exact.noise(x, t) + 1e-3 * jnp.sin(1e5 * t)[:, None] * jnp.sin(1e3 * x)

    gap = coarse_curves(ripples, None)[0] - coarse_curves(exact.noise, None)[0]
    assert float(jnp.abs(gap)[2:-2].max()) > 1


def test_differences_along_the_flow_stand_in_for_the_derivative_in_time():
    field = mixture().noise
    (s, b), (near_s, near_b) = coarse_curves(field, None), coarse_curves(field, 0.1)
    # An error of second order in the spacing: at twice of it, four times as large.
    far_s, _ = coarse_curves(field, 0.2)
    inner = slice(2, -2)
    error, double = (float(jnp.abs(v - s)[inner].max()) for v in (near_s, far_s))
    assert error < 0.01 and 3 < double / error < 5, (error, double)
    np.testing.assert_allclose(near_b[inner], b[inner], atol=0.02)
    with pytest.raises(ValueError, match="spacing is -1"):
        estimate_statistics(jax.random.key(2), field, SDE, jnp.zeros((4, 2)), spacing=-1)


def test_statistics_come_back_from_disk(tmp_path, small):
    made = dataclasses.replace(small, made=(*small.made, ("step", 7)))
    folder = save_statistics(tmp_path / "own", small)
    assert save_statistics(tmp_path / "own", made) == folder  # replaced
    back = load_statistics(folder)
    assert back.made == made.made
    for name in ("lam", "l", "s", "b"):
        np.testing.assert_array_equal(getattr(back, name), getattr(made, name))
    with pytest.raises(ValueError, match="no statistics"):
        load_statistics(tmp_path)
    with pytest.raises(ValueError, match="choose another folder"):
        save_statistics(tmp_path, small)
    about = folder / "statistics.json"
    body = json.loads(about.read_text())
    about.write_text(json.dumps(body | {"sha256": "0" * 64}))
    with pytest.raises(ValueError, match="damaged"):
        load_statistics(folder)


# --- the solver -----------------------------------------------------------------------------------


def test_one_step_is_exact_for_gaussian_data():
    with jax.enable_x64(True):
        sde = process.vp()
        start, end = (float(sde.inverse_log_snr(jnp.float64(v))) for v in (-10, 8))
        exact = score.closed_form.gaussian(sde, jnp.asarray(MEAN), jnp.asarray(VAR))
        data = exact.sample(jax.random.key(0), (8, 3))
        x = jax.random.normal(jax.random.key(1), (16, 3), jnp.float64)
        span = {"t_start": start, "t_end": end}

        @jax.jit
        def run(data, x):
            own = estimate_statistics(
                jax.random.key(2), exact.noise, sde, data, n_grid=240, n_samples=8, **span
            )
            key, shape = jax.random.key(0), x.shape
            solvers = {1: dpmv3(own, order=1), 4: dpmv3(own)}
            return [
                solve.sample(key, exact.noise, sde, shape, solver=s, steps=n, x_init=x, **span).x
                for n, s in solvers.items()
            ]

        a0, s0, a1, s1 = (float(f(t)) for t in (start, end) for f in (sde.alpha, sde.sigma))
        scale = np.sqrt((a1**2 * VAR + s1**2) / (a0**2 * VAR + s0**2))
        want = a1 * MEAN + scale * (np.asarray(x) - a0 * MEAN)
        for out in run(data, x):
            # A table of 1200 nodes reaches 2.4e-5, a DDIM step 5.3.
            np.testing.assert_allclose(out, want, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "order"),
    [
        pytest.param({"order": 1}, 1, marks=pytest.mark.slow),
        pytest.param({"order": 2, "corrector": False}, 2, marks=pytest.mark.slow),
        ({"order": 3, "corrector": False}, 3),
        # A pseudo order is of order 2 here by design; the plain corrector mends it.
        ({"order": 3, "corrector": False, "pseudo_predictor": True}, 2),
        ({"order": 3}, None),
    ],
)
def test_order_of_convergence(options, order):
    with jax.enable_x64(True):
        *_, x, _, _, made = problem()
        truth = reference()
        solver = dpmv3(made, lower_order_final=False, **options)
        errors = [np.sqrt(np.mean((run64(solver, x, n) - truth) ** 2)) for n in (40, 80)]
    slope = np.log2(errors[0] / errors[1])
    assert errors[1] < 0.02
    if order is None:
        assert slope > 2.75, (slope, errors)
    else:
        assert abs(slope - order) < 0.25, (slope, errors)


@functools.cache
def reference():
    *_, x, _, _, _ = problem()
    return np.asarray(run64(ExponentialMultistep("data", 3), x, 2000))


@pytest.mark.parametrize(
    ("kind", "order"),
    [("data", 3), ("noise", 3), pytest.param("data", 1, marks=pytest.mark.slow)],
)
def test_constant_curves_give_the_other_solvers(kind, order):
    with jax.enable_x64(True):
        sde, _, x, start, end, _ = problem()
        own = degenerate_statistics(sde, kind, (1,), t_start=start, t_end=end, dtype=jnp.float64)
        v3 = dpmv3(own, order=order, corrector=False)
        plain = (
            solve.ddim()
            if order == 1
            else ExponentialMultistep(kind, order, lower_order_final=True)
        )
        np.testing.assert_allclose(run64(v3, x, 5), run64(plain, x, 5), atol=1e-13)


def test_the_half_corrector_stops_half_way():
    """Before half of the time its numbers are the corrector's, and after it the predictor's."""
    with jax.enable_x64(True):
        sde, _, _, start, end, made = problem()
        times = solve.make_grid("time", sde, 6, t_start=start, t_end=end, dtype=jnp.float64)
        call = FieldCall(lambda x, t: x)
        term = SemiLinearTerm(call, sde, times, None, "noise", (True, True))
        options = {"full": {}, "half": {"half_corrector": True}}
        solvers = {k: dpmv3(made, lower_order_final=False, **v) for k, v in options.items()}
        full, half = jax.jit(lambda: [tabulate(term, s) for s in solvers.values()])()
        before = np.asarray(times)[:-1] > 0.5
        assert 0 < before.sum() < 6
        on_half, on_full = half.correct.weights[0], full.correct.weights[0]
        for a, b in zip(on_half, on_full, strict=False):
            np.testing.assert_allclose(a[before], b[before], atol=1e-14)
        np.testing.assert_array_equal(on_half[3][before], 0)
        # After it the step's own weights, one place further back.
        after = np.flatnonzero(~before)
        np.testing.assert_array_equal(on_half[0][after], 0)
        for a, b in zip(on_half[1:], full.predict.weights[0], strict=True):
            np.testing.assert_allclose(a[after], b[after - 1], atol=1e-14)
        np.testing.assert_allclose(half.correct.factor[after], full.predict.factor[after - 1])
        np.testing.assert_allclose(half.correct.shift[after], full.predict.shift[after - 1])


@functools.partial(jax.jit, static_argnames=("steps", "adjoint"))
def by_data(exact, solver, x, steps, adjoint=None):
    options = {"solver": solver, "steps": steps, "x_init": x, "adjoint": adjoint}
    key = jax.random.key(0)
    return solve.sample(key, exact.data, SDE, x.shape, prediction="data", **options)


@pytest.mark.parametrize("steps", [5, pytest.param(1000, marks=pytest.mark.slow)])
def test_single_against_double_precision(small, steps):
    exact, solver, x = mixture(), dpmv3(small), jax.random.normal(jax.random.key(0), (8, 2))
    got = by_data(exact, solver, x, steps)
    assert got.solver == "dpmv3" and got.grid == "log_snr"
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), (solver, x))
        np.testing.assert_allclose(got.x, by_data(exact, *wide, steps).x, atol=5e-5)


def test_both_drivers(small):
    exact, solver, x = mixture(), dpmv3(small), jax.random.normal(jax.random.key(0), (8, 2))
    solved = by_data(exact, solver, x, 5, diffrax.DirectAdjoint())
    np.testing.assert_allclose(solved.x, by_data(exact, solver, x, 5).x, atol=2e-5)


def test_calls_per_sample_times_and_transforms(small):
    calls = []

    def field(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return mixture().noise(x, t)

    x = jax.random.normal(jax.random.key(0), (3, 2))

    def run(solver, x, t, field=None, ndim=None):
        return solve.sample(
            jax.random.key(0),
            field or mixture().noise,
            SDE,
            x.shape,
            solver=solver,
            steps=4,
            x_init=x,
            t_start=t,
            event_ndim=ndim,
        )

    t = jnp.array([1.0, 0.7, 0.4])
    with jax.enable_x64(True):
        own, x, t = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), (small, x, t))
        together = jax.jit(functools.partial(run, field=field))(dpmv3(own), x, t)
        jax.effects_barrier()
        assert int(together.nfe) == len(calls) == 4
        alone = jax.jit(jax.vmap(lambda x, t: run(dpmv3(own), x, t, ndim=1).x))(x, t)
        np.testing.assert_allclose(alone, together.x, atol=1e-9)


def test_gradient_in_the_statistics_and_the_state():
    with jax.enable_x64(True):
        _, _, x, *_, made = problem()

        def loss(scale):
            own = dataclasses.replace(made, s=scale * made.s)
            return jnp.sum(run64(dpmv3(own, order=2), scale * x, 4))

        slope, value, d = jax.jit(jax.grad(loss)), jax.jit(loss), 1e-4
        numeric = (value(1 + d) - value(1 - d)) / (2 * d)
        np.testing.assert_allclose(slope(1.0), numeric, rtol=1e-5)


def test_a_last_level_without_noise_gives_the_data_prediction():
    sde = process.edm()
    exact = mixture(sde)
    own = degenerate_statistics(sde, "data", (2,))
    x = 80 * jax.random.normal(jax.random.key(0), (4, 2))
    options = {"x_init": x, "steps": 6, "t_end": 0.0, "prediction": "data"}

    def run(solver):
        return jax.jit(
            lambda k: solve.sample(k, exact.data, sde, x.shape, solver=solver, **options).x
        )(jax.random.key(0))

    plain = ExponentialMultistep("data", 2, lower_order_final=True)
    got = run(dpmv3(own, order=2, corrector=False))
    np.testing.assert_allclose(got, run(plain), atol=1e-5)


# --- bad input ------------------------------------------------------------------------------------


def test_bad_statistics_are_refused(small):
    cut = jax.tree.map(lambda v: v[:3], small)
    cases = {
        "at least 4": cut,
        "strictly rising": dataclasses.replace(small, lam=small.lam[::-1]),
        "not finite": dataclasses.replace(small, s=small.s.at[3].set(jnp.nan)),
        "have shapes": dataclasses.replace(small, b=small.b[:, :1]),
    }
    for message, bad in cases.items():
        with pytest.raises(ValueError, match=message):
            dpmv3(bad)
    with pytest.raises(TypeError, match="expected Statistics"):
        dpmv3(None)
    with pytest.raises(ValueError, match="expected 1, 2 or 3"):
        dpmv3(small, order=4)
    with pytest.raises(ValueError, match="without a corrector"):
        dpmv3(small, corrector=False, half_corrector=True)


def test_bad_samples_are_refused(small):
    solver, call = dpmv3(small), FieldCall(lambda x, t: x)

    def term(steps, t_end=1e-3, ends=(True, True)):
        times = jnp.linspace(1.0, t_end, steps + 1)
        return SemiLinearTerm(call, SDE, times, None, "noise", ends)

    with pytest.raises(ValueError, match="at least as many steps"):
        solver.check(term(2))
    with pytest.raises(ValueError, match="the proper end"):
        solver.check(term(4, ends=(False, True)))
    with pytest.raises(ValueError, match="the statistics cover lam in"):
        solver.check(term(4, 1e-4))
    with pytest.raises(ValueError, match="the samples' event is"):
        solver.start(term(4), jnp.zeros((2, 3)))
    traced = jax.jit(lambda t: tabulate(term(4, t), solver).predict.factor)(1e-4)
    assert np.isnan(traced[-1]).all() and not np.isnan(traced[0]).any()
    error, _ = checkify.checkify(lambda t: solver.check(term(4, t)))(1e-4)
    assert error.get() is None or "range" in error.get()
    error, _ = jax.jit(checkify.checkify(lambda t: solver.check(term(4, t))))(1e-4)
    assert "the statistics' range" in error.get()


def test_bad_estimates_are_refused(key):
    field, x0 = mixture().noise, jnp.zeros((4, 2))
    make = functools.partial(estimate_statistics, key, field, SDE)
    cases = [
        ("n_samples is 1", x0, {"n_samples": 1}),
        ("n_grid is 2", x0, {"n_grid": 2}),
        ("estimator is", x0, {"estimator": "guess"}),
        ("prediction is", x0, {"prediction": "eps"}),
        ("not finite", x0.at[0].set(jnp.nan), {}),
        ("t_start", x0, {"t_start": 0.1, "t_end": 0.2}),
        ("t_end", x0, {"t_end": -1.0}),
        ("returned shape", x0, {"n_samples": 2, "n_grid": 4}),
    ]
    for message, data, options in cases:
        wrong = message == "returned shape"
        call = functools.partial(make, data, **options)
        if wrong:
            call = functools.partial(
                estimate_statistics, key, lambda x, t: x[:, :1], SDE, data, **options
            )
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="floating"):
        make(jnp.zeros((4, 2), jnp.int32))
    with pytest.raises(ValueError, match="infinite"):
        estimate_statistics(key, field, process.edm(), x0, t_end=0.0)
    with pytest.raises(ValueError, match="kind is"):
        degenerate_statistics(SDE, "score", (2,))
    assert isinstance(degenerate_statistics(SDE, "data", (2,)), Statistics)
