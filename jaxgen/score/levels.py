r"""Noise levels as classes: their grid, and the loss of a classifier that reads them off a state.

With x = x0 + sigma_k z and k uniform over a grid of levels, the minimiser of the cross-entropy

    E[-log softmax(logits(x))_k]                                                            (1)

is the posterior p(k | x) ~ p_{sigma_k}(x) (Kim and Ye, ICML 2023, arXiv 2209.14593).
``ClosedForm.level_log_prob`` under ``process.edm`` is that posterior for mixtures. For a process
with a signal coefficient the level is sigma/alpha and the state x/alpha, so one classifier serves
all.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import at_least_f32, batch_event, left_broadcast

__all__ = ["check_levels", "level_classification_loss", "levels"]


def levels(
    sigma_min: ArrayLike, sigma_max: ArrayLike, n: int = 1000, *, last: float = 1e-3
) -> jax.Array:
    """The published grid ``sigma_min (sigma_max/sigma_min)^e``, ``e`` from 1 down to ``last``.

    Args:
      sigma_min: where the exponent is 0.
      sigma_max: highest level, index 0.
      n: number of levels, at least 2.
      last: exponent of the lowest level, in [0, 1): as published the lowest is not ``sigma_min``.

    Returns:
      ``(n,)``, strictly falling, float32 or wider.

    Raises:
      ValueError: not ``0 < sigma_min < sigma_max``, ``n < 2``, or ``last`` out of range.

    Example:
      >>> [round(float(s), 3) for s in levels(0.01, 50.0, 3, last=0.0)]
      [50.0, 0.707, 0.01]
    """
    n = checks.positive_int("n", n, least=2)
    low, high = checks.concrete(sigma_min), checks.concrete(sigma_max)
    if low is not None and high is not None and not 0 < low < high < np.inf:
        raise ValueError(
            f"sigma_min is {sigma_min} and sigma_max {sigma_max}; expected 0 < sigma_min < "
            "sigma_max"
        )
    if not 0 <= last < 1:
        raise ValueError(f"last is {last}; expected an exponent in [0, 1)")
    dtype = at_least_f32(jnp.result_type(sigma_min, sigma_max, float))
    log_low, log_high = (jnp.log(jnp.asarray(v, dtype)) for v in (sigma_min, sigma_max))
    share = jnp.linspace(1.0, last, n, dtype=dtype)
    return jnp.exp(log_low * (1 - share) + log_high * share)


def check_levels(levels: ArrayLike) -> jax.Array:
    """A grid of levels ``(n,)``, ``n >= 2``, in float32 or wider.

    Raises:
      ValueError: another shape, or levels that do not fall or are not positive. Traced ones become
        NaN, and an error under ``checkify``.
      TypeError: not floating.
    """
    array = checks.floating("levels", levels)
    if array.ndim != 1 or array.shape[0] < 2:
        raise ValueError(f"levels has shape {array.shape}; expected (n,) with n >= 2")
    array = array.astype(at_least_f32(array.dtype))
    known = checks.concrete(levels)
    if known is None:
        falls = jnp.all(jnp.diff(array) < 0) & (array[-1] > 0) & jnp.isfinite(array[0])
        checks.debug_check(falls, "levels do not fall or are not positive: {v}", v=array)
        return jnp.where(falls, array, jnp.nan)
    if not ((np.diff(known) < 0).all() and known[-1] > 0 and np.isfinite(known[0])):
        raise ValueError(f"levels is {known}; expected strictly falling positive numbers")
    return array


def level_classification_loss(
    key: jax.Array,
    logits_fn: Callable[[jax.Array], jax.Array],
    x0: ArrayLike,
    levels: ArrayLike,
    *,
    event_ndim: int | None = None,
) -> jax.Array:
    """Cross-entropy of a noise-level classifier, equation (1), per example.

    Draws a level and a noise for each example.

    Args:
      key: typed key; example ``i`` of a batch uses ``fold_in(key, i)``.
      logits_fn: maps ``x0 + sigma z`` of ``x0``'s shape to logits ``(batch, n)``, or ``(n,)`` for
        one example.
      x0: data ``(batch, *event)``, floating.
      levels: noise levels ``(n,)``, strictly falling; see ``levels``.
      event_ndim: ``x0.ndim`` if ``x0`` is one example.

    Returns:
      Losses ``(batch,)`` or ``()`` in nats, float32 or wider; ``log(n)`` for equal logits.

    Raises:
      ValueError: levels of another shape, that do not fall or are not positive; logits of another
        shape.
      TypeError: a raw key, or integer data.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> grid, x0 = jnp.array([1.0, 0.1]), jnp.zeros((4, 3))
      >>> loss = level_classification_loss(jax.random.key(0), lambda x: jnp.zeros((4, 2)), x0, grid)
      >>> [round(float(v), 3) for v in loss]
      [0.693, 0.693, 0.693, 0.693]
    """
    x0, grid = checks.floating("x0", x0), check_levels(levels)
    batch, event = batch_event(x0, event_ndim)
    n, wide = grid.shape[0], at_least_f32(x0.dtype)

    def draw(k: jax.Array) -> tuple[jax.Array, jax.Array]:
        key_level, key_noise = jax.random.split(k)
        level = jax.random.randint(key_level, (), 0, n)
        return level, jax.random.normal(key_noise, event, wide)

    level, noise = keys.map_batch(draw, key, batch)
    sigma = grid.at[level].get(mode="promise_in_bounds").astype(wide)
    x = (x0.astype(wide) + left_broadcast(sigma, noise) * noise).astype(x0.dtype)
    logits = jnp.asarray(logits_fn(x))
    if logits.shape != (*batch, n):
        raise ValueError(
            f"logits_fn(x) returned shape {logits.shape} for x of shape {x.shape} and {n} levels; "
            f"expected {(*batch, n)}"
        )
    log_probs = jax.nn.log_softmax(logits.astype(at_least_f32(logits.dtype)), axis=-1)
    return -jnp.take_along_axis(log_probs, level[..., None], axis=-1, mode="fill")[..., 0]
