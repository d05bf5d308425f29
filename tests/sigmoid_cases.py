"""The elementwise losses from logits, each beside its oracle, and logits that ask them everything."""

import numpy as np
import pytest

import oracle_elementwise as oracle
from jaxent import sigmoid_asymmetric_loss, sigmoid_cross_entropy, sigmoid_focal_loss

LOSSES = [sigmoid_cross_entropy, sigmoid_focal_loss, sigmoid_asymmetric_loss]
ORACLES = {
    sigmoid_cross_entropy: oracle.sigmoid_loss,
    sigmoid_focal_loss: oracle.sigmoid_focal_loss,
    sigmoid_asymmetric_loss: oracle.sigmoid_asymmetric_loss,
}
# loss, options, ulps of the loss, relative error of the gradient: in units of 2**-24 (float32) or 2**-53
FORMS = {
    "plain": (sigmoid_cross_entropy, {}, 4, 17),
    "pos_weight": (sigmoid_cross_entropy, {"pos_weight": 3.25}, 4, 33),
    "smoothed": (sigmoid_cross_entropy, {"label_smoothing": 0.125}, 4, 33),
    "focal": (sigmoid_focal_loss, {}, 10, 17),
    "focal_0": (sigmoid_focal_loss, {"gamma": 0.0, "alpha": 0.25}, 5, 33),
    "focal_alpha": (sigmoid_focal_loss, {"gamma": 0.5, "alpha": 0.25}, 16, 33),
    "focal_steep": (sigmoid_focal_loss, {"gamma": 5.0, "label_smoothing": 0.125}, 33, 33),
    "focal_odd": (sigmoid_focal_loss, {"gamma": 1.7}, 33, 33),
    "asymmetric": (sigmoid_asymmetric_loss, {}, 65, 66),
    "asymmetric_all": (
        sigmoid_asymmetric_loss,
        {
            "gamma_negative": 1.5,
            "gamma_positive": 0.0,
            "clip": 0.25,
            "pos_weight": 0.5,
            "label_smoothing": 0.25,
        },
        33,
        66,
    ),
    "asymmetric_off": (
        sigmoid_asymmetric_loss,
        {"gamma_negative": 0.0, "gamma_positive": 0.0, "clip": 0.25},
        16,
        33,
    ),
}
forms = pytest.mark.parametrize("form", FORMS)
losses = pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)


def numbers(dtype, reach=80.0):
    """Logits of every size, with the three kinds of labels each."""
    rng = np.random.default_rng(0)
    edges = [0.0, 1e-30, -1e-30, 17.0, -17.0, 16.6355, 88.0, 1e-4]
    # just above the clip; in float64 the oracle's own p - clip is too coarse for less
    clip = -np.log(19) + rng.normal(0, 0.1 if dtype == np.float64 else 1e-4, 300)
    z = np.concatenate(
        [rng.normal(0, 3, 1500), rng.uniform(-reach, reach, 700), rng.normal(0, 1e-3, 200), clip, edges]
    )
    z = np.tile(z.astype(dtype), 3)
    kind = np.repeat(np.arange(3), z.size // 3)
    y = np.where(kind == 2, rng.uniform(0, 1, z.size), kind).astype(dtype)
    return z, y
