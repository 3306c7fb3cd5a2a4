"""Inverse problems: quality against evaluations, time and memory per image, for every method.

The prior is a Gaussian mixture on 1500 of scikit-learn's digits, its field in closed form, so that
what is measured is the method and not a network; 297 other digits are restored from half of their
pixels, from 2 x 2 averages, and from an exposure that clips them (HDR). Quality is the mean peak
signal-to-noise ratio in dB, against DPS by its best zeta and eta; RED-diff too has the best of its
rates and weights at each count, the others their defaults; ``repaint`` takes a tenth of the levels,
each ten times. Time is that of 64 images at 100 evaluations; memory the temporary memory of the
compiled loop over a U-Net, for each image.

``deepinv`` on torch is the peer of DPS and DiffPIR, with the same prior and the best of its own
tunings.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from benchmarks import peer as peers
from benchmarks.measure import Missing, Result, compare, summarise
from jaxgen import nets, process
from jaxgen.guide import operators
from jaxgen.guide.restore import METHODS, restore

SDE = process.discrete_betas(np.linspace(1e-4, 0.02, 1000))
VAR = 0.15**2
TUNINGS: dict[str, tuple[tuple[float, float], ...]] = {
    # Rate and weight.
    "red_diff": ((0.05, 0.05), (0.1, 0.05), (0.1, 0.25), (0.2, 0.05), (0.2, 0.25), (0.3, 0.25)),
    # Zeta and eta.
    "dps": tuple((z, e) for z in (0.03, 0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 3.0) for e in (0.0, 1.0)),
}
PEER_TUNINGS = {"dps": (3.0, 10.0, 30.0, 60.0, 100.0), "diffpir": (0.1, 1.0, 7.0)}
TASKS: dict[str, Callable[[], operators.Operator]] = {
    "mask": lambda: operators.mask(np.random.default_rng(1).permutation(64).reshape(8, 8) % 2),
    "average": lambda: operators.average_pool(2),
    "hdr": operators.hdr,
}


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """The prior's modes ``(1500, 64)`` and the digits to restore ``(297, 8, 8)``, in [-1, 1]."""
    x = load_digits().data / 8 - 1
    x = x[np.random.default_rng(0).permutation(len(x))].astype(np.float32)
    return x[:1500], x[1500:].reshape(-1, 8, 8)


def noise(x: jax.Array, t: jax.Array) -> jax.Array:
    """The mixture's noise prediction, by matrix products."""
    modes, flat = jnp.asarray(digits()[0]), x.reshape(len(x), -1)
    a, s = SDE.alpha(t)[:, None], SDE.sigma(t)[:, None]
    spread = VAR * a**2 + s**2
    logits = (a * (flat @ modes.T) - a**2 * jnp.sum(modes**2, axis=1)[None] / 2) / spread
    return (s * (flat - a * (jax.nn.softmax(logits) @ modes)) / spread).reshape(x.shape)


def suits(method: str, task: str) -> bool:
    """Whether a method is for a task's operator."""
    linear = TASKS[task]().is_linear
    return (method != "repaint" or task == "mask") and (
        linear or method not in ("projection", "diffpir", "repaint")
    )


