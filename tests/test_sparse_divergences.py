"""KL and JS to the few classes of a `SparseDistribution`: what they are on paper, and between which bounds.

test_sparse_divergence_forms.py has temperatures, transformations and costs, test_covering.py every pair of options
beside an oracle, test_sparse_errors.py the contracts.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import harness
import jaxent
from few_classes_on_paper import (
    NAMES,
    ROW_CLASSES,
    ROW_LOGITS,
    ROW_PROBS,
    ROWS,
    TEMPERATURE,
    Z,
    exact,
    row_on_paper,
    table,
)
from jaxent import SparseDistribution
from layers import compiled

F32 = np.float32
kl, js = jaxent.softmax_kl_divergence, jaxent.softmax_js_divergence
BETAS = (0.0, 0.3, 1 - 2.0**-20, 1.0)
RESTS = ("bucket", "ignore")


def all_slopes(beta, rest):
    """Values and gradients by logits, probabilities and a temperature per row, of all rows."""

    def f(z, probs, temperature):
        q = SparseDistribution(jnp.asarray(ROW_CLASSES), probs)
        return js(z, q, temperature=temperature, beta=beta, rest=rest)

    def run(*x):
        value, vjp = jax.vjp(f, *x)
        return value, *vjp(jnp.ones_like(value))

    return run


def norm_of(x):
    return np.linalg.norm(np.longdouble(x))


@pytest.mark.parametrize("classes", [(0, 1, 2), (0, 1, 0)])
def test_a_little_mass_of_the_others(classes):
    """What the probabilities leave, down to 1e-6, is as exact as they are: 1 - their sum is not, in float32."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(4000, 9)).astype(F32)
    probs = rng.dirichlet(np.full(4, 0.3), size=4000)[:, :3].astype(F32)
    left = 1 - np.longdouble(probs).sum(-1)
    ordinary = (left > 1e-6) & (probs.min(-1) > 1e-6)
    assert left[ordinary].min() < 2e-6
    z, probs, left = z[ordinary], probs[ordinary], left[ordinary]

    def total(probs):
        slots = jnp.broadcast_to(jnp.asarray(classes), probs.shape)
        return jnp.sum(js(z, SparseDistribution(slots, probs), beta=1.0))

    p = np.exp(np.longdouble(z))
    p /= p.sum(-1, keepdims=True)
    same = np.equal.outer(classes, classes)
    others = np.isin(np.arange(9), classes, invert=True)
    terms = p[:, others].sum(-1, keepdims=True) / left[:, None], p[:, classes] / (np.longdouble(probs) @ same)
    want, size = terms[0] - terms[1], np.maximum(*terms).max(-1)
    error = np.abs(np.asarray(compiled(jax.grad(total))(jnp.asarray(probs))) - want).max(-1)
    assert np.all(error < 1e-6 * size)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_and_gradients(dtype):
    with jax.enable_x64(dtype == "float64"):
        wide = np.dtype(dtype).type
        inputs = wide(ROW_LOGITS), wide(ROW_PROBS), np.full(len(ROWS), TEMPERATURE, dtype)
        forms = [(beta, rest) for beta in BETAS for rest in RESTS]
        found = compiled(lambda *x: [all_slopes(*form)(*x) for form in forms])(*inputs)
    rtol = 1e-5 if dtype == "float32" else 1e-13
    for (beta, rest), got in zip(forms, found, strict=True):
        value, *slopes = map(np.longdouble, got)
        for i, (name, (want, want_slopes)) in enumerate(zip(NAMES, table(beta, rest), strict=True)):
            what = f"{name}, beta {beta}, {rest}"
            np.testing.assert_allclose(value[i], want, rtol=rtol, atol=1e-37, err_msg=what)
            assert np.isfinite(slopes[0][i]).all(), what
            if want_slopes is None:
                continue
            pairs = [(slopes[0][i], want_slopes[0])]
            if rest == "ignore" or ROW_PROBS[i].sum() < 1:  # where a rest begins it has no derivative
                named = ROW_CLASSES[i] >= 0
                pairs.append((slopes[1][i][named], want_slopes[1][named]))
            if np.isfinite(ROW_LOGITS[i]).all():
                pairs.append((slopes[2][i], want_slopes[2][0]))
            for g, w in pairs:
                # of sums of both signs, by a number that is of the size of their terms
                assert norm_of(g - w) <= rtol * norm_of(w) + 1e-37, (what, g, w)


