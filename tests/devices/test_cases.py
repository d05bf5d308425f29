"""The table of cases, rows over two devices and classes over four: as exact as on one.

What does not divide is padded, with rows that `where` hides and with classes that `class_mask` takes out.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import cases
import harness
import jaxent
import oracle
import test_gradients
import test_values
from tables import some, thinned

SOURCES = ("dense", "linear")
AXES = {"class_axis_name": "classes", "batch_axis_name": "rows"}


def pad(x, axis, fill):
    more = [(0, 0)] * x.ndim
    more[axis] = (0, -x.shape[axis] % (4 if axis == -1 else 2))
    return np.pad(x, more, constant_values=fill)


def pad_all(z, labels, options, source):
    """Everything for the mesh, class axis last; in the padding what would be seen if it were looked at."""
    axis, shape = options.get("axis", -1), z.shape
    labels, options = labels, {name: x for name, x in options.items() if name != "axis"}
    last = {name: np.moveaxis(x, axis, -1) for name, x in options.items() if np.shape(x) == shape}
    z, labels = np.moveaxis(z, axis, -1), np.moveaxis(labels, axis, -1) if labels.shape == shape else labels
    options |= last
    *rows, classes = z.shape
    if rows[0] % 2:
        options.setdefault("where", np.ones(rows, bool))
    if classes % 4:
        options.setdefault("class_mask", np.ones(classes, bool))
    # a layer multiplies hidden numbers by 0
    of_row, of_class = (np.nan, np.nan) if source == "dense" else (1e9, 1e9)
    soft = labels.ndim == z.ndim
    labels = pad(pad(labels, -1, 0), 0, np.nan) if soft else pad(labels, 0, -7)
    fills = {"where": False, "weights": 3.0, "class_weights": 5.0, "class_mask": False}
    for name in options.keys() & fills.keys():
        x = options[name]
        if name.startswith("class"):
            x = pad(x, -1, fills[name])
        if x.ndim == len(rows) + 1 or name in ("where", "weights"):
            x = pad(x, 0, name == "class_mask" or fills[name])
        options[name] = x
    return pad(pad(z, -1, of_class), 0, of_row), labels, options


def spec_of(name, x, rows):
    if name == "class_weights" or (name == "class_mask" and x.ndim == 1):
        return P("classes")
    return P("rows", *[None] * (rows - 1), *["classes"] * (x.ndim - rows))


def on_mesh(loss, inputs, options, source, cotangent=None):
    """The loss, or statistics; with a cotangent also the gradients by all inputs that are float."""
    rest = {name: x for name, x in options.items() if name not in harness.ARRAYS}
    arrays = {name: harness.cast(x, "float32") for name, x in options.items() if name in harness.ARRAYS}
    inputs = [harness.cast(x, "float32") for x in inputs]
    *rows, classes = inputs[0].shape
    k, n = len(rows), int(np.prod(rows))
    specs = {name: spec_of(name, x, k) for name, x in arrays.items()}
    of_rows, of_logits = P("rows"), P("rows", *[None] * (k - 1), "classes")
    is_logits = [i == 0 or loss in test_values.MEASURES for i in range(len(inputs))]
    layered = [source == "linear" and z for z in is_logits]
    eye = jnp.eye(n).reshape(*rows, n)
    names = AXES if loss != "softmax_statistics" else {"class_axis_name": "classes"}

    def local(eye, inputs, arrays):
        logits = [
            jaxent.LinearLogits(eye, x) if layer else x for x, layer in zip(inputs, layered, strict=True)
        ]
        found = getattr(jaxent, loss)(*logits, **arrays, **rest, **names)
        return (
            found if loss != "softmax_statistics" else {k: x for k, x in vars(found).items() if x is not None}
        )

    of_inputs = [
        P(None, "classes") if layer else of_logits if x.ndim > k else of_rows
        for x, layer in zip(inputs, layered, strict=True)
    ]
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("rows", "classes"))
    out_specs = of_rows if rest.get("reduction", "none") == "none" else P()
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(of_rows, of_inputs, specs), out_specs=out_specs)

    def f(inputs, arrays, cotangent):
        moving = [i for i, x in enumerate(inputs) if jnp.issubdtype(x.dtype, jnp.floating)]

        def of_moving(moved):
            full = dict(enumerate(inputs)) | dict(zip(moving, moved, strict=True))
            parts = zip(full.values(), layered, strict=True)
            flat = [x.reshape(n, classes) if layer else x for x, layer in parts]
            return mapped(eye, flat, arrays)

        if cotangent is None:
            return of_moving([inputs[i] for i in moving])
        found, vjp = jax.vjp(of_moving, [inputs[i] for i in moving])
        return found, vjp(cotangent)[0]

    cotangent = None if cotangent is None else jnp.asarray(cotangent, jnp.float32)
    return jax.tree.map(np.asarray, jax.jit(f, compiler_options=harness.QUICK)(inputs, arrays, cotangent))


def cut(x, shape):
    return x[tuple(map(slice, shape))]


# each case from one of both; on one device from all
EACH_ONCE = [(case, SOURCES[i % 2]) for i, case in enumerate(cases.CASES)]


@pytest.mark.parametrize(("case", "source"), some(EACH_ONCE[-4:], EACH_ONCE), ids=str)
def test_losses(case, source):
    built, cotangent, wanted = test_gradients.wanted(case, "float32")
    want = test_values.LOSSES[case.loss](built.logits, built.labels, **built.options)
    z, labels, options = pad_all(*built, source)
    padded = cotangent if np.ndim(cotangent) == 0 else pad(cotangent, 0, 3.0)
    got, gradients = on_mesh(case.loss, [z, labels], options, source, padded)
    p = oracle.Softmax(np.moveaxis(built.logits, case.axis, -1)).p
    lost = np.where(p < 4 * test_values.TINY, p, 0).sum(-1)
    allowed = test_values.allowed(case, "float32", want, lost if lost.shape == want.shape else 0)
    harness.assert_within(cut(got, want.shape), want, allowed, "value:")
    for g, w in zip(gradients, wanted, strict=True):
        w = np.moveaxis(w, case.axis, -1)
        bound = np.moveaxis(
            test_gradients.allowed(case, "float32", np.moveaxis(w, -1, case.axis)), case.axis, -1
        )
        harness.assert_within(cut(g, w.shape), w, bound, "gradient:")
        if case in cases.OPTIONS:
            assert (cut(g, w.shape)[np.asarray(w) == 0] == 0).all()


@thinned(2, "case, source", cases.STATISTICS, SOURCES)
def test_statistics(case, source, monkeypatch):
    built = case.build("float32")
    z, labels, options = pad_all(*built, source)
    got = on_mesh("softmax_statistics", [z, labels], options, source)
    rows = tuple(np.delete(built.logits.shape, case.axis))
    found = jaxent.SoftmaxStatistics(**{name: cut(x, rows) for name, x in got.items()})
    monkeypatch.setattr(harness, "value", lambda *_, **__: found)
    test_values.check_statistics(case, "float32", source)


@thinned(2, "name, source", test_values.MEASURES, SOURCES)
def test_divergences(name, source, monkeypatch):
    """What test_values and test_gradients ask of one device."""

    def padded(z, t, options):
        z, _, options = pad_all(z, np.zeros(len(z), int), options, source)
        return [z, pad_all(t, np.zeros(len(t), int), {}, source)[0]], options

    def value(name, z, t, *, dtype, source, quick=False, **options):
        inputs, options = padded(z, t, options)
        return cut(on_mesh(name, inputs, options, harness_source), (len(z),))

    def gradients(name, z, t, *, cotangent, dtype, source, quick=False, **options):
        inputs, options = padded(z, t, options)
        found = on_mesh(name, inputs, options, harness_source, pad(cotangent, 0, 3.0))[1]
        return [cut(x, z.shape) for x in found]

    harness_source = source
    monkeypatch.setattr(harness, "value", value)
    monkeypatch.setattr(harness, "gradients", gradients)
    test_values.check_divergences(name, "float32", source)
    test_gradients.check_divergences(name, "float32", source)
