"""Orders of convergence in float64, and the cases that a solver gets exactly."""

import functools

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
        ("ddim", "log_snr", 1),
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
