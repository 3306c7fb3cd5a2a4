"""What every loop starts from and hands back: the first state, and a ``Sample``."""

import dataclasses
import functools
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import batch_event, cast_coefficient
from jaxgen.process.linear import LinearSDE
from jaxgen.score.prediction import PREDICTIONS, Field, convert
from jaxgen.solve.noise import sample_keys
from jaxgen.solve.path import fold_each, normals
from jaxgen.solve.terms import FieldCall, with_batch_of

__all__ = ["Sample", "Start", "finish", "start"]


# The interval that no grid has: its increment is the noise of the first state.
_START = np.uint32(2**32 - 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sample:
    """Samples and what they were made with.

    Attributes:
      x: samples, of the shape and dtype asked for; NaN where ``result`` is not successful.
      nfe: field evaluations, int32: ``()``, or ``(batch,)`` where each sample was its own solve;
        -1 where the solver does not tell (implicit ones).
      result: ``diffrax.RESULTS``, ``()`` or ``(batch,)``; ``nonfinite`` where ``x`` is.
      times: the grid, ``(steps + 1,)`` or ``(steps + 1, batch)``; the two ends if adaptive.
      solver: name of the solver (static).
      prediction: what the field predicts (static).
      steps: intervals of the grid (static).
      grid: the grid's name, ``"array"`` for a given one, ``"adaptive"`` under a controller.
      corrector: name of the corrector, ``None`` without (static).
      last_step: ``"solver"``, ``"mean"`` (noise-free last step of the predictor-corrector loop)
        or ``"denoise"`` (data prediction at ``t_end``) (static).
    """

    x: jax.Array
    nfe: jax.Array
    result: Any
    times: jax.Array
    solver: str = dataclasses.field(metadata={"static": True})
    prediction: str = dataclasses.field(metadata={"static": True})
    steps: int = dataclasses.field(metadata={"static": True})
    grid: str = dataclasses.field(metadata={"static": True})
    corrector: str | None = dataclasses.field(metadata={"static": True})
    last_step: str = dataclasses.field(metadata={"static": True})


class Start(NamedTuple):
    """Where a loop starts.

    Attributes:
      key: for the loop's noise.
      x: first state, in float32 or wider.
      batch: the batch's shape, ``(n,)`` or ``()``.
      event: the event's shape.
      dtype: of the samples.
      field_dtype: what the field is called in, ``None`` for the state's.
      increments: normals of the first intervals of a grid, drawn with ``x``; see ``start``.
    """

    key: jax.Array
    x: jax.Array
    batch: tuple[int, ...]
    event: tuple[int, ...]
    dtype: Any
    field_dtype: Any
    increments: jax.Array | None


def start(
    key: jax.Array,
    sde: LinearSDE,
    shape: tuple[int, ...],
    x_init: ArrayLike | None,
    prediction: str,
    dtype: DTypeLike | None,
    event_ndim: int | None,
    first_index: ArrayLike,
    ahead: int = 0,
) -> Start:
    """Check what every loop takes and draw the first state; see ``sample``.

    ``ahead`` increments of a ``GridPath`` are drawn with it, if it is drawn at all.
    """
    keys.check(key)
    checks.one_of("prediction", prediction, PREDICTIONS)
    shape = tuple(shape)
    batch, event = batch_event(shape, event_ndim)
    if dtype is None:
        dtype = jnp.result_type(float) if x_init is None else jnp.asarray(x_init).dtype
    dtype = checks.floating("dtype", np.zeros((), dtype), allow_complex=True).dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    increments = None
    if x_init is None:
        numbers = np.append(np.arange(ahead, dtype=np.uint32), _START)
        own = sample_keys(key, batch, first_index)
        drawn = normals(fold_each(own, jnp.asarray(numbers)), event, wide)
        x = _prior(sde, drawn[-1])
        increments = drawn[:-1] if ahead else None
    else:
        x = checks.floating("x_init", x_init, allow_complex=True).astype(wide)
        if x.shape != shape:
            raise ValueError(f"x_init has shape {x.shape}; expected shape {shape}")
    return Start(key, x, batch, event, dtype, dtype if dtype != wide else None, increments)


def _prior(sde: LinearSDE, noise: jax.Array) -> jax.Array:
    """The prior's sample of this noise, like it."""
    std = sde.sigma(sde.t_max) if sde.prior_std is None else jnp.asarray(sde.prior_std)
    mu = sde.centre(noise)
    x = cast_coefficient(std, noise) * noise
    return x if mu is None else (mu + x).astype(noise.dtype)


@functools.partial(jax.jit, static_argnames="batch", inline=True)
def _nonfinite(x: jax.Array, code: Any, batch: tuple[int, ...]) -> Any:
    """The result codes, ``nonfinite`` where a sample is."""
    axes = tuple(range(len(batch), x.ndim))
    is_finite = jnp.all(jnp.isfinite(x), axis=axes)
    codes = jax.tree.map(lambda v: v if v.shape == batch else jnp.broadcast_to(v, batch), code)

    def one(is_finite: jax.Array, code: Any) -> Any:
        is_fine = is_finite | (code != diffrax.RESULTS.successful)
        return diffrax.RESULTS.where(is_fine, code, diffrax.RESULTS.nonfinite)

    if not batch:
        return one(is_finite, codes)
    return jax.vmap(one)(is_finite, with_batch_of(is_finite, codes))


def finish(
    begun: Start,
    field: Field,
    sde: LinearSDE,
    x: jax.Array,
    nfe: jax.Array,
    code: Any,
    times: jax.Array,
    *,
    prediction: str,
    denoise_last: bool,
    last_step: str = "solver",
    **made_with: Any,
) -> Sample:
    """The ``Sample`` of a loop's last state, denoised first where asked.

    Args:
      begun: where the loop started.
      field: for the last denoising.
      sde: the process.
      x: last state.
      nfe: field evaluations so far.
      code: diffrax's result code, ``()`` or per sample.
      times: the grid.
      prediction: what the field predicts.
      denoise_last: end with the data prediction at the last time.
      last_step: the loop's own last step.
      **made_with: the other static attributes.
    """
    if denoise_last:
        ndim = None if begun.batch else x.ndim
        end = jnp.broadcast_to(times[-1], begun.batch)
        out = FieldCall(field, ndim, begun.field_dtype)(x, end)
        x = convert(out, x, end, sde, prediction, "data")
        nfe = jnp.where(nfe < 0, nfe, nfe + 1)
        last_step = "denoise"
    return Sample(
        x=x.astype(begun.dtype),
        nfe=nfe,
        result=_nonfinite(x, code, begun.batch),
        times=times,
        prediction=prediction,
        last_step=last_step,
        **made_with,
    )
