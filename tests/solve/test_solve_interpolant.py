"""Flows and SDEs along an interpolant between mixtures: laws, likelihoods, drivers, errors."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxgen.process.interpolant import interpolant
from jaxgen.score.closed_form import two_mixtures
from jaxgen.solve.interpolant import interpolant_sample, interpolant_terms
from jaxgen.solve.interpolant_likelihood import interpolant_log_likelihood
from jaxgen.solve.path import GridPath

START = ([0.5, 0.5], [-2.0, 1.0], [0.2, 0.3])
END = ([0.3, 0.7], [-1.0, 2.0], [0.1, 0.15])


def make(name="linear", dtype=jnp.float32, **options):
    def cast(mix):
        return tuple(
            jnp.asarray(v, dtype)[:, None] if i == 1 else jnp.asarray(v, dtype)
            for i, v in enumerate(mix)
        )

    interp = interpolant(name, **options)
    return two_mixtures(interp, None if interp.one_sided else cast(START), cast(END))


LAW = make()
KEY = jax.random.key(0)


def _cdf(mix):
    def cdf(x):
        return sum(w * stats.norm.cdf(x, m, np.sqrt(c)) for w, m, c in zip(*mix, strict=True))

    return cdf


@jax.jit
def _both_ways(key, epsilon, x0, x1):
    """Endpoints of the SDE, whose epsilon may be 0, forwards and backwards."""

    def one(epsilon):
        return tuple(
            interpolant_sample(
                key, LAW.b, LAW.score, LAW.interp, x, epsilon=epsilon, steps=steps,
                direction=direction,
            ).x
            for x, direction in ((x0, "forward"), (x1, "backward"))
        )  # fmt: skip

    steps = 100
    return jax.lax.map(one, epsilon)


def _distances(n):
    x0, x1 = LAW.ends(jax.random.key(5), (n, 1))
    forward, backward = _both_ways(jax.random.key(6), jnp.array([0.0, 0.5, 2.0]), x0, x1)
    return [
        stats.kstest(np.asarray(x)[:, 0], _cdf(mix)).statistic
        for ends, mix in ((forward, END), (backward, START))
        for x in ends
    ]


def test_endpoint_laws_of_every_noise_level():
    """Kolmogorov-Smirnov at one in a thousand, and the steps' own error of a hundredth."""
    n = 4000
    distances = _distances(n)
    assert max(distances) < 1.95 / n**0.5 + 0.01, distances


@pytest.mark.slow
def test_endpoint_laws_at_full_size():
    """20,000 samples, 400 steps: below 0.0125 for epsilon 0, 0.5 and 2, both ways."""
    x0, x1 = LAW.ends(jax.random.key(5), (20000, 1))
    for direction, x, mix in (("forward", x0, END), ("backward", x1, START)):
        draw = jax.jit(
            lambda key, epsilon, x, direction=direction: interpolant_sample(
                key, LAW.b, LAW.score, LAW.interp, x, epsilon=epsilon, steps=400,
                direction=direction,
            ).x
        )  # fmt: skip
        for epsilon in (0.0, 0.5, 2.0):
            end = draw(jax.random.key(7), jnp.float32(epsilon), x)
            distance = stats.kstest(np.asarray(end)[:, 0], _cdf(mix)).statistic
            print(direction, epsilon, distance)
            assert distance < 0.0125, (direction, epsilon, distance)


def test_flow_likelihood_of_known_figures():
    """log rho_1 at three places to 1e-6 in float64, and where the flow came from."""
    with jax.enable_x64(True):
        law = make(dtype=jnp.float64)

        @jax.jit
        def measure(x):
            likelihood = interpolant_log_likelihood(
                None, law.b, None, law.interp, x, lambda x: law.log_prob(x, 0.0),
                estimator="exact", rtol=1e-8, atol=1e-8,
            )  # fmt: skip
            tolerances = diffrax.PIDController(rtol=1e-8, atol=1e-8)
            start = interpolant_sample(
                None, law.b, None, law.interp, x, direction="backward", controller=tolerances
            )
            return likelihood, start, law.log_prob(x, 1.0)

        likelihood, start, truth = measure(jnp.array([[-1.3], [0.4], [2.2]]))
        np.testing.assert_allclose(likelihood.log_prob, truth, atol=1e-6)
        np.testing.assert_allclose(truth, [-1.42162, -8.72245, -0.46039], atol=1e-5)
        np.testing.assert_allclose(start.x[:, 0], [-2.56598, -1.88667, 1.10512], atol=1e-5)
        assert (np.asarray(likelihood.nfe) > 20).all() and (
            np.asarray(likelihood.stderr) == 0
        ).all()


