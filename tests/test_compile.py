"""What the compiled programs hold and compute: memory, arrays as large as the logits, statistics not asked for."""

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jaxent
from harness import FULL, QUICK
from jaxent import _contracts as contracts
from programs import avals

N, V = 2048, 32_000
LOSSES = {
    "plain": {},
    "smoothing and z-loss": {"label_smoothing": 0.1, "z_loss": 1e-4},
}


def shapes(rows, classes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct((rows, classes), dtype), jax.ShapeDtypeStruct((rows,), jnp.int32)


def mean_loss(options):
    return functools.partial(jaxent.softmax_cross_entropy, reduction="mean", **options)


@functools.cache
def compiled(name, rows, classes, gradient, donate=()):
    f = mean_loss(LOSSES[name])
    f = jax.value_and_grad(f) if gradient else f
    return jax.jit(f, donate_argnums=donate).lower(*shapes(rows, classes)).compile(FULL)


@pytest.mark.parametrize("name", LOSSES)
def test_temporary_memory(name):
    """3 MB beside 262 MB of logits: forward; with the gradient; with the gradient in the logits' place."""
    forward = compiled(name, N, V, False).memory_analysis()
    backward = compiled(name, N, V, True).memory_analysis()
    donated = compiled(name, N, V, True, (0,)).memory_analysis()
    for memory in (forward, backward, donated):
        assert memory.temp_size_in_bytes <= 3_100_000
    assert forward.output_size_in_bytes < 100
    assert backward.output_size_in_bytes < 4 * N * V + 100
    assert donated.alias_size_in_bytes == 4 * N * V


@pytest.mark.parametrize("name", LOSSES)
def test_a_million_classes(name):
    """Nothing larger than the logits; forward nothing as large, with a gradient one memory: exponentials, then it."""
    rows, classes = 32, 1_000_000
    f = jax.value_and_grad(mean_loss(LOSSES[name]))
    largest = max(np.prod(aval.shape) for aval in avals(jax.make_jaxpr(f)(*shapes(rows, classes)).jaxpr))
    assert largest == rows * classes
    for gradient in (False, True):
        program = compiled(name, rows, classes, gradient)
        memory = program.memory_analysis()
        assert memory.temp_size_in_bytes < classes  # a byte for each class of one row
        assert memory.output_size_in_bytes < 4 * rows * classes * gradient + 100
        assert buffers(program, (rows, classes)) == 2 * gradient


def buffers(program, shape):
    """How many arrays of `shape` the program writes: results outside of fusions, but its arguments."""
    size = ",".join(map(str, shape))
    found = 0
    for body in re.split(r"\n(?=\S)", program.as_text()):
        if body.startswith(("%fused", "fused", "%parallel_fused", "%wrapped", "wrapped")):
            continue
        lines = re.findall(rf"^ +(?:ROOT )?%?\S+ = \w+\[{size}\]\S* ([\w-]+)\(", body, re.MULTILINE)
        found += sum(kind not in ("parameter", "get-tuple-element", "bitcast", "call") for kind in lines)
    return found


def test_buffers_are_counted():
    """The counter above sees a one-hot that is written out."""

    def one_hot(z, y):
        hot = jax.lax.optimization_barrier(jax.nn.one_hot(y, z.shape[-1]))
        return jnp.sum(hot * z)

    program = jax.jit(one_hot).lower(*shapes(32, 4096)).compile(FULL)
    assert buffers(program, (32, 4096)) >= 1


# What each statistic adds per logit to an objective of log_prob alone: it must not be in there unread.
READS = {
    "log_prob": lambda s: -s.log_prob,
    "entropy": lambda s: -s.log_prob - s.entropy,
    "mean_log_prob": lambda s: -s.log_prob - s.mean_log_prob,
    "rank": lambda s: -s.log_prob - s.rank.astype(jnp.float32),
    "prediction": lambda s: -s.log_prob - s.prediction.astype(jnp.float32),
}


@functools.cache
def operations(name, gradient):
    """Floating point operations per logit, transcendental ones among them."""
    f = functools.partial(jaxent.softmax_loss, READS[name])
    f = jax.value_and_grad(f) if gradient else f
    cost = jax.jit(f).lower(*shapes(64, 4096)).compile(QUICK).cost_analysis()
    return np.array([cost["flops"], cost["transcendentals"]]) / (64 * 4096)


@pytest.mark.parametrize("gradient", [False, True])
def test_statistics_that_are_not_read_cost_nothing(gradient):
    alone = operations("log_prob", gradient)
    cross_entropy = jaxent.softmax_cross_entropy
    mean = functools.partial(cross_entropy, reduction="mean")
    mean = jax.value_and_grad(mean) if gradient else mean
    cost = jax.jit(mean).lower(*shapes(64, 4096)).compile(QUICK).cost_analysis()
    assert alone[0] == pytest.approx(cost["flops"] / (64 * 4096), rel=1e-3)
    assert alone[1] == pytest.approx(1, rel=0.05)  # exp of each logit once
    for name in READS:
        if name != "log_prob":
            assert operations(name, gradient)[0] > alone[0] + 1, name
    assert operations("entropy", gradient)[1] > alone[1] + 0.9


def test_a_field_that_is_read_and_thrown_away_costs_nothing():
    """Read but not used: XLA takes it out."""
    f = functools.partial(jaxent.softmax_loss, lambda s: -s.log_prob + jnp.zeros_like(s.rank, jnp.float32))
    cost = jax.jit(f).lower(*shapes(64, 4096)).compile(QUICK).cost_analysis()
    assert cost["flops"] / (64 * 4096) == pytest.approx(operations("log_prob", False)[0], rel=1e-2)


def instructions(f, *arguments):
    text = jax.jit(f).lower(*arguments).compile(QUICK).as_text()
    return len(re.findall(r"^ +(?:ROOT )?%?\S+ = ", text, re.MULTILINE))


@pytest.mark.parametrize("classes", [7, 4096])
@pytest.mark.parametrize("gradient", [False, True])
def test_checks_that_nobody_asked_for_compile_to_nothing(classes, gradient, monkeypatch):
    def f(z, y):
        loss = jaxent.softmax_cross_entropy(z, y, ignore_index=-1, reduction="sum")
        return loss + jaxent.softmax_loss(lambda s: s.rank.astype(s.log_prob.dtype) + s.log_prob, z, y)

    def count():
        g = lambda z, y: f(z, y)  # noqa: E731  (a new function, or jax takes the trace it has)
        return instructions(jax.value_and_grad(g) if gradient else g, *shapes(16, classes))

    with_checks = count()
    called = []
    monkeypatch.setattr(contracts, "explained_labels", lambda _, labels, *__: (called.append(1), labels)[1])
    assert count() == with_checks
    assert called


@pytest.mark.parametrize("platform", ["tpu", "cuda", "rocm"])
def test_other_platforms_get_one_fused_pass(platform):
    """Sums in groups, gathers and scatters are for the CPU."""
    mean = mean_loss(LOSSES["smoothing and z-loss"])
    forward, both = (jax.jit(f).trace(*shapes(64, 4096)) for f in (mean, jax.value_and_grad(mean)))
    for traced in (forward, both):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "gather" not in text and "scatter" not in text
        assert not re.search(r"tensor<64x\d+x\d+xf32>", text)
    on_cpu = forward.lower(lowering_platforms=("cpu",)).as_text()
    assert "gather" in on_cpu and re.search(r"tensor<64x\d+x\d+xf32>", on_cpu)
    assert "scatter" in both.lower(lowering_platforms=("cpu",)).as_text()
