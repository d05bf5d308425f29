"""Explicit meshes, in `jax.set_mesh` and without: what comes beside the logits may be split in another way."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import harness
import jaxent
from tables import some

N, D, V = 8, 4, 12
# of hidden, kernel, and what belongs to rows and classes
SPLITS = {
    "rows": (P("rows"), P(), P("rows"), P()),
    "both": (P("rows"), P(None, "classes"), P("rows"), P("classes")),
    "logits only": (P("rows"), P(None, "classes"), P(), P()),
    "in one place": (P(), P(), P("rows"), P("classes")),
    "like fully sharded data": (P("rows"), P("classes", "rows"), P("rows"), P("rows")),
}


@functools.cache
def arrays():
    rng = np.random.default_rng(6)
    label = rng.integers(V, size=N).astype(np.int32)
    q = rng.uniform(size=(N, V))
    options = {
        "where": np.arange(N) % 3 != 1,
        "weights": np.float32(rng.uniform(0.5, 2, size=N) * (np.arange(N) != 4)),
        "class_weights": np.float32(rng.uniform(0.5, 2, size=V)),
        "class_mask": np.ones(V, bool),
    }
    options["class_mask"][5] = False
    label[label == 5], q[:, 5] = 6, 0
    hidden, kernel = np.float32(rng.normal(size=(N, D))), np.float32(rng.normal(size=(D, V)))
    return hidden, kernel, label, np.float32(q / q.sum(-1, keepdims=True)), options


def losses(source, hidden, kernel, label, q, options):
    """Options alone and together, of each kind of label."""
    logits = jaxent.LinearLogits(hidden, kernel) if source != "dense" else hidden @ kernel
    where, weights = options["where"], options["weights"]
    class_weights, class_mask = options["class_weights"], options["class_mask"]
    return {
        "where": jaxent.softmax_cross_entropy(logits, label, where=where, reduction="mean"),
        "ignored": jaxent.softmax_cross_entropy(
            logits, label, ignore_index=3, class_weights=class_weights, label_smoothing=0.1, reduction="mean"
        ),
        "distribution": jaxent.softmax_focal_loss(
            logits, q, where=where, weights=weights, class_weights=class_weights, class_mask=class_mask
        ),
        "function": jaxent.softmax_loss(
            lambda s, a: a * s.log_prob * s.entropy, logits, label, weights, where=where, reduction="sum"
        ),
    }


def gradients(source, hidden, kernel, label, q, options):
    """Of all of them together, by all that is float."""

    def total(hidden, kernel, q, weights):
        found = losses(source, hidden, kernel, label, q, options | {"weights": weights})
        return sum(jnp.sum(x) * np.cos(float(i)) for i, x in enumerate(found.values()))

    return jax.grad(total, (0, 1, 2, 3))(hidden, kernel, q, options["weights"])


@functools.cache
def expected():
    both = lambda *a: (losses("dense", *a), gradients("dense", *a))  # noqa: E731
    return jax.jit(both, compiler_options=harness.QUICK)(*arrays())


ASKED = (
    ("dense", "logits only", True),
    ("rows", "logits only", False),
    ("rows", "like fully sharded data", True),
    ("classes", "rows", True),
    ("dense", "both", True),
    ("dense", "in one place", True),
    ("classes", "logits only", False),
)


@pytest.mark.parametrize(("source", "split", "in_context"), some(ASKED[:2], ASKED))
def test_what_is_split_otherwise(source, split, in_context):
    mesh = jax.make_mesh((2, 4), ("rows", "classes"))
    hidden, kernel, of_rows, of_classes = SPLITS[split]
    options = {name: of_classes if name.startswith("class") else of_rows for name in arrays()[-1]}
    specs = (hidden, kernel, of_rows, of_rows, options)
    put = jax.device_put(arrays(), jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext(), harness.blocks(source):
        both = lambda *a: (losses(source, *a), gradients(source, *a))  # noqa: E731
        found, slopes = jax.jit(both, compiler_options=harness.QUICK)(*put)
    for key, want in expected()[0].items():
        np.testing.assert_allclose(found[key], want, rtol=1e-5, atol=1e-5, err_msg=str(key))
    inputs = put[0], put[1], put[3], put[4]["weights"]
    for x, slope, want in zip(inputs, slopes, expected()[1], strict=True):
        np.testing.assert_allclose(slope, want, rtol=1e-4, atol=1e-4)
        assert slope.sharding.is_equivalent_to(x.sharding, x.ndim)


@pytest.mark.parametrize("in_context", [False, True])
@pytest.mark.parametrize("source", ["dense", "rows"])
def test_what_is_on_no_mesh(source, in_context):
    """Arrays of NumPy and traced numbers beside logits that are split; a function that is the same for all rows."""
    hidden, kernel, label, q, options = arrays()
    where, weights = options["where"], options["weights"]
    keys, wide = (
        jax.random.split(jax.random.key(0), N),
        {"x": np.cos(np.arange(3.0 * N, dtype=np.float32)).reshape(N, 3)},
    )

    def fn(s, tree, key):
        return tree["x"].sum() * s.log_prob + jax.random.uniform(key) * s.entropy, (s.rank == 0, jnp.ones(2))

    def f(source, smoothing, hidden, kernel):
        logits = jaxent.LinearLogits(hidden, kernel) if source != "dense" else hidden @ kernel
        plain = jaxent.softmax_cross_entropy(
            logits, label, label_smoothing=smoothing, z_loss=smoothing / 9, reduction="mean", **options
        )
        own, aux = jaxent.softmax_loss(fn, logits, label, wide, keys, where=where, has_aux=True)
        focal = jaxent.softmax_focal_loss(logits, q, weights=weights, class_mask=options["class_mask"]).sum()
        total = jaxent.total_weight(
            label, where=where, weights=weights, class_weights=options["class_weights"]
        )
        same = 0.0
        if in_context:  # outside of it such a program has nothing that is split
            same = jaxent.softmax_loss(lambda s: 0.5, logits, label, where=where)
        return plain + own + focal + total + same, aux

    mesh = jax.make_mesh((2, 4), ("rows", "classes"))
    run = jax.value_and_grad(functools.partial(f, source), (0, 1, 2), has_aux=True)
    want = jax.jit(jax.value_and_grad(functools.partial(f, "dense"), (0, 1, 2), has_aux=True))
    want = want(np.float32(0.1), hidden, kernel)
    put = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in ((hidden, P("rows")), (kernel, P()))]
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext(), harness.blocks(source):
        got = jax.jit(run, compiler_options=harness.QUICK)(np.float32(0.1), *put)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", [None, "classes"])  # of the masks; "rows" splits what they are of
def test_grad_of_vmap_over_masks(axis):
    """First and second derivatives by logits that are not mapped over, beside a loop."""
    z = np.float32(np.random.default_rng(8).normal(size=(4, V)))
    masks = np.tril(np.ones((4, 4), bool))

    def f(z, mask):
        kl = jaxent.softmax_kl_divergence(z, -z, where=mask, reduction="mean")
        return kl + jaxent.softmax_entropy(z, where=mask, reduction="mean")

    def derivatives(total, z, masks):
        return jax.jvp(jax.grad(lambda z: jnp.sum(total(z, masks))), (z,), (jnp.sin(z),))

    want = jax.jit(functools.partial(derivatives, lambda z, masks: sum(f(z, mask) for mask in masks)))(
        z, masks
    )
    mesh = jax.make_mesh((2, 4), ("rows", "classes"))
    put = [jax.device_put(x, NamedSharding(mesh, P(*spec))) for x, spec in ((z, ["rows"]), (masks, [axis]))]
    for inside in (jax.jit, jax.checkpoint):
        many = jax.vmap(inside(f), (None, 0))
        with jax.set_mesh(mesh):
            got = jax.jit(functools.partial(derivatives, many))(*put)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
