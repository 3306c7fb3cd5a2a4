"""One step of weighted particles: what is known at a knot, the move and its log-weight.

The formulas are those of ``feynman_kac``, whose parts these are.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgen.core.arrays import cast_coefficient, matmul, safe_sqrt, sum_event
from jaxgen.process.linear import LinearSDE
from jaxgen.smc.target import Density, Target, at_time, noises, per_particle, value_and_grad_of
from jaxgen.solve.phi import phi
from jaxgen.solve.terms import with_batch_of

__all__ = [
    "Level",
    "Node",
    "Pending",
    "Run",
    "evaluate",
    "increment",
    "known_log_probs",
    "levels",
    "move",
    "raw",
]


class Level(NamedTuple):
    """Numbers of a knot, each ``(steps + 1,)``, exponents ``(steps + 1, k)``."""

    t: jax.Array
    alpha: jax.Array
    log_alpha: jax.Array
    root: jax.Array  # sigma/alpha
    log_u: jax.Array
    log_u_dot: jax.Array
    exponents: jax.Array
    tilt: jax.Array  # weight of the reward


class Node(NamedTuple):
    """What is known of particles at a knot; ``None`` where it is not used."""

    mixed: jax.Array  # E
    push: jax.Array | None  # grad h
    rate: jax.Array | None  # u G but for what the next three are for, (n,)
    log_probs: jax.Array | None  # of each field, of y, (n, k)
    reward: jax.Array | None  # R, (n,)
    slide: jax.Array | None  # d h / d log alpha at fixed y, (n,)


class Pending(NamedTuple):
    """What the weight of a step needs of its start; ``None`` where it is not used."""

    rate: jax.Array | None
    log_probs: jax.Array | None
    reward: jax.Array | None
    slide: jax.Array | None
    y: jax.Array | None
    log_density: jax.Array | None  # -(log p + log K), (n,)


@dataclasses.dataclass(frozen=True)
class Run:
    """What every step reads."""

    target: Target
    sde: LinearSDE
    predictions: tuple[str, ...]
    log_probs: tuple[Density, ...] | None
    weights: str
    noise: jax.Array
    is_noisy: bool
    clip: float | None
    size: int
    field_dtype: Any
    axis_name: str | None

    @property
    def waits(self) -> bool:
        """Whether a step's weight needs the fields at its end."""
        return self.weights in ("trapezoid", "density")

    @property
    def by_potential(self) -> bool:
        """Whether weights are the user's potential's, of densities of x rather than y."""
        return self.target.potential is not None and self.weights != "density"


# --- at a knot ------------------------------------------------------------------------------------


def levels(run: Run, times: jax.Array) -> Level:
    """The numbers of all knots."""
    sde, target = run.sde, run.target
    alpha, sigma = sde.alpha(times), sde.sigma(times)
    slope = jnp.zeros_like(times)
    if run.by_potential:
        slope = -jax.jvp(sde.log_snr, (times,), (jnp.ones_like(times),))[1]
    tilt = 0.0 if target.reward is None else target.reward_scale
    exponents = jnp.stack([at_time(b, times) for b in target.exponents], axis=-1)
    out = Level(
        times,
        alpha,
        sde.log_alpha(times),
        sigma / alpha,
        -sde.log_snr(times),
        slope,
        exponents,
        at_time(tilt, times),
    )
    return jax.tree.map(lambda v: v.astype(times.dtype), out)


def raw(run: Run, level: Level, y: jax.Array) -> jax.Array:
    """``x`` from ``y = (x - mu)/alpha``."""
    x = cast_coefficient(level.alpha, y) * y
    mu = run.sde.centre(x)
    return x if mu is None else (mu + x).astype(y.dtype)


def known_log_probs(run: Run, level: Level, x: jax.Array) -> jax.Array:
    """Log-densities of ``y``, ``(n, k)``."""
    assert run.log_probs is not None
    t = with_batch_of(x, jnp.broadcast_to(level.t, x.shape[:1]))
    out = [per_particle(f(x, t), x, f"log_probs[{i}]") for i, f in enumerate(run.log_probs)]
    return jnp.stack(out, axis=-1) + run.size * level.log_alpha


