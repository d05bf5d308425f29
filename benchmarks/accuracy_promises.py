"""All cases of benchmarks/accuracy.py with their bounds, which are the promises of docs/numerics.md.

tests/test_worst_cases.py holds the worst inputs that were found to them.
"""

import itertools
from typing import Any

from accuracy_cases import LABEL, LOSS, MIRRORED, OTHERS, Case, Promise, cross_entropy, sigmoid, two_classes
from accuracy_more_cases import (
    F32,
    divergence,
    entropy,
    half_layer,
    layer,
    of_probabilities,
    other_loss,
    others,
    pairs,
    reverse_kl_slope,
    sparse_bounds,
    sparse_target,
)

CLASSES = (2, 10, 16, 1000, 50257)  # 16: the longest sum that is taken one by one
MARGINS = {
    1.0: "0.3",
    4.0: "1e-2",
    9.0: "1e-4",
    18.0: "1e-8",
    36.0: "1e-16",
    69.0: "1e-30",
}  # and the loss, about
SCALES = (0.1, 1.0, 10.0, 100.0)
OFFSETS = (0.0, 100.0, 1e4)
ROWS = tuple(
    {"scale": scale, "offset": offset, "margin": margin}
    for scale, margin in [(x, None) for x in SCALES] + [(3.0, x) for x in MARGINS]
    for offset in OFFSETS
)
# Where the numbers end; around an anchor's last 0, with logits of both signs (`dense_on_cpu.anchor`).
ENDS = tuple(
    {"scale": scale, "offset": offset, "margin": margin}
    for scale, margin in [(3.0, 74.0), (3.0, 78.0), (3.0, 82.0), (30.0, 80.0), (30.0, None)]
    for offset in (-12.0, -4.0, 0.0, 6.0, 70.0)
)
TWO_CLASS_OFFSETS = (0.0, 1.0, -1.0, 100.0, -100.0, 9984.0, -9984.0, 2.0**100)  # bfloat16
FEW_AND_MANY = (2, 3, 12, 300)
ALL_ROWS = {"scale": [0.1, 3.0, 30.0], "offset": OFFSETS, "margin": (None, 4.0, 18.0, 60.0)}
BETAS = (1e-20, 1e-12, 1e-3, 0.1, 0.5, 0.9, 1 - 1e-6, 1 - 1e-9, 1.0)
STEPS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 4.0, 10.0)
SHIFTS = (10.0, -37.3, 100.0, 1e4)
ROUNDED = 0.505  # ulp: from float32 to the nearest number, which is off by float32's error next to the middle of two
ZERO = Promise(0, "rows")


def table(**lists: Any) -> tuple[dict[str, Any], ...]:
    """All combinations."""
    return tuple(dict(zip(lists, x, strict=True)) for x in itertools.product(*lists.values()))


def relative(bound: float) -> Promise:
    return Promise(bound, "relative")


def ulp(bound: float) -> Promise:
    return Promise(bound, "ulp")


def softmax_case(dtype: str, loss: Promise, gradient: Promise, most: tuple = ()) -> Case:
    rows = [(v, x) for v in CLASSES for x in ROWS + ENDS]
    rows += [(v, x) for v in most for x in ROWS[:: len(OFFSETS) + 1]]
    settings = tuple({"dtype": dtype, "classes": v, **x} for v, x in rows)
    return Case(cross_entropy, {LOSS: loss, LABEL: gradient, OTHERS: gradient}, settings)


def divergence_case(**lists: Any) -> Case:
    promises = {"value": relative(2e-6), "below 0": ZERO}
    promises |= {"gradient": relative(1e-6), "target's gradient": relative(1e-6)}
    return Case(divergence, promises, table(**lists), rows=4000)


def sigmoid_case(loss: str, dtype: str, of_loss: Promise, of_gradient: Promise) -> Case:
    gradient = of_gradient if dtype == F32 else ulp(ROUNDED)
    mirrored = {} if loss == "asymmetric" else {MIRRORED: ZERO}
    return Case(
        sigmoid,
        {LOSS: of_loss, "gradient": gradient} | mirrored,
        table(dtype=[dtype], loss=[loss], label=[0.0, 1.0, 0.25]),
    )


