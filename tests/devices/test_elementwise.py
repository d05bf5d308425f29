"""Elementwise losses, and those on probabilities, on an explicit mesh: what is beside the logits is split otherwise."""

import contextlib
import functools

import jax
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import harness
import jaxent

N, V = 4, 8
# an option may hide what another one breaks: each alone, both, none
SUBSETS = {(): "mean", ("where",): "mean", ("weights",): "mean", ("where", "weights"): "none"}


@functools.cache
def arrays():
    rng = np.random.default_rng(0)
    p, q = (x / x.sum(-1, keepdims=True) for x in rng.uniform(0.1, 1, (2, N, V)))
    moving = {
        "p": p, "q": q, "element weights": rng.uniform(size=(N, V)) * (np.arange(V) != 2),
        "row weights": np.array([0, 2, 0.5, 1]), "per class": rng.uniform(size=V), "number": np.array(1.5),
        "per row": rng.uniform(size=N), "factors": rng.uniform(size=(N, V)),
    }  # fmt: skip
    fixed = {"element where": rng.uniform(size=(N, V)) < 0.7, "row where": np.arange(N) != 2}
    fixed["index"] = np.int32([1, 7, 3, 0])
    fixed["yes"] = rng.choice(np.uint8([0, 1, 255]), size=(N, V))
    return {name: x.astype(np.float32) for name, x in moving.items()}, fixed


def losses(moving, fixed):
    """One loss after another, with every subset of what may be beside it."""
    a = moving | fixed

    def options(subset, kind):
        return {name: a[f"{kind} {name}"] for name in subset}

    for subset, reduction in SUBSETS.items():
        of_elements = options(subset, "element") | {"reduction": reduction}
        of_rows = options(subset, "row") | {"reduction": reduction}
        yield jaxent.sigmoid_cross_entropy(a["p"], a["q"], pos_weight=a["per class"], **of_elements)
        yield jaxent.sigmoid_focal_loss(a["p"], a["q"], gamma=a["number"], **of_elements)
        yield from by_options(a, of_elements)
        yield jaxent.binary_cross_entropy(a["p"], a["q"], **of_elements)
        yield jaxent.categorical_cross_entropy(a["p"], a["index"], **of_rows)
        yield jaxent.categorical_cross_entropy(a["p"], a["q"], **of_rows)
        yield jaxent.nll_loss(a["p"], a["index"], class_weights=a["per class"], ignore_index=7, **of_rows)
        yield jaxent.nll_loss(a["p"], a["q"], class_weights=a["per class"], **of_rows)
        yield jaxent.kl_divergence(a["p"], a["q"], generalized=bool(subset), **of_rows)


def by_options(a, options):
    """Weights per class (of either axis) and per element, and labels to ignore."""
    focal, asymmetric = jaxent.sigmoid_focal_loss, jaxent.sigmoid_asymmetric_loss
    known = options | {"ignore_index": 255}
    yield focal(a["p"], a["yes"], alpha=a["per class"], pos_weight=a["factors"], **known)
    yield focal(a["p"], a["q"], alpha=a["factors"], pos_weight=a["per row"], axis=0, **options)
    yield focal(a["p"], a["yes"], alpha=a["per class"], pos_weight=a["per class"], **known)
    yield asymmetric(a["p"], a["yes"], pos_weight=a["per row"], axis=0, **known)
    yield asymmetric(a["p"], a["q"], pos_weight=np.linspace(0, 2, N * V).reshape(N, V), **options)


def step(moving, fixed, losses=losses):
    def total(moving):
        found = list(losses(moving, fixed))
        return sum(x.sum() * np.cos(i) for i, x in enumerate(found)), [
            x if x.ndim == 0 else x.sum() for x in found
        ]

    (_, found), gradients = jax.value_and_grad(total, has_aux=True)(moving)
    return found, gradients


compiled = jax.jit(step, compiler_options=harness.QUICK)


# of the logits, and of what is beside them: rows and classes of each
SPLITS = {
    "rows only": (("rows", "classes"), ("rows", None)),
    "the other way": (("rows", "classes"), ("classes", None)),
    "not at all": (("rows", "classes"), (None, None)),
    "classes, beside rows": (("rows", None), ("rows", "classes")),
}


@functools.cache
def mesh():
    return jax.make_mesh((2, 4), ("rows", "classes"))


