"""Changing a trained network: one file per method."""

from jaxgen.adapt import slimflow
from jaxgen.adapt.slimflow import distillation_loss, flip_pairs, one_step, reflow_loss

__all__ = ["distillation_loss", "flip_pairs", "one_step", "reflow_loss", "slimflow"]
