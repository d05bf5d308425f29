"""K chosen classes of each row: what an array over the classes has there, and numbers put in their places.

`classes` are int `[..., K]` beside arrays `[..., V]`; one that is not in [0, V) is nowhere. Classes that are split over
devices are not moved: a gather or scatter along the last axis, row by row, stays where it is, and what is sent is
`[..., K]`. tests/test_classes.py, test_sparse.py and tests/devices/test_covering.py guard it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ._devices import explicit_sharding, lanes

COMPARED = 32  # so few classes each logit is compared with, which fuses; more are scattered, into a copy


def is_here(classes: Array, x: Array) -> Array:
    """bool `[..., K]`: whether `x` `[..., V]` has the class."""
    return (classes >= 0) & (classes < x.shape[-1])


def take(x: Array, classes: Array, nowhere: float = 0) -> Array:
    """`x[..., classes]` `[..., K]` of `[..., V]`, or of `[V]` for all rows."""
    if not classes.shape[-1]:
        return jnp.zeros_like(classes, x.dtype)
    how = _out_sharding(explicit_sharding(classes), None)

    def of_row(x: Array, classes: Array) -> Array:
        return x.at[classes].get(mode="promise_in_bounds", **how)

    in_axes = (None if x.ndim == 1 else 0), 0
    found = _of_rows(of_row, classes, in_axes)(x, jnp.clip(classes, 0, x.shape[-1] - 1))
    return jnp.where(is_here(classes, x), found, jnp.asarray(nowhere, found.dtype))


def put(x: Array, classes: Array, values: Array | float) -> Array:
    """`x` `[..., V]` with `values` `[..., K]`, or one number, at these classes; equal ones have equal values."""
    if isinstance(values, float):
        values = (0 * classes).astype(
            x.dtype
        ) + values  # not `full_like`, which on jax 0.12 is split as nothing is
    values = values.astype(x.dtype)
    if classes.shape[-1] <= COMPARED:
        # selects of values, not of what is chosen: a TPU is slow at masks
        for k in range(classes.shape[-1]):
            x = jnp.where(lanes(x, classes.dtype) == classes[..., k, None], values[..., k, None], x)
        return x
    size, sharding = x.shape[-1], explicit_sharding(x)
    how = _out_sharding(sharding, sharding and sharding.spec[-1])
    # each class once, and what is dropped too: jax transposes a scatter of unique places alone
    once = is_here(classes, x) & is_first(classes)
    places = jnp.where(once, classes, lanes(classes, classes.dtype) + size)

    def of_row(x: Array, places: Array, values: Array) -> Array:
        return x.at[places].set(values, mode="drop", unique_indices=True, **how)

    return _of_rows(of_row, classes)(x, places, values)


def spread(values: Array, classes: Array, numbers: Array) -> Array:
    """`[..., B]`: at each of these class numbers the sum of the `values` `[..., K]` of that class."""
    if classes.shape[-1] > COMPARED:
        at = classes[..., None, :] == numbers[..., :, None]
        return jnp.sum(jnp.where(at, values[..., None, :], jnp.zeros_like(values[..., None, :])), -1)
    total = jnp.zeros((), values.dtype)
    for k in range(classes.shape[-1]):
        value = values[..., k, None]
        total = total + jnp.where(numbers == classes[..., k, None], value, jnp.zeros_like(value))
    return total


def is_chosen(classes: Array, numbers: Array) -> Array:
    """bool `[..., B]` of class numbers, or [] if none is."""
    if classes.shape[-1] > COMPARED:
        return jnp.any(classes[..., None, :] == numbers[..., :, None], -1)
    found = jnp.zeros((), bool)
    for k in range(classes.shape[-1]):
        found = found | (numbers == classes[..., k, None])
    return found


def is_first(classes: Array) -> Array:
    """bool `[..., K]`: False for a class that was there before."""
    slots = classes.shape[-1]
    if slots <= COMPARED:
        before = lanes(classes)[..., None, :] < lanes(classes)[..., :, None]
        return ~jnp.any((classes[..., None, :] == classes[..., :, None]) & before, -1)
    place = lanes(classes) + jnp.zeros_like(classes)  # split as they are
    ordered, place = jax.lax.sort((classes, place), num_keys=1, is_stable=True)
    first = jnp.concatenate(
        [jnp.ones_like(ordered[..., :1], bool), ordered[..., 1:] != ordered[..., :-1]], -1
    )
    return jax.lax.sort((place, first), num_keys=1)[1]


def _out_sharding(sharding: Any, last: Any) -> dict[str, Any]:
    """Of one row, which jax asks for on an explicit mesh."""
    return {} if sharding is None else {"out_sharding": NamedSharding(sharding.mesh, P(last))}


def _of_rows(f: Callable[..., Array], classes: Array, in_axes: Any = 0) -> Callable[..., Array]:
    """`f` of one row as a function of all."""
    for _ in range(classes.ndim - 1):
        f = jax.vmap(f, in_axes=in_axes)
    return f
