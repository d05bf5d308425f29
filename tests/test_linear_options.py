"""Every option of every function on linear logits, in blocks: the same as on built logits."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import harness
import jaxent
from layers import ADVANTAGE, F32, FLAGS, FLAT, OLD, assert_same, compiled, layer_of
from tables import spread

VALUES = {
    "labels": np.array([3, 10, 0, 99, 5, 1, 7], np.int32),
    "target_logits": layer_of(FLAT, seed=5),
    "fn": lambda s, *args: (
        sum(args, -s.log_prob - s.other_log_prob),
        {"hit": s.rank < 2, "entropy": s.entropy},
    ),
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
    "alpha": np.linspace(0.5, 2, 11, dtype=F32),
    "beta": 0.25,
    "rest": "ignore",
    "temperature": 2.0,
    "classes": np.stack([np.arange(7), np.arange(7)[::-1]], -1).astype(np.int32),
    "names": ("rank", "log_prob", "class_log_probs", "other_log_prob"),
    "reduction": ("none", "sum", "mean"),
    "has_aux": True,
    "class_axis_name": "classes",
    "batch_axis_name": "rows",
}
AXES = {"class_axis_name", "batch_axis_name"}
TAKES_LOGITS = [
    name
    for name, f in vars(jaxent).items()
    if inspect.isfunction(f) and "logits" in inspect.signature(f).parameters and "sigmoid" not in name
]


def test_the_functions_that_take_logits():
    softmax = {name for name in vars(jaxent) if name.startswith("softmax_")}
    softmax = {name for name in softmax if "logits" in inspect.signature(getattr(jaxent, name)).parameters}
    assert softmax == set(TAKES_LOGITS) - {"diagnose"}


@spread(3, "name, mapped, source", sorted(set(TAKES_LOGITS) - {"diagnose"}), [False, True], harness.LINEAR)
def test_every_option(name, mapped, source):
    """Mapped: over an axis of one device; of many: devices/."""
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

            def over_both(v):
                rows = jax.vmap(lambda _: call(dict(v)), axis_name="rows")
                return jax.vmap(rows, axis_name="classes")(jnp.zeros((1, 1)))

            return [over_both(v) for v in each]
        return [call(v) for v in each]

    with harness.blocks(source):
        for got, want in zip(run(False, layer_of(FLAT)), run(True, layer_of(FLAT)), strict=True):
            assert_same(got, want)


@pytest.mark.exhaustive
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
