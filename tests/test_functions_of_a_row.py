"""What a user's function is: of one row, of any source of logits; and what is no such function."""

import dataclasses
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax, nn

import harness
import jaxent
from forms import entropy, log_prob
from layers import ADVANTAGE, F32, FLAGS, FLAT, OLD, SEQUENCES, WIDE, assert_same, compiled, layer_of
from tables import spread, thinned

SOURCES = ("dense", *harness.LINEAR)
everywhere = pytest.mark.parametrize("source", SOURCES)
LABELS = jnp.asarray([3, 0, 10, 7, 7, 1, 5])
REDUCTIONS = ("none", "sum", "mean")


def logits_of(source, layer):
    return layer.dense() if source == "dense" else layer


def add_up(losses):
    """Rows with uneven signs."""
    return jnp.sum(losses * jnp.cos(2.0 * jnp.arange(losses.size, dtype=losses.dtype)).reshape(losses.shape))


# What fn sees.


@spread(2, "shape, source", [FLAT, SEQUENCES, ()], SOURCES)
def test_fn_sees_one_row(shape, source):
    rows = {
        "wide": jnp.ones((*shape, 3)),
        "tree": [jnp.ones((*shape, 2, 5), bool), (jnp.ones(shape, jnp.int32),)],
    }
    keys = jax.random.split(jax.random.key(0), shape) if shape else jax.random.key(0)
    seen = []

    def fn(s, advantage, rows, key):
        fields = {
            field.name: getattr(s, field.name) for field in dataclasses.fields(jaxent.SoftmaxStatistics)
        }
        assert {x.shape for x in fields.values()} == {()}
        assert {name for name, x in fields.items() if x.dtype == jnp.int32} == {"prediction", "rank"}
        assert {x.dtype for name, x in fields.items() if name not in ("prediction", "rank")} == {
            jnp.dtype(F32)
        }
        assert advantage.shape == key.shape == () and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        assert jax.tree.map(jnp.shape, rows) == {"wide": (3,), "tree": [(2, 5), ((),)]}
        assert [x.dtype for x in jax.tree.leaves(rows)] == [jnp.bool_, jnp.int32, F32]
        seen.append(1)
        return advantage * s.log_prob

    def loss(layer, advantage, reduction):
        logits = logits_of(source, layer)
        where = jnp.ones(shape, bool)
        return jaxent.softmax_loss(
            fn, logits, jnp.zeros(shape, int), advantage, rows, keys, where=where, reduction=reduction
        )

    with harness.blocks(source):
        for reduction in ("none", "mean"):
            f = functools.partial(loss, reduction=reduction)
            found = jax.eval_shape(lambda *x, f=f: jax.vjp(f, *x)[0], layer_of(shape), jnp.ones(shape))
            assert found.shape == (shape if reduction == "none" else ()) and found.dtype == F32
    assert seen


@everywhere
def test_fn_is_not_called_for_every_row(source):
    calls = []

    def traced(rows):
        calls.clear()

        def fn(s):
            calls.append(1)
            return -s.log_prob

        def loss(layer):
            return jaxent.softmax_loss(fn, logits_of(source, layer), jnp.zeros(rows, int))

        with harness.blocks(source):
            jax.make_jaxpr(jax.grad(loss))(layer_of((rows,)))
        return len(calls)

    assert 1 <= traced(7) == traced(29) <= 4


@everywhere
def test_what_is_not_read_is_not_computed(source):
    def computes(fn):
        with harness.blocks(source):
            program = jax.make_jaxpr(lambda x: jaxent.softmax_loss(fn, logits_of(source, x), LABELS))(
                layer_of(FLAT)
            )
        return "argmax" in str(program)

    assert computes(lambda s: s.log_prob + s.prediction.astype(F32))
    assert not computes(
        lambda s: lax.cond(s.log_prob > -1, lambda: jnp.sort(s.log_prob[None])[0], lambda: s.entropy)
    )


