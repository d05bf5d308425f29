"""`jaxent.diagnose`: each finding on arrays with the mistake, silence on healthy ones like them."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxent
from jaxent._diagnose import _CHECKS, _LOSSES

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(8, 3)).astype(np.float32)
LABELS = np.array([0, 1, 2, 0, 1, 2, 2, 1])
PAIRS = RNG.normal(size=(6, 2)).astype(np.float32)
ONE_HOT = np.eye(3, dtype=np.float32)[LABELS]
SATURATED = np.array([[0, 200, 0], [200, 0, 0]], np.float32)
MULTI_LABEL = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0]], np.float32)
ANSWERS = np.array([0, 1, 1, 0, 1, 0, 0, 1])
COUNTS = np.array([[2, 1, 0], [0, 3, 1]], np.float32)

SOFTMAX, SIGMOID = "softmax_cross_entropy", "sigmoid_cross_entropy"
CATEGORICAL, BINARY, NLL = "categorical_cross_entropy", "binary_cross_entropy", "nll_loss"


def softmax(z):
    return np.asarray(jax.nn.softmax(jnp.asarray(z), -1))


# (the finding, the loss, the first argument, the labels, a piece of the fix)
MISTAKES = [
    ("softmax-twice", SOFTMAX, softmax(LOGITS), LABELS, "goes into your softmax"),
    ("softmax-twice", "softmax_focal_loss", softmax(LOGITS), LABELS, "softmax_focal_loss(logits, labels)"),
    ("softmax-twice", SOFTMAX, softmax(LOGITS[0]), np.int32(1), "goes into your softmax"),
    ("softmax-twice", SOFTMAX, jnp.asarray(softmax(LOGITS), jnp.bfloat16), LABELS, "goes into your"),
    ("softmax-twice", SOFTMAX, softmax(SATURATED), LABELS[:2], "goes into your softmax"),
    ("softmax-twice", SIGMOID, softmax(LOGITS), ONE_HOT[::-1], "softmax_cross_entropy(logits, labels)"),
    ("saturated-probabilities", CATEGORICAL, softmax(SATURATED), LABELS[:2], "softmax_cross_entropy(logits"),
    ("saturated-probabilities", CATEGORICAL, softmax(SATURATED[[0, 0]]), LABELS[:2], "softmax_cross"),
    ("saturated-probabilities", BINARY, np.float32([0.5, 1]), np.float32([1, 0]), "sigmoid_cross_entropy"),
    ("saturated-probabilities", NLL, jnp.log(softmax(SATURATED)), LABELS[:2], "no softmax or log before"),
    ("not-probabilities", CATEGORICAL, LOGITS, LABELS, "softmax_cross_entropy(probs, labels)"),
    ("not-probabilities", CATEGORICAL, softmax(LOGITS) * 0.5, LABELS, "softmax_cross_entropy(probs, labels)"),
    ("not-probabilities", BINARY, LOGITS[:5], MULTI_LABEL, "sigmoid_cross_entropy(probs"),
    ("not-probabilities", NLL, softmax(LOGITS), LABELS, "categorical_cross_entropy(log_probs, labels)"),
    ("not-probabilities", NLL, LOGITS, LABELS, "softmax_cross_entropy(log_probs, labels)"),
    ("not-probabilities", NLL, -np.abs(LOGITS), LABELS, "softmax_cross_entropy(log_probs, labels)"),
    ("one-hot-rows", SIGMOID, LOGITS, ONE_HOT, "softmax_cross_entropy(logits, labels.argmax(-1))"),
    ("one-hot-rows", SIGMOID, LOGITS, ONE_HOT.astype(bool), "labels.argmax(-1)"),
    ("one-hot-rows", "sigmoid_focal_loss", LOGITS, ONE_HOT.astype(np.int32), "labels.argmax(-1)"),
    ("one-hot-rows", BINARY, softmax(PAIRS), np.eye(2)[LABELS[:6] % 2], "labels.argmax(-1)"),
    ("one-class", SOFTMAX, LOGITS[:, :1], np.zeros(8, int), "sigmoid_cross_entropy(logits[..., 0], labels)"),
    ("one-class", SOFTMAX, LOGITS[:, :1], LABELS % 2, "sigmoid_cross_entropy(logits[..., 0], labels)"),
    ("float-indices", SOFTMAX, LOGITS, LABELS.astype(np.float32), "labels.astype(jnp.int32)"),
    ("float-indices", NLL, jax.nn.log_softmax(LOGITS), LABELS.astype(float), "log_probs, labels.astype"),
    ("label-values", SOFTMAX, PAIRS, np.linspace(0, 1, 6), "jnp.stack([1 - labels, labels], -1)"),
    ("label-values", SOFTMAX, LOGITS, np.linspace(0, 2, 8), "distribution of the shape of the logits"),
    ("label-values", SOFTMAX, LOGITS[:, 0], ANSWERS.astype(np.float32), "sigmoid_cross_entropy(logits"),
    ("label-values", SOFTMAX, LOGITS[:, 0], ANSWERS, "sigmoid_cross_entropy(logits"),
    ("integer-one-hot", SOFTMAX, LOGITS, ONE_HOT.astype(np.int32), "labels.argmax(-1)"),
    ("integer-one-hot", CATEGORICAL, softmax(LOGITS), ONE_HOT.astype(bool), "labels.argmax(-1)"),
    ("one-based", SOFTMAX, LOGITS, LABELS + 1, "labels - 1"),
    ("one-based", SOFTMAX, LOGITS, np.array([1, 2, 3, -100, 1, 1, 3, 3]), "jnp.where(labels < 0, labels,"),
    ("labels-out-of-range", SOFTMAX, LOGITS, np.array([0, 1, 2, 3, 0, 1, 2, 3]), "V = 3"),
    ("labels-out-of-range", SOFTMAX, LOGITS, np.array([0, 1, 2, -100, 0, 1, -100, 2]), "ignore_index=-100"),
    ("labels-out-of-range", SOFTMAX, LOGITS, LABELS.astype(np.uint8) + np.uint8(200), "V = 3"),
    ("labels-out-of-range", SIGMOID, LOGITS[:5], 2 * MULTI_LABEL - 1, "(labels + 1) / 2"),
    ("multi-hot", SOFTMAX, LOGITS[:5], MULTI_LABEL, "sigmoid_cross_entropy(logits, labels)"),
    ("multi-hot", SOFTMAX, LOGITS[:5], MULTI_LABEL.astype(np.int32), "sigmoid_cross_entropy(logits, labels)"),
    ("not-a-distribution", SOFTMAX, LOGITS[:2], COUNTS, "labels / labels.sum(-1, keepdims=True)"),
    ("not-a-distribution", SOFTMAX, LOGITS[:2], COUNTS.astype(int), "labels / labels.sum(-1, keepdims=True)"),
    ("not-a-distribution", SOFTMAX, LOGITS, ONE_HOT * (LABELS != 2)[:, None], "where=labels.sum(-1) > 0"),
    ("nan", SOFTMAX, np.where(LOGITS == LOGITS.max(), np.nan, LOGITS), LABELS, "jax_debug_nans"),
    ("nan", SOFTMAX, np.where(LOGITS == LOGITS.max(), np.inf, LOGITS), LABELS, "jax_debug_nans"),
    ("integer-scores", SOFTMAX, LABELS[:, None] * np.ones(3, int), LABELS, "before any argmax"),
    ("swapped", SOFTMAX, LABELS, LOGITS, "softmax_cross_entropy(labels, logits)"),
    ("swapped", SOFTMAX, ONE_HOT, LOGITS, "softmax_cross_entropy(labels, logits)"),
    ("swapped", SOFTMAX, softmax(LOGITS), LOGITS, "softmax_cross_entropy(labels, logits)"),
    ("swapped", SIGMOID, MULTI_LABEL, LOGITS[:5], "sigmoid_cross_entropy(labels, logits)"),
    ("swapped", CATEGORICAL, LABELS, np.log(softmax(LOGITS)), "categorical_cross_entropy(labels, probs)"),
    ("shapes", SOFTMAX, LOGITS, LABELS[:, None], "labels.squeeze(-1)"),
    ("shapes", SOFTMAX, LOGITS, LABELS[:5], "no broadcast"),
    ("shapes", SOFTMAX, np.float32(0.3), np.int32(1), "sigmoid_cross_entropy"),
    ("shapes", SIGMOID, LOGITS, LABELS, "softmax_cross_entropy(logits, labels)"),
    ("shapes", SIGMOID, LOGITS[:, :1], LABELS % 2, "labels[..., None]"),
    ("shapes", SIGMOID, LOGITS[:, 0], LABELS[:, None] % 2, "labels.squeeze(-1)"),
]  # fmt: skip

SMOOTHED = 0.9 * ONE_HOT + 0.1 / 3
HEALTHY = {
    "plain": (SOFTMAX, LOGITS, LABELS),
    "on the device": (SOFTMAX, jnp.asarray(LOGITS), jnp.asarray(LABELS)),
    "bfloat16": (SOFTMAX, jnp.asarray(LOGITS, jnp.bfloat16), jnp.asarray(LABELS)),
    "float16 and uint8": (SOFTMAX, LOGITS.astype(np.float16), LABELS.astype(np.uint8)),
    "lists": (SOFTMAX, LOGITS.tolist(), LABELS.tolist()),
    "one row": (SOFTMAX, LOGITS[0], 1),
    "no rows": (SOFTMAX, LOGITS[:0], LABELS[:0]),
    "sequences": (SOFTMAX, LOGITS.reshape(2, 4, 3), LABELS.reshape(2, 4)),
    "saturated logits": (SOFTMAX, SATURATED, LABELS[:2]),
    "logits of 0, as at the start": (SOFTMAX, np.zeros((8, 3), np.float32), LABELS),
    "masked classes": (SOFTMAX, np.where(np.arange(3) == 2, -np.inf, LOGITS), LABELS % 2),
    "logits in [0, 1]": (SOFTMAX, RNG.random((8, 3)), LABELS),
    "logits in [0, 1], one sums to 1": (SOFTMAX, np.append([[0.5, 0.5, 0]], RNG.random((7, 3)), 0), ANSWERS),
    "log-probabilities as logits": (SOFTMAX, np.asarray(jax.nn.log_softmax(LOGITS)), LABELS),
    "one class in the batch": (SOFTMAX, LOGITS, np.full(8, 2)),
    "no 0 in the batch": (SOFTMAX, LOGITS, np.array([1, 2, 1, 2, 2, 2, 1, 1])),
    "one-hot floats": (SOFTMAX, LOGITS, ONE_HOT),
    "smoothed": (SOFTMAX, LOGITS, SMOOTHED),
    "smoothed bfloat16": (SOFTMAX, LOGITS, jnp.asarray(SMOOTHED, jnp.bfloat16)),
    "a distribution with rounding error": (SOFTMAX, LOGITS, softmax(LOGITS).astype(np.float16).astype(float)),
    "a distribution by hand": (SOFTMAX, LOGITS[:1], [[0.33, 0.33, 0.33]]),
    "a wide distribution": (SOFTMAX, np.zeros((2, 9999)), softmax(RNG.normal(size=(2, 9999)) * 3)),
    "square": (SOFTMAX, LOGITS[:3], LABELS[:3]),
    "one yes/no row of V": (SOFTMAX, LOGITS[0], np.float32([0, 1, 0])),
    "yes/no": (SIGMOID, LOGITS[:, 0], LABELS % 2),
    "yes/no bool": (SIGMOID, LOGITS[:, 0], LABELS > 1),
    "yes/no column": (SIGMOID, LOGITS[:, :1], np.ones((8, 1))),
    "probabilities as labels": (SIGMOID, LOGITS, softmax(LOGITS)),
    "multi-label": (SIGMOID, LOGITS[:5], MULTI_LABEL),
    "three rows with one positive": (SIGMOID, LOGITS[:3], ONE_HOT[:3]),
    "no positive at all": (SIGMOID, LOGITS, np.zeros((8, 3))),
    "one yes/no output in (0, 1)": (SIGMOID, np.float32([0.4, 0.6]), np.float32([0, 1])),
    "saturated yes/no": (SIGMOID, SATURATED, [[0, 1, 1], [1, 0, 0]]),
    "probabilities": (CATEGORICAL, softmax(LOGITS), LABELS),
    "bfloat16 probabilities": (CATEGORICAL, jnp.asarray(softmax(LOGITS), jnp.bfloat16), LABELS),
    "masked probabilities": (CATEGORICAL, softmax(np.where(np.arange(3) == 2, -np.inf, LOGITS)), LABELS % 2),
    "binary probabilities": (BINARY, softmax(LOGITS)[:, 0], LABELS % 2),
    "log-probabilities": (NLL, np.asarray(jax.nn.log_softmax(LOGITS)), LABELS),
    "saturated log-probabilities": (NLL, np.asarray(jax.nn.log_softmax(SATURATED)), LABELS[:2]),
    "masked log-probabilities": (
        NLL, np.asarray(jax.nn.log_softmax(np.where(np.arange(3) == 2, -np.inf, LOGITS))), LABELS % 2),
}  # fmt: skip


@pytest.mark.parametrize(("name", "loss", "logits", "labels", "fix"), MISTAKES)
def test_a_mistake_is_found(name, loss, logits, labels, fix):
    found = {finding.name: finding for finding in jaxent.diagnose(logits, labels, loss=loss).findings}
    assert name in found
    assert fix in found[name].fix


def test_every_finding_has_a_mistake():
    assert {mistake[0] for mistake in MISTAKES} == set(_CHECKS)


@pytest.mark.parametrize("case", HEALTHY.values(), ids=HEALTHY.keys())
def test_a_healthy_look_alike_is_not_accused(case):
    loss, logits, labels = case
    diagnosis = jaxent.diagnose(logits, labels, loss=loss)
    assert diagnosis.ok, diagnosis


@pytest.mark.parametrize(
    ("loss", "logits", "labels", "names"),
    [
        (SOFTMAX, softmax(LOGITS), LABELS, ["softmax-twice"]),
        (SOFTMAX, LOGITS, LABELS + 1, ["one-based"]),
        (SOFTMAX, LOGITS[:, :1], LABELS % 2, ["one-class"]),
        (SOFTMAX, LOGITS[:, :1], (LABELS % 2)[:, None], ["one-class"]),
        (SOFTMAX, LOGITS[:, :1], np.linspace(0, 1, 8), ["one-class", "label-values"]),
        (SOFTMAX, LOGITS, ONE_HOT.astype(int), ["integer-one-hot"]),
        (SOFTMAX, LOGITS, LABELS.astype(float), ["float-indices"]),
        (SOFTMAX, LOGITS, LABELS + 1.0, ["float-indices", "one-based"]),
        (SOFTMAX, LOGITS, (LABELS + 1)[:, None], ["shapes", "one-based"]),
        (SOFTMAX, LOGITS[:5], MULTI_LABEL, ["multi-hot"]),
        (SIGMOID, LOGITS, ONE_HOT, ["one-hot-rows"]),
        (SOFTMAX, LOGITS, np.full(8, np.nan), ["label-values"]),
        (SOFTMAX, LOGITS, np.full((8, 3), np.nan), ["not-a-distribution"]),
    ],
)
def test_one_mistake_is_not_told_twice(loss, logits, labels, names):
    assert [finding.name for finding in jaxent.diagnose(logits, labels, loss=loss).findings] == names


def test_repr_word_for_word():
    logits = np.array([[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]], np.float32)
    assert repr(jaxent.diagnose(logits, np.array([1, 2, 1], np.int32))) == (
        "softmax_cross_entropy(logits float32[3, 2], labels int32[3]): 2 findings\n"
        "\n"
        "softmax-twice\n"
        "  seen: all 6 logits lie in [0, 1] and every row sums to 1: they are probabilities\n"
        "  fix:  jaxent.softmax_cross_entropy(logits, labels)  "
        "# what goes into your softmax; the loss has its own\n"
        "\n"
        "one-based\n"
        "  seen: labels run from 1 to V = 2, and none is 0: they count from 1\n"
        "  fix:  jaxent.softmax_cross_entropy(logits, labels - 1)"
    )
    assert repr(jaxent.diagnose(LOGITS[:, 0], LABELS > 1, loss=SIGMOID)) == (
        "sigmoid_cross_entropy(logits float32[8], labels bool[8]): no mistake found"
    )


def test_the_figures_of_bad_values_and_labels():
    logits = LOGITS.copy()
    logits[5, 1] = np.nan
    found = jaxent.diagnose(logits, np.array([0, 1, 2, 0, -7, 5, 2, 1])).findings
    assert [finding.seen for finding in found] == [
        "1 of 24 logits, the first at [5, 1], are NaN or +inf: these rows have loss NaN",
        "2 of 8 labels, the first at [4], are outside [0, 3) (-7 to 5): these rows have loss NaN",
    ]


def test_a_diagnosis_counts_its_findings_and_is_frozen():
    sick, well = jaxent.diagnose(LOGITS, LABELS + 1), jaxent.diagnose(LOGITS, LABELS)
    assert len(sick) == 1 and sick and not sick.ok
    assert len(well) == 0 and not well and well.ok
    with pytest.raises(dataclasses.FrozenInstanceError):
        sick.findings = ()


@pytest.mark.parametrize("loss", _LOSSES)
def test_every_name_is_a_public_loss(loss):
    assert callable(getattr(jaxent, loss))


def test_an_unknown_loss_names_the_known_ones():
    with pytest.raises(
        ValueError, match=r"`loss` must be one of softmax_cross_entropy, .*nll_loss, but is 'mse'"
    ):
        jaxent.diagnose(LOGITS, LABELS, loss="mse")


@pytest.mark.parametrize(
    ("classes", "probs", "name", "fix"),
    [
        ([[0, 1], [2, -1]], [[0.5, 0.5], [1, 0]], None, None),
        ([[0, 1], [3, -1]], [[0.5, 0.5], [1, 0]], "labels-out-of-range", "an empty slot has probability 0"),
        (
            [[0, 1], [2, 1]],
            [[0.5, 0.25], [0.5, 0.125]],
            "not-a-distribution",
            "softmax_kl_divergence(logits, labels)",
        ),
        ([[0, 1], [2, -1]], [[3, 2], [1, 0]], "not-a-distribution", "probs / probs.sum(-1, keepdims=True)"),
        ([[0, 1], [2, 1]], [[1.5, -0.5], [1, 0]], "not-a-distribution", "probs / probs.sum"),
        ([[0, 1], [2, 1]], [[np.nan, 0.5], [1, 0]], "not-a-distribution", "probs are NaN"),
        ([[], []], [[], []], "not-a-distribution", "softmax_kl_divergence(logits, labels)"),
    ],
)
def test_a_few_classes(classes, probs, name, fix):
    labels = jaxent.SparseDistribution(np.array(classes, int), np.float32(probs))
    found = jaxent.diagnose(LOGITS[:2], labels)
    assert found.subject.endswith(f"labels SparseDistribution[2, {len(classes[0])}])")
    assert [x.name for x in found.findings] == [name] * (name is not None)
    assert all(fix in x.fix for x in found.findings)


def test_a_few_classes_where_none_are_taken():
    labels = jaxent.SparseDistribution(np.array([[0, 1]]), np.float32([[0.5, 0.5]]))
    with pytest.raises(TypeError, match="must be an array of real numbers, but is a SparseDistribution"):
        jaxent.diagnose(LOGITS[:1], labels, loss=SIGMOID)
    with pytest.raises(ValueError, match=r"`labels.classes` must be of shape \[8, K\]"):
        jaxent.diagnose(LOGITS, labels)
    assert jaxent.diagnose(np.float32(1), labels).findings[0].name == "shapes"


def test_traced_values_are_refused():
    with pytest.raises(
        TypeError, match=r"`logits` must be real arrays, but is traced. Call `diagnose` outside jit"
    ):
        jax.jit(lambda z: jaxent.diagnose(z, LABELS).ok)(LOGITS)
    with pytest.raises(TypeError, match="`labels` must be real arrays, but is traced"):
        jax.vmap(lambda y: jaxent.diagnose(LOGITS[0], y).ok)(LABELS)


@pytest.mark.parametrize("labels", [None, "abc", [[1], [1, 2]], np.array([1j, 2])])
def test_what_is_no_array_of_numbers_is_refused(labels):
    with pytest.raises(TypeError, match="`labels` must be an array of real numbers, but is"):
        jaxent.diagnose(LOGITS, labels)


def test_never_raises_on_malformed_arrays():
    shapes = [(), (4,), (0, 3), (4, 0), (4, 1), (4, 2), (2, 4, 2)]
    fillers = [
        lambda s: RNG.normal(size=s).astype(np.float32),
        lambda s: RNG.integers(-3, 6, s),
        lambda s: RNG.random(s) < 0.5,
        lambda s: np.full(s, np.nan),
        lambda s: np.full(s, -np.inf),
        lambda s: np.full(s, 2**63, np.uint64),
    ]
    for a, b, f, g in itertools.product(shapes, shapes, fillers, fillers):
        for loss in (SOFTMAX, SIGMOID, CATEGORICAL, BINARY, NLL):
            assert repr(jaxent.diagnose(f(a), g(b), loss=loss))
