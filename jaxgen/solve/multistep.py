r"""The named multistep solvers: DPM-Solver, DPM-Solver++, their SDE forms, UniPC and DEIS.

All are equation (2) of ``exponential`` with the last ``order`` outputs; they differ in

| name          | kind  | c_1 at order 2       | noise | corrector | source                        |
|---------------|-------|----------------------|-------|-----------|-------------------------------|
| dpm_2m        | noise | phi_1(z)/2           |       |           | Lu et al., arXiv 2206.00927   |
| dpm_3m        | noise |                      |       |           |                               |
| dpmpp_2m      | data  | phi_1(z)/2           |       |           | Lu et al., arXiv 2211.01095   |
| dpmpp_3m      | data  |                      |       |           |                               |
| dpmpp_2m_sde  | data  | phi_2(z)             | eta 1 |           |                               |
| dpmpp_3m_sde  | data  |                      | eta 1 |           |                               |
| unipc         | data  | 1/2 (bh1) or phi_1/2 |       | free      | Zhao et al., arXiv 2302.04867 |
| deis          | noise | phi_2(z)             |       |           | Zhang, Chen, arXiv 2204.13902 |

At order 3 and above UniPC's function B(h) cancels and its update is the polynomial's own. The
published third-order coefficients of DPM-Solver take half of the second derivative: their slope is
2 (``third="official"``); ``"exact"`` has slope 3. A corrector adds one order. The first steps have
orders 1, 2, ...: the first one costs h^2, so at small steps an order above 2 shows only in its
constant.

From alpha = 0 and to sigma = 0 a step is of order 1; the last then returns the data prediction.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.core import checks
from jaxgen.solve.exponential import (
    Multistep,
    Numbers,
    Update,
    combined,
    derivative_weights,
    gap,
    is_zero,
    leading,
    spread,
)
from jaxgen.solve.phi import phi
from jaxgen.solve.semilinear import Level, SemiLinearTerm, Window

__all__ = ["ExponentialMultistep", "deis", "dpm", "dpmpp", "unipc"]

_SECOND = ("taylor", "half_phi", "half")
_VARIABLES = ("log_rho", "rho", "t")
# Below this many steps the last ones are of lower order, unless asked otherwise.
_FEW_STEPS = 15
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(16)


class ExponentialMultistep(Multistep):
    """The solver of the module docstring; see ``dpm``, ``dpmpp``, ``unipc`` and ``deis``.

    Attributes:
      kind: ``"data"`` or ``"noise"``, the prediction that is extrapolated.
      max_order: 1 to 3, outputs of the predictor.
      second: ``c_1`` of an update of order 2: ``"taylor"`` is phi_2(z), ``"half_phi"`` phi_1(z)/2,
        ``"half"`` 1/2.
      third: ``"exact"``, or ``"official"`` with half of ``c_2`` at order 3.
      corrector: whether the last step is corrected by the newest output.
      eta: share of noise, at least 0 and possibly traced; 1 is the reverse SDE.
      variable: of the polynomial: ``"log_rho"``, ``"rho"`` or ``"t"`` (rho = sigma/alpha).
      lower_order_final: whether a step's order is at most the number of steps left; ``None``: where
        there are fewer than 15.
      label: the solver's name.

    Raises:
      ValueError: a value that is none of these; a corrector or another variable with noise.
    """

    kind: str = eqx.field(static=True)
    max_order: int = eqx.field(static=True)
    second: str = eqx.field(static=True, default="taylor")
    third: str = eqx.field(static=True, default="exact")
    corrector: bool = eqx.field(static=True, default=False)
    eta: Any = 0.0
    variable: str = eqx.field(static=True, default="log_rho")
    lower_order_final: bool | None = eqx.field(static=True, default=None)
    label: str = eqx.field(static=True, default="multistep")

    def __check_init__(self) -> None:
        checks.one_of("kind", self.kind, ("data", "noise"))
        checks.one_of("second", self.second, _SECOND)
        checks.one_of("third", self.third, ("exact", "official"))
        checks.one_of("variable", self.variable, _VARIABLES)
        if type(self.max_order) is not int or self.max_order not in (1, 2, 3):
            raise ValueError(f"order is {self.max_order!r}; expected 1, 2 or 3")
        _check_eta(self.eta)
        if self.is_noisy and (self.corrector or self.variable != "log_rho"):
            raise ValueError(
                f"eta is {self.eta} with corrector={self.corrector} and variable "
                f"{self.variable!r}; noise goes with neither a corrector nor another variable"
            )
        if self.variable != "log_rho" and self.kind != "noise":
            raise ValueError(f"variable {self.variable!r} is for noise prediction, not {self.kind}")

    @property
    def name(self) -> str:
        """The solver's name."""
        return self.label

    @property
    def kinds(self) -> tuple[str, ...]:
        """One kind."""
        return (self.kind,)

    @property
    def has_corrector(self) -> bool:
        """As configured."""
        return self.corrector

    @property
    def is_noisy(self) -> bool:
        """Whether ``eta`` is anything but the number 0."""
        return not is_zero(self.eta)

    @property
    def depth(self) -> int:
        """Outputs in use: the predictor's, and one more for the corrector."""
        return self.max_order + self.corrector

    def order(self, terms: Any) -> int:
        """Of the deterministic solver."""
        return self.max_order + self.corrector

    def check(self, term: SemiLinearTerm) -> None:
        """Refuse a grid with fewer steps than the order.

        Raises:
          ValueError: that, or what ``Multistep`` refuses.
        """
        super().check(term)
        if term.steps < self.max_order:
            raise ValueError(
                f"steps is {term.steps} for {self.name} of order {self.max_order}; expected at "
                "least as many steps as its order, or a solver of lower order"
            )

    def _order(self, term: SemiLinearTerm, window: Window, back: int) -> jax.Array:
        """Order of the predictor of the ``back``-th interval before the window's own."""
        lams = window.past.lam
        shape = (-1,) + (1,) * (lams.ndim - 1)
        known = jnp.arange(lams.shape[0]).reshape(shape) < window.begun
        usable = jnp.sum((known & jnp.isfinite(lams))[back:], axis=0, dtype=jnp.int32)
        order = jnp.clip(usable, 1, self.max_order)
        lowers = self.lower_order_final
        if lowers is None:
            lowers = term.steps < _FEW_STEPS
        if lowers:
            order = jnp.minimum(order, window.left + back)
        last = window.last if back == 0 else window.at(back - 1)
        return jnp.where(jnp.isfinite(last.lam) & jnp.isfinite(window.at(back).lam), order, 1)

    def _update(
        self, term: SemiLinearTerm, base: Level, last: Level, points: list[Level], order: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Factor, and weights on the base's output and the points', of an update of ``order``."""
        a, b0, lead, z, h = leading(self.kind, base, last, self.eta)
        if not points:
            return a, b0[None]
        n = len(points)
        active = [order > j for j in range(1, n + 1)]
        if self.variable == "log_rho":
            c = list(phi(z, n + 1))
            half = {"taylor": c[1], "half_phi": 0.5 * c[0], "half": jnp.full_like(z, 0.5)}
            moments = [jnp.where(order == 2, half[self.second], c[1]), *c[2:]]
            span = [gap(base, p) for p in points]
            unit = h
        elif self.variable == "rho":
            rho0 = base.sigma / base.alpha
            unit = last.sigma / last.alpha - rho0
            lead = last.alpha * unit
            moments = [jnp.full_like(unit, 1 / math.factorial(k + 1)) for k in range(1, n + 1)]
            span = [p.sigma / p.alpha - rho0 for p in points]
        else:
            unit = last.t - base.t
            lead = last.alpha * unit
            moments = _time_moments(term, base.t, unit, n)
            span = [p.t - base.t for p in points]
        if self.third == "official" and n >= 2:
            moments[1] = jnp.where(order == 3, 0.5 * moments[1], moments[1])
        # Inactive points need places that no active one has: those are at most 1.
        unit = jnp.where(unit == 0, 1.0, unit)
        r = [
            jnp.where(on, s / unit, 2.0 + j)
            for j, (s, on) in enumerate(zip(span, active, strict=True))
        ]
        c = [jnp.where(on, v, 0.0) for v, on in zip(moments, active, strict=True)]
        return a, combined(b0, lead, c, derivative_weights(r, active))

    def coefficients(self, term: SemiLinearTerm, window: Window) -> Numbers:
        """Weights on the last outputs."""
        first, last = window.first, window.last
        order = self._order(term, window, 0)
        noise = None
        if self.is_noisy:
            noise = spread(self.kind, last, leading(self.kind, first, last)[4], self.eta)
        parts = self.parts(term, first)
        if not self.corrector:
            points = [window.at(j) for j in range(1, self.max_order)]
            a, weights = self._update(term, first, last, points, order)
            return Numbers(first.t, parts, Update(a, (weights,)), None, noise)
        # The correction is the interval before again, with the newest output among its points:
        # both updates at once, the prediction with one point more than it uses.
        base = window.at(1)
        has_base = jnp.isfinite(base.lam) & (window.begun > 1)
        before = jnp.where(has_base, self._order(term, window, 1) + 1, 1)
        pairs = [(window.at(1), first), *((window.at(j),) * 2 for j in range(2, self.depth))]
        a, weights = self._update(
            term,
            _both(first, base),
            _both(last, first),
            [_both(*pair) for pair in pairs],
            jnp.stack([order, before]),
        )
        predict = Update(a[0], (weights[:, 0],))
        # Newest first. At the first step there is nothing to correct.
        newest_first = jnp.stack([weights[1, 1], weights[0, 1], *weights[2:, 1]])
        is_first = window.begun == 1
        correct = Update(jnp.where(is_first, 1.0, a[1]), (jnp.where(is_first, 0.0, newest_first),))
        return Numbers(first.t, parts, predict, correct, noise)


def _check_eta(eta: Any) -> None:
    # Inside a transformation a solver's leaves may be placeholders.
    if isinstance(eta, str | bool) or eta is None:
        raise ValueError(f"eta is {eta!r}; expected a real number of at least 0")
    if isinstance(eta, int | float | np.number | np.ndarray | jax.Array):
        known = checks.concrete(eta)
        if jnp.shape(eta) != () or (known is not None and not known >= 0):
            raise ValueError(f"eta is {eta}; expected one real number of at least 0")


def _both(a: Level, b: Level) -> Level:
    return Level(*(jnp.stack(pair) for pair in zip(a, b, strict=True)))


def _time_moments(term: SemiLinearTerm, t0: jax.Array, dt: jax.Array, n: int) -> list[jax.Array]:
    """``int_0^1 u^k/k! rho'(t0 + u dt) du`` for ``k = 1 .. n`` by Gauss-Legendre."""
    shape = (-1,) + (1,) * t0.ndim
    u = jnp.asarray(0.5 * (_NODES + 1), t0.dtype).reshape(shape)
    w = jnp.asarray(0.5 * _NODE_WEIGHTS, t0.dtype).reshape(shape)
    level = term.level_at(t0[None] + u * dt[None])
    slope = (level.sigma_dot * level.alpha - level.sigma * level.alpha_dot) / level.alpha**2
    moments, power = [], w * slope
    for k in range(1, n + 1):
        power = power * u / k
        moments.append(jnp.sum(power, axis=0))
    return moments


# --- by name ------------------------------------------------------------------------------------


def dpm(
    order: int = 2,
    *,
    second: str = "half_phi",
    third: str = "exact",
    lower_order_final: bool | None = None,
) -> ExponentialMultistep:
    """Multistep DPM-Solver on the noise prediction (``dpm_2m``, ``dpm_3m``).

    Args:
      order: 1, 2 or 3; order 1 is DDIM.
      second: ``"half_phi"`` as published, or ``"taylor"``.
      third: ``"exact"``, or ``"official"`` as published (module docstring).
      lower_order_final: lower the order of the last steps; ``None``: where there are fewer than 15.

    Raises:
      ValueError: a value that is none of these.
    """
    return ExponentialMultistep(
        "noise",
        order,
        second,
        third,
        lower_order_final=lower_order_final,
        label=f"dpm_{order}m",
    )


def dpmpp(
    order: int = 2,
    *,
    eta: Any = 0.0,
    second: str | None = None,
    third: str = "exact",
    lower_order_final: bool | None = None,
) -> ExponentialMultistep:
    """Multistep DPM-Solver++ on the data prediction (``dpmpp_2m``, ``dpmpp_2m_sde``, ...).

    Args:
      order: 1, 2 or 3; order 1 without noise is DDIM.
      eta: share of noise: 0 for the probability flow, 1 for the reverse SDE; may be traced.
      second: ``"half_phi"`` (the default without noise) or ``"taylor"`` (with noise).
      third: ``"exact"``, or ``"official"`` as published (module docstring).
      lower_order_final: lower the order of the last steps; ``None``: where there are fewer than 15.

    Raises:
      ValueError: a value that is none of these.
    """
    if second is None:
        second = "half_phi" if is_zero(eta) else "taylor"
    return ExponentialMultistep(
        "data",
        order,
        second,
        third,
        eta=eta,
        lower_order_final=lower_order_final,
        label=f"dpmpp_{order}m" + ("" if is_zero(eta) else "_sde"),
    )


def unipc(
    order: int = 3,
    *,
    variant: str = "bh2",
    corrector: bool = True,
    kind: str = "data",
    lower_order_final: bool | None = True,
) -> ExponentialMultistep:
    """UniPC: a multistep predictor with a free corrector, of order ``order + 1``.

    Args:
      order: of the predictor, 1, 2 or 3.
      variant: B(h), ``"bh1"`` or ``"bh2"``; matters in updates of order 2 alone.
      corrector: whether to correct; without it bh2 of order 2 is ``dpmpp_2m``.
      kind: ``"data"`` or ``"noise"``.
      lower_order_final: lower the order of the last steps; ``None``: where there are fewer than 15.

    Raises:
      ValueError: a value that is none of these.
    """
    checks.one_of("variant", variant, ("bh1", "bh2"))
    return ExponentialMultistep(
        kind,
        order,
        "half" if variant == "bh1" else "half_phi",
        corrector=corrector,
        lower_order_final=lower_order_final,
        label="unipc",
    )


def deis(
    order: int = 3, *, variable: str = "log_rho", lower_order_final: bool | None = None
) -> ExponentialMultistep:
    """DEIS (tAB): the noise prediction as a polynomial, integrated exactly.

    Args:
      order: 1, 2 or 3 outputs.
      variable: of the polynomial, ``"log_rho"``, ``"rho"`` or ``"t"``; rho = sigma/alpha.
      lower_order_final: lower the order of the last steps; ``None``: where there are fewer than 15.

    Raises:
      ValueError: a value that is none of these.
    """
    return ExponentialMultistep(
        "noise", order, variable=variable, lower_order_final=lower_order_final, label="deis"
    )
