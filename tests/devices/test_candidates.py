"""Sampled softmax and NCE where rows, or the classes of the kernel, are split over devices."""

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

N, D, V, S, T = 8, 6, 4096, 16, 2
LOSSES = {"softmax": jaxent.sampled_softmax_cross_entropy, "nce": jaxent.nce_loss}
SPECS = {
    "hidden": P("rows"),
    "kernel": P(None, "classes"),
    "bias": P("classes"),
    "labels": P("rows"),
    "samples": P(),
}
compiled = functools.partial(jax.jit, compiler_options=harness.QUICK)


@functools.cache
def arrays():
    """Labels and samples are on all devices; one of each row is both."""
    rng = np.random.default_rng(0)
    found = {
        name: np.float32(rng.normal(size=size))
        for name, size in {"hidden": (N, D), "kernel": (D, V), "bias": (V,)}.items()
    }
    labels, samples = rng.integers(V, size=(N, T)), rng.choice(V, size=S, replace=False)
    labels[:, 1] = samples[:N]
    labels[3, 0] = -1
    return found | {"labels": np.int32(labels), "samples": np.int32(samples)}


def loss(name, reduction, x, **axes):
    layer = x["hidden"], x["kernel"], x["labels"], x["samples"]
    return LOSSES[name](*layer, bias=x["bias"], reduction=reduction, **axes)


def slopes(f, x):
    moving = {name: x[name] for name in ("hidden", "kernel", "bias")}
    return jax.value_and_grad(lambda moving: jnp.sum(f(x | moving)))(moving)


@functools.cache
def expected(name, reduction):
    return compiled(functools.partial(slopes, functools.partial(loss, name, reduction)))(arrays())


def check(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(name, reduction, check_vma):
    """Each device gathers what it has; what is sent is logits of candidates, and gradients."""
    mesh = jax.make_mesh((2, 4), ("rows", "classes"), axis_types=(AxisType.Auto,) * 2)
    axes = {"class_axis_name": "classes", "batch_axis_name": "rows"}
    f = functools.partial(loss, name, reduction, **axes)
    out = P("rows") if reduction == "none" else P()
    mapped = jax.shard_map(f, mesh=mesh, in_specs=(SPECS,), out_specs=out, check_vma=check_vma)
    program = compiled(functools.partial(slopes, mapped)).lower(arrays()).compile()
    check(program(arrays()), expected(name, reduction))
    assert all(c.kind == "all-reduce" for c in collectives(program))


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("split", ["rows", "classes", "both"])
def test_jit(kind, name, split):
    mesh = jax.make_mesh((2, 4), ("rows", "classes"), axis_types=(getattr(AxisType, kind.title()),) * 2)
    left = {"rows": {"classes"}, "classes": {"rows"}, "both": set()}[split]
    specs = {x: P(*(None if axis in left else axis for axis in spec)) for x, spec in SPECS.items()}
    x = jax.device_put(arrays(), {x: NamedSharding(mesh, spec) for x, spec in specs.items()})
    f = compiled(functools.partial(slopes, functools.partial(loss, name, "mean")))
    program = f.lower(x).compile()
    check(program(x), expected(name, "mean"))
    # the gradient of the kernel, summed over rows (on an auto mesh of all its classes); no kernel
    gradient = 4 * (D + 1) * V // (4 if (kind, split) == ("explicit", "both") else 1)
    assert max((c.bytes for c in collectives(program)), default=0) < gradient * (split != "classes") + 4000


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("jitted", [True, False])
@pytest.mark.parametrize("hits", [True, False])
def test_samplers_on_an_explicit_mesh(name, jitted, hits):
    """Each row with one label; expected counts are split as the labels are."""
    x = arrays()
    x = {"hidden": x["hidden"], "kernel": x["kernel"], "labels": x["labels"][:, 1]}
    counts = np.arange(1, V + 1, dtype=np.float32)

    def step(hidden, kernel, labels):
        samples = jaxent.learned_sampler(jax.random.key(0), counts, S)
        of_labels = samples.log_expected_counts_of(labels)
        options = {"log_expected_counts": samples.log_expected_counts, "remove_accidental_hits": hits}
        options |= {"label_log_expected_counts": of_labels, "reduction": "mean"}
        return LOSSES[name](hidden, kernel, labels, samples.classes, **options)

    f = jax.value_and_grad(step, (0, 1))
    want = compiled(f)(*map(jnp.asarray, x.values()))
    mesh = jax.make_mesh((8,), ("rows",))
    with jax.set_mesh(mesh):
        split = jax.device_put(
            tuple(x.values()), tuple(NamedSharding(mesh, P(*s)) for s in (("rows",), (), ("rows",)))
        )
        got = (compiled(f) if jitted else f)(*split)
    check(got, want)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("jitted", [True, False])
def test_columns_on_an_explicit_mesh(name, jitted):
    """Of a table that all devices have, and labels that are split with the rows; a bad one is NaN there too."""
    x = arrays()
    labels = np.where(np.arange(N) == 2, V, x["labels"][:, 1])

    def f(hidden, kernel, labels, samples):
        columns = jaxent.candidate_columns(kernel, labels, samples)
        losses = LOSSES[name](hidden, columns, labels, samples)
        found = jaxent.candidate_logits(hidden, kernel, labels, samples)
        return losses, jaxent.softmax_statistics(**found._asdict(), names=("log_prob", "rank"))

    case = x["hidden"], x["kernel"], jnp.asarray(labels), jnp.asarray(x["samples"])
    want = compiled(f)(*case)
    np.testing.assert_array_equal(np.isnan(want[0]), np.arange(N) == 2)
    mesh = jax.make_mesh((2, 4), ("rows", "classes"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        case = jax.device_put(
            case, tuple(NamedSharding(mesh, spec) for spec in (P("rows"), P(), P("rows"), P()))
        )
        check((compiled(f) if jitted else f)(*case), want)