def put(split, on=None):
    of_logits, (rows, classes) = SPLITS[split]
    specs = {"p": P(*of_logits), "per class": P(classes), "number": P()}

    def one(name, x):
        spec = specs.get(name, P(rows, classes) if x.ndim == 2 else P(rows))
        return jax.device_put(x, NamedSharding(on or mesh(), spec))

    return [{name: one(name, x) for name, x in part.items()} for part in arrays()]


def assert_split_as(gradients, moving):
    for name, g in gradients.items():
        got, want = (tuple(x.sharding.spec) for x in (g, moving[name]))
        assert got + (None,) * (g.ndim - len(got)) == want + (None,) * (g.ndim - len(want)), name


@pytest.mark.parametrize("split", SPLITS)
def test_gradients_come_back_as_the_arrays_were_split(split):
    """Traced, not compiled: it is the types that say how arrays are split."""
    moving, fixed = put(split)
    for context in (contextlib.nullcontext(), jax.set_mesh(mesh())):
        with context:
            _, gradients = jax.eval_shape(step, moving, fixed)
            assert_split_as(gradients, moving)


def test_values():
    moving, fixed = put("rows only")
    with jax.set_mesh(mesh()):
        found = compiled(moving, fixed)
    assert_split_as(found[1], moving)
    want = compiled(*arrays())
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


OF_OPTIONS = ("p", "q", "per class", "per row", "factors")


def options_alone(moving, fixed):
    return by_options(moving | fixed, {"where": fixed["element where"], "reduction": "mean"})


@functools.cache
def on_one_device():
    moving, fixed = arrays()
    f = functools.partial(step, losses=options_alone)
    return jax.jit(f)({name: moving[name] for name in OF_OPTIONS}, fixed)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    "mode", ["auto mesh", "explicit mesh", "explicit mesh, set_mesh", "not compiled, set_mesh"]
)
def test_weights_per_class_and_element(mode, split):
    kind = AxisType.Auto if mode == "auto mesh" else AxisType.Explicit
    of_mode = jax.make_mesh((2, 4), ("rows", "classes"), axis_types=(kind, kind))
    f = functools.partial(step, losses=options_alone)
    if not mode.startswith("not compiled"):
        f = jax.jit(f, compiler_options=harness.QUICK)
    moving, fixed = put(split, of_mode)
    moving = {name: moving[name] for name in OF_OPTIONS}
    with jax.set_mesh(of_mode) if mode.endswith("set_mesh") else contextlib.nullcontext():
        found = f(moving, fixed)
    if kind == AxisType.Explicit:
        assert_split_as(found[1], moving)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(on_one_device()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_checks_on_an_explicit_mesh():
    def f(p, q):
        return jaxent.sigmoid_cross_entropy(p, q), jaxent.kl_divergence(p, p)

    p, q = (arrays()[0][name].copy() for name in "pq")
    q[2, 3] = 2
    p, q = (jax.device_put(x, NamedSharding(mesh(), P("rows", "classes"))) for x in (p, q))
    with jax.set_mesh(mesh()):
        error, _ = checkify.checkify(jax.jit(f))(p, q)
    assert "element 19 (counted over the flattened array) is 2.0" in error.get()


def test_options_in_shard_map():
    """A device's slice of classes has its own weights; a number is the same on all of them."""
    moving, _ = arrays()

    def total(p, q, pos_weight, gamma):
        options = {"pos_weight": pos_weight, "gamma": gamma, "alpha": gamma / 4, "label_smoothing": gamma / 8}
        return jaxent.sigmoid_focal_loss(p, q, reduction="sum", **options)

    def local(*arguments):
        found = jax.value_and_grad(lambda *a: jax.lax.psum(total(*a), ("rows", "classes")), (0, 2, 3))
        return found(*arguments)

    both = P("rows", "classes")
    in_specs = (both, both, P("classes"), P())
    f = jax.shard_map(local, mesh=mesh(), in_specs=in_specs, out_specs=(P(), (both, P("classes"), P())))
    arguments = [moving[name] for name in ("p", "q", "per class", "number")]
    want = jax.jit(jax.value_and_grad(total, (0, 2, 3)))(*arguments)
    put = [
        jax.device_put(x, NamedSharding(mesh(), spec)) for x, spec in zip(arguments, in_specs, strict=True)
    ]
    for a, b in zip(jax.tree.leaves(jax.jit(f)(*put)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
