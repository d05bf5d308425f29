"""What the devices send, read from compiled programs of a 2 x 4 mesh: a few numbers per row, and gradients once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxent
from compiled import collectives

N, D, V = 64, 16, 256
HERE = N // 2  # rows of a device
AUTO = Mesh(np.array(jax.devices()).reshape(2, 4), ("rows", "classes"))
AXES = {"class_axis_name": "classes", "batch_axis_name": "rows"}


def mean(logits, labels, **axes):
    return jaxent.softmax_cross_entropy(logits, labels, reduction="mean", **axes)


def sent(f, mesh, specs, *shapes):
    """The collectives of a program of arrays so split."""
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for (shape, dtype), spec in zip(shapes, specs, strict=True)
    ]
    found = collectives(jax.jit(f).lower(*arguments).compile())
    assert {c.kind for c in found} == {"all-reduce"}
    return found


@pytest.mark.parametrize("form", ["auto", "explicit", "shard_map"])
def test_dense_logits(form):
    """Three numbers per row: the maximum, the label's logit, the sum of the others. And the mean."""
    specs = P("rows", "classes"), P("rows")
    f = mean
    if form == "shard_map":
        f = jax.shard_map(lambda *x: mean(*x, **AXES), mesh=AUTO, in_specs=specs, out_specs=P())
    mesh = jax.make_mesh((2, 4), ("rows", "classes")) if form == "explicit" else AUTO
    found = sent(jax.value_and_grad(f), mesh, specs, ((N, V), jnp.float32), ((N,), jnp.int32))
    assert sum(c.bytes for c in found) <= 3 * 4 * HERE + 16 == 400
    assert not any(c.in_loop for c in found)


def test_without_check_vma_the_transposes_are_sent_too():
    specs = P("rows", "classes"), P("rows")
    f = jax.shard_map(lambda *x: mean(*x, **AXES), mesh=AUTO, in_specs=specs, out_specs=P(), check_vma=False)
    found = sent(jax.value_and_grad(f), AUTO, specs, ((N, V), jnp.float32), ((N,), jnp.int32))
    assert sum(c.bytes for c in found) <= 5 * 4 * HERE + 16


@pytest.mark.parametrize("form", ["inside", "outside", "explicit"])
def test_linear_logits(form):
    """dhidden once over the classes, dkernel once over the rows."""

    def loss(hidden, kernel, labels, **axes):
        return mean(jaxent.LinearLogits(hidden, kernel, block_bytes=2**14), labels, **axes)

    specs = P("rows"), P(None, "classes"), P("rows")
    f = jax.value_and_grad(loss, (0, 1))
    mesh = AUTO
    if form == "inside":
        gradients = jax.value_and_grad(lambda *x: loss(*x, **AXES), (0, 1))
        f = jax.shard_map(gradients, mesh=AUTO, in_specs=specs, out_specs=(P(), specs[:2]))
    elif form == "outside":
        f = jax.shard_map(lambda *x: loss(*x, **AXES), mesh=AUTO, in_specs=specs, out_specs=P())
        f = jax.value_and_grad(f, (0, 1))
    else:
        mesh = jax.make_mesh((2, 4), ("rows", "classes"))
    shapes = ((N, D), jnp.float32), ((D, V), jnp.float32), ((N,), jnp.int32)
    found = sent(f, mesh, specs, *shapes)
    assert not any(c.in_loop for c in found)
    parts = [shape for c in found for _, shape in c.shapes]
    assert sorted(shape for shape in parts if len(shape) == 2) == [(D, V // 4), (HERE, D)]
    others = [shape for shape in parts if len(shape) < 2]
    assert sum(map(np.prod, others)) <= 3 * HERE + 4


def test_masked_rows_stay_where_they_are():
    """Sorted among those of their own device; how many blocks are needed is one number."""

    def loss(hidden, kernel, labels, where):
        logits = jaxent.LinearLogits(hidden, kernel, block_bytes=2**14)
        return jaxent.softmax_cross_entropy(logits, labels, where=where, reduction="mean")

    specs = P("rows"), P(), P("rows"), P("rows")
    shapes = ((N, D), jnp.float32), ((D, V), jnp.float32), ((N,), jnp.int32), ((N,), bool)
    found = sent(jax.value_and_grad(loss, (0, 1)), AUTO, specs, *shapes)
    assert {shape[:1] for c in found for _, shape in c.shapes} == {
        (),
        (D,),
    }  # numbers, and columns of dkernel
