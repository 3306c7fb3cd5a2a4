"""Checkpoints: orbax writes the arrays in the background, a manifest vouches for them.

A save runs in this order, so that being killed at any moment loses at most the step being saved:
orbax copies the arrays to the host (the caller waits for this alone), writes them, renames its
folder; then every file is hashed and the manifest put in place by rename; then the steps beyond
``keep`` go, each one's manifest first. ``restore`` checks the manifest and every hash before orbax
reads anything, and casts nothing. No pickle anywhere.

Several processes save and restore together, in a folder that all of them see: each writes its own
parts of the arrays, process 0 the rest. What is saved knows nothing of where it lay: it comes back
on any number of devices and processes.
"""

import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding, SingleDeviceSharding

from jaxgen.core.checks import positive_int
from jaxgen.train import distributed, manifest
from jaxgen.train import layouts as shared_layouts
from jaxgen.train.manifest import (
    CheckpointError,
    CheckpointExists,
    CheckpointForeign,
    step_folder,
)

__all__ = ["Saver", "restore", "save"]


class Saver:
    """Saves steps to one folder, one at a time, in the background.

    Use it as a context manager, or call ``close``: it waits for the save under way.

    Args:
      directory: the checkpoints' folder, made if need be.
      config: plain values, or a dataclass of them, kept in every manifest.
      keep: how many of the newest steps to keep; ``None`` keeps all.
      layout: of shared parameters, from ``share.plan``, or several: kept in every manifest.

    Raises:
      OSError: the folder cannot be made.
      TypeError: ``config`` holds something that is not JSON.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        config: Any = None,
        keep: int | None = None,
        layout: Any = None,
    ):
        # Imported here: the library is used without checkpoints too, and orbax is slow to import.
        import orbax.checkpoint as ocp

        self.directory = Path(directory).absolute()
        self._config = manifest.plain(config)
        self._layouts = shared_layouts.as_tuple(layout)
        self._keep = None if keep is None else positive_int("keep", keep)
        self._thread: threading.Thread | None = None
        self._failed = self.directory
        self._error: BaseException | None = None
        distributed.first(lambda: self.directory.mkdir(parents=True, exist_ok=True))
        self._orbax = ocp.StandardCheckpointer()

    def save(self, state: Any) -> Path:
        """Start to save ``state`` under its ``step``; returns its folder before it is finished.

        Waits for the save before, and until the arrays are copied to the host: the state may then
        be donated. Every process must call it.

        Raises:
          CheckpointExists: that step is saved already.
          CheckpointForeign: its folder holds something else.
          OSError: the disk is full or cannot be written, now or in the save before.
        """
        self.wait()
        step = int(state.step)
        folder = step_folder(self.directory, step)
        leaves = manifest.named_leaves(state)
        # Orbax knows neither typed keys nor arrays without entries.
        arrays = {name: _key_data(leaf) for name, leaf in leaves.items() if leaf.size}
        try:
            distributed.first(lambda: _make_room(folder))
            self._orbax.save(folder / manifest.STATE, arrays)
        except Exception as error:
            _fail(error, folder)
        body: dict[str, Any] = {
            "step": step,
            "config": self._config,
            "leaves": manifest.describe(leaves),
            "keys": {k: str(jax.random.key_impl(v)) for k, v in leaves.items() if _is_key(v)},
        }
        if self._layouts:
            body["layout"] = shared_layouts.entries(self._layouts)
        self._thread = threading.Thread(
            target=self._finish, args=(folder, body), name="jaxgen-save"
        )
        self._thread.start()
        return folder

    def _finish(self, folder: Path, body: dict[str, Any]) -> None:
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                manifest.write_manifest(folder, body)
                manifest.sync_folder(self.directory)
                _prune(self.directory, self._keep, body["step"])
        except BaseException as error:
            self._error = error
            self._failed = folder

    def wait(self) -> None:
        """Wait for the save under way, and raise what went wrong in it.

        With several processes all of them wait for one another: then the step is safely on disk.

        Raises:
          OSError: the disk is full or cannot be written.
          DistributedError: another process could not save.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        try:
            distributed.join_errors(error)
        except Exception as raised:
            _fail(raised, self._failed)

    def close(self) -> None:
        """Wait as ``wait`` does and release orbax's threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        # After an error the others may never come to where a save ends.
        if kind is None or jax.process_count() == 1:
            self.close()


def save(
    directory: str | os.PathLike[str],
    state: Any,
    *,
    config: Any = None,
    keep: int | None = None,
    layout: Any = None,
) -> Path:
    """Save ``state`` under its ``step`` and wait until it is safely on disk.

    Args:
      directory: the checkpoints' folder, made if need be; each step gets a folder in it.
      state: a ``TrainState``, or any pytree of arrays with an integer ``step``.
      config: plain values, or a dataclass of them, kept in the manifest.
      keep: how many of the newest steps to keep; ``None`` keeps all.
      layout: of shared parameters, from ``share.plan``, kept in the manifest; several where pools
        are nested, the outermost first. What is saved is ``state`` as it is: the pools.

    Returns:
      The step's folder.

    Raises:
      CheckpointExists: that step is saved already; nothing is overwritten.
      CheckpointForeign: the step's folder holds something else.
      OSError: the disk is full or cannot be written; the half-written step is removed.
    """
    with Saver(directory, config=config, keep=keep, layout=layout) as saver:
        return saver.save(state)


def restore(
    directory: str | os.PathLike[str],
    like: Any,
    *,
    sharding: Any = None,
    step: int | None = None,
    layout: Any = None,
) -> Any:
    """Read a saved step back, bit for bit, onto any devices; every process must call it.

    Args:
      directory: the checkpoints' folder.
      like: a pytree of arrays or ``jax.ShapeDtypeStruct``s, for instance
        ``jax.eval_shape(TrainState.create, ...)``; its values are not used.
      sharding: one sharding for every leaf, or a pytree of them that is a prefix of ``like``'s.
        Default: the sharding of each leaf of ``like``, and the first device where it has none.
      step: default: the newest finished one.
      layout: of shared parameters, as for ``save``: compared with the one saved. Without it a
        checkpoint that holds a layout comes back with a warning.

    Returns:
      A tree like ``like`` with the saved values.

    Raises:
      CheckpointMissing: there is no such finished step.
      CheckpointTruncated, CheckpointDamaged: the bytes are not those written; the message names
        the newest step that still holds.
      CheckpointForeign: jaxgen did not write it.
      CheckpointMismatch: it holds other paths, shapes or dtypes, which the message names, or
        another layout: both fingerprints and what differs.
    """
    import orbax.checkpoint as ocp

    leaves = manifest.named_leaves(like)
    body = manifest.read_manifest(directory, step)
    folder = step_folder(directory, body["step"]).absolute()
    shared_layouts.check(body, shared_layouts.as_tuple(layout), folder)
    manifest.compare_leaves(body["leaves"], manifest.describe(leaves), folder)
    with manifest.offering(directory):
        distributed.everywhere(
            lambda: manifest.verify_files(
                folder, body, part=jax.process_index(), parts=jax.process_count()
            )
        )

    treedef = jax.tree.structure(like)
    if sharding is None or isinstance(sharding, Sharding):
        shardings = [sharding] * len(leaves)
    else:
        shardings = jax.tree.leaves(jax.tree.broadcast(sharding, like))
    wanted = dict(zip(leaves, shardings, strict=True))
    abstract = {name: _abstract(leaf, wanted[name]) for name, leaf in leaves.items() if leaf.size}
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(folder / manifest.STATE, abstract)
    return jax.tree.unflatten(
        treedef,
        [
            _as_saved(arrays.get(name), leaf, wanted[name], body["keys"].get(name))
            for name, leaf in leaves.items()
        ],
    )


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _placement(leaf: Any, sharding: Sharding | None) -> Sharding:
    found = sharding or getattr(leaf, "sharding", None)
    return found or SingleDeviceSharding(jax.local_devices()[0])


def _abstract(leaf: Any, sharding: Sharding | None) -> jax.ShapeDtypeStruct:
    raw = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=_placement(leaf, sharding))


def _as_saved(array: Any, leaf: Any, sharding: Sharding | None, generator: str | None) -> Any:
    if array is None:
        return jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), _placement(leaf, sharding))
    return array if generator is None else jax.random.wrap_key_data(array, impl=generator)


def _make_room(folder: Path) -> None:
    _clear_unfinished(folder)
    folder.mkdir(exist_ok=True)


def _is_ours(entry: Path) -> bool:
    return entry.name.startswith((manifest.STATE, manifest.NAME + "."))


def _clear_unfinished(folder: Path) -> None:
    """Remove what a killed save left in a step's folder, and nothing else."""
    if not folder.exists():
        return
    if (folder / manifest.NAME).exists():
        raise CheckpointExists(
            f"{folder} is a finished checkpoint; nothing is overwritten: choose another folder, or "
            "move it away"
        )
    if not folder.is_dir() or not all(map(_is_ours, folder.iterdir())):
        raise CheckpointForeign(
            f"{folder} is in the way and was not written by jaxgen; move it away"
        )
    shutil.rmtree(folder)


