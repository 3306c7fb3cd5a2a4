"""Every solver through one suite: a new solver is a row of ``ROWS``."""

import functools
import itertools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import process, score, solve

MU = jnp.array([0.5, -0.5])
MEAN, VAR = jnp.array([1.0, -0.5]), 0.25

# name: (solver, calls of K steps, a process); together the rows cover every process.
ROWS = {
    "euler_maruyama": ("euler_maruyama", lambda k: k, "ve"),
    "reverse_diffusion": ("reverse_diffusion", lambda k: k, "mean_reverting"),
    "ancestral": ("ancestral", lambda k: k, "vp"),
    "ddim": ("ddim", lambda k: k, "cosine"),
    "ddim_noisy": (solve.ddim(1.0), lambda k: k, "ve"),
    "heun": ("heun", lambda k: 2 * k, "edm"),
    "heun_churned": (solve.Heun(churn=10.0), lambda k: 2 * k, "sub_vp"),
    "heun_time": ("heun_time", lambda k: 2 * k - 1, "rectified"),
    "unipc": ("unipc", lambda k: k, "ve"),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", lambda k: k, "edm"),
    "dpm_2": ("dpm_2", lambda k: 2 * k, "sub_vp"),
    "diffrax_euler": (diffrax.Euler(), lambda k: k, "vp"),
    "diffrax_tsit5": (diffrax.Tsit5(), lambda k: 6 * k + 1, "ouve"),
    "diffrax_shark": (diffrax.ShARK(), lambda k: 2 * k, "vp"),
}


# Of a family with another row, on a process of another row.
SIBLINGS = ("ddim_noisy", "dpm_2", "diffrax_euler", "diffrax_shark")


def make_process(name):
    return process.PROCESSES[name](*([MU] if name in ("ouve", "mean_reverting") else []))


@functools.cache
def closed(name):
    sde = make_process(name)
    return sde, score.closed_form.gaussian(sde, MEAN, VAR)


def true_moments(name):
    """Mean and variance that an exact solver ends with, from the prior that it starts from."""
    sde, _ = closed(name)
    (a0, s0), (a1, s1) = (
        (float(sde.alpha(t)), float(sde.sigma(t))) for t in (sde.t_max, sde.t_end)
    )
    mu = np.zeros(2) if sde.mu is None else np.asarray(MU)
    centred = np.asarray(MEAN) - mu
    before, after = a0**2 * VAR + s0**2, a1**2 * VAR + s1**2
    start = s0 if sde.prior_std is None else float(sde.prior_std)
    # The flow of a Gaussian is affine; the prior lacks what is left of the data's mean.
    scale = (after / before) ** 0.5
    return mu + a1 * centred - scale * a0 * centred, (scale * start) ** 2


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=[pytest.mark.slow] if row in SIBLINGS else []) for row in ROWS],
)
def test_marginal_of_a_gaussian_with_counted_calls(key, row):
    solver, calls, name = ROWS[row]
    sde, exact = closed(name)
    n, steps, seen = 1500, 100, []

    def field(x, t):
        assert x.shape == (n, 2) and t.shape == (n,)
        jax.debug.callback(lambda: seen.append(1))
        return exact.noise(x, t)

    run = jax.jit(
        lambda k: solve.sample(k, field, sde, (n, 2), solver=solver, steps=steps, denoise_last=True)
    )
    out = run(key)
    jax.effects_barrier()
    assert int(out.nfe) == len(seen) == calls(steps) + 1
    assert out.last_step == "denoise" and out.prediction == "noise" and out.steps == steps
    assert jax.tree.leaves(out.result)[0].max() == 0
    mean, var = true_moments(name)
    if name == "ouve":
        # The last denoising moves far from t_min = 0.03; it is affine too.
        a, s = float(sde.alpha(0.03)), float(sde.sigma(0.03))
        pull = a * VAR / (a**2 * VAR + s**2)
        mean = np.asarray(MEAN) + pull * (mean - (np.asarray(MU) + a * np.asarray(MEAN - MU)))
        var = pull**2 * var
    error = np.asarray(out.x.mean(0)) - mean
    assert np.all(np.abs(error) < 4 * (var / n) ** 0.5 + 0.01), error
    # Discretisation bias at 100 steps: at most 10 % for the solvers of order one.
    ratio = float(out.x.var(0).mean()) / var
    assert abs(ratio - 1) < 4 * (2 / (2 * n)) ** 0.5 + 0.1, ratio
    run(jax.random.key(1))
    assert run._cache_size() == 1


