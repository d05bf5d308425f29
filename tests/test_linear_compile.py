"""What linear logits cost, exactly: operations of matmuls, memory, and that no array of N x V exists."""

import functools
import itertools

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxent
from compiled import matmul_operations
from harness import HLO, QUICK
from jaxent._devices import platform
from jaxent._logits import sources
from jaxent._logits.plan import Plan, Sizes, plan
from programs import avals

N, D, V = 600, 16, 1000
MATMUL = 2 * N * D * V
BLOCK = 64  # rows, or
CLASSES = 200
PLANS = {"rows": Plan(BLOCK, V), "classes": Plan(N, CLASSES)}
all_plans = pytest.mark.parametrize("kind", PLANS)
HIDDEN, KERNEL, BIAS = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((N, D), (D, V), (V,)))
LABEL = jax.ShapeDtypeStruct((N,), jnp.int32)
ROWS = np.cos(np.arange(N)).astype(np.float32)


@pytest.fixture
def force(monkeypatch):
    return lambda kind: monkeypatch.setattr(sources, "plan", lambda *_: PLANS[kind])


def mean(hidden, kernel, bias, label, **options):
    logits = jaxent.LinearLogits(hidden, kernel, bias)
    return jaxent.softmax_cross_entropy(logits, label, reduction="mean", **options)


def per_row(hidden, kernel, bias, label):
    return jnp.vdot(ROWS, jaxent.softmax_cross_entropy(jaxent.LinearLogits(hidden, kernel, bias), label))


def policy(hidden, kernel, bias, label):
    """A user's function that closes over something traced."""
    scale = jnp.mean(bias)
    fn = lambda s, a: -a * jnp.tanh(s.log_prob) * scale - 0.1 * s.entropy  # noqa: E731
    return jaxent.softmax_loss(fn, jaxent.LinearLogits(hidden, kernel, bias), label, ROWS)


def compiled(f, *arguments, options=HLO):
    anew = lambda *x: f(*x)  # noqa: E731  (jax would take the trace it has, of another plan)
    return jax.jit(anew).lower(*(arguments or (HIDDEN, KERNEL, BIAS, LABEL))).compile(options)


def matmuls(f, *arguments):
    """In units of one product of all rows; the rows that fill the last block are work as well."""
    return matmul_operations(compiled(f, *arguments, options=QUICK)) / MATMUL


def gradient(f, *which):
    return jax.value_and_grad(f, which)


FILLED = BLOCK * -(-N // BLOCK) / N


@pytest.mark.parametrize("loss", [mean, policy])
def test_three_matmuls_for_a_sum(loss, force):
    force("rows")
    assert matmuls(gradient(loss, 0, 1, 2)) == pytest.approx(3 * FILLED)
    assert matmuls(loss) == pytest.approx(FILLED)


OPTIONS = {
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-3},
    "class weights": {"class_weights": np.linspace(0.5, 2, V)},
    "class mask": {"class_mask": np.arange(V) % 3 != 1},
    "weights": {"weights": np.linspace(0.5, 2, N)},
}
OPTIONS["everything"] = functools.reduce(lambda a, b: a | b, OPTIONS.values())


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    "loss", [jaxent.softmax_cross_entropy, jaxent.softmax_focal_loss, jaxent.softmax_poly_loss]
)
def test_three_matmuls_with_every_option(loss, name, force):
    force("rows")
    jaxpr = jax.make_jaxpr(
        lambda h, k, y: loss(jaxent.LinearLogits(h, k), y, reduction="sum", where=ROWS > 0, **OPTIONS[name])
    )(HIDDEN, KERNEL, LABEL)
    assert "_summed" in str(jaxpr) or "_summed_primal" in str(jaxpr)


def test_four_matmuls_otherwise(force):
    force("rows")
    assert matmuls(gradient(per_row, 0, 1, 2)) == pytest.approx(4 * FILLED)
    assert matmuls(per_row) == pytest.approx(FILLED)
    force("classes")
    for f in (mean, per_row):
        assert matmuls(gradient(f, 0, 1, 2)) == pytest.approx(4)
        assert matmuls(f) == pytest.approx(1)


def test_what_is_frozen_costs_nothing(force):
    force("rows")
    for which in ((0,), (1,), (0, 2), (1, 2)):
        assert matmuls(gradient(mean, *which)) == pytest.approx(2 * FILLED)
        assert matmuls(gradient(per_row, *which)) == pytest.approx(3 * FILLED)
    assert matmuls(gradient(mean, 2)) == pytest.approx(FILLED)
    force("classes")
    for which in ((0,), (1,)):
        assert matmuls(gradient(mean, *which)) == pytest.approx(3)


