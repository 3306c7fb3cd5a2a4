r"""Transformers that predict clean tokens from partly masked ones: without time, and with it.

``RADDTransformer`` (Ou et al., arXiv 2406.03736, section 3.1) is a bidirectional transformer that
is told nothing of time, since the conditionals of clean data have none in them: pre-LayerNorm,
attention without biases and with rotary positions on queries and keys (Su et al., arXiv
2104.09864), a tanh-GELU MLP of four times the width, and a last layer that starts at zero. The
biases of the norms in the blocks start at one, as published: what all tokens have in common lets
a head prefer a distance before it knows a token, and so leave the frequencies of characters sooner.

``TimedTransformer`` is its rival, the same with the share of masked tokens given to every block as
scale, shift and gate (adaLN-zero; Peebles and Xie, arXiv 2212.09748), as in SEDD and MDLM.

Both give logits of the real tokens only: the mask has none, so it can have no probability. (The
published network has one for it too, and drops it.)
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from jaxgen.nets.embedding import TimeEmbedding

__all__ = ["RADDTransformer", "TimedTransformer"]

_BASE = 10_000.0


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions: pairs of channels turned by angles that grow along axis 1.

    Args:
        x: ``(n, length, heads, d)``, ``d`` even; channel ``j`` is paired with ``j + d/2``.

    Returns:
        The shape and dtype of ``x``; angles are float32.
    """
    length, half = x.shape[1], x.shape[-1] // 2
    frequency = _BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency[None]
    cos, sin = (f(angle)[None, :, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class _Block(nn.Module):
    """Attention and MLP; with a condition ``(n, c)``, scaled, shifted and gated by it."""

    heads: int
    dropout: float
    dtype: Dtype | None

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array | None, train: bool) -> jax.Array:
        n, length, width = x.shape
        terms: list[jax.Array | None] = [None] * 6
        if condition is not None:
            zeros = nn.initializers.zeros
            out = nn.Dense(6 * width, dtype=self.dtype, kernel_init=zeros, name="modulation")(
                condition
            )
            terms = list(jnp.split(out[:, None, :], 6, axis=-1))

        def normed(x: jax.Array, shift: jax.Array | None, scale: jax.Array | None) -> jax.Array:
            h = nn.LayerNorm(dtype=self.dtype, bias_init=nn.initializers.ones)(x)
            return h if shift is None or scale is None else h * (1 + scale) + shift

        def added(x: jax.Array, h: jax.Array, gate: jax.Array | None) -> jax.Array:
            h = nn.Dropout(self.dropout, deterministic=not train)(h)
            return x + (h if gate is None else gate * h)

        h = normed(x, terms[0], terms[1])
        qkv = nn.Dense(3 * width, use_bias=False, dtype=self.dtype, name="qkv")(h)
        query, key, value = jnp.split(qkv.reshape(n, length, 3 * self.heads, -1), 3, axis=2)
        h = jax.nn.dot_product_attention(rotate(query), rotate(key), value).reshape(x.shape)
        h = nn.Dense(width, use_bias=False, dtype=self.dtype, name="out")(h)
        x = added(x, h, terms[2])
        h = nn.Dense(4 * width, dtype=self.dtype, name="up")(normed(x, terms[3], terms[4]))
        h = nn.Dense(width, dtype=self.dtype, name="down")(nn.gelu(h, approximate=True))
        return added(x, h, terms[5])


class _Body(nn.Module):
    """Embedding, blocks and the last layer, with or without a condition."""

    vocabulary: int
    width: int
    depth: int
    heads: int
    dropout: float
    dtype: Dtype | None
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array | None, train: bool) -> jax.Array:
        _check(x, self.vocabulary, self.width, self.heads)
        table = self.param(
            "embedding", nn.initializers.normal(0.5), (self.vocabulary + 1, self.width)
        )
        dtype = self.dtype or table.dtype
        # A negative id would count from the end; sent past the end it is filled with NaN.
        index = jnp.where(x < 0, self.vocabulary + 1, x.astype(jnp.int32))
        h = table.astype(dtype).at[index].get(mode="fill", fill_value=jnp.nan)
        make = nn.remat(_Block, static_argnums=(3,)) if self.remat else _Block
        for i in range(self.depth):
            block = make(self.heads, self.dropout, self.dtype, name=f"block_{i}")
            h = block(h, condition, train)
        h = nn.LayerNorm(dtype=self.dtype, name="norm")(h)
        # In float32: a softmax over many tokens in bfloat16 loses mass.
        return nn.Dense(
            self.vocabulary, kernel_init=nn.initializers.zeros, dtype=jnp.float32, name="logits"
        )(h)


