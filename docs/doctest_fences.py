"""Examples of docstrings as code: a run of doctest lines becomes a fenced block of its page."""

import re
from typing import Any

import griffe

_RUN = re.compile(r"^(?P<pad> *)>>> .*(?:\n(?P=pad)[^\n]*\S[^\n]*)*", re.MULTILINE)


def fenced(text: str) -> str:
    """`text` with fences about its doctests, and without their flags."""

    def fence(found: re.Match[str]) -> str:
        code = re.sub(r"  # doctest: \+\w+", "", found[0])
        return f"{found['pad']}```pycon\n{code}\n{found['pad']}```"

    return _RUN.sub(fence, text)


class DoctestFences(griffe.Extension):
    """Applied to each docstring as it is collected."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        del kwargs
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