def test_operations_are_counted():
    f = jax.value_and_grad(lambda h, k: jnp.sum(jnp.tanh(h @ k)), (0, 1))
    assert matmul_operations(jax.jit(f).lower(HIDDEN, KERNEL).compile(HLO)) == 3 * MATMUL
    looped = jax.jit(lambda h, k: jax.lax.fori_loop(0, 7, lambda _, x: jnp.tanh(x @ k @ k.T), h))
    assert matmul_operations(looped.lower(HIDDEN, KERNEL).compile(HLO)) == 14 * MATMUL


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("differentiated", [False, True])
def test_blocks_in_which_no_row_counts_are_not_run(share, differentiated, force):
    force("rows")
    calls = []

    def fn(s):
        jax.debug.callback(lambda: calls.append(1))
        return -s.log_prob

    def f(hidden, kernel, where):
        logits = jaxent.LinearLogits(hidden, kernel)
        return jaxent.softmax_loss(fn, logits, jnp.zeros(N, jnp.int32), where=where)

    where = np.random.default_rng(0).permutation(np.arange(N) < share * N)
    f = jax.value_and_grad(f, (0, 1)) if differentiated else f
    jax.block_until_ready(jax.jit(f)(jnp.ones((N, D)), jnp.ones((D, V)), where))
    jax.effects_barrier()
    size = sources.cut(jaxent.LinearLogits(HIDDEN, KERNEL), True).by_rows.rows
    assert len(calls) == -(-int(where.sum()) // size)


def statistics(hidden, kernel, bias, label):
    s = jaxent.softmax_statistics(jaxent.LinearLogits(hidden, kernel, bias), label)
    return sum(jnp.vdot(ROWS, x.astype(ROWS.dtype)) for x in jax.tree.leaves(s))


def divergence(name, reduction):
    def f(hidden, kernel, bias, label):
        other = jaxent.LinearLogits(hidden[:, :5], kernel[:5], block_bytes=80 * V * BLOCK)
        logits = jaxent.LinearLogits(hidden, kernel, bias, block_bytes=80 * V * BLOCK)
        return jnp.sum(getattr(jaxent, name)(logits, other, reduction=reduction, where=ROWS > 0))

    return f


PROGRAMS = {
    "per row": per_row,
    "policy": policy,
    "statistics": statistics,
    "entropy": lambda h, k, b, y: jaxent.softmax_entropy(jaxent.LinearLogits(h, k, b), reduction="mean"),
    "kl": divergence("softmax_kl_divergence", "mean"),
    "js": divergence("softmax_js_divergence", "none"),
    **{name: functools.partial(mean, **options) for name, options in OPTIONS.items()},
}


@all_plans
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_array_of_rows_by_classes(name, kind, force):
    force(kind)
    jaxpr = jax.make_jaxpr(gradient(PROGRAMS[name], 0, 1, 2))(HIDDEN, KERNEL, BIAS, LABEL)
    largest = max(np.prod(aval.shape) for aval in avals(jaxpr.jaxpr) if hasattr(aval, "shape"))
    assert largest <= max(BLOCK * V, N * CLASSES, D * V)
    assert largest < N * V / 3


@pytest.mark.parametrize("rows", [4096, 32])
@pytest.mark.parametrize("name", ["mean", "per row", "everything"])
def test_temporaries_are_bounded(rows, name):
    """Many rows: blocks of rows. Few: of classes. Beside the block, what the gradients take."""
    features, classes, block_bytes = 32, 50_000, 2**24
    options = (
        {"label_smoothing": 0.1, "z_loss": 1e-3, "where": np.arange(rows) % 5 != 1}
        if name == "everything"
        else {}
    )

    def f(hidden, kernel, label):
        logits = jaxent.LinearLogits(hidden, kernel, block_bytes=block_bytes)
        if name == "per row":
            return jnp.vdot(jnp.cos(jnp.arange(rows)), jaxent.softmax_cross_entropy(logits, label))
        return jaxent.softmax_cross_entropy(logits, label, reduction="mean", **options)

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, features), (features, classes))]
    program = compiled(jax.value_and_grad(f, (0, 1)), *shapes, jax.ShapeDtypeStruct((rows,), jnp.int32))
    gradients = 4 * (rows * features + features * classes)
    temporaries = program.memory_analysis().temp_size_in_bytes
    assert temporaries <= 1.1 * block_bytes + 2 * gradients
    assert temporaries < 0.15 * (2 * 4 * rows * classes) or rows == 32


def test_the_plan_on_a_cpu():
    assert plan(Sizes(2048, 512, 32_000)) == Plan(512, 32_000)
    assert plan(Sizes(32, 64, 1_000_000)).classes < 1_000_000
    assert plan(Sizes(2048, 64, 65_536)) == Plan(256, 65_536)
    assert plan(Sizes(1024, 256, 128_000)) == Plan(1024, 8192)


