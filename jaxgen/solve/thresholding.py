r"""Keep the data prediction in its range, in each step of any sampler.

A wrapper of the field: it converts the output to the data prediction, cuts that, and hands on a
field of data. Static thresholding cuts at the data's own range; dynamic thresholding (Saharia et
al., arXiv 2205.11487, section 2.3) takes for each example the quantile s of |x0|, at least the
range and at most a limit, cuts at s and divides by s, so that pixels do not pile up at the ends.
NaN passes through either.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgen.core import checks
from jaxgen.core.arrays import batch_event, left_broadcast
from jaxgen.process.linear import LinearSDE
from jaxgen.score.prediction import Field, convert

__all__ = ["clip_to", "dynamic_threshold", "thresholded"]

Cut = Callable[[jax.Array], jax.Array]


def clip_to(low: float, high: float) -> Cut:
    """Cut the data prediction at the data's range.

    Args:
      low: smallest value of the data.
      high: largest value.

    Raises:
      ValueError: not ``low < high``.
    """
    if not low < high:
        raise ValueError(f"low is {low} and high {high}; expected low < high")
    return lambda data: jnp.clip(data, low, high)


def dynamic_threshold(
    ratio: float = 0.995, *, limit: float = 1.5, least: float = 1.0, event_ndim: int | None = None
) -> Cut:
    """Dynamic thresholding of data in ``[-least, least]`` (module docstring).

    Args:
      ratio: the quantile, in (0, 1].
      limit: largest ``s``.
      least: smallest ``s``, what the prediction is scaled back to.
      event_ndim: ``None`` for a batch, the example's ``ndim`` for one alone.

    Raises:
      ValueError: an argument out of range; when it cuts, an example without axes.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio is {ratio}; expected a quantile in (0, 1]")
    if not 0 < least <= limit:
        raise ValueError(f"least is {least} and limit {limit}; expected 0 < least <= limit")

    def cut(data: jax.Array) -> jax.Array:
        batch, event = batch_event(data, event_ndim)
        if not event:
            raise ValueError(
                f"the data prediction has shape {data.shape} and event_ndim is {event_ndim}: an "
                "example without axes has no quantile; expected event_ndim=None for a batch of "
                "examples with axes, the example's ndim for one alone"
            )
        axes = tuple(range(len(batch), len(batch) + len(event)))
        size = jnp.abs(data.astype(jnp.promote_types(data.dtype, jnp.float32)))
        s = left_broadcast(jnp.clip(jnp.quantile(size, ratio, axis=axes), least, limit), data)
        return (jnp.clip(data, -s, s) * (least / s)).astype(data.dtype)

    return cut


def thresholded(field: Field, sde: LinearSDE, cut: Cut, *, prediction: str = "noise") -> Field:
    """A field of data, its prediction cut; use it with ``prediction="data"``.

    Args:
      field: ``f(x, t) -> like x``.
      sde: the process.
      cut: ``clip_to(...)``, ``dynamic_threshold(...)``, or any function of the data prediction.
      prediction: what ``field`` predicts.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxgen import process
      >>> field = thresholded(lambda x, t: 3 * x, process.vp(), clip_to(-1, 1), prediction="data")
      >>> field(jnp.ones((2, 3)), jnp.ones(2)).max().item()
      1.0
    """

    def data(x: jax.Array, t: jax.Array) -> jax.Array:
        out = checks.cast_field_output(field(x, t), x)
        return cut(convert(out, x, t, sde, prediction, "data"))

    return data
