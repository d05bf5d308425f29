"""Embedding tables `[V, D]` as kernels, split over devices: the same as on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import harness
import jaxent
from compiled import collectives
from tables import spread

N, D, V = 12, 8, 40  # six rows on each of 2, ten classes on each of 4 devices
# of rows, and of classes
SPLITS = {"rows": ("rows", None), "classes": (None, "classes"), "both": ("rows", "classes")}
LOSSES = ("softmax_cross_entropy", "softmax_kl_divergence")


@functools.cache
def arrays():
    """hidden, table, bias; what comes beside the logits."""
    rng = np.random.default_rng(3)
    moving = [np.float32(rng.normal(size=size)) for size in ((N, D), (V, D), (V,))]
    where, mask = np.arange(N) % 4 != 1, np.arange(V) % 9 != 2
    label = rng.choice(np.flatnonzero(mask), size=N).astype(np.int32)
    moving[0][~where], moving[1][~mask] = np.nan, np.nan
    return moving, {"label": label, "where": where, "class_mask": mask}


def losses(loss, reduction, moving, beside, class_axis=0, **names):
    hidden, table, bias = moving
    layer = jaxent.LinearLogits(hidden, table, bias, class_axis=class_axis)
    options = {"where": beside["where"], "class_mask": beside["class_mask"], "reduction": reduction} | names
    if loss == "softmax_cross_entropy":
        return jaxent.softmax_cross_entropy(layer, beside["label"], label_smoothing=0.1, **options)
    target = jaxent.LinearLogits(jnp.cos(hidden), table, softcap=2.0, class_axis=class_axis)
    return jaxent.softmax_kl_divergence(layer, target, **options)


def total(found):
    return jnp.sum(found * found)


@functools.cache
def expected(loss, reduction):
    """Value and gradients by the kernel `[D, V]`, on one device."""
    (hidden, table, bias), beside = arrays()

    def f(hidden, kernel, bias):
        return total(losses(loss, reduction, (hidden, kernel, bias), beside, class_axis=-1))

    with harness.blocks("rows"):
        value, (dh, dk, db) = jax.jit(jax.value_and_grad(f, (0, 1, 2)))(hidden, table.T, bias)
    return value, (dh, dk.T, db)


def specs_of(split):
    rows, classes = SPLITS[split]
    moving = P(rows), P(classes, None), P(classes)
    return list(moving), {"label": P(rows), "where": P(rows), "class_mask": P(classes)}


def mesh_of(mode):
    if mode == "explicit":
        return jax.make_mesh((2, 4), ("rows", "classes"))
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("rows", "classes"))


@spread(
    6,
    "loss, mode, split, source, reduction",
    LOSSES,
    ["shard_map", "auto", "explicit"],
    SPLITS,
    ["rows", "pieces", "classes"],
    ["none", "mean"],
)
def test_split_tables(loss, mode, split, source, reduction):
    mesh, specs = mesh_of(mode), specs_of(split)
    put = jax.device_put(arrays(), jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
    rows, classes = SPLITS[split]

    def f(moving, beside):
        of_losses = functools.partial(losses, loss, reduction)
        if mode == "shard_map":
            names = {"class_axis_name": classes, "batch_axis_name": rows}
            out = P() if reduction == "mean" else P(rows)
            of_losses = functools.partial(of_losses, **names)
            of_losses = jax.shard_map(of_losses, mesh=mesh, in_specs=specs, out_specs=out)
        return total(of_losses(moving, beside))

    with harness.blocks(source):
        program = jax.jit(jax.value_and_grad(f), compiler_options=harness.QUICK).lower(*put).compile()
    value, gradients = program(*put)
    want, slopes = expected(loss, reduction)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for x, got, slope in zip(put[0], gradients, slopes, strict=True):
        np.testing.assert_allclose(got, slope, rtol=1e-4, atol=1e-5)
        assert got.sharding.is_equivalent_to(x.sharding, x.ndim)
    sent = collectives(program)
    assert {c.kind for c in sent} == {"all-reduce"}  # nothing is gathered
    assert mode == "auto" or not any(c.in_loop for c in sent)


@pytest.mark.parametrize("split", [P("rows", "classes"), P(None, "classes"), P(("rows", "classes"))])
def test_a_table_split_in_another_way(split):
    """By features, or over the axis of the rows as well: what an explicit mesh has to move first."""
    mesh = mesh_of("explicit")
    specs = [P("rows"), split, P()], {"label": P("rows"), "where": P("rows"), "class_mask": P()}
    put = jax.device_put(arrays(), jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
    f = lambda *x: total(losses("softmax_cross_entropy", "mean", *x))  # noqa: E731
    with harness.blocks("rows"):
        value, gradients = jax.jit(jax.value_and_grad(f), compiler_options=harness.QUICK)(*put)
    want, slopes = expected("softmax_cross_entropy", "mean")
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for x, got, slope in zip(put[0], gradients, slopes, strict=True):
        np.testing.assert_allclose(got, slope, rtol=1e-4, atol=1e-5)
        assert got.sharding.is_equivalent_to(x.sharding, x.ndim)


@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_dense(mode):
    mesh = mesh_of(mode)
    (hidden, table, bias), _ = arrays()
    put = jax.device_put([hidden, table, bias], [NamedSharding(mesh, s) for s in specs_of("both")[0]])
    found = jax.jit(lambda *x: jaxent.LinearLogits(*x, class_axis=0).dense())(*put)
    np.testing.assert_allclose(found, hidden @ table.T + bias, rtol=1e-5, atol=1e-5)
