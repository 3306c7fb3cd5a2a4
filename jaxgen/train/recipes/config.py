"""The configuration of a score-based run: a frozen dataclass, and its plain YAML file.

A field that is ``None`` is chosen for the data by ``resolve``, so that a run's folder always holds
every number that the run was made with.
"""

import dataclasses
import math
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from jaxgen.train.manifest import replace_text

__all__ = [
    "ADDED",
    "MAY_CHANGE",
    "ConfigError",
    "Resolved",
    "ScoreConfig",
    "default_out",
    "field_names",
    "from_mapping",
    "read_yaml",
    "resolve",
    "write_yaml",
]

Process = Literal["vp", "sub_vp", "ve", "edm", "cosine", "rectified", "absorbing"]
Prediction = Literal["edm", "noise", "data", "score", "v", "velocity"]
Weighting = Literal["edm", "simple", "likelihood", "min_snr"]
Times = Literal["lognormal", "uniform", "stratified", "importance", "stratified_importance"]


class ConfigError(ValueError):
    """A configuration cannot be used; the message says which field, and what would do."""


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """What a run is made with. Fields left at None are chosen to suit the data."""

    data: str = "digits"
    """digits, mnist5k, moons, swissroll, checkerboard, gaussians, a folder of images or an .npz;
    for --process absorbing text (Python's help topics) or text:FILE."""
    process: Process = "vp"
    """How data become noise; absorbing hides the characters of a text."""
    steps: int | None = None
    """Training steps in all, those of earlier runs in the same folder included."""
    seed: int = 0
    """Of the split, the order of the data, the network and the noise."""
    out: str | None = None
    """The run's folder; by default runs/<data>-<process>, with -share<share> where it is shared and
    -fp<weight> with --fokker-planck."""

    share: float | None = None
    """Train in a pool: 0.1 for a tenth of the weights, 5000 for so many slots, 1 for the dense run;
    biases, norms and layers of a few weights pass through uncounted."""
    share_scheme: Literal["stable", "roast", "hashednet"] = "stable"
    """Which slot of the pool makes each weight: STABLE-RPS, ROAST or HashedNets."""

    fokker_planck: float | None = None
    """For points in the plane: learn a log-density, with this weight on its Fokker-Planck residual,
    such as 0.1; 0 is the same network without it."""
    discrete_loss: Literal["t_dse", "t_dce", "lambda_dce", "k_dce"] = "lambda_dce"
    """For text: which of the four equivalent losses."""
    length: int | None = None
    """For text: characters in one example; 64 if not given."""

    batch_size: int | None = None
    """Examples in a step, over all devices together."""
    learning_rate: float | None = None
    """Adam's, after the warm-up."""
    warmup_steps: int = 200
    """Steps over which the learning rate rises from zero."""
    schedule: Literal["constant", "cosine"] = "constant"
    """The learning rate after the warm-up; with cosine a longer run needs --reschedule."""
    weight_decay: float = 0.0
    """Decoupled weight decay, as in AdamW."""
    ema: float = 0.999
    """Decay of the moving average of the parameters, which is what samples come from."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    accumulate: int = 1
    """Parts that a batch is worked through in, to save memory."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the network's arithmetic; the parameters stay float32."""
    remat: bool = False
    """Work the network's blocks out again in the backward pass: less memory, more time."""

    prediction: Prediction = "edm"
    """What the network predicts; edm is EDM's preconditioned denoiser, for any process."""
    weighting: Weighting = "edm"
    """How much an error counts at each noise level."""
    times: Times = "lognormal"
    """Which noise levels a step looks at."""
    process_args: tuple[str, ...] = ()
    """Numbers for the process, such as beta_max=15 or sigma_max=50."""

    labels: bool = False
    """Train on the labels too, so that sampling can ask for one and be guided."""
    label_dropout: float = 0.1
    """Share of examples whose label is hidden, so that the network knows the mixture as well."""
    width: int | None = None
    """Channels of the network's finest level (units, for data that are no images)."""
    channel_mults: tuple[int, ...] | None = None
    """Channels of each level of the U-Net, as multiples of width, finest first."""
    blocks: int | None = None
    """Residual blocks per level (in all, for data that are no images)."""
    attention: tuple[int, ...] = ()
    """Heights at which the U-Net attends."""
    patch: int | None = None
    """Pixels on a side that the U-Net folds into channels."""
    dropout: float | None = None
    """Dropout in the network's blocks."""
    image_size: int | None = None
    """Side to which a folder's images are cut and resized."""
    held_out: float = 0.15
    """Share of the data kept from training, for the likelihood."""

    report_every: int = 100
    """Steps between lines of metrics.jsonl."""
    save_every: int = 1000
    """Steps between checkpoints."""
    save_seconds: float = 60.0
    """Longest time between checkpoints, in seconds."""
    keep: int = 2
    """Checkpoints to keep."""

    eval_samples: int | None = None
    """Samples that the evaluation draws, and looks at by its classifier."""
    eval_likelihood: int | None = None
    """Held-out examples whose likelihood is measured."""
    classifier_steps: int = 200
    """Training steps of the classifier that judges the samples of labelled images."""
    solver: str = "heun"
    """Solver of the evaluation's samples; `jaxgen sample` may choose another. For text tweedie,
    which stands for heun there, or euler."""
    solver_steps: int | None = None
    """Its steps."""


