r"""Losses of absorbing discrete diffusion: four estimators of one bound on -log p(x0).

A network c gives, for every masked position i of x, the conditional c(v | unmasked tokens of x) of
clean data. Per sequence of length l, with sums over the masked positions of x (Ou et al., arXiv
2406.03736, equations 3.5, 3.8, 3.9 and section 3.3):

- t_dse: t ~ U(t_min, 1), x = x_t: sigma(t) sum_i [r sum_v c_v - r log(r c(x0^i)) + r (log r - 1)],
  r = 1 / (exp(sb) - 1): denoising score entropy;
- t_dce: the same t: sigma(t) r sum_i -log c(x0^i): denoising cross-entropy, equal to t_dse point by
  point where c is normalised;
- lambda_dce: lam ~ U(0, 1), each token masked with probability lam: (1/lam) sum_i -log c(x0^i);
- k_dce: k ~ U{1 .. l}, a uniform set of k tokens masked: (l/k) sum_i -log c(x0^i): any-order
  autoregression.

The last two have the same expectation, an upper bound on -log p(x0), exact for exact conditionals.
The first two integrate lam from lam(t_min) to lam(1) only, and so leave out a little of it. Of all
but k_dce the variance grows as log(1/lam) of the smallest level drawn: measure by k_dce.

The levels are drawn per example, or spread evenly over a batch of n: ``"stratified"``, u_i =
(u + i/n) mod 1 with one u (Kingma et al., arXiv 2107.00630, appendix I.1), of which each is still
uniform; or ``"decoupled"``, (u_i + i)/n, where example i keeps to its own nth of the levels, so
that only the batch's mean is unbiased.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import at_least_f32, batch_event, left_broadcast, varying_zeros
from jaxgen.process.absorbing import (
    Absorbing,
    check_tokens,
    mask_tokens_k,
    mask_tokens_lambda,
)
from jaxgen.score.times import stratify

__all__ = ["DRAWS", "LOSSES", "aoarm_nll", "log_conditionals", "radd_loss", "radd_score"]

LOSSES = ("t_dse", "t_dce", "lambda_dce", "k_dce")
DRAWS = ("independent", "stratified", "decoupled")

# Levels are cut here: next to no token is masked below, and at 0 the weight 1/lam is infinite.
_LEAST = 1e-6

Conditionals = Callable[..., jax.Array]


def log_conditionals(
    field: Conditionals,
    process: Absorbing,
    x: jax.Array,
    lam: ArrayLike | None = None,
) -> jax.Array:
    """Log-probabilities of the real tokens at every position, by a network's logits.

    Args:
      field: maps ids like ``x`` to logits ``(*x.shape, V)``, or ``(*x.shape, V + 1)`` whose last,
        the mask's, is dropped; log-probabilities are logits too. Called as ``field(x)``, or as
        ``field(x, lam)`` where ``lam`` is given.
      process: whose vocabulary it is.
      x: int32 ids in [0, V], ``(n, l)`` or ``(l,)``.
      lam: share of masked tokens, for a network that wants it, ``()`` or ``(n,)``.

    Returns:
      ``(*x.shape, V)``, float32 or wider; NaN for a position with a logit of NaN or ``inf``, or
      with none that is finite.

    Raises:
      ValueError: logits of another shape. TypeError: logits that are not real floating.
    """
    level = () if lam is None else (jnp.broadcast_to(jnp.asarray(lam), x.shape[:-1]),)
    logits = checks.floating("field(x)", field(x, *level))
    size = process.vocabulary
    if logits.shape not in ((*x.shape, size), (*x.shape, size + 1)):
        raise ValueError(
            f"field(x) returned shape {logits.shape} for x of shape {x.shape}; expected "
            f"{(*x.shape, size)}, or one more for the mask"
        )
    wide = logits[..., :size].astype(at_least_f32(logits.dtype))
    log_cond = jax.nn.log_softmax(wide, axis=-1)
    checks.debug_check(~jnp.any(jnp.isnan(log_cond)), "field(x) returned logits that are no number")
    return log_cond


def _levels(key: jax.Array, batch: tuple[int, ...], draws: str) -> tuple[jax.Array, jax.Array]:
    """Uniform numbers ``batch``, and the key for the masks."""
    key_level, key_mask = jax.random.split(keys.check(key))
    if draws == "stratified":
        return stratify(key_level, batch), key_mask
    u = keys.map_batch(jax.random.uniform, key_level, batch)
    if draws == "decoupled" and batch:
        place, n = keys.places(batch[0])
        u = (u + place.astype(u.dtype)) / n
    return u, key_mask


def radd_loss(
    key: jax.Array,
    field: Conditionals,
    process: Absorbing,
    x0: ArrayLike,
    *,
    kind: str = "lambda_dce",
    draws: str = "independent",
    takes_level: bool = False,
    t_min: ArrayLike | None = None,
    event_ndim: int | None = None,
) -> jax.Array:
    """One of the four losses (module docstring), in nats per sequence.

    Args:
      key: typed key; its levels and its masks draw per example from ``fold_in``. Other ``draws``
        than ``"independent"`` tie the examples of a batch together.
      field: logits of clean tokens, see ``log_conditionals``.
      process: the process; ``lambda_dce`` and ``k_dce`` use its vocabulary alone.
      x0: integer ids in [0, V), ``(n, l)``, or ``(l,)`` with ``event_ndim=1``.
      kind: ``"t_dse"``, ``"t_dce"``, ``"lambda_dce"`` or ``"k_dce"``.
      draws: ``"independent"``, ``"stratified"`` or ``"decoupled"``.
      takes_level: call ``field(x, lam)`` with the expected share of masked tokens, ``(n,)`` or
        ``()``: for a network conditioned on time.
      t_min: first time of the first two losses, ``process.t_min`` if ``None``.
      event_ndim: see above.

    Returns:
      ``(n,)`` or ``()``, float32 or wider; NaN for a sequence with an id out of range (an error
      under checkify). Perplexity is ``exp(loss / l)``.

    Raises:
      ValueError: an unknown name, a wrong shape, or a concrete id out of range, the mask included.
      TypeError: a raw key, ids that are not integer, logits that are not floating.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxgen.process.absorbing import absorbing
      >>> x0 = jnp.zeros((4, 8), jnp.int32)
      >>> uniform = lambda x: jnp.zeros((*x.shape, 2))
      >>> losses = radd_loss(jax.random.key(0), uniform, absorbing(2), x0, kind="k_dce")
      >>> [round(float(loss / jnp.log(2)), 3) for loss in losses]  # a bit for each token
      [8.0, 8.0, 8.0, 8.0]
    """
    checks.one_of("kind", kind, LOSSES)
    checks.one_of("draws", draws, DRAWS)
    batch = batch_event(x0 if isinstance(x0, jax.Array) else jnp.asarray(x0), event_ndim)[0]
    u, key_mask = _levels(key, batch, draws)
    if kind == "k_dce":
        length = jnp.shape(x0)[-1]
        k = jnp.clip(jnp.floor(u * length).astype(jnp.int32) + 1, 1, length)
        x = mask_tokens_k(key_mask, process, x0, k, event_ndim=event_ndim)
        lam = k / length
        weight = length / k
    else:
        if kind == "lambda_dce":
            lam = jnp.clip(u, _LEAST, 1.0)
            weight = 1 / lam
        else:
            first = jnp.asarray(process.t_min if t_min is None else t_min)
            t = first * (1 - u) + u
            lam = process.mask_probability(t)
            # The integral over time, not its mean over (t_min, 1).
            weight = (1 - first) * process.reverse_rate(t)
        x = mask_tokens_lambda(key_mask, process, x0, lam, event_ndim=event_ndim)
    x0, fits = check_tokens("x0", x0, process.vocabulary - 1)
    log_cond = log_conditionals(field, process, x, lam if takes_level else None)
    index = jnp.clip(x0, 0, process.vocabulary - 1)[..., None]
    losses = -jnp.take_along_axis(log_cond, index, axis=-1)[..., 0]
    if kind == "t_dse":
        # log r cancels; what is left beside the cross-entropy is how far c is from normalised.
        losses = losses + jnp.sum(jnp.exp(log_cond), axis=-1) - 1
    is_masked = x == process.mask
    # Selected, not multiplied: an unmasked token may have a logit of any kind.
    total = jnp.sum(jnp.where(is_masked, losses, 0), axis=-1)
    # Near lam = 0 nothing is masked, and a weight that overflows must not meet that zero.
    weight = jnp.where(jnp.any(is_masked, axis=-1), weight, 1).astype(total.dtype)
    return jnp.where(fits & ~jnp.isnan(lam), weight * total, jnp.nan)


def aoarm_nll(
    field: Conditionals,
    process: Absorbing,
    x0: ArrayLike,
    order: ArrayLike,
    *,
    takes_level: bool = False,
    event_ndim: int | None = None,
) -> jax.Array:
    """Negative log-likelihood of sequences written one token at a time in a given order.

    The mean over orders is the expectation of ``k_dce`` and ``lambda_dce``; each order is a model
    of its own, whose likelihood this is exactly. Costs l evaluations.

    Args:
      field: logits of clean tokens, see ``log_conditionals``.
      process: whose vocabulary it is.
      x0: integer ids in [0, V), ``(n, l)``, or ``(l,)`` with ``event_ndim=1``.
      order: positions in the order of their writing, a permutation of 0 .. l - 1, ``(l,)``, or
        ``(n, l)`` with one for each sequence.
      takes_level: see ``radd_loss``; here the share of tokens that are masked.
      event_ndim: see above.

    Returns:
      Nats, ``(n,)`` or ``()``, float32 or wider; NaN for an id out of range, or for an order that
      is no permutation (errors under checkify).

    Raises:
      ValueError: a wrong shape, a concrete order that is no permutation or id out of range.
      TypeError: ids or an order that are not integer.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxgen.process.absorbing import absorbing
      >>> uniform = lambda x: jnp.zeros((*x.shape, 2))
      >>> loss = aoarm_nll(uniform, absorbing(2), jnp.array([[0, 1, 1]]), jnp.array([2, 0, 1]))
      >>> round(float(loss[0] / jnp.log(2)), 3)
      3.0
    """
    x0, fits = check_tokens("x0", x0, process.vocabulary - 1)
    batch = batch_event(x0, event_ndim)[0]
    rank, is_order = written_at(order, x0.shape)
    length = x0.shape[-1]
    index = jnp.clip(x0, 0, process.vocabulary - 1)[..., None]

    def write(total: jax.Array, j: jax.Array) -> tuple[jax.Array, None]:
        x = jnp.where(rank >= j, process.mask, x0)
        lam = jnp.broadcast_to((length - j) / length, batch)
        log_cond = log_conditionals(field, process, x, lam if takes_level else None)
        own = jnp.take_along_axis(log_cond, index, axis=-1)[..., 0]
        return total - jnp.sum(jnp.where(rank == j, own, 0), axis=-1), None

    start = jax.eval_shape(write, jnp.zeros(batch), jnp.int32(0))[0]
    total, _ = jax.lax.scan(write, varying_zeros(batch, start.dtype, x0), jnp.arange(length))
    return jnp.where(fits & is_order, total, jnp.nan)


def written_at(order: Any, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """When each position is written, of shape ``shape``, and whether ``order`` is a permutation.

    Raises:
      ValueError: a shape that does not fit, or a concrete order that is no permutation.
      TypeError: an order that is not integer.
    """
    array = jnp.asarray(order)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"order has dtype {array.dtype}; expected integer positions")
    length = shape[-1]
    if array.shape not in ((length,), shape):
        raise ValueError(f"order has shape {array.shape}; expected {(length,)} or {shape}")
    fine = jnp.all(jnp.sort(array, axis=-1) == left_of(jnp.arange(length), array), axis=-1)
    known = checks.concrete(fine)
    if known is not None and not known.all():
        raise ValueError(f"order is no permutation of the positions 0 to {length - 1}")
    checks.debug_check(jnp.all(fine), "order is no permutation: {order}", order=array)
    rank = jnp.broadcast_to(jnp.argsort(array, axis=-1), shape)
    return rank, jnp.broadcast_to(fine, shape[:-1])


def left_of(row: jax.Array, x: jax.Array) -> jax.Array:
    """``row`` ``(l,)`` with ones in front, to broadcast against ``x``."""
    return row.reshape((1,) * (x.ndim - 1) + row.shape)


def radd_score(log_cond: ArrayLike, total: ArrayLike) -> jax.Array:
    """The concrete score p_t(y)/p_t(x) of masked positions, from conditionals of clean data.

    Args:
      log_cond: log-conditionals, ``(n, l, V)``, or ``(l, V)``.
      total: total noise sb(t) > 0, ``()`` or ``(n,)``; see ``Absorbing.total``.

    Returns:
      Like ``log_cond``, float32 or wider: exp(-sb) / (1 - exp(-sb)) c (Ou et al., theorem 1).

    Example:
      >>> import jax.numpy as jnp
      >>> radd_score(jnp.log(jnp.array([[0.25, 0.75]])), jnp.log(2.0)).tolist()
      [[0.25, 0.75]]
    """
    log_cond = checks.floating("log_cond", log_cond)
    wide = log_cond.astype(at_least_f32(log_cond.dtype))
    total = jnp.asarray(total)
    checks.debug_check(jnp.all(total > 0), "total is not positive: {total}", total=total)
    factor = jnp.where(total > 0, 1 / jnp.expm1(total), jnp.nan)
    return left_broadcast(factor, wide).astype(wide.dtype) * jnp.exp(wide)
