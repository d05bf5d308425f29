"""A user's function of a row where rows, or classes, are on several devices: the same as on one."""

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
from compiled import collectives
from tables import spread

N, D, V = 16, 4, 12
SOURCES = ("dense", *harness.LINEAR)
AXES = ("rows", "classes")
AUTO = Mesh(np.array(jax.devices()).reshape(2, 4), AXES)
compiled = functools.partial(jax.jit, compiler_options=harness.QUICK)


def of_row(s, own, key, scale, table, typed=False):
    """A sort, a scan, a choice and noise; a pytree and keys of rows; a number and a table that are closed over.

    `typed`: without what jax refuses, in or out of jaxent, where types say how arrays are split: a gather at an index
    that is split, and the derivative of a sort.
    """
    wide, (a, index) = own["wide"], own["tree"]
    if typed:
        ordered = wide * jnp.sort(lax.stop_gradient(wide))
        found = jnp.sum(jnp.where(jnp.arange(N) == index, table, 0))
    else:
        ordered, found = jnp.sort(wide), table[index]

    def step(carry, x):
        return jnp.sin(carry) * x + scale, None

    carry, _ = lax.scan(step, s.log_prob, ordered)
    # operands, as jax has no transpose of a choice that closes over what all devices have in common
    yes, no = (lambda x, y, _: x * y), (lambda x, _, z: jnp.cos(x) - z)
    loss = lax.cond(a > 0, yes, no, carry, a * found, scale * s.entropy)
    figures = {
        "entropy": s.entropy,
        "hit": s.rank < 3,
        "place": s.prediction,
        "both": jnp.stack([carry, scale * a]),
    }
    return loss * jax.random.uniform(key, minval=0.5), figures


@functools.cache
def arrays():
    """(what is differentiated, the rest)"""
    rng = np.random.default_rng(12)

    def normal(*shape):
        return np.float32(rng.normal(size=shape))

    moving = {
        "hidden": normal(N, D), "kernel": normal(D, V), "wide": normal(N, 3), "a": normal(N),
        "scale": np.float32(0.7), "table": normal(N),
    }  # fmt: skip
    fixed = {
        "index": rng.integers(N, size=N).astype(np.int32),
        "label": rng.integers(V, size=N).astype(np.int32),
        "where": np.arange(N) % 5 != 1,
        "weights": np.float32(rng.uniform(0.5, 2, size=N) * (np.arange(N) != 8)),
        "key": jax.random.split(jax.random.key(3), N),
    }
    return moving, fixed


def loss(source, reduction, moving, fixed, typed=False, **axes):
    x = moving | fixed
    logits = x["hidden"] @ x["kernel"] if source == "dense" else jaxent.LinearLogits(x["hidden"], x["kernel"])
    own = {"wide": x["wide"], "tree": (x["a"], x["index"])}
    fn = lambda s, own, key: of_row(s, own, key, x["scale"], x["table"], typed)  # noqa: E731
    options = {"where": x["where"], "weights": x["weights"], "reduction": reduction}
    return jaxent.softmax_loss(fn, logits, x["label"], own, x["key"], has_aux=True, **options, **axes)


def value_and_grad(source, reduction="mean", **options):
    """((loss, aux), gradients); losses per row are added up."""

    def total(moving, fixed):
        found, aux = loss(source, reduction, moving, fixed, **options)
        return (found if found.ndim == 0 else jnp.sum(found * jnp.sin(fixed["weights"]))), aux

    return jax.value_and_grad(total, has_aux=True)


@functools.cache
def expected(reduction="mean", typed=False):
    return compiled(value_and_grad("dense", reduction, typed=typed))(*jax.tree.map(jnp.asarray, arrays()))


def check(got, want, tolerance=1e-5):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def specs(rows, classes=None, beside=None):
    """Of `arrays`: of rows, of the classes of the kernel, and of what stands beside the logits."""
    beside = rows if beside is None else beside
    moving = {
        "hidden": rows,
        "kernel": P(None, classes),
        "wide": beside,
        "a": beside,
        "scale": P(),
        "table": P(),
    }
    return moving, dict.fromkeys(arrays()[1], beside)


