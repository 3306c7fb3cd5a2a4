"""Schedules as JSON: a file that says what it was made for, checked when it is read.

Numbers are written so that they come back bit for bit; infinite knots as ``"inf"`` and ``"-inf"``,
which JSON has no numbers for.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.process.linear import LinearSDE
from jaxgen.solve.schedule import FIELDS, SolverSchedule, schedule_times, validate_schedule

__all__ = ["load_schedule", "read_schedule", "save_schedule", "schedule_record"]

FORMAT = "jaxgen solver schedule"
VERSION = 1
_INTEGERS = ("ptype", "order", "est_order", "relax_kind", "afs")
_BOOLEANS = ("corrector", "scale_corrector")


def schedule_record(schedule: SolverSchedule) -> dict[str, Any]:
    """A schedule as plain lists and numbers, for JSON."""
    record: dict[str, Any] = {name: np.asarray(getattr(schedule, name)).tolist() for name in FIELDS}
    record["lam"] = [v if math.isfinite(v) else str(v) for v in record["lam"]]
    return record | {"dtype": np.asarray(schedule.lam).dtype.name}


def read_schedule(record: Any) -> SolverSchedule:
    """The schedule of a ``schedule_record``, of NumPy arrays, validated.

    Raises:
      ValueError: what is missing, of another type, or no schedule.
    """
    if not isinstance(record, dict):
        raise ValueError(f"the schedule is a {type(record).__name__}; expected an object of fields")
    missing = [name for name in (*FIELDS, "dtype") if name not in record]
    if missing:
        raise ValueError(f"the schedule lacks {', '.join(missing)}")
    if record["dtype"] not in ("float32", "float64"):
        raise ValueError(f"dtype is {record['dtype']!r}; expected float32 or float64")
    schedule = SolverSchedule(**{name: _array(name, record) for name in FIELDS})
    # What types 2 and mean need is given when sampling.
    validate_schedule(schedule, statistics=True, x0_mean=0.0)
    return schedule


def _array(name: str, record: dict[str, Any]) -> np.ndarray:
    values = record[name]
    entries = values if isinstance(values, list) else [values]
    kinds: tuple[type, ...] = (float, int, str) if name == "lam" else (float, int)
    if name in _INTEGERS:
        kinds = (int,)
    elif name in _BOOLEANS:
        kinds = (bool,)
    is_right = all(
        isinstance(v, kinds) and (name in _BOOLEANS or not isinstance(v, bool)) for v in entries
    )
    if not is_right or any(isinstance(v, str) and v not in ("inf", "-inf") for v in entries):
        raise ValueError(f"{name} is {values!r}; expected {' or '.join(k.__name__ for k in kinds)}")
    if name in _INTEGERS:
        return np.asarray(values, np.int32)
    if name in _BOOLEANS:
        return np.asarray(values, bool)
    values = [float(v) for v in entries]
    return np.asarray(values, record["dtype"])


def save_schedule(
    path: str | os.PathLike[str],
    schedule: SolverSchedule,
    *,
    sde: LinearSDE | None = None,
    notes: dict[str, Any] | None = None,
) -> None:
    """Write a schedule and what it was made for, by rename.

    Args:
      path: a JSON file.
      schedule: one schedule.
      sde: the process that it was made for; its kind and the times of the ends are written.
      notes: anything more that JSON can hold; ``load_schedule`` does not read it.

    Raises:
      ValueError: it is no schedule, or the process does not reach its range.
      OSError: the file cannot be written.
    """
    validate_schedule(schedule, statistics=True, x0_mean=0.0)
    made_for: dict[str, Any] = {}
    if sde is not None:
        times = np.asarray(schedule_times(sde, schedule))
        made_for = {"process": sde.kind, "t_start": float(times[0]), "t_end": float(times[-1])}
    document = {
        "format": FORMAT,
        "version": VERSION,
        "steps": schedule.steps,
        "made_for": made_for,
        "schedule": schedule_record(schedule),
        "notes": notes or {},
    }
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_schedule(
    path: str | os.PathLike[str], *, sde: LinearSDE | None = None, steps: int | None = None
) -> SolverSchedule:
    """Read what ``save_schedule`` wrote, validated.

    Args:
      path: the file.
      sde: the process to sample; one of another kind, or out of reach of the schedule, is refused.
      steps: the number of steps that is expected.

    Returns:
      A schedule of NumPy arrays.

    Raises:
      ValueError: the file is no schedule, of a newer version, or made for something else.
      OSError: the file cannot be read.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path} holds no schedule; expected a file of save_schedule")
    if document.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {document.get('version')!r} of the format; expected {VERSION}, so "
            "read it with the release that wrote it"
        )
    try:
        schedule = read_schedule(document.get("schedule"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if steps is not None and schedule.steps != steps:
        raise ValueError(f"{path} has {schedule.steps} steps; expected {steps}")
    if sde is not None:
        made_for = document.get("made_for")
        kind = made_for.get("process") if isinstance(made_for, dict) else None
        if kind is not None and kind != sde.kind:
            raise ValueError(f"{path} was made for the process {kind}; this one is {sde.kind}")
        try:
            schedule_times(sde, schedule)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return schedule
