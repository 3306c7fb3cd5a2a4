"""The ``jaxgen`` command: whole jobs from a shell, made of the library's functions.

This file imports nothing heavy, so that ``jaxgen --help`` answers at once; each subcommand lives in
a module of its own, imported when it is asked for.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

__all__ = ["main"]

COMMANDS = {
    "train": "train a generator on one device or many hosts, measure it, draw it; go on with a run",
    "plan": "what a run would hold: a pool, or each chip of a TPU slice; train nothing",
    "profile": "where the time and the memory of a training step go",
    "sample": "draw samples from a trained run",
    "evaluate": "measure a trained run again, with other counts or another solver",
    "compare": "draw solvers of a trained run side by side: quality against evaluations",
    "search": "search for the solver that suits a trained run at a few evaluations",
    "inpaint": "hide part of held-out images and let a trained run fill it in",
    "restore": "restore an image that is hidden in part, coarse or blurred, by a trained run",
    "distill": "turn a trained run into a small generator of one evaluation",
    "systems": "the published systems in this library, where they live, what was measured",
    "version": "versions and devices, for a bug report",
}

# What the command needs and the library does without.
_EXTRAS = ("grain", "matplotlib", "sklearn", "tqdm", "tyro", "yaml")

_HEAVY = (
    "train",
    "sample",
    "evaluate",
    "compare",
    "search",
    "inpaint",
    "restore",
    "distill",
    "profile",
)

_EXAMPLES = """\
  jaxgen train                                  handwritten digits in a few minutes on a laptop
  jaxgen train --data moons --process ve        a two-dimensional toy, another process
  jaxgen train --share 0.1                      the same network in a tenth of its weights
  jaxgen train --data text --process absorbing  a text, character by character
  jaxgen sample runs/digits-vp --n 64           new digits from the run's checkpoint
  jaxgen compare runs/digits-vp                 which solver, at how many evaluations
  jaxgen restore runs/digits-vp --task inpaint  half of the pixels, and the image they came from
  jaxgen plan runs/digits-vp --topology v5e:4x4 what sixteen chips would do, without one of them
  jaxgen distill runs/digits-vp --steps 1       a smaller network that needs one evaluation
  jaxgen train --help                           every setting, with its default"""


def usage() -> str:
    """The text of ``jaxgen --help``."""
    lines = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    return (
        "usage: jaxgen COMMAND [...]\n\n"
        "Generative modelling by stochastic dynamics, in JAX.\n\n"
        f"commands:\n{lines}\n\nexamples:\n{_EXAMPLES}\n\n"
        "Each command explains itself: jaxgen COMMAND --help."
    )


def _ask_for_large_pages() -> None:
    """Start this process again with large memory pages, where it runs by glibc without them.

    XLA's CPU backend takes and returns its scratch memory at every step: for the default run that
    is thirty thousand page faults a step, a quarter of the time. glibc reads the wish for large
    pages once, when a process starts. Whoever has set ``GLIBC_TUNABLES``, to nothing even, is left
    alone.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    # If it cannot be started again it goes on as it is.
    with contextlib.suppress(OSError):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
      argv: the words after ``jaxgen``; those of this process if ``None``.

    Returns:
      The exit code: 0 done; 1 training diverged; 2 it could not be done, with one line on standard
      error that says what to do; 75 another process of a distributed run has gone, and the same
      command goes on; 130 or 143 stopped by SIGINT or SIGTERM, 137 the worker of one was killed.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, rest = words[0], words[1:]
    if name == "--version":
        name = "version"
    if name not in COMMANDS:
        print(
            f"jaxgen: no command {name!r}; the commands are {', '.join(COMMANDS)}", file=sys.stderr
        )
        return 2
    if argv is None and name in _HEAVY:
        _ask_for_large_pages()
    from jaxgen.cli.errors import guarded

    try:
        command = importlib.import_module(f"jaxgen.cli.{name}")
        return guarded(f"jaxgen {name}", command.run, rest)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRAS:
            raise
        print(
            f'jaxgen {name}: {error.name} is not installed; pip install "jaxgen[run]"',
            file=sys.stderr,
        )
        return 2
