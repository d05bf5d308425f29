"""What a compiled program computes, holds and sends, read from its text: benchmarks and tests ask the same reader.

It reads the HLO of CPUs, GPUs and TPUs. A loop counts as often as it runs; where that is known at run time only, as
often as it is told.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

BITS = {"pred": 8, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16}
BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64}
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
COMMUNICATION = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
NO_WORK = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
}
UNKNOWN = 2**62  # of cycles, above that


class Shape(NamedTuple):
    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return BITS.get(self.dtype, 0) // 8 * self.size


class Instruction(NamedTuple):
    name: str
    shapes: tuple[Shape, ...]  # of its results
    kind: str
    operands: tuple[str, ...]
    text: str
    is_root: bool

    @property
    def cycles(self) -> int:
        """What a TPU's compiler thinks that it takes, once."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(found[1]) if found and int(found[1]) < UNKNOWN else 0

    @property
    def where(self) -> str:
        """In the source, as jax names it."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""

    def called(self, what: str) -> str:
        return re.search(rf"\b{what}=(%[\w.-]+)", self.text)[1]


class Step(NamedTuple):
    """An instruction as the program runs it."""

    instruction: Instruction
    computation: str
    times: int
    in_loop: bool


class Program:
    """A compiled program.

    `trips(0, is_outer)` is how often a loop runs whose number of steps is not known; whether it has another such loop
    in it. `trips(n, False)` is which of n branches, from 1 on, a conditional takes.
    """

    def __init__(self, compiled, trips: Callable[[int, bool], int] = lambda *_: 1):
        self.computations: dict[str, list[Instruction]] = {}
        self.trips, self.entry = trips, ""
        for text in re.split(r"\n(?=\S)", compiled.as_text()):
            name = re.match(r"(ENTRY )?(%\S+)", text)
            if name and text.splitlines()[0].endswith("{"):
                self.computations[name[2]] = [parsed for x in text.splitlines()[1:] if (parsed := _parse(x))]
                self.entry = name[2] if name[1] else self.entry

    def steps(self, name: str = "", times: int = 1, in_loop: bool = False) -> Iterator[Step]:
        """Everything that is scheduled, in order: not what is inside fusions."""
        name = name or self.entry
        for x in self.computations[name]:
            yield Step(x, name, times, in_loop)
            if x.kind == "while":
                yield from self.steps(x.called("body"), times * self._trips(x), True)
            elif x.kind == "conditional":
                yield from self.steps(self._branch(x), times, in_loop)
            elif x.kind == "call":
                yield from self.steps(x.called("to_apply"), times, in_loop)

    def everything(self) -> Iterator[Step]:
        """What is inside fusions as well."""
        for step in self.steps():
            yield step
            yield from self._inside(step)

    def _inside(self, step: Step) -> Iterator[Step]:
        for name in re.findall(r"\b(?:calls|to_apply)=(%[\w.-]+)", step.instruction.text):
            if step.instruction.kind == "call" or name not in self.computations:
                continue
            for x in self.computations[name]:
                inner = Step(x, name, step.times, step.in_loop)
                yield inner
                yield from self._inside(inner)

    def _trips(self, loop: Instruction) -> int:
        known = self._known_trips(loop)
        if known is not None:
            return known
        inner = [x for x in self.computations[loop.called("body")] if x.kind == "while"]
        return self.trips(0, any(self._known_trips(x) is None for x in inner))

    def _known_trips(self, loop: Instruction) -> int | None:
        known = re.search(r'"known_trip_count":{"n":"(\d+)"}', loop.text)
        if known:
            return int(known[1])
        condition = self.computations[loop.called("condition")]
        limits = [int(n) for x in condition for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", x.text)]
        return max(limits, default=None)

    def _branch(self, x: Instruction) -> str:
        branches = re.search(r"branch_computations={([^}]*)}", x.text)
        if branches is None:
            return x.called("true_computation")
        names = re.findall(r"%[\w.-]+", branches[1])
        return names[max(min(self.trips(len(names), False), len(names)), 1) - 1]

    def shape(self, computation: str, operand: str) -> Shape:
        return next(x.shapes[0] for x in self.computations[computation] if x.name == operand)

    # What is asked of it.

    @property
    def cycles(self) -> int:
        """By the model of a TPU's compiler."""
        return sum(step.times * step.instruction.cycles for step in self.steps())

    def matmuls(self) -> list["Matmul"]:
        found = []
        for x, computation, times, in_loop in self.everything():
            if x.kind not in ("dot", "convolution"):
                continue
            lhs, rhs = (self.shape(computation, operand) for operand in x.operands)
            if x.kind == "dot":
                contracted = numbers(re.search(r"lhs_contracting_dims={([\d,]*)}", x.text)[1])
            else:
                labels = re.search(r"dim_labels=(\w+)_", x.text)[1]
                contracted = [labels.index("f")]
            terms = math.prod(lhs.dims[i] for i in contracted)
            found.append(Matmul(x.shapes[0], lhs, rhs, terms, times, in_loop))
        return found

    def collectives(self) -> list["Collective"]:
        found = []
        for x, _, times, in_loop in self.steps():
            kind = x.kind.removesuffix("-start")
            if kind in COMMUNICATION:
                found.append(Collective(kind, x.shapes, times, in_loop))
        return found

    def accesses(self, counted: Callable[[Shape], bool]) -> int:
        """Elements that are read from memory and written to it, of arrays that are `counted`, slices as slices."""
        total = 0
        for x, computation, times, _ in self.steps():
            if x.kind in NO_WORK or x.kind.endswith("-done") or "AllocateBuffer" in x.text:
                continue
            shapes = [self.shape(computation, name) for name in x.operands]
            for i, shape in enumerate(shapes):
                if counted(shape):
                    total += times * self._read(x, i, shape)
            for i, shape in enumerate(x.shapes):
                if counted(shape):
                    total += times * self._written(x, i, shape)
        return total

    def _fused(self, x: Instruction) -> list[Instruction]:
        return self.computations[x.called("calls")] if x.kind == "fusion" else []

    def _read(self, x: Instruction, i: int, shape: Shape) -> int:
        """Of the i-th operand."""
        if x.kind == "dynamic-slice" and i == 0:
            return x.shapes[0].size
        if x.kind == "dynamic-update-slice" and i == 0:
            return 0
        fused = self._fused(x)
        parameter = [y.name for y in fused if y.kind == "parameter" and f" parameter({i})" in y.text]
        uses = [y for y in fused if parameter and parameter[0] in y.operands]
        if uses and all(y.kind in ("dynamic-slice", "dynamic-update-slice") for y in uses):
            slices = [y.shapes[0].size if y.kind == "dynamic-slice" else 0 for y in uses]
            return min(sum(slices), shape.size)
        return shape.size

    def _written(self, x: Instruction, i: int, shape: Shape) -> int:
        """Of the i-th result."""
        within, root = x, x
        fused = self._fused(x)
        if fused:
            by_name = {y.name: y for y in fused}
            root = next(y for y in fused if y.is_root)
            if root.kind == "tuple":
                root = by_name[root.operands[i]]
            while root.kind == "bitcast":
                root = by_name[root.operands[0]]
            within = root
        if within.kind == "dynamic-update-slice":
            shapes = {y.name: y.shapes[0] for y in fused} if fused else {}
            return shapes[within.operands[1]].size if fused else shape.size
        return shape.size


