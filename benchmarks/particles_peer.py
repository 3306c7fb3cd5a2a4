"""The `particles` package as a peer, and the model that its worker knows."""

from benchmarks import peer

VARIABLE = "JAXGEN_PARTICLES"

# The linear-Gaussian model that the worker knows: x_t = A x + SIGMA e, y = x + TAU e, stationary.
A, SIGMA, TAU = 0.9, 0.5, 0.3


def find() -> peer.Peer | None:
    """The peer, where the environment variable names a Python that has it."""
    return peer.find(VARIABLE, "particles_worker.py")
