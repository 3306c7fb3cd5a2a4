"""The training step and the sampler of a run, compiled for devices that are not there.

The compiler wants an environment of its own, so ``plan_run`` starts a process, hands it the
configuration as JSON and gets plans back as JSON, with lines of progress in between. Inside such a
process, or over devices that are there, ``plan_experiment`` and ``plan_sampler`` do the work.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxgen import solve
from jaxgen.core import keys
from jaxgen.solve.discrete import radd_sample
from jaxgen.train import mesh as meshes
from jaxgen.train.data import DataError
from jaxgen.train.recipes.config import ConfigError, ScoreConfig, from_mapping
from jaxgen.train.recipes.run import make_experiment
from jaxgen.train.recipes.score import Experiment
from jaxgen.train.recipes.text import TextExperiment
from jaxgen.train.step_plan import (
    StepPlan,
    largest_batch,
    plan_program,
    plan_step,
    sharded_shapes,
)
from jaxgen.train.topology import (
    Chip,
    Topology,
    environment,
    parse_topology,
    topology_devices,
)

__all__ = ["RunPlan", "batch_shapes", "plan_experiment", "plan_run", "plan_sampler"]

Say = Callable[[str], None]


class RunPlan(NamedTuple):
    """Plans of one run.

    Attributes:
      step: of the training step.
      sampler: of the sampler, if asked for.
      largest: of the step at the largest batch that fits, if asked for and any does.
      compiles: compilations that ``largest`` took beside ``step``.
    """

    step: StepPlan
    sampler: StepPlan | None = None
    largest: StepPlan | None = None
    compiles: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            name: value.to_dict() if isinstance(value, StepPlan) else value
            for name, value in self._asdict().items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunPlan":
        """The inverse of ``to_dict``."""
        made: dict[str, Any] = {
            name: StepPlan.from_dict(value) if isinstance(value, Mapping) else value
            for name, value in values.items()
        }
        return cls(**made)


def batch_shapes(experiment: Experiment, n: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of ``n`` raw examples, as ``datasets.batches`` gives them."""
    data = experiment.train
    arrays = {"x": data.x} | ({} if data.label is None else {"label": data.label})
    return {
        name: jax.ShapeDtypeStruct((n, *array.shape[1:]), array.dtype)
        for name, array in arrays.items()
    }


def plan_experiment(
    experiment: Experiment,
    mesh: Mesh,
    *,
    batch: int | None = None,
    rules: meshes.Rules | Sequence[str] = meshes.RULES,
    chip: Chip | None = None,
) -> StepPlan:
    """The plan of a run's training step; see ``train.plan_step``.

    Args:
      experiment: what would be trained.
      mesh: where.
      batch: examples of a step; default: the configuration's.
      rules: where the parts of the state lie.
      chip: of the mesh, if known.
    """
    config = experiment.config
    n = config.batch_size if batch is None else batch
    return plan_step(
        experiment.make_step(),
        jax.eval_shape(experiment.state),
        batch_shapes(experiment, n),
        mesh,
        rules=rules,
        chip=chip,
        what=f"training step of {_network(experiment)}",
    )