def test_a_beta_that_is_traced():
    """One program for all; its derivative between the ends is KL(q || h) - KL(p || h)."""
    rows = [i for i in range(len(NAMES)) if np.isfinite(ROW_LOGITS[i]).all()]
    z, classes, probs = (x[rows] for x in (ROW_LOGITS, ROW_CLASSES, ROW_PROBS))

    def f(z, probs, beta, rest):
        q = SparseDistribution(jnp.asarray(classes), probs)
        return js(z, q, temperature=TEMPERATURE, beta=beta, rest=rest)

    def slopes(beta, rest):
        value, vjp = jax.vjp(functools.partial(f, rest=rest), z, probs, beta)
        return value, *vjp(jnp.ones_like(value))

    @compiled
    def run(betas):
        each = jnp.broadcast_to(betas[:, None], (len(BETAS), len(rows)))
        return [
            (jax.vmap(lambda b, rest=rest: slopes(b, rest))(each), slopes(betas[1], rest)) for rest in RESTS
        ]

    betas = F32(BETAS)
    for rest, (each, one) in zip(RESTS, run(jnp.asarray(betas)), strict=True):
        for k, beta in enumerate(betas.astype(float)):
            for n, i in enumerate(rows):
                row = ROW_LOGITS[i], ROW_CLASSES[i], ROW_PROBS[i], TEMPERATURE, beta, rest
                want, want_slopes = row_on_paper(*row)
                value, dz, _, by_beta = (x[k, n] for x in each)
                np.testing.assert_allclose(np.longdouble(value), want, rtol=1e-5, atol=1e-30)
                if want_slopes is None:
                    assert np.isfinite(dz).all()
                    continue
                assert norm_of(np.longdouble(dz) - want_slopes[0]) <= 1e-5 * norm_of(want_slopes[0]) + 1e-30
                if beta in (0, 1):
                    continue
                size = abs(want_slopes[2][1]) + 4 * abs(want)
                assert abs(np.longdouble(by_beta) - want_slopes[2][1]) <= 1e-5 * size + 1e-30
        np.testing.assert_allclose(one[0], each[0][1], rtol=1e-6)
        np.testing.assert_allclose(one[3], each[3][1].sum(), rtol=1e-5)


# Slots that are empty, a rest that is a rounding, ends of beta, sure rows.

ONE = jnp.asarray([[1.0, 0.0, -1.0, 0.5]])


def of_one(probs, classes, beta=0.0, **options):
    return js(ONE, SparseDistribution(jnp.asarray([classes]), probs), beta=beta, **options).sum()


def test_a_beta_that_is_an_array_stays_in_no_rule():
    q = SparseDistribution(jnp.array([[0, 1], [2, 3]]), jnp.full((2, 2), 0.3))
    with jax.checking_leaks():
        found = jaxent.softmax_js_divergence(jnp.ones((2, 5)), q, beta=jnp.float32(0.25))
    np.testing.assert_allclose(found, jaxent.softmax_js_divergence(jnp.ones((2, 5)), q, beta=0.25), rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_slot_without_mass_is_gone_whatever_its_class(beta):
    probs = jnp.asarray([[0.625, 0.0]])
    np.testing.assert_allclose(of_one(probs, [0, 1], beta), of_one(probs, [0, -1], beta), rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_an_empty_slot_has_no_gradient(beta):
    assert jax.grad(of_one)(jnp.asarray([[0.625, 0.0]]), [0, -1], beta)[0, 1] == 0


def test_all_classes_with_probabilities_that_are_rounded():
    t = F32(2 * np.random.default_rng(0).normal(size=(64, 6)))
    places = jnp.broadcast_to(jnp.arange(6), t.shape)
    probs = jax.nn.softmax(t)
    assert (1 - probs.sum(-1) > 0).any()
    np.testing.assert_allclose(kl(t + 1, SparseDistribution(places, probs)), 0, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"class_mask": np.array([True, True, True, False])}], ids=["-inf", "mask"]
)
def test_the_derivative_by_a_temperature_beside_minus_infinity(options):
    z = ONE.at[0, 3].set(-jnp.inf)
    q = SparseDistribution(jnp.asarray([[0, 1]]), jnp.asarray([[0.5, 0.25]]))
    assert np.isfinite(jax.grad(lambda t: kl(z, q, temperature=t, **options).sum())(jnp.float32(1.5)))


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_beta_has_no_derivative_at_the_ends(beta):
    z, q = Z[None], SparseDistribution(jnp.asarray([[0, 1, 3]]), jnp.asarray([[0.5, 0.25, 0.125]]))
    assert jax.grad(lambda b: js(z, q, beta=b).sum())(jnp.float32(beta)) == 0


# What holds for all rows.

