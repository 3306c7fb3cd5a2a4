"""Networks with fewer parameters than weights: pytrees of weights that live in a pool."""

from jaxgen.share.describe import describe
from jaxgen.share.gather import Shared, compress, expand, expand_leaf, init, slots
from jaxgen.share.hashing import fmix32, mersenne31, quadratic31, sign
from jaxgen.share.layers import HashedConv, HashedDense, HashedEmbed
from jaxgen.share.layout import Kept, Layout, Spec, leaf, plan
from jaxgen.share.matmul import hashed_matmul
from jaxgen.share.modules import SharedCallable, SharedModule, SharedNNX, share_callable
from jaxgen.share.tree import pool_scale, scale_by_pool, shared_apply

__all__ = [
    "HashedConv",
    "HashedDense",
    "HashedEmbed",
    "Kept",
    "Layout",
    "Shared",
    "SharedCallable",
    "SharedModule",
    "SharedNNX",
    "Spec",
    "compress",
    "describe",
    "expand",
    "expand_leaf",
    "fmix32",
    "hashed_matmul",
    "init",
    "leaf",
    "mersenne31",
    "plan",
    "pool_scale",
    "quadratic31",
    "scale_by_pool",
    "share_callable",
    "shared_apply",
    "sign",
    "slots",
]