class RADDTransformer(nn.Module):
    """Map token ids ``(n, l)`` to logits ``(n, l, V)`` of clean tokens; time takes no part.

    The logits are zero until the first update, since the last layer starts at zero.

    Attributes:
        vocabulary: number V of real tokens; the mask is the id V.
        width: channels, a multiple of ``2 heads``.
        depth: blocks.
        heads: attention heads.
        dropout: rate after attention and MLP, under ``train=True`` only.
        dtype: dtype of the computation, None for float32; parameters and logits are float32.
        remat: keep of each block its input only, and work the rest out again in the backward pass.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = RADDTransformer(vocabulary=27, width=32, depth=2, heads=2)
        >>> x = jnp.full((4, 16), 27)
        >>> variables = jax.jit(net.init)(jax.random.key(0), x)
        >>> net.apply(variables, x).shape
        (4, 16, 27)
    """

    vocabulary: int
    width: int = 128
    depth: int = 4
    heads: int = 4
    dropout: float = 0.0
    dtype: Dtype | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Evaluate the network.

        Args:
            x: integer ids in ``[0, V]``, ``(n, l)``; an id out of range gives NaN.
            train: static; True draws dropout, from ``rngs={"dropout": key}``.

        Returns:
            ``(n, l, V)``, float32.

        Raises:
            ValueError: wrong rank, or a width that the heads do not divide evenly.
            TypeError: ids that are not integer.
        """
        body = _Body(
            self.vocabulary,
            self.width,
            self.depth,
            self.heads,
            self.dropout,
            self.dtype,
            self.remat,
            name="body",
        )
        return body(x, None, train)


class TimedTransformer(nn.Module):
    """Map token ids ``(n, l)`` and the share of masked tokens ``(n,)`` to logits ``(n, l, V)``.

    The blocks of ``RADDTransformer``, each scaled, shifted and gated by the share (adaLN-zero),
    which takes ``6 width (condition + 1)`` more parameters a block.

    Attributes:
        vocabulary: see ``RADDTransformer``, as are the others.
        width: channels.
        depth: blocks.
        heads: attention heads.
        condition: features of the share that the blocks are given, at least 4.
        dropout: rate.
        dtype: dtype of the computation.
        remat: see ``RADDTransformer``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = TimedTransformer(vocabulary=27, width=32, depth=2, heads=2)
        >>> x, lam = jnp.full((4, 16), 27), jnp.full((4,), 0.5)
        >>> variables = jax.jit(net.init)(jax.random.key(0), x, lam)
        >>> net.apply(variables, x, lam).shape
        (4, 16, 27)
    """

    vocabulary: int
    width: int = 128
    depth: int = 4
    heads: int = 4
    condition: int = 32
    dropout: float = 0.0
    dtype: Dtype | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, lam: jax.Array, train: bool = False) -> jax.Array:
        """Evaluate the network.

        Args:
            x: integer ids in ``[0, V]``, ``(n, l)``; an id out of range gives NaN.
            lam: real floating, ``(n,)``, the probability of being masked or the share that is.
            train: static; True draws dropout, from ``rngs={"dropout": key}``.

        Returns:
            ``(n, l, V)``, float32.

        Raises:
            ValueError: wrong rank or shape, or a width that the heads do not divide evenly.
            TypeError: ids that are not integer, or ``lam`` not floating.
        """
        if jnp.shape(lam) != jnp.shape(x)[:1]:
            raise ValueError(f"lam: expected shape {jnp.shape(x)[:1]}, received {jnp.shape(lam)}")
        if not jnp.issubdtype(jnp.result_type(lam), jnp.floating):
            raise TypeError(f"lam: expected a floating dtype, received {jnp.result_type(lam)}")
        body = _Body(
            self.vocabulary,
            self.width,
            self.depth,
            self.heads,
            self.dropout,
            self.dtype,
            self.remat,
            name="body",
        )
        return body(x, nn.swish(TimeEmbedding(self.condition)(lam)), train)


def _check(x: jax.Array, vocabulary: int, width: int, heads: int) -> None:
    if jnp.ndim(x) != 2:
        raise ValueError(f"x: expected shape (n, length), received {jnp.shape(x)}")
    if not jnp.issubdtype(jnp.result_type(x), jnp.integer):
        raise TypeError(f"x: expected integer token ids, received {jnp.result_type(x)}")
    if vocabulary < 2:
        raise ValueError(f"vocabulary: expected at least 2, received {vocabulary}")
    if heads < 1 or width % (2 * heads):
        raise ValueError(
            f"width: expected a multiple of 2 heads, {2 * heads}, received {width}: rotary "
            "positions turn pairs of channels"
        )
