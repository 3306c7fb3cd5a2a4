"""What a trained generator is worth: likelihood, Frechet distance, recognisability.

Every figure comes with what it was computed with: counts, averaged parameters or not, solver, grid,
steps and last step. Distances are given twice at one count, between model and data and between two
halves of the data, the second being what a perfect model would score.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import guide, metrics, solve
from jaxgen.metrics.wasserstein import wasserstein2
from jaxgen.score import Field, fokker_planck
from jaxgen.solve.ode_sde_gap import Gap, ode_sde_gap
from jaxgen.train.data import Dataset
from jaxgen.train.recipes.classifier import Judge, train_judge
from jaxgen.train.recipes.score import DATA_RANGE, Experiment

__all__ = [
    "Drawn",
    "draw",
    "evaluate",
    "judged",
    "likelihood",
    "rounded",
    "sliced",
    "two_samplers",
]

CHUNK = 125
TOLERANCE = 1e-3
# Of the comparison of the two samplers: samples of each, and steps before the last are refined.
_GAP_SAMPLES, _GAP_STEPS = 2000, 400

Say = Callable[[str], None]


class Drawn(NamedTuple):
    """Samples and what they were made with.

    Attributes:
      x: float32 ``(n, *event)``, network-scaled.
      how: solver, grid, steps, evaluations, last step and last time, as plain values.
      clouds: samples of the probability flow and of the reverse SDE, where a log-density was
        learned.
    """

    x: np.ndarray
    how: dict[str, Any]
    clouds: tuple[np.ndarray, np.ndarray] | None = None


def draw(
    key: jax.Array,
    experiment: Experiment,
    params: Any,
    n: int,
    *,
    solver: str | diffrax.AbstractSolver = "heun",
    steps: int | None = None,
    grid: np.ndarray | None = None,
    label: int | None = None,
    guidance: float = 1.0,
    advance: Callable[[int], None] | None = None,
) -> Drawn:
    """Draw samples in chunks of one size; the first ``k`` of ``n`` are the same whatever ``n``.

    Args:
      key: typed key.
      experiment: what was trained.
      params: parameters of the network, usually the averaged ones.
      n: number of samples.
      solver: a name of ``solve.SOLVERS``, or a solver.
      steps: its steps; ``None`` for the solver's default.
      grid: falling times instead of the solver's own grid.
      label: a class that the network was trained with.
      guidance: scale of classifier-free guidance; 1 samples the label, more presses it.
      advance: called with the number of samples done after each chunk.

    Raises:
      ValueError: an unknown solver, or a number out of range.
    """
    how: dict[str, Any] = {}

    @jax.jit
    def chunk(key: jax.Array, params: Any, first: jax.Array) -> solve.Sample:
        return solve.sample(
            key,
            conditional_field(experiment, params, label, guidance),
            experiment.sde,
            (CHUNK, *experiment.train.event),
            solver=solver,
            steps=steps,
            grid=grid,
            prediction=experiment.prediction,
            first_index=first,
        )

    parts = []
    for first in range(0, n, CHUNK):
        sample = chunk(key, params, jnp.int32(first))
        parts.append(np.asarray(sample.x)[: n - first])
        if advance is not None:
            advance(len(parts[-1]))
        how = {
            "solver": sample.solver,
            "steps": sample.steps,
            "grid": sample.grid,
            "evaluations": int(np.max(sample.nfe)),
            "last_step": sample.last_step,
            "last_time": float(np.min(sample.times)),
        }
    return Drawn(np.concatenate(parts), how)


def conditional_field(
    experiment: Experiment, params: Any, label: int | None, guidance: float
) -> Field:
    """The field of one label, guided (``guide.classifier_free_labels``); without one, of all."""
    params = experiment.weights(params)
    if label is None:
        return experiment.field(params)
    return guide.classifier_free_labels(
        lambda x, t, labels: experiment.field(params, labels)(x, t),
        label,
        np.int32(experiment.train.num_classes or 0),
        guidance,
    )


def likelihood(
    key: jax.Array, experiment: Experiment, params: Any, data: Dataset, n: int
) -> dict[str, Any]:
    """Likelihood of the first ``n`` examples of a data set, by the probability flow.

    Returns:
      For integers ``bits_per_dim``, else ``log_prob_per_dim`` (nats, in the data's own units),
      with its standard error over examples and what it was computed with.
    """
    n = min(n, len(data))
    key_data, key_probe = jax.random.split(key)
    dims, levels = experiment.dims, experiment.train.levels

    @jax.jit
    def run(params: Any, x: jax.Array) -> solve.Likelihood:
        return solve.log_likelihood(
            key_probe,
            experiment.field(params),
            experiment.sde,
            x,
            prediction=experiment.prediction,
            rtol=TOLERANCE,
            atol=TOLERANCE,
            estimator="exact" if dims <= 4 else "hutchinson",
        )

    out = run(params, experiment.to_model(key_data, jnp.asarray(data.x[:n])))
    log_prob = np.asarray(out.log_prob, np.float64)
    if levels is None:
        name, values = "log_prob_per_dim", log_prob / dims - np.log(experiment.train.scale)
    else:
        name = "bits_per_dim"
        values = np.asarray(solve.bits_per_dim(out.log_prob, dims, levels, DATA_RANGE), np.float64)
    return {
        name: rounded(values.mean()),
        f"{name}_standard_error": rounded(values.std() / np.sqrt(n)),
        "likelihood": {
            "examples": n,
            "failed": int((~np.isfinite(log_prob)).sum()),
            "levels": levels,
            "estimator": "exact" if dims <= 4 else "hutchinson, one Rademacher probe",
            "tolerance": TOLERANCE,
            "first_time": float(experiment.sde.t_min),
            "evaluations": rounded(np.mean(np.asarray(out.nfe))),
        },
    }


def evaluate(
    key: jax.Array,
    experiment: Experiment,
    params: Any,
    *,
    say: Say = lambda line: None,
) -> tuple[dict[str, Any], Drawn]:
    """All figures of a trained network, and the samples that they were computed from.

    Args:
      key: typed key; the figures are a function of it and of the parameters.
      experiment: what was trained.
      params: parameters of the network, usually the averaged ones.
      say: called with a line at the start of each part; two parts run at once, so that their
        wall times (``seconds``) overlap.
    """
    key_draw, key_likelihood, key_judge = jax.random.split(key, 3)
    key_gap = jax.random.fold_in(key, 3)
    config = experiment.config
    seconds: dict[str, float] = {}

    def timed(name: str, line: str, work: Callable[[], Any]) -> Any:
        if line:
            say(line)
        start = time.monotonic()
        done = work()
        seconds[name] = round(time.monotonic() - start, 2)
        return done

    n = min(config.eval_likelihood, len(experiment.held_out))

    def measured_likelihood() -> dict[str, Any]:
        return timed(
            "likelihood",
            "",
            lambda: likelihood(key_likelihood, experiment, params, experiment.held_out, n),
        )

    # The likelihood takes half of the time, much of it in the compiler, which uses one core.
    # Said here, as two threads may tear each other's lines.
    say(f"likelihood of {n} held-out examples")
    with ThreadPoolExecutor(1) as beside:
        waiting = beside.submit(measured_likelihood)
        drawn = timed(
            "samples",
            f"drawing {config.eval_samples} samples",
            lambda: draw(
                key_draw,
                experiment,
                params,
                config.eval_samples,
                solver=config.solver,
                steps=config.solver_steps,
            ),
        )
        figures = _compared(key_judge, experiment, drawn, timed)
        if config.fokker_planck is not None:
            gap, clouds = timed(
                "gap",
                "drawing by the probability flow and by the reverse SDE",
                lambda: two_samplers(key_gap, experiment, params),
            )
            figures, drawn = figures | gap, drawn._replace(clouds=clouds)
        figures = waiting.result() | figures
    figures["samples"] = {"count": len(drawn.x), "ema": config.ema, **drawn.how}
    figures["seconds"] = seconds
    return figures, drawn


def _compared(
    key: jax.Array, experiment: Experiment, drawn: Drawn, timed: Callable[..., Any]
) -> dict[str, Any]:
    data = experiment.train
    if not data.is_image or data.label is None:
        return timed("distances", "comparing", lambda: sliced(key, data, drawn.x))
    judge = timed(
        "classifier",
        "training the classifier that judges the samples",
        lambda: train_judge(
            key, data, experiment.held_out, steps=experiment.config.classifier_steps
        ),
    )
    return timed("distances", "comparing", lambda: judged(judge, data, drawn.x))


def _halves(data: Dataset, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint random parts of the data, of ``count`` examples or half of all if fewer."""
    count = min(count, len(data) // 2)
    order = np.random.default_rng(0).permutation(len(data))
    return data.to_unit(data.x[order[:count]]), data.to_unit(data.x[order[count : 2 * count]])


def judged(judge: Judge, data: Dataset, samples: np.ndarray) -> dict[str, Any]:
    """Frechet distance and recognisability of images, by a classifier of the data."""
    # Quantised as real images are: the judge has seen nothing between two grey levels.
    made = data.to_unit(data.from_unit(samples))
    first, second = _halves(data, len(made))
    features, top = judge.look(made)
    first_features, first_top = judge.look(first)
    second_features, _ = judge.look(second)
    shares = np.bincount(top.argmax(axis=1), minlength=top.shape[1]) / len(top)
    return {
        "frechet": {
            "model_to_data": rounded(
                metrics.frechet_distance(features[: len(first)], first_features)
            ),
            "data_to_data": rounded(metrics.frechet_distance(first_features, second_features)),
            "count": len(first),
            "features": f"{judge.feature_size} penultimate features of the classifier",
        },
        "classifier": {
            "held_out_accuracy": rounded(judge.accuracy),
            "mean_top_probability": rounded(top.max(axis=1).mean()),
            "mean_top_probability_of_data": rounded(first_top.max(axis=1).mean()),
            "class_shares": [rounded(share) for share in shares],
            "smallest_class_share": rounded(shares.min()),
        },
    }


def sliced(key: jax.Array, data: Dataset, samples: np.ndarray) -> dict[str, Any]:
    """Sliced Wasserstein distance of samples to the data."""
    first, second = _halves(data, len(samples))
    made = samples[: len(first)]
    if data.levels is not None:
        made = data.to_unit(data.from_unit(made))
    distance = jax.jit(lambda x, y: metrics.sliced_wasserstein(key, x, y, directions=256))
    return {
        "sliced_wasserstein": {
            "model_to_data": rounded(distance(made, first)),
            "data_to_data": rounded(distance(first, second)),
            "count": len(first),
            "units": "of the data as the network sees them",
        }
    }


def two_samplers(
    key: jax.Array, experiment: Experiment, params: Any
) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    """How far apart the probability flow and the reverse SDE of a learned log-density end.

    Returns:
      The figures, and the two clouds, network-scaled.
    """
    key_gap, key_points, key_slices = jax.random.split(key, 3)
    data, sde = experiment.train, experiment.sde
    first, second = _halves(data, _GAP_SAMPLES)
    count = len(first)

    @jax.jit
    def run(params: Any, x0: jax.Array) -> tuple[Gap, jax.Array]:
        u = experiment.potential(params)
        gap = ode_sde_gap(
            key_gap,
            fokker_planck.potential_score(u),
            sde,
            (count, *data.event),
            prediction="score",
            steps=_GAP_STEPS,
            method="assignment",
        )
        points = fokker_planck.collocation_paths(
            key_points, x0, sde, count, time="importance", t_min=sde.t_end
        )
        weighting = fokker_planck.per_log_level
        return gap, fokker_planck.penalty(None, u, sde, *points, weighting=weighting)

    gap, squares = run(params, first)
    ode, noisy = np.asarray(gap.ode), np.asarray(gap.sde)
    pairs = {
        "ode_to_sde": (ode, noisy),
        "sde_to_data": (noisy, first),
        "ode_to_data": (ode, first),
        "data_to_data": (first, second),
    }
    slices = jax.jit(lambda x, y: metrics.sliced_wasserstein(key_slices, x, y, directions=256))
    found = {
        "w2": {
            name: rounded(
                gap.w2 if name == "ode_to_sde" else wasserstein2(*clouds, method="assignment")
            )
            for name, clouds in pairs.items()
        },
        "sliced_wasserstein": {k: rounded(slices(*v)) for k, v in pairs.items()},
        "residual_rms": rounded(np.sqrt(squares)),
        "weight": experiment.config.fokker_planck,
        "count": count,
        "steps": _GAP_STEPS,
        "evaluations": int(gap.nfe),
        "units": "of the data as the network sees them; residual in nats per log noise level",
    }
    return {"ode_sde_gap": found}, (ode, noisy)


def rounded(value: Any) -> float | None:
    """Five digits, and ``None`` for what is no number, so that the file stays plain JSON."""
    number = float(value)
    return float(f"{number:.5g}") if np.isfinite(number) else None
