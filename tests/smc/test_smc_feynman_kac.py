import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jaxgen import process, score
from jaxgen.particles.weights import normalise
from jaxgen.smc import target as targets
from jaxgen.smc.feynman_kac import feynman_kac
from jaxgen.smc.feynman_kac_step import Run, evaluate, levels

# --- laws and their closed forms ------------------------------------------------------------------
#
# Every expert is a mixture of three Gaussians in the plane, so that all cases share their compiled
# functions; a Gaussian is three times itself.

EDM = process.edm(0.01, 80.0)
SLOW = pytest.mark.slow


def expert(weights, means, covs, sde=EDM):
    f32 = np.float32
    return score.closed_form.mixture(sde, f32(weights), f32(means), f32(covs))


def gaussian(mean, cov, sde=EDM):
    return expert([1 / 3] * 3, [mean] * 3, [cov] * 3, sde)


THREE = (
    [0.5, 0.3, 0.2],
    [[-2, 0], [2, 1.5], [1.5, -2]],
    [[[0.5, 0], [0, 0.5]], [[0.15, 0.05], [0.05, 0.1]], [[0.3, -0.1], [-0.1, 0.2]]],
)
# Experts, exponents, first sigma; the truth by quadrature.
CASES = {
    "guidance": (
        (gaussian([0, 0], [[2, 0.5], [0.5, 1.5]]), gaussian([1, -0.5], [[0.6, 0], [0, 0.9]])),
        (-1.5, 2.5),
        10.0,
    ),
    "product": (
        (
            gaussian([-1, 0.5], [[1, 0.3], [0.3, 0.5]]),
            gaussian([1, 0], [[0.4, -0.1], [-0.1, 0.8]]),
        ),
        (1.0, 1.0),
        5.0,
    ),
    "cold": ((expert(*THREE), expert(*THREE)), (2.0, 0.0), 6.0),
    "hot": ((expert(*THREE), expert(*THREE)), (0.5, 0.0), 10.0),
    "same": ((expert(*THREE), expert(*THREE)), (-1.5, 2.5), 10.0),
    "colder": ((expert(*THREE), expert(*THREE)), (3.0, 0.0), 80.0),
}


def grid(first, steps, last=0.01):
    """Karras' grid of EDM."""
    share = np.arange(steps + 1) / steps
    return jnp.asarray((first ** (1 / 7) + share * (last ** (1 / 7) - first ** (1 / 7))) ** 7)


def lattice():
    axis = np.linspace(-10, 10, 401)
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2), 0.05**2


def integrals(logs, x, area):
    """``log Z``, mean, variances and masses by nearest mode of a density on the lattice."""
    density = np.exp(logs - logs.max())
    p = density / density.sum()
    mean = p @ x
    masses = np.asarray([p[np.asarray(nearest(x)) == k].sum() for k in range(3)])
    return np.log(density.sum() * area) + logs.max(), mean, p @ (x - mean) ** 2, masses


@jax.jit
def log_prob_wide(q, x, t):
    return q.log_prob(x, t)


def log_prob_of(q, x, t):
    """In double precision."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: np.asarray(v, np.float64), q)
        return np.asarray(log_prob_wide(wide, x, np.float64(t)))


@functools.lru_cache
def truth(name, last=0.01):
    """The integrals of a case at the last sigma."""
    experts, exponents, _ = CASES[name]
    x, area = lattice()
    pairs = zip(experts, exponents, strict=True)
    return integrals(sum(b * log_prob_of(q, x, last) for q, b in pairs), x, area)


def nearest(x):
    x = jnp.asarray(x, jnp.float32)
    means = jnp.asarray(THREE[1], jnp.float32)
    return jnp.argmin(jnp.sum((x[:, None] - means[None]) ** 2, -1), -1)


def moments(x, log_weights):
    p = jnp.exp(normalise(log_weights))
    mean = p @ x
    masses = jnp.stack([jnp.sum(jnp.where(nearest(x) == k, p, 0)) for k in range(3)])
    return mean, p @ (x - mean[None]) ** 2, masses


@functools.partial(jax.jit, static_argnames=("n", "options"))
def steer(keys, experts, exponents, noise, times, n, options):
    """Each key's ``log_z``, largest log-weight, moments with and without the weights."""
    options = dict(options)
    if options.get("weights") == "density":
        options["log_probs"] = [q.log_prob for q in experts]
    pairs = [(q.noise, b) for q, b in zip(experts, exponents, strict=True)]

    def one(key):
        out = feynman_kac(key, pairs, EDM, (n, 2), grid=times, noise=noise, **options)
        plain = moments(out.x, jnp.zeros(n))
        largest = jnp.max(jnp.abs(out.log_weights))
        return out.log_z, largest, moments(out.x, out.log_weights), plain

    return jax.lax.map(one, keys)


