"""In defense of parameter sharing for model-compression (Desai and Shrivastava, ICLR 2024).

The claims: at full budget sharing is the dense model; the gradient scaler makes training stable and
blind to the pool's scale; under a hard budget sharing leads pruning, and lottery-ticket rewinding
only where compression is high. Here that is a perceptron of 84,480 weights on scikit-learn's
digits. Every method trains for 1,500 steps, rewinding in addition for 600 in each round, which
halves the survivors; biases stay whole and uncounted.

Test accuracy in per cent, mean and deviation over ten seeds:

    compression   sharing      SynFlow       SNIP          rewinding
    100           96.0 (0.5)   95.7 (1.2)    90.4 (7.1)    97.2 (0.4)
    300           93.5 (0.7)   87.5 (3.4)    39.8 (11.5)   96.2 (0.8)
    1000          89.3 (1.6)   47.1 (16.4)   chance        81.9 (6.0)
    2000          87.7 (1.2)   28.3 (10.2)   chance        51.7 (7.3)

Seen from these figures the assertions hold by this many standard errors. On ten seeds: at 100x 1.6
over SNIP (two bad seeds of ten make its error) and 3.0 over SynFlow; at 300x 3.6 over SynFlow; at
1000x 2.8 over rewinding. On three seeds: rewinding's lead 3.4 at 100x and 4.5 at 300x; at 1000x 2.9
over SynFlow; at 2000x 4.9 over rewinding.

What does not hold: HashedNets and ROAST with the scaler do as well as the paper's mapping at these
ratios, which matters near full budget. Rewinding that prunes a fifth a round, in 30 rounds, draws
level at 1000x (88.3 with a deviation of 1.2) and stays behind at 2000x (65.3, 7.4). Without the
scaler a lucky ``pool_std`` of 1 reaches 95.6 at 300x and 92.7 at 1000x: the scaler buys safety.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from jaxgen import nets, prune, share

SIZES = (64, 256, 256, 10)
WEIGHTS = sum(a * b for a, b in itertools.pairwise(SIZES))  # biases stay whole and do not count
STEPS, BATCH = 1500, 128


@functools.cache
def digits():
    """Images and labels to train on (1,257) and to test on (540)."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = np.float32(x[order] / 16), np.int32(y[order])
    cut = int(0.7 * len(x))
    return (x[:cut], y[:cut]), (x[cut:], y[cut:])


def init(key, sizes=SIZES):
    he = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, len(sizes) - 1)
    pairs = itertools.pairwise(sizes)
    return [
        {"kernel": he(k, shape), "bias": jnp.zeros(shape[1])}
        for k, shape in zip(keys, pairs, strict=True)
    ]


