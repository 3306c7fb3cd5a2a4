"""A small convolutional classifier: for feature distances, sample quality and guidance.

Its penultimate features serve the Frechet distance in a stated feature space (Heusel et al.,
2017), on data for which no public feature network makes sense; conditioned on the noise level it
is the classifier of class-conditional sampling (Song et al., 2021, section 5).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from jaxgen.nets.embedding import TimeEmbedding
from jaxgen.nets.layers import Conv3x3, check_call, check_resolution, film, norm_groups


class Classifier(nn.Module):
    """Logits of ``num_classes`` classes for images ``(batch, height, width, channels)``.

    Two convolutions and a halving per entry of ``widths``, then a dense layer of ``features``
    units on the flattened grid (so the parameters belong to one resolution), then the logits.

    Attributes:
        num_classes: number of classes.
        widths: channels of each level, finest first.
        feature_size: units of the penultimate layer.
        dropout: rate before the penultimate and the last layer, under ``train=True`` only.
        conditional: whether the network takes a noise level ``t``.
        time_scale: see `TimeEmbedding`.
        dtype: dtype of the computation, None for that of ``x``; parameters are float32.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = Classifier(num_classes=10, widths=(8,), feature_size=16)
        >>> x = jnp.ones((4, 8, 8, 1))
        >>> variables = jax.jit(net.init)(jax.random.key(0), x)
        >>> net.apply(variables, x).shape
        (4, 10)
        >>> net.apply(variables, x, method="features").shape
        (4, 16)
    """

    num_classes: int
    widths: tuple[int, ...] = (32, 64)
    feature_size: int = 128
    dropout: float = 0.0
    conditional: bool = False
    time_scale: float = 1000.0
    dtype: Dtype | None = None

    def setup(self) -> None:
        """Name the layers, which both methods share."""
        pairs = [width for width in self.widths for _ in range(2)]
        self.convs = [Conv3x3(width, dtype=self.dtype) for width in pairs]
        self.norms = [nn.GroupNorm(norm_groups(width, 8), dtype=self.dtype) for width in pairs]
        if self.conditional:
            self.embedding = TimeEmbedding(4 * self.widths[0], self.time_scale)
            self.films = [nn.Dense(2 * width, dtype=self.dtype) for width in pairs]
        self.drop = nn.Dropout(self.dropout)
        self.penultimate = nn.Dense(self.feature_size, dtype=self.dtype)
        self.head = nn.Dense(self.num_classes, dtype=self.dtype)

    def features(self, x: jax.Array, t: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Return the penultimate features.

        Args:
            x: real floating, ``(batch, height, width, channels)``, sides divisible by
                ``2**len(widths)``.
            t: real floating, ``(batch,)``, the noise level, for a conditional network alone.
            train: static; True draws dropout, from ``rngs={"dropout": key}``.

        Returns:
            ``(batch, feature_size)`` in the dtype of ``x``, non-negative.

        Raises:
            ValueError: wrong rank or shape, or ``t`` missing or not expected.
            TypeError: a dtype of another kind.
        """
        check_call(x, t, None, None, ndim=4)
        if (t is not None) != self.conditional:
            expected = "shape (batch,)" if self.conditional else "None"
            received = "None" if t is None else f"shape {jnp.shape(t)}"
            raise ValueError(
                f"t: expected {expected} with conditional={self.conditional}, received {received}"
            )
        check_resolution(x.shape, 2 ** len(self.widths), len(self.widths))
        h = x.astype(self.dtype or x.dtype)
        condition = None if t is None else nn.swish(self.embedding(t)).astype(h.dtype)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            h = norm(conv(h))
            if condition is not None:
                h = film(h, self.films[i](condition))
            h = nn.relu(h)
            if i % 2:
                h = nn.max_pool(h, (2, 2), (2, 2))
        h = self.drop(h.reshape(h.shape[0], -1), deterministic=not train)
        return nn.relu(self.penultimate(h)).astype(x.dtype)

    def __call__(self, x: jax.Array, t: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Return the logits, ``(batch, num_classes)``, float32 or wider; see `features`."""
        h = self.features(x, t, train)
        logits = self.head(self.drop(h, deterministic=not train))
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
