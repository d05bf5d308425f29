"""pmap and shard_map over the batch, and logits split over devices by jit: the same as on one device."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax import lax
from jax.experimental import checkify
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxent
from forms import COTANGENT, FORMS, total
from tables import some

CLASSES = 512  # enough for sums in groups, which are for one device only
CT = jnp.asarray(COTANGENT, jnp.float32)
SOME = ("cross_entropy, options", "softmax_loss", "kl")  # labels and masks, a closure, two logits
all_forms = pytest.mark.parametrize("name", FORMS)


def test_there_are_eight_devices():
    assert jax.device_count() == 8


def mesh():
    return Mesh(np.array(jax.devices()), ("rows",))


@functools.cache
def expected(name):
    """Losses, and the gradient of their sum with COTANGENT, of plain jax.numpy in float64."""
    form = FORMS[name]
    with jax.enable_x64(True):
        arguments = form.arguments(CLASSES, jnp.float64)
        losses, gradient = jax.jit(lambda *a: (form.plain(*a), jax.grad(total(form.plain))(*a)))(*arguments)
        return np.asarray(losses), np.asarray(gradient)


def assert_expected(name, losses, gradient):
    for got, want in zip((losses, gradient), expected(name), strict=True):
        np.testing.assert_allclose(got, want, rtol=3e-6, atol=3e-6)


def local(form):
    """Weighted losses of rows, and the gradient of their sum."""

    def scalar(z, ct, *rest):
        losses = form.rows(z, *rest)
        return jnp.sum(ct * losses), losses

    def f(z, ct, *rest):
        (_, losses), gradient = jax.value_and_grad(scalar, has_aux=True)(z, ct, *rest)
        return losses, gradient

    return f


@pytest.mark.parametrize("name", SOME)  # pmap is jit of shard_map underneath
def test_pmap(name):
    """One row on each device; the gradient inside and outside."""
    form = FORMS[name]
    z, *rest = form.arguments(CLASSES)
    axes = form.in_axes()
    inside = jax.pmap(local(form), axis_name="rows", in_axes=(0, 0, *axes[1:]))(z, CT, *rest)
    assert_expected(name, *inside)
    rows = jax.pmap(form.rows, in_axes=axes)
    outside = jax.grad(lambda z: jnp.vdot(rows(z, *rest), CT))(z)
    assert_expected(name, rows(z, *rest), outside)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", some(SOME, FORMS))
def test_shard_map(name, check_vma):
    """One row on each device; the gradient inside and outside."""
    form = FORMS[name]
    z, *rest = form.arguments(CLASSES)
    specs = [P() if axis is None else P("rows") for axis in form.in_axes()]
    put = functools.partial(jax.shard_map, mesh=mesh(), check_vma=check_vma)
    inside = put(local(form), in_specs=(specs[0], P("rows"), *specs[1:]), out_specs=P("rows"))
    assert_expected(name, *jax.jit(inside)(z, CT, *rest))
    if name in SOME:
        rows = put(form.rows, in_specs=tuple(specs), out_specs=P("rows"))
        outside = jax.jit(jax.grad(lambda z: jnp.vdot(rows(z, *rest), CT)))(z)
        assert_expected(name, jax.jit(rows)(z, *rest), outside)


@pytest.mark.parametrize("check_vma", [True, False])
def test_higher_orders_and_forward_mode_in_shard_map(check_vma):
    """Also with a direction that all devices have in common."""
    form = FORMS["cross_entropy, options"]
    arguments = form.arguments(CLASSES)
    dot = jnp.cos(arguments[0][:1])

    def f(dot, z, *rest):
        slope = jax.jvp(lambda z: form.rows(z, *rest), (z,), (dot,))[1]
        gradient = jax.grad(lambda z: form.rows(z, *rest).sum())
        return slope, jax.jvp(gradient, (z,), (dot,))[1]

    want = jax.jit(f)(jnp.tile(dot, (8, 1)), *arguments)
    specs = (P("rows"),) * len(arguments)
    put = functools.partial(jax.shard_map, mesh=mesh(), out_specs=P("rows"), check_vma=check_vma)
    each = jax.jit(put(f, in_specs=(P("rows"), *specs)))(jnp.tile(dot, (8, 1)), *arguments)
    common = jax.jit(put(f, in_specs=(P(), *specs)))(dot, *arguments)
    for got in (each, common):
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(g, w, rtol=3e-6, atol=3e-6)


def split_over(x, *spec):
    devices = np.array(jax.devices()).reshape(2, 4)
    return jax.device_put(x, NamedSharding(Mesh(devices, ("rows", "classes")), P(*spec)))


@all_forms
def test_jit_of_split_logits_gathers_nothing(name):
    """Rows over 2 and classes over 4 devices: losses and gradients, and no logits on the wire."""
    form = FORMS[name]
    arguments = form.arguments(CLASSES)
    put = [
        split_over(x) if axis is None else split_over(x, "rows", *["classes"][: x.ndim - 1])
        for x, axis in zip(arguments, form.in_axes(), strict=True)
    ]
    f = jax.jit(lambda z, ct, *rest: local(form)(z, ct, *rest))
    program = f.lower(put[0], CT, *put[1:]).compile()
    losses, gradient = program(put[0], CT, *put[1:])
    assert_expected(name, losses, gradient)
    assert gradient.sharding.is_equivalent_to(put[0].sharding, 2)
    moved = re.findall(r"\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)\(", program.as_text())
    share = np.size(put[0]) // 8  # what a device has of the logits
    assert all(np.prod([int(n) for n in size.split(",")]) < share for size in moved if size), moved


BAD, GOOD = jnp.array([0, 1, 2, 3, 4, 512, 5, 6]), jnp.arange(8)
MESSAGE = (
    "jaxent.softmax_cross_entropy: `labels` must be in [0, 512) and name a class in force, but row 0 "
    "(counted over the flattened rows) has label 512. "
    "Labels count from 0; hide a row with `where=` or `ignore_index=`."
)
LOSS = jaxent.softmax_cross_entropy
Z = jnp.zeros((8, CLASSES))


def in_shard_map(f):
    return jax.jit(jax.shard_map(f, mesh=mesh(), in_specs=(P("rows"), P("rows")), out_specs=P("rows")))


INSIDE = {
    "pmap": jax.pmap(LOSS),
    "pmap of grad": jax.pmap(jax.grad(LOSS)),
    "shard_map": in_shard_map(LOSS),
    "shard_map of grad": in_shard_map(jax.grad(lambda z, y: LOSS(z, y).sum())),
    "grad of shard_map": jax.grad(lambda z, y: in_shard_map(LOSS)(z, y).sum()),
}


@pytest.mark.parametrize("name", INSIDE)
def test_checkify(name):
    f = checkify.checkify(INSIDE[name])
    assert MESSAGE in f(Z, BAD)[0].get()
    assert f(Z, GOOD)[0].get() is None


@pytest.mark.parametrize("name", INSIDE)
def test_bad_labels_poison_their_row_alone(name):
    got = INSIDE[name](Z, BAD).reshape(8, -1)
    assert np.isnan(got).all(-1).tolist() == (BAD == 512).tolist() == np.isnan(got).any(-1).tolist()


@pytest.mark.parametrize("transform", [jax.pmap, in_shard_map], ids=["pmap", "shard_map"])
def test_errors(transform):
    got = "int32[1]" if transform is jax.pmap else "int32[1, 1]"
    rows = "[]" if transform is jax.pmap else "[1]"
    full = "[512]" if transform is jax.pmap else "[1, 512]"
    with pytest.raises(ValueError) as e:
        transform(LOSS)(Z, GOOD[:, None])
    assert str(e.value) == (
        f"jaxent.softmax_cross_entropy: `labels` must be class indices (integers) of shape {rows} or a "
        f"distribution (floats) of shape {full}, but is {got}. "
        "jaxent never broadcasts labels: one index per row of logits, e.g. `labels.squeeze(-1)`."
    )


def test_global_mean_over_devices_that_hold_different_counts():
    """Sums by psum: not the mean of the means of devices."""
    weights = jnp.arange(8.0)

    def mean(z, y, w):
        loss = jaxent.softmax_cross_entropy(z, y, weights=w, reduction="sum")
        return lax.psum(loss, "rows") / lax.psum(w.sum(), "rows")

    arguments = FORMS["cross_entropy"].arguments(CLASSES)
    f = jax.shard_map(mean, mesh=mesh(), in_specs=P("rows"), out_specs=P())
    got = jax.jit(jax.value_and_grad(f))(*arguments, weights)

    @jax.jit
    @jax.value_and_grad
    def whole(z, y, w):
        return jaxent.softmax_cross_entropy(z, y, weights=w, reduction="mean")

    for g, w in zip(got, whole(*arguments, weights), strict=True):
        np.testing.assert_allclose(g, w, rtol=2e-6, atol=1e-7)


class Variants(chex.TestCase):
    """With pmap beside jit and device arrays."""

    @chex.variants(with_jit=True, with_device=True, with_pmap=True)
    @parameterized.parameters("cross_entropy", "cross_entropy, distribution")
    def test_rows(self, name):
        form = FORMS[name]
        got = self.variant(form.rows)(*form.arguments(CLASSES))
        np.testing.assert_allclose(got, expected(name)[0], rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("of_targets", [False, True], ids=["split logits", "split targets"])
def test_what_all_devices_have_beside_what_each_has(of_targets):
    """In a shard_map that checks what varies: each gradient varies as its input does."""
    rng = np.random.default_rng(9)
    whole = np.float32(rng.uniform(size=(2, 16, 5)))
    specs = (P(), P("rows")) if of_targets else (P("rows"), P())
    arrays = [x if spec == P("rows") else x[:2] for x, spec in zip(whole, specs, strict=True)]
    label = jnp.arange(16) % 5
    losses = {
        "sigmoid": lambda z, q, _, **axes: jaxent.mean(
            jaxent.sigmoid_cross_entropy(z, q), **({"axis_name": "rows"} if axes else {})
        ),
        "softmax": lambda z, q, _, **axes: jaxent.softmax_focal_loss(z, q, reduction="mean", **axes),
        "index": lambda z, q, y, **axes: jaxent.softmax_cross_entropy(
            z + 0 * q, y, weights=q[:, 0], reduction="mean", **axes
        ),
    }

    def step(z, q, y):
        axes = {"batch_axis_name": "rows"}
        return [jax.grad(lambda *a, f=f: f(*a, y, **axes), (0, 1))(z, q) for f in losses.values()]

    f = jax.shard_map(step, mesh=mesh(), in_specs=(*specs, P("rows")), out_specs=list([specs] * 3))
    found = jax.jit(f)(*arrays, label)

    @jax.jit
    def on_one(z, q):
        z, q = (jnp.tile(x, (16 // x.shape[0], 1)) for x in (z, q))
        return [f(z, q, label) for f in losses.values()]

    for i, got in enumerate(found):
        want = jax.jit(jax.grad(lambda z, q, i=i: on_one(z, q)[i], (0, 1)))(*arrays)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
