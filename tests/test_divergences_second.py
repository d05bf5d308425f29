"""Second derivatives of nonlinear functions of KL and JS, to which the first derivative of the value belongs too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import nn

import harness
import jaxent
from layers import compiled
from tables import thinned

NAMES = ("softmax_kl_divergence", "softmax_js_divergence")
N, D, V = 4, 2, 6  # rows in two blocks, of which the last is not full
SOURCES = {"arrays": (False, False), "a layer": (True, False), "two layers": (True, True)}
CASES = [  # source, whether the class axis is split, reduction; every second one for KL
    ("arrays", False, "none"),
    ("arrays", False, "mean"),
    ("a layer", False, "none"),
    ("two layers", False, "mean"),
    ("arrays", True, "none"),
    ("two layers", True, "none"),
    ("a layer", True, "none"),
]


def inputs(seed=0):
    """Hidden states and kernel of the logits, and of the target; a temperature and a beta per row."""
    rng = np.random.default_rng(seed)
    pair = [rng.normal(size=shape) for shape in ((N, D), (D, V)) * 2]
    return [*map(jnp.asarray, (*pair, rng.uniform(0.5, 2, size=N), rng.uniform(0.1, 0.9, size=N)))]


def naive(name, *x):
    hidden, kernel, target_hidden, target_kernel, temperature, beta = x
    pair = hidden @ kernel, target_hidden @ target_kernel
    log_p, log_q = (nn.log_softmax(z / temperature[:, None]) for z in pair)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if name == NAMES[0]:
        return jnp.sum(q * (log_q - log_p), -1)
    log_h = jnp.log((1 - beta)[:, None] * p + beta[:, None] * q)
    return (1 - beta) * jnp.sum(p * (log_p - log_h), -1) + beta * jnp.sum(q * (log_q - log_h), -1)


def divergence(name, source, split, reduction, *x):
    """Of classes that are all in one place, or split along a mapped axis."""
    hidden, kernel, target_hidden, target_kernel, temperature, beta = x
    hiddens, kernels = (hidden, target_hidden), (kernel, target_kernel)

    def of_classes(*kernels):
        pair = [
            jaxent.LinearLogits(h, k) if is_layer else h @ k
            for is_layer, h, k in zip(SOURCES[source], hiddens, kernels, strict=True)
        ]
        options = {"class_axis_name": "classes"} if split else {}
        options |= {"beta": beta} if name == NAMES[1] else {}
        return getattr(jaxent, name)(*pair, temperature=temperature, reduction=reduction, **options)

    if not split:
        return of_classes(*kernels)
    slices = [jnp.stack(jnp.split(kernel, 2, -1)) for kernel in kernels]
    return jax.vmap(of_classes, axis_name="classes")(*slices)[0]


def curvature(f, x, directions):
    """The Hessian times `directions`, forward over reverse and reverse over reverse."""
    gradient = jax.grad(f)
    _, forward = jax.jvp(gradient, (x,), (directions,))
    reverse = jax.grad(lambda x: sum(map(jnp.vdot, gradient(x), directions)))(x)
    return forward, reverse


@thinned(2, "name, case", NAMES, CASES)
def test_the_hessian_of_a_square(name, case, x64):
    """By both logits, the temperature and beta at once."""
    source, split, reduction = case

    @compiled
    def run(x, directions):
        def square(x):
            return jnp.sum(divergence(name, source, split, reduction, *x) ** 2)

        def expected(x):
            rows = naive(name, *x)
            return jnp.sum((rows if reduction == "none" else jnp.mean(rows)) ** 2)

        return curvature(square, x, directions), curvature(expected, x, directions)[0]

    with harness.blocks("rows"):
        found, want = run(inputs(), inputs(1))
    for got in found:
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_layers_that_are_mapped_over_have_their_own_gradients(name, x64):
    """The class axis is split inside: what a rule returns that is 0 differs between layers all the same."""
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *map(inputs, range(3)))
    factors = jnp.asarray([1.0, -2.0, 0.5])

    def gradients(f):
        each = jax.vmap(lambda factor, x: factor * jnp.sum(f(*x)))
        return jax.grad(lambda x: jnp.sum(each(factors, x)))

    def of_split(*x):
        return divergence(name, "two layers", True, "none", *x)

    def expected(*x):
        return naive(name, *x)

    with harness.blocks("rows"):
        found, want = compiled(lambda x: [gradients(f)(x) for f in (of_split, expected)])(stacked)
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