ELEMENTWISE = {
    "policy": lambda s, a, old: -jnp.minimum(jnp.exp(s.log_prob - old) * a, jnp.clip(s.log_prob, -2, -1)),
    "choices": lambda s, a, old: jnp.where(s.rank < 2, a * s.log_prob, jnp.zeros_like(s.log_prob)),
    "shapes": lambda s, a, old: (
        jnp.ones(s.log_prob.shape, F32) * s.entropy * jnp.broadcast_to(a, s.entropy.shape)
    ),
    "predictions": lambda s, a, old: s.prediction.astype(old.dtype) * old - s.log_normalizer**2,
    "no row arguments": lambda s, *_: nn.softplus(s.mean_log_prob) - s.entropy,
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_functions_written_for_arrays(name):
    """They give what they give of all rows at once."""
    layer, fn = layer_of(FLAT), ELEMENTWISE[name]

    @compiled
    def run(layer):
        dense = layer.dense()
        want = fn(jaxent.softmax_statistics(dense, LABELS), ADVANTAGE, OLD)
        got = (jaxent.softmax_loss(fn, z, LABELS, ADVANTAGE, OLD, reduction="none") for z in (dense, layer))
        return want, list(got)

    want, both = run(layer)
    for got in both:
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


FUNCTIONS = {
    "jit": jax.jit(lambda s, w: s.log_prob * w.sum()),
    "vmap": lambda s, w: jax.vmap(lambda s, x: x * s.log_prob, (None, 0))(s, w).sum(),
    "checkpoint": jax.checkpoint(lambda s, w: s.log_prob * w.sum()),
    "grad": lambda s, w: jax.grad(lambda w: s.log_prob * w.sum() ** 2 / 2)(w)[0],
    "partial": functools.partial(lambda factor, s, w: factor * s.log_prob * w.sum(), 1.0),
    "scan": lambda s, w: lax.scan(lambda c, x: (c + x * s.log_prob, None), jnp.zeros_like(s.log_prob), w)[0],
    "cond": lambda s, w: lax.cond(s.rank < 0, lambda: s.entropy, lambda: s.log_prob * w.sum()),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_function_in_many_forms(name):
    @compiled
    def run(layer):
        def loss(logits, fn):
            return jaxent.softmax_loss(fn, logits, LABELS, WIDE)

        layers = layer, layer.dense()
        plain = lambda s, w: s.log_prob * w.sum()  # noqa: E731
        return [[jax.value_and_grad(loss)(z, fn) for z in layers] for fn in (FUNCTIONS[name], plain)]

    got, want = run(layer_of(FLAT))
    assert_same(got, want)


# What is closed over, in both modes and to any order.


def policy(s, a, scale):
    return (
        -a * jnp.tanh(scale[0] * s.log_prob) - scale[1] ** 2 * jnp.sort(jnp.stack([s.entropy, scale[2]]))[1]
    )


def plain_policy(z, labels, a, scale):
    larger = jnp.maximum(entropy(z), scale[2])
    return -a * jnp.tanh(scale[0] * log_prob(z, labels)) - scale[1] ** 2 * larger


def to_second_order(loss, layer, scale):
    dots = jax.tree.map(jnp.cos, (layer, scale))
    gradient = jax.grad(loss, (0, 1))
    along = lambda layer, scale: sum(  # noqa: E731
        jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (gradient(layer, scale), dots)), strict=True)
    )
    return {
        "hessian": jax.hessian(loss, 1)(layer, scale),
        "forward over reverse": jax.jvp(gradient, (layer, scale), dots)[1],
        "reverse over reverse": jax.grad(along, (0, 1))(layer, scale),
    }


