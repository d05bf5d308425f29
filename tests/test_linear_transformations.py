"""Every transformation of jax on linear logits, in blocks of rows and of classes: the same as of plain jax.numpy."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, nn

import harness
import jaxent
from forms import entropy, log_prob
from jaxent._logits import sources
from jaxent._logits.plan import Plan
from tables import thinned

N, D, V = 8, 3, 7
COMPILER = {"xla_backend_optimization_level": 0}  # programs that run once
# blocks that do not divide what they are blocks of
PLANS = {
    "rows": lambda sizes, *_: Plan(min(3, max(sizes.rows, 1)), V),
    "pieces": lambda sizes, *_: Plan(1, V, pieces=3),
    "fused": lambda sizes, *_: Plan(min(3, max(sizes.rows, 1)), V, fused=2),
    "classes": lambda sizes, *_: Plan(sizes.rows, 3),
}


@pytest.fixture(params=PLANS)
def plan(request, monkeypatch):
    monkeypatch.setattr(sources, "plan", PLANS[request.param])
    monkeypatch.setattr("jax.lax.empty", harness.nans)
    return request.param


def inputs(dtype):
    rng = np.random.default_rng(11)
    hidden, kernel, bias = rng.normal(size=(N, D)), rng.normal(size=(D, V)), rng.normal(size=V)
    advantage, scale, weights = rng.normal(size=N), rng.normal(size=2), rng.normal(size=N)
    moving = [jnp.asarray(x, dtype) for x in (hidden, kernel, bias, advantage, scale, weights)]
    return moving, jnp.asarray(rng.integers(V, size=N)), jnp.arange(N) % 4 != 1


def logits(hidden, kernel, bias):
    return jaxent.LinearLogits(hidden, kernel, bias, softcap=3.0, temperature=0.7)


def plain_logits(hidden, kernel, bias):
    return 3 * jnp.tanh((hidden @ kernel + bias[None]) / 3) / 0.7


def policy(s, advantage, scale):
    return -advantage * s.log_prob * scale[0] - scale[1] * s.entropy + 0.1 * s.log_normalizer**2


def fused(reduction, hidden, kernel, bias, advantage, scale, weights, label, where):
    """A user's objective with row arguments, something closed over, a mask and weights: all are differentiated."""
    return jaxent.softmax_loss(
        lambda s, a: policy(s, a, scale),
        logits(hidden, kernel, bias),
        label,
        advantage,
        where=where,
        weights=weights,
        reduction=reduction,
    )


def plain(reduction, hidden, kernel, bias, advantage, scale, weights, label, where):
    z = plain_logits(hidden, kernel, bias)
    s = jaxent.SoftmaxStatistics(
        log_prob=log_prob(z, label), entropy=entropy(z), log_normalizer=nn.logsumexp(z, -1)
    )
    losses = jnp.where(where, weights, 0) * policy(s, advantage, scale)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / jnp.where(where, weights, 0).sum()


def scalar(f, reduction, label, where):
    """A function of what can be differentiated; rows are added up with uneven signs."""

    def g(*moving):
        losses = f(reduction, *moving, label, where)
        return jnp.vdot(
            losses, jnp.cos(2.0 * jnp.arange(losses.size, dtype=losses.dtype)).reshape(losses.shape)
        )

    return g


def directions(moving):
    rng = np.random.default_rng(3)
    return tuple(jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in moving)


def gradient(g, x):
    return jax.grad(g, tuple(range(len(x))))(*x)


def along(g, x):
    return sum(map(jnp.vdot, gradient(g, x), directions(x)))


def stacked(moving):
    """Three copies of hidden, each rolled; the rest in common."""
    return [jnp.stack([jnp.roll(moving[0], i, 0) for i in range(3)]), *moving[1:]]


def scanned(g, moving):
    def step(carry, hidden):
        return carry + g(hidden, *moving[1:]), None

    return lax.scan(step, jnp.zeros((), moving[0].dtype), stacked(moving)[0])[0]