@jax.jit
def _by_sde(key, x, epsilon):
    def one(control_variate, steps, paths):
        return interpolant_log_likelihood(
            key, LAW.b, LAW.score, LAW.interp, x, lambda x: LAW.log_prob(x, 0.0), epsilon=epsilon,
            steps=steps, paths=paths, control_variate=control_variate, estimator="exact",
        )  # fmt: skip

    return one(False, 200, 1000), one(True, 50, 500), one(True, 200, 500), LAW.log_prob(x, 1.0)


def test_sde_likelihood_and_its_control_variate(key):
    """The full size with fewer paths: epsilon 0.2; standard deviations 0.035, 0.19, 0.028 of
    a path at 800 steps, so twice that at 200 and four times at 50."""
    x = jnp.array([[-1.3], [0.4], [2.2]])
    plain, coarse, fine, truth = _by_sde(key, x, 0.2)
    # The steps' own error is of their order: 200 of them were measured to be off by 0.07 at most.
    assert (np.abs(plain.log_prob - truth) < 4 * plain.stderr + 0.1).all(), (plain, truth)
    np.testing.assert_allclose(plain.stderr * 1000**0.5, [1.17, 1.08, 0.68], rtol=0.15)
    spread = np.asarray(fine.stderr) * 500**0.5
    np.testing.assert_allclose(spread, 2 * np.array([0.035, 0.19, 0.028]), rtol=0.25)
    np.testing.assert_allclose(coarse.stderr / fine.stderr, 2.0, rtol=0.3)
    assert (np.abs(fine.log_prob - truth) < 0.1).all(), (fine.log_prob, truth)
    assert (np.abs(fine.log_prob - truth) < np.abs(coarse.log_prob - truth)).all()
    assert np.asarray(fine.nfe).tolist() == [200 * 500] * 3


@pytest.mark.slow
def test_sde_likelihood_at_full_size(key):
    """800 steps, 4000 paths: within 4 s.e. without the Ito term; the spreads with it."""
    x = jnp.array([[-1.3], [0.4], [2.2]])

    @jax.jit
    def measure(key):
        return [
            interpolant_log_likelihood(
                key, LAW.b, LAW.score, LAW.interp, x, lambda x: LAW.log_prob(x, 0.0), epsilon=0.2,
                steps=800, paths=4000, control_variate=use, estimator="exact",
            )
            for use in (False, True)
        ]  # fmt: skip

    plain, controlled = measure(key)
    truth = np.asarray(LAW.log_prob(x, 1.0))
    print(plain, controlled, truth)
    np.testing.assert_allclose(plain.stderr, [0.018, 0.017, 0.011], rtol=0.1)
    assert (np.abs(plain.log_prob - truth) < 4 * plain.stderr).all()
    np.testing.assert_allclose(controlled.stderr * 4000**0.5, [0.035, 0.19, 0.028], rtol=0.1)


def test_kinds_and_drivers_agree(key):
    """(v, noise) for (b, score); diffeqsolve for the scan; a batch for its examples; one map."""
    x = jnp.linspace(-2.5, 1.5, 5)[:, None]
    ends = {"t_min": 1e-3, "t_max": 1 - 1e-3, "steps": 40, "direction": "backward"}

    @jax.jit
    def run(key, x, epsilon):
        def sample(x=x, key=key, b=LAW.b, s=LAW.score, **options):
            return interpolant_sample(key, b, s, LAW.interp, x, epsilon=epsilon, **(ends | options))

        return {
            "scan": sample(),
            "kinds": sample(b=LAW.v, s=LAW.noise, kinds=("v", "noise")),
            "mixed": sample(b=LAW.v, s=LAW.score, kinds=("v", "score")),
            "diffeqsolve": sample(adjoint=diffrax.DirectAdjoint()),
            "part": sample(x[2:], first_index=2),
            "one": sample(x[3], jax.random.fold_in(key, 3), event_ndim=1),
            "grid": sample(grid=jnp.linspace(1 - 1e-3, 1e-3, 41)),
            "mapped": jax.vmap(
                lambda e: (
                    interpolant_sample(key, LAW.b, LAW.score, LAW.interp, x, epsilon=e, **ends).x
                )
            )(jnp.stack([epsilon, 2 * epsilon]))[0],
        }

    out = run(key, x, 0.7)
    scan = np.asarray(out.pop("scan").x)
    # Forty steps of rounding, grown by a field whose slope reaches 1/0.1.
    for name, value in out.items():
        value = value if name == "mapped" else value.x
        expected = {"part": scan[2:], "one": scan[3]}.get(name, scan)
        np.testing.assert_allclose(value, expected, rtol=2e-3, atol=2e-3, err_msg=name)
    assert out["kinds"].nfe == 40 and out["diffeqsolve"].nfe.tolist() == [40] * 5
    assert out["grid"].direction == "backward" and out["grid"].solver == "Euler"


