"""What the programs compiled for TPUs and an H100 hold, multiply, read and send. Nothing is run: no accelerator needed.

Small shapes, whose programs have the structure of large ones: docs/accelerators.md has those. A machine whose compiler
is not installed is skipped; benchmarks/machines.py says what to install.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxent
from compiled import Program
from test_architecture import PUBLIC

pytestmark = pytest.mark.accelerators

N, D, V = 2048, 1536, 8192  # four pieces of 512 rows
HALF = jnp.bfloat16
TPU, GPU = "v6e", "H100"


def array(shape, dtype=HALF):
    return jax.ShapeDtypeStruct(shape, dtype)


HIDDEN, KERNEL, LABELS = array((N, D)), array((D, V)), array((N,), jnp.int32)
TABLE = array((V, D))
WHERE = array((N,), jnp.bool_)


def mean(hidden, kernel, labels, where=None, block_bytes=None, class_axis=-1, **options):
    logits = jaxent.LinearLogits(hidden, kernel, class_axis=class_axis, block_bytes=block_bytes)
    return jaxent.softmax_cross_entropy(logits, labels, where=where, reduction="mean", **options)


def unfused(hidden, kernel, labels):
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    log_p = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], 1))


@pytest.fixture(autouse=True)
def as_users_compile(as_users_run):
    """What users have: neither strict modes, nor the flags that make tests of values quick."""


def compile_for(machine, f, *arguments, shape=None, kind=AxisType.Auto, **options):
    import machines  # not before these tests are wanted: it tells jax to stay on the CPU

    if why := machines.missing(machine):
        pytest.skip(why)
    return machines.compile_for(machines.mesh(machine, shape, kind), f, *arguments, **options)


@functools.cache
def compiled(machine, loss, which=(0, 1), masked=False, **options):
    f = functools.partial(loss, **options)
    kernel = TABLE if options.get("class_axis") == 0 else KERNEL
    arguments = (HIDDEN, kernel, LABELS, WHERE) if masked else (HIDDEN, kernel, LABELS)
    return compile_for(machine, jax.value_and_grad(f, which), *arguments)


def temporaries(program):
    return program.memory_analysis().temp_size_in_bytes


on_each = pytest.mark.parametrize("machine", [TPU, GPU])


@on_each
@pytest.mark.parametrize("class_axis", [-1, 0])
def test_three_matmuls_of_halves(machine, class_axis):
    found = Program(compiled(machine, mean, class_axis=class_axis)).matmuls()
    assert sum(m.operations for m in found) == 3 * 2 * N * D * V
    assert {x.dtype for m in found for x in (m.lhs, m.rhs)} == {"bf16"}
    # those of the backward take all rows at once, which are written once
    assert sorted((m.times, m.in_loop) for m in found) == [(1, False), (1, False), (4, True)]


@on_each
@pytest.mark.parametrize("class_axis", [-1, 0])
def test_nothing_is_widened_or_copied(machine, class_axis):
    """No float32 kernel or hidden, no transposed kernel or gradient, no zeros to be added to."""
    steps = list(Program(compiled(machine, mean, class_axis=class_axis)).steps())
    layer = {tuple(sorted(dims)) for dims in ((N, D), (D, V))}
    for step in steps:
        x = step.instruction
        if x.kind in ("parameter", "get-tuple-element", "tuple", "bitcast", "while"):
            continue
        for shape in x.shapes:
            if tuple(sorted(shape.dims)) in layer:
                assert shape.dtype == "bf16", x.text
                assert x.kind not in ("copy", "transpose"), x.text


@on_each
@pytest.mark.parametrize("loss", [jaxent.softmax_cross_entropy, jaxent.softmax_kl_divergence])
def test_few_classes(machine, loss):
    """No array of the logits' size but their gradient, though a KL leaves 16 classes of each row out of a sum."""

    def mean(logits, classes, probs):
        return loss(logits, jaxent.SparseDistribution(classes, probs), reduction="mean")

    arguments = array((N, V)), array((N, 16), jnp.int32), array((N, 16), jnp.float32)
    program = compile_for(machine, jax.value_and_grad(mean), *arguments)
    made = [step.instruction for step in Program(program).steps() if step.instruction.kind == "fusion"]
    large = [shape for x in made for shape in x.shapes if shape.size >= N * V / 4]
    assert [(x.dtype, x.size) for x in large] == [("bf16", N * V)]
    assert temporaries(program) < N * V / 2


@on_each
@pytest.mark.parametrize("rows", ["all", "some"])
def test_the_logits_are_never_there(machine, rows):
    """Their gradient is, in half precision, and a piece of them; of the unfused loss they are, in float32."""
    program = compiled(machine, mean, masked=rows == "some")
    assert temporaries(program) < 0.75 * temporaries(compiled(machine, unfused))
    arrays = [shape for step in Program(program).everything() for shape in step.instruction.shapes]
    assert not [x for x in arrays if x.dtype == "f32" and x.size >= N * V]


