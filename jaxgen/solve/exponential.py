r"""The core of the fast solvers: exponential multistep updates with a free corrector.

With lam = log(alpha/sigma), E the noise and D the data prediction, the reverse process of noise
share eta (0: the probability flow, 1: the reverse SDE) is linear but for the field (Lu et al.,
arXiv 2206.00927 and 2211.01095; Xue et al., arXiv 2309.05019):

    data    x_t' = (sigma_t/sigma_s) e^{-eta h} x_s' + alpha_t (1+eta) int_0^h e^{z(1-u/h)} D' du
    noise   x_t' = (alpha_t/alpha_s) x_s' - sigma_t (1+eta) int_0^h e^{z(1-u/h)} E du        (1)

over a step h = lam_t - lam_s, with z = -(1+eta) h for data and z = h for noise. A Taylor polynomial
of the output about the base s turns (1) into

    x_t' = a x_s' + b0 F_s + lead sum_{k=1}^{n-1} c_k (h^k F^(k)),     c_k = phi_{k+1}(z)    (2)

and the polynomial through the last outputs gives h^k F^(k) as differences F_j - F_s with weights
that depend on r_j = (lam_j - lam_s)/h alone. So an update is a factor on the state and a weight on
each of the last outputs, and a *corrector* is the same update over the interval just passed, with
the newest output among the points; it costs no call of the field. In any other variable than lam
(rho = sigma/alpha, t) only lead, c_k and r_j change.

This file has the pieces and the step; ``multistep`` has the named solvers, and the schedules of
``schedule`` and DPM-Solver-v3 are other providers of numbers.
"""

import abc
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.core.arrays import cast_coefficient, safe_sqrt
from jaxgen.solve.semilinear import GridSolver, Level, SemiLinearTerm, Window

__all__ = ["Multistep", "Numbers", "Update", "derivative_weights", "leading", "spread"]

Parts = tuple[jax.Array, jax.Array] | None


class Update(NamedTuple):
    """``mu + factor (x - mu) + sum_j weights_j F_j + shift``.

    Attributes:
      factor: on the base state; ``()`` or ``(batch,)``, or of the state's shape up to ones.
      weights: for each kind of output that the solver keeps, weights on the newest, the one
        before it, ...: arrays in a tuple or along a first axis.
      shift: a constant, ``None`` for none.
    """

    factor: jax.Array
    weights: tuple[Any, ...]
    shift: jax.Array | None = None


class Numbers(NamedTuple):
    """What a step of a ``Multistep`` solver needs.

    Attributes:
      t: time of the field's call.
      parts: for each kind kept, ``(p, q)`` of ``F = p x' + q out'``; ``None`` for the output
        itself.
      predict: from the state at the interval's start; its weights begin with the newest output.
      correct: of that state, from the state one interval before; ``None`` without a corrector.
      spread: standard deviation of the step's noise, ``None`` for none.
    """

    t: jax.Array
    parts: tuple[Parts, ...]
    predict: Update
    correct: Update | None
    spread: jax.Array | None


# --- the pieces of an update ------------------------------------------------------------------


