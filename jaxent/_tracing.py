"""What a function of row statistics reads, closes over and mixes, found by tracing it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun, jaxprs_in_params

from . import _contracts as contracts
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

    dtype = block.logits.dtype
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


def hoist(closed: ClosedJaxpr) -> tuple[Callable[..., Array], list[Any]]:
    """(`function(closed_over, *arguments)`, the traced arrays that a traced function closes over).

    A rule of differentiation has to know all that it differentiates as its arguments.
    """
    is_traced = [isinstance(x, jax.core.Tracer) for x in closed.consts]

    def function(closed_over: list[Any], *arguments: Any) -> Array:
        traced = iter(closed_over)
        consts = [next(traced) if t else x for x, t in zip(closed.consts, is_traced, strict=True)]
        (out,) = jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, consts))(*jax.tree.leaves(arguments))
        return out

    return function, [x for x, t in zip(closed.consts, is_traced, strict=True) if t]


# Whether rows are mixed. A function that normalizes over rows, or closes over an array with a value per row, must see
# all rows at once; one that provably takes each row by itself may see them block by block. What is not known here
# counts as mixing: then the gradients take a matmul more, and are right.

ELEMENTWISE = frozenset(
    "abs acos acosh add and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type copy cos cosh digamma "
    "div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le lgamma log log1p logistic lt max "
    "min mul ne neg nextafter not or pow reduce_precision rem round rsqrt select_n sign sin sinh sqrt square "
    "stop_gradient sub tan tanh xor".split()
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


def same_numbers(a: ClosedJaxpr, b: ClosedJaxpr) -> bool:
    """Whether one function, traced for two numbers of rows, uses neither of them as a number."""
    return list(_numbers(a)) == list(_numbers(b))


def _numbers(closed: ClosedJaxpr) -> Iterator[Any]:
    for x in closed.consts:
        yield None if isinstance(x, jax.core.Tracer) else np.asarray(x).tolist()
    yield from _numbers_of_equations(closed.jaxpr)


def _numbers_of_equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        yield [np.asarray(var.val).tolist() for var in equation.invars if isinstance(var, Literal)]
        yield [value for value in equation.params.values() if isinstance(value, bool | int | float | str)]
        for inner in jaxprs_in_params(equation.params):
            yield from _numbers_of_equations(inner)


def _constant(aval: Any, rows: tuple[int, ...]) -> str:
    """A value that nothing is known of: with the rows in front it may hold one number per row."""
    return MIXED if aval.shape[: len(rows)] == rows else SAME


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
    if inner is not None and name in ("jit", "pjit", "checkpoint", "custom_jvp_call", "custom_vjp_call"):
        return _dependence(getattr(inner, "jaxpr", inner), inputs, rows)
    if MIXED in inputs:
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
