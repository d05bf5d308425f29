"""What a `SparseDistribution` may not be, as labels and as the target of a divergence, word for word."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import harness
import jaxent
from jaxent import SparseDistribution

V = 3
F32, I32 = np.float32, np.int32
Z = np.zeros((4, V), F32)
CLASSES = np.array([[0, 1], [1, 2], [2, 0], [0, 2]], I32)
PROBS = np.full((4, 2), 0.375, F32)
AT = np.arange(8).reshape(4, 2) == 5  # the second slot of row 2
GOOD = np.arange(4) != 2

LABELLED = (
    "softmax_cross_entropy",
    "softmax_focal_loss",
    "softmax_poly_loss",
    "softmax_loss",
    "softmax_statistics",
)
DIVERGENCES = ("softmax_kl_divergence", "softmax_js_divergence")
ALL = (*LABELLED, *DIVERGENCES)
LAYER = jaxent.LinearLogits(np.zeros((4, 2), F32), np.zeros((2, V), F32))


def argument_of(function):
    return "target_logits" if function in DIVERGENCES else "labels"


def rows_of(function, q, logits=Z, **options):
    """Values `[...]` of any function that takes a SparseDistribution."""
    f = getattr(jaxent, function)
    if function == "softmax_loss":
        return f(lambda s: -s.log_prob, logits, q, **{"reduction": "none"} | options)
    found = f(logits, q, **options)
    return found.log_prob if function == "softmax_statistics" else found


SETS = "One set of K classes per row of logits; fill up smaller ones with -1."
COUNT = "Classes count from 0; an empty slot is -1, of probability 0; hide a row with `where=`."
WORDS = "'bucket' makes one class of all that a sparse target does not name, 'ignore' leaves them out."
SHAPE = "`{}.classes` must be of shape [4, K], but is"
PAIRS = "`{0}.probs` must be of shape [4, 2] (that of `{0}.classes`), but is"
RANGE = "`{}.classes` must be in [0, 3), but is"
# (classes, probs), options, exception, what follows "jaxent.<function>: ", with the name of the argument
ERRORS = {
    "classes [N, 1, K]": ((CLASSES[:, None], PROBS), {}, ValueError, f"{SHAPE} int32[4, 1, 2]. {SETS}"),
    "classes [N]": ((CLASSES[:, 0], PROBS[:, 0]), {}, ValueError, f"{SHAPE} int32[4]. {SETS}"),
    "classes [K]": ((CLASSES[0], PROBS[0]), {}, ValueError, f"{SHAPE} int32[2]. {SETS}"),
    "classes [1, K]": ((CLASSES[:1], PROBS[:1]), {}, ValueError, f"{SHAPE} int32[1, 2]. {SETS}"),
    "classes [N + 1, K]": (
        (np.zeros((5, 2), I32), np.ones((5, 2), F32)), {}, ValueError, f"{SHAPE} int32[5, 2]. {SETS}",
    ),
    "classes where the axis is not": (
        (CLASSES, PROBS), {"logits": Z.T, "axis": 0}, ValueError,
        f"`{{}}.classes` must be of shape [K, 4], but is int32[4, 2]. {SETS}",
    ),
    "float classes": ((PROBS, PROBS), {}, TypeError, f"`{{}}.classes` must be integers, but is float32[4, 2]. {SETS}"),
    "bool classes": (
        (CLASSES > 0, PROBS), {}, TypeError, f"`{{}}.classes` must be integers, but is bool[4, 2]. {SETS}",
    ),
    "a list of classes": (
        ([[0, 1]] * 4, PROBS), {}, TypeError,
        "`{}.classes` must be an array, but is a list. Pass `jnp.asarray(...)`.",
    ),
    "no classes": (
        (None, PROBS), {}, TypeError, "`{}.classes` must be an array, but is a NoneType. Pass `jnp.asarray(...)`.",
    ),
    "integer probs": (
        (CLASSES, CLASSES), {}, TypeError,
        "`{}.probs` must be a floating point array, but is int32[4, 2]. Pass `probs.astype(jnp.float32)`.",
    ),
    "bool probs": (
        (CLASSES, CLASSES > 0), {}, TypeError,
        "`{}.probs` must be a floating point array, but is bool[4, 2]. Pass `probs.astype(jnp.float32)`.",
    ),
    "a list of probs": (
        (CLASSES, [0.5, 0.5]), {}, TypeError,
        "`{}.probs` must be an array, but is a list. Pass `jnp.asarray(...)`.",
    ),
    "probs [N, K + 1]": ((CLASSES, Z), {}, ValueError, f"{PAIRS} float32[4, 3]. One per class."),
    "probs [K]": ((CLASSES, PROBS[0]), {}, ValueError, f"{PAIRS} float32[2]. One per class."),
    "probs [N, 1]": ((CLASSES, PROBS[:, :1]), {}, ValueError, f"{PAIRS} float32[4, 1]. One per class."),
    "a class that is V": ((np.where(AT, V, CLASSES), PROBS), {}, ValueError, f"{RANGE} 3 at index [2, 1]. {COUNT}"),
    "-1 with mass": ((np.where(AT, -1, CLASSES), PROBS), {}, ValueError, f"{RANGE} -1 at index [2, 1]. {COUNT}"),
    "an int64 class": (
        (np.where(AT, 2**32 + 1, CLASSES.astype(np.int64)), PROBS), {}, ValueError,
        f"{RANGE} 4294967297 at index [2, 1]. {COUNT}",
    ),
    "where the axis is": (
        (np.where(AT, V, CLASSES).T, PROBS.T), {"logits": Z.T, "axis": 0}, ValueError,
        f"{RANGE} 3 at index [1, 2]. {COUNT}",
    ),
    "beside a layer": (
        (np.where(AT, V, CLASSES), PROBS), {"logits": LAYER}, ValueError, f"{RANGE} 3 at index [2, 1]. {COUNT}",
    ),
    "a row that is seen": (
        (np.where(AT | (CLASSES == 1), V, CLASSES), PROBS), {"where": ~GOOD}, ValueError,
        f"{RANGE} 3 at index [2, 1]. {COUNT}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    """At once, in jit too."""
    arrays, options, kind, message = ERRORS[name]
    for function in ALL:
        if "where" in options and function == "softmax_statistics":
            continue  # its mask hides what comes out, not what comes in

        def call(function=function):
            return rows_of(function, SparseDistribution(*arrays), **options)

        for f in (call, jax.jit(call)):
            with pytest.raises(kind) as error:
                f()
            assert str(error.value) == f"jaxent.{function}: {message.format(argument_of(function))}"


@pytest.mark.parametrize("function", DIVERGENCES)
@pytest.mark.parametrize("rest", ["other", "Bucket", None, 0, True])
def test_errors_of_rest(function, rest):
    """Beside logits as well, which have no rest."""
    for target in (SparseDistribution(CLASSES, PROBS), Z, LAYER):
        with pytest.raises(ValueError) as error:
            rows_of(function, target, rest=rest)
        want = f"jaxent.{function}: `rest` must be 'bucket' or 'ignore', but is {rest!r}. {WORDS}"
        assert str(error.value) == want


def test_errors_of_other_options():
    q = SparseDistribution(CLASSES, PROBS)
    with pytest.raises(ValueError) as error:
        jaxent.softmax_cross_entropy(Z, q, ignore_index=-1)
    assert str(error.value) == (
        "jaxent.softmax_cross_entropy: `ignore_index` must be an int beside integer labels, but is -1. "
        "It hides rows by their label; hide rows of a distribution with `where=`."
    )
    with pytest.raises(ValueError) as error:
        jaxent.softmax_kl_divergence(LAYER, q, axis=0)
    assert str(error.value) == (
        "jaxent.softmax_kl_divergence: `axis` must be the last axis, but is 0. "
        "The classes of a LinearLogits come last; `class_axis` is that of its kernel."
    )
    with pytest.raises(TypeError, match="unexpected keyword argument 'rest'"):
        jaxent.softmax_cross_entropy(Z, q, rest="bucket")


ARRAYS_ONLY = {
    "softmax_entropy": (jaxent.softmax_entropy, "logits"),
    "softmax_cross_entropy": (lambda q: jaxent.softmax_cross_entropy(q, CLASSES[:, 0]), "logits"),
    "softmax_kl_divergence": (lambda q: jaxent.softmax_kl_divergence(q, Z), "logits"),
    "softmax_js_divergence": (lambda q: jaxent.softmax_js_divergence(q, q), "logits"),
    "sigmoid_cross_entropy": (lambda q: jaxent.sigmoid_cross_entropy(Z, q), "labels"),
    "sigmoid_focal_loss": (lambda q: jaxent.sigmoid_focal_loss(Z, q), "labels"),
    "sigmoid_asymmetric_loss": (lambda q: jaxent.sigmoid_asymmetric_loss(Z, q), "labels"),
    "categorical_cross_entropy": (lambda q: jaxent.categorical_cross_entropy(Z, q), "labels"),
    "nll_loss": (lambda q: jaxent.nll_loss(Z, q), "labels"),
    "binary_cross_entropy": (lambda q: jaxent.binary_cross_entropy(Z, q), "labels"),
    "kl_divergence": (lambda q: jaxent.kl_divergence(Z, q), "target_probs"),
    "mean": (jaxent.mean, "losses"),
    "total_weight": (jaxent.total_weight, "labels"),
}


@pytest.mark.parametrize("function", ARRAYS_ONLY)
def test_functions_that_take_none(function):
    f, argument = ARRAYS_ONLY[function]
    with pytest.raises(TypeError) as error:
        f(SparseDistribution(CLASSES, PROBS))
    start = f"jaxent.{function}: `{argument}` must be an array, but is a SparseDistribution. The softmax "
    assert str(error.value).startswith(start)


# Bad classes that do not count.

TRACED = ("softmax_cross_entropy", "softmax_poly_loss", "softmax_loss", "softmax_kl_divergence")
of_traced = pytest.mark.parametrize("function", TRACED)


def all_of(calls, *arguments):
    """As one program."""
    f = jax.jit(lambda *x: [call(*x) for call in calls], compiler_options=harness.QUICK)
    return list(map(np.asarray, f(*arguments)))


@of_traced
def test_what_is_hidden_raises_nothing(function):
    """And slots without mass, of any class, are none."""
    hidden = [{"where": GOOD}, {"where": jnp.asarray(GOOD)}, {"weights": F32(GOOD)}, {"weights": GOOD}]
    hidden += [{"where": GOOD, "weights": F32(GOOD)}]
    bad = SparseDistribution(np.where(AT, V, CLASSES), PROBS)
    nowhere = [np.where(AT, c, CLASSES.astype(np.int64)) for c in (-1, V, 2**32 + 1, -(2**40))]
    empty = [SparseDistribution(classes, np.where(AT, 0, PROBS)) for classes in nowhere]
    one = SparseDistribution(CLASSES[2:3, :1], PROBS[2:3, :1])
    clean, short, *found = all_of(
        [
            lambda: rows_of(function, SparseDistribution(CLASSES, PROBS)),
            lambda: rows_of(function, one, Z[:1]),
            *(functools.partial(rows_of, function, bad, **options) for options in hidden),
            *(functools.partial(rows_of, function, q) for q in empty),
        ]
    )
    for x in found:
        np.testing.assert_array_equal(x[GOOD], clean[GOOD])
    assert all(x[2] == 0 for x in found[: len(hidden)])
    for x in found[len(hidden) :]:
        np.testing.assert_allclose(x[2:3], short, rtol=1e-6)


@of_traced
def test_beside_a_traced_mask(function):
    """Not an error, as the mask may hide them; where it does not they are NaN, and not another class."""
    bad = np.array([[0, 1], [2**32 + 1, 2], [2, -1], [V, 0]])  # of row 1 that is class 1 in 32 bits
    shown = np.array([True, True, True, False])
    q = SparseDistribution(bad, PROBS)
    calls = [
        lambda x: rows_of(function, q, where=x),
        lambda x: rows_of(function, q, weights=x.astype(jnp.float32)),
    ]
    for found in all_of(calls, shown):
        np.testing.assert_array_equal(np.isnan(found), [False, True, True, False])
        assert found[3] == 0


@of_traced
def test_arrays_of_jax_raise_nothing(function):
    """Nor where one of both is: then it is not known which slots have mass."""
    bad = np.where(AT, V, CLASSES)
    pairs = (jnp.asarray(bad), PROBS), (bad, jnp.asarray(PROBS)), (jnp.asarray(bad), jnp.asarray(PROBS))
    for found in all_of([functools.partial(rows_of, function, SparseDistribution(*q)) for q in pairs]):
        np.testing.assert_array_equal(np.isnan(found), ~GOOD)


@of_traced
def test_classes_out_of_force(function):
    """The mask is not looked at on the host: NaN rows, unless the slot has no mass."""
    force = np.array([True, False, True])
    of_row = np.ones((4, V), bool)
    of_row[2, 0] = False
    q, named = SparseDistribution(CLASSES, PROBS), CLASSES == 1
    empty = SparseDistribution(CLASSES, np.where(named, 0, PROBS))
    calls = (q, force), (q, of_row), (empty, force)
    found = all_of([functools.partial(rows_of, function, q, class_mask=mask) for q, mask in calls])
    for x, bad in zip(found, (named.any(-1), ~GOOD, np.zeros(4, bool)), strict=True):
        np.testing.assert_array_equal(np.isnan(x), bad)


# Under checkify.

CHECKED = (
    "jaxent.{}: `{}.classes` must be in [0, 3) and name a class in force, but element {} (counted over the flattened \
array, its slots last) is {}. "
    + COUNT
)


def total(function, z, classes, probs, **options):
    return rows_of(function, SparseDistribution(classes, probs), z, **options).sum()


def checked(f):
    return jax.jit(checkify.checkify(f), compiler_options=harness.QUICK)


BAD, J_PROBS = jnp.asarray(np.where(AT, V, CLASSES)), jnp.asarray(PROBS)


@pytest.mark.parametrize("function", ALL)
def test_checkify(function):
    argument, f = argument_of(function), checked(functools.partial(total, function))
    assert f(Z, jnp.asarray(CLASSES), J_PROBS)[0].get() is None
    assert CHECKED.format(function, argument, 5, 3) in f(Z, BAD, J_PROBS)[0].get()
    assert f(Z, BAD, jnp.asarray(np.where(AT, 0, PROBS)))[0].get() is None
    error = f(Z, jnp.asarray(np.where(AT, -7, CLASSES)), J_PROBS)[0]
    with pytest.raises(checkify.JaxRuntimeError) as e:
        error.throw()
    assert CHECKED.format(function, argument, 5, -7) in str(e.value)


@pytest.mark.parametrize("transform", [jax.value_and_grad, jax.vmap], ids=["value_and_grad", "vmap"])
@pytest.mark.parametrize("function", ["softmax_cross_entropy", "softmax_js_divergence"])
def test_checkify_of_transformations(function, transform):
    f = checked(transform(functools.partial(total, function)))
    assert CHECKED.format(function, argument_of(function), 5, 3) in f(Z, BAD, J_PROBS)[0].get()
    assert f(Z, jnp.asarray(CLASSES), J_PROBS)[0].get() is None


@pytest.mark.parametrize("function", ["softmax_focal_loss", "softmax_kl_divergence"])
def test_checkify_counts_what_is_in_force(function):
    """Hidden rows pass; mass on a class that `class_mask` takes out does not."""

    def hidden(where):
        options = {"where": where}, {"weights": where.astype(jnp.float32)}
        return [total(function, Z, BAD, J_PROBS, **x) for x in options]

    f = checked(hidden)
    assert f(jnp.asarray(GOOD))[0].get() is None and f(jnp.ones(4, bool))[0].get() is not None
    f = checked(lambda mask: total(function, Z, jnp.asarray(CLASSES), J_PROBS, class_mask=mask))
    got = f(jnp.array([True, False, True]))[0].get()
    assert CHECKED.format(function, argument_of(function), 1, 1) in got


@pytest.mark.parametrize("function", ALL)
def test_checks_are_no_effect(function):
    f = jax.value_and_grad(functools.partial(total, function))
    assert not jax.make_jaxpr(f)(Z, jnp.asarray(CLASSES), J_PROBS).effects
