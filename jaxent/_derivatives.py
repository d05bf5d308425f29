"""Custom derivatives: forward mode for rules that are a `custom_vjp`, and values whose derivative is stated apart."""

import dataclasses
import functools
from collections.abc import Callable, Set
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from ._mapped import mapped_like


def with_forward_mode(rule: Callable[..., Any]) -> Callable[..., Any]:
    """`rule(static, *arrays)`, a custom_vjp function, with `jvp`, `linearize` and `jacfwd` as well.

    jax refuses forward mode of a custom_vjp function. But the tangent map is the transpose of the backward
    map, which the rule states already, so nothing is derived twice. Under reverse mode jax transposes the tangent
    map, which gives the backward map again; `checkpoint` keeps what the rule saved as the only residuals.

    What is not differentiated (integer labels, a frozen kernel) is closed over, so its part of the backward is
    never built. Integer results are allowed; they have no derivative. The forward rule must not call `rule` itself,
    and the backward must be linear in its cotangents: no comparison of them, no added constant, no loop.
    """

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def function(static: Any, *arrays: Any) -> Any:
        return mapped_like(arrays, rule(static, *arrays))

    @functools.partial(function.defjvp, symbolic_zeros=True)
    def jvp(static: Any, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
        leaves, treedef = jax.tree.flatten(primals)
        dots = jax.tree.leaves(tangents)
        perturbed = [i for i, dot in enumerate(dots) if not isinstance(dot, SymbolicZero)]

        def of_perturbed(some: list[Any]) -> Any:
            full = dict(enumerate(leaves)) | dict(zip(perturbed, some, strict=True))
            found = rule(static, *jax.tree.unflatten(treedef, list(full.values())))
            is_real = jax.tree.map(lambda x: bool(jnp.issubdtype(x.dtype, jnp.inexact)), found)
            real = jax.tree.map(lambda x, real: x if real else None, found, is_real)
            return real, jax.tree.map(lambda x, real: None if real else x, found, is_real)

        def join(real: Any, integers: Any) -> Any:
            is_none = lambda x: x is None  # noqa: E731
            return jax.tree.map(lambda x, n: n if x is None else x, real, integers, is_leaf=is_none)

        out, vjp, integers = jax.vjp(of_perturbed, [leaves[i] for i in perturbed], has_aux=True)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def tangent(vjp: Any, dots: list[Any]) -> Any:
            (out_dot,) = jax.linear_transpose(vjp, out)((dots,))
            return out_dot

        dot = tangent(vjp, [varying_like(leaves[i], dots[i]) for i in perturbed])
        zeros = jax.tree.map(jax.custom_derivatives.zero_from_primal, integers)
        return mapped_like(primals, join(out, integers)), join(dot, zeros)

    return function


def zeros_like_any(like: Any, x: Array) -> Array:
    """Zeros like `x`, that vary over devices, and that a `vmap` maps over, if anything in `like` does.

    As the result of a rule: cotangents of a result that all have in common would be added up.
    """
    return varying_like(like, mapped_like(like, jnp.zeros_like(x)))


def with_slope(value: Any, zero: Any) -> Any:
    """`value` with the derivative of `zero`. In what is made of a derivative it is plain, and has its own again."""
    return _with_slope(*varying_like((value, zero), (value, zero)))


_with_slope = jax.custom_jvp(lambda value, zero: mapped_like(zero, value))
_with_slope.defjvp(lambda primals, tangents: (primals[0], tangents[1]))


def reverse_mode_only(rule: Callable[..., Any]) -> Callable[..., Any]:
    """`rule`, a custom_vjp function whose backward is a loop, which has no transpose; an error says what works."""

    def function(*args: Any) -> Any:
        try:
            return rule(*args)
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            raise TypeError(
                "jaxent: contrastive losses, results per row of a `LinearLogits`, and those by blocks of classes or of "
                "a split class axis, have no forward mode (`jax.jvp`, `jax.linearize`, `jax.jacfwd`). What works: "
                "reverse mode (`jax.grad`, `jax.vjp`, `jax.jacrev`); forward over reverse (`jax.jvp` of `jax.grad`, "
                '`jax.hessian`); of linear logits also `jax.jvp` of a `reduction="mean"` or "sum" by blocks of rows (a '
                "larger `block_bytes`); or logits as an array (`.dense()`)."
            ) from error

    return function


def varying_like(like: Any, tree: Any) -> Any:
    """`tree`, whose leaves may be the same on all devices of a shard_map, as varying wherever a leaf of `like` is."""
    axes = varying_axes(like)

    def cast(x: Any) -> Any:
        more = tuple(axes - varying_axes(x))
        return jax.lax.pcast(x, more, to="varying") if more else x

    return jax.tree.map(cast, tree)


def varying_axes(tree: Any) -> Set[Any]:
    """Over which axes of a shard_map (with check_vma) any leaf differs."""
    return set().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Perturbed:
    """Which leaves of a pytree are differentiated."""

    leaves: tuple[bool, ...]

    def tree(self, like: Any) -> Any:
        return jax.tree.unflatten(jax.tree.structure(like), self.leaves)


def values_and_perturbed(tree: Any) -> tuple[Any, Perturbed]:
    """From what a forward rule is given with `symbolic_zeros`."""
    leaves, treedef = jax.tree.flatten(tree)
    perturbed = [x.perturbed and jnp.issubdtype(x.value.dtype, jnp.inexact) for x in leaves]
    return jax.tree.unflatten(treedef, [x.value for x in leaves]), Perturbed(tuple(perturbed))


def slope_rule(zeros: Callable[..., Any], gradient: Callable[..., Any]) -> Callable[..., Any]:
    """`rule(static, inputs)`, which is 0, `zeros(static, inputs)`, and has a derivative by `inputs`:

    `gradient(static, inputs, perturbed, g)`. With `with_slope` it is that of something made of more than these inputs.
    """

    def forward(static: Any, inputs: Any) -> tuple[Any, Any]:
        inputs, perturbed = values_and_perturbed(inputs)
        return zeros(static, inputs), (inputs, perturbed)

    def backward(static: Any, residuals: Any, g: Any) -> tuple[Any]:
        return (gradient(static, *residuals, instantiate(g)),)

    rule = jax.custom_vjp(zeros, nondiff_argnums=(0,))
    rule.defvjp(forward, backward, symbolic_zeros=True)
    return rule


def instantiate(tree: Any) -> Any:
    """Cotangents, symbolic zeros among them, as arrays."""
    is_zero = lambda x: isinstance(x, SymbolicZero)  # noqa: E731
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if is_zero(x) else x, tree, is_leaf=is_zero)


