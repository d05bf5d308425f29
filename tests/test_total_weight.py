"""What a mean divides by: alone, of parts that are added up, and where labels are bad, hidden or on the host."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import harness
import jaxent
from layers import F32, SEQUENCES, compiled, layer_of
from tables import thinned

V = 11
total_weight = compiled(jaxent.total_weight, static_argnames=("ignore_index",))
RNG = np.random.default_rng(8)
LABELS = RNG.integers(V, size=SEQUENCES).astype(np.int32)
IGNORED = 4
LABELS[0, 1] = LABELS[2, 2] = IGNORED
OPTIONS = {
    "where": RNG.uniform(size=SEQUENCES) < 0.7,
    "ignore_index": IGNORED,
    "weights": np.float32(RNG.uniform(0.5, 2, size=SEQUENCES) * (np.arange(12).reshape(SEQUENCES) != 5)),
    "class_weights": np.float32(RNG.uniform(0.5, 2, size=V) * (np.arange(V) != LABELS[3, 0])),
}
TOGETHER = {
    "nothing": (),
    **{name: (name,) for name in OPTIONS},
    "weights of rows and classes": ("weights", "class_weights"),
    "masks": ("where", "ignore_index"),
    "everything": tuple(OPTIONS),
}


def options_of(together):
    """(arrays, the rest)"""
    return harness.split({name: OPTIONS[name] for name in TOGETHER[together]})


def expected(labels, where=True, ignore_index=None, weights=1.0, class_weights=None):
    """In NumPy, in float64; a bad label has a class weight of 1."""
    total = np.ones(labels.shape) * where * (labels != ignore_index) * np.float64(weights)
    if class_weights is not None:
        ok = (labels >= 0) & (labels < len(class_weights))
        total = total * np.where(ok, np.float64(class_weights)[np.where(ok, labels, 0)], 1)
    return total.sum()


@pytest.mark.parametrize("together", TOGETHER)
def test_total(together):
    arrays, rest = options_of(together)
    want = expected(LABELS, **arrays, **rest)
    assert want != 0
    for f in (total_weight, jaxent.total_weight):  # traced, and on the host
        got = f(LABELS, **arrays, **rest)
        assert got.shape == () and got.dtype == F32 and isinstance(got, jax.Array)
        np.testing.assert_allclose(got, want, rtol=3e-7)


@thinned(3, "together, source", TOGETHER, ["dense", *harness.LINEAR])
def test_the_mean_divides_by_it(together, source):
    arrays, rest = options_of(together)
    layer = layer_of(SEQUENCES, classes=V)

    @compiled
    def run(layer, labels, arrays):
        def loss(layer, reduction):
            logits = layer.dense() if source == "dense" else layer
            return jaxent.softmax_cross_entropy(logits, labels, reduction=reduction, **arrays, **rest)

        total = jaxent.total_weight(labels, **arrays, **rest)
        return total, [jax.value_and_grad(loss)(layer, reduction) for reduction in ("sum", "mean")]

    with harness.blocks(source):
        total, (of_sum, of_mean) = run(layer, LABELS, arrays)
    for a, b in zip(jax.tree.leaves(of_sum), jax.tree.leaves(of_mean), strict=True):
        np.testing.assert_allclose(a / total, b, rtol=2e-6, atol=1e-7)


LOSSES = ("softmax_cross_entropy", "softmax_focal_loss", "softmax_poly_loss")


@pytest.mark.parametrize("loss", LOSSES)
def test_with_options_that_the_total_does_not_know(loss):
    """Smoothing and z-loss: a row with a class weight of 0 counts, and adds nothing to the total."""
    arrays, rest = options_of("everything")

    @compiled
    def run(z, labels, arrays):
        of = functools.partial(
            getattr(jaxent, loss), z, labels, **arrays, **rest, label_smoothing=0.2, z_loss=0.01
        )
        total = jaxent.total_weight(labels, **arrays, **rest)
        return of(reduction="sum") / total, of(reduction="mean")

    np.testing.assert_allclose(*run(layer_of(SEQUENCES, classes=V).dense(), LABELS, arrays), rtol=1e-6)


def test_of_a_users_function():
    """Which has no class weights; in two parts, along the rows of sequences."""

    @compiled
    def run(z, labels, weights):
        def of(i, reduction):
            fn = lambda s: s.log_prob * s.entropy  # noqa: E731
            return jaxent.softmax_loss(fn, z[i], labels[i], weights=weights[i], reduction=reduction)

        parts = np.s_[:1], np.s_[1:]
        total = sum(jaxent.total_weight(labels[i], weights=weights[i]) for i in parts)
        return sum(of(i, "sum") for i in parts) / total, of(np.s_[:], "mean")

    np.testing.assert_allclose(*run(layer_of(SEQUENCES).dense(), LABELS, OPTIONS["weights"]), rtol=1e-6)


@pytest.mark.parametrize("linear", [False, True])
def test_micro_batches(linear):
    """Of uneven counts, one of which has nothing: the mean of all rows and its gradient, to a rounding."""
    rng = np.random.default_rng(5)
    n, size = 6, 8  # micro-batches of rows
    labels = rng.integers(V, size=(n, size))
    where = np.arange(size) < np.array([7, 1, 4, 0, 6, 8])[:, None]
    arrays = {"where": where, "weights": np.float32(rng.uniform(0.2, 3, size=(n, size)))}
    class_weights = np.float32(rng.uniform(0.2, 3, size=V))
    layer = layer_of((n, size), classes=V)

    def loss(kernel, hidden, labels, arrays, reduction):
        logits = dataclasses.replace(layer, hidden=hidden, kernel=kernel)
        logits = logits if linear else logits.dense()
        options = arrays | {"class_weights": class_weights, "reduction": reduction}
        return jaxent.softmax_cross_entropy(logits, labels, **options)

    @compiled
    def accumulated(kernel, hidden, labels, arrays):
        total = jaxent.total_weight(labels, **arrays, class_weights=class_weights)

        def step(sums, batch):
            hidden, labels, arrays = batch
            of_part = jax.value_and_grad(lambda kernel: loss(kernel, hidden, labels, arrays, "sum") / total)
            part = jaxent.total_weight(labels, **arrays, class_weights=class_weights)
            return jax.tree.map(jnp.add, sums, (*of_part(kernel), part)), part

        zeros = (jnp.zeros(()), jnp.zeros_like(kernel), jnp.zeros(()))
        (value, gradient, added), parts = lax.scan(step, zeros, (hidden, labels, arrays))
        return value, gradient, added / total, parts

    with harness.blocks("rows" if linear else "dense"):
        *got, share, parts = accumulated(layer.kernel, layer.hidden, labels, arrays)
        whole = compiled(jax.value_and_grad(loss), static_argnums=4)
        want = whole(layer.kernel, layer.hidden, labels, arrays, "mean")
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    assert np.linalg.norm(got[1] - want[1]) <= 2e-6 * np.linalg.norm(want[1])
    np.testing.assert_allclose(share, 1, rtol=1e-6)
    assert parts[3] == 0 and len(set(np.asarray(parts).tolist())) == n
    each = [(layer.hidden[i], labels[i], {name: x[i] for name, x in arrays.items()}) for i in range(n)]
    mean_of_means = np.mean([whole(layer.kernel, *x, "mean")[0] for x in each])
    assert abs(mean_of_means - want[0]) > 1e-2  # what must not come out


def test_bad_labels_count():
    """Their loss is NaN and so is the mean; hidden ones do not."""
    labels = jnp.asarray([0, -1, 11, 3, 2**31 - 1])
    assert total_weight(labels) == 5
    weights = jnp.asarray([2.0, 4, 8, 16, 32])
    assert total_weight(labels, weights=weights) == 62
    assert total_weight(labels, weights=weights, where=labels != 11) == 54
    class_weights = jnp.where(jnp.arange(V) == 3, 0.5, 3.0)
    assert total_weight(labels, class_weights=class_weights) == 3 + 1 + 1 + 0.5 + 1
    mean = compiled(functools.partial(jaxent.softmax_cross_entropy, reduction="mean"))
    assert np.isnan(mean(jnp.zeros((5, V)), labels, class_weights=class_weights))


def test_a_hidden_row_may_hold_anything():
    labels, where = jnp.asarray([3, 77, 0]), jnp.asarray([True, False, True])
    weights = jnp.asarray([0.25, np.nan, 4])
    got = total_weight(labels, where=where, weights=weights, class_weights=jnp.linspace(1, 2, V))
    np.testing.assert_allclose(got, 0.25 * 1.3 + 4, rtol=1e-6)


def test_labels_on_the_host():
    """Hidden ones may be anything; none is cut to 32 bits, or wrapped into another class."""
    labels, where = np.array([1, 2**32 + 3, -100, 2]), np.array([True, False, True, True])
    class_weights = np.linspace(1, 2, V)
    assert jaxent.total_weight(labels, ignore_index=-100, where=where) == 2
    assert jaxent.total_weight(labels, ignore_index=2**32 + 3, where=labels > 0) == 2
    got = jaxent.total_weight(labels, ignore_index=-100, where=where, class_weights=class_weights)
    np.testing.assert_allclose(got, 1.1 + 1.2, rtol=1e-6)
    for bad in (V, -1, 2**32 + 3):
        with pytest.raises(ValueError, match=rf"`labels` must be in \[0, 11\), but is {bad} at index \[1\]"):
            jaxent.total_weight(np.array([1, bad]), class_weights=class_weights)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_labels_of_few_bits_and_many(dtype):
    labels = np.array([0, 10, 4, 127], dtype)
    for x in (labels, jnp.asarray(labels)):
        assert total_weight(x, ignore_index=127) == 3
        got = total_weight(x, ignore_index=127, class_weights=jnp.linspace(1, 2, V))
        np.testing.assert_allclose(got, 1 + 2 + 1.4, rtol=1e-6)


def test_ignored_labels():
    labels, weights = jnp.asarray([-100, 3, 3, -1, -100]), jnp.asarray([9.0, 1, 2, 4, np.nan])
    found = [total_weight(labels, ignore_index=i) for i in (None, 3, -100, 2**40)]
    assert found == [5, 3, 3, 5]
    assert total_weight(labels, ignore_index=-100, weights=weights) == 7


def test_elements_that_are_yes_or_no():
    """bools, of sigmoid losses: what `jaxent.mean` divides by."""

    @compiled
    def run(z, yes, where, weights):
        losses = jaxent.sigmoid_cross_entropy(z, yes)
        total = jaxent.total_weight(yes, where=where, weights=weights)
        parts = jnp.sum(jnp.where(where, weights * losses, 0)) / total
        return parts, jaxent.mean(losses, where=where, weights=weights)

    z, weights = np.linspace([-3, 0.5], [3, 2], 15, axis=-1, dtype=F32).reshape(2, 5, 3)
    yes, where = z > 1, np.arange(15).reshape(5, 3) % 4 != 1
    assert total_weight(yes) == jaxent.total_weight(yes) == 15
    np.testing.assert_allclose(*run(z, yes, where, weights), rtol=1e-6)


@pytest.mark.parametrize("weights", [np.array([2, 0, 1]), np.array([True, False, True])], ids=["int", "bool"])
def test_weights_of_another_kind(weights):
    got = total_weight(jnp.asarray([0, 1, 2]), weights=weights)
    assert got.item() == weights.sum() and got.dtype == F32


def test_many_rows_are_counted_exactly():
    """Neither in float16 nor in bfloat16, whatever the weights are."""
    labels = jnp.zeros((70, 1001), jnp.int32)
    assert total_weight(labels) == 70_070
    for dtype in (jnp.float16, jnp.bfloat16):
        got = total_weight(labels, weights=jnp.ones((70, 1001), dtype))
        assert got == 70_070 and got.dtype == F32


@pytest.mark.usefixtures("x64")
def test_float64():
    weights = np.random.default_rng(0).uniform(size=40)
    got = jaxent.total_weight(jnp.zeros(40, int), weights=weights)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, weights.sum(), rtol=1e-15)


def test_no_rows_and_one_row():
    assert total_weight(jnp.zeros((0,), int)) == total_weight(jnp.zeros((3, 0), int)) == 0
    assert total_weight(jnp.asarray(3)) == 1
    assert total_weight(jnp.asarray(3), weights=jnp.asarray(0.5), class_weights=jnp.arange(5.0)) == 1.5
    assert total_weight(jnp.asarray([1, 2]), where=jnp.zeros(2, bool)) == 0


def test_weights_are_differentiated():
    """The total is linear in them; class weights are constants, as in the losses."""
    where, labels = jnp.asarray([True, False, True]), jnp.asarray([0, 1, 2])

    def total(weights, class_weights):
        return jaxent.total_weight(labels, where=where, weights=weights, class_weights=class_weights)

    of_rows, of_classes = compiled(jax.grad(total, (0, 1)))(jnp.ones(3), jnp.asarray([3.0, 5, 7]))
    assert of_rows.tolist() == [3, 0, 7] and of_classes.tolist() == [0, 0, 0]


def test_vmap():
    labels, where = jnp.asarray(LABELS), jnp.asarray(OPTIONS["where"])
    got = compiled(jax.vmap(lambda y, w: jaxent.total_weight(y, where=w)))(labels, where)
    assert got.tolist() == where.sum(-1).tolist()
    whole = jax.vmap(lambda y: jaxent.total_weight(y, batch_axis_name="rows"), axis_name="rows")
    assert compiled(whole)(labels).tolist() == [12] * 4


def test_classes_over_a_named_axis():
    """Each has its slice of the class weights; labels count over all classes."""
    arrays, rest = options_of("everything")
    labels = np.where(LABELS < 10, LABELS, 3)
    slices = np.split(arrays.pop("class_weights")[:10], 2)

    def total(class_weights):
        options = arrays | rest | {"class_axis_name": "classes", "class_weights": class_weights}
        return jaxent.total_weight(jnp.asarray(labels), **options)

    got = compiled(jax.vmap(total, axis_name="classes"))(jnp.stack(slices))
    want = expected(labels, **arrays, **rest, class_weights=np.concatenate(slices))
    np.testing.assert_allclose(got, [want, want], rtol=3e-7)


ERRORS = {
    "floats": (TypeError, "labels", {"labels": np.ones(3, F32)}),
    "a distribution": (TypeError, "labels", {"labels": np.ones((3, 11), F32)}),
    "complex labels": (TypeError, "labels", {"labels": np.ones(3) * 1j}),
    "a list": (TypeError, "labels", {"labels": [0, 1, 2]}),
    "no labels": (TypeError, "labels", {"labels": None}),
    "a mask of another shape": (ValueError, "where", {"where": np.ones(1, bool)}),
    "a mask of numbers": (TypeError, "where", {"where": np.ones(3)}),
    "weights of another shape": (ValueError, "weights", {"weights": np.ones((3, 1))}),
    "complex weights": (TypeError, "weights", {"weights": np.ones(3) * 1j}),
    "class weights of two axes": (ValueError, "class_weights", {"class_weights": np.ones((3, 11))}),
    "one class weight": (ValueError, "class_weights", {"class_weights": np.float32(2)}),
    "ignored half": (ValueError, "ignore_index", {"ignore_index": 0.5}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    kind, argument, changed = ERRORS[name]
    arguments = {"labels": np.array([0, 1, 2])} | changed
    with pytest.raises(kind, match=rf"^jaxent\.total_weight: `{argument}` must be"):
        jaxent.total_weight(arguments.pop("labels"), **arguments)
