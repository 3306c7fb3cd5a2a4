"""``jaxgen sample``: new samples from a trained run."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from jaxgen.cli.errors import CommandError
from jaxgen.cli.flags import parse
from jaxgen.cli.runs import (
    WITH_STATISTICS,
    check_out,
    check_run,
    check_solver,
    check_text_solver,
    explained,
    is_distilled,
    named_solver,
    stored_process,
    write_npz,
)

__all__ = ["run"]

PROG = "jaxgen sample"
DEFAULT = "dpmpp_2m"


@dataclasses.dataclass(frozen=True)
class Sample:
    """Draw samples from a trained run, by its averaged parameters.

    For example:

      jaxgen sample runs/digits-vp --n 100
      jaxgen sample runs/digits-vp --solver ddim --steps 10 --seed 7 --out ten-steps.png
      jaxgen sample runs/digits-vp --solver dpmv3 --steps 10
      jaxgen sample runs/digits-vp --schedule runs/digits-vp/schedule-nfe5.json
      jaxgen sample runs/digits-vp --n 5000 --out digits.npz
      jaxgen sample runs/labelled --label 3 --guidance 2
      jaxgen sample runs/labelled --label 3 --steer guide=2
      jaxgen sample runs/digits-vp --steer anneal=1.5 --particles 64
      jaxgen sample runs/digits-vp-one-step --n 1000 --out digits.npz
      jaxgen sample runs/text-absorbing --prompt "The " --top-p 0.9
    """

    dir: tyro.conf.Positional[Path]
    """The run's folder."""
    n: int | None = None
    """Number of samples, 100, or 8 of text; the first k are the same whatever the number."""
    solver: str = DEFAULT
    """ddim, heun, dpm_2, dpm_3, dpmpp_2s, dpm_2m, dpm_3m, dpmpp_2m, dpmpp_3m, unipc, deis, and
    dpmv3 with statistics of the run, estimated once; with noise dpmpp_2m_sde, dpmpp_3m_sde,
    euler_maruyama, reverse_diffusion, ancestral; in time euler_time, heun_time. One euler_time
    step by default for what jaxgen distill made. For text tweedie (the default there), euler."""
    steps: int | None = None
    """Steps of the solver; by default its own number."""
    schedule: Path | None = None
    """A schedule that `jaxgen search` found, instead of a solver and its steps."""
    seed: int = 0
    """Of the noise."""
    out: Path | None = None
    """A picture (.png), or the samples in the data's units (.npz); by default DIR/sampled.png. Of
    text a file (.txt) or a picture (.png); by default it is printed."""
    label: int | None = None
    """A class, for a run that was trained with --labels."""
    guidance: float = 1.0
    """Scale of classifier-free guidance: 1 samples the label, more presses it, 0 ignores it."""
    steer: str | None = None
    """anneal=1.5 samples the density to the power 1.5; guide=1.5 presses --label as --guidance
    does, with the weights of the guided density (which from 2 on favours the unlikely). By
    weighted particles, in 100 steps; a picture of them goes beside --out."""
    particles: int = 64
    """With --steer: particles that are weighted against each other."""
    uncorrected: bool = False
    """With --steer: the same particles without their weights."""
    prompt: str = ""
    """For text: what every sample begins with."""
    top_p: float | None = None
    """For text: draw from the likeliest characters of this probability together."""
    top_k: int | None = None
    """For text: draw from so many likeliest characters."""