def test_every_argument_matters():
    """The gradients of the expected result, and its figures, are those of this function."""
    ((value, aux), gradients) = expected()
    assert np.isfinite(value) and all(
        np.isfinite(x).all() and (x != 0).any() for x in jax.tree.leaves(gradients)
    )
    hidden = ~arrays()[1]["where"]
    assert all((np.asarray(x)[hidden] == 0).all() for x in jax.tree.leaves(aux))
    assert 0 < aux["hit"].sum() < (~hidden).sum() and (aux["both"][8] != 0).all()


SPLITS = {
    "rows": specs(P("rows")),
    "rows of all devices": specs(P(AXES)),
    "both": specs(P("rows"), "classes"),
    "classes": specs(P(), "classes"),
    "logits only": specs(P("rows"), "classes", beside=P()),
    "otherwise": specs(P(), beside=P("rows")),
}
MESHES = {
    "auto": lambda: (AUTO, False),
    "explicit": lambda: (jax.make_mesh((2, 4), AXES), False),
    "set_mesh": lambda: (jax.make_mesh((2, 4), AXES), True),
}


@spread(5, "kind, split, source", MESHES, SPLITS, SOURCES)
def test_jit(kind, split, source):
    check_jit(kind, split, source, "mean")


@spread(3, "kind, source", MESHES, SOURCES)
def test_jit_of_losses_per_row(kind, source):
    check_jit(kind, "both", source, "none")


def check_jit(kind, split, source, reduction):
    mesh, in_context = MESHES[kind]()
    put = jax.device_put(arrays(), jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPLITS[split]))
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext(), harness.blocks(source):
        got = compiled(value_and_grad(source, reduction, typed=kind != "auto"))(*put)
    check(got, expected(reduction, kind != "auto"))


@spread(2, "kind, source", MESHES, SOURCES)
def test_a_function_that_closes_over_nothing(kind, source):
    """Each device has its own rows of it: whatever it is made of."""

    def fn(s, wide, index):
        carry, _ = lax.scan(lambda c, x: (jnp.sin(c) * x + s.entropy, None), s.log_prob, jnp.cumsum(wide))
        return lax.cond(index > N // 2, lambda x: jnp.exp(-x * x), lambda x: jax.jit(jnp.cos)(x), carry)

    def f(moving, fixed):
        hidden, kernel = moving["hidden"], moving["kernel"]
        logits = hidden @ kernel if source == "dense" else jaxent.LinearLogits(hidden, kernel)
        label, where = fixed["label"], fixed["where"]
        return jaxent.softmax_loss(fn, logits, label, moving["wide"], fixed["index"], where=where)

    mesh, in_context = MESHES[kind]()
    put = jax.device_put(arrays(), jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPLITS["both"]))
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext(), harness.blocks(source):
        got = compiled(jax.value_and_grad(f))(*put)
    check(got, compiled(jax.value_and_grad(f))(*arrays()))


@pytest.mark.parametrize("kind", ["explicit", "set_mesh"])
def test_what_is_closed_over_may_be_split(kind):
    """A sum of it is not."""
    mesh, in_context = MESHES[kind]()
    table = np.float32(np.random.default_rng(0).normal(size=(8, 3)))

    def f(hidden, kernel, table, label):
        fn = lambda s: s.log_prob * jnp.sum(table**2) + s.entropy  # noqa: E731
        return jaxent.softmax_loss(fn, jaxent.LinearLogits(hidden, kernel), label)

    moving, fixed = arrays()
    arguments = moving["hidden"], moving["kernel"], table, fixed["label"]
    split = tuple(NamedSharding(mesh, spec) for spec in (P("rows"), P(), P("rows"), P("rows")))
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext(), harness.blocks("rows"):
        got = compiled(jax.value_and_grad(f, (0, 1, 2)))(*jax.device_put(arguments, split))
    want = compiled(jax.value_and_grad(f, (0, 1, 2)))(*arguments)
    check(got, want)
    assert got[1][2].sharding.is_equivalent_to(split[2], 2)


