"""The four losses of absorbing diffusion against the entropy of a joint law, by enumeration."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jaxgen.process.absorbing import absorbing
from jaxgen.score import discrete
from jaxgen.score.discrete import aoarm_nll, log_conditionals, radd_loss, radd_score
from jaxgen.train.mesh import make_mesh
from jaxgen.train.parallel import over_batch

V, L = 3, 4
JOINT = np.random.default_rng(3).dirichlet(np.full(V**L, 0.3)).reshape((V,) * L)
ENTROPY = -float((JOINT * np.log(JOINT)).sum())
PROCESS = absorbing(V)
CLEAN = np.array(list(itertools.product(range(V), repeat=L)))


def conditionals(joint):
    """``p(x^i = v | unmasked)`` for every state with masks: ``((V+1)^l, l, V)``."""
    table = np.zeros(((V + 1),) * L + (L, V))
    for x in itertools.product(range(V + 1), repeat=L):
        seen = joint[tuple(slice(None) if a == V else slice(a, a + 1) for a in x)]
        for i in range(L):
            own = seen.sum(axis=tuple(j for j in range(L) if j != i))
            table[x][i] = own / own.sum() if x[i] == V else np.eye(V)[x[i]]
    return table.reshape(-1, L, V)


with np.errstate(divide="ignore"):
    TABLE = jnp.asarray(np.log(conditionals(JOINT)), jnp.float32)


def exact(x, table=TABLE):
    """The exact conditionals as a field, for a batch or one sequence."""
    places = jnp.asarray([(V + 1) ** (L - 1 - i) for i in range(L)])
    return table[jnp.tensordot(x, places, 1)]


def enumerate_masks(fixed_level=None):
    """Every loss for every clean sequence and mask, with the masks' counts."""
    masks = np.array(list(itertools.product((False, True), repeat=L)))
    x = np.where(masks[:, None], V, CLEAN[None])
    log_cond = np.asarray(exact(jnp.asarray(x)), np.float64)
    own = np.take_along_axis(log_cond, np.broadcast_to(CLEAN, x.shape)[..., None], -1)[..., 0]
    sums = -np.where(masks[:, None], own, 0).sum(-1)
    return masks.sum(1), (sums * JOINT.reshape(-1)).sum(-1)


def test_the_bound_of_exact_conditionals_is_the_entropy():
    # E[loss] over masks, the level integrated in closed form: beta functions.
    assert pytest.approx(3.35800, abs=5e-6) == ENTROPY
    counts, sums = enumerate_masks()

    def bound(last):
        """The integral of (1/lam) lam^m (1 - lam)^(L - m) over lam in (0, last), for each mask."""
        level = np.linspace(0, last, 20_001)
        total = 0.0
        for m, value in zip(counts, sums, strict=True):
            if m:
                total += value * np.trapezoid(level ** (m - 1) * (1 - level) ** (L - m), level)
        return total

    k_dce = sum(
        value * (L / m) / (L * math.comb(L, m)) for m, value in zip(counts, sums, strict=True) if m
    )
    assert k_dce == pytest.approx(ENTROPY, abs=1e-5)
    assert bound(1.0) == pytest.approx(ENTROPY, abs=1e-5)
    assert bound(0.999) == pytest.approx(3.35379, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "draws"),
    [
        *((kind, "independent") for kind in discrete.LOSSES),
        ("k_dce", "decoupled"),
        ("t_dce", "stratified"),
    ],
)
def test_the_mean_loss_is_the_entropy(key, kind, draws):
    n = 40_000
    chosen = jax.random.choice(key, len(CLEAN), (n,), p=jnp.asarray(JOINT.reshape(-1)))
    loss = sampled(key, jnp.asarray(CLEAN)[chosen], kind=kind, draws=draws)
    truth = 3.35379 if kind.startswith("t_") else ENTROPY
    error = float(loss.std()) / n**0.5
    assert abs(float(loss.mean()) - truth) < 4 * error, (float(loss.mean()), error)


sampled = jax.jit(
    lambda key, x0, kind, draws: radd_loss(key, exact, PROCESS, x0, kind=kind, draws=draws),
    static_argnames=("kind", "draws"),
)


def noisy(x):
    """A normalised field that is no law's conditionals."""
    weights = jax.random.normal(jax.random.key(9), (V + 1, L, V + 1))
    return jnp.cumsum(weights[x, jnp.arange(L)], axis=-2)


