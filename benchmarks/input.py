"""Examples a second of the input pipeline against what a training step takes of them.

Ours is what the loop reads: ``datasets.batches`` through ``train.Feed``, arrays on the device. It
is held against grain's own pipeline (shuffle, repeat, batch, one reading thread) over the same
arrays, and against the training step of a default run on the same data: input is no bottleneck
where a step takes longer than a batch.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.measure import Result, compare
from jaxgen.train import data as datasets
from jaxgen.train.feed import Feed
from jaxgen.train.recipes.config import ScoreConfig, resolve
from jaxgen.train.recipes.score import build

BATCHES = 8


def _images() -> datasets.Dataset:
    """As many bytes a batch as pictures of 64 x 64 in colour."""
    x = np.random.default_rng(0).integers(0, 256, (4096, 64, 64, 3), np.uint8)
    return datasets.Dataset("images", x, levels=256)


def _grain(data: datasets.Dataset, batch_size: int) -> Callable[[], Any]:
    import grain

    class Source:
        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, i: int) -> dict[str, np.ndarray]:
            return {"x": data.x[i]}

    shuffled = grain.MapDataset.source(Source()).shuffle(seed=0).repeat().batch(batch_size)
    batches = iter(shuffled.to_iter_dataset(grain.ReadOptions(1, 4)))
    return lambda: [jax.device_put(next(batches)) for _ in range(BATCHES)]


def run(*, quick: bool) -> Iterator[Result]:
    """Points in a hurry, whose step is the shortest; else digits and larger images too."""
    for name in ("moons",) if quick else ("moons", "digits", "images"):
        data = _images() if name == "images" else datasets.load(name)
        config = resolve(ScoreConfig(data=name), data.event)
        n = config.batch_size
        with Feed(datasets.batches(data, n, seed=0)(0), owns_source=True) as feed:

            def ours(feed: Feed = feed) -> Any:
                taken = []
                for _ in range(BATCHES):
                    taken.append(next(feed))
                    feed.fill()
                return taken

            result = compare(
                "input",
                f"{name}_against_grain",
                ours,
                _grain(data, n),
                peer_name="grain's shuffle, repeat and batch",
                note=f"{BATCHES} batches of {n}",
            )
            yield _with_rate(result, n)
            if name == "images":
                continue
            yield _with_rate(_against_step(name, build(config, data), ours), n)


def _against_step(name: str, experiment: Any, ours: Callable[[], Any]) -> Result:
    step = experiment.make_step()
    batch = jax.device_put(
        next(datasets.batches(experiment.train, experiment.config.batch_size, seed=0)(0))
    )
    held = [experiment.state()]

    def steps() -> Any:
        for _ in range(BATCHES):
            held[0], metrics = step(held[0], batch)
        return metrics

    return compare(
        "input",
        f"{name}_against_the_step",
        ours,
        steps,
        peer_name="the training step that reads them",
        goal=1.0,
        note=f"{BATCHES} batches of {experiment.config.batch_size}",
    )


def _with_rate(result: Result, n: int) -> Result:
    """The same, with what it comes to in examples a second."""
    ours, peer = (1e3 * BATCHES * n / value for value in (result.ours, result.peer))
    note = f"{result.note}: {ours:,.0f} examples/s against {peer:,.0f}"
    return dataclasses.replace(result, note=note)
