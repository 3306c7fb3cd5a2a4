"""The manifest beside every saved step: what a checkpoint holds, and the proof that it still does.

Orbax restores a flipped bit and casts a wrong dtype without a word. So each step's folder has a
``manifest.json`` with the tree's paths, shapes and dtypes, the size and SHA-256 of every file, the
run's config, and a SHA-256 of all this. It is put in place by rename after everything else is on
disk: a folder without it is an unfinished save and counts as nothing.

Layout::

    checkpoints/step_00000300/state/         what orbax wrote
    checkpoints/step_00000300/manifest.json  written last, removed first
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

__all__ = [
    "CheckpointDamaged",
    "CheckpointError",
    "CheckpointExists",
    "CheckpointForeign",
    "CheckpointMismatch",
    "CheckpointMissing",
    "CheckpointTruncated",
    "latest_valid",
    "read_manifest",
    "saved_steps",
]

NAME = "manifest.json"
STATE = "state"
FORMAT = "jaxgen checkpoint"
VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint cannot be used or written; the subclass says why, the message what to do."""


class CheckpointMissing(CheckpointError):
    """There is no finished checkpoint where one was asked for."""


class CheckpointExists(CheckpointError):
    """A finished checkpoint stands where one should be written; nothing is overwritten."""


class CheckpointForeign(CheckpointError):
    """The folder holds something that this library did not write, or a newer version did."""


class CheckpointDamaged(CheckpointError):
    """The bytes on disk are not the ones that were written."""


class CheckpointTruncated(CheckpointDamaged):
    """A file is missing or shorter than it was written."""


class CheckpointMismatch(CheckpointError):
    """The checkpoint is sound but holds another tree, shape or dtype than was asked for."""


def step_folder(directory: str | os.PathLike[str], step: int) -> Path:
    """The folder of one step."""
    return Path(directory) / f"step_{step:08d}"