@on_each
def test_passes_over_the_logits(machine):
    """Written, read for the sum and for the gradient, which is written and read twice; by a GPU for the maximum too."""

    def is_logits(shape):
        return len(shape.dims) == 2 and D not in shape.dims and shape.size > N

    passes = Program(compiled(machine, mean)).accesses(is_logits)
    assert 5.9 <= passes / (N * V) <= (6.1 if machine == TPU else 7.1)


@on_each
def test_a_frozen_kernel_takes_two_matmuls(machine):
    program = compiled(machine, mean, which=0)
    assert sum(m.operations for m in Program(program).matmuls()) == 2 * 2 * N * D * V
    assert temporaries(program) <= temporaries(compiled(machine, mean))


@on_each
def test_masked_rows_are_left_out(machine):
    """Where a quarter of the rows counts, a quarter of each matmul is done."""
    program = compiled(machine, mean, masked=True)
    for quarters in (1, 2, 3, 4):
        # eight pieces, whose loop does not know its end; the branches of the backward are the quarters
        found = Program(program, lambda branches, _, n=quarters: n if branches else 2 * n).matmuls()
        assert sum(m.operations for m in found) == 3 * 2 * N * D * V * quarters / 4
        assert [(m.times, m.in_loop) for m in found if m.in_loop] == [(2 * quarters, True)]


@on_each
def test_little_memory(machine):
    given = 2**22
    program = compiled(machine, mean, block_bytes=given)
    found = Program(program).matmuls()
    assert sum(m.operations for m in found) == pytest.approx(4 * 2 * N * D * V, rel=0.01)
    kept = 4 * N * D + 2 * D * V  # the gradient of hidden in float32; on a GPU slices of kernels
    assert temporaries(program) <= 2 * given + kept


def test_a_maximum_is_never_alone_on_a_tpu():
    logits = array((N, V))
    f = functools.partial(jaxent.softmax_cross_entropy, reduction="mean")
    program = compile_for(TPU, jax.value_and_grad(f), logits, LABELS)
    assert not [
        s for s in Program(program).steps() if s.instruction.kind == "reduce" and s.instruction.cycles > 1000
    ]
    assert temporaries(program) < N * V


SPLITS = {"rows": {"data": 4}, "rows and classes": {"data": 2, "vocab": 2}}


@on_each
@pytest.mark.parametrize("how", ["explicit", "shard_map"])
@pytest.mark.parametrize("split", SPLITS)
def test_nothing_is_sent_in_a_loop(machine, how, split):
    shape = SPLITS[split]
    names = {"class_axis_name": "vocab" if "vocab" in shape else None, "batch_axis_name": "data"}
    specs = P("data"), P(None, names["class_axis_name"]), P("data")
    step, kind = jax.value_and_grad(mean, (0, 1)), AxisType.Explicit
    if how == "shard_map":
        step, kind = jax.value_and_grad(functools.partial(mean, **names), (0, 1)), AxisType.Auto
        step = jax.shard_map(step, in_specs=specs, out_specs=(P(), specs[:2]))
    program = compile_for(machine, step, HIDDEN, KERNEL, LABELS, specs=specs, shape=shape, kind=kind)
    sent, matmuls = Program(program).collectives(), Program(program).matmuls()
    assert sent and not [c for c in sent if c.in_loop]
    sizes = [size.size for c in sent for size in c.shapes]
    assert max(sizes) <= D * V  # gradients; never logits
    # half of the classes are one block, whose logits XLA need not make again
    assert 4 * sum(m.operations for m in matmuls) == 3 * 2 * N * D * V


def mapped(hidden, kernel, labels):
    return jnp.sum(jax.vmap(mean, (0, None, 0))(hidden, kernel, labels))


def curvature(hidden, kernel, labels):
    """Forward over reverse."""
    gradient = jax.grad(lambda hidden: mean(hidden, kernel, labels))
    return jnp.sum(jax.jvp(gradient, (hidden,), (hidden,))[1].astype(jnp.float32))


