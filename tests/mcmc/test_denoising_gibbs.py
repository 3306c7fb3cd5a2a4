"""Denoising Gibbs chains and what is made of their states, against closed forms."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jaxgen import mcmc, process, score, solve
from jaxgen.mcmc import GibbsState, Start
from jaxgen.mcmc import denoising_gibbs as gibbs

SDE = process.edm(0.01, 50.0)
GRID = gibbs.levels(0.01, 50.0, 60)
MEANS = np.array([[-1.0, 0.0], [2.0, 1.0]], np.float32)
LAW = score.closed_form.mixture(SDE, [0.4, 0.6], MEANS, [0.04, 0.04])


def noise(x, t):
    """The exact field for data N(0, 1); it compiles faster than a mixture's."""
    return (t / (1 + t**2)).reshape((*t.shape, 1)) * x


def logits(x):
    """Its classifier, exact but for the normalisation."""
    v = (1 + GRID**2).reshape((1,) * (x.ndim - 1) + GRID.shape)
    return -jnp.log(v) - 0.5 * jnp.sum(x**2, -1, keepdims=True) / v


def near(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# --- levels and their posterior -------------------------------------------------------------------


def test_the_published_grid():
    grid = np.asarray(gibbs.levels(0.01, 50.0), np.float64)
    assert grid.shape == (1000,) and (np.diff(grid) < 0).all()
    near(grid[[0, -1]], [50.0, 0.01 * 5000**0.001], 1e-6)
    near(grid, 0.01 * 5000 ** np.linspace(1, 1e-3, 1000), 1e-5)
    near(gibbs.levels(0.05, 5.0, 32, last=0.0), np.geomspace(5.0, 0.05, 32), 1e-6)


POSTERIORS = {  # E log sigma, likeliest index and level, P(sigma < 0.5): float64 quadrature
    (0.5, 0.5): (0.363917, 448, 1.101112, 0.015856),
    (2.0, 1.0): (-2.964997, 999, 0.010086, 0.974407),
    (6.0, -3.0): (1.731957, 286, 4.375872, None),
}


@pytest.mark.parametrize("x64", [False, True])
def test_the_exact_posterior_of_the_level(x64):
    with jax.enable_x64(x64):
        law = score.closed_form.mixture(
            process.edm(0.01, 50.0), np.array([0.4, 0.6]), np.float64(MEANS), np.full(2, 0.04)
        )
        grid = gibbs.levels(0.01, 50.0)
        x = jnp.array(list(POSTERIORS))
        log_probs = np.asarray(jax.jit(law.level_log_prob)(x, grid), np.float64)
        grid = np.asarray(grid, np.float64)
    tolerance = 1e-5 if x64 else 1e-3
    for own, (mean, index, level, below) in zip(log_probs, POSTERIORS.values(), strict=True):
        weights = np.exp(own)
        assert abs(weights @ np.log(grid) - mean) < tolerance * 3
        assert own.argmax() == index and abs(grid[index] - level) < tolerance
        assert below is None or abs(weights[grid < 0.5].sum() - below) < tolerance


# --- the sweep ------------------------------------------------------------------------------------


def test_a_sweep_at_a_known_level_adds_its_square():
    """Data N(0, 0.09 I) in many dimensions, where the level is known: v <- v + eta^2 / (4 v)."""
    size, chains, eta = 3072, 100, 0.8
    grid = gibbs.levels(0.01, 50.0, 1000)

    def known(x):
        v = (0.09 + grid**2)[None]
        return -0.5 * (size * jnp.log(v) + jnp.sum(x**2, -1, keepdims=True) / v)

    def narrow(x, t):
        return (t / (0.09 + t**2))[:, None] * x

    def run(key):
        x = 1.09**0.5 * jax.random.normal(key, (chains, size))
        state = GibbsState(x, jnp.full(chains, jnp.argmin(jnp.abs(grid - 1))))
        return gibbs.chain(
            key, state, narrow, SDE, known, grid, step_size=eta, skip=1, draws=12, pick="last"
        ).start

    start = jax.jit(run)(jax.random.key(0))
    v, measured = 1.09, np.mean(np.square(np.asarray(start.x, np.float64)), axis=(1, 2))
    expected = []
    for _ in range(12):
        v += eta**2 / (4 * v)
        expected.append(v)
    near([expected[i] for i in (0, 3, 11)], [1.23679, 1.59114, 2.26933], 1e-5)
    # The standard error of a variance of 307,200 numbers is 0.26 %; the grid adds as much.
    assert np.abs(measured / expected - 1).max() < 0.01


PROCESSES = {
    "edm": (SDE, "noise"),
    "vp": (process.vp(), "data"),
    "rectified": (process.rectified(), "velocity"),
    "ve": (process.ve(), "score"),
    "reverting": (process.mean_reverting(jnp.array([0.3, -0.2]), sigma_inf=1.0), "noise"),
}
THREE = GibbsState(jnp.array([[0.3, 0.1], [-2.0, 1.0], [4.0, 4.0]]), jnp.array([30, 25, 20]))


def mixture_logits(x):
    return LAW.level_log_prob(x, GRID)


@functools.cache
def one_step(name, scaling="fixed"):
    sde, prediction = PROCESSES[name]
    law = score.closed_form.mixture(sde, [0.4, 0.6], MEANS, [0.04, 0.04])
    field = getattr(law, prediction)
    options = {"step_size": 0.5, "prediction": prediction, "scaling": scaling}
    run = jax.jit(lambda key: gibbs.step(key, THREE, field, sde, mixture_logits, GRID, **options))
    return jax.tree.map(np.asarray, run(jax.random.key(0)))


@pytest.mark.parametrize("scaling", ["fixed", "relative"])
def test_one_step_is_its_formula(scaling):
    sigma = GRID[THREE.level][:, None]
    eta = 0.5 * (sigma**2 if scaling == "relative" else jnp.ones((3, 1)))
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(0), i), 0) for i in range(3)]
    noise = jnp.stack([jax.random.normal(k, (2,)) for k in keys])
    expected = THREE.x + 0.5 * eta * LAW.score(THREE.x, sigma[:, 0]) + jnp.sqrt(eta) * noise
    near(one_step("edm", scaling).x, expected)


