"""The transformers of masked tokens: shape, start, what they see and what they do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.nets.radd import RADDTransformer, TimedTransformer, rotate

V = 7
SIZES = {"vocabulary": V, "width": 16, "depth": 2, "heads": 2}
X = jax.random.randint(jax.random.key(1), (3, 10), 0, V + 1)
LAM = jnp.array([0.1, 0.5, 0.9])


def perturbed(variables):
    """Parameters in which nothing is zero."""
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return tree.unflatten(
        [x + 0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


@pytest.fixture(scope="module", params=[RADDTransformer, TimedTransformer])
def made(request):
    net = request.param(**SIZES)
    given = () if request.param is RADDTransformer else (LAM,)
    variables = jax.jit(net.init)(jax.random.key(0), X, *given)
    return net, given, variables, jax.jit(net.apply)


def test_logits_are_of_real_tokens_and_start_at_zero(made):
    _, given, variables, apply = made
    out = apply(variables, X, *given)
    assert out.shape == (3, 10, V) and out.dtype == jnp.float32
    assert (out == 0).all()


def test_parameters_are_as_many_as_the_architecture_says(made):
    net, given, variables, _ = made
    width, depth = 16, 2
    block = 3 * width**2 + width**2 + 8 * width**2 + 5 * width + 4 * width
    total = (V + 1) * width + depth * block + 2 * width + width * V + V
    if given:
        condition = net.condition
        total += depth * 6 * width * (condition + 1)
        total += condition * (condition // 2 + 1) + condition * (condition + 1)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == total


def test_every_position_sees_every_other_in_both_directions(made):
    _, given, variables, apply = made
    variables = perturbed(variables)
    before = apply(variables, X, *given)
    for place in (0, 9):
        after = apply(variables, X.at[:, place].set((X[:, place] + 1) % (V + 1)), *given)
        moved = np.abs(np.asarray(after - before)).max(axis=(0, 2))
        assert (moved > 1e-4).all(), moved


def test_positions_are_told_apart_by_distance_alone(made):
    _, given, variables, apply = made
    variables = perturbed(variables)
    level = [g[:1] for g in given]
    one = jnp.full((1, 10), V).at[0, 3].set(2)
    out = apply(variables, one, *level)[0]
    # The masks to both sides of the one token differ by their distance to it.
    assert float(jnp.abs(out[2] - out[4]).max()) > 1e-4
    # Attention depends on differences of positions: a rotation of all by as much changes nothing.
    q, k = jax.random.normal(jax.random.key(3), (2, 1, 6, 1, 8))
    scores = jnp.einsum("nqhd,nkhd->nqk", rotate(q), rotate(k))
    padded = [jnp.pad(x, ((0, 0), (4, 0), (0, 0), (0, 0))) for x in (q, k)]
    shifted = jnp.einsum("nqhd,nkhd->nqk", *(rotate(x)[:, 4:] for x in padded))
    np.testing.assert_allclose(scores, shifted, atol=1e-5)
    assert float(jnp.abs(scores - jnp.einsum("nqhd,nkhd->nqk", q, k)).max()) > 0.1


def test_rows_do_not_meet_and_ids_out_of_range_are_nan(made):
    _, given, variables, apply = made
    variables = perturbed(variables)
    before = apply(variables, X, *given)
    for bad in (V + 1, -1):
        after = apply(variables, X.at[0, 4].set(bad), *given)
        assert np.isnan(after[0]).all()
        np.testing.assert_allclose(after[1:], before[1:], rtol=1e-5, atol=1e-5)


def test_time_matters_only_where_it_is_given():
    net = TimedTransformer(**SIZES)
    variables = perturbed(jax.jit(net.init)(jax.random.key(0), X, LAM))
    a, b = (jax.jit(net.apply)(variables, X, lam) for lam in (LAM, LAM + 0.05))
    assert float(jnp.abs(a - b).max()) > 1e-3
    assert "lam" not in RADDTransformer.__call__.__annotations__


def test_dropout_and_bfloat16():
    net = RADDTransformer(**SIZES, dropout=0.5, dtype=jnp.bfloat16)
    variables = perturbed(jax.jit(net.init)(jax.random.key(0), X))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    plain = jax.jit(net.apply)(variables, X)
    full = jax.jit(RADDTransformer(**SIZES).apply)(variables, X)
    assert plain.dtype == jnp.float32
    # bfloat16 has three digits, in values of the order of ten through two blocks.
    assert float(jnp.abs(plain - full).mean()) < 0.03 * float(jnp.abs(full).mean()) + 0.05
    draw = jax.jit(lambda key: net.apply(variables, X, True, rngs={"dropout": key}))
    drawn = [draw(jax.random.key(i)) for i in (0, 1)]
    assert float(jnp.abs(drawn[0] - drawn[1]).mean()) > 0.1


@pytest.mark.parametrize(
    ("sizes", "x", "error", "match"),
    [
        ({}, X[0], ValueError, r"x: expected shape \(n, length\)"),
        ({}, X.astype(float), TypeError, "x: expected integer"),
        ({"heads": 3}, X, ValueError, "width: expected a multiple"),
        ({"vocabulary": 1}, X, ValueError, "vocabulary"),
    ],
)
def test_arguments_that_do_not_fit(sizes, x, error, match):
    net = RADDTransformer(**(SIZES | sizes))
    with pytest.raises(error, match=match):
        jax.eval_shape(net.init, jax.random.key(0), x)


def test_levels_that_do_not_fit():
    net = TimedTransformer(**SIZES)
    for lam, error in ((LAM[0], ValueError), (jnp.array([0, 1, 1]), TypeError)):
        with pytest.raises(error, match="lam: expected"):
            jax.eval_shape(net.init, jax.random.key(0), X, lam)
