"""How data becomes noise: linear processes, their named schedules and discrete chains."""

from jaxgen.process.discrete_betas import discrete_betas
from jaxgen.process.discretize import DiscreteKernel
from jaxgen.process.linear import LinearSDE, Rates
from jaxgen.process.schedules import (
    PROCESSES,
    cosine,
    edm,
    mean_reverting,
    ouve,
    rectified,
    sub_vp,
    ve,
    vp,
)

__all__ = [
    "PROCESSES",
    "DiscreteKernel",
    "LinearSDE",
    "Rates",
    "cosine",
    "discrete_betas",
    "edm",
    "mean_reverting",
    "ouve",
    "rectified",
    "sub_vp",
    "ve",
    "vp",
]
