"""Resampling with one slot's ancestor given, as conditional particle filters need it.

The law is that of the scheme followed by a uniformly random permutation of its slots, given that
slot 0 has ancestor 0. By Bayes' rule the counts are those of the scheme weighed by the count of
particle 0: a uniformly chosen slot fell to it, and each scheme says what that tells of the rest.

Sources: Chopin and Singh 2015 (conditional systematic); Karppinen, Singh and Vihola 2023 (killing,
random shifts); the conditioned residual and SSP schemes are derived here.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import keys
from jaxgen.core.arrays import unsharded
from jaxgen.core.checks import debug_check, one_of, positive_int
from jaxgen.particles import fixed_point, schemes, sharded
from jaxgen.particles.fixed_point import Fixed, multiply
from jaxgen.particles.resample import METHODS, check_sizes, killing_slots, relative_weights
from jaxgen.particles.weights import check_log_weights

__all__ = ["conditional_resample"]


def conditional_resample(
    key: jax.Array, log_weights: ArrayLike, *, method: str = "multinomial", n: int | None = None
) -> jax.Array:
    """Ancestors of ``n`` slots, of which slot 0 has ancestor 0.

    Every slot has the right law: given that particle 0 was drawn from the weights, each of the
    others is too, as in the scheme with its slots shuffled.

    Args:
      key: a typed key.
      log_weights: ``(N,)``, in any normalisation.
      method: ``multinomial stratified systematic residual ssp killing``.
      n: how many, ``N`` by default.

    Returns:
      int32 ``(n,)``; every ancestor is ``N`` where the weights cannot be resampled. A weight of
      zero for particle 0 leaves slot 0 its own and the others as close to the scheme as may be.

    Raises:
      TypeError: integer log-weights, or a key that is not a typed key.
      ValueError: as ``resample``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> int(conditional_resample(jax.random.key(0), jnp.zeros(4))[0])
      0
    """
    one_of("method", method, METHODS)
    keys.check(key)
    log_weights = unsharded(check_log_weights(log_weights))
    total = log_weights.shape[0]
    n = total if n is None else positive_int("n", n)
    check_sizes(total, n, 1, method)
    return _conditional_resample(key, log_weights, method=method, n=n)


@functools.partial(jax.jit, static_argnames=("method", "n"), inline=True)
def _conditional_resample(
    key: jax.Array, log_weights: jax.Array, *, method: str, n: int
) -> jax.Array:
    weights, usable = relative_weights(log_weights, None)
    debug_check(usable, "log_weights: all are -inf, or one is NaN or +inf")
    ends, start = fixed_point.cumulative(weights, n)
    draw_key, shuffle_key = jax.random.split(key)
    if method == "killing":
        rest = _killing(draw_key, weights, ends, n)
    else:
        counts = _SCHEMES[method](draw_key, ends, start, n)
        # Sorted, so that the first belongs to particle 0 wherever its weight is not zero.
        rest = sharded.ancestors(counts, n, None)[1:]
    rest = jax.random.permutation(shuffle_key, rest)
    ancestors = jnp.concatenate([jnp.zeros(1, jnp.int32), rest])
    return jnp.where(usable, ancestors, log_weights.shape[0])


def _share_of_first(ends: Fixed) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Particle 0's whole slots, its fraction, and the chance that a slot of its is a whole one."""
    whole, part = ends.whole[0], ends.part[0]
    share = whole + part.astype(jnp.float32) / 2.0**32
    return whole, part, jnp.where(share > 0, whole / share, 1.0)


def _point_in_first(key: jax.Array, ends: Fixed) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A point uniform on particle 0's share: is it in its last, broken cell, which, and where."""
    whole, part, sure = _share_of_first(ends)
    which, where = jax.random.split(key)
    broken = jax.random.uniform(which) >= sure
    return broken, whole, multiply(jax.random.bits(where, (), jnp.uint32), part)[0]


def _systematic(key: jax.Array, ends: Fixed, start: Fixed, n: int) -> jax.Array:
    point_key, free_key = jax.random.split(key)
    broken, _, word = _point_in_first(point_key, ends)
    free = jax.random.bits(free_key, (), jnp.uint32)
    return schemes.systematic_counts(jnp.where(broken, word, free), ends)


def _stratified(key: jax.Array, ends: Fixed, start: Fixed, n: int) -> jax.Array:
    point_key, free_key = jax.random.split(key)
    broken, cell, word = _point_in_first(point_key, ends)
    words = schemes.words_at(free_key, ends.whole)
    return schemes.stratified_counts(jnp.where(broken & (ends.whole == cell), word, words), ends)


def _multinomial(key: jax.Array, ends: Fixed, start: Fixed, n: int) -> jax.Array:
    return 1 + schemes.points_below(key, ends, jnp.int32(n - 1), jnp.int32(n), n)


def _residual(key: jax.Array, ends: Fixed, start: Fixed, n: int) -> jax.Array:
    which, draw_key = jax.random.split(key)
    _, whole, rest, left = schemes.residual_shares(ends, start)
    given = (jax.random.uniform(which) >= _share_of_first(ends)[2]).astype(jnp.int32)
    return whole + given + schemes.points_below(draw_key, rest, left - given, left, n)


def _ssp(key: jax.Array, ends: Fixed, start: Fixed, n: int) -> jax.Array:
    which, draw_key = jax.random.split(key)
    share = fixed_point.differences(ends, start)
    given = jax.random.uniform(which) >= _share_of_first(ends)[2]
    return fixed_point.prefix_sum(
        share.whole + schemes.duels(draw_key, share.part, first_wins=given)
    )


def _killing(key: jax.Array, weights: jax.Array, ends: Fixed, n: int) -> jax.Array:
    """The slots other than the one that fell to particle 0."""
    kill_key, draw_key, which_key, slot_key = jax.random.split(key, 4)
    dead = schemes.killed(kill_key, weights)
    # Particle 0 kept its slot, or a slot s gave up, with chance 1 - w_s, and drew particle 0.
    share = ends.whole[0] + ends.part[0].astype(weights.dtype) / 2.0**32
    kept = jax.random.uniform(which_key, (), weights.dtype) * share < weights[0]
    slot = jax.random.categorical(slot_key, jnp.log1p(-weights))
    slot = jnp.where(kept | (share <= 0), 0, slot)
    dead = dead.at[slot].set(False)
    died = jnp.sum(dead, dtype=jnp.int32)
    drawn = schemes.points_below(draw_key, ends, died, jnp.int32(n), n)
    slots = killing_slots(dead, sharded.ancestors(drawn, n, None))
    # The given slot leaves, the first takes its place.
    return slots.at[slot].set(slots[0])[1:]


_SCHEMES: dict[str, Callable[..., jax.Array]] = {
    "multinomial": _multinomial,
    "stratified": _stratified,
    "systematic": _systematic,
    "residual": _residual,
    "ssp": _ssp,
}
