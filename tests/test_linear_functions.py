"""A user's function of one row, of linear logits in blocks: the same as of built logits, in three matmuls."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import harness
import jaxent
from layers import (
    ADVANTAGE,
    F32,
    FLAGS,
    FLAT,
    OLD,
    SEQUENCES,
    WIDE,
    assert_same,
    compiled,
    in_blocks,
    layer_of,
)
from programs import jaxprs
from tables import some

CLASSES = 11


@jax.custom_vjp
def reversed_gradient(x):
    return x


reversed_gradient.defvjp(lambda x: (x, None), lambda _, g: (-0.3 * g,))


@jax.custom_vjp
def clipped_gradient(x):
    """A rule that is not linear in its cotangent."""
    return x


clipped_gradient.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.05, 0.05),))


@jax.custom_jvp
def rounded(x):
    """With a derivative that is not its own."""
    return jnp.round(x)


rounded.defjvp(lambda x, dot: (rounded(*x), dot[0] * x[0] ** 2))


def clipped_policy(s, advantage, old):
    ratio = jnp.exp(s.log_prob - old)
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage) - 0.1 * s.entropy


def inner_loop(s, wide):
    """A loop that ends elsewhere in each row, and another whose steps are known."""
    steps = lax.while_loop(
        lambda x: x[0] < 2, lambda x: (2 * x[0], x[1] + 1), (lax.stop_gradient(s.entropy), 0)
    )
    return lax.fori_loop(0, 3, lambda i, x: jnp.sin(x) * wide[i], s.log_prob) * (1.0 + steps[1].astype(F32))


def inner_scan(s, wide):
    def step(carry, x):
        return jnp.sin(carry) * x + s.entropy, carry * x

    carry, each = lax.scan(step, s.log_prob, wide)
    return carry + (each**2).sum()


def inner_choice(s, advantage, index):
    found = lax.cond(advantage > 0, lambda a: a * s.log_prob, lambda a: s.entropy**2, advantage)
    return lax.switch(index % 3, [jnp.sin, jnp.square, lambda x: x * s.log_normalizer], found)


def inner_noise(s, key, wide):
    own, other = jax.random.split(key)
    return (jax.random.normal(own, (3,)) * wide).sum() * s.log_prob + jax.random.uniform(other) * s.entropy


def solved(s, matrix, wide):
    matrix = matrix + 5 * jnp.eye(3, dtype=F32)
    return jnp.linalg.solve(matrix, wide)[0] * s.log_prob + jnp.linalg.slogdet(matrix)[1] * s.entropy


def with_everything(s, advantage, index, tree, key, scale, table, params):
    found = clipped_policy(s, advantage, tree["a"]) * table.ravel()[index] + params["w"][1].sum() * s.entropy
    return found + jnp.sort(tree["b"][0])[0] * jnp.exp(scale) * jax.random.uniform(key) + params["b"] ** 2


# Of a row's statistics; the other arguments are row arguments or, if they are in `shared`, closed over.
FUNCTIONS = {
    "no arguments": lambda s: s.entropy - s.log_prob,
    "row arguments": clipped_policy,
    "a vector": lambda s, wide: s.log_prob * wide.sum(-1) + wide[0] * s.entropy,
    "a matrix": solved,
    "a pytree": lambda s, tree: s.log_prob * tree["a"] + tree["b"][0].max() * s.log_normalizer,
    "integers": lambda s, index: jnp.where(index > 2, -index.astype(F32) * s.log_prob, s.entropy),
    "bools": lambda s, flag, old: jnp.where(flag, old * s.log_prob, s.mean_log_prob),
    "keys": lambda s, key: s.log_prob * jax.random.uniform(key),
    "noise": inner_noise,
    "closes over a number": lambda s, scale: jnp.exp(scale * s.log_prob) * s.entropy,
    "closes over a table": lambda s, index, table: table.ravel()[index] * s.log_prob,
    "closes over all of a table": lambda s, table: jax.nn.logsumexp(table * s.log_prob) + table.std() * s.entropy,
    "closes over a pytree": lambda s, wide, params: jnp.tanh(wide @ params["w"]).sum() * s.log_prob + params["b"],
    "closes over a key and integers": lambda s, index, seed, bounds: s.log_prob
    * jax.random.uniform(jax.random.fold_in(seed, index)) * bounds[index].astype(F32),
    "closes over nothing per row": lambda s, index: jnp.asarray(np.arange(12.0), F32)[index] * s.log_prob,
    "sorted": lambda s, wide: (jnp.sort(wide) * jnp.arange(3, dtype=F32)).sum() * s.log_prob,
    "sorted statistics": lambda s: jnp.sort(jnp.stack([s.log_prob, -s.entropy, -s.log_normalizer]))[1] ** 2,
    "running sums": lambda s, wide: (jnp.cumsum(wide)[::-1] ** 2 * s.log_prob).mean(),
    "scan": inner_scan,
    "loops": inner_loop,
    "choices": inner_choice,
    "custom_vjp": lambda s, advantage, scale: reversed_gradient(scale * s.log_prob) * reversed_gradient(advantage),
    "custom_jvp": lambda s, old, scale: rounded(3 * s.log_prob) * old + rounded(scale) * s.entropy,
    "jitted": jax.jit(lambda s, advantage, scale: s.log_prob * advantage * scale),
    "checkpointed": jax.checkpoint(lambda s, old, scale: jnp.exp(scale * jnp.sin(s.log_prob)) * old * s.entropy),
    "vmapped": lambda s, wide: jax.vmap(lambda s, x: jnp.sin(x * s.log_prob), (None, 0))(s, wide).sum(),
    "a gradient": lambda s, old, scale: jax.grad(lambda x: jnp.sin(x * s.log_prob * scale))(old),
    "another loss": lambda s, wide: jaxent.softmax_cross_entropy(wide, jnp.asarray(1)) * s.log_prob - s.entropy,
    "a prediction": lambda s: jnp.where(s.rank < 2, s.log_prob, s.prediction.astype(F32)),
    "no statistics": lambda s, advantage, scale: scale * advantage**2,
    "no row": lambda s, scale: scale**2,
    "wrong rows behind a mask": lambda s, dirty: s.log_prob * jnp.log(dirty),
    "everything": with_everything,
}  # fmt: skip
FIXED = ("index", "flag", "key", "seed", "bounds")


def arguments_of(fn, shape):
    """Row arguments, and what is closed over: of each those that `fn` names. The rows in front are no hint."""
    rng = np.random.default_rng([5, *shape])

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), F32)

    counts = counting(shape)
    rows = {
        "advantage": normal(*shape),
        "old": normal(*shape) - 2,
        "wide": normal(*shape, 3),
        "matrix": normal(*shape, 3, 3),
        "tree": {"a": normal(*shape) - 2, "b": [normal(*shape, 2)]},
        "index": jnp.asarray(rng.integers(math.prod(shape), size=shape)),
        "flag": jnp.asarray(rng.uniform(size=shape) < 0.5),
        "key": jax.random.split(jax.random.key(0), shape),
        "dirty": jnp.where(counts, normal(*shape) ** 2 + 0.5, jnp.nan),
    }
    shared = {
        "scale": jnp.asarray(0.3, F32),
        "table": normal(*shape),
        "seed": jax.random.key(1),
        "bounds": jnp.arange(12),
        "params": {"w": normal(3, 2), "b": jnp.asarray(-1.5, F32)},
    }
    names = inspect.signature(fn).parameters
    return tuple({name: x for name, x in arguments.items() if name in names} for arguments in (rows, shared))


def counting(shape):
    return (
        jnp.asarray(np.random.default_rng(2).uniform(size=shape) < 0.7) if shape == SEQUENCES else FLAGS > 0
    )


def matmuls_of_classes(jaxpr):
    """How many equations are one, inside of loops too; one that a loop repeats is one."""
    here = sum(
        e.primitive.name == "dot_general" and any(CLASSES in v.aval.shape for v in e.invars)
        for e in jaxpr.eqns
    )
    return here + sum(matmuls_of_classes(inner) for e in jaxpr.eqns for inner in jaxprs(e.params))


def with_gradients(name, shape, source):
    """Value and gradients, of the layer in blocks and of its built logits; and how many matmuls the layer took."""
    fn = FUNCTIONS[name]
    rows, shared = arguments_of(fn, shape)
    fixed, constant = ({name: x.pop(name) for name in FIXED if name in x} for x in (rows, shared))
    labels = jnp.asarray(np.random.default_rng(1).integers(CLASSES, size=shape))
    options = {"where": counting(shape)}
    if shape == SEQUENCES:
        options["weights"] = jnp.asarray(np.arange(12.0).reshape(shape) % 4 / 2, F32)

    def f(layer, rows, shared, fixed, constant, dense):
        own = rows | fixed

        def of_row(s, *row):
            return fn(s, **dict(zip(own, row, strict=True)), **shared, **constant)

        logits = layer.dense() if dense else layer
        return 1.5 * jaxent.softmax_loss(of_row, logits, labels, *own.values(), **options)

    arguments = layer_of(shape, classes=CLASSES), rows, shared, fixed, constant
    found, taken = [], []
    for dense in (False, True):
        run = compiled(jax.value_and_grad(functools.partial(f, dense=dense), (0, 1, 2)))
        with harness.blocks(source):
            traced = run.trace(*arguments)
        taken.append(matmuls_of_classes(traced.jaxpr.jaxpr))
        found.append(traced.lower().compile()(*arguments))
    return *found, taken[0]


BOTH = [(name, shape) for name in FUNCTIONS for shape in (FLAT, SEQUENCES)]
DAILY = [both for i, both in enumerate(BOTH) if i % 4 in (0, 3)]  # each function with one of them


@pytest.mark.parametrize(("name", "shape"), some(DAILY, BOTH), ids=str)
def test_a_users_function(name, shape):
    got, want, matmuls = with_gradients(name, shape, "rows")
    assert_same(got, want)
    assert matmuls == (0 if name in ("no statistics", "no row") else 3)


IN_CLASSES = ("row arguments", "keys", "closes over a table", "scan", "a prediction", "everything")


@pytest.mark.parametrize("name", some(("keys", "closes over a table", "scan"), IN_CLASSES))
def test_a_users_function_in_blocks_of_classes(name):
    assert_same(*with_gradients(name, SEQUENCES, "classes")[:2])


def statistics(layer, labels):
    """In float64: log p, log p_y and the entropy."""
    hidden, kernel, bias = (np.asarray(x, np.float64) for x in (layer.hidden, layer.kernel, layer.bias))
    z = hidden @ kernel + bias
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return log_p, log_p[np.arange(len(z)), labels], -(np.exp(log_p) * log_p).sum(-1)


@in_blocks
def test_a_clipped_objective_and_its_gradient_by_hand(source):
    layer, labels, where = layer_of(FLAT), np.arange(7), np.asarray(FLAGS) > 0

    def loss(layer, advantage, old):
        return jaxent.softmax_loss(
            clipped_policy, layer, jnp.asarray(labels), advantage, old, where=FLAGS > 0
        )

    with harness.blocks(source):
        value, gradients = compiled(jax.value_and_grad(loss, (0, 1, 2)))(layer, ADVANTAGE, OLD)
    log_p, log_prob, entropy = statistics(layer, labels)
    p = np.exp(log_p)
    a, old, share = np.float64(ADVANTAGE), np.float64(OLD), where / where.sum()
    ratio = np.exp(log_prob - old)
    inside = np.clip(ratio, 0.8, 1.2)
    moves = ratio * a <= inside * a
    assert 0 < moves[where].sum() < where.sum()
    np.testing.assert_allclose(
        value, (share * (-np.minimum(ratio * a, inside * a) - 0.1 * entropy)).sum(), rtol=2e-6
    )
    of_log_prob = share * -a * ratio * moves
    dz = of_log_prob[:, None] * (np.eye(CLASSES)[labels] - p)
    dz += share[:, None] * 0.1 * p * (log_p + entropy[:, None])
    of_layer, of_advantage, of_old = gradients
    for got, want in (
        (of_layer.hidden, dz @ np.float64(layer.kernel).T),
        (of_layer.kernel, np.float64(layer.hidden).T @ dz),
        (of_layer.bias, dz.sum(0)),
        (of_advantage, -share * np.where(moves, ratio, inside)),
        (of_old, -of_log_prob),
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_what_is_closed_over_by_finite_differences():
    """Of NumPy in float64; the value too."""
    layer, labels, index = layer_of(FLAT), np.arange(7) % 4, np.asarray([3, 0, 0, 2, 6, 1, 6])
    wide, table, scale = np.float64(WIDE), np.float64(ADVANTAGE), np.array(0.3)

    def fn(s, i, x, table, scale):
        carry = lax.scan(lambda c, x: (jnp.sin(c) * x + scale, None), s.log_prob, x)[0]
        return table[i] ** 2 * carry + scale * jnp.sort(x)[1] * s.entropy

    def loss(table, scale):
        of_row = lambda s, i, x: fn(s, i, x, table, scale)  # noqa: E731
        return jaxent.softmax_loss(
            of_row, layer, jnp.asarray(labels), jnp.asarray(index), WIDE, reduction="sum"
        )

    def plain(table, scale):
        _, carry, entropy = statistics(layer, labels)
        for x in wide.T:
            carry = np.sin(carry) * x + scale
        return (table[index] ** 2 * carry + scale * np.sort(wide, -1)[:, 1] * entropy).sum()

    with harness.blocks("rows"):
        value, (of_table, of_scale) = compiled(jax.value_and_grad(loss, (0, 1)))(ADVANTAGE, jnp.float32(0.3))
    np.testing.assert_allclose(value, plain(table, scale), rtol=2e-6)
    h = 1e-6
    slopes = [(plain(table + h * e, scale) - plain(table - h * e, scale)) / (2 * h) for e in np.eye(7)]
    np.testing.assert_allclose(of_table, slopes, rtol=1e-5, atol=1e-5)
    slope = (plain(table, scale + h) - plain(table, scale - h)) / (2 * h)
    np.testing.assert_allclose(of_scale, slope, rtol=1e-5, atol=1e-5)
    assert of_table[4] == of_table[5] == 0 != of_table[1]


@in_blocks
def test_a_rule_that_clips_its_cotangent(source):
    """It is not linear, so it shows what a row's loss is multiplied by: its share of the mean."""
    labels, weights = jnp.arange(7), ADVANTAGE**2

    @functools.partial(compiled, static_argnums=0)
    def run(dense, layer, scale):
        def loss(layer, scale):
            logits = layer.dense() if dense else layer
            fn = lambda s, a: clipped_gradient(scale * s.log_prob) * a  # noqa: E731
            return jaxent.softmax_loss(fn, logits, labels, ADVANTAGE, weights=weights)

        return jax.value_and_grad(loss, (0, 1))(layer, scale)

    with harness.blocks(source):
        assert_same(*(run(dense, layer_of(FLAT), jnp.float32(0.3)) for dense in (False, True)))


