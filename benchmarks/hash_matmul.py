"""A layer whose weight lives in a pool, against the dense layer of the same virtual shape.

4096 x 4096, batch 256, float32: forward and both gradients in one jitted call; then a whole
training step with Adam, where the smaller state counts. Memory is that of the compiled program.
The ``rule`` cases time the two XLA forms against each other: ``implementation=None`` goes by them.
On a GPU the kernel is timed against the dense layer and both XLA forms.
A layer of PyTorch that looks each weight up by a stored index is timed where torch is installed.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.measure import PAIRS, Missing, Result, compare
from jaxgen import share

GOALS = {4: 1 / 1.2, 16: 1 / 1.05, 64: 1 / 1.2, 256: 1 / 1.2}
MIB = 2**20


def _spec(k: int, n: int, compression: float):
    layout = share.plan({"w": jax.ShapeDtypeStruct((k, n), jnp.float32)}, 1 / compression)
    return layout, share.leaf(layout, "w")


def _loss(product, dy):
    """Forward and both gradients of a layer, compiled."""
    return jax.jit(jax.value_and_grad(lambda x, w: jnp.vdot(product(x, w), dy), (0, 1)))


def _temp(function, *args) -> float:
    return function.lower(*args).compile().memory_analysis().temp_size_in_bytes / MIB


def _adam_step(product, dy):
    optimizer = optax.adam(1e-3)

    def step(w, state, x):
        grads = jax.grad(lambda w: jnp.vdot(product(x, w), dy))(w)
        updates, state = optimizer.update(grads, state, w)
        return optax.apply_updates(w, updates), state

    return optimizer, jax.jit(step, donate_argnums=(0, 1))


def _held_step(product, w, x, dy):
    """A training step on held, donated state, and its memory in MiB: state, temporary."""
    optimizer, step = _adam_step(product, dy)
    held = {"state": (jnp.copy(w), optimizer.init(w))}
    memory = step.lower(*held["state"], x).compile().memory_analysis()
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(held["state"]))

    def run():
        held["state"] = step(*held["state"], x)
        return held["state"]

    return run, (state / MIB, memory.temp_size_in_bytes / MIB)


def _torch_layer(index, signs, pool, x, dy):
    """The layer of PyTorch codebases: the weight by a stored int64 index."""
    import torch

    def tensor(array):
        return torch.from_numpy(np.array(array))

    at, g = tensor(index.astype(np.int64)), tensor(signs.astype(np.float32))
    inputs, target = tensor(x).requires_grad_(), tensor(dy)
    weights = tensor(pool).requires_grad_()

    def run():
        inputs.grad = weights.grad = None
        torch.vdot((inputs @ (weights[at] * g)).ravel(), target.ravel()).backward()
        return weights.grad.numpy()

    return run


def run(*, quick: bool) -> Iterator[Result | Missing]:
    k = n = 1024 if quick else 4096
    m_rows = 64 if quick else 256
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (m_rows, k))
    dy = jax.random.normal(keys[1], (m_rows, n))
    w = jax.random.normal(keys[2], (k, n)) * k**-0.5
    dense = _loss(lambda x, w: x @ w, dy)
    for compression in (16,) if quick else (4, 10, 16, 64, 256):
        layout, spec = _spec(k, n, compression)
        pool = share.init(keys[2], layout).pool
        ours = _loss(lambda x, p, spec=spec: share.hashed_matmul(x, p, spec), dy)
        note = (
            f"temporary {_temp(ours, x, pool):.0f} MiB against {_temp(dense, x, w):.0f}, "
            f"weight {w.nbytes / MIB:.0f}"
        )
        yield compare(
            "hash_matmul",
            f"layer_{compression}x",
            lambda ours=ours, pool=pool: ours(x, pool),
            lambda: dense(x, w),
            peer_name="the dense layer",
            goal=None if quick else GOALS.get(compression),
            pairs=PAIRS,
            note=note,
        )
    for compression in (16,) if quick else (4, 16, 64, 256):
        layout, spec = _spec(k, n, compression)
        pool = share.init(keys[2], layout).pool
        ours_step, (state, temp) = _held_step(
            lambda x, p, spec=spec: share.hashed_matmul(x, p, spec), pool, x, dy
        )
        peer_step, (peer_state, peer_temp) = _held_step(lambda x, w: x @ w, w, x, dy)
        note = (
            f"weights and moments {state:.1f} MiB against {peer_state:.1f}, temporary {temp:.0f} "
            f"against {peer_temp:.0f}"
        )
        yield compare(
            "hash_matmul",
            f"adam_step_{compression}x",
            ours_step,
            peer_step,
            peer_name="the dense layer with Adam",
            note=note,
        )
    yield from _rule(quick)
    if jax.default_backend() == "gpu" and not quick:
        yield from _on_gpu()
    yield _against_torch(k, n, x, dy, keys[2])


def _rule(quick: bool) -> Iterator[Result]:
    """The loop over windows against expand-and-multiply, from one row to many."""
    sizes = [(64, 1024, 16)] if quick else [(1, 4096, 16), (16, 4096, 16), (2048, 2048, 16)]
    sizes += [] if quick else [(256, 512, 16), (256, 4096, 4096)]
    for rows, width, compression in sizes:
        layout, spec = _spec(width, width, compression)
        pool = share.init(jax.random.key(1), layout).pool
        x = jax.random.normal(jax.random.key(2), (rows, width))
        sides = [
            _loss(
                lambda x, p, spec=spec, name=name: share.hashed_matmul(
                    x, p, spec, implementation=name
                ),
                x,
            )
            for name in ("xla_loop", "xla_expand")
        ]
        yield compare(
            "hash_matmul",
            f"rule_{rows}_rows_{width}_wide_{compression}x",
            lambda f=sides[0], x=x, pool=pool: f(x, pool),
            lambda f=sides[1], x=x, pool=pool: f(x, pool),
            peer_name="xla_expand",
        )


def _on_gpu() -> Iterator[Result]:
    """The GPU kernel in bfloat16 against the dense layer, and the XLA forms beside it."""
    for rows, compression in ((16, 16), (256, 4), (256, 16), (256, 64), (1024, 16), (4096, 16)):
        shape = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
        spec = share.leaf(share.plan(shape, 1 / compression, tile=(128, 128)), "w")
        keys = jax.random.split(jax.random.key(1), 4)
        x, dy = (jax.random.normal(k, (rows, 4096), jnp.bfloat16) for k in keys[:2])
        pool = jax.random.normal(keys[2], (spec.m,), jnp.bfloat16)
        w = jax.random.normal(keys[3], (4096, 4096), jnp.bfloat16)

        def by(name, spec=spec, dy=dy):
            return _loss(lambda a, p: share.hashed_matmul(a, p, spec, implementation=name), dy)

        kernel, dense = by("mosaic_gpu"), _loss(lambda x, w: x @ w, dy)
        for name in ("xla_expand", "xla_loop"):
            form = by(name)
            yield compare(
                "hash_matmul",
                f"gpu_{rows}_rows_{compression}x_{name}",
                lambda f=kernel, x=x, pool=pool: f(x, pool),
                lambda f=form, x=x, pool=pool: f(x, pool),
                peer_name=name,
            )
        yield compare(
            "hash_matmul",
            f"gpu_{rows}_rows_{compression}x_dense",
            lambda f=kernel, x=x, pool=pool: f(x, pool),
            lambda f=dense, x=x, w=w: f(x, w),
            peer_name="the dense layer",
        )


def _against_torch(k: int, n: int, x, dy, key) -> Result | Missing:
    try:
        import torch
    except ImportError:
        return Missing("hash_matmul", "element_wise_16x", "torch, a layer by a stored index")
    layout, spec = _spec(k, n, 16)
    spec = dataclasses.replace(spec, scale=1.0)
    pool = share.init(key, layout).pool
    index, signs = (
        np.asarray(a).reshape(k, n) for a in share.slots(spec, jnp.arange(k * n, dtype=jnp.uint32))
    )
    ours = _loss(lambda x, p: share.hashed_matmul(x, p, spec), dy)
    peer = _torch_layer(index, signs, np.asarray(pool), np.asarray(x), np.asarray(dy))
    gap = np.abs(np.asarray(ours(x, pool)[1][1]) - peer()).max()
    return compare(
        "hash_matmul",
        "element_wise_16x",
        lambda: ours(x, pool),
        peer,
        peer_name=f"torch {torch.__version__}, the same layer by a stored index",
        note=f"same slots and signs, largest gap of the pool's gradients {gap:.1e}",
    )
