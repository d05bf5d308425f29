"""Weights of 0 in the elementwise losses and in those on probabilities: what they add, and their derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxent
import oracle_elementwise as oracle

W = np.float32([0, 2, 0.5, 0, 0, 0])  # of the last three: NaN, a bad label, an infinite loss
Z = np.float32([0.5, -1, 2, np.nan, 1, np.inf])
YES = np.float32([0, 1, 0.25, 1, 7, 0])
P = np.float32([0.5, 0.6, 0.3, np.nan, 0.4, 1])
PROBS = np.stack([P / 2, 1 - P, P / 2], -1)
Q = np.float32([[0.25, 0.75, 0], [0, 1, 0], [0.5, 0.25, 0.25], [1, 0, 0], [np.nan, 1, 0], [0.5, 0.5, 0]])
INDEX = np.int32([1, 1, 0, 0, 5, 1])
ONE_HOT = np.where(np.arange(6)[:, None] == 4, np.nan, oracle.one_hot(INDEX, 3))
CLASS_WEIGHTS = np.float32([2, 0.5, 1])
with np.errstate(divide="ignore"):
    LOG_PROBS = np.log(PROBS)
# loss, its input, its labels; the labels as a distribution, and the oracle
CASES = {
    "sigmoid": (jaxent.sigmoid_cross_entropy, Z, YES, YES, oracle.sigmoid_loss),
    "focal": (jaxent.sigmoid_focal_loss, Z, YES, YES, oracle.sigmoid_focal_loss),
    "asymmetric": (functools.partial(jaxent.sigmoid_asymmetric_loss, clip=0.0), Z, YES, YES,
                   functools.partial(oracle.sigmoid_asymmetric_loss, clip=0.0)),
    "binary": (jaxent.binary_cross_entropy, P, YES, YES, oracle.binary_cross_entropy),
    "categorical": (jaxent.categorical_cross_entropy, PROBS, INDEX, ONE_HOT, oracle.categorical_cross_entropy),
    "distribution": (jaxent.categorical_cross_entropy, PROBS, Q, Q, oracle.categorical_cross_entropy),
    "nll": (functools.partial(jaxent.nll_loss, class_weights=CLASS_WEIGHTS), LOG_PROBS, INDEX, ONE_HOT,
            functools.partial(oracle.nll_loss, class_weights=CLASS_WEIGHTS)),
    "nll of a distribution": (jaxent.nll_loss, LOG_PROBS, Q, Q, oracle.nll_loss),
    "kl": (jaxent.kl_divergence, LOG_PROBS, Q, Q, oracle.kl_divergence),
    "generalized kl": (functools.partial(jaxent.kl_divergence, generalized=True), LOG_PROBS, Q, Q,
                       oracle.generalized_kl_divergence),
}  # fmt: skip


@functools.cache
def found():
    """Of all cases, in one program."""

    def of_case(loss, x, labels, w):
        def f(reduction, x, w):
            return loss(x, labels, weights=w, reduction=reduction)

        out = {
            "none": f("none", x, w),
            "by w of none": jax.jvp(lambda w: f("none", x, w), (w,), (jnp.ones(6),))[1],
        }
        for reduction, jacobian in (("sum", jax.jacfwd), ("mean", jax.jacrev)):
            by_w = jax.grad(functools.partial(f, reduction), 1)
            out[reduction] = f(reduction, x, w)
            out[f"{reduction} by x, w"] = jax.grad(functools.partial(f, reduction), (0, 1))(x, w)
            out[f"{reduction} by w and x"] = jacobian(by_w)(x, w)
        return out

    @jax.jit
    def everything(w, inputs, labels):
        return {name: of_case(loss, inputs[name], labels[name], w) for name, (loss, *_) in CASES.items()}

    inputs, labels = ({name: jnp.asarray(case[i]) for name, case in CASES.items()} for i in (1, 2))
    return jax.tree.map(np.asarray, everything(W, inputs, labels))


@pytest.mark.parametrize("case", CASES)
def test_weights_of_0(case):
    got = found()[case]
    loss, slope, *_ = CASES[case][-1](CASES[case][1], CASES[case][3])
    answered = np.isfinite(loss)
    np.testing.assert_array_equal(answered, [True, True, True, False, False, False])
    loss = np.where(answered, loss, 0)
    slope = np.where(answered[:, None], slope.reshape(6, -1), 0)
    # nll: the mean divides by the weights of the labels' classes, too
    of_class = (
        np.where(answered, CLASS_WEIGHTS[INDEX % 3], 0) if case == "nll" else np.where(answered, 1.0, 0)
    )
    total = (W * of_class).sum()
    mean = (W * loss).sum() / total
    each = np.eye(6)[..., None] * slope[None]
    wanted = {
        "none": W * loss,
        "by w of none": loss,
        "sum": (W * loss).sum(),
        "mean": mean,
        "sum by x": W[:, None] * slope,
        "mean by x": W[:, None] * slope / total,
        "sum by w": loss,
        "mean by w": (loss - of_class * mean) / total,
        "sum by w and x": each,
        "mean by w and x": each / total - (of_class[:, None] * W)[..., None] * slope / total**2,
    }

    def check(x, name):
        want = wanted[name].astype(np.float32)
        np.testing.assert_allclose(x.reshape(want.shape), want, rtol=2e-6, atol=2e-7, err_msg=name)

    for name in ("none", "by w of none", "sum", "mean"):
        check(got[name], name)
    for reduction in ("sum", "mean"):
        by_x, by_w = got[f"{reduction} by x, w"]
        check(by_x, f"{reduction} by x")
        check(by_w, f"{reduction} by w")
        check(got[f"{reduction} by w and x"], f"{reduction} by w and x")