@on_each
def test_transformations_compile(machine):
    two = array((2, N // 2, D)), KERNEL, array((2, N // 2), jnp.int32)
    assert temporaries(compile_for(machine, jax.value_and_grad(mapped, (0, 1)), *two)) >= 0
    few = array((600, D)), KERNEL, array((600,), jnp.int32)  # of two pieces
    assert temporaries(compile_for(machine, curvature, *few)) >= 0
    assert temporaries(compile_for(machine, jax.checkpoint(jax.value_and_grad(mean, (0, 1))), *few)) >= 0


LOGITS, TARGETS, INDICES, NUMBERS = (
    array((256, 384)),
    array((256, 384)),
    array((256,), jnp.int32),
    array((256,)),
)
LAYER = array((256, 128)), array((128, 384))
OF_CLASSES = (
    "softmax_cross_entropy",
    "softmax_focal_loss",
    "softmax_poly_loss",
    "softmax_statistics",
    "nll_loss",
)
OF_TWO = ("softmax_kl_divergence", "softmax_js_divergence", "kl_divergence", "categorical_cross_entropy")
OF_TWO += ("sigmoid_cross_entropy", "sigmoid_focal_loss", "sigmoid_asymmetric_loss", "binary_cross_entropy")
OTHERS = {name: (INDICES,) for name in OF_CLASSES} | {name: (TARGETS,) for name in OF_TWO}
OTHERS |= {"softmax_entropy": (), "softmax_loss": (INDICES, NUMBERS)}
CANDIDATES = *LAYER, INDICES, array((64,), jnp.int32)
PAIRS = (array((256, 128)),) * 2
OWN = {name: CANDIDATES for name in ("sampled_softmax_cross_entropy", "nce_loss", "candidate_logits")}
OWN |= {"candidate_columns": CANDIDATES[1:]}
OWN |= dict.fromkeys(("softmax_contrastive_loss", "sigmoid_contrastive_loss"), PAIRS)
NUMBERS_OF = {"sigmoid_contrastive_loss": {"scale": 10.0, "bias": -10.0}}
SAMPLERS = {"log_uniform_sampler": 384, "uniform_sampler": 384, "learned_sampler": jnp.ones(384)}
ONE_PER_ROW = ("mean", "total_weight")  # sums of what losses give
AS_LAYERS = [f"{name}, a layer" for name in OTHERS if name.startswith("softmax")]


def total(name, *arguments):
    def policy(s, advantage):
        return -advantage * s.log_prob - 0.01 * s.entropy

    f = functools.partial(jaxent.softmax_loss, policy) if name == "softmax_loss" else getattr(jaxent, name)
    found = f(*arguments, **NUMBERS_OF.get(name, {}))
    return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(found))


def test_the_table_is_that_of_all_functions():
    functions = {name for name in PUBLIC if not isinstance(getattr(jaxent, name), type)}
    assert functions == {*OTHERS, *OWN, *SAMPLERS, *ONE_PER_ROW, "diagnose"}


@on_each
@pytest.mark.parametrize("name", [*OTHERS, *AS_LAYERS, *OWN])
def test_every_function_compiles(machine, name):
    name, _, layer = name.partition(", ")
    arguments = OWN.get(name) or (*(LAYER if layer else (LOGITS,)), *OTHERS[name])

    def f(*arguments):
        if layer:
            arguments = jaxent.LinearLogits(*arguments[:2]), *arguments[2:]
        return total(name, *arguments)

    of_floats = tuple(i for i, x in enumerate(arguments) if jnp.issubdtype(x.dtype, jnp.floating))
    assert temporaries(compile_for(machine, f, *arguments)) >= 0
    assert temporaries(compile_for(machine, jax.value_and_grad(f, of_floats), *arguments)) >= 0


@on_each
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_compiles(machine, name):
    def f(labels):
        samples = getattr(jaxent, name)(jax.random.key(0), SAMPLERS[name], 64)
        return *samples, samples.log_expected_counts_of(labels)

    assert temporaries(compile_for(machine, f, INDICES)) >= 0


@on_each
@pytest.mark.parametrize("name, matmuls", [("softmax", 4), ("sigmoid", 3)])
def test_all_pairs(machine, name, matmuls):
    """In tiles, whose products and gradients are the operands of matmuls in half precision, and as few as can be."""
    pairs, features = 4096, 512
    numbers = {"scale": 10.0} | ({"bias": -10.0} if name == "sigmoid" else {})
    loss = functools.partial(getattr(jaxent, f"{name}_contrastive_loss"), **numbers)
    program = compile_for(machine, jax.value_and_grad(loss, (0, 1)), *(array((pairs, features)),) * 2)
    found = Program(program).matmuls()
    assert sum(m.operations for m in found) == matmuls * 2 * pairs**2 * features
    assert {x.dtype for m in found for x in (m.lhs, m.rhs)} == {"bf16"}
    arrays = [shape for step in Program(program).everything() for shape in step.instruction.shapes]
    assert max(x.size for x in arrays) <= pairs**2 // 2
    assert temporaries(program) < 5 * pairs**2  # the matrix takes 4, and its gradient


@on_each
def test_sampled_classes_take_one_gradient_of_the_table(machine):
    def loss(hidden, table, labels, samples):
        f = functools.partial(jaxent.sampled_softmax_cross_entropy, class_axis=0, reduction="mean")
        return f(hidden, table, labels, samples)

    arguments = HIDDEN, array((32 * V, D)), LABELS, array((64,), jnp.int32)
    program = compile_for(machine, jax.value_and_grad(loss, (0, 1)), *arguments)
    assert temporaries(program) < 2 * 32 * V * D / 4
