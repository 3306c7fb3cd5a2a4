r"""Imputation: hold some orthonormal coordinates of a sample to known values while it is made.

Song et al., arXiv 2011.13456, appendix I.2. With an orthonormal map A of the last axis (columns
are the new axes), u = A^T x, and a mask of the coordinates that are known to be y, after every step
at time t

    u <- u (1 - mask) + mask (mean_t(y) + sigma(t) z),    z ~ N(0, I) fresh                 (1)

where mean_t(y) is the process' marginal mean, alpha y without an anchor. An isotropic noise is the
same in every orthonormal basis, so that (1) is a draw from the marginal of the known coordinates.
The mean of a step is treated likewise without noise. Inpainting is A = I; colourisation is a map of
the colour channels. Without a corrector (1) converges to the wrong conditional: the unknown
coordinates never hear of noise levels at equilibrium with the known ones.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgen.core import checks
from jaxgen.core.arrays import batch_event, left_broadcast, matmul
from jaxgen.process.linear import LinearSDE
from jaxgen.solve.noise import sample_keys

__all__ = ["Imputation", "impute"]

# Departure from orthonormality that is taken for rounding.
_TOLERANCE = 1e-4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Imputation:
    """The projection (1), as the predictor-corrector loop calls it; made by ``impute``. A pytree.

    Attributes:
      sde: the process.
      known: values in the original axes whose known coordinates are right, ``(batch, *event)``.
      mask: boolean, of ``known``'s shape.
      basis: orthonormal ``(c, c)``, or ``None`` for the identity.
      event_ndim: axes of one example (static).
      first_index: number of the first example.
    """

    sde: LinearSDE
    known: jax.Array
    mask: jax.Array
    basis: jax.Array | None
    event_ndim: int = dataclasses.field(metadata={"static": True})
    first_index: ArrayLike

    def _draw(self, key: jax.Array, x: jax.Array) -> jax.Array:
        """Standard normal noise like ``x``, per example."""
        split = x.ndim - self.event_ndim
        event = x.shape[split:]

        def one(k: jax.Array) -> jax.Array:
            return jax.random.normal(k, event, x.dtype)

        own = sample_keys(key, x.shape[:split], self.first_index)
        return jax.vmap(one)(own) if split else one(own)

    def _blend(self, x: jax.Array, known: jax.Array) -> jax.Array:
        """``x`` with the known coordinates of ``known``."""
        if self.basis is None:
            return jnp.where(self.mask, known, x)
        basis = self.basis.astype(x.dtype)
        return matmul(jnp.where(self.mask, matmul(known, basis), matmul(x, basis)), basis.T)

    def start(self, key: jax.Array, dtype: Any) -> jax.Array:
        """First state: the known coordinates, and the prior elsewhere, ``(batch, *event)``."""
        known = self.known.astype(dtype)
        unit = self._draw(key, known)
        mu = self.sde.centre(known)
        std = self.sde.sigma(self.sde.t_max) if self.sde.prior_std is None else self.sde.prior_std
        prior = jnp.asarray(std) * unit if mu is None else mu + jnp.asarray(std) * unit
        return self._blend(prior.astype(dtype), known)

    def __call__(
        self, key: jax.Array, x: jax.Array, x_mean: jax.Array, t: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Hold the known coordinates of a state and of its mean at time ``t``, equation (1)."""
        mean, std = self.sde.marginal(self.known.astype(x.dtype), t)
        noisy = mean + (left_broadcast(std, x) * self._draw(key, x)).astype(x.dtype)
        return self._blend(x, noisy), self._blend(x_mean, mean)


def _mask(mask: ArrayLike, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The mask as booleans of ``shape``, and where its values are 0 or 1."""
    given = jnp.asarray(mask)
    if given.ndim > len(shape) or any(
        a not in (1, b) for a, b in zip(given.shape[::-1], shape[::-1], strict=False)
    ):
        raise ValueError(f"mask has shape {given.shape}, which does not broadcast to {shape}")
    known = checks.concrete(mask)
    if known is not None and not np.all((known == 0) | (known == 1)):
        raise ValueError("mask has other values than 0 and 1; expected 1 where y is known, else 0")
    valid = (given == 0) | (given == 1)
    checks.debug_check(jnp.all(valid), "mask has other values than 0 (unknown) and 1 (known)")

    def fit(value: jax.Array) -> jax.Array:
        value = value.reshape((1,) * (len(shape) - value.ndim) + value.shape)
        return jnp.broadcast_to(value, shape)

    return fit(given == 1), fit(valid)


def _basis(basis: ArrayLike | None, channels: int) -> jax.Array | None:
    if basis is None:
        return None
    matrix = checks.floating("basis", basis)
    if matrix.shape != (channels, channels):
        raise ValueError(
            f"basis has shape {matrix.shape}; expected ({channels}, {channels}) for a last axis of "
            f"{channels}"
        )
    known = checks.concrete(basis)
    if known is not None:
        known = np.asarray(known, np.float64)
        error = np.abs(known.T @ known - np.eye(channels)).max()
        if not error < _TOLERANCE:
            raise ValueError(f"basis is not orthonormal: A^T A differs from I by {error:.3g}")
    return matrix


def impute(
    sde: LinearSDE,
    y: ArrayLike,
    mask: ArrayLike,
    *,
    basis: ArrayLike | None = None,
    first_index: ArrayLike = 0,
    event_ndim: int | None = None,
) -> Imputation:
    """The projection that holds known coordinates, for ``solve.predictor_corrector(project=...)``.

    Args:
      sde: the process.
      y: known coordinates, ``(batch, *event)`` or one example if ``event_ndim=y.ndim``; floating.
        Entries where the mask is 0 are not looked at, and may be NaN.
      mask: 1 where a coordinate is known and 0 elsewhere, any dtype; broadcasts to ``y``'s shape
        from the right.
      basis: orthonormal ``(c, c)`` for a last axis of ``c`` entries, its columns the axes in which
        ``y`` and ``mask`` are given; ``None`` for the axes of the sample.
      first_index: number of the first example, for the noise's keys.
      event_ndim: see above.

    Returns:
      An ``Imputation``, called as ``(key, x, x_mean, t) -> (x, x_mean)``; its ``start(key, dtype)``
      is the first state. A traced mask of other values than 0 and 1 makes NaN there, and an error
      under ``checkify``.

    Raises:
      ValueError: shapes that do not fit, mask values other than 0 and 1, a basis that is not
        orthonormal (where known).
      TypeError: ``y`` or ``basis`` is not floating.
    """
    y = checks.floating("y", y, allow_complex=True)
    _, event = batch_event(y, event_ndim)
    held, valid = _mask(mask, y.shape)
    matrix = _basis(basis, y.shape[-1] if event else 0)
    values = jnp.where(held, y, jnp.zeros_like(y))
    if matrix is not None:
        values = matmul(values, matrix.astype(y.dtype).T)
    poisoned = jnp.where(valid, values, jnp.nan)
    return Imputation(sde, poisoned, held | ~valid, matrix, len(event), first_index)
