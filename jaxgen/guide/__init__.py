"""Conditions and inverse tasks: steer a trained field without training it again."""

from jaxgen.guide import operators
from jaxgen.guide.class_conditional import class_conditional
from jaxgen.guide.classifier_free import classifier_free, classifier_free_labels
from jaxgen.guide.colorize import COLOR_BASIS, colorize
from jaxgen.guide.consistency import diffpir, projection, repaint
from jaxgen.guide.impute import Imputation, impute
from jaxgen.guide.inpaint import inpaint
from jaxgen.guide.inverse import Restored
from jaxgen.guide.posterior import dps, pigdm
from jaxgen.guide.red_diff import red_diff, red_diff_gradient
from jaxgen.guide.restore import Spread, restore, restore_many

__all__ = [
    "COLOR_BASIS",
    "Imputation",
    "Restored",
    "Spread",
    "class_conditional",
    "classifier_free",
    "classifier_free_labels",
    "colorize",
    "diffpir",
    "dps",
    "impute",
    "inpaint",
    "operators",
    "pigdm",
    "projection",
    "red_diff",
    "red_diff_gradient",
    "repaint",
    "restore",
    "restore_many",
]