EXHAUSTIVE = {
    f"sigmoid {loss}, {dtype}": sigmoid_case(loss, dtype, *promises)
    for loss, promises in {
        "cross-entropy": (ulp(4), relative(1e-6)),
        "focal": (ulp(10), relative(1e-6)),
        "focal, gamma 5": (relative(2e-6), relative(2e-6)),
        "asymmetric": (relative(4e-6), relative(4e-6)),
    }.items()
    for dtype in ("float32", "bfloat16", "float16")
}
EXHAUSTIVE["two classes, bfloat16"] = Case(
    two_classes,
    {LOSS: relative(1e-6), LABEL: ulp(ROUNDED), OTHERS: ulp(ROUNDED)},
    table(dtype=["bfloat16"], other=TWO_CLASS_OFFSETS, label=[0, 1]),
)
SEARCHED = {
    "softmax_cross_entropy, float32": softmax_case(F32, relative(1e-6), relative(1e-6), (1_000_000,)),
    "softmax_cross_entropy, bfloat16": softmax_case("bfloat16", relative(1e-6), ulp(ROUNDED)),
    "softmax_cross_entropy, float16": softmax_case("float16", relative(1e-6), ulp(ROUNDED)),
    "softmax_cross_entropy, float64": softmax_case("float64", relative(1e-14), relative(1e-14)),
    "KL": divergence_case(classes=FEW_AND_MANY, beta=[0.0], step=STEPS, scale=[0.3, 2.0, 5.0]),
    "JS": divergence_case(classes=FEW_AND_MANY, beta=BETAS, step=STEPS, scale=[0.3, 2.0, 5.0]),
    "KL and JS, temperature 3": divergence_case(
        classes=FEW_AND_MANY, beta=[0.0, 0.5, 1.0], step=STEPS, temperature=[3.0]
    ),
    "KL and JS, one shifted": divergence_case(
        classes=[2, 12], beta=[0.0, 0.5, 1.0], step=STEPS[:5], shift=SHIFTS
    ),
    "softmax_entropy": Case(
        entropy,
        {"value": relative(1e-6), "gradient": relative(2e-6)},
        table(classes=FEW_AND_MANY, **ALL_ROWS),
    ),
    "softmax_focal_loss": Case(
        other_loss,
        {LOSS: relative(2e-6), "gradient": relative(2e-6)},
        table(loss=["softmax_focal_loss"], classes=FEW_AND_MANY, **ALL_ROWS),
    ),
    "softmax_poly_loss, label_smoothing, z_loss": Case(
        other_loss,
        {LOSS: relative(1e-6), "gradient": relative(1e-6)},
        table(loss=["softmax_poly_loss", "label_smoothing", "z_loss"], classes=FEW_AND_MANY, **ALL_ROWS),
    ),
    "losses of probabilities": Case(
        of_probabilities,
        {LOSS: ulp(4), "gradient": ulp(4)},
        table(loss=["categorical_cross_entropy", "binary_cross_entropy"]),
    ),
    "other_log_prob": Case(
        others,
        {"value": ulp(6), "gradient": relative(1e-6)},
        table(lead=[-70.0, -30.0, -10.0, -3.0, 0.0, 3.0, 10.0, 30.0, 70.0], offset=[0.0, 100.0]),
    ),
    "SparseDistribution": Case(
        sparse_target, {LOSS: relative(1e-6), "gradient": relative(1e-6)}, table(scale=[0.1, 1.0, 10.0])
    ),
    "KL and JS to a SparseDistribution": Case(
        sparse_bounds,
        {"below 0": ZERO, "above the whole": Promise(4, "roundings")},
        table(scale=[1e-3, 0.3, 1.0, 5.0, 40.0], beta=[0.0, 0.5, 0.9, 1.0]),
    ),
    "reverse KL by probabilities": Case(reverse_kl_slope, {"gradient": relative(1e-6)}, ({},)),
    "LinearLogits, float32": Case(
        layer,
        {LOSS: relative(1e-6), LABEL: relative(1e-6), OTHERS: relative(1e-6)},
        tuple({"classes": 1000, **x} for x in ROWS),
        rows=64,
    ),
    "LinearLogits, bfloat16": Case(
        half_layer,
        {LOSS: Promise(1e-5, "absolute"), "hidden": relative(3e-3), "kernel": relative(3e-3)},
        table(scale=[0.1, 1.0, 3.0]),
        rows=3,
    ),
    "contrastive, float32": Case(
        pairs,
        {LOSS: Promise(2, "roundings"), "gradient": relative(2e-5)},
        table(loss=["softmax", "sigmoid"], scale=[1.0, 4.0, 12.0], dtype=[F32]),
        rows=10,
    ),
    "contrastive, float64": Case(
        pairs,
        {LOSS: Promise(2, "roundings"), "gradient": relative(1e-13)},
        table(loss=["softmax", "sigmoid"], scale=[1.0, 4.0, 12.0], dtype=["float64"]),
        rows=10,
    ),
}
CASES = EXHAUSTIVE | SEARCHED
