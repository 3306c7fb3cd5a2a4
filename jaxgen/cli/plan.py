"""``jaxgen plan``: what a run would hold, before anything of its size is made."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from jaxgen.cli.errors import CommandError
from jaxgen.cli.flags import parse
from jaxgen.cli.runs import check_run
from jaxgen.train.recipes.config import ScoreConfig, read_yaml

__all__ = ["run"]

PROG = "jaxgen plan"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Print how the network of jaxgen train would lie in a pool, and train nothing.

    Each leaf with its shape, its scale, its share of the pool, and whether it lives in the pool or
    passes through, and why; then weights, slots, compression, and the bytes of weights, gradients
    and Adam's moments before and after. Only shapes are worked out, so that a network too large for
    this machine can be planned. Settings are those of jaxgen train; with a run's folder, that
    run's, and the layout is compared with that of its newest checkpoint.

    For example:

      jaxgen plan --share 0.1
      jaxgen plan --share 5000 --share-scheme hashednet
      jaxgen plan --data moons --width 2048 --share 0.01
      jaxgen plan runs/digits-vp-share0.1
    """

    run: tyro.conf.OmitArgPrefixes[ScoreConfig]
    dir: tyro.conf.Positional[Path | None] = None
    """A run's folder."""
    config: Path | None = None
    """A YAML file of settings, such as a run's config.yaml; flags go before it."""


def _parse(words: Sequence[str]) -> Plan:
    """Flags over the folder's run, or over a file, or over the defaults."""
    base = ScoreConfig()
    args = parse(Plan, words, prog=PROG, default=Plan(run=base))
    if args.dir is not None:
        check_run(args.dir, one_step=True)
        if args.config is not None:
            raise CommandError("give a run's folder or --config, not both")
        base = read_yaml(args.dir / "config.yaml", base)
    elif args.config is not None:
        base = read_yaml(args.config, base)
    else:
        return args
    return parse(Plan, words, prog=PROG, default=Plan(run=base))


def run(words: Sequence[str]) -> int:
    """Carry out ``jaxgen plan``."""
    args = _parse(words)
    if args.run.share is None:
        where = "this run is not shared: " if args.dir is not None else ""
        raise CommandError(f"{where}give --share, such as --share 0.1 for a tenth of the weights")

    from jaxgen import share
    from jaxgen.train import data as datasets
    from jaxgen.train.recipes.config import resolve
    from jaxgen.train.recipes.score import build

    data = datasets.load(args.run.data, image_size=args.run.image_size)
    experiment = build(resolve(args.run, data.event), data)
    assert experiment.sharing is not None
    print(f"{type(experiment.net).__name__} for {data.name}, share {args.run.share:g}")
    print()
    print(share.describe(*experiment.sharing.layouts))
    if args.dir is not None:
        _compare(args.dir / "checkpoints", experiment.sharing.layouts)
    return 0


def _compare(checkpoints: Path, layouts: Sequence[Any]) -> None:
    """Say whether a run's newest checkpoint has this layout."""
    from jaxgen import train

    steps = train.saved_steps(checkpoints)
    if not steps:
        print("\nthe run has no checkpoint yet")
        return
    saved = [each.fingerprint for each in train.read_layouts(checkpoints)]
    if saved == [each.fingerprint for each in layouts]:
        print(f"\nthe run's checkpoint of step {steps[-1]} has this layout")
    else:
        there = ", ".join(saved) or "none: it is not shared"
        print(f"\nthe run's checkpoint of step {steps[-1]} has another layout ({there})")
