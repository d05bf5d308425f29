"""KL and JS with the classes on several devices, dense, linear and both: values and gradients are in test_cases.py."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import harness
import jaxent
from compiled import collectives, matmul_operations
from tables import some, spread

N, D, V = 12, 5, 48
SPECS = (P("rows"), P(None, "classes"), P("rows"), P(None, "classes"))
AUTO = Mesh(np.array(jax.devices()).reshape(2, 4), ("rows", "classes"))
SOURCES = ("dense", "linear"), ("linear", "dense"), ("linear", "linear"), ("dense", "dense")
NAMES = ("softmax_kl_divergence", "softmax_js_divergence")
SPLIT = [("auto", SOURCES[0]), *(("explicit", sources) for sources in SOURCES)]
compiled = functools.partial(jax.jit, compiler_options=harness.QUICK)


@functools.cache
def arrays():
    rng = np.random.default_rng(4)
    layers = [np.float32(rng.normal(size=shape)) for shape in ((N, D), (D, V)) * 2]
    where, class_mask = rng.uniform(size=N) < 0.7, rng.uniform(size=V) < 0.7
    class_mask[12:24] = False  # all of a device's
    return layers, where, class_mask


def loss(name, sources, reduction, layers, where, class_mask, **axes):
    def logits(source, hidden, kernel):
        return (
            jaxent.LinearLogits(hidden, kernel, block_bytes=8000) if source == "linear" else hidden @ kernel
        )

    both = [logits(source, *layers[2 * i : 2 * i + 2]) for i, source in enumerate(sources)]
    options = {"where": where, "class_mask": class_mask, "temperature": 1.5}
    f = getattr(jaxent, name) if isinstance(name, str) else name
    return jnp.sum(f(*both, **options, reduction=reduction, **axes))


def mapped(name, sources, check_vma=True):
    return jax.shard_map(
        functools.partial(loss, name, sources, "mean", class_axis_name="classes", batch_axis_name="rows"),
        mesh=AUTO,
        in_specs=(list(SPECS), P("rows"), P("classes")),
        out_specs=P(),
        check_vma=check_vma,
    )


def hessian_vector_product(f):
    def g(layers, *rest):
        directions = [jnp.cos(x) for x in layers]
        return jax.jvp(jax.grad(lambda x: f(x, *rest)), (layers,), (directions,))[1]

    return g


@functools.cache
def expected(name, reduction, second):
    f = functools.partial(loss, name, ("dense", "dense"), reduction)
    return compiled(hessian_vector_product(f) if second else jax.value_and_grad(f))(*arrays())


def check(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "sources"), [(NAMES[0], SOURCES[0]), (NAMES[1], SOURCES[3])])
def test_second_derivatives(name, sources):
    got = compiled(hessian_vector_product(mapped(name, sources)))(*arrays())
    check(got, expected(name, "mean", True))


@pytest.mark.parametrize(("name", "sources"), [(NAMES[0], SOURCES[0]), (NAMES[1], SOURCES[3])])
def test_without_check_vma(name, sources):
    got = compiled(jax.value_and_grad(mapped(name, sources, check_vma=False)))(*arrays())
    check(got, expected(name, "mean", False))


@spread(3, "name, reduction, split", NAMES, ["mean", "none"], SPLIT)
def test_jit(name, reduction, split):
    """With no keyword."""
    kind, sources = split
    mesh = jax.make_mesh((2, 4), ("rows", "classes")) if kind == "explicit" else AUTO
    specs = list(SPECS), P("rows"), P("classes")
    split = jax.device_put(arrays(), jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
    f = compiled(jax.value_and_grad(functools.partial(loss, name, sources, reduction)))
    program = f.lower(*split).compile()
    check(program(*split), expected(name, reduction, False))
    found = collectives(program)
    assert {c.kind for c in found} == {"all-reduce"}
    assert kind == "auto" or not any(c.in_loop for c in found)


@pytest.mark.parametrize(("frozen", "matmuls"), [(False, 12), (True, 10)])
def test_matmuls(frozen, matmuls):
    """Three sums and the gradient make the logits anew; nothing is differentiated that is not asked for."""

    def f(hidden, kernel, target_hidden, target_kernel):
        if frozen:
            target_hidden, target_kernel = lax.stop_gradient((target_hidden, target_kernel))
        both = (hidden, kernel), (target_hidden, target_kernel)
        both = [jaxent.LinearLogits(*layer, block_bytes=3000) for layer in both]  # three blocks
        axes = {"class_axis_name": "classes", "batch_axis_name": "rows"}
        return jaxent.softmax_kl_divergence(*both, reduction="mean", **axes)

    f = jax.shard_map(f, mesh=AUTO, in_specs=SPECS, out_specs=P())
    program = jax.jit(jax.value_and_grad(f, range(4))).lower(*arrays()[0]).compile()
    assert matmul_operations(program) / (2 * N * D * V / 8) == matmuls


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 3, 0, 1)])
def test_a_layer_in_one_place_beside_one_that_is_split(order):
    """The first that is split decides for both, so its kernel is not gathered, whichever it is."""
    mesh = jax.make_mesh((2, 4), ("rows", "classes"))
    layers, where, class_mask = arrays()
    specs = [SPECS[0], SPECS[1], P(), P()]
    split = [jax.device_put(layers[i], NamedSharding(mesh, specs[i])) for i in order]
    rest = [jax.device_put(x, NamedSharding(mesh, P())) for x in (where, class_mask)]
    f = compiled(functools.partial(loss, NAMES[0], ("linear", "linear"), "mean"))
    program = f.lower(split, *rest).compile()
    assert {c.kind for c in collectives(program)} == {"all-reduce"}
    want = compiled(functools.partial(loss, NAMES[0], ("dense", "dense"), "mean"))
    check(program(split, *rest), want([layers[i] for i in order], where, class_mask))


# Explicit meshes where not everything is split as the logits are, inside of jax.set_mesh and outside.

WHOLE, ROWS_ONLY = P(), P("rows")
OPTIONS = {
    "where": ROWS_ONLY,
    "weights": WHOLE,
    "class_mask": P(None),
    "temperature": P(("rows", "classes")),
    "beta": WHOLE,
}
UNLIKE = [  # name, sources, how logits and targets are split, option, reduction, in jax.set_mesh
    (NAMES[0], SOURCES[3], (P("rows", "classes"), ROWS_ONLY), None, "mean", True),
    (NAMES[1], SOURCES[3], (P("rows", "classes"), P(None, "classes")), "where", "mean", True),
    (NAMES[1], SOURCES[3], (WHOLE, P("rows", "classes")), "weights", "mean", False),
    (NAMES[0], SOURCES[3], (P(("rows", "classes")), P("rows", "classes")), "class_mask", "none", False),
    (NAMES[0], SOURCES[1], (P("rows", "classes"), WHOLE), "temperature", "none", True),
    (NAMES[0], SOURCES[2], (ROWS_ONLY, P("rows", "classes")), "where", "mean", True),
    (NAMES[1], SOURCES[2], (P("rows"), P(("rows", "classes"))), "weights", "sum", False),
    (NAMES[1], SOURCES[3], (P("rows", "classes"), P(None, "classes")), "beta", "none", False),
    (NAMES[1], SOURCES[1], (P("rows", "classes"), P("rows", "classes")), "beta", "mean", True),
]


@functools.cache
def more_arrays():
    rng = np.random.default_rng(5)
    rows = 16
    logits = [np.float32(rng.normal(size=shape)) for shape in ((rows, D), (D, V)) * 2]
    where, class_mask = rng.uniform(size=rows) < 0.7, rng.uniform(size=V) < 0.7
    numbers = [np.float32(rng.uniform(0.5, 2, size=rows)) for _ in range(2)]
    return logits, {
        "where": where,
        "weights": numbers[0],
        "class_mask": class_mask,
        "temperature": numbers[1],
        "beta": np.float32(np.arange(rows) / (rows - 1)),  # both ends, too
    }


@pytest.mark.parametrize(
    ("name", "sources", "splits", "option", "reduction", "inside"), some([*UNLIKE[::3], UNLIKE[-1]], UNLIKE)
)
def test_split_unlike(name, sources, splits, option, reduction, inside):
    """Gradients come back split as their inputs are; there is none of targets that are not differentiated."""
    layers, options = more_arrays()
    options = {} if option is None else {option: options[option]}
    inputs = [
        (hidden, kernel) if source == "linear" else hidden @ kernel
        for source, hidden, kernel in zip(sources, layers[::2], layers[1::2], strict=True)
    ]

    def total(logits, targets, options):
        both = [jaxent.LinearLogits(*x) if isinstance(x, tuple) else x for x in (logits, targets)]
        return jnp.sum(getattr(jaxent, name)(*both, **options, reduction=reduction))

    f = compiled(lambda *x: (jax.value_and_grad(total, (0, 1))(*x), jax.grad(total)(*x)))
    mesh = jax.make_mesh((2, 4), ("rows", "classes"))

    def specs_of(source, spec):
        first, last = (*spec, None, None)[:2]
        return (P(first), P(None, last)) if source == "linear" else spec

    specs = [specs_of(*pair) for pair in zip(sources, splits, strict=True)]
    specs = [*specs, {key: OPTIONS[key] for key in options}]
    split = jax.device_put([*inputs, options], jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
    with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
        got = f(*split)
    check(got, f(*inputs, options))
    found = jax.tree.leaves((got[0][1], got[1]))
    for g, x in zip(found, jax.tree.leaves((split[:2], split[0])), strict=True):
        assert g.sharding.is_equivalent_to(x.sharding, x.ndim)


@pytest.mark.parametrize(("name", "sources"), [(NAMES[0], SOURCES[0]), (NAMES[1], SOURCES[3])])
def test_a_temperature_that_is_a_value(name, sources):
    """Of all rows and of each: its derivative is that of all classes."""
    layers, _, _ = arrays()
    of_rows = np.float32(np.linspace(0.5, 2, N))

    def total(layers, temperature, **axes):
        both = [
            jaxent.LinearLogits(*layer) if source == "linear" else layer[0] @ layer[1]
            for source, layer in zip(sources, (layers[:2], layers[2:]), strict=True)
        ]
        options = {"temperature": temperature, "reduction": "mean"} | axes
        return getattr(jaxent, name)(*both, **options)

    def both(f):
        return compiled(lambda *x: [jax.value_and_grad(f, 1)(x[0], t) for t in x[1:]])(layers, 1.5, of_rows)

    axes = {"class_axis_name": "classes", "batch_axis_name": "rows"}

    def split(layers, temperature):
        in_specs = (list(SPECS), P("rows") if temperature.ndim else P())
        on_device = functools.partial(total, **axes)
        return jax.shard_map(on_device, mesh=AUTO, in_specs=in_specs, out_specs=P())(layers, temperature)

    check(both(split), both(total))


@pytest.mark.parametrize("sources", [SOURCES[0], SOURCES[3]])
def test_a_beta_that_is_a_value(sources):
    """Of all rows and of each, the ends among them; and numbers, of which 1 swaps the two."""
    layers, where, class_mask = arrays()
    of_rows = np.float32(np.arange(N) / (N - 1))
    specs = list(SPECS), P("rows"), P("classes")

    def total(layers, beta, *masks, **axes):
        f = functools.partial(jaxent.softmax_js_divergence, beta=beta)
        return loss(f, sources, "mean", layers, *masks, **axes)

    def split(layers, beta, *masks):
        axes = {"class_axis_name": "classes", "batch_axis_name": "rows"}
        if isinstance(beta, float):
            mapped = jax.shard_map(
                lambda x, *y: total(x, beta, *y, **axes), mesh=AUTO, in_specs=specs, out_specs=P()
            )
            return mapped(layers, *masks)
        in_specs = specs[0], P("rows") if beta.ndim else P(), *specs[1:]
        on_device = functools.partial(total, **axes)
        return jax.shard_map(on_device, mesh=AUTO, in_specs=in_specs, out_specs=P())(layers, beta, *masks)

    def run(f):
        masks = where, class_mask
        g = lambda layers: [jax.value_and_grad(f)(layers, beta, *masks) for beta in (0.0, 0.3, 1.0)]  # noqa: E731
        values = jnp.float32(0.3), jnp.asarray(of_rows)
        h = lambda layers: [jax.value_and_grad(f, (0, 1))(layers, beta, *masks) for beta in values]  # noqa: E731
        return compiled(lambda x: (g(x), h(x)))(layers)

    check(run(split), run(total))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_an_infinite_loss_of_weight_0(reduction):
    """p = 0 < q in a row that weighs nothing; it has no gradient either."""
    (hidden, kernel, *_), _, _ = arrays()
    weights = np.float32(np.arange(N) % 3)
    student = np.array(hidden @ kernel[::-1])
    student[0, 2] = -np.inf

    def f(student, hidden, kernel, weights, axis_name=None):
        layer = jaxent.LinearLogits(hidden, kernel)
        options = {"weights": weights, "reduction": reduction, "class_axis_name": axis_name}
        return jaxent.softmax_kl_divergence(student, layer, **options)

    run = lambda f: compiled(jax.value_and_grad(f, (0, 1, 2)))(student, hidden, kernel, weights)  # noqa: E731
    specs = P(None, "classes"), P(), P(None, "classes"), P()
    split = functools.partial(f, axis_name="classes")
    found = run(jax.shard_map(split, mesh=AUTO, in_specs=specs, out_specs=P()))
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(run(f)), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-5)
        assert np.isfinite(got).all()
