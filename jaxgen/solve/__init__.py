"""From noise back to data: diffrax terms, grids, solvers and drivers."""

from jaxgen.solve.chain import Chain, Step
from jaxgen.solve.corrector import LangevinCorrector, langevin_corrector
from jaxgen.solve.ddim import DDIM, ddim
from jaxgen.solve.euler_maruyama import EulerMaruyama
from jaxgen.solve.exponential import Multistep
from jaxgen.solve.grids import GRIDS, make_grid
from jaxgen.solve.heun import Heun
from jaxgen.solve.heun_time import HeunTime
from jaxgen.solve.likelihood import Likelihood, log_likelihood
from jaxgen.solve.multistep import ExponentialMultistep, deis, dpm, dpmpp, unipc
from jaxgen.solve.path import GridPath
from jaxgen.solve.phi import phi
from jaxgen.solve.predictor_corrector import annealed_langevin, predictor_corrector
from jaxgen.solve.predictors import as_predictor
from jaxgen.solve.quantization import bits_per_dim, dequantize
from jaxgen.solve.registry import SOLVERS
from jaxgen.solve.sample import sample
from jaxgen.solve.semilinear import GridSolver, Level, SemiLinearTerm, Window
from jaxgen.solve.singlestep import Singlestep, dpm_2, dpm_3, dpmpp_2s
from jaxgen.solve.state import Sample
from jaxgen.solve.terms import probability_flow, reverse_sde
from jaxgen.solve.transport import Transport, decode, encode

__all__ = [
    "DDIM",
    "GRIDS",
    "SOLVERS",
    "Chain",
    "EulerMaruyama",
    "ExponentialMultistep",
    "GridPath",
    "GridSolver",
    "Heun",
    "HeunTime",
    "LangevinCorrector",
    "Level",
    "Likelihood",
    "Multistep",
    "Sample",
    "SemiLinearTerm",
    "Singlestep",
    "Step",
    "Transport",
    "Window",
    "annealed_langevin",
    "as_predictor",
    "bits_per_dim",
    "ddim",
    "decode",
    "deis",
    "dequantize",
    "dpm",
    "dpm_2",
    "dpm_3",
    "dpmpp",
    "dpmpp_2s",
    "encode",
    "langevin_corrector",
    "log_likelihood",
    "make_grid",
    "phi",
    "predictor_corrector",
    "probability_flow",
    "reverse_sde",
    "sample",
    "unipc",
]
