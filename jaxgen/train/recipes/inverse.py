"""A trained run as the prior of inverse problems: images inpainted, made larger, deblurred.

The network is that of the run and knows nothing of the task. Settings of the methods are those of
``guide``, but for RED-diff's weight and rate, which are the best ones on digits under their own
mixture as the prior (``tests/claims/test_red_diff.py``).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxgen.core.keys import normal
from jaxgen.guide import operators
from jaxgen.guide.restore import METHODS, Spread, restore_many
from jaxgen.train.data import DataError, Dataset
from jaxgen.train.recipes import pictures
from jaxgen.train.recipes.score import Experiment

__all__ = ["TASKS", "Restoration", "draw", "psnr", "read_image", "restore_images", "task"]

TASKS = ("inpaint", "super-resolve", "deblur")

# Evaluations of a step of ``repaint``.
_REPEATS = 10
_RED_DIFF: dict[str, Any] = {"weight": 0.05, "optimizer": optax.adam(0.05, b1=0.9, b2=0.99)}


class Task(NamedTuple):
    """What is done to an image, and in words."""

    operator: operators.Operator
    words: str


def task(
    name: str, event: tuple[int, ...], *, hide: str, factor: int, blur: float, seed: int
) -> Task:
    """The operator of a task.

    Args:
      name: one of ``TASKS``.
      event: ``(height, width, channels)``.
      hide: for ``"inpaint"``, a side, ``"centre"`` or ``"random"``.
      factor: for ``"super-resolve"``, pixels a side that are averaged.
      blur: for ``"deblur"``, the kernel's deviation in pixels.
      seed: of the pixels hidden at random.

    Raises:
      ValueError: an unknown name, or images that the task does not suit.
    """
    height, width, _ = event
    if name == "inpaint":
        parts: dict[str, Any] = {
            "right": np.s_[:, width // 2 :],
            "left": np.s_[:, : width // 2],
            "top": np.s_[: height // 2],
            "bottom": np.s_[height // 2 :],
            "centre": np.s_[height // 4 : height - height // 4, width // 4 : width - width // 4],
        }
        seen = np.ones((height, width, 1), np.float32)
        if hide == "random":
            order = np.random.default_rng(seed).permutation(height * width)
            seen[order.reshape(height, width, 1) % 2 > 0] = 0
        elif hide in parts:
            seen[parts[hide]] = 0
        else:
            raise ValueError(f"hide is {hide!r}; expected one of {', '.join((*parts, 'random'))}")
        where = "half of the pixels" if hide == "random" else hide
        return Task(operators.mask(seen), f"inpaint ({where} hidden)")
    if name == "super-resolve":
        if factor < 2 or height % factor or width % factor:
            raise ValueError(
                f"factor is {factor}; expected a number of at least 2 that divides {height} x "
                f"{width} pixels"
            )
        return Task(operators.average_pool(factor), f"super-resolve ({factor} times)")
    if name == "deblur":
        reach = 2 * int(np.ceil(3 * blur)) + 1 if blur > 0 else 1
        # The largest odd kernel that the image has room for.
        size = min(reach, min(height, width) - (min(height, width) + 1) % 2)
        return Task(operators.gaussian_blur(blur, size=size), f"deblur ({blur:g} pixels)")
    raise ValueError(f"task is {name!r}; expected one of {', '.join(TASKS)}")


def read_image(path: Path, data: Dataset) -> np.ndarray:
    """An image file as one example of a data set, float32 in [-1, 1].

    Raises:
      DataError: it cannot be read, has another size, or the data are in units of their own.
    """
    if data.levels is None:
        raise DataError(
            f"{data.name} holds images of floats, whose units {path} does not have; leave it out "
            "for held-out images"
        )
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise DataError("reading images needs Pillow: pip install pillow") from None
    height, width, channels = data.event
    try:
        with Image.open(path) as image:
            found = image.size
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"), np.float32)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from None
    if found != (width, height):
        raise DataError(
            f"{path} has {found[0]} x {found[1]} pixels and the run's images {width} x {height}; "
            "give an image of that size"
        )
    return ((2 * pixels + 1) / 256 - 1).reshape(data.event)


def psnr(x: ArrayLike, truth: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], clipped; over the last three axes."""
    error = np.clip(np.asarray(x, float), -1, 1) - np.asarray(truth, float)
    return 10 * np.log10(4 / np.maximum(np.mean(error**2, axis=(-3, -2, -1)), 1e-12))


class Restoration(NamedTuple):
    """Images, what was measured of them, and what was made of that.

    Attributes:
      words: the task.
      truth: ``(n, h, w, c)`` in [-1, 1].
      measured: ``(n, *measurement)``, on the same scale.
      shown: the measurement as images.
      made: by method.
    """

    words: str
    truth: np.ndarray
    measured: np.ndarray
    shown: np.ndarray
    made: dict[str, Spread]

    def row(self, method: str) -> dict[str, float]:
        """Means over images of a method.

        ``psnr`` in dB, ``residual`` and ``evaluations`` are those of one restoration; ``psnr_mean``
        that of their mean over keys, ``spread`` their deviation, ``measured`` the measurement's dB.
        """
        out = self.made[method]
        return {
            "psnr": float(psnr(out.x, self.truth[None]).mean()),
            "psnr_mean": float(psnr(out.mean, self.truth).mean()),
            "spread": float(np.mean(out.std)),
            "residual": float(np.mean(out.residual)),
            "evaluations": int(out.nfe) // len(out.x),
            "measured": float(psnr(self.shown, self.truth).mean()),
        }


