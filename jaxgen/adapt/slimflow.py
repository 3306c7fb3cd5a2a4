r"""SlimFlow: a small one-step generator from a large flow or diffusion model.

Zhu, Liu and Liu, ECCV 2024, arXiv 2407.12718, in three stages:

1. ``solve.reflow_pairs``: noise and where the teacher's ODE takes it;
2. *annealing reflow*, ``reflow_loss``: a small network, from random initialisation, learns the flow
   between them, while the pairing goes from independent to the teacher's. It takes the place of a
   warm start, which a network of another size cannot have;
3. *guided distillation*, ``distillation_loss``: the flow's (averaged) parameters start a student
   that learns its end in one step, from the pairs and from the flow's two-step samples of fresh
   noise, at equal weight.

The losses are of the form that ``train.make_train_step`` takes; the mathematics is in
``score.flow``. Left out of the published recipe: the perceptual distance, whose weights are not
shipped (any ``distance`` serves). A distilled network is no longer a flow: more steps than one make
its samples worse.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import batch_event, left_broadcast
from jaxgen.score.flow import (
    Distance,
    anneal_noise,
    flow_guided_loss,
    flow_matching_loss,
)

__all__ = ["distillation_loss", "flip_pairs", "one_step", "reflow_loss"]

# velocity(params, x, t) or velocity(params, x, t, label), in flow time.
Velocity = Callable[..., jax.Array]

T_MIN = 1e-3


def _pair(batch: Any) -> tuple[Any, Any, Any]:
    """Noise, data and labels of a batch: ``Pairs`` or a mapping with ``x0``, ``x1``, ``label``."""
    if isinstance(batch, dict):
        missing = [name for name in ("x0", "x1") if name not in batch]
        if missing:
            raise ValueError(f"batch has {sorted(batch)}; expected x0 and x1, and maybe label")
        return batch["x0"], batch["x1"], batch.get("label")
    if not hasattr(batch, "x0") or not hasattr(batch, "x1"):
        raise ValueError(f"batch is {type(batch).__name__}; expected Pairs or a dict of x0 and x1")
    return batch.x0, batch.x1, getattr(batch, "label", None)


def reflow_loss(
    velocity: Velocity,
    beta: Callable[[jax.Array], jax.Array],
    *,
    t_min: float = T_MIN,
    distance: Distance | None = None,
) -> Callable[[jax.Array, Any, Any, jax.Array], jax.Array]:
    """The loss of annealing reflow, for ``train.make_train_step(..., pass_step=True)``.

    Args:
      velocity: ``velocity(params, x, t)`` in flow time, noise at 0; with ``label`` last where the
        batches have labels.
      beta: the step's share of fresh noise, from ``score.flow.anneal_schedule``.
      t_min: first time.
      distance: see ``score.flow.flow_matching_loss``.

    Returns:
      ``loss(key, params, batch, step) -> (n,)``; ``batch`` is a ``solve.reflow.Pairs`` or a dict
      of ``x0``, ``x1`` and, if there are any, ``label``.
    """

    def loss(key: jax.Array, params: Any, batch: Any, step: jax.Array) -> jax.Array:
        x0, x1, label = _pair(batch)
        key_noise, key_time = jax.random.split(key)
        return flow_matching_loss(
            key_time,
            functools.partial(velocity, params),
            anneal_noise(key_noise, x0, beta(step)),
            x1,
            t_min=t_min,
            distance=distance,
            label=label,
        )

    return loss


def distillation_loss(
    velocity: Velocity,
    teacher: Any = None,
    *,
    first: Literal["student", "teacher"] = "student",
    t_range: tuple[float, float] = (0.2, 0.8),
    t_min: float = T_MIN,
    distance: Distance | None = None,
) -> Callable[[jax.Array, Any, Any], jax.Array]:
    """The loss of distillation to one step, guided by a frozen flow, for ``train.make_train_step``.

    The student's state starts from the flow's averaged parameters, as both its parameters and its
    average (``TrainState.create`` does so): the average's warm-up begins at step 0.

    Args:
      velocity: as for ``reflow_loss``, of student and teacher.
      teacher: the frozen flow's parameters; ``None`` leaves the guidance out, which is naive
        distillation.
      first: see ``score.flow.flow_guided_loss``.
      t_range: likewise.
      t_min: time of the one step.
      distance: see ``score.flow.flow_matching_loss``.

    Returns:
      ``loss(key, params, batch) -> (n,)``, the sum of both parts; ``batch`` as for
      ``reflow_loss``.
    """

    def loss(key: jax.Array, params: Any, batch: Any) -> jax.Array:
        x0, x1, label = _pair(batch)
        student = functools.partial(velocity, params)
        key_pairs, key_fresh = jax.random.split(key)
        on_pairs = flow_matching_loss(
            key_pairs,
            student,
            x0,
            x1,
            t_min=t_min,
            t_schedule="start",
            distance=distance,
            label=label,
        )
        if teacher is None:
            return on_pairs
        on_fresh = flow_guided_loss(
            key_fresh,
            student,
            functools.partial(velocity, teacher),
            jnp.shape(x0),
            first=first,
            t_range=t_range,
            t_min=t_min,
            distance=distance,
            label=label,
            dtype=jnp.result_type(x0),
        )
        return on_pairs + on_fresh

    return loss


def one_step(
    field: Callable[[jax.Array, jax.Array], jax.Array],
    x0: ArrayLike,
    *,
    t_min: float = T_MIN,
    event_ndim: int | None = None,
) -> jax.Array:
    """Data from noise by one evaluation: ``x0 + (1 - t_min) u(x0, t_min)``.

    Args:
      field: the velocity in flow time.
      x0: standard noise ``(batch, *event)``.
      t_min: the time that the network was distilled at.
      event_ndim: ``x0.ndim`` if ``x0`` is one example.

    Returns:
      Samples like ``x0``; the same as ``solve.sample(..., solver="euler_time", steps=1)`` of
      ``score.from_flow(field)`` under ``process.rectified()`` from ``1 - t_min`` to 0.

    Raises:
      ValueError: a field of another shape.
      TypeError: ``x0`` is no real floating array.
    """
    x0 = checks.floating("x0", x0)
    batch, _ = batch_event(x0, event_ndim)
    t = jnp.full(batch, t_min, jnp.promote_types(x0.dtype, jnp.float32))
    out = checks.cast_field_output(field(x0, t), x0)
    return (x0 + (1 - t_min) * out).astype(x0.dtype)


def flip_pairs(
    key: jax.Array, x0: ArrayLike, x1: ArrayLike, *, axis: int = -2
) -> tuple[jax.Array, jax.Array]:
    """Noise and image mirrored together, one coin per example: flipped alone they are no pair.

    Args:
      key: typed key; example ``i`` uses ``fold_in(key, i)``.
      x0: noise ``(batch, height, width, channels)``.
      x1: images, like ``x0``.
      axis: the axis that is mirrored, the width.

    Raises:
      ValueError: pairs of different shapes.
    """
    x0, x1 = jnp.asarray(x0), jnp.asarray(x1)
    if x0.shape != x1.shape:
        raise ValueError(f"x0 has shape {x0.shape} and x1 {x1.shape}; expected pairs of one shape")
    heads = keys.map_batch(jax.random.bernoulli, key, x0.shape[:1])
    mirrored = left_broadcast(heads, x0)
    return (
        jnp.where(mirrored, jnp.flip(x0, axis), x0),
        jnp.where(mirrored, jnp.flip(x1, axis), x1),
    )
