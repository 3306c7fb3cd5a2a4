"""Masks over any pytree of parameters: which weights stay, by which criterion."""

from jaxgen.prune.grasp import grasp
from jaxgen.prune.magnitude import magnitude
from jaxgen.prune.masks import apply_mask, masked, select_weights, top_k
from jaxgen.prune.random import random
from jaxgen.prune.rewind import rewind
from jaxgen.prune.snip import snip
from jaxgen.prune.synflow import synflow

__all__ = [
    "apply_mask",
    "grasp",
    "magnitude",
    "masked",
    "random",
    "rewind",
    "select_weights",
    "snip",
    "synflow",
    "top_k",
]
