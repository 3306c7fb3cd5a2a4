r"""DDIM: the exponential integrator of order one, deterministic or with noise.

Song, Meng and Ermon, arXiv 2010.02502, equations (12) and (16), for any linear process. From level
0 to level 1, with data D and noise E from one call of the field,

    x1' = alpha1 D' + sqrt(sigma1^2 - s^2) E + s z,
    s   = eta sigma1 sqrt(1 - r^2),    r = (alpha0 sigma1) / (alpha1 sigma0)                 (1)

``eta = 0`` is the first-order solver of the probability flow in log-SNR (DPM-Solver-1), ``eta = 1``
has the variance of DDPM's posterior. With data prediction the step is finite from alpha = 0 and to
sigma = 0, where it returns the data prediction. On the ``"time"`` grid under ``rectified`` this is
the Euler method of flow matching.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxgen.solve.semilinear import GridSolver, Level, SemiLinearTerm, Window

__all__ = ["DDIM", "ddim", "to_data"]


def to_data(
    term: SemiLinearTerm, first: Level, last: Level, keep: jax.Array | float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """``(a, b)`` of ``x1' = a x' + b out'`` by equation (1) without its noise.

    Args:
      term: knows the field's prediction kind.
      first: level 0.
      last: level 1.
      keep: ``sqrt(1 - s^2 / sigma1^2)``, the share of the noise that is kept.
    """
    ratio = keep * last.sigma / first.sigma
    # alpha1 (1 - e^{-h}): the difference is as accurate as log-SNRs would be, and finite at ends.
    weight = last.alpha - first.alpha * ratio
    a, b = term.conversion(first, "data")
    return ratio + weight * a, weight * b


class DDIM(GridSolver):
    """The solver of the module docstring; ``eta`` in [0, 1] may be traced."""

    eta: Any = 0.0

    @property
    def is_noisy(self) -> bool:
        """Whether ``eta`` is anything but the number 0."""
        return not (isinstance(self.eta, int | float) and self.eta == 0)

    def coefficients(self, term: SemiLinearTerm, window: Window) -> Any:
        """``(t, a, b, s)`` of equation (1)."""
        first, last = window.first, window.last
        if not self.is_noisy:
            return first.t, *to_data(term, first, last), None
        r = first.alpha * last.sigma / (last.alpha * first.sigma)
        share = jnp.asarray(self.eta, r.dtype) ** 2 * (1 - r) * (1 + r)
        keep = jnp.sqrt(jnp.maximum(1 - share, 0))
        spread = last.sigma * jnp.sqrt(jnp.maximum(share, 0))
        return first.t, *to_data(term, first, last, keep), spread

    def advance(
        self,
        term: SemiLinearTerm,
        numbers: Any,
        noise: tuple[jax.Array, jax.Array] | None,
        x: jax.Array,
        state: Any,
        is_full: bool | None = None,
    ) -> tuple[jax.Array, Any]:
        """One call of the field."""
        return term.one_call(x, numbers, noise), state

    def additive_noise(self, numbers: Any) -> jax.Array | None:
        """The deviation of the noise."""
        return numbers[3]

    def order(self, terms: Any) -> int:
        """Of the deterministic solver."""
        return 1


def ddim(eta: float = 0.0) -> DDIM:
    """The DDIM solver with noise share ``eta``.

    Args:
      eta: 0 for the deterministic sampler, 1 for DDPM's posterior variance.

    Raises:
      ValueError: ``eta`` is a number outside [0, 1].
    """
    if isinstance(eta, int | float) and not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; expected a number in [0, 1]")
    return DDIM(eta)
