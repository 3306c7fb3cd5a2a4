"""The mean-reverting sampler against the paper's formulas, written out in NumPy's float64.

Data N(m, diag v) in four dimensions, of which every field, map and variance is known.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import process, score, solve
from jaxgen.solve.mean_reverting import (
    MR_GRIDS,
    mr_euler_sample,
    mr_field,
    mr_grid,
    mr_heun_sample,
    mr_posterior_sample,
    mr_sample,
)
from jaxgen.solve.thresholding import clip_to, dynamic_threshold, thresholded

MEAN = np.array([[0.2, 0.5, 0.7, 0.4]])
VARIANCE = np.array([[0.01, 0.002, 0.03, 0.0005]])
MU = np.array([[0.6, 0.1, 0.3, 0.9], [0.5, 0.2, 0.2, 0.8], [0.1, 0.4, 0.6, 0.3]])
SIZE = 50 / 255
TABLES = process.ir_sde_tables()
STEPS = 12
GRID = np.linspace(98.0, 2.0, STEPS + 1) ** 1.05 * 0.75


def parts(x, mu, alpha, sigma, variance=VARIANCE):
    """Data and noise that the exact field sees."""
    gain = alpha * variance / (alpha**2 * variance + sigma**2)
    data = MEAN + gain * (x - alpha * MEAN - (1 - alpha) * mu)
    return data, (x - mu - alpha * (data - mu)) / sigma


def net_of(sde, target, variance=VARIANCE):
    """The exact network, in the paper's own terms."""

    def net(x, mu, t):
        alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
        data, noise = parts(x, mu, alpha, sigma, variance)
        velocity = alpha * SIZE * noise - sigma / SIZE * (data - mu)
        return {"data": data, "noise": noise, "velocity": velocity}[target]

    return net


def levels(times):
    """Alpha and sigma at real times, log alpha being linear between the tables' entries."""
    total = np.concatenate([[0], np.cumsum(TABLES.theta)]) * TABLES.dt
    log_alpha = -np.interp(times, np.arange(-1, 101), total)
    return np.exp(log_alpha), SIZE * np.sqrt(-np.expm1(2 * log_alpha))


def by_the_paper(x, mu, times, solver, predict, order, noise=None):
    """The paper's loop (at least 10 steps), term by term as it prints them."""
    a, s = levels(times)
    lam = np.log(a / s)
    old = []
    for i in range(1, len(times)):
        data, eps = parts(x, mu, a[i - 1], s[i - 1])
        old = [data if predict == "data" else eps, *old[:2]]
        h, n = lam[i] - lam[i - 1], min(order, i)
        first = second = np.zeros_like(x)
        if n >= 2:
            r0 = (lam[i - 1] - lam[i - 2]) / h
            first = (old[0] - old[1]) / r0
        if n == 3:
            r1 = (lam[i - 2] - lam[i - 3]) / h
            change = (first - (old[1] - old[2]) / r1) / (r0 + r1)
            first, second = first + change * r0, change
        ratio_a, ratio_s = a[i] / a[i - 1], s[i] / s[i - 1]
        if solver == "ode" and predict == "noise":
            p1 = np.exp(h) - 1
            p2 = p1 / h - 1
            p3 = p2 / h - 0.5
            x = ratio_a * x - s[i] * (p1 * old[0] + p2 * first + p3 * second)
            x = x + mu * (1 - ratio_a)
        elif solver == "ode":
            p1 = np.exp(-h) - 1
            p2 = p1 / h + 1
            p3 = p2 / h - 0.5
            x = ratio_s * x - a[i] * (p1 * old[0] - p2 * first + p3 * second)
            x = x + mu * (1 - ratio_s + ratio_s * a[i - 1] - a[i])
        elif predict == "noise":
            p1 = np.exp(h) - 1
            p2 = p1 / h - 1
            x = ratio_a * x - 2 * s[i] * (p1 * old[0] + p2 * first) + mu * (1 - ratio_a)
            x = x + s[i] * np.sqrt(np.exp(2 * h) - 1) * noise[i - 1]
        else:
            p1 = 1 - np.exp(-2 * h)
            x = ratio_s * np.exp(-h) * x + a[i] * p1 * old[0] + a[i] * (1 - p1 / (2 * h)) * first
            x = x + mu * (1 - ratio_a * np.exp(-2 * h) - a[i] * p1)
            x = x + s[i] * np.sqrt(p1) * noise[i - 1]
    return x


def states(sigma=SIZE):
    return MU + sigma * np.random.default_rng(0).normal(size=MU.shape)


