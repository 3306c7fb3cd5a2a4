"""Orders of convergence in float64, and the cases that a solver gets exactly."""

import dataclasses
import functools
import itertools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import process, score, solve
from jaxgen.solve.semilinear import SemiLinearTerm, tabulate
from jaxgen.solve.terms import FieldCall

START, END = 0.9, 0.05


@functools.cache
def problem():
    """A skewed mixture in three dimensions, states on its way and where the flow takes them."""
    sde = process.vp()
    key_means, key_x = jax.random.split(jax.random.key(3))
    means = jax.random.normal(key_means, (3, 3), jnp.float64)
    exact = score.closed_form.mixture(
        sde, jnp.array([0.5, 0.3, 0.2]), means, jnp.array([0.2, 0.4, 0.1])
    )
    x = exact.sample(key_x, (6, 3), START).astype(jnp.float64)
    return sde, exact, x


def run(solver, steps, grid):
    sde, exact, x = problem()
    options = {"t_start": START, "t_end": END, "grid": grid, "x_init": x}
    draw = jax.jit(
        lambda k: (
            solve.sample(k, exact.noise, sde, x.shape, solver=solver, steps=steps, **options).x
        )
    )
    return np.asarray(draw(jax.random.key(0)))


@functools.cache
def reference():
    return run(diffrax.Dopri8(), 150, "time")


@pytest.mark.parametrize(
    ("solver", "grid", "order"),
    [
        pytest.param("ddim", "log_snr", 1, marks=pytest.mark.slow),
        ("heun", "karras", 2),
        # The last Euler step costs h^2, which is no more than the other steps together.
        ("heun_time", "time", 2),
    ],
)
def test_order_of_convergence(solver, grid, order):
    with jax.enable_x64(True):
        errors = [np.sqrt(np.mean((run(solver, n, grid) - reference()) ** 2)) for n in (80, 160)]
    assert errors[1] < 0.02
    slope = np.log2(errors[0] / errors[1])
    assert abs(slope - order) < 0.25, (slope, errors)


# --- solvers with a history, from an exact one --------------------------------------------------

# Intervals of the finest grid; a history is exact states at the first three knots of a grid.
FINE, SEEDS = 240, 3
SOLVERS = {
    "ddim": (solve.ddim(), 1),
    "dpm_2": (solve.dpm_2(), 2),
    "dpm_3": (solve.dpm_3(), 3),
    "dpmpp_2s": (solve.dpmpp_2s(), 2),
    "dpm_2m": (solve.dpm(2), 2),
    "dpm_3m": (solve.dpm(3), 3),
    "dpmpp_2m": (solve.dpmpp(2), 2),
    "dpmpp_2m_taylor": (solve.dpmpp(2, second="taylor"), 2),
    "dpmpp_3m": (solve.dpmpp(3), 3),
    # Half of the second derivative is missing.
    "dpmpp_3m_official": (solve.dpmpp(3, third="official"), 2),
    "unipc_1": (solve.unipc(1, corrector=False), 1),
    "unipc_2": (solve.unipc(2, corrector=False), 2),
    "unipc_2_bh1": (solve.unipc(2, variant="bh1", corrector=False), 2),
    "unipc_3": (solve.unipc(3, corrector=False), 3),
    "unipc_1_corrected": (solve.unipc(1), 2),
    "unipc_2_corrected": (solve.unipc(2), 3),
    "unipc_2_bh1_corrected": (solve.unipc(2, variant="bh1"), 3),
    "unipc_3_corrected": (solve.unipc(3), 4),
    "unipc_3_noise": (solve.unipc(3, kind="noise"), 4),
    "deis_2_rho": (solve.deis(2, variable="rho"), 2),
    "deis_3_rho": (solve.deis(3, variable="rho"), 3),
    "deis_3_t": (solve.deis(3, variable="t"), 3),
    "deis_3": (solve.deis(3), 3),
}
# One member of each family and mechanism; the others are slow.
QUICK = {
    "ddim",
    "dpm_3",
    "dpmpp_2s",
    "dpm_3m",
    "dpmpp_3m",
    "dpmpp_3m_official",
    "unipc_3",
    "unipc_2_bh1_corrected",
    "unipc_3_corrected",
    "deis_3_t",
    "deis_3",
}
LAWS = {
    "vp": lambda: process.vp(),
    "edm": lambda: process.edm(),
    "mean_reverting": lambda: process.mean_reverting(jnp.array([0.5, -0.2, 0.1]), sigma_inf=1.0),
}


