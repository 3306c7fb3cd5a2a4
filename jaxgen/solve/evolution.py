"""Mutation and crossover of solver schedules, at a fixed number of network evaluations.

Liu et al., arXiv 2312.07243, and the rates of their released search. All that is drawn comes from
the key, on the host: these are a few hundred small arrays, and no two of them should compile
anything. Knots move in log-SNR, by a share of the mean spacing, so that a process is not needed;
the first and the last stay. Beyond the published rates, the number of changes is drawn for each
child, so that some are near their parent, and knots also move along the parents' differences, which
finds better schedules within some hundred scores.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxgen.core import keys
from jaxgen.solve.schedule import (
    FIELDS,
    MAX_ORDER,
    RELAXATIONS,
    STATISTICS,
    SolverSchedule,
    order_caps,
)

__all__ = ["EvolutionConfig", "crossover", "generator", "mutate", "offspring"]

# Fields that crossover takes together.
_GROUPS = (
    ("order", "est_order"),
    ("ptype",),
    ("relax_kind", "relax_coef"),
    ("corrector", "scale_corrector"),
)
_PER_STEP = ("ptype", "order", "est_order", "relax_kind", "relax_coef", "corrector")
# Closest knots, in units of the mean spacing.
_CLOSEST = 0.05


@dataclasses.dataclass(frozen=True)
class EvolutionConfig:
    """What evolution draws from.

    Attributes:
      parents: the best so many of the archive.
      knots: share of children that differ from a parent mainly in their knots.
      crossover: probability that a child has two parents.
      mixing: probability that type and order of two parents are then mixed step by step.
      rate: probability of each change, a step.
      spread: largest standard deviation of moved knots, in units of the mean spacing in log-SNR.
      coef_spread: of a changed ``relax_coef``.
      relocate: probability that a step is taken out and another put in.
      types: probabilities of noise, data and statistics.
      orders: probabilities of orders 1 to 4.
      afs: probabilities of no analytic first step, of zero and of the mean; a schedule with one has
        a step more, for the same number of evaluations.

    Raises:
      ValueError: probabilities that are none.
    """

    parents: int = 8
    knots: float = 0.7
    crossover: float = 0.3
    mixing: float = 0.5
    rate: float = 0.3
    spread: float = 0.5
    coef_spread: float = 0.03
    relocate: float = 0.2
    types: tuple[float, float, float] = (0.5, 0.5, 0.0)
    orders: tuple[float, float, float, float] = (0.2, 0.4, 0.3, 0.1)
    afs: tuple[float, float, float] = (1.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        for name in ("knots", "crossover", "mixing", "rate", "relocate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a probability")
        for name, count in (("types", 3), ("orders", 4), ("afs", 3)):
            values = np.asarray(getattr(self, name), float)
            if values.shape != (count,) or (values < 0).any() or not np.isclose(values.sum(), 1):
                raise ValueError(
                    f"{name} is {getattr(self, name)}; expected {count} probabilities that add to 1"
                )
        if self.parents < 1 or self.spread < 0 or self.coef_spread < 0:
            raise ValueError("parents must be at least 1, spread and coef_spread at least 0")


def generator(key: jax.Array, *numbers: int) -> np.random.Generator:
    """A generator that is a function of a typed key and of numbers."""
    words = np.asarray(jax.random.key_data(keys.check(key))).ravel().tolist()
    return np.random.default_rng([*words, *numbers])


def as_host(schedule: SolverSchedule) -> SolverSchedule:
    """The schedule as NumPy arrays of its own."""
    return SolverSchedule(**{name: np.array(getattr(schedule, name)) for name in FIELDS})


def mutate(
    key: jax.Array, schedule: SolverSchedule, config: EvolutionConfig | None = None
) -> SolverSchedule:
    """A changed copy, valid, with as many network evaluations as before.

    Args:
      key: typed key.
      schedule: known values.
      config: what is drawn.
    """
    return _mutate(generator(key), as_host(schedule), config or EvolutionConfig())


def crossover(
    key: jax.Array,
    first: SolverSchedule,
    second: SolverSchedule,
    config: EvolutionConfig | None = None,
) -> SolverSchedule:
    """A child of two schedules of one number of steps: each group of fields is one parent's.

    Args:
      key: typed key.
      first: known values; its analytic first step goes with its knots.
      second: known values.
      config: what is drawn.

    Raises:
      ValueError: the numbers of steps differ.
    """
    if first.steps != second.steps:
        raise ValueError(f"the parents have {first.steps} and {second.steps} steps; expected one")
    return _crossover(generator(key), as_host(first), as_host(second), config or EvolutionConfig())


def offspring(
    rng: np.random.Generator, parents: Sequence[SolverSchedule], config: EvolutionConfig
) -> SolverSchedule:
    """A child of parents, which come best first; the better ones have more.

    A share of the children differ from a parent mainly in their knots, moved along the difference
    of two other parents (differential evolution: Storn and Price 1997) or at random.
    """
    first = parents[int(len(parents) * rng.random() ** 2)]
    mates = [p for p in parents if p.steps == first.steps and p is not first]
    child = as_host(first)
    if rng.random() < config.knots:
        child = _with_moved_knots(rng, child, mates, config)
        if rng.random() < 0.5:
            return _repaired(child)
        few = dataclasses.replace(config, rate=0.5 * config.rate, relocate=0.0, spread=0.0)
        return _mutate(rng, child, few)
    if mates and rng.random() < config.crossover:
        child = _crossover(rng, child, as_host(mates[int(rng.integers(len(mates)))]), config)
    return _mutate(rng, child, config)


def _with_moved_knots(
    rng: np.random.Generator,
    schedule: SolverSchedule,
    mates: list[SolverSchedule],
    config: EvolutionConfig,
) -> SolverSchedule:
    if schedule.steps < 2:
        return schedule
    inner = schedule.lam[1:-1].astype(np.float64)
    spacing = _inner(schedule.lam)[2]
    if len(mates) > 1 and rng.random() < 0.5:
        one, other = (mates[int(i)].lam[1:-1] for i in rng.choice(len(mates), 2, replace=False))
        inner = inner + rng.choice([0.25, 0.5, 1.0]) * (one.astype(np.float64) - other)
        inner = inner + 0.01 * spacing * rng.standard_normal(len(inner))
    else:
        scale = config.spread * spacing * 10 ** -rng.uniform(0, 1)
        inner = inner + scale * rng.standard_normal(len(inner)) * (rng.random(len(inner)) < 0.5)
    return _with_knots(schedule, inner)


def _with_knots(schedule: SolverSchedule, inner: np.ndarray) -> SolverSchedule:
    """The schedule with these inner knots, or as it is where they leave the range or coincide."""
    low, high, spacing = _inner(schedule.lam)
    if ((inner <= low) | (inner >= high)).any():
        return schedule
    lam = np.concatenate([schedule.lam[:1], np.sort(inner), schedule.lam[-1:]])
    if not (lam[1:] - lam[:-1] > _CLOSEST * spacing).all():
        return schedule
    return dataclasses.replace(schedule, lam=lam.astype(schedule.lam.dtype))


def _crossover(
    rng: np.random.Generator, a: SolverSchedule, b: SolverSchedule, config: EvolutionConfig
) -> SolverSchedule:
    groups = (("lam", "afs"), *_GROUPS)
    # At least one group from each.
    from_b = rng.random(len(groups)) < 0.5
    which = rng.permutation(len(groups))
    from_b[which[0]], from_b[which[1]] = True, False
    taken = {
        name: getattr(b if is_b else a, name)
        for is_b, names in zip(from_b, groups, strict=True)
        for name in names
    }
    if rng.random() < config.mixing:
        is_b = rng.random(a.steps) < 0.5
        for name in ("ptype", "order", "est_order"):
            taken[name] = np.where(is_b, getattr(b, name), getattr(a, name))
    return _repaired(SolverSchedule(**taken))


def _mutate(
    rng: np.random.Generator, schedule: SolverSchedule, config: EvolutionConfig
) -> SolverSchedule:
    """``mutate`` of a host copy, which is used up."""
    new = _stepwise(rng, schedule, config)
    if rng.random() < config.rate:
        new = dataclasses.replace(new, scale_corrector=np.asarray(rng.random() < 0.5))
    evaluations = new.steps - int(new.afs > 0)
    # An analytic step alone cannot be evaluated at no call.
    if rng.random() < config.rate and evaluations > 0:
        new = dataclasses.replace(new, afs=np.asarray(rng.choice(3, p=config.afs), np.int32))
    if rng.random() < config.relocate and new.steps > 1:
        new = _without_step(rng, new)
    while new.steps - int(new.afs > 0) > evaluations:
        new = _without_step(rng, new)
    while new.steps - int(new.afs > 0) < evaluations:
        new = _with_step(rng, new)
    return _repaired(new)


def _draws(rng: np.random.Generator, n: int, config: EvolutionConfig) -> dict[str, np.ndarray]:
    """Decisions of ``n`` steps."""
    return {
        "ptype": rng.choice(3, n, p=config.types),
        "order": 1 + rng.choice(MAX_ORDER, n, p=config.orders),
        "est_order": rng.choice([1, 2], n),
        "relax_kind": rng.integers(len(RELAXATIONS), size=n),
        "relax_coef": config.coef_spread * rng.standard_normal(n),
        "corrector": rng.random(n) < 0.5,
    }


def _stepwise(
    rng: np.random.Generator, schedule: SolverSchedule, config: EvolutionConfig
) -> SolverSchedule:
    """Changes of knots and of each step's decisions, many or few."""
    steps, changed = schedule.steps, {}
    rate = config.rate * 10 ** -rng.uniform(0, 1)
    for name, drawn in _draws(rng, steps, config).items():
        old = getattr(schedule, name)
        if name == "relax_coef":
            drawn = old + drawn
        changed[name] = np.where(rng.random(steps) < rate, drawn, old).astype(old.dtype)
    new = dataclasses.replace(schedule, **changed)
    if config.spread == 0 or rng.random() < 0.5:
        return new
    return _with_moved_knots(rng, new, [], config)


