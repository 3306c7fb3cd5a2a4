r"""Derivatives of a field ``f(x, t)``: along directions, in time, divergence and Laplacian.

With J the Jacobian of one example's output in its own input, and v a random probe with
``E[v v^T] = I``,

    div f = tr J = sum_i e_i . J e_i                                                   (1)
    div f = E[v . J v]                                                                 (2)
    (div f)^2 = E[(v . J v)(w . J w)],   v and w independent                           (3)
    Laplacian of h = sum_i d^2 h/dx_i^2 = E[v . H v]                                   (4)

(1) is exact and costs one Jacobian-vector product per entry of an example, (2) is Hutchinson's
estimator (Hutchinson 1989; Grathwohl et al., arXiv 1810.01367, section 3.1) and costs one; (3)
needs two probes, because the square of one estimate is biased by its variance. All products are
forward mode: the field is evaluated once, whatever the number of directions. A scalar's gradient
and time derivative come together from one reverse sweep (``scalar_derivatives``), and (4) from
forward products of that sweep.

A batched field must treat its examples independently (no batch statistics), or (1) to (4) would
mix them. States in reduced precision are lifted to float32 before the field is called, and the
derivatives are float32 or wider.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import at_least_f32, batch_event, sum_event
from jaxgen.score.prediction import Field

__all__ = [
    "PROBES",
    "ScalarDerivatives",
    "probes",
    "scalar_derivatives",
    "unbiased_square",
    "value_and_divergence",
    "value_and_jvp",
    "value_and_laplacian",
    "value_and_time_derivative",
    "value_and_traces",
]

PROBES = {"rademacher": keys.rademacher, "gaussian": keys.normal}

# Entries of the state carried at once by one block of directions; a network's activations are
# some tens of times as many.
_BLOCK = 2**18

# What a directional derivative is taken of: a state to an array with the same batch.
_Map = Callable[[jax.Array], jax.Array]


def probes(
    key: jax.Array,
    shape: tuple[int, ...],
    kind: str = "rademacher",
    *,
    n: int | None = None,
    dtype: DTypeLike = jnp.float32,
    event_ndim: int | None = None,
) -> jax.Array:
    """Random directions with identity covariance, drawn per example.

    Args:
      key: typed key; example ``i`` of a batch uses ``fold_in(key, i)``, so that its probe does
        not change with the size of the batch. With ``n``, probe ``j`` starts from
        ``fold_in(key, j)``.
      shape: the state's shape, ``(batch, *event)``.
      kind: ``"rademacher"`` (signs; the smaller variance) or ``"gaussian"``.
      n: number of independent probes per example, ``None`` for one without an axis of its own.
      dtype: float32 or wider.
      event_ndim: ``len(shape)`` if ``shape`` is that of one example.

    Returns:
      ``shape``, or ``(n, *shape)``.

    Raises:
      ValueError: an unknown kind, or ``n < 1``.
    """
    checks.one_of("kind", kind, PROBES)
    dtype = at_least_f32(dtype)

    def draw(k: jax.Array) -> jax.Array:
        return PROBES[kind](k, tuple(shape), dtype, event_ndim)

    if n is None:
        return draw(keys.check(key))
    return jax.vmap(draw)(keys.fold(keys.check(key), checks.positive_int("n", n), is_batch=False))


def _lift(
    field: Field, x: ArrayLike, t: ArrayLike, event_ndim: int | None
) -> tuple[_Map, jax.Array, jax.Array, jax.Array]:
    """The field as a map of the state alone, the state as given and widened, and the time."""
    x = checks.floating("x", x)
    batch_event(x, event_ndim)
    t = checks.field_time(t, x, event_ndim)
    wide = x.astype(at_least_f32(x.dtype))
    return lambda y: checks.cast_field_output(field(y, t), y), x, wide, t


def _directions(probe: ArrayLike, x: jax.Array, name: str) -> jax.Array:
    """Check a probe's shape and give it the state's dtype."""
    probe = jnp.asarray(probe)
    if probe.shape[-x.ndim :] != x.shape or probe.ndim > x.ndim + 1:
        raise ValueError(
            f"{name} has shape {probe.shape}; expected {x.shape} or (n, "
            f"{', '.join(map(str, x.shape))}) for x of shape {x.shape}"
        )
    # Never taken, but under shard_map a tangent must vary over the same mesh axes as its state.
    state = x if probe.ndim == x.ndim else x[None]
    return jnp.where(False, state, probe.astype(x.dtype))


def _over_directions(function: _Map, directions: jax.Array, size: int) -> jax.Array:
    """``function`` of every direction along axis 0, so many at once that memory stays bounded."""
    at_once = max(1, _BLOCK // max(size, 1))
    if at_once >= directions.shape[0]:
        return jax.vmap(function)(directions)
    return jax.lax.map(function, directions, batch_size=at_once)


def _over_basis(function: _Map, x: jax.Array, event_ndim: int | None) -> jax.Array:
    """Sum of ``function`` over the unit vectors of an example, the same for all examples."""
    batch, event = batch_event(x, event_ndim)
    dim = math.prod(event)

    def at_entry(i: jax.Array) -> jax.Array:
        unit = (jnp.arange(dim) == i).reshape((1,) * len(batch) + event)
        return function(jnp.where(unit, jnp.ones_like(x), jnp.zeros_like(x)))

    return jnp.sum(_over_directions(at_entry, jnp.arange(dim), x.size), axis=0)


def value_and_jvp(
    field: Field,
    x: ArrayLike,
    t: ArrayLike,
    dx: ArrayLike | None = None,
    dt: ArrayLike | None = None,
    *,
    event_ndim: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The field and its derivative along the direction ``(dx, dt)``, from one evaluation.

    Args:
      field: maps ``(x, t)`` to an array like ``x``.
      x: states ``(batch, *event)``, real.
      t: times, ``()`` or ``(batch,)``.
      dx: direction in the state, ``x``'s shape; ``None`` for zero.
      dt: direction in time, ``()`` or ``(batch,)``; ``None`` for zero. With ``dx`` the velocity
        of a trajectory and ``dt = 1`` the result is the total derivative along it.
      event_ndim: ``x.ndim`` if ``x`` is one example.

    Returns:
      ``f(x, t)`` in ``x``'s dtype, and ``(df/dx) dx + (df/dt) dt`` in float32 or wider.

    Raises:
      ValueError: shapes that do not fit.
      TypeError: ``x`` is no real floating array.
    """
    _, x, wide, t = _lift(field, x, t, event_ndim)
    time = t.astype(at_least_f32(t.dtype))
    along_x = jnp.zeros_like(wide) if dx is None else _directions(dx, wide, "dx")
    if along_x.ndim != wide.ndim:
        raise ValueError(f"dx has shape {along_x.shape}; expected {wide.shape}")
    along_t = jnp.zeros_like(time) if dt is None else checks.field_time(dt, x, event_ndim)
    value, out = jax.jvp(
        lambda y, s: checks.cast_field_output(field(y, s), y),
        (wide, time),
        (along_x, along_t.astype(time.dtype)),
    )
    return value.astype(x.dtype), out


