r"""A trained run turned into a small generator of one step, by SlimFlow (arXiv 2407.12718).

Pairs of the teacher's probability flow, annealed reflow of a network of its own size, distillation
guided by that flow, and, for comparison, the same distillation without guidance; see
``adapt.slimflow``. Whatever the teacher's process, the student is a rectified flow from standard
noise: its folder holds a run of ``process: rectified`` with the network's parameters distilled, so
that ``open_run`` and ``jaxgen sample`` read it as any other::

    config.yaml, checkpoints/, metrics.jsonl   the student, as of any run
    distill.json                               what it was distilled from and with
    pairs/, reflow/, naive/                    the pairs and the other two networks
    metrics.json, samples.png, curves.png      at the end

Every part goes on where it was stopped.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import score, solve, train
from jaxgen.adapt.slimflow import distillation_loss, one_step, reflow_loss
from jaxgen.core import keys
from jaxgen.score.flow import anneal_schedule
from jaxgen.solve.reflow import Pairs, reflow_pairs, scaled_noise
from jaxgen.train import data as datasets
from jaxgen.train import lock
from jaxgen.train.manifest import replace_text
from jaxgen.train.recipes import pictures
from jaxgen.train.recipes.classifier import train_judge
from jaxgen.train.recipes.config import ConfigError, Resolved, write_yaml
from jaxgen.train.recipes.evaluate import CHUNK, judged, rounded, sliced
from jaxgen.train.recipes.run import Run, open_run, stored_config
from jaxgen.train.recipes.score import Experiment, build
from jaxgen.train.recipes.statistics import _digest
from jaxgen.train.report import read_lines
from jaxgen.train.state import TrainState
from jaxgen.train.step import make_train_step

__all__ = [
    "DistillConfig",
    "Distillation",
    "distill_run",
    "is_distilled",
    "prepare_distillation",
    "student_sampler",
    "teacher_sampler",
    "train_students",
    "yardstick",
]

Say = Callable[[str], None]

ABOUT = "distill.json"
T_MIN = 1e-3
TEACHER_EVALUATIONS = (1, 2, 5, 50)
_PAIRS, _MEASURE = 0xD157, 0xD158


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """What a run is distilled with."""

    steps: int = 1
    """Evaluations of the network that a sample of the new generator takes; 1 is what there is."""
    out: str | None = None
    """The new generator's folder; by default RUN-one-step."""
    width: int | None = None
    """Channels of the student's finest level; by default half the run's, a quarter of its
    weights."""
    pairs: int = 3000
    """Pairs of noise and sample that the teacher makes."""
    teacher_steps: int = 48
    """Evaluations of the teacher for each pair, by unipc along its probability flow."""
    reflow_steps: int = 2000
    """Training steps of the student's flow between the pairs."""
    annealing: Literal["linear", "cosine"] = "linear"
    """How the pairing goes from independent to the teacher's."""
    anneal_share: float = 0.3
    """The share of those steps that it takes; 0 starts with the teacher's pairs."""
    distill_steps: int = 1000
    """Training steps of the distillation to one step."""
    first: Literal["student", "teacher"] = "student"
    """Who takes the first half-step of the guidance: the student, or its frozen flow."""
    naive: bool = True
    """Distil without guidance too, to compare."""
    batch_size: int | None = None
    """Examples in a step; by default the run's."""
    learning_rate: float | None = None
    """Adam's, after the warm-up; by default the run's."""
    n: int | None = None
    """Samples to judge; by default the run's number."""
    seed: int = 0
    """Of the pairs, the student and its training."""


@dataclasses.dataclass(frozen=True, eq=False)
class Distillation:
    """Everything that is known before any work; made by ``prepare_distillation``.

    Attributes:
      config: what was asked for.
      teacher: the run.
      student: the experiment of the generator, a rectified flow.
      out: its folder.
      about: what ``distill.json`` says.
    """

    config: DistillConfig
    teacher: Run
    student: Experiment
    out: Path
    about: dict[str, Any]


def is_distilled(folder: Path) -> bool:
    """Whether a run's folder holds a one-step generator."""
    return (folder / ABOUT).is_file()


