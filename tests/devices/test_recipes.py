"""docs/sharding.md: which gradients are to be summed, by what factor they are off if not, and what is sent when."""

import functools
import math

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
from jaxent._logits import sources
from jaxent._logits.plan import Plan
from tables import thinned

N, F, D, V = 12, 4, 5, 48  # six rows on each of 2, twelve classes on each of 4 devices
SIZES = {"rows": 2, "classes": 4}
NAMES = {"rows": "batch_axis_name", "classes": "class_axis_name"}
SPLITS = {"rows": ("rows",), "classes": ("classes",), "both": ("rows", "classes")}
# what can be split over rows and classes, and along which of its axes
PARAMETERS = {"inputs": ("rows", 0), "trunk": (None, None), "kernel": ("classes", 1)}
SOURCES = ("dense", "linear")
quick = functools.partial(jax.jit, compiler_options=harness.QUICK)


@functools.cache
def arrays():
    rng = np.random.default_rng(5)
    shapes = {"inputs": (N, F), "trunk": (F, D), "kernel": (D, V)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    where = np.arange(N) < 7  # six rows on the first device, one on the other
    return params, (jnp.asarray(rng.integers(V, size=N)), jnp.asarray(where))


def loss(source, axes, params, rows):
    label, where = rows
    logits = jaxent.LinearLogits(jnp.tanh(params["inputs"] @ params["trunk"]), params["kernel"])
    logits = logits if source == "linear" else logits.dense()
    axes = {NAMES[axis]: axis for axis in axes}
    return jaxent.softmax_cross_entropy(logits, label, where=where, reduction="mean", **axes)


def losses(axes):
    """Of both sources, in one program."""

    def f(params, rows):
        return {source: loss(source, axes, params[source], rows) for source in SOURCES}

    return f


def gradients(f, scale=1):
    """Each source's loss depends on its own copy of the parameters."""
    return lambda params, rows: jax.grad(lambda p: sum(f(p, rows).values()) / scale)(params)


def twice(x):
    return dict.fromkeys(SOURCES, x)


@functools.cache
def expected():
    params, rows = arrays()
    return jax.tree.map(np.asarray, quick(gradients(losses(())))(twice(params), rows))


def assert_gradients(got, factor=1):
    assert got.keys() == expected().keys()
    for source, of_source in expected().items():
        for name, want in of_source.items():
            np.testing.assert_allclose(
                got[source][name], factor * want, rtol=1e-5, atol=1e-6, err_msg=f"{source} {name}"
            )


def mesh(kind="auto"):
    if kind == "explicit":
        return jax.make_mesh((2, 4), ("rows", "classes"))
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("rows", "classes"))


def specs(axes):
    params = {
        name: P(*[None] * (dim or 0), axis) if axis in axes else P()
        for name, (axis, dim) in PARAMETERS.items()
    }
    return twice(params), P("rows") if "rows" in axes else P()


def common(axes, name):
    """The named axes along which all devices have the same."""
    return tuple(axis for axis in axes if axis != PARAMETERS[name][0])


def recipe(axes):
    """As the page has it."""

    def step(params, rows):
        found = gradients(losses(axes), lax.axis_size(axes))(params, rows)
        return {
            source: {name: lax.psum(g, common(axes, name)) for name, g in of.items()}
            for source, of in found.items()
        }

    return step


def in_other_words(axes, found):
    """From raw gradients."""

    def right(name, g):
        split = [SIZES[axis] for axis in axes if axis == PARAMETERS[name][0]]
        return lax.pmean(g, common(axes, name)) / math.prod(split)

    return {source: {name: right(name, g) for name, g in of.items()} for source, of in found.items()}