def _inner(lam: np.ndarray) -> tuple[float, float, float]:
    """Bounds of the inner knots and the mean spacing; an infinite end bounds by its neighbour."""
    finite = lam[np.isfinite(lam)]
    spacing = (finite[-1] - finite[0]) / max(len(finite) - 1, 1)
    low = finite[0] - (0.0 if np.isfinite(lam[0]) else spacing)
    high = finite[-1] + (0.0 if np.isfinite(lam[-1]) else spacing)
    return float(low), float(high), float(spacing) or 1.0


def _without_step(rng: np.random.Generator, schedule: SolverSchedule) -> SolverSchedule:
    """One inner knot fewer, and the decisions of a step beside it."""
    knot = int(rng.integers(1, schedule.steps))
    step = knot - int(rng.integers(2))
    cut = {name: np.delete(getattr(schedule, name), step) for name in _PER_STEP}
    return dataclasses.replace(schedule, lam=np.delete(schedule.lam, knot), **cut)


def _with_step(rng: np.random.Generator, schedule: SolverSchedule) -> SolverSchedule:
    """One inner knot more, in an interval that is drawn by its length: two steps of its kind."""
    lam = schedule.lam
    low, high, _ = _inner(lam)
    ends = np.clip(lam, low, high)
    gaps = ends[1:] - ends[:-1]
    step = int(rng.choice(len(gaps), p=gaps / gaps.sum()))
    knot = ends[step] + (0.2 + 0.6 * rng.random()) * gaps[step]
    put = {}
    for name in _PER_STEP:
        old = getattr(schedule, name)
        put[name] = np.insert(old, step, old[step])
    new = np.insert(lam, step + 1, knot).astype(lam.dtype)
    return dataclasses.replace(schedule, lam=new, **put)


