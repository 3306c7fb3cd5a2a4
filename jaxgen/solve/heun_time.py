r"""Heun's method on the probability flow in time, with a last Euler step.

With v the velocity and h = t1 - t0 < 0,

    x1 = x + h v(x, t0);    x1 <- x1 + h (v(x1, t1) - v(x, t0)) / 2    but in the last step.   (1)

This is ``diffrax.Heun`` on ``solve.probability_flow`` except for the last step, which spares the
call at the end of time, where a velocity is hardest to learn (the Heun sampler of flow matching).
Nfe = 2 steps - 1.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxgen.solve.heun import correct
from jaxgen.solve.semilinear import GridSolver, SemiLinearTerm, Window

__all__ = ["HeunTime"]


class HeunTime(GridSolver):
    """The solver of the module docstring."""

    @property
    def stages(self) -> int:
        """Two."""
        return 2

    def coefficients(self, term: SemiLinearTerm, window: Window) -> Any:
        """Times, the step and the velocity's numbers at both ends."""
        first, last = window.first, window.last
        h = last.t - first.t
        wanted = last.t > term.times[-1]
        # Undefined numbers of a correction that is left out must not reach a gradient.
        after = tuple(jnp.where(wanted, r, 0.0) for r in term.conversion(last, "velocity"))
        return first.t, last.t, h, wanted, term.conversion(first, "velocity"), after

    def advance(
        self,
        term: SemiLinearTerm,
        numbers: Any,
        noise: tuple[jax.Array, jax.Array] | None,
        x: jax.Array,
        state: Any,
        is_full: bool | None = None,
    ) -> tuple[jax.Array, Any]:
        """Two calls of the field, or one."""
        del noise
        t0, t1, h, wanted, (a0, b0), (a1, b1) = numbers
        out = term.output(x, t0)

        def corrected(x1: jax.Array) -> jax.Array:
            half = 0.5 * h
            return term.combine(
                x1,
                1 + half * a1,
                (half * b1, term.output(x1, t1)),
                (-half * a0, term.centred(x)),
                (-half * b0, out),
            )

        x1 = term.combine(x, 1 + h * a0, (h * b0, out))
        return correct(is_full, wanted, corrected, x1), state

    def plan(self, term: SemiLinearTerm) -> Sequence[tuple[int, bool | None]]:
        """All but the last step whole."""
        return [(term.steps - 1, True), (1, False)]

    def calls(self, term: SemiLinearTerm, numbers: Any) -> jax.Array:
        """Two a step, one in the last."""
        del numbers
        return jnp.asarray(2 * term.steps - 1, jnp.int32)

    def order(self, terms: Any) -> int:
        """Global order: one Euler step at the end costs no order."""
        return 2
