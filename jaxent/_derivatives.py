"""Forward mode for functions whose rule of record is a `custom_vjp`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero


def with_forward_mode(rule: Callable[..., Any]) -> Callable[..., Any]:
    """`rule(static, *arrays)`, a custom_vjp function, with `jvp`, `linearize` and `jacfwd` as well.

    jax refuses forward mode of a custom_vjp function. But the tangent map is the transpose of the backward
    map, which the rule states already, so nothing is derived twice. Under reverse mode jax transposes the tangent
    map, which gives the backward map again; `checkpoint` keeps what the rule saved as the only residuals.

    What is not differentiated (integer labels, a frozen kernel) is closed over, so its part of the backward is
    never built. The forward rule must not call `rule` itself, and the backward must be linear in its cotangents:
    no comparison of them, no added constant.
    """

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def function(static: Any, *arrays: Any) -> Any:
        return rule(static, *arrays)

    @functools.partial(function.defjvp, symbolic_zeros=True)
    def jvp(static: Any, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
        leaves, treedef = jax.tree.flatten(primals)
        dots = jax.tree.leaves(tangents)
        moving = [i for i, dot in enumerate(dots) if not isinstance(dot, SymbolicZero)]

        def of_moving(moved: list[Any]) -> Any:
            full = dict(enumerate(leaves)) | dict(zip(moving, moved, strict=True))
            return rule(static, *jax.tree.unflatten(treedef, list(full.values())))

        out, vjp = jax.vjp(of_moving, [leaves[i] for i in moving])

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def tangent(vjp: Any, dots: list[Any]) -> Any:
            (out_dot,) = jax.linear_transpose(vjp, out)((dots,))
            return out_dot

        return out, tangent(vjp, [_varying_like(leaves[i], dots[i]) for i in moving])

    return function


def _varying_like(x: Any, dot: Any) -> Any:
    """`dot`, which may be the same on all devices of a shard_map, as varying over the devices as `x`."""
    axes = tuple(jax.typeof(x).manual_axis_type.varying - jax.typeof(dot).manual_axis_type.varying)
    return jax.lax.pcast(dot, axes, to="varying") if axes else dot
