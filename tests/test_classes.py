"""The option `classes`: log-probabilities of chosen classes, and of all others, from 1e-30 to all but 1.

Beside 60-digit arithmetic. tests/test_covering.py has it with every other option, and tests/devices/test_covering.py.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from jax.experimental import checkify

import harness
import jaxent
from harness import FULL, QUICK
from jaxent import _chosen, _others

SOURCES = ("dense", *harness.LINEAR)
NAMES = ("class_log_probs", "other_log_prob")
N, V, K = 24, 40, 3
EPS = np.finfo(np.float32).eps


@functools.cache
def rows(seed=0):
    """Logits and K classes each, one maybe twice; the others have 1e-36 to all but 1e-30 of the mass."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(N, V))
    classes = np.stack([rng.choice(V, size=K, replace=False) for _ in range(N)]).astype(np.int32)
    classes[::3, 2] = classes[::3, 0]
    np.put_along_axis(z, classes, np.take_along_axis(z, classes, -1) + np.linspace(-70, 80, N)[:, None], -1)
    z[::2] += 100.0  # a shift changes nothing
    return z.astype(np.float32), classes


def on_paper(z, classes):
    """(log p of the chosen classes, log of the others' mass), and derivatives of the latter, in 60 digits."""
    with mp.workdps(60):
        e = [mp.exp(mp.mpf(float(x))) for x in z]
        total, chosen = mp.fsum(e), set(classes)
        rest = mp.fsum(x for j, x in enumerate(e) if j not in chosen)
        share = (total - rest) / total
        slope = [-x / total if j in chosen else x / rest * share for j, x in enumerate(e)]
        return [mp.log(e[c] / total) for c in classes], mp.log(rest / total), slope


@functools.cache
def paper():
    z, classes = rows()
    found = [on_paper(*row) for row in zip(z, classes.tolist(), strict=True)]
    return [
        np.array([[*map(np.longdouble, map(str, np.ravel(x)))] for x in part])
        for part in zip(*found, strict=True)
    ]


def statistics(source, z, classes, **options):
    layer = z if source == "dense" else harness.as_layer(z)
    s = jaxent.softmax_statistics(layer, names=NAMES, classes=classes, **options)
    return s.class_log_probs, s.other_log_prob


@pytest.mark.parametrize("source", SOURCES)
def test_values(source):
    """A few ulp, of the chosen ones and of the others, whichever have the mass."""
    z, classes = rows()
    with harness.blocks(source):
        found = jax.jit(functools.partial(statistics, source), compiler_options=FULL)(z, classes)
    want_chosen, want_other, _ = paper()
    assert want_other.min() < -69 and want_other.max() > -1e-28
    assert harness.error_in_ulp(found[0], want_chosen, "float32").max() <= 6
    assert harness.error_in_ulp(found[1], want_other[:, 0], "float32").max() <= 6


@pytest.mark.parametrize("source", SOURCES)
def test_gradient_of_the_others(source):
    """No p - 1: the rows in which the others have all but 1e-30 have a gradient of 1e-30."""
    z, classes = rows()

    def rows_of(z):
        return statistics(source, z, classes)[1]

    with harness.blocks(source):
        jacobian = jax.jit(jax.grad(lambda z: rows_of(z).sum()), compiler_options=FULL)(jnp.asarray(z))
    want = paper()[2]
    visible = np.abs(want) > 1e-36
    np.testing.assert_allclose(jacobian[visible], want[visible].astype(np.float64), rtol=1e-6)
    assert (np.abs(want).max(-1) < 1e-20).any() and (np.abs(want).max(-1) > 0.5).any()


