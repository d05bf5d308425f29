"""Embedding tables `[V, D]` as kernels: the same as their transpose, and never transposed by the program.

tests/devices/test_kernel_layout.py has tables that are split, test_accelerators.py what is compiled for a TPU.
"""

import dataclasses
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import harness
import jaxent
from compiled import Program, matmul_operations
from harness import HLO
from jaxent._logits import sources
from jaxent._logits.plan import Plan
from layers import ADVANTAGE, F32, FLAT, assert_same, compiled, in_blocks, layer_of
from tables import spread

V = 11
LABELS = np.array([3, 10, 0, 9, 5, 1, 7], np.int32)
CLASSES = np.stack([LABELS, (LABELS + 4) % V], -1)
SPARSE = jaxent.SparseDistribution(CLASSES, np.full(CLASSES.shape, 0.4, F32))
FORCE = np.isin(np.arange(V), [6, 8], invert=True)  # none of those
OPTIONS = {
    "plain": {},
    "rows": {"where": np.arange(7) != 4, "weights": np.array([0.5, 1, 2, 1, 1, 0, 3], F32)},
    "numbers": {"label_smoothing": 0.25, "z_loss": 0.1, "temperature": 2.0},
    "class mask": {"class_mask": FORCE, "class_weights": np.linspace(0.5, 2, V, dtype=F32)},
    "class mask of rows": {"class_mask": np.broadcast_to(FORCE, (7, V)), "where": np.arange(7) != 4},
}
DENSE = jax.nn.softmax(np.where(FORCE, np.cos(np.arange(7.0 * V, dtype=F32)).reshape(7, V), -np.inf))


def own(logits, labels, **options):
    fn = lambda s, a: -a * s.log_prob - 0.1 * s.entropy * s.other_log_prob  # noqa: E731
    return jaxent.softmax_loss(fn, logits, labels, ADVANTAGE, classes=CLASSES, **options)


LOSSES = {  # of a layer, and what comes beside it
    "cross-entropy": (jaxent.softmax_cross_entropy, LABELS),
    "of a distribution": (jaxent.softmax_cross_entropy, DENSE),
    "focal": (jaxent.softmax_focal_loss, LABELS),
    "poly": (jaxent.softmax_poly_loss, LABELS),
    "entropy": (jaxent.softmax_entropy,),
    "KL": (jaxent.softmax_kl_divergence, layer_of(FLAT, features=3, seed=5)),
    "JS": (jaxent.softmax_js_divergence, layer_of(FLAT, features=3, seed=5)),
    "KL to a few classes": (jaxent.softmax_kl_divergence, SPARSE),
    "own": (own, LABELS),
}


def turned(tree):
    """The same layers with the other layout of their kernels."""
    is_layer = lambda x: isinstance(x, jaxent.LinearLogits)  # noqa: E731

    def turn(x):
        return dataclasses.replace(x, kernel=x.kernel.T, class_axis=-1 - x.class_axis) if is_layer(x) else x

    return jax.tree.map(turn, tree, is_leaf=is_layer)


def full_layer(**fields):
    """With all that a layer can have."""
    temperature = jnp.linspace(0.5, 2, 7, dtype=F32)
    return dataclasses.replace(layer_of(FLAT), **({"softcap": 3.0, "temperature": temperature} | fields))


def both(f, *arguments, tolerance=2e-6):
    """`f` of layers, and of the same layers turned: what it finds is turned as well."""
    want, got = compiled(lambda x: (f(*x), f(*turned(x))))(arguments)
    assert_same(turned(got), want, tolerance=tolerance)
    return got


@spread(8, "loss, option, source, reduction", LOSSES, OPTIONS, harness.LINEAR, ["none", "mean"])
def test_every_loss(loss, option, source, reduction):
    f, *beside = LOSSES[loss]
    taken = inspect.signature(jaxent.softmax_loss if f is own else f).parameters
    options = {name: x for name, x in OPTIONS[option].items() if name in taken}

    def total(layer, beside):
        losses = f(layer, *beside, **options, reduction=reduction)
        # The losses are compared, not their weighted sum: its terms cancel.
        return losses if reduction == "mean" else jnp.vdot(losses, ADVANTAGE), losses

    is_layer = isinstance(beside[0] if beside else None, jaxent.LinearLogits)
    with harness.blocks(source):
        gradients, _ = both(jax.grad(total, (0, 1) if is_layer else 0, has_aux=True), full_layer(), beside)
    of_layers = [gradients] if not is_layer else [gradients[0], *gradients[1]]
    assert all(x.kernel.shape[0] == V and x.class_axis == 0 for x in of_layers)


