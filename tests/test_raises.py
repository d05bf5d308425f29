"""What raises while tracing, for each loss; the messages themselves are in test_errors.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxent

NAN = np.nan
LOSSES = ("softmax_cross_entropy", "softmax_focal_loss", "softmax_poly_loss")


RAISES = {
    "label -1 on the host": (ValueError, (4, 3), np.array([0, 1, -1, 0]), {}),
    "label V on the host": (ValueError, (4, 3), np.array([0, 1, 3, 0]), {}),
    "label 2^32 + 1 on the host": (ValueError, (4, 3), np.array([0, 2**32 + 1, 1, 0]), {}),
    "float labels [N]": (TypeError, (4, 3), np.zeros(4, np.float32), {}),
    "bool labels [N]": (TypeError, (4, 3), np.zeros(4, bool), {}),
    "integer one-hot": (TypeError, (4, 3), np.eye(3, dtype=np.int32)[[0, 1, 2, 0]], {}),
    "labels [N, 1]": (ValueError, (4, 3), np.zeros((4, 1), np.int32), {}),
    "labels [1]": (ValueError, (4, 3), np.zeros(1, np.int32), {}),
    "labels []": (ValueError, (4, 3), np.int32(0), {}),
    "labels [N + 1]": (ValueError, (4, 3), np.zeros(5, np.int32), {}),
    "a distribution [V] for [V, V]": (Exception, (3, 3), np.ones(3, np.float32) / 3, {}),
    "a distribution [1, V]": (ValueError, (4, 3), np.ones((1, 3), np.float32), {}),
    "where [1]": (ValueError, (4, 3), np.zeros(4, np.int32), {"where": np.ones(1, bool)}),
    "where that is not bool": (TypeError, (4, 3), np.zeros(4, np.int32), {"where": np.ones(4)}),
    "weights [1]": (ValueError, (4, 3), np.zeros(4, np.int32), {"weights": np.ones(1)}),
    "class_weights [1]": (ValueError, (4, 3), np.zeros(4, np.int32), {"class_weights": np.ones(1)}),
    "class_weights [N]": (ValueError, (4, 3), np.zeros(4, np.int32), {"class_weights": np.ones(4)}),
    "class_mask [N]": (ValueError, (4, 3), np.zeros(4, np.int32), {"class_mask": np.ones(4, bool)}),
    "smoothing -0.1": (ValueError, (4, 3), np.zeros(4, np.int32), {"label_smoothing": -0.1}),
    "smoothing 1.1": (ValueError, (4, 3), np.zeros(4, np.int32), {"label_smoothing": 1.1}),
    "smoothing NaN": (ValueError, (4, 3), np.zeros(4, np.int32), {"label_smoothing": NAN}),
    "negative z_loss": (ValueError, (4, 3), np.zeros(4, np.int32), {"z_loss": -1e-4}),
    "unknown reduction": (ValueError, (4, 3), np.zeros(4, np.int32), {"reduction": "average"}),
    "axis": (ValueError, (4, 3), np.zeros(4, np.int32), {"axis": 2}),
    "no classes": (ValueError, (4, 0), np.zeros(4, np.int32), {}),
    "a scalar": (ValueError, (), np.int32(0), {}),
    "ignore_index with a distribution": (
        ValueError,
        (4, 3),
        np.ones((4, 3), np.float32),
        {"ignore_index": 0},
    ),
}


@pytest.mark.parametrize("name", RAISES)
def test_raises_while_tracing(name):
    kind, shape, labels, options = RAISES[name]
    for loss in LOSSES:
        with pytest.raises(kind, match=f"jaxent.{loss}: `"):
            f = getattr(jaxent, loss)
            jax.eval_shape(lambda z, f=f: f(z, labels, **options), jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, jnp.bool_])
def test_logits_must_be_real_numbers(dtype):
    z = jax.ShapeDtypeStruct((4, 3), dtype)
    for loss in LOSSES:
        with pytest.raises(TypeError, match=loss):
            jax.eval_shape(lambda z, loss=loss: getattr(jaxent, loss)(z, np.zeros(4, np.int32)), z)
    for f in (jaxent.softmax_entropy, jaxent.softmax_statistics):
        with pytest.raises(TypeError, match=f.__name__):
            jax.eval_shape(f, z)
    with pytest.raises(TypeError, match="softmax_kl_divergence"):
        jax.eval_shape(jaxent.softmax_kl_divergence, z, z)


def test_what_fn_reads_needs_labels():
    z = jnp.zeros((4, 3))
    message = "`labels` must be given for `fn` to read `log_prob`, but is None."
    with pytest.raises(TypeError, match=message):
        jaxent.softmax_loss(lambda s: -s.log_prob, z, None)
    with pytest.raises(ValueError, match="but is one to a tuple"):
        jaxent.softmax_loss(lambda s: (s.entropy,), z, None)