@in_blocks
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradients_of_everything_beside_the_layer(source, reduction):
    q = jax.nn.softmax(layer_of(FLAT, seed=3).dense())

    @functools.partial(compiled, static_argnums=0)
    def run(dense, layer, q, weights):
        def f(layer, q, weights):
            logits = layer.dense() if dense else layer
            options = {"weights": weights, "reduction": reduction, "label_smoothing": 0.1}
            return (jaxent.softmax_cross_entropy(logits, q, **options) * jnp.float32(1.5)).sum()

        return jax.value_and_grad(f, (0, 1, 2))(layer, q, weights)

    with harness.blocks(source):
        assert_same(*(run(dense, layer_of(FLAT), q, ADVANTAGE**2) for dense in (False, True)))


@in_blocks
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_forward_mode(source, reduction):
    """Of a sum in blocks of rows; where the backward has a loop over blocks to transpose, it is refused."""
    layer, dots, labels = layer_of(FLAT), layer_of(FLAT, seed=1), jnp.arange(7)

    @functools.partial(compiled, static_argnums=0)
    def run(dense, layer, dots):
        def loss(layer):
            logits = layer.dense() if dense else layer
            return jaxent.softmax_cross_entropy(logits, labels, reduction=reduction)

        return jax.jvp(loss, (layer,), (dots,))

    with harness.blocks(source):
        if reduction == "none" or source == "classes":
            with pytest.raises(TypeError, match="forward-mode"):
                run(False, layer, dots)
        else:
            assert_same(run(False, layer, dots), run(True, layer, dots))
