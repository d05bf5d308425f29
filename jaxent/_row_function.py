"""A loss as a function of one row: what it reads and closes over, found by tracing it, and `jax.vmap` of it.

What the function does with a row is its own affair: nothing here looks into it. tests/test_functions_of_a_row.py,
test_linear_functions.py and test_aux.py guard it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from . import _contracts as contracts
from ._block import Block
from ._derivatives import varying_like
from ._numerics import accumulation_dtype
from ._rows import Rows, both, keep
from ._statistics import (
    INTEGER_STATISTICS,
    OF_CLASSES,
    STATISTICS,
    PhiStatistics,
    SoftmaxStatistics,
    harmless,
    record,
)


class Arguments(NamedTuple):
    """What rows have beside their statistics, `[..., *anything]`."""

    label_weight: Array | None  # w_y, where classes have weights
    weightless: Array | None  # bool: a weight of 0, where rows have weights
    row_args: Any  # a pytree


class RowFunction(NamedTuple):
    """`of_row(closed_over, statistics, arguments) -> (loss, aux)` of scalars; aux is a pytree."""

    of_row: Callable[[Any, SoftmaxStatistics, Arguments], tuple[Array, Any]]
    names: tuple[str, ...]  # of the statistics that it reads: no other is computed
    classes: int
    dtype: Any  # of the loss
    has_aux: bool

    def of_rows(
        self,
        closed_over: Any,
        statistics: SoftmaxStatistics,
        counts: Array | None,
        arguments: Arguments,
        shape: tuple[int, ...],
    ) -> tuple[Array, Any]:
        """Of rows `[*shape]`: losses `[*shape]`, and aux `[*shape, ...]`, which is 0 where a row does not count."""

        def of_row(statistics: SoftmaxStatistics, arguments: Arguments) -> tuple[Array, Any]:
            return self.of_row(closed_over, statistics, arguments)

        def kept(counts: Array | None, statistics: Any, arguments: Any) -> Any:
            # inside the mask as well as outside: fn may turn what a hidden row holds into a NaN gradient
            arguments = jax.tree.map(lambda x: keep(counts, x), arguments)
            return harmless(counts, statistics, self.classes), arguments

        of_rows = _over_rows(of_row, shape)
        row = kept(counts, statistics, arguments)
        losses, aux = of_rows(*row)
        if arguments.weightless is not None:
            # what is not finite is gone with a weight of 0, and must not be differentiated
            finite = ~arguments.weightless | jnp.isfinite(losses)
            losses, aux = of_rows(*kept(finite, *row))
            losses, counts = keep(finite, losses), both(counts, finite)
        return losses, jax.tree.map(lambda x: keep(counts, x), aux)


def row_function(
    fn: Callable[..., Any], block: Block, rows: Rows, arguments: Arguments, has_aux: bool
) -> RowFunction:
    """From `fn(statistics, label_weight, *row_args)`, which gives a loss or with `has_aux` (loss, aux)."""
    available = available_statistics(block)
    read: set[str] = set()

    def on_read(name: str) -> None:
        if name not in available:
            argument, got = "labels", "None" if block.distribution is None else "a distribution"
            remedy = "Pass class indices; `rank` needs them, `log_prob` a distribution at least."
            if name in OF_CLASSES:
                argument, got, remedy = (
                    "classes",
                    "None",
                    "The classes of each row whose mass it is, `[..., K]`.",
                )
            expected = f"given for `fn` to read `{name}`"
            contracts.fail(TypeError, rows.function, argument, expected, got, remedy)
        read.add(name)

    def of_row(_: Any, statistics: SoftmaxStatistics, arguments: Arguments) -> tuple[Array, Any]:
        label_weight = 1 if arguments.label_weight is None else arguments.label_weight
        return _checked(rows.function, fn(statistics, label_weight, *arguments.row_args), has_aux)

    def recording(statistics: SoftmaxStatistics, arguments: Arguments) -> tuple[Array, Any]:
        recorder = _Recorder(**vars(statistics))
        object.__setattr__(recorder, "on_read", on_read)
        return of_row((), recorder, arguments)

    _, (loss, _) = _trace(recording, available, block, (rows.counts, rows.weights), arguments)
    names = tuple(name for name in available if name in read)
    return RowFunction(of_row, names, rows.all_classes(block.logits.shape[-1]), loss.dtype, has_aux)


def hoist(f: RowFunction, block: Block, like: Any, arguments: Arguments) -> tuple[RowFunction, list[Array]]:
    """(`f` of the arrays that it closes over, these): a rule must know all that it differentiates.

    In a `shard_map` rows vary as anything in `like` does.
    """
    of_row = lambda *row: f.of_row((), *row)  # noqa: E731
    closed, out = _trace(of_row, f.names, block, like, arguments)
    is_array = [isinstance(x, jax.Array) for x in closed.consts]
    closed_over = [x for x, it_is in zip(closed.consts, is_array, strict=True) if it_is]

    def run(closed_over: list[Array], row: list[Array]) -> list[Array]:
        arrays = iter(closed_over)
        consts = [next(arrays) if it_is else x for x, it_is in zip(closed.consts, is_array, strict=True)]
        return jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, consts))(*row)

    # once more: what the rule keeps holds no traced array, which would leak with it
    opened, treedef = jax.make_jaxpr(run)(closed_over, list(closed.in_avals)), jax.tree.structure(out)

    def hoisted(closed_over: list[Array], *row: Any) -> tuple[Array, Any]:
        return jax.tree.unflatten(treedef, jaxpr_as_fun(opened)(*closed_over, *jax.tree.leaves(row)))

    return f._replace(of_row=hoisted), closed_over


class _Recorder(PhiStatistics):
    """Statistics that tell which of them are read. As a pytree (fn may be jitted) all that there are."""

    def __getattribute__(self, name: str) -> Any:
        if name in STATISTICS:
            vars(self).get("on_read", lambda _: None)(name)  # a copy has none
        found = object.__getattribute__(self, name)
        if name == "__dataclass_fields__":  # of which `dataclasses.replace` reads all
            found = {name: field for name, field in found.items() if vars(self)[name] is not None}
        return found


jax.tree_util.register_pytree_node(
    _Recorder,
    lambda s: ([None if vars(s)[name] is None else getattr(s, name) for name in STATISTICS], None),
    lambda _, fields: cast(_Recorder, PhiStatistics(*fields)),
)


def available_statistics(block: Block) -> tuple[str, ...]:
    has_target = block.label is not None or block.distribution is not None
    given = {
        "log_prob": has_target,
        "weighted_log_prob": has_target,
        "rank": block.label is not None,
        "weighted_phi": block.phi is not None and block.distribution is not None,
        "mean_phi": block.phi is not None,
    } | dict.fromkeys(OF_CLASSES, block.classes is not None)
    return tuple(name for name in STATISTICS if given.get(name, True))


def _trace(
    of_row: Callable[..., Any], names: tuple[str, ...], block: Block, like: Any, arguments: Arguments
) -> tuple[ClosedJaxpr, Any]:
    """(`of_row(statistics, arguments)` of one row as a jaxpr, the shapes of its results)."""
    found = []
    one = (1,) * (block.logits.ndim - 1)
    like = block, like, arguments

    def probe(*row: Any) -> None:
        found.append(jax.make_jaxpr(of_row, return_shape=True)(*row))

    def of_one_row(arguments: Arguments) -> None:
        real = accumulation_dtype(block.logits.dtype)
        dtypes = {name: jnp.int32 if name in INTEGER_STATISTICS else real for name in names}
        slots = (1 if block.classes is None else block.classes.shape[-1],)
        shapes = {name: one + slots if name == "class_log_probs" else one for name in names}
        statistics = record({name: jnp.zeros(shapes[name], x) for name, x in dtypes.items()})
        _over_rows(probe, one, None)(*varying_like(like, (statistics, arguments)))

    def of_row_alone(x: Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(one + x.shape[len(one) :], x.dtype)

    jax.eval_shape(of_one_row, jax.tree.map(of_row_alone, arguments))
    return found[0]


def _over_rows(f: Callable[..., Any], shape: tuple[int, ...], out_axes: int | None = 0) -> Callable[..., Any]:
    """`f` of one row as a function of rows `shape`."""
    for size in reversed(shape):
        f = jax.vmap(f, out_axes=out_axes, axis_size=size)
    return f


def _checked(function: str, found: Any, has_aux: bool) -> tuple[Array, Any]:
    loss, aux = found, ()
    if has_aux:
        if not (isinstance(found, tuple) and len(found) == 2):
            remedy = "With `has_aux` it returns `(loss, aux)`."
            got = f"one to {contracts.what_came(found)}"
            contracts.fail(ValueError, function, "fn", "a function of one row to a pair", got, remedy)
        loss, aux = found
    is_number = isinstance(loss, jax.Array | np.ndarray | np.generic | float | int)
    if not is_number or np.iscomplexobj(loss) or np.shape(loss):
        remedy = (
            "It sees one row: scalar statistics, and row arguments without the axes of rows; `reduction` does the "
            "rest. What has a value for each row must be a row argument: pass it as one, do not close over it."
        )
        got = f"one to {contracts.what_came(loss)}"
        contracts.fail(ValueError, function, "fn", "a function of one row to a scalar", got, remedy)
    loss = jnp.asarray(loss)
    aux = jax.tree.map(lambda x: lax.stop_gradient(jnp.asarray(x)), aux)
    return loss.astype(accumulation_dtype(loss.dtype)), aux
