r"""What a compiled step will cost: memory, work, exchange, and the time that it cannot beat.

A step is lowered from shapes and compiled for a mesh of devices that need not be there
(``train.topology``); nothing of its size is made and nothing runs. What is reported is of one chip:

* memory: the parts of the state and the batch by the shards that a chip holds (the arrays
  themselves, without padding), and from the compiler its arguments (padded to the chip's tiles),
  results, temporaries and the *peak* of them all, which alone decides whether it fits,
* work: the compiler's FLOPs and bytes accessed, with every loop's body counted as often as it runs
  (``train.hlo``); what the compiler keeps on the chip between two operations counts as moved,
* collectives by kind,
* a roofline (Williams et al. 2009): with the published peaks of the chip, FLOPs over peak, bytes
  over HBM bandwidth and bytes on the wire over the bandwidth of the links each give a time; the
  largest is an estimate. No step is faster than the largest of the first, the last and the time to
  read every argument and write every result once.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxgen.train.hlo import Collective, read_hlo
from jaxgen.train.mesh import RULES, Rules, batch_axes, batch_sharding, state_shardings
from jaxgen.train.topology import Chip

__all__ = [
    "Memory",
    "Roofline",
    "StepPlan",
    "describe_plan",
    "largest_batch",
    "local_bytes",
    "plan_program",
    "plan_step",
    "sharded_shapes",
]

_MOST_COMPILES = 12


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip.

    Attributes:
      parts: of the arrays that go in, by name, without padding.
      arguments: what goes in, as the chip lays it out.
      outputs: what comes out and does not take the place of an argument.
      temporary: what the compiler sets aside beside these.
      code: the program.
      peak: the most that is held at one time: the compiler's figure, and no less than arguments,
        outputs and temporaries together (the CPU's compiler leaves the last out).
    """

    parts: dict[str, int]
    arguments: int
    outputs: int
    temporary: int
    code: int
    peak: int

    @property
    def working(self) -> int:
        """Activations, gradients and all else that the step adds to its arguments at the peak."""
        return self.peak - self.arguments


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one step by the published peaks of the chip.

    Attributes:
      compute: FLOPs over the peak of bfloat16 products.
      hbm: bytes moved over the bandwidth of main memory.
      hbm_least: bytes of arguments and results over the same.
      ici: bytes on the wire over the bandwidth of all links one way.
    """

    compute: float
    hbm: float
    hbm_least: float
    ici: float

    @property
    def estimate(self) -> float:
        """The largest of the three."""
        return max(self.compute, self.hbm, self.ici)

    @property
    def lower_bound(self) -> float:
        """What no step beats: with nothing moved but arguments and results."""
        return max(self.compute, self.hbm_least, self.ici)

    @property
    def bound_by(self) -> str:
        """What the estimate comes from."""
        times = {"compute": self.compute, "HBM": self.hbm, "links": self.ici}
        return max(times, key=lambda name: times[name])


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What one call of a program costs one chip; made by ``plan_step`` or ``plan_program``.

    Attributes:
      what: what was compiled, in words.
      mesh: sizes of the mesh's axes by name.
      batch: examples of one call, over all chips.
      fits: whether it fits the chip's memory; ``None`` where that is not known (CPUs).
      hbm: bytes of the chip's main memory, if known.
      memory: ``None`` if the compiler refused the program, for want of memory.
      flops: in one call, loops as often as they run.
      matmul_flops: those of matrix products and convolutions.
      bytes_moved: read and written by all operations, loops as often as they run.
      collectives: by kind.
      unknown_loops: loops whose rounds could not be read, counted once.
      roofline: ``None`` for CPUs.
      compile_seconds: how long the compiler took.
      refusal: what the compiler said if it refused, else empty; the figures are then all zero.
    """

    what: str
    mesh: dict[str, int]
    batch: int
    fits: bool | None
    hbm: int | None
    memory: Memory | None
    flops: float
    matmul_flops: int
    bytes_moved: float
    collectives: tuple[Collective, ...]
    unknown_loops: int
    roofline: Roofline | None
    compile_seconds: float
    refusal: str = ""

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.mesh.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = dataclasses.asdict(self)
        values["chips"] = self.chips
        if self.roofline is not None:
            for name in ("estimate", "lower_bound", "bound_by"):
                values["roofline"][name] = getattr(self.roofline, name)
        if self.memory is not None:
            values["memory"]["working"] = self.memory.working
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "StepPlan":
        """The inverse of ``to_dict``."""

        def make(kind: Any, given: Any) -> Any:
            names = {field.name for field in dataclasses.fields(kind)}
            return kind(**{name: value for name, value in given.items() if name in names})

        whole = make(cls, values)
        return dataclasses.replace(
            whole,
            memory=whole.memory and make(Memory, whole.memory),
            roofline=whole.roofline and make(Roofline, whole.roofline),
            collectives=tuple(make(Collective, each) for each in whole.collectives),
        )


