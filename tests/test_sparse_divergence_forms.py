"""KL and JS to a `SparseDistribution`: temperatures, layers, transformations, and what they cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import harness
import jaxent
from compiled import matmul_operations
from few_classes_on_paper import exact
from harness import HLO
from jaxent import SparseDistribution
from jaxent._logits import sources
from jaxent._logits.plan import Plan
from layers import compiled
from programs import avals

F32 = np.float32
kl, js = jaxent.softmax_kl_divergence, jaxent.softmax_js_divergence


def drawn(rows=6, classes=11, slots=3, seed=5):
    rng = np.random.default_rng(seed)
    z = F32(2 * rng.normal(size=(rows, classes)))
    places = np.argsort(rng.normal(size=z.shape), -1)[:, :slots].astype(np.int32)
    places[0, 1] = places[0, 0]
    probs = exact(rows, slots + 1)[:, :slots]
    probs[1, 2], places[1, 2] = 0, -1
    return jnp.asarray(z), jnp.asarray(places), jnp.asarray(probs)


@pytest.mark.parametrize("source", ["dense", "rows"])
def test_temperatures(source):
    """They divide the logits alone: a number, an array of one, one per row; 1e4 above all costs no digits."""
    z, places, probs = drawn()
    q, each = SparseDistribution(places, probs), jnp.asarray(np.linspace(0.5, 2, 6), jnp.float32)

    def losses(z, temperature):
        layer = z if source == "dense" else harness.as_layer(z)
        return js(layer, q, temperature=temperature, beta=0.3)

    def of_divided(z, temperature):
        return js(z / jnp.reshape(temperature, (-1, 1)), q, beta=0.3)

    def slopes(f, temperature):
        if isinstance(temperature, float):
            return f(z, temperature), jax.grad(lambda z: f(z, temperature).sum())(z)
        return f(z, temperature), *jax.grad(lambda *x: f(*x).sum(), (0, 1))(z, temperature)

    def run(f):
        return [slopes(f, x) for x in (0.75, jnp.float32(0.75), each)]

    with harness.blocks(source):
        found, want = compiled(lambda: (run(losses), run(of_divided)))()
        shifted = compiled(lambda z: losses(z, each))(z + 1024) if source == "dense" else None
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6)
    if source == "dense":
        back = (z + 1024) - 1024
        np.testing.assert_allclose(shifted, of_divided(back, each), rtol=2e-6)
    bad = compiled(lambda t: kl(z, q, temperature=t))(F32([1, 0, -1, np.nan, np.inf, 2]))
    np.testing.assert_array_equal(np.isnan(bad), [False, True, True, True, True, False])


@pytest.mark.parametrize("source", ["rows", "classes"])
def test_layers_with_numbers_of_their_own(source):
    """A layer's softcap and temperature come first; the temperature of the loss is one more factor."""
    rng = np.random.default_rng(6)
    _, places, probs = drawn()
    hidden, kernel, bias = (F32(rng.normal(size=size)) for size in ((6, 4), (4, 11), (11,)))
    each = jnp.asarray(np.linspace(0.5, 2, 6), jnp.float32)
    numbers = [(0.75, 1.5), (0.75, each), (each, jnp.float32(1.5))]

    def losses(built, layer, own, temperature):
        logits = jaxent.LinearLogits(*layer, softcap=2.0, temperature=own)
        logits = logits.dense() if built else logits
        return kl(logits, SparseDistribution(places, probs), temperature=temperature)

    def run(built):
        found = []
        for pair in numbers:
            given = [x for x in pair if not isinstance(x, float)]

            def f(layer, *given, pair=pair):
                given = iter(given)
                return losses(built, layer, *(x if isinstance(x, float) else next(given) for x in pair))

            value, vjp = jax.vjp(f, (hidden, kernel, bias), *given)
            found.append(
                (value, vjp(jnp.cos(jnp.arange(value.size, dtype=value.dtype)).reshape(value.shape)))
            )
        return found

    with harness.blocks(source):
        found, want = compiled(lambda: (run(False), run(True)))()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-6, atol=2e-6)


# Transformations.


def naive(z, q, beta, temperature=1.0, rest="bucket"):
    """The definition, where no class comes twice."""
    log_p = jax.nn.log_softmax(z / temperature)
    empty = q.probs == 0
    at = jnp.where(empty, 0, q.classes)
    log_k = jnp.where(empty, 0, jnp.take_along_axis(log_p, at, -1))
    chosen = jnp.any((jnp.arange(z.shape[-1])[:, None] == q.classes[..., None, :]), -1)
    others = jax.nn.logsumexp(jnp.where(chosen, -jnp.inf, log_p), -1)
    probs = jnp.where(empty, 1, q.probs)  # log 1 = 0, and so is log_k
    missing = 1 - jnp.sum(jnp.where(empty, 0, q.probs), -1)
    if rest == "bucket":
        log_k, probs = jnp.append(log_k, others[..., None], -1), jnp.append(probs, missing[..., None], -1)
    p = jnp.exp(log_k)
    if beta == 0:
        return jnp.sum(probs * (jnp.log(probs) - log_k), -1)
    if beta == 1:
        return jnp.sum(p * (log_k - jnp.log(probs)), -1)
    h = jnp.log((1 - beta) * p + beta * probs)
    return jnp.sum((1 - beta) * p * (log_k - h) + beta * probs * (jnp.log(probs) - h), -1)


