"""Generative modelling by stochastic dynamics, and networks with fewer parameters than weights.

The rooms are imported on first use: ``jaxgen.process`` (how data becomes noise), ``jaxgen.score``
(what a network is taught), ``jaxgen.solve`` (from noise back to data), ``jaxgen.guide``
(conditions and inverse tasks), ``jaxgen.adapt`` (changing a trained network), ``jaxgen.mcmc``
(chains), ``jaxgen.smc`` (weighted particles at work) over ``jaxgen.particles`` (weights and
resampling), ``jaxgen.share`` (fewer parameters than weights), ``jaxgen.prune`` (masks over
parameters), ``jaxgen.metrics``, ``jaxgen.nets`` and ``jaxgen.train``.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_ROOMS = (
    "adapt",
    "core",
    "guide",
    "mcmc",
    "metrics",
    "nets",
    "particles",
    "process",
    "prune",
    "score",
    "share",
    "smc",
    "solve",
    "train",
)

__all__ = ["__version__", *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"jaxgen.{name}")
    raise AttributeError(f"module 'jaxgen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
