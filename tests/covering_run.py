"""Cases of tests/covering.py on a mesh or one device: some of them one program, and what is wrong with each."""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import harness
import jaxent
import oracle_complex as oracle
from covering import Case
from covering_numbers import AXIS, ROWS, build, layered, shape_of_losses, static_options

OF_LAYER = {"softcap": "softcap", "layer_temperature": "temperature", "class_axis": "class_axis"}
# what rounding takes from a gradient: float32's, then that of its own dtype; layers round their operands as well
EXACT = 4e-6
HALF = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}
AT_A_TIME = 6  # in a program: a case takes a quarter less than in a program of 80
WITH_THE_LOGITS = ("logits", "hidden", "kernel", "bias", "advantage", "cotangent")
TARGETS = ("labels", "target", "target_logits", "target_hidden")
OF_CLASSES = ("bias", "target_bias", "class_weights", "pos_weight", "alpha")
# K of them where logits have V classes: in one place
OF_SLOTS = ("classes", "classes_of_labels", "classes_of_target", "target")


def loss(case: Case, x: dict[str, Any], **axes: str) -> Any:
    """The case as a user writes it, of `inputs`."""
    arrays = ("where", "weights", "class_weights", "class_mask", "classes", "pos_weight", "alpha")
    options = static_options(case) | {name: x[name] for name in arrays if name in x}
    if case["loss"] == "mean":
        return jaxent.mean(x["logits"], **options, axis_name=axes.get("batch_axis_name"))
    options["reduction"] = case["reduction"]

    def logits(prefix: str) -> Any:
        if prefix + "logits" in x:
            return x[prefix + "logits"]
        of_layer = {new: case[name] for name, new in OF_LAYER.items() if case[name] is not None}
        hidden, kernel, bias = (x.get(prefix + part) for part in ("hidden", "kernel", "bias"))
        kernel = kernel if case["class_axis"] is None else kernel.T
        return jaxent.LinearLogits(hidden, kernel, bias, **of_layer)

    f, inputs = getattr(jaxent, case["loss"]), [logits("")]
    if case["target"] == "sparse":
        inputs.append(jaxent.SparseDistribution(x["classes_of_target"], x["target"]))
    elif case.table == "divergences":
        inputs.append(logits("target_"))
    elif case["loss"] != "softmax_entropy":
        labels = x.get("labels")
        if "classes_of_labels" in x:
            labels = jaxent.SparseDistribution(x["classes_of_labels"], labels)
        inputs.append(labels)
    if case["loss"] == "softmax_loss":
        given = {"labelled": "labels" in x, "chosen": "classes" in x}
        inputs = [functools.partial(of_statistics, **given), *inputs, x["advantage"]]
    if case.table in ("softmax", "divergences"):
        return f(*inputs, **options, **axes)
    found = f(*inputs, **options)
    return lax.psum(found, tuple(axes.values())) if axes and case["reduction"] == "sum" else found


def of_statistics(s: Any, advantage: Any, labelled: bool, chosen: bool) -> Any:
    log_prob = s.log_prob if labelled else jnp.zeros_like(s.entropy)
    found = oracle.policy(log_prob, s.entropy, s.log_normalizer, s.mean_log_prob, advantage)
    if not chosen:
        return found
    of_slots = jnp.where(jnp.isneginf(s.class_log_probs), 0, s.class_log_probs)
    return found + oracle.of_classes(list(of_slots), s.other_log_prob)


def spec(case: Case, name: str, x: Any) -> P:
    """How an input is split: rows over two devices, classes over four."""
    rows, split = len(ROWS[case["shape"]]), case["split"]
    of_rows = None if split == "by classes" else "rows"
    of_classes = None if split == "by rows" else "classes"
    if (
        split == "unlike" and name not in WITH_THE_LOGITS
    ):  # like the one-hot rows of split labels; masks are whole
        of_rows, of_classes = "rows" if name in TARGETS and x.ndim > rows else None, None
    if name.endswith("kernel"):
        return P(None, of_classes)
    if name in OF_SLOTS or (name == "labels" and case["labels"] == "sparse"):
        of_classes = None
    if x.ndim == 1 and name in (*OF_CLASSES, "class_mask"):
        return P(of_classes)
    axes = [of_rows, *[None] * (rows - 1)]
    if x.ndim > rows:
        at = AXIS[case["shape"]] if case["axis"] else rows
        axes.insert(at, None if name.endswith("hidden") else of_classes)
    return P(*axes)