@functools.cache
def drawn():
    """The sampler's noise by its definition, ``(steps, batch, 4)``."""
    own = [jax.random.fold_in(jax.random.key(3), i) for i in range(3)]
    draw = jax.jit(jax.vmap(lambda k: jax.random.normal(k, (4,), jnp.float64)))
    each = [[jax.random.fold_in(k, n) for k in own] for n in range(STEPS)]
    return np.stack([np.asarray(draw(jnp.stack(row))) for row in each])


@pytest.mark.parametrize(
    ("solver", "predict", "order", "target"),
    [
        ("ode", "data", 2, "noise"),
        ("ode", "data", 3, "velocity"),
        ("ode", "noise", 2, "data"),
        ("ode", "noise", 3, "velocity"),
        ("sde", "data", 2, "noise"),
        ("sde", "noise", 2, "noise"),
    ],
)
def test_the_formulas_of_the_paper(solver, predict, order, target):
    # Order 1 is each one's first step, order 2 the second of order 3.
    with jax.enable_x64(True):
        sde = process.ir_sde(None)
        run = jax.jit(
            lambda key, mu: mr_sample(
                key,
                net_of(sde, target),
                mu,
                sde,
                steps=STEPS,
                solver=solver,
                order=order,
                predict=predict,
                fit_target=target,
                grid=GRID,
                third="official",
                x_init=jnp.asarray(states()),
            )
        )
        out = run(jax.random.key(3), jnp.asarray(MU))
        noise = drawn() if solver == "sde" else None
    expected = by_the_paper(states(), MU, GRID, solver, predict, order, noise)
    np.testing.assert_allclose(out.x, expected, atol=1e-9)
    assert int(out.nfe) == STEPS and out.solver == f"mr_{solver}_{predict}_{order}"