@functools.cache
def trajectory(law):
    """Exact states at the knots of the finest grid, by Runge-Kutta steps of a fifth of it."""
    sde = LAWS[law]()
    means = jnp.asarray(np.random.default_rng(3).normal(size=(3, 3)))
    exact = score.closed_form.mixture(
        sde, jnp.array([0.5, 0.3, 0.2]), means, jnp.array([0.2, 0.4, 0.1])
    )
    lam = jnp.linspace(-2.0, 1.5, FINE + 1)
    times = sde.inverse_log_snr(2 * lam)
    x = exact.sample(jax.random.key(1), (6, 3), times[0])
    states = [x]

    @jax.jit
    def between(x, t0, t1):
        options = {"solver": diffrax.Dopri8(), "grid": jnp.stack([t0, t1]), "x_init": x}
        return solve.sample(
            jax.random.key(0), exact.velocity, sde, x.shape, prediction="velocity", **options
        ).x

    for t0, t1 in itertools.pairwise(times):
        states.append(between(states[-1], t0, t1))
    return sde, exact, times, jnp.stack(states)


def seeded_error(solver, law, prediction, steps):
    """The error at the end of a run of ``steps`` intervals whose first outputs are exact."""
    sde, exact, fine, states = trajectory(law)
    stride = FINE // steps

    @jax.jit
    def run():
        call = FieldCall(getattr(exact, prediction))
        term = SemiLinearTerm(call, sde, fine[::stride], None, prediction, (True, True))
        numbers = tabulate(term, solver)
        x = states[0]
        state = solver.start(term, x)
        for n in range(SEEDS):
            own = jax.tree.map(lambda v, n=n: v[n], numbers)
            _, state = solver.advance(term, own, None, states[n * stride], state)
            if getattr(solver, "has_corrector", False):
                state = (state[0], states[n * stride])

        def body(carry, own):
            return solver.advance(term, own, None, *carry), None

        rest = jax.tree.map(lambda v: v[SEEDS:], numbers)
        (x, _), _ = jax.lax.scan(body, (states[SEEDS * stride], state), rest)
        return jnp.sqrt(jnp.mean((x - states[-1]) ** 2))

    return float(run())


def pairs():
    """The quick solvers once, over all laws and both kinds in turn; the rest are slow."""
    turn = itertools.cycle(itertools.product(LAWS, ("noise", "data")))
    for name in SOLVERS:
        quick = next(turn)
        for case in itertools.product(LAWS, ("noise", "data")):
            marks = () if case == quick and name in QUICK else pytest.mark.slow
            yield pytest.param(name, *case, marks=marks)


@pytest.mark.parametrize(("name", "law", "prediction"), list(pairs()))
def test_order_of_a_solver_with_an_exact_history(name, law, prediction):
    solver, order = SOLVERS[name]
    if hasattr(solver, "lower_order_final"):
        solver = dataclasses.replace(solver, lower_order_final=False)
    with jax.enable_x64(True):
        errors = [seeded_error(solver, law, prediction, n) for n in (60, 120)]
    assert 1e-11 < errors[1] < 0.03
    slope = np.log2(errors[0] / errors[1])
    assert abs(slope - order) < 0.25, (slope, errors)


def moments_error(solver, steps):
    """Relative error of the variance of N(0, 0.25) data after a run, without sampling.

    The state and the outputs kept are jointly Gaussian; a step is a linear map of them and noise.
    """
    sde = process.vp()

    @jax.jit
    def numbers():
        times = solve.make_grid("log_snr", sde, steps, t_start=START, t_end=END, dtype=jnp.float64)
        call = FieldCall(lambda x, t: x)
        return times, tabulate(SemiLinearTerm(call, sde, times, None, "data"), solver)

    times, own = jax.tree.map(np.asarray, numbers())
    alpha, sigma = np.asarray(sde.alpha(times)), np.asarray(sde.sigma(times))
    total = 0.25 * alpha**2 + sigma**2
    gain = 0.25 * alpha / total  # of the data prediction
    depth = solver.depth
    # Of the state, then of the outputs before it, newest first; there are none yet.
    covariance = np.zeros((depth, depth))
    covariance[0, 0] = total[0]
    for n in range(steps):
        weights = own.predict.weights[0][n]
        step = np.zeros((depth, depth))
        step[0, 0] = own.predict.factor[n] + weights[0] * gain[n]
        step[0, 1:] = weights[1:]
        if depth > 1:
            step[1, 0] = gain[n]
        for j in range(2, depth):
            step[j, j - 1] = 1.0
        covariance = step @ covariance @ step.T
        covariance[0, 0] += own.spread[n] ** 2
    return covariance[0, 0] / total[-1] - 1