def plan_step(
    step: Callable[..., Any],
    state: Any,
    batch: Any,
    mesh: Mesh,
    *,
    rules: Rules | Sequence[str] = RULES,
    chip: Chip | None = None,
    what: str = "training step",
) -> StepPlan:
    """Compile a training step for a mesh, and say what it costs. Nothing runs.

    Args:
      step: from ``make_train_step``, or any ``step(state, batch)``.
      state: the training state, or its shapes by ``jax.eval_shape``.
      batch: a global batch, or its shapes; axis 0 of each leaf is the batch.
      mesh: from ``make_mesh``; its devices may be those of ``topology_devices``.
      rules: where the parts of the state lie.
      chip: for the roofline and whether it fits; an entry of ``CHIPS``.
      what: what it is called in the plan.

    Raises:
      ValueError: the rules do not suit the state, or the batch does not divide over the mesh.

    Example:
      >>> import optax
      >>> from jaxgen import train
      >>> from jaxgen.train import mesh as meshes
      >>> adam = optax.adam(1e-3)
      >>> start = {"w": jnp.zeros((8, 4))}
      >>> state = jax.eval_shape(lambda: train.TrainState.create(jax.random.key(0), start, adam))
      >>> def loss_fn(key, params, batch):
      ...     return jnp.sum((batch @ params["w"]) ** 2, -1)
      >>> plan = plan_step(
      ...     train.make_train_step(loss_fn, adam),
      ...     state,
      ...     jax.ShapeDtypeStruct((16, 8), jnp.float32),
      ...     meshes.make_mesh("data=1", jax.devices()[:1]),
      ... )
      >>> plan.memory.parts["weights"], plan.matmul_flops
      (128, 2048)
    """
    n = _divided(batch, mesh)
    state = sharded_shapes(state, state_shardings(state, mesh, rules))
    batch = jax.tree.map(lambda leaf: _struct(leaf, batch_sharding(mesh)), batch)
    names = {"params": "weights", "opt_state": "optimiser", "ema": "average"}
    parts = {said: getattr(state, name) for name, said in names.items() if hasattr(state, name)}
    parts = {**(parts or {"state": state}), "batch": batch}
    lower = step.lower if hasattr(step, "lower") else jax.jit(step, donate_argnums=0).lower
    return plan_program(lower(state, batch), parts, mesh, batch=n, chip=chip, what=what)


