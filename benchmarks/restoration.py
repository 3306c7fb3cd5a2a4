"""Digits blurred and noised, restored in 5, 10 and 20 evaluations; posterior sampling takes 100.

One network serves all. The figure is the peak signal-to-noise ratio of held-out digits in dB,
higher being better. Samples of a posterior stay below its mean, which is the network's best guess
in one call, and blurred.

``python -m benchmarks.restoration FILE.png [--steps N]`` draws them, after N steps of training.
"""

import argparse
import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks.measure import Result
from jaxgen.solve.mean_reverting import mr_posterior_sample, mr_sample
from jaxgen.train.recipes import pictures
from jaxgen.train.recipes.restoration import RestorationConfig, Restorer, psnr, train_restorer

COUNTS = (5, 10, 20)
CHAIN = 100


def restored(made: Restorer, key: jax.Array) -> dict[str, np.ndarray]:
    """The held-out digits by each sampler, named with its evaluations."""
    options = {"fit_target": made.config.fit_target}
    # The last step is the longest in log-SNR: data prediction is better off with order 1 there.
    ours = {
        f"{n} evaluations": functools.partial(mr_sample, steps=n, lower_order_final=True, **options)
        for n in COUNTS
    }
    ours[f"posterior, {CHAIN}"] = functools.partial(mr_posterior_sample, **options)
    images = {}
    for name, sampler in ours.items():
        run = jax.jit(lambda key, mu, sampler=sampler: sampler(key, made.net, mu, made.sde).x)
        images[name] = np.asarray(run(key, made.measured))
    return images


def results(made: Restorer, images: dict[str, np.ndarray]) -> Iterator[Result]:
    """Each count of evaluations against the chain's."""
    before = psnr(made.measured, made.truth)
    figures = {name: psnr(x, made.truth) for name, x in images.items()}
    *ours, chain = figures.items()
    for name, mine in ours:
        yield Result(
            bench="restoration",
            case=f"digits_{name.split()[0]}",
            ours=mine,
            peer=chain[1],
            peer_name=f"posterior sampling in {CHAIN} evaluations",
            unit="dB",
            ratio=mine / chain[1],
            note=f"measured {before:.1f} dB, {len(made.truth)} digits, {made.config.steps} steps",
        )


def run(*, quick: bool) -> Iterator[Result]:
    config = RestorationConfig(steps=20, width=8) if quick else RestorationConfig()
    made = train_restorer(config, progress=False if quick else None)
    yield from results(made, restored(made, jax.random.key(1)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.restoration", description=__doc__)
    parser.add_argument("file", type=Path, help="the PNG to draw")
    parser.add_argument("--steps", type=int, default=RestorationConfig.steps, help="of training")
    args = parser.parse_args()
    made = train_restorer(RestorationConfig(steps=args.steps))
    images = restored(made, jax.random.key(1))
    for result in results(made, images):
        print(result.to_line(), flush=True)
    panels = {"truth": made.truth, "measurement": made.measured, **images}
    draw = [
        (f"{name}, {psnr(x, made.truth):.1f} dB" if name != "truth" else name, 2 * x[:49] - 1)
        for name, x in panels.items()
    ]
    pictures.draw_grid(args.file, [(t, np.asarray(x)) for t, x in draw], columns=7)


if __name__ == "__main__":
    main()
