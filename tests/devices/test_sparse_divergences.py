"""KL and JS to a `SparseDistribution` with the student's classes on several devices: what is sent, and derivatives.

test_covering.py has every option in each mode.
"""

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
from jaxent import SparseDistribution, _others
from tables import spread

N, D, V, K = 12, 5, 4096, 3
AUTO = Mesh(np.array(jax.devices()).reshape(2, 4), ("rows", "classes"))
SPECS = {"hidden": P("rows"), "kernel": P(None, "classes"), "classes": P("rows"), "probs": P("rows")}
NUMBERS = {"temperature": P("rows"), "beta": P("rows")}
compiled = functools.partial(jax.jit, compiler_options=harness.QUICK)


@functools.cache
def arrays():
    """Each row names classes of several devices, one of them twice; a slot is empty."""
    rng = np.random.default_rng(8)
    hidden, kernel = np.float32(rng.normal(size=(N, D))), np.float32(rng.normal(size=(D, V)))
    classes = np.int32(rng.integers(V, size=(N, K)))
    classes[::3, 1] = classes[::3, 0]
    probs = np.float32(rng.dirichlet(np.ones(K + 1), size=N)[:, :K])
    classes[1::3, 2], probs[1::3, 2] = -1, 0
    found = {"hidden": hidden, "kernel": kernel, "classes": classes, "probs": probs}
    of_rows = np.float32(np.linspace(0.25, 0.75, N)), np.float32(np.linspace(0.5, 2, N))
    return found | dict(zip(("beta", "temperature"), of_rows, strict=True))


def loss(source, reduction, x, **axes):
    logits = (
        jaxent.LinearLogits(x["hidden"], x["kernel"]) if source == "linear" else x["hidden"] @ x["kernel"]
    )
    options = {"temperature": x["temperature"], "beta": x["beta"], "reduction": reduction} | axes
    return jaxent.softmax_js_divergence(logits, SparseDistribution(x["classes"], x["probs"]), **options)


def slopes(f, x):
    moving = {name: a for name, a in x.items() if name != "classes"}
    return jax.value_and_grad(lambda moving: jnp.sum(f(x | moving)))(moving)


@functools.cache
def expected(reduction):
    return compiled(functools.partial(slopes, functools.partial(loss, "dense", reduction)))(arrays())


def check(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def mapped(source, reduction, check_vma=True):
    axes = {"class_axis_name": "classes", "batch_axis_name": "rows"}
    f = functools.partial(loss, source, reduction, **axes)
    out = P("rows") if reduction == "none" else P()
    return jax.shard_map(f, mesh=AUTO, in_specs=(SPECS | NUMBERS,), out_specs=out, check_vma=check_vma)


@pytest.mark.parametrize("source", ["dense", "linear"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_shard_map(source, reduction):
    """Values and gradients by all that is a number; what is sent is a few numbers per row, and gradients."""
    program = compiled(functools.partial(slopes, mapped(source, reduction))).lower(arrays()).compile()
    check(program(arrays()), expected(reduction))
    assert all(c.kind == "all-reduce" for c in collectives(program))
    assert max(c.bytes for c in collectives(program)) < N * V  # a quarter of the logits


@pytest.mark.parametrize("kind", ["shard_map", "explicit, whole classes"])
def test_groups_of_classes(kind, monkeypatch):
    """Where a device has all classes, or a stretch of them for good."""
    monkeypatch.setattr(_others, "FOLDS", 4)
    x, used = arrays(), []
    of_groups = _others._by_groups
    monkeypatch.setattr(_others, "_by_groups", lambda *x: used.append(1) or of_groups(*x))
    f = mapped("dense", "mean")
    if kind != "shard_map":
        f, mesh = functools.partial(loss, "dense", "mean"), jax.make_mesh((8,), ("rows",))
        x = {name: a if name == "kernel" else a[:8] for name, a in x.items()}
        want = compiled(functools.partial(slopes, f))(x)
        specs = SPECS | NUMBERS | {"kernel": P()}
        x = jax.device_put(x, {name: NamedSharding(mesh, spec) for name, spec in specs.items()})
        assert not used
    else:
        want = expected("mean")
    check(compiled(functools.partial(slopes, f))(x), want)
    assert used


@pytest.mark.parametrize("name", ["cross_entropy", "focal_loss", "kl_divergence", "js_divergence"])
def test_eager_gradients_on_an_explicit_mesh(name):
    mesh, x = jax.make_mesh((2, 4), ("rows", "classes")), arrays()
    loss = getattr(jaxent, f"softmax_{name}")
    f = lambda z, p, c: loss(z, SparseDistribution(c, p), reduction="mean")  # noqa: E731
    inputs = x["hidden"] @ x["kernel"], x["probs"], x["classes"]
    want = jax.grad(f, (0, 1))(*map(jnp.asarray, inputs))
    with jax.set_mesh(mesh):
        got = jax.grad(f, (0, 1))(*jax.device_put(inputs, NamedSharding(mesh, P("rows"))))
    check(got, want)


def test_without_check_vma():
    check(compiled(functools.partial(slopes, mapped("linear", "mean", False)))(arrays()), expected("mean"))


@spread(2, "kind, source", ["auto", "explicit"], ["dense", "linear"])
def test_jit(kind, source):
    """With no keyword: no logits are moved."""
    mesh = jax.make_mesh((2, 4), ("rows", "classes")) if kind == "explicit" else AUTO
    split = {name: NamedSharding(mesh, spec) for name, spec in (SPECS | NUMBERS).items()}
    f = compiled(functools.partial(slopes, functools.partial(loss, source, "mean")))
    x = jax.device_put(arrays(), split)
    program = f.lower(x).compile()
    check(program(x), expected("mean"))
    assert max(c.bytes for c in collectives(program)) < N * V


def test_second_derivatives():
    """Of a layer, forward over reverse."""

    def product(f):
        def g(layer, x):
            directions = jax.tree.map(jnp.cos, layer)
            total = lambda layer: jnp.sum(f(x | layer))  # noqa: E731
            return jax.jvp(jax.grad(total), (layer,), (directions,))[1]

        return compiled(g)({name: arrays()[name] for name in ("hidden", "kernel", "probs")}, arrays())

    check(product(mapped("linear", "mean")), product(functools.partial(loss, "dense", "mean")))


@pytest.mark.parametrize("name", ["kl_divergence", "js_divergence"])
def test_many_classes_on_an_explicit_mesh(name):
    """Those that are scattered; outside of `jax.set_mesh`, so arrays alone say how they are split."""
    rng, mesh = np.random.default_rng(0), jax.make_mesh((2, 4), ("rows", "classes"))
    z = rng.normal(size=(8, 64)).astype(np.float32)
    classes = rng.permuted(np.tile(np.arange(64, dtype=np.int32), (8, 1)), axis=1)[:, :40]
    probs = rng.dirichlet(np.ones(45), size=8)[:, :40].astype(np.float32)
    loss = getattr(jaxent, f"softmax_{name}")
    f = compiled(jax.grad(lambda z, p, c: loss(z, SparseDistribution(c, p), reduction="mean"), (0, 1)))
    inputs = z, probs, classes
    check(f(*jax.device_put(inputs, NamedSharding(mesh, P("rows")))), f(*map(jnp.asarray, inputs)))
