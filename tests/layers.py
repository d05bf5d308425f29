"""Linear layers that several test files use, and how a result in blocks is compared with that of built logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import harness
import jaxent

F32 = np.float32
compiled = functools.partial(jax.jit, compiler_options=harness.QUICK)
in_blocks = pytest.mark.parametrize("source", harness.LINEAR)
FLAT, SEQUENCES = (7,), (4, 3)
RNG = np.random.default_rng(0)
ADVANTAGE = jnp.asarray(RNG.normal(size=FLAT), F32)
OLD = jnp.asarray(RNG.normal(size=FLAT) - 2, F32)
WIDE = jnp.asarray(RNG.normal(size=(*FLAT, 3)), F32)
FLAGS = jnp.asarray([1, 0, 2, 1, 1, 0, 3])


def layer_of(rows, features=4, classes=11, seed=0):
    rng = np.random.default_rng([seed, *rows])
    operands = (rng.normal(size=s) for s in ((*rows, features), (features, classes), (classes,)))
    return jaxent.LinearLogits(*(jnp.asarray(x, F32) for x in operands))


def assert_same(got, want, what="", tolerance=2e-6):
    assert jax.tree.structure(got) == jax.tree.structure(want), what
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g), np.asarray(w)
        assert g.shape == w.shape and g.dtype == w.dtype, what
        g, w = g.astype(np.float64), w.astype(np.float64)
        assert np.isfinite(w).all(), what
        assert np.linalg.norm((g - w).ravel()) <= tolerance * np.linalg.norm(w.ravel()), (what, g, w)


SOURCES = ("dense", *harness.LINEAR)


def logits_of(source, layer):
    return layer.dense() if source == "dense" else layer
