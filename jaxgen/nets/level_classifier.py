"""Noise-level classifiers: which level of noise a state has, for denoising MCMC.

The convolutional form is that of Kim and Ye (ICML 2023, arXiv 2209.14593): per width a
3 x 3 convolution, ReLU and 2 x 2 average pooling, then one dense layer to the logits. Both are
trained by ``score.level_classification_loss``; beside a score network their cost is small.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from jaxgen.core.arrays import at_least_f32
from jaxgen.nets.layers import Conv3x3, check_call, check_resolution


class LevelClassifier(nn.Module):
    """Logits of ``n_levels`` noise levels for images ``(batch, height, width, channels)``.

    The parameters belong to one resolution.

    Attributes:
        n_levels: number of levels.
        widths: channels of each convolution; each halves the resolution.
        dtype: dtype of the computation, None for that of ``x``; parameters are float32.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = LevelClassifier(n_levels=100, widths=(8, 16))
        >>> x = jnp.ones((4, 8, 8, 1))
        >>> jax.jit(net.init_with_output)(jax.random.key(0), x)[0].shape
        (4, 100)
    """

    n_levels: int
    widths: tuple[int, ...] = (32, 64, 128, 256)
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the logits, ``(batch, n_levels)``, float32 or wider.

        Args:
            x: real floating, ``(batch, height, width, channels)``, sides divisible by
                ``2**len(widths)``.

        Raises:
            ValueError: wrong rank or shape.
            TypeError: a dtype of another kind.
        """
        check_call(x, None, None, None, ndim=4)
        check_resolution(x.shape, 2 ** len(self.widths), len(self.widths))
        h = x.astype(self.dtype or x.dtype)
        for width in self.widths:
            h = nn.avg_pool(nn.relu(Conv3x3(width, dtype=self.dtype)(h)), (2, 2), (2, 2))
        logits = nn.Dense(self.n_levels, dtype=self.dtype)(h.reshape(h.shape[0], -1))
        return logits.astype(at_least_f32(logits.dtype))


class LevelMLP(nn.Module):
    """Logits of ``n_levels`` noise levels for vectors ``(batch, d)``.

    The layers see ``x / sqrt(1 + |x|^2)`` and ``log(1 + |x|^2)``, as the size of a state spans the
    decades of the levels.

    Attributes:
        n_levels: number of levels.
        widths: units of the hidden layers.
        dtype: dtype of the layers, None for that of ``x``; parameters are float32.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = LevelMLP(n_levels=100, widths=(32,))
        >>> x = jnp.ones((4, 2))
        >>> jax.jit(net.init_with_output)(jax.random.key(0), x)[0].shape
        (4, 100)
    """

    n_levels: int
    widths: tuple[int, ...] = (128, 128)
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the logits, ``(batch, n_levels)``, float32 or wider.

        Args:
            x: real floating, ``(batch, d)``.

        Raises:
            ValueError: wrong rank.
            TypeError: a dtype of another kind.
        """
        check_call(x, None, None, None, ndim=2)
        wide = x.astype(at_least_f32(x.dtype))
        square = jnp.sum(wide**2, axis=-1, keepdims=True)
        h = jnp.concatenate([wide * jax.lax.rsqrt(1 + square), jnp.log1p(square)], axis=-1)
        h = h.astype(self.dtype or x.dtype)
        for width in self.widths:
            h = nn.swish(nn.Dense(width, dtype=self.dtype)(h))
        logits = nn.Dense(self.n_levels, dtype=self.dtype)(h)
        return logits.astype(at_least_f32(logits.dtype))
