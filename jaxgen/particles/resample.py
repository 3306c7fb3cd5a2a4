"""Resampling: log-weights in, ancestors out, exact in float32 at a million particles.

The shares are exact fixed-point numbers (``particles/fixed_point.py``), so that no particle of zero
weight is ever chosen, equal weights get equal counts, and the answer is the same on any number of
devices. All of it is O(N): no sort, no host callback.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import keys
from jaxgen.core.arrays import unsharded
from jaxgen.core.checks import debug_check, one_of, positive_int
from jaxgen.particles import fixed_point, sharded
from jaxgen.particles.fixed_point import prefix_sum
from jaxgen.particles.schemes import SCHEMES, killed, points_below
from jaxgen.particles.weights import check_log_weights, ess, log_mean_exp

__all__ = ["METHODS", "Resampled", "maybe_resample", "resample", "take"]

METHODS = (*SCHEMES, "killing")


def resample(
    key: jax.Array,
    log_weights: ArrayLike,
    *,
    method: str = "systematic",
    n: int | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Ancestors of ``n`` new particles; the expected count of particle ``i`` is ``n w_i / sum w``.

    Each share ``n w_i / sum w`` is held to float32's relative rounding and 2^-32 of a slot; sums of
    shares are exact. Ancestors are in rising order; ``"killing"`` instead leaves every surviving
    particle in its own slot, with ``n`` the number of weights.

    Args:
      key: a typed key; with ``axis_name`` the same on every device.
      log_weights: ``(N,)``, in any normalisation, -inf allowed; at most 2^24.
      method: ``multinomial stratified systematic residual ssp killing``.
      n: how many, ``N`` by default; at most 2^24.
      axis_name: inside ``shard_map`` or ``pmap``, the mapped axis over which particles are split in
        order. ``log_weights`` and the result are then the device's own share, ``N`` and ``n`` the
        numbers over all devices, and ancestors count over all devices.

    Returns:
      int32 ``(n,)``. Where all weights are zero, or one is NaN or +inf, every ancestor is ``N``,
      out of range, which ``take`` turns into NaN. ``checkify.checkify`` reports it.

    Raises:
      TypeError: integer log-weights, or a key that is not a typed key.
      ValueError: an unknown method, no particles, ``n`` below 1, sizes above 2^24, another ``n``
        than ``N`` with ``"killing"``, or an ``n`` that the devices do not divide.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> resample(jax.random.key(0), jnp.log(jnp.array([0.5, 0.0, 0.25, 0.25])))
      Array([0, 0, 2, 3], dtype=int32)
    """
    one_of("method", method, METHODS)
    keys.check(key)
    log_weights = check_log_weights(log_weights)
    split = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    total = log_weights.shape[0] * split
    n = total if n is None else positive_int("n", n)
    check_sizes(total, n, split, method)
    if axis_name is None:
        mapped = sharded.explicit_axis(log_weights)
        if mapped is not None and n % mapped[1] == 0:
            return jax.shard_map(
                lambda k, w: resample(k, w, method=method, n=n, axis_name=mapped[0]),
                in_specs=(jax.P(), jax.P(mapped[0])),
                out_specs=jax.P(mapped[0]),
                mesh=jax.typeof(log_weights).sharding.mesh,
            )(key, log_weights)
        log_weights = unsharded(log_weights)
    return _resample(key, log_weights, method=method, n=n, total=total, axis_name=axis_name)


@functools.partial(jax.jit, static_argnames=("method", "n", "total", "axis_name"), inline=True)
def _resample(
    key: jax.Array,
    log_weights: jax.Array,
    *,
    method: str,
    n: int,
    total: int,
    axis_name: str | None,
) -> jax.Array:
    weights, usable = relative_weights(log_weights, axis_name)
    debug_check(usable, "log_weights: all are -inf, or one is NaN or +inf")
    ends, start = fixed_point.cumulative(weights, n, axis_name)
    if method == "killing":
        ancestors = _killing(key, weights, ends, n, axis_name)
    else:
        counts = SCHEMES[method](key, ends, start, n, axis_name)
        ancestors = sharded.ancestors(counts, n, axis_name)
    return jnp.where(usable, ancestors, total)


def check_sizes(total: int, n: int, split: int, method: str) -> None:
    for name, size in (("log_weights has", total), ("n asks for", n)):
        if size > fixed_point.MAX_PARTICLES:
            raise ValueError(f"{name} {size} particles; expected at most 2^24")
    if method == "killing" and n != total:
        raise ValueError(f"n is {n} for {total} particles; killing keeps their number")
    if n % split:
        raise ValueError(f"n is {n}; expected a multiple of the {split} devices")


