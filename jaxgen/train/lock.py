"""A run's folder belongs to one run at a time.

The lock is the kernel's (``flock``) on the file ``.lock`` in the folder: it goes with the process
that holds it, however that one ends, so that a run that was killed never stands in its own way. The
file's text says who holds it. Where a file system knows no such locks nothing is locked.
"""

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["NAME", "FolderBusy", "hold", "is_empty", "text"]

NAME = ".lock"


class FolderBusy(RuntimeError):
    """Another run is at work in the folder."""


def is_empty(folder: Path) -> bool:
    """Whether nothing is in a folder but what a killed run's lock left."""
    return all(entry.name == NAME for entry in folder.iterdir())


def text(folder: Path) -> str:
    """Who holds a folder, as its lock says; empty where there is none."""
    try:
        return (folder / NAME).read_text(encoding="utf-8")
    except OSError:
        return ""


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a run's folder, made if need be; left empty it is removed again.

    Raises:
      FolderBusy: another process holds it, on this host or another; the message says which.
      OSError: the folder or the lock cannot be written.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    path, handle = folder / NAME, None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _locked(path)
        yield
    finally:
        if handle is not None:
            # Removed before it is let go: whoever opens it later makes a new one.
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(handle)
        for made in missing:
            with contextlib.suppress(OSError):
                made.rmdir()


def _locked(path: Path) -> int:
    """The open lock file, locked, with our name in it."""
    try:
        import fcntl
    except ImportError:  # Not a POSIX system.
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                who = _holder(handle)
                os.close(handle)
                raise FolderBusy(
                    f"{path.parent} is in use by another run ({who}); wait for it, stop it, or "
                    "choose another folder"
                ) from None
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                os.close(handle)
                raise
        # Its last holder may have removed the file between our opening and our locking it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                break
        os.close(handle)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(_us()).encode())
        # Other hosts read it while it is held.
        os.fsync(handle)
    except OSError as error:
        os.close(handle)
        with contextlib.suppress(OSError):
            path.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error
    return handle


def _us() -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return {"host": socket.gethostname(), "process": os.getpid(), "since": since}


def _holder(handle: int) -> str:
    try:
        held = json.loads(os.read(handle, 1000))
        return f"process {held['process']} on {held['host']}, since {held['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has not said which"
