"""Exit codes and one-line errors: what went wrong, and what to do about it."""

import errno
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

__all__ = ["CommandError", "guarded"]


class CommandError(Exception):
    """The command cannot be carried out as it was given; the message says what to do."""


class Stopped(BaseException):
    """A signal came while nothing was being trained."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def guarded(name: str, run: Callable[[Sequence[str]], int], words: Sequence[str]) -> int:
    """``run(words)`` with errors that a person can act on turned into one line and a code."""
    try:
        with _signals():
            return run(words)
    except (Stopped, KeyboardInterrupt) as error:
        number = error.number if isinstance(error, Stopped) else int(signal.SIGINT)
        _say(name, f"stopped by {signal.Signals(number).name}; the same command goes on")
        return 128 + number
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 2
    except BrokenPipeError:
        # The reader of a pipe (`| head`) has left: there is no one to tell.
        sys.stderr.close()
        return 128 + int(signal.SIGPIPE)
    except Exception as error:
        code = _code(error)
        if code is None:
            raise
        _say(name, _message(error))
        return code


def _code(error: Exception) -> int | None:
    """The exit code of an error that a person can act on, ``None`` for a fault of the program."""
    if isinstance(error, CommandError | OSError):
        return 2
    # Known only to a command that has imported the rooms they come from.
    known = {
        "jaxgen.train.recipes.config": {"ConfigError": 2},
        "jaxgen.train.data": {"DataError": 2},
        "jaxgen.train.manifest": {"CheckpointError": 2},
        "jaxgen.train.lock": {"FolderBusy": 2},
        "jaxgen.train.distributed": {"DistributedError": 2},
        "jaxgen.train.loop": {"Diverged": 1},
    }
    for module, names in known.items():
        for class_name, code in names.items():
            kind = getattr(sys.modules.get(module), class_name, None)
            if kind is not None and isinstance(error, kind):
                return code
    interrupted = getattr(sys.modules.get("jaxgen.train.loop"), "Interrupted", None)
    if interrupted is not None and isinstance(error, interrupted):
        return 128 + int(signal.Signals[error.signal])
    return None


def _message(error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error)
    where = f" {error.filename}" if error.filename else ""
    reason = error.strerror or str(error)
    advice = {
        errno.ENOSPC: "free some space and give the same command again",
        errno.EDQUOT: "free some space and give the same command again",
        errno.EFBIG: "the file may not grow so large; raise the limit or choose another folder",
        errno.EACCES: "choose a folder that you may write, by --out",
        errno.EROFS: "choose a folder that you may write, by --out",
        errno.EPERM: "choose a folder that you may write, by --out",
        errno.ENOTDIR: "choose another path; a file stands in the way",
    }.get(error.errno or 0, "check the path")
    return f"{reason}{where}: {advice}"


def _say(name: str, message: str) -> None:
    line = "; ".join(" ".join(part.split()) for part in message.splitlines() if part.strip())
    print(f"{name}: {line.replace(':; ', ': ')}", file=sys.stderr, flush=True)


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, so that half-written files are removed."""

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        raise Stopped(number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:
        # Not in the main thread: signals are someone else's matter.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
