"""Axes split by jit, on auto and explicit meshes, with no keyword: the same as on one device, and nothing gathered."""

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
from jaxent._logits import class_blocks, sources
from jaxent._logits.plan import Plan
from tables import thinned

D, V = 6, 96
MESHES = {
    "auto": lambda: Mesh(np.array(jax.devices()).reshape(2, 4), ("rows", "classes")),
    "explicit": lambda: jax.make_mesh((2, 4), ("rows", "classes")),
}
# shape of rows, how they are split, and the classes
SPLITS = {
    "batch": ((64,), ("rows",), None),
    "classes": ((64,), (None,), "classes"),
    "both": ((64,), ("rows",), "classes"),
    "batch of sequences": ((8, 5), ("rows", None), None),
    "sequence": ((3, 32), (None, "rows"), "classes"),
    "batch and sequence": ((4, 16), ("rows", "classes"), None),
}
# four rows, or 40 classes, of a device at a time: both leave a remainder
PLANS = {"rows": lambda *_: Plan(4, V), "classes": lambda sizes, *_: Plan(sizes.rows, 40)}
SOURCES = ("dense", *PLANS)


@pytest.fixture
def source(request, monkeypatch):
    if request.param != "dense":
        monkeypatch.setattr(sources, "plan", PLANS[request.param])
        monkeypatch.setattr(sources, "ROWS", 4)
        monkeypatch.setattr(class_blocks, "ROWS", 4)
    return request.param


@functools.cache
def arrays(rows):
    rng = np.random.default_rng([3, *rows])
    layer = 2 * rng.normal(size=(*rows, D)), rng.normal(size=(D, V)), rng.normal(size=V)
    label = rng.integers(V, size=rows)
    options = {
        "where": rng.uniform(size=rows) < 0.6,
        "weights": rng.uniform(0.5, 2, size=rows),
        "class_weights": rng.uniform(0.5, 2, size=V),
        "class_mask": rng.uniform(size=V) < 0.8,
    }
    options["class_mask"][label] = True
    layer[0][~options["where"]] = np.nan
    return jax.tree.map(lambda x: np.float32(x) if x.dtype.kind == "f" else x, (layer, label, options))


def loss(reduction, layer, label, options, dense):
    logits = jaxent.LinearLogits(*layer)
    if dense:
        hidden = jnp.where(options["where"][..., None], logits.hidden, 0)
        logits = hidden @ logits.kernel + jnp.expand_dims(logits.bias, range(logits.ndim - 1))
    found = jaxent.softmax_cross_entropy(
        logits, label, **options, label_smoothing=0.1, z_loss=0.01, reduction=reduction
    )
    return jnp.sum(found @ jnp.cos(jnp.arange(1.0 * found.shape[-1]))) if found.ndim else found


value_and_grad = jax.value_and_grad(loss, 1)


@functools.cache
def expected(rows, reduction):
    layer, label, options = jax.tree.map(jnp.asarray, arrays(rows))
    f = jax.jit(value_and_grad, static_argnums=(0, 4), compiler_options=harness.QUICK)
    return f(reduction, layer, label, options, True)


def put(kind, split):
    rows, of_rows, of_classes = SPLITS[split]
    mesh = MESHES[kind]()
    layer, label, options = arrays(rows)
    specs = (
        (P(*of_rows), P(None, of_classes), P(of_classes)),
        P(*of_rows),
        {name: P(of_classes) if name.startswith("class") else P(*of_rows) for name in options},
    )
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return jax.device_put((layer, label, options), shardings)


@thinned(3, "split, kind, source", SPLITS, MESHES, SOURCES, indirect=["source"])
def test_splits(split, kind, source):
    check_split(split, kind, "mean", source)


@thinned(3, "split, kind, source", ["both", "sequence"], MESHES, SOURCES, indirect=["source"])
def test_results_per_row(split, kind, source):
    check_split(split, kind, "none", source)


def check_split(split, kind, reduction, source):
    layer, label, options = put(kind, split)
    f = jax.jit(value_and_grad, static_argnums=(0, 4), compiler_options=harness.QUICK)
    program = f.lower(reduction, layer, label, options, source == "dense").compile()
    value, gradients = program(layer, label, options)
    want = expected(SPLITS[split][0], reduction)
    for a, b in zip(jax.tree.leaves((value, gradients)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for x, gradient in zip(layer, gradients, strict=True):
        assert gradient.sharding.is_equivalent_to(x.sharding, x.ndim)
    sent = collectives(program)
    assert {c.kind for c in sent} == {"all-reduce"}
    if kind == "explicit":
        assert not any(c.in_loop for c in sent)


@thinned(3, "kind, mapped, source", MESHES, ["rows", None], SOURCES, indirect=["source"])
def test_vmap(kind, mapped, source):
    """Over an axis that is split or not; jax refuses a shard_map under a vmap that has taken an axis of its mesh."""
    rng = np.random.default_rng(7)
    hidden, kernel = (
        rng.normal(size=(4, 16, D)).astype(np.float32),
        rng.normal(size=(D, V)).astype(np.float32),
    )
    label = rng.integers(V, size=16)

    def f(hidden, kernel, label):
        def loss(hidden):
            logits = hidden @ kernel if source == "dense" else jaxent.LinearLogits(hidden, kernel)
            return jaxent.softmax_cross_entropy(logits, label, reduction="mean")

        return jnp.sum(jax.vmap(loss)(hidden) * jnp.arange(4.0))

    specs = P(mapped), P(None, "classes"), P()
    shardings = [NamedSharding(MESHES[kind](), spec) for spec in specs]
    arguments = jax.device_put((hidden, kernel, label), tuple(shardings))
    run = jax.jit(jax.value_and_grad(f, (0, 1)), compiler_options=harness.QUICK)
    if kind == "explicit" and mapped and source != "dense":
        with pytest.raises(ValueError, match="axis_names"):
            run(*arguments)
        return
    got, want = run(*arguments), run(hidden, kernel, label)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
