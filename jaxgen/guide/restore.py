"""One front for the methods of inverse problems, and several restorations of one measurement."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import checks, keys
from jaxgen.guide.consistency import diffpir, projection, repaint
from jaxgen.guide.inverse import Restored
from jaxgen.guide.posterior import dps, pigdm
from jaxgen.guide.red_diff import red_diff
from jaxgen.process.linear import LinearSDE
from jaxgen.score.prediction import Field

__all__ = ["METHODS", "Spread", "restore", "restore_many"]

METHODS: dict[str, Callable[..., Restored]] = {
    "red_diff": red_diff,
    "dps": dps,
    "pigdm": pigdm,
    "projection": projection,
    "diffpir": diffpir,
    "repaint": repaint,
}


def restore(
    key: jax.Array,
    field: Field,
    sde: LinearSDE,
    y: ArrayLike,
    operator: Callable[[jax.Array], jax.Array],
    *,
    method: str = "red_diff",
    **options: Any,
) -> Restored:
    """Restore events by a method's name.

    Args:
      key: typed key.
      field: ``f(x, t) -> like x``.
      sde: the process.
      y: measurements.
      operator: of one event.
      method: one of ``METHODS``.
      **options: of that method.

    Raises:
      ValueError: an unknown method, and what the method raises.
      TypeError: an option that the method does not take, and what it raises.
    """
    checks.one_of("method", method, METHODS)
    return METHODS[method](key, field, sde, y, operator, **options)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spread:
    """Several restorations of each measurement.

    Attributes:
      x: ``(n, batch, *event)`` or ``(n, *event)``.
      mean: over them, ``(batch, *event)`` or ``(*event,)``.
      std: their standard deviation by entry (that of a population), like ``mean``.
      residual: of each, ``(n, batch)`` or ``(n,)``.
      nfe: evaluations for all of them, int32 ``()``.
      method: its name (static).
      steps: noise levels (static).
    """

    x: jax.Array
    mean: jax.Array
    std: jax.Array
    residual: jax.Array
    nfe: jax.Array
    method: str = dataclasses.field(metadata={"static": True})
    steps: int = dataclasses.field(metadata={"static": True})

    def best(self) -> jax.Array:
        """Of each measurement the restoration of least residual, like ``mean``.

        For operators under which several images look alike (phase retrieval), where a mean of them
        is none. One that is no number is not chosen beside one that is.
        """
        residual = jnp.where(jnp.isnan(self.residual), jnp.inf, self.residual)
        index = jnp.argmin(residual, axis=0)[None]
        index = index.reshape(index.shape + (1,) * (self.x.ndim - index.ndim))
        return jnp.take_along_axis(self.x, index, axis=0, mode="clip")[0]


def restore_many(
    key: jax.Array,
    field: Field,
    sde: LinearSDE,
    y: ArrayLike,
    operator: Callable[[jax.Array], jax.Array],
    n: int,
    *,
    method: str = "red_diff",
    **options: Any,
) -> Spread:
    """Restore each measurement ``n`` times, all at once.

    The spread is that of the method: of a sampler's law, or of RED-diff's modes. It tells what the
    measurement leaves open only as far as that law is the posterior.

    Args:
      key: typed key; restoration ``j`` uses ``fold_in(key, j)``.
      field: see ``restore``, as are the rest.
      sde: likewise.
      y: likewise.
      operator: likewise.
      n: restorations of each measurement.
      method: likewise.
      **options: likewise.

    Raises:
      ValueError: ``n < 1``, and what ``restore`` raises.
      TypeError: what ``restore`` raises.
    """
    own = keys.fold(keys.check(key), checks.positive_int("n", n))

    def one(key: jax.Array) -> Restored:
        return restore(key, field, sde, y, operator, method=method, **options)

    out = jax.vmap(one)(own)
    wide = out.x.astype(jnp.promote_types(out.x.dtype, jnp.float32))
    return Spread(
        out.x,
        jnp.mean(wide, axis=0).astype(out.x.dtype),
        jnp.std(wide, axis=0).astype(out.x.dtype),
        out.residual,
        jnp.sum(out.nfe),
        out.method,
        out.steps,
    )