def run(words: Sequence[str]) -> int:
    """Carry out ``jaxgen sample``."""
    args = parse(Sample, words, prog=PROG)
    check_run(args.dir, one_step=True)
    is_text = stored_process(args.dir) == "absorbing"
    args = dataclasses.replace(args, n=args.n if args.n is not None else 8 if is_text else 100)
    if is_text:
        return _text(args)
    if args.prompt or args.top_p is not None or args.top_k is not None:
        raise CommandError(f"--prompt, --top-p and --top-k are for text, which {args.dir} is not")
    if is_distilled(args.dir):
        args = _one_step(args)
    out = check_out(args.out or args.dir / "sampled.png", (".png", ".npz"))
    check_solver(args.solver, args.steps, more=(WITH_STATISTICS,))
    if args.schedule is not None:
        if args.solver != DEFAULT or args.steps is not None:
            raise CommandError("--schedule is a solver with its steps; leave out --solver, --steps")
        if not args.schedule.is_file():
            raise CommandError(
                f"--schedule {args.schedule} is no file; find one by jaxgen search {args.dir}"
            )
    steer = _check_steer(args)
    _check_numbers(args)

    import jax

    from jaxgen.core.progress import meter
    from jaxgen.train.recipes.evaluate import draw
    from jaxgen.train.recipes.run import open_run

    trained = open_run(args.dir)
    _check_label(args, trained.experiment)
    if steer is not None:
        return _steered(args, trained, steer, out)
    solver, grid = _solver(args, trained)
    assert args.n is not None
    with meter(args.n, description="sampling", unit="sample") as bar, explained():
        drawn = draw(
            jax.random.key(args.seed),
            trained.experiment,
            trained.params,
            args.n,
            solver=solver,
            steps=args.steps,
            grid=grid,
            label=args.label,
            guidance=args.guidance,
            advance=bar.update,
        )
    data = trained.experiment.train
    title = f"{data.name}: {args.n} samples, {drawn.how['solver']}, {drawn.how['steps']} steps"
    _write(out, data, drawn.x, title)
    print(
        f"{out}: {args.n} samples of step {trained.step} (averaged parameters), "
        f"{_how(args, drawn.how)}, {drawn.how['steps']} steps, "
        f"{drawn.how['evaluations']} evaluations"
    )
    return 0


def _one_step(args: Sample) -> Sample:
    """The arguments with the solver that a distilled network was made for."""
    if args.steer is not None or args.schedule is not None:
        raise CommandError(f"{args.dir} takes one step; leave out --steer and --schedule")
    if args.solver != DEFAULT:
        return args
    return dataclasses.replace(args, solver="euler_time", steps=args.steps or 1)


def _check_numbers(args: Sample) -> None:
    if args.n is None or args.n < 1 or args.seed < 0:
        raise CommandError(f"--n is {args.n} and --seed {args.seed}; give n >= 1 and seed >= 0")


def _text(args: Sample) -> int:
    """Samples of a run on text, printed or written."""
    plain = Sample(args.dir)
    for name in ("schedule", "label", "guidance", "steer", "particles", "uncorrected"):
        if getattr(args, name) != getattr(plain, name):
            raise CommandError(f"--{name} is not for text, which {args.dir} holds; leave it out")
    solver = "tweedie" if args.solver == DEFAULT else args.solver
    check_text_solver(solver, args.steps)
    out = None if args.out is None else check_out(args.out, (".txt", ".png"))
    _check_numbers(args)

    import jax

    from jaxgen.core.categorical import check_filters
    from jaxgen.core.progress import meter
    from jaxgen.train.manifest import replace_text
    from jaxgen.train.recipes import pictures
    from jaxgen.train.recipes.run import open_text_run
    from jaxgen.train.recipes.text import draw_text, joined

    with explained():
        check_filters(args.top_p, args.top_k)
    trained = open_text_run(args.dir, text=False)
    experiment: Any = trained.experiment
    assert args.n is not None
    with meter(args.n, description="sampling", unit="text") as bar:
        drawn = draw_text(
            jax.random.key(args.seed),
            experiment,
            trained.params,
            args.n,
            solver=solver,
            steps=args.steps or experiment.config.solver_steps,
            prompt=args.prompt,
            top_p=args.top_p,
            top_k=args.top_k,
            advance=bar.update,
        )
    how = drawn.how
    if out is None:
        print(joined(drawn.texts), end="")
    elif out.suffix == ".txt":
        replace_text(out, joined(drawn.texts))
    else:
        title = f"{experiment.config.data}: {solver}, {how['steps']} steps"
        pictures.draw_text(out, title, drawn.texts, drawn.unmasked_at)
    print(
        f"{'---' if out is None else f'{out}:'} {args.n} texts of {experiment.vocabulary.length} "
        f"characters, step {trained.step} (averaged parameters), {solver}, {how['steps']} steps, "
        f"{how['evaluations']} evaluations for each text"
    )
    return 0


