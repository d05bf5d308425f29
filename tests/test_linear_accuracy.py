"""Logits that are never built, in blocks of rows and of classes: as exact as an array of logits, and their layers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import harness
import jaxent
import oracle
import test_gradients
import test_values
from jaxent._logits import sources
from layers import F32, assert_same, compiled, in_blocks
from tables import combinations, some, spread, thinned

ROUNDING = {"float64": 1.1e-16, "float32": 6e-8, "bfloat16": 2.0**-9, "float16": 2.0**-12}


def check(case, dtype, source, quick=True):
    built, cotangent, wanted = test_gradients.wanted(case, dtype)
    want = test_values.LOSSES[case.loss](built.logits, built.labels, **built.options)
    options = built.options | {"dtype": dtype, "source": source, "quick": quick}
    got, gradients = harness.value_and_gradients(
        case.loss, built.logits, built.labels, cotangent=cotangent, **options
    )
    assert got.dtype == (np.float64 if dtype == "float64" else np.float32)
    harness.assert_within(got, want, test_values.allowed(case, dtype, want), "value:")
    # a sum has its gradients rounded before the one factor that comes last
    roundings = 2 if "reduction" in built.options else 1
    for g, w in zip(gradients, wanted, strict=True):
        assert g.dtype == cases.NUMPY_DTYPES[dtype]
        harness.assert_within(g, w, test_gradients.allowed(case, dtype, w, roundings), "gradient:")
        if case in cases.OPTIONS and dtype == "float32":
            assert (g[np.asarray(w) == 0] == 0).all()


ALL, ONCE = combinations(2, cases.CASES, harness.LINEAR)


@pytest.mark.parametrize(("case", "source"), some(ONCE[::3], ALL), ids=str)
def test_float32(case, source):
    check(case, "float32", source)


@pytest.mark.exhaustive
@spread(2, "case, source", cases.PLAIN + cases.CONFIDENT, harness.LINEAR)
def test_float32_as_a_user_compiles_it(case, source):
    check(case, "float32", source, quick=False)


@thinned(3, "case, dtype, source", cases.HALF, ["float64", "bfloat16", "float16"], harness.LINEAR)
def test_other_dtypes(case, dtype, source):
    check(case, dtype, source)


@thinned(2, "case, source", cases.STATISTICS, harness.LINEAR)
def test_statistics(case, source):
    test_values.check_statistics(case, "float32", source)


@in_blocks
def test_gradients_of_statistics(source):
    test_gradients.check_statistics("float32", source)


@in_blocks
def test_gradients_of_entropy(source):
    test_gradients.check_entropy("float32", source)


@pytest.mark.parametrize("name", test_values.MEASURES)
def test_divergences(name):
    test_values.check_divergences(name, "float32", "rows")
    test_gradients.check_divergences(name, "float32", "rows")


@in_blocks
def test_statistics_of_ties(source):
    """Of several largest logits the first; a rank counts strictly larger ones; no answer is the worst."""
    z = np.array([[1.0, 2.0, 4.0, 2.0, 4.0]] * 7)
    options = {"source": source, "quick": True}
    got = harness.value("softmax_statistics", z, np.array([0, 1, 2, 3, 4, -1, 5]), **options)
    assert got.rank.tolist() == [4, 2, 0, 2, 0, 5, 5]
    assert got.prediction.tolist() == [2] * 7
    assert np.isnan(got.log_prob).tolist() == [False] * 5 + [True] * 2
    got = harness.value("softmax_statistics", z, **options)
    assert got.log_prob is None and got.rank is None
    assert got.prediction.tolist() == [2] * 7


# Layers: what becomes of the logits' gradient, in hidden, kernel and bias.


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of a case, its numbers exact in the dtypes of its operands, and what it must give."""

    case: cases.Case
    hidden: str = "float32"
    kernel: str = "float32"
    softcap: float | None = None
    temperature: float = 1.0

    def __str__(self):
        return self.case.name

    @property
    def dtype(self):
        return "float64" if "float64" in (self.hidden, self.kernel) else "float32"

    def operands(self):
        built = self.case.linear(8)
        dtypes = (self.hidden, self.kernel, self.kernel)
        return [
            x.astype(cases.NUMPY_DTYPES[dtype]).astype(np.longdouble)
            for x, dtype in zip(built[:3], dtypes, strict=True)
        ]

    def want(self, cotangent, labels, options):
        """(largest logit, loss, gradients of hidden, kernel and bias)."""
        hidden, kernel, bias = self.operands()
        z, slope = hidden @ kernel + bias, 1 / self.temperature
        if self.softcap is not None:
            capped = np.tanh(z / self.softcap)
            z, slope = self.softcap * capped, slope * (1 - capped**2)
        z = z / self.temperature
        dz = oracle.softmax_cross_entropy(z, labels, cotangent=cotangent, **options).logits * slope
        flat_dz, flat_hidden = (x.reshape(-1, x.shape[-1]) for x in (dz, hidden))
        gradients = [dz @ kernel.T, flat_hidden.T @ flat_dz, flat_dz.sum(0)]
        return np.abs(z).max(), oracle.softmax_cross_entropy(z, labels, **options), gradients


def layer_case(name, rows, classes, reduction="none", masks=(), **options):
    return cases.Case(name, rows, classes, masks=masks, options=(("reduction", reduction),), **options)