def test_weak_order_of_the_stochastic_multistep_solvers():
    counts = (100, 200, 400)
    with jax.enable_x64(True):
        errors = {
            name: [abs(moments_error(solver, n)) for n in counts]
            for name, solver in {
                "first": solve.dpmpp(1, eta=1.0),
                "second": solve.dpmpp(2, eta=1.0, lower_order_final=False),
                "third": solve.dpmpp(3, eta=1.0, lower_order_final=False),
                "half": solve.dpmpp(2, eta=0.5, lower_order_final=False),
            }.items()
        }
    slopes = {name: np.log2(e[1] / e[2]) for name, e in errors.items()}
    assert abs(slopes["first"] - 1) < 0.1, slopes
    for name in ("second", "half", "third"):
        assert abs(slopes[name] - 2) < 0.25, slopes
    assert errors["third"][2] < 0.5 * errors["second"][2], errors


# --- solvers of one step that draw noise --------------------------------------------------------


def variance_error(sde, solver, steps, grid):
    """Relative error of the variance of N(0, 0.25) data, by the solver's own numbers, exactly."""

    @jax.jit
    def numbers():
        times = solve.make_grid(grid, sde, steps, t_end=END, dtype=jnp.float64)
        term = SemiLinearTerm(FieldCall(lambda x, t: x), sde, times, None, "noise")
        own = tabulate(term, solver)
        return times, sde.alpha(times), sde.sigma(times), *own

    times, alpha, sigma, t, a, b, s = (np.asarray(v) for v in numbers())
    total = 0.25 * alpha**2 + sigma**2
    variance = total[0]
    for n in range(steps):
        variance = (a[n] + b[n] * sigma[n] / total[n]) ** 2 * variance + s[n] ** 2
    np.testing.assert_allclose(t, times[:-1])
    return variance / total[-1] - 1


@pytest.mark.parametrize(
    ("solver", "grid"), [(solve.EulerMaruyama(), "time"), (solve.ddim(1.0), "log_snr")]
)
def test_weak_order_of_the_stochastic_solvers(solver, grid):
    with jax.enable_x64(True):
        sde = process.vp()
        errors = [abs(variance_error(sde, solver, n, grid)) for n in (200, 400)]
    assert errors[1] < 0.05
    assert abs(np.log2(errors[0] / errors[1]) - 1) < 0.1, errors


@pytest.mark.parametrize("name", ["vp", "ve", "rectified"])
def test_ddim_is_exact_for_one_data_point(key, name):
    sde = process.PROCESSES[name]()
    point = jnp.array([[1.5, -0.7]])
    exact = score.closed_form.empirical(sde, point)
    x = jax.random.normal(key, (4, 2))
    start, end = 0.8, 0.1
    options = {"t_start": start, "t_end": end, "steps": 1, "x_init": x, "solver": "ddim"}
    out = jax.jit(lambda k: solve.sample(k, exact.noise, sde, (4, 2), **options))(key)
    noise = (x - sde.alpha(start) * point) / sde.sigma(start)
    want = sde.alpha(end) * point + sde.sigma(end) * noise
    np.testing.assert_allclose(out.x, want, atol=2e-5 * float(sde.sigma(start)) + 2e-5)


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_ddim_keeps_the_variance_of_one_data_point(key, eta):
    sde = process.vp()
    exact = score.closed_form.empirical(sde, jnp.zeros((1, 2)))
    n = 4000
    x = float(sde.sigma(0.8)) * jax.random.normal(key, (n, 2))
    options = {"t_start": 0.8, "t_end": 0.3, "steps": 2, "x_init": x}
    out = jax.jit(
        lambda k, e: solve.sample(k, exact.noise, sde, (n, 2), solver=solve.ddim(e), **options).x
    )(jax.random.key(1), eta)
    ratio = float(out.var()) / float(sde.sigma(0.3)) ** 2
    assert abs(ratio - 1) < 4 * (2 / (2 * n)) ** 0.5
