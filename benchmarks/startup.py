"""How long a person waits: import, first training step, first sample, with compiled programs kept.

Each measurement is a process of its own. Ours has jax's persistent compilation cache
(``jaxgen train --compilation-cache``), filled by a process that is not counted; the peer, the same
program without it, compiles all anew. The two take turns.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import numpy as np

from benchmarks.measure import PAIRS, Result, summarise

CASES = ("import", "first_step", "first_sample")
_PROGRAM = """
import json, sys, time
marks = [time.perf_counter()]
import jax
from jaxgen import solve, train
from jaxgen.train import data as datasets
from jaxgen.train.recipes.config import ScoreConfig, resolve
from jaxgen.train.recipes.score import build
marks.append(time.perf_counter())
data = datasets.load(sys.argv[1])
experiment = build(resolve(ScoreConfig(data=sys.argv[1]), data.event), data)
config = experiment.config
read = datasets.batches(experiment.train, config.batch_size, seed=0)
batch = jax.device_put(next(read(0)))
state, metrics = experiment.make_step()(experiment.state(), batch)
metrics.loss.block_until_ready()
marks.append(time.perf_counter())
@jax.jit
def draw(key, params):
    field = experiment.field(params)
    shape = (16, *data.event)
    return solve.sample(key, field, experiment.sde, shape, prediction=experiment.prediction).x
draw(jax.random.key(0), state.ema).block_until_ready()
marks.append(time.perf_counter())
print(json.dumps([b - a for a, b in zip(marks, marks[1:])]))
"""


def _seconds(data: str, cache: str | None) -> list[float]:
    """Import; from there to the first step's loss; from there to the first 16 samples."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    if cache is not None:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    command = [sys.executable, "-c", _PROGRAM, data]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return [float(value) for value in done.stdout.strip().splitlines()[-1].strip("[]").split(",")]


def run(*, quick: bool) -> Iterator[Result]:
    """Points in the plane in a hurry, else the default run on digits too."""
    for data in ("moons",) if quick else ("moons", "digits"):
        pairs = 2 if quick else PAIRS if data == "moons" else 5
        times = np.zeros((pairs, 2, len(CASES)))
        with tempfile.TemporaryDirectory() as cache:
            _seconds(data, cache)
            for i in range(pairs):
                for side in (0, 1) if i % 2 else (1, 0):
                    times[i, side] = _seconds(data, cache if side == 0 else None)
        total = np.median(times.sum(2), axis=0)
        for j, case in enumerate(CASES):
            yield summarise(
                "startup",
                f"{data}_{case}",
                times[:, 0, j],
                times[:, 1, j],
                peer_name="the same without the cache",
                unit="s",
                note=f"of {total[0]:.1f} s to the first sample, {total[1]:.1f} s without",
            )