def placed_loss(case: Case, x: dict[str, Any], mesh: Any) -> Any:
    if case["mode"] != "shard_map":
        return loss(case, x)
    axes = {"batch_axis_name": "rows", "class_axis_name": "classes"}
    axes.pop({"by classes": "batch_axis_name", "by rows": "class_axis_name"}.get(case["split"]), None)
    of_losses = spec(case, "cotangent", np.empty(shape_of_losses(case)))
    is_scalar = case["loss"] == "mean" or case["reduction"] != "none"
    specs = {name: spec(case, name, value) for name, value in x.items()}
    f = functools.partial(loss, case, **axes)
    return jax.shard_map(f, mesh=mesh, in_specs=(specs,), out_specs=P() if is_scalar else of_losses)(x)


def value_and_gradients(case: Case, x: dict[str, Any], ct: Any, mesh: Any) -> Any:
    moving = {name: a for name, a in x.items() if jnp.issubdtype(a.dtype, jnp.floating)}
    moving.pop("class_weights", None)  # constants, as a weight of each class is
    if case.table == "softmax":
        moving.pop("alpha", None)
    blocks = case["source"] if case["source"] in harness.LINEAR else "rows" if layered(case) else "dense"
    with harness.blocks(blocks):
        value, vjp = jax.vjp(lambda moving: placed_loss(case, x | moving, mesh), moving)
        return value, vjp(ct)[0]


def mesh_of(mode: str | None) -> Any:
    if mode is None:
        return None
    if mode.startswith("explicit"):
        return jax.make_mesh((2, 4), ("rows", "classes"))
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("rows", "classes"))


class Result(NamedTuple):
    inputs: dict[str, Any]  # as they are placed
    value: Any
    gradients: dict[str, Any]


def run(table: Sequence[Case], mode: str | None = None) -> dict[Case, Result | Exception]:
    """All of them as one program."""
    mesh = mesh_of(mode)
    arguments = [build(case)[:2] for case in table]
    if mesh is not None:
        specs = [
            (
                {name: spec(case, name, x) for name, x in inputs.items()},
                spec(case, "cotangent", ct) if ct.ndim else P(),
            )
            for case, (inputs, ct) in zip(table, arguments, strict=True)
        ]
        is_spec = {"is_leaf": lambda s: isinstance(s, P)}
        arguments = jax.device_put(
            arguments, jax.tree.map(lambda s: NamedSharding(mesh, s), specs, **is_spec)
        )
    failed: dict[Case, Any] = {}

    def f(arguments: Any) -> dict[int, Any]:
        found = {}
        for i, case in enumerate(table):
            try:
                found[i] = value_and_gradients(case, *arguments[i], mesh)
            except Exception as error:  # the others go on
                failed[case] = error
        return found

    within = (
        jax.set_mesh(mesh) if mode is not None and mode.endswith("set_mesh") else contextlib.nullcontext()
    )
    try:
        with within:
            found = jax.jit(f, compiler_options=harness.QUICK)(arguments)
    except Exception as error:  # of the whole program: which case is it?
        if len(table) == 1:
            return {table[0]: error}
        half = len(table) // 2
        return run(table[:half], mode) | run(table[half:], mode)
    return failed | {table[i]: Result(arguments[i][0], *of) for i, of in found.items()}


def wrong(case: Case, result: Result | Exception) -> list[str]:
    """What is wrong with a result, in words."""
    if isinstance(result, Exception):
        return [f"{type(result).__name__}: {str(result)[:400]}"]
    want, found = build(case), []
    if result.gradients.keys() != want.gradients.keys():
        return [f"gradients by {sorted(result.gradients)}, not by {sorted(want.gradients)}"]
    parts = [("value", result.value, want.value, 0.0)]
    for name, g in result.gradients.items():
        x = result.inputs[name]
        if g.dtype != x.dtype:
            found.append(f"gradient by {name}: {g.dtype}, its input {x.dtype}")
        explicit = case["mode"] is not None and case["mode"].startswith("explicit")
        if explicit and not g.sharding.is_equivalent_to(x.sharding, g.ndim):
            found.append(f"gradient by {name}: split as {g.sharding.spec}, its input as {x.sharding.spec}")
        rounding = HALF[str(g.dtype)] * (3 if layered(case) else 1)
        parts.append((f"gradient by {name}", g, want.gradients[name], rounding))
    for name, got, wanted, rounding in parts:
        bound = (EXACT + rounding) * np.abs(wanted).max()
        try:
            harness.assert_within(np.asarray(got, np.float64), wanted, np.where(wanted == 0, 0, bound), name)
        except AssertionError as error:
            found.append(str(error))
    return found


def check(table: Sequence[Case], mode: str | None = None) -> None:
    results: dict[Case, Any] = {}
    for i in range(0, len(table), AT_A_TIME):
        results |= run(table[i : i + AT_A_TIME], mode)
    found = {case: bad for case, result in results.items() if (bad := wrong(case, result))}
    lines = "".join(f"\n{case}\n    " + "\n    ".join(bad) for case, bad in found.items())
    assert not found, f"{len(found)} of {len(table)} cases:{lines}"
