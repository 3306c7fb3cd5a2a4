"""Flax layers whose kernel lives in a pool of its own: dense, embedding, convolution.

Each layer's pool is drawn with the standard deviation of the kernel's default initialiser, so that
lambda is one and an ordinary optimiser suits it. For one pool under a whole network see
``modules.SharedModule`` and ``tree.shared_apply``.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer, PaddingLike

from jaxgen.share.gather import expand_leaf, slots
from jaxgen.share.layout import Scheme, Spec, leaf, plan
from jaxgen.share.matmul import hashed_matmul

__all__ = ["HashedConv", "HashedDense", "HashedEmbed"]


def _layer_spec(layer: Any, name: str, shape: tuple[int, ...], std: float, tile: Any) -> Spec:
    shapes = {name: jax.ShapeDtypeStruct(shape, layer.param_dtype)}
    layout = plan(
        shapes,
        layer.budget,
        scheme=layer.scheme,
        tile=tile,
        scale={name: std},
        pool_std=std,
        select=lambda path, leaf: True,
        seed=layer.hash_seed,
    )
    return leaf(layout, name)


def _pool(layer: nn.Module, spec: Spec, std: float, param_dtype: Dtype) -> jax.Array:
    return layer.param("pool", nn.initializers.normal(std), (spec.m,), param_dtype)


class HashedDense(nn.Module):
    """``nn.Dense`` with its kernel in a pool: the weight is never built, see ``hashed_matmul``.

    Attributes:
        features: N, outputs.
        budget: slots of the pool: an int counts, a float is a share in (0, 1] of the kernel.
        use_bias: whether there is a bias, which is not shared.
        scheme: see ``plan``.
        tile: ``(bk, bn)`` for the kernels of accelerators, see ``plan``.
        hash_seed: of the hashes.
        implementation: see ``hashed_matmul``.
        dtype: of the computation, None for the promoted dtype of input and parameters.
        param_dtype: of the parameters.
        bias_init: initialiser of the bias.

    Example:
        >>> layer = HashedDense(32, budget=0.25)
        >>> variables = jax.jit(layer.init)(jax.random.key(0), jnp.ones((4, 64)))
        >>> variables["params"]["pool"].shape, layer.apply(variables, jnp.ones((4, 64))).shape
        ((512,), (4, 32))
    """

    features: int
    budget: int | float = 0.1
    use_bias: bool = True
    scheme: Scheme = "stable"
    tile: tuple[int, int] | None = None
    hash_seed: int = 0
    implementation: str | Sequence[str] | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(*batch, K)`` to ``(*batch, features)``."""
        std = x.shape[-1] ** -0.5
        spec = _layer_spec(self, "kernel", (x.shape[-1], self.features), std, self.tile)
        pool = _pool(self, spec, std, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        x, pool, bias = promote_dtype(x, pool, bias, dtype=self.dtype)
        y = hashed_matmul(x, pool, spec, implementation=self.implementation)
        return y if bias is None else y + jnp.broadcast_to(bias, y.shape)


class HashedEmbed(nn.Module):
    """``nn.Embed`` with its table in a pool: a lookup computes the slots of its rows alone.

    Attributes:
        num_embeddings: rows of the table.
        features: entries of a row.
        budget: slots of the pool: an int counts, a float is a share in (0, 1] of the table.
        scheme: see ``plan``.
        hash_seed: of the hashes.
        dtype: of the result, None for ``param_dtype``.
        param_dtype: of the pool.

    Example:
        >>> layer = HashedEmbed(1000, 16, budget=0.01)
        >>> variables = jax.jit(layer.init)(jax.random.key(0), jnp.array([3, 999]))
        >>> variables["params"]["pool"].shape, layer.apply(variables, jnp.array([3, 999])).shape
        ((160,), (2, 16))
    """

    num_embeddings: int
    features: int
    budget: int | float = 0.1
    scheme: Scheme = "stable"
    hash_seed: int = 0
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Plan the table and make its pool."""
        std = self.features**-0.5
        self.spec = _layer_spec(self, "table", (self.num_embeddings, self.features), std, None)
        if self.spec.size > 2**32:
            raise ValueError(f"the table has {self.spec.size} entries; expected at most 2^32")
        self.pool = _pool(self, self.spec, std, self.param_dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Rows of the table: ``(*batch)``, integer, to ``(*batch, features)``.

        Args:
            ids: in ``[0, num_embeddings)``; a row out of range is NaN, one below zero too, where
                ``nn.Embed`` counts from the end.

        Raises:
            TypeError: ``ids`` is not of an integer dtype.
        """
        ids = jnp.asarray(ids)
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise TypeError(f"ids has dtype {ids.dtype}; expected integers")
        # Narrow integers would wrap what they are compared with.
        ids = ids.astype(jnp.promote_types(ids.dtype, jnp.int32))
        is_row = (ids >= 0) & (ids < self.num_embeddings)
        first = jnp.where(is_row, ids, 0).astype(jnp.uint32) * jnp.uint32(self.features)
        within = jnp.arange(self.features, dtype=jnp.uint32).reshape((1,) * ids.ndim + (-1,))
        at, signs = slots(self.spec, first[..., None] + within)
        rows = self.pool.at[at].get(mode="promise_in_bounds") * signs.astype(self.pool.dtype)
        rows = jnp.where(is_row[..., None], rows, jnp.nan)
        return rows.astype(self.dtype or self.param_dtype)

    def attend(self, query: jax.Array) -> jax.Array:
        """Inner products with every row: ``(*batch, features)`` to ``(*batch, num_embeddings)``."""
        query, pool = promote_dtype(query, self.pool, dtype=self.dtype)
        return query @ expand_leaf(pool, self.spec).T


class HashedConv(nn.Module):
    """``nn.Conv`` with its kernel in a pool; the kernel is built for each call, then forgotten.

    Attributes:
        features: output channels.
        kernel_size: window.
        budget: slots of the pool: an int counts, a float is a share in (0, 1] of the kernel.
        strides: as in ``nn.Conv``, like all that follows but ``scheme`` and ``hash_seed``.
        padding: as in ``nn.Conv``.
        input_dilation: as in ``nn.Conv``.
        kernel_dilation: as in ``nn.Conv``.
        feature_group_count: as in ``nn.Conv``.
        use_bias: whether there is a bias, which is not shared.
        scheme: see ``plan``.
        hash_seed: of the hashes.
        dtype: of the computation, None for the promoted dtype of input and parameters.
        param_dtype: of the parameters.

    Example:
        >>> layer = HashedConv(16, (3, 3), budget=0.1)
        >>> variables = jax.jit(layer.init)(jax.random.key(0), jnp.ones((2, 8, 8, 3)))
        >>> variables["params"]["pool"].shape
        (43,)
    """

    features: int
    kernel_size: int | Sequence[int]
    budget: int | float = 0.1
    strides: int | Sequence[int] | None = 1
    padding: PaddingLike = "SAME"
    input_dilation: int | Sequence[int] | None = 1
    kernel_dilation: int | Sequence[int] | None = 1
    feature_group_count: int = 1
    use_bias: bool = True
    scheme: Scheme = "stable"
    hash_seed: int = 0
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(*batch, *space, channels)`` to ``(*batch, *space, features)``."""
        # The convolution itself, and every option of it, is Flax's.
        conv = nn.Conv(
            self.features,
            self.kernel_size,
            strides=self.strides,
            padding=self.padding,
            input_dilation=self.input_dilation,
            kernel_dilation=self.kernel_dilation,
            feature_group_count=self.feature_group_count,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            parent=None,
        )
        shapes = jax.eval_shape(lambda: conv.init(jax.random.key(0), x))["params"]
        shape = shapes["kernel"].shape
        std = math.prod(shape[:-1]) ** -0.5
        spec = _layer_spec(self, "kernel", shape, std, None)
        params = {"kernel": expand_leaf(_pool(self, spec, std, self.param_dtype), spec)}
        if self.use_bias:
            zeros = nn.initializers.zeros_init()
            params["bias"] = self.param("bias", zeros, shapes["bias"].shape, self.param_dtype)
        y: Any = conv.apply({"params": params}, x)
        return y
