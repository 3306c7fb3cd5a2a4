"""From noise back to data: diffrax terms, grids, solvers and drivers."""

from jaxgen.solve.chain import Chain, Step
from jaxgen.solve.corrector import LangevinCorrector, langevin_corrector
from jaxgen.solve.ddim import DDIM, ddim
from jaxgen.solve.discrete import DiscreteSample, ordered_sample, radd_sample
from jaxgen.solve.dpm_solver_v3 import DPMSolverV3, dpmv3
from jaxgen.solve.euler_maruyama import EulerMaruyama
from jaxgen.solve.euler_time import EulerTime
from jaxgen.solve.evolution import EvolutionConfig, crossover, mutate
from jaxgen.solve.exponential import Multistep
from jaxgen.solve.grids import GRIDS, make_grid
from jaxgen.solve.heun import Heun
from jaxgen.solve.heun_time import HeunTime
from jaxgen.solve.interpolant import InterpolantSample, interpolant_sample, interpolant_terms
from jaxgen.solve.interpolant_likelihood import InterpolantLikelihood, interpolant_log_likelihood
from jaxgen.solve.likelihood import Likelihood, log_likelihood
from jaxgen.solve.mean_reverting import (
    mr_euler_sample,
    mr_field,
    mr_grid,
    mr_heun_sample,
    mr_posterior_sample,
    mr_sample,
)
from jaxgen.solve.multistep import ExponentialMultistep, deis, dpm, dpmpp, unipc
from jaxgen.solve.ode_sde_gap import Gap, ode_sde_bound, ode_sde_gap
from jaxgen.solve.path import GridPath
from jaxgen.solve.phi import phi
from jaxgen.solve.predictor_corrector import annealed_langevin, predictor_corrector
from jaxgen.solve.predictors import as_predictor
from jaxgen.solve.quantization import bits_per_dim, dequantize
from jaxgen.solve.ranking import RankingConfig
from jaxgen.solve.reflow import Pairs, reflow_pairs, scaled_noise, standard_noise
from jaxgen.solve.registry import SOLVERS
from jaxgen.solve.sample import sample
from jaxgen.solve.schedule import (
    SolverSchedule,
    baseline_schedules,
    schedule_from_baseline,
    schedule_nfe,
    schedule_times,
    validate_schedule,
)
from jaxgen.solve.schedule_file import load_schedule, save_schedule
from jaxgen.solve.search import (
    SearchConfig,
    SearchResult,
    evaluate_schedules,
    search,
    stack_schedules,
)
from jaxgen.solve.semilinear import GridSolver, Level, SemiLinearTerm, Window
from jaxgen.solve.singlestep import Singlestep, dpm_2, dpm_3, dpmpp_2s
from jaxgen.solve.state import Sample
from jaxgen.solve.statistics import (
    Statistics,
    degenerate_statistics,
    estimate_statistics,
    load_statistics,
    save_statistics,
)
from jaxgen.solve.straightness import straightness
from jaxgen.solve.terms import probability_flow, reverse_sde
from jaxgen.solve.thresholding import clip_to, dynamic_threshold, thresholded
from jaxgen.solve.transport import Transport, decode, encode
from jaxgen.solve.usf import ScheduleSolver, usf, usf_sample

__all__ = [
    "DDIM",
    "GRIDS",
    "SOLVERS",
    "Chain",
    "DPMSolverV3",
    "DiscreteSample",
    "EulerMaruyama",
    "EulerTime",
    "EvolutionConfig",
    "ExponentialMultistep",
    "Gap",
    "GridPath",
    "GridSolver",
    "Heun",
    "HeunTime",
    "InterpolantLikelihood",
    "InterpolantSample",
    "LangevinCorrector",
    "Level",
    "Likelihood",
    "Multistep",
    "Pairs",
    "RankingConfig",
    "Sample",
    "ScheduleSolver",
    "SearchConfig",
    "SearchResult",
    "SemiLinearTerm",
    "Singlestep",
    "SolverSchedule",
    "Statistics",
    "Step",
    "Transport",
    "Window",
    "annealed_langevin",
    "as_predictor",
    "baseline_schedules",
    "bits_per_dim",
    "clip_to",
    "crossover",
    "ddim",
    "decode",
    "degenerate_statistics",
    "deis",
    "dequantize",
    "dpm",
    "dpm_2",
    "dpm_3",
    "dpmpp",
    "dpmpp_2s",
    "dpmv3",
    "dynamic_threshold",
    "encode",
    "estimate_statistics",
    "evaluate_schedules",
    "interpolant_log_likelihood",
    "interpolant_sample",
    "interpolant_terms",
    "langevin_corrector",
    "load_schedule",
    "load_statistics",
    "log_likelihood",
    "make_grid",
    "mr_euler_sample",
    "mr_field",
    "mr_grid",
    "mr_heun_sample",
    "mr_posterior_sample",
    "mr_sample",
    "mutate",
    "ode_sde_bound",
    "ode_sde_gap",
    "ordered_sample",
    "phi",
    "predictor_corrector",
    "probability_flow",
    "radd_sample",
    "reflow_pairs",
    "reverse_sde",
    "sample",
    "save_schedule",
    "save_statistics",
    "scaled_noise",
    "schedule_from_baseline",
    "schedule_nfe",
    "schedule_times",
    "search",
    "stack_schedules",
    "standard_noise",
    "straightness",
    "thresholded",
    "unipc",
    "usf",
    "usf_sample",
    "validate_schedule",
]
