"""Linear logits with the batch split over devices: the same as on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import harness
import jaxent
from jaxent._logits import sources
from jaxent._logits.plan import Plan
from tables import thinned

N, D, V = 40, 6, 90  # five rows on each device
REDUCTIONS = ("sum", "none")
PLANS = {
    "rows": lambda sizes, *_: Plan(min(3, sizes.rows), V),
    "pieces": lambda sizes, *_: Plan(1, V, pieces=3),
    "classes": lambda sizes, *_: Plan(sizes.rows, 40),
}


@pytest.fixture
def plan(request, monkeypatch):
    monkeypatch.setattr(sources, "plan", PLANS[request.param])
    monkeypatch.setattr("jax.lax.empty", harness.nans)


@functools.cache
def inputs():
    rng = np.random.default_rng(2)
    hidden, kernel, bias = rng.normal(size=(N, D)), rng.normal(size=(D, V)), rng.normal(size=V)
    label, where = (
        rng.integers(V, size=N),
        rng.uniform(size=N) < np.arange(N) / N,
    )  # from none to all of a device
    hidden[~where] = np.nan
    arrays = [jnp.asarray(x, jnp.float32) for x in (hidden, kernel, bias)]
    return *arrays, jnp.asarray(label), jnp.asarray(where)


def loss(reduction, hidden, kernel, bias, label, where):
    logits = jaxent.LinearLogits(hidden, kernel, bias)
    return jnp.sum(
        jaxent.softmax_cross_entropy(logits, label, where=where, reduction=reduction, label_smoothing=0.1)
    )


@functools.cache
def expected():
    """Value and gradients of the sum, from logits that are built."""
    hidden, *rest = inputs()
    where = rest[-1]

    def dense(hidden, kernel, bias, label, where):
        z = hidden @ kernel + bias[None]
        return jaxent.softmax_cross_entropy(z, label, where=where, reduction="sum", label_smoothing=0.1)

    hidden = jnp.where(where[:, None], hidden, 0)
    return jax.jit(jax.value_and_grad(dense, (0, 1, 2)))(hidden, *rest)


def assert_expected(got):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected()), strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-6, atol=3e-6)


SPECS = (P("rows"), P(), P(), P("rows"), P("rows"))


def over_devices(f, out_specs, check_vma):
    mesh = Mesh(np.array(jax.devices()), ("rows",))
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=SPECS, out_specs=out_specs, check_vma=check_vma))


@thinned(2, "reduction, check_vma, plan", REDUCTIONS, [True, False], PLANS, indirect=["plan"])
def test_shard_map(reduction, check_vma, plan):
    """The gradient of the kernel, which all devices share: outside, and inside, where jax adds it up or not."""

    def total(*x):
        return lax.psum(loss(reduction, *x), "rows")

    outside = jax.value_and_grad(over_devices(total, P(), check_vma), (0, 1, 2))
    assert_expected(jax.jit(outside)(*inputs()))

    def inside(*x):
        value, (hidden, kernel, bias) = jax.value_and_grad(loss, (1, 2, 3))(reduction, *x)
        if not check_vma:
            kernel, bias = lax.psum((kernel, bias), "rows")
        return lax.psum(value, "rows"), (hidden, kernel, bias)

    assert_expected(over_devices(inside, (P(), (P("rows"), P(), P())), check_vma)(*inputs()))


@thinned(2, "reduction, plan", REDUCTIONS, PLANS, indirect=["plan"])
def test_pmap(reduction, plan):
    def split(x):
        return x.reshape(8, -1, *x.shape[1:])

    def step(*x):
        value, gradients = jax.value_and_grad(loss, (1, 2, 3))(reduction, *x)
        return lax.psum(value, "rows"), (gradients[0], *lax.psum(gradients[1:], "rows"))

    hidden, kernel, bias, label, where = inputs()
    f = jax.pmap(step, "rows", in_axes=(0, None, None, 0, 0), out_axes=(None, (0, None, None)))
    value, (d_hidden, *rest) = f(split(hidden), kernel, bias, split(label), split(where))
    assert_expected((value, (d_hidden.reshape(N, D), *rest)))


@pytest.mark.parametrize("plan", PLANS, indirect=True)
def test_hessian_vector_product_in_shard_map(plan):
    def f(*x):
        def gradient(kernel):
            return jax.grad(loss, 2)("sum", x[0], kernel, *x[2:])

        return jax.jvp(gradient, (x[1],), (jnp.cos(x[1]),))[1]

    hidden, *rest = inputs()
    want = jax.jit(f)(jnp.where(rest[-1][:, None], hidden, 0), *rest)
    got = over_devices(lambda *x: lax.psum(f(*x), "rows"), P(), False)(*inputs())
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-5)


@thinned(2, "reduction, split, plan", REDUCTIONS, ["batch", "sequence"], PLANS, indirect=["plan"])
def test_jit_of_split_rows(reduction, split, plan):
    """[..., D] with a leading axis on the devices."""
    mesh = Mesh(np.array(jax.devices()), ("rows",))
    shape, spec = {"batch": ((8, 5), P("rows")), "sequence": ((5, 8), P(None, "rows"))}[split]
    hidden, kernel, bias, label, where = inputs()
    put = [
        jax.device_put(x.reshape(*shape, *x.shape[1:]), NamedSharding(mesh, spec))
        for x in (hidden, label, where)
    ]
    f = jax.jit(jax.value_and_grad(functools.partial(loss, reduction), (0, 1, 2)))
    value, (d_hidden, *rest) = f(put[0], kernel, bias, *put[1:])
    assert_expected((value, (d_hidden.reshape(N, D), *rest)))
