"""The digits U-Net in pools of 1, 1/10 and 1/100 of its weights, against smaller dense U-Nets.

Both sides train from one seed for a quarter of the command's default steps, with its settings, and
are judged alike: bits per dimension of held-out digits, and the Frechet distance of 500 samples in
the features of one classifier. The peer is the widest dense U-Net with no more trained numbers
(``nets.width_for_budget``, pools, biases and norms all counted); at 1 it is the network itself.

``python -m benchmarks.shared_unet FILE.png`` runs it too, and draws samples.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.measure import Result
from jaxgen import nets
from jaxgen.train import data as datasets
from jaxgen.train.recipes import evaluate, pictures
from jaxgen.train.recipes.classifier import Judge, train_judge
from jaxgen.train.recipes.config import ScoreConfig, resolve
from jaxgen.train.recipes.score import Experiment, build

BUDGETS = (1.0, 0.1, 0.01)
# A network that trains and samples in seconds, for --quick; likelihoods take longer to compile.
SMALL: dict[str, Any] = {
    "width": 16,
    "channel_mults": (1,),
    "steps": 16,
    "eval_samples": 25,
    "classifier_steps": 20,
    "solver": "ddim",
    "solver_steps": 3,
}


class Judged(NamedTuple):
    """A trained network's figures, bits per dimension with their standard error, and samples."""

    experiment: Experiment
    frechet: float
    bits: tuple[float, float] | None
    x: np.ndarray


def _experiment(data: datasets.Dataset, **settings: Any) -> Experiment:
    return build(resolve(ScoreConfig(**settings), data.event), data)


def _trained(experiment: Experiment, judge: Judge, *, quick: bool) -> Judged:
    config, data = experiment.config, experiment.train
    state, step = experiment.state(), experiment.make_step()
    source = datasets.batches(data, config.batch_size, seed=config.seed)(0)
    for _ in range(config.steps):
        state, metrics = step(state, next(source))
        # One step in flight: batches must not pile up.
        metrics.loss.block_until_ready()
    key_draw, key_likelihood = jax.random.split(jax.random.key(1))
    drawn = evaluate.draw(
        key_draw,
        experiment,
        state.ema,
        config.eval_samples,
        solver=config.solver,
        steps=config.solver_steps,
    )
    bits = None
    if not quick:
        likely = evaluate.likelihood(
            key_likelihood, experiment, state.ema, experiment.held_out, config.eval_likelihood
        )
        bits = likely["bits_per_dim"], likely["bits_per_dim_standard_error"]
    distance = evaluate.judged(judge, data, drawn.x)["frechet"]["model_to_data"]
    return Judged(experiment, distance, bits, data.to_unit(data.from_unit(drawn.x)))


def _width(data: datasets.Dataset, numbers: int, **settings: Any) -> int:
    """The widest U-Net of these settings with at most so many parameters."""

    def family(width: int) -> Any:
        return _experiment(data, **{**settings, "width": width}).init_network(jax.random.key(0))

    return nets.width_for_budget(family, numbers, count="all")


def pairs(*, quick: bool) -> Iterator[tuple[float, Judged, Judged]]:
    """Per budget the shared network and the dense one of its size."""
    data = datasets.load("digits")
    settings = dict(SMALL)
    if not quick:
        default = resolve(ScoreConfig(), data.event)
        settings = {"steps": default.steps // 4}
    dense = _experiment(data, **settings)
    steps = dense.config.classifier_steps
    judge = train_judge(jax.random.key(0), dense.train, dense.held_out, steps=steps)
    for budget in BUDGETS[1:2] if quick else BUDGETS:
        shared = _experiment(data, share=budget, **settings)
        width = _width(data, shared.parameters(), **settings)
        peer = _experiment(data, **{**settings, "width": width})
        sides = [_trained(side, judge, quick=quick) for side in (shared, peer)]
        yield budget, sides[0], sides[1]


def results(budget: float, ours: Judged, peer: Judged) -> Iterator[Result]:
    """The figures of one budget; lower is better, so that the ratio is the peer's over ours."""
    sharing, dense = ours.experiment.sharing, peer.experiment
    assert sharing is not None
    numbers = ours.experiment.parameters()
    note = (
        f"{sharing.weights:,} weights in {numbers:,} numbers, peer of width {dense.config.width} "
        f"with {dense.parameters():,}; {dense.config.steps} steps, one seed"
    )
    cases: list[Any] = [("frechet", "Frechet distance", ours.frechet, peer.frechet, None)]
    if ours.bits is not None and peer.bits is not None:
        error = float(np.hypot(ours.bits[1] / ours.bits[0], peer.bits[1] / peer.bits[0]))
        cases.append(("bits", "bits per dimension", ours.bits[0], peer.bits[0], error))
    for case, unit, mine, its, relative in cases:
        ratio = its / mine
        # Two standard errors over the held-out digits; a Frechet distance comes with none.
        width = None if relative is None else 2 * ratio * relative
        yield Result(
            bench="shared_unet",
            case=f"{case}_{1 / budget:g}x",
            ours=mine,
            peer=its,
            peer_name="the dense U-Net of that size",
            unit=unit,
            ratio=ratio,
            interval=None if width is None else (ratio - width, ratio + width),
            note=note,
        )


def run(*, quick: bool) -> Iterator[Result]:
    for budget, ours, peer in pairs(quick=quick):
        yield from results(budget, ours, peer)


def main(path: Path) -> None:
    """Run in full, and draw samples of each pair of networks."""
    panels = []
    for budget, ours, peer in pairs(quick=False):
        for result in results(budget, ours, peer):
            print(result.to_line(), flush=True)
        sizes = [side.experiment.parameters() for side in (ours, peer)]
        title = "in a pool, {:,} numbers; below, dense, {:,}".format(*sizes)
        panels.append((title, np.concatenate([ours.x[:40], peer.x[:40]])))
    pictures.draw_grid(path, panels, columns=10)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
