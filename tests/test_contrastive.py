"""Contrastive losses in tiles: what the matrix of all pairs gives, with each option alone and with each other one.

tests/devices/test_contrastive.py has pairs that are split.
"""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import harness
import jaxent
import pairs_on_paper
from compiled import matmul_operations
from programs import avals

N, E, D = 37, 8, 5
TILE = 8 * 16 * 12  # bytes: tiles of 13 x 13 or so, ragged
SCALE, BIAS = 2.5, -1.5
LOSSES = {"softmax": jaxent.softmax_contrastive_loss, "sigmoid": jaxent.sigmoid_contrastive_loss}
F32 = np.float32
compiled = functools.partial(jax.jit, compiler_options=harness.QUICK)
each_loss = pytest.mark.parametrize("name", LOSSES)


@functools.cache
def arrays(more=False, seed=0, dtype=F32):
    rng = np.random.default_rng(seed)
    x, y = (rng.normal(size=(n, D)) for n in (N, N + E))
    return x.astype(dtype), y.astype(dtype) if more else y[:N].astype(dtype)


def numbers(name):
    return {"scale": SCALE} | ({"bias": BIAS} if name == "sigmoid" else {})


def on_paper(name, x, y, values, options):
    """(losses, gradients of sum(weights * losses))."""
    options = dict(options)
    weights = options.pop("weights", np.ones(N, F32))
    options.pop("block_bytes", None)
    losses, gradients = getattr(pairs_on_paper, f"{name}_losses")(x, y, *values.values(), **options)
    return weights * losses, gradients(weights)


def run(name, x, y, values, options, reduction="none", cotangent=1):
    """(losses, gradients of `cotangent` times their sum by x, y and the numbers, which are arrays)."""
    fixed = {k: v for k, v in options.items() if not isinstance(v, np.ndarray)}
    given = {k: v for k, v in options.items() if isinstance(v, np.ndarray)}

    @compiled
    def losses_and_gradients(x, y, values, given):
        def total(x, y, values):
            losses = LOSSES[name](x, y, **values, **given, **fixed, reduction=reduction)
            return cotangent * jnp.sum(losses), losses

        (_, losses), gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(x, y, values)
        return losses, gradients

    wide = jnp.float64 if x.dtype == np.float64 else jnp.float32
    losses, (dx, dy, dvalues) = losses_and_gradients(x, y, jax.tree.map(wide, values), given)
    return losses, (dx, dy, *(dvalues[k] for k in values))


def check(got, want, rtol=2e-5):
    """Gradients are sums of terms of both signs: beside the largest."""
    np.testing.assert_allclose(got[0], np.float64(want[0]), rtol=rtol, atol=rtol)
    for a, b in zip(got[1], want[1], strict=True):
        b = np.float64(b)
        np.testing.assert_allclose(np.float64(a), b, rtol=0, atol=rtol * max(np.max(abs(b)), 1))


def options_of(names):
    """The options by these names; (options, whether there are hard negatives)."""
    rng = np.random.default_rng(1)
    more, ids = "more" in names, rng.integers(9, size=N + E)
    given = {
        "ids": ids[:N],
        "ids of all": ids,
        "where": rng.uniform(size=N) < 0.7,
        "weights": F32(rng.uniform(size=N)),
        "one way": False,
        "tiles": TILE,
    }
    words = {"ids of all": "ids", "one way": "symmetric", "tiles": "block_bytes"}
    return {words.get(name, name): given[name] for name in names if name in given}, more


WORDS = ("ids", "more", "where", "weights", "one way")
TABLE = [(*names, "tiles") for n in (0, 1, 2) for names in itertools.combinations(WORDS, n)]
TABLE += [(), WORDS, (*WORDS, "tiles"), ("ids of all", "more", "tiles"), ("ids of all", "more", "where")]


@pytest.mark.parametrize("names", TABLE, ids=" + ".join)
@each_loss
def test_matrix_of_all_pairs(name, names):
    options, more = options_of(names)
    if name == "sigmoid" and "one way" in names:
        pytest.skip("it has no second direction")
    case = name, *arrays(more), numbers(name), options
    check(run(*case), on_paper(*case))


