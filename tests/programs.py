"""What a program holds and computes, read from its jaxpr or its compiled text."""

import math
import re

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


def matmul_operations(program):
    """Multiplications and additions of all matmuls of a compiled program; a loop counts as often as it runs.

    A loop whose number of steps is not known when compiling counts once.
    """
    bodies = {}
    for text in re.split(r"\n(?=\S)", program.as_text()):
        name = re.match(r"(?:ENTRY )?(%\S+)", text)
        if name:
            bodies[name[1]] = text

    def operations(name):
        text = bodies[name]
        # a computation's parameters are declared with their shapes as well
        shapes = {key: numbers(size) for key, size in re.findall(SHAPE, text)}
        total = 0
        for line in text.splitlines()[1:]:
            dot = re.search(rf"{SHAPE}\S* dot\((%[\w.-]+), .*lhs_contracting_dims={{([\d,]*)}}", line)
            if dot:
                lhs = shapes[dot[3]]
                total += 2 * math.prod(numbers(dot[2])) * math.prod(lhs[i] for i in numbers(dot[4]))
            steps = re.search(r'"known_trip_count":{"n":"(\d+)"}', line)
            called = re.findall(r"(?:calls|body|to_apply)=(%[\w.-]+)", line)
            called += re.findall(r"%[\w.-]+", (re.search(r"branch_computations={([^}]*)}", line) or [""])[0])
            total += (int(steps[1]) if steps else 1) * sum(operations(c) for c in called if c in bodies)
        return total

    (entry,) = [name for name, text in bodies.items() if text.startswith("ENTRY")]
    return operations(entry)


def numbers(text):
    return [int(x) for x in text.split(",") if x]