def plan_program(
    lowered: Any,
    parts: Mapping[str, Any],
    mesh: Mesh,
    *,
    batch: int,
    chip: Chip | None = None,
    what: str = "program",
) -> StepPlan:
    """Compile what ``jitted.lower(...)`` gave, and say what it costs. Nothing runs.

    Args:
      lowered: the program, lowered for the devices of ``mesh``.
      parts: pytrees of what goes in, with shardings, by the name in the plan.
      mesh: where it would run.
      batch: examples of one call.
      chip: as in ``plan_step``.
      what: likewise.
    """
    hbm = None if chip is None else chip.hbm
    here: dict[str, Any] = {"what": what, "mesh": dict(mesh.shape), "batch": batch, "hbm": hbm}
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        said = str(error).removeprefix("RESOURCE_EXHAUSTED: ").splitlines()[0].strip()
        return StepPlan(
            **here,
            fits=False,
            memory=None,
            flops=0.0,
            matmul_flops=0,
            bytes_moved=0.0,
            collectives=(),
            unknown_loops=0,
            roofline=None,
            compile_seconds=time.perf_counter() - start,
            refusal=said,
        )
    seconds = time.perf_counter() - start
    memory = _memory(compiled, {name: local_bytes(tree) for name, tree in parts.items()})
    counts, cost = read_hlo(compiled.as_text()), compiled.cost_analysis() or {}
    flops = float(cost.get("flops", 0.0)) * counts.flops_in_loops
    moved = float(cost.get("bytes accessed", 0.0)) * counts.bytes_in_loops
    roofline = None
    if chip is not None:
        wire = sum(each.wire_bytes for each in counts.collectives)
        stats = compiled.memory_analysis()
        ends = stats.argument_size_in_bytes + stats.output_size_in_bytes
        roofline = Roofline(
            compute=flops / chip.flops,
            hbm=moved / chip.hbm_bandwidth,
            hbm_least=ends / chip.hbm_bandwidth,
            ici=wire / chip.ici_bandwidth,
        )
    return StepPlan(
        **here,
        fits=None if hbm is None else memory.peak <= hbm,
        memory=memory,
        flops=flops,
        matmul_flops=counts.matmul_flops,
        bytes_moved=moved,
        collectives=counts.collectives,
        unknown_loops=counts.unknown_loops,
        roofline=roofline,
        compile_seconds=seconds,
    )


