"""Contrastive losses of pairs that are split over devices: y goes round, and nothing is gathered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import harness
import jaxent
from compiled import collectives

DEVICES, N, D = 8, 48, 8
F32 = np.float32
LOSSES = {"softmax": jaxent.softmax_contrastive_loss, "sigmoid": jaxent.sigmoid_contrastive_loss}
TILE = 8 * 4 * 4  # bytes: several tiles on each device, ragged
compiled = functools.partial(jax.jit, compiler_options=harness.QUICK)
each_loss = pytest.mark.parametrize("name", LOSSES)
each_reduction = pytest.mark.parametrize("reduction", ["none", "mean"])


@functools.cache
def arrays(more=0, seed=0):
    rng = np.random.default_rng(seed)
    return F32(rng.normal(size=(N, D))), F32(rng.normal(size=(N + more, D)))


@functools.cache
def options_of(*names, more=0):
    rng = np.random.default_rng(1)
    found = {
        "ids": rng.integers(20, size=N),
        "ids of all": rng.integers(20, size=N + more),
        "where": rng.uniform(size=N) < 0.7,
        "weights": F32(rng.uniform(size=N)),
    }
    return {name.removesuffix(" of all"): found[name] for name in names}


def loss(name, reduction, x, y, scale, options, **static):
    bias = {"bias": F32(-1)} if name == "sigmoid" else {}
    return LOSSES[name](x, y, scale=scale, **bias, **options, reduction=reduction, **static)


def slopes(f):
    """Value and gradients, with cotangents that are not all alike."""

    def total(x, y, scale, options):
        losses = f(x, y, scale, options)
        weights = 1 if losses.ndim == 0 else 1 + jnp.arange(losses.shape[0], dtype=losses.dtype)
        return jnp.vdot(losses, jnp.broadcast_to(jnp.asarray(weights, losses.dtype), losses.shape))

    return jax.value_and_grad(total, (0, 1, 2))


@functools.cache
def expected(name, reduction, *names, more=0):
    case = *arrays(more), F32(2), options_of(*names, more=more)
    return compiled(slopes(functools.partial(loss, name, reduction)))(*case)


def check(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6 * max(1, np.max(np.abs(b))))


def sends_only_lists(program, rows):
    """To the next device, lists of y and numbers of their rows; of all, sums that are numbers."""
    for found in collectives(program):
        sizes = {shape.size for shape in found.shapes}
        if found.kind == "collective-permute":
            assert sizes <= {rows * D, rows, 1}, found
        else:
            assert found.kind == "all-reduce" and sizes == {1}, found


def mesh_of(kind, shape=(DEVICES,), names=("pairs",)):
    return jax.make_mesh(shape, names, axis_types=(getattr(AxisType, kind),) * len(names))


EACH = [(), ("ids", "where", "weights")]
each_options = pytest.mark.parametrize("names", EACH, ids=" + ".join)


@pytest.mark.parametrize("check_vma", [True, False])
@each_options
@each_reduction
@each_loss
def test_shard_map(name, reduction, names, check_vma):
    """Each device has its own pairs; the gradient by scale is that of all."""
    f = functools.partial(loss, name, reduction, batch_axis_name="pairs", block_bytes=TILE)
    specs = P("pairs"), P("pairs"), P(), P("pairs")
    out = P("pairs") if reduction == "none" else P()
    how = {"in_specs": specs, "out_specs": out, "check_vma": check_vma}
    mapped = slopes(jax.shard_map(f, mesh=mesh_of("Auto"), **how))
    case = *arrays(), F32(2), options_of(*names)
    program = compiled(mapped).lower(*case).compile()
    check(program(*case), expected(name, reduction, *names))
    if reduction == "mean":
        sends_only_lists(program, N // DEVICES)


@each_loss
def test_hard_negatives_in_shard_map(name):
    """Each device has its partners first, then its negatives."""
    more = 2 * DEVICES
    x, y = arrays(more)
    ids = options_of("ids of all", more=more)["ids"]
    want = expected(name, "mean", "ids of all", more=more)

    def by_device(a):
        pairs, negatives = a[:N].reshape(DEVICES, -1, *a.shape[1:]), a[N:].reshape(DEVICES, -1, *a.shape[1:])
        return np.concatenate([pairs, negatives], 1).reshape(a.shape)

    f = functools.partial(loss, name, "mean", batch_axis_name="pairs", block_bytes=TILE)
    specs = P("pairs"), P("pairs"), P(), P("pairs")
    mapped = jax.shard_map(f, mesh=mesh_of("Auto"), in_specs=specs, out_specs=P())
    value, (dx, dy, ds) = compiled(slopes(mapped))(x, by_device(y), F32(2), {"ids": by_device(ids)})
    check((value, (dx, dy, ds)), (want[0], (want[1][0], by_device(np.asarray(want[1][1])), want[1][2])))


@pytest.mark.parametrize("mapped", [jax.pmap, jax.vmap])
@each_loss
def test_mapped_axes(name, mapped):
    """Differentiated inside, as a training step is: each device's loss is the mean of all, and they are added up."""
    apart = lambda a: a.reshape(DEVICES, -1, *a.shape[1:])  # noqa: E731

    def f(x, y, options):
        return loss(name, "mean", x, y, F32(2), options, batch_axis_name="pairs")

    case = *map(apart, arrays()), jax.tree.map(apart, options_of("ids", "where", "weights"))
    values, slopes = mapped(jax.value_and_grad(f, (0, 1)), axis_name="pairs")(*case)
    want = expected(name, "mean", "ids", "where", "weights")
    check([values[0], *(a.reshape(N, D) / DEVICES for a in slopes)], [want[0], *want[1][:2]])