def test_the_plan_on_accelerators():
    half = functools.partial(Sizes, itemsize=2, gradient=2)
    on_tpu = functools.partial(plan, platform="tpu")
    # one block: the kernel's gradient is written once
    assert on_tpu(half(8192, 4096, 131_072)) == Plan(512, 131_072, 16)
    assert on_tpu(half(16_384, 4096, 131_072)) == Plan(512, 131_072, 16)
    assert plan(half(8192, 4096, 131_072), platform="gpu") == Plan(512, 131_072, 16)
    assert on_tpu(half(8192, 2304, 256_000)) == Plan(512, 256_000, 16, fused=1)
    assert on_tpu(half(32, 64, 1_000_000)) == Plan(32, 1_000_000, fused=2)
    # few features: exponentials are made as a part of matmuls, on a TPU
    assert on_tpu(half(16_384, 768, 50_257)) == Plan(4096, 50_257, fused=2)
    assert plan(half(16_384, 768, 50_257), platform="gpu") == Plan(464, 50_257, 6)
    # next to no memory
    assert on_tpu(half(8192, 4096, 131_072), 2**28) == Plan(8192, 3584)
    assert on_tpu(half(16_384, 768, 50_257), 2**28) == Plan(16_384, 2560)


def test_the_benchmark_says_which_blocks_it_timed():
    import linear

    assert linear.plan_of(linear.make_problem("f32", 64, 16, 1000)) == "1 block of 64 rows x 1000 classes"
    assert (
        linear.plan_of(linear.make_problem("bf16", 32, 2, 600_000)) == "74 blocks of 32 rows x 8192 classes"
    )


TPU = jax.sharding.AbstractDevice("TPU v6 lite", 1, "tpu")
TPU_MESH = jax.sharding.AbstractMesh((1,), ("one",), (AxisType.Auto,), abstract_device=TPU)


def test_the_mesh_says_what_the_program_is_for():
    """Not what jax would take: a program may be compiled for a machine that is not there."""
    found = []

    def seen(x):
        found.append(platform((x, 1.0)))
        return x

    nowhere = jax.ShapeDtypeStruct((4, 2), jnp.float32)
    jax.eval_shape(seen, jax.ShapeDtypeStruct((4, 2), jnp.float32, sharding=NamedSharding(TPU_MESH, P())))
    with jax.sharding.use_abstract_mesh(TPU_MESH):
        jax.eval_shape(seen, nowhere)
    jax.eval_shape(seen, nowhere)
    seen(jnp.zeros((4, 2)))
    assert found == ["tpu", "tpu", "cpu", "cpu"]


def test_a_program_for_a_tpu_is_not_that_of_a_cpu():
    kernel, bias = jax.ShapeDtypeStruct((D, 1024), jnp.float32), jax.ShapeDtypeStruct((1024,), jnp.float32)

    def traced():
        f = gradient(mean, 0, 1, 2)
        return str(jax.make_jaxpr(lambda *x: f(*x))(HIDDEN, kernel, bias, LABEL))

    on_cpu = traced()
    with jax.sharding.use_abstract_mesh(TPU_MESH):
        on_tpu = traced()
    for primitive in ("optimization_barrier", "layout_constraint"):
        assert primitive in on_tpu and primitive not in on_cpu


@pytest.mark.parametrize("machine", ["cpu", "tpu", "gpu"])
def test_any_plan_covers_the_rows_and_no_more(machine):
    for rows, features in itertools.product((0, 1, 3, 17, 1000, 5000, 20_000), (8, 2000, 4000)):
        for classes, block_bytes in itertools.product((1, 2, 129, 5003), (1, 1000, 10**9, None)):
            found = plan(Sizes(rows, features, classes), block_bytes, machine)
            if found.classes < classes:
                assert found.classes >= 1 and found.rows == rows and found.pieces == 1
                continue
            block = found.rows * found.pieces
            blocks = max(-(-rows // block), 1)
            # pieces come in whole tiles where there are several
            assert max(rows, 1) <= blocks * block < max(rows, 1) + blocks * (found.pieces * 16)


@all_plans
def test_precision_is_that_of_every_matmul(kind, force):
    force(kind)

    def f(hidden, kernel):
        logits = jaxent.LinearLogits(hidden, kernel, precision="highest")
        return jaxent.softmax_cross_entropy(logits, jnp.zeros(N, jnp.int32), reduction="mean")

    text = jax.jit(jax.value_and_grad(f, (0, 1))).lower(HIDDEN, KERNEL).as_text()
    matmuls = [line for line in text.splitlines() if "dot_general" in line]
    assert len(matmuls) >= 3
    assert all("HIGHEST" in line for line in matmuls)


IN_LOOPS = {
    "a layer": lambda x: jaxent.softmax_entropy(jaxent.LinearLogits(x, x.T), reduction="mean"),
    "pairs": lambda x: jaxent.softmax_contrastive_loss(x, x),
}


@pytest.mark.parametrize("name", IN_LOOPS)
def test_within_jit_a_loop_is_compiled_once(name):
    """And outside of it at each call, as docs/memory.md says."""
    compiled, x = [], jnp.asarray(np.random.default_rng(0).normal(size=(12, 5)), jnp.float32)

    def listener(event, *_, **__):
        compiled.append(event == "/jax/core/compile/backend_compile_duration")

    def compilations(f):
        f(x)
        compiled.clear()
        f(x)
        return sum(compiled)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        assert compilations(jax.jit(IN_LOOPS[name])) == 0
        assert compilations(IN_LOOPS[name]) > 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
