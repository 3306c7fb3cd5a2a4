"""How data becomes noise: linear processes, their named schedules and discrete chains."""

from jaxgen.process.discrete_betas import discrete_betas
from jaxgen.process.discretize import DiscreteKernel
from jaxgen.process.ir_sde import IRSDETables, ir_sde, ir_sde_tables
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
    "IRSDETables",
    "LinearSDE",
    "Rates",
    "cosine",
    "discrete_betas",
    "edm",
    "ir_sde",
    "ir_sde_tables",
    "mean_reverting",
    "ouve",
    "rectified",
    "sub_vp",
    "ve",
    "vp",
]