def largest_batch(
    plan_at: Callable[[int], StepPlan], first: StepPlan, multiple: int, *, hbm: int | None = None
) -> tuple[StepPlan | None, int]:
    """The largest batch that fits, within an eighth, by a few compilations.

    The peak is taken to grow by so many bytes for each example, and each compilation corrects that;
    once a batch is known that does not fit, halving closes the gap.

    Args:
      plan_at: compiles for a batch of so many examples.
      first: a plan that is there already.
      multiple: what a batch must be divisible by.
      hbm: bytes that there are; default: those of the chip.

    Returns:
      The plan of the largest batch that was found to fit, ``None`` if none does, and the number of
      compilations that it took beside ``first``.

    Raises:
      ValueError: the chip's memory is not known.
    """
    limit = first.hbm if hbm is None else hbm
    if limit is None:
        raise ValueError("hbm is not known for this topology; expected a TPU, or a number of bytes")
    good: list[StepPlan] = []
    small: int | None = None
    compiles, plan = 0, first
    while True:
        if plan.memory is not None and plan.memory.peak <= limit:
            good.append(plan)
        else:
            small = plan.batch if small is None else min(small, plan.batch)
        good.sort(key=lambda each: each.batch)
        last = good[-1].batch if good else 0
        asked = _next_batch(good, small, limit, multiple)
        close = small is not None and small - last <= max(multiple, last // 8)
        if close or asked <= last or asked == small or compiles == _MOST_COMPILES:
            return (good[-1] if good else None), compiles
        plan = plan_at(asked)
        compiles += 1


def _next_batch(good: list[StepPlan], small: int | None, limit: int, multiple: int) -> int:
    """A multiple between the largest batch that fits and the smallest that does not."""
    last = good[-1].batch if good else 0
    if len(good) >= 2:
        a, b = good[-2:]
        assert a.memory is not None and b.memory is not None
        each = (b.memory.peak - a.memory.peak) / (b.batch - a.batch)
        left = (limit - b.memory.peak) / each if each > 0 else math.inf
        asked = last + int(min(left, 63 * last))
    else:
        asked = 2 * last or (small or multiple) // 4
    if small is not None and asked >= small:
        asked = (last + small) // 2
    return max(asked // multiple, 1) * multiple


# --- shapes ---------------------------------------------------------------------------------------


def sharded_shapes(tree: Any, shardings: Any) -> Any:
    """The shapes of a tree's leaves, each with its sharding."""
    return jax.tree.map(_struct, tree, shardings)


def _struct(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype, sharding=sharding)


def local_bytes(tree: Any) -> int:
    """Bytes of a tree's shards on one device, without padding; leaves need a ``sharding``."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _divided(batch: Any, mesh: Mesh) -> int:
    """The size of a batch that divides over the mesh."""
    shards = math.prod(mesh.shape[name] for name in batch_axes(mesh))
    for leaf in jax.tree.leaves(batch):
        shape = jnp.shape(leaf)
        if not shape or shape[0] == 0 or shape[0] % shards:
            raise ValueError(
                f"batch has a leaf of shape {shape}, whose axis 0 does not divide over the "
                f"{shards} parts of the mesh; expected a multiple of {shards}"
            )
    return int(jnp.shape(jax.tree.leaves(batch)[0])[0])


def _memory(compiled: Any, parts: dict[str, int]) -> Memory:
    stats = compiled.memory_analysis()
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    sum_of_all = stats.argument_size_in_bytes + outputs + stats.temp_size_in_bytes
    return Memory(
        parts=parts,
        arguments=stats.argument_size_in_bytes,
        outputs=outputs,
        temporary=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        peak=max(stats.peak_memory_in_bytes, sum_of_all),
    )


# --- words ----------------------------------------------------------------------------------------


def describe_plan(plan: StepPlan, chip: Chip | None = None) -> str:
    """A table of a plan.

    Args:
      plan: from ``plan_step``.
      chip: the chip, whose figures are then named.
    """
    shape = ",".join(f"{name}={size}" for name, size in plan.mesh.items())
    lines = [
        plan.what,
        f"  mesh {shape} of {plan.chips} device{'s' * (plan.chips > 1)}, batch {plan.batch:,}, "
        f"compiled in {plan.compile_seconds:.0f} s; all figures are of one device",
    ]
    if plan.memory is None:
        return "\n".join((*lines, f"  DOES NOT FIT: {plan.refusal}"))
    memory = plan.memory
    rows = [(name, size) for name, size in memory.parts.items()]
    rows += [
        ("arguments as laid out", memory.arguments),
        ("activations and the rest", memory.working),
        ("peak", memory.peak),
    ]
    lines += ["", f"  {'memory':<26}{'bytes':>16}{'MiB':>12}"]
    lines += [f"    {name:<24}{size:>16,}{size / 2**20:>12,.2f}" for name, size in rows]
    lines.append(f"    (temporary {memory.temporary:,}, program {memory.code:,})")
    if plan.hbm is not None:
        share = 100 * memory.peak / plan.hbm
        verdict = "fits" if plan.fits else "DOES NOT FIT"
        lines.append(f"    {verdict}: the peak is {share:.3g} % of {plan.hbm / 2**30:g} GiB")
    lines += [
        "",
        "  work",
        f"    {'FLOPs':<24}{plan.flops:>16.4g}  (matrix products {plan.matmul_flops:.4g})",
        f"    {'bytes moved':<24}{plan.bytes_moved:>16.4g}",
        "",
        f"  {'collectives':<26}{'count':>16}{'bytes':>16}{'on the wire':>16}",
    ]
    lines += [
        f"    {each.kind:<24}{each.count:>16,}{each.bytes:>16,}{each.wire_bytes:>16,}"
        for each in plan.collectives
    ] or ["    none"]
    if plan.unknown_loops:
        lines.append(f"    ({plan.unknown_loops} loops of unknown length count once)")
    if plan.roofline is not None:
        lines += ["", *_describe_roofline(plan.roofline, chip)]
    return "\n".join(lines)


def _describe_roofline(roofline: Roofline, chip: Chip | None) -> list[str]:
    peaks = ("", "", "")
    if chip is not None:
        peaks = (
            f"{chip.flops / 1e12:g} TFLOP/s in bfloat16, float32 in one bfloat16 pass",
            f"{chip.hbm_bandwidth / 1e9:g} GB/s, if all bytes moved came from there",
            f"{chip.ici_bandwidth / 1e9:g} GB/s one way, all links together",
        )
    times = zip(
        ("compute", "HBM", "links"), (roofline.compute, roofline.hbm, roofline.ici), peaks,
        strict=True,
    )  # fmt: skip
    return [
        f"  {'time by published peaks':<26}{'ms':>16}",
        *(f"    {name:<24}{1e3 * each:>16.4g}  {said}".rstrip() for name, each, said in times),
        f"    {'estimate':<24}{1e3 * roofline.estimate:>16.4g}  the largest of the three, by "
        f"{roofline.bound_by}",
        f"    {'lower bound':<24}{1e3 * roofline.lower_bound:>16.4g}  with nothing moved but "
        "arguments and results",
    ]
