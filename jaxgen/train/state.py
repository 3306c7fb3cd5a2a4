"""The state that a training run carries from step to step.

One pytree holds all that the next step needs: master parameters, their exponential moving average
(EMA), the optimiser's state, the step, the key from which every step's key is folded, and the data
position. A run that is started again from it goes on as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxgen.core import keys

__all__ = ["TrainState"]


def _copy(leaf: jax.Array) -> jax.Array:
    # With its dtype named, a weakly typed leaf becomes a strong one, and the step compiles once.
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jnp.copy(leaf) if is_key else jnp.array(leaf, dtype=leaf.dtype, copy=True)


@jax.jit
def _own(tree: Any) -> Any:
    """``tree`` in buffers of its own, so that donating it deletes no others."""
    return jax.tree.map(_copy, tree)


def _check_trainable(params: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise TypeError(
                f"params[{name!r}] is {type(leaf).__name__} of dtype "
                f"{getattr(leaf, 'dtype', 'none')}; expected floating arrays only (partition the "
                "others out and close over them in loss_fn)"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What one training step hands to the next; a pytree, made by ``TrainState.create``.

    Attributes:
      params: trained parameters, any pytree of floating arrays.
      ema: their exponential moving average, same tree and dtypes.
      opt_state: the optax state.
      step: int32 ``()``, steps taken, skipped ones included.
      key: typed key ``()``; step ``i`` draws from ``fold_in(key, i)``. It never changes.
      examples: uint32 ``()``, examples consumed by all devices together: the data position.
      skipped: int32 ``()``, steps whose update was skipped because of a NaN or infinity.
      skipped_in_a_row: int32 ``()``, how many of those came last without a good one after them.
    """

    params: Any
    ema: Any
    opt_state: Any
    step: jax.Array
    key: jax.Array
    examples: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array

    @classmethod
    def create(
        cls, key: jax.Array, params: Any, optimizer: optax.GradientTransformation
    ) -> TrainState:
        """The state before the first step; the average starts at the parameters.

        Everything is copied, so that a step that donates the state leaves ``params`` alone. Under
        ``jax.eval_shape`` it gives the shapes that ``restore`` needs.

        Args:
          key: one typed key ``()``, for all the randomness of the run.
          params: pytree of floating arrays.
          optimizer: an optax transformation; its ``init`` is called with ``params``.

        Raises:
          TypeError: ``key`` is not a typed key, or a leaf of ``params`` is no floating array.
          ValueError: ``key`` is an array of keys.
        """
        keys.check(key)
        _check_trainable(params)
        zero = jnp.int32(0)
        state = cls(
            params=params,
            ema=params,
            opt_state=optimizer.init(params),
            step=zero,
            key=key,
            examples=jnp.uint32(0),
            skipped=zero,
            skipped_in_a_row=zero,
        )
        return _own(state)

    def replace(self, **changes: Any) -> TrainState:
        """A copy with some attributes exchanged."""
        return dataclasses.replace(self, **changes)
