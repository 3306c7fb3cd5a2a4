"""The multistep and singlestep solvers against formulas written out anew, and at the ends."""

import functools
import math

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from jaxgen import process, score, solve

SHAPE = (4, 3)
STEPS = 7


def problem():
    return _problem(jax.config.read("jax_enable_x64"))


@functools.cache
def _problem(is_wide):
    del is_wide  # a closed form is made in the precision of its time
    sde = process.vp()
    means = jnp.array([[1.0, -0.5, 0.2], [-1.0, 0.3, 0.8]])
    return sde, score.closed_form.mixture(sde, jnp.array([0.4, 0.6]), means, jnp.array([0.1, 0.3]))


def uneven(sde, steps=STEPS):
    """A grid whose steps in log-SNR all differ."""
    u = np.linspace(0, 1, steps + 1) ** 1.3
    return sde.inverse_log_snr(jnp.asarray(2 * (-3.0 + 5.5 * u)))


def draw(solver, *, prediction="noise", **options):
    sde, exact = problem()

    @jax.jit
    def run(key):
        return solve.sample(
            key,
            getattr(exact, prediction),
            sde,
            SHAPE,
            solver=solver,
            prediction=prediction,
            x_init=jnp.asarray(states(), jnp.result_type(float)),
            **({"grid": uneven(sde)} | options),
        )

    return run(jax.random.key(0))


def states():
    return np.random.default_rng(5).normal(size=SHAPE)


# --- the published updates, written out in NumPy ------------------------------------------------


class Peer:
    """Levels and outputs of a run, with the published update of each solver."""

    def __init__(self, times):
        sde, exact = problem()
        self.t = np.asarray(times)
        self.alpha, self.sigma = np.asarray(sde.alpha(times)), np.asarray(sde.sigma(times))
        self.lam = np.log(self.alpha / self.sigma)
        self.call = jax.jit(lambda x, t: (exact.data(x, t), exact.noise(x, t)))

    def outputs(self, x, n):
        return [np.asarray(v) for v in self.call(jnp.asarray(x), jnp.asarray(self.t[n]))]

    def rho(self, t):
        sde, _ = problem()
        return float(sde.sigma(t) / sde.alpha(t))


def dpmpp_3m(peer, x, third):
    """Lu et al., with D0, D1, D2 as in their code."""
    data = []
    for n in range(STEPS):
        data.append(peer.outputs(x, n)[0])
        h = peer.lam[n + 1] - peer.lam[n]
        p1 = math.expm1(-h)
        p2, p3 = p1 / h + 1, (p1 / h + 1) / h - 0.5
        base = peer.sigma[n + 1] / peer.sigma[n] * x - peer.alpha[n + 1] * p1 * data[n]
        order = min(n + 1, 3)
        if order == 2:
            r0 = (peer.lam[n] - peer.lam[n - 1]) / h
            base = base - 0.5 * peer.alpha[n + 1] * p1 * (data[n] - data[n - 1]) / r0
        if order == 3:
            r0 = (peer.lam[n] - peer.lam[n - 1]) / h
            r1 = (peer.lam[n - 1] - peer.lam[n - 2]) / h
            d10, d11 = (data[n] - data[n - 1]) / r0, (data[n - 1] - data[n - 2]) / r1
            d2 = (d10 - d11) / (r0 + r1)
            d1 = d10 + r0 * d2
            twice = 2 if third == "exact" else 1
            base = base + peer.alpha[n + 1] * (p2 * d1 - twice * p3 * d2)
        x = base
    return x


def unipc(peer, x, order, variant):
    """Zhao et al., algorithm 2: the weights by a linear solve."""
    data = [peer.outputs(x, 0)[0]]

    def update(x, n, data_of, points, p):
        """Over the interval from n, with outputs at knots ``points`` beside n."""
        h = peer.lam[n + 1] - peer.lam[n]
        z = -h
        big_b = z if variant == "bh1" else math.expm1(z)
        phis = [math.expm1(z) / z]
        for k in range(1, 5):
            phis.append((phis[-1] - 1 / math.factorial(k)) / z)
        x = peer.sigma[n + 1] / peer.sigma[n] * x - peer.alpha[n + 1] * math.expm1(z) * data_of[n]
        if not points:
            return x
        r = np.array([(peer.lam[j] - peer.lam[n]) / h for j in points])
        rows = np.stack([r**i for i in range(p)])
        right = np.array([math.factorial(i + 1) * phis[i + 1] * z / big_b for i in range(p)])
        c = np.linalg.solve(rows, right) if p > 1 else np.array([0.5])
        change = sum(c[i] * (data_of[j] - data_of[n]) / r[i] for i, j in enumerate(points))
        return x - peer.alpha[n + 1] * big_b * change

    def run(x):
        p, before = 1, x
        for n in range(STEPS):
            if n > 0:
                data.append(peer.outputs(x, n)[0])
                points = [n, *range(n - 2, n - 1 - p, -1)]
                x = update(before, n - 1, data, points, p)
            p = min(n + 1, order, STEPS - n)
            before = x
            x = update(x, n, data, list(range(n - 1, n - p, -1)), p - 1)
        return x

    return run(x)


