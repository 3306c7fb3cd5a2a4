"""Reference networks in Flax linen, for images (channels last) and for low dimensions.

They serve examples, tests and the command; nothing else in the library asks for them. All are
called as ``net.apply(variables, x, t, label=None, train=False)`` with ``t`` of shape ``(batch,)``
and return the shape and dtype of ``x``, so that a field is one closure::

    field = lambda x, t: net.apply(variables, x, t)

Parameters are float32; a bfloat16 ``x`` (or ``dtype=jnp.bfloat16``) computes in bfloat16, with
the time embedding in float32. For classifier-free guidance the label ``num_classes`` means none.
"""

from jaxgen.nets.budget import width_for_budget
from jaxgen.nets.classifier import Classifier
from jaxgen.nets.embedding import (
    GaussianFourier,
    LabelEmbedding,
    TimeEmbedding,
    fourier_features,
    sinusoidal,
)
from jaxgen.nets.level_classifier import LevelClassifier, LevelMLP
from jaxgen.nets.mlp import MLP
from jaxgen.nets.ncsnpp import NCSNPP_CONFIGS, NCSNpp, NCSNppConfig, ncsnpp
from jaxgen.nets.potential import PotentialMLP
from jaxgen.nets.radd import RADDTransformer, TimedTransformer
from jaxgen.nets.resample import (
    depth_to_space,
    fir_down,
    fir_up,
    mean_down,
    nearest_up,
    space_to_depth,
)
from jaxgen.nets.unet import UNet

__all__ = [
    "MLP",
    "NCSNPP_CONFIGS",
    "Classifier",
    "GaussianFourier",
    "LabelEmbedding",
    "LevelClassifier",
    "LevelMLP",
    "NCSNpp",
    "NCSNppConfig",
    "PotentialMLP",
    "RADDTransformer",
    "TimeEmbedding",
    "TimedTransformer",
    "UNet",
    "depth_to_space",
    "fir_down",
    "fir_up",
    "fourier_features",
    "mean_down",
    "ncsnpp",
    "nearest_up",
    "sinusoidal",
    "space_to_depth",
    "width_for_budget",
]
