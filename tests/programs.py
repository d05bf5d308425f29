"""What a program holds, computes and sends, read from its jaxpr or its compiled text."""

import math
import re
from typing import NamedTuple

import jax


def jaxprs(params):
    for x in jax.tree.leaves(list(params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
        x = getattr(x, "jaxpr", x)
        if hasattr(x, "eqns"):
            yield x


def avals(jaxpr):
    """Everything that a jaxpr computes, inner ones too."""
    for equation in jaxpr.eqns:
        yield from (v.aval for v in equation.outvars)
        for inner in jaxprs(equation.params):
            yield from avals(inner)


SHAPE = r"(%\S+) = \w+\[([\d,]*)\]"


class Computations:
    """The computations of a compiled program, by name; each is called from others, and by loops several times."""

    def __init__(self, program):
        self.texts, self.entry = {}, None
        for text in re.split(r"\n(?=\S)", program.as_text()):
            name = re.match(r"(ENTRY )?(%\S+)", text)
            if name:
                self.texts[name[2]] = text
                self.entry = name[2] if name[1] else self.entry

    def walk(self, name=None, times=1, in_loop=False):
        """Every line of the program, with how often it runs (once where that is not known) and whether a loop does."""
        for line in self.texts[name or self.entry].splitlines()[1:]:
            yield name or self.entry, line, times, in_loop
            steps = re.search(r'"known_trip_count":{"n":"(\d+)"}', line)
            called = re.findall(r"(?:calls|body|condition|to_apply)=(%[\w.-]+)", line)
            called += re.findall(r"%[\w.-]+", (re.search(r"branch_computations={([^}]*)}", line) or [""])[0])
            for inner in called:
                if inner in self.texts:
                    loop = in_loop or " while(" in line
                    yield from self.walk(inner, times * (int(steps[1]) if steps else 1), loop)


def matmul_operations(program):
    """Multiplications and additions of all matmuls of a compiled program; a loop counts as often as it runs.

    A loop whose number of steps is not known when compiling counts once.
    """
    computations, total = Computations(program), 0
    # a computation's parameters are declared with their shapes as well
    shapes = {
        name: {key: numbers(size) for key, size in re.findall(SHAPE, text)}
        for name, text in computations.texts.items()
    }
    for name, line, times, _ in computations.walk():
        dot = re.search(rf"{SHAPE}\S* dot\((%[\w.-]+), .*lhs_contracting_dims={{([\d,]*)}}", line)
        if dot:
            lhs = shapes[name][dot[3]]
            terms = math.prod(lhs[i] for i in numbers(dot[4]))
            total += times * 2 * math.prod(numbers(dot[2])) * terms
    return total


class Collective(NamedTuple):
    kind: str  # all-reduce, all-gather, ...
    shapes: tuple  # of its results on each device, e.g. (("f32", (32,)), ("f32", ()))
    times: int  # how often it runs; once where that is not known
    in_loop: bool

    @property
    def bytes(self):
        """Of its results on each device, each time it runs."""
        return sum(BITS[dtype] // 8 * math.prod(shape) for dtype, shape in self.shapes)


BITS = {"pred": 8, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16}
BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64}
COLLECTIVE = re.compile(
    r" = (\(.*?\)|\S+) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|"
    r"collective-broadcast|ragged-all-to-all)(?:-start)?\("
)


def collectives(program):
    """All communication of a compiled program."""
    found = []
    for _, line, times, in_loop in Computations(program).walk():
        match = COLLECTIVE.search(line)
        if match:
            shapes = tuple(
                (dtype, tuple(numbers(size))) for dtype, size in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            )
            found.append(Collective(match[2], shapes, times, in_loop))
    return found


def numbers(text):
    return [int(x) for x in text.split(",") if x]