@pytest.mark.parametrize(
    "name",
    ["vp", "reverting", *(pytest.param(n, marks=pytest.mark.slow) for n in ("rectified", "ve"))],
)
def test_every_process_and_prediction_gives_the_same_chain(name):
    ours, reference = one_step(name), one_step("edm")
    near(ours.x, reference.x, 3e-4)
    np.testing.assert_array_equal(ours.level, reference.level)


# --- the chain ------------------------------------------------------------------------------------

X = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
FIRST = GibbsState(jnp.asarray(X), jnp.full(8, 35))
OPTIONS = {"step_size": 0.3, "skip": 3, "draws": 6}


@functools.partial(jax.jit, static_argnames=("pick",))
def run_chain(key, state, pick="min"):
    return gibbs.chain(key, state, noise, SDE, logits, GRID, pick=pick, **OPTIONS)


def each_alone(key, state):
    """The chains' states, each chain alone and sweep by sweep."""
    options = {"step_size": OPTIONS["step_size"]}
    sweep = jax.jit(
        jax.vmap(
            lambda key, j, state: gibbs.step(
                jax.random.fold_in(key, j), state, noise, SDE, logits, GRID, **options
            ),
            in_axes=(0, None, 0),
        )
    )
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(8))
    states = [state]
    for j in range(18):
        states.append(sweep(keys, j, states[-1]))
    return jax.tree.map(lambda *v: np.stack(v), *states)


def test_chains_are_their_sweeps_alone_and_keep_the_lowest_level():
    key = jax.random.key(1)
    states, run = each_alone(key, FIRST), run_chain(key, FIRST)
    np.testing.assert_array_equal(run.info.level.reshape(18, 8), states.level[1:])
    near(run.state.x, states.x[-1])
    assert int(run.nfe) == 18 and run.nfe.dtype == jnp.int32
    repeats = 0
    for i in range(8):
        kept = [3 * d + int(states.level[3 * d : 3 * d + 4, i].argmax()) for d in range(6)]
        near(run.start.x[:, i], states.x[kept, i])
        near(run.start.sigma[:, i], np.asarray(GRID)[states.level[kept, i]])
        assert int(run.info.distinct[i]) == len(set(kept))
        repeats += 6 - len(set(kept))
    assert repeats > 0
    last = run_chain(key, FIRST, pick="last")
    near(last.start.x, states.x[3::3])
    assert last.info.distinct.tolist() == [6] * 8


