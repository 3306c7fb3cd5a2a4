"""How good is a sample: distances between two sets of points, and between their statistics."""

from jaxgen.metrics.frechet import frechet_distance, gaussian_distance, moments
from jaxgen.metrics.sliced_wasserstein import sliced_wasserstein, wasserstein_1d
from jaxgen.metrics.wasserstein import wasserstein2

__all__ = [
    "frechet_distance",
    "gaussian_distance",
    "moments",
    "sliced_wasserstein",
    "wasserstein2",
    "wasserstein_1d",
]
