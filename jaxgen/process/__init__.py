"""How data becomes noise: linear processes, their named schedules and discrete chains."""

from jaxgen.process.absorbing import (
    Absorbing,
    absorbing,
    expected_nfe,
    mask_tokens_k,
    mask_tokens_lambda,
    mask_tokens_t,
)
from jaxgen.process.coupling import Coupling, minibatch_coupling
from jaxgen.process.discrete_betas import discrete_betas
from jaxgen.process.discretize import DiscreteKernel
from jaxgen.process.interpolant import (
    GAMMAS,
    INTERPOLANTS,
    Interpolant,
    InterpolantRates,
    interpolant,
)
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
from jaxgen.process.spline_interpolant import spline, spline_interpolant

__all__ = [
    "GAMMAS",
    "INTERPOLANTS",
    "PROCESSES",
    "Absorbing",
    "Coupling",
    "DiscreteKernel",
    "IRSDETables",
    "Interpolant",
    "InterpolantRates",
    "LinearSDE",
    "Rates",
    "absorbing",
    "cosine",
    "discrete_betas",
    "edm",
    "expected_nfe",
    "interpolant",
    "ir_sde",
    "ir_sde_tables",
    "mask_tokens_k",
    "mask_tokens_lambda",
    "mask_tokens_t",
    "mean_reverting",
    "minibatch_coupling",
    "ouve",
    "rectified",
    "spline",
    "spline_interpolant",
    "sub_vp",
    "ve",
    "vp",
]
