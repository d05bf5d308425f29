"""Every transformation of jax on every softmax function: the same as of plain jax.numpy in float64."""

import functools
import importlib.util

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax import lax

import harness
import jaxent
from forms import COTANGENT, FORMS, moving, tangents, total
from tables import some, thinned

SMALL, GROUPED = 7, 4096  # classes; on one CPU, sums of many classes are made in groups
# for programs that run once: most of the time goes into compiling them
once = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
all_forms = pytest.mark.parametrize("name", FORMS)


class Problem:
    """Rows `f` of a form on its arguments; `g` is their sum with uneven signs, of what can be differentiated."""

    def __init__(self, form, f, arguments):
        self.form, self.f, self.arguments = form, f, arguments
        self.axes = form.in_axes()
        self.which = moving(arguments)
        self.primals = tuple(arguments[i] for i in self.which)
        self.dots = tuple(tangents(arguments))

    def complete(self, moved):
        full = list(self.arguments)
        for i, x in zip(self.which, moved, strict=True):
            full[i] = x
        return full

    def g(self, *moved):
        return total(self.f)(*self.complete(moved))

    def gradient(self, g, primals):
        return jax.grad(g, tuple(range(len(primals))))(*primals)

    def along(self, *moved):
        """The directional derivative in reverse mode."""
        return sum(map(jnp.vdot, self.gradient(self.g, moved), self.dots))

    def directional(self, *moved):
        """The directional derivative in forward mode."""
        return jax.jvp(self.g, moved, self.dots)[1]

    def copies(self, name):
        """in_axes for, and arguments with, three copies of one input: its rows rolled."""
        axes = tuple(0 if other == name else None for other in self.form.inputs)
        rolled = [
            jnp.stack([jnp.roll(x, i, 0) for i in range(3)]) if axis == 0 else x
            for x, axis in zip(self.arguments, axes, strict=True)
        ]
        return axes, rolled

    def classes_first(self):
        """in_axes for, and arguments with, [V, N] logits."""
        axes = tuple(1 if x.ndim == 2 else axis for x, axis in zip(self.arguments, self.axes, strict=True))
        return axes, [x.T if x.ndim == 2 else x for x in self.arguments]

    def split(self):
        """Rows [N] as [2, N / 2]."""
        pairs = zip(self.arguments, self.axes, strict=True)
        return [x if axis is None else x.reshape(2, -1, *x.shape[1:]) for x, axis in pairs]

    def scan(self, *moved):
        """(total, losses), one row a step."""
        full = self.complete(moved)
        rows = [x for x, axis in zip(full, self.axes, strict=True) if axis == 0]

        def step(carry, row):
            *row, cotangent = row
            left = iter(row)
            loss = self.f(
                *[x if axis is None else next(left) for x, axis in zip(full, self.axes, strict=True)]
            )
            return carry + cotangent * loss, loss

        zero = jnp.zeros((), full[0].dtype)
        return lax.scan(step, zero, [*rows, jnp.asarray(COTANGENT, zero.dtype)])

    def vmap_of_grad(self):
        """Gradients by the logits, row by row."""
        grad = jax.grad(lambda z, cotangent, *rest: cotangent * self.f(z, *rest))
        z, *rest = self.arguments
        axes = (0, 0, *self.axes[1:])
        return jax.vmap(grad, axes)(z, jnp.asarray(COTANGENT, z.dtype), *rest)

    def vmap_of_one(self, name):
        axes, rolled = self.copies(name)
        return jax.vmap(self.f, axes)(*rolled)


