r"""The singlestep solvers: DPM-Solver-2 and -3 and DPM-Solver++ 2S.

Explicit exponential Runge-Kutta steps (Lu et al., arXiv 2206.00927, algorithms 1 and 2; 2211.01095,
algorithm 1): with E the output of the kind that the solver keeps, at the levels lam_s + c_i h,

    stage i   x_i' = a_i x_s' + b_i E_s + lead_i m_i (E_{i-1} - E_s)                        (1)

where a_i, b_i and lead_i are those of equation (2) of ``exponential`` over c_i h, with z_i = -c_i h
(data) or c_i h (noise). The end of the step is the last stage, c = 1.

| name     | kind  | stages at     | m                                              |
|----------|-------|---------------|------------------------------------------------|
| dpm_2    | noise | 1/2, 1        | phi_1(z)/2 / (1/2)                             |
| dpmpp_2s | data  | 1/2, 1        | the same                                       |
| dpm_3    | noise | 1/3, 2/3, 1   | phi_2(z_2) (2/3)/(1/3), then phi_2(z) / (2/3)  |

Two or three calls a step; one where log-SNR is infinite at either end, which is a DDIM step.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from jaxgen.core import checks
from jaxgen.core.arrays import cast_coefficient
from jaxgen.solve.exponential import Parts, leading, refuse_pure_noise
from jaxgen.solve.heun import correct, runs_between_ends
from jaxgen.solve.phi import phi
from jaxgen.solve.semilinear import GridSolver, Level, SemiLinearTerm, Window

__all__ = ["Singlestep", "dpm_2", "dpm_3", "dpmpp_2s"]


class Singlestep(GridSolver):
    """The solver of the module docstring; see ``dpm_2``, ``dpm_3`` and ``dpmpp_2s``.

    Attributes:
      kind: ``"data"`` or ``"noise"``.
      nodes: the inner stages, in (0, 1): one for order 2, two for order 3.
      label: the solver's name.

    Raises:
      ValueError: another kind, or nodes that do not rise within (0, 1).
    """

    kind: str = eqx.field(static=True)
    nodes: tuple[float, ...] = eqx.field(static=True)
    label: str = eqx.field(static=True, default="singlestep")

    def __check_init__(self) -> None:
        checks.one_of("kind", self.kind, ("data", "noise"))
        ends = (0.0, *self.nodes, 1.0)
        if len(self.nodes) not in (1, 2) or any(not a < b for a, b in itertools.pairwise(ends)):
            raise ValueError(f"nodes is {self.nodes}; expected one or two rising within (0, 1)")

    @property
    def name(self) -> str:
        """The solver's name."""
        return self.label

    @property
    def stages(self) -> int:
        """The inner stages and the first."""
        return len(self.nodes) + 1

    def order(self, terms: Any) -> int:
        """One more than the inner stages."""
        return len(self.nodes) + 1

    def check(self, term: SemiLinearTerm) -> None:
        """Refuse pure noise where a kind is undefined there; see ``Multistep``."""
        refuse_pure_noise(term, (self.kind,))

    def _parts(self, term: SemiLinearTerm, level: Level) -> Parts:
        return None if self.kind == term.prediction else term.conversion(level, self.kind)

    def coefficients(self, term: SemiLinearTerm, window: Window) -> Any:
        """Whether the step is whole, a DDIM step's numbers, and each stage's."""
        first, last = window.first, window.last
        wanted = jnp.isfinite(first.lam) & jnp.isfinite(last.lam)
        euler = leading(self.kind, first, last)[:2]
        # Undefined stages of a step that is not whole must not reach a gradient.
        some = jnp.broadcast_to(jnp.asarray(term.sde.t_min, first.t.dtype), wanted.shape)
        begin = jax.tree.map(lambda v, w: jnp.where(wanted, v, w), first, term.level_at(some))
        h = jnp.where(wanted, last.lam - first.lam, 0.0)
        stages: list[Any] = []
        before = None
        for c in (*self.nodes, 1.0):
            if c < 1:
                level = term.level_at(term.sde.inverse_log_snr(2 * (begin.lam + c * h)))
            else:
                level = jax.tree.map(lambda v, w: jnp.where(wanted, v, w), last, begin)
            a, b, lead, z, _ = leading(self.kind, begin, level)
            on_change = None
            if before is not None:
                phi_1, phi_2 = phi(z, 2)
                weight = 0.5 * phi_1 if len(self.nodes) == 1 else phi_2
                on_change = lead * weight * (c / before)
            parts = self._parts(term, level) if c < 1 else None
            stages.append((level.t, parts, a, b, on_change))
            before = c
        return first.t, self._parts(term, first), euler, wanted, stages

    def advance(
        self,
        term: SemiLinearTerm,
        numbers: Any,
        noise: tuple[jax.Array, jax.Array] | None,
        x: jax.Array,
        state: Any,
        is_full: bool | None = None,
    ) -> tuple[jax.Array, Any]:
        """One call of the field, and one for each inner stage of a whole step."""
        del noise
        t0, parts, (a, b), wanted, stages = numbers

        def output(x: jax.Array, t: jax.Array, parts: Parts) -> jax.Array:
            out = term.output(x, t)
            if parts is None:
                return out
            p, q = (cast_coefficient(v, x) for v in parts)
            return p * term.centred(x) + q * out

        out0 = output(x, t0, parts)

        def whole(_: jax.Array) -> jax.Array:
            t, own, a_i, b_i, _none = stages[0]
            inner = term.combine(x, a_i, (b_i, out0))
            for t_next, own_next, a_i, b_i, on_change in stages[1:]:
                change = output(inner, t, own) - out0
                inner = term.combine(x, a_i, (b_i, out0), (on_change, change))
                t, own = t_next, own_next
            return inner

        return correct(is_full, wanted, whole, term.combine(x, a, (b, out0))), state

    def plan(self, term: SemiLinearTerm) -> Sequence[tuple[int, bool | None]]:
        """One run where both ends are known to be finite or not."""
        return runs_between_ends(term)

    def calls(self, term: SemiLinearTerm, numbers: Any) -> jax.Array:
        """One a step, and the inner stages' where any sample's step is whole."""
        wanted = numbers[3]
        some = jnp.any(wanted.reshape(term.steps, -1), axis=1)
        return term.steps + len(self.nodes) * jnp.sum(some, dtype=jnp.int32)


def dpm_2(r: float = 0.5) -> Singlestep:
    """DPM-Solver-2, two calls a step.

    Args:
      r: place of the inner stage in log-SNR, in (0, 1).
    """
    return Singlestep("noise", (r,), "dpm_2")


def dpm_3(r1: float = 1 / 3, r2: float = 2 / 3) -> Singlestep:
    """DPM-Solver-3, three calls a step; of order 3 with ``r2 = 2/3``.

    Args:
      r1: place of the first inner stage in log-SNR.
      r2: place of the second.
    """
    return Singlestep("noise", (r1, r2), "dpm_3")


def dpmpp_2s(r: float = 0.5) -> Singlestep:
    """DPM-Solver++ 2S on the data prediction, two calls a step.

    Args:
      r: place of the inner stage in log-SNR, in (0, 1).
    """
    return Singlestep("data", (r,), "dpmpp_2s")