def apply(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
    return x @ params[-1]["kernel"] + params[-1]["bias"][None]


def loss(params, x, y, temperature=1.0):
    logits = apply(params, x) / temperature
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@jax.jit
def accuracy(params):
    x, y = digits()[1]
    return 100 * jnp.mean(jnp.argmax(apply(params, x), -1) == y)


def train(key, trained, steps, weights, *before, after=()):
    """Momentum SGD with a cosine; ``weights(trained)`` are the network's parameters."""
    descent = optax.sgd(lambda i: 0.05 * (1 + jnp.cos(jnp.pi * i / steps)), momentum=0.9)
    rule = optax.chain(*before, descent, *after)
    x, y = map(jnp.asarray, digits()[0])

    def step(i, carry):
        trained, state = carry
        rows = jax.random.randint(jax.random.fold_in(key, i), (BATCH,), 0, len(x))
        batch = [a.at[rows].get(mode="promise_in_bounds") for a in (x, y)]
        grads = jax.grad(lambda t: loss(weights(t), *batch))(trained)
        updates, state = rule.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state

    return jax.lax.fori_loop(0, steps, step, (trained, rule.init(trained)))[0]


@jax.jit
def train_masked(key, params, mask, steps=STEPS):
    """One compiled function for every pruned network, and for the dense one."""
    params = prune.apply_mask(params, mask)
    return train(key, params, steps, lambda p: p, after=[prune.masked(mask)])


@functools.partial(jax.jit, static_argnames=("layout", "mode"))
def train_shared(key, shared, layout, steps=STEPS, mode="v5"):
    """The weights that training in the pool leads to."""
    scaler = [share.scale_by_pool(layout, mode)] if mode else []
    expand = functools.partial(share.expand, layout=layout)
    return expand(train(key, shared, steps, expand, *scaler))


def few():
    return (a[:512] for a in digits()[0])


ONE_SHOT = {
    "random": prune.random,
    "magnitude": lambda key, p, m: prune.magnitude(p, m),
    "SNIP": lambda key, p, m: prune.snip(lambda q: loss(q, *few()), p, m),
    "GraSP": lambda key, p, m: prune.grasp(lambda q: loss(q, *few(), 200.0), p, m),
    "SynFlow": lambda key, p, m: prune.synflow(lambda q: apply(q, jnp.ones((1, 64))), p, m),
}


@functools.partial(jax.jit, static_argnames=("name", "m"))
def one_shot(key, params, name, m):
    return ONE_SHOT[name](key, params, m)


def whole(params):
    return jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)


ROUNDS = {}


def rewinding_round(key, params, mask):
    # Budgets differ in the last cut alone, so that a round is trained once for all of them.
    seen = jax.random.key_data(key), *jax.tree.leaves(mask)
    seen = b"".join(np.asarray(a).tobytes() for a in seen)
    if seen not in ROUNDS:
        ROUNDS[seen] = train_masked(key, params, mask, 600)
    return ROUNDS[seen]


@functools.cache
def start(seed, sizes=SIZES):
    """The key that trains, and the parameters before."""
    key_init, key_train = jax.random.split(jax.random.key(seed))
    return key_train, init(key_init, sizes)


def pool(seed, m, **kwargs):
    key, params = start(seed)
    layout = share.plan(params, m, seed=seed, **kwargs)
    return layout, share.init(jax.random.fold_in(key, STEPS), layout, rest=params)


@functools.cache
def mask_of(method, m, seed):
    key, params = start(seed)
    return one_shot(jax.random.fold_in(key, STEPS), params, method, m)


@functools.cache
def score(method, compression, seed, steps=STEPS):
    """Test accuracy in per cent."""
    key, params = start(seed)
    m = round(WEIGHTS / compression)
    if method == "smaller":
        width = nets.width_for_budget(lambda w: init(key, (64, w, w, 10)), m)
        _, params = start(seed, (64, width, width, 10))
        weights = train_masked(key, params, whole(params), steps)
    elif method == "rewinding":
        mask, params = prune.rewind(key, rewinding_round, params, m, rate=0.5, progress=False)
        weights = train_masked(key, params, mask, steps)
    elif method in ONE_SHOT:
        weights = train_masked(key, params, mask_of(method, m, seed), steps)
    else:
        layout, shared = pool(seed, m, scheme=method)
        weights = train_shared(key, shared, layout, steps)
    return float(accuracy(weights))


# --- in the ordinary suite: one seed -------------------------------------------------------------