ADDED = ("share", "share_scheme", "fokker_planck", "discrete_loss", "length", "remat")
"""Fields that older checkpoints do not know: left out of new ones too where they are not set."""

MAY_CHANGE = (
    "steps",
    "out",
    "report_every",
    "save_every",
    "save_seconds",
    "keep",
    "eval_samples",
    "eval_likelihood",
    "classifier_steps",
    "solver",
    "solver_steps",
)
"""Fields in which a run that goes on may differ from what it was started with."""


# --- values that suit the data ------------------------------------------------------------------

_TABLE = {
    # kind: (steps, batch, learning rate, width, mults, blocks, patch, dropout, solver steps,
    #        evaluation's samples, its held-out examples)
    "small": (1200, 128, 2e-3, 32, (1, 2), 1, 1, 0.0, 24, 500, 128),
    "images": (8000, 64, 1e-3, 32, (1, 2, 4), 1, 2, 0.0, 24, 500, 128),
    "points": (4000, 256, 1e-3, 128, (1,), 3, 1, 0.0, 24, 500, 128),
    "text": (3000, 32, 3e-3, 96, (1,), 3, 1, 0.0, 128, 16, 512),
}
LENGTH = 64
"""Characters in one example of text, where nothing else is asked for."""
_NAMES = (
    "steps",
    "batch_size",
    "learning_rate",
    "width",
    "channel_mults",
    "blocks",
    "patch",
    "dropout",
    "solver_steps",
    "eval_samples",
    "eval_likelihood",
)


@dataclasses.dataclass(frozen=True)
class Resolved(ScoreConfig):
    """A ``ScoreConfig`` in which every number stands; made by ``resolve``."""

    steps: int = 0
    out: str = ""
    batch_size: int = 0
    learning_rate: float = 0.0
    width: int = 0
    channel_mults: tuple[int, ...] = ()
    blocks: int = 0
    patch: int = 0
    dropout: float = 0.0
    solver_steps: int = 0
    eval_samples: int = 0
    eval_likelihood: int = 0


def resolve(config: ScoreConfig, event: tuple[int, ...]) -> Resolved:
    """``config`` with every ``None`` that has a meaning for the data replaced, and checked.

    Args:
      config: what was asked for.
      event: shape of one example.

    Raises:
      ConfigError: a number out of range, or a network that does not fit the data.
    """
    kind = "points" if len(event) != 3 else "small" if event[0] * event[1] <= 256 else "images"
    if config.process == "absorbing":
        kind = "text"
        if config.solver == ScoreConfig.solver:
            config = dataclasses.replace(config, solver="tweedie")
    else:
        for name in ("length", "discrete_loss"):
            if getattr(config, name) != getattr(ScoreConfig, name):
                raise ConfigError(
                    f"{name} is {getattr(config, name)}, which is for text (--process absorbing); "
                    "leave it out"
                )
    chosen: dict[str, Any] = dict(zip(_NAMES, _TABLE[kind], strict=True))
    if kind == "images" and config.patch is None and config.channel_mults is None:
        chosen |= _levels(event)
    chosen |= {"out": default_out(config), "length": event[0] if kind == "text" else None}
    values = {name: getattr(config, name) for name in field_names()}
    values |= {name: value for name, value in chosen.items() if values[name] is None}
    resolved = Resolved(**values)
    _check(resolved, event)
    return resolved


def field_names() -> list[str]:
    """The names of a configuration's fields, in order."""
    return [field.name for field in dataclasses.fields(ScoreConfig)]


def default_out(config: ScoreConfig) -> str:
    """The folder of a run: the one asked for, or ``runs/<data>-<process>[-share<share>]``."""
    if config.out:
        return config.out
    name = f"{Path(config.data.removeprefix('text:')).stem or 'data'}-{config.process}"
    if config.share is not None:
        scheme = "" if config.share_scheme == "stable" else f"-{config.share_scheme}"
        # Twelve digits: 0.1 and 123456 are written as they were given.
        name += f"-share{config.share:.12g}{scheme}"
    if config.fokker_planck is not None:
        name += f"-fp{config.fokker_planck:.12g}"
    return str(Path("runs") / name)