def _prune(directory: Path, keep: int | None, step: int) -> None:
    """Remove unfinished steps before ``step``, and finished ones beyond the newest ``keep``."""
    saved = manifest.saved_steps(directory)
    old = set() if keep is None else set(saved[:-keep]) - {step}
    for number, folder in manifest.step_folders(directory).items():
        if number in old:
            # Manifest first: killed in between, what is left is an unfinished step.
            (folder / manifest.NAME).unlink()
            shutil.rmtree(folder)
        elif number not in saved and number < step and all(map(_is_ours, folder.iterdir())):
            shutil.rmtree(folder)


def _fail(error: BaseException, folder: Path) -> None:
    """Remove the half-written step and raise; a failed write becomes an ``OSError`` with path."""
    if isinstance(error, CheckpointError):
        raise error
    if jax.process_index() == 0 and not (folder / manifest.NAME).exists():
        shutil.rmtree(folder, ignore_errors=True)
    if isinstance(error, OSError):
        raise OSError(
            error.errno, f"cannot save the checkpoint: {error.strerror or error}", str(folder)
        ) from error
    # Tensorstore, which writes orbax's files, puts the number into its message.
    found = re.search(r"os_error_code='(\d+)'", str(error))
    if found:
        code = int(found[1])
        raise OSError(
            code, f"cannot save the checkpoint: {os.strerror(code)}", str(folder)
        ) from error
    raise error
