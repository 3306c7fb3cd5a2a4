"""``jaxgen train``: start a run, go on with one, extend one."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from jaxgen.cli.errors import CommandError
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

    For example:

      jaxgen train
      jaxgen train --data mnist5k --steps 4000
      jaxgen train --data moons --process ve --process-args sigma_max=10
      jaxgen train --labels --out runs/labelled
      jaxgen train --share 0.1
      jaxgen train --process absorbing
      jaxgen train --process absorbing --data text:novel.txt --length 128
      jaxgen train --config runs/digits-vp/config.yaml --seed 1 --out runs/again
    """

    run: tyro.conf.OmitArgPrefixes[ScoreConfig]
    config: Path | None = None
    """A YAML file of settings, such as another run's config.yaml; flags go before it."""
    reschedule: tyro.conf.FlagCreatePairsOff[bool] = False
    """Let a falling learning rate be bent to another number of steps."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show no progress."""


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
    args = _parse(words)
    is_text = args.run.process == "absorbing"
    if not is_text:
        check_solver(args.run.solver, args.run.solver_steps)

    from jaxgen.train.recipes import run as runs

    experiment = runs.prepare(args.run, reschedule=args.reschedule)
    config = experiment.config
    out = Path(config.out)
    figures = runs.finished(out, config.steps)
    if figures is not None:
        print(f"{out} has finished at step {figures['step']}; a higher --steps extends it")
        print(figures_text(figures))
        return 0
    if is_distilled(out):
        raise CommandError(
            f"{out} holds a one-step generator, which jaxgen distill made and goes on with; train "
            "the run that it was made from, or choose another folder by --out"
        )

    def say(line: str) -> None:
        if not args.quiet:
            print(line, file=sys.stderr, flush=True)

    figures = runs.train_run(experiment, progress=False if args.quiet else None, say=say)
    print(figures_text(figures))
    names = ["samples.txt"] if is_text else []
    names += ["gap.png"] if "ode_sde_gap" in figures else []
    names += ["samples.png", "curves.png"]
    print(f"see {', '.join(str(out / name) for name in names)} and {out / 'metrics.json'}")
    return 0
