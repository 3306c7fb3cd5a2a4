r"""Guidance by a noise-conditional classifier (Song et al., arXiv 2011.13456, section 5, (14)).

    score(x, t | y) = score(x, t) + grad_x log p_t(y | x)                                   (1)

Every other prediction kind is affine in the score at a given state, so that (1) adds to it the
kind's linear part: ``-sigma grad`` to the noise, ``sigma^2 grad/alpha`` to the data, and so on.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import checks
from jaxgen.core.arrays import at_least_f32, left_broadcast
from jaxgen.process.linear import LinearSDE
from jaxgen.score.prediction import PREDICTIONS, Field, convert

__all__ = ["class_conditional"]


def _gradient(log_prob_y: Callable[..., jax.Array], x: jax.Array, t: jax.Array) -> jax.Array:
    """``grad_x log p_t(y | x)`` of each example, from one pull-back of ones."""
    value, pull = jax.vjp(lambda state: jnp.asarray(log_prob_y(state, t)), x)
    if value.shape != t.shape:
        raise ValueError(
            f"log_prob_y(x, t) returned shape {value.shape} for x of shape {x.shape}; expected "
            f"{t.shape}, one log-probability per example (not their sum)"
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"log_prob_y(x, t) returned dtype {value.dtype}; expected a real floating dtype"
        )
    return pull(jnp.ones_like(value))[0]


def class_conditional(
    field: Field,
    log_prob_y: Callable[[jax.Array, jax.Array], jax.Array],
    sde: LinearSDE,
    *,
    prediction: str = "noise",
    scale: ArrayLike = 1.0,
) -> Field:
    """A field of ``p_t(x | y)`` from one of ``p_t(x)`` and a classifier, equation (1).

    Args:
      field: ``f(x, t) -> like x``, unconditional.
      log_prob_y: ``(x, t) -> log p_t(y | x)`` in nats at the label wanted: ``(batch,)`` for a
        batch, ``()`` for one example. Example ``i`` may depend on ``x[i]`` and ``t[i]`` alone (no
        batch statistics), or the gradient of one example would reach into another. Labels per
        example may be closed over where the field is called on whole batches; adaptive solves and
        likelihoods call it on batches of one, so ``vmap`` those over single examples instead.
      sde: the process; its times are the classifier's noise levels.
      prediction: what the field predicts, one of ``score.PREDICTIONS``; the result predicts the
        same.
      scale: factor of the gradient, ``()`` or ``(batch,)``; 1 is Bayes' rule, more sharpens.

    Returns:
      A field of the same kind, called with ``t`` of shape ``(batch,)``, or ``()`` for one example.
      Its result is like ``x``; the sum is in float32 or wider.

    Raises:
      ValueError: an unknown ``prediction``; when called, a classifier's output of another shape.
      TypeError: when called, an output that is not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxgen import process
      >>> guided = class_conditional(
      ...     lambda x, t: 0 * x, lambda x, t: 3 * x[:, 0], process.edm(), prediction="score")
      >>> guided(jnp.ones((1, 2)), jnp.ones(1)).tolist()
      [[3.0, 0.0]]
    """
    checks.one_of("prediction", prediction, PREDICTIONS)

    def guided(x: jax.Array, t: jax.Array) -> jax.Array:
        x = checks.floating("x", x)
        t = jnp.asarray(t)
        value = checks.cast_field_output(field(x, t), x)
        wide = at_least_f32(x.dtype)
        gradient = _gradient(log_prob_y, x, t).astype(wide)
        gradient = left_broadcast(jnp.asarray(scale, wide), x) * gradient
        plain = dataclasses.replace(sde, mu=None)
        added = convert(gradient, jnp.zeros_like(gradient), t, plain, "score", prediction)
        return (value.astype(wide) + added).astype(x.dtype)

    return guided
