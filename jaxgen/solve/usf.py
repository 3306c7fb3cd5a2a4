"""A schedule as a solver: the numbers of equation (1) of ``schedule`` on the exponential core.

Both predictions are kept of every output, so that each step may work on either. All decisions are
data: one compilation serves every schedule of M steps, and a population of them under ``vmap``. A
step that is not corrected is replayed: the predictor's own update, from the state at its start.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.core import checks
from jaxgen.process.linear import LinearSDE
from jaxgen.score.prediction import Field
from jaxgen.solve.dpm_solver_v3 import DPMSolverV3, dpmv3
from jaxgen.solve.exponential import (
    Multistep,
    Numbers,
    Update,
    combined,
    derivative_weights,
    leading,
    refuse_pure_noise,
)
from jaxgen.solve.phi import phi
from jaxgen.solve.sample import sample
from jaxgen.solve.schedule import (
    AFS,
    MAX_ORDER,
    NOISE,
    RELAXATIONS,
    STATISTICS,
    SolverSchedule,
    schedule_times,
    validate_schedule,
)
from jaxgen.solve.semilinear import Level, SemiLinearTerm, Window
from jaxgen.solve.state import Sample
from jaxgen.solve.statistics import Statistics

__all__ = ["ScheduleSolver", "usf", "usf_sample"]

# Quadrature nodes on the statistics, of all steps together and of one, as DPM-Solver-v3 has them.
_NODES, _FEWEST, _MOST = 200, 10, 64
# Distance in lam, relative to 1 + |lam|, at which a grid is another than the schedule's.
_SAME_GRID = 2e-3


class _Decisions(NamedTuple):
    """What a schedule says of one step, each ``()``."""

    ptype: jax.Array
    order: jax.Array
    est_order: jax.Array
    relax_kind: jax.Array
    relax_coef: jax.Array


class _Known(NamedTuple):
    """A term whose output at this step is known; of its methods, what a step uses."""

    term: SemiLinearTerm
    out: jax.Array

    def output(self, x: jax.Array, t: jax.Array) -> jax.Array:
        del x, t
        return self.out

    def centred(self, x: jax.Array) -> jax.Array:
        return self.term.centred(x)

    def combine(self, x: jax.Array, a: jax.Array, *pairs: Any) -> jax.Array:
        return self.term.combine(x, a, *pairs)


def _stacked(levels: Sequence[Level]) -> Level:
    return Level(*(jnp.stack(values) for values in zip(*levels, strict=True)))


class ScheduleSolver(Multistep):
    """The solver of a schedule; made by ``usf``.

    Attributes:
      schedule: the decisions, possibly traced.
      x0_mean: mean of the data, of the event's shape; for ``afs`` 2.
      model: DPM-Solver-v3 with the model's statistics, for ``ptype`` 2; ``None`` without.
      may_skip: whether the first output may be analytic (static).
    """

    schedule: SolverSchedule
    x0_mean: Any = None
    model: DPMSolverV3 | None = None
    may_skip: bool = eqx.field(static=True, default=True)

    @property
    def name(self) -> str:
        """The solver's name."""
        return "usf"

    @property
    def kinds(self) -> tuple[str, ...]:
        """Both, so that steps may differ."""
        return ("data", "noise")

    @property
    def has_corrector(self) -> bool:
        """Always: a step without one is replayed."""
        return True

    @property
    def depth(self) -> int:
        """Outputs in use: the predictor's, and one more for the corrector."""
        return MAX_ORDER + 1

    def order(self, terms: Any) -> int:
        """Of the highest predictor."""
        del terms
        known = checks.concrete(self.schedule.order)
        return MAX_ORDER if known is None else int(np.max(known))

    def times(self, sde: LinearSDE) -> jax.Array:
        """The grid that the schedule is made for; see ``schedule_times``."""
        return schedule_times(sde, self.schedule)

    def check(self, term: SemiLinearTerm) -> None:
        """Refuse another grid than the schedule's.

        Raises:
          ValueError: another number of steps; other times, where they are known.
        """
        refuse_pure_noise(term, ("data",))
        steps = self.schedule.steps
        if term.steps != steps:
            raise ValueError(
                f"the schedule has {steps} steps and the grid {term.steps}; pass "
                "grid=schedule_times(sde, schedule), or a schedule for that many steps"
            )
        with jax.ensure_compile_time_eval():
            is_same = self._is_same(0.5 * term.sde.log_snr(term.times), self.schedule.lam)
        known = checks.concrete(is_same)
        if known is not None and not known.all():
            raise ValueError(
                f"the grid {term.times} is not the schedule's, which is at lam "
                f"{self.schedule.lam}; pass grid=schedule_times(sde, schedule)"
            )

    @staticmethod
    def _is_same(lam: jax.Array, own: Any) -> jax.Array:
        own = jnp.asarray(own, lam.dtype)
        own = own.reshape(own.shape + (1,) * (lam.ndim - own.ndim))
        close = jnp.abs(lam - own) <= _SAME_GRID * (1 + jnp.abs(own))
        return (lam == own) | (close & jnp.isfinite(own))

    def start(self, term: SemiLinearTerm, x: jax.Array) -> Any:
        """An empty history.

        Raises:
          ValueError: the statistics are of another event.
        """
        if self.model is not None:
            self.model.start(term, x)
        return super().start(term, x)

    def calls(self, term: SemiLinearTerm, numbers: Any) -> jax.Array:
        """One a step, but for an analytic first."""
        del numbers
        skipped = jnp.asarray(self.schedule.afs) > 0
        return jnp.asarray(term.steps - skipped, jnp.int32)

    # --- numbers ----------------------------------------------------------------------------------

    def _decisions(self, n: jax.Array) -> _Decisions:
        def at(values: Any) -> jax.Array:
            return jnp.asarray(values).at[n].get(mode="clip")

        return _Decisions(*(at(getattr(self.schedule, name)) for name in _Decisions._fields))

    def _updates(
        self, base: Level, last: Level, points: Sequence[Level], decisions: _Decisions
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Factors, and for each kind the weights on the base's output and the points'.

        Several updates at once, along the first axis of all entries (in the weights, the second):
        the compiler's time goes by the number of operations.
        """
        order, m = decisions.order, len(points)
        active = [order > j for j in range(1, m + 1)]
        fewer = jnp.where(decisions.est_order > 0, decisions.est_order, order - 1)
        first_active = [on & (fewer >= j) for j, on in enumerate(active, 1)]
        h = last.lam - base.lam
        # At the first step there is no earlier interval: a length of 1 keeps its numbers finite.
        h = jnp.where(jnp.isfinite(h) & (h > 0), h, 1.0)
        # Inactive points need places that no active one has: those are at most 1.
        r = [
            jnp.where(on, jnp.where(on, p.lam - base.lam, 1.0) / h, 2.0 + j)
            for j, (p, on) in enumerate(zip(points, active, strict=True))
        ]
        estimates = derivative_weights(r, active)
        estimates = jnp.concatenate([derivative_weights(r, first_active)[:1], estimates[1:]])
        # A step of the statistics to sigma = 0 is one on the data.
        is_data = decisions.ptype != NOISE
        factor, weights = None, []
        for kind, is_kind in (("data", is_data), ("noise", ~is_data)):
            a, b0, lead, z, step = leading(kind, base, last)
            functions = phi(z, m + 1)
            moments = [functions[1] * self._relaxed(z, step, functions, decisions), *functions[2:]]
            c = [jnp.where(on, v, 0.0) for v, on in zip(moments, active, strict=True)]
            own = combined(b0, lead, c, estimates)
            factor = a if factor is None else jnp.where(is_data, factor, a)
            weights.append(jnp.where(is_kind[None], own, 0.0))
        return cast(jax.Array, factor), weights

    @staticmethod
    def _relaxed(
        z: jax.Array, h: jax.Array, functions: Sequence[jax.Array], decisions: _Decisions
    ) -> jax.Array:
        """R_1; with phi_1 and phi_2 the quotients hold at z = 0 too."""
        one, half = jnp.ones_like(z), 0.5 * jnp.expm1(z)
        rows = [
            one,
            one + decisions.relax_coef.astype(z.dtype) * h,
            0.5 * functions[0] / functions[1],
            0.5 / functions[1],
            one + half,
            one - half,
        ]
        kind = decisions.relax_kind
        chosen = jnp.zeros_like(z)
        for i, row in enumerate(rows):
            chosen = jnp.where(kind == i, row, chosen)
        return chosen

    def coefficients(self, term: SemiLinearTerm, window: Window) -> Any:
        """The core's numbers, and whether this step's output is analytic (``None``: never)."""
        first, n = window.first, window.begun - 1
        is_known = None
        parts: tuple[Any, ...] = self.parts(term, first)
        if self.may_skip:
            is_known = (n == 0) & (jnp.asarray(self.schedule.afs) > 0)
            data, noise = (term.conversion(first, kind) for kind in self.kinds)
            known: Any = (0.0, 1.0), (1 / first.sigma, -first.alpha / first.sigma)
            parts = tuple(
                (jnp.where(is_known, p, own[0]), jnp.where(is_known, q, own[1]))
                for (p, q), own in zip(known, (data, noise), strict=True)
            )
        predict, correct = self._both(term, window, n)
        predict = predict._replace(factor=self._spoilt(predict.factor, window))
        return Numbers(first.t, parts, predict, correct, None), is_known

    def _both(self, term: SemiLinearTerm, window: Window, n: jax.Array) -> tuple[Update, Update]:
        """The prediction; and the last interval again: corrected, or as it was; at first, nothing.

        All three updates are computed in one, with as many points as the longest uses.
        """
        base, first = window.at(1), window.first
        older = [window.at(j) for j in range(2, self.depth)]
        # Before the first step there is nothing: of order 1 no point takes part, at distance 0.
        is_first = window.begun == 1
        last_n = jnp.maximum(n - 1, 0)
        now, before = self._decisions(n), self._decisions(last_n)
        before = before._replace(
            order=jnp.where(is_first, 1, before.order),
            est_order=jnp.where(is_first, 0, before.est_order),
        )
        is_relaxed = jnp.asarray(self.schedule.scale_corrector) & (before.order == 1)
        higher = before._replace(
            order=jnp.where(is_first, 1, before.order + 1),
            est_order=jnp.zeros_like(before.est_order),
            relax_kind=jnp.where(is_relaxed, before.relax_kind, 0),
        )
        bases, lasts = [first, base, base], [window.last, first, first]
        points = [[base, *older], [*older, older[-1]], [first, *older]]
        decisions = [now, before, higher]
        axes = (3,) + (1,) * first.t.ndim
        factor, weights = self._updates(
            _stacked(bases),
            _stacked(lasts),
            [_stacked(each) for each in zip(*points, strict=True)],
            jax.tree.map(lambda *v: jnp.stack(v).reshape(axes), *decisions),
        )
        shift = None
        if self.model is not None:
            own = [
                self._model_update(term, *each)
                for each in zip(bases, lasts, points, decisions, strict=True)
            ]
            factor, weights, shift = self._chosen(term, factor, weights, own)
        is_on = jnp.asarray(self.schedule.corrector).at[last_n].get(mode="clip")
        again = []
        for own_weights in weights:
            w = jnp.moveaxis(own_weights, 1, 0)
            replayed = jnp.concatenate([jnp.zeros_like(w[1, :1]), w[1, :-1]])
            # Newest first: the step's end, its base, the older ones.
            corrected = jnp.concatenate([w[2, 1:2], w[2, :1], w[2, 2:]])
            again.append(jnp.where(is_first, 0.0, jnp.where(is_on, corrected, replayed)))
        predict = Update(factor[0], tuple(w[:, 0] for w in weights))
        correct = Update(
            jnp.where(is_first, 1.0, jnp.where(is_on, factor[2], factor[1])), tuple(again)
        )
        if shift is not None:
            late = jnp.where(is_on, shift[2], shift[1])
            predict = predict._replace(shift=shift[0])
            correct = correct._replace(shift=jnp.where(is_first, 0.0, late))
        return predict, correct

    # --- ptype 2 ----------------------------------------------------------------------------------

    def _model_update(
        self,
        term: SemiLinearTerm,
        base: Level,
        last: Level,
        points: list[Level],
        decisions: _Decisions,
    ) -> tuple[jax.Array, Update]:
        """Whether the update is of ``ptype`` 2, and it: weights on data and noise.

        With y the centred state, f = (sigma noise - l y)/alpha is made of the two:
        sigma (1 - l)/alpha noise - l data.
        """
        model = cast(DPMSolverV3, self.model)
        nodes = int(np.clip(_NODES // term.steps, _FEWEST, _MOST))
        made = model.update(base, last, points, decisions.order, nodes, False)
        data, noise = [], []
        for level, w in zip((base, *points), made.weights[0], strict=True):
            l = model.statistics.at(level.lam)[0]  # noqa: E741
            ratio = level.sigma / level.alpha
            data.append(-l * w)
            noise.append(ratio.reshape(*ratio.shape, *(1,) * (l.ndim - ratio.ndim)) * (1 - l) * w)
        is_ours = (decisions.ptype == STATISTICS) & jnp.isfinite(last.lam)
        return is_ours, made._replace(weights=(jnp.stack(data), jnp.stack(noise)))

    def _chosen(
        self,
        term: SemiLinearTerm,
        factor: jax.Array,
        weights: list[jax.Array],
        own: Sequence[tuple[jax.Array, Update]],
    ) -> tuple[jax.Array, list[jax.Array], jax.Array]:
        """Either kind of update for each of the three, of the state's shape up to ones."""
        axes = len(cast(DPMSolverV3, self.model).statistics.event)
        # The curves' axes begin after the batch.
        blank = term.call.event_ndim is None and factor.ndim == 1

        def wide(v: jax.Array) -> jax.Array:
            return v.reshape(*v.shape, *(1,) * (axes + blank))

        def curve(v: jax.Array, axis: int) -> jax.Array:
            return jnp.expand_dims(v, axis) if blank else v

        is_own = wide(jnp.stack([jnp.broadcast_to(a, factor.shape[1:]) for a, _ in own]))
        factors = curve(jnp.stack([u.factor for _, u in own]), 1)
        shifts = curve(jnp.stack([cast(jax.Array, u.shift) for _, u in own]), 1)
        both = []
        for i, plain in enumerate(weights):
            ours = curve(jnp.stack([u.weights[i] for _, u in own], axis=1), 2)
            both.append(jnp.where(is_own[None], ours, wide(plain)))
        return (
            jnp.where(is_own, factors, wide(factor)),
            both,
            jnp.where(is_own, shifts, jnp.zeros_like(shifts)),
        )

    def _spoilt(self, factor: jax.Array, window: Window) -> jax.Array:
        """NaN for decisions that are none, or on another grid; where only values tell."""
        lam, n = jnp.asarray(self.schedule.lam), window.begun - 1
        is_same = self._is_same(window.first.lam, lam.at[n].get(mode="clip"))
        is_same &= self._is_same(window.last.lam, lam.at[window.begun].get(mode="clip"))
        checks.debug_check(
            jnp.all(is_same), "the grid is not the schedule's: {lam}", lam=window.last.lam
        )
        is_fine = self._is_proper(lam, n)
        checks.debug_check(is_fine, "the schedule has a bad entry at step {step}", step=n + 1)
        return jnp.where(is_same & is_fine, factor, jnp.nan)

    def _is_proper(self, lam: jax.Array, n: jax.Array) -> jax.Array:
        """Whether step ``n`` is one that ``validate_schedule`` takes, ``()``."""
        own, afs = self._decisions(n), jnp.asarray(self.schedule.afs)
        ends = jnp.isfinite(lam.at[n].get(mode="clip")) & jnp.isfinite(
            lam.at[n + 1].get(mode="clip")
        )
        outputs = n + jnp.isfinite(lam[0])  # one at infinite log-SNR is no point
        cap = jnp.where(ends, jnp.clip(outputs, 1, MAX_ORDER), 1)
        types = STATISTICS if self.model is None else STATISTICS + 1
        return (
            (own.ptype >= 0)
            & (own.ptype < types)
            & (own.order >= 1)
            & (own.order <= cap)
            & (own.est_order >= 0)
            & (own.est_order < own.order)
            & (own.relax_kind >= 0)
            & (own.relax_kind < len(RELAXATIONS))
            & jnp.isfinite(own.relax_coef)
            & (afs >= 0)
            & (afs < len(AFS))
        )

    def advance(
        self,
        term: SemiLinearTerm,
        numbers: Any,
        noise: tuple[jax.Array, jax.Array] | None,
        x: jax.Array,
        state: Any,
        is_full: bool | None = None,
    ) -> tuple[jax.Array, Any]:
        """One call of the field, none where the output is analytic."""
        own, is_known = numbers
        if is_known is not None:
            out = jax.lax.cond(
                is_known, lambda x: self._mean(term, x), lambda x: term.output(x, own.t), x
            )
            term = cast(SemiLinearTerm, _Known(term, out))
        return super().advance(term, own, noise, x, state, is_full)

    def _mean(self, term: SemiLinearTerm, x: jax.Array) -> jax.Array:
        """The data's mean, centred, like ``x``; it varies over the mesh as ``x`` does."""
        mean = jnp.zeros_like(x)
        if self.x0_mean is not None:
            given = jnp.asarray(self.x0_mean, x.dtype)
            given = given.reshape((1,) * (x.ndim - given.ndim) + given.shape)
            given = term.centred(jnp.broadcast_to(given, x.shape))
            mean = jnp.where(jnp.asarray(self.schedule.afs) == 2, given, mean)
        return jnp.where(jnp.isnan(x), x, mean)


def usf(schedule: SolverSchedule, *, x0_mean: Any = None, statistics: Any = None) -> ScheduleSolver:
    """The solver of a schedule, for ``sample`` with ``grid=schedule_times(sde, schedule)``.

    Args:
      schedule: one schedule; its entries may be traced, so that one compilation serves all of its
        number of steps.
      x0_mean: mean of the data, of the event's shape, for ``afs`` 2; a traced ``afs`` without it
        takes zero.
      statistics: of the model, see ``estimate_statistics``, for ``ptype`` 2; neither ``est_order``
        nor ``relax_kind`` act there.

    Raises:
      ValueError: ``validate_schedule`` refuses it; the statistics do not cover its steps of
        ``ptype`` 2.

    Of traced entries, those that ``validate_schedule`` would refuse give NaN, and an error under
    ``checkify``.
    """
    validate_schedule(schedule, statistics=statistics, x0_mean=x0_mean)
    afs = checks.concrete(schedule.afs)
    arrays = jax.tree.map(jnp.asarray, schedule)
    model = None
    if statistics is not None:
        model = dpmv3(statistics, corrector=False)
        _check_cover(schedule, statistics)
    return ScheduleSolver(arrays, x0_mean, model, may_skip=afs is None or bool(afs > 0))


def _check_cover(schedule: SolverSchedule, statistics: Statistics) -> None:
    lam, ptype = checks.concrete(schedule.lam), checks.concrete(schedule.ptype)
    if lam is None or ptype is None:
        return
    ends = np.stack([lam[:-1], lam[1:]])[:, ptype == STATISTICS]
    with jax.ensure_compile_time_eval():
        covered = checks.concrete(statistics.covers(jnp.where(jnp.isposinf(ends), lam[-2], ends)))
    if covered is not None and not covered.all():
        raise ValueError(
            f"the statistics cover lam in [{float(statistics.lam[0]):.4g}, "
            f"{float(statistics.lam[-1]):.4g}] and steps of ptype 2 run from {ends.min():.4g} to "
            f"{ends.max():.4g}; estimate them for these times"
        )


def usf_sample(
    key: jax.Array,
    field: Field,
    sde: LinearSDE,
    shape: tuple[int, ...],
    schedule: SolverSchedule,
    *,
    x0_mean: Any = None,
    statistics: Any = None,
    **options: Any,
) -> Sample:
    """``sample`` by a schedule on the schedule's own grid.

    Args:
      key: typed key.
      field: ``f(x, t) -> like x``.
      sde: the process.
      shape: ``(batch, *event)``.
      schedule: the solver; ``vmap`` over a population of them compiles once.
      x0_mean: see ``usf``.
      statistics: see ``usf``.
      **options: of ``sample``: ``prediction``, ``x_init``, ``event_ndim``, ...

    Raises:
      ValueError: see ``usf``, ``schedule_times`` and ``sample``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxgen import process, score
      >>> from jaxgen.solve.schedule import schedule_from_baseline
      >>> sde = process.vp()
      >>> field = score.closed_form.gaussian(sde, jnp.ones(2), 0.25).noise
      >>> schedule = schedule_from_baseline("unipc", 5, sde)
      >>> draw = jax.jit(lambda key, schedule: usf_sample(key, field, sde, (4, 2), schedule))
      >>> out = draw(jax.random.key(0), schedule)
      >>> out.x.shape, int(out.nfe)
      ((4, 2), 5)
    """
    solver = usf(schedule, x0_mean=x0_mean, statistics=statistics)
    grid = schedule_times(sde, schedule)
    return sample(key, field, sde, shape, solver=solver, grid=grid, **options)
