"""A run and its folder: start, go on, extend, finish; and read a trained run back.

The folder holds ``config.yaml``, ``metrics.jsonl``, ``checkpoints/``, and at the end
``metrics.json``, ``samples.png`` and ``curves.png``; a run on text has ``text.json``, its
characters, and ``samples.txt`` too. Everything is checked before anything is written.

Several processes may train one run together, in a folder that all of them see: process 0 writes
everything but its checkpoints, which all write, and measures the run alone when it is trained.
"""

import contextlib
import dataclasses
import json
import math
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxgen import train
from jaxgen.share import Layout
from jaxgen.train import data as datasets
from jaxgen.train import distributed, lock
from jaxgen.train import mesh as meshes
from jaxgen.train.manifest import replace_text
from jaxgen.train.recipes import pictures
from jaxgen.train.recipes.config import (
    ADDED,
    LENGTH,
    MAY_CHANGE,
    ConfigError,
    ScoreConfig,
    field_names,
    read_yaml,
    resolve,
    write_yaml,
)
from jaxgen.train.recipes.evaluate import Drawn, evaluate
from jaxgen.train.recipes.score import Experiment, build
from jaxgen.train.recipes.text import (
    TextExperiment,
    build_text,
    evaluate_text,
    load_for,
    write_samples,
)
from jaxgen.train.report import read_lines
from jaxgen.train.text import is_text, read_vocabulary, write_vocabulary

__all__ = [
    "Run",
    "make_experiment",
    "measure",
    "open_run",
    "open_text_run",
    "prepare",
    "stored_config",
    "train_run",
]

Say = Callable[[str], None]

_EVALUATION = 0x0E7A1
_SEEN = 30.0


class Run(NamedTuple):
    """A trained run read back.

    Attributes:
      experiment: what was trained.
      params: the averaged parameters, on one device; pools stay pools.
      step: the step that they are of.
    """

    experiment: Experiment
    params: Any
    step: int


def stored_config(out: Path) -> ScoreConfig | None:
    """The configuration of the run in a folder, ``None`` if there is none.

    Raises:
      ConfigError: there is one that cannot be read.
    """
    path = out / "config.yaml"
    return read_yaml(path, ScoreConfig()) if path.exists() else None


def prepare(config: ScoreConfig, *, reschedule: bool = False) -> Experiment:
    """Check everything about a run that can be checked without writing.

    Args:
      config: what was asked for.
      reschedule: let a run with a decaying learning rate go on to another number of steps.

    Returns:
      The experiment; its folder is new, empty, or holds an earlier part of the same run.

    Raises:
      DataError, ConfigError: the data or a setting cannot be used, or the folder holds another run.
    """
    experiment = make_experiment(config)
    resolved = experiment.config
    out = Path(resolved.out)
    before = stored_config(out)
    if before is None:
        if out.exists() and (not out.is_dir() or not lock.is_empty(out)):
            raise ConfigError(f"{out} exists and holds no run; choose another folder by --out")
        return experiment
    differ = [
        f"{name} {getattr(before, name)!r} there, {getattr(resolved, name)!r} now"
        for name in field_names()
        if name not in MAY_CHANGE and getattr(before, name) != getattr(resolved, name)
    ]
    if differ:
        raise ConfigError(
            f"{out} holds a run with another config ({', '.join(differ)}); choose another folder "
            "by --out, or leave that flag out"
        )
    if isinstance(experiment, TextExperiment):
        _check_text(experiment, out)
    saved = train.saved_steps(out / "checkpoints")
    step = saved[-1] if saved else 0
    if step > resolved.steps:
        raise ConfigError(
            f"{out} holds a run at step {step}, past {resolved.steps}; choose more steps, or "
            "another folder by --out"
        )
    if resolved.schedule == "cosine" and before.steps != resolved.steps and step and not reschedule:
        raise ConfigError(
            f"{out} holds a run whose learning rate falls to zero at step {before.steps}; to bend "
            f"it towards {resolved.steps} steps give --reschedule too"
        )
    return experiment