@in_blocks
def test_statistics(source):
    def statistics(layer):
        found = jaxent.softmax_statistics(layer, LABELS, classes=CLASSES, where=np.arange(7) != 4)
        return vars(found)

    with harness.blocks(source):
        found = both(statistics, full_layer())
    assert {"prediction", "rank", "class_log_probs", "other_log_prob"} <= set(found)


def test_layers_of_different_layouts():
    layer, target = layer_of(FLAT), layer_of(FLAT, features=3, seed=5)

    @compiled
    def run(layer, target):
        found = []
        for first, second in itertools.product([False, True], repeat=2):

            def f(layer, target, first=first, second=second):
                pair = turned(layer) if first else layer, turned(target) if second else target
                return jaxent.softmax_js_divergence(*pair, reduction="mean")

            found.append(jax.value_and_grad(f, (0, 1))(layer, target))
        return found

    with harness.blocks("rows"):
        want, *found = run(layer, target)
    for got in found:
        assert_same(got, want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@in_blocks
def test_half_precision(source, dtype):
    """The gradient comes in the dtype of the table."""
    layer = jax.tree.map(lambda x: x.astype(dtype), layer_of(FLAT))

    def f(layer):
        return jaxent.softmax_cross_entropy(layer, LABELS, reduction="mean")

    with harness.blocks(source):
        _, gradient = both(jax.value_and_grad(f), layer, tolerance=1e-2)
    assert gradient.kernel.dtype == dtype and gradient.kernel.shape == (V, 4)


@spread(
    2, "source, option, reduction", harness.LINEAR, ["class mask", "class mask of rows"], ["none", "mean"]
)
def test_a_class_mask_hides_what_a_table_holds(source, option, reduction):
    layer, mask = turned(layer_of(FLAT)), OPTIONS[option]["class_mask"]
    dirty, clean = (
        dataclasses.replace(layer, kernel=jnp.where(FORCE[:, None], layer.kernel, x)) for x in (jnp.nan, 0)
    )

    @compiled
    def run(layer):
        def f(layer):
            losses = jaxent.softmax_cross_entropy(layer, LABELS, class_mask=mask, reduction=reduction)
            return jnp.sum(losses)

        return jax.value_and_grad(f)(layer)

    with harness.blocks(source):
        got, want = run(dirty), run(clean)
    assert_same(got, want)
    assert (got[1].kernel[~FORCE] == 0).all()


@in_blocks
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_hessian_vector_products(source, reduction):
    def product(layer):
        def f(layer):
            losses = jaxent.softmax_cross_entropy(layer, LABELS, z_loss=0.1, reduction=reduction)
            return jnp.sum(losses * losses)

        # the same tangent of the same number, whichever way it lies
        tangent = jax.tree.map(lambda x: jnp.cos(3 * x), layer)
        return jax.jvp(jax.grad(f), (layer,), (tangent,))[1]

    with harness.blocks(source):
        both(product, full_layer(), tolerance=1e-5)


def test_many_tables():
    """A table each for some rows, by vmap."""
    layers = [full_layer(kernel=layer_of(FLAT, seed=i).kernel) for i in range(2)]

    def f(tables):
        layer = full_layer(class_axis=0)
        of_one = lambda x: jaxent.softmax_entropy(dataclasses.replace(layer, kernel=x)).sum()  # noqa: E731
        return jax.vmap(jax.value_and_grad(of_one))(tables)

    with harness.blocks("classes"):
        values, gradients = compiled(f)(jnp.stack([x.kernel.T for x in layers]))
        for i, layer in enumerate(layers):
            want = jax.value_and_grad(lambda x: jaxent.softmax_entropy(x).sum())(layer)
            assert_same((values[i], gradients[i].T), (want[0], want[1].kernel))


def test_what_a_layer_says_of_itself():
    layer = full_layer()
    table = turned(layer)
    assert table.shape == layer.shape and table.dtype == layer.dtype
    np.testing.assert_allclose(table.dense(), layer.dense(), rtol=1e-6, atol=1e-6)
    leaves, treedef = jax.tree.flatten(table)
    assert jax.tree.unflatten(treedef, leaves).class_axis == 0
    assert treedef != jax.tree.structure(layer)
    assert str(jaxent.diagnose(table, LABELS)) == str(jaxent.diagnose(layer, LABELS))


HIDDEN, KERNEL = np.zeros((4, 2), F32), np.zeros((2, 3), F32)
ERRORS = {
    "a kernel": (
        {"kernel": KERNEL, "class_axis": 0},
        "`logits.kernel` must be of shape [V, 2] (`hidden` is float32[4, 2]), but is float32[2, 3]. "
        "It looks transposed: pass `class_axis=-1`.",
    ),
    "a table": (
        {"kernel": KERNEL.T},
        "`logits.kernel` must be of shape [2, V] (`hidden` is float32[4, 2]), but is float32[3, 2]. "
        "It looks transposed: pass `class_axis=0`.",
    ),
    "another table": (
        {"kernel": np.zeros((3, 5), F32), "class_axis": 0},
        "`logits.kernel` must be of shape [V, 2] (`hidden` is float32[4, 2]), but is float32[3, 5]. "
        "It maps D features to V logits.",
    ),
    "a row of a table": (
        {"kernel": KERNEL[:, 0], "class_axis": 0},
        "`logits.kernel` must be of shape [V, 2] (`hidden` is float32[4, 2]), but is float32[2]. "
        "It maps D features to V logits.",
    ),
    "a bias": (
        {"kernel": KERNEL.T, "bias": np.zeros(2, F32), "class_axis": 0},
        "`logits.bias` must be of shape [3] (one per class), but is float32[2]. Nothing is broadcast.",
    ),
    "no classes": (
        {"kernel": KERNEL.T[:0], "class_axis": 0},
        "`logits` must be over at least one class, but is float32[4, 0]. There is no distribution over no classes.",
    ),
    "axis 1": (
        {"kernel": KERNEL, "class_axis": 1},
        "`logits.class_axis` must be -1 or 0, but is 1. -1 for `[D, V]`, 0 for an embedding table `[V, D]`.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    fields, message = ERRORS[name]
    with pytest.raises(ValueError) as error:
        jaxent.softmax_entropy(jaxent.LinearLogits(HIDDEN, **fields))
    assert str(error.value) == f"jaxent.softmax_entropy: {message}"


WIDE, FEATURES, ROWS = 1000, 48, 640
PLANS = {"one block": Plan(ROWS, WIDE), "rows": Plan(160, WIDE), "classes": Plan(ROWS, 200)}


# a CPU updates an array of bfloat16 in a loop by a copy of it, whichever way it lies (jax 0.10)
@pytest.mark.parametrize(
    ("plan", "dtype"),
    [*((plan, "float32") for plan in PLANS), ("one block", "bfloat16"), ("rows", "bfloat16")],
)
def test_nothing_is_transposed(plan, dtype, monkeypatch):
    """Value and gradients of the mean: three matmuls, or four; the table and its gradient stay as they lie."""
    monkeypatch.setattr(sources, "plan", lambda *_: PLANS[plan])

    def f(hidden, table):
        logits = jaxent.LinearLogits(hidden, table, class_axis=0)
        return jaxent.softmax_cross_entropy(logits, np.zeros(ROWS, np.int32), reduction="mean")

    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((ROWS, FEATURES), (WIDE, FEATURES))]
    program = jax.jit(jax.value_and_grad(f, (0, 1))).lower(*shapes).compile(HLO)
    matmul = 2 * ROWS * FEATURES * WIDE
    assert matmul_operations(program) == (4 if plan == "classes" else 3) * matmul
    moved = moves(program, (WIDE, FEATURES))
    assert not moved, moved


def moves(program, dims):
    """The instructions that copy or transpose as many numbers."""
    found = [step.instruction for step in Program(program).everything()]
    found = [x for x in found if x.kind in ("copy", "transpose", "copy-start")]
    return [x.text for x in found if any(sorted(shape.dims) == sorted(dims) for shape in x.shapes)]