@thinned(2, "source, reduction", SOURCES, ["mean", "none"])
def test_second_derivatives(source, reduction):
    scale = np.array([0.4, -1.3, 2.2])

    def of_plain(layer, scale):
        rows = plain_policy(layer.dense(), LABELS, a, scale)
        return rows.mean() if reduction == "mean" else add_up(rows)

    def of_jaxent(layer, scale):
        found = jaxent.softmax_loss(
            lambda s, a: policy(s, a, scale), logits_of(source, layer), LABELS, a, reduction=reduction
        )
        return found if reduction == "mean" else add_up(found)

    with jax.enable_x64(True), harness.blocks(source):
        layer, scale, a = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64), (layer_of(FLAT), scale, ADVANTAGE)
        )
        run = compiled(lambda *x: [to_second_order(f, *x) for f in (of_jaxent, of_plain)])
        got, want = run(layer, scale)
    assert_same(got, want, tolerance=1e-11)


@everywhere
def test_vmap_of_what_is_closed_over(source):
    layer, scales = layer_of(FLAT), jnp.asarray([[0.4, -1.3, 2.2], [1.0, 0.5, 0.0]])

    def loss(layer, scale):
        return jaxent.softmax_loss(
            lambda s, a: policy(s, a, scale), logits_of(source, layer), LABELS, ADVANTAGE
        )

    f = jax.value_and_grad(loss, (0, 1))
    with harness.blocks(source):
        got = compiled(jax.vmap(f, (None, 0)))(layer, scales)
        each = compiled(f)
        want = jax.tree.map(lambda *x: jnp.stack(x), *(each(layer, scale) for scale in scales))
    assert_same(got, want)


@everywhere
def test_vmap_of_rows_and_row_arguments(source):
    layer, tables = layer_of(FLAT), jnp.stack([ADVANTAGE, OLD])

    def loss(hidden, table):
        logits = logits_of(source, dataclasses.replace(layer, hidden=hidden))
        return jaxent.softmax_loss(lambda s, i: table[i] * s.log_prob, logits, LABELS, FLAGS)

    f = jax.value_and_grad(loss, (0, 1))
    with harness.blocks(source):
        hidden = jnp.stack([layer.hidden, layer.hidden[::-1]])
        got = compiled(jax.vmap(f))(hidden, tables)
        each = compiled(f)
        want = jax.tree.map(lambda *x: jnp.stack(x), *(each(*x) for x in zip(hidden, tables, strict=True)))
    assert_same(got, want)


@everywhere
def test_a_traced_option_that_is_closed_over(source):
    @compiled
    def step(layer, bonus):
        def fn(s):
            return -s.log_prob - bonus * s.entropy

        return jaxent.softmax_loss(fn, logits_of(source, layer), LABELS)

    layer = layer_of(FLAT)
    z = layer.dense()
    with harness.blocks(source):
        for bonus in (0.0, 0.5):
            want = jnp.mean(-log_prob(z, LABELS) - bonus * entropy(z))
            np.testing.assert_allclose(step(layer, jnp.float32(bonus)), want, rtol=2e-6)


@everywhere
def test_nothing_leaks(source):
    @jax.jit
    def loss(layer, scale):
        logits = logits_of(source, layer)
        return jaxent.softmax_loss(lambda s, a: policy(s, a, scale), logits, LABELS, ADVANTAGE)

    gc.collect()
    gc.freeze()  # the check collects garbage after every trace; it need not look at what other tests left
    try:
        with jax.checking_leaks(), harness.blocks(source):
            jax.eval_shape(jax.grad(loss, (0, 1)), layer_of(FLAT), jnp.ones(3))
    finally:
        gc.unfreeze()


# Rows: hidden ones, one, none; and how they are added up.


