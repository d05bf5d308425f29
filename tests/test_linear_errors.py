"""What a layer of linear logits may not be, word for word."""

import dataclasses

import numpy as np
import pytest

import jaxent

F32 = np.float32


HIDDEN, KERNEL = np.zeros((4, 2), F32), np.zeros((2, 3), F32)
NO_LIMIT = "1 leaves the logits as they are; the limit at 0 is the argmax, which has no gradient."
FLOATING = "Pass `x.astype(jnp.float32)`."
FORMS = "class indices (integers) of shape [4] or a distribution (floats) of shape [4, 3]"
ERRORS = {
    "kernel transposed": (
        {"kernel": KERNEL.T}, ValueError,
        "`logits.kernel` must be of shape [2, V] (`hidden` is float32[4, 2]), but is float32[3, 2]. "
        "It looks transposed: pass `class_axis=0`.",
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
        {"temperature": 0}, ValueError, f"`logits.temperature` must be a finite number > 0, but is 0. {NO_LIMIT}",
    ),
    "negative temperature": (
        {"temperature": -1.0}, ValueError,
        f"`logits.temperature` must be a finite number > 0, but is -1.0. {NO_LIMIT}",
    ),
    "temperatures of other rows": (
        {"temperature": np.ones(3, F32)}, ValueError,
        f"`logits.temperature` must be of shape [] or [4], but is float32[3]. {NO_LIMIT}",
    ),
    "temperature as text": (
        {"temperature": "1"}, TypeError,
        f"`logits.temperature` must be a number or an array of one, but is a str. {NO_LIMIT}",
    ),
    "softcap 0": (
        {"softcap": 0.0}, ValueError,
        "`logits.softcap` must be a finite number > 0, but is 0.0. For no bound pass None.",
    ),
    "block_bytes 0": (
        {"block_bytes": 0}, ValueError,
        "`logits.block_bytes` must be a positive int or None, but is 0. Bytes come in whole numbers, e.g. `64 * "
        "2**20`; None leaves the choice to jaxent.",
    ),
    "axis 0": (
        {"axis": 0}, ValueError,
        "`axis` must be the last axis, but is 0. "
        "The classes of a LinearLogits come last; `class_axis` is that of its kernel.",
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


def test_errors_of_target_logits():
    layer = jaxent.LinearLogits(HIDDEN, KERNEL)
    for target, message in (
        (
            jaxent.LinearLogits(HIDDEN, KERNEL.T),
            "`target_logits.kernel` must be of shape [2, V] (`hidden` is float32[4, 2]), but is float32[3, 2]. "
            "It looks transposed: pass `class_axis=0`.",
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