def apart(a, b):
    """The largest distance between two networks' parameters."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(x - y).max()) for x, y in pairs)


def test_at_full_budget_it_is_the_dense_model_step_by_step():
    key, params = start(0)
    layout = share.plan(params, 1.0, seed=0)
    shared = share.compress(params, layout)
    gap = apart(share.expand(shared, layout), params)
    assert gap < 1e-7
    for steps in (1, 2, 10, 100):
        dense = train_masked(key, params, whole(params), steps)
        # Rounding in float32: 6e-8 after one step and 5e-7 after 100, which move weights by 0.4.
        gap = apart(train_shared(key, shared, layout, steps), dense)
        assert gap < 5e-6
    moved = apart(dense, params)
    assert moved > 0.2


def test_the_scaler_makes_training_stable_and_blind_to_the_scale_of_the_pool():
    m = round(WEIGHTS / 300)
    key, _ = start(0)
    ends = {}
    for pool_std in (0.004, 0.04, 0.4):
        layout, shared = pool(0, m, pool_std=pool_std)
        ends[pool_std] = train_shared(key, shared, layout, 100)
    moved = apart(ends[0.4], share.expand(shared, layout))
    gaps = [apart(ends[0.04], ends[pool_std]) for pool_std in (0.004, 0.4)]
    # Rounding in float32: 1.4e-5.
    assert moved > 0.4 and max(gaps) < 2e-4
    layout, shared = pool(0, m)
    diverged = accuracy(train_shared(key, shared, layout, 100, mode=None))
    assert accuracy(ends[0.04]) > 50 and diverged < 15


def is_connected(mask):
    """Whether a path leads from an input to an output."""
    reached = np.ones(64, bool)
    for layer in mask:
        reached = reached @ np.asarray(layer["kernel"])
    return reached.any()


def test_at_300x_sharing_leads_the_two_best_one_shot_rivals():
    """In a third of the steps; all five in all of them are in the table below."""
    steps = STEPS // 3
    shared = score("stable", 300, 0, steps)
    for method in ("SNIP", "SynFlow"):
        if is_connected(mask_of(method, round(WEIGHTS / 300), 0)):
            rival = score(method, 300, 0, steps)
        else:  # it answers the same for every image, however it is trained
            y = digits()[1][1]
            rival = 100 * np.bincount(y).max() / len(y)
        print(f"{method} {rival:.1f}, sharing {shared:.1f}")
        assert shared >= rival + 2, (method, shared, rival)


# --- the whole table: a quarter of an hour, three seeds ------------------------------------------


def row(compression):
    """Mean accuracy of each method; prints it with its deviation over seeds."""
    methods = ["stable", "hashednet", "roast", "rewinding", *ONE_SHOT]
    if WEIGHTS / compression >= 75:  # the network of width 1
        methods.append("smaller")
    means = {}
    for method in methods:
        scores = [score(method, compression, seed) for seed in range(3)]
        means[method] = np.mean(scores)
        print(f"{compression}x {method} {means[method]:.1f} +- {np.std(scores, ddof=1):.1f}")
    return means


def lead(method, compression):
    """Of sharing over a rival whose seeds differ much: ten of them."""
    leads = [score("stable", compression, s) - score(method, compression, s) for s in range(10)]
    print(f"{compression}x over {method} {np.mean(leads):.1f} +- {np.std(leads, ddof=1):.1f}")
    return np.mean(leads)


@pytest.mark.slow
def test_100x_sharing_leads_all_but_synflow_and_rewinding():
    means = row(100)
    assert means["stable"] >= max(means[m] for m in ("GraSP", "magnitude", "random")) + 2
    assert lead("SNIP", 100) >= 2
    assert lead("SynFlow", 100) >= -1
    assert means["rewinding"] > means["stable"]


@pytest.mark.slow
def test_300x_sharing_leads_one_shot_pruning_and_rewinding_leads_sharing():
    means = row(300)
    assert means["stable"] >= max(means[method] for method in ONE_SHOT) + 2
    assert lead("SynFlow", 300) >= 2
    assert means["rewinding"] > means["stable"]


@pytest.mark.slow
def test_1000x_sharing_leads_rewinding():
    means = row(1000)
    assert lead("rewinding", 1000) >= 2
    assert means["stable"] >= max(means[method] for method in ONE_SHOT) + 15


@pytest.mark.slow
def test_2000x_sharing_leads_by_far():
    means = row(2000)
    assert means["stable"] >= means["rewinding"] + 15
    assert means["stable"] >= max(means[method] for method in ONE_SHOT) + 15