@thinned(2, "split, check_vma", SPLITS, [False, True])
def test_shard_map(split, check_vma):
    axes = SPLITS[split]
    params, rows = arrays()
    mapped = functools.partial(jax.shard_map, mesh=mesh(), in_specs=specs(axes), check_vma=check_vma)
    of_params = specs(axes)[0]

    def every(params, rows):
        outside = gradients(mapped(losses(axes), out_specs=P()))(params, rows)
        if check_vma:
            return outside, mapped(gradients(losses(axes)), out_specs=of_params)(params, rows)

        def inside(params, rows):
            raw = gradients(losses(axes))(params, rows)
            parts = jax.tree.map(lambda x: x[None, None], raw)
            return parts, recipe(axes)(params, rows), in_other_words(axes, raw)

        out_specs = (jax.tree.map(lambda _: P("rows", "classes"), of_params), of_params, of_params)
        return outside, *mapped(inside, out_specs=out_specs)(params, rows)

    outside, *inside = quick(every)(twice(params), rows)
    assert_gradients(outside)
    if check_vma:
        assert_gradients(inside[0])
        return
    raw, *right = inside
    for found in right:
        assert_gradients(found)
    n = np.prod([SIZES[axis] for axis in axes])
    assert n == {"rows": 2, "classes": 4, "both": 8}[split]
    whole = {
        source: {k: added_up(axes, k, np.asarray(x)) for k, x in of.items()} for source, of in raw.items()
    }
    assert_gradients(whole, n)


def added_up(axes, name, x):
    """`[2, 4, ...]`, what each device has: the sum over those that have it in common, split axes joined."""
    split, dim = PARAMETERS[name]
    for axis in ("classes", "rows"):
        at = ("rows", "classes").index(axis)
        parts = [x.take(i, at) for i in range(SIZES[axis])]
        if axis == split and axis in axes:
            x = np.concatenate(parts, at + dim)
            continue
        same = all(np.array_equal(part, parts[0]) for part in parts)
        assert same == (axis not in axes), (
            name,
            axis,
        )  # along a named axis each device has a part of its own
        x = sum(parts) if axis in axes else parts[0]
    return x


@pytest.mark.parametrize(("axis", "transform"), [("rows", "pmap"), ("classes", "pmap"), ("rows", "vmap")])
def test_pmap(axis, transform):
    params, rows = arrays()
    n = SIZES[axis]
    dims = {name: dim if of == axis else None for name, (of, dim) in PARAMETERS.items()}
    in_axes = (twice(dims), 0 if axis == "rows" else None)

    def apart(x, dim):
        return x if dim is None else x.reshape(*x.shape[:dim], n, -1, *x.shape[dim + 1 :])

    def together(of):
        return {
            name: x if dims[name] is None else np.asarray(x).reshape(params[name].shape)
            for name, x in of.items()
        }

    mapped = jax.vmap
    if transform == "pmap":
        mapped = functools.partial(jax.pmap, devices=jax.devices()[:n])
    mapped = functools.partial(mapped, axis_name=axis, in_axes=in_axes)
    arguments = twice({name: apart(x, dims[name]) for name, x in params.items()})
    rows = jax.tree.map(lambda x: apart(x, 0) if axis == "rows" else x, rows)

    every = mapped(losses((axis,)))
    outside = [
        (1, lambda *x: jax.tree.map(lambda y: y[0], every(*x))),
        (1, mapped(losses((axis,)), out_axes=None)),
        (n, lambda *x: jax.tree.map(jnp.sum, every(*x))),  # the loss n times
    ]
    outside = outside if (transform, axis) == ("pmap", "rows") else outside[:1]
    out_axes = twice({name: 0 if dim is None else dim for name, dim in dims.items()})

    def inside(params, rows):
        raw = gradients(losses((axis,)))(params, rows)
        return raw, recipe((axis,))(params, rows) if transform == "pmap" else in_other_words((axis,), raw)

    inside = mapped(inside, out_axes=(out_axes, in_axes[0]))

    @quick
    def found(*x):
        return [gradients(f)(*x) for _, f in outside], inside(*x)

    from_outside, (raw, right) = found(arguments, rows)
    for (factor, _), got in zip(outside, from_outside, strict=True):
        assert_gradients({source: together(of) for source, of in got.items()}, factor)
    assert_gradients({source: together(of) for source, of in right.items()})
    for of in raw.values():
        for name, dim in dims.items():
            if dim is None:
                assert not np.array_equal(of[name][0], of[name][1])
                of[name] = of[name].sum(0)
    assert_gradients({source: together(of) for source, of in raw.items()}, n)


def test_what_is_summed_already():
    """With the check on: a psum too much multiplies, a pmean does nothing."""
    params, rows = arrays()
    names = ("trunk", "kernel")  # what is in common

    def step(params, rows):
        found = gradients(losses(("rows",)))(params, rows)
        found = {source: {name: of[name] for name in names} for source, of in found.items()}
        return lax.psum(found, "rows"), lax.pmean(found, "rows")

    got = quick(jax.shard_map(step, mesh=mesh(), in_specs=specs(("rows",)), out_specs=P()))(
        twice(params), rows
    )
    for factor, of_sources in zip((2, 1), got, strict=True):
        whole = {
            source: {"inputs": factor * expected()[source]["inputs"]} | of
            for source, of in of_sources.items()
        }
        assert_gradients(whole, factor)