def run(name, *, steps=60, n=2048, keys=6, noise=1.0, **options):
    experts, exponents, first = CASES[name]
    keys = jax.random.split(jax.random.key(1), keys)
    options = tuple(sorted(options.items()))
    return steer(keys, experts, exponents, noise, grid(first, steps), n, options)


def within(values, true, slack):
    """The mean over keys is within 4 standard errors and ``slack`` of the truth."""
    values = np.asarray(values)
    error = np.abs(values.mean(0) - true)
    bound = 4 * values.std(0, ddof=1) / np.sqrt(len(values)) + slack
    assert (error <= bound).all(), (values.mean(0), true, bound)


# --- cases with known answers ---------------------------------------------------------------------

# What 60 steps leave as bias: of log Z, means, variances, masses.
SLACK = {
    "guidance": (0.03, 0.03, 0.05, 0.02),
    "product": (0.05, 0.03, 0.06, 0.02),
    "cold": (0.1, 0.1, 0.2, 0.02),
    "hot": (0.03, 0.05, 0.15, 0.01),
}


@pytest.mark.parametrize("name", SLACK)
def test_weighted_particles_have_the_targets_moments(name):
    log_z, _, weighted, _ = run(name)
    true = truth(name)
    for value, known, slack in zip((log_z, *weighted), true, SLACK[name], strict=True):
        within(value, known, slack)


@SLOW
@pytest.mark.parametrize(("name", "least"), [("guidance", 0.1), ("product", 0.08), ("cold", 0.2)])
def test_without_weights_the_law_is_another(name, least):
    _, _, weighted, plain = run(name, resample=None)
    true = truth(name)
    if name != "cold":
        within(weighted[0], true[1], SLACK[name][1])  # weights alone serve in two dimensions
    which = 2 if name == "cold" else 0
    error = np.abs(np.asarray(plain[which]).mean(0) - true[1 + which]).max()
    assert error > least


def test_the_level_of_the_noise_is_free_but_not_below_its_bound():
    """B = 3 needs z > 2/3: at 0.1 the spread of log Z is small and its value wrong."""
    errors = {z: np.asarray(run("colder", noise=z)[0]) - truth("colder")[0] for z in (0.1, 2.0)}
    assert abs(errors[2.0].mean()) < 1
    assert errors[0.1].mean() < -6
    assert errors[0.1].std() < 1
    log_z, _, weighted, _ = run("guidance", noise=2.0)
    within(log_z, truth("guidance")[0], 0.09)
    within(weighted[0], truth("guidance")[1], 0.03)


def test_equal_experts_weigh_nothing():
    log_z, largest, _, _ = run("same")
    # Zero but for a fused multiply-add, which rounds one square and not the other.
    assert np.abs(log_z).max() < 1e-12
    assert np.abs(largest).max() < 1e-12


@pytest.mark.parametrize("name", ["guidance", "product", "cold"])
def test_density_weights_are_unbiased_at_any_step_size(name):
    """E[Z_hat] = Z and E[Z_hat mean] = Z mean, with 10 steps and 64 particles.

    Steps that keep more than half of sigma^2, or the variance would be infinite.
    """
    experts, exponents, _ = CASES[name]
    keys, times = jax.random.split(jax.random.key(1), 400), jnp.asarray(np.geomspace(3, 0.3, 11))
    true, mean, _, masses = truth(name, 0.3)
    for noise in (1.0, 2.0):
        options = (("weights", "density"),)
        log_z, _, weighted, _ = steer(keys, experts, exponents, noise, times, 64, options)
        ratio = np.exp(np.asarray(log_z) - true)
        assert ratio.std(ddof=1) / np.sqrt(400) < 0.06
        within(ratio, 1.0, 0.0)
        within(ratio[:, None] * np.asarray(weighted[0]), mean, 0.0)
        within(ratio[:, None] * np.asarray(weighted[2]), masses, 0.0)