def shard_map(f, in_specs, out_specs, check_vma):
    return jax.shard_map(f, mesh=AUTO, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)


@spread(3, "check_vma, split, source", [True, False], ["rows", "rows of all devices"], SOURCES)
def test_rows_in_shard_map(check_vma, split, source):
    """The gradient from outside; figures of a device's rows are there."""
    in_specs = SPLITS[split]
    names = in_specs[0]["hidden"][0]

    def local(moving, fixed):
        return loss(source, "mean", moving, fixed, batch_axis_name=names)

    mapped = shard_map(local, in_specs, (P(), in_specs[0]["hidden"]), check_vma)
    with harness.blocks(source):
        check(compiled(jax.value_and_grad(mapped, has_aux=True))(*arrays()), expected())


@spread(2, "check_vma, source", [True, False], SOURCES)
def test_rows_and_classes_in_shard_map(check_vma, source):
    in_specs = SPLITS["both"]
    axes = {"batch_axis_name": "rows", "class_axis_name": "classes"}

    def local(moving, fixed):
        return loss(source, "mean", moving, fixed, **axes)

    mapped = shard_map(local, in_specs, (P(), P("rows")), check_vma)
    with harness.blocks(source):
        check(compiled(jax.value_and_grad(mapped, has_aux=True))(*arrays()), expected())


@spread(2, "axes, source", ["rows", "both"], SOURCES)
def test_gradients_inside_of_shard_map(axes, source):
    """jax adds up those of what the devices have in common: the kernel, the number and the table."""
    in_specs = SPLITS[axes]
    names = {"batch_axis_name": "rows"} | ({"class_axis_name": "classes"} if axes == "both" else {})
    mapped = shard_map(value_and_grad(source, **names), in_specs, ((P(), P("rows")), in_specs[0]), True)
    with harness.blocks(source):
        check(compiled(mapped)(*arrays()), expected())


@pytest.mark.parametrize("source", SOURCES)
def test_losses_per_row_of_split_classes(source):
    def local(moving, fixed):
        return loss(source, "none", moving, fixed, class_axis_name="classes")

    mapped = shard_map(local, SPLITS["both"], P("rows"), True)

    def total(moving, fixed):
        found, aux = mapped(moving, fixed)
        return jnp.sum(found * jnp.sin(fixed["weights"])), aux

    with harness.blocks(source):
        check(compiled(jax.value_and_grad(total, has_aux=True))(*arrays()), expected("none"))


@pytest.mark.parametrize("source", ["dense", "rows"])
def test_pmap(source):
    """Figures come back with the axis of devices in front."""
    moving, fixed = arrays()
    in_axes = jax.tree.map(lambda spec: 0 if spec == P("rows") else None, SPLITS["rows"])
    cut = jax.tree.map(
        lambda x, axis: x if axis is None else jnp.asarray(x).reshape(8, -1, *x.shape[1:]),
        (moving, fixed),
        in_axes,
        is_leaf=lambda x: x is None,
    )
    f = jax.pmap(
        lambda *x: loss(source, "mean", *x, batch_axis_name="devices"), axis_name="devices", in_axes=in_axes
    )
    with harness.blocks(source):
        value, aux = f(*cut)
    (want, figures), _ = expected()
    np.testing.assert_allclose(value, np.full(8, want), rtol=1e-5)
    check(jax.tree.map(lambda x: x.reshape(N, *x.shape[2:]), aux), figures)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_figures_are_not_gathered(kind):
    """They stay with their rows, and so do row arguments."""
    mesh, _ = MESHES[kind]()
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPLITS["rows of all devices"])
    with harness.blocks("rows"):
        program = (
            compiled(value_and_grad("rows", typed=kind != "auto"))
            .lower(*jax.device_put(arrays(), shardings))
            .compile()
        )
    assert {c.kind for c in collectives(program)} == {"all-reduce"}