@pytest.mark.parametrize(
    "row", ["ddim_noisy", "ancestral", pytest.param("heun", marks=pytest.mark.slow)]
)
def test_half_precision_comes_back_in_it(key, row):
    solver, _, name = ROWS[row]
    sde, exact = closed(name)

    def field(x, t):
        assert x.dtype == jnp.bfloat16 and t.dtype == jnp.float32
        return exact.noise(x, t)

    options = {"solver": solver, "steps": 30, "x_init": jnp.ones((3, 2), jnp.bfloat16)}
    out = jax.jit(lambda k: solve.sample(k, field, sde, (3, 2), **options).x)(key)
    assert out.dtype == jnp.bfloat16 and bool(jnp.isfinite(out).all())


@pytest.mark.parametrize(
    "row", ["heun_churned", "ancestral", pytest.param("euler_maruyama", marks=pytest.mark.slow)]
)
def test_first_samples_do_not_depend_on_the_batch(key, row):
    solver, _, name = ROWS[row]
    sde, exact = closed(name)

    @functools.partial(jax.jit, static_argnums=0)
    def draw(shape, first):
        return solve.sample(
            key,
            exact.noise,
            sde,
            shape,
            solver=solver,
            steps=10,
            first_index=first,
        ).x

    many = draw((7, 2), 0)
    np.testing.assert_allclose(many[:2], draw((2, 2), 0), atol=2e-5 * float(sde.t_max))
    np.testing.assert_allclose(many[5:], draw((2, 2), 5), atol=2e-5 * float(sde.t_max))
    assert float(jnp.abs(many[0] - many[1]).max()) > 1e-3


def test_one_sample_alone(key):
    sde, exact = closed("vp")
    for solver in ("ddim", "ancestral"):
        options = {"solver": solver, "steps": 10, "event_ndim": 1}
        out = jax.jit(lambda k, o=options: solve.sample(k, exact.noise, sde, (2,), **o))(key)
        assert out.x.shape == (2,) and bool(jnp.isfinite(out.x).all()) and out.nfe.shape == ()


@pytest.mark.parametrize(
    "row",
    ["euler_maruyama", "heun_time", "diffrax_tsit5", pytest.param("heun", marks=pytest.mark.slow)],
)
def test_start_per_sample(key, row):
    solver, _, name = ROWS[row]
    sde, exact = closed(name)
    x = jax.random.normal(jax.random.key(2), (3, 2))
    starts = jnp.array([0.9, 0.4, 0.1]) * sde.t_max

    @jax.jit
    def draw(x, start, first):
        return solve.sample(
            key,
            exact.noise,
            sde,
            x.shape,
            solver=solver,
            steps=8,
            x_init=x,
            t_start=start,
            first_index=first,
        )

    out = draw(x, starts, 0)
    assert out.times.shape == (9, 3) and out.nfe.shape == ()
    for i in (0, 2):
        alone = draw(x[i : i + 1], starts[i], i).x
        np.testing.assert_allclose(out.x[i : i + 1], alone, atol=2e-5)


def test_gradient_through_the_scan_equals_finite_differences(key):
    sde, exact = closed("vp")
    x = jax.random.normal(key, (2, 2))
    for solver in ("heun", "heun_time"):

        def total(scale, solver=solver):
            def field(x, t):
                return scale * exact.noise(x, t)

            out = solve.sample(key, field, sde, (2, 2), solver=solver, steps=6, x_init=x)
            return jnp.sum(out.x)

        step = 1e-2
        both = jax.jit(jax.value_and_grad(total))
        slope = (both(1 + step)[0] - both(1 - step)[0]) / (2 * step)
        np.testing.assert_allclose(both(1.0)[1], slope, rtol=0.02)


def test_vmap_over_keys_and_a_sweep_over_the_process(key):
    _, exact = closed("vp")

    def draw(k, beta_max=20.0):
        own = process.vp(0.1, beta_max)
        return solve.sample(k, exact.noise, own, (2, 2), solver="ddim", steps=5).x

    keys = jax.random.split(key, 3)
    sweep = jax.jit(draw)
    mapped = jax.jit(jax.vmap(draw))(keys)
    np.testing.assert_allclose(mapped[1], sweep(keys[1], 20.0), atol=1e-5)
    sweep(key, 10.0)
    assert sweep._cache_size() == 1


def test_edm_grid_to_zero_spares_one_call(key):
    sde, exact = closed("edm")
    times = solve.make_grid("karras", sde, 10, t_end=0.0)
    for end in ({"t_end": 0.0}, {"grid": np.asarray(times)}):
        out = jax.jit(
            lambda k, end=end: solve.sample(
                k, exact.data, sde, (4, 2), solver="heun", steps=10, prediction="data", **end
            )
        )(key)
        assert int(out.nfe) == 19 and bool(jnp.isfinite(out.x).all())
    traced = jax.jit(
        lambda t: solve.sample(
            key, exact.data, sde, (4, 2), solver="heun", grid=t, prediction="data"
        )
    )(times)
    assert int(traced.nfe) == 19
    np.testing.assert_allclose(traced.x, out.x, atol=1e-5)


