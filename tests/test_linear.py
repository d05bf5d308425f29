"""Logits that are never built: what holds for an array of logits holds in blocks of rows and of classes."""

import dataclasses
import functools
import inspect

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

F32 = np.float32
ROUNDING = {"float64": 1.1e-16, "float32": 6e-8, "bfloat16": 2.0**-9, "float16": 2.0**-12}
compiled = functools.partial(jax.jit, compiler_options=harness.QUICK)
in_blocks = pytest.mark.parametrize("source", harness.LINEAR)


# The table of cases.


def check(case, dtype, source):
    built, cotangent, wanted = test_gradients.wanted(case, dtype)
    want = test_values.LOSSES[case.loss](built.logits, built.labels, **built.options)
    options = built.options | {
        "dtype": dtype,
        "source": source,
        "quick": dtype != "float32" or case in cases.OPTIONS,
    }
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


@in_blocks
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_float32(case, source):
    check(case, "float32", source)


@in_blocks
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("case", cases.HALF, ids=str)
def test_other_dtypes(case, dtype, source):
    check(case, dtype, source)


@in_blocks
@pytest.mark.parametrize("case", cases.STATISTICS, ids=str)
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


@in_blocks
@pytest.mark.parametrize("layer", LAYERS, ids=str)
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
    size = sources.cut(layer, False).size
    assert size is not None and size < rows if by_rows else size is None
    labels = jnp.asarray(rng.integers(classes, size=rows))
    f = compiled(jax.value_and_grad(functools.partial(jaxent.softmax_cross_entropy, reduction="mean")))
    whole = dataclasses.replace(layer, block_bytes=2**30)
    assert_same(*(jax.tree.leaves(f(x, labels)) for x in (layer, whole)))
    dense = compiled(lambda x: jaxent.softmax_cross_entropy(x.dense(), labels, reduction="mean"))
    assert_same(f(layer, labels)[0], dense(layer))


# Beside a dense source. Its gradients go through jax's own product; norms differ by a few roundings.


def assert_same(got, want, what="", tolerance=2e-6):
    assert jax.tree.structure(got) == jax.tree.structure(want), what
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g), np.asarray(w)
        assert g.shape == w.shape and g.dtype == w.dtype, what
        g, w = g.astype(np.float64), w.astype(np.float64)
        assert np.isfinite(w).all(), what
        assert np.linalg.norm((g - w).ravel()) <= tolerance * np.linalg.norm(w.ravel()), (what, g, w)


def layer_of(rows, features=4, classes=11, seed=0):
    rng = np.random.default_rng([seed, *rows])
    operands = (rng.normal(size=s) for s in ((*rows, features), (features, classes), (classes,)))
    return jaxent.LinearLogits(*(jnp.asarray(x, F32) for x in operands))


FLAT, SEQUENCES = (7,), (4, 3)
RNG = np.random.default_rng(0)
ADVANTAGE = jnp.asarray(RNG.normal(size=FLAT), F32)
OLD = jnp.asarray(RNG.normal(size=FLAT) - 2, F32)
WIDE = jnp.asarray(RNG.normal(size=(*FLAT, 3)), F32)
FLAGS = jnp.asarray([1, 0, 2, 1, 1, 0, 3])


def clipped(s, advantage, old):
    ratio = jnp.exp(s.log_prob - old)
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage) - 0.1 * s.entropy


