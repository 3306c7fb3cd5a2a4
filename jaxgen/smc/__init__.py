"""Weighted particles at work: filters, smoothers, Gibbs sweeps, importance sampling, steering."""

from jaxgen.particles import (
    METHODS,
    Resampled,
    conditional_resample,
    ess,
    log_mean_exp,
    log_sum_exp,
    maybe_resample,
    normalise,
    resample,
    take,
)
from jaxgen.smc import genealogy, importance, oracle, target
from jaxgen.smc.backward import backward_indices
from jaxgen.smc.conditional import ConditionalSMC, backward_sample, conditional_smc, ffbs
from jaxgen.smc.feynman_kac import FeynmanKac, feynman_kac
from jaxgen.smc.filter import (
    Filter,
    FilterInfo,
    FilterState,
    filter_init,
    filter_step,
    particle_filter,
)
from jaxgen.smc.genealogy import Genealogy, PathTree, with_functional, with_lag
from jaxgen.smc.importance import Expectations, multiple_expectations
from jaxgen.smc.kalman import (
    KalmanFilter,
    KalmanSmoother,
    LinearGaussian,
    kalman_filter,
    kalman_smoother,
    linear_gaussian,
    simulate,
)
from jaxgen.smc.learning import Ascent, fisher_functional, markov_score_climbing, score_ascent
from jaxgen.smc.oracle import hmm_enumerate
from jaxgen.smc.paris import (
    Paris,
    ParisState,
    conditional_paris,
    paris,
    paris_estimate,
    paris_init,
    paris_step,
)
from jaxgen.smc.particle_gibbs import ParticleGibbs, particle_gibbs
from jaxgen.smc.sde_model import discretize_linear_sde, linear_sde, sde_model
from jaxgen.smc.sobol import pick_freeze, sobol_from_expectations
from jaxgen.smc.state_space import StateSpaceModel
from jaxgen.smc.target import potential_from_density
from jaxgen.smc.tempered import Tempered, tempered

__all__ = [
    "METHODS",
    "Ascent",
    "ConditionalSMC",
    "Expectations",
    "FeynmanKac",
    "Filter",
    "FilterInfo",
    "FilterState",
    "Genealogy",
    "KalmanFilter",
    "KalmanSmoother",
    "LinearGaussian",
    "Paris",
    "ParisState",
    "ParticleGibbs",
    "PathTree",
    "Resampled",
    "StateSpaceModel",
    "Tempered",
    "backward_indices",
    "backward_sample",
    "conditional_paris",
    "conditional_resample",
    "conditional_smc",
    "discretize_linear_sde",
    "ess",
    "feynman_kac",
    "ffbs",
    "filter_init",
    "filter_step",
    "fisher_functional",
    "genealogy",
    "hmm_enumerate",
    "importance",
    "kalman_filter",
    "kalman_smoother",
    "linear_gaussian",
    "linear_sde",
    "log_mean_exp",
    "log_sum_exp",
    "markov_score_climbing",
    "maybe_resample",
    "multiple_expectations",
    "normalise",
    "oracle",
    "paris",
    "paris_estimate",
    "paris_init",
    "paris_step",
    "particle_filter",
    "particle_gibbs",
    "pick_freeze",
    "potential_from_density",
    "resample",
    "score_ascent",
    "sde_model",
    "simulate",
    "sobol_from_expectations",
    "take",
    "target",
    "tempered",
    "with_functional",
    "with_lag",
]
