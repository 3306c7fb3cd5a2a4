"""Search for a solver schedule: evolution, and evolution guided by a predictor.

S^3 (Liu et al., ICLR 2024, arXiv 2312.07243). A start population is scored by the user's own
metric. Then, generation by generation, the best so far have children by crossover and mutation
(``evolution``). From ``guided_after`` scores on, if given, a predictor trained on all of them
(``ranking``) ranks many children over cheap generations, and only its favourites are scored.

What is drawn is a function of the key, of the generation and of the scores before it. So a search
that was stopped goes on from its archive to the same end, a larger budget extends a smaller one,
and one of the generations is scored again at most. The best has been chosen for the noise of the
metric: score it again on fresh noise before believing its number.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.core import keys
from jaxgen.core.progress import meter
from jaxgen.solve.archive import Archive, Entry, fingerprint
from jaxgen.solve.evolution import EvolutionConfig, as_host, generator, identity, offspring
from jaxgen.solve.ranking import RankingConfig, fit_predictor
from jaxgen.solve.schedule import SolverSchedule, validate_schedule

__all__ = ["SearchConfig", "SearchResult", "evaluate_schedules", "search", "stack_schedules"]

Score = Callable[[SolverSchedule], Any]

# Draws for one child before an equal of an earlier one is let through.
_TRIES = 20
# Parents with the same types and orders.
_OF_A_KIND = 1


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """How a search goes.

    Attributes:
      budget: schedules scored, the start population among them.
      batch: schedules of a generation, and of a call of the metric.
      guided_after: scores after which the predictor guides; ``None`` for never: it takes seconds a
        generation and was no better than evolution where that was measured (the claim test).
      guided_generations: cheap generations on predicted scores before each scored one.
      guided_children: children of each of them.
      explore: share of a guided generation that evolution alone fills.
      evolution: what children are drawn from.
      ranking: the predictor.

    Raises:
      ValueError: numbers out of range.
    """

    budget: int = 300
    batch: int = 10
    guided_after: int | None = None
    guided_generations: int = 1
    guided_children: int = 40
    explore: float = 0.25
    evolution: EvolutionConfig = dataclasses.field(default_factory=EvolutionConfig)
    ranking: RankingConfig = dataclasses.field(default_factory=RankingConfig)

    def __post_init__(self) -> None:
        for name in ("budget", "batch", "guided_generations", "guided_children"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.guided_after is not None and self.guided_after < 2:
            raise ValueError(f"guided_after is {self.guided_after}; expected at least 2, or None")
        if not 0 <= self.explore <= 1:
            raise ValueError(f"explore is {self.explore}; expected a share in [0, 1]")


class SearchResult(NamedTuple):
    """What a search found.

    Attributes:
      best: the schedule with the lowest score, of NumPy arrays.
      score: its score, on the noise that the search used.
      archive: every schedule that was scored, in order.
    """

    best: SolverSchedule
    score: float
    archive: tuple[Entry, ...]


def stack_schedules(schedules: Sequence[SolverSchedule]) -> SolverSchedule:
    """A population of schedules of one number of steps, with an axis in front.

    Raises:
      ValueError: there is none, or the numbers of steps differ.
    """
    steps = sorted({s.steps for s in schedules})
    if len(steps) != 1:
        raise ValueError(f"the schedules have {steps} steps; expected one number, for a stack")
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(v) for v in leaves]), *schedules)


def evaluate_schedules(
    score_fn: Score, schedules: Sequence[SolverSchedule], batch: int
) -> np.ndarray:
    """Scores of schedules, float64 ``(P,)``; what is not finite becomes infinite.

    Args:
      score_fn: from a population of ``batch`` schedules to ``(batch,)``, lower is better.
      schedules: of any numbers of steps: each number is a batch, or more, of its own.
      batch: a batch that is not full repeats its last schedule.

    Raises:
      ValueError: ``score_fn`` returned another shape.
    """
    scores = np.full(len(schedules), np.inf)
    for steps in sorted({s.steps for s in schedules}):
        rows = [i for i, s in enumerate(schedules) if s.steps == steps]
        for first in range(0, len(rows), batch):
            part = rows[first : first + batch]
            padded = part + part[-1:] * (batch - len(part))
            out = np.asarray(score_fn(stack_schedules([schedules[i] for i in padded])), np.float64)
            if out.shape != (batch,):
                raise ValueError(
                    f"score_fn returned shape {out.shape} for {batch} schedules; expected "
                    f"({batch},)"
                )
            scores[part] = out[: len(part)]
    return np.where(np.isfinite(scores), scores, np.inf)


def search(
    key: jax.Array,
    score_fn: Score,
    init_population: Sequence[SolverSchedule],
    config: SearchConfig | None = None,
    *,
    archive: str | Path | None = None,
    progress: bool | Literal["bar"] | None = None,
    made_for: str = "",
) -> SearchResult:
    """Find the schedule with the lowest score.

    Args:
      key: typed key; of the candidates. The metric has its own noise.
      score_fn: from a population of ``config.batch`` schedules (a ``SolverSchedule`` whose entries
        have that axis in front) to scores ``(batch,)``, lower is better. A ``jit`` of a ``vmap``
        compiles once for each number of steps: one, and one more with analytic first steps. What is
        not finite is never selected. To go on exactly it must give the same scores again.
      init_population: where to start, such as ``baseline_schedules(...).values()``.
      config: see ``SearchConfig``.
      archive: a JSON-lines file that takes every score as it comes; one that is there is gone on
        with. ``None`` for none.
      progress: ``False`` shows nothing; see ``core.progress.meter``.
      made_for: what the metric stands on; an archive made for something else is refused.

    Raises:
      ValueError: an empty population or a schedule that is none; an archive of another search; not
        one finite score.
      OSError: the archive cannot be read or written.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxgen import process
      >>> from jaxgen.solve.schedule import baseline_schedules
      >>> start = list(baseline_schedules(4, process.vp()).values())[:6]
      >>> metric = jax.jit(lambda s: jnp.sum((s.lam[:, 1:-1] - 1.0) ** 2, axis=1))
      >>> config = SearchConfig(budget=40, batch=8, guided_after=None)
      >>> found = search(jax.random.key(0), metric, start, config, progress=False)
      >>> bool(found.score < min(e.score for e in found.archive[:6])), len(found.archive)
      (True, 40)
    """
    config = SearchConfig() if config is None else config
    keys.check(key)
    population = [as_host(s) for s in init_population]
    if not population:
        raise ValueError("init_population is empty; expected at least one schedule")
    for schedule in population:
        validate_schedule(schedule, statistics=True, x0_mean=0.0)
    most = max(s.steps for s in population) + (config.evolution.afs[0] < 1)
    store = Archive(archive, fingerprint(key, population, config, made_for))
    entries = store.read()[: config.budget]
    with meter(
        config.budget,
        initial=len(entries),
        description="search",
        unit="evaluation",
        enabled=progress,
    ) as bar:
        while len(entries) < config.budget:
            first, origin, candidates = _generation(key, population, entries, config, most)
            scores = evaluate_schedules(score_fn, candidates, config.batch)
            new = [Entry(float(v), origin, s) for v, s in zip(scores, candidates, strict=True)]
            # A generation that was cut short by a smaller budget is scored again, then gone on.
            new = new[len(entries) - first : config.budget - first]
            store.append(new)
            entries += new
            bar.update(len(new), best=min(e.score for e in entries))
    best = min(entries, key=lambda entry: entry.score)
    if not np.isfinite(best.score):
        raise ValueError(f"none of the {len(entries)} scores is finite; check score_fn")
    return SearchResult(best.schedule, best.score, tuple(entries))


def _generation(
    key: jax.Array,
    population: list[SolverSchedule],
    entries: list[Entry],
    config: SearchConfig,
    most: int,
) -> tuple[int, str, list[SolverSchedule]]:
    """The number of the first candidate of the next generation, its origin, its candidates."""
    n, batch = len(entries), config.batch
    if n < len(population):
        first = n - n % batch
        return first, "start", population[first : first + batch]
    number = (n - len(population)) // batch
    first = len(population) + number * batch
    known = entries[:first]
    rng = generator(key, number)
    seen = {identity(entry.schedule) for entry in known}
    if config.guided_after is None or first < config.guided_after:
        parents = _best(known, config.evolution.parents)
        return first, "evolution", _children(rng, parents, config.evolution, batch, seen)
    own = jax.random.fold_in(key, number)
    return first, "guided", _guided(own, rng, known, config, most, seen)


def _best(entries: Sequence[Entry], count: int) -> list[SolverSchedule]:
    """The best schedules, one of a kind, so that no family crowds out the rest.

    Those without a finite score never, unless there is no other.
    """
    finite = [e for e in entries if np.isfinite(e.score)] or list(entries)
    kinds: dict[tuple[bytes, bytes], int] = {}
    best: list[SolverSchedule] = []
    for entry in sorted(finite, key=lambda e: e.score):
        kind = entry.schedule.ptype.tobytes(), entry.schedule.order.tobytes()
        kinds[kind] = kinds.get(kind, 0) + 1
        if kinds[kind] <= _OF_A_KIND:
            best.append(entry.schedule)
    return best[:count]


def _children(
    rng: np.random.Generator,
    parents: list[SolverSchedule],
    config: EvolutionConfig,
    count: int,
    seen: set[bytes],
) -> list[SolverSchedule]:
    """Children that are new; ``seen`` grows."""
    children = []
    for _ in range(count):
        for _ in range(_TRIES):
            child = offspring(rng, parents, config)
            if identity(child) not in seen:
                break
        seen.add(identity(child))
        children.append(child)
    return children


def _guided(
    key: jax.Array,
    rng: np.random.Generator,
    known: list[Entry],
    config: SearchConfig,
    most: int,
    seen: set[bytes],
) -> list[SolverSchedule]:
    """Evolution on predicted scores; the favourites, and some of plain evolution."""
    rank = fit_predictor(
        key,
        [e.schedule for e in known],
        [e.score for e in known],
        config.ranking,
        most_steps=most,
    )
    plain = round(config.explore * config.batch)
    wanted = config.batch - plain
    parents = _best(known, config.evolution.parents)
    candidates = _children(rng, parents, config.evolution, plain, seen)
    pool: list[SolverSchedule] = []
    values = np.zeros(0)
    for _ in range(config.guided_generations):
        new = _children(rng, parents, config.evolution, config.guided_children, seen)
        pool, values = pool + new, np.concatenate([values, rank(new)])
        kept = np.argsort(values, kind="stable")[: max(wanted, config.evolution.parents)]
        pool, values = [pool[i] for i in kept], values[kept]
        parents = pool[: config.evolution.parents]
    return pool[:wanted] + candidates
