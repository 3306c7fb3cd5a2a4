"""The archive of a search: a JSON line for every score, so that a search can go on.

The first line says which search it is: key, start population, and everything in the configuration
that candidates depend on. Lines are added in whole generations and flushed to the disk; a line that
a kill left unfinished is cut off.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgen.solve.evolution import identity
from jaxgen.solve.schedule import SolverSchedule
from jaxgen.solve.schedule_file import read_schedule, schedule_record

__all__ = ["Archive", "Entry", "fingerprint"]

FORMAT = "jaxgen schedule search"
VERSION = 1


class Entry(NamedTuple):
    """A scored schedule.

    Attributes:
      score: lower is better; infinite where the metric was not finite.
      origin: ``"start"``, ``"evolution"`` or ``"guided"``.
      schedule: of NumPy arrays.
    """

    score: float
    origin: str
    schedule: SolverSchedule


def fingerprint(
    key: jax.Array, population: Sequence[SolverSchedule], config: Any, made_for: str
) -> dict[str, Any]:
    """What must be the same for a search to be gone on with; the budget need not."""
    start = hashlib.sha256(b"".join(identity(s) for s in population)).hexdigest()
    settings = dataclasses.asdict(config)
    del settings["budget"]
    return {
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "start_population": start,
        "settings": json.loads(json.dumps(settings)),
        "made_for": made_for,
    }


class Archive:
    """A file of entries; without a path, nothing.

    Args:
      path: JSON lines.
      of: the search's ``fingerprint``.
    """

    def __init__(self, path: str | Path | None, of: dict[str, Any]):
        self._path = None if path is None else Path(path)
        self._head = {"format": FORMAT, "version": VERSION, **of}

    def read(self) -> list[Entry]:
        """The entries so far; a last line that is not whole is cut off the file.

        Raises:
          ValueError: the file is none of this search.
        """
        if self._path is None or not self._path.exists() or not self._path.stat().st_size:
            return []
        raw = self._path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        lines = whole.decode("utf-8", errors="replace").splitlines()
        if not lines and not raw.startswith(b'{"format": "' + FORMAT.encode()):
            raise ValueError(f"{self._path} holds no search; choose another file, or delete it")
        if lines:
            self._check_head(lines[0])
        entries = [self._entry(number, line) for number, line in enumerate(lines[1:], 2)]
        if len(whole) < len(raw):
            with open(self._path, "rb+") as file:
                file.truncate(len(whole))
        return entries

    def _check_head(self, line: str) -> None:
        try:
            head = json.loads(line)
        except json.JSONDecodeError:
            head = None
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise ValueError(f"{self._path} holds no search; choose another file, or delete it")
        differ = [name for name, value in self._head.items() if head.get(name) != value]
        if differ:
            raise ValueError(
                f"{self._path} holds another search ({', '.join(differ)} differ); choose another "
                "file, or delete it"
            )

    def _entry(self, number: int, line: str) -> Entry:
        try:
            record = json.loads(line)
            score = math.inf if record["score"] is None else float(record["score"])
            return Entry(score, str(record["origin"]), read_schedule(record["schedule"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self._path} is damaged at line {number} ({error}); delete it to start again"
            ) from None

    def append(self, entries: Sequence[Entry]) -> None:
        """Add entries, on the disk when this returns."""
        if self._path is None:
            return
        records: list[Any] = [
            {
                "score": e.score if math.isfinite(e.score) else None,
                "origin": e.origin,
                "schedule": schedule_record(e.schedule),
            }
            for e in entries
        ]
        if not self._path.exists() or not self._path.stat().st_size:
            records.insert(0, self._head)
        text = "".join(json.dumps(record) + "\n" for record in records)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
