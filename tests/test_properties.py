"""Identities that hold for any logits, on inputs that hypothesis picks; shapes are few, so little is compiled."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import harness
import jaxent
import oracle
from jaxent._block import Block
from jaxent._gradient import logits_gradient
from jaxent._statistics import finish, merge, partial_statistics

N, V = 6, 11
EPS = float(np.finfo(np.float32).eps)
given = hypothesis.given
settings = hypothesis.settings(deadline=None, derandomize=True, max_examples=30, database=None)

seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([1e-3, 0.3, 1.0, 5.0, 40.0, 300.0])
value = functools.partial(harness.value, quick=True)
ce = functools.partial(value, "softmax_cross_entropy")
grad = functools.partial(harness.gradients, "softmax_cross_entropy", quick=True)


def draw(seed, scale, classes=V):
    """Logits that float32 holds, labels, a distribution, weights."""
    rng = np.random.default_rng([seed, classes])
    z = (rng.normal(size=(N, classes)) * scale).astype(np.float32).astype(np.float64)
    q = rng.dirichlet(np.full(classes, 0.5), size=N).astype(np.float32).astype(np.float64)
    return z, rng.integers(classes, size=N), q, rng.integers(1, 32, size=N) / 16


def assert_close(a, b, ulp=8):
    """Both are a few roundings of the same number."""
    harness.assert_within(a, b, ulp * EPS * np.abs(b) + 1e-37)


@settings
@given(seeds, scales, st.integers(-20_000, 20_000))
def test_a_shift_of_all_logits_changes_nothing(seed, scale, shift):
    z, labels, _, _ = draw(seed, scale)
    z = np.round(z * 256) / 256 if scale < 100 else np.round(z)  # so that the shift is exact
    assert_close(ce(z + shift, labels), ce(z, labels))
    (moved,), (still,) = (grad(x, labels, cotangent=np.ones(N)) for x in (z + shift, z))
    harness.assert_within(moved, still, 4 * EPS)


@settings
@given(seeds, scales)
def test_the_order_of_classes_does_not_matter(seed, scale):
    z, labels, q, _ = draw(seed, scale)
    order = np.random.default_rng(seed).permutation(V)
    assert_close(ce(z[:, order], np.argsort(order)[labels]), ce(z, labels))
    assert_close(ce(z[:, order], q[:, order]), ce(z, q))


@settings
@given(seeds, scales)
def test_binary_cross_entropy_per_element_is_twice_that_of_two_classes(seed, scale):
    """For logits (z, -z) and one-hot labels: each sigmoid sees z, the softmax sees 2z; with z / 2 they agree."""
    z, labels, _, _ = draw(seed, scale, classes=2)
    pair = np.stack([z[:, 0], -z[:, 0]], -1)
    binary = np.logaddexp(0, np.where(labels == 0, -1, 1) * pair[:, 0])
    elementwise = value("sigmoid_cross_entropy", pair, np.eye(2)[labels]).sum(-1)
    softmax = ce(pair / 2, labels)
    harness.assert_within(softmax, binary, 8 * EPS * binary + 1e-37)
    assert_close(elementwise, 2 * softmax)


@settings
@given(seeds, scales, scales)
def test_kl_is_cross_entropy_less_entropy(seed, scale, other):
    z, _, _, _ = draw(seed, scale)
    t, _, _, _ = draw(seed + 1, other)
    log_q = t - t.max(-1, keepdims=True)
    q = np.exp(log_q) / np.exp(log_q).sum(-1, keepdims=True)
    cross, entropy = ce(z, q), value("softmax_entropy", t)
    size = cross + np.abs(entropy)
    harness.assert_within(value("softmax_kl_divergence", z, t), cross - entropy, 16 * EPS * size)


@settings
@given(seeds, scales)
def test_a_one_hot_distribution_is_a_label(seed, scale):
    z, labels, _, _ = draw(seed, scale)
    one_hot = np.eye(V)[labels]
    for options in ({}, {"label_smoothing": 0.25, "z_loss": 0.5}):
        assert_close(ce(z, one_hot, **options), ce(z, labels, **options))
        by_label = grad(z, labels, cotangent=np.ones(N), **options)[0]
        by_one_hot = grad(z, one_hot, cotangent=np.ones(N), **options)[0]
        size = np.abs(by_label).max(-1, keepdims=True)
        harness.assert_within(by_one_hot, by_label, 8 * EPS * size)


@settings
@given(seeds, scales)
def test_smoothing_interpolates(seed, scale):
    z, labels, _, _ = draw(seed, scale)
    hard, uniform = ce(z, labels), ce(z, labels, label_smoothing=1.0)
    for a in (0.125, 0.5):
        assert_close(ce(z, labels, label_smoothing=a), (1 - a) * hard.astype(np.float64) + a * uniform)


@settings
@given(seeds, scales, st.lists(st.booleans(), min_size=N, max_size=N))
def test_masked_rows_are_removed_rows(seed, scale, where):
    z, labels, _, weights = draw(seed, scale)
    where = np.array(where)
    dirty = np.where(where[:, None], z, np.nan)
    options = {"weights": weights, "reduction": "mean"}
    got = ce(dirty, labels, where=where, **options)
    want = oracle.softmax_cross_entropy(z[where], labels[where], weights=weights[where], reduction="mean")
    assert_close(got, want)
    (gradient,) = grad(dirty, labels, cotangent=np.float64(1), where=where, **options)
    assert (gradient[~where] == 0).all() and np.isfinite(gradient).all()


@settings
@given(seeds, scales, st.lists(st.integers(0, 2), min_size=N, max_size=N))
def test_a_mean_over_chunks_is_the_mean_over_all(seed, scale, chunk):
    z, labels, _, weights = draw(seed, scale)
    chunk, total, weight = np.array(chunk), 0.0, 0.0
    for k in range(3):
        inside = chunk == k
        mean = ce(z, labels, where=inside, weights=weights, reduction="mean")
        assert np.isfinite(mean)
        total, weight = total + mean * weights[inside].sum(), weight + weights[inside].sum()
    assert_close(ce(z, labels, where=chunk >= 0, weights=weights, reduction="mean"), total / weight)


@settings
@given(seeds, scales)
def test_gradient_rows_sum_to_zero(seed, scale):
    z, labels, q, _ = draw(seed, scale)
    for targets, options in ((labels, {}), (labels, {"label_smoothing": 0.25}), (q, {})):
        gradient = grad(z, targets, cotangent=np.ones(N), **options)[0].astype(np.float64)
        # XLA may flush what is below `tiny` to 0
        allowed = 8 * EPS * np.abs(gradient).sum(-1) + np.finfo(np.float32).tiny
        harness.assert_within(gradient.sum(-1), np.zeros(N), allowed)


@settings
@given(seeds, scales, st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 3.0, 100.0]))
def test_divergences_are_not_negative(seed, scale, step):
    z, _, _, _ = draw(seed, scale)
    t = (z + step * np.random.default_rng(seed).normal(size=z.shape)).astype(np.float32)
    kl, js = (value(f"softmax_{name}_divergence", z, t) for name in ("kl", "js"))
    assert (kl >= 0).all() and (js >= 0).all() and (js <= np.float32(np.log(2)) * (1 + EPS)).all()
    assert_close(value("softmax_js_divergence", t, z), js, ulp=200)  # differs in rounding only
    if step == 0:
        assert (kl == 0).all() and (js == 0).all()


@settings
@given(seeds, scales)
def test_entropy_is_between_0_and_log_v(seed, scale):
    entropy = value("softmax_entropy", draw(seed, scale)[0])
    assert (entropy >= 0).all() and (entropy <= np.float32(np.log(V)) * (1 + 2 * EPS)).all()


NAMES = ("log_prob", "mean_log_prob", "log_normalizer", "entropy")


@functools.partial(jax.jit, static_argnames="order")
def merged(z, target, assignment, ct, order):
    """Statistics and gradient from three blocks of classes; those of other blocks are masked away."""
    blocks = []
    for k in range(3):
        inside = assignment == k
        if target.ndim == 1:
            hit = jnp.any((jnp.arange(V)[None] == target[:, None]) & inside[None], -1)
            label = jnp.where(hit, target, V + 1)  # V + 1: in another block
            blocks.append(Block(z, label, None, None, inside))
        else:
            blocks.append(Block(z, None, jnp.where(inside[None], target, 0), None, inside))
    parts = [partial_statistics(NAMES, block) for block in blocks]
    if order == "left":
        whole = merge(merge(parts[0], parts[1]), parts[2])
    else:
        whole = merge(parts[2], merge(parts[1], parts[0]))
    found = finish(NAMES, whole)
    g = dict(zip(NAMES, ct, strict=True))
    gradient = sum(
        jnp.where((assignment == k)[None], logits_gradient(blocks[k], whole, g), 0) for k in range(3)
    )
    return found, gradient


@pytest.mark.parametrize("order", ["left", "right"])
@pytest.mark.parametrize("target", ["label", "distribution"])
def test_merged_statistics_of_any_split_are_those_of_the_whole(target, order):
    @settings
    @given(seeds, scales, st.lists(st.integers(0, 2), min_size=V, max_size=V))
    def check(seed, scale, assignment):
        z, labels, q, _ = draw(seed, scale)
        y = labels if target == "label" else q
        ct = harness.cotangent_of((4, N))
        arrays = (z, y, np.array(assignment), ct)
        found, gradient = merged(*(harness.cast(x, "float32") for x in arrays), order=order)
        want = oracle.softmax_statistics(z, y)
        for name in NAMES:
            exact = getattr(want, name)
            # an uncompensated shift between blocks costs its size in ulp, on confident rows of large logits
            allowed = max(16, 2 * scale) * EPS * np.abs(exact)
            slack = 8 * EPS * np.abs(z).max(-1) if name == "log_normalizer" else 1e-37
            harness.assert_within(found[name], exact, allowed + slack, name)
        exact = oracle.softmax_statistics(z, y, cotangents=dict(zip(NAMES, ct, strict=True)))
        size = np.abs(exact).max(-1, keepdims=True) + 1
        harness.assert_within(gradient, exact, max(16, 2 * scale) * EPS * size)

    check()


def test_labels_count_from_a_blocks_first_class():
    z, labels, _, _ = draw(0, 2.0)
    z32 = harness.cast(z, "float32")
    for cuts in ([0, 4, V], [0, 1, 2, V], [0, V - 1, V]):

        @jax.jit
        def statistics(z, labels, cuts=cuts):
            blocks = (Block(z[:, a:b], labels - a) for a, b in itertools.pairwise(cuts))
            return finish(NAMES, functools.reduce(merge, [partial_statistics(NAMES, x) for x in blocks]))

        found = statistics(z32, labels)
        want = oracle.softmax_statistics(z, labels)
        for name in NAMES:
            assert_close(found[name], getattr(want, name), ulp=16)


def test_merge_with_nothing_changes_nothing():
    z, labels, _, _ = draw(1, 2.0)
    block = Block(harness.cast(z, "float32"), jnp.asarray(labels))
    empty = Block(block.logits, jnp.full(N, V + 1), class_mask=jnp.zeros(V, bool))
    masked = block._replace(class_mask=jnp.ones(V, bool))
    whole, nothing = partial_statistics(NAMES, masked), partial_statistics(NAMES, empty)
    for got in (merge(whole, nothing), merge(nothing, whole)):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(whole), strict=True):
            assert (a == b).all()
    for a, b in zip(jax.tree.leaves(merge(nothing, nothing)), jax.tree.leaves(nothing), strict=True):
        assert (a == b).all()


def test_chunks_of_a_softmax_loss_without_labels():
    z, _, _, _ = draw(2, 1.0)
    got = jaxent.softmax_loss(lambda s: s.log_normalizer - s.entropy, harness.cast(z, "float32"), None)
    s = oracle.softmax_statistics(z)
    np.testing.assert_allclose(got, np.float64((s.log_normalizer - s.entropy).mean()), rtol=1e-5, atol=1e-6)