@thinned(2, "source, hide", SOURCES, ["where", "ignore_index", "weights"])
def test_hidden_rows_are_gone(source, hide):
    """Whatever they hold, and whatever fn makes of it; the others are as without them."""
    seen = np.array([True, False, True, True, False, True, True])
    dirty = jnp.where(seen, ADVANTAGE, jnp.nan)
    layer, labels, options, ignored = layer_of(FLAT), LABELS, {}, None
    if hide == "ignore_index":
        labels, ignored = jnp.where(seen, LABELS, -1), -1
    elif hide == "where":
        options["where"] = jnp.asarray(seen)
    else:
        options["weights"] = jnp.asarray(seen, F32)

    def fn(s, a, w, scale):
        carry = lax.scan(lambda c, x: (scale * c + a * x, None), s.log_prob, jnp.sort(w))[0]
        return lax.cond(a > 0, lambda c: c * s.entropy, jnp.sin, carry)

    def loss(layer, dirty, wide, scale, labels, options):
        f = lambda s, a, w: fn(s, a, w, scale)  # noqa: E731
        logits = logits_of(source, layer)
        return jaxent.softmax_loss(f, logits, labels, dirty, wide, ignore_index=ignored, **options)

    rows = lambda x: x[np.flatnonzero(seen)]  # noqa: E731
    with harness.blocks(source):
        f = compiled(jax.value_and_grad(loss, (0, 1, 2, 3)))
        scale = jnp.float32(0.7)
        value, gradients = f(layer, dirty, WIDE, scale, labels, options)
        of_seen = dataclasses.replace(layer, hidden=rows(layer.hidden))
        want, slopes = f(of_seen, rows(dirty), rows(WIDE), scale, rows(labels), {})
    of_layer, *of_rows, of_scale = gradients
    for x in (of_layer.hidden, *of_rows):
        assert (x[np.flatnonzero(~seen)] == 0).all()
    of_layer = dataclasses.replace(of_layer, hidden=rows(of_layer.hidden))
    assert_same((value, of_layer, *map(rows, of_rows), of_scale), (want, *slopes))


@spread(3, "source, reduction", SOURCES, REDUCTIONS)
def test_a_single_row(source, reduction):
    layer = layer_of(())

    def loss(layer, w):
        fn = lambda s, w: jnp.sort(w)[0] * s.log_prob - s.entropy  # noqa: E731
        return jaxent.softmax_loss(fn, logits_of(source, layer), jnp.asarray(2), w, reduction=reduction)

    def plain(layer, w):
        return w.min() * log_prob(layer.dense(), jnp.asarray(2)) - entropy(layer.dense())

    with harness.blocks(source):
        run = compiled(lambda *x: [jax.value_and_grad(f, (0, 1))(*x) for f in (loss, plain)])
        assert_same(*run(layer, WIDE[0]))


@spread(3, "source, reduction", SOURCES, REDUCTIONS)
def test_no_rows(source, reduction):
    layer = dataclasses.replace(layer_of(FLAT), hidden=jnp.zeros((0, 4)))

    def loss(layer, w, scale):
        fn = lambda s, w: scale * jnp.sort(w)[0] * s.log_prob  # noqa: E731
        logits = logits_of(source, layer)
        losses = jaxent.softmax_loss(fn, logits, jnp.zeros(0, int), w, reduction=reduction)
        assert losses.shape == ((0,) if reduction == "none" else ())
        return losses.sum()

    with harness.blocks(source):
        found = compiled(jax.value_and_grad(loss, (0, 1, 2)))(layer, jnp.zeros((0, 3)), jnp.float32(2))
    assert all((x == 0).all() for x in jax.tree.leaves(found))


@spread(3, "source, reduction", SOURCES, REDUCTIONS)
def test_reductions(source, reduction):
    layer, weights = layer_of(SEQUENCES), np.float32(np.arange(12) % 5 / 2).reshape(SEQUENCES)
    labels, where = np.arange(12).reshape(SEQUENCES) % 11, np.arange(12).reshape(SEQUENCES) % 4 != 2
    with harness.blocks(source):
        got = compiled(
            lambda layer, *x: jaxent.softmax_loss(
                lambda s, i: jnp.arange(12.0)[i] * s.log_prob, logits_of(source, layer), *x, reduction=reduction,
                where=where, weights=weights,
            )
        )(layer, labels, labels[::-1])  # fmt: skip
    z = np.float64(layer.hidden) @ np.float64(layer.kernel) + np.float64(layer.bias)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    losses = where * weights * labels[::-1] * np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    want = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / (where * weights).sum()}
    np.testing.assert_allclose(got, want[reduction], rtol=2e-6, atol=2e-6)


