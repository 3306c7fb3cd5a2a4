r"""Collectives, matrix products and bytes of a compiled program, read from its HLO text.

XLA's own cost analysis says nothing of collectives and counts a loop's body once. Here the text of
the program that one device runs is walked from its entry:

* a loop's body counts as often as the loop runs. That is the ``known_trip_count`` which the CPU and
  GPU compilers write down; else it is worked out from a condition ``i < constant``, the counter's
  first value and its step (the TPU compiler leaves it there). A loop of neither kind counts once,
  and ``unknown_loops`` says how many there are,
* of a conditional the branch that exchanges or computes most counts,
* an operation that the TPU compiler spreads over several asynchronous fusions keeps its channel in
  each, and counts once; a ``-start`` counts, its ``-done`` does not,
* an all-reduce that is fused with the slice that follows (``all-reduce-scatter``) is a
  reduce-scatter.

The bytes of a collective are those that one device has of the whole value: the operand of an
all-reduce, reduce-scatter, all-to-all or collective-permute, the result of an all-gather. Bytes on
the wire are what one device must send among ``g`` devices by the best algorithm there is:
:math:`2(g-1)/g` of an all-reduce, :math:`(g-1)/g` of the others, all of a permute (Thakur et al.
2005, "Optimization of collective communication operations in MPICH").
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

__all__ = ["COLLECTIVES", "Collective", "Counts", "read_hlo"]

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_MOVES_NOTHING = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "opt-barrier", "async-start", "async-update",
    "async-done",
}  # fmt: skip
# Those of which XLA's cost analysis counts one operation for each element.
_ELEMENTWISE = {
    "abs", "add", "and", "ceil", "clamp", "compare", "convert", "divide", "floor", "maximum",
    "minimum", "multiply", "negate", "not", "or", "power", "remainder", "select", "shift-left",
    "shift-right-arithmetic", "shift-right-logical", "sign", "subtract", "xor",
}  # fmt: skip
# Begins the key of a collective inside a fusion.
_CLONE = "clone/"
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind, for one device.

    Attributes:
      kind: one of ``COLLECTIVES``.
      count: how often one runs.
      bytes: see the module's text.
      wire_bytes: what one device sends, by the best algorithm there is.
    """

    kind: str
    count: int
    bytes: int
    wire_bytes: int


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one device does in one call of a program.

    Attributes:
      collectives: those that are there, in the order of ``COLLECTIVES``.
      matmul_flops: of ``dot`` and ``convolution``, two for each multiplication and addition; none
        for a convolution's padding, nor for the zeros between what it spreads out.
      flops_in_loops: how many times more FLOPs there are, those of elements and sums included, than
        with every loop's body counted once.
      bytes_in_loops: likewise, of the bytes that operations read and write.
      unknown_loops: loops of an unknown number of rounds, counted once.
    """

    collectives: tuple[Collective, ...]
    matmul_flops: int
    flops_in_loops: float
    bytes_in_loops: float
    unknown_loops: int


def read_hlo(text: str) -> Counts:
    """Read the optimised HLO text of a program (``compiled.as_text()``).

    Raises:
      ValueError: there is no entry computation in it.
    """
    return _Program(text).counts()


@dataclasses.dataclass(frozen=True)
class _Op:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    inside: str
    rest: str
    is_root: bool


@dataclasses.dataclass
class _Total:
    """Of one call of a computation: by every round of its loops, and by one round of each."""

    products: int = 0
    flops: int = 0
    flops_once: int = 0
    bytes: int = 0
    bytes_once: int = 0
    unknown: int = 0
    # By place, or by channel inside fusions: kind, bytes, devices, how often.
    found: dict[str, tuple[str, int, int, int]] = dataclasses.field(default_factory=dict)

    def add(self, other: "_Total", times: int = 1) -> None:
        self.products += times * other.products
        self.flops += times * other.flops
        self.flops_once += other.flops_once
        self.bytes += times * other.bytes
        self.bytes_once += other.bytes_once
        self.unknown += other.unknown
        for key, (kind, size, group, count) in other.found.items():
            before = self.found.get(key)
            count *= times
            if before is not None:
                # The clones of one asynchronous operation are one.
                count = max(count, before[3]) if key.startswith(_CLONE) else count + before[3]
                kind = before[0] if before[0] == "reduce-scatter" else kind
            self.found[key] = (kind, size, group, count)

    def weight(self) -> tuple[int, int]:
        return sum(size * count for _, size, _, count in self.found.values()), self.flops


class _Program:
    def __init__(self, text: str):
        self.computations: dict[str, dict[str, _Op]] = {}
        self.entry = ""
        self._totals: dict[tuple[str, bool], _Total] = {}
        header = text[: text.find("\n")]
        self._devices = math.prod(
            int(found[1])
            for name in ("num_partitions", "replica_count")
            if (found := re.search(rf"{name}=(\d+)", header))
        )
        current: dict[str, _Op] = {}
        for line in text.splitlines():
            if line.endswith("{") and not line.startswith(" ") and "->" in line:
                found = re.match(r"(ENTRY )?%?([\w.\-]+)", line)
                if found is None:
                    continue
                current = self.computations.setdefault(found[2], {})
                if found[1]:
                    self.entry = found[2]
            elif " = " in line and line.startswith(" "):
                op = _read_op(line)
                current[op.name] = op
        if not self.entry:
            raise ValueError("text is no HLO module; expected that of compiled.as_text()")

    def counts(self) -> Counts:
        total = self._total(self.entry, fused=False)
        kinds: dict[str, list[int]] = {}
        for kind, size, group, count in total.found.values():
            sums = kinds.setdefault(kind, [0, 0, 0])
            sums[0] += count
            sums[1] += count * size
            sums[2] += round(count * size * _share_sent(kind, group))
        return Counts(
            tuple(Collective(kind, *kinds[kind]) for kind in COLLECTIVES if kind in kinds),
            total.products,
            total.flops / total.flops_once if total.flops_once else 1.0,
            total.bytes / total.bytes_once if total.bytes_once else 1.0,
            total.unknown,
        )

    def _total(self, name: str, *, fused: bool) -> _Total:
        """What one call of a computation comes to; ``fused``: its parts touch no memory."""
        if (name, fused) not in self._totals:
            total = _Total()
            for op in self.computations.get(name, {}).values():
                self._add(total, name, op, fused)
            self._totals[name, fused] = total
        return self._totals[name, fused]

    def _add(self, total: _Total, where: str, op: _Op, fused: bool) -> None:
        called = _CALLED.findall(op.rest)
        if op.opcode == "while":
            times = self._rounds(where, op)
            for name in called:
                total.add(self._total(name, fused=fused), 1 if times is None else times)
            total.unknown += times is None
        elif op.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", op.rest)
            called += re.findall(r"%([\w.\-]+)", branches[1]) if branches else []
            total.add(max((self._total(name, fused=fused) for name in called), key=_Total.weight))
        elif op.opcode in ("fusion", "call", "async-start"):
            for name in called:
                inner = _Total()
                inner.add(self._total(name, fused=fused or op.opcode == "fusion"))
                if "all-reduce-scatter" in name or "all-reduce-scatter" in op.name:
                    inner.found = {
                        key: ("reduce-scatter", size, group, count)
                        for key, (_, size, group, count) in inner.found.items()
                    }
                total.add(inner)
        elif op.opcode in ("dot", "convolution"):
            flops = self._product_flops(where, op)
            total.products += flops
            total.flops += flops
            total.flops_once += flops
        elif op.opcode in _ELEMENTWISE or op.opcode in ("reduce", "reduce-window"):
            shape = op.shape if op.opcode in _ELEMENTWISE else self._shape(where, op.operands[0])
            flops = sum(math.prod(dims) for dims in _dims(shape))
            total.flops += flops
            total.flops_once += flops
        elif (kind := op.opcode.removesuffix("-start")) in COLLECTIVES:
            self._add_collective(total, where, op, kind, fused)
        if not fused and op.opcode not in _MOVES_NOTHING and not op.opcode.endswith("-done"):
            size = _bytes(op.shape) + self._operand_bytes(where, op)
            total.bytes += size
            total.bytes_once += size

    def _add_collective(self, total: _Total, where: str, op: _Op, kind: str, fused: bool) -> None:
        group = 2 if kind == "collective-permute" else self._group_size(op.rest)
        if group < 2:
            return
        size = self._operand_bytes(where, op) * (group if kind == "all-gather" else 1)
        key = f"{where}/{op.name}"
        channel = re.search(r"channel_id=(\d+)", op.rest)
        if fused and channel:
            chain = re.search(r'chain_id="(\d+)"', op.rest)
            key = f"{_CLONE}{channel[1]}/{chain[1] if chain else ''}/{kind}/{size}"
        total.found[key] = (kind, size, group, 1)

    def _group_size(self, rest: str) -> int:
        """Devices that exchange with each other; all, where nothing else is said."""
        if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
            # A part of an axis is written 'axis':(before)size.
            axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
            return math.prod(int(part or sizes[axis]) for axis, part in axes)
        if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
            return int(found[2])
        if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
            return found[1].count(",") + 1
        return self._devices

    def _operand_bytes(self, where: str, op: _Op) -> int:
        return sum(_bytes(self._shape(where, name)) for name in op.operands)

    def _shape(self, where: str, name: str) -> str:
        op = self.computations[where].get(name)
        return op.shape if op else ""

    def _product_flops(self, where: str, op: _Op) -> int:
        out = math.prod(next(_dims(op.shape)))
        left, right = (next(_dims(self._shape(where, name))) for name in op.operands[:2])
        if op.opcode == "convolution":
            return _convolution_flops(op, left, right)
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)
        axes = [int(axis) for axis in found[1].split(",") if axis] if found else []
        return 2 * out * math.prod(left[axis] for axis in axes)

    # --- how often a loop runs ------------------------------------------------------------------

    def _rounds(self, where: str, op: _Op) -> int | None:
        if found := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', op.rest):
            return int(found[1])
        condition = re.search(r"condition=%([\w.\-]+)", op.rest)
        body = re.search(r"body=%([\w.\-]+)", op.rest)
        if condition is None or body is None:
            return None
        limit = self._limit(condition[1])
        if limit is None:
            return None
        index, stop = limit
        first = self._first(where, op.operands[0], index)
        step = self._step(body[1], index)
        if first is None or step is None or step < 1:
            return None
        return max(0, -(-(stop - first) // step))

    def _limit(self, condition: str) -> tuple[int, int] | None:
        """The counter's place in the loop's state and the constant that it stays below."""
        ops = self.computations.get(condition, {})
        root = next((op for op in ops.values() if op.is_root), None)
        compares = [root] if root is not None else []
        if root is not None and root.opcode == "fusion":
            inner = self.computations.get(_CALLED.findall(root.rest)[0], {})
            compares = [op for op in inner.values() if op.is_root]
        if root is None or not compares or compares[0].opcode != "compare":
            return None
        if "direction=LT" not in compares[0].rest:
            return None
        index = stop = None
        for name in root.operands:
            op = ops[name]
            if op.opcode == "get-tuple-element":
                index = _index(op)
            elif op.opcode == "constant" and op.inside.lstrip("-").isdigit():
                stop = int(op.inside)
        if stop is None and root.opcode == "fusion":
            inner = self.computations[_CALLED.findall(root.rest)[0]]
            stop = next((int(op.inside) for op in inner.values() if op.opcode == "constant"), None)
        return None if index is None or stop is None else (index, stop)

    def _first(self, where: str, state: str, index: int) -> int | None:
        ops = self.computations[where]
        op = ops.get(state)
        while op is not None and op.opcode in ("tuple", "copy", "bitcast", "convert"):
            op = ops.get(op.operands[index if op.opcode == "tuple" else 0])
        if op is not None and op.opcode == "constant" and op.inside.lstrip("-").isdigit():
            return int(op.inside)
        return None

    def _step(self, body: str, index: int) -> int | None:
        ops = self.computations.get(body, {})
        root = next((op for op in ops.values() if op.is_root), None)
        if root is None or root.opcode != "tuple":
            return None
        op = ops.get(root.operands[index])
        while op is not None and op.opcode in ("copy", "bitcast"):
            op = ops.get(op.operands[0])
        if op is None:
            return None
        if op.opcode == "fusion":
            inner = self.computations.get(_CALLED.findall(op.rest)[0], {})
            ops = {**ops, **inner}
            op = next((each for each in inner.values() if each.is_root), op)
        if op.opcode != "add":
            return None
        added = [ops[name] for name in op.operands if name in ops]
        steps = [int(each.inside) for each in added if each.opcode == "constant"]
        return steps[0] if len(steps) == 1 else None


def _convolution_flops(op: _Op, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest)
    if labels is None:
        return 0
    data, kernel, result = labels[1], labels[2], labels[3]
    out = next(_dims(op.shape))
    # For each result and feature of the data that a group has; groups need no more than that.
    flops = 2 * out[result.index("b")] * out[result.index("f")] * right[kernel.index("i")]
    window = re.search(r"window=\{([^}]*)\}", op.rest)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    for axis in range(len(out) - 2):

        def field(name: str, default: str, axis: int = axis) -> str:
            return fields[name].split("x")[axis] if name in fields else default

        flops *= _met(
            left[data.index(str(axis))],
            right[kernel.index(str(axis))],
            out[result.index(str(axis))],
            stride=int(field("stride", "1")),
            before=int(field("pad", "0_0").split("_")[0]),
            spread=int(field("lhs_dilate", "1")),
            apart=int(field("rhs_dilate", "1")),
        )
    return flops


def _met(
    data: int, kernel: int, out: int, *, stride: int, before: int, spread: int, apart: int
) -> int:
    """How often an element of the kernel meets one of the data along an axis, over all results."""
    places = (i * stride - before + k * apart for i in range(out) for k in range(kernel))
    return sum(place % spread == 0 and 0 <= place // spread < data for place in places)


def _share_sent(kind: str, group: int) -> float:
    if kind == "collective-permute":
        return 1.0
    return (2.0 if kind == "all-reduce" else 1.0) * (group - 1) / group


def _index(op: _Op) -> int | None:
    found = re.search(r"index=(\d+)", op.rest)
    return int(found[1]) if found else None


def _read_op(line: str) -> _Op:
    left, _, right = line.strip().partition(" = ")
    right = re.sub(r"/\*.*?\*/", "", right)
    end = _closing(right, 0) + 1 if right.startswith("(") else right.find(" ")
    shape, right = right[:end], right[end:].lstrip()
    start = right.find("(")
    stop = _closing(right, start)
    inside = right[start + 1 : stop]
    return _Op(
        name=left.removeprefix("ROOT ").removeprefix("%"),
        shape=shape,
        opcode=right[:start],
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        inside=inside,
        rest=right[stop + 1 :],
        is_root=left.startswith("ROOT "),
    )


def _closing(text: str, start: int) -> int:
    """The place of the parenthesis that closes the one at ``start``."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return start + found.start()
    return len(text)


def _dims(shape: str) -> Iterator[tuple[int, ...]]:
    for _, dims in _SHAPE.findall(shape):
        yield tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)


def _bytes(shape: str) -> int:
    """Bytes of an array, or of all arrays of a tuple, without any padding of their layout."""
    kinds: Iterable[str] = (kind for kind, _ in _SHAPE.findall(shape))
    return sum(
        -(-_bits(kind) * math.prod(dims) // 8)
        for kind, dims in zip(kinds, _dims(shape), strict=True)
    )


def _bits(kind: str) -> int:
    if kind in _BITS:
        return _BITS[kind]
    found = re.match(r"[a-z]+(\d+)", kind)
    return int(found[1]) if found else 0