@pytest.mark.parametrize(
    "names", [(), ("weights",), ("where", "weights"), ("where", "weights", "more", "ids", "tiles")]
)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@each_loss
def test_reductions(name, reduction, names):
    """They are those of the losses of pairs; the sigmoid makes their gradients in another way."""
    options, more = options_of(names)
    x, y = arrays(more)
    total = np.sum(options.get("weights", np.ones(N)) * options.get("where", np.ones(N)))
    factor = 1 if reduction == "sum" else 1 / total
    case = name, x, y, numbers(name)
    losses, gradients = on_paper(*case, options)
    got = run(*case, options, reduction, cotangent=3)
    check(got, (factor * losses.sum(), [3 * factor * g for g in gradients]))
    if "weights" in names:
        others = {k: v for k, v in options.items() if k != "weights"}
        f = lambda w: LOSSES[name](x, y, **numbers(name), **others, weights=w, reduction=reduction)  # noqa: E731
        plain = on_paper(*case, others)[0]
        want = plain if reduction == "sum" else (plain - factor * losses.sum()) / total
        want = np.float64(want * options.get("where", np.ones(N)))
        np.testing.assert_allclose(compiled(jax.grad(f))(options["weights"]), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("block_bytes", [None, TILE])
@each_loss
def test_dtypes(name, dtype, block_bytes, x64):
    x, y = (np.asarray(jnp.asarray(a, dtype)) for a in arrays(True, dtype=np.float64))
    case = name, x, y, numbers(name), {"block_bytes": block_bytes}
    got, wide = run(*case), [np.float64(a) for a in (x, y)]
    tolerance = {"bfloat16": 2e-2, "float16": 2e-3, "float64": 1e-13}[dtype]
    check(got, on_paper(name, *wide, *case[3:]), tolerance)
    assert got[0].dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
    assert [g.dtype for g in got[1][:2]] == [x.dtype, y.dtype]
    if dtype != "float64":  # the losses are computed in float32 of them
        np.testing.assert_allclose(got[0], np.float64(on_paper(name, *wide, *case[3:])[0]), rtol=1e-5)


@pytest.mark.parametrize("logit", [30.0, 69.0])
@pytest.mark.parametrize("tiles", [None, TILE])
@each_loss
def test_confident_pairs(name, logit, tiles):
    """Told apart to 1e-30, and so is the gradient: nothing is taken from 1."""
    n = 16
    x = np.eye(n, dtype=F32)
    y = x + F32(0.03) * np.float32(np.random.default_rng(0).normal(size=(n, n)))
    np.fill_diagonal(y, 1)
    values = {"scale": logit} | ({"bias": -logit} if name == "sigmoid" else {})
    if name == "sigmoid":
        values["scale"] *= 2
    options = {"block_bytes": tiles, "weights": F32(np.linspace(1, 2, n))}
    losses, gradients = getattr(pairs_on_paper, f"{name}_losses")(x, y, *values.values())
    got = run(name, x, y, values, options)
    np.testing.assert_allclose(got[0], np.float64(options["weights"] * losses), rtol=3e-5)
    assert np.max(got[0]) < 1e-8
    for a, b in zip(got[1][:2], gradients(options["weights"]), strict=False):
        b = np.float64(b)
        np.testing.assert_allclose(a, b, rtol=3e-4, atol=1e-4 * np.max(abs(b)))


@pytest.mark.parametrize("tiles", [None, TILE])
@each_loss
def test_what_is_hidden_stays_there(name, tiles):
    """NaN in a pair that is gone, or of weight 0, changes no bit of what is left."""
    x, y = (a.copy() for a in arrays(True))
    hidden = np.arange(N) % 3 == 1
    options = {"where": ~hidden, "block_bytes": tiles}
    clean = run(name, x, y, numbers(name), options)
    x[hidden], y[:N][hidden] = np.nan, np.inf
    dirty = run(name, x, y, numbers(name), options)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert (
        not np.any(dirty[0][hidden])
        and not np.any(dirty[1][0][hidden])
        and not np.any(dirty[1][1][:N][hidden])
    )
    of_weight_0 = run(name, x, y, numbers(name), {"weights": F32(~hidden), "block_bytes": tiles})
    jax.tree.map(np.testing.assert_array_equal, of_weight_0, dirty)


@each_loss
def test_weight_0_is_still_a_negative_of_others(name):
    x, y = arrays()
    weights = F32(np.arange(N) % 2)
    case = name, x, y, numbers(name), {"weights": weights}
    check(run(*case), on_paper(*case))


@each_loss
def test_nothing_counts(name):
    x, y = arrays()
    losses, gradients = run(name, x, y, numbers(name), {"where": np.zeros(N, bool)}, "mean")
    assert losses == 0 and not any(np.any(g) for g in gradients)
    losses, gradients = run(name, x[:0], y[:0], numbers(name), {}, "mean")
    assert losses == 0 and gradients[0].shape == (0, D)


@pytest.mark.parametrize("options", [{"where": np.zeros(N, bool)}, {"ids": np.zeros(N + E, int)}])
@pytest.mark.parametrize("tiles", [None, TILE])
@each_loss
def test_hard_negatives_that_are_negatives_of_nobody(name, tiles, options):
    """They have no loss, and nothing to be compared with."""
    case = name, *arrays(True), numbers(name), options | {"block_bytes": tiles}
    got = run(*case)
    check(got, on_paper(*case))


@pytest.mark.parametrize(
    "ids", [2**33 * np.arange(N), np.array([10, 2**32 + 10, 2**40] * N)[:N], np.arange(N) % 5]
)
@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
@each_loss
def test_ids_of_64_bits(name, ids, dtype):
    """Keys of a database, or hashes: jax would keep 32 bits of them."""
    case = name, *arrays(), numbers(name), {"ids": ids.astype(dtype)}
    losses = LOSSES[name](*case[1:3], **numbers(name), **case[4], reduction="none")
    np.testing.assert_allclose(losses, np.float64(on_paper(*case)[0]), rtol=2e-5)


@each_loss
def test_a_loss_scale_saves_float16(name):
    """The gradient of a mean over many pairs is 0 in float16 before it is multiplied."""
    n, rng = 1024, np.random.default_rng(0)
    x = rng.normal(size=(n, 512))
    y = x + rng.normal(size=x.shape) / 2
    x, y = (np.float16(a / np.linalg.norm(a, axis=1, keepdims=True)) for a in (x, y))
    options = {"scale": 20.0} | ({"bias": -10.0} if name == "sigmoid" else {})
    slope = compiled(jax.grad(lambda x, y: 2.0**16 * LOSSES[name](x, y, **options)))(x, y)
    want = getattr(pairs_on_paper, f"{name}_losses")(x, y, *options.values())[1](np.full(n, 2.0**16 / n))[0]
    want = np.float64(want)
    assert np.linalg.norm(np.float64(slope) - want) < 5e-4 * np.linalg.norm(want)


@each_loss
def test_nan_poisons(name):
    x, y = (a.copy() for a in arrays())
    y[3] = np.nan
    losses = LOSSES[name](x, y, **numbers(name), reduction="none")
    assert np.all(np.isnan(losses))
    losses = LOSSES[name](y, x, **numbers(name), reduction="none")
    assert np.all(np.isnan(losses) if name == "softmax" else np.isnan(losses) == (np.arange(N) == 3))
    bad = {"scale": jnp.float32(-1)} | ({"bias": 0.0} if name == "sigmoid" else {})
    assert np.isnan(LOSSES[name](*arrays(), **bad))


@pytest.mark.parametrize("tiles", [None, TILE])
@each_loss
def test_transformations(name, tiles):
    """vmap over batches, checkpoint, scan; second derivatives in both orders beside jax' own of the matrix."""
    x, y = arrays()
    loss = functools.partial(LOSSES[name], **numbers(name), block_bytes=tiles)
    f = compiled(jax.value_and_grad(loss, (0, 1)))
    batches = np.stack([x, y, x[::-1]]), np.stack([y, x, x])
    each = [f(*batch) for batch in zip(*batches, strict=True)]
    want = jax.tree.map(lambda *a: jnp.stack(a), *each)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, compiled(jax.vmap(jax.value_and_grad(loss, (0, 1))))(*batches), want)
    jax.tree.map(close, compiled(jax.value_and_grad(jax.checkpoint(loss), (0, 1)))(x, y), each[0])
    scanned = compiled(
        lambda *a: jax.lax.scan(lambda c, b: (c, jax.value_and_grad(loss, (0, 1))(*b)), 0, a)[1]
    )
    jax.tree.map(close, scanned(*batches), want)

    def plain(x, y):
        z = SCALE * x @ y.T
        if name == "sigmoid":
            sign = 2 * jnp.eye(N) - 1
            return -jnp.mean(jnp.sum(jax.nn.log_sigmoid(sign * (z + BIAS)), 1))
        return -jnp.mean(jnp.diag(jax.nn.log_softmax(z, 0)) + jnp.diag(jax.nn.log_softmax(z, 1))) / 2

    direction = arrays(seed=3)

    def forward_over_reverse(f):
        return jax.jvp(jax.grad(f, (0, 1)), (x, y), direction)[1]

    def reverse_over_reverse(f):
        inner = lambda *a: sum(map(jnp.vdot, jax.grad(f, (0, 1))(*a), direction))  # noqa: E731
        return jax.grad(inner, (0, 1))(x, y)

    for second in (forward_over_reverse, reverse_over_reverse):
        got, want = (compiled(functools.partial(second, f))() for f in (loss, plain))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.max(abs(b)))
    with pytest.raises(TypeError, match="have no forward mode"):
        jax.jvp(loss, (x, y), direction)


