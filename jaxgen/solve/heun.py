r"""Heun's second-order solver in x/alpha and sigma/alpha, with churn.

Karras et al., arXiv 2206.00364, algorithms 1 and 2. In z = x'/alpha and s = sigma/alpha the
probability flow is dz/ds = E, the predicted noise. Back in x', from the (churned) level h to 1,

    x1' <- Euler step (DDIM) to s1                                                          (1)
    x1' <- x1' + alpha1 (s1 - s_h) (E_1 - E_h) / 2       unless sigma1 = 0 or alpha_h = 0   (2)

Churn first raises the level: s_h = s (1 + min(churn/steps, sqrt(2) - 1)) for s in [s_min, s_max],
with noise of standard deviation sqrt(s_h^2 - s^2) s_noise added to z. A raised level beyond t_max
is held at t_max. Two calls a step, one where (2) is left out.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from jaxgen.core.arrays import safe_sqrt
from jaxgen.solve.ddim import to_data
from jaxgen.solve.semilinear import GridSolver, Level, SemiLinearTerm, Window

__all__ = ["Heun"]


def correct(
    is_full: bool | None,
    wanted: jax.Array,
    corrected: Callable[[jax.Array], jax.Array],
    x: jax.Array,
) -> jax.Array:
    """``corrected(x)`` where it is wanted, with the call left out where no sample wants it.

    Args:
      is_full: whether every sample is known to want it, or none; ``None`` leaves it to ``wanted``.
      wanted: ``()`` or ``(batch,)``.
      corrected: calls the field once.
      x: state of the prediction.
    """
    if is_full is not None:
        return corrected(x) if is_full else x

    def some(x: jax.Array) -> jax.Array:
        keep = jnp.reshape(wanted, wanted.shape + (1,) * (x.ndim - wanted.ndim))
        return jnp.where(keep, corrected(x), x)

    return jax.lax.cond(jnp.any(wanted), some, lambda x: x, x)


def runs_between_ends(term: SemiLinearTerm) -> Sequence[tuple[int, bool | None]]:
    """``GridSolver.plan`` of a solver whose steps are whole between finite log-SNRs alone."""
    first, last = term.ends
    if first is None or last is None:
        return [(term.steps, None)]
    if term.steps == 1:
        return [(1, first and last)]
    runs = [(1, False)] * (not first)
    runs.append((term.steps - (not first) - (not last), True))
    return runs + [(1, False)] * (not last)


class Heun(GridSolver):
    """The solver of the module docstring.

    Attributes:
      churn: total churn of the grid (S_churn); 0 is the deterministic solver.
      s_min: lowest ``sigma/alpha`` with churn.
      s_max: highest ``sigma/alpha`` with churn.
      s_noise: standard deviation of the churn's noise relative to the exact one.

    Raises:
      ValueError: a negative ``churn``, or ``s_min > s_max``.
    """

    churn: float = eqx.field(static=True, default=0.0)
    s_min: float = eqx.field(static=True, default=0.0)
    s_max: float = eqx.field(static=True, default=math.inf)
    s_noise: float = eqx.field(static=True, default=1.0)

    def __check_init__(self) -> None:
        if not self.churn >= 0 or not self.s_min <= self.s_max:
            raise ValueError(
                f"churn is {self.churn}, s_min {self.s_min} and s_max {self.s_max}; expected churn "
                ">= 0 and s_min <= s_max"
            )

    @property
    def is_noisy(self) -> bool:
        """Whether there is churn."""
        return self.churn > 0

    def _raised(self, term: SemiLinearTerm, level: Level) -> tuple[Level, jax.Array, jax.Array]:
        """The churned level, the factor on ``x'`` and the noise's standard deviation."""
        most = min(self.churn / term.steps, math.sqrt(2) - 1)
        s = level.sigma / level.alpha
        gamma = jnp.where((s >= self.s_min) & (s <= self.s_max), most, 0.0)
        top = term.sde.log_snr(term.sde.t_max)
        lam = jnp.maximum(level.lam - jnp.log1p(gamma), 0.5 * top)
        is_moved = lam < level.lam
        t = term.sde.inverse_log_snr(jnp.where(is_moved, 2 * lam, jnp.maximum(2 * level.lam, top)))
        raised = term.level_at(jnp.where(is_moved, t, level.t))
        rise = jnp.exp(2 * (level.lam - raised.lam))
        spread = raised.alpha * s * safe_sqrt(jnp.where(is_moved, rise - 1, 0.0))
        factor = jnp.where(is_moved, raised.alpha / level.alpha, 1.0)
        return raised, factor, self.s_noise * jnp.where(is_moved, spread, 0.0)

    @property
    def stages(self) -> int:
        """Two."""
        return 2

    def coefficients(self, term: SemiLinearTerm, window: Window) -> Any:
        """The churn's numbers, the Euler step's and the correction's."""
        first, last = window.first, window.last
        churned = None
        if self.is_noisy:
            first, factor, spread = self._raised(term, first)
            churned = factor, spread
        wanted = (last.sigma > 0) & (first.alpha > 0)
        alpha = jnp.where(first.alpha > 0, first.alpha, 1.0)
        half = 0.5 * (last.sigma - last.alpha * first.sigma / alpha)
        rates = (half, *term.conversion(first, "noise"), *term.conversion(last, "noise"))
        # Undefined numbers of a correction that is left out must not reach a gradient.
        known = tuple(jnp.where(wanted, r, 0.0) for r in rates)
        return first.t, last.t, churned, to_data(term, first, last), wanted, known

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
        t0, t1, churned, (a, b), wanted, (half, a0, b0, a1, b1) = numbers
        if churned is not None:
            factor, spread = churned
            pairs = []
            if noise is not None:
                scale, increment = noise
                pairs.append((spread * scale, increment))
            x = term.combine(x, factor, *pairs)
        out = term.output(x, t0)

        def corrected(x1: jax.Array) -> jax.Array:
            return term.combine(
                x1,
                1 + half * a1,
                (half * b1, term.output(x1, t1)),
                (-half * a0, term.centred(x)),
                (-half * b0, out),
            )

        x1 = term.combine(x, a, (b, out))
        return correct(is_full, wanted, corrected, x1), state

    def plan(self, term: SemiLinearTerm) -> Sequence[tuple[int, bool | None]]:
        """One run where both ends are known to be finite or not."""
        return runs_between_ends(term)

    def calls(self, term: SemiLinearTerm, numbers: Any) -> jax.Array:
        """Two a step, one where the correction is left out for every sample."""
        wanted = numbers[4]
        some = jnp.any(wanted.reshape(term.steps, -1), axis=1)
        return term.steps + jnp.sum(some, dtype=jnp.int32)

    def order(self, terms: Any) -> int:
        """Of the deterministic solver."""
        return 2
