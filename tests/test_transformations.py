"""Every transformation of jax on every softmax function: the same as of plain jax.numpy in float64."""

import functools

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax import lax

import forms
import harness
import jaxent
from forms import FORMS, moving, tangents, total

SMALL, GROUPED = 7, 4096  # classes; on one CPU, sums of many classes are made in groups
all_forms = pytest.mark.parametrize("name", FORMS)


def of_moving(f, arguments):
    """`f` as a function of the arguments that can be differentiated, and their values."""
    which = moving(arguments)

    def g(*moved):
        full = list(arguments)
        for i, x in zip(which, moved, strict=True):
            full[i] = x
        return f(*full)

    return g, [arguments[i] for i in which]


def all_but(name, form, arguments, copies=3):
    """in_axes for, and arguments with, copies of one input only: its rows rolled."""
    axes = [0 if other == name else None for other in form.inputs]
    rolled = [
        jnp.stack([jnp.roll(x, i, 0) for i in range(copies)]) if axis == 0 else x
        for x, axis in zip(arguments, axes, strict=True)
    ]
    return tuple(axes), rolled


def vmap_of_one(name, f, form, arguments):
    if name not in form.inputs:
        return ()
    axes, rolled = all_but(name, form, arguments)
    return jax.vmap(f, axes)(*rolled)


def vmap_with_classes_first(f, form, arguments):
    """[V, N] logits and targets, mapped over axis 1."""
    axes = [1 if x.ndim == 2 else axis for x, axis in zip(arguments, form.in_axes(), strict=True)]
    return jax.vmap(f, tuple(axes), out_axes=0)(*[x.T if x.ndim == 2 else x for x in arguments])


def nested(f, form, arguments):
    """[N] rows as [2, N / 2], mapped twice, and the inner map alone."""
    axes = form.in_axes()
    split = [
        x if a is None else x.reshape(2, -1, *x.shape[1:]) for x, a in zip(arguments, axes, strict=True)
    ]
    return jax.vmap(jax.vmap(f, axes), axes)(*split), jax.vmap(f, axes)(*split), f(*split)


def scan_of(f, form, arguments):
    """(sum, losses), one row a step."""
    axes = form.in_axes()
    rows = [x for x, a in zip(arguments, axes, strict=True) if a == 0]

    def step(carry, row):
        row = iter(row)
        loss = f(*[next(row) if a == 0 else x for x, a in zip(arguments, axes, strict=True)])
        return carry + loss * loss, loss

    return lax.scan(step, jnp.zeros((), arguments[0].dtype), rows)


def by_rows(wrap):
    """Transformation of the rows function, called on all arguments."""
    return lambda f, form, arguments: wrap(f, form)(*arguments)


def by_scalar(wrap):
    """Transformation of the scalar function of what can be differentiated: wrap(scalar)(primals, tangents)."""

    def transformed(f, form, arguments):
        g, primals = of_moving(total(f), arguments)
        return wrap(g, primals, tangents(arguments))

    return transformed


def gradient(g, primals):
    return jax.grad(g, tuple(range(len(primals))))(*primals)


def along(g, primals, dots):
    """The scalar <grad g, dots>, to be differentiated again."""
    return lambda *moved: sum(jnp.vdot(d, dot) for d, dot in zip(gradient(g, moved), dots, strict=True))


def directional(g, dots):
    """The same scalar in forward mode."""
    return lambda *moved: jax.jvp(g, moved, tuple(dots))[1]


def jacobians(transform):
    return lambda f, form, arguments: transform(f)(*arguments)


def gradient_of_one_row(f, form):
    return jax.grad(lambda *row: f(*row))