def value_and_time_derivative(
    field: Field, x: ArrayLike, t: ArrayLike, *, event_ndim: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """The field and its partial derivative in time; arguments and errors of ``value_and_jvp``."""
    return value_and_jvp(field, x, t, dt=1.0, event_ndim=event_ndim)


def value_and_traces(
    field: Field,
    x: ArrayLike,
    t: ArrayLike,
    probe: ArrayLike,
    *,
    event_ndim: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The field and one estimate ``v . J v`` of its divergence per probe, equation (2).

    Args:
      field: maps ``(x, t)`` to an array like ``x``.
      x: states ``(batch, *event)``, real.
      t: times, ``()`` or ``(batch,)``.
      probe: ``(n, *x.shape)``, see ``probes``.
      event_ndim: ``x.ndim`` if ``x`` is one example.

    Returns:
      ``f(x, t)`` in ``x``'s dtype and the estimates ``(n, batch)`` (or ``(n,)``), float32 or
      wider.

    Raises:
      ValueError: shapes that do not fit.
      TypeError: ``x`` is no real floating array.
    """
    function, x, wide, _ = _lift(field, x, t, event_ndim)
    directions = _directions(probe, wide, "probe")
    if directions.ndim != wide.ndim + 1:
        raise ValueError(f"probe has shape {directions.shape}; expected (n, *{x.shape})")
    value, push = jax.linearize(function, wide)
    traces = _over_directions(lambda v: sum_event(v * push(v), event_ndim), directions, x.size)
    return value.astype(x.dtype), traces


def value_and_divergence(
    field: Field,
    x: ArrayLike,
    t: ArrayLike,
    probe: ArrayLike | None = None,
    *,
    event_ndim: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The field and its divergence per example, from one evaluation of the field.

    Args:
      field: maps ``(x, t)`` to an array like ``x``; it must allow forward-mode derivatives.
      x: states ``(batch, *event)``, real.
      t: times, ``()`` or ``(batch,)``.
      probe: ``None`` for the exact trace (1), whose directions are taken in blocks of bounded
        memory; ``x``'s shape for Hutchinson's estimate (2), or ``(n, *x.shape)`` for the mean of
        ``n`` estimates. See ``probes``.
      event_ndim: ``x.ndim`` if ``x`` is one example.

    Returns:
      ``f(x, t)`` in ``x``'s dtype, and the divergence ``(batch,)`` or ``()`` in float32 or wider.

    Raises:
      ValueError: shapes that do not fit.
      TypeError: ``x`` is no real floating array (write a complex state as two real ones).

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.ones((2, 3))
      >>> value_and_divergence(lambda x, t: x**2, x, 0.5)[1].tolist()
      [6.0, 6.0]
    """
    function, x, wide, _ = _lift(field, x, t, event_ndim)
    if probe is None:
        value, push = jax.linearize(function, wide)
        trace = _over_basis(lambda v: sum_event(v * push(v), event_ndim), wide, event_ndim)
        return value.astype(x.dtype), trace
    directions = _directions(probe, wide, "probe")
    if directions.ndim > wide.ndim:
        value, traces = value_and_traces(field, x, t, directions, event_ndim=event_ndim)
        return value, jnp.mean(traces, axis=0)
    value, pushed = jax.jvp(function, (wide,), (directions,))
    return value.astype(x.dtype), sum_event(directions * pushed, event_ndim)


def unbiased_square(estimates: jax.Array) -> jax.Array:
    """Unbiased estimate of ``(E a)^2`` from independent estimates ``a_j``, equation (3).

    The mean of ``a_j a_k`` over all pairs ``j != k``; for two it is their product. Use it on
    ``value_and_traces``, or on residuals that are linear in the divergence: the square of one
    such residual would carry its probe's variance.

    Args:
      estimates: independent along axis 0, ``(n, ...)`` with ``n >= 2``.

    Returns:
      The shape without axis 0; may be negative.

    Raises:
      ValueError: fewer than two estimates.
    """
    n = estimates.shape[0] if estimates.ndim else 0
    if n < 2:
        raise ValueError(
            f"estimates has shape {estimates.shape}; expected at least 2 along axis 0: the square "
            "of a single estimate is biased"
        )
    # Each with the sum of those before it: no difference of two large squares.
    before = jnp.cumsum(estimates, axis=0)[:-1]
    return 2 * jnp.sum(estimates[1:] * before, axis=0) / (n * (n - 1))


def value_and_laplacian(
    function: Field,
    x: ArrayLike,
    t: ArrayLike,
    probe: ArrayLike | None = None,
    *,
    event_ndim: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """A function and its Laplacian, equation (4), per example (and per entry of its output).

    Args:
      function: maps ``(x, t)`` to one number per example (a log-density), or to an array like
        ``x`` (a field, whose Laplacian is taken entry by entry); twice differentiable in forward
        mode.
      x: states ``(batch, *event)``, real.
      t: times, ``()`` or ``(batch,)``.
      probe: ``None`` for the exact sum over a basis, ``x``'s shape for one estimate,
        ``(n, *x.shape)`` for the mean of ``n``.
      event_ndim: ``x.ndim`` if ``x`` is one example.

    Returns:
      The value and the Laplacian, both of the output's shape, float32 or wider.

    Raises:
      ValueError: shapes that do not fit.
      TypeError: ``x`` is no real floating array.
    """
    _, x, wide, t = _lift(function, x, t, event_ndim)

    def at(y: jax.Array) -> jax.Array:
        out = checks.floating("function(x, t)", function(y, t))
        return out.astype(wide.dtype)

    def along(v: jax.Array) -> tuple[jax.Array, jax.Array]:
        (value, _), (_, curvature) = jax.jvp(lambda y: jax.jvp(at, (y,), (v,)), (wide,), (v,))
        return value, curvature

    if probe is None:
        return at(wide), _over_basis(lambda v: along(v)[1], wide, event_ndim)
    directions = _directions(probe, wide, "probe")
    if directions.ndim == wide.ndim:
        return along(directions)
    curvatures = _over_directions(lambda v: along(v)[1], directions, wide.size)
    return at(wide), jnp.mean(curvatures, axis=0)


class ScalarDerivatives(NamedTuple):
    """A scalar field and its derivatives, from ``scalar_derivatives``; all float32 or wider.

    Attributes:
      value: ``(batch,)`` or ``()``.
      gradient: in the state, like ``x``.
      in_time: partial derivative in time, of ``value``'s shape.
      laplacian: of ``value``'s shape; ``(n, batch)`` or ``(n,)`` estimates for ``n`` probes.
    """

    value: jax.Array
    gradient: jax.Array
    in_time: jax.Array
    laplacian: jax.Array


def scalar_derivatives(
    function: Field,
    x: ArrayLike,
    t: ArrayLike,
    probe: ArrayLike | None = None,
    *,
    event_ndim: int | None = None,
) -> ScalarDerivatives:
    """Gradient, time derivative and Laplacian of one number per example, from one evaluation.

    Args:
      function: maps ``(x, t)`` to one real number per example, such as a log-density.
      x: states ``(batch, *event)``, real.
      t: times, ``()`` or ``(batch,)``.
      probe: ``None`` for the exact Laplacian, one forward product per entry of an example; ``x``'s
        shape for one estimate (4), or ``(n, *x.shape)`` for ``n`` estimates, which are not
        averaged. See ``probes``.
      event_ndim: ``x.ndim`` if ``x`` is one example.

    Raises:
      ValueError: shapes that do not fit, or a function that returns no number per example.
      TypeError: ``x`` is no real floating array, or the output is not.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.ones((2, 3))
      >>> scalar_derivatives(lambda x, t: t * jnp.sum(x**2, axis=-1), x, 0.5).laplacian.tolist()
      [3.0, 3.0]
    """
    _, x, wide, t = _lift(function, x, t, event_ndim)
    batch, _ = batch_event(x, event_ndim)
    time = t.astype(at_least_f32(t.dtype))

    def at(y: jax.Array, s: jax.Array) -> jax.Array:
        out = checks.floating("function(x, t)", function(y, s))
        if out.shape != batch:
            raise ValueError(
                f"function(x, t) returned shape {out.shape} for x of shape {x.shape}; expected "
                f"one number per example, {batch}"
            )
        return out.astype(wide.dtype)

    def slopes(y: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        value, pull = jax.vjp(at, y, time)
        gradient, in_time = pull(jnp.ones_like(value))
        return gradient, (value, in_time)

    gradient, push, (value, in_time) = jax.linearize(slopes, wide, has_aux=True)

    def along(v: jax.Array) -> jax.Array:
        return sum_event(v * push(v), event_ndim)

    if probe is None:
        laplacian = _over_basis(along, wide, event_ndim)
    else:
        directions = _directions(probe, wide, "probe")
        is_one = directions.ndim == wide.ndim
        laplacian = along(directions) if is_one else _over_directions(along, directions, wide.size)
    return ScalarDerivatives(value, gradient, in_time, laplacian)