def plan_sampler(
    experiment: Experiment,
    mesh: Mesh,
    *,
    batch: int | None = None,
    rules: meshes.Rules | Sequence[str] = meshes.RULES,
    chip: Chip | None = None,
) -> StepPlan:
    """The plan of a run's sampler, with the solver and steps of its evaluation.

    Args:
      experiment: what would be sampled from.
      mesh: where; the samples are split as a batch is.
      batch: samples of one call; default: as many as a training step has examples.
      rules: where the parameters lie.
      chip: of the mesh, if known.
    """
    config = experiment.config
    n = config.batch_size if batch is None else batch
    params = jax.eval_shape(experiment.init, jax.random.key(0))
    named = meshes.state_shardings({"ema": params}, mesh, _only(rules, params, mesh))["ema"]
    params = sharded_shapes(params, named)
    key = sharded_shapes(jax.eval_shape(lambda: jax.random.key(0)), meshes.replicated(mesh))

    axes = meshes.batch_axes(mesh)
    shards = math.prod(mesh.shape[name] for name in axes)
    if n % shards:
        raise ValueError(
            f"batch is {n} samples, which do not divide over the {shards} parts of the mesh"
        )

    def draw(key: jax.Array, params: Any) -> jax.Array:
        with keys.part_of_batch(axes, n // shards):
            return _draw(key, experiment, params, n // shards)

    # As ``over_batch`` does.
    whole = PartitionSpec()
    mapped = jax.shard_map(
        draw, mesh=mesh, in_specs=(whole, whole), out_specs=meshes.batch_sharding(mesh).spec
    )
    lowered = jax.jit(mapped).lower(key, params)
    return plan_program(
        lowered,
        {"weights": params},
        mesh,
        batch=n,
        chip=chip,
        what=f"sampler of {_network(experiment)}, {config.solver} in {config.solver_steps} steps",
    )


def _draw(key: jax.Array, experiment: Experiment, params: Any, n: int) -> jax.Array:
    """Samples by the solver and steps of a run's evaluation."""
    config = experiment.config
    if isinstance(experiment, TextExperiment):
        return radd_sample(
            key,
            experiment.conditionals(params),
            experiment.sde,
            (n, experiment.vocabulary.length),
            config.solver_steps,
            method=config.solver,
        ).x
    return solve.sample(
        key,
        experiment.field(params),
        experiment.sde,
        (n, *experiment.train.event),
        solver=config.solver,
        steps=config.solver_steps,
        prediction=experiment.prediction,
    ).x


def _only(rules: meshes.Rules | Sequence[str], params: Any, mesh: Mesh) -> meshes.Rules:
    """The rules that speak of the averaged parameters; others are of no use to a sampler."""
    parsed = rules if isinstance(rules, meshes.Rules) else meshes.parse_rules(rules)
    kept = []
    for rule in parsed.rules:
        try:
            meshes.state_shardings({"ema": params}, mesh, meshes.Rules((rule,)))
        except ValueError:
            continue
        kept.append(rule)
    return meshes.Rules(tuple(kept))


def _network(experiment: Experiment) -> str:
    share = experiment.config.share
    shared = "" if share is None else f", share {share:g}"
    return f"{type(experiment.net).__name__} for {experiment.train.name}{shared}"


# --- in a process of its own ----------------------------------------------------------------------


def plan_run(
    config: ScoreConfig,
    topology: str,
    *,
    mesh: str = "data=-1",
    rules: Sequence[str] = (),
    sampler: bool = False,
    largest: bool = False,
    say: Say = lambda line: None,
) -> RunPlan:
    """Compile a run's step, and its sampler, for a topology, in a process of its own.

    Args:
      config: what would be trained.
      topology: as ``parse_topology`` reads it.
      mesh: as ``make_mesh`` reads it.
      rules: as ``parse_rules`` reads them.
      sampler: plan the sampler too.
      largest: look for the largest batch that fits.
      say: called with lines of progress.

    Raises:
      ConfigError: the configuration, the topology, the mesh or a rule cannot be used, or the
        compiler is missing.
      RuntimeError: the compiler failed.
    """
    try:
        where = parse_topology(topology)
        more = environment(where)
    except (ValueError, ModuleNotFoundError) as error:
        raise ConfigError(str(error)) from None
    if largest and where.chip is None:
        raise ConfigError(
            f"topology {topology} has no memory of its own to fit into; ask for the largest batch "
            "on a TPU's"
        )
    request = {
        "config": dataclasses.asdict(config),
        "topology": topology,
        "mesh": mesh,
        "rules": list(rules),
        "sampler": sampler,
        "largest": largest,
    }
    # Where this jaxgen was imported from; the caller's folder stays out of the path.
    root = str(Path(__file__).parents[3])
    more["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    words = [sys.executable, "-P", "-c", "from jaxgen.train.recipes.plan import serve; serve()"]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            words,
            env=os.environ | more,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as worker,
    ):
        try:
            assert worker.stdin is not None and worker.stdout is not None
            worker.stdin.write(json.dumps(request))
            worker.stdin.close()
            for line in worker.stdout:
                answer = json.loads(line) if line.startswith("{") else {}
                if "say" in answer:
                    say(answer["say"])
                elif "error" in answer:
                    raise ConfigError(answer["error"])
                elif "plan" in answer:
                    return RunPlan.from_dict(answer["plan"])
            worker.wait()
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["it said nothing"])[-1]
        finally:
            worker.kill()
    raise RuntimeError(f"the compiler's process ended with code {worker.returncode}: {last}")


def serve() -> None:
    """Answer one request of ``plan_run``, from standard input to standard output."""
    request, out = json.load(sys.stdin), sys.stdout
    # What libraries print must not come between the answers.
    sys.stdout = sys.stderr

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=out, flush=True)

    try:
        plan = _plan(request, lambda line: answer(say=line))
    except (ConfigError, DataError, ValueError, TimeoutError) as error:
        answer(error=str(error))
    else:
        answer(plan=plan.to_dict())


def _plan(request: Mapping[str, Any], say: Say) -> RunPlan:
    where: Topology = parse_topology(request["topology"])
    config = from_mapping(request["config"], ScoreConfig())
    experiment = make_experiment(config)
    mesh = meshes.make_mesh(request["mesh"], topology_devices(where, say=say))
    rules = meshes.parse_rules(request["rules"])
    resolved = experiment.config
    shards = math.prod(mesh.shape[name] for name in meshes.batch_axes(mesh))
    if resolved.batch_size % shards:
        raise ConfigError(
            f"the batch of {resolved.batch_size} does not divide over the {shards} parts of the "
            "mesh; choose another --batch-size or another --mesh"
        )
    if (resolved.batch_size // shards) % resolved.accumulate:
        raise ConfigError(
            f"the batch of {resolved.batch_size} leaves {resolved.batch_size // shards} examples "
            f"to each of the {shards} parts of the mesh, which {resolved.accumulate} micro batches "
            "do not divide; choose another --batch-size, --accumulate or --mesh"
        )
    options: dict[str, Any] = {"rules": rules, "chip": where.chip}
    wait = "" if where.chip is None else ", which takes a minute or so"

    def step_at(n: int) -> StepPlan:
        say(f"compiling the training step for {where.name}, batch {n:,}{wait}")
        return plan_experiment(experiment, mesh, batch=n, **options)

    step = step_at(resolved.batch_size)
    best, compiles, sampler = None, 0, None
    if request["sampler"]:
        say(f"compiling the sampler for {where.name}{wait}")
        sampler = plan_sampler(experiment, mesh, **options)
    if request["largest"]:
        best, compiles = largest_batch(step_at, step, shards * resolved.accumulate)
    return RunPlan(step, sampler, best, compiles)