@pytest.mark.parametrize("predict", ["data", "noise"])
def test_point_data_are_reached_in_one_step(predict, key):
    with jax.enable_x64(True):
        sde = process.mean_reverting(None)
        t = np.array([0.9, 0.2])
        net = net_of(sde, "noise", 0 * VARIANCE)
        run = jax.jit(
            lambda mu: mr_sample(
                key, net, mu, sde, steps=1, order=1, predict=predict, grid=t, x_init=states()
            )
        )
        x = run(jnp.asarray(MU)).x
        alpha, sigma = np.asarray(sde.alpha(t)), np.asarray(sde.sigma(t))
    mean = [a * MEAN + (1 - a) * MU for a in alpha]
    expected = mean[1] + sigma[1] / sigma[0] * (states() - mean[0])
    np.testing.assert_allclose(x, expected, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_sampler_is_dpm_solver_pp_on_the_shifted_state(order, key):
    sde = process.ir_sde(None)
    mu, x = jnp.asarray(MU, jnp.float32), jnp.asarray(states(), jnp.float32)
    net = net_of(sde, "noise")

    @jax.jit
    def run(key):
        grid = mr_grid("linspace", sde, STEPS)
        ours = mr_sample(key, net, mu, sde, steps=STEPS, order=order, x_init=x)
        plain = solve.sample(
            key,
            lambda y, t: net(y + mu, mu, t),
            sde,
            x.shape,
            solver=solve.dpmpp(order, second="taylor", lower_order_final=False),
            grid=grid,
            x_init=x - mu,
        )
        return ours.x, mu + plain.x

    ours, plain = run(key)
    np.testing.assert_allclose(ours, plain, atol=1e-5)


def test_the_posterior_sampler_has_the_chains_coefficients(key):
    """One step of the chain, its affine map read off by states, data and noise."""
    a = TABLES.alpha
    with jax.enable_x64(True):
        sde = process.ir_sde(None)

        def net(x, mu, t):
            return jnp.full_like(x, 0.25)

        def run(key, x, grid):
            return mr_sample(
                key,
                net,
                jnp.asarray(MU),
                sde,
                steps=1,
                order=1,
                solver="sde",
                grid=grid,
                fit_target="data",
                x_init=x,
            ).x

        step = jax.jit(run)
        z = drawn()[0]
        for t in (100, 40, 1):
            got = step(jax.random.key(3), jnp.asarray(states()), np.array([t, t - 1.0]))
            big, c = a[t], a[t - 1]
            rate = big / c
            mean = rate * (1 - c**2) / (1 - big**2) * (states() - MU)
            mean = MU + mean + c * (1 - rate**2) / (1 - big**2) * (0.25 - MU)
            deviation = SIZE * np.sqrt((1 - rate**2) * (1 - c**2) / (1 - big**2))
            np.testing.assert_allclose(got, mean + deviation * z, atol=1e-9)
        whole = jax.jit(lambda key, mu: mr_posterior_sample(key, net, mu, sde, fit_target="data"))(
            key, jnp.asarray(MU)
        )
    np.testing.assert_array_equal(whole.times, np.arange(100.0, -1, -1))
    assert int(whole.nfe) == 100
    # The chain ends at the data with the last level's noise.
    np.testing.assert_allclose(whole.x, a[0] * 0.25 + (1 - a[0]) * MU, atol=5 * TABLES.sigma[0])


def test_the_other_baselines_solve_the_same_equations(key):
    sde = process.ir_sde(None)
    mu, x = jnp.asarray(MU, jnp.float32), jnp.asarray(states(), jnp.float32)
    net = net_of(sde, "noise")

    @jax.jit
    def run(key):
        many = jnp.broadcast_to(mu[:1], (4000, 4))
        return (
            mr_euler_sample(key, net, mu, sde, form="ode", x_init=x),
            mr_heun_sample(key, net, mu, sde, x_init=x, steps=100),
            mr_euler_sample(key, net, many, sde, form="sde"),
        )

    euler, heun, noisy = run(key)
    assert (int(euler.nfe), int(heun.nfe), int(noisy.nfe)) == (100, 199, 100)
    # The flow of Gaussian data: affine, mean to mean and deviation to deviation.
    (a1, a0), (s1, s0) = levels(np.array([100.0, 0.0]))
    spread = np.sqrt((a0**2 * VARIANCE + s0**2) / (a1**2 * VARIANCE + s1**2))
    mean1, mean0 = (a * MEAN + (1 - a) * MU for a in (a1, a0))
    exact = mean0 + spread * (states() - mean1)
    # Measured 0.0092 and 0.0097: the last step, of Euler's kind in both, is the longest in log-SNR.
    assert np.abs(euler.x - exact).max() < 0.012
    assert np.abs(heun.x - exact).max() < 0.012
    # Four standard errors of the mean of 4000, and the discretisation's 0.003.
    assert np.abs(noisy.x.mean(0) - mean0[0]).max() < 4 * 0.17 / 4000**0.5 + 0.003
    ratio = noisy.x.std(0) / np.sqrt(a0**2 * VARIANCE[0] + s0**2)
    assert np.abs(ratio - 1).max() < 4 / 8000**0.5 + 0.06


# --- grids, ends and options ----------------------------------------------------------------------


def test_grids():
    def grids(sde):
        return {
            "linspace": mr_grid("linspace", sde, 20),
            "leading": mr_grid("leading", sde, 20),
            **{k: mr_grid(k, sde, 9) for k in ("trailing", "karras_t", "linear_lambda")},
            "karras_n": mr_grid("karras_n", sde, 9),
        }

    sde = process.ir_sde(None)
    found = jax.jit(grids)(sde)
    assert found["linspace"].tolist() == list(np.arange(100.0, -1, -5))
    # In steps of 100 // 21.
    assert found["leading"].tolist() == list(np.arange(80.0, -1, -4))
    np.testing.assert_allclose(found["trailing"], 100 - 10 * np.arange(10), rtol=1e-6)
    karras = np.linspace(100 ** (1 / 7), 1, 10) ** 7
    np.testing.assert_allclose(found["karras_t"], karras, rtol=1e-5)
    alpha, sigma = levels(np.asarray(found["linear_lambda"], float))
    expected = np.linspace(TABLES.lam[100], TABLES.lam[0], 10)
    np.testing.assert_allclose(np.log(alpha / sigma), expected, atol=1e-4)
    alpha, sigma = levels(np.asarray(found["karras_n"], float))
    ends = np.exp(-TABLES.lam[[100, 0]] / 7)
    np.testing.assert_allclose(sigma / alpha, np.linspace(*ends, 10) ** 7, rtol=1e-4)
    assert set(found) == set(MR_GRIDS)


def test_grids_keep_above_lam_min():
    def grids(sde, lam_min):
        return {name: mr_grid(name, sde, 10, lam_min=lam_min) for name in MR_GRIDS}

    sde = process.ir_sde(None)
    found = jax.jit(grids)(sde, -2.0)
    for times in found.values():
        alpha, sigma = levels(float(times[0]))
        assert np.log(alpha / sigma) >= -2.0 - 1e-4
    assert abs(np.log(alpha / sigma) + 2) < 1e-4
    # A known schedule gives known times, in a trace too.
    known = []
    jax.eval_shape(lambda: known.append(mr_grid("linear_lambda", sde, 10, lam_min=-2.0)))
    np.testing.assert_allclose(known[0], found["linear_lambda"], rtol=1e-5)
    # In continuous time nothing is rounded, and without a bound t_max is the first.
    smooth = mr_grid("leading", process.mean_reverting(None), 9, lam_min=None)
    np.testing.assert_allclose(np.diff(smooth), -0.1, rtol=1e-4)


def test_denoise_last_replaces_the_last_step(key):
    sde, mu = process.ir_sde(None), jnp.asarray(MU, jnp.float32)
    net = net_of(sde, "noise")
    x = jnp.asarray(states(), jnp.float32)
    out = jax.jit(lambda k: mr_sample(k, net, mu, sde, steps=5, denoise_last=True, x_init=x))(key)
    assert int(out.nfe) == 5 and float(out.times[-1]) == 20
    # The published orders 1, 2, 2, 1 and then the data prediction.
    x = states()
    a, s = levels(np.linspace(100, 0, 6))
    lam, old = np.log(a / s), []
    for i, order in enumerate((1, 2, 2, 1), 1):
        old = [parts(x, MU, a[i - 1], s[i - 1])[0], *old[:1]]
        h = lam[i] - lam[i - 1]
        p1 = np.expm1(-h)
        x = MU + s[i] / s[i - 1] * (x - MU) - a[i] * p1 * (old[0] - MU)
        if order == 2:
            slope = (old[0] - old[1]) * h / (lam[i - 1] - lam[i - 2])
            x = x + a[i] * (p1 / h + 1) * slope
    np.testing.assert_allclose(out.x, parts(x, MU, a[4], s[4])[0], atol=1e-5)


def test_thresholds(key):
    sde, mu = process.ir_sde(None), jnp.asarray(MU, jnp.float32)

    def net(x, mu, t):
        return jnp.broadcast_to(jnp.array([[-2.0, 0.0, 1.0, 4.0]]), x.shape)

    def run(cut):
        return mr_sample(
            key, net, mu, sde, steps=2, fit_target="data", threshold=cut, denoise_last=True, order=1
        ).x

    np.testing.assert_array_equal(jax.jit(lambda: run(clip_to(0.0, 1.0)))()[0], [0, 0, 1, 1])
    # The quantile of |x| at 2/3 is 2, cut down to 1.6: then all is divided by it.
    dynamic = jax.jit(lambda: run(dynamic_threshold(2 / 3, limit=1.6)))()
    np.testing.assert_allclose(dynamic[0], [-1, 0, 1 / 1.6, 1], rtol=1e-6)
    with pytest.raises(ValueError, match=r"shape \(3,\) and event_ndim is None"):
        dynamic_threshold()(jnp.ones(3))
    with pytest.raises(ValueError, match=r"field\(x, t\) returned shape \(2,\)"):
        thresholded(lambda x, t: x[0], process.vp(), clip_to(0.0, 1.0))(jnp.ones((3, 2)), 0.5)
    with pytest.raises(ValueError, match="low is 1"):
        clip_to(1.0, 0.0)
    with pytest.raises(ValueError, match="ratio is 0"):
        dynamic_threshold(0.0)
    with pytest.raises(ValueError, match="least is 2"):
        dynamic_threshold(least=2.0)


def test_a_velocity_trains_by_the_librarys_loss(key):
    """At its own target the loss is zero: equation (3) of the file is the library's "v"."""
    sde = process.ir_sde(jnp.asarray(MU, jnp.float32))
    point = jnp.broadcast_to(jnp.asarray(MEAN, jnp.float32), MU.shape)
    field, prediction = mr_field(net_of(sde, "velocity", 0 * VARIANCE), sde, "velocity")
    loss = jax.jit(
        lambda k: score.denoising_loss(k, field, sde, point, prediction=prediction, t_min=1.0)
    )(key)
    assert prediction == "v" and float(loss.max()) < 1e-9


def test_batch_shaped_anchors_transforms_and_precision(key):
    sde = process.ir_sde(None)
    net = net_of(sde, "noise")

    def run(key, mu, **options):
        return mr_sample(key, net, mu, sde, steps=4, solver="sde", **options).x

    @jax.jit
    def runs(key, mu):
        return (
            run(key, mu),
            run(key, mu[2:], first_index=2),
            jax.vmap(lambda k, m: run(k, m, shape=(2, 4)))(jax.random.split(key, 3), mu),
            run(key, mu.astype(jnp.bfloat16)),
        )

    batched, alone, mapped, half = runs(key, jnp.asarray(MU, jnp.float32))
    # A sample keeps its noise whatever the batch; its anchor is its own.
    np.testing.assert_allclose(alone[0], batched[2], atol=1e-6)
    # One anchor for all of a batch, mapped over keys and anchors.
    assert mapped.shape == (3, 2, 4) and bool(jnp.isfinite(mapped).all())
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), batched, atol=0.05)


