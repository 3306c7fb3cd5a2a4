"""Text as examples of one length: where it comes from, its characters, what is held out.

The text is cut into stretches, of which some, whole, are held out: no held-out character is seen in
training, not even as another's neighbour, but at the ends of a stretch. Training examples overlap
(they start at every quarter of a length), held-out ones do not. The vocabulary is the characters of
the training text; others are one more token, shown as U+FFFD.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.train.data import DataError, Dataset
from jaxgen.train.manifest import replace_text

__all__ = [
    "UNKNOWN",
    "Text",
    "Vocabulary",
    "is_text",
    "load_text",
    "read_vocabulary",
    "write_vocabulary",
]

UNKNOWN = "\ufffd"
NAME = "text.json"

_PREFIX = "text:"
_STRETCHES = 40
# Examples that a text must fill at least.
_LEAST = 40


def is_text(name: str) -> bool:
    """Whether this names text: ``text``, or ``text:FILE``."""
    return name == "text" or name.startswith(_PREFIX)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The characters of a run, and which text they are of.

    Attributes:
      characters: in order of their ids, without the unknown one, which comes last.
      sha256: of the whole text in UTF-8.
      length: characters in one example.
    """

    characters: str
    sha256: str
    length: int

    def __len__(self) -> int:
        return len(self.characters) + 1

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 ``(len(text),)``; an unknown character gets the last one."""
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        known = np.frombuffer(self.characters.encode("utf-32-le"), np.uint32)
        place = np.clip(np.searchsorted(known, points), 0, len(known) - 1)
        return np.where(known[place] == points, place, len(known)).astype(np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of ids; what is no character is U+FFFD."""
        n = len(self.characters)
        return "".join(self.characters[i] if 0 <= i < n else UNKNOWN for i in tokens)


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """A text, encoded and split.

    Attributes:
      vocabulary: its characters.
      characters: how many it has in all.
      train: examples ``(n, length)`` to learn, overlapping.
      held_out: examples that share no character with those.
      train_tokens: the stretches that are learned, one after another, ``(m,)``.
      held_out_tokens: those that are not.
    """

    vocabulary: Vocabulary
    characters: int
    train: Dataset
    held_out: Dataset
    train_tokens: np.ndarray
    held_out_tokens: np.ndarray


def load_text(name: str, *, length: int, held_out: float, seed: int) -> Text:
    """Load a text and split it.

    Args:
      name: ``"text"`` for the help topics of this Python (``pydoc_data.topics``, joined in the
        order of their names; other versions have other texts), or ``"text:FILE"`` for a file in
        UTF-8.
      length: characters in one example.
      held_out: share of the text kept from training, in (0, 1).
      seed: of which stretches those are.

    Raises:
      DataError: no such file, not UTF-8, or too short.
    """
    text = _standard_library() if name == "text" else _read(name.removeprefix(_PREFIX))
    if len(text) < _LEAST * length:
        raise DataError(
            f"{name} holds {len(text)} characters; expected at least {_LEAST * length}, "
            f"{_LEAST} examples of {length}: give a longer text, or a smaller --length"
        )
    # Whole examples, so that a stretch holds out what it says.
    count = min(_STRETCHES, len(text) // (2 * length))
    borders = np.linspace(0, len(text), count + 1).astype(int)
    stretches = [text[a:b] for a, b in itertools.pairwise(borders)]
    order = np.random.default_rng([seed, 0x7E87]).permutation(count)
    kept_back = set(order[: min(max(round(held_out * count), 1), count - 1)].tolist())
    learned = [s for i, s in enumerate(stretches) if i not in kept_back]
    hidden = [s for i, s in enumerate(stretches) if i in kept_back]
    characters = "".join(sorted(set("".join(learned)) - {UNKNOWN}))
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    vocabulary = Vocabulary(characters, digest, length)
    if len(characters) < 2:
        raise DataError(f"{name} holds the one character {characters!r}; expected text that varies")

    def examples(parts: list[str], stride: int) -> Dataset:
        windows = [
            np.lib.stride_tricks.sliding_window_view(_tokens(vocabulary, part), length)[::stride]
            for part in parts
        ]
        return Dataset(name, np.concatenate(windows), levels=len(vocabulary))

    return Text(
        vocabulary,
        len(text),
        examples(learned, max(1, length // 4)),
        examples(hidden, length),
        np.concatenate([_tokens(vocabulary, part) for part in learned]),
        np.concatenate([_tokens(vocabulary, part) for part in hidden]),
    )


def _tokens(vocabulary: Vocabulary, text: str) -> np.ndarray:
    """Ids in the smallest dtype that holds them and the mask."""
    return vocabulary.encode(text).astype(np.min_scalar_type(len(vocabulary)))


def _standard_library() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            "this Python comes without pydoc_data.topics; give a text of your own, --data text:FILE"
        ) from None
    return "\n\n".join(topics[name] for name in sorted(topics))


def _read(file: str) -> str:
    path = Path(file).expanduser()
    if not file or not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise DataError(f"text file {file!r} {what}; give one in UTF-8, as --data text:FILE")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not text in UTF-8 (byte {data[error.start]:#04x} at {error.start}); "
            "convert it first"
        ) from None
    if "\0" in text:
        raise DataError(f"{file} holds zero bytes, so it is no text in UTF-8; convert it first")
    return text.replace("\r\n", "\n").replace("\r", "\n")


# --- the vocabulary in a run's folder -----------------------------------------------------------


def write_vocabulary(out: Path, vocabulary: Vocabulary) -> None:
    """Keep the vocabulary in a run's folder, so that samples can be read without the text."""
    body = dataclasses.asdict(vocabulary)
    replace_text(out / NAME, json.dumps(body, indent=1) + "\n")


def read_vocabulary(out: Path) -> Vocabulary | None:
    """The vocabulary of the run in a folder, ``None`` if it has none.

    Raises:
      DataError: it cannot be read.
    """
    path = out / NAME
    if not path.exists():
        return None
    try:
        body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = Vocabulary(str(body["characters"]), str(body["sha256"]), int(body["length"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no vocabulary of a run any more ({error})") from None
    return found