def _check(config: DistillConfig) -> None:
    if config.steps != 1:
        raise ConfigError(f"steps is {config.steps}; a run is distilled to 1 step")
    least = {
        "pairs": 2, "teacher_steps": 3, "reflow_steps": 1, "distill_steps": 1, "seed": 0, "n": 2,
        "width": 1,
    }  # fmt: skip
    for name, low in least.items():
        value = getattr(config, name)
        if value is not None and value < low:
            raise ConfigError(f"{name} is {value}; expected at least {low}")
    if not 0 <= config.anneal_share <= 1:
        raise ConfigError(f"anneal_share is {config.anneal_share}; expected a share in [0, 1]")


def _student_config(config: DistillConfig, run: Resolved, out: Path) -> Resolved:
    given: dict[str, Any] = {
        "batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
    }
    return dataclasses.replace(
        run,
        **{name: value for name, value in given.items() if value is not None},
        process="rectified",
        process_args=(f"t_max={1 - T_MIN}",),
        prediction="velocity",
        weighting="simple",
        times="uniform",
        steps=config.distill_steps,
        out=str(out),
        width=max(1, run.width // 2) if config.width is None else config.width,
        warmup_steps=min(run.warmup_steps, config.reflow_steps // 10, config.distill_steps // 10),
        # A rate that is nearly spent when the pairing becomes exact would waste the annealing.
        schedule="constant",
        labels=False,
        share=None,
        fokker_planck=None,
        dropout=0.0,
        solver="euler_time",
        solver_steps=1,
        eval_samples=run.eval_samples if config.n is None else config.n,
    )


def prepare_distillation(folder: Path, config: DistillConfig) -> Distillation:
    """Check everything that can be checked without writing.

    Args:
      folder: of a trained run, of any process with noise in it.
      config: what was asked for.

    Raises:
      ConfigError: a setting cannot be used, the folder holds no run or one that cannot be
        distilled, or ``out`` holds something else.
      CheckpointError, DataError: see ``open_run``.
    """
    _check(config)
    stored = stored_config(folder)
    if stored is None:
        raise ConfigError(f"{folder} holds no run (no config.yaml); make one by jaxgen train")
    if stored.process == "absorbing":
        raise ConfigError(f"{folder} was trained on text, which no flow makes from noise")
    if is_distilled(folder):
        raise ConfigError(f"{folder} takes one step already; give the run that it was made from")
    teacher = open_run(folder)
    # Of "." the name is known once it is resolved.
    named = folder if folder.name not in ("", "..") else folder.resolve()
    out = Path(config.out) if config.out else named.with_name(f"{named.name}-one-step")
    if out.resolve() == folder.resolve():
        raise ConfigError(f"{out} is the run itself; choose another folder by --out")
    run = teacher.experiment.config
    student_config = _student_config(config, run, out)
    for name in ("batch_size", "learning_rate"):
        if not getattr(student_config, name) > 0:
            raise ConfigError(f"{name} is {getattr(student_config, name)}; expected more than 0")
    if student_config.batch_size % student_config.accumulate:
        raise ConfigError(
            f"batch_size is {student_config.batch_size}; expected a multiple of the run's "
            f"accumulate, {student_config.accumulate}"
        )
    # The run's seed and share held out, so that the split is the run's.
    data = datasets.load(run.data, image_size=run.image_size)
    try:
        student = build(student_config, data)
        student.parameters()
    except ValueError as error:
        raise ConfigError(f"width {student_config.width} does not suit: {error}") from None
    about = {
        "format": "jaxgen distillation",
        "teacher": {"step": teacher.step, "params": _digest(teacher.params)},
        **{k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "n")},
        "width": student_config.width,
        "batch_size": student_config.batch_size,
        "learning_rate": student_config.learning_rate,
    }
    _check_folder(out, about)
    return Distillation(config, teacher, student, out, about)


def _check_folder(out: Path, about: dict[str, Any]) -> None:
    if not is_distilled(out):
        if out.exists() and (not out.is_dir() or not lock.is_empty(out)):
            raise ConfigError(
                f"{out} exists and holds no such work; choose another folder by --out"
            )
        return
    try:
        before = json.loads((out / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{out / ABOUT} cannot be read: {error}") from None
    differ = [
        f"{name} {before.get(name)!r} there, {value!r} now"
        for name, value in about.items()
        if before.get(name) != value and name != "teacher"
    ]
    if before.get("teacher") != about["teacher"]:
        differ.insert(0, "another teacher")
    if differ:
        raise ConfigError(
            f"{out} was distilled otherwise ({', '.join(differ)}); choose another folder by --out"
        )


# --- the work -----------------------------------------------------------------------------------


def _velocity(student: Experiment) -> Callable[..., jax.Array]:
    """The student's network as a velocity in flow time."""

    def velocity(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        return score.from_flow(student.field(params))(x, t)

    return velocity


def _teacher_field(teacher: Run) -> Any:
    """The teacher as a field that is a pytree, its parameters arguments of what is compiled."""
    experiment = teacher.experiment

    def field(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        return experiment.field(params)(x, t)

    return jax.tree_util.Partial(field, experiment.weights(teacher.params))


def _make_pairs(job: Distillation, progress: bool | None) -> datasets.Dataset:
    """The pairs, from the disk or made, as a data set of ``(n, 2, *event)``."""
    experiment = job.teacher.experiment
    chunks: Iterator[Pairs] = reflow_pairs(
        jax.random.fold_in(jax.random.key(job.config.seed), _PAIRS),
        _teacher_field(job.teacher),
        (CHUNK, *experiment.train.event),
        job.config.pairs,
        sde=experiment.sde,
        prediction=experiment.prediction,
        # Not adaptive: far from the data the flow of a large noise is straight, and a loose
        # tolerance steps over its bend.
        solver="unipc",
        steps=job.config.teacher_steps,
        folder=job.out / "pairs",
        made_for=job.about["teacher"]["params"],
        progress=progress,
    )
    pairs = np.concatenate([np.stack(chunk, axis=1) for chunk in chunks])
    good = np.isfinite(pairs).reshape(len(pairs), -1).all(axis=1)
    if not good.any():
        raise ConfigError("the teacher's flow gives NaN for every noise; train it anew")
    return datasets.Dataset("pairs", pairs[good])


def _on_pairs(loss: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def on_batch(key: jax.Array, params: Any, batch: Any, *step: jax.Array) -> jax.Array:
        return loss(key, params, Pairs(batch["x"][:, 0], batch["x"][:, 1]), *step)

    return on_batch


def _train(
    job: Distillation,
    out: Path,
    start: Any,
    loss: Callable[..., jax.Array],
    pairs: datasets.Dataset,
    steps: int,
    *,
    number: int,
    pass_step: bool = False,
    progress: bool | None = None,
) -> Any:
    """Train one stage, or read it back; the averaged parameters, on one device."""
    student, devices = job.student, jax.devices()
    config = student.config
    mesh = train.data_mesh(batch=config.batch_size) if len(devices) > 1 else None
    key = jax.random.fold_in(jax.random.key(job.config.seed), number)
    step = make_train_step(
        _on_pairs(loss),
        student.optimizer,
        ema=config.ema,
        clip=config.clip,
        accumulate=config.accumulate,
        dtype=None if config.precision == "float32" else jnp.dtype(config.precision),
        pass_step=pass_step,
    )
    state = train.fit(
        TrainState.create(key, start, student.optimizer),
        step,
        datasets.batches(
            pairs,
            config.batch_size,
            seed=job.config.seed + number,
            process=jax.process_index(),
            processes=jax.process_count(),
        ),
        steps,
        out=out,
        # Not a run's own config, so that none is gone on with as a run.
        config={"distilled": job.about, "pairs": len(pairs)},
        progress=progress,
        mesh=mesh,
        report_every=config.report_every,
        save_every=config.save_every,
        save_seconds=config.save_seconds,
        keep=1,
    )
    return jax.device_put(state.ema, devices[0])


def distill_run(
    job: Distillation, *, progress: bool | None = None, say: Say = lambda line: None
) -> dict[str, Any]:
    """Distil, from where the folder's work stands, measure and draw.

    Raises:
      Interrupted, Diverged, CheckpointError, OSError: see ``train.fit``.
      FolderBusy: another run is at work in the folder.
      ValueError: ``pairs/`` holds something else.
    """
    done = _finished(job)
    if done is not None:
        return done
    with lock.hold(job.out):
        made, seconds = train_students(job, progress=progress, say=say)
        return _measure(job, made, seconds, say)


def train_students(
    job: Distillation, *, progress: bool | None = None, say: Say = lambda line: None
) -> tuple[dict[str, Any], dict[str, float]]:
    """The averaged parameters of ``"flow"``, ``"naive"`` (if asked for) and ``"guided"``.

    Returns:
      These, and the seconds of the pairs.

    Raises:
      As ``distill_run``.
    """
    config, student, out = job.config, job.student, job.out
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / ABOUT, json.dumps(job.about, indent=1) + "\n")
    write_yaml(out / "config.yaml", student.config)
    run = job.teacher.experiment.config
    say(
        f"{out}: a student of {student.parameters():,} parameters for a teacher of "
        f"{job.teacher.experiment.parameters():,} ({run.data}, {run.process}, step "
        f"{job.teacher.step})"
    )
    say(f"1 of 4: {config.pairs} pairs of the teacher's flow")
    start = time.monotonic()
    pairs = _make_pairs(job, progress)
    seconds = {"pairs": round(time.monotonic() - start, 2)}

    velocity = _velocity(student)
    horizon = config.anneal_share * config.reflow_steps
    beta = anneal_schedule(config.annealing, horizon) if horizon else anneal_schedule("constant", 0)
    say(f"2 of 4: annealed reflow, {config.reflow_steps} steps")
    flow = _train(
        job,
        out / "reflow",
        student.init(jax.random.fold_in(jax.random.key(config.seed), 0)),
        reflow_loss(velocity, beta, t_min=T_MIN),
        pairs,
        config.reflow_steps,
        number=1,
        pass_step=True,
        progress=progress,
    )
    made = {"flow": flow}
    options: dict[str, Any] = {"first": config.first, "t_min": T_MIN}
    if config.naive:
        say(f"3 of 4: distillation without guidance, to compare, {config.distill_steps} steps")
        made["naive"] = _train(
            job,
            out / "naive",
            flow,
            distillation_loss(velocity, **options),
            pairs,
            config.distill_steps,
            number=2,
            progress=progress,
        )
    say(f"4 of 4: guided distillation, {config.distill_steps} steps")
    made["guided"] = _train(
        job,
        out,
        flow,
        distillation_loss(velocity, flow, **options),
        pairs,
        config.distill_steps,
        number=2,
        progress=progress,
    )
    return made, seconds


# --- what it is worth ---------------------------------------------------------------------------


def _finished(job: Distillation) -> dict[str, Any] | None:
    try:
        figures = json.loads((job.out / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_whole = figures.get("step", -1) >= job.config.distill_steps
    return figures if is_whole and figures["samples"]["count"] == _samples(job) else None


def _samples(job: Distillation) -> int:
    """Samples to judge, in whole chunks."""
    return math.ceil(job.student.config.eval_samples / CHUNK) * CHUNK


def _drawn(
    draw: Callable[[Any, jax.Array], jax.Array], params: Any, z: np.ndarray
) -> tuple[np.ndarray, float | None]:
    """Samples of these noises, chunk by chunk, and seconds for one after the first chunk."""
    run = jax.jit(draw)
    parts, seconds = [], []
    for first in range(0, len(z), CHUNK):
        start = time.monotonic()
        parts.append(np.asarray(run(params, jnp.asarray(z[first : first + CHUNK]))))
        seconds.append((time.monotonic() - start) / CHUNK)
    return np.concatenate(parts), float(np.median(seconds[1:])) if seconds[1:] else None


def teacher_sampler(experiment: Experiment, evaluations: int) -> Callable[..., jax.Array]:
    """``draw(params, z)`` of the run from standard noise: dpmpp_2m, and Euler's step for one."""

    def draw(params: Any, z: jax.Array) -> jax.Array:
        return solve.sample(
            jax.random.key(0),
            experiment.field(params),
            experiment.sde,
            z.shape,
            solver="ddim" if evaluations == 1 else "dpmpp_2m",
            steps=evaluations,
            prediction=experiment.prediction,
            x_init=scaled_noise(experiment.sde, z),
        ).x

    return draw


def student_sampler(student: Experiment) -> Callable[..., jax.Array]:
    """``draw(params, z)`` of a distilled network, in one evaluation."""
    velocity = _velocity(student)

    def draw(params: Any, z: jax.Array) -> jax.Array:
        return one_step(lambda x, t: velocity(params, x, t), z, t_min=T_MIN)

    return draw


def yardstick(
    key: jax.Array, experiment: Experiment
) -> tuple[str, Callable[[np.ndarray], dict[str, Any]]]:
    """The distance that suits the data, and a function from samples to its figures.

    Of labelled images the Frechet distance, by a classifier that is trained here; else the sliced
    Wasserstein distance.
    """
    data = experiment.train
    if not data.is_image or data.label is None:
        return "sliced_wasserstein", lambda x: sliced(key, data, x)
    judge = train_judge(key, data, experiment.held_out, steps=experiment.config.classifier_steps)
    return "frechet", lambda x: judged(judge, data, x)


def _measure(
    job: Distillation, made: dict[str, Any], seconds: dict[str, float], say: Say
) -> dict[str, Any]:
    """Distances of teacher and students, from the same noises; the folder's figures, pictures."""
    start = time.monotonic()
    student, teacher, out = job.student, job.teacher, job.out
    config, data = student.config, student.train
    key_noise, key_judge = jax.random.split(
        jax.random.fold_in(jax.random.key(job.config.seed), _MEASURE)
    )
    n = _samples(job)
    z = np.asarray(keys.normal(key_noise, (n, *data.event)))
    say(f"measuring, {n} samples each")
    kind, figures_of = yardstick(key_judge, student)
    weights = teacher.experiment.weights(teacher.params)
    jobs: list[tuple[str, int, Callable[..., jax.Array], Any]] = [
        ("teacher", e, teacher_sampler(teacher.experiment, e), weights)
        for e in TEACHER_EVALUATIONS[::-1]
    ]
    names = {"guided": "one step", "naive": "one step, unguided", "flow": "flow, undistilled"}
    sampler = student_sampler(student)
    jobs += [(title, 1, sampler, made[name]) for name, title in names.items() if name in made]
    rows: list[dict[str, Any]] = []
    reference: np.ndarray | None = None
    kept: dict[str, tuple[np.ndarray, dict[str, Any]]] = {}
    for title, evaluations, draw, params in jobs:
        x, each = _drawn(draw, params, z)
        reference = x if reference is None else reference
        found = figures_of(x)
        kept[f"{title} {evaluations}"] = x, found
        rows.append(
            {
                "generator": title,
                "evaluations": evaluations,
                kind: found[kind]["model_to_data"],
                "data_to_data": found[kind]["data_to_data"],
                "rmse": rounded(np.sqrt(np.mean((x - reference) ** 2))),
                "seconds_per_sample": None if each is None else rounded(each),
            }
        )
    lines = read_lines(out / "reflow" / "metrics.jsonl")
    shift = lines[-1]["step"] if lines else 0
    for line in read_lines(out / "metrics.jsonl"):
        lines.append(line | {"step": line["step"] + shift})
    _draw_pictures(job, kept["teacher 50"][0], kept["one step 1"][0], lines)
    trained = [read_lines(out / name / "metrics.jsonl") for name in ("reflow", "naive", ".")]
    seconds["training"] = round(sum(part[-1]["wall_seconds"] for part in trained if part), 2)
    seconds["evaluation"] = round(time.monotonic() - start, 2)
    figures = {
        "data": config.data,
        "process": config.process,
        "step": config.steps,
        "parameters": student.parameters(),
        **kept["one step 1"][1],
        "samples": {
            "count": n,
            "ema": config.ema,
            "solver": config.solver,
            "steps": 1,
            "grid": "time",
            "evaluations": 1,
        },
        "distilled": {
            "teacher_process": teacher.experiment.config.process,
            "teacher_step": teacher.step,
            "teacher_parameters": teacher.experiment.parameters(),
            "pairs": job.config.pairs,
            "rmse_to": "the teacher in 50 evaluations, from the same noise",
            "rows": rows,
        },
        "seconds": seconds,
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
        "jax": jax.__version__,
    }
    replace_text(out / "metrics.json", json.dumps(figures, indent=2) + "\n")
    return figures


def _draw_pictures(
    job: Distillation, teacher: np.ndarray, student: np.ndarray, lines: list[dict[str, Any]]
) -> None:
    data, out = job.student.train, job.out
    titles = ("teacher, 50 evaluations", "student, one, from the same noise", "real")
    shown = 100 if data.is_image else min(len(teacher), len(data))
    sets = [data.from_unit(x[:shown]) for x in (teacher, student)] + [data.x[:shown]]
    if data.is_image:
        panels = [(t, data.to_unit(x)) for t, x in zip(titles, sets, strict=True)]
        pictures.draw_grid(out / "samples.png", panels)
    else:
        pictures.draw_points(out / "samples.png", list(zip(titles, sets, strict=True)))
    pictures.draw_curves(out / "curves.png", lines)
