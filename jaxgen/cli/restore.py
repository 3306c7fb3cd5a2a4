"""``jaxgen restore``: images inpainted, made larger or deblurred by a trained run."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from jaxgen.cli.errors import CommandError
from jaxgen.cli.flags import parse
from jaxgen.cli.runs import check_out, check_run, explained, write_npz

__all__ = ["run"]

PROG = "jaxgen restore"


@dataclasses.dataclass(frozen=True)
class Restore:
    """Restore images that lost something, with a trained run as the only knowledge of them.

    The picture shows the truth, the measurement, and what was made of it, each with its peak
    signal-to-noise ratio; several keys also show where they differ. RED-diff descends on the image
    and gives a point; the others draw samples, of which that ratio says less.

    For example:

      jaxgen restore runs/digits-vp --task inpaint
      jaxgen restore runs/digits-vp --task super-resolve --method all --n 9
      jaxgen restore runs/digits-vp --task deblur --noise 0.05 --method dps --keys 8
      jaxgen restore runs/faces --task inpaint portrait.png --hide centre
    """

    dir: tyro.conf.Positional[Path]
    """The run's folder."""
    image: tyro.conf.Positional[Path | None] = None
    """An image of the run's size; without one, held-out images of the run."""
    task: Literal["inpaint", "super-resolve", "deblur"] = "inpaint"
    """What was done to the image, and is to be undone."""
    method: Literal["red_diff", "dps", "pigdm", "projection", "diffpir", "repaint", "all"] = (
        "red_diff"
    )
    """How; all are those that suit the task."""
    steps: int = 100
    """Noise levels, one evaluation of the network each; repaint takes a tenth of them, each ten
    times."""
    noise: float = 0.0
    """Standard deviation of the measurement's noise, images being in [-1, 1]."""
    keys: int = 1
    """Restorations of each image."""
    n: int = 16
    """Number of held-out images."""
    hide: Literal["right", "left", "top", "bottom", "centre", "random"] = "random"
    """With inpaint: the part that is hidden, or half of the pixels at random."""
    factor: int = 2
    """With super-resolve: pixels a side that were averaged into one."""
    blur: float = 0.7
    """With deblur: standard deviation of the blur in pixels."""
    seed: int = 0
    """Of everything drawn."""
    out: Path | None = None
    """A picture (.png) or the arrays (.npz); by default DIR/restored.png."""


def run(words: Sequence[str]) -> int:
    """Carry out ``jaxgen restore``."""
    args = parse(Restore, words, prog=PROG)
    check_run(args.dir)
    out = check_out(args.out or args.dir / "restored.png", (".png", ".npz"))
    if args.n < 1 or args.keys < 1 or args.steps < 1 or args.seed < 0:
        raise CommandError("give --n, --keys and --steps of at least 1, and --seed >= 0")
    if not 0 <= args.noise < float("inf") or not 0 < args.blur < float("inf"):
        raise CommandError(
            f"--noise is {args.noise:g} and --blur {args.blur:g}; give noise >= 0 and blur > 0, "
            "both finite"
        )
    if args.method == "repaint" and args.task != "inpaint":
        raise CommandError(f"--method repaint is for --task inpaint, not {args.task}")
    if args.image is not None and not args.image.is_file():
        raise CommandError(f"{args.image} is no file; give an image, or none for held-out ones")

    import jax

    from jaxgen.core.progress import meter
    from jaxgen.train.recipes import inverse
    from jaxgen.train.recipes.run import open_run

    trained = open_run(args.dir)
    data = trained.experiment.held_out
    if not data.is_image:
        raise CommandError(f"{args.dir} was trained on {data.name}, which holds no images")
    if args.image is None:
        truth = data.to_unit(data.x[: args.n])
    else:
        truth = inverse.read_image(args.image, data)[None]
    methods = inverse.suiting(args.task) if args.method == "all" else (args.method,)
    with explained():
        what = inverse.task(
            args.task,
            data.event,
            hide=args.hide,
            factor=args.factor,
            blur=args.blur,
            seed=args.seed,
        )
    with meter(len(methods), description="restoring", unit="method") as bar, explained():
        done = inverse.restore_images(
            jax.random.key(args.seed),
            trained.experiment,
            trained.params,
            truth,
            what,
            methods=methods,
            steps=args.steps,
            noise=args.noise,
            keys=args.keys,
            advance=lambda name: bar.update(1, method=name),
        )
    if out.suffix == ".npz":
        write_npz(out, **_arrays(done, data))
    else:
        inverse.draw(out, done)
    for name in methods:
        print(f"{name}: {_row(done.row(name), args.keys)}")
    images = str(args.image) if args.image else f"{len(truth)} held-out images"
    print(
        f"{out}: {images}, {done.words}, noise {args.noise:g}, by step {trained.step} (averaged "
        "parameters)"
    )
    return 0


def _arrays(done: Any, data: Any) -> dict[str, Any]:
    """Truth and restorations in the data's units; the measurement in [-1, 1]."""
    arrays = {"truth": data.from_unit(done.truth), "measured": done.measured}
    for name, out in done.made.items():
        arrays |= {name: data.from_unit(out.x), f"{name}_std": out.std}
    return arrays


def _row(row: dict[str, float], keys: int) -> str:
    several = (
        ""
        if keys == 1
        else (f"; mean of {keys} keys {row['psnr_mean']:.2f} dB, spread {row['spread']:.3g}")
    )
    return (
        f"{row['psnr']:.2f} dB (measured {row['measured']:.2f}), residual {row['residual']:.3g}, "
        f"{row['evaluations']} evaluations{several}"
    )
