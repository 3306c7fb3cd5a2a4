"""Solver schedules: equal to the named solvers, bad input, files, transforms."""

import dataclasses
import functools
import json

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import process, score, solve
from jaxgen.core import checks
from jaxgen.solve.schedule import (
    SolverSchedule,
    baseline_schedules,
    schedule_from_baseline,
    schedule_nfe,
    schedule_times,
    validate_schedule,
)
from jaxgen.solve.schedule_file import load_schedule, save_schedule
from jaxgen.solve.usf import usf, usf_sample

STEPS = 6
SHAPE = (8, 3)


@functools.cache
def problem():
    """A skewed mixture and noise to start from, in float64 where that is on."""
    sde = process.vp()
    means = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)))
    law = score.closed_form.mixture(sde, jnp.array([0.4, 0.6]), means, jnp.array([0.1, 0.3]))
    return sde, law, jnp.asarray(np.random.default_rng(1).normal(size=SHAPE))


@functools.partial(jax.jit, static_argnames="prediction")
def by_schedule(schedule, sde, law, x, prediction="noise"):
    field = getattr(law, prediction)
    return usf_sample(
        jax.random.key(0), field, sde, SHAPE, schedule, x_init=x, prediction=prediction
    )


@functools.partial(jax.jit, static_argnames="solver")
def named(solver, grid, sde, law, x):
    return solve.sample(
        jax.random.key(0), law.noise, sde, SHAPE, solver=solver, grid=grid, x_init=x
    ).x


CASES = [
    ("dpm_2m", {}, "dpm_2m"),
    ("dpmpp_3m", {}, "dpmpp_3m"),
    ("unipc", {"order": 2, "variant": "bh1"}, solve.unipc(2, variant="bh1")),
    ("unipc", {"order": 3}, solve.unipc(3)),
]
MORE = [
    ("ddim", {"kind": "noise"}, "ddim"),
    ("ddim", {}, "ddim"),
    ("dpmpp_2m", {}, "dpmpp_2m"),
    ("dpm_3m", {}, "dpm_3m"),
    ("dpmpp_3m", {"lower_order_final": False}, solve.dpmpp(3, lower_order_final=False)),
    ("unipc", {"order": 1}, solve.unipc(1)),
    *(
        (
            "unipc",
            {"order": n, "variant": v, "corrector": c, "kind": k},
            solve.unipc(n, variant=v, corrector=c, kind=k),
        )
        for n in (1, 2, 3)
        for v in ("bh1", "bh2")
        for c in (False, True)
        for k in ("data", "noise")
    ),
]


def distances(cases):
    """The largest difference between each schedule's samples and the named solver's."""
    sde, law, x = problem()
    for name, options, solver in cases:
        schedule = schedule_from_baseline(name, STEPS, sde, **options)
        ours = by_schedule(schedule, sde, law, x).x
        exact = named(solver, schedule_times(sde, schedule), sde, law, x)
        yield float(jnp.abs(ours - exact).max()), (name, options)


@pytest.fixture(autouse=True)
def afresh():
    """The problem in this test's precision."""
    problem.cache_clear()


@pytest.mark.parametrize("cases", [CASES, pytest.param(MORE, marks=pytest.mark.slow)])
def test_schedules_are_the_named_solvers_to_rounding(cases):
    with jax.enable_x64(True):
        assert problem()[2].dtype == jnp.float64
        for distance, case in distances(cases):
            assert distance < 1e-12, case


def test_in_float32_too_and_compiled_once():
    before = by_schedule._cache_size()
    for distance, case in distances([CASES[-1]]):
        assert distance < 1e-5, case
    assert by_schedule._cache_size() <= before + 1


def changed(schedule, **entries):
    """A copy with single entries set, as ``order={2: 3}``."""
    fields = {k: np.array(getattr(schedule, k)) for k in entries}
    for name, values in entries.items():
        for i, value in values.items():
            fields[name][i] = value
    return dataclasses.replace(schedule, **fields)


