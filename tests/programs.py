"""What a program computes, read from its jaxpr; benchmarks/compiled.py reads what it is compiled to."""

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