# name: (f, form, arguments) -> what is compared
TRANSFORMATIONS = {
    "value": by_rows(lambda f, form: f),
    "vmap": by_rows(lambda f, form: jax.vmap(f, form.in_axes())),
    "vmap, labels only": functools.partial(vmap_of_one, "label"),
    "vmap, logits only": functools.partial(vmap_of_one, "logits"),
    "vmap, in_axes=1": vmap_with_classes_first,
    "vmap of vmap": nested,
    "vmap of grad": by_rows(lambda f, form: jax.vmap(gradient_of_one_row(f, form), form.in_axes())),
    "vmap of jvp": by_rows(
        lambda f, form: jax.vmap(
            lambda z, *rest: jax.jvp(lambda z: f(z, *rest), (z,), (jnp.sin(z + 1),)), form.in_axes()
        )
    ),
    "grad of vmap": lambda f, form, a: by_scalar(lambda g, x, dots: gradient(g, x))(
        jax.vmap(f, form.in_axes()), form, a
    ),
    "grad": by_scalar(lambda g, x, dots: gradient(g, x)),
    "value_and_grad": by_scalar(lambda g, x, dots: jax.value_and_grad(g)(*x)),
    "checkpoint": by_scalar(lambda g, x, dots: gradient(jax.checkpoint(g), x)),
    "checkpoint, twice": by_scalar(
        lambda g, x, dots: gradient(jax.checkpoint(along(jax.checkpoint(g), x, dots)), x)
    ),
    "jvp": by_scalar(lambda g, x, dots: jax.jvp(g, tuple(x), tuple(dots))),
    "linearize": by_scalar(lambda g, x, dots: jax.linearize(g, *x)[1](*dots)),
    "linear_transpose of linearize": by_scalar(
        lambda g, x, dots: jax.linear_transpose(jax.linearize(g, *x)[1], *x)(jnp.ones((), x[0].dtype))
    ),
    "grad of grad": by_scalar(lambda g, x, dots: gradient(along(g, x, dots), x)),
    "forward over reverse": by_scalar(
        lambda g, x, dots: jax.jvp(lambda *x: gradient(g, x), tuple(x), tuple(dots))[1]
    ),
    "reverse over forward": by_scalar(lambda g, x, dots: gradient(directional(g, dots), x)),
    "forward over forward": by_scalar(
        lambda g, x, dots: jax.jvp(directional(g, dots), tuple(x), tuple(dots))
    ),
    "third order": by_scalar(
        lambda g, x, dots: jax.jvp(lambda *x: gradient(directional(g, dots), x), tuple(x), tuple(dots))[1]
    ),
    "scan": scan_of,
    "grad of scan": lambda f, form, a: jax.grad(lambda z: scan_of(f, form, [z, *a[1:]])[0])(a[0]),
    "jvp of scan": lambda f, form, a: jax.jvp(
        lambda z: scan_of(f, form, [z, *a[1:]])[0], (a[0],), (jnp.cos(a[0]),)
    ),
}
# [N, N, V] or more: for few classes only
JACOBIANS = {
    "jacrev": lambda f, form, a: jax.jacrev(f)(*a),
    "jacfwd": lambda f, form, a: jax.jacfwd(f)(*a),
    "hessian": by_scalar(lambda g, x, dots: jax.hessian(g)(*x)),
    "jacrev of jacfwd": by_scalar(lambda g, x, dots: jax.jacrev(jax.jacfwd(g))(*x)),
    "jacfwd of jacfwd": by_scalar(lambda g, x, dots: jax.jacfwd(jax.jacfwd(g))(*x)),
    "hessian of one row": by_rows(lambda f, form: jax.vmap(jax.hessian(f), form.in_axes())),
}


def both(form, classes, dtype, which):
    """All of `which`, of jaxent in `dtype` and of the plain function in float64."""

    def everything(f, arguments):
        return {name: which[name](f, form, arguments) for name in which}

    with jax.enable_x64(True):
        want = jax.jit(functools.partial(everything, form.plain))(form.arguments(classes, jnp.float64))
        want = jax.tree.map(np.asarray, want)
    with jax.enable_x64(dtype == jnp.float64):
        got = jax.jit(functools.partial(everything, form.rows))(form.arguments(classes, dtype))
        return jax.tree.map(np.asarray, got), want


def assert_same(got, want, rtol):
    """Every leaf, in units of its largest element."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for path, g in jax.tree.leaves_with_path(got):
        w = functools.reduce(lambda x, key: x[getattr(key, "key", getattr(key, "idx", None))], path, want)
        harness.assert_within(g, w, rtol * max(np.abs(w).max(), 1), jax.tree_util.keystr(path))


@all_forms
def test_few_classes_in_float64(name):
    assert_same(*both(FORMS[name], SMALL, jnp.float64, TRANSFORMATIONS | JACOBIANS), 1e-12)