@pytest.mark.parametrize(("beta", "rest"), [(0.0, "bucket"), (0.3, "bucket"), (1.0, "ignore")])
def test_transformations(beta, rest):
    z, places, probs = drawn()
    places = places.at[0, 1].set((places[0, 0] + 1) % 11).at[0, 2].set((places[0, 0] + 2) % 11)
    dz, dp = (
        jnp.cos(jnp.arange(z.size, dtype=z.dtype)).reshape(z.shape),
        jnp.where(probs == 0, 0, jnp.sin(probs)),
    )
    ct = jnp.cos(jnp.arange(6, dtype=jnp.float32))

    def everything(f):
        rows = lambda z, p: f(z, SparseDistribution(places, jnp.where(probs == 0, 0, p)))  # noqa: E731
        total = lambda z, p: jnp.sum(ct * rows(z, p))  # noqa: E731
        along = lambda g: lambda *x: jax.jvp(g, x, (dz, dp))[1]  # noqa: E731
        scanned = lambda z, p: jax.lax.scan(lambda c, x: (c + total(*x), None), 0.0, (z[None], p[None]))[0]  # noqa: E731
        one_by_one = jax.vmap(lambda z, c, p: f(z, SparseDistribution(c, p)))
        return {
            "rows": rows(z, probs),
            "vmap": one_by_one(z, places, probs),
            "grad": jax.grad(total, (0, 1))(z, probs),
            "jvp": along(rows)(z, probs),
            "grad of checkpoint": jax.grad(jax.checkpoint(total), (0, 1))(z, probs),
            "jvp of grad": along(jax.grad(total, (0, 1)))(z, probs),
            "grad of jvp": jax.grad(lambda *x: along(total)(*x), (0, 1))(z, probs),
            "hessian": jax.hessian(lambda row: total(z.at[3].set(row), probs))(z[3]),
            "scan": jax.grad(scanned, (0, 1))(z, probs),
        }

    ours = functools.partial(js, beta=beta, temperature=1.25, rest=rest)
    with jax.numpy_rank_promotion("allow"):
        plain = functools.partial(naive, beta=beta, temperature=1.25, rest=rest)
        found, want = compiled(lambda: (everything(ours), everything(plain)))()
    for key, x in found.items():
        for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(want[key]), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=key)


# What it costs.

WIDE, DIM, MANY, K = 4096, 16, 256, 7


@pytest.mark.parametrize("kind", ["rows", "classes"])
@pytest.mark.parametrize(
    "loss", [kl, functools.partial(js, beta=0.3), functools.partial(js, temperature=2.0)]
)
def test_linear_logits(loss, kind, monkeypatch):
    """3 matmuls for a mean, 4 per row; and no array of N x V, nor of N x V x K."""
    by = {"rows": Plan(64, WIDE), "classes": Plan(MANY, 512)}[kind]
    monkeypatch.setattr(sources, "plan", lambda *_: by)
    shapes = (
        ((MANY, DIM), jnp.float32),
        ((DIM, WIDE), jnp.float32),
        ((MANY, K), jnp.int32),
        ((MANY, K), jnp.float32),
    )
    arguments = [jax.ShapeDtypeStruct(*x) for x in shapes]

    def f(reduction, hidden, kernel, classes, probs):
        q, layer = SparseDistribution(classes, probs), jaxent.LinearLogits(hidden, kernel)
        return jnp.sum(loss(layer, q, reduction=reduction))

    for reduction, matmuls in {"mean": 3 if kind == "rows" else 4, "none": 4}.items():
        step = jax.value_and_grad(functools.partial(f, reduction), (0, 1, 3))
        sizes = [np.prod(x.shape) for x in avals(jax.make_jaxpr(step)(*arguments).jaxpr)]
        assert max(sizes) <= max(64 * WIDE, MANY * 512)
        program = jax.jit(lambda *x: step(*x)).lower(*arguments).compile(HLO)  # noqa: B023
        assert matmul_operations(program) == pytest.approx(matmuls * 2 * MANY * DIM * WIDE)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_dense_logits(temperature):
    """Not one more array of N x V."""
    shapes = ((MANY, WIDE), jnp.float32), ((MANY, K), jnp.int32), ((MANY, K), jnp.float32)

    def f(z, classes, probs):
        return kl(z, SparseDistribution(classes, probs), temperature=temperature, reduction="mean")

    step = jax.jit(jax.value_and_grad(f, (0, 2)))
    memory = step.lower(*(jax.ShapeDtypeStruct(*x) for x in shapes)).compile(harness.FULL).memory_analysis()
    arrays = memory.temp_size_in_bytes / (4 * MANY * WIDE)
    assert arrays < 0.2
    assert memory.output_size_in_bytes < 4 * MANY * (WIDE + K) + 1000