def test_chains_on_eight_devices():
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    key = jax.random.key(1)

    def run(state, index):
        options = OPTIONS | {"restart": True, "first_index": index[0]}
        return tuple(gibbs.chain(key, state, noise, SDE, logits, GRID, **options).start)

    spec = jax.P("i")
    parts = jax.shard_map(run, mesh=mesh, in_specs=(spec, spec), out_specs=(jax.P(None, "i"),) * 2)
    x, sigma = jax.jit(parts)(FIRST, jnp.arange(8))
    together = run_chain(key, FIRST).start
    near(x, together.x)
    near(sigma, together.sigma)


@functools.cache
def visited(step_size, select, sweeps, chains=400):
    """Share of sweeps at each of 32 levels, data N(0, 1) on the line, from stationarity."""
    sde, grid = process.edm(0.05, 5.0), gibbs.levels(0.05, 5.0, 32, last=0.0)
    law = score.closed_form.gaussian(sde, jnp.zeros(1), 1.0)

    @jax.jit
    def run(key, step_size):
        key_level, key_x, key = jax.random.split(key, 3)
        level = jax.random.randint(key_level, (chains,), 0, 32)
        state = GibbsState(law.sample(key_x, (chains, 1), grid[level]), level)
        info = gibbs.chain(
            key,
            state,
            law.noise,
            sde,
            lambda x: law.level_log_prob(x, grid),
            grid,
            step_size=step_size,
            skip=1,
            draws=sweeps,
            select=select,
        ).info
        return jnp.zeros(32).at[info.level.reshape(-1)].add(1.0, mode="drop")

    counts = np.asarray(run(jax.random.key(0), step_size), np.float64)
    assert counts.sum() == chains * sweeps
    return counts / counts.sum()


def distance_to_uniform(shares):
    return 0.5 * np.abs(shares - 1 / 32).sum()


def test_drawn_levels_keep_the_law():
    assert distance_to_uniform(visited(0.05, "sample", sweeps=500)) < 0.01


@pytest.mark.slow
def test_stationarity_over_4000_sweeps():
    far = {e: distance_to_uniform(visited(e, "sample", 4000)) for e in (0.05, 0.5)}
    likeliest = distance_to_uniform(visited(0.05, "argmax", 4000))
    print(far, likeliest)
    assert far[0.05] < 0.01
    assert 0.015 < far[0.5] < 0.03  # the bias of unadjusted Langevin
    assert likeliest > 0.4


@pytest.mark.slow
def test_at_a_fixed_low_level_no_chain_leaves_its_mode():
    means = np.array([[a, b] for a in (-4, 0, 4) for b in (-4, 0, 4)], np.float32)
    law = score.closed_form.mixture(SDE, np.arange(1, 10), means, np.full(9, 0.01, np.float32))
    first = law.sample(jax.random.key(0), (200, 2), 0.1)

    def nearest(x):
        return jnp.argmin(jnp.sum((x[..., None, :] - means[None]) ** 2, -1), -1)

    @jax.jit
    def run(key):
        return gibbs.chain(
            key,
            GibbsState(first, jnp.ones(200, int)),
            law.noise,
            SDE,
            lambda x: jnp.zeros((200, 2)),
            jnp.array([0.2, 0.1]),
            sigma_cap=0.15,
            step_size=0.02,
            skip=1000,
            draws=1,
        ).state.x

    np.testing.assert_array_equal(nearest(run(jax.random.key(1))), nearest(first))


