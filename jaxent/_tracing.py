"""What a function of row statistics reads, closes over and mixes, found by tracing it."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from . import _contracts as contracts
from ._numerics import accumulation_dtype
from ._statistics import INTEGER_STATISTICS, STATISTICS, Block, SoftmaxStatistics


class _Recorder(SoftmaxStatistics):
    """Statistics that remember which of them were read. As a pytree (fn may be jitted) all of them are."""

    def __getattribute__(self, name: str) -> Any:
        if name in STATISTICS:
            object.__getattribute__(self, "on_read")(name)
        return object.__getattribute__(self, name)


jax.tree_util.register_pytree_node(
    _Recorder,
    lambda s: (tuple(getattr(s, name) for name in STATISTICS), None),
    lambda _, fields: cast(_Recorder, SoftmaxStatistics(*fields)),
)


def used_statistics(
    function: str, fn: Callable[..., Array], block: Block, rows: tuple[int, ...], row_args: Sequence[Any]
) -> tuple[str, ...]:
    """Which statistics `fn` reads: what it does not read is never computed."""
    available = available_statistics(block)
    used: set[str] = set()

    def trace(statistics: SoftmaxStatistics, label_weight: Array, row_args: Any) -> Any:
        recorder = _Recorder(**vars(statistics))
        object.__setattr__(recorder, "on_read", used.add)
        return fn(recorder, label_weight, *row_args)

    dtype = accumulation_dtype(block.logits.dtype)
    try:
        jax.eval_shape(trace, example(available, rows, dtype), jax.ShapeDtypeStruct(rows, dtype), row_args)
    except TypeError as error:
        missing = sorted(used.difference(available))
        if not missing:
            raise
        remedy = "Pass class indices; `rank` needs them, `log_prob` a distribution at least."
        got = "None" if block.distribution is None else "a distribution"
        expected = f"given for `fn` to read `{missing[0]}`"
        raise contracts.error(TypeError, function, "labels", expected, got, remedy) from error
    return tuple(name for name in available if name in used)


def available_statistics(block: Block) -> tuple[str, ...]:
    missing = {"rank"} if block.label is None else set()
    if block.label is None and block.distribution is None:
        missing |= {"log_prob", "weighted_log_prob"}
    return tuple(name for name in STATISTICS if name not in missing)


def example(names: tuple[str, ...], rows: tuple[int, ...], dtype: Any) -> SoftmaxStatistics:
    """Shapes and dtypes of statistics."""
    shapes: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(rows, jnp.int32 if name in INTEGER_STATISTICS else dtype) for name in names
    }
    return SoftmaxStatistics(**shapes)


def hoist(closed: ClosedJaxpr, arguments: Any) -> tuple[Callable[..., Array], list[Any]]:
    """(`function(closed_over, *arguments)`, the traced arrays that a function, traced for `arguments`, closes over).

    A rule of differentiation has to know all that it differentiates as its arguments.
    """
    is_traced = [isinstance(x, jax.core.Tracer) for x in closed.consts]

    def run(closed_over: list[Any], arguments: Any) -> Any:
        traced = iter(closed_over)
        consts = [next(traced) if t else x for x, t in zip(closed.consts, is_traced, strict=True)]
        return jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, consts))(*jax.tree.leaves(arguments))

    closed_over = [x for x, t in zip(closed.consts, is_traced, strict=True) if t]
    # it holds no tracer, which would leak with the rule
    open_jaxpr = jax.make_jaxpr(run)(closed_over, arguments)

    def function(closed_over: list[Any], *arguments: Any) -> Array:
        (out,) = jaxpr_as_fun(open_jaxpr)(*jax.tree.leaves((closed_over, arguments)))
        return out

    return function, closed_over


# Whether rows are mixed. A function that normalizes over rows, or closes over an array with a value per row, must see
# all rows at once; one that provably takes each row by itself may see them block by block. What is not known here
# counts as mixing: then the gradients take a matmul more, and are right.


def derivative(call: Callable[..., Array], arguments: Any) -> tuple[ClosedJaxpr, list[bool]]:
    """(A function and its tangent map, traced: rules of derivatives are opened; which of `arguments` have tangents)."""
    leaves, treedef = jax.tree.flatten(arguments)
    moves = [bool(jnp.issubdtype(x.dtype, jnp.inexact)) for x in leaves]
    moving = [x for x, m in zip(leaves, moves, strict=True) if m]

    def both(leaves: list[Any], dots: list[Any]) -> Any:
        def of_moving(moved: list[Any]) -> Array:
            rest = iter(moved)
            full = [next(rest) if m else x for x, m in zip(leaves, moves, strict=True)]
            return call(*jax.tree.unflatten(treedef, full))

        return jax.jvp(of_moving, ([x for x, m in zip(leaves, moves, strict=True) if m],), (dots,))

    return jax.make_jaxpr(both)(leaves, moving), moves


OF_RULES = {"jvp_jaxpr_fun", "symbolic_zeros"}  # of custom_jvp: what they do is judged in `derivative`
ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp clz convert_element_type copy "
    "cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le le_to "
    "lgamma log log1p log2 logistic lt lt_to max min mul ne neg nextafter not one_minus_square or "
    "population_count pow reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic "
    "shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor".split()
)
REDUCTIONS = frozenset(
    "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum".split()
)
SCANS = frozenset("cumlogsumexp cummax cummin cumprod cumsum".split())

# How a value depends on the row: OF_ROW has the rows in front, SAME is the same for all of them, MIXED is unknown.
OF_ROW, SAME, MIXED = "of row", "same", "mixed"


def takes_rows_apart(closed: ClosedJaxpr, rows: tuple[int, ...], is_of_row: Sequence[bool]) -> bool:
    """Whether a traced function provably maps each row by itself; `is_of_row` says which inputs have rows."""
    inputs = [
        OF_ROW if of_row else _constant(var.aval, rows)
        for var, of_row in zip(closed.jaxpr.invars, is_of_row, strict=True)
    ]
    return MIXED not in _dependence(closed.jaxpr, inputs, rows)


def is_same_function(a: ClosedJaxpr, rows: tuple[int, ...], b: ClosedJaxpr, block: tuple[int, ...]) -> bool:
    """Whether a function, traced for `rows` and for those of a `block`, is one that does not use their number."""
    if len(a.consts) != len(b.consts) or not all(map(_is_same_constant, a.consts, b.consts)):
        return False
    return _has_same_equations(a.jaxpr, rows, b.jaxpr, block)


def _is_same_constant(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if any(isinstance(x, jax.core.Tracer) or not hasattr(x, "dtype") for x in (a, b)):
        return False
    small = a.shape == b.shape and a.dtype == b.dtype and a.size <= 1024
    return small and not jnp.issubdtype(a.dtype, jax.dtypes.extended) and bool(np.all(np.asarray(a) == b))


def _has_same_equations(a: Any, rows: tuple[int, ...], b: Any, block: tuple[int, ...]) -> bool:
    k = len(rows)
    partner = dict(zip((*a.constvars, *a.invars), (*b.constvars, *b.invars), strict=True))

    def same(x: Any, y: Any) -> bool:
        """Equal, or shapes that differ in their rows."""
        if hasattr(x, "eqns") or hasattr(x, "jaxpr"):
            return _has_same_equations(getattr(x, "jaxpr", x), rows, getattr(y, "jaxpr", y), block)
        if isinstance(x, tuple) and isinstance(y, tuple):
            of_rows = x[:k] == rows and y[:k] == block
            return (of_rows and x[k:] == y[k:]) or (len(x) == len(y) and all(map(same, x, y)))
        return callable(x) or bool(x == y)

    def same_operand(x: Any, y: Any) -> bool:
        if isinstance(x, Literal) or isinstance(y, Literal):
            both = isinstance(x, Literal) and isinstance(y, Literal)
            return both and np.asarray(x.val).tolist() == np.asarray(y.val).tolist()
        return partner[x] is y and same(x.aval.shape, y.aval.shape)

    def same_operands(x: Sequence[Any], y: Sequence[Any]) -> bool:
        return len(x) == len(y) and all(map(same_operand, x, y))

    def same_equation(x: Any, y: Any) -> bool:
        partner.update(zip(x.outvars, y.outvars, strict=False))
        return (
            x.primitive is y.primitive
            and same_operands(x.invars, y.invars)
            and same_operands(x.outvars, y.outvars)
            and x.params.keys() == y.params.keys()
            and all(same(x.params[key], y.params[key]) for key in x.params.keys() - OF_RULES)
        )

    same_steps = len(a.eqns) == len(b.eqns) and all(map(same_equation, a.eqns, b.eqns))
    return same_steps and same_operands(a.outvars, b.outvars)


def _constant(aval: Any, rows: tuple[int, ...]) -> str:
    """A value that nothing is known of: with the rows in front it may hold one number per row."""
    per_row = aval.shape[: len(rows)] == rows
    return MIXED if per_row or jnp.issubdtype(aval.dtype, jnp.complexfloating) else SAME


def _dependence(jaxpr: Any, inputs: Sequence[str], rows: tuple[int, ...]) -> list[str]:
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    known |= {var: _constant(var.aval, rows) for var in jaxpr.constvars}

    def of(var: Any) -> str:
        return SAME if isinstance(var, Literal) else known[var]

    for equation in jaxpr.eqns:
        found = _of_equation(equation, [of(var) for var in equation.invars], rows)
        known |= dict(zip(equation.outvars, found, strict=True))
    return [of(var) for var in jaxpr.outvars]


def _of_equation(equation: Any, inputs: list[str], rows: tuple[int, ...]) -> list[str]:
    name, params = equation.primitive.name, equation.params
    k = len(rows)
    leading = tuple(range(k))
    inner = params.get("jaxpr", params.get("call_jaxpr"))
    if inner is not None and name in ("jit", "pjit", "checkpoint", "custom_jvp_call"):
        return _dependence(getattr(inner, "jaxpr", inner), inputs, rows)
    if MIXED in inputs or name.startswith("custom_vjp"):  # its backward may do anything with a cotangent
        kind = MIXED
    elif OF_ROW not in inputs:
        if name in ELEMENTWISE or (
            name == "broadcast_in_dim" and min(params["broadcast_dimensions"], default=k) >= k
        ):
            kind = SAME
        else:
            return [_constant(var.aval, rows) for var in equation.outvars]
    elif name in ELEMENTWISE:
        kind = OF_ROW
    elif name in REDUCTIONS:
        kind = OF_ROW if min(params["axes"], default=k) >= k else MIXED
    elif name in SCANS:
        kind = OF_ROW if params["axis"] >= k else MIXED
    elif name == "broadcast_in_dim":
        kind = OF_ROW if params["broadcast_dimensions"][:k] == leading else MIXED
    elif name == "squeeze":
        kind = OF_ROW if min(params["dimensions"], default=k) >= k else MIXED
    elif name in ("reshape", "slice"):
        kind = OF_ROW if params.get("dimensions") is None else MIXED
    else:
        kind = MIXED
    if kind == OF_ROW and any(var.aval.shape[:k] != rows for var in equation.outvars):
        kind = MIXED
    return [kind] * len(equation.outvars)