def evaluate(run: Run, level: Level, y: jax.Array) -> Node:
    """One call of every field, and of the reward or the potential."""
    target, rate, log_probs, push, value, slide = run.target, None, None, None, None, None
    x = raw(run, level, y)
    t = with_batch_of(x, jnp.broadcast_to(level.t, x.shape[:1]))
    parts = noises(target, x, t, run.sde, run.predictions, run.field_dtype)
    total, first = jnp.sum(level.exponents), parts[0]
    # From differences to the first field, so that equal fields cancel to the last digit.
    apart, squares = jnp.zeros_like(y), jnp.zeros_like(y, shape=y.shape[:1])
    for i, e in enumerate(parts[1:], 1):
        apart = apart + cast_coefficient(level.exponents[i], y) * (e - first)
        squares = squares + level.exponents[i] * sum_event((e - first) ** 2)
    mixed = cast_coefficient(total, y) * first + apart
    if target.reward is not None:
        value, slope = value_and_grad_of(target.reward, x, "reward")
        push = cast_coefficient(level.tilt * level.alpha, y) * slope
        slide = level.tilt * level.alpha * sum_event(slope * y)
    if run.weights == "density":
        return Node(mixed, push, None, known_log_probs(run, level, x), value, None)
    if run.by_potential:
        assert target.potential is not None
        rate = per_particle(target.potential(x, t), x, "potential") / level.log_u_dot
        return Node(mixed, push, rate, None, None, None)
    rate = 0.5 * (total - 1) * sum_event(first * (mixed + apart))
    rate = rate + 0.5 * (sum_event(apart**2) - squares)
    if push is not None:
        rate = rate - 0.5 * level.root * sum_event(mixed * push)
    if target.is_varying and run.weights != "none":
        log_probs = known_log_probs(run, level, x)
    return Node(mixed, push, rate, log_probs, value, slide)


def _log_target(level: Level, node: Node) -> jax.Array:
    assert node.log_probs is not None
    total = matmul(node.log_probs, level.exponents)
    return total if node.reward is None else total + level.tilt * node.reward


# --- from knot to knot ----------------------------------------------------------------------------


def _phi(z: jax.Array) -> jax.Array:
    return phi(z, 1)[0]


def _log(variance: jax.Array) -> jax.Array:
    """Finite, with its gradient, at the 0 of a step of no length."""
    return jnp.log(jnp.where(variance == 0, 1.0, variance))


def move(
    run: Run, here: Level, there: Level, y: jax.Array, node: Node, n: jax.Array | None
) -> tuple[jax.Array, Pending]:
    """The step (4), and what its weight needs of its start."""
    z, total = run.noise, jnp.sum(here.exponents)
    c, v, span = (1 + z) / 2, there.root**2, there.log_u - here.log_u
    shift = cast_coefficient(here.root * c * span * _phi(c * total * span), y) * node.mixed
    if node.push is not None:
        pull = -z / 2 * v * span * _phi((c * total - 1) * span)
        shift = shift + cast_coefficient(pull, y) * node.push
    moved, variance = y + shift, -z * v * span * _phi((2 * c * total - 1) * span)
    if n is not None:
        moved = moved + cast_coefficient(safe_sqrt(variance), y) * n
    if run.weights != "density":
        return moved, Pending(node.rate, node.log_probs, node.reward, node.slide, None, None)
    assert n is not None
    log_kernel = -0.5 * sum_event(n**2) - 0.5 * run.size * _log(variance)
    waits = -(_log_target(here, node) + log_kernel)
    return moved, Pending(None, None, None, None, y, waits)


def _density_increment(
    run: Run, here: Level, there: Level, pending: Pending, node: Node, y: jax.Array
) -> jax.Array:
    """The log-weight of a step to ``y`` by the kernel back."""
    assert pending.y is not None
    assert pending.log_density is not None
    z, u, span = run.noise, here.root**2, there.log_u - here.log_u
    kappa = (z - 1) / 2 * jnp.sum(there.exponents)
    back = there.root * (z - 1) / 2 * span * _phi(kappa * span)
    mean = y + cast_coefficient(back, y) * node.mixed
    if node.push is not None:
        pull = -z / 2 * u * span * _phi((kappa + 1) * span)
        mean = mean + cast_coefficient(pull, y) * node.push
    variance = -z * u * span * _phi((2 * kappa + 1) * span)
    # The first knot has no step before it: its variance is 0 and its weight left out.
    log_back = -0.5 * sum_event((pending.y - mean) ** 2) / jnp.where(variance == 0, 1.0, variance)
    log_back = log_back - 0.5 * run.size * _log(variance)
    return pending.log_density + _log_target(there, node) + log_back


def increment(
    run: Run, here: Level, there: Level, pending: Pending, node: Node | None, y: jax.Array
) -> jax.Array:
    """The log-weight of the step from ``here`` to ``there``, where it arrived at ``y``.

    By the trapezoid rule, or by the start alone where the end's ``node`` is not given.
    """
    if run.weights == "density":
        assert node is not None
        return _clipped(run, _density_increment(run, here, there, pending, node, y))

    def mean(name: str) -> Any:
        first = getattr(pending, name)
        return first if node is None else 0.5 * (first + getattr(node, name))

    out = -(there.log_u - here.log_u) * mean("rate")
    if pending.log_probs is not None:
        out = out + matmul(mean("log_probs"), there.exponents - here.exponents)
    if pending.reward is not None:
        out = out + (there.tilt - here.tilt) * mean("reward")
        out = out + (there.log_alpha - here.log_alpha) * mean("slide")
    return _clipped(run, out)


def _clipped(run: Run, out: jax.Array) -> jax.Array:
    if run.clip is None:
        return out
    middle = jnp.mean(out)
    if run.axis_name is not None:
        middle = jax.lax.pmean(middle, run.axis_name)
    return middle + jnp.clip(out - middle, -run.clip, run.clip)
