"""Contract errors of the softmax functions, word for word."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxent

N, V = 4, 3
F32, I32 = np.float32, np.int32
NAN, INF = float("nan"), float("inf")
Z = np.zeros((N, V), F32)
Y = np.array([0, 1, 2, 0], I32)
Q = np.full((N, V), 1 / V, F32)

LABELLED = ("softmax_cross_entropy", "softmax_focal_loss", "softmax_poly_loss")
DIVERGENCES = ("softmax_kl_divergence", "softmax_js_divergence")
WITH_LABELS = (*LABELLED, "softmax_loss", "softmax_statistics")
REDUCED = (*LABELLED, "softmax_loss", "softmax_entropy", *DIVERGENCES)
ALL = (*WITH_LABELS, "softmax_entropy", *DIVERGENCES)


def call(name, logits=Z, labels=Y, **options):
    """Any softmax function on logits and, where it has them, labels."""
    f = getattr(jaxent, name)
    if name == "softmax_loss":
        return f(lambda s: -s.log_prob, logits, labels, **options)
    if name == "softmax_entropy":
        return f(logits, **options)
    if name in DIVERGENCES:
        return f(logits, options.pop("target_logits", logits), **options)
    return f(logits, labels, **options)


FLOATING = "Pass what the last layer gives, before any rounding: `logits.astype(jnp.float32)`."
FORMS = "`labels` must be class indices (integers) of shape [4] or a distribution (floats) of shape [4, 3], but is"
SQUARE = FORMS.replace("[4]", "[3]").replace("[4, 3]", "[3, 3]")
ONE_INDEX = "jaxent never broadcasts labels: one index per row of logits, e.g. `labels.squeeze(-1)`."
BROADCAST = "jaxent never broadcasts labels: use `jnp.broadcast_to(labels, logits.shape)` if you mean it."
INDICES = "Floats are read as a distribution; for class indices pass `labels.astype(jnp.int32)`."
ONE_HOT = "For one-hot rows pass `labels.argmax(axis)`, or `labels.astype(jnp.float32)`."
BOOLS = "bool labels are for `sigmoid_cross_entropy`; for classes 0 and 1 pass `labels.astype(jnp.int32)`."
PER_ROW = "must be of shape [4] (one per row of `logits`), but is"
NO_MASK = "A mask is never broadcast: use `jnp.broadcast_to(where, rows)` if you mean it."
NO_WEIGHTS = "Weights are never broadcast: use `jnp.broadcast_to(weights, rows)` if you mean it."
NOT_BOOL = "Write the condition, e.g. `labels >= 0` or `mask != 0`; for factors use `weights`."
BOOL = "must be a bool array (True: the row counts), but is"
PER_CLASS = "`class_weights` must be of shape [3] (one per class), but is"
CLASS_MASK = "`class_mask` must be of shape [4, 3] (or [3], one per class), but is"
KEEPS = "True keeps a class in the softmax; nothing is broadcast."
HIDES = "It hides rows by their label; hide rows of a distribution with `where=`."
AXIS = "`axis` must be an axis of `logits`, which is float32[4, 3], but is"
ONE_AXIS = "`axis` is the one class axis."
SMOOTHING = "0 is none of it, 1 all of it; usual is 0.1."
OFF = "0 turns it off; usual is 1e-4."
REDUCTION = "`reduction` must be 'none', 'sum' or 'mean', but is"
PER_LOSS = "'none' gives one loss per row."
NUMBER = "must be a Python number, but is"
GAMMA = "0 is the cross-entropy; usual is 2."
EPSILON = "Below -1 a confident mistake would be rewarded; 0 is the cross-entropy."
TEMPERATURE = "It divides both logits: small ones come near the argmax, which has no gradient."
COUNT = "Labels count from 0; hide a row with `where=` or `ignore_index=`."

# functions, arguments, exception, what follows "jaxent.<function>: "
ERRORS = {
    # shapes
    "labels [N, 1]": (WITH_LABELS, {"labels": Y[:, None]}, ValueError, f"{FORMS} int32[4, 1]. {ONE_INDEX}"),
    "labels [1]": (WITH_LABELS, {"labels": Y[:1]}, ValueError, f"{FORMS} int32[1]. {ONE_INDEX}"),
    "labels [N + 1]": (WITH_LABELS, {"labels": np.zeros(5, I32)}, ValueError, f"{FORMS} int32[5]. {ONE_INDEX}"),
    "labels []": (WITH_LABELS, {"labels": 0}, ValueError, f"{FORMS} int32[]. {ONE_INDEX}"),
    "distribution [V], V rows": (
        WITH_LABELS, {"logits": Z[:3], "labels": Q[0]}, TypeError, f"{SQUARE} float32[3]. {INDICES}",
    ),
    "distribution [V], N rows": (WITH_LABELS, {"labels": Q[0]}, ValueError, f"{FORMS} float32[3]. {BROADCAST}"),
    "distribution [1, V]": (WITH_LABELS, {"labels": Q[:1]}, ValueError, f"{FORMS} float32[1, 3]. {BROADCAST}"),
    "distribution [N, V + 1]": (
        WITH_LABELS, {"labels": np.zeros((4, 4), F32)}, ValueError, f"{FORMS} float32[4, 4]. {BROADCAST}",
    ),
    "target [V]": (
        DIVERGENCES, {"target_logits": Z[0]}, ValueError,
        "`target_logits` must be of shape [4, 3] (that of `logits`), but is float32[3]. "
        "Logits are never broadcast: use `jnp.broadcast_to` if you mean it.",
    ),
    "where [1]": (ALL, {"where": np.ones(1, bool)}, ValueError, f"`where` {PER_ROW} bool[1]. {NO_MASK}"),
    "where [N, 1]": (ALL, {"where": np.ones((4, 1), bool)}, ValueError, f"`where` {PER_ROW} bool[4, 1]. {NO_MASK}"),
    "where []": (ALL, {"where": True}, ValueError, f"`where` {PER_ROW} bool[]. {NO_MASK}"),
    "weights [1]": (REDUCED, {"weights": np.ones(1, F32)}, ValueError, f"`weights` {PER_ROW} float32[1]. {NO_WEIGHTS}"),
    "weights [N, V]": (REDUCED, {"weights": Q}, ValueError, f"`weights` {PER_ROW} float32[4, 3]. {NO_WEIGHTS}"),
    "class_weights [1]": (
        LABELLED, {"class_weights": np.ones(1, F32)}, ValueError,
        f"{PER_CLASS} float32[1]. For weights of rows use `weights`.",
    ),
    "class_weights [N]": (
        LABELLED, {"class_weights": np.ones(N, F32)}, ValueError,
        f"{PER_CLASS} float32[4]. For weights of rows use `weights`.",
    ),
    "class_mask [N]": (ALL, {"class_mask": np.ones(N, bool)}, ValueError, f"{CLASS_MASK} bool[4]. {KEEPS}"),
    "class_mask [1, V]": (ALL, {"class_mask": np.ones((1, V), bool)}, ValueError, f"{CLASS_MASK} bool[1, 3]. {KEEPS}"),
    "logits []": (
        ALL, {"logits": F32(0)}, ValueError,
        "`logits` must be of shape [..., V], but is float32[]. "
        "A single row of V classes has shape [V]; for one yes/no logit use `sigmoid_cross_entropy`.",
    ),
    "no classes": (
        ALL, {"logits": np.zeros((4, 0), F32)}, ValueError,
        "`logits` must be over at least one class, but is float32[4, 0]. There is no distribution over no classes.",
    ),
    "fn [N]": (
        ("softmax_loss",), {"fn": lambda s: s.entropy * np.ones(4, F32)}, ValueError,
        "`fn` must be a function of one row to a scalar, but is one to float32[4]. It sees one row: scalar statistics, "
        "and row arguments without the axes of rows; `reduction` does the rest. What has a value for each row must be "
        "a row argument: pass it as one, do not close over it.",
    ),
    "fn without aux": (
        ("softmax_loss",), {"fn": lambda s: s.entropy, "has_aux": True}, ValueError,
        "`fn` must be a function of one row to a pair, but is one to float32[]. "
        "With `has_aux` it returns `(loss, aux)`.",
    ),
    # dtypes
    "float indices": (WITH_LABELS, {"labels": Y.astype(F32)}, TypeError, f"{FORMS} float32[4]. {INDICES}"),
    "bool indices": (WITH_LABELS, {"labels": Y > 0}, TypeError, f"{FORMS} bool[4]. {BOOLS}"),
    "bool one-hot": (WITH_LABELS, {"labels": Q > 0}, TypeError, f"{FORMS} bool[4, 3]. {BOOLS}"),
    "integer one-hot": (WITH_LABELS, {"labels": np.eye(3, dtype=I32)[Y]}, TypeError, f"{FORMS} int32[4, 3]. {ONE_HOT}"),
    "complex labels": (WITH_LABELS, {"labels": Q * 1j}, TypeError, f"{FORMS} complex64[4, 3]. {BOOLS}"),
    "list of labels": (
        WITH_LABELS, {"labels": [0, 1, 2, 0]}, TypeError,
        "`labels` must be an array, but is a list. Pass `jnp.asarray(...)`.",
    ),
    "no labels": (
        LABELLED, {"labels": None}, TypeError,
        "`labels` must be an array, but is a NoneType. Pass `jnp.asarray(...)`.",
    ),
    "integer logits": (
        ALL, {"logits": Z.astype(I32)}, TypeError,
        f"`logits` must be a floating point array, but is int32[4, 3]. {FLOATING}",
    ),
    "complex logits": (
        ALL, {"logits": Z * 1j}, TypeError,
        f"`logits` must be a floating point array, but is complex64[4, 3]. {FLOATING}",
    ),
    "list of logits": (
        ALL, {"logits": [[0.0, 1.0]]}, TypeError,
        "`logits` must be an array, but is a list. Pass `jnp.asarray(...)`.",
    ),
    "integer target": (
        DIVERGENCES, {"target_logits": Z.astype(I32)}, TypeError,
        f"`target_logits` must be a floating point array, but is int32[4, 3]. {FLOATING}",
    ),
    "float where": (ALL, {"where": np.ones(N, F32)}, TypeError, f"`where` {BOOL} float32[4]. {NOT_BOOL}"),
    "integer where": (ALL, {"where": np.ones(N, I32)}, TypeError, f"`where` {BOOL} int32[4]. {NOT_BOOL}"),
    "float class_mask": (
        ALL, {"class_mask": np.ones(V, F32)}, TypeError, f"`class_mask` {BOOL} float32[3]. {NOT_BOOL}",
    ),
    "complex weights": (
        REDUCED, {"weights": np.ones(N, np.complex64)}, TypeError,
        "`weights` must be real, but is complex64[4]. Pass real numbers.",
    ),
    "complex class_weights": (
        LABELLED, {"class_weights": np.ones(V, np.complex64)}, TypeError,
        "`class_weights` must be real, but is complex64[3]. Pass real numbers.",
    ),
    # options
    "axis 2": (ALL, {"axis": 2}, ValueError, f"{AXIS} 2. {ONE_AXIS}"),
    "axis -3": (ALL, {"axis": -3}, ValueError, f"{AXIS} -3. {ONE_AXIS}"),
    "two axes": (ALL, {"axis": (0, 1)}, ValueError, f"{AXIS} (0, 1). {ONE_AXIS}"),
    "smoothing 1.5": (
        LABELLED, {"label_smoothing": 1.5}, ValueError,
        f"`label_smoothing` must be in [0, 1], but is 1.5. {SMOOTHING}",
    ),
    "smoothing -0.1": (
        LABELLED, {"label_smoothing": -0.1}, ValueError,
        f"`label_smoothing` must be in [0, 1], but is -0.1. {SMOOTHING}",
    ),
    "smoothing NaN": (
        LABELLED, {"label_smoothing": NAN}, ValueError,
        f"`label_smoothing` must be in [0, 1], but is nan. {SMOOTHING}",
    ),
    "smoothing as text": (
        LABELLED, {"label_smoothing": "0.1"}, TypeError,
        f"`label_smoothing` must be a number or an array of one, but is a str. {SMOOTHING}",
    ),
    "negative z_loss": (
        LABELLED, {"z_loss": -1e-4}, ValueError,
        f"`z_loss` must be a finite number >= 0, but is -0.0001. {OFF}",
    ),
    "infinite z_loss": (
        LABELLED, {"z_loss": INF}, ValueError, f"`z_loss` must be a finite number >= 0, but is inf. {OFF}",
    ),
    "unknown reduction": (REDUCED, {"reduction": "avg"}, ValueError, f"{REDUCTION} 'avg'. {PER_LOSS}"),
    "no reduction": (REDUCED, {"reduction": None}, ValueError, f"{REDUCTION} None. {PER_LOSS}"),
    "negative gamma": (
        ("softmax_focal_loss",), {"gamma": -1}, ValueError,
        f"`gamma` must be a finite number >= 0, but is -1. {GAMMA}",
    ),
    "gamma NaN": (
        ("softmax_focal_loss",), {"gamma": NAN}, ValueError,
        f"`gamma` must be a finite number >= 0, but is nan. {GAMMA}",
    ),
    "epsilon -2": (
        ("softmax_poly_loss",), {"epsilon": -2.0}, ValueError,
        f"`epsilon` must be a finite number >= -1, but is -2.0. {EPSILON}",
    ),
    "temperature 0": (
        DIVERGENCES, {"temperature": 0.0}, ValueError,
        f"`temperature` must be a finite number > 0, but is 0.0. {TEMPERATURE}",
    ),
    "temperature -1": (
        DIVERGENCES, {"temperature": -1}, ValueError,
        f"`temperature` must be a finite number > 0, but is -1. {TEMPERATURE}",
    ),
    "ignore_index of a distribution": (
        (*LABELLED, "softmax_loss"), {"labels": Q, "ignore_index": 0}, ValueError,
        f"`ignore_index` must be an int beside integer labels, but is 0. {HIDES}",
    ),
    "ignore_index 0.5": (
        (*LABELLED, "softmax_loss"), {"ignore_index": 0.5}, ValueError,
        f"`ignore_index` must be an int beside integer labels, but is 0.5. {HIDES}",
    ),
    # labels known on the host
    "label -1": (
        WITH_LABELS, {"labels": np.array([0, -1, 3, 0])}, ValueError,
        f"`labels` must be in [0, 3), but is -1 at index [1]. {COUNT}",
    ),
    "label 2^32 + 1": (
        WITH_LABELS, {"labels": np.array([0, 1, 2**32 + 1, 3])}, ValueError,
        f"`labels` must be in [0, 3), but is 4294967297 at index [2]. {COUNT}",
    ),
    "unsigned label": (
        WITH_LABELS, {"labels": np.array([0, 1, 2, 255], np.uint8)}, ValueError,
        f"`labels` must be in [0, 3), but is 255 at index [3]. {COUNT}",
    ),
    "int as label": (
        WITH_LABELS, {"logits": Z[0], "labels": 3}, ValueError, f"`labels` must be in [0, 3), but is 3. {COUNT}",
    ),
    "numpy scalar as label": (
        WITH_LABELS, {"logits": Z[0], "labels": np.int64(-2)}, ValueError,
        f"`labels` must be in [0, 3), but is -2. {COUNT}",
    ),
    "label beside one that is masked": (
        WITH_LABELS,
        {"labels": np.array([7, 0, 8, 9]), "where": np.array([False, True, True, True])}, ValueError,
        f"`labels` must be in [0, 3), but is 8 at index [2]. {COUNT}",
    ),
    "label beside one that is ignored": (
        (*LABELLED, "softmax_loss"), {"labels": np.array([-100, 0, -1, 0]), "ignore_index": -100}, ValueError,
        f"`labels` must be in [0, 3), but is -1 at index [2]. {COUNT}",
    ),
    "label of several axes": (
        WITH_LABELS, {"logits": np.zeros((2, 2, V), F32), "labels": np.array([[0, 1], [2, 3]])}, ValueError,
        f"`labels` must be in [0, 3), but is 3 at index [1, 1]. {COUNT}",
    ),
}  # fmt: skip


def message_of(kind, f, *arguments):
    with pytest.raises(kind) as e:
        f(*arguments)
    assert type(e.value) is kind
    return str(e.value)


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    functions, arguments, kind, text = ERRORS[name]
    for function in functions:
        assert message_of(kind, functools.partial(run, function), arguments) == f"jaxent.{function}: {text}"


def run(function, arguments):
    if "fn" in arguments:
        return jaxent.softmax_loss(arguments["fn"], Z, Y, has_aux=arguments.get("has_aux", False))
    return call(function, **arguments)


ARRAY = np.ndarray | np.generic
ON_HOST = [name for name, (*_, text) in ERRORS.items() if "[0, 3), but is" in text]


@pytest.mark.parametrize("name", ERRORS)
def test_errors_while_tracing(name):
    """The same words under jit, vmap and grad, where arrays are tracers."""
    functions, arguments, kind, text = ERRORS[name]
    traced = ("logits",) if name in ON_HOST else (*arguments, "logits")
    arrays = {k: x for k, x in ({"logits": Z} | arguments).items() if k in traced and isinstance(x, ARRAY)}
    rest = {k: x for k, x in arguments.items() if k not in arrays}
    stacked = jax.tree.map(lambda x: np.stack([x, x]), arrays)
    for function in functions:

        def f(arrays, function=function, rest=rest):
            return jax.tree.leaves(run(function, arrays | rest))[0].sum()

        want = f"jaxent.{function}: {text}"
        assert message_of(kind, jax.jit(f), arrays) == want
        if arrays:
            assert message_of(kind, jax.vmap(f), stacked) == want
        if "logits" not in arguments:  # else they may be no array to differentiate by
            given = {k: x for k, x in arrays.items() if k != "logits"}
            assert message_of(kind, jax.grad(lambda z, f=f, g=given: f({"logits": z} | g)), Z) == want


LABELLED_NAMES = (
    "('log_prob', 'weighted_log_prob', 'mean_log_prob', 'log_normalizer', 'entropy', 'prediction', 'rank')"
)
DISTRIBUTION_NAMES = LABELLED_NAMES.replace(", 'rank'", "")
UNLABELLED_NAMES = DISTRIBUTION_NAMES.replace("'log_prob', 'weighted_log_prob', ", "")
NAMES = {
    "unknown": (Y, ["log_prob", "logprob"], LABELLED_NAMES),
    "text": (Y, "entropy", LABELLED_NAMES),
    "rank of a distribution": (Q, ("rank",), DISTRIBUTION_NAMES),
    "log_prob without labels": (None, ("entropy", "log_prob"), UNLABELLED_NAMES),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_statistics(name):
    labels, names, known = NAMES[name]
    text = f"`names` must be some of {known}, but is {names!r}. Some need (integer) labels."
    for f in (jaxent.softmax_statistics, jax.jit(jaxent.softmax_statistics, static_argnames="names")):
        if f is not jaxent.softmax_statistics and isinstance(names, list):
            names = tuple(names)
            text = text.replace("['log_prob', 'logprob']", "('log_prob', 'logprob')")
        got = message_of(ValueError, functools.partial(f, names=names), Z, labels)
        assert got == f"jaxent.softmax_statistics: {text}"


def rows_of(name, *arguments, **options):
    """One number per row, of any function with labels."""
    if name == "softmax_statistics":
        return call(name, *arguments, **options).log_prob
    return call(name, *arguments, reduction="none", **options)


@pytest.mark.parametrize("name", WITH_LABELS)
def test_bad_host_labels_that_do_not_count_pass(name):
    bad = np.array([0, -1, 2**32 + 1, 7])
    first = np.array([True, False, False, False])
    hidden = [{"where": first}, {"where": jnp.asarray(first)}]
    if name != "softmax_statistics":
        ignored = np.where(first, bad, 2**31 - 1), {"ignore_index": 2**31 - 1}
        hidden += [{"where": first, "ignore_index": -1}]
        got = rows_of(name, Z, ignored[0], **ignored[1])
        assert np.isfinite(got).all() and (got[1:] == 0).all()
    for options in hidden:
        got = rows_of(name, Z, bad, **options)
        assert np.isfinite(got).all() and got[0] != 0 and (got[1:] == 0).all()


@pytest.mark.parametrize("name", WITH_LABELS)
def test_host_labels_beside_a_traced_mask(name):
    """Not an error, as the mask may hide them; where it does not they are NaN, and not another class."""
    bad = np.array([0, 2**32 + 1, -1, 3])
    f = jax.jit(lambda z, where: rows_of(name, z, bad, where=where))
    got = f(Z, np.array([True, True, False, True]))
    assert np.isnan(got).tolist() == [False, True, False, True] and got[2] == 0