def test_scale_may_be_any_kind_of_number():
    x, y = arrays()
    want = jaxent.softmax_contrastive_loss(x, y, scale=2.0)
    for scale in (2, np.float32(2), np.array(2.0, F32), jnp.float32(2), jnp.bfloat16(2), jnp.int32(2)):
        np.testing.assert_allclose(jaxent.softmax_contrastive_loss(x, y, scale=scale), want, rtol=1e-6)
    slope = jax.grad(lambda s: jaxent.softmax_contrastive_loss(x, y, scale=jnp.exp(s)))(jnp.bfloat16(0.5))
    assert slope.dtype == jnp.bfloat16 and np.isfinite(slope)


def test_ntxent():
    """SimCLR: both views of all images are negatives of each other, but a view is none of itself."""
    z = arrays()[0][:36]
    n, temperature = len(z) // 2, 0.3
    with jax.numpy_dtype_promotion("standard"):
        want = optax.losses.ntxent(z, np.tile(np.arange(n), 2), temperature)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    partners, images = np.roll(z, n, 0), np.arange(2 * n) % n
    got = jaxent.softmax_contrastive_loss(z, partners, scale=1 / temperature, ids=images, symmetric=False)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_statistics_of_pairs():
    """Retrieval: the rank of the partner, and the entropy, of a layer whose kernel is the other list, `[M, D]`."""
    x, y = arrays(True)
    logits = jaxent.LinearLogits(x, y, class_axis=0, temperature=1 / SCALE)
    s = jaxent.softmax_statistics(logits, np.arange(N), names=("log_prob", "rank", "entropy"))
    z = SCALE * np.float64(x) @ np.float64(y).T
    np.testing.assert_array_equal(s.rank, np.sum(z > z.diagonal()[:, None], 1))
    p = np.exp(z - np.max(z, 1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    np.testing.assert_allclose(s.entropy, -np.sum(p * np.log(p), 1), rtol=1e-5)
    loss = jaxent.softmax_contrastive_loss(x, y, scale=SCALE, symmetric=False, reduction="none")
    np.testing.assert_allclose(-s.log_prob, loss, rtol=1e-5)


def test_several_positives():
    """Supervised contrastive: each row's positives are a distribution over the other list; docs/migration.md."""
    x, y = arrays()
    classes = np.random.default_rng(0).integers(5, size=N)
    positives = classes[:, None] == classes[None, :]
    z = SCALE * np.float64(x) @ np.float64(y).T
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    slots = np.full((N, positives.sum(1).max()), -1)
    for i, row in enumerate(positives):
        slots[i, : row.sum()] = np.flatnonzero(row)
    probs = F32((slots >= 0) / positives.sum(1, keepdims=True))
    logits = jaxent.LinearLogits(x, y, class_axis=0, temperature=1 / SCALE)
    loss = jaxent.softmax_cross_entropy(logits, jaxent.SparseDistribution(slots, probs))
    np.testing.assert_allclose(loss, -np.sum(positives * log_p, 1) / positives.sum(1), rtol=1e-5)


def test_negatives_of_their_own():
    """InfoNCE with keys that are nobody's: they come last; docs/migration.md."""
    x, y = arrays(True)
    z = SCALE * np.float64(x) @ np.float64(y).T
    want = np.mean(np.log(np.exp(z).sum(1)) - z.diagonal())
    np.testing.assert_allclose(
        jaxent.softmax_contrastive_loss(x, y, scale=SCALE, symmetric=False), want, rtol=1e-5
    )


@each_loss
def test_second_derivatives_keep_no_tile(name):
    """They are made again, tile by tile."""
    n, block_bytes = 2048, 2**18
    x = jax.ShapeDtypeStruct((n, D), F32)
    loss = functools.partial(LOSSES[name], **numbers(name), block_bytes=block_bytes)

    def product(x, y, direction):
        return jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x, y), direction))(x)

    program = jax.jit(product, compiler_options=harness.HLO).lower(x, x, x).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * n * n / 2