def _write(out: Path, data: Any, x: Any, title: str, **more: Any) -> None:
    """Samples as a picture, or with ``more`` arrays in one file."""
    from jaxgen.train.recipes import pictures

    made = data.from_unit(x)
    if out.suffix == ".npz":
        write_npz(out, x=made, **more)
    elif data.is_image:
        columns = max(1, round(len(made) ** 0.5))
        pictures.draw_grid(out, [(title, data.to_unit(made))], columns=columns)
    else:
        pictures.draw_points(out, [("generated", made), ("real", data.x[: len(made)])])


def _steered(args: Sample, trained: Any, steer: tuple[str, float], out: Path) -> int:
    """Samples by weighted particles, and the picture of these."""
    import jax

    from jaxgen.core.progress import meter
    from jaxgen.train.recipes import pictures
    from jaxgen.train.recipes.steering import steer as draw

    assert args.n is not None
    with meter(args.n, description="steering", unit="sample") as bar, explained():
        drawn = draw(
            jax.random.key(args.seed),
            trained.experiment,
            trained.params,
            args.n,
            kind=steer[0],
            value=steer[1],
            label=args.label,
            particles=args.particles,
            steps=args.steps or 100,
            corrected=not args.uncorrected,
            advance=bar.update,
        )
    data, how = trained.experiment.train, drawn.how
    label = "" if args.label is None else f" of {args.label}"
    title = f"{data.name}{label}: {how['steer']}, {how['particles']} particles"
    _write(out, data, drawn.x, title, ess=drawn.ess, resampled=drawn.resampled, log_z=drawn.log_z)
    beside = out.with_name(f"{out.stem}-steering.png")
    pictures.draw_steering(
        beside, title, drawn.levels, drawn.ess, drawn.resampled, drawn.history, drawn.shown_at
    )
    print(
        f"{out}, {beside.name}: {args.n} samples of step {trained.step} (averaged parameters), "
        f"{how['steer']}{label}, {how['populations']} times {how['particles']} particles, "
        f"{'without weights' if args.uncorrected else 'weighted'}, {how['steps']} steps, "
        f"{how['evaluations']} evaluations, resampled {how['resampled']:.2g} times, "
        f"effective sample size {how['last_ess']:.3g} at the end"
    )
    return 0


def _check_steer(args: Sample) -> tuple[str, float] | None:
    """The kind of steering and its number, ``None`` without."""
    if args.steer is None:
        if args.uncorrected:
            raise CommandError("--uncorrected is for --steer; leave it out, or steer")
        if args.particles != Sample.particles:
            raise CommandError("--particles is for --steer; leave it out, or steer")
        return None
    kind, _, number = args.steer.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if kind not in ("anneal", "guide") or not math.isfinite(value):
        raise CommandError(f"--steer is {args.steer!r}; give anneal=NUMBER or guide=NUMBER")
    if kind == "anneal" and value <= 0:
        raise CommandError(f"--steer {args.steer}: give a power above 0")
    if kind == "guide" and args.label is None:
        raise CommandError("--steer guide needs a --label to guide towards")
    if args.solver != DEFAULT or args.schedule is not None or args.guidance != 1:
        raise CommandError(
            "--steer has a sampler of its own; leave out --solver, --schedule and --guidance"
        )
    if args.particles < 2:
        raise CommandError(f"--particles is {args.particles}; give at least 2")
    return kind, value


def _how(args: Sample, how: dict[str, Any]) -> str:
    if args.schedule is not None:
        return f"schedule {args.schedule}"
    return f"{how['solver']} on the {how['grid']} grid"


def _solver(args: Sample, trained: Any) -> tuple[Any, Any]:
    """The solver, and the grid that goes with a schedule."""
    with explained():
        if args.schedule is None:
            options = {"label": args.label, "guidance": args.guidance}
            return named_solver(args.solver, trained, **options), None
        from jaxgen.train.recipes.schedules import load_solver

        return load_solver(args.schedule, trained.experiment)


def _check_label(args: Sample, experiment: Any) -> None:
    if args.label is None:
        if args.guidance != 1:
            raise CommandError("--guidance needs a --label to guide towards")
        return
    if not experiment.config.labels:
        raise CommandError(f"{args.dir} was trained without labels; train one with --labels")
    if not 0 <= args.label < experiment.train.num_classes:
        raise CommandError(
            f"--label is {args.label}; the classes are 0 to {experiment.train.num_classes - 1}"
        )
