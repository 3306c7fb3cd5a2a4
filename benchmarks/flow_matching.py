"""Flow matching against torchcfm with the same network: training steps and samples.

The linear interpolant without gamma between two batches of points in the plane, torchcfm's network
(three SELU layers on x and t) with the same weights, Adam, the batch paired at random or by the
exact minibatch coupling; samples by 100 Euler steps. torchcfm runs in an environment of its own, in
alternation. Beside it the loop that one would write by hand in JAX.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import peer as peers
from benchmarks.measure import PAIRS, Missing, Result, compare, first_call, summarise
from jaxgen import train
from jaxgen.process.coupling import minibatch_coupling
from jaxgen.process.interpolant import interpolant
from jaxgen.score.interpolant import interpolant_loss
from jaxgen.solve.interpolant import interpolant_sample

VARIABLE = "JAXGEN_TORCHCFM"
GOAL, BARE_GOAL = 1.0, 0.97
STEPS, SAMPLE_STEPS = 20, 100


class Network(nn.Module):
    """torchcfm's multilayer perceptron."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """Velocity at ``x`` of shape ``(batch, 2)`` and ``t`` of shape ``(batch,)``."""
        h = jnp.concatenate([x, t[:, None]], axis=1)
        for _ in range(3):
            h = nn.selu(nn.Dense(self.width)(h))
        return nn.Dense(x.shape[1])(h)


def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def _ours(network: Network, params: Any, x0: jax.Array, x1: jax.Array, coupling: str) -> Callable:
    """Runs ``STEPS`` training steps and returns the last loss."""
    interp = interpolant("linear", gamma="zero")

    def loss_fn(key: jax.Array, params: Any, batch: Any) -> jax.Array:
        x0, x1 = batch
        if coupling == "exact":
            x0, x1, _ = minibatch_coupling(None, x0, x1)
        return interpolant_loss(
            key, lambda x, t: network.apply(params, x, t), interp, x0, x1, form="regression"
        )

    optimizer = optax.adam(1e-3)
    step = train.make_train_step(loss_fn, optimizer, ema=0.0, clip=None)
    held = {"state": train.TrainState.create(jax.random.key(0), _copy(params), optimizer)}

    def run() -> Any:
        for _ in range(STEPS):
            held["state"], metrics = step(held["state"], (x0, x1))
        return metrics

    return run


def _by_hand(network: Network, params: Any, x0: jax.Array, x1: jax.Array) -> Callable:
    """The same steps as one would write them."""
    optimizer = optax.adam(1e-3)

    def loss(params: Any, key: jax.Array) -> jax.Array:
        t = jax.random.uniform(key, x0.shape[:1])
        x_t = (1 - t[:, None]) * x0 + t[:, None] * x1
        return jnp.mean((network.apply(params, x_t, t) - (x1 - x0)) ** 2)

    def step(state: Any) -> Any:
        params, opt_state, key = state
        key, own = jax.random.split(key)
        value, slope = jax.value_and_grad(loss)(params, own)
        updates, opt_state = optimizer.update(slope, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, key), value

    jitted = jax.jit(step, donate_argnums=0)
    held = {"state": (_copy(params), optimizer.init(params), jax.random.key(0))}

    def run() -> Any:
        for _ in range(STEPS):
            held["state"], value = jitted(held["state"])
        return value

    return run


def _samplers(network: Network, params: Any, x0: jax.Array) -> tuple[Callable, Callable]:
    """Ours, and a scan written by hand."""
    interp = interpolant("linear", gamma="zero")

    @jax.jit
    def ours(params: Any, x: jax.Array) -> jax.Array:
        return interpolant_sample(
            None,
            lambda x, t: network.apply(params, x, t),
            None,
            interp,
            x,
            steps=SAMPLE_STEPS,
            solver=diffrax.Euler(),
        ).x

    @jax.jit
    def by_hand(params: Any, x: jax.Array) -> jax.Array:
        def step(x: jax.Array, n: jax.Array) -> Any:
            t = jnp.full(x.shape[:1], n / SAMPLE_STEPS)
            return x + network.apply(params, x, t) / SAMPLE_STEPS, None

        return jax.lax.scan(step, x, jnp.arange(SAMPLE_STEPS))[0]

    return lambda: ours(params, x0), lambda: by_hand(params, x0)


