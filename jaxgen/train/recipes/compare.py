"""Solvers of a trained network side by side: nearness to the exact flow and quality, at what cost.

Every solver starts from the same noise. The deterministic ones are held against a fine solution of
the probability flow; all of them against the data, by the distance that ``evaluate`` reports.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import solve
from jaxgen.train.manifest import replace_text
from jaxgen.train.recipes.classifier import Judge, train_judge
from jaxgen.train.recipes.evaluate import CHUNK, judged, rounded, sliced
from jaxgen.train.recipes.score import Experiment

__all__ = ["REFERENCE_STEPS", "Comparison", "steps_within"]

# Of Heun's method, with two evaluations each.
REFERENCE_STEPS = 200

Solvers = Mapping[str, str | diffrax.AbstractSolver]


def steps_within(solver: str | diffrax.AbstractSolver, evaluations: int) -> int:
    """Most steps of a solver with at most that many field evaluations, 0 if none."""
    _, _, made = solve.registry.resolve(solver)
    if made is None:
        return evaluations
    if isinstance(made, solve.HeunTime):  # the last step is Euler's
        return (evaluations + 1) // 2
    if isinstance(made, solve.GridSolver):
        return evaluations // made.stages
    known = solve.drivers.evaluations(made)
    return evaluations // 2 if known is None else (evaluations - known[1]) // max(known[0], 1)


class Comparison:
    """Rows of a comparison, kept in a file after each, so that it goes on where it was stopped.

    Args:
      experiment: what was trained.
      params: parameters of the network, usually the averaged ones.
      file: JSON file of the rows; rows of the same settings that it holds are not computed again.
      step: training step of the parameters.
      n: samples of each solver.
      seed: of the noise.
    """

    def __init__(
        self, experiment: Experiment, params: Any, file: Path, *, step: int, n: int, seed: int
    ):
        self.experiment, self.params, self.file = experiment, params, file
        self.n = -(-n // CHUNK) * CHUNK
        self.key = jax.random.key(seed)
        self.settings = {
            "step": step,
            "samples": self.n,
            "seed": seed,
            "reference": f"heun, {REFERENCE_STEPS} steps",
            "jax": jax.__version__,
        }
        self.rows: list[dict[str, Any]] = self._stored()
        self._reference: np.ndarray | None = None
        self._judge: Judge | None = None

    def _stored(self) -> list[dict[str, Any]]:
        try:
            kept = json.loads(self.file.read_text())
            return list(kept["rows"]) if kept["settings"] == self.settings else []
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def _find(self, name: str, evaluations: int) -> dict[str, Any] | None:
        wanted = (name, evaluations)
        return next((r for r in self.rows if (r["solver"], r["allowed"]) == wanted), None)

    def draw(self, solver: str | diffrax.AbstractSolver, steps: int) -> tuple[np.ndarray, int, Any]:
        """Samples, evaluations, and the seconds of a chunk after the first, if there is one."""
        experiment = self.experiment

        @jax.jit
        def chunk(params: Any, first: jax.Array) -> solve.Sample:
            return solve.sample(
                self.key,
                experiment.field(experiment.weights(params)),
                experiment.sde,
                (CHUNK, *experiment.train.event),
                solver=solver,
                steps=steps,
                prediction=experiment.prediction,
                first_index=first,
            )

        parts, seconds = [], []
        for first in range(0, self.n, CHUNK):
            start = time.monotonic()
            sample = jax.block_until_ready(chunk(self.params, jnp.int32(first)))
            seconds.append(time.monotonic() - start)
            parts.append(np.asarray(sample.x))
        later = seconds[1:]
        return (
            np.concatenate(parts),
            int(np.max(sample.nfe)),
            float(np.median(later)) / CHUNK if later else None,
        )

    def reference(self) -> np.ndarray:
        """The fine solution of the probability flow, computed once."""
        if self._reference is None:
            self._reference = self.draw("heun", REFERENCE_STEPS)[0]
        return self._reference

    def distance(self, x: np.ndarray) -> tuple[str, dict[str, Any]]:
        """The name of the distance to the data that suits them, and what ``evaluate`` says."""
        data = self.experiment.train
        if not data.is_image or data.label is None:
            return "sliced_wasserstein", sliced(self.key, data, x)["sliced_wasserstein"]
        if self._judge is None:
            self._judge = train_judge(
                self.key,
                data,
                self.experiment.held_out,
                steps=self.experiment.config.classifier_steps,
            )
        return "frechet", judged(self._judge, data, x)["frechet"]

    def row(
        self, name: str, solver: str | diffrax.AbstractSolver, evaluations: int
    ) -> dict[str, Any] | None:
        """One solver with at most so many evaluations; ``None`` where it cannot do with so few.

        Raises:
          ValueError: the solver does not suit the process.
        """
        kept = self._find(name, evaluations)
        if kept is not None:
            return kept
        steps = steps_within(solver, evaluations)
        made = solve.registry.resolve(solver)[2]
        if steps < max(1, getattr(made, "max_order", 1)):
            return None
        x, nfe, seconds = self.draw(solver, steps)
        is_noisy = solve.noise.needs_noise(made) if made is not None else True
        rmse = None if is_noisy else rounded(np.sqrt(np.mean((x - self.reference()) ** 2)))
        kind, found = self.distance(x)
        row = {
            "solver": name,
            "allowed": evaluations,
            "steps": steps,
            "evaluations": nfe,
            "rmse": rmse,
            kind: found["model_to_data"],
            "data_to_data": found["data_to_data"],
            "seconds_per_sample": None if seconds is None else rounded(seconds),
        }
        self.rows.append(row)
        kept_all = {"settings": self.settings, "rows": self.rows}
        replace_text(self.file, json.dumps(kept_all, indent=1) + "\n")
        return row

    def run(
        self,
        solvers: Solvers,
        evaluations: Sequence[int],
        advance: Callable[[str], None] = lambda name: None,
    ) -> list[dict[str, Any]]:
        """All rows, solver by solver; ``advance`` is called with the name after each."""
        rows = []
        for name, solver in solvers.items():
            for allowed in evaluations:
                row = self.row(name, solver, allowed)
                if row is not None:
                    rows.append(row)
                advance(name)
        return rows
