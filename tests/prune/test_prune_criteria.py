"""Pruning criteria against closed-form scores, and masks that stay where they are put."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify

from jaxgen import prune

SHAPES = {"first": (6, 8), "second": (8, 4)}


@pytest.fixture(scope="module")
def params():
    draw = np.random.default_rng(0).normal
    tree = {n: {"kernel": jnp.float32(draw(size=s))} for n, s in SHAPES.items()}
    tree["first"]["bias"] = jnp.float32(draw(size=8))
    tree["count"] = jnp.int32(3)
    return tree


def kernels(tree):
    return np.concatenate([np.asarray(tree[n]["kernel"]).ravel() for n in SHAPES])


def expected(scores, k):
    found = np.zeros(len(scores), bool)
    found[np.argsort(-scores, kind="stable")[:k]] = True
    return found


@functools.cache
def quadratic():
    """``1/2 sum h (w - t)^2``: gradient and Hessian in closed form."""
    rng = np.random.default_rng(1)
    h = {n: rng.uniform(0.1, 2, s).astype(np.float32) for n, s in SHAPES.items()}
    t = {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}

    def loss(tree):
        return sum(0.5 * jnp.sum(h[n] * (tree[n]["kernel"] - t[n]) ** 2) for n in SHAPES)

    return loss, *(np.concatenate([d[n].ravel() for n in SHAPES]) for d in (h, t))


def test_magnitude(params):
    mask = prune.magnitude(params, 0.25)
    np.testing.assert_array_equal(kernels(mask), expected(np.abs(kernels(params)), 20))
    assert mask["first"]["bias"].all() and mask["count"]
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    again = jax.jit(lambda p: prune.magnitude(p, 20))(params)
    np.testing.assert_array_equal(kernels(again), kernels(mask))


def test_snip_scores_the_change_of_the_loss(params):
    loss, h, t = quadratic()
    w = kernels(params)
    mask = prune.snip(loss, params, 30)
    np.testing.assert_array_equal(kernels(mask), expected(np.abs(w * h * (w - t)), 30))


def test_grasp_keeps_what_removing_would_cost_most_flow(params):
    loss, h, t = quadratic()
    w = kernels(params)
    mask = prune.grasp(loss, params, 30)
    np.testing.assert_array_equal(kernels(mask), expected(w * h**2 * (w - t), 30))
    # To first order a removal changes |g|^2 by -2 w (Hg): check the sign by really removing.
    g = h * (w - t)
    scores = w * h * g
    for i in (int(np.argmax(scores)), int(np.argmin(scores))):
        without = g.copy()
        without[i] -= 1e-3 * h[i] * w[i]
        assert np.sign((without**2).sum() - (g**2).sum()) == -np.sign(scores[i])


def synflow_by_hand(w1, w2, k, rounds):
    n = w1.size + w2.size
    m1, m2 = np.ones(w1.shape, bool), np.ones(w2.shape, bool)
    for t in range(1, rounds + 1):
        a, b = np.abs(w1) * m1, np.abs(w2) * m2
        s1 = np.where(m1, a * b.sum(1)[None], -np.inf)
        s2 = np.where(m2, b * a.sum(0)[:, None], -np.inf)
        count = max(k, round(n * (k / n) ** (t / rounds)))
        both = expected(np.concatenate([s1.ravel(), s2.ravel()]), count)
        m1, m2 = both[: w1.size].reshape(w1.shape), both[w1.size :].reshape(w2.shape)
    return np.concatenate([m1.ravel(), m2.ravel()])


def through(tree):
    return jnp.ones((1, 6)) @ tree["first"]["kernel"] @ tree["second"]["kernel"]


@pytest.mark.parametrize("k", [40, 8, 2])
def test_synflow_equals_its_closed_form_and_never_cuts_a_layer_off(params, k):
    mask = prune.synflow(through, params, k, rounds=20)
    w1, w2 = (np.float64(params[n]["kernel"]) for n in SHAPES)
    np.testing.assert_array_equal(kernels(mask), synflow_by_hand(w1, w2, k, 20))
    assert float(through(prune.apply_mask(jax.tree.map(jnp.abs, params), mask)).sum()) > 0
    if k == 2:
        # One weight of each layer, on one path; magnitude alone would not see to that.
        assert [int(mask[n]["kernel"].sum()) for n in SHAPES] == [1, 1]


def test_synflow_refuses_a_network_without_flow(params):
    for scale, flow in ((1e38, "inf"), (0.0, "0.0"), (-1.0, "-")):
        with pytest.raises(ValueError, match=f"is {flow}.* in round 1 of 2"):
            prune.synflow(lambda tree, c=scale: c * through(tree) * 10.0, params, 5, rounds=2)
    with pytest.raises(ValueError, match="rounds"):
        prune.synflow(through, params, 5, rounds=0)


def test_synflow_names_the_round_in_which_flow_ends(params):
    def cut(tree):
        left = sum(jnp.sum(tree[n]["kernel"] > 0) for n in SHAPES)
        return through(tree) * (left > 50)

    def prune_it(tree):
        return prune.synflow(cut, tree, 20, rounds=4)

    # The rounds start from 80, 57, 40 and 28 weights.
    told = "is 0.0 in round 3 of 4"
    with pytest.raises(ValueError, match=told):
        prune_it(params)
    assert told in checkify.checkify(jax.jit(prune_it))(params)[0].get()


def test_synflow_revives_no_weight_for_one_of_nan_score():
    # At a weight of zero the score is 0 times inf.
    w = np.tile(np.array([[1.0, 0.0, 2.0, 3.0]], np.float32), (20, 1))
    mask = prune.synflow(lambda tree: jnp.sqrt(tree["w"]), {"w": w}, 66, rounds=2)
    np.testing.assert_array_equal(mask["w"][:, [0, 2, 3]], True)
    np.testing.assert_array_equal(mask["w"][:, 1], np.arange(20) < 6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_random_is_uniform_and_exact(params, dtype):
    params = {n: {"kernel": params[n]["kernel"].astype(dtype)} for n in SHAPES}
    draw = jax.jit(jax.vmap(lambda key: prune.random(key, params, 20)))
    masks = draw(jax.random.split(jax.random.key(0), 2000))
    kept = np.concatenate([np.asarray(masks[n]["kernel"]).reshape(2000, -1) for n in SHAPES], 1)
    assert (kept.sum(1) == 20).all()
    # Each is kept with chance 1/4; the largest of 80 deviations stays within 4.5 standard errors.
    assert np.abs(kept.mean(0) - 0.25).max() < 4.5 * np.sqrt(0.25 * 0.75 / 2000)
    with pytest.raises(TypeError, match="key"):
        prune.random(jnp.zeros(2, jnp.uint32), params, 20)


def test_a_mask_holds_under_momentum_and_decay(params):
    mask = prune.magnitude(params, 0.1)
    floats = {k: v for k, v in params.items() if k != "count"}
    held = {k: v for k, v in mask.items() if k != "count"}
    rule = optax.chain(optax.adamw(1e-2, weight_decay=0.1), prune.masked(held))
    now = prune.apply_mask(floats, held)
    state = rule.init(now)
    for i in range(3):
        grads = jax.tree.map(lambda p, i=i: jnp.cos(p + i), now)
        updates, state = rule.update(grads, state, now)
        now = optax.apply_updates(now, updates)
    left_out = ~kernels(mask)
    assert (kernels(now)[left_out] == 0).all()
    assert (kernels(now)[~left_out] != kernels(params)[~left_out]).all()


def test_selection_and_bad_input(params):
    only = prune.magnitude(params, 4, select=lambda path, leaf: path == "second/kernel")
    assert only["first"]["kernel"].all() and int(only["second"]["kernel"].sum()) == 4
    assert int(prune.top_k(params, 1)["first"]["kernel"].sum()) <= 1
    with pytest.raises(ValueError, match="no leaf is selected"):
        prune.magnitude({"bias": jnp.ones(3)}, 1)
    with pytest.raises(ValueError, match=r"keep comes to 81 of 80"):
        prune.magnitude(params, 81)
    with pytest.raises(ValueError, match="first/kernel has shape"):
        prune.apply_mask({"first": {"kernel": jnp.ones((2, 2))}}, {"first": {"kernel": True}})
    bf16 = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params["first"])
    assert prune.apply_mask(bf16, prune.magnitude(bf16, 5))["kernel"].dtype == jnp.bfloat16


def test_rewinding_finds_a_sparse_truth():
    rng = np.random.default_rng(3)
    truth = np.zeros((20, 1), np.float32)
    truth[[2, 7, 11]] = [[1.0], [-2.0], [0.5]]
    x = rng.normal(size=(200, 20)).astype(np.float32)
    seen = []

    def train(key, params, mask):
        seen.append(jax.tree.map(np.asarray, (jax.random.key_data(key), params, mask)))
        own = np.asarray(mask["w"])[:, 0]
        solved = np.zeros((20, 1), np.float32)
        solved[own] = np.linalg.lstsq(x[:, own], x @ truth, rcond=None)[0]
        return {"w": jnp.asarray(solved)}

    start = {"w": jnp.full((20, 1), 0.1)}
    early = {"w": jnp.full((20, 1), 0.2)}
    mask, params = prune.rewind(
        jax.random.key(0), train, start, 3, rate=0.5, rewind_params=early, progress=False
    )
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(mask["w"])), [2, 7, 11])
    np.testing.assert_array_equal(params["w"], np.where(mask["w"], 0.2, 0).astype(np.float32))
    assert [int(m["w"].sum()) for _, _, m in seen] == [20, 10, 5]
    assert [float(p["w"].max()) for _, p, _ in seen] == pytest.approx([0.1, 0.2, 0.2])
    assert len({k.tobytes() for k, _, _ in seen}) == 3
    whole, same = prune.rewind(jax.random.key(0), train, start, 1.0, progress=False)
    assert whole["w"].all() and (same["w"] == start["w"]).all() and len(seen) == 3
    with pytest.raises(ValueError, match="rate"):
        prune.rewind(jax.random.key(0), train, start, 3, rate=1.0)
    with pytest.raises(ValueError, match="structure"):
        prune.rewind(jax.random.key(0), train, start, 3, rewind_params={"v": start["w"]})
    with pytest.raises(ValueError, match="train_fn returned has another structure"):
        prune.rewind(jax.random.key(0), lambda *_: {}, start, 3, progress=False)


def test_rewinding_with_diverged_weights():
    rank = jnp.arange(20.0, 0.0, -1.0)[:, None]
    start = {"w": jnp.full((20, 1), 0.1)}

    def train(key, params, mask):
        # The second round diverges; what was pruned before stays away.
        whole = mask["w"].all()
        return {"w": jnp.where(mask["w"], jnp.where(whole, rank, jnp.nan), 0)}

    def find(start):
        return prune.rewind(jax.random.key(0), train, start, 5, rate=0.5, progress=False)

    told = "round 2 of 2 trained 10 of the weights left to NaN or infinity"
    with pytest.raises(ValueError, match=told):
        find(start)
    error, _ = checkify.checkify(jax.jit(find))(start)
    assert told in error.get()
    mask, params = jax.jit(find)(start)
    assert int(mask["w"].sum()) == 5 and not mask["w"][10:].any()
    assert np.isnan(params["w"]).all(where=np.asarray(mask["w"]))


def test_a_leaf_that_is_no_array_is_named():
    with pytest.raises(TypeError, match="act is function; expected an array: partition"):
        prune.magnitude({"act": lambda x: x, "w": jnp.ones((2, 2))}, 1)