N = 6
FORMS = [(11, 3, "float32"), (40, 36, "float32"), (11, 1, "bfloat16"), (11, 3, "float64")]
settings = hypothesis.settings(deadline=None, derandomize=True, max_examples=40, database=None)
seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([1e-3, 0.3, 1.0, 5.0, 40.0, 300.0])


@functools.cache
def bounded(classes, slots, dtype):
    def top_k(z, temperature):
        z = z.astype(jnp.float64 if dtype == "float64" else jnp.float32)
        return jax.lax.top_k(jax.nn.softmax(z / temperature), slots)

    def run(z, t, temperature):
        (probs, places), (own, own_places) = top_k(t, temperature), top_k(z, temperature)
        of_few, of_own = SparseDistribution(places, probs), SparseDistribution(own_places, own)
        of = functools.partial
        losses = [of(kl, temperature=temperature), of(js, temperature=temperature)]
        losses.append(of(js, temperature=temperature, beta=0.9))
        return [(f(z, of_few), f(z, t), f(z, of_own)) for f in losses], 1 - probs.sum(-1), 1 - own.sum(-1)

    return compiled(run)


@settings
@hypothesis.given(st.sampled_from(FORMS), seeds, scales, scales, st.sampled_from([0.5, 1.0, 2.0]))
def test_bounds(form, seed, scale, other, temperature):
    """Never negative, never above the divergence from the whole teacher, and 0 to the student's own classes.

    Where a rest is as small as the roundings of what is named, so is what is known of it.
    """
    classes, _, dtype = form
    rng = np.random.default_rng(seed)
    with jax.enable_x64(dtype == "float64"):
        z, t = (harness.cast(x * rng.normal(size=(N, classes)), dtype) for x in (scale, other))
        losses, rest, own_rest = bounded(*form)(z, t, temperature)
        eps = float(np.finfo(rest.dtype).eps)
    for few, full, own in losses:
        few, full, own = (np.float64(x) for x in (few, full, own))
        assert (few >= 0).all() and (own >= 0).all()
        # of each class q log(q / p) is off by a few roundings of q and of the logs
        size = 1 + np.float64(np.ptp(np.float64(z), -1) + np.ptp(np.float64(t), -1)) / temperature
        assert (few <= full + 4 * eps * size).all()
        unsure = np.maximum(np.float64(own_rest), 0) < 64 * eps
        assert (own <= np.where(unsure, 64 * eps, 1e-12 + (16 * eps) ** 2 / np.maximum(own_rest, eps))).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_all_classes(dtype):
    """Then no others are there, and it is the divergence itself; in any order, and with one more in force."""
    with jax.enable_x64(dtype == "float64"):
        wide = np.dtype(dtype).type
        q, z = wide(exact(8, 7)), wide(np.random.default_rng(1).normal(size=(8, 7)))
        places = np.stack([np.random.default_rng(i).permutation(7) for i in range(8)]).astype(np.int32)
        probs = np.take_along_axis(q, places, -1)
        mask = np.arange(8) < 7

        @compiled
        def run(z, probs):
            few = SparseDistribution(jnp.asarray(places), probs)
            more = jnp.pad(z, ((0, 0), (0, 1)), constant_values=jnp.nan)
            pairs = []
            for beta in (0.0, 0.3, 1.0):
                f = functools.partial(js, beta=beta)
                pairs.append((f(z, few), f(z, jnp.log(q)), f(more, few, class_mask=mask)))
            return pairs

        for few, full, masked in run(z, probs):
            np.testing.assert_allclose(few, full, rtol=1e-12 if dtype == "float64" else 2e-6)
            np.testing.assert_allclose(masked, few, rtol=1e-6)


def test_next_to_the_ends():
    """Of the bucket: what is left out is no part of a sum of two distributions."""
    rng = np.random.default_rng(2)
    z, probs = F32(rng.normal(size=(40, 11))), exact(40, 4)[:, :3]
    places = np.argsort(rng.normal(size=(40, 11)), -1)[:, :3].astype(np.int32)

    @compiled
    def run(z, probs):
        q = SparseDistribution(jnp.asarray(places), probs)
        low = [js(z, q, beta=b) / b for b in (1e-8, 1e-12, 1e-20)]
        high = [js(z, q, beta=1 - c) / c for c in (2.0**-30, 2.0**-50)]
        return (js(z, q, beta=0.0), kl(z, q), js(z, q, beta=1.0)), low, high

    (forward, want, reverse), low, high = run(z, probs)
    np.testing.assert_array_equal(forward, want)
    for got in low:
        np.testing.assert_allclose(got, forward, rtol=1e-6)
    for got in high:
        np.testing.assert_allclose(got, reverse, rtol=1e-6)


