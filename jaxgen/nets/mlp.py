"""A residual multilayer perceptron with time (and class) conditioning, for low dimensions.

Each block is ``h + W2 swish((1 + scale) W1 swish(h) + shift)`` with scale and shift linear in the
embedding of time and class (FiLM, Perez et al., 2018). There is no normalisation layer: a score
in a few dimensions grows linearly far from the data, and a normalised network cannot follow it.
"""

import flax.linen as nn
import jax
from flax.typing import Dtype

from jaxgen.nets.embedding import ConditionEmbedding
from jaxgen.nets.layers import check_call, film


class MLP(nn.Module):
    """Map ``x`` of shape ``(batch, d)``, given ``t`` and a label, to the same shape.

    The network is zero until its first update, since the last layer starts at zero.

    Attributes:
        width: hidden units.
        depth: residual blocks.
        num_classes: number of classes, or None for a network without labels.
        dropout: rate within the blocks, under ``train=True`` only.
        time_scale: angular frequency, in radians per unit of ``t``, of the fastest of the time
            features (see `TimeEmbedding`): 1000 suits ``t`` in [0, 1], 100 a log-SNR.
        dtype: dtype of the computation, None for that of ``x``; parameters are float32.
        remat: keep of each block its input only, and work the rest out again in the backward pass:
            less memory for up to a third more arithmetic, on accelerators (XLA's CPU compiler
            saves nothing). Parameters and results are the same.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = MLP(width=32, depth=2)
        >>> x, t = jnp.ones((4, 2)), jnp.full((4,), 0.5)
        >>> variables = jax.jit(net.init)(jax.random.key(0), x, t)
        >>> net.apply(variables, x, t).shape
        (4, 2)
    """

    width: int = 256
    depth: int = 3
    num_classes: int | None = None
    dropout: float = 0.0
    time_scale: float = 1000.0
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
            x: real floating, ``(batch, d)``.
            t: real floating, ``(batch,)``, whatever number the caller conditions on.
            label: integer, ``(batch,)``, in ``[0, num_classes]``; ``num_classes`` and None both
                mean "no label". Out of range gives NaN.
            train: static; True draws dropout, from ``rngs={"dropout": key}``.

        Returns:
            ``(batch, d)`` in the dtype of ``x``.

        Raises:
            ValueError: wrong rank or shape, or a label without classes.
            TypeError: a dtype of another kind.
        """
        check_call(x, t, label, self.num_classes, ndim=2)
        dtype = self.dtype or x.dtype
        condition = ConditionEmbedding(self.width, self.num_classes, self.time_scale)(t, label)
        condition = condition.astype(dtype)
        h = nn.Dense(self.width, dtype=dtype)(x)

        def block(net: MLP, h: jax.Array, condition: jax.Array) -> jax.Array:
            r = nn.Dense(net.width, dtype=dtype)(nn.swish(h))
            r = nn.swish(film(r, nn.Dense(2 * net.width, dtype=dtype)(condition)))
            r = nn.Dropout(net.dropout, deterministic=not train)(r)
            return h + nn.Dense(net.width, dtype=dtype)(r)

        for _ in range(self.depth):
            h = (nn.remat(block) if self.remat else block)(self, h, condition)
        out = nn.Dense(x.shape[-1], dtype=dtype, kernel_init=nn.initializers.zeros)(nn.swish(h))
        return out.astype(x.dtype)
