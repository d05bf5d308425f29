"""`SparseDistribution`: each loss, option and source as with the dense distribution of the same mass; what is hostile.

tests/test_covering.py has every pair of options beside an oracle; tests/test_sparse_errors.py the contracts.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import harness
import jaxent
from compiled import matmul_operations
from harness import FULL, HLO, QUICK
from jaxent import SparseDistribution, _chosen
from jaxent._logits import sources
from jaxent._logits.plan import Plan
from programs import avals
from tables import spread

N, V = 8, 11
SOURCES = ("dense", *harness.LINEAR)
LOSSES = ("softmax_cross_entropy", "softmax_focal_loss", "softmax_poly_loss")
SLOTS = (0, 1, 2, 7, 40)  # 40 are scattered, fewer are compared
MASK = np.arange(V) % 4 != 1
OPTIONS = {
    "none": {},
    "where": {"where": np.arange(N) % 3 != 1},
    "weights": {"weights": np.linspace(0, 2, N, dtype=np.float32)},
    "class_weights": {"class_weights": np.linspace(0, 2, V, dtype=np.float32)},
    "class_mask": {"class_mask": MASK},
    "class_mask per row": {"class_mask": (np.arange(N)[:, None] + np.arange(V)) % 4 != 1},
    "label_smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.01},
    "mean": {"reduction": "mean"},
    "sum": {"reduction": "sum"},
    "axis": {"axis": 0},
}


def slots(number, force=True):
    """(classes, probs): some twice, some empty, of a class that is not there."""
    rng = np.random.default_rng(number)
    draws = rng.gumbel(size=(number, N, V)) + np.where(force, 0, -1e9)
    classes = np.moveaxis(draws.argmax(-1), 0, -1).astype(np.int32)
    if number > 1:
        classes[::2, 1] = classes[::2, 0]
    probs = rng.dirichlet(np.ones(number), size=N) if number else np.zeros((N, 0))
    empty = rng.uniform(size=classes.shape) < 0.2
    nowhere = rng.choice([-1, V, 2**31 - 1, -(2**31)], size=classes.shape)
    return np.where(empty, nowhere, classes).astype(np.int32), np.where(empty, 0, probs).astype(np.float32)


def dense(classes, probs, size=V):
    at = jnp.arange(size, dtype=jnp.int32)[None, None] == jnp.asarray(classes)[..., None]
    return jnp.sum(jnp.where(at, jnp.asarray(probs)[..., None], 0), -2)


@functools.cache
def logits(dtype="float32"):
    z = 3 * np.random.default_rng(3).normal(size=(N, V))
    z[1, 4] = 60  # sure of a class
    z[2, :] = 0  # all tied
    return harness.cast(z, dtype)


def both_ways(loss, source, number, options, z):
    """((value, gradients by logits and probs) of the sparse form, and of the dense one)."""
    classes, probs = slots(number, options.get("class_mask", True))
    axis = options.get("axis", -1)
    ct = jnp.asarray(np.cos(np.arange(N)), jnp.float32) if "reduction" not in options else jnp.float32(1.5)
    f = getattr(jaxent, loss)

    def of(labels):
        def run(z, probs):
            q = labels(probs)
            if axis == 0 and source == "dense":
                return f(z.T, jax.tree.map(jnp.transpose, q), **options)
            layer = z if source == "dense" else harness.as_layer(z)
            return f(layer, q, **{name: x for name, x in options.items() if name != "axis"})

        def value_and_gradients(z, probs):
            value, vjp = jax.vjp(run, z, probs)
            return value, *vjp(ct.astype(value.dtype))

        with harness.blocks(source):
            return jax.jit(value_and_gradients, compiler_options=QUICK)(z, probs)

    return of(lambda p: SparseDistribution(jnp.asarray(classes), p)), of(lambda p: dense(classes, p)), classes


# Each option of each loss, in turn on a source and with a number of slots; the class axis of a layer is its last.
EACH = [
    (loss, option, "dense" if option == "axis" else SOURCES[i % len(SOURCES)], SLOTS[i % len(SLOTS)])
    for i, (loss, option) in enumerate(itertools.product(LOSSES, OPTIONS))
]


@pytest.mark.parametrize(("loss", "option", "source", "number"), EACH)
def test_is_the_dense_distribution(loss, option, source, number):
    (value, dz, dp), (want, want_dz, want_dp), classes = both_ways(
        loss, source, number, OPTIONS[option], logits()
    )
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(dz, want_dz, rtol=2e-6, atol=1e-6)
    # what is no class has no derivative; the dense form has none by what is not summed up
    np.testing.assert_allclose(dp, want_dp, rtol=1e-5, atol=1e-6)
    assert (np.asarray(dp)[(classes < 0) | (classes >= V)] == 0).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("loss", LOSSES)
def test_dtypes(loss, dtype):
    with jax.enable_x64(dtype == "float64"):
        found, want, _ = both_ways(loss, "dense", 2, {"label_smoothing": 0.1}, logits(dtype))
    assert found[0].dtype == ("float64" if dtype == "float64" else "float32") and found[1].dtype == dtype
    for x, y in zip(found, want, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(
            x, y, rtol={"bfloat16": 1e-2, "float16": 2e-3}.get(dtype, 1e-12), atol=1e-6
        )


@spread(2, "loss, source", LOSSES, SOURCES)
def test_one_class_is_the_label(loss, source):
    """Sure rows too: losses and gradients of 1e-26."""
    rng = np.random.default_rng(1)
    z, label = rng.normal(size=(N, V)), rng.integers(V, size=N)
    z[np.arange(N), label] = z.max(-1) + np.linspace(-3, 60, N)
    f = getattr(jaxent, loss)

    def run(z, labels):
        rows = lambda z: f(z if source == "dense" else harness.as_layer(z), labels)  # noqa: E731
        with harness.blocks(source):
            of = jax.jit(lambda z: (rows(z), jax.grad(lambda z: rows(z).sum())(z)), compiler_options=FULL)
            return of(z)

    z, label = jnp.asarray(z, jnp.float32), jnp.asarray(label)
    found, want = run(z, SparseDistribution(label[:, None], jnp.ones((N, 1)))), run(z, label)
    np.testing.assert_allclose(found[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], want[1], rtol=1e-6, atol=1e-38)


@spread(2, "loss, source", LOSSES, SOURCES)
def test_bad_classes_poison_their_row(loss, source):
    classes = np.array([[0, 1], [V, 2], [-1, 2], [3, 3], [2**31 - 1, -1], [1, 4], [5, 5], [0, 9]], np.int32)
    probs = np.array([[0.5, 0.5]] * 4 + [[0, 0], [np.nan, 1], [0.5, 0.5], [1, 0]], np.float32)
    bad = np.array([False, True, True, False, False, True, False, False])

    def f(z, probs, where=None):
        layer = z if source == "dense" else harness.as_layer(z)
        options = {"where": where, "label_smoothing": 0.1}
        return getattr(jaxent, loss)(layer, SparseDistribution(jnp.asarray(classes), probs), **options)

    with harness.blocks(source):
        run = jax.jit(
            lambda *x: (f(*x), jax.grad(lambda *y: f(*y).sum(), (0, 1))(*x)), compiler_options=QUICK
        )
        rows, (dz, dp) = run(logits(), probs)
        np.testing.assert_array_equal(np.isnan(rows), bad)
        np.testing.assert_array_equal(np.isnan(dp).any(-1), bad)
        if source == "dense":  # rows have the kernel of a layer in common
            assert np.isnan(dz[bad]).all() and np.isfinite(dz[~bad]).all()
        # and are gone with it
        rows, (dz, dp) = run(logits(), probs, ~bad)
        assert (rows[bad] == 0).all() and (dz[bad] == 0).all() and (dp[bad] == 0).all()


def test_a_class_out_of_force_is_bad_if_it_has_mass():
    q = SparseDistribution(jnp.array([[1, 0]] * 2), jnp.array([[0.5, 0.5], [0.0, 1.0]]))
    f = lambda z, q: jaxent.softmax_cross_entropy(z, q, class_mask=MASK)  # noqa: E731
    np.testing.assert_array_equal(np.isnan(f(logits()[:2], q)), [True, False])
    dp = jax.grad(lambda p: f(logits()[1:2], SparseDistribution(q.classes[1:], p)).sum())(q.probs[1:])
    assert dp[0, 0] == 0 and dp[0, 1] > 0


def test_logits_of_minus_infinity():
    """With mass: a loss of +inf, and p - q as gradient; without: 0 * inf = 0, by the probabilities too."""
    z = jnp.array([[0.0, -jnp.inf, 1.0], [0.0, -jnp.inf, 1.0]])
    q = SparseDistribution(jnp.array([[1, 2], [1, 2]]), jnp.array([[0.25, 0.75], [0.0, 1.0]]))
    f = lambda z, p: jaxent.softmax_cross_entropy(z, SparseDistribution(q.classes, p))  # noqa: E731
    rows, (dz, dp) = f(z, q.probs), jax.grad(lambda *x: f(*x).sum(), (0, 1))(z, q.probs)
    assert rows[0] == jnp.inf and np.isfinite(rows[1])
    np.testing.assert_allclose(dz, jax.nn.softmax(z) - dense(q.classes, q.probs, 3), atol=1e-7)
    assert dp[0, 0] == jnp.inf and dp[1, 0] == 0


TOTALS = {
    "cross-entropy": functools.partial(jaxent.softmax_cross_entropy, label_smoothing=0.1),
    "focal": jaxent.softmax_focal_loss,
    "poly": jaxent.softmax_poly_loss,
}


@pytest.mark.parametrize("name", TOTALS)
def test_transformations(name):
    classes, probs = map(jnp.asarray, slots(3))
    z, dz = logits(), jnp.cos(jnp.arange(N * V, dtype=jnp.float32)).reshape(N, V)
    of_sparse = lambda z, p: TOTALS[name](z, SparseDistribution(classes, p))  # noqa: E731
    of_dense = lambda z, p: TOTALS[name](z, dense(classes, p))  # noqa: E731

    def everything(f):
        total = lambda z, p: jnp.sum(jnp.cos(jnp.arange(N, dtype=jnp.float32)) * f(z, p))  # noqa: E731
        along = lambda g: lambda *x: jax.jvp(g, x, (dz, jnp.sin(probs)))[1]  # noqa: E731
        scanned = lambda z, p: jax.lax.scan(lambda c, x: (c + total(*x), None), 0.0, (z[None], p[None]))[0]  # noqa: E731
        return {
            "jvp": along(f)(z, probs),
            "grad of checkpoint": jax.grad(jax.checkpoint(total), (0, 1))(z, probs),
            "jvp of grad": along(jax.grad(total, (0, 1)))(z, probs),
            "grad of jvp": jax.grad(lambda z, p: along(total)(z, p), (0, 1))(z, probs),
            "hessian": jax.hessian(lambda row: total(z.at[3].set(row), probs))(z[3]),
            "scan": jax.grad(scanned)(z, probs),
        }

    with jax.numpy_rank_promotion("allow"):
        found, want = jax.jit(lambda: (everything(of_sparse), everything(of_dense)), compiler_options=QUICK)()
    for key, x in found.items():
        for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(want[key]), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=key)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint16", "int64", "uint64"])
def test_integers_of_any_size(dtype, array):
    classes, probs = np.abs(slots(2)[0]) % V, slots(2)[1]
    with jax.enable_x64("64" in dtype):
        of = lambda c: jaxent.softmax_loss(  # noqa: E731
            lambda s: s.other_log_prob - s.log_prob, logits(), SparseDistribution(c, probs), classes=c
        )
        np.testing.assert_array_equal(of(array(classes.astype(dtype))), of(array(classes)))


def test_is_a_pytree_that_is_mapped_over():
    q = SparseDistribution(*map(jnp.asarray, slots(3)))
    rows = jax.vmap(jaxent.softmax_cross_entropy)(logits(), q)
    np.testing.assert_array_equal(rows, jaxent.softmax_cross_entropy(logits(), q))
    assert len(jax.tree.leaves(q)) == 2
    # one row alone
    one = jax.tree.map(lambda x: x[0], q)
    np.testing.assert_allclose(jaxent.softmax_cross_entropy(logits()[0], one), rows[0], rtol=1e-6)


def test_statistics():
    q = SparseDistribution(*map(jnp.asarray, slots(2)))
    s, want = (jaxent.softmax_statistics(logits(), x) for x in (q, dense(q.classes, q.probs)))
    assert s.rank is None
    for name in ("log_prob", "weighted_log_prob", "mean_log_prob", "log_normalizer", "entropy", "prediction"):
        np.testing.assert_allclose(getattr(s, name), getattr(want, name), rtol=1e-6, atol=1e-7)


# What it costs.

ROWS, DIM, WIDE, K = 256, 16, 4096, 7
SHAPES = [
    jax.ShapeDtypeStruct(shape, dtype)
    for shape, dtype in (((ROWS, WIDE), jnp.float32), ((ROWS, K), jnp.int32), ((ROWS, K), jnp.float32))
]


@pytest.mark.parametrize("loss", LOSSES)
def test_no_array_over_the_classes_beside_logits_and_their_gradient(loss):
    f = lambda z, c, p: getattr(jaxent, loss)(z, SparseDistribution(c, p), reduction="mean")  # noqa: E731
    forward = jax.jit(f).lower(*SHAPES).compile(FULL).memory_analysis()
    backward = jax.jit(jax.value_and_grad(f, (0, 2))).lower(*SHAPES).compile(FULL).memory_analysis()
    assert forward.temp_size_in_bytes < ROWS * WIDE
    assert backward.temp_size_in_bytes < ROWS * WIDE
    assert backward.output_size_in_bytes < 4 * ROWS * (WIDE + K) + 1000


@pytest.mark.parametrize("kind", ["rows", "classes"])
@pytest.mark.parametrize("loss", LOSSES)
def test_linear_logits(loss, kind, monkeypatch):
    """3 matmuls for a mean, 4 per row; and no array of N x V, nor of N x V x K."""
    by = {"rows": Plan(64, WIDE), "classes": Plan(ROWS, 512)}[kind]
    monkeypatch.setattr(sources, "plan", lambda *_: by)
    hidden, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((ROWS, DIM), (DIM, WIDE)))
    arguments = hidden, kernel, *SHAPES[1:]

    def f(reduction, hidden, kernel, classes, probs):
        q, layer = SparseDistribution(classes, probs), jaxent.LinearLogits(hidden, kernel)
        return jnp.sum(getattr(jaxent, loss)(layer, q, reduction=reduction))

    expected = {"mean": 3, "none": 4}
    if kind == "classes":  # focal and poly look at all classes once more, when their sum is known
        expected = dict.fromkeys(expected, 4 if loss == "softmax_cross_entropy" else 5)
    for reduction, matmuls in expected.items():
        step = jax.value_and_grad(functools.partial(f, reduction), (0, 1, 3))
        sizes = [np.prod(x.shape) for x in avals(jax.make_jaxpr(step)(*arguments).jaxpr)]
        assert max(sizes) <= max(64 * WIDE, ROWS * 512)
        program = jax.jit(lambda *x: step(*x)).lower(*arguments).compile(HLO)  # noqa: B023
        assert matmul_operations(program) == pytest.approx(matmuls * 2 * ROWS * DIM * WIDE)


def test_slots_are_compared_or_scattered(monkeypatch):
    """The two ways are the same to the last bit."""
    q = SparseDistribution(*map(jnp.asarray, slots(7)))
    f = jax.value_and_grad(lambda z: jaxent.softmax_cross_entropy(z, q).sum())
    value, compared = f(logits())
    monkeypatch.setattr(_chosen, "COMPARED", 1)
    again, scattered = f(logits())
    np.testing.assert_array_equal(value, again)
    np.testing.assert_allclose(compared, scattered, rtol=1e-6, atol=1e-7)
