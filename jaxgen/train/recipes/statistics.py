"""DPM-Solver-v3's statistics of a trained run: estimated once, kept in the run's folder.

They are of the averaged parameters of one step, from the run's training examples. The folder
``RUN/statistics`` is used again as long as the step, these parameters and the settings are the
same.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.solve.statistics import (
    Statistics,
    estimate_statistics,
    load_statistics,
    save_statistics,
)
from jaxgen.train.recipes.evaluate import conditional_field
from jaxgen.train.recipes.run import Run

__all__ = ["FOLDER", "statistics_of_run"]

FOLDER = "statistics"


def statistics_of_run(
    key: jax.Array,
    run: Run,
    *,
    n_grid: int = 60,
    n_samples: int = 512,
    label: int | None = None,
    guidance: float = 1.0,
    progress: bool | None = None,
) -> Statistics:
    """The statistics of a run, from its folder or estimated and put there.

    Args:
      key: typed key; statistics that another key made serve as well.
      run: from ``open_run``.
      n_grid: intervals between levels.
      n_samples: pairs of data and noise.
      label: a class that the network was trained with; its statistics are estimated from its own
        examples, and not kept.
      guidance: see ``evaluate.draw``.
      progress: ``True`` shows a meter, if anything is to be estimated.

    Raises:
      OSError: the folder cannot be written.
      ValueError: ``RUN/statistics`` holds something else; sizes out of range.
    """
    experiment, is_kept = run.experiment, label is None
    folder = Path(experiment.config.out) / FOLDER
    wanted: dict[str, Any] = {"step": run.step, "n_grid": n_grid, "n_samples": n_samples}
    if is_kept:
        # A run that was trained anew in the same folder comes to the same step.
        wanted["params"] = _digest(run.params)
        found = _found(folder, wanted)
        if found is not None:
            return found
    key_data, key_estimate = jax.random.split(key)
    raw = experiment.train.x
    if label is not None and experiment.train.label is not None:
        raw = raw[experiment.train.label == label]

    # The parameters as an argument: as constants they would be compiled in.
    @jax.jit
    def estimate(params: Any, raw: jax.Array) -> Statistics:
        return estimate_statistics(
            key_estimate,
            conditional_field(experiment, params, label, guidance),
            experiment.sde,
            experiment.to_model(key_data, raw),
            prediction=experiment.prediction,
            n_grid=n_grid,
            n_samples=n_samples,
            progress=progress,
        )

    made = jax.block_until_ready(estimate(run.params, jnp.asarray(raw)))
    ends = {"t_start": float(experiment.sde.t_max), "t_end": float(experiment.sde.t_end)}
    about = dict(made.made) | ends | wanted | {"ema": experiment.config.ema}
    made = dataclasses.replace(made, made=tuple(about.items()))
    if is_kept:
        save_statistics(folder, made)
    return made


def _digest(params: Any) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _found(folder: Path, wanted: dict[str, Any]) -> Statistics | None:
    try:
        found = load_statistics(folder)
    except ValueError:
        return None
    about = dict(found.made)
    return found if all(about.get(name) == value for name, value in wanted.items()) else None
