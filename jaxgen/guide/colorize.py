r"""Colourisation: imputation of the grey coordinate of colour images.

Song et al., arXiv 2011.13456, appendix I.3. The channels are mapped to orthonormal coordinates
whose first is the grey level; that one is known, the two of colour are sampled. The start is the
prior in those coordinates with the known one put in, not a mixture made before the map.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgen.core import checks
from jaxgen.guide.impute import impute
from jaxgen.guide.inpaint import CORRECTOR, sample_imputed
from jaxgen.process.linear import LinearSDE
from jaxgen.score.prediction import Field
from jaxgen.solve.state import Sample

__all__ = ["COLOR_BASIS", "colorize"]

# Columns: grey, red against green and blue, green against blue.
COLOR_BASIS = np.array([[1, -2, 0], [1, 1, 1], [1, 1, -1]], np.float32) / np.sqrt(
    np.array([[3, 6, 2]], np.float32)
)


def colorize(
    key: jax.Array,
    field: Field,
    sde: LinearSDE,
    gray: ArrayLike,
    *,
    predictor: Any = "reverse_diffusion",
    corrector: Any = CORRECTOR,
    steps: int = 1000,
    first_index: ArrayLike = 0,
    event_ndim: int | None = None,
    **options: Any,
) -> Sample:
    """Colour images whose mean over the channels is known.

    Args:
      key: typed key; example ``i`` of a batch draws from keys folded with ``first_index + i``.
      field: a field of colour images ``(batch, *space, 3)``.
      sde: the process.
      gray: grey levels ``(batch, *space, 1)``, or images ``(batch, *space, 3)`` of which the mean
        over the channels counts; without the batch if ``event_ndim=gray.ndim``. Floating, in the
        data's own scale.
      predictor: see ``inpaint``, as are the rest.
      corrector: see ``inpaint``.
      steps: noise levels.
      first_index: number of the first example.
      event_ndim: see above.
      **options: see ``inpaint``.

    Returns:
      A ``Sample`` of shape ``(batch, *space, 3)`` and ``gray``'s dtype; its mean over the channels
      is the marginal mean of ``gray`` at ``t_end``.

    Raises:
      ValueError: a last axis of another length than 1 or 3, and what ``inpaint`` raises.
      TypeError: ``gray`` is not floating, or a raw key.
    """
    gray = checks.floating("gray", gray)
    if gray.ndim < 1 or gray.shape[-1] not in (1, 3):
        raise ValueError(
            f"gray has shape {gray.shape}; expected a last axis of 1 (grey) or 3 (colour channels)"
        )
    # Of three equal channels the first coordinate is sqrt(3) times their value.
    level = math.sqrt(3) * jnp.mean(gray, axis=-1, keepdims=True)
    y = jnp.concatenate([level, jnp.zeros_like(level), jnp.zeros_like(level)], axis=-1)
    imputation = impute(
        sde,
        y.astype(gray.dtype),
        np.array([True, False, False]),
        basis=COLOR_BASIS,
        first_index=first_index,
        event_ndim=event_ndim,
    )
    return sample_imputed(
        key,
        field,
        sde,
        imputation,
        predictor=predictor,
        corrector=corrector,
        steps=steps,
        **options,
    )
