"""Networks with fewer parameters than weights: pytrees of weights that live in a pool."""

from jaxgen.share.gather import Shared, compress, expand, expand_leaf, init, slots
from jaxgen.share.hashing import fmix32, mersenne31, quadratic31, sign
from jaxgen.share.layout import Layout, Spec, leaf, plan

__all__ = [
    "Layout",
    "Shared",
    "Spec",
    "compress",
    "expand",
    "expand_leaf",
    "fmix32",
    "init",
    "leaf",
    "mersenne31",
    "plan",
    "quadratic31",
    "sign",
    "slots",
]