class Matmul(NamedTuple):
    result: Shape
    lhs: Shape
    rhs: Shape
    terms: int  # of each sum
    times: int
    in_loop: bool

    @property
    def operations(self) -> int:
        return self.times * 2 * self.result.size * self.terms


class Collective(NamedTuple):
    kind: str  # all-reduce, all-gather, ...
    shapes: tuple[Shape, ...]  # of its results on each device
    times: int  # how often it runs
    in_loop: bool

    @property
    def bytes(self) -> int:
        """Of its results on each device, each time it runs."""
        return sum(shape.bytes for shape in self.shapes)


def matmul_operations(compiled) -> int:
    """Multiplications and additions of all matmuls; a loop of unknown length counts once."""
    return sum(matmul.operations for matmul in Program(compiled).matmuls())


def collectives(compiled) -> list[Collective]:
    """All communication; that of a loop of unknown length counts once."""
    return Program(compiled).collectives()


def numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]


def _parse(line: str) -> Instruction | None:
    head = re.match(r"\s*(ROOT )?(%[\w.-]+) = ", line)
    if head is None:
        return None
    text = line[head.end() :]
    end = _closing(text) if text.startswith("(") else _end_of_shape(text)
    shapes = tuple(Shape(dtype, tuple(numbers(dims))) for dtype, dims in SHAPE.findall(text[:end]))
    kind, rest = text[end:].lstrip().split("(", 1)
    operands = re.findall(r"%[\w.-]+", rest[: _closing("(" + rest) - 1])
    return Instruction(head[2], shapes, kind, tuple(operands), line, bool(head[1]))


def _closing(text: str) -> int:
    """Behind the bracket that closes the first one."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return i + 1
    return len(text)


def _end_of_shape(text: str) -> int:
    return re.match(r"\w+(\[[^\]]*\])?({[^}]*})?", text).end()
