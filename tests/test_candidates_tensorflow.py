"""Parity with tf.nn.sampled_softmax_loss and tf.nn.nce_loss: stored values, all cases where TensorFlow is installed."""

import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import harness
import jaxent
from tensorflow_cases import CASES, KEPT, NAMES, STORED, case, of_tensorflow

VALUES = json.loads(STORED.read_text())
OURS = {"sampled_softmax_loss": jaxent.sampled_softmax_cross_entropy, "nce_loss": jaxent.nce_loss}
each_name = pytest.mark.parametrize("name", NAMES)


def check(name, x, losses, gradients):
    of_labels, of_samples = map(np.log, x.expected)
    labels, samples = np.int32(x.labels), np.int32(x.samples)

    @functools.partial(jax.jit, compiler_options=harness.QUICK)
    def run(hidden, table, bias):
        def f(hidden, table, bias):
            counts = {"log_expected_counts": of_samples, "label_log_expected_counts": of_labels}
            options = {"class_axis": 0, "remove_accidental_hits": x.remove_accidental_hits}
            return OURS[name](hidden, table, labels, samples, bias=bias, **counts, **options)

        value, vjp = jax.vjp(f, hidden, table, bias)
        return value, vjp(jnp.ones_like(value))

    value, slopes = run(x.hidden, x.table, x.bias)
    np.testing.assert_allclose(value, losses, rtol=1e-6, atol=1e-6)
    for got, want in zip(slopes, gradients, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@each_name
@pytest.mark.parametrize("seed", range(KEPT))
def test_stored_values(name, seed):
    losses, *gradients = map(np.float32, VALUES[f"{name} {seed}"])
    check(name, case(seed), losses, gradients)


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="no tensorflow")
@each_name
@pytest.mark.parametrize("seed", range(CASES))
def test_live(name, seed):
    check(name, case(seed), *of_tensorflow(name, case(seed)))
