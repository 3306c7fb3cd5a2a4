"""Solver schedules of a trained run: find one for so many evaluations, and sample with it.

The metric is the distance to a fine solution of the probability flow from the same noise, on the
run's own averaged parameters and in the data's units. A schedule fits the noise that it was found
on; so it and the plain solvers are measured again on noise that the search has not seen.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import solve
from jaxgen.solve.evolution import EvolutionConfig
from jaxgen.solve.schedule import (
    SolverSchedule,
    baseline_schedules,
    schedule_from_baseline,
    schedule_times,
)
from jaxgen.solve.schedule_file import load_schedule
from jaxgen.solve.search import SearchConfig, SearchResult, evaluate_schedules, search
from jaxgen.solve.usf import usf, usf_sample
from jaxgen.train.recipes.score import Experiment

__all__ = ["Found", "data_scale", "find_schedule", "load_solver", "plain_schedules"]

# Of Heun's method, with two evaluations each.
REFERENCE_STEPS = 100
# Noise of the final measurement, in units of the search's.
FRESH = 2
_ANALYTIC = (0.4, 0.2, 0.4)


class Found(NamedTuple):
    """What ``find_schedule`` found.

    Attributes:
      result: the search's.
      score: of the best schedule, on fresh noise.
      plain: scores of the plain solvers by name, on the same fresh noise.
      fresh: number of samples of the fresh noise.
    """

    result: SearchResult
    score: float
    plain: dict[str, float]
    fresh: int


def data_scale(experiment: Experiment) -> float:
    """Data units in one unit of the network's."""
    data = experiment.train
    return data.scale if data.levels is None else data.levels / 2


def data_mean(experiment: Experiment) -> np.ndarray:
    """Mean of the training data as the network sees them, of the event's shape."""
    data = experiment.train
    return np.asarray(np.mean(data.to_unit(data.x), axis=0, dtype=np.float64), np.float32)


def plain_schedules(experiment: Experiment, nfe: int) -> dict[str, SolverSchedule]:
    """Named solvers with their own defaults, and the 36 plain ones, at so many evaluations."""
    orders = {"ddim": 1, "dpmpp_2m": 2, "dpmpp_3m": 3, "unipc": 3}
    named = {
        name: schedule_from_baseline(name, nfe, experiment.sde, order=order)
        for name, order in orders.items()
        if nfe >= order
    }
    return named | baseline_schedules(nfe, experiment.sde)


def _metric(
    key: jax.Array, experiment: Experiment, params: Any, n: int
) -> Callable[[SolverSchedule], jax.Array]:
    """Distance of a population's samples to the fine solution, schedule after schedule."""
    sde, event = experiment.sde, experiment.train.event
    scale, mean = data_scale(experiment), data_mean(experiment)
    x = sde.prior_sample(key, (n, *event))

    @jax.jit
    def fine(params: Any, x: jax.Array) -> jax.Array:
        return solve.sample(
            key,
            experiment.field(experiment.weights(params)),
            sde,
            x.shape,
            solver="heun",
            steps=REFERENCE_STEPS,
            prediction=experiment.prediction,
            x_init=x,
        ).x

    @jax.jit
    def distances(
        params: Any, x: jax.Array, exact: jax.Array, population: SolverSchedule
    ) -> jax.Array:
        field = experiment.field(experiment.weights(params))

        def one(schedule: SolverSchedule) -> jax.Array:
            made = usf_sample(
                key,
                field,
                sde,
                x.shape,
                schedule,
                x0_mean=mean,
                prediction=experiment.prediction,
                x_init=x,
            ).x
            return scale * jnp.sqrt(jnp.mean((made - exact) ** 2))

        # One after another: the memory of one, whatever the population.
        return jax.lax.map(one, population)

    return functools.partial(distances, params, x, fine(params, x))


def find_schedule(
    key: jax.Array,
    experiment: Experiment,
    params: Any,
    nfe: int,
    *,
    config: SearchConfig,
    samples: int = 64,
    analytic: bool = False,
    archive: Path | None = None,
    made_for: str = "",
    progress: bool | Literal["bar"] | None = None,
) -> Found:
    """Search for a schedule of a trained run, and measure it on fresh noise.

    Args:
      key: typed key; of the search, its noise and the fresh noise.
      experiment: what was trained.
      params: parameters of the network, usually the averaged ones.
      nfe: evaluations of the network.
      config: of the search; what children are drawn from is chosen here.
      samples: for each score.
      analytic: let the first output be analytic (zero or the data's mean), for a step more.
      archive: see ``solve.search``.
      made_for: what else the scores stand on, such as the training step.
      progress: see ``solve.search``.

    Raises:
      ValueError: see ``solve.search``.
    """
    key_search, key_noise, key_fresh = jax.random.split(key, 3)
    plain = plain_schedules(experiment, nfe)
    if analytic:
        config = SearchConfig(**{**vars(config), "evolution": EvolutionConfig(afs=_ANALYTIC)})
    result = search(
        key_search,
        _metric(key_noise, experiment, params, samples),
        list(plain.values()),
        config,
        archive=archive,
        progress=progress,
        made_for=f"{made_for}, {nfe} evaluations, {samples} samples, jax {jax.__version__}",
    )
    names = list(plain)
    fresh = _metric(key_fresh, experiment, params, FRESH * samples)
    scores = evaluate_schedules(
        fresh, [result.best, *(plain[name] for name in names)], config.batch
    )
    return Found(
        result,
        float(scores[0]),
        {name: float(v) for name, v in zip(names, scores[1:], strict=True)},
        FRESH * samples,
    )


def load_solver(path: Path, experiment: Experiment) -> tuple[solve.ScheduleSolver, jax.Array]:
    """A schedule's solver and its grid, for ``solve.sample`` on a run's process.

    Args:
      path: what ``jaxgen search`` wrote.
      experiment: the run's.

    Raises:
      ValueError: the file is no schedule, or one for another process.
      OSError: it cannot be read.
    """
    schedule = load_schedule(path, sde=experiment.sde)
    mean = data_mean(experiment) if int(schedule.afs) == 2 else None
    return usf(schedule, x0_mean=mean), schedule_times(experiment.sde, schedule)
