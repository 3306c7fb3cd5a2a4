"""What a network is taught: prediction kinds, losses, derivatives and closed-form fields."""

from jaxgen.score import closed_form, derivatives, flow, fokker_planck, times, weighting
from jaxgen.score.discrete import aoarm_nll, log_conditionals, radd_loss, radd_score
from jaxgen.score.flow import anneal_noise, anneal_schedule, flow_guided_loss, flow_matching_loss
from jaxgen.score.fokker_planck import potential_score
from jaxgen.score.interpolant import convert_interpolant, interpolant_loss, schrodinger_objective
from jaxgen.score.levels import level_classification_loss
from jaxgen.score.matching import denoising_loss, implicit_loss, sliced_loss
from jaxgen.score.preconditioning import precondition
from jaxgen.score.prediction import PREDICTIONS, Field, convert, from_flow, per_example
from jaxgen.score.times import TIMES, sample_times
from jaxgen.score.weighting import WEIGHTINGS, Weighting

__all__ = [
    "PREDICTIONS",
    "TIMES",
    "WEIGHTINGS",
    "Field",
    "Weighting",
    "anneal_noise",
    "anneal_schedule",
    "aoarm_nll",
    "closed_form",
    "convert",
    "convert_interpolant",
    "denoising_loss",
    "derivatives",
    "flow",
    "flow_guided_loss",
    "flow_matching_loss",
    "fokker_planck",
    "from_flow",
    "implicit_loss",
    "interpolant_loss",
    "level_classification_loss",
    "log_conditionals",
    "per_example",
    "potential_score",
    "precondition",
    "radd_loss",
    "radd_score",
    "sample_times",
    "schrodinger_objective",
    "sliced_loss",
    "times",
    "weighting",
]