def test_score_entropy_equals_cross_entropy_point_by_point(key):
    x0 = jax.random.randint(key, (200, L), 0, V)
    for process in (PROCESS, absorbing(V, "geometric", sigma_min=1e-3)):
        dse, dce = jax.jit(
            lambda process: [radd_loss(key, noisy, process, x0, kind=k) for k in ("t_dse", "t_dce")]
        )(process)
        assert float(dce.max()) > 1
        np.testing.assert_allclose(dse, dce, rtol=1e-5, atol=1e-5)


def test_the_formula_of_score_entropy_as_printed(key):
    # sigma (sum_v s_v - r log s_x0 + r (log r - 1)) over masked positions, from the score itself.
    t = jnp.array(0.3)
    x = jnp.array([V, 0, V, 1])
    log_cond = log_conditionals(noisy, PROCESS, x)
    score = radd_score(log_cond, PROCESS.total(t))
    r = 1 / jnp.expm1(PROCESS.total(t))
    x0 = jnp.array([1, 0, 2, 1])
    own = score[jnp.arange(L), x0]
    terms = PROCESS.rate(t) * (score.sum(-1) - r * jnp.log(own) + r * (jnp.log(r) - 1))
    dce = PROCESS.reverse_rate(t) * -log_cond[jnp.arange(L), x0]
    np.testing.assert_allclose(terms[x == V], dce[x == V], rtol=1e-5)
    np.testing.assert_allclose(score.sum(-1), jnp.full(L, r), rtol=1e-5)


def test_every_order_has_the_exact_likelihood_of_exact_conditionals():
    orders = jnp.asarray(list(itertools.permutations(range(L))))
    x0 = jnp.asarray(CLEAN[[5, 40, 77]])
    nll = jax.jit(jax.vmap(lambda o: aoarm_nll(exact, PROCESS, x0, o)))(orders)
    truth = -np.log(JOINT.reshape(-1)[[5, 40, 77]])
    np.testing.assert_allclose(nll, np.broadcast_to(truth, nll.shape), rtol=1e-5)
    own, alone = jax.jit(
        lambda o: (
            aoarm_nll(noisy, PROCESS, x0, o),
            aoarm_nll(noisy, PROCESS, x0[1], o[1], event_ndim=1),
        )
    )(orders[:3])
    np.testing.assert_allclose(own[1], alone, rtol=1e-5)


def test_the_mean_over_orders_is_the_expectation_of_k_dce(key):
    orders = jnp.asarray(list(itertools.permutations(range(L))))
    x0 = jnp.asarray([2, 0, 1, 1])
    nll = jax.jit(jax.vmap(lambda o: aoarm_nll(noisy, PROCESS, x0, o, event_ndim=1)))(orders)
    many = jnp.broadcast_to(x0, (20_000, L))
    loss = jax.jit(lambda k, x: radd_loss(k, noisy, PROCESS, x, kind="k_dce"))(key, many)
    error = float(loss.std()) / len(many) ** 0.5
    assert abs(float(loss.mean() - nll.mean())) < 4 * error
    assert float(nll.std()) > 20 * error


def test_the_mask_has_no_probability():
    x = jnp.full((1, L), V)
    certain = lambda x: jnp.concatenate([noisy(x), jnp.full((*x.shape, 1), 1e4)], -1)  # noqa: E731
    log_cond = log_conditionals(lambda x: certain(x)[..., [0, 1, 2, -1]], PROCESS, x)
    assert log_cond.shape == (1, L, V)
    np.testing.assert_allclose(log_cond, jax.nn.log_softmax(noisy(x)[..., :V]), rtol=1e-5)


