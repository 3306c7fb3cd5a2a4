"""Predictor-corrector chains against exact linear recursions, and the rules of the loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import process, score, solve
from jaxgen.solve.chain import published
from jaxgen.solve.predictors import ancestral, reverse_diffusion
from jaxgen.solve.semilinear import SemiLinearTerm
from jaxgen.solve.terms import FieldCall

MEAN, VAR = 1.0, 0.25


def chain_of(sde, steps, mean=MEAN, var=VAR, anchor=0.0):
    """The published chain of a one-dimensional Gaussian's exact field, two samples wide."""

    def field(x, t):
        a, s = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
        centre = anchor + a * (mean - anchor)
        return s * (x - centre) / (a**2 * var + s**2)

    term = SemiLinearTerm(FieldCall(field), sde, jnp.ones((2,)), None, "noise")
    return published(term, steps, (2,), 0)


def linear(step, steps, noise_shape):
    """``x_mean = a x + c`` and ``x = x_mean + s z`` of a step, for every index."""
    index = jnp.arange(steps)
    zero, one = jnp.zeros((2, 1)), jnp.ones((2, 1))

    @jax.jit
    def at(noise, x):
        return jax.vmap(lambda i: step.apply(noise, x, i))(index)

    none = jnp.zeros(noise_shape)
    c = at(none, zero)[1]
    a = at(none, one)[1] - c
    noisy, mean = at(jnp.ones(noise_shape), zero)
    return [np.asarray(v, np.float64)[:, 0, 0] for v in (a, c, noisy - mean)]


def recursion(chain, steps, start, step_list):
    """Mean and variance of the last ``x_mean``, exactly."""
    mean, var = start
    numbers = [linear(s, steps, shape) for s, shape in step_list]
    for i in range(steps - 1, -1, -1):
        for a, c, s in numbers:
            mean, var = a[i] * mean + c[i], a[i] ** 2 * var
            last = mean, var
            var += s[i] ** 2
    return last


# kind, kernel, steps, mean, variance of N(1, 0.25) data with its exact score.
FIGURES = [
    ("ve", reverse_diffusion, 50, 0.99990, 0.29888),
    ("ve", reverse_diffusion, 1000, 0.99990, 0.25206),
    ("ve", reverse_diffusion, 100, None, 0.27272),
    ("ve", ancestral, 50, None, 0.21112),
    ("vp", reverse_diffusion, 100, 1.00554, 0.25615),
    ("vp", ancestral, 100, 1.01092, 0.24983),
]


@pytest.mark.parametrize(("name", "kernel", "steps", "mean", "var"), FIGURES)
def test_published_chains_have_the_exact_moments(name, kernel, steps, mean, var):
    sde = process.ve() if name == "ve" else process.vp()
    chain = chain_of(sde, steps)
    start = (0.0, 50.0**2) if name == "ve" else (0.0, 1.0)
    got = recursion(chain, steps, start, [(kernel(chain), (2, 1))])
    assert mean is None or abs(got[0] - mean) < 1e-4
    assert abs(got[1] - var) < 1e-4


def ve_corrected_variance(steps, snr):
    """The large-dimension recursion: correct, then reverse diffusion, in numpy."""
    sigma = 0.01 * 5000 ** np.linspace(0, 1, steps)
    t = np.linspace(1e-5, 1, steps)
    marginal = 0.01 * 5000**t
    mean, var = 0.0, 2500.0
    for i in range(steps - 1, -1, -1):
        total = VAR + marginal[i] ** 2
        rate = 2 * (snr * total) ** 2 / (var + (mean - MEAN) ** 2)
        keep = 1 - rate / total
        mean, var = MEAN + keep * (mean - MEAN), keep**2 * var + 2 * rate
        g2 = sigma[i] ** 2 - (sigma[i - 1] ** 2 if i else 0)
        keep = 1 - g2 / total
        mean, last = MEAN + keep * (mean - MEAN), keep**2 * var
        var = last + g2
    return mean, last


@functools.cache
def drawer(name, solver, steps, corrector, rows=2000):
    sde = process.PROCESSES[name]()
    exact = score.closed_form.gaussian(sde, jnp.full((64,), MEAN), VAR)
    options = {"t_end": 1e-5} if name == "ve" else {}
    return jax.jit(
        lambda k: solve.sample(
            k,
            exact.noise,
            sde,
            (rows, 64),
            solver=solver,
            steps=steps,
            corrector=corrector,
            grid="score_sde",
            **options,
        )
    )