def test_sigmoid_losses_are_reduced_by_mean():
    rng = np.random.default_rng(2)
    z, y = jnp.asarray(rng.normal(size=(N, V)), jnp.float32), jnp.asarray(rng.integers(2, size=(N, V)))

    def f(z, y):
        return jaxent.mean(jaxent.sigmoid_cross_entropy(z, y), axis_name=("rows", "classes"))

    got = quick(jax.shard_map(f, mesh=mesh(), in_specs=P("rows", "classes"), out_specs=P()))(z, y)
    want = quick(functools.partial(jaxent.sigmoid_cross_entropy, reduction="mean"))(z, y)
    np.testing.assert_allclose(got, want, rtol=1e-6)


# What is sent, and how blocks are cut: compiled, never run.

ROWS, FEATURES, CLASSES = 4096, 32, 512
BLOCK_BYTES = 2 * 4 * 256 * CLASSES  # 256 rows: a logit and its gradient in float32
DKERNEL = ("f32", (FEATURES, CLASSES))


def step(hidden, kernel, label):
    def mean(hidden, kernel):
        logits = jaxent.LinearLogits(hidden, kernel, block_bytes=BLOCK_BYTES)
        return jaxent.softmax_cross_entropy(logits, label, reduction="mean")

    return jax.value_and_grad(mean, (0, 1))(hidden, kernel)


def compiled(mesh, rows, kernel, on_mesh=True, rows_of_all=ROWS, classes=CLASSES):
    shapes = (
        ((rows_of_all, FEATURES), jnp.float32),
        ((FEATURES, classes), jnp.float32),
        ((rows_of_all,), jnp.int32),
    )
    shardings = [NamedSharding(mesh, spec) for spec in (rows, kernel, rows)]
    arguments = [
        jax.ShapeDtypeStruct(*shape, sharding=sharding if on_mesh else None)
        for shape, sharding in zip(shapes, shardings, strict=True)
    ]
    f = quick(step, in_shardings=None if on_mesh else tuple(shardings))
    return f.lower(*arguments).compile()


def times_sent(program, array):
    """How often the gradient is, in and out of loops."""
    found = {True: 0, False: 0}
    for c in collectives(program):
        assert c.kind == "all-reduce"
        found[c.in_loop] += c.times * (array in c.shapes)
    return found


def test_the_gradient_of_the_kernel_is_sent_in_every_block_of_an_auto_mesh_only():
    both = P(("rows", "classes"))  # 512 rows on each device: two blocks
    assert times_sent(compiled(mesh(), both, P()), DKERNEL) == {True: 2, False: 0}
    assert times_sent(compiled(mesh("explicit"), both, P()), DKERNEL) == {True: 0, False: 1}