LAYERS = (
    Layer(layer_case("one result per row", (37,), 53, masks=("where", "weights"))),
    Layer(layer_case("mean", (37,), 1000, "mean", masks=("where", "weights"))),
    Layer(layer_case("sum", (37,), 53, "sum", masks=("class_weights",))),
    Layer(layer_case("softcap and temperature", (37,), 53), softcap=5.0, temperature=0.7),
    Layer(layer_case("mean, softcap and temperature", (36,), 53, "mean"), softcap=2.0, temperature=2.0),
    Layer(layer_case("tiny", (37,), 53, "mean", scale=1e-3)),
    Layer(layer_case("large", (37,), 1000, scale=30.0)),
    Layer(layer_case("two rows", (2,), 53, "mean")),
    Layer(layer_case("one row", (1,), 53, "mean")),
    Layer(layer_case("leading axes", (3, 5), 53, "mean", masks=("where",)), softcap=5.0),
    Layer(layer_case("leading axes, one result per row", (3, 5), 53)),
    Layer(layer_case("a single row", (), 53)),
    Layer(layer_case("a single row, mean", (), 2, "mean")),
    Layer(layer_case("bfloat16", (37,), 53), "bfloat16", "bfloat16"),
    Layer(layer_case("bfloat16, mean", (37,), 1000, "mean"), "bfloat16", "bfloat16", softcap=20.0),
    Layer(layer_case("bfloat16 hidden", (37,), 53), "bfloat16", "float32"),
    Layer(layer_case("bfloat16 hidden, mean", (37,), 53, "mean"), "bfloat16", "float32"),
    Layer(layer_case("float16, mean", (37,), 53, "mean"), "float16", "float16"),
    Layer(layer_case("float64", (37,), 53, "mean", masks=("where",)), "float64", "float64", temperature=2.0),
)


@thinned(2, "layer, source", LAYERS, harness.LINEAR)
def test_layers(layer, source):
    built = layer.case.linear(8)
    reduced = layer.case.options != (("reduction", "none"),)
    cotangent = harness.cotangent_of(() if reduced else layer.case.rows)
    largest, want, wanted = layer.want(cotangent, built.labels, built.options)
    arrays, rest = harness.split(built.options)

    @compiled
    def run(operands, labels, arrays, cotangent):
        def f(*operands):
            logits = jaxent.LinearLogits(*operands, softcap=layer.softcap, temperature=layer.temperature)
            return jaxent.softmax_cross_entropy(logits, labels, **arrays, **rest)

        loss, vjp = jax.vjp(f, *operands)
        return loss, vjp(cotangent.astype(loss.dtype))

    dtypes = (layer.hidden, layer.kernel, layer.kernel)
    with jax.enable_x64(layer.dtype == "float64"), harness.blocks(source):
        operands = [
            harness.cast(x.astype(np.float64), dtype)
            for x, dtype in zip(layer.operands(), dtypes, strict=True)
        ]
        arrays = harness.weights_in(arrays, layer.dtype)
        loss, gradients = run(operands, built.labels, arrays, harness.cast(cotangent, "float32"))
    eps = ROUNDING[layer.dtype]
    assert loss.dtype == layer.dtype
    harness.assert_within(
        loss, want, min(8 * eps * (1 + largest), 1e-5) * np.maximum(np.abs(want), 1), "loss:"
    )
    both_half = layer.hidden == layer.kernel == "bfloat16"
    for name, g, w, dtype in zip(("hidden", "kernel", "bias"), gradients, wanted, dtypes, strict=True):
        assert g.dtype == dtype
        error = np.linalg.norm((np.asarray(g, np.longdouble) - w).astype(np.float64).ravel())
        rounding = 3e-3 if both_half else 8 * eps + (ROUNDING[dtype] if dtype != layer.dtype else 0)
        # a probability is as wrong as its logit is
        allowed = (rounding + eps * largest) * np.linalg.norm(w.astype(np.float64).ravel())
        assert error <= allowed, (name, error / allowed)


@pytest.mark.parametrize("rows", [(0,), (3, 0)])
def test_no_rows(rows):
    layer = jaxent.LinearLogits(jnp.zeros((*rows, 4)), jnp.ones((4, 5)), jnp.ones(5))
    labels = jnp.zeros(rows, jnp.int32)

    @compiled
    def run(layer):
        def f(layer):
            options = {"reduction": "mean"}
            return (
                jaxent.softmax_cross_entropy(layer, labels, **options)
                + jaxent.softmax_cross_entropy(layer, labels).sum()
                + jaxent.softmax_kl_divergence(layer, layer, **options)
            )

        return jax.value_and_grad(f)(layer), jaxent.softmax_statistics(layer, labels)

    (loss, gradient), statistics = run(layer)
    assert loss == 0 and loss.dtype == F32
    assert list(map(jnp.shape, jax.tree.leaves(gradient))) == list(map(jnp.shape, jax.tree.leaves(layer)))
    assert all(jnp.all(x == 0) for x in jax.tree.leaves(gradient))
    assert all(x.shape == rows for x in jax.tree.leaves(statistics))


@pytest.mark.parametrize("rows, features, classes, by_rows", [(500, 16, 32, True), (8, 64, 3000, False)])
def test_the_plan_that_is_made(rows, features, classes, by_rows):
    rng = np.random.default_rng(rows)
    hidden, kernel = (jnp.asarray(rng.normal(size=s), F32) for s in ((rows, features), (features, classes)))
    layer = jaxent.LinearLogits(hidden / 8, kernel, block_bytes=2**15)
    best = sources.cut(layer, False).by_rows
    assert best is not None and best.rows < rows if by_rows else best is None
    labels = jnp.asarray(rng.integers(classes, size=rows))
    f = compiled(jax.value_and_grad(functools.partial(jaxent.softmax_cross_entropy, reduction="mean")))
    whole = dataclasses.replace(layer, block_bytes=2**30)
    assert_same(*(jax.tree.leaves(f(x, labels)) for x in (layer, whole)))
    dense = compiled(lambda x: jaxent.softmax_cross_entropy(x.dense(), labels, reduction="mean"))
    assert_same(f(layer, labels)[0], dense(layer))
