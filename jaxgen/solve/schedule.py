r"""Every decision of a fast solver as data: the schedules of the unified sampling framework.

Liu, Ning, Yang, Wang, ICLR 2024, arXiv 2312.07243. A ``SolverSchedule`` says for each step where
it ends, on which prediction it works, of which Taylor order it is, how the derivatives are
estimated and damped, and whether the step is corrected once its end has been evaluated. With s the
start of a step (lam_s = log(alpha_s/sigma_s)), h = lam_t - lam_s, F the noise or data prediction
and n = order,

    x_t = a x_s + b0 F_s + lead sum_{k=1}^{n-1} phi_{k+1}(z) R_k E_k                         (1)

(``exponential`` has a, b0, lead and z: z = h for noise, -h for data). E_k estimates h^k F^(k) from
the last n - 1 outputs, E_1 from the last ``est_order`` if that is not 0. R_k is 1 but for R_1, the
relaxation:

| relax_kind | name     | R_1                                                 |
|------------|----------|-----------------------------------------------------|
| 0          | none     | 1                                                   |
| 1          | linear   | 1 + relax_coef h                                    |
| 2          | bh2      | z expm1(z) / (2 (expm1(z) - z)), as DPM-Solver-2    |
| 3          | bh1      | z^2 / (2 (expm1(z) - z))                            |
| 4          | exp_up   | 1 + expm1(z)/2                                      |
| 5          | exp_down | 1 - expm1(z)/2                                      |

A step of ``ptype`` 2 is DPM-Solver-v3's, with the same order; neither ``est_order`` nor
``relax_kind`` acts on it. A corrected step is done again with its end's output among the points,
one order higher, from all points; unrelaxed, but by ``scale_corrector`` where it comes to order 2,
as UniPC does. It costs nothing: outputs already computed are kept.

DDIM, DPM-Solver(++) 2M, the exact 3M and UniPC-1 to 3 are such schedules
(``schedule_from_baseline``). Left out: the "implicit" corrector, which evaluates again.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgen.core import checks
from jaxgen.process.linear import LinearSDE
from jaxgen.solve.grids import make_grid

__all__ = [
    "MAX_ORDER",
    "RELAXATIONS",
    "SolverSchedule",
    "baseline_schedules",
    "schedule_from_baseline",
    "schedule_nfe",
    "schedule_times",
    "validate_schedule",
]

NOISE, DATA, STATISTICS = 0, 1, 2
PTYPES = ("noise", "data", "statistics")
RELAXATIONS = ("none", "linear", "bh2", "bh1", "exp_up", "exp_down")
AFS = ("none", "zero", "mean")
MAX_ORDER = 4
BASELINES = ("ddim", "dpm_2m", "dpm_3m", "dpmpp_2m", "dpmpp_3m", "unipc")
# Below this many steps the named solvers lower the last orders.
_FEW_STEPS = 15
# Knots closer than this, in lam, coincide.
_CLOSEST = 1e-5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SolverSchedule:
    """A solver as data (module docstring); ``M`` steps, or ``(P, M)`` for a population.

    Nothing is checked here, so that it may hold tracers: see ``validate_schedule``.

    Attributes:
      lam: ``(M + 1,)``, ``log(alpha / sigma)`` at the knots, rising; float32 or wider. Infinite
        only at an end of a process that has such ends.
      ptype: ``(M,)`` int32: 0 noise, 1 data, 2 DPM-Solver-v3's statistics.
      order: ``(M,)`` int32, 1 to 4, at most the number of evaluations made.
      est_order: ``(M,)`` int32, points for the first derivative: 0 for all ``order - 1``, or fewer.
      relax_kind: ``(M,)`` int32, a row of the table above.
      relax_coef: ``(M,)``, for ``"linear"``.
      corrector: ``(M,)`` bool, never at the last step.
      scale_corrector: ``()`` bool.
      afs: ``()`` int32, the analytic first step: 0 none, else the first output is not evaluated but
        the data are taken to be 1 zero (the process' anchor), 2 the data's mean.
    """

    lam: Any
    ptype: Any
    order: Any
    est_order: Any
    relax_kind: Any
    relax_coef: Any
    corrector: Any
    scale_corrector: Any
    afs: Any

    @property
    def steps(self) -> int:
        """Number of steps, M."""
        return jnp.shape(self.lam)[-1] - 1


FIELDS = tuple(f.name for f in dataclasses.fields(SolverSchedule))


def schedule_nfe(schedule: SolverSchedule) -> jax.Array:
    """Network evaluations: one a step, none for an analytic first; int32, shaped as ``afs``."""
    return jnp.asarray(schedule.steps - (jnp.asarray(schedule.afs) > 0), jnp.int32)


def schedule_times(sde: LinearSDE, schedule: SolverSchedule) -> jax.Array:
    """The falling times of a schedule's knots, ``(M + 1,)``: the grid for ``sample``.

    Args:
      sde: the process.
      schedule: whose log-SNRs the process reaches; times of others are NaN (an error under
        checkify), and raise where they are known.

    Raises:
      ValueError: the range of the schedule is known and not within the process'.
    """
    lam = jnp.asarray(schedule.lam)
    times = sde.inverse_log_snr(2 * lam)
    known = checks.concrete(times)
    if known is not None and not np.isfinite(known).all():
        ends = [float(0.5 * sde.log_snr(t)) for t in (sde.t_max, sde.t_min)]
        raise ValueError(
            f"schedule spans lam {float(lam[0]):.4g} to {float(lam[-1]):.4g}; the process "
            f"{sde.kind or ''} reaches {ends[0]:.4g} to {ends[1]:.4g}"
        )
    return times


# --- checking ------------------------------------------------------------------------------------


def validate_schedule(
    schedule: SolverSchedule, *, statistics: Any = None, x0_mean: Any = None
) -> None:
    """Refuse a schedule that is none; of traced entries the shapes alone are checked.

    Args:
      schedule: one schedule, not a population.
      statistics: what ``ptype`` 2 needs.
      x0_mean: what ``afs`` 2 needs.

    Raises:
      ValueError: shapes that do not fit; knots that do not rise, or coincide; a code that is none;
        an order above the evaluations made; ``est_order`` not below the order; a corrector at the
        last step; ``ptype`` 2 or ``afs`` 2 without what it needs. All name the step.
    """
    _check_shapes(schedule)
    lam = checks.concrete(schedule.lam)
    if lam is not None:
        _check_knots(lam)
    for name, count in (("ptype", 3), ("relax_kind", len(RELAXATIONS)), ("afs", len(AFS))):
        values = checks.concrete(getattr(schedule, name))
        if values is not None and not ((values >= 0) & (values < count)).all():
            raise ValueError(f"{name} is {values}; expected codes 0 to {count - 1}")
    coefs = checks.concrete(schedule.relax_coef)
    if coefs is not None and not np.isfinite(coefs).all():
        raise ValueError(f"relax_coef is {coefs}; expected finite numbers")
    order, est = checks.concrete(schedule.order), checks.concrete(schedule.est_order)
    if order is not None:
        _check_orders(order, lam)
    if order is not None and est is not None:
        wrong = np.flatnonzero((est < 0) | (est > np.maximum(order - 1, 0)))
        if wrong.size:
            i = int(wrong[0])
            raise ValueError(
                f"est_order is {est[i]} at step {i + 1} of order {order[i]}; expected 1 to "
                f"order - 1, or 0 for all of them"
            )
    corrector = checks.concrete(schedule.corrector)
    if corrector is not None and corrector[-1]:
        raise ValueError("corrector is on at the last step, whose end is never evaluated")
    ptype, afs = checks.concrete(schedule.ptype), checks.concrete(schedule.afs)
    if ptype is not None and (ptype == STATISTICS).any() and statistics is None:
        i = int(np.flatnonzero(ptype == STATISTICS)[0]) + 1
        raise ValueError(f"ptype is 2 at step {i} and there are no statistics; pass statistics=")
    if lam is not None and ptype is not None and np.isneginf(lam[0]) and ptype[0] != DATA:
        raise ValueError(
            f"ptype is {ptype[0]} for a step from pure noise (lam -inf); expected 1, data"
        )
    if afs is not None and afs == 2 and x0_mean is None:
        raise ValueError("afs is 2, the data's mean, and there is none; pass x0_mean=")


def _check_shapes(schedule: SolverSchedule) -> None:
    shape = jnp.shape(schedule.lam)
    if len(shape) != 1 or shape[0] < 2:
        raise ValueError(f"lam has shape {shape}; expected (steps + 1,), for one schedule")
    for name in FIELDS[1:]:
        expected = () if name in ("scale_corrector", "afs") else (shape[0] - 1,)
        if jnp.shape(getattr(schedule, name)) != expected:
            raise ValueError(
                f"{name} has shape {jnp.shape(getattr(schedule, name))}; expected {expected} for "
                f"lam of shape {shape}"
            )


def _check_knots(lam: np.ndarray) -> None:
    inner = lam[1:-1]
    if np.isnan(lam).any() or not np.isfinite(inner).all():
        raise ValueError(f"lam is {lam}; expected finite numbers, infinite at the ends alone")
    if not (lam[1:] > lam[:-1]).all():
        raise ValueError(f"lam is {lam}; expected strictly rising values")
    gaps = lam[1:] - lam[:-1]
    if not (gaps > _CLOSEST * np.maximum(1, np.abs(np.where(np.isfinite(lam), lam, 0)[1:]))).all():
        raise ValueError(f"lam is {lam}; two knots coincide to rounding")


def order_caps(lam: np.ndarray) -> np.ndarray:
    """The highest order of each step, int ``(M,)``: evaluations made, 1 where lam is infinite."""
    steps = len(lam) - 1
    caps = np.clip(np.cumsum(np.isfinite(lam[:-1])), 1, MAX_ORDER)
    return np.where(np.isfinite(lam[:-1]) & np.isfinite(lam[1:]), caps, 1)[:steps]


def _check_orders(order: np.ndarray, lam: np.ndarray | None) -> None:
    finite = np.arange(order.shape[0] + 1.0)
    caps = order_caps(finite if lam is None else lam)
    wrong = np.flatnonzero((order < 1) | (order > caps))
    if wrong.size:
        i = int(wrong[0])
        raise ValueError(
            f"order is {order[i]} at step {i + 1}; expected 1 to {caps[i]}, the outputs that this "
            "step can use"
        )


# --- the named solvers as schedules ---------------------------------------------------------------


def schedule_from_baseline(
    name: str,
    steps: int,
    sde: LinearSDE,
    *,
    order: int = 3,
    kind: str | None = None,
    variant: str = "bh2",
    corrector: bool = True,
    lower_order_final: bool | None = None,
    t_start: ArrayLike | None = None,
    t_end: ArrayLike | None = None,
    grid: str | ArrayLike = "log_snr",
) -> SolverSchedule:
    """A named solver as a schedule; what it computes is the same to rounding.

    Args:
      name: ``"ddim"``, ``"dpm_2m"``, ``"dpm_3m"``, ``"dpmpp_2m"``, ``"dpmpp_3m"`` (the exact third
        order) or ``"unipc"``.
      steps: number of steps.
      sde: the process.
      order: of ``unipc``, 1 to 3.
      kind: ``"data"`` or ``"noise"`` for ``ddim`` (the same samples) and ``unipc``.
      variant: ``"bh1"`` or ``"bh2"``, of ``unipc``.
      corrector: of ``unipc``.
      lower_order_final: as in the named solvers: ``None`` lowers the last orders below 15 steps,
        and of ``unipc`` always.
      t_start: first time; ``t_max`` if ``None``.
      t_end: last time; the process' ``t_end`` if ``None``.
      grid: as in ``sample``.

    Raises:
      ValueError: an unknown name, kind or variant, or a grid that ``make_grid`` refuses; fewer
        steps than the order; a traced process or grid.

    Example:
      >>> from jaxgen import process
      >>> schedule = schedule_from_baseline("dpmpp_2m", 5, process.vp())
      >>> schedule.order.tolist(), int(schedule_nfe(schedule))
      ([1, 2, 2, 2, 1], 5)
    """
    checks.one_of("name", name, BASELINES)
    checks.one_of("variant", variant, ("bh1", "bh2"))
    implied = {"dpm": "noise", "dpmpp": "data"}.get(name.split("_")[0])
    if implied is not None and kind not in (None, implied):
        raise ValueError(f"kind is {kind!r} for {name}, which is on {implied} prediction")
    kind = kind or implied or "data"
    checks.one_of("kind", kind, ("data", "noise"))
    if name == "unipc":
        if order not in (1, 2, 3):
            raise ValueError(f"order is {order!r}; expected 1, 2 or 3")
        lower_order_final = True if lower_order_final is None else lower_order_final
    else:
        order, corrector, variant = 1 if name == "ddim" else int(name[-2]), False, "bh2"
    if lower_order_final is None:
        lower_order_final = steps < _FEW_STEPS
    lam = _known_knots(sde, steps, t_start, t_end, grid)
    if len(lam) - 1 < order:
        raise ValueError(f"steps is {len(lam) - 1} for {name} of order {order}")
    return plain_schedule(
        lam, kind, order, variant, corrector=corrector, lower_order_final=lower_order_final
    )


def _known_knots(sde: LinearSDE, steps: int, t_start: Any, t_end: Any, grid: Any) -> np.ndarray:
    """``lam`` at the grid's times, known under ``jit`` too: a baseline's decisions depend on it."""
    with jax.ensure_compile_time_eval():
        dtype = jnp.result_type(float)
        times = make_grid(grid, sde, steps, t_start=t_start, t_end=t_end, dtype=dtype)
        lam = checks.concrete(0.5 * sde.log_snr(times))
    if lam is None:
        raise ValueError(
            "the process (or t_start, t_end, grid) is traced; the process must be known: make the "
            "schedule outside jit, grad and vmap, and pass it in"
        )
    return lam


def plain_schedule(
    lam: np.ndarray,
    kind: str,
    order: int,
    relaxation: str,
    *,
    corrector: bool,
    lower_order_final: bool,
) -> SolverSchedule:
    """One kind, order and relaxation throughout; relaxed in updates of order 2 alone."""
    steps = len(lam) - 1
    orders = np.minimum(order_caps(lam), order)
    if lower_order_final:
        orders = np.minimum(orders, steps - np.arange(steps))
    relax = np.where(orders <= 2, RELAXATIONS.index(relaxation), 0)
    corrects = np.full(steps, corrector) & np.isfinite(lam[:-1]) & np.isfinite(lam[1:])
    corrects[-1] = False
    return SolverSchedule(
        lam=lam,
        ptype=np.full(steps, PTYPES.index(kind), np.int32),
        order=orders.astype(np.int32),
        est_order=np.zeros(steps, np.int32),
        relax_kind=relax.astype(np.int32),
        relax_coef=np.zeros(steps, lam.dtype),
        corrector=corrects,
        scale_corrector=np.asarray(relaxation != "none"),
        afs=np.asarray(0, np.int32),
    )


def baseline_schedules(
    steps: int,
    sde: LinearSDE,
    *,
    t_start: ArrayLike | None = None,
    t_end: ArrayLike | None = None,
    grid: str | ArrayLike = "log_snr",
    lower_order_final: bool = False,
) -> dict[str, SolverSchedule]:
    """The 36 plain solvers by name: kind, order 1 to 3, relaxation, corrector.

    DDIM, DPM-Solver(++) 2M and exact 3M and UniPC-1 to 3 are among them: ``"data-2-bh2"`` is
    DPM-Solver++ 2M, ``"data-3-bh2-corrected"`` UniPC-3. They are what a search starts from and is
    measured against. Fewer where there are fewer steps than the order.

    Args:
      steps: number of steps.
      sde: the process.
      t_start: first time; ``t_max`` if ``None``.
      t_end: last time; the process' ``t_end`` if ``None``.
      grid: as in ``sample``.
      lower_order_final: lower the orders of the last steps.

    Raises:
      ValueError: a grid that ``make_grid`` refuses; a traced process or grid.
    """
    lam = _known_knots(sde, steps, t_start, t_end, grid)
    return {
        f"{kind}-{order}-{relaxation}{'-corrected' if corrector else ''}": plain_schedule(
            lam,
            kind,
            order,
            relaxation,
            corrector=corrector,
            lower_order_final=lower_order_final,
        )
        for kind in ("data", "noise")
        for order in range(1, min(3, steps) + 1)
        for relaxation in ("none", "bh1", "bh2")
        for corrector in (False, True)
        if not (np.isneginf(lam[0]) and kind == "noise")
    }