def test_drift_where_gamma_vanishes():
    """epsilon = gamma gamma' takes the score out of the forward drift, at the ends as inside."""

    def epsilon(t):
        return LAW.interp.gamma_gamma_dot(t)

    path = GridPath(jax.random.key(0), (3, 1), jnp.float32, 4)
    term = interpolant_terms(
        LAW.v, LAW.noise, LAW.interp, path, epsilon=epsilon, kinds=("v", "noise")
    )
    x = jnp.ones((3, 1))
    drift, v = jax.jit(lambda t: (term.terms[0].vf(t, x, None), LAW.v(x, t)))(jnp.float32(0.0))
    np.testing.assert_allclose(drift, v, rtol=1e-6)


def test_terms_serve_diffeqsolve_both_ways():
    """There and back along the flow; one example."""

    @jax.jit
    def travel(x):
        term = interpolant_terms(LAW.b, None, LAW.interp, event_ndim=1)
        for t0, t1 in ((0.0, 1.0), (1.0, 0.0)):
            x = diffrax.diffeqsolve(
                term, diffrax.Tsit5(), t0=t0, t1=t1, dt0=(t1 - t0) / 50, y0=x
            ).ys[-1]
        return x

    x = jnp.array([-1.7])
    np.testing.assert_allclose(travel(x), x, atol=1e-4)


def test_mirror_needs_only_a_score(key):
    """rho is END at both ends and broader between: forward to the middle, then back."""
    law = make("mirror", a=0.5)
    _, x1 = law.ends(key, (4000, 1))

    @jax.jit
    def run(key, x):
        there = interpolant_sample(
            key, None, law.score, law.interp, x, epsilon=0.1, steps=50, t_max=0.5
        )
        back = interpolant_sample(
            key, None, law.score, law.interp, there.x, steps=25, t_max=0.5, direction="backward"
        )
        return there, back

    there, back = run(key, x1)
    middle = (END[0], END[1], np.array(END[2]) + 0.5 * 0.25)
    for x, mix in ((there.x, middle), (back.x, END)):
        distance = stats.kstest(np.asarray(x)[:, 0], _cdf(mix)).statistic
        assert distance < 1.95 / 4000**0.5 + 0.01, distance
    assert int(back.nfe) == 50  # Heun, twice a step


def test_likelihoods_map_over_keys_and_take_one_example(key):
    """A mapped call is the calls one by one; an example alone is that of a batch."""
    x = jnp.array([[0.5, 1.0], [-1.0, 2.0]])

    @jax.jit
    def run(keys, x):
        def measure(key, x, **options):
            return interpolant_log_likelihood(
                key, lambda x, t: -x, lambda x, t: -x, LAW.interp, x, lambda x: x[:, 0],
                epsilon=0.3, steps=5, paths=3, **options,
            )  # fmt: skip

        mapped = jax.vmap(lambda key: measure(key, x))(keys)
        # The probe and the paths of an example come from two keys, so one key is not enough.
        whole, alone = measure(keys[0], x), measure(keys[0], x[0], event_ndim=1)
        return mapped, whole, alone

    keys = jax.random.split(key, 2)
    mapped, whole, alone = run(keys, x)
    np.testing.assert_allclose(mapped.log_prob[0], whole.log_prob, rtol=1e-5)
    assert alone.log_prob.shape == () and int(alone.nfe) == 15
    assert np.isfinite(alone.log_prob) and mapped.stderr.shape == (2, 2)


