"""Functions of statistics that must not see their rows block by block, and those that may."""

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxent
from tables import some

N, D, V = 10, 3, 7
KEY = jax.random.key(5)


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.05, 0.05),))


@jax.custom_jvp
def centred(x):
    return x


centred.defjvp(lambda x, dx: (x[0], dx[0] - dx[0].mean()))

# fn(s, x, p) with x [..., 3, 4] and p closed over
MIXING = {
    "mean over rows": lambda s, x, p: p * (s.log_prob - s.log_prob.mean()),
    "number of rows": lambda s, x, p: p * s.log_prob / s.log_prob.shape[0],
    "number of rows in a shape": lambda s, x, p: p * s.log_prob * jnp.ones(2 * s.log_prob.shape[0]).sum(),
    "number of rows in an iota": lambda s, x, p: p * s.log_prob * jnp.arange(2.0 * s.log_prob.shape[0]).sum(),
    "a choice by number": lambda s, x, p: (
        p * (s.log_prob - 2 * s.entropy if s.log_prob.size > 5 else s.entropy - 2 * s.log_prob)
    ),
    "position": lambda s, x, p: p * s.log_prob * jnp.arange(1.0 * s.log_prob.size).reshape(s.log_prob.shape),
    "clipped cotangent": lambda s, x, p: clipped(p * s.log_prob),
    "clipped parameter": lambda s, x, p: clipped(p) * s.log_prob,
    "mixing tangent": lambda s, x, p: centred(p * s.log_prob),
    "sorted": lambda s, x, p: p * jnp.sort(s.log_prob, 0),
    "cumulative": lambda s, x, p: p * jnp.cumsum(s.log_prob, 0),
    "loop": lambda s, x, p: p * jax.lax.fori_loop(0, 2, lambda _, y: jnp.roll(y, 1), s.log_prob),
    "values per row": lambda s, x, p: (
        p * s.log_prob * jnp.asarray(np.arange(1.0 * N), jnp.float32).reshape(s.log_prob.shape)
    ),
}
APART = {
    "plain": lambda s, x, p: p * s.log_prob,
    "singular at 0": lambda s, x, p: p * jnp.log(s.entropy) / (x[..., 0, 0] ** 2),
    "axes of a row": lambda s, x, p: p * s.log_prob * x.max(s.log_prob.ndim).sum(-1),
    "part of a row": lambda s, x, p: p * s.log_prob * x[(slice(None),) * s.log_prob.ndim + (0,)].sum(-1),
    "jitted": jax.jit(lambda s, x, p: p * jnp.where(s.rank > 1, jax.nn.softplus(s.log_prob), s.entropy)),
    "key": lambda s, x, p: p * s.log_prob * jax.random.uniform(KEY),
    "table": lambda s, x, p: p * s.log_prob * jnp.asarray(np.linspace(0, 1, 5)).sum(),
    "assertion": lambda s, x, p: p * s.log_prob * (1 if s.log_prob.ndim else None),
}
FUNCTIONS = MIXING | APART


def problem(shape):
    rng = np.random.default_rng(4)
    arrays = rng.normal(size=(*shape, D)), rng.normal(size=(D, V)), rng.normal(size=(*shape, 3, 4)), 1.3
    hidden, kernel, x, p = (jnp.asarray(a, jnp.float32) for a in arrays)
    return (hidden, kernel, x, p), jnp.asarray(rng.integers(V, size=shape))


COMPILER = {"xla_backend_optimization_level": 0}  # programs that run once
OF_AXES = (
    "mean over rows",
    "sorted",
    "number of rows",
    "values per row",
    "axes of a row",
    "part of a row",
    "jitted",
)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *some([(name, (N,)) for name in (*list(MIXING)[::2], *APART)], [(name, (N,)) for name in FUNCTIONS]),
        *(pytest.param(name, (2, 5), marks=pytest.mark.exhaustive) for name in OF_AXES),
    ],
)
def test_as_dense(name, shape):
    """In blocks of four rows, which do not divide ten."""
    arguments, label = problem(shape)

    def loss(dense, hidden, kernel, x, p):
        logits = jaxent.LinearLogits(hidden, kernel, block_bytes=2 * 4 * V * 4)
        logits = logits.dense() if dense else logits
        return 0.1 * jaxent.softmax_loss(lambda s, x: FUNCTIONS[name](s, x, p), logits, label, x)

    @functools.partial(jax.jit, compiler_options=COMPILER)
    def run(*arguments):
        each = (functools.partial(loss, dense) for dense in (False, True))
        return [jax.value_and_grad(f, (0, 1, 2, 3))(*arguments) for f in each]

    for got, want in zip(*map(jax.tree.leaves, run(*arguments)), strict=True):
        assert np.isfinite(want).all()
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", APART)
def test_rows_by_themselves_go_by_blocks(name):
    (hidden, kernel, x, p), label = problem((N,))

    def loss(hidden):
        logits = jaxent.LinearLogits(hidden, kernel, block_bytes=2 * 4 * V * 4)
        return jaxent.softmax_loss(lambda s, x: FUNCTIONS[name](s, x, p), logits, label, x)

    assert "_summed" in str(jax.make_jaxpr(loss)(hidden))


@pytest.mark.parametrize("shared", [0.3, np.arange(3.0)], ids=["number", "table"])
def test_arguments_without_rows_go_by_blocks(shared):
    (hidden, kernel, x, _), label = problem((N,))

    def loss(hidden):
        logits = jaxent.LinearLogits(hidden, kernel, block_bytes=2 * 4 * V * 4)
        fn = lambda s, x, shared: s.log_prob * x[:, 0, 0] * jnp.sum(shared)  # noqa: E731
        return jaxent.softmax_loss(fn, logits, label, x, shared)

    assert "_summed" in str(jax.make_jaxpr(loss)(hidden))


def test_nothing_leaks():
    (hidden, kernel, _, p), label = problem((N,))

    @jax.jit
    def loss(hidden, p):
        logits = jaxent.LinearLogits(hidden, kernel)
        return jaxent.softmax_loss(lambda s: p * s.log_prob, logits, label)

    gc.collect()
    gc.freeze()  # the check collects garbage after every trace; it need not look at what other tests left
    try:
        with jax.checking_leaks():
            jax.grad(loss)(hidden, p)
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("wrap", [jax.jit, jax.vmap, jax.checkpoint])
def test_fn_under_a_transformation(wrap):
    z, y = jnp.eye(4), jnp.arange(4)
    got, want = jax.jit(
        lambda z: (
            jaxent.softmax_loss(wrap(lambda s: -s.log_prob), z, y),
            jaxent.softmax_cross_entropy(z, y, reduction="mean"),
        )
    )(z)
    assert got == want