# --- the formulas ---------------------------------------------------------------------------------


def pull(x):
    return jnp.sin(x[:, 0]) - 0.3 * x[:, 1] ** 2


MU = jnp.asarray([0.5, -1.0])
PROCESSES = {
    "vp": process.vp(),
    "ve": process.ve(0.01, 10.0),
    "edm": process.edm(0.01, 10.0),
    "rectified": process.rectified(),
    "mean_reverting": process.mean_reverting(MU, sigma_inf=1.0),
}


def two(sde):
    """Two Gaussians, of equal and of unequal variances."""
    laws = (([0, 0.5], 1.5), ([1, -0.5], [0.6, 0.9]))
    return tuple(score.closed_form.gaussian(sde, jnp.asarray(m), jnp.asarray(c)) for m, c in laws)


@pytest.mark.parametrize(("kind", "z"), [("vp", 2.5), ("mean_reverting", 0.0)])
def test_the_rate_is_that_of_the_density(kind, z):
    """Equation (3) of the fields against the general formula with Laplacian and time derivative."""
    sde, d = PROCESSES[kind], 2
    a, b = two(sde)
    exponents, scale = (0.8, 0.9), lambda t: jnp.exp(-3 * t)
    target = targets.reward(targets.geometric([a.noise, b.score], exponents), pull, scale)
    kinds = ("noise", "score")

    def log_gamma(x, t):
        logs = exponents[0] * a.log_prob(x, t) + exponents[1] * b.log_prob(x, t)
        return logs + jax.vmap(scale)(t) * pull(x)

    drift = targets.steered_drift(target, sde, noise=z, prediction=kinds)
    size = jnp.sqrt(jnp.asarray(z))
    general = targets.potential_from_density(log_gamma, drift, lambda t: size * sde.diffusion(t))

    @jax.jit
    def both(x, t):
        own = Run(target, sde, kinds, None, "trapezoid", z, True, None, d, None, None)
        level = jax.tree.map(lambda v: v[0], levels(own, t[None]))
        centred = x if sde.mu is None else x - MU[None]
        node = evaluate(own, level, centred / level.alpha)
        log_u_dot = -jax.grad(sde.log_snr)(t)
        change = jax.grad(scale)(t) * node.reward
        change += sde.log_alpha_dot(t) * (node.slide + d * (1 - sum(exponents)))
        return log_u_dot * node.rate - change, general(x, jnp.broadcast_to(t, 5))

    x = 1.5 * jax.random.normal(jax.random.key(3), (5, 2))
    for t in (0.1, 0.6):
        ours, expected = both(x, jnp.asarray(t))
        np.testing.assert_allclose(ours, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


@SLOW
def test_probes_estimate_the_rate():
    a, _ = two(EDM)
    drift = targets.steered_drift([(a.noise, 2.0)], EDM)

    def log_gamma(x, t):
        return 2 * a.log_prob(x, t)

    x, t = jax.random.normal(jax.random.key(4), (3, 2)), jnp.full(3, 0.7)
    exact = jax.jit(targets.potential_from_density(log_gamma, drift, EDM.diffusion))(x, t)
    key, n = jax.random.key(5), 4000
    some = jax.jit(
        targets.potential_from_density(log_gamma, drift, EDM.diffusion, key=key, n_probes=n)
    )
    # Rademacher: the variance of v.Av is 2 sum of squares off the diagonal, here below 8.
    np.testing.assert_allclose(some(x, t), exact, atol=4 * np.sqrt(8 / n))


def test_a_step_is_exact_where_the_field_is_linear():
    """All data at one point: one step has the moments of forty, for B = 2, z = 1/2 and a push."""
    n, point = 20_000, score.closed_form.gaussian(EDM, jnp.asarray([3.0]), 1e-8)
    aim = targets.reward(targets.annealed(point.noise, 2.0), lambda x: 2 * x[:, 0], 1.0)
    moments = []
    for steps in (1, 40):
        times = jnp.asarray(np.geomspace(2.0, 0.7, steps + 1))

        @jax.jit
        def go(key, times=times):
            x = feynman_kac(key, aim, EDM, (n, 1), grid=times, noise=0.5, weights="none").x
            return jnp.mean(x), jnp.var(x)

        moments.append(go(jax.random.key(steps)))
    (mean, variance), (mean_40, variance_40) = np.asarray(moments)
    assert abs(mean - mean_40) < 4 * np.sqrt(2 * variance_40 / n)
    assert abs(variance - variance_40) < 4 * 2 * variance_40 / np.sqrt(n)


def test_the_step_back_reverses_a_step_where_both_are_exact():
    """All data at one point, B = 1: density weights are 0 at any step size and z."""
    point = score.closed_form.gaussian(EDM, jnp.asarray([3.0]), 1e-8)
    times = jnp.asarray([2.0, 1.2, 0.3])

    @jax.jit
    def go(key, noise):
        options = {"log_probs": [point.log_prob], "weights": "density", "resample": None}
        first = 3 + 2 * jax.random.normal(key, (16, 1))
        return feynman_kac(
            key, [(point.noise, 1.0)], EDM, (16, 1), grid=times, noise=noise, init=first, **options
        ).log_weights

    for noise in (0.3, 1.0, 2.5):
        np.testing.assert_allclose(go(jax.random.key(0), noise), 0, atol=3e-4)


@functools.lru_cache
def particles_of(kind):
    """``y``, log-weights and ``log Z`` in ``y`` at the levels of one grid."""
    sde = PROCESSES[kind]
    mu = jnp.zeros(2) if sde.mu is None else MU
    own = score.closed_form.gaussian(sde, mu + jnp.asarray([1, -0.5]), jnp.asarray([0.6, 2]))

    @jax.jit
    def go(key):
        times = sde.inverse_log_snr(-2 * jnp.log(grid(8.0, 12, 1.0)))
        options = {"grid": times, "prediction": "velocity", "resample": None}
        out = feynman_kac(key, [(own.velocity, 1.6)], sde, (16, 2), **options)
        alpha = sde.alpha(times[-1])
        log_z = out.log_z - 2 * (1 - 1.6) * jnp.log(alpha)
        return (out.x - mu[None]) / alpha, out.log_weights, log_z

    return go(jax.random.key(0))


@pytest.mark.parametrize(
    "kind", ["vp", "rectified", *(pytest.param(k, marks=SLOW) for k in ("ve", "mean_reverting"))]
)
def test_every_process_weighs_alike(kind):
    """At equal levels sigma/alpha the particles are alpha y + mu with the same y and weights."""
    for value, expected in zip(particles_of(kind), particles_of("edm"), strict=True):
        np.testing.assert_allclose(value, expected, rtol=2e-3, atol=4e-3)


@pytest.mark.parametrize("weights", ["density", pytest.param("trapezoid", marks=SLOW)])
def test_exponents_in_time_and_a_reward(weights):
    sde, n = PROCESSES["vp"], 8192
    a, b = two(sde)

    def falls(t):
        return 1.2 - 0.8 * t

    target = targets.reward(targets.geometric([a.noise, b.noise], (falls, 0.4)), pull, falls)
    sigmas = np.geomspace(2.5, 0.2, 13)
    times = sde.inverse_log_snr(-2 * jnp.log(jnp.asarray(sigmas)))

    @jax.jit
    def go(key, noise):
        densities = [a.log_prob, b.log_prob]
        options = {"grid": times, "noise": noise, "weights": weights, "log_probs": densities}
        out = feynman_kac(key, target, sde, (n, 2), resample=None, **options)
        return out.x, out.log_weights, out.log_z

    (x, area), t = lattice(), times[-1]
    logs = float(falls(t)) * (log_prob_of(a, x, t) + np.asarray(pull(x)))
    true, mean, _, _ = integrals(logs + 0.4 * log_prob_of(b, x, t), x, area)
    for noise in (1.0, 2.0):
        particles, log_weights, log_z = go(jax.random.key(2), noise)
        p = np.asarray(jnp.exp(normalise(log_weights)))
        spread = np.sqrt(p**2 @ (np.asarray(particles) - mean) ** 2)
        slack = 0.0 if weights == "density" else 0.1  # of 12 steps
        assert (np.abs(p @ np.asarray(particles) - mean) < 4 * spread + slack).all()
        assert abs(log_z - true) < 4 * np.sqrt(np.sum(p**2) - 1 / n) + slack


@SLOW
def test_a_linear_reward_shifts_a_gaussian():
    """N(m, C) tilted by exp(c a.x) is N(m + c C a, C); log Z = c a.m + c^2 a.C a / 2."""
    sde = PROCESSES["vp"]
    q, _ = two(sde)
    mean_of, cov, a = np.asarray([0, 0.5]), 1.5 * np.eye(2), np.asarray([0.4, -0.6])
    target = targets.reward(q.data, lambda x: x @ jnp.asarray(a, x.dtype), lambda t: 1 - t)

    @jax.jit
    def go(key):
        out = feynman_kac(key, target, sde, (4096, 2), steps=60, t_start=0.6, prediction="data")
        return out, moments(out.x, out.log_weights)[:2]

    out, (mean, variance) = go(jax.random.key(6))
    end = 1 - float(sde.t_end)
    np.testing.assert_allclose(mean, mean_of + end * cov @ a, atol=4 * np.sqrt(2 / 4096) + 0.02)
    np.testing.assert_allclose(variance, np.diag(cov), atol=4 * 2 * np.sqrt(2 / 4096) + 0.1)
    true = end * a @ mean_of + end**2 * a @ cov @ a / 2
    np.testing.assert_allclose(out.log_z, true, atol=0.06)


@SLOW
def test_an_energys_potential_weighs_as_the_field_does():
    sde = PROCESSES["vp"]
    q, _ = two(sde)
    own = targets.annealed(q.noise, 2.0)
    drift = targets.steered_drift(own, sde, noise=1.0)
    potential = targets.potential_from_density(
        lambda x, t: 2 * q.log_prob(x, t), drift, sde.diffusion
    )
    by_energy = targets.Target(own.fields, own.exponents, potential=potential)

    @jax.jit
    def go(key):
        options = {"steps": 80, "resample": None, "t_start": 0.5, "log_probs": [q.log_prob]}
        return [feynman_kac(key, t, sde, (64, 2), **options) for t in (own, by_energy)]

    first, second = go(jax.random.key(7))
    np.testing.assert_array_equal(first.x, second.x)
    apart = first.log_weights - second.log_weights
    assert np.std(apart) < 0.02 * np.std(first.log_weights) + 0.02
    np.testing.assert_allclose(first.log_z, second.log_z, atol=0.1)


# --- how it runs ----------------------------------------------------------------------------------

PLANE = score.closed_form.gaussian(EDM, jnp.zeros(2), jnp.ones(2))
SHORT = grid(5.0, 8, 0.5)


@functools.partial(jax.jit, static_argnames="options")
def short(key, options=()):
    return feynman_kac(key, [(PLANE.noise, 2.0)], EDM, (64, 2), grid=SHORT, **dict(options))


def see(x, log_weights, t):
    return t, x, log_weights


def test_resampling_by_schedule_and_window(key):
    out = short(key, (("resample_every", 2), ("window", (1.2, 2.0)), ("observe", see)))
    ve = process.ve()  # which, unlike the other, has no proper ends
    jax.eval_shape(functools.partial(call, sde=ve, grid="time", window=(0.2, 0.8)), key)
    times, x, log_weights = out.observed
    np.testing.assert_array_equal(times, np.asarray(SHORT)[1:])
    np.testing.assert_allclose(x[-1], out.x, rtol=1e-6)
    np.testing.assert_array_equal(log_weights[-1], out.log_weights)
    n = np.arange(1, 9)
    times = np.asarray(SHORT)[1:]
    due = (n % 2 == 0) & (n < 8) & (times >= 1.2) & (times <= 2.0)
    assert due.sum() == 1  # without either end of the window there are more
    np.testing.assert_array_equal(out.resampled, due)
    assert out.ancestors.shape == (8, 64)
    for done, ancestors, ess in zip(due, out.ancestors, out.ess, strict=True):
        assert done == (np.asarray(ancestors) != np.arange(64)).any()
        assert 1 <= ess <= 64
    assert (out.steps, out.grid, out.resample) == (8, "array", "systematic")
    assert int(out.nfe) == 9


@SLOW
def test_resampling_where_the_ess_has_fallen(key):
    out = short(key)
    np.testing.assert_array_equal(out.resampled[:-1], np.asarray(out.ess[:-1]) < 0.9 * 64)
    assert not out.resampled[-1]
    assert 0 < out.resampled.sum() < 7


def test_left_weights_call_each_field_once_a_step(key):
    calls = []

    def field(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return PLANE.noise(x, t)

    pairs = [(field, 0.5), (PLANE.score, 0.5)]
    options = {"grid": SHORT, "prediction": ("noise", "score"), "resample": None}
    out = jax.jit(lambda k: feynman_kac(k, pairs, EDM, (4, 2), weights="left", **options))(key)
    jax.effects_barrier()
    assert len(calls) == 8
    assert int(out.nfe) == 16


@SLOW
def test_clipped_increments_keep_their_mean(key):
    first = short(key, (("resample", None),))
    clipped = short(key, (("resample", None), ("clip", 1e-6)))
    np.testing.assert_array_equal(first.x, clipped.x)
    mean = np.mean(first.log_weights)
    np.testing.assert_allclose(clipped.log_weights, mean, atol=1e-4)
    assert np.std(first.log_weights) > 0.5


def test_a_bad_score_spoils_its_particle_and_is_reported(key):
    def field(x, t):
        bad = (jnp.arange(x.shape[0]) == 3) & (t < 2)
        return jnp.where(bad[:, None], jnp.nan, PLANE.noise(x, t))

    @jax.jit
    def go(key):
        return feynman_kac(key, [(field, 2.0)], EDM, (16, 2), grid=SHORT)

    error, out = checkify.checkify(go)(key)
    assert "not finite" in error.get()
    np.testing.assert_array_equal(np.isnan(out.log_weights), np.arange(16) == 3)
    np.testing.assert_array_equal(np.isnan(out.x).any(-1), np.arange(16) == 3)
    assert np.isnan(out.log_z)
    assert not out.resampled[np.asarray(SHORT)[1:] < 2].any()


def test_the_field_runs_in_the_particles_dtype(key):
    seen = []

    def field(x, t):
        seen.append((x.dtype, t.dtype, t.shape))
        return PLANE.noise(x, t)

    options = {"grid": SHORT, "dtype": jnp.bfloat16}
    out = jax.eval_shape(lambda k: feynman_kac(k, [(field, 2.0)], EDM, (4, 2), **options), key)
    assert set(seen) == {(jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32), (4,))}
    assert out.x.dtype == jnp.bfloat16
    assert out.log_weights.dtype == jnp.float32


@SLOW
def test_an_init_of_ones_own(key):
    """Exponents that sum to -1 have no scaled prior; log Z from the weights of the first draw."""
    wide, narrow = (
        score.closed_form.gaussian(EDM, jnp.zeros(2), c * jnp.ones(2)) for c in (4.0, 1.0)
    )
    times = jnp.asarray(np.geomspace(0.5, 0.1, 21))
    pairs = [(wide.noise, -2.0), (narrow.noise, 1.0)]
    variance = 1 / (1 / 1.25 - 2 / 4.25)

    def init(key, shape):
        x = jnp.sqrt(variance) * jax.random.normal(key, shape)
        own = jnp.sum(-0.5 * x**2 / variance - 0.5 * jnp.log(2 * jnp.pi * variance), -1)
        return x, narrow.log_prob(x, times[0]) - 2 * wide.log_prob(x, times[0]) - own

    @jax.jit
    def go(key):
        options = {"grid": times, "resample": None}
        with_weights = feynman_kac(key, pairs, EDM, (2048, 2), init=init, **options)
        alone = feynman_kac(key, pairs, EDM, (2048, 2), init=lambda k, s: init(k, s)[0], **options)
        return with_weights, alone

    def log_z(u):
        a, b = 4 + u, 1 + u
        v = 1 / (1 / b - 2 / a)
        return 2 * np.log(2 * np.pi * a) - np.log(2 * np.pi * b) + np.log(2 * np.pi * v)

    out, alone = go(key)
    assert abs(out.log_z - log_z(0.01)) < 0.15
    np.testing.assert_allclose(alone.log_z, out.log_z - log_z(0.25), atol=1e-3)


@SLOW
def test_populations_by_vmap_are_the_single_ones(key):
    keys = jax.random.split(key, 2)
    many = jax.jit(jax.vmap(short))(keys)
    for i in range(2):
        np.testing.assert_allclose(many.x[i], short(keys[i]).x, atol=1e-4)
        np.testing.assert_allclose(many.log_z[i], short(keys[i]).log_z, atol=1e-4)


def test_particles_split_over_devices(key):
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))

    def part(key):
        pairs = [(PLANE.noise, 2.0)]
        return feynman_kac(key, pairs, EDM, (16, 2), grid=SHORT, axis_name="devices")

    split, same = jax.P("devices"), jax.P()
    one = short(key)
    out_specs = type(one)(
        *[split, split, same, same, same, jax.P(None, "devices"), None, same, same],
        **{name: getattr(one, name) for name in STATIC},
    )
    many = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=same, out_specs=out_specs))(key)
    assert one.resampled.any()
    np.testing.assert_array_equal(many.resampled, one.resampled)
    np.testing.assert_array_equal(many.ancestors, one.ancestors)
    for name in ("x", "log_weights", "log_z", "ess"):
        np.testing.assert_allclose(getattr(many, name), getattr(one, name), rtol=1e-4, atol=1e-4)