# The weight of all rows.


def total_weight(x, **axes):
    options = {name: x[name] for name in ("where", "weights", "class_weights")}
    return jaxent.total_weight(x["label"], ignore_index=3, **options, **axes)


@functools.cache
def weighted():
    fixed = arrays()[1]
    class_weights = np.float32(np.random.default_rng(1).uniform(0.5, 2, size=V))
    found = {name: fixed[name] for name in ("label", "where", "weights")} | {"class_weights": class_weights}
    counts = fixed["where"] & (fixed["label"] != 3)
    want = (counts * np.float64(fixed["weights"]) * np.float64(class_weights)[fixed["label"]]).sum()
    return found, want


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("classes", [None, "classes"])
def test_total_weight_over_axes(check_vma, classes):
    """Of devices with different counts, and class weights in one place or in slices; the same on all devices."""
    x, want = weighted()
    in_specs = {"label": P("rows"), "where": P("rows"), "weights": P("rows"), "class_weights": P(classes)}
    axes = {"batch_axis_name": "rows", "class_axis_name": classes}
    for local in (False, True):
        f = functools.partial(total_weight, **(axes | ({"batch_axis_name": None} if local else {})))
        out = P("rows") if local else P()
        g = (lambda x, f=f: f(x)[None]) if local else f
        got = compiled(shard_map(g, (in_specs,), out, check_vma))(x)
        assert got.shape == ((2,) if local else ())
        np.testing.assert_allclose(got.sum(), want, rtol=1e-6)


@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.parametrize("split", ["rows", "otherwise"])
def test_total_weight_of_split_labels(kind, split):
    x, want = weighted()
    mesh, in_context = MESHES[kind]()
    beside = P("rows") if split == "rows" else P()
    shardings = dict.fromkeys(x, beside) | {"label": P("rows"), "class_weights": P("classes")}
    put = jax.device_put(x, {name: NamedSharding(mesh, spec) for name, spec in shardings.items()})
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        got = compiled(total_weight)(put)
        alone = compiled(jaxent.total_weight)(put["label"])
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert got.shape == () and alone == N


def test_micro_batches_of_all_devices():
    """Sums of each device's rows over the total weight of all of them: the mean, and its gradient sent once."""
    moving, fixed = arrays()
    labels = fixed["label"].reshape(2, -1), fixed["where"].reshape(2, -1)
    hidden = moving["hidden"].reshape(2, -1, D)

    def mean(kernel, hidden, labels, where):
        logits = jaxent.LinearLogits(hidden, kernel)
        return jaxent.softmax_cross_entropy(logits, labels, where=where, reduction="mean")

    def local(kernel, hidden, labels, where):
        total = jaxent.total_weight(labels, where=where, batch_axis_name="rows")

        def part(kernel, hidden, labels, where):
            logits = jaxent.LinearLogits(hidden, kernel)
            return jaxent.softmax_cross_entropy(logits, labels, where=where, reduction="sum") / total

        def step(sums, batch):
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(part)(kernel, *batch)), None

        zeros = lax.pcast(0.0, ("rows",), to="varying"), jnp.zeros_like(kernel)
        kernel = lax.pcast(kernel, ("rows",), to="varying")
        zeros = zeros[0], lax.pcast(zeros[1], ("rows",), to="varying")
        return lax.psum(lax.scan(step, zeros, (hidden, labels, where))[0], "rows")

    rows = P(None, "rows")
    mapped = shard_map(local, (P(), rows, rows, rows), P(), True)
    with harness.blocks("rows"):
        got = compiled(mapped)(moving["kernel"], hidden, *labels)
        check(got, compiled(jax.value_and_grad(mean))(moving["kernel"], hidden, *labels))
