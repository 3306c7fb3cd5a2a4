r"""Euler-Maruyama on the reverse SDE, on any falling grid of times.

Song et al., arXiv 2011.13456, section 4.1. From t0 to t1 = t0 - h, with score s = a x' + b out',

    x1' = x' - h (f(x') - g^2 s) + g sqrt(h) z
        = (1 - h (d log alpha/dt) + h g^2 a) x' + h g^2 b out' + g sqrt(h) z                 (1)

Identical to ``diffrax.Euler`` on ``solve.reverse_sde``. Where the drift is infinite or steep at the
noise end (``cosine``, ``rectified``) steps of any practical length are unstable: start at an
earlier time there, or use another solver.
"""

from typing import Any

import jax

from jaxgen.core.arrays import safe_sqrt
from jaxgen.solve.semilinear import GridSolver, Level, SemiLinearTerm, Window

__all__ = ["EulerMaruyama", "reverse_step"]


def reverse_step(
    term: SemiLinearTerm, level: Level, h: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """``(t, a, b, s)`` of equation (1) for a step of length ``h`` down from a level."""
    rate, g2 = term.sde.log_alpha_dot(level.t), term.sde.diffusion_squared(level.t)
    a, b = term.conversion(level, "score")
    return level.t, 1 - h * rate + h * g2 * a, h * g2 * b, safe_sqrt(g2 * h)


class EulerMaruyama(GridSolver):
    """The solver of the module docstring: weak order one."""

    @property
    def is_noisy(self) -> bool:
        """Always."""
        return True

    def check(self, term: SemiLinearTerm) -> None:
        """Refuse a start at alpha = 0.

        Raises:
          ValueError: there the drift of the reverse SDE is infinite.
        """
        if term.ends[0] is False:
            raise ValueError(
                "t_start is the proper end, where alpha is 0 and the drift of the reverse SDE is "
                "infinite; expected a t_start up to t_max, or another solver"
            )

    def coefficients(self, term: SemiLinearTerm, window: Window) -> Any:
        """``(t, a, b, s)`` of equation (1)."""
        return reverse_step(term, window.first, window.first.t - window.last.t)

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

    def strong_order(self, terms: Any) -> float:
        """One, since the noise is additive."""
        return 1.0
