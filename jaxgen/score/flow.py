r"""Losses of rectified flow, of its annealed pairing and of distillation to one step.

In flow time, noise x0 at 0 and data x1 at 1 (``score.from_flow`` leads into the library's time),
a velocity u is taught along straight lines:

    x_t = (1 - t) x0 + t x1,   loss D(x0 + u(x_t, t), x1), or |u - (x1 - x0)|^2             (1)

This is the one-sided linear interpolant, and ``flow_matching_loss`` is made of it. With
independent x0 and x1 its minimum is the velocity of ``process.rectified()`` (Liu, Gong and Liu,
arXiv 2209.03003, equation 1); with pairs of a teacher (``solve.reflow_pairs``) it is reflow, and at
t = t_min alone it is distillation to one step.

SlimFlow (Zhu, Liu and Liu, ECCV 2024, arXiv 2407.12718) adds two things. The pairing is *annealed*,

    x0' = sqrt(1 - beta^2) x0 + beta z,   beta from 1 (independent) to 0 (the pairs)        (2)

which is N(0, I) for every beta, so that every stage is a flow with the same end law. And
distillation is *guided* by the flow's own two-step samples of fresh noise z:

    x_t = z + t a(z, t_min),  end = x_t + (1 - t) v(x_t, t),  loss D(z + u(z, t_min), end)  (3)

for the student u, the frozen flow v, t ~ U(0.2, 0.8), and the first half-step a by the student
without gradient (as the published training does) or by v. Left out: a perceptual distance; any D
serves.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import (
    at_least_f32,
    batch_event,
    event_size,
    left_broadcast,
    safe_sqrt,
    sum_event,
)
from jaxgen.process.interpolant import interpolant

__all__ = [
    "ANNEALINGS",
    "Distance",
    "anneal_noise",
    "anneal_schedule",
    "flow_guided_loss",
    "flow_matching_loss",
]

Distance = Callable[[jax.Array, jax.Array], jax.Array]

ANNEALINGS = ("linear", "exp", "cosine", "constant")

_FIRST = ("student", "teacher")

# The last time drawn: a field of ``process.rectified()`` is undefined still nearer to the data.
_LAST = 1 - 1e-5


def _check_open(name: str, value: Any) -> None:
    """Refuse a known number outside of (0, 1)."""
    if isinstance(value, int | float) and not 0 < value < 1:
        raise ValueError(f"{name} is {value}; expected a number in (0, 1)")


def _distance(
    distance: Distance | None, a: jax.Array, b: jax.Array, event_ndim: int | None
) -> jax.Array:
    """The distance per example: the mean square of the difference where none is given."""
    if distance is None:
        return sum_event((a - b) ** 2, event_ndim) / event_size(a, event_ndim)
    batch, _ = batch_event(a, event_ndim)
    found = jnp.asarray(distance(a, b))
    if found.shape != batch:
        raise ValueError(
            f"distance returned shape {found.shape} for examples of shape {a.shape}; expected one "
            f"number for each, {batch}"
        )
    return found.astype(at_least_f32(found.dtype))


def _called(field: Callable[..., Any], label: Any, name: str) -> Callable[..., Any]:
    """``field`` as a function of ``x`` and ``t``, given the label; refused if only one has it."""
    wrong = "takes no label; labels on one side only teach nothing"
    if label is None:
        wrong = "asks for a label; pass label="
    try:
        signature = inspect.signature(field)
    except (TypeError, ValueError):
        signature = None  # a callable without a signature is taken at its word
    if signature is not None:
        try:
            signature.bind(*(None,) * (2 if label is None else 3))
        except TypeError:
            raise ValueError(f"{name} {wrong}") from None
    return field if label is None else lambda x, t: field(x, t, label)


def _times(
    key: jax.Array, batch: tuple[int, ...], t_min: Any, schedule: str | int, dtype: Any
) -> jax.Array:
    """Times of shape ``batch``; see ``flow_matching_loss``."""
    low = jnp.asarray(t_min, dtype)
    if schedule == "start":
        return jnp.broadcast_to(low, batch)
    if schedule == "end":
        return jnp.ones(batch, dtype)
    if schedule == "uniform":
        u = keys.map_batch(lambda k: jax.random.uniform(k, dtype=dtype), key, batch)
        return low * (1 - u) + jnp.asarray(_LAST, dtype) * u
    steps = int(schedule)
    i = keys.map_batch(lambda k: jax.random.randint(k, (), 0, steps), key, batch)
    return low + (1 - low) * (i.astype(dtype) / steps)


def flow_matching_loss(
    key: jax.Array,
    field: Callable[..., jax.Array],
    x0: ArrayLike,
    x1: ArrayLike,
    *,
    t_min: ArrayLike = 1e-3,
    t_schedule: Literal["uniform", "start", "end"] | int = "uniform",
    distance: Distance | None = None,
    weight: Literal["uniform"] | Callable[[jax.Array], jax.Array] = "uniform",
    label: ArrayLike | None = None,
    event_ndim: int | None = None,
) -> jax.Array:
    """Regression of a velocity on the straight line from noise to data, per example: equation (1).

    Args:
      key: typed key; example ``i`` of a batch uses ``fold_in(key, i)``.
      field: the velocity in flow time, ``u(x, t) -> like x`` with ``x`` in the dtype of the pairs
        and ``t`` of shape ``(batch,)``, noise at 0; ``u(x, t, label)`` where a label is given.
      x0: noise ``(batch, *event)``, real floating.
      x1: data, like ``x0``; independent of it, or its partner.
      t_min: first time, in (0, 1).
      t_schedule: ``"uniform"`` on [t_min, 1 - 1e-5], the end of ``process.rectified()``;
        ``"start"``, t_min alone (distillation to one step); ``"end"``, 1 alone (to a one-step
        encoder); or a number k of steps, one of their k starts t_min + i (1 - t_min)/k.
      distance: ``D(a, b) -> (batch,)`` between x0 + prediction and x1; the mean square over an
        example's entries if ``None``.
      weight: ``"uniform"``, or a function of ``t`` that the loss is multiplied by.
      label: handed to the field as it is.
      event_ndim: ``x0.ndim`` if ``x0`` is one example; ``t`` then has shape ``()``.

    Returns:
      Losses ``(batch,)`` or ``()``, float32 or wider.

    Raises:
      ValueError: ``x0`` and ``x1`` of different shape, ``t_min`` outside (0, 1), a schedule below
        one step, an unknown name, or a field, distance or weight of another shape.
      TypeError: a raw key, or ``x0`` or ``x1`` no real floating array.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x0, x1 = jnp.zeros((4, 3)), jnp.ones((4, 3))
      >>> flow_matching_loss(jax.random.key(0), lambda x, t: jnp.ones_like(x), x0, x1)
      Array([0., 0., 0., 0.], dtype=float32)
    """
    x0, x1 = checks.floating("x0", x0), checks.floating("x1", x1)
    if x0.shape != x1.shape:
        raise ValueError(f"x0 has shape {x0.shape} and x1 {x1.shape}; expected pairs of one shape")
    _check_open("t_min", t_min)
    if isinstance(t_schedule, str):
        checks.one_of("t_schedule", t_schedule, ("uniform", "start", "end"))
    else:
        checks.positive_int("t_schedule", t_schedule)
    if not callable(weight):
        checks.one_of("weight", weight, ("uniform",))
    batch, _ = batch_event(x0, event_ndim)
    dtype = jnp.promote_types(x0.dtype, x1.dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    x0, x1 = x0.astype(wide), x1.astype(wide)
    t = _times(keys.check(key), batch, t_min, t_schedule, wide)
    x_t, _, velocity = interpolant("one_sided_linear").draw(key, x0, x1, t, event_ndim=event_ndim)
    out = checks.cast_field_output(_called(field, label, "field")(x_t.astype(dtype), t), x0)
    loss = _distance(distance, x0 + out, x0 + velocity, event_ndim)
    if not callable(weight):
        return loss
    factor = jnp.asarray(weight(t))
    if factor.shape != batch:
        raise ValueError(f"weight returned shape {factor.shape}; expected that of t, {batch}")
    return factor * loss


def anneal_noise(
    key: jax.Array, x0: ArrayLike, beta: ArrayLike, *, event_ndim: int | None = None
) -> jax.Array:
    """Partly fresh noise, ``sqrt(1 - beta^2) x0 + beta z``: equation (2).

    Args:
      key: typed key; example ``i`` of a batch uses ``fold_in(key, i)``.
      x0: standard normal noise ``(batch, *event)``.
      beta: ``()``, in [0, 1], one number for the step: drawn anew for each example it would make a
        mixture of pairings. Another value gives NaN, and an error under ``checkify``.
      event_ndim: ``x0.ndim`` if ``x0`` is one example.

    Returns:
      Standard normal noise like ``x0``, correlated with it by ``sqrt(1 - beta^2)``.

    Raises:
      ValueError: a known ``beta`` outside [0, 1], or one that is no scalar.
      TypeError: a raw key, or ``x0`` no real floating array.
    """
    x0 = checks.floating("x0", x0)
    beta = jnp.asarray(beta)
    if beta.shape != ():
        raise ValueError(f"beta has shape {beta.shape}; expected one number for the step, ()")
    known = checks.concrete(beta)
    if known is not None and not 0 <= known <= 1:
        raise ValueError(f"beta is {known}; expected a number in [0, 1]")
    beta = beta.astype(at_least_f32(x0.dtype))
    is_fine = (beta >= 0) & (beta <= 1)
    checks.debug_check(is_fine, "beta is {beta}, outside [0, 1]", beta=beta)
    beta = jnp.where(is_fine, beta, jnp.nan)
    # (1 - b)(1 + b) keeps the digits of 1 - b^2 near 1; the root's slope is cut at 0.
    kept = safe_sqrt((1 - beta) * (1 + beta))
    fresh = keys.normal(key, x0.shape, x0.dtype, event_ndim)
    return (kept * x0 + beta * fresh).astype(x0.dtype)


def anneal_schedule(
    kind: Literal["linear", "exp", "cosine", "constant"], horizon: float
) -> Callable[[ArrayLike], jax.Array]:
    """How ``beta`` of ``anneal_noise`` falls with the training step.

    Args:
      kind: with k the step and K the horizon, ``"linear"`` 1 - min(1, k/K), ``"exp"`` e^{-k/K},
        which never reaches 0 (go on with ``"constant"`` at 0), ``"cosine"``
        (1 + cos(pi min(1, k/K)))/2, ``"constant"``.
      horizon: K, positive; for ``"constant"`` the value itself, in [0, 1].

    Returns:
      ``beta(step)``, of the step's shape, float32 or wider.

    Raises:
      ValueError: an unknown kind, or a horizon out of range.

    Example:
      >>> float(anneal_schedule("linear", 100)(25))
      0.75
    """
    checks.one_of("kind", kind, ANNEALINGS)
    if kind == "constant":
        if not 0 <= horizon <= 1:
            raise ValueError(f"horizon is {horizon}; expected the constant's value, in [0, 1]")
    elif not 0 < horizon < math.inf:
        raise ValueError(f"horizon is {horizon}; expected a positive number of steps")

    def beta(step: ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        step = step.astype(at_least_f32(step.dtype))
        if kind == "constant":
            return jnp.full_like(step, horizon)
        if kind == "exp":
            return jnp.exp(-step / horizon)
        share = jnp.minimum(1, step / horizon)
        # By the half angle, which is exactly 0 at the end and never below it.
        return 1 - share if kind == "linear" else jnp.sin(0.5 * jnp.pi * (1 - share)) ** 2

    return beta


def flow_guided_loss(
    key: jax.Array,
    student: Callable[..., jax.Array],
    teacher: Callable[..., jax.Array],
    shape: tuple[int, ...],
    *,
    first: Literal["student", "teacher"] = "student",
    t_range: tuple[float, float] = (0.2, 0.8),
    t_min: float = 1e-3,
    distance: Distance | None = None,
    label: ArrayLike | None = None,
    dtype: DTypeLike = jnp.float32,
    event_ndim: int | None = None,
) -> jax.Array:
    """Distance of a one-step sample to the flow's two-step sample of fresh noise: equation (3).

    No gradient passes through the two-step sample. Add it to the distillation loss on pairs,
    ``flow_matching_loss(..., t_schedule="start")``, at equal weight (``adapt.slimflow``).

    Args:
      key: typed key; example ``i`` of a batch uses ``fold_in(key, i)``.
      student: the velocity that is taught, as ``field`` of ``flow_matching_loss``.
      teacher: the frozen flow, likewise.
      shape: of the noise, ``(batch, *event)``.
      first: who takes the first half-step: ``"student"``, without gradient (the published
        training), or ``"teacher"``.
      t_range: the two ends of the middle time, in (0, 1), rising.
      t_min: time of the first evaluation, in (0, 1).
      distance: as for ``flow_matching_loss``.
      label: handed to both fields as it is.
      dtype: of the noise, and of the states that the fields are called with.
      event_ndim: ``len(shape)`` for one example.

    Returns:
      Losses ``(batch,)`` or ``()``, float32 or wider.

    Raises:
      ValueError: a number out of range, an unknown ``first``, labels that only one side takes, or
        a field or distance of another shape.
      TypeError: a raw key.
    """
    checks.one_of("first", first, _FIRST)
    _check_open("t_min", t_min)
    low, high = t_range
    if not 0 < low <= high < 1:
        raise ValueError(f"t_range is {t_range}; expected two rising numbers in (0, 1)")
    batch, _ = batch_event(tuple(shape), event_ndim)
    of_student, of_teacher = _called(student, label, "student"), _called(teacher, label, "teacher")
    key_noise, key_time = jax.random.split(keys.check(key))
    z = keys.normal(key_noise, shape, dtype, event_ndim)
    z = z.astype(jnp.promote_types(dtype, jnp.float32))

    def uniform(k: jax.Array) -> jax.Array:
        return jax.random.uniform(k, dtype=z.dtype, minval=low, maxval=high)

    start = jnp.full(batch, t_min, z.dtype)
    t = keys.map_batch(uniform, key_time, batch)
    one_step = checks.cast_field_output(of_student(z.astype(dtype), start), z, "student")
    first_half = one_step
    if first == "teacher":
        first_half = checks.cast_field_output(of_teacher(z.astype(dtype), start), z, "teacher")
    share = left_broadcast(t, z)
    middle = z + share * first_half
    second_half = checks.cast_field_output(of_teacher(middle.astype(dtype), t), z, "teacher")
    end = jax.lax.stop_gradient(middle + (1 - share) * second_half)
    return _distance(distance, z + one_step, end, event_ndim)