# What plain jax.numpy is asked for.
FACTS = {
    "value": lambda p: p.f(*p.arguments),
    "value, split": lambda p: p.f(*p.arguments).reshape(2, -1),
    "value and losses": lambda p: (p.g(*p.primals), p.f(*p.arguments)),
    "labels rolled": lambda p: jnp.stack([p.f(*x) for x in unstacked(*p.copies("label"))]),
    "logits rolled": lambda p: jnp.stack([p.f(*x) for x in unstacked(*p.copies("logits"))]),
    "gradient": lambda p: p.gradient(p.g, p.primals),
    "gradient by logits": lambda p: p.gradient(p.g, p.primals)[0],
    "slope": lambda p: p.along(*p.primals),
    "hvp": lambda p: p.gradient(p.along, p.primals),
    "jacobian": lambda p: jax.jacrev(p.f)(*p.arguments),
    "hessian": lambda p: jax.hessian(p.g)(*p.primals),
}
# name: (what jaxent is asked for, the fact that it must give)
TRANSFORMATIONS = {
    "jit": (lambda p: p.f(*p.arguments), "value"),
    "vmap": (lambda p: jax.vmap(p.f, p.axes)(*p.arguments), "value"),
    "vmap, in_axes=1": (lambda p: jax.vmap(p.f, p.classes_first()[0])(*p.classes_first()[1]), "value"),
    "vmap, labels only": (lambda p: p.vmap_of_one("label"), "labels rolled"),
    "vmap, logits only": (lambda p: p.vmap_of_one("logits"), "logits rolled"),
    "vmap of two axes": (lambda p: jax.vmap(p.f, p.axes)(*p.split()), "value, split"),
    "vmap of vmap": (lambda p: jax.vmap(jax.vmap(p.f, p.axes), p.axes)(*p.split()), "value, split"),
    "vmap of grad": (Problem.vmap_of_grad, "gradient by logits"),
    "scan": (lambda p: p.scan(*p.primals), "value and losses"),
    "grad of scan": (lambda p: p.gradient(lambda *x: p.scan(*x)[0], p.primals), "gradient"),
    "grad": (lambda p: p.gradient(p.g, p.primals), "gradient"),
    "grad of checkpoint": (lambda p: p.gradient(jax.checkpoint(p.g), p.primals), "gradient"),
    "transpose of linearize": (
        lambda p: jax.linear_transpose(jax.linearize(p.g, *p.primals)[1], *p.primals)(
            jnp.ones((), p.primals[0].dtype)
        ),
        "gradient",
    ),
    "jvp": (lambda p: p.directional(*p.primals), "slope"),
    "linearize": (lambda p: jax.linearize(p.g, *p.primals)[1](*p.dots), "slope"),
    "grad of grad": (lambda p: p.gradient(p.along, p.primals), "hvp"),
    "forward over reverse": (
        lambda p: jax.jvp(lambda *x: p.gradient(p.g, x), p.primals, p.dots)[1],
        "hvp",
    ),
    "reverse over forward": (lambda p: p.gradient(p.directional, p.primals), "hvp"),
}
# [N, N, V] and more: for few classes
JACOBIANS = {
    "jacrev": (lambda p: jax.jacrev(p.f)(*p.arguments), "jacobian"),
    "jacfwd": (lambda p: jax.jacfwd(p.f)(*p.arguments), "jacobian"),
    "hessian": (lambda p: jax.hessian(p.g)(*p.primals), "hessian"),
}


def unstacked(axes, arguments):
    """The arguments of each copy."""
    return [[x if axis is None else x[i] for x, axis in zip(arguments, axes, strict=True)] for i in range(3)]


def both(form, classes, dtype, table):
    """What `table` says, of jaxent in `dtype` and of the plain function in float64, by name."""
    table = {k: v for k, v in table.items() if "label" in form.inputs or v[1] != "labels rolled"}
    facts = {fact for _, fact in table.values()}

    def ask(f, questions, arguments):
        p = Problem(form, f, arguments)
        return {name: question(p) for name, question in questions.items()}

    with jax.enable_x64(True):
        plain = functools.partial(ask, form.plain, {name: FACTS[name] for name in facts})
        want = once(plain)(form.arguments(classes, jnp.float64))
    with jax.enable_x64(dtype == jnp.float64):
        transformed = functools.partial(ask, form.rows, {name: f for name, (f, _) in table.items()})
        got = once(transformed)(form.arguments(classes, dtype))
    return got, {name: want[fact] for name, (_, fact) in table.items()}


