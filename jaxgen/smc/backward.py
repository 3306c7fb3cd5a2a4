"""Backward draws: which particle of step t - 1 was the parent of a given state at step t.

Given particles ``x^l`` of weights ``w^l`` at ``t - 1`` and a state ``x'`` at ``t``, the parent is
``l`` with probability proportional to ``w^l m_t(x^l, x')`` (Godsill, Doucet and West 2004). The
exact draw costs one transition density for each pair. Rejection (Douc, Garivier, Moulines and
Olsson 2011) proposes ``l`` from the weights alone and accepts with ``m_t(x^l, x') / c_t``, so that
its cost does not grow with the number of particles; what a bounded number of trials leaves over is
drawn exactly, which leaves the law as it is, since a refused trial says nothing about the next.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxgen.core import keys
from jaxgen.core.arrays import varying_zeros
from jaxgen.core.checks import debug_check, one_of, positive_int
from jaxgen.particles.resample import take
from jaxgen.particles.weights import check_log_weights
from jaxgen.smc.state_space import StateSpaceModel, scalar_log

__all__ = ["BACKWARD", "backward_indices"]

BACKWARD = ("exact", "rejection")

# Pairs whose densities are held at once. On a CPU a block that stays in its cache takes a quarter
# of the time of one that does not; elsewhere 2^24 float32, 64 MiB, keep the chip busy.
_PAIRS_CPU, _PAIRS = 2**20, 2**24
# Rejection goes on with a buffer this many times smaller once the rest fits.
_SHRINK = 8
_SMALLEST = 512
# Up to so many particles one level serves.
_SHORT = 32


def check_backward(
    model: StateSpaceModel, draws: int, backward: str, max_trials: int | None
) -> None:
    """Raise what every function with backward draws raises."""
    positive_int("draws", draws)
    one_of("backward", backward, BACKWARD)
    model.require("log_transition", what="a backward draw")
    if backward == "rejection":
        if max_trials is not None:
            positive_int("max_trials", max_trials)
        model.require("log_transition_bound", what='backward="rejection"')


def backward_indices(
    key: jax.Array,
    model: StateSpaceModel,
    x: Any,
    log_weights: jax.Array,
    x_next: Any,
    t: jax.Array,
    *,
    draws: int = 1,
    backward: str = "exact",
    max_trials: int | None = None,
) -> jax.Array:
    """Parents of ``m`` states among ``n`` weighted particles, ``draws`` independent ones each.

    Args:
      key: a typed key.
      model: with ``log_transition``; rejection needs ``log_transition_bound`` too.
      x: particles of step ``t - 1``, a pytree of arrays ``(n, *event)``.
      log_weights: ``(n,)``, in any normalisation.
      x_next: states of step ``t``, arrays ``(m, *event)``.
      t: ``()`` int32, the step of ``x_next``.
      draws: parents of each state.
      backward: ``"exact"``, all ``n m`` densities (in blocks where they are many), or
        ``"rejection"``.
      max_trials: rejection's trials of each draw before the exact one; ``None`` means
        ``max(32, n // 32)``, about what an exact draw costs.

    Returns:
      int32 ``(m, draws)``. Out of range where there is no parent: ``n`` where every logit is -inf,
      ``n + 1`` where one is NaN or +inf. Rejection with a density above its bound gives ``n + 1``
      everywhere, and an error under ``checkify``.

    Raises:
      ValueError: ``draws`` or ``max_trials`` below 1, an unknown ``backward``, particles of another
        number than weights, or a model without the functions that it needs.
    """
    check_backward(model, draws, backward, max_trials)
    log_weights = check_log_weights(log_weights)
    n, m = log_weights.shape[0], jax.tree.leaves(x_next)[0].shape[0]
    for leaf in jax.tree.leaves(x):
        if jnp.shape(leaf)[:1] != (n,):
            raise ValueError(f"x has a leaf of shape {jnp.shape(leaf)} for {n} log-weights")
    keys.check(key)
    if backward == "rejection":
        max_trials = max(32, n // 32) if max_trials is None else max_trials
        return _rejection(
            jax.random.split(key), model, x, log_weights, x_next, t, (m, draws), max_trials
        )
    uniforms = uniforms_for(key, (m, draws), log_weights)

    def in_blocks(pairs: int) -> Callable[[Any, jax.Array], jax.Array]:
        block = max(1, pairs // n)

        def one(state: Any, u: jax.Array) -> jax.Array:
            return draw_index(u, logits_of(model, x, log_weights, state, t))

        if m <= block:
            return jax.vmap(one)
        return lambda *both: jax.lax.map(lambda pair: one(*pair), both, batch_size=block)

    if m * n <= _PAIRS_CPU:
        return in_blocks(_PAIRS_CPU)(x_next, uniforms)
    return jax.lax.platform_dependent(
        x_next, uniforms, cpu=in_blocks(_PAIRS_CPU), default=in_blocks(_PAIRS)
    )


def logits_of(
    model: StateSpaceModel, x: Any, log_weights: jax.Array, x_next: Any, t: jax.Array
) -> jax.Array:
    def log_density(one: Any) -> jax.Array:
        return scalar_log("log_transition", model.log_transition(one, x_next, t))  # type: ignore[misc]

    return log_weights + jax.vmap(log_density)(x).astype(log_weights.dtype)


def uniforms_for(key: jax.Array, shape: tuple[int, ...], logits: jax.Array) -> jax.Array:
    """What ``draw_index`` needs for draws of ``shape``: one or two uniforms for each."""
    levels = 1 if logits.shape[-1] <= _SHORT else 2
    return jax.random.uniform(key, (*shape, levels), logits.dtype)


def draw_index(uniforms: jax.Array, logits: jax.Array) -> jax.Array:
    """Draws from the law proportional to ``exp(logits)``.

    In two levels of about ``sqrt(n)``: a block by its sum, then a member of it. That spares the
    cumulative sum over all ``n``, and keeps float32 sums short.

    Args:
      uniforms: ``(draws, levels)``, of ``uniforms_for``.
      logits: ``(n,)``.

    Returns:
      int32 ``(draws,)``; ``n`` where every logit is -inf, ``n + 1`` where one is NaN or +inf.
    """
    n = logits.shape[0]
    top = jax.lax.stop_gradient(jnp.max(logits))
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0))
    if uniforms.shape[1] == 1:
        index = _invert(uniforms[:, 0], weights)
    else:
        side = math.isqrt(n - 1) + 1
        rows = -(-n // side)
        blocks = jnp.pad(weights, (0, rows * side - n)).reshape(rows, side)
        row = _invert(uniforms[:, 0], jnp.sum(blocks, axis=1))
        column = jax.vmap(_invert)(uniforms[:, 1:], blocks.at[row].get(mode="clip"))[:, 0]
        index = row * side + column
    index = jnp.where(jnp.isneginf(top), n, index)
    return jnp.where(jnp.isnan(top) | jnp.isposinf(top), n + 1, index)


def _invert(uniforms: jax.Array, weights: jax.Array) -> jax.Array:
    """First index whose cumulative weight exceeds ``u`` times the total; never of zero weight."""
    size = weights.shape[0]
    upper = jnp.triu(jnp.ones((size, size), weights.dtype))
    cumulative = jnp.dot(weights, upper, precision=jax.lax.Precision.HIGHEST)
    alive = weights > 0
    # The largest over live entries, so that one of them always exceeds u < 1 times it.
    total = jnp.max(jnp.where(alive, cumulative, 0))
    hit = alive[None] & (cumulative[None] > uniforms[:, None] * total)
    return jnp.argmax(hit, axis=1).astype(jnp.int32)


def _rejection(
    two_keys: jax.Array,
    model: StateSpaceModel,
    x: Any,
    log_weights: jax.Array,
    x_next: Any,
    t: jax.Array,
    shape: tuple[int, int],
    max_trials: int,
) -> jax.Array:
    n, total = log_weights.shape[0], shape[0] * shape[1]
    top = jnp.max(log_weights)
    weights = jnp.exp(log_weights - jnp.where(jnp.isfinite(top), top, 0))
    cumulative = jnp.cumsum(weights)
    bound = scalar_log("log_transition_bound", model.log_transition_bound(t))  # type: ignore[misc]
    # At the mode a density meets its bound but for rounding.
    slack = 1e-5 * (1 + jnp.abs(bound))

    def trial(state: tuple, todo: jax.Array) -> tuple:
        """One proposal for each draw of ``todo``; numbers past the last draw are padding."""
        index, above, done = state
        choose, accept = jax.random.uniform(
            jax.random.fold_in(two_keys[1], done), (2, *todo.shape), log_weights.dtype
        )
        parent = jnp.searchsorted(cumulative, choose * cumulative[-1], side="right")
        parent = jnp.minimum(parent, n - 1).astype(jnp.int32)
        log_density = jax.vmap(
            lambda a, b: scalar_log("log_transition", model.log_transition(a, b, t))  # type: ignore[misc]
        )(take(x, parent), take(x_next, jnp.minimum(todo, total - 1) // shape[1]))
        live = (todo < total) & (weights[parent] > 0)
        above = above | jnp.any(live & (log_density > bound + slack))
        live = live & (jnp.log(accept) < log_density - bound)
        # Drawn already: out of range, so that nothing is written.
        free = index.at[todo].get(mode="fill", fill_value=0) == n
        index = index.at[jnp.where(live & free, todo, total)].set(parent, mode="drop")
        return index, above, done + 1

    # Over devices draws vary where keys, weights or densities do.
    one, after = jax.tree.map(lambda leaf: leaf[:1], x), jax.tree.map(lambda leaf: leaf[0], x_next)
    logits = logits_of(model, one, log_weights[:1], after, t)
    zero = varying_zeros((), jnp.int32, jax.random.key_data(two_keys), cumulative, bound, logits)
    state = (jnp.full((total,), n, jnp.int32) + zero, zero > 0, jnp.int32(0))
    size, todo = total, jnp.arange(total, dtype=jnp.int32)
    while True:
        smaller = -(-size // _SHRINK) if size > _SMALLEST else 0

        def going(state: tuple, smaller: int = smaller) -> jax.Array:
            left = jnp.sum(state[0] == n)
            return (left > smaller) & (state[2] < max_trials) & ~state[1]

        state = jax.lax.while_loop(going, functools.partial(trial, todo=todo), state)
        if smaller == 0:
            break
        size = smaller
        todo = _unfinished(state[0] == n, size)
    index, above, _ = state
    debug_check(~above, "at step {t} log_transition exceeds log_transition_bound", t=t)
    index = _finish(two_keys[0], model, x, log_weights, x_next, t, index, shape[1])
    return jnp.where(above, n + 1, index).reshape(shape)


def _unfinished(left: jax.Array, size: int) -> jax.Array:
    return jnp.nonzero(left, size=size, fill_value=left.shape[0])[0].astype(jnp.int32)


def _finish(
    key: jax.Array,
    model: StateSpaceModel,
    x: Any,
    log_weights: jax.Array,
    x_next: Any,
    t: jax.Array,
    index: jax.Array,
    draws: int,
) -> jax.Array:
    """Exact draws for those at ``n``, in blocks, so that what is done already costs nothing."""
    n, total = log_weights.shape[0], index.shape[0]
    block = min(total, 256, max(1, _PAIRS_CPU // n))

    def body(state: tuple) -> tuple:
        index, left, done = state
        todo = _unfinished(left, block)
        uniforms = uniforms_for(jax.random.fold_in(key, done), (block, 1), log_weights)
        drawn = jax.vmap(
            lambda after, u: draw_index(u, logits_of(model, x, log_weights, after, t))[0]
        )(take(x_next, jnp.minimum(todo, total - 1) // draws), uniforms)
        return (
            index.at[todo].set(drawn, mode="drop"),
            left.at[todo].set(False, mode="drop"),
            done + 1,
        )

    return jax.lax.while_loop(
        lambda state: jnp.any(state[1]), body, (index, index == n, jnp.int32(0))
    )[0]
