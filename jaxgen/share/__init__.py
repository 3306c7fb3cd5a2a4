"""Networks with fewer parameters than weights: pytrees of weights that live in a pool."""

from jaxgen.share.gather import Shared, compress, expand, expand_leaf, init, slots
from jaxgen.share.hashing import fmix32, mersenne31, quadratic31, sign
from jaxgen.share.layout import Kept, Layout, Spec, leaf, plan
from jaxgen.share.matmul import hashed_matmul
from jaxgen.share.tree import pool_scale, scale_by_pool, shared_apply

__all__ = [
    "Kept",
    "Layout",
    "Shared",
    "Spec",
    "compress",
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
    "shared_apply",
    "sign",
    "slots",
]