def test_nan_of_the_network_spreads(key):
    sde, mu = process.ir_sde(None), jnp.asarray(MU, jnp.float32)
    bad = jnp.array([[0.0], [jnp.nan], [0.0]])
    net = net_of(sde, "noise")
    out = jax.jit(
        lambda k: mr_sample(
            k, lambda x, mu, t: net(x, mu, t) + bad, mu, sde, steps=3, threshold=clip_to(0, 1)
        )
    )(key)
    assert np.isnan(out.x[1]).all() and np.isfinite(out.x[::2]).all()


def test_bad_input(key):
    sde, mu = process.ir_sde(None), jnp.asarray(MU, jnp.float32)

    def run(mu=mu, sde=sde, net=lambda x, mu, t: x, **options):
        return jax.eval_shape(lambda: mr_sample(key, net, mu, sde, **options).x)

    for match, options in {
        "steps is 2 for order 3": {"steps": 2, "order": 3},
        "steps is 1 for order 1 with denoise_last=True": {
            "steps": 1,
            "order": 1,
            "denoise_last": True,
        },
        'order is 3 for solver "sde"': {"solver": "sde", "order": 3},
        "solver is 'pde'": {"solver": "pde"},
        "predict is 'v'": {"predict": "v"},
        "fit_target is 'v'": {"fit_target": "v"},
        "third is 'wrong'": {"third": "wrong", "order": 3},
        "order is 4": {"order": 4},
        "grid is 'karras'": {"grid": "karras"},
        "mu has shape": {"shape": (3, 5)},
        "strictly falling": {"grid": np.array([90.0, 50.0, 50.0, 1.0]), "steps": 3},
        r"expected times in \[0": {"grid": np.array([101.0, 50.0, 1.0]), "steps": 2},
        r"grid has shape \(3,\)": {"grid": np.array([90.0, 50.0, 1.0]), "steps": 3},
        "strictly falling times: fewer steps": {"grid": "leading", "steps": 200},
        "lam_min below 6": {"lam_min": 8.0},
        "net.* returned shape": {"net": lambda x, mu, t: x[:, :2]},
    }.items():
        with pytest.raises(ValueError, match=match):
            run(**options)
    for match, options in {
        "brownian is set.*mu has a batch axis.*event_ndim=1": {"brownian": "tree"},
        "t_end is 1.0, and the grid alone": {"t_end": 1.0},
        "t_start is 90.0": {"t_start": 90.0},
    }.items():
        with pytest.raises(ValueError, match=match):
            run(**options)
    with pytest.raises(ValueError, match="grid is 'leading', and the grid alone"):
        mr_posterior_sample(key, lambda x, mu, t: x, mu, sde, grid="leading")
    with pytest.raises(TypeError, match="unexpected option 'corrector'"):
        run(corrector=True)
    # One anchor alone serves a solver that takes each sample by itself.
    assert run(mu=mu[0], shape=(3, 4), steps=3, brownian="tree", solver="sde").shape == (3, 4)
    with pytest.raises(ValueError, match="sigma_inf is 0"):
        process.mean_reverting(mu, sigma_inf=0.0)
    with pytest.raises(ValueError, match="velocity is defined for mean_reverting"):
        run(sde=process.vp(), fit_target="velocity")
    # No signal at all at the start: the core refuses to divide by it.
    with pytest.raises(ValueError, match="alpha is 0"):
        run(sde=process.cosine(), grid=np.array([1.0, 0.5, 0.1]), steps=2)
    with pytest.raises(ValueError, match=r"sde\.mu is None"):
        mr_field(lambda x, mu, t: x, sde)
    with pytest.raises(TypeError, match="mu has dtype int32"):
        run(mu=jnp.ones((3, 4), jnp.int32))
    with pytest.raises(ValueError, match="form is 'flow'"):
        mr_euler_sample(key, lambda x, mu, t: x, mu, sde, form="flow")