@pytest.mark.parametrize("options", [{}, {"where": np.arange(4096) % 2 == 0, "ids": np.arange(4096) % 100}])
@each_loss
def test_no_matrix_of_pairs(name, options):
    """Tiles, and gradients: one matmul for both directions, three for the gradient."""
    n, block_bytes = 4096, 2**20
    x = jax.ShapeDtypeStruct((n, D), F32)
    f = functools.partial(LOSSES[name], **numbers(name), **options, block_bytes=block_bytes)
    step = jax.value_and_grad(f, (0, 1))
    largest = max(a.size for a in avals(jax.make_jaxpr(step)(x, x).jaxpr) if hasattr(a, "shape"))
    assert largest <= max(block_bytes / 8, n * D)
    program = jax.jit(step, compiler_options=harness.HLO).lower(x, x).compile()
    assert program.memory_analysis().temp_size_in_bytes < 6 * block_bytes
    assert matmul_operations(program) == (4 if name == "softmax" else 3) * 2 * n * n * D
    default = jax.make_jaxpr(functools.partial(LOSSES[name], **numbers(name), **options))(x, x)
    assert max(a.size for a in avals(default.jaxpr) if hasattr(a, "shape")) <= 2**20 / 8
    forward = jax.jit(f, compiler_options=harness.HLO).lower(x, x).compile()
    assert matmul_operations(forward) == 2 * n * n * D