# name: (shape of rows, what is differentiated beside the layer, loss of a layer, labels and that)
FUNCTIONS = {
    "no arguments": (FLAT, (), lambda loss: loss(lambda s: s.entropy - s.log_prob)),
    "row arguments": (FLAT, (ADVANTAGE, OLD), lambda loss, a, old: loss(clipped, a, old)),
    "wide row arguments": (
        FLAT, (WIDE,), lambda loss, x: loss(lambda s, x: s.log_prob * x.sum(-1) + x[:, 0] * s.entropy, x),
    ),
    "a pytree of row arguments": (
        FLAT, ({"a": ADVANTAGE, "b": [OLD]},),
        lambda loss, tree: loss(lambda s, t: s.log_prob * t["a"] + t["b"][0] * s.log_normalizer, tree),
    ),
    "integer row arguments": (
        FLAT, (), lambda loss: loss(lambda s, k: jnp.where(k > 0, -k * s.log_prob, s.entropy), FLAGS),
    ),
    "keys as row arguments": (
        FLAT, (),
        lambda loss: loss(
            lambda s, key: s.log_prob * jax.vmap(jax.random.uniform)(key),
            jax.random.split(jax.random.key(0), FLAT[0]),
        ),
    ),
    "an argument without rows": (
        FLAT, (jnp.asarray([0.5, -2.0]),), lambda loss, x: loss(lambda s, x: x[0] * s.log_prob + x[1], x),
    ),
    "closes over a number": (FLAT, (jnp.asarray(0.3),), lambda loss, x: loss(lambda s: x * s.log_prob)),
    "closes over an array": (
        FLAT, (WIDE[:2],), lambda loss, x: loss(lambda s: s.log_prob * x.sum() + jnp.exp(x[1, 2]) * s.entropy),
    ),
    "closes over a value per row": (FLAT, (ADVANTAGE,), lambda loss, a: loss(lambda s: a * s.log_prob)),
    "closes over a constant per row": (FLAT, (), lambda loss: loss(lambda s: ADVANTAGE * s.log_prob)),
    "normalizes over rows": (
        FLAT, (ADVANTAGE,),
        lambda loss, a: loss(lambda s, a: (a - a.mean()) / a.std() * s.log_prob, a),
    ),
    "normalizes statistics over rows": (FLAT, (), lambda loss: loss(lambda s: jax.nn.softmax(s.log_prob) ** 2)),
    "counts the rows": (FLAT, (), lambda loss: loss(lambda s: s.log_prob / len(s.log_prob))),
    "numbers the rows": (FLAT, (), lambda loss: loss(lambda s: s.log_prob * jnp.arange(s.log_prob.size))),
    "noise of the shape of rows": (
        FLAT, (),
        lambda loss: loss(lambda s: s.log_prob * jax.random.normal(jax.random.key(1), s.log_prob.shape)),
    ),
    "the row before": (FLAT, (), lambda loss: loss(lambda s: s.log_prob * jnp.roll(s.entropy, 1))),
    "a running sum": (FLAT, (), lambda loss: loss(lambda s: jnp.cumsum(s.log_prob) ** 2)),
    "sorted": (FLAT, (), lambda loss: loss(lambda s: jnp.sort(s.log_prob) * jnp.arange(FLAT[0]))),
    "reshapes": (
        SEQUENCES, (), lambda loss: loss(lambda s: (s.log_prob.reshape(-1) ** 2).reshape(s.log_prob.shape)),
    ),
    "transposes": (SEQUENCES, (), lambda loss: loss(lambda s: (s.log_prob.T * jnp.arange(4.0)).T)),
    "sequences": (
        SEQUENCES, (),
        lambda loss: loss(lambda s: jnp.exp(s.log_prob.sum(-1, keepdims=True) / 5) + 0 * s.log_prob),
    ),
    "knows the shape": (
        SEQUENCES, (), lambda loss: loss(lambda s: s.log_prob.reshape(SEQUENCES) * jnp.ones(SEQUENCES)),
    ),
    "jitted": (FLAT, (ADVANTAGE,), lambda loss, a: loss(jax.jit(lambda s, a: s.log_prob * a), a)),
    "vmapped": (FLAT, (ADVANTAGE,), lambda loss, a: loss(jax.vmap(lambda s, a: s.log_prob * a), a)),
    "a loop": (
        FLAT, (),
        lambda loss: loss(lambda s: jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x) * s.entropy, s.log_prob)),
    ),
    "a prediction": (FLAT, (), lambda loss: loss(lambda s: jnp.where(s.rank < 2, s.log_prob, s.prediction))),
    "no statistics": (FLAT, (ADVANTAGE,), lambda loss, a: loss(lambda s, a: a**2, a)),
    "wrong rows behind a mask": (
        FLAT, (ADVANTAGE,), lambda loss, a: loss(lambda s, a: s.log_prob * jnp.log(a - 9 * (FLAGS == 0)), a + 5),
    ),
}  # fmt: skip