SPLITS = {
    "all": ((DEVICES,), ("pairs",), P("pairs"), P("pairs")),
    "one of two axes": ((2, 4), ("pairs", "model"), P("pairs"), P("pairs")),
    "two axes": ((2, 4), ("pairs", "more"), P(("pairs", "more")), P(("pairs", "more"))),
    "features": ((2, 4), ("pairs", "model"), P("pairs", "model"), P("pairs", "model")),
    "x alone": ((DEVICES,), ("pairs",), P("pairs"), P()),
    "nothing": ((DEVICES,), ("pairs",), P(), P()),
}


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("split", SPLITS)
@each_loss
def test_jit(name, split, kind):
    """No keyword: on an auto mesh all devices share the pairs, on an explicit one those that types say."""
    shape, axes, *specs = SPLITS[split]
    mesh, names = mesh_of(kind, shape, axes), EACH[1]
    x, y = (jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arrays(), specs, strict=True))
    case = x, y, F32(2), options_of(*names)
    f = compiled(slopes(functools.partial(loss, name, "mean", block_bytes=TILE)))
    program = f.lower(*case).compile()
    check(program(*case), expected(name, "mean", *names))
    if split in ("all", "two axes"):
        sends_only_lists(program, N // DEVICES)
    with jax.set_mesh(mesh):
        check(f(*case), expected(name, "mean", *names))
        if split == "all":  # and not compiled
            total = functools.partial(loss, name, "mean", block_bytes=TILE)
            check(jax.value_and_grad(total, (0, 1, 2))(*case), expected(name, "mean", *names))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("more", [DEVICES, 5])
@pytest.mark.parametrize("names", [("ids", "where"), ("ids of all",)], ids=" + ".join)
@each_loss
def test_hard_negatives_of_all(name, names, more, kind):
    """Of no number that devices could share evenly."""
    mesh = mesh_of(kind)
    x, y = arrays(more)
    spec = P("pairs") if more % DEVICES == 0 else P()
    case = jax.device_put(x, NamedSharding(mesh, P("pairs"))), jax.device_put(y, NamedSharding(mesh, spec))
    case = *case, F32(2), options_of(*names, more=more)
    got = compiled(slopes(functools.partial(loss, name, "none", block_bytes=TILE)))(*case)
    check(got, expected(name, "none", *names, more=more))
    with jax.set_mesh(mesh):  # and not compiled
        total = functools.partial(loss, name, "mean", block_bytes=TILE)
        got = jax.value_and_grad(total, (0, 1, 2))(*case)
    check(got, expected(name, "mean", *names, more=more))


@each_loss
def test_pairs_that_devices_cannot_share(name):
    mesh = mesh_of("Auto")
    x, y = (jax.device_put(a[:13], NamedSharding(mesh, P())) for a in arrays())
    f = compiled(slopes(functools.partial(loss, name, "mean")))
    check(f(x, y, F32(2), {}), f(*(a[:13] for a in arrays()), F32(2), {}))


@each_loss
def test_second_derivatives(name):
    mesh = mesh_of("Explicit")
    direction = arrays(seed=5)[0]

    def second(x, y, direction):
        f = lambda x: loss(name, "mean", x, y, 2.0, {})  # noqa: E731
        return jax.grad(lambda x: jnp.sum(jax.grad(f)(x) * direction))(x)

    want = compiled(second)(*arrays(), direction)
    with jax.set_mesh(mesh):
        case = (jax.device_put(a, NamedSharding(mesh, P("pairs"))) for a in (*arrays(), direction))
        np.testing.assert_allclose(compiled(second)(*case), want, rtol=1e-4, atol=1e-6)


@each_loss
def test_memory(name):
    """Of each device: an eighth of the lists, and tiles."""
    n, block_bytes = 16_384, 2**20
    f = functools.partial(loss, name, "mean", batch_axis_name="pairs", block_bytes=block_bytes)
    mapped = jax.shard_map(
        f, mesh=mesh_of("Auto"), in_specs=(P("pairs"), P("pairs"), P(), P()), out_specs=P()
    )
    x = jax.ShapeDtypeStruct((n, D), F32)
    step = jax.jit(jax.value_and_grad(mapped, (0, 1, 2)), compiler_options=harness.HLO)
    program = step.lower(x, x, jax.ShapeDtypeStruct((), F32), {}).compile()
    assert program.memory_analysis().temp_size_in_bytes < 6 * block_bytes + 40 * 4 * n * D / DEVICES
    sends_only_lists(program, n // DEVICES)


@each_loss
def test_beside_an_explicit_axis(name):
    """A ring over the axis that shard_map has split, on a mesh whose other one is explicit, or is left to jit."""
    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh = jax.make_mesh((2, 4), ("pairs", "other"), axis_types=(AxisType.Auto, kind))
        f = functools.partial(loss, name, "mean", batch_axis_name="pairs")
        specs = P("pairs"), P("pairs"), P(), P()
        with jax.set_mesh(mesh):
            mapped = jax.shard_map(f, in_specs=specs, out_specs=P(), axis_names={"pairs"})
            np.testing.assert_allclose(
                compiled(mapped)(*arrays(), F32(2), {}), expected(name, "mean")[0], rtol=1e-5
            )
            np.testing.assert_allclose(
                compiled(functools.partial(loss, name, "mean"))(*arrays(), F32(2), {}),
                expected(name, "mean")[0],
                rtol=1e-5,
            )


@each_loss
def test_vmap_on_an_explicit_mesh(name):
    x, y = (a.reshape(2, -1, D) for a in arrays())
    with jax.set_mesh(mesh_of("Explicit")):
        x, y = (jax.device_put(a, P(None, "pairs")) for a in (x, y))
        f = functools.partial(loss, name, "none", scale=F32(2), options={}, batch_axis_name="batch")
        with pytest.raises(ValueError, match="pass nothing"):
            jax.vmap(f, axis_name="batch")(x, y)


@each_loss
def test_without_a_name_each_device_is_alone(name):
    f = functools.partial(loss, name, "mean")
    mapped = jax.shard_map(
        lambda *a: f(*a)[None],
        mesh=mesh_of("Auto"),
        in_specs=(P("pairs"), P("pairs"), P(), P()),
        out_specs=P("pairs"),
    )
    got, some = compiled(mapped)(*arrays(), F32(2), {}), N // DEVICES
    want = compiled(f)(*(a[some : 2 * some] for a in arrays()), F32(2), {})
    np.testing.assert_allclose(got[1], want, rtol=1e-5)