@pytest.mark.parametrize(
    ("name", "solver", "corrector", "mean", "var", "nfe"),
    [
        ("ve", "reverse_diffusion", None, 0.99990, 0.29888, 50),
        # The claim of tests/claims/test_score_sde.py is one with the batch's norms.
        pytest.param("ve", "reverse_diffusion", "batch", 1.0, 0.25975, 100, marks=pytest.mark.slow),
        ("ve", "reverse_diffusion", "expected", 1.0, 0.25975, 100),
    ],
)
def test_monte_carlo_agrees_with_the_recursions(key, name, solver, corrector, mean, var, nfe):
    if corrector is not None:
        exact = ve_corrected_variance(50, 0.16)
        np.testing.assert_allclose(exact, (1.0, var), atol=2e-4)
        corrector = solve.langevin_corrector(0.16, norms=corrector)
    out = drawer(name, solver, 50, corrector)(key)
    n = out.x.size
    # The finite dimension moves the batch's rule by about 0.0005, and the expected norm's by up
    # to E[1/||g||^2] E||g||^2 = d/(d - 2).
    shift = {"batch": 6e-4, "expected": var * 2 / 62}.get(getattr(corrector, "norms", ""), 0)
    assert abs(float(out.x.mean()) - mean) < 4 * (var / n) ** 0.5 + 1e-3
    assert abs(float(out.x.var()) - var) < 4 * var * (2 / n) ** 0.5 + shift
    assert int(out.nfe) == nfe and out.last_step == "mean"
    assert out.corrector == (None if corrector is None else "langevin")


@pytest.mark.parametrize(
    ("steps", "snr", "mean", "var"),
    [
        (10, None, 0.32172, 0.010237),
        (1000, None, 0.28294, 0.009451),
        (50, 0.5, 0.29191, 0.009865),
    ],
)
def test_ouve_chains_have_the_exact_moments(steps, snr, mean, var):
    anchor = -0.2
    sde = process.ouve(jnp.array([anchor]))
    chain = chain_of(sde, steps, mean=0.3, var=0.01, anchor=anchor)
    kernels = [(reverse_diffusion(chain), (2, 1))]
    if snr is not None:
        kernels.insert(0, (solve.langevin_corrector(snr, variant="ald")(chain), (1, 2, 1)))
    got = recursion(chain, steps, (anchor, float(sde.sigma(1.0)) ** 2), kernels)
    np.testing.assert_allclose(got, (mean, var), atol=2e-5)


def test_complex_states(key):
    sde = process.ouve(jnp.array([-0.2 + 0j]))

    def field(x, t):
        a, s = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
        return s * (x + 0.2 - 0.5 * a) / (a**2 * 0.01 + s**2)

    n = 20000
    out = jax.jit(
        lambda k: (
            solve.sample(
                k,
                field,
                sde,
                (n, 1),
                solver="reverse_diffusion",
                steps=10,
                grid="score_sde",
                corrector=solve.langevin_corrector(0.5, variant="ald"),
                dtype=jnp.complex64,
            ).x
        )
    )(key)
    assert out.dtype == jnp.complex64
    assert abs(complex(out.mean()) - 0.32757) < 4 * (0.0098 / n) ** 0.5
    spread = float(jnp.mean(jnp.abs(out - out.mean()) ** 2))
    assert abs(spread / 0.009745 - 1) < 4 / n**0.5


def test_the_corrector_takes_beta_for_vp_and_sub_vp_only():
    for sde, share in ((process.vp(), 1), (process.sub_vp(), 1), (process.edm(), 0)):
        chain = chain_of(sde, 100)
        want = 1 - share * np.linspace(0.1 / 100, 20 / 100, 100)
        np.testing.assert_allclose(chain.shrink, want, rtol=1e-5)


