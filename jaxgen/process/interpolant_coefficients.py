r"""Coefficients of the named interpolants: functions of time, elementwise on [0, 1].

The table stands in ``interpolant`` (Albergo, Boffi and Vanden-Eijnden, arXiv 2303.08797, section
4). Each takes the interpolant's parameters after ``t``; the gammas have one, their scale ``a``.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["GAMMAS", "INTERPOLANTS", "OnSphere", "circle2"]

_elementwise = functools.partial(jax.jit, inline=True)

_HALF_PI = 0.5 * math.pi


@_elementwise
def _brownian2(t, a):
    return a * t * (1 - t)


@_elementwise
def _quadratic(t, a):
    return jnp.sqrt(a) * t * (1 - t)


@_elementwise
def _quadratic2(t, a):
    return a * (t * (1 - t)) ** 2


@_elementwise
def _sine_squared(t, a):
    # The sine of the smaller of t and 1 - t: float32 has no exact pi.
    return jnp.sqrt(a) * jnp.sin(math.pi * jnp.where(t > 0.5, 1 - t, t)) ** 2


@_elementwise
def _sine_squared2(t, a):
    return a * jnp.sin(math.pi * jnp.where(t > 0.5, 1 - t, t)) ** 4


# Each gamma as (gamma^2, gamma where it is smooth, largest gamma^2 for a = 1).
GAMMAS: dict[str, tuple[Any, Any, float]] = {
    "brownian": (_brownian2, None, 0.25),
    "quadratic": (_quadratic2, _quadratic, 0.0625),
    "sine_squared": (_sine_squared2, _sine_squared, 1.0),
    "zero": (None, None, 0.0),
}


@_elementwise
def _falling(t, *params):
    del params
    return 1 - t


@_elementwise
def _rising(t, *params):
    del params
    return t


@_elementwise
def _nothing(t, *params):
    del params
    return jnp.zeros_like(t)


@_elementwise
def _one(t, *params):
    del params
    return jnp.ones_like(t)


@_elementwise
def _cosine(t, *params):
    del params
    # The sine of the complement keeps relative accuracy where the cosine vanishes.
    return jnp.sin(_HALF_PI * (1 - t))


@_elementwise
def _sine(t, *params):
    del params
    return jnp.sin(_HALF_PI * t)


@_elementwise
def _encode(t, *params):
    del params
    return jnp.where(t < 0.5, jnp.cos(math.pi * t) ** 2, 0.0)


@_elementwise
def _decode(t, *params):
    del params
    return jnp.where(t > 0.5, jnp.cos(math.pi * (1 - t)) ** 2, 0.0)


@_elementwise
def _circle(t, *params):
    del params
    # Its derivative at t = 1 is infinite, and to be seen.
    return jnp.sqrt((1 - t) * (1 + t))


@_elementwise
def circle2(t, *params):
    """Square of the ``score_based`` alpha, smooth where alpha is not."""
    del params
    return (1 - t) * (1 + t)


@dataclasses.dataclass(frozen=True)
class OnSphere:
    """A coefficient of the trig kind, ``curve(t) sqrt(1 - gamma^2)``; NaN where gamma exceeds 1."""

    curve: Callable[..., jax.Array]
    gamma2_fn: Callable[..., jax.Array] | None

    def __call__(self, t: jax.Array, *params: Any) -> jax.Array:
        """The coefficient at ``t``, of its shape; ``params`` are those of ``gamma2_fn``."""
        if self.gamma2_fn is None:
            return self.curve(t)
        return self.curve(t) * jnp.sqrt(1 - self.gamma2_fn(t, *params))


# Each kind as (alpha, beta, gamma unless given).
INTERPOLANTS: dict[str, tuple[Any, Any, str]] = {
    "linear": (_falling, _rising, "brownian"),
    "trig": (_cosine, _sine, "brownian"),
    "encoder_decoder": (_encode, _decode, "sine_squared"),
    "mirror": (_nothing, _one, "brownian"),
    "one_sided_linear": (_falling, _rising, "zero"),
    "one_sided_trig": (_cosine, _sine, "zero"),
    "score_based": (_circle, _rising, "zero"),
}