def test_a_network_that_takes_the_level_is_given_it(key):
    x0 = jnp.zeros((300, L), jnp.int32)
    seen = lambda x, lam: jnp.stack([jnp.zeros(x.shape), 0 * x + lam[:, None], -9e9 + 0.0 * x], -1)  # noqa: E731
    for kind in ("t_dce", "k_dce"):
        loss, per_mask = jax.jit(
            lambda k, x, kind=kind: (
                radd_loss(k, seen, PROCESS, x, kind=kind, takes_level=True),
                radd_loss(k, lambda x: jnp.zeros((*x.shape, V)), PROCESS, x, kind=kind),
            )
        )(key, x0)
        # log(1 + exp(lam)) for each masked token lies between these.
        ratio = (loss / per_mask)[per_mask > 0] * math.log(V)
        # The largest k is a level of 1, to rounding.
        low, high = math.log(2), math.log(1 + math.e)
        assert low < float(ratio.min()) and float(ratio.max()) < high * (1 + 2**-20)
        assert float(ratio.max() - ratio.min()) > 0.3
    alone = radd_loss(
        key, lambda x, lam: jnp.zeros((L, V)) + lam, PROCESS, x0[0], takes_level=True, event_ndim=1
    )
    assert alone.shape == ()
    x0, order = jnp.zeros((1, L), jnp.int32), jnp.arange(L)
    nll = aoarm_nll(seen, PROCESS, x0, order, takes_level=True)
    levels = np.array([1.0, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(nll, [np.log1p(np.exp(levels)).sum()], rtol=1e-5)


@pytest.mark.parametrize("kind", discrete.LOSSES)
def test_gradients_are_those_of_differences(key, kind):
    x0 = jax.random.randint(key, (4, L), 0, V)

    @jax.jit
    def total(a):
        return radd_loss(key, lambda x: a * noisy(x), PROCESS, x0, kind=kind).sum()

    step = 1e-2
    slope = (total(0.7 + step) - total(0.7 - step)) / (2 * step)
    np.testing.assert_allclose(jax.jit(jax.grad(total))(0.7), slope, rtol=2e-2)


def test_decoupled_levels_keep_to_their_share():
    u, _ = discrete._levels(jax.random.key(0), (10,), "decoupled")
    assert np.floor(np.asarray(u) * 10).tolist() == list(range(10))
    u, _ = discrete._levels(jax.random.key(0), (10,), "stratified")
    np.testing.assert_allclose(np.diff(np.sort(u)), 0.1, atol=1e-6)


def test_decoupled_levels_of_a_batch_in_parts_are_those_of_the_whole(key):
    def draw(key, n):
        return discrete._levels(key, (n,), "decoupled")[0]

    parts = over_batch(draw, make_mesh("data=8"))(key, 16)
    np.testing.assert_allclose(parts, draw(key, 16), rtol=2**-22)


def broken(x, value):
    return noisy(x).at[0, :, 0].set(value)


def test_values_that_are_no_token_or_number_are_nan(key):
    x0 = jnp.zeros((3, L), jnp.int32)

    @jax.jit
    def loss(x, value, t_min=1e-5):
        k_dce = radd_loss(key, lambda x: broken(x, value), PROCESS, x, kind="k_dce")
        return k_dce, radd_loss(key, noisy, PROCESS, x, kind="t_dce", t_min=t_min)

    assert np.isnan(loss(x0.at[1, 2].set(V), 0.0)).tolist() == [[False, True, False]] * 2
    assert np.isnan(loss(x0, jnp.nan)[0]).tolist() == [True, False, False]
    assert np.isnan(loss(x0, jnp.inf)[0]).tolist() == [True, False, False]
    assert np.isnan(loss(x0, 0.0, 2.0)).tolist() == [[False] * 3, [True] * 3]
    assert np.isnan(radd_score(jnp.zeros((1, V)), 0.0)).all()
    checked = checkify.checkify(loss)
    for arguments, match in (((x0 + V, 0.0), "x0 holds ids"), ((x0, jnp.nan), "no number")):
        with pytest.raises(checkify.JaxRuntimeError, match=match):
            checked(*arguments)[0].throw()


def test_arguments_that_do_not_fit(key):
    x0 = jnp.zeros((3, L), jnp.int32)
    with pytest.raises(ValueError, match=r"holds the token 3; expected ids in \[0, 2\]"):
        radd_loss(key, noisy, PROCESS, x0 + V)
    with pytest.raises(ValueError, match="kind is 'dse'"):
        radd_loss(key, noisy, PROCESS, x0, kind="dse")
    with pytest.raises(ValueError, match="draws is 'sobol'"):
        radd_loss(key, noisy, PROCESS, x0, draws="sobol")
    with pytest.raises(ValueError, match=r"returned shape \(3, 4, 9\)"):
        radd_loss(key, lambda x: jnp.zeros((*x.shape, 9)), PROCESS, x0)
    with pytest.raises(TypeError, match="int32; expected a floating"):
        radd_loss(key, lambda x: jnp.zeros((*x.shape, V), jnp.int32), PROCESS, x0)
    with pytest.raises(TypeError, match="integer token ids"):
        radd_loss(key, noisy, PROCESS, x0.astype(float))
    for order, kind, match in (
        (jnp.array([0, 1, 1, 2]), ValueError, "no permutation"),
        (jnp.arange(5), ValueError, "order has shape"),
        (jnp.arange(4.0), TypeError, "order has dtype"),
    ):
        with pytest.raises(kind, match=match):
            aoarm_nll(noisy, PROCESS, x0, order)
    nll = jax.jit(lambda order: aoarm_nll(noisy, PROCESS, x0, order))(jnp.array([0, 1, 1, 2]))
    assert np.isnan(nll).all()
