"""``jaxgen systems``: the published systems in this library, as data.

This table is the source of the one in the readme; a test holds that one, the files and the claim
tests to it.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from jaxgen.cli.flags import parse

__all__ = ["SYSTEMS", "System", "run", "systems_table"]


class System(NamedTuple):
    """A row of the table.

    Attributes:
      name: the system, with its paper.
      where: files and folders below ``jaxgen/``.
      claim: the claim test, from the project's root.
      figure: what that test measures, in words and numbers.
    """

    name: str
    where: tuple[str, ...]
    claim: str
    figure: str


SYSTEMS = (
    System(
        "Score-SDE: score-based generative modelling through SDEs (arXiv 2011.13456)",
        ("process", "score", "solve", "guide/inpaint.py", "nets/ncsnpp.py", "train/recipes"),
        "tests/claims/test_score_sde.py",
        "variance 0.260 with a corrector against 0.273 without at 100 evaluations, truth 0.250",
    ),
    System(
        "STABLE-RPS: in defense of parameter sharing for model-compression (arXiv 2310.11611), "
        "with ROAST, HashedNets and pruning",
        ("share", "prune", "nets/budget.py", "train/recipes/sharing.py"),
        "tests/claims/test_stable_rps.py",
        "digits in 1/1000 of 84,480 weights: 89.3 % against 81.9 % for rewinding and 47.1 % for "
        "SynFlow; in 1/300: 93.5 % against 87.5 % for SynFlow, behind rewinding's 96.2 %",
    ),
)


def systems_table() -> str:
    """The table as Markdown, for the readme."""
    rows = ["| system | where | claim test | measured |", "| --- | --- | --- | --- |"]
    for system in SYSTEMS:
        where = ", ".join(f"`{path}`" for path in system.where)
        rows.append(f"| {system.name} | {where} | `{system.claim}` | {system.figure} |")
    return "\n".join(rows)


@dataclasses.dataclass(frozen=True)
class Systems:
    """Print the table of published systems: where each lives, its claim test, what it measured."""


def run(words: Sequence[str]) -> int:
    """Carry out ``jaxgen systems``."""
    parse(Systems, words, prog="jaxgen systems")
    print(systems_table())
    return 0