def test_with_blocks_of_classes_it_is_the_gradient_of_hidden(monkeypatch):
    monkeypatch.setattr(sources, "plan", lambda sizes, *_: Plan(sizes.rows, 3200))
    sizes = {"rows_of_all": 64, "classes": 12_800}  # four blocks of 3200
    program = compiled(mesh(), P("rows"), P(None, "classes"), **sizes)
    d_hidden, d_kernel = ("f32", (8, 4, FEATURES)), ("f32", (FEATURES, 3200 // 4))  # 32 rows on each device
    assert times_sent(program, d_hidden) == {True: 4, False: 0}
    assert times_sent(program, d_kernel) == {True: 4, False: 0}  # in pieces, once in all


def test_matmuls_of_classes_that_are_split():
    one = 2 * ROWS * FEATURES * CLASSES // 8
    f = functools.partial(compiled, rows=P("rows"), kernel=P(None, "classes"))
    assert matmul_operations(f(mesh())) == 3 * one
    assert 3.9 * one < matmul_operations(f(mesh("explicit"))) <= 4 * one


def test_block_bytes_of_an_auto_mesh():
    auto, both = mesh(), P(("rows", "classes"))

    def blocks(**options):
        return times_sent(compiled(auto, both, P(), **options), DKERNEL)[True]

    assert blocks(on_mesh=False) == 2 * 8  # an eighth of block_bytes on each device
    with jax.set_mesh(auto):
        assert blocks(on_mesh=False) == 2

    program = compiled(auto, both, P())
    assert times_sent(program, DKERNEL)[True] == 2
    assert BLOCK_BYTES <= program.memory_analysis().temp_size_in_bytes < 1.5 * BLOCK_BYTES
    # nothing is split over "classes": four devices do the same
    program = compiled(auto, P("rows"), P())
    assert 4 * BLOCK_BYTES <= program.memory_analysis().temp_size_in_bytes < 6 * BLOCK_BYTES


def sent_whole(program):
    """How the kernel and its gradient travel: kind, shape of the result, in a loop or not."""
    large = [(c.kind, s[1], c.in_loop) for c in collectives(program) for s in c.shapes if len(s[1]) == 2]
    return sorted(x for x in large if x[0] != "collective-permute")


@pytest.mark.parametrize("kernel", [P("rows"), P(None, "rows")], ids=["features", "classes"])
def test_fully_sharded_kernels(kernel):
    gathered = ("all-gather", (FEATURES, CLASSES), False)
    program = compiled(mesh("explicit"), P("rows"), kernel)
    assert sent_whole(program) == [gathered, ("all-reduce", (FEATURES, CLASSES), False)]
    out = program.output_shardings[1][1]
    assert out.is_equivalent_to(NamedSharding(mesh(), kernel), 2)
    if kernel == P("rows"):
        in_loop = ("all-reduce", (FEATURES, CLASSES), True)
        assert sent_whole(compiled(mesh(), P("rows"), kernel)) == [gathered, in_loop]


def test_fully_sharded_kernels_in_shard_map():
    params, rows = arrays()
    hidden, kernel = params["inputs"], jnp.asarray(np.ones((F, D)) + np.arange(D), jnp.float32)
    label = rows[0] % D

    def mean(hidden, kernel, label, **axes):
        logits = jaxent.LinearLogits(hidden, kernel)
        return jaxent.softmax_cross_entropy(logits, label, reduction="mean", **axes)

    def step(hidden, kernel, label):
        def of_slice(kernel):
            whole = lax.all_gather(kernel, "rows", axis=0, tiled=True)
            return mean(hidden, whole, label, batch_axis_name="rows")

        return jax.grad(of_slice)(kernel)

    f = quick(jax.shard_map(step, mesh=mesh(), in_specs=P("rows"), out_specs=P("rows")))
    program = f.lower(hidden, kernel, label).compile()
    assert sent_whole(program) == [
        ("all-gather", (F, D), False),
        ("reduce-scatter", (F // 2, D), False),
    ]
    want = quick(jax.grad(mean, 1))(hidden, kernel, label)
    np.testing.assert_allclose(f(hidden, kernel, label), want, rtol=1e-5, atol=1e-6)


def test_merging_axes_of_which_the_second_is_split():
    def flat(hidden, kernel, label):
        return step(hidden.reshape(-1, FEATURES), kernel, label.reshape(-1))

    def arguments(mesh):
        rows, whole = NamedSharding(mesh, P(None, "rows")), NamedSharding(mesh, P())
        return (
            jax.ShapeDtypeStruct((4, 64, FEATURES), jnp.float32, sharding=rows),
            jax.ShapeDtypeStruct((FEATURES, CLASSES), jnp.float32, sharding=whole),
            jax.ShapeDtypeStruct((4, 64), jnp.int32, sharding=rows),
        )

    kinds = {c.kind for c in collectives(quick(flat).lower(*arguments(mesh())).compile())}
    assert "all-gather" in kinds
    assert {c.kind for c in collectives(quick(step).lower(*arguments(mesh())).compile())} == {"all-reduce"}
    with pytest.raises(Exception, match="sharding"):
        quick(flat).lower(*arguments(mesh("explicit")))


def test_shard_map_on_an_explicit_mesh_takes_what_is_split_already():
    f = functools.partial(jax.shard_map, lambda x: x, in_specs=P("rows"), out_specs=P("rows"))
    assert f(mesh=mesh())(jnp.arange(4.0)).shape == (4,)
    with pytest.raises(ValueError, match="does not match"):
        f(mesh=mesh("explicit"))(jnp.arange(4.0))
