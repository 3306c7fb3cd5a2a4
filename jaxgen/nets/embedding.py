r"""Embeddings of time and of class labels.

Sinusoidal (Vaswani et al., 2017, section 3.5; in the form of Ho et al., DDPM, 2020), for
``k = 0 .. features/2 - 1``::

    w_k = max_period ** (-k / (features/2 - 1)),   e(t) = [sin(w t), cos(w t)]

Gaussian Fourier features (Tancik et al., 2020; Song et al., 2021, for NCSN++), with fixed
``W ~ N(0, scale^2)``::

    e(t) = [sin(2 pi W t), cos(2 pi W t)]

Everything about time is computed in at least float32, whatever the network's dtype: a bfloat16
time has three digits, and the early steps of a process live below that.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def sinusoidal(t: jax.Array, features: int, *, max_period: float = 10_000.0) -> jax.Array:
    """Embed numbers by sines and cosines of geometrically spaced frequencies.

    Args:
        t: real, ``(n,)``; the fastest frequency is 1 radian per unit of ``t``.
        features: static size of the embedding, even and at least 4.
        max_period: ratio of the fastest to the slowest frequency.

    Returns:
        ``(n, features)``, sines first; float32, or float64 if ``t`` is.

    Raises:
        ValueError: ``t`` is not of rank 1, or ``features`` is odd or below 4.
    """
    _check_vector(t)
    if features < 4 or features % 2:
        raise ValueError(f"features: expected an even number of at least 4, received {features}")
    half = features // 2
    t = _at_least_float32(t)
    exponents = jnp.arange(half, dtype=t.dtype) / (half - 1)
    frequencies = jnp.exp(-jnp.log(jnp.asarray(max_period, t.dtype)) * exponents)
    angles = t[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def fourier_features(t: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Embed numbers by sines and cosines of given frequencies.

    Args:
        t: real, ``(n,)``.
        frequencies: real, ``(m,)``, in cycles per unit of ``t``.

    Returns:
        ``(n, 2 m)``, sines first; float32, or float64 if ``t`` is.

    Raises:
        ValueError: ``t`` is not of rank 1.
    """
    _check_vector(t)
    t = _at_least_float32(t)
    angles = 2 * jnp.pi * t[:, None] * jnp.asarray(frequencies, t.dtype)[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class GaussianFourier(nn.Module):
    """Fourier features with frequencies drawn once from ``N(0, scale^2)`` and then kept.

    The frequencies are the parameter ``frequencies`` behind a ``stop_gradient``, so that they
    are saved and counted with the rest while their gradient is exactly zero. (Weight decay would
    still shrink them: mask it there.)

    Attributes:
        size: number of frequencies; the embedding has twice as many entries.
        scale: their standard deviation, in cycles per unit of ``t``.
    """

    size: int
    scale: float = 16.0

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        """Map ``(n,)`` to ``(n, 2 size)``, in at least float32."""
        frequencies = self.param("frequencies", nn.initializers.normal(self.scale), (self.size,))
        return fourier_features(t, jax.lax.stop_gradient(frequencies))


class TimeEmbedding(nn.Module):
    """Sinusoidal features of ``time_scale * t`` and two dense layers, all in float32.

    The angular frequencies run geometrically from ``time_scale`` down to ``time_scale / 10000``
    radians per unit of ``t``. The default of 1000 thus resolves steps from about 1e-3 to 10, which
    suits times in [0, 1], EDM's ``log(sigma) / 4`` and ``sigma`` itself; a log-SNR, which runs over
    some 30 units, is better served by 100.

    Attributes:
        features: size of the result.
        time_scale: multiplies ``t`` before it is embedded.
    """

    features: int
    time_scale: float = 1000.0

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        """Map ``(n,)`` to ``(n, features)``, in at least float32."""
        h = sinusoidal(self.time_scale * _at_least_float32(t), max(4, self.features // 2 // 2 * 2))
        h = nn.swish(nn.Dense(self.features, dtype=h.dtype)(h))
        return nn.Dense(self.features, dtype=h.dtype)(h)


class LabelEmbedding(nn.Module):
    """A learned vector per class, and one more, of index ``num_classes``, for "no label".

    Attributes:
        num_classes: number of classes.
        features: size of the vectors.
    """

    num_classes: int
    features: int

    @nn.compact
    def __call__(self, label: jax.Array) -> jax.Array:
        """Map integer ``(n,)`` to float32 ``(n, features)``; a label out of range gives NaN."""
        table = self.param(
            "embedding", nn.initializers.normal(1.0), (self.num_classes + 1, self.features)
        )
        # A negative index would count from the end; sent past the end it is filled with NaN.
        index = jnp.where(label < 0, self.num_classes + 1, label)
        return table.at[index].get(mode="fill", fill_value=jnp.nan)


class ConditionEmbedding(nn.Module):
    """``swish`` of the embeddings of time and label, added.

    Attributes:
        features: size of the result.
        num_classes: number of classes, or None for time alone.
        time_scale: see `TimeEmbedding`.
    """

    features: int
    num_classes: int | None = None
    time_scale: float = 1000.0

    @nn.compact
    def __call__(self, t: jax.Array, label: jax.Array | None) -> jax.Array:
        """Map ``(n,)`` and integer ``(n,)`` to ``(n, features)``; None stands for "no label"."""
        h = TimeEmbedding(self.features, self.time_scale)(t)
        if self.num_classes is not None:
            if label is None:
                label = jnp.full(t.shape, self.num_classes, jnp.int32)
            h = h + LabelEmbedding(self.num_classes, self.features)(label).astype(h.dtype)
        return nn.swish(h)


def _at_least_float32(t: Any) -> jax.Array:
    return jnp.asarray(t, jnp.promote_types(jnp.result_type(t), jnp.float32))


def _check_vector(t: jax.Array) -> None:
    if jnp.ndim(t) != 1:
        raise ValueError(f"t: expected shape (n,), received {jnp.shape(t)}")
