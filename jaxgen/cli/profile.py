"""``jaxgen profile``: where the time and the memory of a training step go."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from jaxgen.cli.errors import CommandError
from jaxgen.cli.flags import parse
from jaxgen.cli.runs import check_run
from jaxgen.train.recipes.config import ScoreConfig, default_out, field_names, read_yaml

__all__ = ["run"]

PROG = "jaxgen profile"

_ROWS = 12


@dataclasses.dataclass(frozen=True)
class Settings(ScoreConfig):
    """The settings of a run, but for two that mean something else here."""

    steps: int = 20
    """Steps to time, and again to trace."""
    out: str | None = None
    """The folder to write to; by default RUN/profile, or runs/DATA-PROCESS-profile."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """Compile the training step of a run, run it for a few steps, and tell where time goes.

    Printed, and kept in summary.json: seconds to the first step, the step's time, the share of it
    spent waiting for data, memory, FLOPs, and the operations that take longest, which
    operations.png shows. The trace lies in the same folder: open it in XProf, or its trace.json.gz
    at ui.perfetto.dev. Settings are those of jaxgen train; with a run's folder, that run's, whose
    checkpoints are neither read nor changed.

    For example:

      jaxgen profile
      jaxgen profile runs/digits-vp --steps 50
      jaxgen profile --data mnist5k --precision bfloat16 --out profiles/bfloat16
      jaxgen profile --mesh data=4,fsdp=2
    """

    run: tyro.conf.OmitArgPrefixes[Settings]
    dir: tyro.conf.Positional[Path | None] = None
    """A run's folder."""
    config: Path | None = None
    """A YAML file of settings, such as a run's config.yaml; flags go before it."""
    mesh: str | None = None
    """How to lay out the devices, as for jaxgen train."""
    rule: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Where a part of the state lies, as for jaxgen train."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show no progress."""


def _parse(words: Sequence[str]) -> tuple[Profile, ScoreConfig]:
    """Flags over the folder's run, or over a file, or over the defaults; and the run's settings."""
    args = parse(Profile, words, prog=PROG, default=Profile(run=Settings()))
    base = ScoreConfig()
    if args.dir is not None:
        check_run(args.dir)
        if args.config is not None:
            raise CommandError("give a run's folder or --config, not both")
        base = read_yaml(args.dir / "config.yaml", base)
    elif args.config is not None:
        base = read_yaml(args.config, base)
    elif args.run.process == "absorbing" and not any(w.startswith("--data") for w in words):
        base = ScoreConfig(data="text")
    kept = {name: getattr(base, name) for name in field_names() if name not in ("steps", "out")}
    args = parse(Profile, words, prog=PROG, default=Profile(run=Settings(**kept)))
    asked = {name: getattr(args.run, name) for name in kept}
    return args, ScoreConfig(**asked, steps=base.steps)


def _folder(args: Profile, config: ScoreConfig) -> Path:
    """Where to write.

    Raises:
      CommandError: what stands there is something else.
    """
    if args.run.out is not None:
        out = Path(args.run.out)
    elif args.dir is not None:
        out = args.dir / "profile"
    else:
        out = Path(f"{default_out(config)}-profile")
    if (out / "config.yaml").exists():
        raise CommandError(f"{out} holds a run; choose another folder by --out")
    if out.exists() and not out.is_dir():
        raise CommandError(f"{out} is a file; choose a folder by --out")
    return out


