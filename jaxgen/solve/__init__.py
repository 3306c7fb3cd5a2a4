"""From noise back to data: diffrax terms, grids, solvers and drivers."""

from jaxgen.solve.ddim import DDIM, ddim
from jaxgen.solve.euler_maruyama import EulerMaruyama
from jaxgen.solve.grids import GRIDS, make_grid
from jaxgen.solve.heun import Heun
from jaxgen.solve.heun_time import HeunTime
from jaxgen.solve.likelihood import Likelihood, log_likelihood
from jaxgen.solve.path import GridPath
from jaxgen.solve.quantization import bits_per_dim, dequantize
from jaxgen.solve.registry import SOLVERS
from jaxgen.solve.sample import Sample, sample
from jaxgen.solve.semilinear import GridSolver, Level, SemiLinearTerm
from jaxgen.solve.terms import probability_flow, reverse_sde
from jaxgen.solve.transport import Transport, decode, encode

__all__ = [
    "DDIM",
    "GRIDS",
    "SOLVERS",
    "EulerMaruyama",
    "GridPath",
    "GridSolver",
    "Heun",
    "HeunTime",
    "Level",
    "Likelihood",
    "Sample",
    "SemiLinearTerm",
    "Transport",
    "bits_per_dim",
    "ddim",
    "decode",
    "dequantize",
    "encode",
    "log_likelihood",
    "make_grid",
    "probability_flow",
    "reverse_sde",
    "sample",
]
