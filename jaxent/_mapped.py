"""Values that a `vmap` maps over because others are.

A custom rule may have a result that some input has no part in, and a derivative that it has a part in: a mask hides a
row's gradient, not its log-normalizer. Where a `vmap` meets such a rule within `jit`, `checkpoint` or a loop, jax notes
once which results are mapped over, by their values alone; the derivatives that come later are then taken for arrays of
other shapes. So these results are made mapped over too, by a primitive that is the identity, and nothing in a compiled
program.
"""

from typing import Any

import jax
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_mapped = Primitive("mapped_like")


def mapped_like(like: Any, tree: Any) -> Any:
    """`tree`, whose leaves a `vmap` maps over if it maps over any leaf of `like`."""
    others = jax.lax.stop_gradient(jax.tree.leaves(like))
    return jax.tree.map(lambda x: _mapped.bind(x, *others), tree)


def _batch(axis: Any, inputs: tuple[Any, ...], axes: tuple[Any, ...]) -> tuple[Array, int | None]:
    if all(at is None for at in axes):
        return _mapped.bind(*inputs), None
    x = batching.bdim_at_front(inputs[0], axes[0], axis.size, axis.explicit_mesh_axis)
    return _mapped.bind(x, *inputs[1:]), 0


_mapped.def_impl(lambda x, *others: x)
_mapped.def_abstract_eval(lambda x, *others: x)
mlir.register_lowering(_mapped, lambda context, x, *others: [x])
batching.fancy_primitive_batchers[_mapped] = _batch
ad.primitive_jvps[_mapped] = lambda primals, tangents: (_mapped.bind(*primals), tangents[0])