def deis(peer, x, variable):
    """Zhang and Chen, equation (14): the interpolating polynomial, integrated by quadrature."""
    noise = []
    of = {"log_rho": lambda t: math.log(peer.rho(t)), "rho": peer.rho, "t": lambda t: t}[variable]
    for n in range(STEPS):
        noise.append(peer.outputs(x, n)[1])
        nodes = list(range(n, max(n - 3, -1), -1))
        places = np.array([of(float(peer.t[j])) for j in nodes])

        def weight(i, nodes=nodes, places=places, n=n):
            others = [j for j in range(len(nodes)) if j != i]

            def integrand(rho):
                # Integrated in rho, at the time that has it.
                t = float(problem()[0].inverse_log_snr(-2 * math.log(rho)))
                ratios = [(of(t) - places[j]) / (places[i] - places[j]) for j in others]
                return math.prod(ratios)

            ends = [peer.rho(float(peer.t[m])) for m in (n, n + 1)]
            return integrate.fixed_quad(np.vectorize(integrand), *ends, n=12)[0]

        x = x / peer.alpha[n] + sum(weight(i) * noise[j] for i, j in enumerate(nodes))
        x = peer.alpha[n + 1] * x
    return x


CASES = {
    "dpmpp_3m": (
        lambda: solve.dpmpp(3, lower_order_final=False),
        lambda p, x: dpmpp_3m(p, x, "exact"),
    ),
    "official": (
        lambda: solve.dpmpp(3, third="official", lower_order_final=False),
        lambda p, x: dpmpp_3m(p, x, "official"),
    ),
    "unipc3": (lambda: "unipc", lambda p, x: unipc(p, x, 3, "bh2")),
    "unipc2_bh1": (lambda: solve.unipc(2, variant="bh1"), lambda p, x: unipc(p, x, 2, "bh1")),
    "deis_rho": (
        lambda: solve.deis(variable="rho", lower_order_final=False),
        lambda p, x: deis(p, x, "rho"),
    ),
    "deis_t": (
        lambda: solve.deis(variable="t", lower_order_final=False),
        lambda p, x: deis(p, x, "t"),
    ),
    "deis_log_rho": (
        lambda: solve.deis(lower_order_final=False),
        lambda p, x: deis(p, x, "log_rho"),
    ),
}


# Variants of a case that stays.
SIBLINGS = ("official", "unipc2_bh1", "deis_rho")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in SIBLINGS else []) for n in CASES],
)
def test_the_published_update(name):
    make, peer = CASES[name]
    with jax.enable_x64(True):
        sde, _ = problem()
        out = draw(make())
        want = peer(Peer(uneven(sde)), states())
        np.testing.assert_allclose(out.x, want, atol=1e-6 if name == "deis_t" else 1e-10)
    assert int(out.nfe) == STEPS


@pytest.mark.parametrize(
    "solvers",
    [
        ("ddim", solve.dpm(1), solve.dpmpp(1), solve.unipc(1, corrector=False), solve.deis(1)),
        pytest.param(
            ("dpmpp_2m", solve.unipc(2, corrector=False, lower_order_final=None)),
            marks=pytest.mark.slow,
        ),
        pytest.param((solve.dpm(2, second="taylor"), solve.deis(2)), marks=pytest.mark.slow),
        ("dpm_3m", solve.unipc(3, kind="noise", corrector=False, lower_order_final=None)),
    ],
    ids=["order one", "2M", "DEIS", "3M on noise"],
)
def test_names_of_one_solver(solvers):
    with jax.enable_x64(True):
        first, *others = (draw(s).x for s in solvers)
    for other in others:
        np.testing.assert_allclose(first, other, atol=1e-12)