REVERSE = {
    "value": lambda g, x: g(*x),
    "grad": gradient,
    "grad of checkpoint": lambda g, x: gradient(jax.checkpoint(g), x),
    "grad of jit": lambda g, x: gradient(jax.jit(g), x),
    "vmap": lambda g, x: jax.vmap(g, (0, *[None] * 5))(*stacked(x)),
    "vmap of grad": lambda g, x: jax.vmap(jax.grad(g, (0, 1)), (0, *[None] * 5))(*stacked(x)),
    "grad of vmap": lambda g, x: gradient(lambda *x: jax.vmap(g, (0, *[None] * 5))(*stacked(x)).sum(), x),
    "scan": lambda g, x: scanned(g, x),
    "grad of scan": lambda g, x: gradient(lambda *x: scanned(g, x), x),
    "forward over reverse": lambda g, x: jax.jvp(lambda *x: gradient(g, x), x, directions(x))[1],
    "grad of grad": lambda g, x: gradient(lambda *x: along(g, x), x),
    "hessian by hidden": lambda g, x: jax.jacfwd(jax.grad(g))(*x),
}
# an even share of what they take to compile
GROUPS = (
    ("value", "grad", "vmap", "grad of vmap", "grad of jit", "grad of scan"),
    ("scan", "vmap of grad", "grad of checkpoint", "forward over reverse"),
    ("grad of grad", "hessian by hidden"),
)
FORWARD = {
    "jvp": lambda g, x: jax.jvp(g, x, directions(x))[1],
    "linearize": lambda g, x: jax.linearize(g, *x)[1](*directions(x)),
    "reverse over forward": lambda g, x: gradient(lambda *x: jax.jvp(g, x, directions(x))[1], x),
}


def ask(function, names, reduction):
    with jax.enable_x64(True):
        moving, label, where = inputs(jnp.float64)
        g, table = scalar(function, reduction, label, where), REVERSE | FORWARD
        f = jax.jit(lambda *x: {name: table[name](g, x) for name in names}, compiler_options=COMPILER)
        return jax.tree.map(np.asarray, f(*moving))


expected = functools.cache(functools.partial(ask, plain))


def check(names, reduction):
    got, want = ask(fused, names, reduction), expected(names, reduction)
    for name, found in got.items():
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want[name]), strict=True):
            harness.assert_within(a, b, 1e-11 * max(np.abs(b).max(), 1), name)


def test_no_transformation_is_left_out():
    assert sorted(sum(GROUPS, ())) == sorted(REVERSE)


@thinned(3, "plan, reduction, group", PLANS, ["mean", "none"], range(len(GROUPS)), indirect=["plan"])
def test_transformations(plan, reduction, group):
    check(GROUPS[group], reduction)


def test_forward_mode_of_a_sum(monkeypatch):
    monkeypatch.setattr(sources, "plan", PLANS["rows"])
    check(tuple(FORWARD), "sum")


def test_forward_mode_of_rows_is_refused(plan):
    (hidden, *rest), label, where = inputs(jnp.float32)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jit(lambda x: jax.jvp(lambda h: fused("none", h, *rest, label, where), (x,), (x,))).lower(hidden)


@thinned(2, "plan, reduction", PLANS, ["mean", "none"], indirect=["plan"])
def test_donation_and_export(plan, reduction):
    moving, label, where = inputs(jnp.float32)
    g = jax.value_and_grad(scalar(fused, reduction, label, where), (0, 1))
    want = jax.jit(g)(*moving)
    exported = jax.export.export(jax.jit(g), platforms=("cpu", "cuda", "tpu"))(*moving)
    donated = jax.jit(g, donate_argnums=(0, 1))(*map(jnp.copy, moving))
    for got in (exported.call(*moving), donated):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "plan", ["rows", pytest.param("classes", marks=pytest.mark.exhaustive)], indirect=True
)
def test_without_jit(plan):
    moving, label, where = inputs(jnp.float32)
    g, want = scalar(fused, "mean", label, where), expected(GROUPS[0], "mean")
    np.testing.assert_allclose(g(*moving), want["value"], rtol=1e-5)
    for a, b in zip(gradient(g, moving), want["grad"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
