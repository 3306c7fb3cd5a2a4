r"""What a network may predict, and the way from each kind to every other.

With x' = x - mu and x0' = x0 - mu, a state on the path of data x0 and noise n is

    x' = alpha x0' + sigma n                                                                (1)

and the kinds are, with dots for time derivatives,

    noise n,   data x0,   score = -n/sigma,
    v = alpha n - sigma x0'             (Salimans and Ho, arXiv 2202.00512, section 4)
    velocity = alpha_dot x0' + sigma_dot n    (the probability-flow velocity)               (2)

A conversion solves (1) and the source's definition for (x0', n) and evaluates the target's. Where
a kind is undefined at an end of time (noise or score where sigma = 0, data from noise where alpha =
0) the result is NaN or infinite, never a plausible number. Time runs from data to noise.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import checks
from jaxgen.core.arrays import left_broadcast
from jaxgen.process.linear import LinearSDE, Rates

__all__ = ["PREDICTIONS", "Field", "convert", "from_flow", "from_parts", "per_example"]

Field = Callable[[jax.Array, jax.Array], jax.Array]

PREDICTIONS = ("score", "noise", "data", "v", "velocity")


def _data_and_noise(
    source: str, value: jax.Array, x: jax.Array, r: Rates
) -> tuple[jax.Array, jax.Array]:
    """Solve for ``(x0', n)``; ``x`` is already centred, the data kind too."""
    if source == "noise":
        return (x - r.sigma * value) / r.alpha, value
    if source == "data":
        return value, (x - r.alpha * value) / r.sigma
    if source == "score":
        noise = -r.sigma * value
        return (x - r.sigma * noise) / r.alpha, noise
    if source == "v":
        square = r.alpha**2 + r.sigma**2
        return (r.alpha * x - r.sigma * value) / square, (r.sigma * x + r.alpha * value) / square
    determinant = r.alpha * r.sigma_dot - r.alpha_dot * r.sigma
    data = (r.sigma_dot * x - r.sigma * value) / determinant
    return data, (r.alpha * value - r.alpha_dot * x) / determinant


def from_parts(target: str, data: jax.Array, noise: jax.Array, r: Rates) -> jax.Array:
    """A kind's value from centred data and noise; the rates already broadcast.

    Args:
      target: one of ``PREDICTIONS``.
      data: ``x0 - mu``.
      noise: ``n`` of equation (1).
      r: coefficients that broadcast against both.
    """
    if target == "noise":
        return noise
    if target == "data":
        return data
    if target == "score":
        return -noise / r.sigma
    if target == "v":
        return r.alpha * noise - r.sigma * data
    return r.alpha_dot * data + r.sigma_dot * noise


def convert(
    value: ArrayLike, x: ArrayLike, t: ArrayLike, sde: LinearSDE, source: str, target: str
) -> jax.Array:
    """Turn one kind of prediction into another.

    Args:
      value: the prediction, of ``x``'s shape.
      x: the noisy state, ``(batch, *event)`` or one example.
      t: times, ``()`` or ``(batch,)``.
      sde: the process.
      source: what ``value`` is, one of ``"score" "noise" "data" "v" "velocity"``.
      target: what is wanted, one of the same.

    Returns:
      The other kind, in ``x``'s shape and dtype; computed in float32 or wider. NaN or infinite
      where the kind is undefined (module docstring).

    Raises:
      ValueError: an unknown kind, or ``value`` of another shape than ``x``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxgen import process
      >>> x = jnp.ones((2, 3))
      >>> float(convert(x, x, 0.5, process.rectified(), "noise", "data")[0, 0])  # (1 - 0.5) / 0.5
      1.0
    """
    checks.one_of("source", source, PREDICTIONS)
    checks.one_of("target", target, PREDICTIONS)
    x = checks.floating("x", x, allow_complex=True)
    value = checks.cast_field_output(value, x, "value")
    if source == target:
        return value
    wide = jnp.promote_types(x.dtype, jnp.float32)
    r = Rates(*(left_broadcast(c, x) for c in sde.rates(t)))
    mu = sde.centre(x)
    centred, given = x.astype(wide), value.astype(wide)
    if mu is not None:
        centred = centred - mu
        given = given - mu if source == "data" else given
    data, noise = _data_and_noise(source, given, centred, r)
    out = from_parts(target, data, noise, r)
    if mu is not None and target == "data":
        out = out + mu
    return out.astype(x.dtype)


def per_example(field: Field) -> Field:
    """Lift a field of one example, ``f(x, t)`` with ``t`` of shape ``()``, to a batch.

    Args:
      field: maps one example and its time.

    Returns:
      A field of ``x`` of shape ``(batch, *event)`` and ``t`` of shape ``(batch,)`` or ``()``.
    """

    def batched(x: jax.Array, t: jax.Array) -> jax.Array:
        return jax.vmap(field)(x, checks.field_time(t, x))

    return batched


def from_flow(velocity: Field) -> Field:
    """The velocity field of ``process.rectified()`` from one in flow time.

    Flow time tau = 1 - t runs from noise at 0 to data at 1 (stochastic interpolants, reflow), so
    the field is ``-velocity(x, 1 - t)``; use it with prediction ``"velocity"``.
    """

    def field(x: jax.Array, t: jax.Array) -> jax.Array:
        return -velocity(x, 1 - t)

    return field