def test_the_likeliest_level_is_taken_with_its_prior():
    prior = jnp.linspace(0.0, 30.0, 60)
    options = {"step_size": 0.3, "select": "argmax", "log_prior": prior}
    run = jax.jit(lambda key: gibbs.step(key, FIRST, noise, SDE, logits, GRID, **options))
    out = run(jax.random.key(0))
    joint = np.asarray(logits(out.x)) + np.asarray(prior)
    np.testing.assert_array_equal(out.level, joint.argmax(-1))


def test_caps_and_priors_rule_levels_out():
    prior = jnp.where(GRID < 0.3, -jnp.inf, 0.0)
    run = jax.jit(
        lambda key: gibbs.chain(
            key,
            FIRST,
            noise,
            SDE,
            logits,
            GRID,
            log_prior=prior,
            sigma_cap=2.0,
            **OPTIONS,
        )
    )(jax.random.key(0))
    sigma = np.asarray(GRID)[run.info.level]
    assert sigma.min() >= 0.3 and sigma.max() <= 2.0


# --- chains that are lost -------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("restart",))
def run_lossy(key, restart):
    """The classifier fails for states beyond 2.5, and a state without a level is lost."""

    def failing(x):
        return jnp.where(jnp.abs(x[:, :1]) > 2.5, jnp.nan, logits(x))

    return gibbs.chain(key, FIRST, noise, SDE, failing, GRID, restart=restart, **OPTIONS)


def test_a_lost_chain_is_nan_or_restarted():
    key = jax.random.key(0)
    lost = run_lossy(key, False)
    is_lost = np.isnan(np.asarray(lost.state.x)).any(-1)
    assert is_lost.any() and not is_lost.all()
    # Once lost it is lost for good, and the others are what they were.
    gone = np.asarray(lost.info.level).reshape(18, 8) == len(GRID)
    assert (np.diff(gone.astype(int), axis=0) >= 0).all()
    near(lost.start.x[:, ~is_lost], run_chain(key, FIRST).start.x[:, ~is_lost])
    assert not np.asarray(lost.info.restarts).any()
    run = run_lossy(key, True)
    assert np.isfinite(run.start.x).all() and np.isfinite(run.start.sigma).all()
    np.testing.assert_array_equal(np.asarray(run.info.restarts) > 0, is_lost)


@pytest.mark.slow
def test_a_lost_chain_is_an_error_under_checkify():
    error, _ = checkify.checkify(lambda key: run_lossy(key, False))(jax.random.key(0))
    with pytest.raises(checkify.JaxRuntimeError, match=r"a chain is lost|t is outside"):
        error.throw()


def test_a_level_out_of_range_gives_nan_and_an_error_under_checkify():
    def run(level):
        return gibbs.step(
            jax.random.key(0),
            GibbsState(FIRST.x, level),
            noise,
            SDE,
            logits,
            GRID,
            step_size=0.3,
        )

    level = jnp.array([-1, 60, 100, 35, 35, 35, 35, 35])
    out = jax.jit(run)(level)
    np.testing.assert_array_equal(np.isnan(out.x).any(-1), [True] * 3 + [False] * 5)
    np.testing.assert_array_equal(np.asarray(out.level) == 60, [True] * 3 + [False] * 5)
    error, _ = checkify.checkify(jax.jit(run))(level)
    with pytest.raises(checkify.JaxRuntimeError, match=r"level out of range|t is outside"):
        error.throw()


# --- denoising ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tweedie", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_start_at_the_last_level_is_denoised_by_tweedie_alone(tweedie):
    sigma = jnp.array([[0.01, 0.5, 0.008], [0.4, 0.6, 0.7]])
    sde = process.edm(0.005, 50.0)
    law = score.closed_form.mixture(sde, [0.4, 0.6], MEANS, [0.04, 0.04])

    @jax.jit
    def run(key):
        x = jax.random.normal(key, (2, 3, 2))
        options = {"steps": 4, "t_end": 0.01}
        start = Start(x, sigma)
        out = mcmc.denoise(key, start, law.noise, sde, tweedie=tweedie, **options)
        options |= {"solver": "heun", "x_init": x[1], "t_start": sigma[1], "denoise_last": tweedie}
        direct = solve.sample(key, law.noise, sde, (3, 2), **options)
        return out, direct.x, law.data(x[0], sigma[0])

    out, direct, data = run(jax.random.key(0))
    near(out.x[0, ::2], data[::2])
    near(out.x[1], direct)
    assert (out.result == diffrax.RESULTS.successful).all()
    # Heun's eight, and Tweedie's where it was asked for or where a start needed it.
    assert out.nfe.tolist() == ([9, 9] if tweedie else [9, 8])
    assert out.tweedie.tolist() == ([1, 1] if tweedie else [1, 0])


