r"""How straight the paths of a flow are.

In flow time, noise at 0 and data at 1, with N Euler steps x_{i+1} = x_i + v(x_i, i/N)/N,

    S = mean over samples of (1/N) sum_i |v(x_i, i/N) - (x_N - x_0)|

the norm, not its square, as SlimFlow's published code has it (Zhu, Liu and Liu, arXiv 2407.12718;
Liu, Gong and Liu, arXiv 2209.03003, section 2, integrate the square). Zero is a flow that one step
follows exactly.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import checks
from jaxgen.core.arrays import batch_event, safe_sqrt, sum_event
from jaxgen.score.prediction import Field

__all__ = ["straightness"]


def straightness(
    field: Field, x0: ArrayLike, steps: int = 100, *, event_ndim: int | None = None
) -> jax.Array:
    """Mean distance of a flow's velocity from the straight line between its ends.

    Args:
      field: the velocity in flow time, noise at 0 (``score.from_flow`` of one of
        ``process.rectified()``), ``u(x, t)`` with ``t`` of shape ``(batch,)``.
      x0: noise ``(batch, *event)``. Its velocities along all steps are kept in memory.
      steps: Euler steps.
      event_ndim: ``x0.ndim`` if ``x0`` is one example.

    Returns:
      The mean over the batch, ``()``, float32 or wider, in the data's units.

    Raises:
      ValueError: ``steps`` below 1, or a field of another shape.
      TypeError: ``x0`` is no real floating array.

    Example:
      >>> import jax.numpy as jnp
      >>> float(straightness(lambda x, t: jnp.ones_like(x), jnp.zeros((2, 3))))
      0.0
    """
    x0 = checks.floating("x0", x0)
    checks.positive_int("steps", steps)
    x0 = x0.astype(jnp.promote_types(x0.dtype, jnp.float32))
    batch, _ = batch_event(x0, event_ndim)

    def step(x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        v = checks.cast_field_output(field(x, jnp.broadcast_to(t, batch)), x)
        return x + v / steps, v

    times = jnp.arange(steps, dtype=x0.dtype) / steps
    _, velocities = jax.lax.scan(step, x0, times)
    # The mean velocity is the way from end to end, without the rounding of x_N - x_0.
    away = velocities - jnp.mean(velocities, axis=0, keepdims=True)
    norms = jax.vmap(lambda v: safe_sqrt(sum_event(v**2, event_ndim)))(away)
    return jnp.mean(norms)