@pytest.mark.parametrize(
    "predictor",
    ["ancestral", solve.Heun(churn=3.0), pytest.param("ddim", marks=pytest.mark.slow)],
)
def test_any_predictor_with_any_corrector_on_levels(key, predictor):
    sde = process.vp()
    exact = score.closed_form.gaussian(sde, jnp.full((40,), MEAN), VAR)
    corrector = solve.langevin_corrector(0.1, 2, norms="per_sample")
    seen = []

    def field(x, t):
        jax.debug.callback(lambda: seen.append(1))
        return exact.noise(x, t)

    def draw(k, first):
        return solve.sample(
            k,
            field,
            sde,
            (40, 40),
            solver=predictor,
            steps=40,
            corrector=corrector,
            first_index=first,
        )

    draw = jax.jit(draw)
    out = draw(key, 0)
    jax.effects_barrier()
    calls = {"ancestral": 40, "ddim": 40}.get(str(predictor), 80)
    assert int(out.nfe) == len(seen) == 80 + calls
    assert abs(float(out.x.mean()) - MEAN) < 4 * (VAR / 1600) ** 0.5 + 0.02
    assert abs(float(out.x.var()) / VAR - 1) < 4 * (2 / 1600) ** 0.5 + 0.06
    # With norms per sample, a sample does not depend on its batch.
    np.testing.assert_allclose(draw(key, 7).x[:2], out.x[7:9], atol=1e-4)


def test_projection_is_called_after_both_steps_with_their_times(key):
    sde = process.ve()
    seen = []

    def project(key, x, x_mean, t):
        jax.debug.callback(lambda t: seen.append(float(t)), t, ordered=True)
        return x, jnp.zeros_like(x_mean) + 7.0

    def draw(k, grid):
        return solve.predictor_corrector(
            k,
            lambda x, t: x / sde.sigma(t)[:, None],
            sde,
            (2, 3),
            corrector=solve.langevin_corrector(),
            steps=3,
            grid=grid,
            project=project,
        ).x

    out = draw(key, "score_sde")
    jax.effects_barrier()
    np.testing.assert_allclose(seen, [1.0, 1.0, 0.5, 0.5, 0.0, 0.0], atol=1e-6)
    assert bool((out == 7.0).all())
    seen.clear()
    draw(key, "time")
    jax.effects_barrier()
    np.testing.assert_allclose(seen, [1, 2 / 3, 2 / 3, 1 / 3, 1 / 3, 0], atol=1e-6)


def test_annealed_langevin_and_own_kernels(key):
    sde = process.ve()
    exact = score.closed_form.gaussian(sde, jnp.full((4,), MEAN), VAR)
    out = jax.jit(
        lambda k: solve.annealed_langevin(
            k, exact.noise, sde, (500, 4), steps=60, corrector_steps=2, snr=0.3
        )
    )(key)
    assert int(out.nfe) == 120 and out.corrector == "ald" and out.solver == "none"
    assert abs(float(out.x.mean()) - MEAN) < 4 * (VAR / 2000) ** 0.5 + 0.05

    def still(chain):
        return lambda key, x, i: (x, x)

    own = solve.predictor_corrector(
        key, exact.noise, sde, (2, 4), predictor=still, steps=3, x_init=jnp.ones((2, 4))
    )
    assert bool((own.x == 1).all()) and int(own.nfe) == -1 and own.solver == "still"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"predictor": "ancestral", "sde": process.sub_vp()}, ValueError, "sub_vp"),
        ({"predictor": "reverse_diffusion", "steps": 20}, ValueError, "at least 21"),
        ({"steps": 1}, ValueError, "steps is 1"),
        ({"predictor": None}, ValueError, "both None"),
        ({"predictor": 3}, TypeError, "solver is 3"),
        ({"predictor": "ddim"}, ValueError, "needs a grid of levels"),
        ({"corrector": "langevin"}, TypeError, "langevin_corrector"),
        ({"t_start": 0.5}, ValueError, "t_start=None"),
    ],
)
def test_bad_input_raises(key, options, error, message):
    options = {"sde": process.vp(), "steps": 40} | options
    sde = options.pop("sde")
    with pytest.raises(error, match=message):
        solve.predictor_corrector(key, lambda x, t: x, sde, (2, 3), **options)


def test_bad_correctors_raise():
    for options, message in (
        ({"snr": 0.0}, "snr is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"variant": "mala"}, "variant is"),
        ({"norms": "sum"}, "norms is"),
        ({"norms": "expected", "axis_name": "data"}, "axis_name"),
    ):
        with pytest.raises(ValueError, match=message):
            solve.langevin_corrector(**options)