def test_states_of_a_process_with_decay_are_rescaled():
    """VP from x/alpha at sigma/alpha is EDM from there: Heun's solver works in these."""
    start = Start(jnp.array([[[0.5, 1.0], [2.0, 0.0], [-1.0, -1.0]]]), jnp.ones((1, 3)))
    ends = []
    for sde in (SDE, process.vp()):
        law = score.closed_form.mixture(sde, [0.4, 0.6], MEANS, [0.04, 0.04])
        end = sde.inverse_log_snr(-2 * jnp.log(0.5))
        run = jax.jit(
            lambda s, law=law, sde=sde, end=end: mcmc.denoise(
                jax.random.key(0), s, law.noise, sde, steps=6, t_end=end, tweedie_sigma=0.4
            )
        )
        ends.append(run(start))
    near(ends[0].x, ends[1].x, 2e-4)


SOLVERS = ["reverse_diffusion"]
MORE = ["ddim", "euler_maruyama", "ancestral", "heun_time"]


@pytest.mark.parametrize(
    "solver", [*SOLVERS, *(pytest.param(s, marks=pytest.mark.slow) for s in MORE)]
)
def test_every_solver_starts_each_sample_at_its_own_level(solver):
    """From N(m, v + s^2) at its own level, 40 steps lead each sample to the data's law."""
    sde, n = process.ve(), 500
    law = score.closed_form.gaussian(sde, jnp.full(2, 1.5), 0.25)
    sigma = jnp.broadcast_to(jnp.where(jnp.arange(n) < n // 2, 0.5, 20.0), (2, n))

    @jax.jit
    def run(key):
        x = 1.5 + jnp.sqrt(0.25 + sigma**2)[..., None] * jax.random.normal(key, (2, n, 2))
        options = {"solver": solver, "steps": 40, "grid": "time"}
        return mcmc.denoise(key, Start(x, sigma), law.noise, sde, **options)

    out = run(jax.random.key(0))
    assert out.nfe.tolist() == [80 if solver == "heun_time" else 41] * 2
    for half in np.split(np.asarray(out.x, np.float64), 2, axis=1):
        # Four standard errors are 0.063 and 0.045; the solvers' own errors at 40 steps are 0.02.
        assert abs(half.mean() - 1.5) < 0.08
        assert abs(half.var() - 0.25) < 0.06
        # Each draw has noise of its own: 500 pairs, five standard errors.
        assert abs(np.corrcoef(half.reshape(2, -1))[0, 1]) < 0.22


# --- the whole ------------------------------------------------------------------------------------


class Counter:
    """A field that counts its calls, and a label by the nearer mean."""

    def __init__(self):
        self.calls = 0

    def _count(self):
        self.calls += 1

    def __call__(self, x, t):
        jax.debug.callback(self._count)
        return noise(x, t)


def label(x):
    return (x[..., 0] > 0).astype(int)


WHOLE = OPTIONS | {"steps": 3}
PARTS = {"init": 11 + 7, "chain": 18, "solver": 6 * 6, "tweedie": 6}


def test_the_whole_counts_every_call_of_the_field(capfd):
    field = Counter()
    options = WHOLE | {
        "init_options": {"steps": 6, "t_end": 0.0, "warm_up": ((3, 0.5), (4, 0.3))},
        "label": label,
        "progress": True,
    }
    run = jax.jit(lambda key: mcmc.denoising_mcmc(key, field, SDE, logits, GRID, (5, 2), **options))
    out = run(jax.random.key(0))
    jax.effects_barrier()
    assert {k: int(v) for k, v in out.spent._asdict().items()} == PARTS
    assert int(out.nfe) == sum(PARTS.values()) == field.calls
    assert out.nfe.dtype == jnp.int32
    assert float(out.nfe_per_sample) == pytest.approx(sum(PARTS.values()) / 6)
    assert out.x.shape == (6, 5, 2) and np.isfinite(out.x).all()
    assert (out.result == diffrax.RESULTS.successful).all()
    labels = np.asarray(jax.jit(jax.vmap(label))(out.x))
    near(out.mode_changes, (labels[1:] != labels[:-1]).mean(0))
    changed = (np.asarray(out.start.x[1:]) != np.asarray(out.start.x[:-1])).any(-1)
    np.testing.assert_array_equal(out.distinct, 1 + changed.sum(0))
    assert (np.diff(out.level_quantiles) >= 0).all() and not np.asarray(out.restarts).any()
    lines = capfd.readouterr().err
    assert "denoising Gibbs" in lines and "denoise" in lines


def test_the_whole_under_vmap_is_its_parts():
    def run(key):
        return mcmc.denoising_mcmc(key, noise, SDE, logits, GRID, (8, 2), state=FIRST, **WHOLE)

    both = jax.random.split(jax.random.key(0))
    pair = jax.jit(jax.vmap(run))(both)
    _, key_chain, key_denoise = jax.random.split(both[1], 3)
    start = run_chain(key_chain, FIRST).start
    near(pair.start.x[1], start.x)
    denoised = jax.jit(lambda s: mcmc.denoise(key_denoise, s, noise, SDE, steps=3))(start)
    near(pair.x[1], denoised.x, 1e-4)
    assert pair.nfe.tolist() == [60, 60] and pair.spent.init.tolist() == [0, 0]


@pytest.mark.slow
def test_adaptive_integrators_count_for_each_sample():
    options = OPTIONS | {
        "solver": diffrax.Tsit5(),
        "controller": diffrax.PIDController(rtol=1e-6, atol=1e-6),
        "grid": "log_snr",
    }
    run = jax.jit(
        lambda key: mcmc.denoising_mcmc(
            key, noise, SDE, logits, GRID, (8, 2), state=FIRST, **options
        )
    )
    out = run(jax.random.key(0))
    assert out.nfe.shape == (8,) and len(set(out.nfe.tolist())) > 1
    np.testing.assert_array_equal(out.nfe, 18 + out.spent.solver + 6)
    assert (out.result == diffrax.RESULTS.successful).all() and np.isfinite(out.x).all()


@pytest.mark.slow
def test_first_states_on_eight_devices():
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))

    def run(index, n):
        options = {"warm_up": ((2, 0.3),), "steps": 3, "first_index": index[0]}
        key = jax.random.key(1)
        return tuple(gibbs.init(key, noise, SDE, logits, GRID, (n, 2), **options).state)

    spec = jax.P("i")
    parts = jax.shard_map(lambda i: run(i, 1), mesh=mesh, in_specs=spec, out_specs=(spec, spec))
    x, level = jax.jit(parts)(jnp.arange(8))
    together = jax.jit(lambda i: run(i, 8))(jnp.zeros(1, int))
    near(x, together[0], 1e-4)
    np.testing.assert_array_equal(level, together[1])


