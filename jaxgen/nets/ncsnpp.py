r"""NCSN++ and DDPM++ (Song et al., "Score-Based Generative Modeling through SDEs", ICLR 2021).

Appendix H of the paper, in the form of the published configurations for CIFAR-10. Residual blocks
are BigGAN's (Brock et al., 2019), which change resolution inside the block; sums of a block and
its skip are divided by sqrt(2); attention stands after every block of the 16 x 16 level on the
way down, once in the middle and once at the end of that level on the way up.

NCSN++ resamples by FIR filters, feeds the shrunken input back at every level ("progressive
input"), embeds ``log t`` by Gaussian Fourier features and divides its output by ``t``, which is
the noise level sigma: it is a score under a variance-exploding process. DDPM++ averages and
repeats pixels, embeds ``999 t`` by sinusoids and predicts noise under a variance-preserving
process with ``t`` in [0, 1]. As fields::

    ncsnpp:  score  s(x, t) = net(x, sde.sigma(t))      data in [0, 1]
    ddpmpp:  noise  e(x, t) = net(x, t)                 data in [-1, 1]

Left out: the residual variant of the progressive output and DDPM's own blocks. The "output skip"
and "input skip" variants of the pyramids serve the smaller networks of later work (StoRM,
Lemercier et al., 2023: one block a level, ``attention=()``).
"""

import dataclasses
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer

from jaxgen.nets.embedding import GaussianFourier, LabelEmbedding, sinusoidal
from jaxgen.nets.layers import (
    Conv3x3,
    SelfAttention,
    check_call,
    check_resolution,
    divide,
)
from jaxgen.nets.resample import FIR_KERNEL, fir_down, fir_pad, fir_up, mean_down, nearest_up

_ROOT_TWO = math.sqrt(2.0)


