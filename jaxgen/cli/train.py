"""``jaxgen train``: start a run, go on with one, extend one."""

import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from jaxgen.cli import supervise
from jaxgen.cli.errors import CommandError, guarded
from jaxgen.cli.flags import parse
from jaxgen.cli.report import figures_text
from jaxgen.cli.runs import check_solver, is_distilled
from jaxgen.train.recipes.config import ScoreConfig, default_out, read_yaml

__all__ = ["run"]

PROG = "jaxgen train"


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a score-based generator, measure it and draw it.

    A run's folder (runs/DATA-PROCESS, or --out) receives config.yaml, metrics.jsonl, checkpoints/
    and at the end metrics.json, samples.png and curves.png. The same command goes on with a run
    that was interrupted, a higher --steps extends one that has finished, and settings that are not
    given are those of the folder's run. Ctrl-C finishes the step and saves.

    With --process absorbing a run learns text, character by character: Python's help topics, or a
    file of yours; it draws samples.txt too.

    With --share the weights live in a pool of hashed slots: weights, gradients, Adam's moments and
    checkpoints have the pool's size. jaxgen plan shows beforehand what that comes to.

    Several processes, on one host or many, train one run by --distributed; where no cluster says
    so itself give each --coordinator HOST:PORT --processes N --process-id I. If one of them goes
    the others stop with exit code 75, and the same commands go on from the last checkpoint.

    For example:

      jaxgen train
      jaxgen train --data mnist5k --steps 4000
      jaxgen train --data moons --process ve --process-args sigma_max=10
      jaxgen train --labels --out runs/labelled
      jaxgen train --share 0.1
      jaxgen train --process absorbing
      jaxgen train --process absorbing --data text:novel.txt --length 128
      jaxgen train --config runs/digits-vp/config.yaml --seed 1 --out runs/again
      jaxgen train --mesh data=4,fsdp=2
      jaxgen train --distributed --coordinator localhost:6000 --processes 2 --process-id 0
    """

    run: tyro.conf.OmitArgPrefixes[ScoreConfig]
    config: Path | None = None
    """A YAML file of settings, such as another run's config.yaml; flags go before it."""
    reschedule: tyro.conf.FlagCreatePairsOff[bool] = False
    """Let a falling learning rate be bent to another number of steps."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show no progress."""
    mesh: str | None = None
    """How to lay out the devices, such as data=8, or data=4,fsdp=2 to split the state over pairs;
    one size may be -1. A run may go on over another mesh. Default: all that divide the batch."""
    rule: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Where a part of the state lies, PATTERN=PLACEMENT, such as kernel=-,fsdp or pool=replicate;
    may be given more than once."""
    distributed: tyro.conf.FlagCreatePairsOff[bool] = False
    """Be one of several processes of one run, as SLURM, Open MPI, Kubernetes or Cloud TPU say, or
    the three flags below."""
    coordinator: str | None = None
    """HOST:PORT of process 0."""
    processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    wait_seconds: float = 60.0
    """How long to wait for the coordinator and the other processes."""
    compilation_cache: Path | None = None
    """A folder that keeps compiled programs, so that the next start need not compile them."""


def _parse(words: Sequence[str]) -> Train:
    """Flags over the folder's run, or over a file, or over the defaults."""
    from jaxgen.train.recipes.run import stored_config

    def parsed(base: ScoreConfig) -> Train:
        return parse(Train, words, prog=PROG, default=Train(run=base))

    args = parsed(ScoreConfig())
    chosen = any(word.startswith("--data") for word in words) or args.config is not None
    if args.run.process == "absorbing" and not chosen:
        args = parsed(ScoreConfig(data="text"))
    if args.config is not None:
        # A file says where its own run was: a new one goes to its own folder.
        base = dataclasses.replace(read_yaml(args.config, ScoreConfig()), out=None)
        return parsed(base)
    stored = stored_config(Path(default_out(args.run)))
    if stored is None:
        return args
    return parsed(dataclasses.replace(stored, out=default_out(args.run)))


def run(words: Sequence[str]) -> int:
    """Carry out ``jaxgen train``."""
    if supervise.is_needed(words):
        command = [sys.executable, "-m", "jaxgen.cli", "train", *words]
        return supervise.supervise(PROG, command)
    if supervise.is_worker() and "--distributed" in words:
        return supervise.work(
            PROG,
            functools.partial(_run, words),
            lambda action: guarded(PROG, lambda _: action(), ()),
        )
    return _run(words)