def test_losses_of_other_dtypes():
    z = layer_of(FLAT).dense()
    place = jaxent.softmax_statistics(z, LABELS, names=["rank"]).rank
    for fn, want in (
        (lambda s: s.rank, place.mean()),
        (lambda s: s.rank < 3, (place < 3).mean()),
        (lambda s: 0.5, 0.5),
    ):
        got = jaxent.softmax_loss(fn, z, LABELS)
        assert got.dtype == F32
        np.testing.assert_allclose(got, want, rtol=1e-6)


@everywhere
def test_export_for_any_number_of_rows(source):
    kernel = layer_of(FLAT).kernel

    def f(hidden, label, wide, scale):
        fn = lambda s, w: (scale * s.log_prob * jnp.sort(w)[0], s.rank)  # noqa: E731
        logits = logits_of(source, jaxent.LinearLogits(hidden, kernel))
        return jaxent.softmax_loss(fn, logits, label, wide, has_aux=True)

    f = compiled(jax.value_and_grad(f, (0, 3), has_aux=True))
    (n,) = export.symbolic_shape("n")
    with harness.blocks(source):
        types = ((n, 4), F32), ((n,), jnp.int32), ((n, 3), F32), ((), F32)
        exported = export.export(f)(*(jax.ShapeDtypeStruct(*x) for x in types))
    arguments = layer_of(FLAT).hidden, LABELS, WIDE, F32(0.3)
    assert_same(exported.call(*arguments), f(*arguments))


@everywhere
def test_half_logits_and_half_row_arguments(source):
    layer = jax.tree.map(lambda x: x.astype(jnp.bfloat16), layer_of(FLAT))

    def fn(s, w):
        assert s.log_prob.dtype == s.entropy.dtype == F32 and w.dtype == jnp.bfloat16
        return s.log_prob * jnp.sort(w)[1].astype(F32)

    def loss(layer, w):
        return jaxent.softmax_loss(fn, logits_of(source, layer), LABELS, w)

    with harness.blocks(source):
        value, gradients = compiled(jax.value_and_grad(loss, (0, 1)))(layer, WIDE.astype(jnp.bfloat16))
        half = compiled(lambda x, w: jaxent.softmax_loss(lambda s, w: fn(s, w).astype(w.dtype), x, LABELS, w))
        assert half(logits_of(source, layer), WIDE.astype(jnp.bfloat16)).dtype == F32
    wide = jax.tree.map(lambda x: x.astype(F32), layer)
    ordered = jnp.sort(WIDE.astype(jnp.bfloat16), -1)[:, 1].astype(F32)
    want = jnp.mean(log_prob(wide.dense(), LABELS) * ordered)
    np.testing.assert_allclose(value, want, rtol=2e-2)
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.bfloat16)}
    assert (jnp.sum(gradients[1] != 0, -1) == 1).all()


# Errors: the same of both sources, before anything runs.


def messages(fn, *row_args, match, rows=FLAT, **options):
    found = set()
    for source in SOURCES:
        for reduction in ("none", "mean"):
            with harness.blocks(source), pytest.raises(ValueError, match=match) as error:
                jax.eval_shape(
                    lambda layer, source=source, reduction=reduction: jaxent.softmax_loss(
                        fn,
                        logits_of(source, layer),
                        jnp.zeros(rows, int),
                        *row_args,
                        reduction=reduction,
                        **options,
                    ),
                    layer_of(rows),
                )
            found.add(str(error.value))
    (message,) = found
    assert message.startswith("jaxent.softmax_loss: ")
    return message


