"""The sampler of absorbing diffusion: its law, its evaluations, prompts, filters and orders."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jaxgen.process.absorbing import absorbing, expected_nfe
from jaxgen.score.discrete import aoarm_nll
from jaxgen.solve.discrete import ordered_sample, radd_sample

V, L = 3, 4
JOINT = np.random.default_rng(3).dirichlet(np.full(V**L, 0.3)).reshape((V,) * L)
EXACT = absorbing(V, eps=0.0)

# Total variation to the joint law at so many steps, of the exact conditionals.
DISTANCES = {1: 0.561, 2: 0.323, 4: 0.173, 16: 0.046, 64: 0.013}


def conditionals():
    table = np.zeros(((V + 1),) * L + (L, V))
    for x in itertools.product(range(V + 1), repeat=L):
        seen = JOINT[tuple(slice(None) if a == V else slice(a, a + 1) for a in x)]
        for i in range(L):
            own = seen.sum(axis=tuple(j for j in range(L) if j != i))
            table[x][i] = own / own.sum() if x[i] == V else np.eye(V)[x[i]]
    return table.reshape(-1, L, V)


with np.errstate(divide="ignore"):
    TABLE = jnp.asarray(np.log(conditionals()), jnp.float32)


def exact(x):
    places = jnp.asarray([(V + 1) ** (L - 1 - i) for i in range(L)])
    return TABLE[jnp.tensordot(x, places, 1)]


def distance(x):
    """Total variation of samples to the joint law."""
    places = np.array([V ** (L - 1 - i) for i in range(L)])
    counts = np.bincount(np.asarray(x) @ places, minlength=V**L)
    return 0.5 * float(np.abs(counts / counts.sum() - JOINT.reshape(-1)).sum())


@functools.partial(jax.jit, static_argnames=("n", "steps", "method", "cache"))
def draw(key, process, n, steps, method="tweedie", cache=True):
    return radd_sample(key, exact, process, (n, L), steps, method=method, cache=cache)


@pytest.mark.parametrize(
    "steps", [s if s in (1, 4, 64) else pytest.param(s, marks=pytest.mark.slow) for s in DISTANCES]
)
def test_the_law_of_the_samples_nears_the_joint_law(key, steps):
    n = 40_000
    out = draw(key, EXACT, n, steps)
    # The floor: 81 cells of n draws, each |error| sqrt(2/pi) standard errors on average.
    floor = 0.5 * np.sqrt(2 / np.pi) * np.sqrt(JOINT * (1 - JOINT) / n).sum()
    assert distance(out.x) < 1.1 * DISTANCES[steps] + (floor if steps == 64 else 0)
    expected = float(expected_nfe(EXACT, steps, L))
    assert abs(float(out.nfe.mean()) - expected) <= 3 * float(out.nfe.std()) / n**0.5 + 1e-6
    assert int(out.calls) <= min(steps, L)


def test_euler_and_a_geometric_schedule_near_the_same_law(key):
    for process, method in ((absorbing(V, "geometric"), "tweedie"), (absorbing(V), "euler")):
        assert distance(draw(key, process, 50_000, 64, method).x) < 0.05


@functools.partial(jax.jit, static_argnames=("cache", "method", "steps"))
def long(key, process, cache=True, method="tweedie", steps=64):
    """Sequences of 32 tokens from a field with many distinct conditionals."""
    weights = jax.random.normal(jax.random.key(5), (7, 32, 6))

    def field(x):
        near = jnp.roll(x, 1, -1) * 3 + jnp.roll(x, -1, -1)
        return 2 * weights[near % 7, jnp.arange(32)[None]]

    return radd_sample(key, field, process, (1000, 32), steps, method=method, cache=cache)


@pytest.mark.parametrize("method", ["tweedie", "euler"])
def test_evaluations_of_32_tokens_in_64_steps(key, method):
    process = absorbing(6, eps=0.0)
    out = long(key, process, method=method)
    nfe = np.asarray(out.nfe)
    error = nfe.std() / len(nfe) ** 0.5
    assert abs(nfe.mean() - 25.335) < 3 * error
    assert nfe.max() <= 32
    # Eager: one more, unless the last step is busy.
    eager = nfe + ~(np.asarray(out.unmasked_at) == 63).any(1)
    assert abs(eager.mean() - 25.939) < 3 * error
    assert float(expected_nfe(process, 64, 32, method=method)) == pytest.approx(25.335, abs=1e-3)
    busy = [len(set(row)) for row in np.asarray(out.unmasked_at)]
    assert busy == nfe.tolist()
    # A batch costs as many calls as its busiest sequence, not as many as there are steps.
    assert int(out.calls) == nfe.max()


def test_skipping_calls_changes_no_token(key):
    process = absorbing(6)
    cached, plain = long(key, process), long(key, process, cache=False)
    assert (cached.x == plain.x).all()
    assert (cached.unmasked_at == plain.unmasked_at).all()
    assert (plain.nfe == 64).all() and int(plain.calls) == 64
    assert (cached.x < 6).all() and len(np.unique(cached.x)) == 6


def uniform(x):
    return jnp.zeros((*x.shape, V))


def test_a_sequence_does_not_change_with_its_batch(key):
    @jax.jit
    def runs(key):
        own = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(5))
        one = lambda k: radd_sample(k, exact, EXACT, (L,), 9, event_ndim=1)  # noqa: E731
        return (
            radd_sample(key, exact, EXACT, (5, L), 9),
            radd_sample(key, exact, EXACT, (2, L), 9, first_index=3),
            jax.vmap(one)(own),
        )

    whole, part, many = runs(key)
    assert (whole.x[3:] == part.x).all()
    assert (many.x == whole.x).all() and (many.nfe == whole.nfe).all()


def test_prompts_stay_and_the_rest_is_drawn_given_them(key):
    prompt = jnp.array([2, V, V, 0])
    run = jax.jit(lambda k: radd_sample(k, exact, EXACT, (50_000, L), 64, prompt=prompt))
    out = run(key)
    assert (out.x[:, 0] == 2).all() and (out.x[:, 3] == 0).all()
    assert (out.unmasked_at[:, [0, 3]] == -1).all()
    law = JOINT[2, :, :, 0] / JOINT[2, :, :, 0].sum()
    found = np.bincount(np.asarray(out.x[:, 1] * V + out.x[:, 2]), minlength=9) / 50_000
    # Two tokens in one step of 64 are drawn apart: 1/64 of the law at most, and 9 cells' errors.
    assert 0.5 * np.abs(found - law.reshape(-1)).sum() < 1 / 64 + 0.01
    expected = float(expected_nfe(EXACT, 64, 2))
    assert abs(float(out.nfe.mean()) - expected) < 3 * float(out.nfe.std()) / 50_000**0.5


def test_a_prompt_mask_chooses_what_counts(key):
    prompt, chosen = jnp.array([2, 2, 2, 2]), jnp.array([True, False, False, True])
    each = jnp.broadcast_to(prompt, (200, L))
    marks = jnp.broadcast_to(chosen, each.shape)
    run = functools.partial(radd_sample, key, uniform, EXACT, (200, L), 8)
    out, same = jax.jit(
        lambda: (
            run(prompt=prompt, prompt_mask=chosen),
            run(prompt=each, prompt_mask=marks),
        )
    )()
    assert (out.x[:, [0, 3]] == 2).all()
    assert len(np.unique(out.x[:, 1])) == V
    assert (same.x == out.x).all()


def test_nothing_masked_is_returned_as_it_is(key):
    prompt = jnp.array([[0, 1, 2, 0], [2, 2, 2, 1]])
    for cache in (True, False):
        out = radd_sample(key, exact, EXACT, (2, L), 16, prompt=prompt, cache=cache)
        assert (out.x == prompt).all()
        assert out.nfe.tolist() == [0, 0] and int(out.calls) == 0
    half = prompt.at[1, 0].set(V)
    out = radd_sample(key, uniform, EXACT, (2, L), 16, prompt=half)
    assert out.nfe.tolist() == [0, 1] and (out.x[0] == prompt[0]).all()


def test_filters_leave_what_is_likely(key):
    logits = jnp.log(jnp.array([0.15, 0.25, 0.6]))
    field = lambda x: jnp.broadcast_to(logits, (*x.shape, V))  # noqa: E731
    run = functools.partial(radd_sample, field=field, process=EXACT, shape=(500, L), steps=4)
    options = ({"top_k": 1}, {"top_p": 0.8}, {"top_k": 2}, {})
    first, mass, second, plain = jax.jit(lambda k: [run(k, **o) for o in options])(key)
    assert np.unique(first.x).tolist() == [2]
    assert np.unique(mass.x).tolist() == [1, 2]
    share = float((second.x == 2).mean())
    assert abs(share - 0.6 / 0.85) < 4.5 * (0.21 / second.x.size) ** 0.5
    # Which tokens unmask does not depend on the filters.
    assert (second.unmasked_at == plain.unmasked_at).all()


def test_ordered_sampling_has_the_joint_law_in_any_order(key):
    n = 40_000
    run = jax.jit(lambda k, order: ordered_sample(k, exact, EXACT, (n, L), order))
    floor = 0.5 * np.sqrt(2 / np.pi) * np.sqrt(JOINT * (1 - JOINT) / n).sum()
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        out = run(key, jnp.array(order))
        assert distance(out.x) < 1.3 * floor
        assert (out.nfe == L).all() and int(out.calls) == L
        assert out.unmasked_at[0, jnp.array(order)].tolist() == [0, 1, 2, 3]


def test_ordered_sampling_with_an_order_for_each_and_a_prompt(key):
    orders = jnp.array([[3, 2, 1, 0], [0, 1, 2, 3]])
    out = ordered_sample(key, exact, EXACT, (2, L), orders, prompt=jnp.array([V, 1, V, V]))
    assert out.nfe.tolist() == [3, 3]
    assert out.unmasked_at.tolist() == [[3, -1, 1, 0], [0, -1, 2, 3]]
    assert (out.x[:, 1] == 1).all()
    alone = ordered_sample(
        jax.random.fold_in(key, 1), exact, EXACT, (L,), orders[1], event_ndim=1,
        prompt=jnp.array([V, 1, V, V]),
    )  # fmt: skip
    assert (alone.x == out.x[1]).all()
    broken = jax.jit(lambda o: ordered_sample(key, exact, EXACT, (2, L), o).x)
    assert (broken(jnp.array([0, 0, 1, 2])) == V).all()


def test_a_network_that_takes_the_level(key):
    """Skipping quiet steps is as exact for it: it is told the level of each sequence's step."""

    def field(x, lam):
        return jnp.stack([20 * lam[:, None] - 10 + 0.0 * x, 0.0 * x], -1)

    process = absorbing(2, eps=0.0)
    run = functools.partial(
        radd_sample, field=field, process=process, shape=(300, 8), steps=16, takes_level=True
    )
    out, plain = jax.jit(lambda k: [run(k, cache=cache) for cache in (True, False)])(key)
    assert (out.x == plain.x).all() and int(out.calls) <= 8
    early = np.asarray(out.unmasked_at) < 4
    # At level 1 - i/16 a token is 0 with probability sigmoid(10 - 20 i/16).
    p = 1 / (1 + np.exp(-(10 - 20 * np.asarray(out.unmasked_at) / 16)))
    zero = np.asarray(out.x) == 0
    for group in (early, ~early):
        error = np.sqrt((p * (1 - p))[group].sum()) / group.sum()
        assert abs(zero[group].mean() - p[group].mean()) < 4 * error
    shares = []
    ordered_sample(
        key,
        lambda x, lam: (shares.append(lam.shape), jnp.zeros((*x.shape, 2)))[1],
        process,
        (3, 8),
        jnp.arange(8),
        takes_level=True,
    )
    assert shares[0] == (3,)


