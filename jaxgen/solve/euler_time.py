r"""Euler's method on the probability flow in time, ``x1 = x + (t1 - t0) v(x, t0)``.

The plain baseline of order one (``diffrax.Euler`` counts as an Ito solver, so that ``sample`` runs
it on the reverse SDE). Nfe = steps. Under ``rectified`` it is ``ddim`` on the ``"time"`` grid.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxgen.solve.semilinear import GridSolver, SemiLinearTerm, Window

__all__ = ["EulerTime"]


class EulerTime(GridSolver):
    """The solver of the module docstring."""

    def coefficients(self, term: SemiLinearTerm, window: Window) -> Any:
        """``(t, a, b, s)`` of ``SemiLinearTerm.one_call``, without noise."""
        h = window.last.t - window.first.t
        a, b = term.conversion(window.first, "velocity")
        return window.first.t, 1 + h * a, h * b, jnp.zeros_like(h)

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
        del noise, is_full
        return term.one_call(x, numbers, None), state

    def order(self, terms: Any) -> int:
        """Global order."""
        return 1
