"""What a network is taught: prediction kinds, losses, derivatives and closed-form fields."""

from jaxgen.score import closed_form, derivatives, times, weighting
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
    "closed_form",
    "convert",
    "denoising_loss",
    "derivatives",
    "from_flow",
    "implicit_loss",
    "level_classification_loss",
    "per_example",
    "precondition",
    "sample_times",
    "sliced_loss",
    "times",
    "weighting",
]
