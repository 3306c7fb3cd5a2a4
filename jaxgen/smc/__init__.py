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
from jaxgen.smc.importance import Expectations, multiple_expectations
from jaxgen.smc.kalman import LinearGaussian, kalman_filter, kalman_smoother, linear_gaussian
from jaxgen.smc.learning import Ascent, fisher_functional, markov_score_climbing, score_ascent
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
from jaxgen.smc.sde_model import linear_sde, sde_model
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
    "LinearGaussian",
    "Paris",
    "ParisState",
    "ParticleGibbs",
    "Resampled",
    "StateSpaceModel",
    "Tempered",
    "backward_sample",
    "conditional_paris",
    "conditional_resample",
    "conditional_smc",
    "ess",
    "feynman_kac",
    "ffbs",
    "filter_init",
    "filter_step",
    "fisher_functional",
    "genealogy",
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
    "sobol_from_expectations",
    "take",
    "target",
    "tempered",
]
