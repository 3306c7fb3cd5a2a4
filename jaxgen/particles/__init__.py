"""Weighted particles: log-weights, and resampling that is right at a million."""

from jaxgen.particles.conditioned import conditional_resample
from jaxgen.particles.resample import METHODS, Resampled, maybe_resample, resample, take
from jaxgen.particles.weights import ess, log_mean_exp, log_sum_exp, normalise

__all__ = [
    "METHODS",
    "Resampled",
    "conditional_resample",
    "ess",
    "log_mean_exp",
    "log_sum_exp",
    "maybe_resample",
    "normalise",
    "resample",
    "take",
]