def assert_same(got, want, rtol):
    """Every leaf, in units of its largest element, or of 1."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, g), w in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g), np.asarray(w)
        harness.assert_within(g, w, rtol * max(np.abs(w).max(), 1), jax.tree_util.keystr(path))


SECOND = ("grad of grad", "forward over reverse", "reverse over forward")
GROUPS = {
    "vmap": {k: f for k, f in TRANSFORMATIONS.items() if k == "jit" or k.startswith("vmap")},
    "first order": {
        k: f for k, f in TRANSFORMATIONS.items() if k not in ("jit", *SECOND) and not k.startswith("vmap")
    },
    "second order": {k: TRANSFORMATIONS[k] for k in SECOND} | JACOBIANS,
}


@thinned(3, "name, group", FORMS, GROUPS)
def test_few_classes(name, group):
    assert_same(*both(FORMS[name], SMALL, jnp.float64, GROUPS[group]), 1e-11)


SOME = ("jit", "vmap", "vmap of grad", "scan", "grad", "grad of checkpoint", "jvp", "forward over reverse")
MANY = ("cross_entropy", "cross_entropy, options", "softmax_loss", "statistics")


@pytest.mark.parametrize("name", some(MANY[1:3], MANY))
def test_sums_in_groups(name):
    form = FORMS[name]
    if jax.device_count() == 1:
        assert "platform_index" in str(jax.make_jaxpr(form.rows)(*form.arguments(GROUPED)))
    assert_same(*both(form, GROUPED, jnp.float32, {k: TRANSFORMATIONS[k] for k in SOME}), 3e-6)


@pytest.mark.parametrize("classes", [SMALL, GROUPED])
def test_second_derivatives_of_confident_rows(classes):
    """p_y (1 - p_y) of a row whose loss is 1e-20 is not 0, and has all its digits."""
    gap = np.float32([5, 15, 45])
    z = np.zeros((3, classes), np.float32)
    z[:, 2] = gap
    label = jnp.full(3, 2)
    dot = jnp.zeros_like(z).at[:, 2].set(1)
    grad = jax.grad(lambda z: jaxent.softmax_cross_entropy(z, label, reduction="sum"))
    got = once(lambda z: jax.jvp(grad, (z,), (dot,))[1])(jnp.asarray(z))
    rest = (classes - 1) * np.exp(-gap.astype(np.float64))
    np.testing.assert_allclose(got[:, 2], rest / (1 + rest) ** 2, rtol=2e-6)
    off = -np.exp(-gap.astype(np.float64)) / (1 + rest) ** 2
    np.testing.assert_allclose(got[:, 3], off, rtol=2e-6)


def value_and_gradient(form):
    return jax.value_and_grad(lambda z, *rest: total(form.rows)(z, *rest))


@pytest.mark.parametrize("name", ["cross_entropy", "cross_entropy, distribution", "softmax_loss", "kl"])
def test_donated_logits(name):
    form = FORMS[name]
    arguments = form.arguments(300)
    want = once(value_and_gradient(form))(*arguments)
    donated = [jnp.copy(arguments[0]), *arguments[1:]]
    got = once(value_and_gradient(form), donate_argnums=0)(*donated)
    assert donated[0].is_deleted()
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-6, atol=1e-7)


def read_again(exported):
    """Through bytes, where the package that makes them is there."""
    if importlib.util.find_spec("flatbuffers") is None:
        return exported
    return jax.export.deserialize(exported.serialize(vjp_order=1))


@pytest.mark.parametrize("name", ["cross_entropy, options", "softmax_loss"])
def test_export_with_any_number_of_rows(name):
    """Called with two batch sizes, and differentiated."""
    form = FORMS[name]
    n = jax.export.symbolic_shape("n")

    def abstract(x, axis):
        return jax.ShapeDtypeStruct(x.shape if axis is None else (*n, *x.shape[1:]), x.dtype)

    arguments = form.arguments(SMALL)
    shapes = [abstract(x, axis) for x, axis in zip(arguments, form.in_axes(), strict=True)]
    exported = jax.export.export(jax.jit(form.rows), platforms=("cpu", "tpu"))(*shapes)
    read = read_again(exported)
    fewer = [x if axis is None else x[:5] for x, axis in zip(arguments, form.in_axes(), strict=True)]

    @functools.partial(once, static_argnums=0)
    def value_and_gradient(rows, z, *rest):
        return rows(z, *rest), jax.grad(lambda z: rows(z, *rest).sum())(z)

    for given in (arguments, fewer):
        got, want = (value_and_gradient(rows, *given) for rows in (read.call, form.rows))
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-6, atol=1e-7)


def test_export_of_sums_in_groups():
    """A program for several platforms holds the way of each."""
    form = FORMS["cross_entropy"]
    arguments = form.arguments(GROUPED)
    f = jax.jit(value_and_gradient(form))
    exported = jax.export.export(f, platforms=("cpu", "cuda", "tpu"))(*arguments)
    read = read_again(exported)
    for g, w in zip(read.call(*arguments), f(*arguments), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-6, atol=1e-7)


@all_forms
def test_lowering_for_other_platforms(name):
    traced = jax.jit(value_and_gradient(FORMS[name])).trace(*FORMS[name].arguments(GROUPED))
    for platform in ("tpu", "cuda"):
        assert "stablehlo" in traced.lower(lowering_platforms=(platform,)).as_text()


class Variants(chex.TestCase):
    """With and without jit, from host or device arrays."""

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    @parameterized.parameters("cross_entropy, options", "softmax_loss", "statistics", "js")
    def test_rows(self, name):
        form = FORMS[name]
        arguments = [np.asarray(x) for x in form.arguments(SMALL)]
        got = self.variant(form.rows)(*arguments)
        want = form.plain(*map(jnp.asarray, arguments))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def softmaxed(z):
    return jax.nn.softmax(z, -1)


def linear(z, **options):
    return jaxent.LinearLogits(z, jnp.cos(jnp.arange(63.0)).reshape(7, 9), **options)


def sparse(i):
    classes = jnp.stack([jnp.arange(4), jnp.arange(4) + 1 + i % 2], -1)
    return jaxent.SparseDistribution(classes, jnp.full((4, 2), 0.4))


def rows(i):
    return jnp.arange(4) <= i


def weights(i):
    return jnp.arange(4.0) + i


LABELS = jnp.arange(4)
# What is mapped over, alone: as many masks, weights, teachers or numbers as there are rows, or else nothing broadcasts.
MAPPED = {
    "a mask, entropy": lambda z, i: jaxent.softmax_entropy(z, where=rows(i)),
    "a mask, log-normalizer": lambda z, i: jaxent.softmax_statistics(z, where=rows(i)).log_normalizer,
    "a mask, labels": lambda z, i: jaxent.softmax_cross_entropy(z, LABELS, where=rows(i), reduction="mean"),
    "a mask, a distribution": lambda z, i: jaxent.softmax_cross_entropy(
        z, softmaxed(-z), where=rows(i), reduction="mean"
    ),
    "a mask, a sparse one": lambda z, i: jaxent.softmax_cross_entropy(z, sparse(1), where=rows(i)),
    "a mask, focal": lambda z, i: jaxent.softmax_focal_loss(z, LABELS, where=rows(i)),
    "a mask, yes/no": lambda z, i: jaxent.sigmoid_cross_entropy(z, z > 0, where=rows(i)[:, None] & (z < 9)),
    "a mask, KL": lambda z, i: jaxent.softmax_kl_divergence(z, -z, where=rows(i)),
    "a mask, JS of a sparse one": lambda z, i: jaxent.softmax_js_divergence(z, sparse(1), where=rows(i)),
    "a mask, linear": lambda z, i: jaxent.softmax_entropy(linear(z), where=rows(i), reduction="mean"),
    "a mask, linear KL": lambda z, i: jaxent.softmax_kl_divergence(linear(z), linear(-z), where=rows(i)),
    "a mask, blocks of classes": lambda z, i: jaxent.softmax_entropy(
        linear(z, block_bytes=64), where=rows(i)
    ),
    "a mask, pairs": lambda z, i: jaxent.softmax_contrastive_loss(z, z[::-1], scale=1, where=rows(i)),
    "a mask, yes/no pairs": lambda z, i: jaxent.sigmoid_contrastive_loss(
        z, z[::-1], scale=1, bias=0, where=rows(i)
    ),
    "a mask of classes": lambda z, i: jaxent.softmax_cross_entropy(
        z, 0 * LABELS, class_mask=jnp.arange(7) <= i + 2
    ),
    "weights": lambda z, i: jaxent.softmax_entropy(z, weights=weights(i), reduction="mean"),
    "weights, labels": lambda z, i: jaxent.softmax_cross_entropy(
        z, LABELS, weights=weights(i), reduction="mean"
    ),
    "weights, KL": lambda z, i: jaxent.softmax_kl_divergence(z, -z, weights=weights(i), reduction="mean"),
    "weights, linear": lambda z, i: jaxent.softmax_cross_entropy(
        linear(z), LABELS, weights=weights(i), reduction="mean"
    ),
    "weights of classes": lambda z, i: jaxent.softmax_cross_entropy(
        z, LABELS, class_weights=jnp.arange(7.0) + i, reduction="mean"
    ),
    "labels": lambda z, i: jaxent.softmax_cross_entropy(z, (LABELS + i) % 7),
    "a sparse distribution": lambda z, i: jaxent.softmax_cross_entropy(z, sparse(i)),
    "a teacher": lambda z, i: jaxent.softmax_kl_divergence(z, jnp.cos(z + i)),
    "a temperature": lambda z, i: jaxent.softmax_kl_divergence(z, -z, temperature=1.0 + i),
    "a beta": lambda z, i: jaxent.softmax_js_divergence(z, -z, beta=(1.0 + i) / 6),
    "a beta, a sparse one": lambda z, i: jaxent.softmax_js_divergence(z, sparse(1), beta=(1.0 + i) / 6),
    "a smoothing": lambda z, i: jaxent.sigmoid_cross_entropy(z, z > 0, label_smoothing=i / 6),
    "a smoothing, labels": lambda z, i: jaxent.softmax_cross_entropy(z, LABELS, label_smoothing=i / 6),
    "a z-loss": lambda z, i: jaxent.softmax_cross_entropy(z, LABELS, z_loss=0.1 + i),
    "an ignored label": lambda z, i: jaxent.softmax_cross_entropy(
        z, jnp.where(rows(i), LABELS, -1), ignore_index=-1, reduction="mean"
    ),
    "a gamma": lambda z, i: jaxent.softmax_focal_loss(z, LABELS, gamma=1.0 + i),
    "an alpha": lambda z, i: jaxent.softmax_focal_loss(z, LABELS, alpha=jnp.arange(7.0) / 9 + i / 30),
    "an epsilon": lambda z, i: jaxent.softmax_poly_loss(z, LABELS, epsilon=1.0 + i),
    "a pos_weight": lambda z, i: jaxent.sigmoid_cross_entropy(z, z > 0, pos_weight=1.0 + i),
    "a gamma, yes/no": lambda z, i: jaxent.sigmoid_asymmetric_loss(z, z > 0, gamma_negative=1.0 + i),
    "a mask, chosen classes": lambda z, i: (
        jaxent.softmax_statistics(z, classes=sparse(1).classes, where=rows(i)).other_log_prob
    ),
    "chosen classes": lambda z, i: jaxent.softmax_statistics(z, classes=sparse(i).classes).other_log_prob,
    "an argument": lambda z, i: jaxent.softmax_loss(
        lambda s, a: a * s.log_prob * s.entropy, linear(z), LABELS, weights(i), reduction="sum"
    ),
    "a closure": lambda z, i: jaxent.softmax_loss(
        lambda s: (1.0 + i) * s.log_prob * s.entropy, linear(z), LABELS, reduction="sum"
    ),
    "a kernel": lambda z, i: jaxent.softmax_entropy(
        jaxent.LinearLogits(z, jnp.sin(linear(z).kernel + i), block_bytes=64)
    ),
    "a softcap": lambda z, i: jaxent.softmax_cross_entropy(
        linear(z, softcap=5.0 + i), LABELS, reduction="mean"
    ),
    "a scale of pairs": lambda z, i: jaxent.softmax_contrastive_loss(z, z[::-1], scale=1.0 + i),
    "ids of pairs": lambda z, i: jaxent.softmax_contrastive_loss(z, z[::-1], scale=1, ids=LABELS // (1 + i)),
    "a mask, samples": lambda z, i: jaxent.sampled_softmax_cross_entropy(
        z, linear(z).kernel, LABELS, 5 + LABELS[:3], where=rows(i), reduction="mean"
    ),
    "samples": lambda z, i: jaxent.nce_loss(z, linear(z).kernel, LABELS, (5 + LABELS[:3] + i) % 9),
    "a mask, probabilities": lambda z, i: jaxent.categorical_cross_entropy(
        softmaxed(z), LABELS, where=rows(i)
    ),
}
NUMBERS = jnp.arange(4)
VMAPS = {
    "vmap": lambda f: lambda z: jax.vmap(f, (None, 0))(z, NUMBERS),
    "vmap of jit": lambda f: lambda z: jax.vmap(jax.jit(f), (None, 0))(z, NUMBERS),
    "vmap of checkpoint": lambda f: lambda z: jax.vmap(jax.checkpoint(f), (None, 0))(z, NUMBERS),
    "map by batches": lambda f: lambda z: lax.map(functools.partial(f, z), NUMBERS, batch_size=2),
}


def looped(f):
    return lambda z: jnp.stack([f(z, i) for i in NUMBERS])


@pytest.mark.parametrize("name", MAPPED)
def test_grad_of_vmap(name, as_users_run):
    """One argument is mapped over and the logits are not: beside a loop."""
    f, z = MAPPED[name], jnp.asarray(np.random.default_rng(0).normal(size=(4, 7)), jnp.float32)

    def gradient(many):
        return jax.grad(lambda z: jnp.sum(many(f)(z)))

    @once
    def derivatives(z):
        return {
            way: jax.jvp(gradient(many), (z,), (jnp.sin(z),))
            for way, many in {"loop": looped, **VMAPS}.items()
        }

    found = derivatives(z)
    loop = found.pop("loop")
    for way, of_vmap in found.items():
        chex.assert_trees_all_close(of_vmap, loop, rtol=1e-4, atol=1e-5, custom_message=way)
    assert all(np.abs(x).max() > 1e-3 for x in loop)
    for way in ("vmap", "vmap of checkpoint"):  # outside of jit
        chex.assert_trees_all_close(gradient(VMAPS[way])(z), loop[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["softmax_kl_divergence", "softmax_js_divergence"])
def test_grad_of_vmap_of_pairs(name, as_users_run):
    z = jnp.asarray(np.random.default_rng(0).normal(size=(4, 7)), jnp.float32)
    f = getattr(jaxent, name)
    many = jax.grad(lambda z: jax.vmap(f)(z, z[::-1]).sum())(z)
    chex.assert_trees_all_close(many, jax.grad(lambda z: f(z, z[::-1]).sum())(z), rtol=1e-5, atol=1e-6)