def run(words: Sequence[str]) -> int:
    """Carry out ``jaxgen profile``."""
    args, config = _parse(words)
    if args.run.steps < 2:
        raise CommandError(f"--steps is {args.run.steps}; give at least 2")
    if args.rule and args.mesh is None:
        raise CommandError("--rule needs a mesh to place things on; give --mesh too")
    out = _folder(args, config)

    from jaxgen.train import mesh as meshes
    from jaxgen.train.recipes.profiling import profile_run
    from jaxgen.train.recipes.run import make_experiment

    def say(line: str) -> None:
        if not args.quiet:
            print(line, file=sys.stderr, flush=True)

    try:
        mesh = None if args.mesh is None else meshes.make_mesh(args.mesh)
        rules = meshes.parse_rules(args.rule)
    except ValueError as error:
        raise CommandError(str(error)) from None
    experiment = make_experiment(config)
    try:
        summary = profile_run(
            experiment, out, steps=args.run.steps, mesh=mesh, rules=rules, say=say
        )
    except ValueError as error:
        # A batch or a state that does not fit the mesh.
        if mesh is None:
            raise
        raise CommandError(str(error)) from None
    print(_text(summary))
    print(
        f"see {out / 'operations.png'} and {out / 'summary.json'}; the trace is {summary['trace']}"
    )
    return 0


def _text(summary: Mapping[str, Any]) -> str:
    """The summary for a person."""
    seconds, step, memory = summary["seconds"], summary["step_ms"], summary["memory"]
    mesh = summary["mesh"]
    where = summary["device"] + (
        "" if mesh is None else f", mesh {','.join(f'{k}={v}' for k, v in mesh.items())}"
    )
    total = seconds["to_first_step"]
    parts = ", ".join(
        f"{k.replace('_', ' ')} {v:.2f}" for k, v in seconds.items() if k != "to_first_step"
    )
    flops = summary["flops_per_step"]
    rows = [
        ("what", f"{summary['network']} of {summary['parameters']:,} parameters, "
                 f"{summary['data']}, batches of {summary['batch_size']}"),
        ("where", f"{where}; jax {summary['jax']}"),
        ("to the first step", f"{total:.2f} s ({parts})"),
        ("step", f"{step['median']:.4g} ms (10 to 90 %: {step['p10']:.4g} to "
                 f"{step['p90']:.4g}; traced {step['traced']:.4g})"),
        ("rate", f"{summary['examples_per_second']:.5g} examples/s"),
        ("waiting for input", f"{100 * summary['input_wait_share']:.2f} % of the time"),
        ("device at work", _share(summary["device_busy_share"])),
        ("memory", f"{_bytes(memory['peak'])} at the peak: state {_bytes(memory['state'])}, "
                   f"temporary {_bytes(memory['temporary'])}; {_bytes(memory['reused'])} of the "
                   "state written in place"),
        ("arithmetic", "not counted by this compiler" if flops is None else
                       f"{flops / 1e9:.4g} GFLOP a step, "
                       f"{summary['flops_per_second'] / 1e9:.4g} GFLOP/s a device"),
    ]  # fmt: skip
    lines, traced = [f"{name:<19}{text}" for name, text in rows], summary["traced_steps"]
    if summary["layers"]:
        lines.append(f"\n{'share':>6}  layer")
    for each in summary["layers"][:_ROWS]:
        lines.append(f"{100 * each['share']:>5.1f}%  {each['layer']}")
    if summary["operations"]:
        lines.append(f"\n{'ms a step':>9} {'share':>6} {'calls':>6}  operation")
    for each in summary["operations"][:_ROWS]:
        lines.append(
            f"{1e3 * each['seconds'] / traced:>9.3f} {100 * each['share']:>5.1f}% "
            f"{each['calls'] / traced:>6.3g}  {each['name']}"
            + (f": {each['source']}" if each["source"] else "")
        )
    if any(each["name"].startswith("command_buffer") for each in summary["operations"]):
        lines.append(
            "\ncommand_buffer: many operations that the GPU runs as one; with XLA_FLAGS="
            "--xla_gpu_enable_command_buffer= each has its name, and steps take longer"
        )
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "not in the trace" if value is None else f"{100 * value:.1f} % of the traced time"


def _bytes(count: int) -> str:
    return f"{count / 2**20:.4g} MiB" if count < 2**30 else f"{count / 2**30:.4g} GiB"
