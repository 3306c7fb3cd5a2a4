"""What the networks of this room share: checks of the call, convolution, norm, attention.

The convolution chooses its form by static shape. XLA's CPU convolutions reach a tenth of the
machine's speed on grids of a few pixels, where the same sum written as one matrix product of the
nine shifted copies ("im2col") is up to ten times as fast; from about 8 x 8 x 64 on the copies
cost more than they save. Both forms are the same function of the same parameters.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer

# Entries of one example's feature map up to which the matrix product is used.
_IM2COL_ENTRIES = 3072


class Conv3x3(nn.Module):
    """A 3 x 3 convolution with bias and zero padding, stride 1, on ``(n, h, w, c)``.

    Attributes:
        features: output channels.
        dtype: dtype of the computation; the parameters ``kernel`` (3, 3, c, features) and
            ``bias`` (features,) are float32.
        kernel_init: initialiser of the kernel.
    """

    features: int
    dtype: Dtype | None = None
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``(n, h, w, c)`` to ``(n, h, w, features)``."""
        n, height, width, channels = x.shape
        dtype = self.dtype or x.dtype
        kernel = self.param("kernel", self.kernel_init, (3, 3, channels, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = x.astype(dtype), kernel.astype(dtype), bias.astype(dtype)
        if height * width * channels <= _IM2COL_ENTRIES:
            padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
            rows = jnp.concatenate(shifted, axis=-1).reshape(-1, 9 * channels)
            y = (rows @ kernel.reshape(9 * channels, self.features)).reshape(
                n, height, width, self.features
            )
        else:
            y = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return y + bias[None, None, None, :]


class SelfAttention(nn.Module):
    """``x + out(attention(norm(x)))`` over all pixels, one head, the sum divided by ``rescale``.

    Attributes:
        groups: groups of the norm.
        rescale: divides the residual sum (``sqrt(2)`` in NCSN++).
        kernel_init: initialiser of the query, key and value maps.
        out_init: initialiser of the last map.
        dtype: dtype of the computation; the softmax is float32.
    """

    groups: int
    rescale: float = 1.0
    kernel_init: Initializer = nn.initializers.lecun_normal()
    out_init: Initializer = nn.initializers.zeros
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``(n, h, w, c)`` to the same shape."""
        n, height, width, channels = x.shape
        h = nn.GroupNorm(self.groups, dtype=self.dtype)(x).reshape(n, height * width, 1, channels)
        query, key, value = (
            nn.Dense(channels, dtype=self.dtype, kernel_init=self.kernel_init, name=name)(h)
            for name in ("query", "key", "value")
        )
        h = jax.nn.dot_product_attention(query, key, value).reshape(x.shape)
        h = nn.Dense(channels, dtype=self.dtype, kernel_init=self.out_init, name="out")(h)
        return divide(x + h, self.rescale)


def film(h: jax.Array, scale_shift: jax.Array) -> jax.Array:
    """Return ``(1 + scale) h + shift``, one scale and one shift a channel.

    Args:
        h: ``(n, ..., c)``.
        scale_shift: ``(n, 2 c)``, the scales first.

    Returns:
        The shape of ``h``.
    """
    shape = (h.shape[0],) + (1,) * (h.ndim - 2) + (2 * h.shape[-1],)
    scale, shift = jnp.split(scale_shift.reshape(shape), 2, axis=-1)
    return h * (1 + scale) + shift


def norm_groups(channels: int, groups: int) -> int:
    """Return the number of groups that divides the channels and does not exceed ``groups``."""
    return math.gcd(channels, groups)


def check_call(x: Any, t: Any, label: Any, num_classes: int | None, *, ndim: int) -> None:
    """Check the arguments of ``net.apply(variables, x, t, label)``.

    Raises:
        ValueError: ``x`` is not of rank ``ndim``, ``t`` is not ``(batch,)``, or ``label`` is not
            ``(batch,)`` or given to a network without classes.
        TypeError: ``x`` or ``t`` is not real floating, or ``label`` not integer.
    """
    shape = jnp.shape(x)
    if len(shape) != ndim:
        expected = "(batch, height, width, channels)" if ndim == 4 else "(batch, d)"
        raise ValueError(f"x: expected shape {expected}, received {shape}")
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise TypeError(f"x: expected a real floating dtype, received {jnp.result_type(x)}")
    if t is not None:
        if jnp.shape(t) != shape[:1]:
            raise ValueError(f"t: expected shape {shape[:1]}, received {jnp.shape(t)}")
        if not jnp.issubdtype(jnp.result_type(t), jnp.floating):
            raise TypeError(f"t: expected a real floating dtype, received {jnp.result_type(t)}")
    if label is None:
        return
    if num_classes is None:
        raise ValueError(
            "label: expected None, as the network was built with num_classes=None, received an "
            f"array of shape {jnp.shape(label)}"
        )
    if jnp.shape(label) != shape[:1]:
        raise ValueError(f"label: expected shape {shape[:1]}, received {jnp.shape(label)}")
    if not jnp.issubdtype(jnp.result_type(label), jnp.integer):
        raise TypeError(f"label: expected an integer dtype, received {jnp.result_type(label)}")


def check_resolution(shape: tuple[int, ...], divisor: int, levels: int) -> None:
    """Check that every level of a U-Net halves evenly.

    Raises:
        ValueError: height or width is not a multiple of ``divisor``.
    """
    if shape[1] % divisor or shape[2] % divisor:
        raise ValueError(
            f"x: expected height and width divisible by {divisor} for {levels} levels, received "
            f"{shape}"
        )


def divide(x: jax.Array, value: float) -> jax.Array:
    """Divide by a static number in the dtype of ``x``."""
    return x if value == 1.0 else x / jnp.asarray(value, x.dtype)