def test_each_decision_changes_the_samples():
    sde, law, x = problem()
    base = schedule_from_baseline("unipc", STEPS, sde)
    start = by_schedule(base, sde, law, x).x
    compiled = by_schedule._cache_size()
    for entries in (
        {"ptype": {3: 0}},
        {"order": {3: 2}},
        {"order": {4: 4}} | {"order": {3: 4}},
        {"est_order": {2: 1}},
        {"relax_kind": {2: 5}},
        {"relax_kind": {2: 1}, "relax_coef": {2: 0.1}},
        {"corrector": {2: False}},
        {"scale_corrector": {(): False}},
        {"afs": {(): 1}},
    ):
        out = by_schedule(changed(base, **entries), sde, law, x)
        assert float(jnp.abs(out.x - start).max()) > 1e-6, entries
        assert bool(jnp.isfinite(out.x).all())
    assert by_schedule._cache_size() == compiled


def test_reduced_estimates_keep_the_higher_derivatives():
    # Two points fit a cubic's first derivative, one the secant: against the polynomial by hand.
    sde = process.edm(sigma_min=0.1)
    base = dataclasses.replace(
        schedule_from_baseline("dpmpp_3m", 3, sde, t_start=8.0, t_end=1.0, lower_order_final=False),
        relax_kind=np.zeros(3, np.int32),
    )
    lam = np.asarray(base.lam, np.float64)

    def field(x, t):
        return jnp.broadcast_to(jnp.log(1 / t)[:, None] ** 2, x.shape)

    x = jnp.zeros((1, 1))
    run = jax.jit(
        lambda s: usf_sample(jax.random.key(0), field, sde, (1, 1), s, prediction="data", x_init=x)
    )
    for est in (0, 1):
        out = run(changed(base, est_order={2: est}))
        # By hand in float64: lam = -log t, data = lam^2.
        y, seen = 0.0, []
        for i in range(3):
            s, t = lam[i], lam[i + 1]
            seen.append((s, s**2))
            h, d0 = t - s, s**2
            slopes = [(f - d0) / (u - s) for u, f in reversed(seen[:-1])]
            first = 0.0 if not slopes else slopes[0]
            second = 0.0
            if len(slopes) == 2:
                r = [u - s for u, _ in reversed(seen[:-1])]
                second = 2 * (slopes[1] - slopes[0]) / (r[1] - r[0])
                first = slopes[0] - 0.5 * second * r[0] if est == 0 else slopes[0]
            p1 = -np.expm1(-h) / h
            p2 = (p1 - 1) / -h
            p3 = (p2 - 0.5) / -h
            y = np.exp(-h) * y + h * (p1 * d0 + p2 * h * first + p3 * h**2 * second)
        assert float(out.x[0, 0]) == pytest.approx(y, rel=2e-5)


