"""``jaxgen plan``: what a run would hold and cost, before anything of its size is made."""

import dataclasses
import json
import sys
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
    """Print how the network of jaxgen train would lie in a pool, or what a step costs on TPUs.

    With --share: each leaf with its shape, its scale, its share of the pool, and whether it lives
    in the pool or passes through, and why; then weights, slots, compression, and the bytes of
    weights, gradients and Adam's moments before and after. Only shapes are worked out, so that a
    network too large for this machine can be planned. With a run's folder the layout is compared
    with that of its newest checkpoint.

    With --topology: the training step is compiled for devices that need not be there, and nothing
    runs. Memory of one device by its parts, its peak and whether it fits; FLOPs, bytes moved, the
    exchange between devices by kind; and the time of a step by the chip's published peaks. TPUs
    need the extra tpu-compile, and a minute or so for each program.

    Settings are those of jaxgen train; with a run's folder, that run's.

    For example:

      jaxgen plan --share 0.1
      jaxgen plan --data moons --width 2048 --share 0.01
      jaxgen plan runs/digits-vp-share0.1
      jaxgen plan --topology v5e:4x4 --mesh data=8,fsdp=2
      jaxgen plan runs/digits-vp --topology v5e:16x16 --sampler --json plan.json
      jaxgen plan --topology v6e:2x2 --width 256 --largest-batch
      jaxgen plan --data moons --topology cpu:8
    """

    run: tyro.conf.OmitArgPrefixes[ScoreConfig]
    dir: tyro.conf.Positional[Path | None] = None
    """A run's folder."""
    config: Path | None = None
    """A YAML file of settings, such as a run's config.yaml; flags go before it."""
    topology: str | None = None
    """Devices to compile for: v4, v5e, v5p or v6e and the sides of the slice, as in v5e:4x4, or
    cpu:8 for virtual devices of this machine."""
    mesh: str | None = None
    """With --topology: how to lay the devices out, as in jaxgen train; by default data=-1."""
    rule: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """With --topology: where a part of the state lies, as in jaxgen train; more than once."""
    sampler: tyro.conf.FlagCreatePairsOff[bool] = False
    """With --topology: plan the sampler of the run's evaluation too, for as many samples as a step
    has examples."""
    largest_batch: tyro.conf.FlagCreatePairsOff[bool] = False
    """With --topology: look for the largest batch that fits, within an eighth; some compilations
    more."""
    json: Path | None = None
    """With --topology: write all figures to this file too."""


def _parse(words: Sequence[str]) -> Plan:
    """Flags over the folder's run, or over a file, or over the defaults."""
    base = ScoreConfig()
    args = parse(Plan, words, prog=PROG, default=Plan(run=base))
    if args.dir is not None:
        # A one-step generator is made by another step than a run is.
        check_run(args.dir, one_step=args.topology is None)
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
    if args.topology is not None:
        return _step(args, args.topology)
    for name in ("mesh", "rule", "sampler", "largest_batch", "json"):
        if getattr(args, name) != getattr(Plan, name):
            flag = name.replace("_", "-")
            raise CommandError(f"--{flag} is for a step; give --topology too, such as v5e:4x4")
    if args.run.share is None:
        where = "this run is not shared: " if args.dir is not None else ""
        raise CommandError(
            f"{where}give --share, such as --share 0.1 for a tenth of the weights, or --topology, "
            "such as --topology v5e:4x4 for what a step costs there"
        )

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


def _step(args: Plan, topology: str) -> int:
    """Compile a run's step for a topology, and print what it costs."""
    if args.json is not None and not args.json.parent.is_dir():
        raise CommandError(f"--json {args.json}: there is no folder {args.json.parent}")

    from jaxgen.train.manifest import replace_text
    from jaxgen.train.recipes.plan import plan_run
    from jaxgen.train.step_plan import describe_plan
    from jaxgen.train.topology import parse_topology

    planned = plan_run(
        args.run,
        topology,
        mesh=args.mesh or "data=-1",
        rules=args.rule,
        sampler=args.sampler,
        largest=args.largest_batch,
        say=lambda line: print(f"{PROG}: {line}", file=sys.stderr, flush=True),
    )
    chip = parse_topology(topology).chip
    print(f"{topology}: {describe_plan(planned.step, chip)}")
    if planned.sampler is not None:
        print(f"\n{topology}: {describe_plan(planned.sampler, chip)}")
    if args.largest_batch:
        if planned.largest is None:
            print(f"\nno batch fits, after {planned.compiles} more compilations")
        else:
            print(
                f"\nlargest batch that fits, within an eighth: {planned.largest.batch:,}, after "
                f"{planned.compiles} more compilations\n"
                f"{topology}: {describe_plan(planned.largest, chip)}"
            )
    if args.json is not None:
        whole = {"topology": topology, **planned.to_dict()}
        replace_text(args.json, json.dumps(whole, indent=2) + "\n")
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
