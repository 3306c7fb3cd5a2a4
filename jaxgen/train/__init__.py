"""Training: a state, a step, a loop, checkpoints that prove themselves, and many devices.

>>> from jaxgen import train                                              # doctest: +SKIP
>>> state = train.TrainState.create(key, params, optimizer)               # doctest: +SKIP
>>> step = train.make_train_step(loss_fn, optimizer)                      # doctest: +SKIP
>>> state = train.fit(state, step, batches, 10_000, out="runs/first")     # doctest: +SKIP

Nothing in the library imports this room but the command line.
"""

import importlib
from typing import Any

from jaxgen.train.checkpoint import Saver, restore, save
from jaxgen.train.distributed import DistributedError
from jaxgen.train.feed import Feed
from jaxgen.train.layouts import read_layout, read_layouts
from jaxgen.train.lock import FolderBusy
from jaxgen.train.loop import Diverged, Interrupted, fit
from jaxgen.train.manifest import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointExists,
    CheckpointForeign,
    CheckpointMismatch,
    CheckpointMissing,
    CheckpointTruncated,
    latest_valid,
    read_manifest,
    saved_steps,
)
from jaxgen.train.mesh import (
    RULES,
    Rules,
    batch_sharding,
    data_mesh,
    gather,
    make_mesh,
    parse_rules,
    place,
    replicate,
    replicated,
    shard_batch,
    state_shardings,
)
from jaxgen.train.parallel import (
    local_step,
    mean_over_batch,
    over_batch,
    pmap_step,
    shard_map_step,
)
from jaxgen.train.state import TrainState
from jaxgen.train.step import Metrics, Step, make_train_step
from jaxgen.train.step_plan import StepPlan, describe_plan, plan_step

__all__ = [
    "RULES",
    "CheckpointDamaged",
    "CheckpointError",
    "CheckpointExists",
    "CheckpointForeign",
    "CheckpointMismatch",
    "CheckpointMissing",
    "CheckpointTruncated",
    "DistributedError",
    "Diverged",
    "Feed",
    "FolderBusy",
    "Interrupted",
    "Metrics",
    "Rules",
    "Saver",
    "Step",
    "StepPlan",
    "TrainState",
    "batch_sharding",
    "data_mesh",
    "describe_plan",
    "fit",
    "gather",
    "latest_valid",
    "local_step",
    "make_mesh",
    "make_train_step",
    "mean_over_batch",
    "over_batch",
    "parse_rules",
    "place",
    "plan_step",
    "pmap_step",
    "read_layout",
    "read_layouts",
    "read_manifest",
    "replicate",
    "replicated",
    "restore",
    "save",
    "saved_steps",
    "shard_batch",
    "shard_map_step",
    "state_shardings",
]


def __getattr__(name: str) -> Any:
    # The data sets need extras that a user's own loop does without.
    if name in ("data", "recipes"):
        return importlib.import_module(f"jaxgen.train.{name}")
    raise AttributeError(f"module 'jaxgen.train' has no attribute {name!r}")