def stopping_early(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run(stop, static, *arrays)`, a loop that may stop after a traced number of steps, as a function that does.

    jax has no reverse mode through such a loop; so where it is differentiated (`run` is what rules are made of, so
    that is for second derivatives) it takes all steps, of which the last ones give zeros.
    """
    function = jax.custom_jvp(functools.partial(run, True), nondiff_argnums=(0,))

    @function.defjvp
    def jvp(static: Any, primals: Any, tangents: Any) -> Any:
        return jax.jvp(functools.partial(run, False, static), primals, tangents)

    return function


def cast_like(gradients: Any, like: Any, dtype: Callable[[Any], Any] = lambda dtype: dtype) -> Any:
    """`gradients`, None where there is none, in `dtype` of the dtypes of `like`."""
    return jax.tree.map(lambda x, d: None if d is None else d.astype(dtype(x.dtype)), like, gradients)


def stored(dtype: Any) -> Any:
    """In which a gradient waits for its factor: float16 would lose what that, a loss scale maybe, is there to save."""
    return jnp.float32 if dtype == jnp.float16 else dtype


def dtypes_of(tree: Any) -> Any:
    """Of what may have a gradient: arrays of no elements."""
    is_real = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)  # noqa: E731
    return jax.tree.map(lambda x: jnp.zeros(0, x.dtype) if is_real(x) else None, tree)
