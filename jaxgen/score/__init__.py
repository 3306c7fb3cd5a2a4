"""What a network is taught: prediction kinds, losses, derivatives and closed-form fields."""

from jaxgen.score import closed_form, derivatives
from jaxgen.score.prediction import PREDICTIONS, Field, convert, from_flow, per_example

__all__ = [
    "PREDICTIONS",
    "Field",
    "closed_form",
    "convert",
    "derivatives",
    "from_flow",
    "per_example",
]
