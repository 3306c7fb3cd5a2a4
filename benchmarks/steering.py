"""Digits guided to a class with the weights that guidance needs, and by the same SDE without.

A class-conditional network of the digits, trained as ``jaxgen train --labels`` does; 64 samples of
each class at each guidance scale, by populations of 64 particles in 100 steps. A case's figures are
the accuracy of a classifier at the class asked for, and the Frechet distance to as many real digits
in its features; the note has the spread within classes as a share of the data's.

``python -m benchmarks.steering RUN`` measures a run that is there.

What is right is not always what looks best. The target at scale w is q_u^(1-w) q_c^w, which from
w = 2 on favours digits that the unconditional network finds unlikely; the weights seek these, as
far as two networks can tell them apart, and 64 particles are few for it (1200 steps, seed 0):

    scale   accuracy          Frechet distance    spread within classes
            with    without   with     without    with    without
    1       0.991   0.991      1.15    1.15       0.92    0.92
    1.5     1.000   0.998      2.28    1.55       0.93    0.88
    2       1.000   1.000      7.81    1.92       0.72    0.86
    3       0.909   1.000     19.5     2.30       0.42    0.85

Real digits have a distance of 2.22 to as many others. At 1.5 the weights give back the spread that
guidance takes; beyond, a population comes from a few ancestors.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from benchmarks.measure import Result
from jaxgen import train
from jaxgen.train import data as datasets
from jaxgen.train.recipes.classifier import train_judge
from jaxgen.train.recipes.config import ScoreConfig
from jaxgen.train.recipes.run import Run, open_run, prepare
from jaxgen.train.recipes.steering import guided_classes

SCALES = (1.0, 1.5, 2.0, 3.0)


def rows_of(run: Run, *, quick: bool = False) -> list[dict[str, Any]]:
    """A row for each scale, corrected and not."""
    experiment = run.experiment
    judge = train_judge(
        jax.random.key(0),
        experiment.train,
        experiment.held_out,
        steps=experiment.config.classifier_steps,
    )
    options: dict[str, Any] = (
        {"scales": (2.0,), "per_class": 4, "particles": 4, "steps": 3} if quick else {}
    )
    return guided_classes(
        jax.random.key(1), experiment, run.params, judge, **({"scales": SCALES} | options)
    )


def results(rows: list[dict[str, Any]], step: int) -> Iterator[Result]:
    """Each scale's accuracy and distance, with the weights against without."""
    half = len(rows) // 2
    # No sample of the class asked for counts as half a one, so that there is a ratio.
    rows = [row | {"accuracy": max(row["accuracy"], 0.5 / row["count"])} for row in rows]
    for ours, peer in zip(rows[:half], rows[half:], strict=True):
        note = (
            f"{ours['count']} digits, step {step}; spread {ours['spread']:.3f} and "
            f"{peer['spread']:.3f}; effective sample size {ours['last_ess']:.3g} at the end; "
            f"distance of data to data {ours['data_to_data']:.3g}"
        )
        for figure, better in (("accuracy", 1), ("frechet", -1)):
            yield Result(
                bench="steering",
                case=f"guide_{ours['scale']:g}_{figure}",
                ours=ours[figure],
                peer=peer[figure],
                peer_name="the same SDE without weights",
                unit="share" if figure == "accuracy" else "squared distance",
                ratio=(ours[figure] / peer[figure]) ** better,
                note=note,
            )


def trained(**settings: Any) -> Run:
    """A run on labelled digits, as ``jaxgen train --labels`` makes it, kept in memory."""
    with tempfile.TemporaryDirectory() as folder:
        experiment = prepare(ScoreConfig(labels=True, out=str(Path(folder) / "run"), **settings))
    config = experiment.config
    source = datasets.batches(experiment.train, config.batch_size, seed=config.seed)
    state = train.fit(experiment.state(), experiment.make_step(), source, config.steps)
    return Run(experiment, state.ema, config.steps)


def run(*, quick: bool) -> Iterator[Result]:
    small: dict[str, Any] = {
        "steps": 10,
        "batch_size": 32,
        "width": 8,
        "channel_mults": (1,),
        "classifier_steps": 5,
    }
    made = trained(**small if quick else {})
    yield from results(rows_of(made, quick=quick), made.step)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steering", description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run on digits with labels")
    args = parser.parse_args()
    made = open_run(args.run)
    for result in results(rows_of(made), made.step):
        print(result.to_line(), flush=True)


if __name__ == "__main__":
    main()
