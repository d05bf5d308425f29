"""What users try first, and what comes from other libraries: their arrays, exports, functions and shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.experimental import checkify

import harness
import jaxent
from tables import spread, thinned

N, D, V = 6, 3, 7
everywhere = pytest.mark.parametrize("source", ("dense", *harness.LINEAR))


@functools.cache
def arrays():
    rng = np.random.default_rng(1)
    hidden, kernel = rng.normal(size=(N, D)), rng.normal(size=(D, V))
    return jnp.float32(hidden), jnp.float32(kernel), jnp.asarray(rng.integers(V, size=N))


def logits_of(source, hidden, kernel, **options):
    layer = jaxent.LinearLogits(hidden, kernel, **options)
    return layer.dense() if source == "dense" else layer


# Arrays by protocol, as flax nnx' Param and Variable are.


class Param:
    def __init__(self, value):
        self.value = value

    def __jax_array__(self):
        return self.value


def test_arrays_by_protocol():
    hidden, kernel, label = arrays()
    probs = jax.nn.softmax(hidden @ kernel)
    yes = (probs > 0.2).astype(jnp.float32)

    @functools.partial(jax.jit, static_argnums=0, compiler_options=harness.QUICK)
    def everything(a):
        """`a` makes an argument of what the library is to take."""
        layer = jaxent.LinearLogits(a(hidden), a(kernel), a(jnp.ones(V)), temperature=a(jnp.float32(2)))
        logits = a(hidden @ kernel)
        rows = {"where": a(label > 1), "weights": a(jnp.arange(1.0, 1 + N))}
        classes = {"class_weights": a(jnp.ones(V)), "class_mask": a(jnp.ones(V, bool))}
        return [
            layer.dense(),
            jaxent.softmax_cross_entropy(
                layer, a(label), **rows, **classes, label_smoothing=a(jnp.float32(0.1))
            ),
            jaxent.softmax_focal_loss(logits, a(probs), **rows, **classes),
            jaxent.softmax_poly_loss(logits, a(label), **rows, **classes),
            jaxent.softmax_loss(lambda s, x: x * s.log_prob, logits, a(label), a(jnp.ones(N)), **rows),
            jaxent.softmax_statistics(layer, a(label), where=rows["where"]).log_prob,
            jaxent.softmax_entropy(logits, **rows),
            jaxent.softmax_kl_divergence(logits, layer, **rows),
            jaxent.softmax_js_divergence(logits, layer, **rows),
            jaxent.sigmoid_cross_entropy(logits, a(yes), pos_weight=a(jnp.ones(V))),
            jaxent.sigmoid_focal_loss(logits, a(yes)),
            jaxent.sigmoid_asymmetric_loss(logits, a(yes)),
            jaxent.categorical_cross_entropy(a(probs), a(label), **rows),
            jaxent.binary_cross_entropy(a(probs), a(yes)),
            jaxent.nll_loss(a(jnp.log(probs)), a(label), **rows),
            jaxent.kl_divergence(a(jnp.log(probs)), a(probs), **rows),
            jaxent.mean(a(jnp.ones(N)), **rows),
        ]

    for got, want in zip(everything(Param), everything(lambda x: x), strict=True):
        np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match=r"`labels` must be in \[0, 7\), but is 9 at index \[0\]"):
        jaxent.softmax_cross_entropy(Param(jnp.zeros((1, V))), Param(np.array([9])))
    with pytest.raises(TypeError, match="must be an array, but is a list"):
        jaxent.softmax_cross_entropy(jnp.zeros((N, V)), [0] * N)


# Programs for any number of rows.


@thinned(2, "rows, source", ["n", "n, t"], ("dense", *harness.LINEAR))
def test_export_for_any_number_of_rows(rows, source):
    _, kernel, _ = arrays()

    def losses(hidden, label, where):
        logits = logits_of(source, hidden, kernel)
        options = {"where": where, "label_smoothing": 0.1}
        return jaxent.softmax_cross_entropy(logits, label, **options), jaxent.softmax_cross_entropy(
            logits, label, **options, reduction="mean"
        )

    def f(hidden, label, where):
        return losses(hidden, label, where), jax.grad(lambda h: losses(h, label, where)[1])(hidden)

    shape = export.symbolic_shape(rows)
    types = [((*shape, D), jnp.float32), (shape, jnp.int32), (shape, jnp.bool_)]
    with harness.blocks(source):
        exported = export.export(jax.jit(f))(*(jax.ShapeDtypeStruct(*x) for x in types))
    for size in [(5,)] if rows == "n" else [(2, 3)]:
        rng = np.random.default_rng(4)
        label = rng.integers(V, size=size).astype(np.int32)
        arguments = np.float32(rng.normal(size=(*size, D))), label, label != 2
        for got, want in zip(
            jax.tree.leaves(exported.call(*arguments)), jax.tree.leaves(jax.jit(f)(*arguments)), strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


@spread(
    2,
    "name, source, masked",
    ["softmax_kl_divergence", "softmax_js_divergence"],
    ["rows", "dense"],
    [False, True],
)
def test_export_of_divergences_for_any_number_of_rows(name, source, masked):
    """In blocks of rows that leave a remainder or none; of a layer and an array, and of two layers."""
    kernel = arrays()[1]

    def losses(hidden, where, reduction):
        layer = jaxent.LinearLogits(hidden, kernel)
        other = logits_of(source, jnp.sin(hidden), kernel)
        options = {"where": where} if masked else {}
        return getattr(jaxent, name)(layer, other, **options, reduction=reduction)

    def f(hidden, where):
        by_hidden = jax.value_and_grad(functools.partial(losses, reduction="mean"))(hidden, where)
        return losses(hidden, where, "none"), by_hidden

    n = export.symbolic_shape("n")
    types = jax.ShapeDtypeStruct((*n, D), jnp.float32), jax.ShapeDtypeStruct(n, jnp.bool_)
    with harness.blocks("rows"):
        exported = export.export(jax.jit(f))(*types)
    for size in (1, 3, 7):
        hidden = np.float32(np.random.default_rng(size).normal(size=(size, D)))
        arguments = hidden, np.arange(size) != 2
        for got, want in zip(
            jax.tree.leaves(exported.call(*arguments)), jax.tree.leaves(jax.jit(f)(*arguments)), strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


# Functions of statistics.


@everywhere
def test_statistics_are_float32_when_traced_too(source):
    """Of half logits as well: lax functions take one dtype."""
    hidden, kernel, label = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, arrays()
    )

    def fn(s, advantage):
        assert s.log_prob.dtype == s.entropy.dtype == jnp.float32
        scaled = lax.mul(s.log_prob, advantage)
        return lax.cond(True, lambda x: x, lambda x: lax.neg(x), scaled)

    logits = logits_of(source, hidden, kernel)
    got = jaxent.softmax_loss(fn, logits, label, jnp.ones(N))
    dense = logits if source == "dense" else logits.dense()
    np.testing.assert_allclose(got, -jaxent.softmax_cross_entropy(dense, label, reduction="mean"), rtol=1e-6)


@everywhere
@pytest.mark.parametrize("hidden_by", ["where", "weights"])
def test_a_function_that_is_singular_where_a_probability_is_1(source, hidden_by):
    """Hidden rows give it what is harmless, so what it closes over has a gradient."""
    hidden, kernel, label = arrays()
    seen = jnp.arange(N) != 2
    mask = {"where": seen} if hidden_by == "where" else {"weights": seen.astype(jnp.float32)}
    hidden = hidden.at[2].set(jnp.nan)

    def loss(scale, hidden):
        logits = logits_of(
            source, jnp.where(seen[:, None], hidden, 0) if source == "dense" else hidden, kernel
        )
        fn = lambda s: scale * jnp.log(-s.log_prob) / s.entropy + jnp.log(s.log_normalizer**2)  # noqa: E731
        return jaxent.softmax_loss(fn, logits, label, **mask)

    with harness.blocks(source):
        gradients = jax.jit(jax.grad(loss, (0, 1)), compiler_options=harness.QUICK)(1.0, hidden)
    assert all(np.isfinite(x).all() for x in gradients) and (gradients[1][2] == 0).all()


# Statistics of hidden rows, ranks and accuracy.


@everywhere
def test_hidden_rows_are_no_hits(source):
    hidden, kernel, _ = arrays()
    best = jnp.argmax(hidden @ kernel, -1)
    where = jnp.arange(N) < 4
    label = jnp.where(jnp.arange(N) == 1, (best + 1) % V, best)
    with harness.blocks(source):
        s = jaxent.softmax_statistics(logits_of(source, hidden, kernel), label, where=where)
    assert s.prediction.tolist() == [*best[:4].tolist(), -1, -1]
    assert s.rank[4:].tolist() == [V, V] and (s.log_prob[4:] == 0).all()
    hits = s.prediction == label
    assert jnp.mean(hits) == 3 / 6 == jnp.mean(s.rank < 1)
    assert jaxent.mean(hits, where=where) == 3 / 4 == jaxent.mean(s.rank < 1, where=where)
    assert jaxent.mean(hits, weights=jnp.array([1, 2, 0, 1, 0, 0])) == 0.5


@pytest.mark.parametrize("width", [1, 2, 4, 8, 3, 5])
def test_ranks_of_equal_logits(width, monkeypatch):
    """Columns of the kernel that are the same have the same rank, in whatever block of classes they are.

    Unless it is the last one and narrower: another matmul, which may round otherwise.
    """
    rng = np.random.default_rng(0)
    columns = np.float32(rng.normal(size=(64, 4)))
    kernel = jnp.asarray(np.tile(columns, 4))  # each four times
    hidden = jnp.asarray(np.float32(rng.normal(size=(16, 64))))
    label = jnp.arange(16)
    monkeypatch.setattr(
        "jaxent._logits.sources.plan", lambda sizes, *_: jaxent._logits.plan.Plan(sizes.rows, width)
    )
    statistics = jax.jit(lambda logits: jaxent.softmax_statistics(logits, label))  # one for each width
    found = statistics(jaxent.LinearLogits(hidden, kernel))
    order = (np.float64(hidden) @ columns).argsort(-1)[:, ::-1]
    larger = (order == (label % 4)[:, None]).argmax(-1)
    assert (found.rank // 4 == larger).all() and (found.prediction % 4 == order[:, 0]).all()
    if 16 % width == 0:
        assert (found.rank == 4 * larger).all() and (found.prediction < 4).all()


# Classes that are out of force hide what they hold.


@thinned(3, "garbage, per_row, source", [np.nan, np.inf], [False, True], harness.LINEAR)
def test_garbage_in_hidden_columns(garbage, per_row, source):
    hidden, kernel, label = arrays()
    out = np.arange(V) == 4
    label = jnp.where(label == 4, 5, label)
    mask = jnp.asarray(np.tile(~out, (N, 1)) if per_row else ~out)
    layer = hidden, jnp.where(out[None], garbage, kernel), jnp.where(out, garbage, jnp.ones(V))

    def total(cap, hidden, kernel, bias, reduction="mean", mask=mask):
        logits = jaxent.LinearLogits(hidden, kernel, bias, softcap=cap)
        options = {"class_mask": mask, "label_smoothing": 0.1, "reduction": reduction}
        loss = jaxent.softmax_cross_entropy(logits, label, **options)
        kl = jaxent.softmax_kl_divergence(
            logits, jaxent.LinearLogits(hidden, kernel * 2), class_mask=mask, reduction=reduction
        )
        return jnp.sum(loss) + jnp.sum(kl)

    @functools.partial(jax.jit, compiler_options=harness.QUICK)
    def run(cap, *layer):
        return [
            jax.value_and_grad(functools.partial(total, reduction=r), (0, 1, 2, 3))(cap, *layer)
            for r in ("mean", "none")
        ]

    with harness.blocks(source):
        got, want = run(2.0, *layer), run(2.0, hidden, kernel, jnp.ones(V))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


# Messages.


@pytest.mark.parametrize(
    ("shape", "labels", "axis"),
    [((2, 5, 3, 4), (2, 3, 4), 1), ((5, 2, 3), (2, 3), 0), ((2, 3, 5), (2, 5), 1)],
)
def test_a_class_axis_that_was_not_named(shape, labels, axis):
    f, logits, labels = jaxent.softmax_cross_entropy, np.zeros(shape), np.zeros(labels, int)
    with pytest.raises(
        ValueError, match=f"If the classes are on axis {axis} of the logits, pass `axis={axis}`"
    ):
        f(logits, labels)
    assert jax.eval_shape(functools.partial(f, axis=axis), logits, labels).shape == labels.shape


def test_forward_mode_of_results_per_row():
    hidden, kernel, label = arrays()

    def losses(hidden, reduction="none"):
        return jaxent.softmax_cross_entropy(jaxent.LinearLogits(hidden, kernel), label, reduction=reduction)

    for f in (jax.jacfwd(losses), lambda x: jax.jvp(losses, (x,), (x,))):
        with pytest.raises(TypeError, match=r"What works: reverse mode.*forward over reverse.*dense"):
            f(hidden)
    jax.jvp(jax.grad(lambda h: losses(h).sum()), (hidden,), (hidden,))
    jax.jvp(functools.partial(losses, reduction="mean"), (hidden,), (hidden,))


@pytest.mark.parametrize("names", [("d", "d"), (("d", "e"), "e"), ("e", ("d", "e"))])
def test_rows_and_classes_over_one_axis(names):
    of_classes, of_rows = names
    losses = (
        lambda z, y, **axes: jaxent.softmax_cross_entropy(z, y, reduction="mean", **axes),
        lambda z, _, **axes: jaxent.softmax_kl_divergence(z, z, reduction="mean", **axes),
        lambda z, _, **axes: jaxent.softmax_entropy(z, reduction="mean", **axes),
    )
    for f in losses:
        g = functools.partial(f, class_axis_name=of_classes, batch_axis_name=of_rows)
        g = jax.vmap(jax.vmap(g, axis_name="e"), axis_name="d")
        with pytest.raises(ValueError, match=r"`batch_axis_name` must be another axis.*Gather one side"):
            g(jnp.zeros((2, 3, 4, 5)), jnp.zeros((2, 3, 4), int))


def test_options_of_values_are_checked_where_checks_are_asked_for():
    """A smoothing out of range is NaN, not another loss; checks of labels are what they were."""
    hidden, kernel, label = arrays()
    f = checkify.checkify(lambda a: jaxent.softmax_cross_entropy(hidden @ kernel, label, label_smoothing=a))
    error, losses = f(jnp.float32(2))
    assert error.get() is None and np.isnan(losses).all()
