"""A small convolutional U-Net for images of 8 x 8 to 64 x 64, quick on a CPU.

The plan is that of Ho et al. (DDPM, 2020): residual blocks at falling and rising resolution with
skip connections, self-attention at chosen resolutions. Time and class enter as scale and shift
after the second norm (Dhariwal and Nichol, 2021). Where the cost lies, it differs: resolution
changes by folding pixels into channels and one matrix product, and a skip joins through one
matrix product (so that no 3 x 3 convolution runs at double width).

Every block ends in a zero-initialised layer, and so does the network: it is zero until its first
update, and each block is the identity.
"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from jaxgen.nets.embedding import ConditionEmbedding
from jaxgen.nets.layers import (
    Conv3x3,
    SelfAttention,
    check_call,
    check_resolution,
    film,
    norm_groups,
)
from jaxgen.nets.resample import depth_to_space, space_to_depth


class ResidualBlock(nn.Module):
    """``skip(h) + conv(dropout(swish(film(norm(conv(swish(norm(h))))))))``.

    Attributes:
        features: output channels; the skip is a 1 x 1 map if the input has another number.
        dropout: rate, under ``train=True`` only.
        groups: groups of the norms at most.
        dtype: dtype of the computation.
    """

    features: int
    dropout: float = 0.0
    groups: int = 8
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, h: jax.Array, condition: jax.Array | None, train: bool) -> jax.Array:
        """Map ``(n, h, w, c)`` and ``(n, m)`` (or None) to ``(n, h, w, features)``."""
        dtype = self.dtype
        r = nn.GroupNorm(norm_groups(h.shape[-1], self.groups), dtype=dtype)(h)
        r = Conv3x3(self.features, dtype=dtype)(nn.swish(r))
        r = nn.GroupNorm(norm_groups(self.features, self.groups), dtype=dtype)(r)
        if condition is not None:
            r = film(r, nn.Dense(2 * self.features, dtype=dtype)(condition))
        r = nn.Dropout(self.dropout, deterministic=not train)(nn.swish(r))
        r = Conv3x3(self.features, dtype=dtype, kernel_init=nn.initializers.zeros)(r)
        if h.shape[-1] != self.features:
            h = nn.Dense(self.features, dtype=dtype)(h)
        return h + r


class UNet(nn.Module):
    """Map images ``x`` of shape ``(batch, height, width, channels)``, given ``t``, to the like.

    Attributes:
        width: channels of the finest level.
        channel_mults: channels of each level as multiples of ``width``, finest first. Each level
            after the first halves the resolution: 8 x 8 with three levels is 8, 4, 2.
        blocks: residual blocks per level, on the way down and again on the way up.
        attention: resolutions (heights, after folding) with self-attention after each block;
            the coarsest level's also adds one in the middle.
        patch: pixels folded into channels before the first layer; 2 makes an image of 64 x 64
            cost as much as one of 32 x 32.
        num_classes: number of classes, or None for a network without labels.
        dropout: rate within the blocks, under ``train=True`` only.
        time_scale: angular frequency, in radians per unit of ``t``, of the fastest of the time
            features (see `TimeEmbedding`): 1000 suits ``t`` in [0, 1], 100 a log-SNR.
        groups: groups of the norms at most.
        dtype: dtype of the computation, None for that of ``x``; parameters are float32.
        remat: keep of each block its input only, and work the rest out again in the backward pass:
            less memory for up to a third more arithmetic, on accelerators (XLA's CPU compiler
            saves nothing). Parameters and results are the same.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = UNet(width=8, channel_mults=(1, 2), num_classes=10)
        >>> x, t = jnp.ones((4, 8, 8, 1)), jnp.full((4,), 0.5)
        >>> variables = jax.jit(net.init)(jax.random.key(0), x, t)
        >>> jax.jit(net.apply)(variables, x, t, label=jnp.arange(4)).shape
        (4, 8, 8, 1)
    """

    width: int = 32
    channel_mults: tuple[int, ...] = (1, 3)
    blocks: int = 1
    attention: tuple[int, ...] = ()
    patch: int = 1
    num_classes: int | None = None
    dropout: float = 0.0
    time_scale: float = 1000.0
    groups: int = 8
    dtype: Dtype | None = None
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        label: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Evaluate the network.

        Args:
            x: real floating, ``(batch, height, width, channels)``, sides divisible by
                ``patch * 2**(levels - 1)``.
            t: real floating, ``(batch,)``, whatever number the caller conditions on.
            label: integer, ``(batch,)``, in ``[0, num_classes]``; ``num_classes`` and None both
                mean "no label". Out of range gives NaN.
            train: static; True draws dropout, from ``rngs={"dropout": key}``.

        Returns:
            The shape and dtype of ``x``.

        Raises:
            ValueError: wrong rank or shape, or a label without classes.
            TypeError: a dtype of another kind.
        """
        check_call(x, t, label, self.num_classes, ndim=4)
        levels = len(self.channel_mults)
        check_resolution(x.shape, self.patch * 2 ** (levels - 1), levels)
        dtype = self.dtype or x.dtype
        condition = ConditionEmbedding(4 * self.width, self.num_classes, self.time_scale)(t, label)
        condition = condition.astype(dtype)
        widths = [self.width * mult for mult in self.channel_mults]

        residual, attention = ResidualBlock, SelfAttention
        if self.remat:
            residual = nn.remat(ResidualBlock, static_argnums=(3,))
            attention = nn.remat(SelfAttention)
        # Named by hand: left alone, Flax puts "Checkpoint" before a name.
        number = itertools.count()
        attending = itertools.count()

        def block(h: jax.Array, features: int) -> jax.Array:
            name = f"ResidualBlock_{next(number)}"
            h = residual(features, self.dropout, self.groups, dtype, name=name)(h, condition, train)
            return attend(h)

        def attend(h: jax.Array) -> jax.Array:
            if h.shape[1] not in self.attention:
                return h
            groups, name = norm_groups(h.shape[-1], self.groups), f"SelfAttention_{next(attending)}"
            return attention(groups, dtype=dtype, name=name)(h)

        h = Conv3x3(widths[0], dtype=dtype)(space_to_depth(x.astype(dtype), self.patch))
        skips = []
        for level, features in enumerate(widths):
            if level > 0:
                h = nn.Dense(features, dtype=dtype)(space_to_depth(h, 2))
            for _ in range(self.blocks):
                h = block(h, features)
                skips.append(h)
        h = block(h, widths[-1])
        for level, features in reversed(list(enumerate(widths))):
            for _ in range(self.blocks):
                h = nn.Dense(features, dtype=dtype)(jnp.concatenate([h, skips.pop()], axis=-1))
                h = block(h, features)
            if level > 0:
                h = depth_to_space(nn.Dense(4 * widths[level - 1], dtype=dtype)(h), 2)

        h = nn.swish(nn.GroupNorm(norm_groups(h.shape[-1], self.groups), dtype=dtype)(h))
        out = Conv3x3(x.shape[-1] * self.patch**2, dtype=dtype, kernel_init=nn.initializers.zeros)(
            h
        )
        return depth_to_space(out, self.patch).astype(x.dtype)
