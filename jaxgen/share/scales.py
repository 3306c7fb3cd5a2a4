"""The standard deviation that each leaf starts with: measured, by a library's rule, or given."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxgen.core.checks import concrete, one_of

__all__ = ["Scale", "leaf_scale"]

Scale = str | Callable[[str, Any], float] | Mapping[str, float] | None

_PRESETS = ("flax", "equinox", "torch")


def _fan_in_std(preset: str, path: str, shape: tuple[int, ...]) -> float:
    """The default initialiser's standard deviation.

    Flax keeps kernels as ``(*window, in, out)`` and draws them with variance 1 / fan-in, and
    embeddings with 1 / features; Equinox and torch keep ``(out, in, *window)``, drawn uniformly
    with half-width ``fan_in ** -0.5``, and embeddings as standard normals. A bias or scale
    of several axes, such as attention or stacked layers have, starts constant.
    """
    parts = path.split("/")
    # Boxed parameters, as Flax's Partitioned and NNX's State have them.
    parts = parts[:-1] if len(parts) > 1 and parts[-1] == "value" else parts
    *_, module, name = ["", *parts]
    is_embedding = name == "embedding" or (name == "weight" and "embed" in module.lower())
    if name in ("bias", "scale") and len(shape) > 1:
        return 0.0
    if preset == "flax" and module in ("query", "key", "value") and len(shape) == 3:
        # Attention keeps (in, heads, features) and draws it as (in, heads * features).
        return shape[0] ** -0.5
    if preset == "flax":
        return (shape[-1] if is_embedding else math.prod(shape[:-1])) ** -0.5
    return 1.0 if is_embedding else (3 * math.prod(shape[1:])) ** -0.5


def leaf_scale(scale: Scale, path: str, leaf: Any) -> float:
    """C of one leaf; zero for a leaf that starts constant.

    Raises:
      ValueError: an unknown name, a leaf without a given scale, or one that is not positive.
      TypeError: a shape, or a traced array, is to be measured.
    """
    is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
    if scale is None:
        scale = "flax" if is_shape else "std"
    if isinstance(scale, str):
        one_of("scale", scale, ("std", *_PRESETS))
        if scale != "std":
            return _fan_in_std(scale, path, tuple(leaf.shape))
        value = None if is_shape else concrete(leaf)
        if value is None:
            raise TypeError(f"{path} is a shape or traced, so its standard deviation is not known")
        std = float(np.std(value.astype(np.float64)))
        if not math.isfinite(std):
            raise ValueError(f"{path} has a standard deviation of {std}; expected a finite one")
        # A constant's measured deviation is rounding alone.
        return 0.0 if np.all(value == value.flat[0]) else std
    if callable(scale):
        given = float(scale(path, leaf))
    else:
        if path not in scale:
            raise ValueError(f"scale has no entry for {path}")
        given = float(scale[path])
    if not 0 < given < math.inf:
        raise ValueError(f"the scale of {path} is {given}; expected a positive number")
    return given
