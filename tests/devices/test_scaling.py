"""The formulas of docs/scaling.md, exactly, in programs that benchmarks/scaling.py compiles."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxent
import scaling
from compiled import collectives
from scaling import Head, Machine

# Sizes of which no block is ragged: XLA would share the last one between forward and backward.
MESHES = {
    "data": Head(4096, 8, 1, features=64, tokens=512, block_bytes=2**23),  # two blocks of rows
    "vocab": Head(4096, 1, 8, features=256, tokens=8, block_bytes=655_360),  # blocks of 256 classes
    "both": Head(4096, 2, 4, features=256, tokens=8, block_bytes=655_360),
}
ITEMSIZE = 4  # CPUs widen an all-reduce of bfloat16
measure = functools.cache(scaling.measure)
meshes = pytest.mark.parametrize("mesh", MESHES)


@meshes
def test_what_is_sent(mesh):
    head = MESHES[mesh]
    found = measure(head)
    assert found.dkernel == (head.data > 1) * ITEMSIZE * head.features * head.classes // head.vocab
    assert found.dhidden == (head.vocab > 1) * ITEMSIZE * head.tokens * head.vocab * head.features
    # a maximum and two sums per row; a loss and the sum of the weights
    assert found.others == (head.vocab > 1) * 3 * 4 * head.rows + (head.data > 1) * 2 * 4
    assert found.kinds == {"all-reduce"}
    assert found.in_loops == 0


@meshes
def test_what_is_held(mesh):
    head = MESHES[mesh]
    found = measure(head)
    kernel, hidden = 2 * head.features * head.classes // head.vocab, 2 * head.rows * head.features
    assert found.arguments == kernel + hidden + 4 * head.rows
    assert (
        kernel + hidden <= found.results < kernel + hidden + 100
    )  # and the loss, and a table of three pointers


@pytest.mark.parametrize(("mesh", "matmuls"), [("data", 3), ("vocab", 4), ("both", 4)])
def test_matmuls(mesh, matmuls):
    assert measure(MESHES[mesh]).matmuls == matmuls


def test_before_compiling_gradients_are_sent_as_bfloat16():
    head = MESHES["both"]
    text = scaling.lower(head).as_text()
    for rows, columns in ((head.features, head.classes_here), (head.rows, head.features)):
        reduced = f"(tensor<{rows}x{columns}xbf16>) -> tensor<{rows}x{columns}xbf16>"
        assert any("}) : " + reduced in line for line in text.splitlines())


def test_rows_that_are_split_over_both_axes():
    """As a data-parallel trunk leaves them: a gather and a scatter take the place of the all-reduce of dhidden."""
    rows, features, classes = 64, 16, 96
    rng = np.random.default_rng(3)
    arrays = (rng.normal(size=(rows, features)), rng.normal(size=(features, classes)))
    hidden, kernel = (jnp.asarray(x, jnp.float32) for x in arrays)
    label = jnp.asarray(rng.integers(classes, size=rows))

    def loss(hidden, kernel, label, **axes):
        logits = jaxent.LinearLogits(hidden, kernel)
        return jaxent.softmax_cross_entropy(logits, label, reduction="mean", **axes)

    def of_split_rows(hidden, kernel, label):
        hidden, label = lax.all_gather((hidden, label), "vocab", tiled=True)
        axes = {"class_axis_name": "vocab", "batch_axis_name": "data"}
        return lax.pmean(loss(hidden, kernel, label, **axes), "vocab")

    arguments, split = (hidden, kernel, label), (P(("data", "vocab")), P(None, "vocab"))
    f = jax.shard_map(
        jax.value_and_grad(of_split_rows, (0, 1)),
        mesh=Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "vocab")),
        in_specs=(*split, split[0]),
        out_specs=(P(), split),
    )
    program = jax.jit(f).lower(*arguments).compile()
    got, want = program(*arguments), jax.value_and_grad(loss, (0, 1))(*arguments)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-6, atol=3e-7)
    sent = {(c.kind, shape) for c in collectives(program) for _, shape in c.shapes if len(shape) == 2}
    assert sent == {
        ("all-gather", (rows // 2, features)),
        ("reduce-scatter", (rows // 8, features)),
        ("all-reduce", (features, classes // 4)),
    }


def test_model_of_all_reduces():
    machine = Machine(fast=100.0, slow=10.0, node=4)
    assert scaling.all_reduce(1000, 1, 1, machine) == 0
    assert scaling.all_reduce(1000, 4, 4, machine) == 2 * 3 / 4 * 1000 / 100
    assert scaling.all_reduce(1000, 2, 1, machine) == 2 * 1 / 2 * 1000 / 10
    assert scaling.all_reduce(1000, 8, 4, machine) == 2 * 3 / 4 * 1000 / 100 + 2 * 1 / 2 * 250 / 10


def test_report(monkeypatch, tmp_path, capsys):
    """All that is printed and drawn, for a small vocabulary."""
    monkeypatch.setattr(
        sys, "argv", ["scaling.py", "--devices", "8", "--classes", "4096", "--out", str(tmp_path)]
    )
    scaling.main()
    printed = capsys.readouterr().out
    for head in scaling.all_meshes([4096], [8]):
        assert printed.count(head.name) >= 2
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