# --- bad input ------------------------------------------------------------------------------------


def good():
    return {
        "key": jax.random.key(0),
        "state": FIRST,
        "field": noise,
        "sde": SDE,
        "level_logits": logits,
        "levels": GRID,
        "step_size": 0.3,
        "skip": 1,
        "draws": 1,
    }


WRONG = [
    ({"levels": GRID[::-1]}, ValueError, "strictly falling"),
    ({"levels": jnp.array([1.0, 0.0])}, ValueError, "positive"),
    ({"levels": jnp.array([1.0, 1.0])}, ValueError, "strictly falling"),
    ({"levels": jnp.ones((2, 2))}, ValueError, "shape"),
    ({"levels": jnp.array([3, 2, 1])}, TypeError, "levels has dtype"),
    ({"levels": gibbs.levels(0.01, 80.0, 60)}, ValueError, "that the process knows"),
    ({"levels": gibbs.levels(0.001, 50.0, 60)}, ValueError, "that the process knows"),
    ({"level_logits": lambda x: logits(x)[:, 1:]}, ValueError, "60 levels"),
    ({"level_logits": GRID}, TypeError, "level_logits"),
    ({"state": GibbsState(FIRST.x, jnp.full(8, 61))}, ValueError, "indices of 60 levels"),
    ({"state": GibbsState(FIRST.x, jnp.full(8, -1))}, ValueError, "indices of 60 levels"),
    ({"state": GibbsState(FIRST.x, jnp.full(4, 1))}, ValueError, "state.level has shape"),
    ({"state": GibbsState(FIRST.x, jnp.ones(8))}, TypeError, "state.level has dtype"),
    ({"step_size": 0.0}, ValueError, "step_size is 0.0"),
    ({"step_size": -1.0}, ValueError, "step_size"),
    ({"step_size": jnp.ones(5)}, ValueError, "step_size has shape"),
    ({"skip": 0}, ValueError, "skip"),
    ({"draws": 0}, ValueError, "draws"),
    ({"pick": "max"}, ValueError, "min, last"),
    ({"select": "mode"}, ValueError, "sample, argmax"),
    ({"scaling": "none"}, ValueError, "fixed, relative"),
    ({"prediction": "x0"}, ValueError, "prediction"),
    ({"log_prior": jnp.zeros(3)}, ValueError, "log_prior has shape"),
    ({"sigma_cap": 0.001}, ValueError, "sigma_cap"),
    ({"key": jax.random.PRNGKey(0)}, TypeError, "typed key"),
    ({"cap": 1.0}, TypeError, "cap"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_bad_input_of_the_chain(change, error, message):
    arguments = good() | change
    with pytest.raises(error, match=message):
        gibbs.chain(**arguments)


def test_bad_input_of_the_rest():
    key = jax.random.key(0)
    for warm_up in (3, ((3,),), ((-1, 0.1),), ((2, 0.0),)):
        with pytest.raises(ValueError, match="warm_up"):
            gibbs.init(key, noise, SDE, logits, GRID, (5, 2), warm_up=warm_up)
    with pytest.raises(ValueError, match="bump"):
        gibbs.init(key, noise, SDE, logits, GRID, (5, 2), warm_up=(), bump=-1.0)
    with pytest.raises(ValueError, match="x0 has shape"):
        gibbs.init(key, noise, SDE, logits, GRID, (5, 2), warm_up=(), x0=jnp.ones(2))
    start = Start(jnp.ones((2, 3, 2)), jnp.ones((2, 3)))
    for grid in ("score_sde", jnp.linspace(1.0, 0.1, 4)):
        with pytest.raises(ValueError, match="each sample's own"):
            mcmc.denoise(key, start, noise, SDE, solver="euler_maruyama", grid=grid)
    with pytest.raises(ValueError, match=r"start\.sigma"):
        mcmc.denoise(key, Start(start.x, jnp.ones(3)), noise, SDE)
    with pytest.raises(ValueError, match="solver"):
        mcmc.denoise(key, start, noise, SDE, solver="rk5")
    with pytest.raises(ValueError, match="that is tweedie"):
        mcmc.denoise(key, start, noise, SDE, denoise_last=True)
    with pytest.raises(TypeError, match="solver is the class Heun"):
        mcmc.denoise(key, start, noise, SDE, solver=solve.Heun)
    with pytest.raises(ValueError, match=r"state\.x has shape"):
        mcmc.denoising_mcmc(key, noise, SDE, logits, GRID, (4, 2), state=FIRST, **WHOLE)
    with pytest.raises(ValueError, match="sigma_min"):
        gibbs.levels(2.0, 1.0)
    with pytest.raises(ValueError, match="last"):
        gibbs.levels(1.0, 2.0, last=1.0)


def test_traced_bad_values_give_nan():
    def run(levels, step_size):
        return gibbs.step(
            jax.random.key(0), FIRST, noise, SDE, logits, levels, step_size=step_size
        ).x

    run = jax.jit(run)
    assert np.isfinite(run(GRID, 0.3)).all()
    assert np.isnan(run(GRID[::-1], 0.3)).all()
    assert np.isnan(run(GRID, -0.3)).all()
