"""A distilled generator of one evaluation against its teacher: distance to the data, time a sample.

A run on digits as ``jaxgen train`` makes it, and what ``jaxgen distill`` makes of it. The teacher
draws by ``dpmpp_2m`` in 50, 10, 5 and 2 evaluations, from the same noises; distances are Frechet's
in the features of a classifier of the data. Both sides are timed on batches of 125, alternately.

One run (1200 steps, seed 0, 378,049 parameters) and its student of 95,329, by 3000 pairs, 2000
steps of reflow and 1000 of distillation; 500 digits, real ones have a distance of 2.43 to as many
others. The machine was busy, so that times are worth their ratios only:

                             distance    time a sample, of the student's
    student, 1 evaluation      3.40
    teacher, 50                2.19        120  [57, 179]
    teacher, 10                2.79         18  [7, 23]
    teacher, 5                 7.25          9  [6, 22]
    teacher, 2                10.4           5  [4, 8]

``python -m benchmarks.one_step RUN DISTILLED`` measures folders that are there.
"""

import argparse
import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Result, compare
from jaxgen import train
from jaxgen.core import keys
from jaxgen.train import data as datasets
from jaxgen.train.recipes.config import ScoreConfig, write_yaml
from jaxgen.train.recipes.distill import (
    DistillConfig,
    prepare_distillation,
    student_sampler,
    teacher_sampler,
    train_students,
    yardstick,
)
from jaxgen.train.recipes.evaluate import CHUNK
from jaxgen.train.recipes.run import Run, open_run, prepare

COUNTS = (50, 10, 5, 2)


def results(
    teacher: Run,
    student: Run,
    *,
    samples: int = 500,
    counts: tuple[int, ...] = COUNTS,
) -> Iterator[Result]:
    """For each count of the teacher's evaluations, both distances and both times."""
    data = student.experiment.train
    key_noise, key_judge = jax.random.split(jax.random.key(1))
    z = keys.normal(key_noise, (samples // CHUNK * CHUNK, *data.event))
    kind, figures = yardstick(key_judge, student.experiment)
    weights = jax.device_put(teacher.experiment.weights(teacher.params))
    ours = jax.jit(student_sampler(student.experiment))

    def distance(draw: Any, params: Any) -> dict[str, Any]:
        parts = [draw(params, z[i : i + CHUNK]) for i in range(0, len(z), CHUNK)]
        return figures(np.concatenate([np.asarray(x) for x in parts]))[kind]

    first = jnp.asarray(z[:CHUNK])
    mine: dict[str, Any] = {}
    for count in counts:
        theirs = jax.jit(teacher_sampler(teacher.experiment, count))
        peer_name = f"the teacher by dpmpp_2m in {count} evaluations"
        # Timed first, so that the first call, which compiles, is seen.
        timed = compare(
            "one_step",
            f"time_{count}",
            functools.partial(ours, student.params, first),
            functools.partial(theirs, weights, first),
            peer_name=peer_name,
            note=f"a sample, in batches of {CHUNK}",
        )
        yield dataclasses.replace(timed, ours=timed.ours / CHUNK, peer=timed.peer / CHUNK)
        mine = mine or distance(ours, student.params)
        found = distance(theirs, weights)
        yield Result(
            bench="one_step",
            case=f"distance_{count}",
            ours=mine["model_to_data"],
            peer=found["model_to_data"],
            peer_name=peer_name,
            unit=kind,
            ratio=found["model_to_data"] / mine["model_to_data"],
            note=f"{len(z)} samples; data to data {mine['data_to_data']:.3g}; "
            f"{student.experiment.parameters():,} parameters for "
            f"{teacher.experiment.parameters():,}",
        )


def trained(folder: Path, **settings: Any) -> None:
    """A run as ``jaxgen train`` makes it, without its evaluation."""
    experiment = prepare(ScoreConfig(out=str(folder), **settings))
    config = experiment.config
    source = datasets.batches(experiment.train, config.batch_size, seed=config.seed)
    state = train.fit(experiment.state(), experiment.make_step(), source, config.steps)
    folder.mkdir(parents=True)
    write_yaml(folder / "config.yaml", config)
    train.save(folder / "checkpoints", state)


def run(*, quick: bool) -> Iterator[Result]:
    settings: dict[str, Any] = {}
    distillation = DistillConfig(naive=False)
    options: dict[str, Any] = {}
    if quick:
        settings = {"data": "moons", "steps": 5, "batch_size": 32, "width": 8, "blocks": 1}
        distillation = dataclasses.replace(
            distillation, pairs=125, reflow_steps=5, distill_steps=5, n=125
        )
        options = {"samples": 125, "counts": (50, 2)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        trained(folder, **settings)
        job = prepare_distillation(folder, distillation)
        made, _ = train_students(job, progress=False if quick else None)
        student = Run(job.student, made["guided"], distillation.distill_steps)
        yield from results(job.teacher, student, **options)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.one_step", description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("distilled", type=Path, help="what jaxgen distill made of it")
    args = parser.parse_args()
    for result in results(open_run(args.run), open_run(args.distilled)):
        print(result.to_line(), flush=True)


if __name__ == "__main__":
    main()