def with_gradients(name, source):
    """The objective of a layer, and its gradients."""
    rows, moving, objective = FUNCTIONS[name]
    labels = jnp.asarray(np.random.default_rng(1).integers(11, size=rows))
    # a row of FLAGS == 0 is one that does not count
    where = jnp.asarray(np.random.default_rng(2).uniform(size=rows) < 0.7) if rows == SEQUENCES else FLAGS > 0

    @compiled
    def run(layer, moving, where):
        def f(layer, moving):
            logits = layer.dense() if source == "dense" else layer

            def loss(fn, *args):
                return jaxent.softmax_loss(fn, logits, labels, *args, where=where)

            return objective(loss, *moving)

        return jax.value_and_grad(f, (0, 1))(layer, moving)

    with harness.blocks(source):
        return run(layer_of(rows), moving, where)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_users_function(name):
    want = with_gradients(name, "dense")
    assert_same(with_gradients(name, "rows"), want)
    if name in ("row arguments", "closes over a value per row", "a prediction"):
        assert_same(with_gradients(name, "classes"), want)


@in_blocks
def test_a_function_of_the_wrong_shape(source):
    layer, labels = layer_of(FLAT), jnp.zeros(FLAT, int)
    for fn in (lambda s: s.entropy.mean(), lambda s: s.entropy[:, None], lambda s: (s.entropy,)):
        messages = []
        for logits in (layer, layer.dense()):
            with harness.blocks(source), pytest.raises(ValueError, match=r"`fn` must be") as error:
                jaxent.softmax_loss(fn, logits, labels)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


@in_blocks
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradients_of_everything_beside_the_layer(source, reduction):
    q = jax.nn.softmax(layer_of(FLAT, seed=3).dense())

    @functools.partial(compiled, static_argnums=0)
    def run(dense, layer, q, weights):
        def f(layer, q, weights):
            logits = layer.dense() if dense else layer
            options = {"weights": weights, "reduction": reduction, "label_smoothing": 0.1}
            return (jaxent.softmax_cross_entropy(logits, q, **options) * jnp.float32(1.5)).sum()

        return jax.value_and_grad(f, (0, 1, 2))(layer, q, weights)

    with harness.blocks(source):
        assert_same(*(run(dense, layer_of(FLAT), q, ADVANTAGE**2) for dense in (False, True)))


@in_blocks
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_forward_mode(source, reduction):
    """Of a sum in blocks of rows; where the backward has a loop over blocks to transpose, it is refused."""
    layer, dots, labels = layer_of(FLAT), layer_of(FLAT, seed=1), jnp.arange(7)

    @functools.partial(compiled, static_argnums=0)
    def run(dense, layer, dots):
        def loss(layer):
            logits = layer.dense() if dense else layer
            return jaxent.softmax_cross_entropy(logits, labels, reduction=reduction)

        return jax.jvp(loss, (layer,), (dots,))

    with harness.blocks(source):
        if reduction == "none" or source == "classes":
            with pytest.raises(TypeError, match="forward-mode"):
                run(False, layer, dots)
        else:
            assert_same(run(False, layer, dots), run(True, layer, dots))


# Every option of every function.