@pytest.mark.parametrize("source", SOURCES)
def test_gradient_of_the_chosen(source):
    """Any cotangents; where one class is sure, to its own scale."""
    z, classes = rows()
    ct = harness.cotangent_of((N, K)).astype(np.float32)
    ct[1::2, 1:] *= 1e-12  # nearly all of it on one class

    def total(z):
        return jnp.sum(ct * statistics(source, z, classes)[0])

    with harness.blocks(source):
        found = jax.jit(jax.grad(total), compiler_options=FULL)(jnp.asarray(z))
    wide = z.astype(np.longdouble)
    p = np.exp(wide - wide.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    want = np.zeros((N, V), np.longdouble)
    for k in range(K):
        at = np.arange(V) == classes[:, k, None]
        not_p = np.where(at, 0, p).sum(-1, keepdims=True)
        want += ct[:, k, None].astype(np.longdouble) * np.where(at, not_p, -p)
    bound = 4e-6 * np.abs(want) + 3e-7 * np.abs(want).max(-1, keepdims=True)
    harness.assert_within(found, want, bound)


@pytest.mark.parametrize("source", SOURCES)
def test_slots_that_are_empty_or_bad(source):
    z = harness.cast(rows()[0][:6], "float32")
    classes = jnp.array([[3, -1], [-1, -1], [V, 2], [-2, 2], [5, 5], [0, 1]])
    bad = np.array([False, False, True, True, False, False])

    def f(z, where=None):
        return statistics(source, z, classes, where=where)

    def total(z, where=None):
        of_slots, others = f(z, where)
        return jnp.sum(jnp.where(jnp.isfinite(of_slots), of_slots, 0)) + jnp.sum(others * 0.5)

    with harness.blocks(source):
        of_slots, others = jax.jit(f, compiler_options=QUICK)(z)
        np.testing.assert_array_equal(np.isnan(of_slots).all(-1), bad)
        np.testing.assert_array_equal(np.isnan(others), bad)
        np.testing.assert_array_equal(np.isneginf(of_slots[:2]), [[False, True], [True, True]])
        assert others[1] == 0  # all classes are others
        np.testing.assert_array_equal(of_slots[4, 0], of_slots[4, 1])
        slope = jax.jit(jax.grad(total), compiler_options=QUICK)(z, ~jnp.asarray(bad))
        assert np.isfinite(slope).all() and (slope[bad] == 0).all() and (slope[1] == 0).all()


def test_an_empty_slot_has_no_gradient():
    """Whatever its cotangent, as behind a log-sum-exp over a set of another size."""
    z = jnp.asarray(rows()[0][:1])
    of_set = lambda z: jax.nn.logsumexp(statistics("dense", z, jnp.array([[3, 7, -1]]))[0])  # noqa: E731
    without = lambda z: jax.nn.logsumexp(statistics("dense", z, jnp.array([[3, 7]]))[0])  # noqa: E731
    found, want = (jax.jit(jax.value_and_grad(f), compiler_options=QUICK)(z) for f in (of_set, without))
    chex.assert_trees_all_close(found, want, rtol=1e-6)


def test_classes_out_of_force_have_no_mass():
    z, mask = jnp.asarray(rows()[0][:2]), np.arange(V) != 4
    of_slots, others = statistics("dense", z, jnp.array([[4, 5]] * 2), class_mask=mask)
    want = statistics("dense", z[:, mask], jnp.array([[-1, 4]] * 2))
    np.testing.assert_allclose(of_slots, want[0], rtol=1e-6)
    np.testing.assert_allclose(others, want[1], rtol=1e-6)


@pytest.mark.parametrize("number", [0, V])
def test_no_class_and_all_of_them(number):
    z = jnp.asarray(rows()[0])
    classes = jnp.broadcast_to(jnp.arange(number)[None], (N, number))
    (of_slots, others), vjp = jax.vjp(lambda z: statistics("dense", z, classes), z)
    assert of_slots.shape == (N, number)
    assert (others == (-jnp.inf if number else 0)).all()
    assert (vjp((jnp.zeros_like(of_slots), jnp.ones(N)))[0] == 0).all()
    if number:
        np.testing.assert_allclose(of_slots, jax.nn.log_softmax(z), rtol=1e-5, atol=1e-6)


EDGES = {  # the classes of which the last two logits are -inf, and have no mass
    "none": [[-1, -1]],
    "all with mass": [[0, 1]],
    "all": [[0, 1, 2, 3]],
    "all without mass": [[2, 3]],
    "no slots": np.zeros((1, 0), int),
}


@pytest.mark.parametrize("name", EDGES)
def test_second_derivatives_where_a_part_has_no_mass(name):
    """The others' mass is 0 or 1 whatever the logits are."""
    z, dz = jnp.array([[0.3, 1.0, -jnp.inf, -jnp.inf]]), jnp.array([[0.3, -0.2, 0.5, 0.1]])
    f = lambda z: jnp.exp(statistics("dense", z, jnp.array(EDGES[name]))[1]).sum()  # noqa: E731

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(z):
        slope = jax.grad(f)
        along = lambda z: jax.jvp(f, (z,), (dz,))[1]  # noqa: E731
        reverse = jax.grad(lambda z: jnp.vdot(slope(z), dz))(z)
        return f(z), slope(z), reverse, jax.jvp(slope, (z,), (dz,))[1], jax.jvp(along, (z,), (dz,))[1]

    value, *derivatives = run(z)
    assert value == (1 if name in ("none", "no slots", "all without mass") else 0)
    assert all((x == 0).all() for x in derivatives)


def test_class_axis_in_front():
    z, classes = rows()
    s = jaxent.softmax_statistics(z.T, classes=classes.T, axis=0)
    want = statistics("dense", z, classes)
    np.testing.assert_allclose(s.class_log_probs, want[0].T, rtol=1e-6)
    np.testing.assert_allclose(s.other_log_prob, want[1], rtol=1e-6)


def test_many_are_scattered(monkeypatch):
    z, classes = rows()
    run = lambda: jax.vjp(lambda z: statistics("dense", z, classes), jnp.asarray(z))  # noqa: E731
    want, vjp = run()
    monkeypatch.setattr(_chosen, "COMPARED", 1)
    found, again = run()
    ct = jax.tree.map(jnp.ones_like, want)
    chex.assert_trees_all_close((found, again(ct)), (want, vjp(ct)), rtol=1e-6)


@pytest.fixture
def groups(monkeypatch):
    """Of 4 classes in place of 32; how often they were used."""
    used, of_groups = [], _others._by_groups
    monkeypatch.setattr(_others, "FOLDS", 4)
    monkeypatch.setattr(_others, "LANES", 1)
    monkeypatch.setattr(_others, "_by_groups", lambda *x: used.append(1) or of_groups(*x))
    return used


@pytest.mark.parametrize("source", SOURCES)
def test_values_by_groups(source, groups, monkeypatch):
    monkeypatch.setattr(_others, "MOST", 4)  # for blocks of 11 classes
    test_values(source)
    assert groups


# classes of V = 43, of which 0 to 39 are in the groups 0 to 9: j % 10
SETS = {
    "of several groups": [3, 17, 41],
    "of one group": [3, 13, 33],
    "twice": [17, 17, 27],
    "of no group": [40, 41, 42],
    "empty slots": [-1, 5, -1],
    "none": [-1, -1, -1],
    "with the largest": [8, 0, 1],
    "-inf in a group": [2, 12, 4],
    "NaN in a group": [19, 1, 2],
    "NaN in another group": [19, 1, 2],
    "bad": [43, 1, 2],
    "a group of -inf": [6, 1, 2],
}


def test_groups_as_they_are():
    """32 classes each; 33 are scattered."""
    rng, size = np.random.default_rng(2), 3 * 4096 + 77
    z = jnp.asarray(3 * rng.normal(size=(4, size)), jnp.float32)
    for slots in (3, 32, 33):
        classes = jnp.asarray(rng.integers(size, size=(4, slots)), jnp.int32)
        f = jax.jit(functools.partial(statistics, "dense"), compiler_options=QUICK)
        found = f(z, classes)[1]
        e, members = np.exp(np.float64(z)), np.asarray(classes)
        left = np.copy(e)
        np.put_along_axis(left, members, 0, -1)
        np.testing.assert_allclose(found, np.log(left.sum(-1) / e.sum(-1)), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask", [None, "[V]", "[N, V]"])
def test_groups(mask, dtype, groups, monkeypatch):
    """As without them: values, gradients, their derivatives."""
    names, rng = list(SETS), np.random.default_rng(1)
    classes = jnp.array(list(SETS.values()))
    z = rng.normal(size=(len(SETS), 43))
    z[names.index("with the largest"), 8] = 90
    z[names.index("-inf in a group"), 22] = -np.inf
    z[names.index("NaN in a group"), 29] = np.nan
    z[names.index("NaN in another group"), 24] = np.nan
    z[names.index("a group of -inf"), [6, 16, 26, 36]] = -np.inf
    z, shape = jnp.asarray(z, dtype), {None: None, "[V]": (43,), "[N, V]": z.shape}[mask]
    in_force = None if shape is None else jnp.asarray(rng.random(shape) < 0.8)

    def everything(z):
        f = lambda z: statistics("dense", z, classes, class_mask=in_force)[1]  # noqa: E731
        slope = lambda z: jax.grad(lambda z: jnp.sum(jnp.cos(f(z))))(z)  # noqa: E731
        return f(z), slope(z), *jax.jvp(f, (z,), (z,)), jax.jvp(slope, (z,), (jnp.cos(z),))[1]

    found = everything(z)
    assert groups
    monkeypatch.setattr(_others, "FOLDS", 43)
    groups.clear()
    want = everything(z)
    assert not groups
    rtol = 1e-5 if dtype == "float32" else 1e-2
    chex.assert_trees_all_close(found, want, rtol=rtol, atol=1e-6)
    bad = [name for name, x in zip(names, found[0], strict=True) if np.isnan(x)]
    assert set(bad) <= {"NaN in a group", "NaN in another group", "bad"} and "bad" in bad


@pytest.mark.parametrize("source", ["dense", "rows", "classes"])
def test_transformations(source):
    """Beside jax.nn: second derivatives, and forward mode of an array."""
    z, classes = map(jnp.asarray, rows())
    z, classes = z[8:12], classes[8:12]
    hit = (jnp.arange(V, dtype=jnp.int32)[None, None] == classes[..., None]).any(1)

    def plain(z):
        log_p = jax.nn.log_softmax(z)
        return jnp.take_along_axis(log_p, classes, -1), jax.nn.logsumexp(jnp.where(hit, -jnp.inf, log_p), -1)

    def total(f):
        return lambda z: sum(jnp.sum(jnp.cos(3.0 * x) * x) for x in f(z))

    dz = jnp.sin(jnp.arange(z.size, dtype=jnp.float32)).reshape(z.shape)

    def everything(f):
        found = {
            "jvp of grad": jax.jvp(jax.grad(total(f)), (z,), (dz,))[1],
            "grad of checkpoint": jax.grad(jax.checkpoint(total(f)))(z),
        }
        if source == "dense":
            found["jvp"] = jax.jvp(total(f), (z,), (dz,))[1]
            found["hessian"] = jax.hessian(lambda row: total(f)(z.at[0].set(row)))(z[0])
        return found

    with harness.blocks(source), jax.numpy_rank_promotion("allow"):
        of = functools.partial(statistics, source, classes=classes)
        found, want = jax.jit(lambda: (everything(of), everything(plain)), compiler_options=QUICK)()
    for name, x in want.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-4, atol=1e-4, err_msg=name)


def test_forward_mode_of_a_row_that_is_sure():
    """The chosen class is so far above the others that exp of the difference is infinite."""
    z = jnp.array([[120.0, 0.0, 1.0, 2.0]])
    f = lambda z: statistics("dense", z, jnp.array([[0]]))[1]  # noqa: E731
    forward, reverse = jax.jit(lambda z: (jax.jacfwd(f)(z), jax.jacrev(f)(z)), compiler_options=QUICK)(z)
    np.testing.assert_allclose(forward, reverse, rtol=1e-6)


def test_mapped_over():
    z, classes = map(jnp.asarray, rows())
    f = lambda z, c: statistics("dense", z, c)  # noqa: E731
    chex.assert_trees_all_close(jax.vmap(f)(z, classes), f(z, classes), rtol=1e-6)


def test_a_function_of_one_row_sees_its_classes():
    z, classes = map(jnp.asarray, rows())
    shapes = []

    def fn(s, weights):
        shapes.append((s.class_log_probs.shape, s.other_log_prob.shape))
        return -jnp.vdot(weights, s.class_log_probs) - s.other_log_prob

    weights = jnp.cos(jnp.arange(N * K, dtype=jnp.float32)).reshape(N, K)
    found = jaxent.softmax_loss(fn, z, None, weights, classes=classes, reduction="none")
    of_slots, others = statistics("dense", z, classes)
    np.testing.assert_allclose(found, -jnp.sum(weights * of_slots, -1) - others, rtol=1e-5, atol=1e-5)
    assert set(shapes) == {((K,), ())}


ERRORS = {
    "floats": (np.zeros((N, K), np.float32), TypeError, "`classes` must be integers, but is float32[24, 3]."),
    "of another number of rows": (
        np.zeros((N + 1, K), np.int32),
        ValueError,
        "of shape [24, K], but is int32[25, 3].",
    ),
    "one per row": (np.zeros(N, np.int32), ValueError, "of shape [24, K], but is int32[24]."),
    "a list": ([[0]], TypeError, "`classes` must be an array, but is a list."),
    "out of range": (
        np.full((N, K), V),
        ValueError,
        "`classes` must be in [0, 40), but is 40 at index [0, 0].",
    ),
    "2^32": (np.full((N, K), 2**32 + 1), ValueError, "`classes` must be in [0, 40), but is 4294967297"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    classes, kind, words = ERRORS[name]
    with pytest.raises(kind) as error:
        jaxent.softmax_statistics(rows()[0], classes=classes)
    assert str(error.value).startswith("jaxent.softmax_statistics: `classes` must be ") and words in str(
        error.value
    )


def test_fields_need_classes():
    z = rows()[0]
    with pytest.raises(ValueError, match="`names` must be some of"):
        jaxent.softmax_statistics(z, names=("other_log_prob",))
    with pytest.raises(TypeError, match="`classes` must be given for `fn` to read `other_log_prob`"):
        jaxent.softmax_loss(lambda s: s.other_log_prob, z, None)
    s = jaxent.softmax_statistics(z)
    assert s.class_log_probs is None and s.other_log_prob is None


def test_checkify_names_a_bad_class():
    f = checkify.checkify(jax.jit(lambda z, c: statistics("dense", z, c)))
    z = jnp.asarray(rows()[0][:2])
    error, _ = f(z, jnp.array([[0, -1], [1, 2]]))
    error.throw()
    error, _ = f(z, jnp.array([[0, 1], [2, V]]))
    with pytest.raises(ValueError, match=r"`classes` must be in \[0, 40\).* element 3 .* is 40"):
        error.throw()