# --- stability ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_phi_in_single_precision(sign):
    z = sign * np.geomspace(1e-6, 10, 400)
    got = jax.jit(lambda z: solve.phi(z, 4))(jnp.asarray(z, jnp.float32))
    z = np.asarray(z, np.float32).astype(np.float64)
    for k, own in enumerate(got, 1):
        # phi_k(z) = int_0^1 e^{(1-u) z} u^{k-1}/(k-1)! du
        u, w = np.polynomial.legendre.leggauss(40)
        u, w = 0.5 * (u + 1), 0.5 * w
        want = np.exp((1 - u) * z[:, None]) @ (w * u ** (k - 1)) / math.factorial(k - 1)
        np.testing.assert_allclose(own, want, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("dpmpp_2m", 5),
        ("dpm_3", 5),
        ("dpmpp_3m", 50),
        ("unipc", 50),
        *(
            pytest.param(name, steps, marks=pytest.mark.slow)
            for steps, names in {
                5: ("dpmpp_3m", "unipc"),
                1000: ("dpmpp_2m", "dpmpp_3m", "unipc", "dpm_3"),
            }.items()
            for name in names
        ),
    ],
)
def test_single_against_double_precision(name, steps):
    options = {"grid": "log_snr", "steps": steps}
    single = draw(name, **options).x
    with jax.enable_x64(True):
        double = draw(name, **options).x
    # A state of order one is rounded at every step; the errors add up like a random walk.
    assert single.dtype == jnp.float32 and double.dtype == jnp.float64
    assert float(np.abs(np.asarray(single) - np.asarray(double)).max()) < 2e-6 * (5 + steps**0.5)


def test_a_bfloat16_field_and_samples(key):
    sde, exact = problem()

    def field(x, t):
        assert x.dtype == jnp.bfloat16
        return exact.noise(x.astype(jnp.float32), t).astype(jnp.bfloat16)

    options = {"solver": "unipc", "steps": 8}
    half = jax.jit(lambda k: solve.sample(k, field, sde, (200, 3), dtype=jnp.bfloat16, **options))
    full = jax.jit(lambda k: solve.sample(k, exact.noise, sde, (200, 3), **options))
    a, b = half(key).x, full(key).x
    assert a.dtype == jnp.bfloat16
    # Outputs are rounded to 2^-9; the first noise drawn is the same.
    assert float(jnp.sqrt(jnp.mean((a.astype(jnp.float32) - b) ** 2))) < 0.05


# --- the ends ------------------------------------------------------------------------------------

ENDS = {
    "edm": (process.edm, "noise", {"t_end": 0.0}),
    "rectified": (process.rectified, "velocity", {"t_start": 1.0, "t_end": 0.0}),
    "cosine": (process.cosine, "v", {"t_start": 1.0}),
}


@pytest.mark.parametrize(
    ("name", "solver", "nfe"),
    [
        ("edm", "unipc", 9),
        pytest.param("edm", "dpm_3m", 9, marks=pytest.mark.slow),
        ("edm", "dpm_3", 25),
        pytest.param("rectified", "unipc", 9, marks=pytest.mark.slow),
        ("rectified", "dpmpp_2s", 16),
        ("cosine", "dpmpp_3m_sde", 9),
    ],
)
def test_a_data_point_is_met_from_and_to_the_proper_ends(key, name, solver, nfe):
    make, prediction, options = ENDS[name]
    sde = make()
    point = jnp.array([[1.5, -0.7]])
    exact = score.closed_form.empirical(sde, point)
    field = getattr(exact, prediction)
    calls = []

    def counted(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return field(x, t)

    options = {"prediction": prediction, "solver": solver, "steps": 9} | options
    out = jax.jit(lambda k: solve.sample(k, counted, sde, (3, 2), **options))(key)
    jax.effects_barrier()
    assert int(out.nfe) == len(calls) == nfe
    end = float(sde.sigma(options.get("t_end", sde.t_end)))
    noise = (out.x - (1 - end * (name == "rectified")) * point) / max(end, 1e-30)
    if end == 0:
        np.testing.assert_allclose(out.x, jnp.broadcast_to(point, (3, 2)), atol=2e-5)
    else:
        assert bool(jnp.isfinite(noise).all()) and float(jnp.abs(noise).max()) < 6


def test_the_last_step_to_data_returns_the_data_prediction(key):
    sde = process.edm()
    exact = score.closed_form.gaussian(sde, jnp.zeros(2), 1.0)
    options = {"prediction": "data", "grid": jnp.array([80.0, 10.0, 1.0, 0.1, 0.0])}
    x = sde.prior_sample(key, (3, 2))
    kept = []

    def field(x, t):
        out = exact.data(x, t)
        jax.debug.callback(kept.append, out)
        return out

    run = jax.jit(
        lambda x: solve.sample(key, field, sde, (3, 2), solver="unipc", x_init=x, **options)
    )
    out = run(x)
    jax.effects_barrier()
    assert len(kept) == 4
    np.testing.assert_allclose(out.x, kept[-1], atol=1e-6)


@pytest.mark.parametrize("solver", ["unipc", pytest.param("dpmpp_2s", marks=pytest.mark.slow)])
def test_starts_of_their_own(key, solver):
    sde, exact = problem()
    x = jax.random.normal(key, SHAPE)
    starts = jnp.array([1.0, 0.7, 0.4, 0.2])

    @jax.jit
    def run(x, starts):
        options = {"solver": solver, "steps": 6, "x_init": x, "t_start": starts}
        return solve.sample(key, exact.noise, sde, x.shape, **options).x

    alone = run(x, jnp.asarray(0.4))
    np.testing.assert_allclose(run(x, starts)[2], alone[2], atol=1e-5)


# --- gradients and other loops --------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver", ["unipc", "dpm_3", pytest.param("dpmpp_3m", marks=pytest.mark.slow)]
)
def test_gradient_in_a_parameter_of_the_process(solver):
    _, exact = problem()
    x = jnp.asarray(states(), jnp.float32)

    @jax.jit
    def end(beta_max):
        own = process.vp(beta_max=beta_max)
        options = {"steps": 5, "x_init": x, "solver": solver}
        return solve.sample(jax.random.key(0), exact.noise, own, SHAPE, **options).x.sum()

    got = float(jax.grad(end)(20.0))
    want = float(end(20.2) - end(19.8)) / 0.4
    assert abs(got - want) < 0.02 * abs(want) + 1e-3, (got, want)