def _levels(event: tuple[int, ...]) -> dict[str, Any]:
    """The deepest folding that the sides divide by, up to a patch of 2 and three levels."""
    halvings = next((k for k in (3, 2, 1) if event[0] % 2**k == 0 and event[1] % 2**k == 0), 0)
    return {"patch": 2 if halvings else 1, "channel_mults": (1, 2, 4)[: max(halvings, 1)]}


def _check(config: Resolved, event: tuple[int, ...]) -> None:
    least = {
        "steps": 1, "batch_size": 1, "accumulate": 1, "width": 1, "blocks": 1, "patch": 1,
        "report_every": 1, "save_every": 1, "keep": 1, "eval_samples": 2, "eval_likelihood": 1,
        "solver_steps": 1, "warmup_steps": 0, "seed": 0, "learning_rate": 0.0, "weight_decay": 0.0,
        "clip": 0.0, "save_seconds": 0.0, "classifier_steps": 1,
    }  # fmt: skip
    for name, low in least.items():
        value = getattr(config, name)
        strict = name in ("learning_rate", "clip", "save_seconds")
        if not (value > low if strict else value >= low):
            raise ConfigError(
                f"{name} is {value}; expected {'more than' if strict else 'at least'} {low}"
            )
    for name in ("ema", "label_dropout", "dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise ConfigError(f"{name} is {getattr(config, name)}; expected a number in [0, 1)")
    if config.share is not None and not (
        0 < config.share <= 1 or (config.share > 1 and config.share.is_integer())
    ):
        raise ConfigError(
            f"share is {config.share:g}; expected a share of the weights in (0, 1], or a whole "
            "number of slots"
        )
    if config.fokker_planck is not None and not 0 <= config.fokker_planck < math.inf:
        raise ConfigError(
            f"fokker_planck is {config.fokker_planck}; expected a weight of at least 0"
        )
    if not 0 < config.held_out < 1:
        raise ConfigError(f"held_out is {config.held_out}; expected a share between 0 and 1")
    if config.batch_size % config.accumulate:
        raise ConfigError(
            f"accumulate is {config.accumulate}; expected a divisor of batch_size, "
            f"{config.batch_size}"
        )
    if len(event) == 3:
        mults, patch = config.channel_mults, config.patch
        divisor = patch * 2 ** (len(mults) - 1)
        if event[0] % divisor or event[1] % divisor:
            raise ConfigError(
                f"channel_mults {mults} and patch {patch} need images whose sides divide by "
                f"{divisor}, not {event[0]} x {event[1]}; choose fewer levels or another "
                "image_size"
            )


# --- YAML ---------------------------------------------------------------------------------------

Config = TypeVar("Config", bound=ScoreConfig)


def write_yaml(path: str | os.PathLike[str], config: ScoreConfig) -> None:
    """Write the fields as plain YAML, put in place by rename.

    Raises:
      OSError: the disk is full or the folder cannot be written.
    """
    import yaml

    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
    }
    replace_text(Path(path), yaml.safe_dump(values, sort_keys=False))


def read_yaml(path: str | os.PathLike[str], base: Config) -> Config:
    """``base`` with the fields that a YAML file sets, read by ``safe_load``, cast to their types.

    Raises:
      ConfigError: no such file, no YAML mapping, an unknown field or a value of another type.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"config {path} cannot be read: {reason}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping):
        raise ConfigError(f"config {path} holds {type(values).__name__}; expected field: value")
    return from_mapping(values, base, where=f"config {path}")


def from_mapping(values: Mapping[Any, Any], base: Config, *, where: str = "config") -> Config:
    """``base`` with these fields replaced, cast to their types.

    Raises:
      ConfigError: an unknown field, or a value of another type.
    """
    hints = typing.get_type_hints(type(base))
    unknown = [str(name) for name in values if name not in hints]
    if unknown:
        raise ConfigError(
            f"{where} has the unknown field {unknown[0]!r}; the fields are {', '.join(hints)}"
        )
    cast = {}
    for name, value in values.items():
        try:
            cast[name] = _cast(value, hints[name])
        except (TypeError, ValueError):
            raise ConfigError(
                f"{where} sets {name} to {value!r}; expected {_type_name(hints[name])}"
            ) from None
    return dataclasses.replace(base, **cast)


def _cast(value: Any, hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _cast(value, next(a for a in args if a is not type(None)))
    if origin is Literal:
        if value in args:
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_cast(item, args[0]) for item in value)
    elif hint is bool or isinstance(value, bool):
        if hint is bool and isinstance(value, bool):
            return value
    elif hint is float and isinstance(value, int | float | str):
        # YAML 1.1 reads 1e-3 as a string.
        return float(value)
    elif isinstance(value, hint):
        return value
    raise TypeError(value)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint)