def _points(key: jax.Array, n: int) -> jax.Array:
    """Eight Gaussians on a circle."""
    key_angle, key_noise = jax.random.split(key)
    angle = jax.random.randint(key_angle, (n,), 0, 8) * (np.pi / 4)
    centres = 2 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    return centres + 0.2 * jax.random.normal(key_noise, (n, 2))


def _against(
    peer: peers.Peer, case: str, ours: Callable, goal: float | None, repeats: int, **command: Any
) -> Result:
    """Alternate with the worker, ``repeats`` steps a call on both sides."""
    ours(), peer.ask(**command)
    times = np.zeros((PAIRS, 2))
    for i in range(PAIRS):
        times[i, 0] = 1e3 * first_call(ours) / repeats
        times[i, 1] = 1e3 * peer.ask(**command)["seconds"] / repeats
    return summarise(
        "flow_matching", case, times[:, 0], times[:, 1], peer_name="torchcfm 1.0.7", goal=goal
    )


def _cases(quick: bool) -> Iterator[tuple[int, int]]:
    yield 64, 256
    if not quick:
        yield 512, 256
        yield 512, 2048


def run(*, quick: bool) -> Iterator[Result | Missing]:
    """Each width and batch: against the loop by hand, and against the peer where it is."""
    peer = peers.find(VARIABLE, "torchcfm_worker.py")
    for width, n in _cases(quick):
        key0, key1, key_init = jax.random.split(jax.random.key(0), 3)
        x0, x1 = jax.random.normal(key0, (n, 2)), _points(key1, n)
        network = Network(width)
        params = network.init(key_init, x0, jnp.zeros(n))
        name = f"w{width}_n{n}"
        ours, sampler_pair = (
            _ours(network, params, x0, x1, "independent"),
            _samplers(network, params, x0),
        )
        goal = None if quick else BARE_GOAL
        yield compare(
            "flow_matching",
            f"train_{name}/by_hand",
            ours,
            _by_hand(network, params, x0, x1),
            peer_name="the loop by hand",
            goal=goal,
            note=f"{STEPS} steps a call",
        )
        yield compare(
            "flow_matching",
            f"sample_{name}/by_hand",
            *sampler_pair,
            peer_name="the scan by hand",
            goal=goal,
            note=f"{SAMPLE_STEPS} Euler steps",
        )
        goal = None if quick else GOAL
        if peer is None:
            yield Missing("flow_matching", name, f"torchcfm (set {VARIABLE})")
            continue
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "network.npz"
            layers = params["params"]
            arrays = {"x0": np.asarray(x0), "x1": np.asarray(x1)}
            for i in range(4):
                layer = layers[f"Dense_{i}"]
                arrays |= {
                    f"kernel{i}": np.asarray(layer["kernel"]),
                    f"bias{i}": np.asarray(layer["bias"]),
                }
            np.savez(file, **arrays)
            peer.ask(task="load", file=str(file))
        # Before any training: both start from the same weights, so the samples are the same.
        head = peer.ask(task="sample", steps=SAMPLE_STEPS)["head"]
        np.testing.assert_allclose(sampler_pair[0]()[:4], head, rtol=1e-3, atol=1e-4)
        yield _against(
            peer,
            f"sample_{name}/torchcfm",
            sampler_pair[0],
            goal,
            1,
            task="sample",
            steps=SAMPLE_STEPS,
        )
        for coupling in ("independent", "exact"):
            # The exact assignment of a large batch is the peer's network simplex, in C++.
            if coupling == "exact" and n > 1024:
                continue
            yield _against(
                peer,
                f"train_{name}_{coupling}/torchcfm",
                ours if coupling == "independent" else _ours(network, params, x0, x1, coupling),
                goal if coupling == "independent" else None,
                STEPS,
                task="train",
                coupling=coupling,
                steps=STEPS,
            )
    if peer is not None:
        peer.close()
