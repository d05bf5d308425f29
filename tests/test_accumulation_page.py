"""What docs/accumulation.md says beside its blocks, which tests/test_readme.py runs: what is sent, and multiplied.

This file is started once more, as a program, on eight CPU devices: jax counts its devices once.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxent
from compiled import collectives, matmul_operations
from test_readme import PAGES, PATTERN

BLOCKS = [code for code, _ in PATTERN.findall(PAGES["accumulation.md"])]
KERNEL = (16, 512)  # in all blocks


def names_of(text):
    """What the block with this text leaves behind."""
    (code,) = (code for code in BLOCKS if text in code)
    found = {}
    exec(code, found)
    return found


def test_blocks_check_themselves():
    assert len(BLOCKS) == 5 and all("print(" in code for code in BLOCKS)


def test_figures_take_no_matmul(as_users_run):
    block = names_of("has_aux")
    program = block["step"].lower(*map(block.get, ("kernel", "hidden", "labels", "where"))).compile()
    assert matmul_operations(program) == 4 * 2 * (2 * 64 * 16 * 512)  # of each micro-batch: logits, dkernel


def test_on_eight_devices():
    paths = [str(Path(__file__).parents[1] / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    run = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stdout + run.stderr


def sent(f, *arguments):
    """(how a gradient of the kernel travels, and whether in a loop; the kinds of all else that is not a number)"""
    found = collectives(jax.jit(f).lower(*arguments).compile())
    gradients = [c for c in found if any(shape == KERNEL for _, shape in c.shapes)]
    others = {c.kind for c in found if c not in gradients and any(shape for _, shape in c.shapes)}
    return [(c.kind, c.in_loop) for c in gradients], others


def assert_all_close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-5, atol=1e-6)


def check_shard_map():
    block = names_of("jax.shard_map")
    arrays = [block[name] for name in ("kernel", "hidden", "labels")]
    assert sent(block["sharded"], *arrays) == ([("all-reduce", False)], set())

    def gradient(kernel, hidden, labels, name=None):
        """Without a copy; and with the loss's own `batch_axis_name`."""
        total = jaxent.total_weight(labels, ignore_index=-1, batch_axis_name="rows")

        def part(kernel, hidden, labels):
            options = {"ignore_index": -1, "reduction": "sum", "batch_axis_name": name}
            return (
                jaxent.softmax_cross_entropy(jaxent.LinearLogits(hidden, kernel), labels, **options) / total
            )

        def micro_batch(sums, batch):
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(part)(kernel, *batch)), None

        sums, _ = lax.scan(micro_batch, (0.0, jnp.zeros_like(kernel)), (hidden, labels))
        return lax.psum(sums, "rows") if name is None else sums

    def mapped(gradient, **options):
        rows = P(None, "rows")
        return jax.shard_map(
            gradient, mesh=block["mesh"], in_specs=(P(), rows, rows), out_specs=P(), **options
        )

    named = mapped(lambda *x: gradient(*x, name="rows"))
    assert_all_close(jax.jit(named)(*arrays), block["want"])
    assert sent(named, *arrays) == ([("all-reduce", True)], set())
    assert_all_close(jax.jit(mapped(gradient, check_vma=False))(*arrays), block["want"])
    kernel, hidden, labels = arrays
    found = jax.pmap(gradient, axis_name="rows", in_axes=(None, 1, 1))(
        kernel, hidden.reshape(4, 8, 8, 16), labels.reshape(4, 8, 8)
    )
    assert_all_close(jax.tree.map(lambda x: x[0], found), block["want"])


def check_jit():
    block = names_of("optax.chain")
    step, state, rows = block["step"], block["optimizer"].init, [block["inputs"], block["labels"]]
    want = step(block["params"], state(block["params"]), *rows)[2:]
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2,), ("rows",), axis_types=(kind,), devices=jax.devices()[:2])
        params = jax.device_put(block["params"], NamedSharding(mesh, P()))
        arguments = params, state(params), *jax.device_put(rows, NamedSharding(mesh, P(None, "rows")))
        assert_all_close(step(*arguments)[2:], want)
        assert sent(step, *arguments)[0] == [("all-reduce", True)]


def check_cuts():
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    x = jax.device_put(jnp.ones((32, 16)), NamedSharding(mesh, P("rows")))

    def add_up(x):
        return lax.scan(lambda total, x: (total + jnp.sum(jnp.tanh(x)), None), 0.0, x)[0]

    assert sent(lambda x: add_up(x.reshape(8, 4, *x.shape[1:]).swapaxes(0, 1)), x)[1] == set()
    assert sent(lambda x: add_up(x.reshape(4, 8, *x.shape[1:])), x)[1] == {"all-gather"}


if __name__ == "__main__":
    check_shard_map()
    check_jit()
    check_cuts()
