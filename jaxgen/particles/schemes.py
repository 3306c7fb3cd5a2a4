"""The resampling schemes: how many slots each particle gets, from exact cumulative shares.

Every scheme returns running counts: how many of the ``n`` slots go to the particles up to and
including each one. All are unbiased: the expected count of particle ``i`` is ``n w_i / sum w``.

Sources: Douc, Cappe and Moulines 2005 (multinomial, stratified, systematic, residual); Gerber,
Chopin and Whiteley 2019 (SSP, after Srinivasan 2001; here the duels form a binary tree, which
keeps the counts unbiased and negatively associated); Del Moral 2004 (killing). Left out: ordering
the particles along a Hilbert curve first.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgen.particles.fixed_point import Fixed, differences, multiply, prefix_sum, running

__all__ = [
    "SCHEMES",
    "duels",
    "killed",
    "points_below",
    "residual_shares",
    "stratified_counts",
    "systematic_counts",
]


def words_at(key: jax.Array, index: jax.Array) -> jax.Array:
    """A uint32 for each index, the same wherever and in whatever order it is asked for."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
    return jax.random.key_data(keys)[..., -1]


def systematic_counts(word: jax.Array, ends: Fixed) -> jax.Array:
    """Points ``k + word / 2^32`` below each end."""
    return ends.whole + (ends.part > word)


def stratified_counts(words: jax.Array, ends: Fixed) -> jax.Array:
    """Points ``k + u_k`` below each end; ``words`` holds ``u_k`` of each end's own cell."""
    return ends.whole + (ends.part > words)


