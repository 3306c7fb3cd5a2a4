"""From noise back to data: diffrax terms, grids, solvers and drivers."""

from jaxgen.solve.terms import probability_flow, reverse_sde

__all__ = ["probability_flow", "reverse_sde"]