def test_failure_is_nan_and_says_so(key):
    """A field that is NaN in one example; too few steps."""

    @jax.jit
    def run(key, x):
        def fine(x, t):
            return -x

        def broken(x, t):
            return -x + jnp.where(x > 5, jnp.nan, 0.0)

        sde = interpolant_sample(key, broken, fine, LAW.interp, x, epsilon=0.1, steps=4)
        tight = {"rtol": 1e-5, "atol": 1e-5}
        flow = interpolant_sample(
            None, broken, None, LAW.interp, x, controller=diffrax.PIDController(**tight),
            max_steps=64,
        )  # fmt: skip
        likelihood = interpolant_log_likelihood(
            None, broken, None, LAW.interp, x, lambda x: x[:, 0], estimator="exact",
            max_steps=32,
        )  # fmt: skip
        few = interpolant_log_likelihood(
            None, fine, None, LAW.interp, x, lambda x: x[:, 0], estimator="exact",
            max_steps=2,
        )  # fmt: skip
        # An epsilon below zero that nothing knows before: no root of it, so no sample.
        below = interpolant_sample(
            key, fine, fine, LAW.interp, x, epsilon=lambda t: 0.5 - t, steps=4
        )
        return sde, flow, likelihood, few, below.x

    sde, flow, likelihood, few, below = run(key, jnp.array([[0.5], [9.0]]))
    assert np.isnan(below).all()
    for x in (sde.x[:, 0], flow.x[:, 0], likelihood.log_prob):
        assert np.isfinite(x[0]) and np.isnan(x[1]), x
    for result in (sde.result, flow.result, likelihood.result):
        failed = result != diffrax.RESULTS.successful
        assert failed.tolist() == [False, True]
    assert np.isnan(few.log_prob).all()


def _sample(interp="linear", b=LAW.b, s=LAW.score, key=KEY, **options):
    interp = interpolant(interp) if isinstance(interp, str) else interp
    return interpolant_sample(key, b, s, interp, jnp.ones((2, 1)), **options)


def _likelihood(**options):
    log_rho0 = options.pop("log_rho0", lambda x: LAW.log_prob(x, 0.0))
    return interpolant_log_likelihood(
        jax.random.key(0), LAW.b, LAW.score, LAW.interp, jnp.ones((2, 1)), log_rho0, **options
    )


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: _sample(epsilon=-0.1), "epsilon is -0.1"),
        (lambda: _sample(epsilon=jnp.ones(2)), "epsilon has shape"),
        (lambda: _sample(s=None, epsilon=0.1), "s is None with epsilon above 0"),
        (lambda: _sample(s=None, kinds=("v", "noise")), "s is None with kinds"),
        (lambda: _sample(b=None), "only mirror"),
        (lambda: _sample(direction="sideways"), "direction is 'sideways'"),
        (lambda: _sample(kinds=("v", "x0")), "kinds\\[1\\] is 'x0'"),
        (lambda: _sample(interpolant("linear", gamma="zero"), epsilon=0.5), "gamma zero"),
        (lambda: _sample(t_min=0.5, t_max=0.5), "t_min < t_max"),
        (lambda: _sample(t_max=1.5), "t_max 1.5"),
        (lambda: _sample(steps=0), "steps is 0"),
        (lambda: _sample(grid=[1.0, 0.0]), "rise"),
        (lambda: _sample(grid=[0.5]), "grid has shape"),
        (lambda: _sample(epsilon=0.1, solver=diffrax.Dopri5()), "is for ODEs"),
        (
            lambda: _sample(solver=diffrax.Euler(), controller=diffrax.PIDController(1e-3, 1e-3)),
            "estimates no error",
        ),
        (lambda: interpolant_terms(LAW.b, LAW.score, LAW.interp, epsilon=0.1), "path is None"),
        (lambda: _likelihood(epsilon=0.1, paths=1), "paths is 1"),
        (lambda: _likelihood(estimator="none"), "estimator is 'none'"),
        (lambda: _likelihood(log_rho0=lambda x: x), "log_rho0 returned shape"),
    ],
)
def test_bad_input(run, message):
    with pytest.raises(ValueError, match=message):
        run()


def test_bad_types():
    with pytest.raises(TypeError, match="key is None"):
        _sample(key=None, epsilon=0.1)
    with pytest.raises(TypeError, match="solver is 'euler'"):
        _sample(solver="euler")
    with pytest.raises(TypeError, match="x has dtype int32"):
        interpolant_log_likelihood(
            None, LAW.b, None, LAW.interp, jnp.ones((2, 1), int), lambda x: x[:, 0],
            estimator="exact",
        )  # fmt: skip