def points_below(
    key: jax.Array, ends: Fixed, points: jax.Array, cells: jax.Array, n: int
) -> jax.Array:
    """How many of ``points`` independent uniform points on ``[0, cells)`` lie below each end.

    Points fall into unit cells first; within a cell they are told apart by their fractions, one by
    one, as many as the fullest cell holds (about ten at a million). No sort and no logarithm.

    Args:
      key: a key.
      ends: ``(N,)``, at most ``cells``.
      points: ``()``, at most ``n``.
      cells: ``()``, at most ``n``.
      n: the bound of both, static.
    """
    cell_key, part_key = jax.random.split(key)
    cell = jax.random.randint(cell_key, (n,), 0, jnp.maximum(cells, 1))
    cell = jnp.where(jnp.arange(n) < points, cell, n + 1)
    held = jnp.zeros(n + 1, jnp.int32).at[cell].add(1, mode="drop")
    first = prefix_sum(held) - held
    parts = jax.random.bits(part_key, (n,), jnp.uint32)
    start, size = (v.at[ends.whole].get(mode="clip") for v in (first, held))
    fullest = jnp.max(held)

    def look(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        j, below = carry
        inside = (j < size) & (ends.part > parts.at[start + j].get(mode="clip"))
        return j + 1, below + inside

    zero = jnp.zeros_like(fullest)
    return jax.lax.while_loop(lambda carry: carry[0] < fullest, look, (zero, start))[1]


def residual_shares(
    ends: Fixed, start: Fixed, axis_name: str | None = None
) -> tuple[Fixed, jax.Array, Fixed, jax.Array]:
    """Shares, running sums of their whole parts and of their fractions, the fractions' total."""
    share = differences(ends, start)
    zeros = jnp.zeros_like(share.part)
    whole, _, _ = running(Fixed(share.whole, zeros), axis_name)
    rest, _, total = running(Fixed(jnp.zeros_like(share.whole), share.part), axis_name)
    return share, whole.whole, rest, total.whole


def duels(
    key: jax.Array,
    part: jax.Array,
    axis_name: str | None = None,
    first_wins: jax.Array | None = None,
) -> jax.Array:
    """Fractions rounded to 0 or 1 by duels in a binary tree, each keeping its expectation.

    In a duel one of two fractions settles, at 0 if they add up to less than 1 and at 1 otherwise,
    and the other goes on with what is left, so that the sum is kept exactly.

    Args:
      key: a key.
      part: ``(N,)`` uint32 fractions that add up to a whole number, over all devices.
      axis_name: the mapped axis of the devices.
      first_wins: ``()`` bool; where true the draw is conditioned on the first settling at 1.

    Returns:
      ``(N,)`` int32 of zeros and ones.
    """
    alive = jnp.asarray(False) if first_wins is None else first_wins
    key_here = (
        key if axis_name is None else jax.random.fold_in(key, 1 + jax.lax.axis_index(axis_name))
    )
    # One duel settles one fraction, so that fewer words than fractions are needed.
    words = jax.random.bits(key_here, (part.shape[0] + 32,), jnp.uint32)
    levels, level, used = [], part, 0
    while level.shape[0] > 1:
        pairs = jnp.pad(level, (0, level.shape[0] % 2)).reshape(-1, 2)
        a, b = pairs[:, 0], pairs[:, 1]
        left_over = a + b
        full = left_over < a  # the sum passed 1
        word = words[used : used + a.shape[0]]
        used += a.shape[0]
        # Chances a : b of going on, or of 1 - b : 1 - a of settling at 1, as 32-bit integers.
        chances = jnp.where(full, -left_over, left_over)
        drawn, _ = multiply(word, chances)
        drawn = jnp.where(full & (chances == 0), word, drawn)
        a_goes_on = jnp.where(full, drawn >= -b, drawn < a)
        if first_wins is not None:
            a0, b0 = (v[0].astype(jnp.float32) / 2.0**32 for v in (a, b))
            settles = (1 - b0) / ((2 - a0 - b0) * a0)
            u = word[0].astype(jnp.float32) / 2.0**32
            given = jnp.where(full[0], u >= settles, True)
            a_goes_on = a_goes_on.at[0].set(jnp.where(alive, given, a_goes_on[0]))
            alive = alive & a_goes_on[0]
        levels.append((a_goes_on, full, level.shape[0]))
        level = left_over
    if axis_name is None:
        settled = jnp.zeros(1, jnp.int32)
    else:
        roots = jax.lax.all_gather(level[0], axis_name)
        settled = duels(key, roots)[jax.lax.axis_index(axis_name)][None]
    for a_goes_on, full, size in reversed(levels):
        both = jnp.stack(
            [jnp.where(a_goes_on, settled, full), jnp.where(a_goes_on, full, settled)], axis=1
        )
        settled = both.reshape(-1)[:size]
    return settled


def killed(key: jax.Array, weights: jax.Array) -> jax.Array:
    """Which particles give up their slot: each with probability ``1 - w / max w``."""
    words = jax.random.bits(key, weights.shape, jnp.uint32)
    # A weight of 1 would overflow the 32 bits; it always stays.
    kept = words < (jnp.minimum(weights, 1 - 2.0**-24) * 2.0**32).astype(jnp.uint32)
    return ~(kept | (weights >= 1))


def _multinomial(
    key: jax.Array, ends: Fixed, start: Fixed, n: int, axis_name: str | None
) -> jax.Array:
    return points_below(key, ends, jnp.int32(n), jnp.int32(n), n)


def _stratified(
    key: jax.Array, ends: Fixed, start: Fixed, n: int, axis_name: str | None
) -> jax.Array:
    return stratified_counts(words_at(key, ends.whole), ends)


def _systematic(
    key: jax.Array, ends: Fixed, start: Fixed, n: int, axis_name: str | None
) -> jax.Array:
    return systematic_counts(jax.random.bits(key, (), jnp.uint32), ends)


def _residual(
    key: jax.Array, ends: Fixed, start: Fixed, n: int, axis_name: str | None
) -> jax.Array:
    _, whole, rest, left = residual_shares(ends, start, axis_name)
    return whole + points_below(key, rest, left, left, n)


def _ssp(key: jax.Array, ends: Fixed, start: Fixed, n: int, axis_name: str | None) -> jax.Array:
    share = differences(ends, start)
    counts = share.whole + duels(key, share.part, axis_name)
    return running(Fixed(counts, jnp.zeros_like(share.part)), axis_name)[0].whole


SCHEMES: dict[str, Callable[..., jax.Array]] = {
    "multinomial": _multinomial,
    "stratified": _stratified,
    "systematic": _systematic,
    "residual": _residual,
    "ssp": _ssp,
}
