"""Fields of interpolants: the closed forms, the losses that they minimise, and conversions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import process, score
from jaxgen.process.interpolant import interpolant
from jaxgen.process.spline_interpolant import spline, spline_interpolant
from jaxgen.score import closed_form
from jaxgen.score.derivatives import value_and_divergence
from jaxgen.score.interpolant import (
    KINDS,
    convert_interpolant,
    interpolant_loss,
    schrodinger_objective,
)

START = (np.array([0.4, 0.6]), np.array([[-1.0, 0.3], [1.0, 2.0]]), np.array([0.5, 0.3]))
FULL = np.array([[[1.0, 0.3], [0.3, 0.5]], [[0.4, -0.1], [-0.1, 0.3]]])
END = (np.array([0.7, 0.3]), np.array([[0.5, 0.2], [-1.0, 1.0]]), np.array([0.6, 0.2]))


def make(name, *, full=False, dtype=jnp.float32):
    interp = interpolant(name)
    start = None if interp.one_sided else (*START[:2], FULL) if full else START
    cast = lambda mix: mix and tuple(jnp.asarray(v, dtype) for v in mix)  # noqa: E731
    return closed_form.two_mixtures(interp, cast(start), cast(END))


def test_closed_form_obeys_the_transport_equation():
    """Along the flow log rho falls by div b, and s is its gradient, whatever the covariances."""
    with jax.enable_x64(True):
        laws = {name: make(name, dtype=jnp.float64) for name in ("trig", "score_based")}
        laws["full"] = make("linear", full=True, dtype=jnp.float64)

        @jax.jit
        def residuals(laws, x, t):
            out = {}
            for name, law in laws.items():
                b, divergence = value_and_divergence(law.b, x, t)
                _, push = jax.linearize(law.log_prob, x, t)
                along_flow = push(b, jnp.ones_like(t))
                ends = jnp.stack([law.b(x, 0.0), law.b(x, 1.0), law.score(x, 0.0)])
                slope = push(x, jnp.zeros_like(t)) - jnp.sum(x * law.score(x, t), axis=-1)
                out[name] = along_flow + divergence, slope, ends
            return out

        x, t = jnp.array([[0.3, -0.2], [1.0, 1.0]]), jnp.array([0.3, 0.8])
        for name, (excess, slope, ends) in residuals(laws, x, t).items():
            np.testing.assert_allclose(excess, 0.0, atol=1e-13, err_msg=name)
            np.testing.assert_allclose(slope, 0.0, atol=1e-13, err_msg=name)
            assert np.isfinite(ends).all(), name


def test_closed_form_against_known_figures():
    """Two mixtures on a line: log rho_1 at three places."""
    with jax.enable_x64(True):
        law = closed_form.two_mixtures(
            interpolant("linear"),
            (jnp.array([0.5, 0.5]), jnp.array([[-2.0], [1.0]]), jnp.array([0.2, 0.3])),
            (jnp.array([0.3, 0.7]), jnp.array([[-1.0], [2.0]]), jnp.array([0.1, 0.15])),
        )
        log_prob = jax.jit(law.log_prob)(jnp.array([[-1.3], [0.4], [2.2]]), 1.0)
        np.testing.assert_allclose(log_prob, [-1.42162, -8.72245, -0.46039], atol=1e-5)


def test_encoder_decoder_is_noise_half_way():
    law = make("encoder_decoder")
    x = jnp.array([[0.3, -2.0], [1.0, 0.5]])
    b, s = jax.jit(lambda x: (law.b(x, 0.5), law.score(x, 0.5)))(x)
    np.testing.assert_allclose(b, jnp.zeros_like(x), atol=2e-6)
    np.testing.assert_allclose(s, -x, rtol=1e-6)


def test_one_sided_linear_is_rectified_flow(key):
    """In flow time: the velocity through ``from_flow``, noise, score and data as they are."""
    law = make("one_sided_linear")
    weights, means, covs = (jnp.asarray(v, jnp.float32) for v in END)
    other = closed_form.mixture(process.rectified(), weights, means, covs)
    x = jax.random.normal(key, (16, 2))
    t = jnp.linspace(0.05, 0.95, 16)

    @jax.jit
    def both(x, t):
        ours = (score.from_flow(law.b)(x, t), law.noise(x, 1 - t), law.score(x, 1 - t))
        theirs = (other.velocity(x, t), other.noise(x, t), other.score(x, t))
        data = law.x1(x, 1 - t), other.data(x, t)
        return ours, theirs, data, (law.log_prob(x, 1 - t), other.log_prob(x, t))

    ours, theirs, data, log_probs = both(x, t)
    for a, b in (*zip(ours, theirs, strict=True), data, log_probs):
        # Through 1 - t the noise level loses a digit.
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_samples_have_the_law(key):
    """The mean of the score over its own law is zero, and of -x . s it is the dimension."""
    law = make("linear", full=True)

    @jax.jit
    def moments(key):
        x = law.sample(key, (20000, 2), 0.4)
        s = law.score(x, 0.4)
        return s, -jnp.sum(x * s, axis=-1)

    s, stein = moments(key)
    z_score = np.abs(s.mean(0)) / (s.std(0) / 20000**0.5)
    assert (z_score < 4).all(), z_score
    assert abs(stein.mean() - 2) < 4 * stein.std() / 20000**0.5


# --- losses -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slopes():
    """Derivatives of the losses along a direction, at the exact field and at a wrong one."""
    n = 8000

    def along(key, law, x0, x1, target, antithetic, wrong):
        exact = getattr(law, target)

        def loss(size):
            def field(x, t):
                return exact(x, t) + (wrong + size) * jnp.sin(x + t[:, None])

            return interpolant_loss(
                key, field, law.interp, x0, x1, target=target, antithetic=antithetic, t_min=0.02,
                t_max=0.98,
            )  # fmt: skip

        return jax.jvp(loss, (0.0,), (1.0,))[1]

    @jax.jit
    def run(key, laws):
        key_ends, key_loss = jax.random.split(key)
        out = {}
        for name, law in laws.items():
            x0, x1 = law.ends(key_ends, (n, 2))
            for target in KINDS:
                for antithetic in (True, False) if name == "linear" else (True,):
                    values = jax.vmap(
                        lambda wrong, law=law, x0=x0, x1=x1, target=target, a=antithetic: along(
                            key_loss, law, x0, x1, target, a, wrong
                        )
                    )(jnp.array([0.0, 0.3]))
                    out[f"{name} {target} {antithetic}"] = (
                        jnp.mean(values, axis=1),
                        jnp.std(values, axis=1) / n**0.5,
                    )
        return out

    names = ("linear", "one_sided_trig")
    flat = run(jax.random.key(1), {name: make(name) for name in names})
    return {name: tuple(np.asarray(v) for v in value) for name, value in flat.items()}


def test_each_loss_is_least_at_its_field(slopes):
    for name, (mean, error) in slopes.items():
        z = np.abs(mean) / error
        assert z[0] < 4 and z[1] > 8, (name, z)


def test_antithetic_loss_has_the_same_mean_and_less_spread(slopes):
    for target in ("b", "score"):
        (a, a_error), (b, b_error) = (slopes[f"linear {target} {use}"] for use in (True, False))
        assert abs(a[1] - b[1]) < 4 * np.hypot(a_error[1], b_error[1])
        assert a_error[1] < 0.8 * b_error[1], (target, a_error, b_error)


def test_antithetic_variance_stays_bounded(key):
    """The plain loss of a score has variance 1/gamma^2 near an end, the antithetic one about 1."""
    one = lambda m, c: (jnp.ones(1), jnp.full((1, 1), m), jnp.full(1, c))  # noqa: E731
    law = closed_form.two_mixtures(interpolant("linear"), one(0.0, 1.0), one(2.0, 0.25))
    n = 100000

    @jax.jit
    def estimates(key, t):
        x0, x1 = law.ends(key, (n, 1))

        def values(antithetic):
            return interpolant_loss(
                key,
                law.score,
                law.interp,
                x0,
                x1,
                target="score",
                antithetic=antithetic,
                t_min=t,
                t_max=t,
            )

        # The part with z/gamma in it, by itself: the loss is even in the rest.
        plus, minus = (
            interpolant_loss(
                key,
                lambda x, t, sign=sign: sign * law.score(x, t),
                law.interp,
                x0,
                x1,
                target="score",
                antithetic=True,
                t_min=t,
                t_max=t,
            )
            for sign in (1.0, -1.0)
        )
        return values(True), values(False), 0.5 * (plus - minus)

    for t, known in ((1e-2, 2.03), (1e-4, 2.0)):
        antithetic, plain, noise_part = estimates(key, t)
        variance = (1 - t) ** 2 + 0.25 * t**2 + t * (1 - t)
        for values in (antithetic, plain):
            # Half of E|s|^2 = 1/C, less 1/C.
            assert abs(values.mean() + 0.5 / variance) < 4 * values.std() / n**0.5
        assert abs(noise_part.mean() + 1 / variance) < 4 * noise_part.std() / n**0.5
        np.testing.assert_allclose(noise_part.var(), known, rtol=0.05)
        np.testing.assert_allclose(plain.var(), 1 / (t * (1 - t)), rtol=0.1)


def test_forms_differ_by_a_constant(key):
    x0, x1 = jnp.zeros((8, 3)), jnp.linspace(-1, 1, 24).reshape(8, 3)
    interp = interpolant("trig", a=2.0)

    @jax.jit
    def gradients(a, key):
        out = {}
        for target in KINDS:
            for form in ("energy", "regression"):

                def total(a, target=target, form=form):
                    return interpolant_loss(
                        key, lambda x, t: a * jnp.cos(x), interp, x0, x1, target=target, form=form
                    ).sum()

                out[target, form] = jax.value_and_grad(total)(a)
        return out

    out = gradients(0.7, key)
    for target in KINDS:
        energy, regression = out[target, "energy"], out[target, "regression"]
        np.testing.assert_allclose(energy[1], regression[1], rtol=1e-4)
        assert regression[0] > 0


def test_losses_are_per_example_and_keep_the_dtype(key):
    interp = interpolant("linear")
    x0, x1 = jnp.zeros((4, 3)), jnp.ones((4, 3))

    def field(x, t):
        assert t.shape == x.shape[:-1]
        return jnp.cos(x) + t.reshape(t.shape + (1,) * (x.ndim - t.ndim))

    @jax.jit
    def forms(key):
        whole = interpolant_loss(key, field, interp, x0, x1)
        part = interpolant_loss(key, field, interp, x0[:2], x1[:2])
        one = interpolant_loss(
            jax.random.fold_in(key, 3), field, interp, x0[3], x1[3], event_ndim=1
        )
        low = interpolant_loss(key, field, interp, x0.astype(jnp.bfloat16), x1.astype(jnp.bfloat16))
        return whole, part, one, low

    whole, part, one, low = forms(key)
    np.testing.assert_allclose(part, whole[:2], rtol=1e-5)
    np.testing.assert_allclose(one, whole[3], rtol=1e-5)
    assert low.dtype == jnp.float32 and low.shape == (4,)


# --- the bridge ---------------------------------------------------------------------------------


def _bridge(a, epsilon, s0, s1, shift):
    one = lambda m, s: (jnp.ones(1), jnp.full((1, 1), m), jnp.full(1, s**2))  # noqa: E731
    law = closed_form.two_mixtures(interpolant("linear", a), one(0.0, s0), one(shift, s1))

    def drift(x, t):
        return law.b(x, t) + epsilon * law.score(x, t)

    return law, drift


@jax.jit
def _objective(key, log_a, case):
    """The objective with u at its inner minimum, its standard error and its slope in log a."""
    _, drift = _bridge(jnp.exp(log_a), *case)
    _, s0, s1, shift = case
    x0, x1 = jax.random.normal(jax.random.fold_in(key, 1), (2, 8192, 1))
    x0, x1 = s0 * x0, shift + s1 * x1

    def value(log_a):
        # The drift is not differentiated: at the inner minimum its change does not count.
        values = schrodinger_objective(
            key,
            drift,
            interpolant("linear", jnp.exp(log_a)),
            x0,
            x1,
            epsilon=case[0],
            t_min=0.0,
            t_max=1.0,
        )
        return jnp.mean(values), jnp.std(values) / 8192**0.5

    (mean, error), slope = jax.value_and_grad(value, has_aux=True)(log_a)
    return mean, error, slope


def _ascend(key, case):
    """Gradient ascent in log a with falling steps, its later half averaged."""
    log_a, total, steps = jnp.zeros(()), 0.0, 240
    for n in range(steps):
        slope = _objective(jax.random.fold_in(key, n), log_a, case)[2]
        log_a = log_a + np.float32(0.5 / np.sqrt(1 + n)) * slope
        total += float(log_a) if n >= steps // 2 else 0.0
    return np.exp(total / (steps - steps // 2))


@pytest.mark.parametrize(
    ("case", "energies", "ascends"),
    [
        ((0.5, 1.0, 0.5, 2.0), {1.4142136: 5.410307, 1.0: 5.4431, 2.0: 5.4638}, True),
        ((1.0, 1.0, 1.0, 0.0), {2.8284271: 0.934320}, False),
        pytest.param((1.0, 1.0, 1.0, 0.0), {}, True, marks=pytest.mark.slow),
    ],
)
def test_the_bridge_between_gaussians(case, energies, ascends):
    """Minus half of the kinetic energy; the ascent in a reaches the known best."""
    best = 2 * np.sqrt(case[1] ** 2 * case[2] ** 2 + case[0] ** 2)
    case = tuple(jnp.float32(c) for c in case)
    for a, energy in energies.items():
        mean, error, _ = _objective(jax.random.key(0), jnp.log(a), case)
        assert abs(mean + 0.5 * energy) < 4 * error, (a, mean, error)
    if ascends:
        reached = _ascend(jax.random.key(1), case)
        print(reached, best)
        assert abs(reached / best - 1) < 0.01, (reached, best)


@pytest.mark.slow
def test_the_bridge_is_learnt_by_two_optimisers():
    """Ascent on a spline interpolant and descent on an affine drift, between the Gaussians above.

    The objective is minus half of 5.410307, and the marginals are those of the best Brownian gamma.
    """
    epsilon, s1, shift, best = 0.5, 0.5, 2.0, 2**0.5

    def field(params, x, t):
        pull, push = spline(t, params[0]), spline(t, params[1])
        return pull[:, None] * x + push[:, None]

    def objective(both, key, n=1024):
        key0, key1, own = jax.random.split(key, 3)
        x0 = jax.random.normal(key0, (n, 1))
        x1 = shift + s1 * jax.random.normal(key1, (n, 1))
        interp = spline_interpolant(*both["interp"])
        drift = functools.partial(field, both["field"])
        return schrodinger_objective(own, drift, interp, x0, x1, epsilon=epsilon)

    steps = 8000
    descent = optax.adam(optax.cosine_decay_schedule(5e-2, steps))
    # The interpolant moves more slowly, without momentum: the drift has to keep up with it.
    slower = optax.adam(optax.cosine_decay_schedule(3e-3, steps), b1=0.0)
    ascent = optax.chain(optax.scale(-1.0), slower)

    @jax.jit
    def train(key):
        zeros = jnp.zeros(6)
        both = {"interp": (zeros, zeros, zeros), "field": (zeros, zeros)}
        optimizers = {"interp": ascent, "field": descent}
        states = {name: opt.init(both[name]) for name, opt in optimizers.items()}

        def step(carry, n):
            both, states = carry
            slope = jax.grad(lambda b: objective(b, jax.random.fold_in(key, n)).mean())(both)
            out = {k: o.update(slope[k], states[k]) for k, o in optimizers.items()}
            both = {k: optax.apply_updates(both[k], out[k][0]) for k in both}
            return (both, {k: v[1] for k, v in out.items()}), None

        both = jax.lax.scan(step, (both, states), jnp.arange(steps))[0][0]
        values = objective(both, jax.random.fold_in(key, 2**30), 400000)
        return both, values.mean(), values.std() / 400000**0.5

    both, value, error = train(jax.random.key(0))
    t = jnp.linspace(0.1, 0.9, 9)
    r = spline_interpolant(*both["interp"]).rates(t)
    variance = r.alpha**2 + r.beta**2 * s1**2 + r.gamma**2
    expected = (1 - t) ** 2 + t**2 * s1**2 + best * t * (1 - t)
    print(value, error, variance / expected, r.beta / t)
    assert abs(value + 0.5 * 5.410307) < 4 * error
    np.testing.assert_allclose(variance, expected, rtol=0.05)
    np.testing.assert_allclose(r.beta, t, rtol=0.05, atol=0.01)


# --- conversions --------------------------------------------------------------------------------

_WAYS = [
    (("v", "noise"), "b"),
    (("v", "score"), "b"),
    (("v", "noise"), "score"),
    (("b", "score"), "v"),
    (("b", "score"), "noise"),
    (("b", "noise"), "v"),
    (("x0", "x1"), "b"),
    (("x0", "x1"), "score"),
    (("x0", "noise"), "v"),
    (("x1", "score"), "b"),
    (("b", "noise"), "x1"),
    (("v", "score"), "x0"),
]


def test_conversions_agree_with_the_closed_form(key):
    """Every documented way and some more, under ``jit``; and one for each example alone."""
    laws = {name: make(name) for name in ("linear", "mirror", "one_sided_trig", "score_based")}
    ways = {
        name: [
            ((k,), to)
            for k in ("b", "noise", "score", "x1")
            for to in ("b", "v", "noise", "score", "x1")
        ]
        for name in ("one_sided_trig", "score_based")
    }
    mirror = [("score", "b"), ("noise", "b"), ("noise", "v"), ("noise", "x1"), ("score", "x1")]
    ways |= {"linear": _WAYS, "mirror": [((k,), to) for k, to in mirror]}
    x = jax.random.normal(key, (8, 2))
    t = jnp.linspace(0.1, 0.9, 8)

    @jax.jit
    def convert(laws, x, t):
        out = {}
        for name, law in laws.items():
            fields = {k: getattr(law, k)(x, t) for k in ("b", "v", "noise", "score", "x0", "x1")}
            for kinds, target in ways[name]:
                known = {kind: fields[kind] for kind in kinds}
                out[f"{name}: {target} from {kinds}"] = (
                    convert_interpolant(known, x, t, law.interp, target),
                    fields[target],
                )
        known = {"v": laws["linear"].v(x, t), "noise": laws["linear"].noise(x, t)}
        one = jax.vmap(lambda k, x, t: convert_interpolant(k, x, t, laws["linear"].interp, "b"))
        out["vmap"] = one(known, x, t), laws["linear"].b(x, t)
        return out

    for name, (value, expected) in convert(laws, x, t).items():
        np.testing.assert_allclose(value, expected, rtol=2e-3, atol=2e-4, err_msg=name)


def test_conversions_at_the_ends():
    """The score gives b there; noise cannot; a one-sided b at t = 0 needs the mean of x1."""
    x, mean = jnp.array([[0.5, -1.0]]), jnp.asarray((END[0][:, None] * END[1]).sum(0), jnp.float32)
    laws = {name: make(name) for name in ("linear", "one_sided_linear", "score_based")}

    @jax.jit
    def convert(laws, x):
        known, unknown = {}, {}
        for name, law in laws.items():

            def b_from(t, law=law, **options):
                kinds = options.pop("kinds")
                values = {kind: getattr(law, kind)(x, t) for kind in kinds}
                return convert_interpolant(values, x, t, law.interp, "b", **options)

            if name == "linear":
                for t in (0.0, 1.0):
                    known[f"{name} {t}"] = b_from(t, kinds=("v", "score")), law.b(x, t)
                    unknown[f"{name} {t}"] = b_from(t, kinds=("v", "noise"))
                    both = {kind: getattr(law, kind)(x, t) for kind in ("x0", "x1")}
                    v = convert_interpolant(both, x, t, law.interp, "v")
                    known[f"v {t}"] = v, law.v(x, t)
            else:
                known[name] = b_from(0.0, kinds=("noise",), x1_mean=mean), law.b(x, 0.0)
                known[f"{name} 1"] = b_from(1.0, kinds=("score",)), law.b(x, 1.0)
                unknown[name] = b_from(0.0, kinds=("noise",))
        return known, unknown

    known, unknown = convert(laws, x)
    for name, (value, expected) in known.items():
        np.testing.assert_allclose(value, expected, rtol=1e-5, err_msg=name)
    assert all(np.isnan(value).all() for value in unknown.values()), unknown


# --- bad input ----------------------------------------------------------------------------------


def _loss(name="linear", **options):
    interp = interpolant(**({"name": name} if isinstance(name, str) else name))
    shape = options.pop("shape", (4, 2))
    field = options.pop("field", lambda x, t: x)
    return interpolant_loss(
        jax.random.key(0), field, interp, jnp.zeros((4, 2)), jnp.ones(shape), **options
    )


_NO_GAMMA = {"name": "linear", "gamma": "zero"}


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: _loss(target="velocity"), "target is 'velocity'"),
        (lambda: _loss(form="square"), "form is 'square'"),
        (lambda: _loss(shape=(4, 3)), "expected the same"),
        (lambda: _loss(t_min=-0.1), "t_min is -0.1"),
        (lambda: _loss(t_min=0.9, t_max=0.1), "t_min < t_max"),
        (lambda: _loss(_NO_GAMMA, target="score"), "gamma zero"),
        (lambda: _loss(_NO_GAMMA, target="noise"), "gamma zero"),
        (lambda: _loss(field=lambda x, t: x[:, 0]), "returned shape"),
        (
            lambda: convert_interpolant(
                {"v": jnp.ones((2, 1))}, jnp.ones((2, 1)), 0.5, interpolant("linear"), "b"
            ),
            "does not follow",
        ),
        (
            lambda: convert_interpolant({}, jnp.ones((2, 1)), 0.5, interpolant("mirror"), "b"),
            "does not follow",
        ),
        (
            lambda: convert_interpolant(
                {"v": jnp.ones((2, 1))}, jnp.ones((2, 1)), 0.5, interpolant(**_NO_GAMMA), "score"
            ),
            "gamma zero",
        ),
        (
            lambda: convert_interpolant(
                {"v": jnp.ones(2)}, jnp.ones((2, 1)), 0.5, interpolant("linear"), "b"
            ),
            "returned shape",
        ),
        (lambda: closed_form.two_mixtures(interpolant("linear"), None, END), "one-sided"),
        (lambda: closed_form.two_mixtures(interpolant("score_based"), START, END), "one-sided"),
        (
            lambda: closed_form.two_mixtures(
                interpolant("linear"), START, (END[0], END[1], -END[2])
            ),
            "variance",
        ),
        (
            lambda: closed_form.two_mixtures(
                interpolant("linear"), START, (END[0], END[1][:, :1], END[2])
            ),
            "start has the event",
        ),
        (
            lambda: schrodinger_objective(
                jax.random.key(0),
                lambda x, t: x,
                interpolant("linear"),
                jnp.ones((2, 1)),
                jnp.ones((2, 1)),
                epsilon=-1.0,
            ),
            "epsilon is -1.0",
        ),
        (
            lambda: schrodinger_objective(
                jax.random.key(0),
                lambda x, t: x,
                interpolant("score_based"),
                jnp.ones((2, 1)),
                jnp.ones((2, 1)),
                epsilon=1.0,
            ),
            "two-sided",
        ),
    ],
)
def test_bad_input(run, message):
    with pytest.raises(ValueError, match=message):
        run()


def test_bad_types():
    with pytest.raises(TypeError, match="x1 has dtype int32"):
        interpolant_loss(
            jax.random.key(0), lambda x, t: x, interpolant("linear"), jnp.ones((2, 1)),
            jnp.ones((2, 1), int),
        )  # fmt: skip
    with pytest.raises(TypeError, match="typed key"):
        interpolant_loss(
            jax.random.PRNGKey(0), lambda x, t: x, interpolant("linear"), jnp.ones((2, 1)),
            jnp.ones((2, 1)),
        )  # fmt: skip
    with pytest.raises(TypeError, match="weights, means, covs"):
        closed_form.two_mixtures(interpolant("linear"), START, END[0])
