"""Conditions and inverse tasks: steer a trained field without training it again."""

from jaxgen.guide.class_conditional import class_conditional
from jaxgen.guide.classifier_free import classifier_free, classifier_free_labels
from jaxgen.guide.colorize import COLOR_BASIS, colorize
from jaxgen.guide.impute import Imputation, impute
from jaxgen.guide.inpaint import inpaint

__all__ = [
    "COLOR_BASIS",
    "Imputation",
    "class_conditional",
    "classifier_free",
    "classifier_free_labels",
    "colorize",
    "impute",
    "inpaint",
]
