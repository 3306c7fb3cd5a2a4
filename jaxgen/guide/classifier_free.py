r"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598, equation (6)).

From a conditional and an unconditional prediction of the same kind,

    guided = unconditional + scale (conditional - unconditional)                            (1)

so ``scale`` 0 is the unconditional field, 1 the conditional one, and above 1 the condition is
pressed. The paper's strength is ``w = scale - 1``, (1 + w) conditional - w unconditional. The
weights sum to one and every prediction kind is affine in every other at a given state, so (1) means
the same for all of them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgen.core import checks
from jaxgen.core.arrays import at_least_f32, left_broadcast
from jaxgen.score.prediction import Field

__all__ = ["classifier_free", "classifier_free_labels"]


def _check_scale(scale: ArrayLike) -> None:
    known = checks.concrete(scale)
    if known is None:
        return
    if known.ndim > 1 or not np.all(np.isfinite(np.asarray(known, np.float64))):
        raise ValueError(f"scale is {scale!r}; expected finite numbers of shape () or (batch,)")


def _combine(
    conditional: jax.Array, unconditional: jax.Array, x: jax.Array, scale: ArrayLike
) -> jax.Array:
    wide = jnp.promote_types(x.dtype, at_least_f32(x.dtype))
    base = unconditional.astype(wide)
    weight = left_broadcast(jnp.asarray(scale, at_least_f32(x.dtype)), x)
    return (base + weight * (conditional.astype(wide) - base)).astype(x.dtype)


def classifier_free(field: Field, unconditional: Field, scale: ArrayLike) -> Field:
    """A guided field from a conditional and an unconditional one, equation (1).

    Args:
      field: ``f(x, t) -> like x``, conditional (its condition closed over).
      unconditional: the same kind of prediction without the condition.
      scale: 0 unconditional, 1 conditional, above 1 pressed (module docstring); ``()`` or
        ``(batch,)``.

    Returns:
      A field of the same prediction kind; each call evaluates both fields once. The sum is in
      float32 or wider, the result like ``x``.

    Raises:
      ValueError: ``scale`` not finite or of more than one axis (where known); when called, an
        output of another shape than ``x``.

    Example:
      >>> import jax.numpy as jnp
      >>> guided = classifier_free(lambda x, t: x, lambda x, t: 0 * x, 3.0)
      >>> guided(jnp.ones((1, 2)), jnp.ones(1)).tolist()
      [[3.0, 3.0]]
    """
    _check_scale(scale)

    def guided(x: jax.Array, t: jax.Array) -> jax.Array:
        x = checks.floating("x", x, allow_complex=True)
        conditional = checks.cast_field_output(field(x, t), x)
        other = checks.cast_field_output(unconditional(x, t), x, "unconditional")
        return _combine(conditional, other, x, scale)

    return guided


def classifier_free_labels(
    net: Callable[[jax.Array, jax.Array, Any], jax.Array],
    y: ArrayLike,
    null: ArrayLike,
    scale: ArrayLike,
) -> Field:
    """A guided field from one network of labels, both halves in one call, equation (1).

    Args:
      net: ``(x, t, y) -> like x`` for a batch, with labels ``(batch, *label)``.
      y: labels wanted, ``(batch, *label)`` or one ``(*label,)`` for every example.
      null: the label that means no condition, ``(*label,)``.
      scale: see ``classifier_free``.

    Returns:
      A field of batches, ``t`` of shape ``(batch,)`` or ``()``; a call evaluates ``net`` once, on
      twice the batch.

    Raises:
      ValueError: as ``classifier_free``; when called, labels that fit neither one nor the batch.
    """
    _check_scale(scale)
    null = jnp.asarray(null)
    labels = jnp.asarray(y, null.dtype)

    def guided(x: jax.Array, t: jax.Array) -> jax.Array:
        x = checks.floating("x", x, allow_complex=True)
        shape = (x.shape[0], *null.shape)
        if labels.shape not in (null.shape, shape):
            raise ValueError(f"y has shape {labels.shape}; expected {null.shape} or {shape}")
        own = labels if labels.ndim > null.ndim else labels[None]
        both = jnp.concatenate(
            [jnp.broadcast_to(own, shape), jnp.broadcast_to(null[None], shape)], axis=0
        )
        t = checks.field_time(t, x)
        twice = jnp.concatenate([x, x], axis=0)
        out = checks.cast_field_output(net(twice, jnp.concatenate([t, t]), both), twice, "net")
        conditional, unconditional = jnp.split(out, 2, axis=0)
        return _combine(conditional, unconditional, x, scale)

    return guided
