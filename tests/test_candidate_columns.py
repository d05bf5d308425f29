"""Columns of a kernel, those of candidates, in its place: the same loss, and a gradient of these alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import harness
import jaxent
from test_candidates import F32, LOSSES, D, N, S, V, candidates, compiled, each_loss, layer

WIDE = 4096


@each_loss
@pytest.mark.parametrize("kind", ["one label", "T labels, ragged", "samples of rows"])
def test_columns(name, kind):
    """The same loss; its gradient is that of the kernel, column by column."""
    hidden, kernel, bias = layer()
    labels, samples, *_ = candidates(kind)

    def of_kernel(kernel, bias):
        return LOSSES[name](hidden, kernel, labels, samples, bias=bias, reduction="mean")

    def both(kernel, bias):
        columns = [jaxent.candidate_columns(x, labels, samples) for x in (kernel, bias)]
        return jax.value_and_grad(of_kernel, (0, 1))(kernel, bias), jax.value_and_grad(of_kernel, (0, 1))(
            *columns
        )

    (want, slopes), (value, (of_columns, of_bias)) = compiled(both)(kernel, bias)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    for slope, found in zip(slopes, (of_columns, of_bias), strict=True):
        total = jnp.zeros_like(slope)
        for classes, x in zip((labels, samples), found, strict=True):
            total = total.at[..., classes].add(jnp.moveaxis(x, -1, 0) if slope.ndim == 2 else x)
        np.testing.assert_allclose(total, slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int8, np.int64])
@each_loss
def test_columns_of_any_integers(name, dtype):
    hidden, kernel, bias = layer()
    labels, samples, *_ = candidates("one label")
    want = LOSSES[name](hidden, kernel, labels, samples, bias=bias)
    labels, samples = labels.astype(dtype), samples.astype(dtype)
    columns = [jaxent.candidate_columns(x, labels, samples) for x in (kernel, bias)]
    np.testing.assert_allclose(
        LOSSES[name](hidden, columns[0], labels, samples, bias=columns[1]), want, rtol=1e-6
    )
    if dtype == np.int64:
        beyond = np.where(np.arange(N) == 1, 2**32 + 1, labels)
        assert np.isnan(jaxent.candidate_columns(kernel, beyond, samples).labels[1]).all()


@each_loss
def test_a_whole_bias_beside_columns(name):
    """It has one for each class, so a bad label is seen."""
    hidden, kernel, bias = layer()
    labels, samples, *_ = candidates("one label")
    columns = jaxent.candidate_columns(kernel, labels, samples)
    f = compiled(lambda labels: LOSSES[name](hidden, columns, labels, samples, bias=bias))
    np.testing.assert_allclose(f(labels), LOSSES[name](hidden, kernel, labels, samples, bias=bias), rtol=1e-6)
    assert np.isnan(f(np.where(np.arange(N) == 1, V, labels))[1])


COLUMNS = {
    "samples of one": lambda c: (c._replace(samples=c.samples[:1]), None, "kernel.samples"),
    "labels of one": lambda c: (c._replace(labels=c.labels[:1]), None, "kernel.labels"),
    "swapped": lambda c: (type(c)(c.samples, c.labels), None, "kernel.labels"),
    "features": lambda c: (c._replace(samples=c.samples[:, :-1]), None, "kernel.samples"),
    "bias": lambda c: (c, type(c)(c.labels[:, 0], c.samples[:1, 0]), "bias.samples"),
    "whole bias": lambda c: (c, np.ones((1, V), F32), "bias"),
}


@pytest.mark.parametrize("case", COLUMNS)
@each_loss
def test_shapes_of_columns(name, case):
    hidden, kernel, _ = layer()
    labels, samples, *_ = candidates("one label")
    columns, bias, argument = COLUMNS[case](jaxent.candidate_columns(kernel, labels, samples))
    with pytest.raises(ValueError, match=f"`{argument}` must be"):
        LOSSES[name](hidden, columns, labels, samples, bias=bias)


def test_columns_of_what_is_no_kernel():
    labels = np.arange(3)
    for kernel in (np.float32(1), np.ones((2, 3, 4), F32)):
        with pytest.raises(ValueError, match="`kernel` must be of shape"):
            jaxent.candidate_columns(kernel, labels, labels)
    with pytest.raises(ValueError, match="`class_axis` must be -1 or 0"):
        jaxent.candidate_columns(np.ones((2, 3), F32), labels, labels, class_axis=1)


@pytest.mark.parametrize("bad", [V, V + 3, 2**31 - 1, -2])
@each_loss
def test_bad_classes_of_columns(name, bad):
    """The loss, which knows no V, gets NaN for a column that is none; of a label its row, of a sample all rows."""
    hidden, kernel, bias = layer()
    labels, samples, *_ = candidates("one label")

    def losses(labels, samples, hidden):
        columns, of_bias = (jaxent.candidate_columns(x, labels, samples) for x in (kernel, bias))
        where = jnp.arange(N) != 4
        found = LOSSES[name](hidden, columns, labels, samples, bias=of_bias, where=where)
        return jnp.sum(found), found

    f = compiled(jax.grad(losses, 2, has_aux=True))
    slope, found = f(labels, samples, hidden)
    assert np.all(np.isfinite(slope)) and np.all(np.isfinite(found))
    labels[[2, 4]] = bad
    slope, found = f(labels, samples, hidden)
    np.testing.assert_array_equal(np.isnan(found), np.arange(N) == 2)
    np.testing.assert_array_equal(np.isnan(slope).any(1), np.arange(N) == 2)
    samples[1] = bad
    assert np.all(np.isnan(f(labels, samples, hidden)[1]) | (np.arange(N) == 4))


@each_loss
@pytest.mark.parametrize("class_axis", [-1, 0])
def test_only_columns_are_read(name, class_axis):
    """Of a kernel nothing is copied; with its columns the gradient has none of V numbers either."""
    kernel = jnp.zeros((D, WIDE) if class_axis else (WIDE, D))
    hidden, labels, samples = jnp.zeros((N, D)), jnp.zeros(N, jnp.int32), jnp.zeros(S, jnp.int32)

    def f(hidden, kernel):
        return LOSSES[name](hidden, kernel, labels, samples, class_axis=class_axis, reduction="mean")

    def of_columns(hidden, kernel):
        columns = jaxent.candidate_columns(kernel, labels, samples, class_axis=class_axis)
        return jax.value_and_grad(f, (0, 1))(hidden, columns)

    for step, gradients in ((jax.value_and_grad(f, (0, 1)), 1), (of_columns, 0), (jax.grad(f), 0)):
        memory = jax.jit(step).lower(hidden, kernel).compile(harness.FULL).memory_analysis()
        assert memory.temp_size_in_bytes < kernel.nbytes / 10
        assert memory.output_size_in_bytes < gradients * kernel.nbytes + 10_000
