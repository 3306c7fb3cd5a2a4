"""The scan driver against diffeqsolve, and what diffeqsolve does when it fails."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import process, score, solve

QUICK = {
    "euler_maruyama": "euler_maruyama",
    "heun_churned": solve.Heun(churn=5.0),
    "heun_time": "heun_time",
    "unipc": "unipc",
    "Tsit5": diffrax.Tsit5(),
    "ShARK": diffrax.ShARK(),
}
SLOW = {
    "dpmpp_2s": "dpmpp_2s",
    "ddim": "ddim",
    "Heun": diffrax.Heun(),
    "ddim_noisy": solve.ddim(1.0),
    "heun": "heun",
    "dpm_2": "dpm_2",
    "dpm_3": "dpm_3",
    "dpm_2m": "dpm_2m",
    "dpm_3m": "dpm_3m",
    "dpmpp_2m": "dpmpp_2m",
    "dpmpp_3m": "dpmpp_3m",
    "dpmpp_2m_sde": "dpmpp_2m_sde",
    "dpmpp_3m_sde": "dpmpp_3m_sde",
    "deis": "deis",
    "deis_t": solve.deis(variable="t"),
    "Euler": diffrax.Euler(),
    "EulerHeun": diffrax.EulerHeun(),
    "ItoMilstein": diffrax.ItoMilstein(),
    "StratonovichMilstein": diffrax.StratonovichMilstein(),
    "Midpoint": diffrax.Midpoint(),
    "Ralston": diffrax.Ralston(),
    "Bosh3": diffrax.Bosh3(),
    "Dopri5": diffrax.Dopri5(),
    "Dopri8": diffrax.Dopri8(),
    "ReversibleHeun": diffrax.ReversibleHeun(),
    "SEA": diffrax.SEA(),
    "SRA1": diffrax.SRA1(),
    "SPaRK": diffrax.SPaRK(),
    "SlowRK": diffrax.SlowRK(),
    "GeneralShARK": diffrax.GeneralShARK(),
}
PID = diffrax.PIDController(rtol=1e-4, atol=1e-4)


@functools.cache
def closed():
    sde = process.vp()
    return sde, score.closed_form.gaussian(sde, jnp.array([1.0, -0.5]), 0.25)


def draw(key, n=3, **options):
    sde, exact = closed()
    options = {"steps": 15, "t_end": 0.01} | options
    return jax.jit(lambda k: solve.sample(k, exact.noise, sde, (n, 2), **options))(key)


@pytest.mark.parametrize(
    "solver",
    [
        *(pytest.param(s, id=n) for n, s in QUICK.items()),
        *(pytest.param(s, id=n, marks=pytest.mark.slow) for n, s in SLOW.items()),
    ],
)
def test_both_drivers_agree(key, solver):
    scan = draw(key, solver=solver)
    solved = draw(key, solver=solver, adjoint=diffrax.DirectAdjoint())
    # Same noise, same steps: float32 rounding over 15 steps of a state of order one.
    np.testing.assert_allclose(scan.x, solved.x, atol=2e-5, rtol=1e-5)
    assert solved.nfe.shape == (3,) and bool((solved.nfe == scan.nfe).all())
    assert bool((solved.result == diffrax.RESULTS.successful).all())


def test_adaptive_steps_are_each_samples_own(key):
    closed()  # in float32, as for the others
    x = np.array([[0.1, 0.1], [4.0, -9.0], [1.0, 0.0]])
    options = {"solver": diffrax.Tsit5(), "controller": PID}
    with jax.enable_x64(True):
        out = draw(key, x_init=jnp.asarray(x), **options)
        alone = draw(key, 1, x_init=jnp.asarray(x[1:2]), **options)
        assert out.x.dtype == jnp.float64
    x = x.astype(np.float32)
    assert out.grid == "adaptive" and out.nfe.shape == (3,) and len(set(out.nfe.tolist())) > 1
    # In float32 rounding would move the accepted step sizes, and the end by the controller's error.
    np.testing.assert_allclose(alone.x[0], out.x[1], rtol=1e-9)
    assert int(alone.nfe[0]) == int(out.nfe[1])
    # The flow of a Gaussian, exactly; local errors of 1e-4 grow on the way.
    sde, _ = closed()
    mean = jnp.array([[1.0, -0.5]])
    end = sde.alpha(0.01) * mean + jnp.sqrt(
        (sde.alpha(0.01) ** 2 * 0.25 + sde.sigma(0.01) ** 2)
        / (sde.alpha(1.0) ** 2 * 0.25 + sde.sigma(1.0) ** 2)
    ) * (x - sde.alpha(1.0) * mean)
    np.testing.assert_allclose(out.x, end, rtol=5e-3, atol=1e-3)


def test_adaptive_calls_are_counted(key):
    sde, exact = closed()
    seen = []

    def field(x, t):
        assert x.shape == (1, 2) and t.shape == (1,)
        jax.debug.callback(lambda: seen.append(1))
        return exact.noise(x, t)

    options = {"solver": diffrax.Tsit5(), "controller": PID, "steps": 20}
    out = solve.sample(key, field, sde, (1, 2), **options)
    jax.effects_barrier()
    assert int(out.nfe[0]) == len(seen)


@pytest.mark.slow
def test_adaptive_sde_on_a_tree_has_the_marginal(key):
    n = 300
    sde, exact = closed()
    out = jax.jit(
        lambda k: solve.sample(
            k,
            exact.noise,
            sde,
            (n, 2),
            solver=diffrax.HalfSolver(diffrax.EulerHeun()),
            controller=diffrax.PIDController(rtol=0.02, atol=0.02, dtmin=1e-3),
            t_end=0.05,
        )
    )(key)
    a, s = float(sde.alpha(0.05)), float(sde.sigma(0.05))
    var = a**2 * 0.25 + s**2
    assert bool((out.result == diffrax.RESULTS.successful).all())
    mean = np.asarray(out.x.mean(0)) - a * np.array([1.0, -0.5])
    assert np.all(np.abs(mean) < 4 * (var / n) ** 0.5 + 0.02), mean
    assert abs(float(out.x.var(0).mean()) / var - 1) < 4 * (1 / n) ** 0.5 + 0.03


def test_max_steps_gives_nan_and_its_code(key):
    out = draw(key, solver=diffrax.Tsit5(), controller=PID, max_steps=3)
    assert bool(jnp.isnan(out.x).all())
    assert bool((out.result == diffrax.RESULTS.max_steps_reached).all())


@pytest.mark.parametrize("controller", [None, PID])
def test_a_field_of_nan_gives_nan_and_a_code(key, controller):
    sde, _ = closed()

    def field(x, t):
        return jnp.where(x[:, :1] > 0, jnp.nan, x)

    x = jnp.array([[1.0, 1.0], [-1.0, 1.0]])
    out = solve.sample(
        key,
        field,
        sde,
        (2, 2),
        solver=diffrax.Tsit5(),
        controller=controller,
        adjoint=diffrax.DirectAdjoint() if controller is None else None,
        x_init=x,
        t_end=0.5,
        max_steps=200,
        steps=10,
    )
    assert bool(jnp.isnan(out.x[0]).all()) and bool(jnp.isfinite(out.x[1]).all())
    good = np.asarray(out.result == diffrax.RESULTS.successful)
    assert good.tolist() == [False, True]


def test_gradients_by_the_adjoint_that_the_user_picks(key):
    sde, exact = closed()
    x = jax.random.normal(key, (2, 2))

    def total(scale, adjoint):
        def field(x, t):
            return scale * exact.noise(x, t)

        out = solve.sample(
            key, field, sde, (2, 2), solver="ddim", steps=6, x_init=x, adjoint=adjoint
        )
        return jnp.sum(out.x)

    def slope(adjoint):
        return jax.jit(jax.grad(lambda s: total(s, adjoint)))(1.0)

    np.testing.assert_allclose(slope(diffrax.DirectAdjoint()), slope(None), rtol=1e-4)


def drawer(brownian, steps):
    sde, exact = closed()
    options = {"solver": "euler_maruyama", "brownian": brownian, "steps": steps, "t_end": 0.1}
    return jax.jit(lambda k: solve.sample(k, exact.noise, sde, (8, 2), **options).x)


def test_trees_are_consistent_over_step_counts(key):
    coarse, fine = drawer("tree", 32), drawer("tree", 128)(key)
    near, far = (float(jnp.abs(fine - coarse(k)).mean()) for k in (key, jax.random.key(9)))
    assert near < 0.25 * far


@pytest.mark.slow
def test_paths_may_be_given(key):
    def own(key, shape, t0, t1):
        return diffrax.VirtualBrownianTree(t0, t1, 2**-14 * (t1 - t0), shape, key)

    np.testing.assert_allclose(drawer(own, 32)(key), drawer("tree", 32)(key), atol=1e-5)


def test_a_grid_path_knows_whole_intervals_only(key):
    with pytest.raises(ValueError, match='expected "tree"'):
        draw(key, solver=diffrax.HalfSolver(diffrax.EulerHeun()), brownian="grid")
