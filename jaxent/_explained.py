"""Values that explain themselves under `checkify`, and cost nothing anywhere else.

`checkify.debug_check` would do, but for its effect: jax calls a compiled function that has one from Python, array by
array, which takes several times as long (docs/benchmarks.md). So the check is a primitive without effect, the identity,
which only checkify reads. How jax's checkify meets a primitive that it does not know is not public; where that is not
found, bad labels are not explained, only NaN. tests/test_checkify.py guards it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import checkify
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_explained = Primitive("explained")


def explained(x: Array, bad: Array, message: str) -> Array:
    """`x`; for whoever wraps the outermost function with `checkify.checkify` or `chex.chexify`, an error if any is bad.

    `message` names the first bad element with {index}, counted over the flattened array, and {value}.
    """
    return _explained.bind(x, jax.lax.stop_gradient(bad), message=message)


def _check(x: Array, bad: Array, message: str) -> None:
    # Nothing is flattened to count: `bad` may be split over devices.
    position = jnp.zeros(bad.shape, jnp.int32)
    for axis in range(bad.ndim):
        position = position * bad.shape[axis] + jax.lax.broadcasted_iota(jnp.int32, bad.shape, axis)
    index = jnp.min(jnp.where(bad, position, bad.size), initial=bad.size)
    value = jnp.sum(jnp.where(position == index, x, jnp.zeros((), x.dtype)), dtype=x.dtype)
    checkify.debug_check(~jnp.any(bad), message, index=index, value=value)


def _batch(inputs: tuple[Any, Any], axes: tuple[Any, Any], message: str) -> tuple[Array, int]:
    size = next(x.shape[axis] for x, axis in zip(inputs, axes, strict=True) if axis is not None)
    x, bad = (batching.bdim_at_front(x, axis, size) for x, axis in zip(inputs, axes, strict=True))
    return _explained.bind(x, bad, message=message), 0


def _jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any], message: str) -> tuple[Array, Any]:
    return _explained.bind(*primals, message=message), tangents[0]


_explained.def_impl(lambda x, bad, message: x)
_explained.def_abstract_eval(lambda x, bad, message: x)
mlir.register_lowering(_explained, lambda context, x, bad, message: [x])
batching.primitive_batchers[_explained] = _batch
ad.primitive_jvps[_explained] = _jvp

try:
    from jax._src.checkify import checkify_jaxpr, error_checks
except ImportError:
    pass
else:

    def _rule(*args: Any, message: str) -> tuple[Any, Array]:
        *context, error, enabled, x, bad = args  # newer versions of jax have a context
        check = jax.make_jaxpr(lambda x, bad: _check(x, bad, message))(x, bad)
        error, _ = checkify_jaxpr(*context, check, enabled, error, x, bad)
        return error, x

    error_checks[_explained] = _rule