VALUES = {
    "labels": np.array([3, 10, 0, 99, 5, 1, 7], np.int32),
    "target_logits": layer_of(FLAT, seed=5),
    "fn": lambda s, *args: sum(args, -s.log_prob),
    "row_args": (ADVANTAGE,),
    "axis": 1,
    "where": np.arange(7) != 4,
    "ignore_index": 99,
    "weights": np.array([0.5, 1, 2, 1, 1, 0, 3], F32),
    "class_weights": np.linspace(0, 2, 11, dtype=F32)[::-1],
    "class_mask": np.arange(11) != 8,
    "label_smoothing": 0.25,
    "z_loss": 0.125,
    "gamma": 1.5,
    "epsilon": 0.5,
    "temperature": 2.0,
    "names": ("rank", "log_prob"),
    "reduction": ("none", "sum", "mean"),
    "class_axis_name": "one",
    "batch_axis_name": "one",
}
AXES = {"class_axis_name", "batch_axis_name"}
TAKES_LOGITS = [
    name
    for name, f in vars(jaxent).items()
    if inspect.isfunction(f) and "logits" in inspect.signature(f).parameters and "sigmoid" not in name
]


def test_the_functions_that_take_logits():
    softmax = {name for name in vars(jaxent) if name.startswith("softmax_")}
    assert softmax == set(TAKES_LOGITS) - {"diagnose"}


