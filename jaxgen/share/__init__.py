"""Networks with fewer parameters than weights: hashes that say which slot makes each weight."""

from jaxgen.share.hashing import fmix32, mersenne31, quadratic31, sign

__all__ = ["fmix32", "mersenne31", "quadratic31", "sign"]