def make_experiment(config: ScoreConfig) -> Experiment:
    """The experiment of a configuration, its data loaded; its folder is not looked at.

    Raises:
      DataError, ConfigError: the data or a setting cannot be used.
    """
    if config.process == "absorbing":
        text = load_for(config, LENGTH if config.length is None else config.length)
        return build_text(resolve(config, text.train.event), text.vocabulary, text)
    if is_text(config.data):
        raise ConfigError(
            f"data {config.data} is text, and process {config.process} is for numbers; give "
            "--process absorbing"
        )
    data = datasets.load(config.data, image_size=config.image_size)
    return build(resolve(config, data.event), data)


def _check_text(experiment: TextExperiment, out: Path) -> None:
    """Refuse a text that is not the one that the run in a folder was started with."""
    before = read_vocabulary(out)
    if before is not None and before.sha256 != experiment.vocabulary.sha256:
        raise ConfigError(
            f"{experiment.config.data} is another text than {out} was started with (SHA-256 "
            f"{experiment.vocabulary.sha256[:12]} now, {before.sha256[:12]} there); choose another "
            "folder by --out"
        )


def finished(out: Path, steps: int) -> dict[str, Any] | None:
    """The figures of a run that has come to ``steps``, ``None`` if it has not."""
    try:
        figures = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return figures if figures.get("step", -1) >= steps else None


