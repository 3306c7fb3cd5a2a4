r"""Inpainting by predictor-corrector sampling with imputation at every noise level.

Song et al., arXiv 2011.13456, section 5 and appendix I.2: ``impute`` with the identity as its
basis. The corrector matters: with a predictor alone the unknown part converges to the wrong
conditional distribution (for a Gaussian of unit variances and correlation 0.9 with one entry known
to be 1.5, to mean 0.94 and variance 0.31 instead of 1.35 and 0.19), with one corrector step per
level to 1.35 and 0.194.
"""

from typing import Any

import jax
from jax.typing import ArrayLike

from jaxgen.core import keys
from jaxgen.guide.impute import Imputation, impute
from jaxgen.process.linear import LinearSDE
from jaxgen.score.prediction import Field
from jaxgen.solve.corrector import langevin_corrector
from jaxgen.solve.predictor_corrector import predictor_corrector
from jaxgen.solve.state import Sample

__all__ = ["CORRECTOR", "inpaint", "sample_imputed"]

CORRECTOR = langevin_corrector()


def sample_imputed(
    key: jax.Array, field: Field, sde: LinearSDE, imputation: Imputation, **options: Any
) -> Sample:
    """Predictor-corrector sampling from an imputation's own start, projected at every step.

    Args:
      key: typed key.
      field: see ``inpaint``.
      sde: the process.
      imputation: what is known.
      **options: of ``solve.predictor_corrector``.
    """
    key_start, key_loop = jax.random.split(keys.check(key))
    known = imputation.known
    return predictor_corrector(
        key_loop,
        field,
        sde,
        known.shape,
        project=imputation,
        x_init=imputation.start(key_start, known.dtype),
        event_ndim=imputation.event_ndim,
        first_index=imputation.first_index,
        **options,
    )


def inpaint(
    key: jax.Array,
    field: Field,
    sde: LinearSDE,
    y: ArrayLike,
    mask: ArrayLike,
    *,
    predictor: Any = "reverse_diffusion",
    corrector: Any = CORRECTOR,
    steps: int = 1000,
    first_index: ArrayLike = 0,
    event_ndim: int | None = None,
    **options: Any,
) -> Sample:
    """Fill in what is unknown of ``y``.

    Args:
      key: typed key; example ``i`` of a batch draws from keys folded with ``first_index + i``.
      field: ``f(x, t) -> like x``, see ``solve.sample``.
      sde: the process.
      y: data ``(batch, *event)``, or one example if ``event_ndim=y.ndim``; floating. Entries where
        the mask is 0 are not looked at.
      mask: 1 where ``y`` is known and 0 where it is wanted; broadcasts to ``y`` from the right.
      predictor: see ``solve.predictor_corrector``.
      corrector: the same; by default one Langevin step a level, its norms averaged over the batch
        as published, so that examples of a batch are coupled (``langevin_corrector(norms=...)``
        has others). ``None`` leaves it out and converges to the wrong distribution.
      steps: noise levels.
      first_index: number of the first example.
      event_ndim: see above.
      **options: ``prediction``, ``grid``, ``t_end``, ``progress``, ``denoise_last`` and ``dtype``
        of ``solve.predictor_corrector``.

    Returns:
      A ``Sample`` of ``y``'s shape and dtype. Its known entries are the marginal mean of ``y`` at
      ``t_end``, as published: ``alpha(t_end) y`` without an anchor.

    Raises:
      ValueError: a mask that does not broadcast to ``y`` or has other values than 0 and 1 (traced:
        NaN there), and what ``solve.predictor_corrector`` raises.
      TypeError: ``y`` is not floating, or a raw key.
    """
    imputation = impute(sde, y, mask, first_index=first_index, event_ndim=event_ndim)
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