def step_folders(directory: str | os.PathLike[str]) -> dict[int, Path]:
    """All step folders by step, ascending, finished or not."""
    directory = Path(directory)
    if not directory.is_dir():
        return {}
    found = ((re.fullmatch(r"step_(\d{8,})", p.name), p) for p in directory.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def saved_steps(directory: str | os.PathLike[str]) -> list[int]:
    """The steps whose save was finished, ascending; their files are not checked."""
    return [step for step, path in step_folders(directory).items() if (path / NAME).exists()]


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree by path, such as ``"params/dense/kernel"``.

    Raises:
      ValueError: two leaves have the same path (a name with a slash in it).
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in leaves:
            raise ValueError(f"two leaves of the state have the path {name!r}; rename one")
        leaves[name] = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return leaves


def describe(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Shape and dtype of every leaf, as the manifest holds them."""
    return {
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in leaves.items()
    }


def plain(config: Any) -> Any:
    """``config`` as JSON would give it back: dataclasses and tuples become objects and lists.

    Raises:
      TypeError: something in it is no plain value.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    return json.loads(json.dumps(config))


def _files(folder: Path) -> list[Path]:
    found = (path for path in (folder / STATE).rglob("*") if path.is_file())
    return sorted(found)


def _digest(path: Path, *, sync: bool = False) -> str:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
    return digest


def _checksum(body: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in body.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Put ``text`` at ``path`` by rename, so that a reader sees the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Ask the disk to keep a folder's entries; systems that cannot open one are left alone."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_manifest(folder: Path, body: Mapping[str, Any]) -> None:
    """Hash every file of a step and put its manifest in place.

    Args:
      folder: the step's folder.
      body: ``step``, ``config``, ``leaves`` (from ``describe``), ``keys`` (the generators of
        typed keys, by path) and, where parameters are shared, ``layout``.
    """
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": _digest(path, sync=True),
        }
        for path in _files(folder)
    }
    full: dict[str, Any] = {"format": FORMAT, "version": VERSION, **body, "files": files}
    full["sha256"] = _checksum(full)
    replace_text(folder / NAME, json.dumps(full, indent=1))


def read_manifest(directory: str | os.PathLike[str], step: int | None = None) -> dict[str, Any]:
    """The manifest of a step: ``step``, ``config``, ``leaves``, ``files``.

    Args:
      directory: the checkpoints' folder.
      step: default: the newest finished one.

    Raises:
      CheckpointMissing: no such finished step.
      CheckpointForeign: the file is not one of ours, or of a newer version.
      CheckpointDamaged: the file was changed after it was written.
    """
    with offering(directory):
        return _read(directory, step)


@contextlib.contextmanager
def offering(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Add the newest step that holds to the message of an error about another one."""
    try:
        yield
    except CheckpointMissing:
        raise
    except CheckpointError as error:
        step = latest_valid(directory)
        offer = f"No other step in {directory} holds."
        if step is not None:
            offer = (
                f"The newest step that holds is {step}: restore it by step={step}, or move the "
                "newer folders away and go on from there."
            )
        raise type(error)(f"{error}\n{offer}") from None


def _read(directory: str | os.PathLike[str], step: int | None) -> dict[str, Any]:
    steps = saved_steps(directory)
    if step is None and steps:
        step = steps[-1]
    if step is None or step not in steps:
        have = ", ".join(map(str, steps)) or "none"
        what = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise CheckpointMissing(f"no finished {what} in {directory}; finished steps there: {have}")
    path = step_folder(directory, step) / NAME
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointDamaged(f"{path} is no longer JSON ({error})") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CheckpointForeign(f"{path} was not written by jaxgen; nothing was read")
    if body.get("sha256") != _checksum(body):
        raise CheckpointDamaged(f"{path} was changed after it was written: its SHA-256 differs")
    if body["version"] > VERSION:
        raise CheckpointForeign(
            f"{path} has format version {body['version']}; this jaxgen knows up to {VERSION}, "
            "so a newer one is needed"
        )
    return body


def verify_files(folder: Path, body: Mapping[str, Any], *, part: int = 0, parts: int = 1) -> None:
    """Check the files of a step against its manifest: all of them, or one of ``parts`` shares.

    Raises:
      CheckpointTruncated: a file is missing or shorter than written.
      CheckpointDamaged: a file has other bytes than were written.
    """
    for name, entry in list(body["files"].items())[part::parts]:
        path = folder / name
        if not path.is_file():
            raise CheckpointTruncated(f"{path} is missing")
        size = path.stat().st_size
        if size < entry["bytes"]:
            raise CheckpointTruncated(
                f"{path} is truncated: {size} bytes where {entry['bytes']} were written"
            )
        if size > entry["bytes"] or _digest(path) != entry["sha256"]:
            raise CheckpointDamaged(f"{path} is damaged: its SHA-256 is not the one written")


def compare_leaves(saved: Mapping[str, Any], wanted: Mapping[str, Any], where: Path) -> None:
    """Check that two trees have the same paths, shapes and dtypes.

    Raises:
      CheckpointMismatch: naming each path that differs.
    """
    lines = [f"  {name}: missing from the checkpoint" for name in wanted if name not in saved]
    lines += [f"  {name}: in the checkpoint only" for name in saved if name not in wanted]
    for name in wanted:
        if name in saved and saved[name] != wanted[name]:
            have, want = (f"{d['dtype']}{d['shape']}" for d in (saved[name], wanted[name]))
            lines.append(f"  {name}: {have} in the checkpoint, {want} asked for")
    if lines:
        shown = lines[:20] + ([f"  and {len(lines) - 20} more"] if len(lines) > 20 else [])
        raise CheckpointMismatch(
            f"{where} holds another tree than was asked for; ask for the network, optimiser and "
            "precision that the run was started with (nothing is cast):\n" + "\n".join(shown)
        )


def latest_valid(directory: str | os.PathLike[str]) -> int | None:
    """The newest step whose manifest and files all hold, or ``None``; reads every byte of it."""
    for step in reversed(saved_steps(directory)):
        with contextlib.suppress(CheckpointError):
            verify_files(step_folder(directory, step), _read(directory, step))
            return step
    return None