def test_an_analytic_first_step_skips_a_call():
    sde, law, x = problem()
    calls = []

    def field(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return law.noise(x, t)

    # The second step does not look back to the first: then the rest is a schedule of its own.
    base = schedule_from_baseline("dpmpp_2m", STEPS, sde)
    base = changed(base, afs={(): 2}, order={1: 1})
    mean = jnp.asarray([0.3, -0.1, 0.2])
    draw = jax.jit(
        lambda s, x: usf_sample(jax.random.key(0), field, sde, SHAPE, s, x_init=x, x0_mean=mean)
    )
    out = draw(base, x)
    jax.effects_barrier()
    assert len(calls) == int(out.nfe) == int(schedule_nfe(base)) == STEPS - 1
    # DDIM's first step from the data's mean, then on from there: the same samples.
    times = schedule_times(sde, base)
    a, s = sde.alpha(times), sde.sigma(times)
    ratio = s[1] / s[0]
    one = ratio * x + (a[1] - a[0] * ratio) * mean[None]
    rest = SolverSchedule(
        np.asarray(base.lam)[1:],
        *(np.array(getattr(base, f.name))[1:] for f in dataclasses.fields(base)[1:-2]),
        base.scale_corrector,
        np.int32(0),
    )
    np.testing.assert_allclose(out.x, draw(rest, one).x, atol=2e-5)


def test_a_population_is_its_schedules_one_by_one():
    sde, law, x = problem()
    some = list(baseline_schedules(STEPS, sde).values())[::7]
    stacked = solve.stack_schedules(some)
    out = jax.jit(jax.vmap(lambda s: by_schedule(s, sde, law, x).x))(stacked)
    for i, schedule in enumerate(some):
        np.testing.assert_allclose(out[i], by_schedule(schedule, sde, law, x).x, atol=5e-5)


@pytest.mark.slow
def test_steps_on_statistics_are_those_of_dpm_solver_v3():
    sde, law, x = problem()
    flat = solve.degenerate_statistics(sde, "data", (3,), n_grid=64)
    curve = 0.1 * jnp.tanh(flat.lam)[:, None] * jnp.array([[1.0, -1.0, 0.5]])
    own = dataclasses.replace(flat, l=flat.l + curve, s=curve, b=curve + 0.1)
    plain = schedule_from_baseline("dpm_3m", STEPS, sde)
    whole = dataclasses.replace(plain, ptype=np.full(STEPS, 2, np.int32))

    @functools.partial(jax.jit, static_argnames="is_named")
    def draw(schedule, own, is_named=False):
        solver = usf(schedule, statistics=own)
        if is_named:
            solver = solve.dpmv3(own, corrector=False)
        options = {"solver": solver, "grid": schedule_times(sde, schedule), "x_init": x}
        return solve.sample(jax.random.key(0), law.noise, sde, SHAPE, **options).x

    ours = draw(whole, own)
    np.testing.assert_allclose(ours, draw(whole, own, True), rtol=1e-4, atol=5e-5)
    # Steps of all three kinds, and a corrector on each.
    mixed = changed(whole, ptype={1: 0, 4: 1}, corrector={1: True, 2: True, 4: True})
    assert bool(jnp.isfinite(draw(mixed, own)).all())
    np.testing.assert_allclose(draw(plain, own), by_schedule(plain, sde, law, x).x, atol=1e-5)


def test_the_process_has_a_gradient():
    """At fixed times; the first step's empty history takes no part in it."""
    with jax.enable_x64(True):
        x = problem()[2]
        schedule = schedule_from_baseline("unipc", 3, process.vp())
        times = schedule_times(process.vp(), schedule)

        @jax.jit
        @jax.value_and_grad
        def total(beta_max):
            sde = process.vp(beta_max=beta_max)
            law = score.closed_form.gaussian(sde, jnp.ones(3), 0.25)
            options = {"solver": usf(schedule), "grid": times, "x_init": x}
            return solve.sample(jax.random.key(0), law.noise, sde, SHAPE, **options).x.sum()

        slope = total(20.0)[1]
        measured = (total(20.002)[0] - total(19.998)[0]) / 0.004
        assert float(slope) == pytest.approx(float(measured), rel=1e-4)


@pytest.mark.parametrize(
    "entries",
    [
        {"ptype": {1: 2}},
        {"ptype": {1: 5}},
        {"order": {1: 3}},
        {"order": {4: 0}},
        {"est_order": {2: 3}},
        {"relax_kind": {1: 6}},
        {"relax_coef": {1: np.inf}},
        {"afs": {(): 3}},
    ],
)
def test_bad_values_that_are_traced_give_nan(entries):
    sde, law, x = problem()
    schedule = schedule_from_baseline("unipc", STEPS, sde)
    assert bool(jnp.isfinite(by_schedule(schedule, sde, law, x).x).all())
    assert bool(jnp.isnan(by_schedule(changed(schedule, **entries), sde, law, x).x).all())


@pytest.mark.slow
def test_knots_have_a_gradient():
    sde, law, x = problem()
    schedule = list(baseline_schedules(STEPS, sde).values())[21]

    def total(lam):
        return by_schedule(dataclasses.replace(schedule, lam=lam), sde, law, x).x.sum()

    lam = jnp.asarray(schedule.lam)
    slope = jax.jit(jax.grad(total))(lam)
    nudge = jnp.zeros_like(lam).at[2].set(0.02)
    measured = (total(lam + nudge) - total(lam - nudge)) / 0.04
    assert float(slope[2]) == pytest.approx(float(measured), rel=0.05)


@pytest.mark.slow
def test_predictions_and_drivers_agree():
    sde, law, x = problem()
    schedule = changed(
        schedule_from_baseline("unipc", STEPS, sde), ptype={3: 0}, corrector={1: False}
    )
    base = by_schedule(schedule, sde, law, x).x
    np.testing.assert_allclose(by_schedule(schedule, sde, law, x, "data").x, base, atol=5e-5)
    again = usf_sample(
        jax.random.key(0),
        law.noise,
        sde,
        SHAPE,
        schedule,
        x_init=x,
        adjoint=diffrax.DirectAdjoint(),
    )
    np.testing.assert_allclose(again.x, base, atol=2e-5)
    assert int(again.nfe[0]) == STEPS


def test_proper_ends_of_a_process():
    sde = process.rectified()
    law = score.closed_form.gaussian(sde, jnp.ones(3), 0.25)
    schedule = schedule_from_baseline("unipc", 16, sde, t_start=1.0, t_end=0.0)
    assert np.isneginf(schedule.lam[0]) and np.isposinf(schedule.lam[-1])
    x = jax.random.normal(jax.random.key(0), (4, 3))
    grid = schedule_times(sde, schedule)

    @functools.partial(jax.jit, static_argnames="solver")
    def draw(schedule, x, solver=None):
        made = usf(schedule) if solver is None else solver
        options = {"x_init": x, "prediction": "velocity", "grid": grid}
        return solve.sample(jax.random.key(0), law.velocity, sde, (4, 3), solver=made, **options).x

    ours = draw(schedule, x)
    np.testing.assert_allclose(ours, draw(schedule, x, "unipc"), atol=1e-5)
    # The flow of a Gaussian is affine: x0 = mean + std x.
    np.testing.assert_allclose(ours, 1 + 0.5 * x, atol=0.2)


@pytest.mark.parametrize(
    ("entries", "part"),
    [
        ({"lam": {2: -9.0}}, "strictly rising"),
        ({"lam": {2: np.nan}}, "infinite at the ends alone"),
        ({"order": {1: 3}}, "order is 3 at step 2; expected 1 to 2"),
        ({"order": {4: 0}}, "order is 0 at step 5"),
        ({"est_order": {2: 3}}, "est_order is 3 at step 3 of order 3"),
        ({"est_order": {2: -1}}, "est_order is -1"),
        ({"corrector": {-1: True}}, "last step"),
        ({"ptype": {1: 2}}, "ptype is 2 at step 2"),
        ({"ptype": {1: 5}}, "codes 0 to 2"),
        ({"relax_kind": {1: 6}}, "codes 0 to 5"),
        ({"relax_coef": {1: np.inf}}, "relax_coef"),
        ({"afs": {(): 2}}, "x0_mean"),
        ({"afs": {(): 3}}, "afs"),
    ],
)
def test_bad_schedules_are_refused(entries, part):
    schedule = schedule_from_baseline("unipc", STEPS, process.vp())
    with pytest.raises(ValueError, match=part):
        usf(changed(schedule, **entries))


def test_bad_input():
    sde, law, _ = problem()
    schedule = schedule_from_baseline("unipc", STEPS, sde)
    lam = np.array(schedule.lam)
    lam[2] = np.nextafter(lam[1], 9, dtype=lam.dtype)
    with pytest.raises(ValueError, match="coincide"):
        validate_schedule(dataclasses.replace(schedule, lam=lam))
    with pytest.raises(ValueError, match="order has shape"):
        validate_schedule(dataclasses.replace(schedule, order=schedule.order[1:]))
    with pytest.raises(ValueError, match="one schedule"):
        validate_schedule(solve.stack_schedules([schedule, schedule]))
    solver = usf(schedule)
    run = functools.partial(solve.sample, jax.random.key(0), law.noise, sde, SHAPE, solver=solver)
    with pytest.raises(ValueError, match="the schedule has 6 steps and the grid 9"):
        run(steps=9, grid="log_snr")
    with pytest.raises(ValueError, match="is not the schedule's"):
        run(steps=STEPS, grid="time")
    # Where only values tell, NaN, and an error under checkify.
    out = jax.jit(lambda g: run(grid=g).x)(jnp.linspace(1.0, 1e-3, STEPS + 1))
    assert bool(jnp.isnan(out).all())
    short = solve.degenerate_statistics(sde, "data", SHAPE[1:], t_start=0.5)
    with pytest.raises(ValueError, match="the statistics cover lam in"):
        usf(changed(schedule, ptype={0: 2}), statistics=short)
    with pytest.raises(ValueError, match="reaches"):
        schedule_times(process.ve(), dataclasses.replace(schedule, lam=schedule.lam * 3))
    with pytest.raises(ValueError, match="one of ddim"):
        schedule_from_baseline("heun", 5, sde)
    with pytest.raises(ValueError, match="noise prediction"):
        schedule_from_baseline("dpm_2m", 5, sde, kind="data")
    with pytest.raises(ValueError, match="steps is 2"):
        schedule_from_baseline("unipc", 2, sde)
    assert checks.concrete(schedule_nfe(schedule)) == STEPS
    # Known under jit; a process that is traced tells nothing at trace time.
    jax.eval_shape(lambda: schedule_from_baseline("unipc", STEPS, sde))
    for make in (baseline_schedules, functools.partial(schedule_from_baseline, "unipc")):
        with pytest.raises(ValueError, match="process must be known"):
            jax.eval_shape(lambda sde, make=make: make(STEPS, sde=sde), sde)


def test_files_hold_every_bit(tmp_path):
    sde = process.rectified()
    schedule = schedule_from_baseline("unipc", 5, sde, t_start=1.0, t_end=0.0)
    path = tmp_path / "schedule.json"
    save_schedule(path, schedule, sde=sde, notes={"a": 1})
    again = load_schedule(path, sde=sde, steps=5)
    for f in dataclasses.fields(schedule):
        a, b = (np.asarray(getattr(s, f.name)) for s in (schedule, again))
        assert a.dtype == b.dtype, f.name
        np.testing.assert_array_equal(a, b)
    assert json.loads(path.read_text())["made_for"]["process"] == "rectified"
    with pytest.raises(ValueError, match="made for the process rectified; this one is vp"):
        load_schedule(path, sde=process.vp())
    with pytest.raises(ValueError, match="has 5 steps; expected 6"):
        load_schedule(path, steps=6)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda d: d.update(format="other"), "holds no schedule"),
        (lambda d: d.update(version=2), "version 2"),
        (lambda d: d["schedule"].pop("order"), "lacks order"),
        (lambda d: d["schedule"].update(order=[1, 2, 9]), "order has shape"),
        (lambda d: d["schedule"]["order"].__setitem__(1, 3), "order is 3 at step 2"),
        (lambda d: d["schedule"]["order"].__setitem__(1, 1.5), "expected int"),
        (lambda d: d["schedule"]["lam"].__setitem__(1, "x"), "expected float"),
        (lambda d: d["schedule"].update(dtype="int8"), "float32 or float64"),
        (lambda d: d.update(schedule=3), "expected an object"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, part):
    path = tmp_path / "schedule.json"
    save_schedule(path, schedule_from_baseline("dpmpp_2m", 4, process.vp()))
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=part):
        load_schedule(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_schedule(path)