def test_logits_that_are_no_number_leave_the_mask(key):
    bad = lambda x: jnp.zeros((*x.shape, V)).at[:, 1].set(jnp.nan)  # noqa: E731
    run = lambda prompt: radd_sample(key, bad, EXACT, (3, L), 8, prompt=prompt)  # noqa: E731
    error, out = checkify.checkify(jax.jit(run))(jnp.full(L, V))
    assert (out.x[:, 1] == V).all() and (out.x[:, [0, 2, 3]] < V).all()
    with pytest.raises(checkify.JaxRuntimeError, match="no number"):
        error.throw()
    assert (jax.jit(run)(jnp.array([9, V, V, V])).x == V + 1).all()


def test_a_time_that_is_no_number_leaves_masks(key):
    run = jax.jit(lambda t_end: radd_sample(key, uniform, EXACT, (2, L), 3, t_end=t_end).x)
    assert (run(jnp.nan) == V).all() and (run(0.1) < V).all()


def test_inside_shard_map(key):
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    def part(key):
        first = 2 * jax.lax.axis_index("data")
        x = radd_sample(key, uniform, EXACT, (2, L), 3, first_index=first).x
        options = {"prompt": x.at[:, 1:].set(V), "first_index": first}
        y = ordered_sample(key, uniform, EXACT, (2, L), jnp.arange(L), **options).x
        return x, y, aoarm_nll(uniform, EXACT, y, jnp.arange(L))

    specs = {"in_specs": jax.P(), "out_specs": jax.P("data")}
    x, y, nll = jax.jit(jax.shard_map(part, mesh=mesh, **specs))(key)
    whole = radd_sample(key, uniform, EXACT, (4, L), 3).x
    assert (x == whole).all() and (y[:, 0] == x[:, 0]).all() and (y < V).all()
    np.testing.assert_allclose(nll, L * np.log(V), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"steps": 0}, ValueError, "steps is 0"),
        ({"t_end": 2.0}, ValueError, "t_end is 2"),
        ({"method": "heun"}, ValueError, "method is 'heun'"),
        ({"shape": (2, 3, 4)}, ValueError, "shape is"),
        ({"top_p": 1.5}, ValueError, "top_p is 1.5"),
        ({"top_k": 0}, ValueError, "top_k is 0"),
        ({"prompt": jnp.zeros(5, int)}, ValueError, "prompt has shape"),
        ({"prompt": jnp.zeros(L)}, TypeError, "prompt has dtype"),
        ({"prompt": jnp.full(L, 4)}, ValueError, "prompt holds the token 4"),
        ({"prompt_mask": jnp.ones(L, bool)}, ValueError, "without a prompt"),
        (
            {"prompt": jnp.zeros(L, int), "prompt_mask": jnp.ones(3, bool)},
            ValueError,
            "prompt_mask has shape",
        ),
        (
            {"prompt": jnp.zeros(L, int), "prompt_mask": jnp.ones(L)},
            TypeError,
            "prompt_mask has dtype",
        ),
    ],
)
def test_arguments_that_do_not_fit(key, options, error, match):
    options = {"shape": (2, L), "steps": 4} | options
    shape, steps = options.pop("shape"), options.pop("steps")
    with pytest.raises(error, match=match):
        radd_sample(key, uniform, EXACT, shape, steps, **options)


def test_orders_that_do_not_fit(key):
    for order, error in (
        ([0, 0, 1, 2], ValueError),
        ([0, 1, 2], ValueError),
        ([0.0] * L, TypeError),
    ):
        with pytest.raises(error, match="order"):
            ordered_sample(key, uniform, EXACT, (2, L), jnp.array(order))