def relative_weights(log_weights: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
    """Weights whose largest is 1, and whether they can be resampled; if not, equal weights."""
    top = jnp.max(log_weights)
    wrong = jnp.any(jnp.isnan(log_weights))
    if axis_name is not None:
        top = jax.lax.pmax(jnp.where(wrong, -jnp.inf, top), axis_name)
        wrong = jax.lax.pmax(wrong.astype(jnp.int32), axis_name) > 0
    usable = jnp.isfinite(top) & ~wrong
    return jnp.where(usable, jnp.exp(log_weights - top), 1.0), usable


def _killing(
    key: jax.Array, weights: jax.Array, ends: fixed_point.Fixed, n: int, axis_name: str | None
) -> jax.Array:
    kill_key, draw_key = jax.random.split(key)
    if axis_name is not None:
        kill_key = jax.random.fold_in(kill_key, jax.lax.axis_index(axis_name))
    dead = killed(kill_key, weights)
    died = jnp.sum(dead, dtype=jnp.int32)
    if axis_name is not None:
        died = jax.lax.psum(died, axis_name)
    drawn = points_below(draw_key, ends, died, jnp.int32(n), n)
    if axis_name is not None:
        # Slots move between devices anyway, so survivors need not stay in theirs.
        counts, _, _ = fixed_point.running(
            fixed_point.Fixed((~dead).astype(jnp.int32), jnp.zeros_like(drawn, jnp.uint32)),
            axis_name,
        )
        return sharded.ancestors(drawn + counts.whole, n, axis_name)
    return killing_slots(dead, sharded.ancestors(drawn, n, None))


def killing_slots(dead: jax.Array, drawn: jax.Array) -> jax.Array:
    """Survivors in their own slots, ``drawn`` in the others in order."""
    rank = prefix_sum(dead.astype(jnp.int32)) - 1
    here = jnp.arange(dead.shape[0], dtype=jnp.int32)
    return jnp.where(dead, drawn.at[rank].get(mode="clip"), here)


def take(x: Any, ancestors: jax.Array) -> Any:
    """Particles of the given ancestors; NaN where an ancestor is out of range.

    Args:
      x: a pytree of arrays ``(N, *event)``; out of range gives a signed integer's
        lowest value and an unsigned one's highest.
      ancestors: int32 ``(n,)``.

    Returns:
      The same tree with arrays ``(n, *event)``.

    Raises:
      TypeError: ancestors that are not integers.
      ValueError: a leaf without a particle axis, or leaves of different lengths.

    Example:
      >>> import jax.numpy as jnp
      >>> take(jnp.array([1.0, 2.0]), jnp.array([1, 1, 2])).tolist()
      [2.0, 2.0, nan]
    """
    ancestors = jnp.asarray(ancestors)
    if not jnp.issubdtype(ancestors.dtype, jnp.integer):
        raise TypeError(f"ancestors has dtype {ancestors.dtype}; expected an integer dtype")
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(x)}
    if len(sizes) > 1 or () in sizes:
        raise ValueError(f"x has leaves with first axes {sorted(sizes)}; expected one common (N,)")

    def one(leaf: ArrayLike) -> jax.Array:
        leaf = jnp.asarray(leaf)
        out = jax.typeof(leaf).sharding if unsharded(leaf) is not leaf else None
        return unsharded(leaf).at[unsharded(ancestors)].get(mode="fill", out_sharding=out)

    return jax.tree.map(one, x)


class Resampled(NamedTuple):
    """Particles after a step that may have resampled them.

    Attributes:
      x: particles.
      log_weights: ``(N,)``; zeros after resampling.
      ancestors: int32 ``(N,)``; their own numbers where nothing was resampled.
      resampled: ``()`` bool.
      ess: ``()``, before.
      log_z_increment: ``()``, ``log_mean_exp`` of the weights that resampling used up, else 0.
    """

    x: Any
    log_weights: jax.Array
    ancestors: jax.Array
    resampled: jax.Array
    ess: jax.Array
    log_z_increment: jax.Array


def maybe_resample(
    key: jax.Array,
    x: Any,
    log_weights: ArrayLike,
    *,
    method: str = "systematic",
    threshold: float = 1.0,
    when: jax.Array | None = None,
    axis_name: str | None = None,
) -> Resampled:
    """Resample where the effective sample size has fallen below ``threshold`` times ``N``.

    Args:
      key: a typed key.
      x: particles, a pytree of arrays ``(N, *event)``.
      log_weights: ``(N,)``.
      method: a scheme of ``resample``.
      threshold: in (0, 1]; 1 resamples always.
      when: ``()`` bool that must hold too.
      axis_name: as in ``resample``; particles then move between devices.

    Weights that cannot be resampled (all -inf, or a NaN) count as fallen: the particles become NaN.

    Raises:
      TypeError: a traced threshold.
      ValueError: a threshold outside (0, 1], or particles of another number than weights.
    """
    if isinstance(threshold, jax.core.Tracer):
        raise TypeError("threshold is traced; expected a number known at trace time")
    if isinstance(threshold, bool) or not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold!r}; expected a number in (0, 1]")
    old = check_log_weights(log_weights)
    n = old.shape[0]
    for leaf in jax.tree.leaves(x):
        if jnp.shape(leaf)[:1] != (n,):
            raise ValueError(f"x has a leaf of shape {jnp.shape(leaf)} for {n} log-weights")
    size = ess(old, axis_name=axis_name)
    split = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    first = 0 if axis_name is None else n * jax.lax.axis_index(axis_name)
    # Zeros of the weights' own sharding, which those made within a branch have not.
    zeros, here = jnp.zeros_like(old), jnp.zeros_like(old, jnp.int32)

    def yes(_: None) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
        ancestors = resample(key, old, method=method, axis_name=axis_name)
        moved = (
            take(x, ancestors) if axis_name is None else sharded.exchange(x, ancestors, axis_name)
        )
        gain = log_mean_exp(old, axis_name=axis_name)
        return moved, zeros, ancestors, gain

    def no(_: None) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
        stay = jnp.arange(n, dtype=jnp.int32) + first + here
        return x, old, stay, jnp.zeros_like(size)

    if threshold == 1 and when is None:
        x, new, ancestors, gain = yes(None)
        return Resampled(x, new, ancestors, jnp.asarray(True), size, gain)
    # Not "below": a NaN size must resample, which turns the particles into NaN.
    fallen = jnp.asarray(True) if threshold == 1 else ~(size >= threshold * n * split)
    if when is not None:
        fallen = fallen & when
    x, new, ancestors, gain = jax.lax.cond(fallen, yes, no, None)
    return Resampled(x, new, ancestors, fallen, size, gain)