@in_blocks
@pytest.mark.parametrize("mapped", [False, True])  # over an axis of one device; of many: devices/
@pytest.mark.parametrize("name", [name for name in TAKES_LOGITS if name != "diagnose"])
def test_every_option(name, mapped, source):
    f = getattr(jaxent, name)
    parameters = inspect.signature(f).parameters.values()
    values = {p.name: VALUES[p.name] for p in parameters if p.name != "logits"}
    assert not any(p.name in values and p.default is values[p.name] for p in parameters)
    if "ignore_index" not in values:
        values |= {"labels": np.clip(VALUES["labels"], 0, 10)} if "labels" in values else {}
    reductions = values.pop("reduction", [None])
    if not mapped:
        values = {key: value for key, value in values.items() if key not in AXES}
    if source == "rows":  # a mask per row is another program than a mask for all
        values["class_mask"] = np.broadcast_to(values["class_mask"], (7, 11))

    @functools.partial(compiled, static_argnums=0)
    def run(dense, layer):
        def call(values):
            def of(p):
                x = layer if p.name == "logits" else values.pop(p.name)
                return x.dense() if dense and isinstance(x, jaxent.LinearLogits) else x

            positional = [of(p) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
            rest = [x for p in parameters if p.kind is p.VAR_POSITIONAL for x in of(p)]
            return f(*positional, *rest, **values)

        each = [values | ({} if r is None else {"reduction": r}) for r in reductions]
        if mapped:
            return [jax.vmap(lambda _, v=v: call(dict(v)), axis_name="one")(jnp.zeros(1)) for v in each]
        return [call(v) for v in each]

    with harness.blocks(source):
        for got, want in zip(run(False, layer_of(FLAT)), run(True, layer_of(FLAT)), strict=True):
            assert_same(got, want)


def test_divergences_of_a_layer_and_an_array():
    layer, other = layer_of(FLAT), layer_of(FLAT, seed=5)

    @compiled
    def run(layer, other):
        def f(layer, other, first, second):
            pair = (layer.dense() if first else layer), (other.dense() if second else other)
            found = [
                f(*pair, where=FLAGS > 0)
                for f in (jaxent.softmax_kl_divergence, jaxent.softmax_js_divergence)
            ]
            return jnp.vdot(found[0], ADVANTAGE) + jnp.vdot(found[1], OLD)

        sides = [(True, True), (False, False), (True, False), (False, True)]
        return [jax.value_and_grad(f, (0, 1))(layer, other, *side) for side in sides]

    with harness.blocks("rows"):
        want, *found = run(layer, other)
    for got in found:
        assert_same(got, want)


def test_the_doctor_builds_a_layer():
    layer, labels = layer_of(FLAT), jnp.arange(7)
    assert str(jaxent.diagnose(layer, labels)) == str(jaxent.diagnose(layer.dense(), labels))


# Rows that do not count, rows that have no answer.

BAD = np.array([1, 4, 6])
NAN, INF = np.nan, np.inf


def hostile():
    """A layer whose bad rows hold NaN, infinities and the largest number, and one where they hold 0."""
    layer = layer_of(FLAT)
    clean = layer.hidden.at[BAD].set(0)
    dirty = clean.at[BAD].set(jnp.asarray([[NAN] * 4, [INF, -INF, 0, 1], [3e38] * 4]))
    return tuple(dataclasses.replace(layer, hidden=x) for x in (dirty, clean))


def to_second_order(loss):
    """loss(layer, arrays) -> its value and gradients, and how these change along some tangent."""

    def run(layer, dots, arrays):
        f = jax.value_and_grad(lambda layer: loss(layer, arrays))
        return jax.jvp(f, (layer,), (dots,))

    return compiled(run)


def assert_gone(run, arrays):
    """What bad rows hold changes nothing, not one bit of it; theirs is 0."""
    dirty, clean = hostile()
    got, want = (run(layer, layer_of(FLAT, seed=9), arrays) for layer in (dirty, clean))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(g, w)
        assert np.isfinite(g).all()
    (_, gradient), (_, change) = got
    for x in (gradient, change):
        assert (x.hidden[BAD] == 0).all() and (x.hidden[np.delete(np.arange(7), BAD)] != 0).all()
        assert all(jnp.any(y != 0) for y in (x.kernel, x.bias))


@in_blocks
@pytest.mark.parametrize("hide", ["where", "weights", "ignore_index", "class_weights"])
def test_masked_means_gone(hide, source):
    labels = np.array([1, 77, 0, 4, -5, 10, 2**31 - 1], np.int32)
    bad = np.isin(np.arange(7), BAD)
    options, arrays = {"reduction": "mean" if hide in ("where", "class_weights") else "none"}, {}
    if hide == "where":
        arrays["where"] = jnp.asarray(~bad)
    elif hide == "weights":
        arrays["weights"] = jnp.where(bad, 0.0, 2.0)
    elif hide == "ignore_index":
        labels = np.where(bad, cases.IGNORED, labels)
        options["ignore_index"] = cases.IGNORED
    else:
        labels = np.where(bad, 2, labels)
        options["class_weights"] = np.where(np.arange(11) == 2, 0, 1)
    labels = jnp.asarray(labels)

    def loss(layer, arrays):
        losses = jaxent.softmax_cross_entropy(layer, labels, z_loss=0.1, **options, **arrays)
        return losses if options["reduction"] == "mean" else jnp.vdot(losses, ADVANTAGE)

    with harness.blocks(source):
        run = to_second_order(loss)
        assert_gone(run, arrays)
        if arrays:  # nothing counts
            zeros = jax.tree.map(jnp.zeros_like, arrays)
            found = run(hostile()[0], layer_of(FLAT, seed=9), zeros)
            assert all((x == 0).all() for x in jax.tree.leaves(found))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name", test_values.MEASURES)
def test_masked_means_gone_in_divergences(name, reduction):
    def loss(layer, where):
        target = dataclasses.replace(layer, kernel=-layer.kernel, bias=None)
        losses = getattr(jaxent, name)(layer, target, where=where, reduction=reduction)
        return jnp.sum(losses * 1.5)

    where = jnp.asarray(~np.isin(np.arange(7), BAD))
    with harness.blocks("rows"):
        run = to_second_order(loss)
        assert_gone(run, where)
        found = run(hostile()[0], layer_of(FLAT, seed=9), where & False)
        assert all((x == 0).all() for x in jax.tree.leaves(found))


@in_blocks
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_rows_are_poisoned_alone(reduction, source):
    labels = jnp.asarray([0, 11, 3, -1, 5, 2**31 - 1, 1])
    layer = layer_of(FLAT)
    hidden = layer.hidden.at[4, 2].set(NAN).at[6, 0].set(INF)
    bad = [1, 3, 4, 5, 6]

    @compiled
    def run(layer):
        def f(layer):
            losses = jaxent.softmax_cross_entropy(layer, labels, reduction=reduction)
            return losses.sum(), losses

        return jax.value_and_grad(f, has_aux=True)(layer)

    with harness.blocks(source):
        (_, losses), gradient = run(dataclasses.replace(layer, hidden=hidden))
    assert np.flatnonzero(np.isnan(losses)).tolist() == (bad if reduction == "none" else [0])
    assert np.flatnonzero(np.isnan(gradient.hidden).all(-1)).tolist() == bad
    assert np.isfinite(np.delete(gradient.hidden, bad, 0)).all()


# What a layer may not be, word for word.

HIDDEN, KERNEL = np.zeros((4, 2), F32), np.zeros((2, 3), F32)
COMPILED_IN = "It is part of the compiled program; multiply `hidden` by what is learned."
FLOATING = "Pass `x.astype(jnp.float32)`."
FORMS = "class indices (integers) of shape [4] or a distribution (floats) of shape [4, 3]"
ERRORS = {
    "kernel transposed": (
        {"kernel": KERNEL.T}, ValueError,
        "`logits.kernel` must be of shape [2, V] (`hidden` is float32[4, 2]), but is float32[3, 2]. "
        "It looks transposed: pass `kernel.T`.",
    ),
    "another kernel": (
        {"kernel": np.zeros((5, 3), F32)}, ValueError,
        "`logits.kernel` must be of shape [2, V] (`hidden` is float32[4, 2]), but is float32[5, 3]. "
        "It maps D features to V logits.",
    ),
    "kernel [D]": (
        {"kernel": KERNEL[:, 0]}, ValueError,
        "`logits.kernel` must be of shape [2, V] (`hidden` is float32[4, 2]), but is float32[2]. "
        "It maps D features to V logits.",
    ),
    "no classes": (
        {"kernel": KERNEL[:, :0]}, ValueError,
        "`logits` must be over at least one class, but is float32[4, 0]. There is no distribution over no classes.",
    ),
    "a scalar hidden": (
        {"hidden": F32(1)}, ValueError,
        "`logits.hidden` must be of shape [..., D], but is float32[]. A single row of D features has shape [D].",
    ),
    "integer hidden": (
        {"hidden": HIDDEN.astype(np.int32)}, TypeError,
        f"`logits.hidden` must be a floating point array, but is int32[4, 2]. {FLOATING}",
    ),
    "integer kernel": (
        {"kernel": KERNEL.astype(np.int32)}, TypeError,
        f"`logits.kernel` must be a floating point array, but is int32[2, 3]. {FLOATING}",
    ),
    "integer bias": (
        {"bias": np.zeros(3, np.int32)}, TypeError,
        f"`logits.bias` must be a floating point array, but is int32[3]. {FLOATING}",
    ),
    "bias [1]": (
        {"bias": np.zeros(1, F32)}, ValueError,
        "`logits.bias` must be of shape [3] (one per class), but is float32[1]. Nothing is broadcast.",
    ),
    "temperature 0": (
        {"temperature": 0}, ValueError, f"`logits.temperature` must be positive, but is 0. {COMPILED_IN}",
    ),
    "negative temperature": (
        {"temperature": -1.0}, ValueError,
        f"`logits.temperature` must be a finite number >= 0, but is -1.0. {COMPILED_IN}",
    ),
    "an array as temperature": (
        {"temperature": np.ones(())}, TypeError,
        f"`logits.temperature` must be a Python number, but is a ndarray. {COMPILED_IN}",
    ),
    "softcap 0": (
        {"softcap": 0.0}, ValueError, f"`logits.softcap` must be positive, but is 0.0. {COMPILED_IN}",
    ),
    "block_bytes 0": (
        {"block_bytes": 0}, ValueError, f"`logits.block_bytes` must be positive, but is 0. {COMPILED_IN}",
    ),
    "axis 0": (
        {"axis": 0}, ValueError,
        "`axis` must be the last axis, but is 0. The classes of a LinearLogits are the columns of its kernel.",
    ),
    "labels [N + 1]": (
        {"labels": np.zeros(5, np.int32)}, ValueError,
        f"`labels` must be {FORMS}, but is int32[5]. "
        "jaxent never broadcasts labels: one index per row of logits, e.g. `labels.squeeze(-1)`.",
    ),
    "labels [N, 1]": (
        {"labels": np.zeros((4, 1), np.int32)}, ValueError,
        f"`labels` must be {FORMS}, but is int32[4, 1]. "
        "jaxent never broadcasts labels: one index per row of logits, e.g. `labels.squeeze(-1)`.",
    ),
    "a label that is V": (
        {"labels": np.array([0, 3, 1, 2])}, ValueError,
        "`labels` must be in [0, 3), but is 3 at index [1]. "
        "Labels count from 0; hide a row with `where=` or `ignore_index=`.",
    ),
    "where [N, 1]": (
        {"where": np.ones((4, 1), bool)}, ValueError,
        "`where` must be of shape [4] (one per row of `logits`), but is bool[4, 1]. "
        "A mask is never broadcast: use `jnp.broadcast_to(where, rows)` if you mean it.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    given, kind, message = ERRORS[name]
    fields = {field.name for field in dataclasses.fields(jaxent.LinearLogits)}
    operands = {"hidden": HIDDEN, "kernel": KERNEL} | {k: x for k, x in given.items() if k in fields}
    options = {"labels": np.zeros(4, np.int32)} | {k: x for k, x in given.items() if k not in fields}
    with pytest.raises(kind) as error:
        jaxent.softmax_cross_entropy(jaxent.LinearLogits(**operands), **options)
    assert str(error.value) == f"jaxent.softmax_cross_entropy: {message}"


def test_a_traced_temperature():
    def f(temperature):
        logits = jaxent.LinearLogits(HIDDEN, KERNEL, temperature=temperature)
        return jaxent.softmax_cross_entropy(logits, np.zeros(4, np.int32))

    with pytest.raises(
        TypeError, match=r"`logits.temperature` must be a Python number, but is a .*Tracer\. It is"
    ):
        jax.jit(f)(2.0)


def test_errors_of_target_logits():
    layer = jaxent.LinearLogits(HIDDEN, KERNEL)
    for target, message in (
        (
            jaxent.LinearLogits(HIDDEN, KERNEL.T),
            "`target_logits.kernel` must be of shape [2, V] (`hidden` is float32[4, 2]), but is float32[3, 2]. "
            "It looks transposed: pass `kernel.T`.",
        ),
        (
            jaxent.LinearLogits(HIDDEN, KERNEL[:, :2]),
            "`target_logits` must be of shape [4, 3] (that of `logits`), but is float32[4, 2]. "
            "Logits are never broadcast: use `jnp.broadcast_to` if you mean it.",
        ),
    ):
        with pytest.raises(ValueError) as error:
            jaxent.softmax_kl_divergence(layer, target)
        assert str(error.value) == f"jaxent.softmax_kl_divergence: {message}"


def test_a_sigmoid_loss_takes_arrays_only():
    with pytest.raises(TypeError, match=r"`logits` must be an array, but is a LinearLogits"):
        jaxent.sigmoid_cross_entropy(jaxent.LinearLogits(HIDDEN, KERNEL), np.zeros((4, 3), F32))