def leading(
    kind: str, base: Level, last: Level, eta: Any = 0.0
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """``(a, b0, lead, z, h)`` of equation (2), with ``h = 1`` where log-SNR is infinite.

    ``a`` and ``b0`` come from alpha and sigma: as accurate as log-SNRs would be, and finite where
    those are not.

    Args:
      kind: ``"data"`` or ``"noise"``.
      base: the level at the base.
      last: the level at the step's end.
      eta: share of the noise; a number 0 leaves it out.
    """
    h = gap(base, last)
    is_noisy = not is_zero(eta)
    if kind == "data":
        a = last.sigma / base.sigma
        if is_noisy:
            a = a * jnp.exp(-eta * h)
        return a, last.alpha - base.alpha * a, last.alpha * (1 + eta) * h, -(1 + eta) * h, h
    a = last.alpha / base.alpha
    b0 = (1 + eta) * (last.sigma - a * base.sigma)
    return a, b0, -last.sigma * (1 + eta) * h, h, h


def spread(kind: str, last: Level, h: jax.Array, eta: Any) -> jax.Array:
    """Standard deviation of the noise of equation (1)."""
    if kind == "data":
        return last.sigma * _root(-jnp.expm1(-2 * eta * h))
    return last.sigma * _root(eta * jnp.expm1(2 * h))


def _root(x: jax.Array) -> jax.Array:
    """A square root with gradient 0 at 0 and NaN below."""
    return jnp.where(x < 0, jnp.nan, safe_sqrt(x))


def gap(base: Level, last: Level) -> jax.Array:
    """``lam_t - lam_s``; 1 where it is infinite, with gradient 0."""
    is_finite = jnp.isfinite(base.lam) & jnp.isfinite(last.lam)
    # Masked before the difference too: infinity times zero is no gradient.
    low, high = (jnp.where(is_finite, v.lam, 0.0) for v in (base, last))
    return jnp.where(is_finite, high - low, 1.0)


def derivative_weights(points: Sequence[jax.Array], active: Sequence[jax.Array]) -> jax.Array:
    """Weights ``w[k-1, j]`` with ``h^k F^(k)(0) = sum_j w[k-1, j] (F(r_j) - F(0))``.

    From the polynomial through 0 and the active points, by Lagrange's basis.

    Args:
      points: ``m`` places ``r_j``, different from each other and from 0 (the inactive ones too).
      active: which of them take part; the weights of the others are 0.

    Returns:
      ``(m, m, ...)``.
    """
    # Few operations on stacked arrays: the compiler's time goes by their number.
    r, is_active, m = jnp.stack(points), jnp.stack(active), len(points)
    own = jnp.eye(m, dtype=bool).reshape(m, m, *(1,) * (r.ndim - 1))
    # At [i, j]: the factor (x - r_i)/(r_j - r_i) of basis polynomial j, 1 where i takes no part.
    gap = jnp.where(own, 1.0, r[None] - r[:, None])
    is_factor = is_active[:, None] & ~own
    slope = jnp.where(is_factor, 1 / gap, 0.0)
    offset = jnp.where(is_factor, -r[:, None] / gap, 1.0)
    # Coefficients of the basis polynomials over x, lowest first.
    blank = jnp.zeros_like(r)[None]
    basis = jnp.concatenate([jnp.where(is_active, 1 / r, 0.0)[None], *[blank] * (m - 1)])
    for i in range(m):
        up = jnp.concatenate([blank, basis[:-1]])
        basis = basis * offset[i][None] + up * slope[i][None]
    factorials = np.array([math.factorial(k + 1) for k in range(m)])
    return basis * jnp.asarray(factorials, r.dtype).reshape(m, *(1,) * r.ndim)


def combined(b0: jax.Array, lead: jax.Array, c: Sequence[jax.Array], weights: Any) -> jax.Array:
    """Weights on the base's output and on the points' of equation (2), ``(m + 1, ...)``.

    Args:
      b0: of equation (2).
      lead: of equation (2).
      c: ``c_k`` for ``k = 1 .. m``, 0 beyond the order.
      weights: ``derivative_weights``.
    """
    on_points = lead[None] * jnp.sum(jnp.stack(c)[:, None] * weights, axis=0)
    return jnp.concatenate([(b0 - jnp.sum(on_points, axis=0))[None], on_points])


def refuse_pure_noise(term: SemiLinearTerm, kinds: Sequence[str | None]) -> None:
    """Refuse a start at alpha = 0 where the field's kind, or one that is kept, is undefined there.

    Raises:
      ValueError: noise or a score is predicted or kept.
    """
    undefined = [k for k in (term.prediction, *kinds) if k in ("noise", "score")]
    if term.ends[0] is False and undefined:
        raise ValueError(
            f"t_start is the proper end, where alpha is 0 and {undefined[0]} prediction tells "
            "nothing of the data; expected data, v or velocity prediction and a solver on data "
            "prediction there, or a t_start up to t_max"
        )


def is_zero(value: Any) -> bool:
    """Whether it is the number 0; a traced value is not."""
    return isinstance(value, int | float) and value == 0


# --- the step -----------------------------------------------------------------------------------


class Multistep(GridSolver):
    """The step of a solver with a history of outputs; a subclass provides its ``Numbers``.

    The state is the history, newest first, for each of ``kinds``, and with a corrector the state at
    the last knot. Every step calls the field once.
    """

    @property
    @abc.abstractmethod
    def kinds(self) -> tuple[str | None, ...]:
        """What is kept of an output: ``"data"``, ``"noise"``; ``None`` for a kind of its own."""

    @property
    @abc.abstractmethod
    def has_corrector(self) -> bool:
        """Whether ``Numbers.correct`` is there."""

    @abc.abstractmethod
    def coefficients(self, term: SemiLinearTerm, window: Window) -> Numbers:
        """The numbers of the step over the window's interval."""

    def parts(self, term: SemiLinearTerm, level: Level) -> tuple[Parts, ...]:
        """``Numbers.parts`` for ``kinds`` with names."""
        return tuple(
            None if kind == term.prediction else term.conversion(level, str(kind))
            for kind in self.kinds
        )

    def check(self, term: SemiLinearTerm) -> None:
        """Refuse what ``refuse_pure_noise`` does."""
        refuse_pure_noise(term, self.kinds)

    def additive_noise(self, numbers: Numbers) -> jax.Array | None:
        """The deviation of the noise."""
        return numbers.spread

    def start(self, term: SemiLinearTerm, x: jax.Array) -> Any:
        """An empty history."""
        blank = jnp.zeros_like(x)
        history = tuple((blank,) * (self.depth - 1) for _ in self.kinds)
        return history, (x if self.has_corrector else None)

    def advance(
        self,
        term: SemiLinearTerm,
        numbers: Numbers,
        noise: tuple[jax.Array, jax.Array] | None,
        x: jax.Array,
        state: Any,
        is_full: bool | None = None,
    ) -> tuple[jax.Array, Any]:
        """One call of the field: correct the state, then step on."""
        out = term.output(x, numbers.t)
        outputs = []
        history, base = state
        for own, past in zip(numbers.parts, history, strict=True):
            if own is None:
                outputs.append((out, *past))
                continue
            p, q = (cast_coefficient(v, x) for v in own)
            outputs.append((p * term.centred(x) + q * out, *past))
        if numbers.correct is not None:
            x = _apply(term, base, numbers.correct, outputs)
            base = x
        drawn = None
        if noise is not None and numbers.spread is not None:
            scale, increment = noise
            drawn = numbers.spread * scale, increment
        x = _apply(term, x, numbers.predict, outputs, drawn)
        return x, (tuple(own[: self.depth - 1] for own in outputs), base)


def _apply(
    term: SemiLinearTerm,
    x: jax.Array,
    update: Update,
    outputs: Sequence[Sequence[jax.Array]],
    noise: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    pairs = [
        pair
        for weights, kept in zip(update.weights, outputs, strict=True)
        for pair in zip(weights, kept, strict=False)
    ]
    x = term.combine(x, update.factor, *pairs, *([] if noise is None else [noise]))
    return x if update.shift is None else x + cast_coefficient(update.shift, x)
