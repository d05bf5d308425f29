"""The class axis split over devices, in shard_map, pmap and vmap: every option the same as on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxent
from tables import thinned

N, D, V = 12, 5, 48  # six rows on each of 2, twelve classes on each of 4 devices
SLICED = {"class_weights": P("classes"), "class_mask": P("classes"), "where": P("rows"), "weights": P("rows")}
SOURCES = ("dense", "linear")


@functools.cache
def arrays():
    rng = np.random.default_rng(1)
    hidden, kernel, bias = 2 * rng.normal(size=(N, D)), rng.normal(size=(D, V)), rng.normal(size=V)
    label = rng.integers(V, size=N)
    kernel[:, 7] = kernel[:, 30]  # ties across devices
    hidden[3] = 0
    options = {
        "class_weights": rng.uniform(0.5, 2, size=V),
        "class_mask": rng.uniform(size=V) < 0.7,
        "where": rng.uniform(size=N) < 0.8,
        "weights": rng.uniform(0.5, 2, size=N),
    }
    options["class_mask"][label] = True
    options["class_mask"][12:24] = False  # a device with next to no class in force
    options["class_mask"][label] = True
    q = rng.uniform(size=(N, V)) * options["class_mask"]
    as_jax = lambda x: jnp.asarray(x, jnp.float32 if np.asarray(x).dtype.kind == "f" else None)  # noqa: E731
    return jax.tree.map(as_jax, ((hidden, kernel, bias), label, q / q.sum(-1, keepdims=True), options))


def policy(s, advantage):
    return -advantage * s.log_prob - 0.1 * s.entropy + 0.01 * s.log_normalizer**2 + 0.1 * s.mean_log_prob


def labelled(loss, *names, soft=False, **fixed):
    """A loss as f(logits, label or distribution, array options, **axis names)."""

    def f(logits, y, options, **axes):
        options = {name: options[name] for name in names}
        return getattr(jaxent, loss)(logits, y, **options, **fixed, **axes)

    return f, names, soft


CASES = {
    "plain": labelled("softmax_cross_entropy", reduction="mean"),
    "rows": labelled("softmax_cross_entropy"),
    "smoothing": labelled("softmax_cross_entropy", label_smoothing=0.1, reduction="sum"),
    "z-loss": labelled("softmax_cross_entropy", z_loss=0.01, reduction="mean"),
    "everything": labelled(
        "softmax_cross_entropy",
        "class_weights",
        "class_mask",
        "where",
        "weights",
        label_smoothing=0.2,
        z_loss=0.01,
        reduction="mean",
    ),
    "focal": labelled("softmax_focal_loss", "class_weights", reduction="mean"),
    "poly": labelled("softmax_poly_loss", "where", reduction="mean"),
    "distribution": labelled("softmax_cross_entropy", "where", soft=True, reduction="mean"),
    "distribution, everything": labelled(
        "softmax_cross_entropy",
        "class_weights",
        "class_mask",
        "weights",
        soft=True,
        label_smoothing=0.2,
        reduction="mean",
    ),
    "entropy": (
        lambda z, y, options, **axes: jaxent.softmax_entropy(
            z, class_mask=options["class_mask"], reduction="sum", **axes
        ),
        ("class_mask",),
        False,
    ),
    "policy": (
        lambda z, y, options, **axes: jaxent.softmax_loss(
            policy, z, y, jnp.cos(y.astype(jnp.float32)), where=options["where"], **axes
        ),
        ("where",),
        False,
    ),
}


def logits_of(source, hidden, kernel, bias):
    layer = jaxent.LinearLogits(hidden, kernel, bias, softcap=5.0, block_bytes=2000)
    return layer if source == "linear" else layer.dense()


def reduced(losses):
    """Rows with uneven signs."""
    return jnp.sum(losses * jnp.cos(jnp.arange(losses.size)).reshape(losses.shape))


@functools.cache
def expected(name):
    f, _, soft = CASES[name]
    layer, label, q, options = arrays()
    g = lambda layer: reduced(f(logits_of("dense", *layer), q if soft else label, options))  # noqa: E731
    return jax.jit(jax.value_and_grad(g))(layer)


def assert_expected(name, got):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected(name)), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-6, atol=3e-6)


def mesh(rows, classes):
    return Mesh(np.array(jax.devices()[: rows * classes]).reshape(rows, classes), ("rows", "classes"))


LAYER = (P(), P(None, "classes"), P("classes"))


# without check_vma: the same with other transposes
UNCHECKED = ("everything", "distribution, everything", "policy")


@thinned(2, "name, source", CASES, SOURCES)
def test_shard_map(name, source):
    """Classes over four devices; the gradient from outside."""
    check_shard_map(name, source, check_vma=True)


@thinned(2, "name, source", UNCHECKED, SOURCES)
def test_without_check_vma(name, source):
    check_shard_map(name, source, check_vma=False)


def check_shard_map(name, source, check_vma):
    f, names, soft = CASES[name]
    layer, label, q, options = arrays()
    options = {key: options[key] for key in names}

    def total(layer, y, options):
        return reduced(f(logits_of(source, *layer), y, options, class_axis_name="classes"))

    specs = {key: P("classes") if key.startswith("class") else P() for key in names}
    sharded = jax.shard_map(
        total,
        mesh=mesh(1, 4),
        in_specs=(LAYER, P(None, "classes") if soft else P(), specs),
        out_specs=P(),
        check_vma=check_vma,
    )
    got = jax.jit(jax.value_and_grad(sharded))(layer, q if soft else label, options)
    assert_expected(name, got)


@thinned(2, "name, source", [name for name in CASES if name != "rows"], SOURCES)
def test_rows_and_classes(name, source):
    """2 x 4: rows over two devices with different weights, classes over four; the gradient from inside."""
    f, names, soft = CASES[name]
    layer, label, q, options = arrays()
    options = {key: options[key] for key in names}
    layer_specs = (P("rows"), P(None, "classes"), P("classes"))

    def step(layer, y, options):
        def loss(layer):
            logits = logits_of(source, *layer)
            return f(logits, y, options, class_axis_name="classes", batch_axis_name="rows")

        return jax.value_and_grad(loss)(layer)

    sharded = jax.shard_map(
        step,
        mesh=mesh(2, 4),
        in_specs=(layer_specs, P("rows", "classes") if soft else P("rows"), {k: SLICED[k] for k in names}),
        out_specs=(P(), layer_specs),
    )
    assert_expected(name, jax.jit(sharded)(layer, q if soft else label, options))


@pytest.mark.parametrize("source", SOURCES)
def test_statistics(source):
    layer, label, _, options = arrays()
    label = label.at[1].set(V)

    def f(layer, mask, **axes):
        logits = logits_of(source, *layer)
        found = jaxent.softmax_statistics(logits, label, class_mask=mask, **axes)
        return {name: x for name, x in vars(found).items() if x is not None}

    f_sharded = functools.partial(f, class_axis_name="classes")
    got = jax.jit(jax.shard_map(f_sharded, mesh=mesh(1, 4), in_specs=(LAYER, P("classes")), out_specs=P()))(
        layer, options["class_mask"]
    )
    want = jax.jit(f)(layer, options["class_mask"])
    assert got.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, rtol=3e-6, atol=3e-6, err_msg=name)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("transform", ["pmap", "vmap"])
def test_named_axes(source, transform):
    layer, label, _, _ = arrays()
    hidden, kernel, bias = layer
    slices = (hidden, kernel.reshape(D, 4, -1), bias.reshape(4, -1))
    mapped = {
        "pmap": functools.partial(jax.pmap, devices=jax.devices()[:4]),
        "vmap": jax.vmap,
    }[transform]

    def loss(hidden, kernel, bias):
        logits = logits_of(source, hidden, kernel, bias)
        return jaxent.softmax_cross_entropy(logits, label, reduction="mean", class_axis_name="classes")

    f = mapped(loss, in_axes=(None, 1, 0), axis_name="classes")
    value, gradient = jax.jit(jax.value_and_grad(lambda s: f(*s)[0]))(slices)
    gradient = (gradient[0], gradient[1].reshape(D, V), gradient[2].reshape(V))
    assert_expected("plain", (value, gradient))


@pytest.mark.parametrize("source", SOURCES)
def test_confident_rows_keep_their_digits(source):
    gap = np.float32([5, 20, 45, 70])
    z = np.zeros((4, V), np.float32)
    z[np.arange(4), [0, 13, 30, 47]] = gap
    label = jnp.asarray([0, 13, 30, 47])

    def rows(z):
        logits = z if source == "dense" else jaxent.LinearLogits(jnp.eye(4), z)
        return jaxent.softmax_cross_entropy(logits, label, class_axis_name="classes")

    f = jax.shard_map(rows, mesh=mesh(1, 4), in_specs=P(None, "classes"), out_specs=P())
    loss, gradient = jax.jit(lambda z: (f(z), jax.grad(lambda z: f(z).sum())(z)))(jnp.asarray(z))
    rest = (V - 1) * np.exp(-gap.astype(np.float64))
    np.testing.assert_allclose(loss, np.log1p(rest), rtol=8e-6)
    np.testing.assert_allclose(gradient[np.arange(4), label], -rest / (1 + rest), rtol=2e-6)


@pytest.mark.parametrize("source", SOURCES)
def test_second_derivatives(source):
    layer, label, _, _ = arrays()

    def slope(layer, axes):
        def loss(layer):
            logits = logits_of(source, *layer)
            return jaxent.softmax_cross_entropy(logits, label, label_smoothing=0.1, reduction="sum", **axes)

        return jax.jvp(jax.grad(loss), (layer,), (jax.tree.map(jnp.cos, layer),))[1]

    f = functools.partial(slope, axes={"class_axis_name": "classes"})
    got = jax.jit(jax.shard_map(f, mesh=mesh(1, 4), in_specs=(LAYER,), out_specs=LAYER))(layer)
    for a, b in zip(got, jax.jit(lambda layer: slope(layer, {}))(layer), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("source", SOURCES)
def test_bad_labels_poison_their_row_alone(source):
    layer, label, _, options = arrays()
    mask = options["class_mask"].at[label[5]].set(False)
    label = label.at[2].set(V).at[4].set(-1)

    def f(hidden, kernel, bias, mask):
        logits = logits_of(source, hidden, kernel, bias)
        loss = lambda h: jaxent.softmax_cross_entropy(  # noqa: E731
            logits_of(source, h, kernel, bias), label, class_mask=mask, class_axis_name="classes"
        )
        return loss(hidden), jax.grad(lambda h: loss(h).sum())(hidden), logits.shape[-1]

    sharded = jax.shard_map(
        lambda *x: f(*x)[:2], mesh=mesh(1, 4), in_specs=(*LAYER, P("classes")), out_specs=P()
    )
    loss, gradient = jax.jit(sharded)(*layer, mask)
    bad = np.isin(np.arange(N), [2, 4]) | np.asarray(label == arrays()[1][5])
    assert np.isnan(loss).tolist() == bad.tolist()
    assert np.isnan(gradient).all(-1).tolist() == bad.tolist() == np.isnan(gradient).any(-1).tolist()


def test_uneven_vocabulary_by_padding():
    """V = 45 on four devices: three classes that are not there."""
    layer, label, _, _ = arrays()
    hidden, kernel, bias = layer
    label = label % 45
    smooth = jax.jit(functools.partial(jaxent.softmax_cross_entropy, label_smoothing=0.1))
    want = smooth(hidden @ kernel[:, :45] + bias[None, :45], label)

    def f(hidden, kernel, bias, mask):
        logits = jaxent.LinearLogits(hidden, kernel, bias)
        return jaxent.softmax_cross_entropy(
            logits, label, label_smoothing=0.1, class_mask=mask, class_axis_name="classes"
        )

    padded = (hidden, jnp.where(jnp.arange(V) < 45, kernel, 1e6), bias, jnp.arange(V) < 45)
    got = jax.jit(jax.shard_map(f, mesh=mesh(1, 4), in_specs=(*LAYER, P("classes")), out_specs=P()))(*padded)
    np.testing.assert_allclose(got, want, rtol=3e-6, atol=1e-6)


def test_the_mean_of_all_rows():
    """`mean` with an axis name: devices hold different counts."""
    losses, where = jnp.arange(8.0), jnp.arange(8) % 3 != 0
    f = lambda x, w: jaxent.mean(x, where=w, axis_name="rows")  # noqa: E731
    mesh = Mesh(np.array(jax.devices()[:4]), "rows")
    got = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("rows"), out_specs=P()))(losses, where)
    np.testing.assert_allclose(got, losses[where].mean(), rtol=1e-6)


def test_the_prediction_of_a_row_with_nan():
    """A NaN counts as the largest, the first of several; also where another device's logits are larger."""
    z = np.zeros((3, V), np.float32)
    z[:, 40] = 9
    z[1, [14, 20]] = z[2, [30, 47]] = np.nan

    def prediction(z):
        return jaxent.softmax_statistics(z, names=["prediction"], class_axis_name="classes").prediction

    f = jax.shard_map(prediction, mesh=mesh(1, 4), in_specs=P(None, "classes"), out_specs=P())
    assert jax.jit(f)(z).tolist() == [40, 14, 30] == jnp.argmax(z, -1).tolist()


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_without_jit(check_vma):
    """A metric of an evaluation: jax has no symbolic zeros there."""
    mesh = Mesh(np.array(jax.devices()), ("classes",))
    z, y = jax.random.normal(jax.random.key(0), (6, 16)), jnp.arange(6)
    f = lambda z, **axes: jaxent.softmax_cross_entropy(z, y, reduction="mean", **axes)  # noqa: E731
    split = functools.partial(f, class_axis_name="classes")
    got = jax.shard_map(split, mesh=mesh, in_specs=P(None, "classes"), out_specs=P(), check_vma=check_vma)(z)
    np.testing.assert_allclose(got, f(z), rtol=1e-6)


def test_checkpoint_of_a_mapped_class_axis():
    z, y = jax.random.normal(jax.random.key(0), (6, 4, 2)), jnp.arange(6)

    @functools.partial(jax.vmap, axis_name="classes", in_axes=1)
    def split(z):
        return jaxent.softmax_loss(lambda s: s.log_prob**2, z, y, class_axis_name="classes")

    whole = lambda z: jaxent.softmax_loss(lambda s: s.log_prob**2, z.reshape(6, 8), y)  # noqa: E731
    got = jax.grad(jax.checkpoint(lambda z: split(z)[0]))(z)
    np.testing.assert_allclose(got, jax.grad(whole)(z), rtol=1e-5, atol=1e-6)