@SLOW
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_particles_that_are_laid_out_on_a_mesh(key, kind):
    @jax.jit
    def go(key, x):
        return feynman_kac(key, [(PLANE.noise, 2.0)], EDM, (64, 2), grid=SHORT, init=x)

    x = 4 * jax.random.normal(jax.random.key(1), (64, 2))
    expected = go(key, x)
    assert expected.resampled.any()
    mesh = jax.make_mesh((4,), ("d",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    with jax.set_mesh(mesh):
        out = go(key, jax.device_put(x, jax.NamedSharding(mesh, jax.P("d"))))
    assert out.x.sharding.spec[0] == "d"
    np.testing.assert_array_equal(out.resampled, expected.resampled)
    np.testing.assert_allclose(np.asarray(out.x), expected.x, rtol=1e-5, atol=1e-5)


STATIC = ("weights", "resample", "prediction", "steps", "grid")


@SLOW
def test_gradients_in_the_exponent(key):
    """d log Z/d b = E_p[log q], by weights alone; finite differences."""

    @jax.jit
    def log_z(b):
        options = {"grid": SHORT, "resample": None, "weights": "density"}
        pairs, densities = [(PLANE.noise, b)], [PLANE.log_prob]
        return feynman_kac(key, pairs, EDM, (64, 2), log_probs=densities, **options).log_z

    slope, step = jax.grad(log_z)(1.5), 1e-2
    expected = (log_z(1.5 + step) - log_z(1.5 - step)) / (2 * step)
    np.testing.assert_allclose(slope, expected, rtol=1e-2)


# --- bad input ------------------------------------------------------------------------------------


def call(key, pairs=((PLANE.noise, 2.0),), shape=(4, 2), sde=EDM, **options):
    options = {"steps": 3} | options
    return feynman_kac(key, pairs, sde, shape, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": [(PLANE.noise, 1.0), (PLANE.noise, -1.0)]}, "sum to 0.*no scaled prior"),
        ({"noise": -1.0}, "noise is -1"),
        ({"noise": jnp.ones(3)}, r"noise has shape \(3,\)"),
        ({"noise": 0.0, "weights": "density", "log_probs": [PLANE.log_prob]}, "noise is 0"),
        ({"weights": "density"}, "log_probs None"),
        ({"weights": "right"}, "weights is 'right'; expected one of left"),
        ({"resample": "bootstrap"}, "resample is 'bootstrap'"),
        ({"log_probs": []}, "0 functions for 1 fields"),
        ({"pairs": [(PLANE.noise, lambda t: 1 + t)]}, "function of time.*log_probs"),
        ({"ess_threshold": 0.0}, "ess_threshold is 0.0"),
        ({"ess_threshold": 1.5}, "ess_threshold is 1.5"),
        ({"resample_every": 0}, "resample_every is 0"),
        ({"resample_every": 2, "resample": None}, "resample None"),
        ({"window": (1.0, 90.0)}, r"window is \(1, 90\).*within \[0, 80\]"),
        ({"window": (2.0, 1.0)}, "rising times"),
        ({"window": 3.0}, "two times"),
        ({"sde": process.ve(), "window": (0.2, 1.5)}, r"within \[0, 1\]"),
        ({"t_start": 90.0}, "t_start is 90"),
        ({"t_end": 0.0}, "last time is a proper end, where sigma is 0"),
        ({"sde": process.rectified(), "t_start": 1.0}, "first time is a proper end.*alpha"),
        ({"t_start": jnp.ones(4)}, r"t_start has shape \(4,\)"),
        ({"steps": None}, "steps is None"),
        ({"shape": (1, 2)}, "one particle"),
        ({"shape": (0, 2)}, "at least one particle"),
        ({"init": "prior"}, "init is 'prior'"),
        ({"init": jnp.ones((3, 2))}, r"init has shape \(3, 2\)"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"prediction": "eps"}, "prediction is 'eps'"),
        ({"prediction": ("noise", "data")}, "2 kinds for 1 fields"),
        ({"pairs": [(lambda x, t: x[:, :1], 2.0)]}, r"field 0 of the target.*shape \(4, 1\)"),
        ({"pairs": targets.reward(PLANE.noise, lambda x: x, 1.0)}, "reward returned shape"),
        ({"sde": process.mean_reverting(jnp.zeros((4, 2)))}, "one anchor"),
    ],
)
def test_bad_input(key, options, message):
    with pytest.raises(ValueError, match=message):
        call(key, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": PLANE.noise}, "targets is a function"),
        ({"pairs": [PLANE.noise]}, "expected a Target or pairs"),
        ({"pairs": None}, "targets is None"),
        ({"log_probs": PLANE.log_prob}, "log_probs is a function"),
        ({"dtype": jnp.int32}, "dtype"),
        ({"dtype": jnp.complex64}, "dtype"),
    ],
)
def test_wrong_types(key, options, message):
    with pytest.raises(TypeError, match=message):
        call(key, **options)


def test_bad_targets():
    with pytest.raises(ValueError, match="2 fields and 1 exponents"):
        targets.geometric([PLANE.noise] * 2, [1.0])
    with pytest.raises(ValueError, match="finite"):
        targets.annealed(PLANE.noise, np.inf)
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        targets.annealed(PLANE.noise, np.ones(2))
    with pytest.raises(ValueError, match="a reward already"):
        targets.reward(targets.reward(PLANE.noise, pull, 1.0), pull, 1.0)
    with pytest.raises(TypeError, match="field is 3"):
        targets.product([3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": 0.0}, "copies never separate"),
        ({"noise": 0.5}, "finite variance only above 0.5"),
        ({"noise": 0.0, "resample": None}, "finite variance only above 0.5"),
    ],
)
def test_warnings_of_the_noise(key, options, message):
    with pytest.warns(UserWarning, match=message):
        jax.eval_shape(functools.partial(call, **options), key)


def test_no_warning_where_all_is_well(key):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(functools.partial(call, noise=0.51), key)
        jax.eval_shape(functools.partial(call, pairs=[(PLANE.noise, 1.0)], noise=0.1), key)
        jax.eval_shape(functools.partial(call, noise=0.0, weights="none"), key)