def _set_up(args: Train) -> None:
    """What must stand before jax is used: the cache and the other processes."""
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("coordinator", "processes", "process_id")
        if getattr(args, name) is not None
    ]
    if given and not args.distributed:
        raise CommandError(f"{' and '.join(given)} belong to --distributed, which is not given")
    import jax

    if args.compilation_cache is not None:
        args.compilation_cache.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(args.compilation_cache.absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if args.distributed:
        from jaxgen.train import distributed

        supervise.tell("joining")
        try:
            distributed.initialize(
                args.coordinator, args.processes, args.process_id, timeout=args.wait_seconds
            )
        except ValueError as error:
            raise CommandError(str(error)) from None
        supervise.tell("joined")


def _run(words: Sequence[str]) -> int:
    args = _parse(words)
    is_text = args.run.process == "absorbing"
    if not is_text:
        check_solver(args.run.solver, args.run.solver_steps)
    _set_up(args)

    import jax

    from jaxgen.train import distributed
    from jaxgen.train import mesh as meshes
    from jaxgen.train.recipes import run as runs

    try:
        mesh = None if args.mesh is None else meshes.make_mesh(args.mesh)
        rules = meshes.parse_rules(args.rule)
    except ValueError as error:
        raise CommandError(str(error)) from None
    experiment = distributed.everywhere(lambda: runs.prepare(args.run, reschedule=args.reschedule))
    config = experiment.config
    out = Path(config.out)
    supervise.tell(f"folder {out.absolute()}")
    is_first = jax.process_index() == 0
    figures = runs.finished(out, config.steps)
    if distributed.choose(figures is not None):
        distributed.part()
        if is_first and figures is not None:
            print(f"{out} has finished at step {figures['step']}; a higher --steps extends it")
            print(figures_text(figures))
        return 0
    if is_distilled(out):
        raise CommandError(
            f"{out} holds a one-step generator, which jaxgen distill made and goes on with; train "
            "the run that it was made from, or choose another folder by --out"
        )
    _check_fit(experiment, mesh, rules)

    def say(line: str) -> None:
        if not args.quiet and is_first:
            print(line, file=sys.stderr, flush=True)

    def report(line: dict[str, Any]) -> None:
        supervise.tell(f"report {line['step']}")
        if line["step"] >= config.steps:
            supervise.tell("measuring")

    supervise.tell("training")
    figures = runs.train_run(
        experiment,
        progress=False if args.quiet else None,
        say=say,
        mesh=mesh,
        rules=rules,
        on_report=report,
    )
    if figures is None:
        return 0
    print(figures_text(figures))
    names = ["samples.txt"] if is_text else []
    names += ["gap.png"] if "ode_sde_gap" in figures else []
    names += ["samples.png", "curves.png"]
    print(f"see {', '.join(str(out / name) for name in names)} and {out / 'metrics.json'}")
    return 0


def _check_fit(experiment: Any, mesh: Any, rules: Any) -> None:
    """Refuse a mesh that the batch does not divide over, and rules that do not suit the state."""
    import jax

    from jaxgen.train import loop
    from jaxgen.train import mesh as meshes

    if mesh is None:
        if rules != meshes.RULES:
            raise CommandError("--rule needs a mesh to place things on; give --mesh too")
        return
    shards = math.prod(mesh.shape[name] for name in meshes.batch_axes(mesh))
    batch = experiment.config.batch_size
    if batch % shards:
        raise CommandError(
            f"the batch of {batch} does not divide over the {shards} parts of --mesh; choose "
            "another --batch-size or another --mesh"
        )
    micro = experiment.config.accumulate
    if (batch // shards) % micro:
        raise CommandError(
            f"the batch of {batch} leaves {batch // shards} examples to each of the {shards} parts "
            f"of --mesh, which --accumulate {micro} does not divide; choose another of the three"
        )
    try:
        loop.check_mesh(mesh)
        meshes.state_shardings(jax.eval_shape(experiment.state), mesh, rules)
    except ValueError as error:
        raise CommandError(str(error)) from None