ARRAYS = {
    "closes over a value per row": ([7], lambda s: ADVANTAGE * s.log_prob),
    "one lane": ([1], lambda s: s.log_prob[None]),
    "stacked": ([2], lambda s: jnp.stack([s.log_prob, s.entropy])),
    "integers": ([7], lambda s: FLAGS),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_fn_returns_an_array(name):
    shape, fn = ARRAYS[name]
    message = messages(fn, match=r"`fn` must be")
    assert "row argument" in message and str(shape) in message


NO_LOSSES = {
    "a tuple": lambda s: (s.entropy,),
    "a pair": lambda s: (s.entropy, s.log_prob),
    "nothing": lambda s: None,
    "a dict": lambda s: {"loss": s.entropy},
    "the statistics": lambda s: s,
    "complex": lambda s: lax.complex(s.log_prob, s.entropy),
}


@pytest.mark.parametrize("name", NO_LOSSES)
def test_fn_returns_something_else(name):
    messages(NO_LOSSES[name], match=r"`fn` must be")


NO_PAIRS = {
    "a loss": lambda s: s.log_prob,
    "three": lambda s: (s.log_prob, s.entropy, s.rank),
    "one": lambda s: (s.log_prob,),
    "a dict": lambda s: {"loss": s.log_prob, "aux": s.entropy},
    "an array as loss": lambda s: (s.log_prob[None], s.entropy),
    "no loss": lambda s: (None, s.entropy),
}


@pytest.mark.parametrize("name", NO_PAIRS)
def test_fn_returns_no_pair(name):
    messages(NO_PAIRS[name], match=r"`fn` must be", has_aux=True)


OTHER_ROWS = {
    "another number of rows": jnp.ones(8),
    "one for all": jnp.ones(1),
    "a number": 0.5,
    "one per class": jnp.ones(11),
    "rows in another place": jnp.ones((3, 7)),
    "a leaf of a pytree": {"a": ADVANTAGE, "b": [jnp.ones(2)]},
    "one key": jax.random.key(0),
    "a table": np.ones((2, 7)),
}


@pytest.mark.parametrize("name", OTHER_ROWS)
def test_row_arguments_without_the_rows(name):
    message = messages(lambda s, x: s.log_prob, OTHER_ROWS[name], match=r"`row_args` must be")
    assert "close over it" in message


def test_row_arguments_with_some_of_the_rows():
    for x in (jnp.ones(4), jnp.ones((4, 1)), jnp.ones((3, 4)), jnp.ones(())):
        assert "close over it" in messages(
            lambda s, x: s.entropy, x, match=r"`row_args` must be", rows=SEQUENCES
        )


def test_no_row_argument_is_none():
    """A pytree with no leaf."""
    z = layer_of(FLAT).dense()
    got = jaxent.softmax_loss(lambda s, nothing, x: s.log_prob * x[1], z, LABELS, None, (None, ADVANTAGE))
    np.testing.assert_allclose(got, jnp.mean(ADVANTAGE * log_prob(z, LABELS)), rtol=1e-5)


@everywhere
def test_errors_of_fn_are_its_own(source):
    def fn(s):
        raise KeyError("mine")

    with harness.blocks(source), pytest.raises(KeyError, match="mine"):
        jaxent.softmax_loss(fn, logits_of(source, layer_of(FLAT)), LABELS)


def test_what_the_labels_do_not_allow_is_an_error_when_it_is_only_compared():
    z, q = jnp.eye(3), jnp.eye(3)
    for fn, labels in (
        (lambda s: jnp.where(s.rank == 0, s.entropy, 0), q),
        (lambda s: s.log_prob is None, None),
    ):
        with pytest.raises(TypeError, match="`labels` must be given for `fn` to read"):
            jaxent.softmax_loss(fn, z, labels)


def test_statistics_may_be_replaced():
    z, y = jnp.eye(3), jnp.arange(3)
    fn = lambda s: dataclasses.replace(s, entropy=1.0).log_prob  # noqa: E731
    assert jaxent.softmax_loss(fn, z, y) == jaxent.softmax_loss(lambda s: s.log_prob, z, y)