def _make_folder(experiment: Experiment) -> None:
    """Make the run's folder with its config; nothing is left of it if that cannot be written."""
    out = Path(experiment.config.out)
    missing = [path for path in (out, *out.parents) if not path.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        # The characters first: a folder with a config is a run.
        if isinstance(experiment, TextExperiment):
            write_vocabulary(out, experiment.vocabulary)
        write_yaml(out / "config.yaml", experiment.config)
    except OSError:
        for name in ("config.yaml.tmp", "text.json.tmp", "text.json"):
            with contextlib.suppress(OSError):
                (out / name).unlink()
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _opening(experiment: Experiment) -> str:
    config = experiment.config
    saved = train.saved_steps(Path(config.out) / "checkpoints")
    if saved:
        start = f"going on with {config.out} at step {saved[-1]}"
    else:
        start = f"a new run in {config.out}"
    return (
        f"{start}: {config.data}, {len(experiment.train)} examples to learn and "
        f"{len(experiment.held_out)} held out; {config.process}; "
        f"{type(experiment.net).__name__} of {_size(experiment)}; "
        f"{config.steps} steps of {config.batch_size}"
    )


def _size(experiment: Experiment) -> str:
    if experiment.sharing is None:
        return f"{experiment.parameters():,} parameters"
    return f"{experiment.sharing.weights:,} weights in {experiment.parameters():,} numbers"


def _layouts(experiment: Experiment) -> tuple[Layout, ...]:
    return () if experiment.sharing is None else experiment.sharing.layouts


def _kept_config(experiment: Experiment) -> dict[str, Any]:
    """The configuration for the checkpoints, which those from before a field came can match."""
    config, plain = dataclasses.asdict(experiment.config), ScoreConfig()
    return {
        name: value
        for name, value in config.items()
        if name not in ADDED or value != getattr(plain, name)
    }


def _shared(experiment: Experiment) -> dict[str, Any]:
    """What a run's figures say of its pools: nothing where there are none."""
    sharing, config = experiment.sharing, experiment.config
    if sharing is None:
        return {}
    return {
        "share": {
            "budget": config.share,
            "scheme": config.share_scheme,
            "weights": sharing.weights,
            "slots": [layout.m for layout in sharing.layouts],
            "fingerprints": [layout.fingerprint for layout in sharing.layouts],
        }
    }


def train_run(
    experiment: Experiment,
    *,
    progress: bool | None = None,
    say: Say = lambda line: None,
    mesh: Mesh | None = None,
    rules: meshes.Rules | Sequence[str] = meshes.RULES,
    on_report: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any] | None:
    """Train to the configured steps, from where the folder's run stands, and measure.

    Args:
      experiment: from ``prepare``.
      progress: ``False`` shows nothing.
      say: called with each line that tells what is being done.
      mesh: from ``make_mesh``; default: every device that divides the batch, in one row.
      rules: where the parts of the state lie on it.
      on_report: called with each line of ``metrics.jsonl``.

    Returns:
      The figures. With several processes those part when the run is trained: process 0 measures
      it, and the others get ``None``.

    Raises:
      Interrupted, Diverged, CheckpointError, OSError, ValueError: see ``train.fit``.
      FolderBusy: another run is at work in the folder.
      DistributedError: the processes have different configurations, or one could not go on.
    """
    config, out = experiment.config, Path(experiment.config.out)
    more = {"mesh": _words(mesh), "rules": str(rules), "examples": _fingerprint(experiment)}
    distributed.agree({**dataclasses.asdict(config), **more})
    mesh = default_mesh(config.batch_size, config.accumulate) if mesh is None else mesh
    with contextlib.ExitStack() as stack:
        distributed.first(lambda: stack.enter_context(lock.hold(out)))
        distributed.first(lambda: _make_folder(experiment))
        held = distributed.choose_text(lock.text(out))
        distributed.everywhere(lambda: _check_seen(out, held))
        say(_opening(experiment))
        state = train.fit(
            experiment.state(),
            experiment.make_step(),
            datasets.batches(
                experiment.train,
                config.batch_size,
                seed=config.seed,
                process=jax.process_index(),
                processes=jax.process_count(),
            ),
            config.steps,
            out=out,
            config=_kept_config(experiment),
            progress=progress if jax.process_index() == 0 else False,
            mesh=mesh,
            rules=rules,
            report_every=config.report_every,
            save_every=config.save_every,
            save_seconds=config.save_seconds,
            keep=config.keep,
            config_may_change=MAY_CHANGE,
            layout=_layouts(experiment),
            on_report=on_report,
        )
        params, step = meshes.gather(state.ema), int(state.step)
        distributed.part()
        if jax.process_index():
            return None
        figures, _ = measure(Run(experiment, params, step), say=say)
    return figures


def default_mesh(batch_size: int, accumulate: int = 1) -> Mesh | None:
    """As many devices as divide each micro batch, in one row; ``None`` where there is but one.

    Raises:
      ConfigError: there are several processes, and not all of their devices can be used.
    """
    if jax.device_count() == 1:
        return None
    least = jax.device_count() * accumulate
    if jax.process_count() > 1 and batch_size % least:
        micro = f" in {accumulate} micro batches" if accumulate > 1 else ""
        raise ConfigError(
            f"batch_size is {batch_size}, which the {jax.device_count()} devices of "
            f"{jax.process_count()} processes do not divide{micro}; choose a multiple of {least}"
        )
    return train.data_mesh(batch=batch_size // accumulate)


def _words(mesh: Mesh | None) -> str:
    return "" if mesh is None else ",".join(f"{name}={size}" for name, size in mesh.shape.items())


def _fingerprint(experiment: Experiment) -> str:
    """How many examples there are, and a checksum of them; not worked out for one process."""
    if jax.process_count() == 1:
        return ""
    x = experiment.train.x
    return f"{len(x)} ({zlib.crc32(x.tobytes()):08x})"


def _check_seen(out: Path, held: str) -> None:
    """Refuse a folder that is another one on this host, where a run of its own may lie."""
    end = time.monotonic() + _SEEN
    # What one host has written a network's file system may show another a little later.
    while not (out / "config.yaml").exists() or lock.text(out) != held:
        if time.monotonic() > end:
            raise ConfigError(
                f"process {jax.process_index()} does not see the {out} that process 0 has made; "
                "choose a folder that all hosts share, by --out"
            )
        time.sleep(0.2)


def measure(run: Run, *, say: Say = lambda line: None) -> tuple[dict[str, Any], Any]:
    """Evaluate a run and write ``metrics.json``, ``samples.png`` and ``curves.png``.

    Where a log-density was learned, ``gap.png`` shows its two samplers.

    Returns:
      The figures, and a ``Drawn`` or ``TextDrawn``.

    Raises:
      OSError: the disk is full or the folder cannot be written.
    """
    experiment, config = run.experiment, run.experiment.config
    out, start = Path(config.out), time.monotonic()
    key = jax.random.fold_in(jax.random.key(config.seed), _EVALUATION)
    title = f"{config.data}: generated, step {run.step}"
    drawn: Any
    if isinstance(experiment, TextExperiment):
        figures, drawn = evaluate_text(key, experiment, run.params, say=say)
        write_samples(out, drawn, title)
    else:
        figures, drawn = evaluate(key, experiment, run.params, say=say)
        _draw_samples(out, title, experiment, drawn)
    lines = read_lines(out / "metrics.jsonl", run.step)
    pictures.draw_curves(out / "curves.png", lines)
    seconds = {
        "training": lines[-1]["wall_seconds"] if lines else None,
        "input_wait": round(math.fsum(x.get("input_wait_seconds", 0.0) for x in lines), 3),
        "first_step": next(
            (n["first_step_seconds"] for n in reversed(lines) if "first_step_seconds" in n), None
        ),
        "evaluation": round(time.monotonic() - start, 2),
        **figures.pop("seconds"),
    }
    whole = {
        "data": config.data,
        "process": config.process,
        "step": run.step,
        "parameters": experiment.parameters(),
        **_shared(experiment),
        **figures,
        "seconds": seconds,
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
        "jax": jax.__version__,
    }
    replace_text(out / "metrics.json", json.dumps(whole, indent=2) + "\n")
    return whole, drawn


def _draw_samples(out: Path, title: str, experiment: Experiment, drawn: Drawn) -> None:
    data = experiment.train
    if data.is_image:
        made, real = data.to_unit(data.from_unit(drawn.x[:100])), data.to_unit(data.x[:100])
        pictures.draw_grid(out / "samples.png", [(title, made), ("real", real)])
        return
    count = min(len(drawn.x), len(data))
    pictures.draw_points(
        out / "samples.png", [(title, data.from_unit(drawn.x[:count])), ("real", data.x[:count])]
    )
    if drawn.clouds is not None:
        flow, noisy = (data.from_unit(x) for x in drawn.clouds)
        panels = [("probability flow", flow), ("reverse SDE", noisy), ("real", data.x[: len(flow)])]
        pictures.draw_points(out / "gap.png", panels)


def open_run(folder: Path) -> Run:
    """Read a run back: its configuration, data, network and newest averaged parameters.

    Runs on text have another opener, ``open_text_run``.

    Raises:
      ConfigError: the folder holds no run.
      CheckpointError: it holds no checkpoint, or one that cannot be used.
      DataError: its data are gone.
    """
    stored = stored_config(folder)
    if stored is None:
        raise ConfigError(f"{folder} holds no run (no config.yaml); make one by jaxgen train")
    if stored.process == "absorbing":
        raise ConfigError(
            f"{folder} holds a run on text: jaxgen sample and jaxgen evaluate know it"
        )
    return _restored(folder, make_experiment(dataclasses.replace(stored, out=str(folder))))


def open_text_run(folder: Path, *, text: bool) -> Run:
    """Read a run on text back.

    Args:
      folder: the run's folder.
      text: load its text too, which measuring needs and sampling does not.

    Raises:
      ConfigError: the folder holds no run on text, or that is not the text any more.
      CheckpointError: it holds no checkpoint, or one that cannot be used.
      DataError: its text or its characters are gone.
    """
    stored, vocabulary = stored_config(folder), read_vocabulary(folder)
    if stored is None or stored.process != "absorbing" or vocabulary is None:
        raise ConfigError(f"{folder} holds no run on text (config.yaml and text.json)")
    stored = dataclasses.replace(stored, out=str(folder))
    if not text:
        config = resolve(stored, (vocabulary.length,))
        return _restored(folder, build_text(config, vocabulary, None))
    experiment = make_experiment(stored)
    assert isinstance(experiment, TextExperiment)
    _check_text(experiment, folder)
    return _restored(folder, experiment)


def _restored(folder: Path, experiment: Experiment) -> Run:
    """The experiment with the newest averaged parameters of a folder."""
    like = jax.eval_shape(experiment.state)
    state = train.restore(folder / "checkpoints", like, layout=_layouts(experiment))
    return Run(experiment, state.ema, int(state.step))