def test_proper_ends_of_rectified_flow(key):
    sde, exact = closed("rectified")
    for solver, calls in (("ddim", 40), ("heun", 78)):
        ends = {"grid": "log_snr", "t_start": 1.0, "t_end": 0.0, "prediction": "data"}
        out = jax.jit(
            lambda k, solver=solver, ends=ends: solve.sample(
                k, exact.data, sde, (500, 2), solver=solver, steps=40, **ends
            )
        )(key)
        assert int(out.nfe) == calls
        np.testing.assert_allclose(out.x.mean(0), MEAN, atol=4 * (VAR / 500) ** 0.5 + 0.02)


def test_ddim_on_the_time_grid_is_eulers_method_of_flow_matching(key):
    sde, exact = closed("rectified")
    x = jax.random.normal(key, (3, 2))
    times = np.linspace(1.0, 0.0, 6, dtype=np.float32)
    out = solve.sample(
        key, exact.data, sde, (3, 2), solver="ddim", grid=times, x_init=x, prediction="data"
    )
    want = x
    for t0, t1 in itertools.pairwise(times):
        data = exact.data(want, jnp.full((3,), t0))
        want = want + (t1 - t0) * (want - data) / t0
    np.testing.assert_allclose(out.x, want, atol=1e-5)


def test_all_predictions_give_the_same_sample(key):
    sde, exact = closed("mean_reverting")

    @jax.jit
    def draw(k):
        return [
            solve.sample(k, getattr(exact, p), sde, (3, 2), solver="ddim", steps=5, prediction=p).x
            for p in ("score", "noise", "data", "v", "velocity")
        ]

    out = draw(key)
    for x in out[1:]:
        np.testing.assert_allclose(x, out[0], atol=1e-4)


def test_meter_runs(key, capfd):
    sde, exact = closed("vp")
    jax.jit(
        lambda k: solve.sample(k, exact.noise, sde, (2, 2), solver="ddim", steps=40, progress=True)
    )(key)
    jax.effects_barrier()
    assert "40/40" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": "dpm"}, ValueError, "solver is 'dpm'"),
        ({"solver": 3}, TypeError, "expected a diffrax solver"),
        ({"prediction": "eps"}, ValueError, "prediction is 'eps'"),
        ({"grid": "snr"}, ValueError, "grid is 'snr'"),
        ({"x_init": jnp.ones((3, 2))}, ValueError, r"x_init has shape \(3, 2\)"),
        ({"x_init": jnp.ones((2, 2), jnp.int32)}, TypeError, "floating"),
        ({"steps": 0}, ValueError, "steps is 0"),
        ({"dtype": jnp.int32}, TypeError, "floating"),
        ({"solver": "ancestral", "adjoint": diffrax.DirectAdjoint()}, ValueError, "loop"),
        ({"grid": "score_sde", "brownian": "tree"}, ValueError, "loop"),
        (
            {"solver": "heun", "grid": "score_sde", "steps": 30},
            ValueError,
            "needs a grid of levels",
        ),
        (
            {"solver": "ddim", "controller": diffrax.PIDController(rtol=1e-3, atol=1e-3)},
            ValueError,
            "estimates no error",
        ),
        ({"solver": diffrax.Euler(), "brownian": "wiener"}, ValueError, "brownian is 'wiener'"),
        ({"event_ndim": 0}, ValueError, "event_ndim is 0"),
    ],
)
def test_bad_input_raises(key, options, error, message):
    sde, exact = closed("vp")
    with pytest.raises(error, match=message):
        solve.sample(key, exact.noise, sde, (2, 2), **options)


def test_bad_keys_and_values_raise():
    sde, exact = closed("vp")
    with pytest.raises(TypeError, match="typed key"):
        solve.sample(jnp.zeros(2, jnp.uint32), exact.noise, sde, (2, 2))
    with pytest.raises(ValueError, match="eta is 2"):
        solve.ddim(2.0)
    with pytest.raises(ValueError, match="churn is -1"):
        solve.Heun(churn=-1.0)


def test_a_field_of_nan_shows_in_the_result(key):
    out = solve.sample(key, lambda x, t: x * jnp.nan, process.vp(), (2, 2), steps=3)
    assert bool((out.result == diffrax.RESULTS.nonfinite).all())
