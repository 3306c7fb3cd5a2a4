"""``jaxgen inpaint``: hide part of held-out images and fill it in."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from jaxgen.cli.errors import CommandError
from jaxgen.cli.flags import parse
from jaxgen.cli.runs import check_out, check_run, explained, write_npz

__all__ = ["run"]

PROG = "jaxgen inpaint"


@dataclasses.dataclass(frozen=True)
class Inpaint:
    """Hide part of held-out images and let a trained run fill it in, with a corrector.

    The picture shows the images, what was left of them, and completions.

    For example:

      jaxgen inpaint runs/digits-vp
      jaxgen inpaint runs/digits-vp --hide top --n 30 --steps 200 --out top.png
    """

    dir: tyro.conf.Positional[Path]
    """The run's folder."""
    n: int = 20
    """Number of held-out images."""
    hide: Literal["right", "left", "top", "bottom", "centre", "random"] = "right"
    """The part that is hidden: a half, the middle, or half of the pixels at random."""
    steps: int = 100
    """Predictor steps, each with one corrector step."""
    snr: float = 0.16
    """Signal-to-noise ratio of the corrector."""
    seed: int = 0
    """Of the noise, and of the pixels hidden at random."""
    out: Path | None = None
    """A picture (.png) or the arrays (.npz); by default DIR/inpainted.png."""


def known_pixels(hide: str, event: tuple[int, ...], seed: int) -> np.ndarray:
    """The mask of what is left, float32 like one image: 1 known, 0 hidden."""
    height, width, _ = event
    mask = np.ones(event, np.float32)
    if hide == "right":
        mask[:, width // 2 :] = 0
    elif hide == "left":
        mask[:, : width // 2] = 0
    elif hide == "top":
        mask[: height // 2] = 0
    elif hide == "bottom":
        mask[height // 2 :] = 0
    elif hide == "centre":
        mask[height // 4 : height - height // 4, width // 4 : width - width // 4] = 0
    else:
        mask[
            np.random.default_rng(seed).permutation(height * width).reshape(height, width) % 2 > 0
        ] = 0
    return mask


def run(words: Sequence[str]) -> int:
    """Carry out ``jaxgen inpaint``."""
    args = parse(Inpaint, words, prog=PROG)
    check_run(args.dir)
    out = check_out(args.out or args.dir / "inpainted.png", (".png", ".npz"))
    if args.n < 1 or args.steps < 2 or args.seed < 0 or not args.snr > 0:
        raise CommandError("give --n of at least 1, --steps of at least 2, --seed >= 0, --snr > 0")

    import jax

    from jaxgen import guide, solve
    from jaxgen.train.recipes import pictures
    from jaxgen.train.recipes.run import open_run

    trained = open_run(args.dir)
    experiment = trained.experiment
    data = experiment.held_out
    if not data.is_image:
        raise CommandError(f"{args.dir} was trained on {data.name}, which holds no images")
    real = data.to_unit(data.x[: args.n])
    mask = known_pixels(args.hide, data.event, args.seed)

    @jax.jit
    def fill(key: jax.Array, params: Any, y: jax.Array) -> Any:
        return guide.inpaint(
            key,
            experiment.field(params),
            experiment.sde,
            y,
            mask,
            corrector=solve.langevin_corrector(snr=args.snr, norms="per_sample"),
            steps=args.steps,
            prediction=experiment.prediction,
        )

    with explained():
        sample = fill(jax.random.key(args.seed), trained.params, real)
    made = data.from_unit(np.where(mask[None] > 0, real, np.asarray(sample.x)))
    if out.suffix == ".npz":
        write_npz(out, x=data.x[: args.n], mask=mask, inpainted=made)
    else:
        columns = max(1, round(len(real) ** 0.5))
        grey = np.where(mask[None] > 0, real, 0.0)
        panels = [("held out", real), ("known", grey), ("filled in", data.to_unit(made))]
        pictures.draw_grid(out, panels, columns=columns)
    print(
        f"{out}: {len(real)} held-out images, {args.hide} hidden, by step {trained.step} "
        f"(averaged parameters), {args.steps} predictor and corrector steps, "
        f"{int(np.max(sample.nfe))} evaluations"
    )
    return 0