def _repaired(schedule: SolverSchedule) -> SolverSchedule:
    """Orders and estimates within their caps, no corrector at the end, data from pure noise.

    Entries that have no effect are put to 0, so that equal solvers are equal arrays.
    """
    lam = schedule.lam
    order = np.minimum(schedule.order, order_caps(lam)).astype(np.int32)
    est = np.where(schedule.est_order < order - 1, schedule.est_order, 0).astype(np.int32)
    corrector = schedule.corrector & np.isfinite(lam[:-1]) & np.isfinite(lam[1:])
    corrector[-1] = False
    ptype = schedule.ptype.copy()
    if np.isneginf(lam[0]):
        ptype[0] = 1
    scales = schedule.scale_corrector & (corrector & (order == 1)).any()
    # The relaxation acts at orders above 1, and in the corrector of an order-1 step.
    acts = (order > 1) | (scales & corrector)
    kind = np.where(acts & (ptype != STATISTICS), schedule.relax_kind, 0).astype(np.int32)
    coef = np.where(kind == 1, schedule.relax_coef, 0).astype(schedule.relax_coef.dtype)
    return dataclasses.replace(
        schedule,
        order=order,
        est_order=est,
        corrector=corrector,
        ptype=ptype,
        relax_kind=kind,
        relax_coef=coef,
        scale_corrector=np.asarray(bool(scales)),
    )


def identity(schedule: SolverSchedule) -> bytes:
    """Equal for schedules that are equal, and for no others."""
    host: Any = as_host(schedule)
    return b"".join(np.ascontiguousarray(getattr(host, name)).tobytes() for name in FIELDS)
