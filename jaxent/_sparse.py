"""A few classes of each row, as a caller gives them: a distribution over them, or the classes alone. Checked here.

tests/test_sparse.py, test_classes.py and test_sparse_errors.py guard it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from . import _contracts as contracts
from ._contracts import Shape, Values
from ._devices import ALL, split_as
from ._rows import Rows

REMEDY = "Classes count from 0; an empty slot is -1{}; hide a row with `where=`."
WITHOUT_MASS = REMEDY.format(", of probability 0")
EMPTY, BAD = -1, -2  # a slot that holds no class; one that makes its row NaN
InForce = Callable[[Array], Array] | None  # of classes [...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SparseDistribution:
    """A label distribution with mass on K classes of each row: `labels` of softmax losses, target of KL and JS.

        q_j = sum of probs[..., k] over the slots with classes[..., k] == j

    Top-k teachers, mixup (K = 2), several right answers, sampled candidates: losses and gradients are those of the
    dense distribution, without its `[..., V]` array. A pytree, like any tuple of arrays.

    Args:
      classes: integers `[..., K]`, in [0, V). The same class twice adds up.
      probs: `[..., K]`, floating point in [0, 1], used as they are, whatever their sum. A slot of probability 0 is
        gone, whatever its class: sets of different sizes are filled up with -1. With an `axis` of logits K stands
        where V does.

    Gradients:
      `probs` get what the dense distribution gets at their classes, a slot whose class is none (-1) 0.

    Numerics:
      A bad class (outside [0, V), or not in force) that has probability makes its row's loss and gradient NaN; where
      both arrays are NumPy's it raises.

    Cost:
      K numbers per row are gathered. In the gradient each logit is compared with up to 32 classes of its row; more are
      scattered into it, which takes an array of N x V.

    Raises:
      Nothing when it is made; as `labels` of a loss, TypeError: classes that are not integers, probs that are not
      floating point; ValueError: shapes that do not match exactly, bad NumPy classes.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> logits = jnp.array([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
      >>> mixed = jaxent.SparseDistribution(jnp.array([[0, 2], [1, -1]]), jnp.array([[0.75, 0.25], [1.0, 0.0]]))
      >>> print(jaxent.softmax_cross_entropy(logits, mixed).round(4))
      [0.9198 1.0986]

    Source:
      Top-k distillation of language models; mixup: Zhang et al. 2018.
    """

    classes: Array
    probs: Array


def check_sparse(function: str, argument: str, q: SparseDistribution, shape: Shape, axis: int) -> None:
    """Shapes and dtypes."""
    classes, probs = q.classes, q.probs
    check_classes(function, f"{argument}.classes", classes, shape, axis)
    contracts.check_floating(function, f"{argument}.probs", probs, "Pass `probs.astype(jnp.float32)`.")
    what = f"that of `{argument}.classes`"
    contracts.check_shape(function, f"{argument}.probs", probs, np.shape(classes), what, "One per class.")


def check_classes(function: str, argument: str, classes: Any, shape: Shape, axis: int) -> None:
    contracts.check_array(function, argument, classes)
    expected = [str(n) for n in shape]
    expected[axis] = "K"
    remedy = "One set of K classes per row of logits; fill up smaller ones with -1."
    if not contracts.is_integer(classes):
        contracts.fail(TypeError, function, argument, "integers", contracts.describe(classes), remedy)
    found = np.shape(classes)
    if len(found) != len(shape) or (np.delete(found, axis) != np.delete(shape, axis)).any():
        wanted = f"of shape [{', '.join(expected)}]"
        contracts.fail(ValueError, function, argument, wanted, contracts.describe(classes), remedy)


def prepare_sparse(
    rows: Rows, argument: str, q: SparseDistribution, classes: int, in_force: InForce
) -> SparseDistribution:
    """With the slots last: classes int32, EMPTY where they are bad or gone, and NaN where such a slot has mass."""
    argument = f"{argument}.classes"
    has_mass = np.asarray(q.probs) != 0 if contracts.is_on_host(q.probs) else False
    found = _on_device(rows, argument, q.classes, classes, has_mass, WITHOUT_MASS)
    probs = _split(rows, jnp.moveaxis(jnp.asarray(q.probs), rows.options.axis, -1))
    ok = _is_class(found, classes, in_force)
    gone = probs == 0
    found = _explained(rows, argument, found, ok | gone, classes, WITHOUT_MASS)
    probs = jnp.where(ok | gone, probs, jnp.nan)
    return SparseDistribution(jnp.where(ok, found, EMPTY).astype(jnp.int32), probs)


def prepare_classes(rows: Rows, argument: str, given: Any, classes: int, in_force: InForce) -> Array:
    """Classes of each row, with the slots last, int32.

    EMPTY where a slot is, or its class is not in force; BAD where it names no class.
    """
    matters = np.asarray(given) != EMPTY if contracts.is_on_host(given) else True
    found = _on_device(rows, argument, given, classes, matters, REMEDY.format(""))
    ok, empty = _is_class(found, classes, None), found == EMPTY
    found = _explained(rows, argument, found, ok | empty, classes, REMEDY.format(""))
    found = jnp.where(ok, found, jnp.where(empty, EMPTY, BAD)).astype(jnp.int32)
    return found if in_force is None else jnp.where(ok & ~in_force(found), EMPTY, found)


def _on_device(rows: Rows, argument: str, x: Any, classes: int, matters: Any, remedy: str) -> Array:
    """`x` with the slots last; known on the host it is checked where it `matters`, before jax truncates it."""
    axis = rows.options.axis
    if contracts.is_on_host(x):
        x = np.asarray(x)
        values = Values(lambda x: (x >= 0) & (x < classes), f"in [0, {classes})", remedy)
        mask = rows.host_mask
        if not isinstance(mask, jax.core.Tracer):
            mask = matters if mask is None else matters & np.expand_dims(np.asarray(mask), axis)
        contracts.check_on_host(rows.function, argument, x, values, mask)
        x = np.where(values.ok(x) | (x == EMPTY), x.astype(np.int32), np.int32(BAD))
    x = jnp.asarray(x)
    x = x.astype(jnp.int32) if x.dtype.itemsize < 4 else x
    return _split(rows, jnp.moveaxis(x, axis, -1))


def _split(rows: Rows, x: Array) -> Array:
    """Like the rows on an explicit mesh, and each row's slots in one place."""
    like = rows.sharding
    return x if like is None else split_as(NamedSharding(like.mesh, P(*like.spec[:-1], None)), ALL, x)


def _is_class(x: Array, classes: int, in_force: InForce) -> Array:
    ok = (x >= 0) & (x < classes)
    return ok if in_force is None else ok & in_force(jnp.where(ok, x, EMPTY).astype(jnp.int32))


def _explained(rows: Rows, argument: str, x: Array, ok: Array, classes: int, remedy: str) -> Array:
    expected = f"in [0, {classes}) and name a class in force"
    values = Values(lambda _: ok, expected, remedy)
    seen = None if rows.seen is None else jnp.broadcast_to(rows.seen[..., None], ok.shape)
    of = "array, its slots last"
    return contracts.explained_values(rows.function, argument, x, values, seen, of)