def test_gradients_at_the_ends_are_numbers(key):
    x = jax.random.normal(key, (2, 3))

    def end(betas, eta):
        sde = process.discrete_betas(betas)
        solver = solve.dpmpp(2, eta=eta)
        options = {"solver": solver, "steps": 4, "t_end": -1.0, "x_init": x}
        return solve.sample(key, lambda x, t: jnp.tanh(x), sde, x.shape, **options).x.sum()

    betas = jnp.linspace(1e-3, 0.2, 20)
    by_betas, by_eta = jax.jit(jax.grad(end, (0, 1)))(betas, 0.0)
    assert bool(jnp.isfinite(by_betas).all()) and bool(jnp.isfinite(by_eta))
    assert float(jnp.abs(by_betas).max()) > 0


def test_in_a_loop_with_a_corrector_and_under_half_steps(key):
    sde, exact = problem()
    options = {"steps": 6, "corrector": solve.langevin_corrector()}
    run = functools.partial(solve.sample, key, exact.noise, sde, SHAPE)
    first = jax.jit(lambda: run(solver=solve.dpmpp(1), **options).x)()
    np.testing.assert_allclose(first, jax.jit(lambda: run(solver="ddim", **options).x)(), atol=1e-5)
    with pytest.raises(ValueError, match="keeps a history"):
        run(solver="unipc", **options)
    halves = diffrax.HalfSolver(solve.dpmpp(2))
    controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    x = jnp.asarray(states(), jnp.float32)
    out = jax.jit(lambda: run(solver=halves, controller=controller, x_init=x))()
    fine = draw("dpm_3", grid="log_snr", steps=100).x
    assert float(jnp.abs(out.x - fine).max()) < 0.02 and int(out.nfe.min()) > 10


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: solve.dpmpp(4), "order is 4; expected 1, 2 or 3"),
        (lambda: solve.dpmpp(2.0), "order is 2.0"),
        (lambda: solve.dpmpp(2, eta="a"), "eta is 'a'"),
        (lambda: solve.dpmpp(2, eta=jnp.zeros(4)), "one real number"),
        (lambda: solve.dpmpp(2, third="wrong"), "third is 'wrong'"),
        (lambda: solve.dpmpp(2, eta=-0.1), "eta is -0.1"),
        (lambda: solve.unipc(2, variant="bh3"), "variant is 'bh3'"),
        (lambda: solve.deis(variable="sigma"), "variable is 'sigma'"),
        (lambda: solve.dpm_2(1.0), "nodes is"),
        (lambda: draw("unipc", grid="log_snr", steps=2), "steps is 2 for unipc of order 3"),
        (lambda: draw("dpm_3m", grid=jnp.array([0.9, 0.5, 0.5, 0.1])), "falling times"),
    ],
)
def test_what_is_wrong_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("solver", ["unipc", "dpm_2m", "dpmpp_2s"])
def test_noise_prediction_from_pure_noise_is_refused(key, solver):
    sde = process.rectified()
    with pytest.raises(ValueError, match="alpha is 0"):
        solve.sample(key, lambda x, t: x, sde, (2, 3), solver=solver, t_start=1.0, steps=4)


def test_euler_maruyama_from_pure_noise_is_refused(key):
    with pytest.raises(ValueError, match="alpha is 0"):
        solve.sample(
            key, lambda x, t: x, process.cosine(), (2, 3), solver="euler_maruyama", t_start=1.0
        )


@pytest.mark.parametrize("bad", [lambda x: x[:, :1], lambda x: x.astype(int), lambda x: x + 1j])
def test_fields_of_another_shape_or_kind_are_refused(key, bad):
    sde, _ = problem()
    with pytest.raises((ValueError, TypeError), match="field"):
        solve.sample(key, lambda x, t: bad(x), sde, SHAPE, solver="unipc", steps=4)
