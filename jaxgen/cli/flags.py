"""Flags by tyro, with its errors brought to one line."""

import contextlib
import dataclasses
import io
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from jaxgen.cli.errors import CommandError

__all__ = ["parse"]

Args = TypeVar("Args")


def parse(
    kind: type[Args], words: Sequence[str], *, prog: str, default: Args | None = None
) -> Args:
    """Read flags into a dataclass, whose docstrings are the help.

    Args:
      kind: the dataclass.
      words: the words after the command.
      prog: the command, such as ``"jaxgen train"``.
      default: values of flags that are not given.

    Raises:
      CommandError: a flag or value that is not understood.
      SystemExit: help was asked for and printed.
    """
    if not words and not dataclasses.fields(kind):  # type: ignore[arg-type]
        return kind()
    import tyro

    said = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=list(words), prog=prog, **options)
    except SystemExit as error:
        if not error.code:
            raise
        raise CommandError(f"{_plain(said.getvalue())}; see {prog} --help") from None


def _plain(text: str) -> str:
    """The message of tyro's box, without the box, its title and its hints at the help."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines: list[str] = []
    for raw in text.splitlines():
        line = raw.strip("╭╮╰╯│├┤ ").strip()
        if raw.lstrip().startswith("╭") or not line:
            continue
        if set(line) <= {"─"}:
            if lines and not lines[-1].endswith(";"):
                lines[-1] = lines[-1].rstrip(".") + ";"
            continue
        if line.startswith(("Argument helptext", "Got errors")):
            break
        if line.startswith("For full helptext") or line.endswith("--help"):
            continue
        lines.append(line)
    return " ".join(lines).strip("; ") or "the flags were not understood"