def _options(method: str, steps: int, noise: float) -> dict[str, Any]:
    if method == "red_diff":
        return {"steps": steps, **_RED_DIFF}
    if method == "repaint":
        return {"steps": max(1, steps // _REPEATS), "repeats": _REPEATS, "sigma_y": noise}
    return {"steps": steps, "sigma_y": noise}


def restore_images(
    key: jax.Array,
    experiment: Experiment,
    params: Any,
    truth: np.ndarray,
    what: Task,
    *,
    methods: Sequence[str] = ("red_diff",),
    steps: int = 100,
    noise: float = 0.0,
    keys: int = 1,
    advance: Callable[[str], None] | None = None,
) -> Restoration:
    """Measure images and restore them by a run's network.

    Args:
      key: typed key; image ``i`` and its noise draw from ``fold_in(.., i)``.
      experiment: what was trained.
      params: parameters of the network, usually the averaged ones.
      truth: images ``(n, h, w, c)`` in [-1, 1].
      what: the task.
      methods: of ``guide.restore.METHODS``.
      steps: noise levels; ``repaint`` takes a tenth of them, each ten times.
      noise: standard deviation of the measurement's noise, on that scale.
      keys: restorations of each image.
      advance: called with each method's name when it is done.

    Raises:
      ValueError: what the methods raise.
      TypeError: a method that does not suit the task.
    """
    key_noise, key_run = jax.random.split(key)
    operator = what.operator
    # Equally spaced times, as published, where time is of the published kind.
    is_timed = experiment.config.process in ("vp", "sub_vp", "cosine", "rectified")

    @jax.jit
    def measure(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        clean = jax.vmap(operator)(x)
        y = clean + noise * normal(key_noise, clean.shape)
        y = jax.vmap(operator.observed)(y)
        return y, y if y.shape == x.shape else jax.vmap(operator.pinv)(y)

    y, shown = measure(jnp.asarray(truth))
    made = {}
    for method in methods:
        options = {
            "method": method,
            "grid": "time" if is_timed else "log_snr",
            "prediction": experiment.prediction,
            **_options(method, steps, noise),
        }

        def run(key: jax.Array, params: Any, y: jax.Array, options: Any = options) -> Spread:
            field = experiment.field(params)
            return restore_many(key, field, experiment.sde, y, operator, keys, **options)

        made[method] = jax.tree.map(np.asarray, jax.jit(run)(key_run, params, y))
        if advance is not None:
            advance(method)
    return Restoration(what.words, truth, np.asarray(y), np.asarray(shown), made)


def suiting(name: str) -> tuple[str, ...]:
    """The methods that suit a task."""
    return tuple(m for m in METHODS if m != "repaint" or name == "inpaint")


def draw(path: Path, done: Restoration) -> None:
    """The picture: truth, measurement, restorations, and their mean and spread if several.

    Raises:
      OSError: the file cannot be written.
    """
    before = psnr(done.shown, done.truth).mean()
    columns = max(1, round(len(done.truth) ** 0.5))
    rows: list[list[tuple[str, Any]]] = [
        [("truth", done.truth), (f"measured, {before:.1f} dB", done.shown)]
    ]
    for name, out in done.made.items():
        row = done.row(name)
        panels: list[tuple[str, Any]] = [
            (f"{name}, {row['psnr']:.1f} dB, {row['evaluations']} evaluations", out.x[0])
        ]
        if len(out.x) > 1:
            largest = max(float(out.std.max()), 1e-6)
            panels += [
                (f"mean of {len(out.x)}, {row['psnr_mean']:.1f} dB", out.mean),
                (f"spread, white {largest:.2g}", 2 * out.std / largest - 1),
            ]
        # One restoration each: side by side, three in a row.
        if len(out.x) == 1 and (len(rows[-1]) < 3 or len(done.made) == 1):
            rows[-1] += panels
        else:
            rows.append(panels)
    wide = max(map(len, rows))
    figure = pictures._figure(3.6 * wide, 3.9 * len(rows) + 0.3)
    figure.suptitle(done.words)
    grid = figure.subplots(len(rows), wide, squeeze=False)
    for axes, panels in zip(grid, rows, strict=True):
        for one in axes:
            one.axis("off")
        for one, (title, images) in zip(axes, panels, strict=False):
            sheet = pictures.mosaic(np.clip((np.nan_to_num(images) + 1) / 2, 0, 1), columns)
            if sheet.shape[-1] == 1:
                one.imshow(sheet[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            else:
                one.imshow(sheet, interpolation="nearest")
            one.set_title(title, fontsize=10)
    pictures._save(figure, path)