@dataclasses.dataclass(frozen=True)
class NCSNppConfig:
    """The shape of an `NCSNpp`; the defaults are DDPM++ for CIFAR-10.

    Attributes:
        width: channels of the finest level.
        channel_mults: channels of each level as multiples of ``width``, finest first.
        blocks: residual blocks per level on the way down; one more on the way up.
        attention: heights with self-attention.
        dropout: rate within the blocks, under ``train=True`` only.
        resample: "mean" (2 x 2 means, nearest neighbours) or "fir".
        fir_kernel: taps of the filter.
        progressive_input: "none"; "residual": a strided convolution of the input pyramid, whose
            normalised sum with the features replaces both; "input_skip": the filtered input,
            mapped to the features' channels and added.
        progressive_output: "none" or "output_skip": an image is read out at every level, and
            the enlarged images are added up.
        embedding: "sinusoidal" of ``time_scale * t`` or "fourier" of ``log t``.
        time_scale: multiplies ``t`` before the sinusoids.
        fourier_scale: standard deviation of the Fourier frequencies.
        divide_by_t: divide the output by ``t``, which is then the noise level.
        centered: whether images come in [-1, 1]; otherwise in [0, 1], and ``2 x - 1`` is fed.
        num_classes: number of classes, or None. A label's embedding is added to that of time;
            the published networks have none.

    Raises:
        ValueError: an unknown name or an empty size.
    """

    width: int = 128
    channel_mults: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 4
    attention: tuple[int, ...] = (16,)
    dropout: float = 0.1
    resample: Literal["mean", "fir"] = "mean"
    fir_kernel: tuple[float, ...] = FIR_KERNEL
    progressive_input: Literal["none", "residual", "input_skip"] = "none"
    progressive_output: Literal["none", "output_skip"] = "none"
    embedding: Literal["sinusoidal", "fourier"] = "sinusoidal"
    time_scale: float = 999.0
    fourier_scale: float = 16.0
    divide_by_t: bool = False
    centered: bool = True
    num_classes: int | None = None

    def __post_init__(self) -> None:
        """Check names and sizes."""
        for field, allowed in (
            ("resample", ("mean", "fir")),
            ("progressive_input", ("none", "residual", "input_skip")),
            ("progressive_output", ("none", "output_skip")),
            ("embedding", ("sinusoidal", "fourier")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{field}: expected one of {allowed}, received {getattr(self, field)!r}"
                )
        if self.width < 4 or self.width % 4:
            raise ValueError(f"width: expected a multiple of 4, received {self.width}")
        if self.blocks < 1 or not self.channel_mults:
            raise ValueError(
                "blocks, channel_mults: expected at least one block and one level, received "
                f"{self.blocks} and {self.channel_mults}"
            )


_DDPMPP = NCSNppConfig()
_NCSNPP = NCSNppConfig(
    resample="fir",
    progressive_input="residual",
    embedding="fourier",
    divide_by_t=True,
    centered=False,
)


def _slimflow(width: int, channel_mults: tuple[int, ...], blocks: int) -> NCSNppConfig:
    """A small DDPM++ of SlimFlow (Zhu et al., arXiv 2407.12718), named by its parameters."""
    return NCSNppConfig(width=width, channel_mults=channel_mults, blocks=blocks, dropout=0.15)


NCSNPP_CONFIGS: dict[str, NCSNppConfig] = {
    "ncsnpp_cifar10": _NCSNPP,
    "ncsnpp_deep_cifar10": dataclasses.replace(_NCSNPP, blocks=8),
    "ddpmpp_cifar10": _DDPMPP,
    "ddpmpp_deep_cifar10": dataclasses.replace(_DDPMPP, blocks=8),
    "slimflow_27_9m": _slimflow(128, (1, 2, 2), 2),
    "slimflow_15_7m": _slimflow(96, (1, 2, 2), 2),
    "slimflow_7_0m": _slimflow(64, (1, 2, 2), 2),
    "slimflow_3_4m": _slimflow(64, (1, 1, 2), 1),
}


def ncsnpp(name: str, *, dtype: Dtype | None = None) -> "NCSNpp":
    """Build a published network by the name of its configuration in `NCSNPP_CONFIGS`.

    Args:
        name: one of ``ncsnpp_cifar10``, ``ncsnpp_deep_cifar10``, ``ddpmpp_cifar10``,
            ``ddpmpp_deep_cifar10``, and SlimFlow's ``slimflow_27_9m``, ``slimflow_15_7m``,
            ``slimflow_7_0m`` and ``slimflow_3_4m``.
        dtype: dtype of the computation, None for that of the input.

    Returns:
        The module.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> ncsnpp("ddpmpp_cifar10").config.blocks
        4
    """
    if name not in NCSNPP_CONFIGS:
        raise ValueError(f"name: expected one of {tuple(NCSNPP_CONFIGS)}, received {name!r}")
    return NCSNpp(NCSNPP_CONFIGS[name], dtype=dtype)


def _scaled(scale: float = 1.0) -> Initializer:
    return nn.initializers.variance_scaling(scale, "fan_avg", "uniform")


# "Zero" of the published networks: small enough, yet every gradient is alive from the first step.
_TINY = 1e-10


def _groups(channels: int) -> int:
    return math.gcd(channels, min(channels // 4, 32))


def _norm(h: jax.Array, dtype: Dtype, name: str) -> jax.Array:
    return nn.GroupNorm(_groups(h.shape[-1]), dtype=dtype, name=name)(h)


class BigGANBlock(nn.Module):
    """Residual block that may halve or double the resolution inside.

    Attributes:
        features: output channels.
        config: the network's configuration.
        resample: "none", "down" or "up".
        dtype: dtype of the computation.
    """

    features: int
    config: NCSNppConfig
    resample: Literal["none", "down", "up"] = "none"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array, train: bool) -> jax.Array:
        """Map ``(n, h, w, c)`` and ``(n, m)`` to ``(n, h', w', features)``."""
        dtype = self.dtype
        h = nn.swish(_norm(x, dtype, "norm_in"))
        if self.resample != "none":
            change = _down if self.resample == "down" else _up
            h, x = change(h, self.config), change(x, self.config)
        h = Conv3x3(self.features, dtype, _scaled(), name="conv_in")(h)
        shift = nn.Dense(self.features, dtype=dtype, kernel_init=_scaled(), name="time")(condition)
        h = h + shift[:, None, None, :]
        h = nn.swish(_norm(h, dtype, "norm_out"))
        h = nn.Dropout(self.config.dropout, deterministic=not train)(h)
        h = Conv3x3(self.features, dtype, _scaled(_TINY), name="conv_out")(h)
        if x.shape[-1] != self.features or self.resample != "none":
            # A 1 x 1 convolution on channels-last images is a dense layer.
            x = nn.Dense(self.features, dtype=dtype, kernel_init=_scaled(), name="skip")(x)
        return divide(x + h, _ROOT_TWO)


class StridedFIRConv(nn.Module):
    """FIR filter, then a 3 x 3 convolution with stride 2: halves the input pyramid.

    Attributes:
        features: output channels.
        kernel: taps of the filter.
        dtype: dtype of the computation.
    """

    features: int
    kernel: tuple[float, ...]
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``(n, h, w, c)`` to ``(n, h/2, w/2, features)``."""
        conv = nn.Conv(
            self.features,
            (3, 3),
            strides=2,
            padding="VALID",
            dtype=self.dtype,
            kernel_init=_scaled(),
        )
        return conv(fir_pad(x, self.kernel, extra=2))


class NCSNpp(nn.Module):
    """NCSN++ or DDPM++, by configuration, on images ``(batch, height, width, channels)``.

    Attributes:
        config: an `NCSNppConfig`; `NCSNPP_CONFIGS` has the published ones.
        dtype: dtype of the computation, None for that of ``x``; parameters, the time embedding
            and the division by ``t`` are float32.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = NCSNpp(NCSNPP_CONFIGS["ncsnpp_cifar10"])
        >>> x, t = jnp.zeros((1, 32, 32, 3)), jnp.ones((1,))
        >>> shapes = jax.eval_shape(net.init, jax.random.key(0), x, t)
        >>> sum(leaf.size for leaf in jax.tree.leaves(shapes))
        62758915
    """

    config: NCSNppConfig
    dtype: Dtype | None = None

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
                ``2**(levels - 1)``.
            t: real floating, ``(batch,)``: the positive noise level with ``embedding="fourier"``
                (zero gives NaN), otherwise the time in [0, 1].
            label: integer, ``(batch,)``, in ``[0, num_classes]``; ``num_classes`` and None both
                mean "no label". Out of range gives NaN.
            train: static; True draws dropout, from ``rngs={"dropout": key}``.

        Returns:
            The shape and dtype of ``x``.

        Raises:
            ValueError: wrong rank or shape, or a label without classes.
            TypeError: a dtype of another kind.
        """
        config = self.config
        check_call(x, t, label, config.num_classes, ndim=4)
        levels = len(config.channel_mults)
        check_resolution(x.shape, 2 ** (levels - 1), levels)
        dtype = self.dtype or x.dtype
        condition = self._condition(t, label).astype(dtype)
        widths = [config.width * mult for mult in config.channel_mults]
        channels = x.shape[-1]

        def block(
            h: jax.Array, features: int, resample: Literal["none", "down", "up"] = "none"
        ) -> jax.Array:
            return BigGANBlock(features, config, resample, dtype)(h, condition, train)

        def attend(h: jax.Array, *, everywhere: bool = False) -> jax.Array:
            if not everywhere and h.shape[1] not in config.attention:
                return h
            groups = _groups(h.shape[-1])
            return SelfAttention(groups, _ROOT_TWO, _scaled(0.1), _scaled(_TINY), dtype)(h)

        def read_out(h: jax.Array, name: str) -> jax.Array:
            h = nn.swish(_norm(h, dtype, f"norm_{name}"))
            return Conv3x3(channels, dtype, _scaled(_TINY), name=f"conv_{name}")(h)

        pyramid = x.astype(dtype) if config.centered else 2 * x.astype(dtype) - 1
        skips = [Conv3x3(config.width, dtype, _scaled(), name="conv_in")(pyramid)]
        for level, features in enumerate(widths):
            for _ in range(config.blocks):
                skips.append(attend(block(skips[-1], features)))
            if level < levels - 1:
                h = block(skips[-1], features, "down")
                h, pyramid = self._feed(h, pyramid, dtype)
                skips.append(h)

        h = block(skips[-1], widths[-1])
        h = attend(h, everywhere=True)
        h = block(h, widths[-1])

        image: jax.Array | None = None
        for level, features in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), features)
            h = attend(h)
            if config.progressive_output == "output_skip":
                more = read_out(h, f"out_{level}")
                image = more if image is None else _up(image, config) + more
            if level > 0:
                h = block(h, features, "up")

        out = read_out(h, "out") if image is None else image
        if config.divide_by_t:
            level_of_noise = t.astype(jnp.promote_types(t.dtype, jnp.float32))
            out = out.astype(level_of_noise.dtype) / level_of_noise[:, None, None, None]
        return out.astype(x.dtype)

    def _condition(self, t: jax.Array, label: jax.Array | None) -> jax.Array:
        """Embed time, and the label if there are classes, in at least float32."""
        config, features = self.config, 4 * self.config.width
        t = t.astype(jnp.promote_types(t.dtype, jnp.float32))
        if config.embedding == "fourier":
            h = GaussianFourier(config.width, config.fourier_scale)(jnp.log(t))
        else:
            h = sinusoidal(config.time_scale * t, config.width)
        h = nn.Dense(features, dtype=h.dtype, kernel_init=_scaled(), name="time_in")(h)
        h = nn.Dense(features, dtype=h.dtype, kernel_init=_scaled(), name="time_out")(nn.swish(h))
        if config.num_classes is not None:
            if label is None:
                label = jnp.full(t.shape, config.num_classes, jnp.int32)
            h = h + LabelEmbedding(config.num_classes, features)(label).astype(h.dtype)
        return nn.swish(h)

    def _feed(self, h: jax.Array, pyramid: jax.Array, dtype: Dtype) -> tuple[jax.Array, jax.Array]:
        """Add the input pyramid, halved, to the features of the next level."""
        config, features = self.config, h.shape[-1]
        if config.progressive_input == "none":
            return h, pyramid
        if config.progressive_input == "input_skip":
            pyramid = _down(pyramid, config)
            return h + nn.Dense(features, dtype=dtype, kernel_init=_scaled())(pyramid), pyramid
        if config.resample == "fir":
            pyramid = StridedFIRConv(features, config.fir_kernel, dtype)(pyramid)
        else:
            pyramid = nn.Conv(features, (3, 3), strides=2, dtype=dtype, kernel_init=_scaled())(
                pyramid
            )
        h = divide(pyramid + h, _ROOT_TWO)
        return h, h


def _down(x: jax.Array, config: NCSNppConfig) -> jax.Array:
    return fir_down(x, config.fir_kernel) if config.resample == "fir" else mean_down(x)


def _up(x: jax.Array, config: NCSNppConfig) -> jax.Array:
    return fir_up(x, config.fir_kernel) if config.resample == "fir" else nearest_up(x)