def test_one_tile_is_made_once():
    """What all pairs fit into XLA keeps for the gradient: three matmuls."""
    n = 256
    x = jax.ShapeDtypeStruct((n, D), F32)
    for block_bytes, matmuls in ((8 * n * n, 3), (4 * n * n, 4)):
        f = functools.partial(jaxent.softmax_contrastive_loss, block_bytes=block_bytes)
        step = jax.jit(jax.value_and_grad(f, (0, 1)), compiler_options=harness.HLO)
        assert matmul_operations(step.lower(x, x).compile()) == matmuls * 2 * n * n * D


@each_loss
def test_memory(name):
    """B = 65,536, D = 512, tiles of 128 MiB: a fiftieth of what the matrix takes."""
    n = 65_536
    x = jax.ShapeDtypeStruct((n, 512), F32)
    loss = functools.partial(LOSSES[name], **numbers(name), block_bytes=128 * 2**20)

    def plain(x, y):
        z = SCALE * x @ y.T
        if name == "sigmoid":
            return -jnp.mean(jnp.sum(jax.nn.log_sigmoid((2 * jnp.eye(n) - 1) * (z + BIAS)), 1))
        return -jnp.mean(jnp.diag(jax.nn.log_softmax(z, 0)) + jnp.diag(jax.nn.log_softmax(z, 1))) / 2

    def temporaries(f):
        step = jax.jit(jax.value_and_grad(f, (0, 1)), compiler_options=harness.HLO)
        return step.lower(x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(loss) <= 0.02 * temporaries(plain)


X = np.ones((4, 3), F32)
BAD = {
    "x": (TypeError, {"x": np.ones((4, 3), int)}, "floating point"),
    "rank": (ValueError, {"x": np.ones((2, 4, 3), F32)}, "jax.vmap"),
    "features": (ValueError, {"y": np.ones((4, 2), F32)}, "of shape [4, 3], or of more rows"),
    "fewer": (ValueError, {"y": np.ones((3, 3), F32)}, "come last"),
    "ids": (TypeError, {"ids": np.ones(4, F32)}, "`ids` must be integers"),
    "ids of others": (ValueError, {"ids": np.ones(5, int)}, "one per pair"),
    "where": (ValueError, {"where": np.ones(5, bool)}, "one per row of `x`"),
    "weights": (ValueError, {"weights": np.ones((4, 1), F32)}, "one per row of `x`"),
    "scale": (ValueError, {"scale": 0.0}, "`scale` must be a finite number > 0"),
    "scale of rows": (ValueError, {"scale": np.ones(4, F32)}, "1 / temperature"),
    "block_bytes": (ValueError, {"block_bytes": 1.5}, "a positive int or None"),
    "ids of bools": (TypeError, {"ids": np.ones(4, bool)}, "ids.astype(int)"),
    "reduction": (ValueError, {"reduction": "avg"}, "reduction"),
}


@pytest.mark.parametrize("case", BAD)
@each_loss
def test_errors_teach(name, case):
    kind, options, words = BAD[case]
    with pytest.raises(kind, match=re.escape(words)):
        LOSSES[name](**({"x": X, "y": X} | numbers(name) | options))
    if name == "sigmoid":
        with pytest.raises(ValueError, match="`bias` must be a finite number"):
            LOSSES[name](X, X, scale=1.0, bias=np.inf)
    else:
        with pytest.raises(ValueError, match="`symmetric` must be True or False"):
            LOSSES[name](X, X, symmetric="no")


@each_loss
def test_a_number_of_pairs_that_is_not_known(name):
    x = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("n"), D), F32)
    with pytest.raises(ValueError, match="a known number of rows"):
        jax.export.export(jax.jit(functools.partial(LOSSES[name], **numbers(name))))(x, x)