@pytest.mark.parametrize("source", ["dense", "rows", "classes"])
def test_a_target_that_sums_to_1(source):
    """The others have mass where the target has none: infinite by reverse KL in a bucket, and only so."""
    rng = np.random.default_rng(3)
    z, probs = F32(rng.normal(size=(6, 11))), exact(6, 3)
    places = np.argsort(rng.normal(size=(6, 11)), -1)[:, :3].astype(np.int32)

    def value_and_slopes(z, probs, **options):
        def f(z, probs):
            layer = z if source == "dense" else harness.as_layer(z)
            return js(layer, SparseDistribution(jnp.asarray(places), probs), **options)

        value, vjp = jax.vjp(f, z, probs)
        return value, vjp(jnp.ones_like(value))

    forms = {"reverse": {"beta": 1.0}, "forward": {"beta": 0.0}, "between": {"beta": 0.9}}
    forms |= {f"{name}, ignore": {**x, "rest": "ignore"} for name, x in forms.items()}
    with harness.blocks(source):
        found = compiled(lambda *x: {name: value_and_slopes(*x, **of) for name, of in forms.items()})(
            z, probs
        )
    for name, (value, slopes) in found.items():
        assert np.isposinf(value).all() if name == "reverse" else np.isfinite(value).all(), name
        assert not any(np.isnan(x).any() for x in slopes), name
    e = np.exp(np.float64(z))
    p = np.take_along_axis(e / e.sum(-1, keepdims=True), places, -1)
    want = (p * np.log(p / probs)).sum(-1)
    np.testing.assert_allclose(found["reverse, ignore"][0], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_next_to_the_teacher(dtype, beta):
    """A student that is off by 1e-4: of p - q what the rounding of log p and of a sum of q leaves, and no less."""
    rng = np.random.default_rng(4)
    rows, classes, slots = 200, 11, 3
    t = rng.normal(size=(rows, classes))
    z = t + 1e-4 * rng.normal(size=t.shape)
    with jax.enable_x64(dtype == "float64"):
        wide = np.dtype(dtype).type
        eps, z = np.finfo(wide).eps, wide(z)
        q = np.exp(t) / np.exp(t).sum(-1, keepdims=True)
        places = np.argsort(-q, -1)[:, :slots].astype(np.int32)
        probs = np.take_along_axis(q, places, -1).astype(wide)

        def f(z):
            return js(z, SparseDistribution(jnp.asarray(places), jnp.asarray(probs)), beta=beta)

        value, gradient = compiled(lambda z: (f(z), jax.grad(lambda z: f(z).sum())(z)))(z)
    e = np.exp(np.longdouble(z))
    p = e / e.sum(-1, keepdims=True)
    named = (np.arange(classes) == places[..., None]).any(-2)
    missing = 1 - np.longdouble(probs).sum(-1)
    others = np.where(named, 0, p).sum(-1)
    p_k = np.append(np.take_along_axis(p, places, -1), others[:, None], -1)
    q_k = np.append(np.longdouble(probs), missing[:, None], -1)
    d = np.log(q_k / p_k)
    h = (1 - beta) * p_k + beta * q_k
    of_p, of_q = ((x * np.log(x / h)).sum(-1) for x in (p_k, q_k))
    want = of_q if beta == 0 else of_p if beta == 1 else (1 - beta) * of_p + beta * of_q
    # by log p of each of them, and then by the logits
    l_p = np.log(p_k / h)
    by_log = -q_k if beta == 0 else p_k * l_p * (1 if beta == 1 else 1 - beta)
    slope = np.zeros_like(p)
    np.put_along_axis(slope, places, by_log[:, :slots], -1)
    slope += np.where(named, 0, p / others[:, None]) * by_log[:, -1:]
    slope -= p * by_log.sum(-1, keepdims=True)
    share = 1 if beta in (0, 1) else 0.5
    # d is off by this, and so is the value by its square and by its product with d
    off = 4 * eps * (1 + np.abs(np.log(q_k)) + np.abs(np.log(p_k))) + eps / q_k * (
        np.arange(slots + 1) == slots
    )
    harness.assert_within(value, want, (q_k * (np.abs(d) * off + off**2)).sum(-1) * share + 1e-18, "value")
    bound = np.linalg.norm(q_k * off, axis=-1) * share
    error = np.linalg.norm(np.longdouble(gradient) - slope, axis=-1)
    harness.assert_within(error, 0 * error, bound, "gradient")
    assert np.median(bound / np.linalg.norm(slope, axis=-1)) < (1e-1 if dtype == "float32" else 1e-9)