def options_of(method: str, evaluations: int, tuning: Any) -> dict[str, Any]:
    """A method's settings; the tuning is one of ``TUNINGS``."""
    if method == "red_diff":
        rule = optax.adam(tuning[0], b1=0.9, b2=0.99)
        return {"steps": evaluations, "optimizer": rule, "weight": tuning[1]}
    if method == "repaint":
        return {"steps": max(1, evaluations // 10), "repeats": min(10, evaluations)}
    more = {"zeta": tuning[0], "eta": tuning[1]} if method == "dps" else {}
    return {"steps": evaluations, **more}


def quality(method: str, task: str, evaluations: int, n: int) -> tuple[float, str]:
    """The best mean dB over a method's tunings, and that tuning in words."""
    truth, operator = jnp.asarray(digits()[1][:n]), TASKS[task]()

    @jax.jit
    def run(tunings: jax.Array) -> jax.Array:
        y = jax.vmap(operator)(truth)

        def one(tuning: jax.Array) -> jax.Array:
            options = options_of(method, evaluations, tuning)
            out = restore(jax.random.key(0), noise, SDE, y, operator, method=method, **options)
            square = jnp.mean((jnp.clip(out.x, -1, 1) - truth) ** 2, axis=(1, 2))
            return jnp.mean(10 * jnp.log10(4 / square))

        return jax.lax.map(one, tunings)

    tunings = np.asarray(TUNINGS.get(method, ((0.0, 0.0),)), np.float32)
    found = np.asarray(run(jnp.asarray(tunings)))
    first, second = tunings[found.argmax()]
    return float(found.max()), f"{method} ({first:g}, {second:g})"


def result(case: str, ours: float, peer: float, peer_name: str, unit: str, note: str) -> Result:
    """One figure of each side; more dB are better, fewer MiB."""
    return Result(
        bench="inverse",
        case=case,
        ours=ours,
        peer=peer,
        peer_name=peer_name,
        unit=unit,
        ratio=ours / peer if unit == "dB" else peer / ours,
        note=note,
    )


def qualities(
    methods: tuple[str, ...], tasks: tuple[str, ...], counts: tuple[int, ...], n: int
) -> Iterator[Result]:
    """Each method against DPS, both by their best tunings."""
    for task in tasks:
        truth, operator = jnp.asarray(digits()[1][:n]), TASKS[task]()
        shown = jax.vmap(operator.pinv)(jax.vmap(operator)(truth))
        start = float(jnp.mean(10 * jnp.log10(4 / jnp.mean((shown - truth) ** 2, axis=(1, 2)))))
        for evaluations in counts:
            best, tuned = quality("dps", task, evaluations, n)
            for method in methods:
                if suits(method, task):
                    ours, own = quality(method, task, evaluations, n)
                    note = f"{n} digits, start {start:.2f} dB, {tuned}"
                    if method in TUNINGS:
                        note += f", {own}"
                    case = f"{task}_{evaluations}_{method}"
                    yield result(case, ours, best, "tuned dps", "dB", note)


def runner(method: str, evaluations: int, n: int) -> Callable[[], jax.Array]:
    """A compiled restoration of ``n`` masked digits."""
    operator = TASKS["mask"]()
    y = jax.vmap(operator)(jnp.asarray(digits()[1][:n]))
    options = options_of(method, evaluations, (0.05, 0.05))

    @jax.jit
    def run(y: jax.Array) -> jax.Array:
        return restore(jax.random.key(0), noise, SDE, y, operator, method=method, **options).x

    return functools.partial(run, y)


def times(methods: tuple[str, ...], evaluations: int, n: int) -> Iterator[Result]:
    """Milliseconds per image against DPS."""
    for method in methods:
        found = compare(
            "inverse",
            f"time_{evaluations}_{method}",
            runner(method, evaluations, n),
            runner("dps", evaluations, n),
            peer_name="dps",
            note=f"{n} digits a call, {evaluations} evaluations of the mixture's field",
        )
        yield dataclasses.replace(
            found, ours=found.ours / n, peer=found.peer / n, unit="ms an image"
        )


def memory(methods: tuple[str, ...], width: int, side: int, batch: int) -> Iterator[Result]:
    """Temporary MiB per image of the compiled loop over a U-Net, against DPS."""
    net: Any = nets.UNet(width=width)
    x = jnp.zeros((batch, side, side, 1))
    params = jax.eval_shape(net.init, jax.random.key(0), x, jnp.zeros(batch))
    seen = operators.mask(np.indices((side, side, 1)).sum(axis=0) % 2)

    def used(method: str) -> float:
        def run(params: Any, y: jax.Array) -> jax.Array:
            def field(x: jax.Array, t: jax.Array) -> jax.Array:
                return net.apply(params, x, SDE.log_snr(t))

            options = options_of(method, 10, (0.05, 0.05))
            return restore(jax.random.key(0), field, SDE, y, seen, method=method, **options).x

        compiled = jax.jit(run).lower(params, jax.ShapeDtypeStruct(x.shape, x.dtype)).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 2**20 / batch

    dps = used("dps")
    note = f"U-Net of width {width}, {side} x {side} pixels, {batch} images a call"
    for method in methods:
        yield result(f"memory_{method}", used(method), dps, "dps", "MiB an image", note)


def against_deepinv(evaluations: int, n: int, pairs: int) -> Iterator[Result | Missing]:
    """DPS and DiffPIR of both sides on the masked digits: quality, then time."""
    modes, truth = digits()
    truth = truth[:n]
    peer = peers.find("JAXGEN_DEEPINV", "deepinv_worker.py")
    if peer is None:
        for method in PEER_TUNINGS:
            yield Missing("inverse", f"deepinv_{method}", "deepinv")
        return
    peer.send(modes=modes.tolist(), var=VAR)
    seen = np.broadcast_to(np.asarray(TASKS["mask"]().known, np.float32), truth.shape)
    command = {
        "y": (seen * truth).tolist(),
        "mask": seen.tolist(),
        "truth": truth.tolist(),
        "steps": evaluations,
        "seed": 1,
    }
    for method, tunings in PEER_TUNINGS.items():
        found = [(peer.ask(method=method, tuning=u, **command)["psnr"], u) for u in tunings]
        theirs, tuning = max(found)
        ours, _ = quality(method, "mask", evaluations, n)
        note = f"{n} digits, {evaluations} evaluations, theirs by tuning {tuning:g}"
        yield result(f"deepinv_{method}", ours, theirs, "deepinv", "dB", note)
        run = runner(method, evaluations, n)
        jax.block_until_ready(run())
        seconds = np.zeros((pairs, 2))
        for i in range(pairs):
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[i, 0] = time.perf_counter() - start
            seconds[i, 1] = peer.ask(method=method, tuning=tuning, **command)["seconds"]
        yield summarise(
            "inverse",
            f"deepinv_{method}_time",
            1e3 * seconds[:, 0] / n,
            1e3 * seconds[:, 1] / n,
            peer_name="deepinv",
            unit="ms an image",
            note=note,
        )
    peer.close()
    peer.close()


def run(*, quick: bool) -> Iterator[Result | Missing]:
    others = tuple(m for m in METHODS if m != "dps")
    if quick:
        yield from qualities(("red_diff",), ("mask",), (20,), 20)
        yield from times(("red_diff",), 10, 8)
        yield from memory(("red_diff",), 8, 8, 4)
        yield from against_deepinv(20, 8, 3)
        return
    yield from memory(others, 32, 32, 8)
    yield from times(others, 100, 64)
    yield from against_deepinv(100, 64, 15)
    yield from qualities(others, tuple(TASKS), (20, 100), 297)
    yield from qualities(others, tuple(TASKS), (1000,), 100)
