"""Sampled softmax and NCE: what TensorFlow's functions give, and the softmax over all classes where all are candidates.

tests/devices/test_candidates.py has kernels and rows that are split.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import harness
import jaxent
from tables import spread

N, D, V, S, T = 6, 5, 20, 8, 3
F32 = np.float32
LOSSES = {"softmax": jaxent.sampled_softmax_cross_entropy, "nce": jaxent.nce_loss}
compiled = functools.partial(jax.jit, compiler_options=harness.QUICK)
each_loss = pytest.mark.parametrize("name", LOSSES)


def layer(seed=0, dtype=F32):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=size).astype(dtype) for size in ((N, D), (D, V), (V,))]


def candidates(kind, seed=0):
    """(labels, samples, log counts of both); some samples are labels, and one comes twice."""
    rng = np.random.default_rng(seed)
    labels = np.stack([rng.choice(V, size=T, replace=False) for _ in range(N)]).astype(np.int32)
    samples = np.stack([rng.choice(V, size=S) for _ in range(N)]).astype(np.int32)
    if "ragged" in kind:
        labels[::2, 1], samples[1::3, 2] = -1, -1
    labels = labels if "T" in kind else labels[:, 0]
    samples = samples if "rows" in kind else samples[0]
    return labels, samples, *(rng.normal(size=x.shape).astype(F32) for x in (labels, samples))


KINDS = ("one label", "T labels", "T labels, ragged", "samples of rows", "T labels, samples of rows, ragged")


def on_paper(name, arrays, classes, smoothing=0.0, hits=True, z_loss=0.0):
    """Losses `[N]` in float64, one row at a time."""
    hidden, kernel, bias = (np.float64(x) for x in arrays)
    found = []
    for n in range(N):
        labels, samples, of_labels, of_samples = (
            np.atleast_1d(x[n] if i in (0, 2) or x.ndim > 1 else x) for i, x in enumerate(classes)
        )
        z = hidden[n] @ kernel + bias
        true = [z[c] - q for c, q in zip(labels, of_labels, strict=True) if c >= 0]
        drawn = [
            z[c] - q
            for c, q in zip(samples, of_samples, strict=True)
            if c >= 0 and not (hits and c in labels)
        ]
        z, t = np.array(true + drawn), np.array([1 / len(true)] * len(true) + [0] * len(drawn))
        if name == "softmax":
            lse = np.log(np.exp(z).sum())
            t = (1 - smoothing) * t + smoothing / t.size
            found.append((t * (lse - z)).sum() + z_loss * lse**2)
        else:
            t = (1 - smoothing) * t + smoothing / 2
            found.append((t * np.logaddexp(0, -z) + (1 - t) * np.logaddexp(0, z)).sum())
    return np.array(found)


def slope_on_paper(f, arrays, step=1e-6):
    """Of sum f by each array, by differences in float64."""
    slopes = []
    for i, x in enumerate(arrays):
        slope = np.zeros(x.shape)
        for at in np.ndindex(*x.shape):
            ends = []
            for sign in (1, -1):
                moved = [np.float64(a) for a in arrays]
                moved[i][at] += sign * step
                ends.append(f(moved).sum())
            slope[at] = (ends[0] - ends[1]) / (2 * step)
        slopes.append(slope)
    return slopes


@each_loss
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients(name, kind):
    classes = labels, samples, of_labels, of_samples = candidates(kind)
    options = {"log_expected_counts": of_samples, "label_log_expected_counts": of_labels}

    def f(hidden, kernel, bias):
        return LOSSES[name](hidden, kernel, labels, samples, bias=bias, **options)

    def run(*arrays):
        value, vjp = jax.vjp(f, *arrays)
        return value, vjp(jnp.ones_like(value))

    arrays = layer()
    value, slopes = compiled(run)(*arrays)
    np.testing.assert_allclose(value, on_paper(name, arrays, classes), rtol=2e-6)
    for got, want in zip(slopes, slope_on_paper(lambda x: on_paper(name, x, classes), arrays), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


OF_LOSSES = [(name, x) for name in LOSSES for x in ("hits", "smoothing", "traced smoothing")] + [
    ("softmax", "z_loss")
]


@spread(2, "pair, kind", OF_LOSSES, KINDS)
def test_options(pair, kind):
    name, option = pair
    classes = labels, samples, of_labels, of_samples = candidates(kind, seed=1)
    options = {
        "hits": {"remove_accidental_hits": False},
        "smoothing": {"label_smoothing": 0.2},
        "traced smoothing": {"label_smoothing": jnp.float32(0.2)},
        "z_loss": {"z_loss": 0.1},
    }[option]
    counts = {"log_expected_counts": of_samples, "label_log_expected_counts": of_labels}
    static = {x: y for x, y in options.items() if not isinstance(y, jax.Array)}
    traced = {x: y for x, y in options.items() if isinstance(y, jax.Array)}
    f = compiled(lambda *x: LOSSES[name](*x[:2], labels, samples, bias=x[2], **counts, **static, **x[3]))
    words = {"remove_accidental_hits": "hits", "label_smoothing": "smoothing", "z_loss": "z_loss"}
    plain = {words[x]: float(y) if x != "remove_accidental_hits" else y for x, y in options.items()}
    want = on_paper(name, layer(1), classes, **plain)
    np.testing.assert_allclose(f(*layer(1), traced), want, rtol=5e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_all_classes_are_the_softmax(dtype):
    """Rows that are sure of their label too: losses of 1e-20."""
    with jax.enable_x64(dtype == "float64"):
        hidden, kernel, bias = (harness.cast(x, dtype) for x in layer(2))
        labels = np.arange(N, dtype=np.int32)
        bias = bias.at[0].add(50) if hasattr(bias, "at") else bias
        every = np.arange(V, dtype=np.int32)

        def sampled(h, k, b):
            return jaxent.sampled_softmax_cross_entropy(h, k, labels, every, bias=b)

        def full(h, k, b):
            return jaxent.softmax_cross_entropy(jaxent.LinearLogits(h, k, b), labels)

        def both(*x):
            return [jax.vjp(f, *x)[0] for f in (sampled, full)], [
                jax.grad(lambda *x, f=f: f(*x).sum(), (0, 1, 2))(*x) for f in (sampled, full)
            ]

        values, slopes = compiled(both)(*map(jnp.asarray, (hidden, kernel, bias)))
    rtol = {"float32": 3e-6, "bfloat16": 3e-6, "float64": 1e-12}[dtype]
    np.testing.assert_allclose(*values, rtol=rtol)
    for a, b in zip(*slopes, strict=True):
        assert a.dtype == b.dtype == dtype
        np.testing.assert_allclose(
            np.float64(a),
            np.float64(b),
            rtol=2e-2 if dtype == "bfloat16" else 1e-5,
            atol=1e-2 if dtype == "bfloat16" else 1e-6,
        )


@each_loss
def test_rows(name):
    """Hidden ones may hold NaN and bad labels, and so may those of weight 0; a mean divides by the weights."""
    hidden, kernel, bias = layer()
    labels, samples, *_ = candidates("one label")
    hidden[1], hidden[2], labels[1], labels[4] = np.nan, np.nan, V, -100
    where, weights = np.arange(N) != 1, F32([1, 2, 0, 0.5, 1, 1])
    labels = jnp.asarray(labels)

    def f(hidden, kernel, bias, weights, reduction):
        options = {"where": where, "weights": weights, "ignore_index": -100, "reduction": reduction}
        return LOSSES[name](hidden, kernel, labels, samples, bias=bias, **options)

    rows = compiled(functools.partial(f, reduction="none"))(hidden, kernel, bias, weights)
    mean, slopes = compiled(jax.value_and_grad(functools.partial(f, reduction="mean"), (0, 1, 2, 3)))(
        hidden, kernel, bias, weights
    )
    assert all(np.isfinite(x).all() for x in (rows, *slopes))
    kept = np.array([0, 3, 5])
    alone = LOSSES[name](hidden[kept], kernel, labels[kept], samples, bias=bias)
    np.testing.assert_allclose(rows[kept], weights[kept] * alone, rtol=1e-6)
    assert (np.delete(rows, kept) == 0).all() and (np.delete(slopes[0], kept, 0) == 0).all()
    np.testing.assert_allclose(mean, (weights[kept] * alone).sum() / weights[kept].sum(), rtol=1e-6)
    np.testing.assert_allclose(slopes[3][kept], (alone - mean) / weights[kept].sum(), rtol=1e-4, atol=1e-6)


@each_loss
def test_bad_classes(name):
    hidden, kernel, _ = layer()
    labels, samples, *_ = map(jnp.asarray, candidates("T labels"))
    f = compiled(lambda labels, samples: LOSSES[name](hidden, kernel, labels, samples))
    for bad in (V, -2, 2**31 - 1):
        assert np.isnan(f(labels.at[2, 1].set(bad), samples)).tolist() == [n == 2 for n in range(N)]
        assert np.isnan(f(labels, samples.at[3].set(bad))).all()
        with pytest.raises(
            ValueError, match=rf"`samples` must be in \[0, {V}\), but is {bad} at index \[3\]"
        ):
            LOSSES[name](hidden, kernel, labels, np.asarray(samples.at[3].set(bad)))
        with pytest.raises(
            ValueError, match=rf"`labels` must be in \[0, {V}\), but is {bad} at index \[2, 1\]"
        ):
            LOSSES[name](hidden, kernel, np.asarray(labels.at[2, 1].set(bad)), samples)
    # of one label -1 is no empty slot
    assert np.isnan(f(labels[:, 0].at[2].set(-1), samples)).tolist() == [n == 2 for n in range(N)]
    checked = jax.jit(checkify.checkify(lambda samples: LOSSES[name](hidden, kernel, labels, samples).sum()))
    assert "`samples` must be in [0, 20)" in checked(samples.at[3].set(V))[0].get()


@each_loss
def test_what_is_no_candidate(name):
    """Empty slots and accidental hits are as if they were not there, whatever their column holds."""
    hidden, kernel, _ = layer()
    labels, samples, *_ = candidates("T labels, ragged")
    kernel[:, 0] = np.nan  # where -1 would be clipped to
    labels, samples = np.where(labels == 0, 1, labels), np.where(samples == 0, 2, samples)

    def f(hidden, kernel, labels, samples):
        return LOSSES[name](hidden, kernel, labels, samples).sum()

    value, slopes = compiled(jax.value_and_grad(f, (0, 1)))(
        hidden, kernel, jnp.asarray(labels), jnp.asarray(samples)
    )
    want = sum(
        float(f(hidden[n : n + 1], kernel, row[row >= 0][None], samples[~np.isin(samples, row)]))
        for n, row in enumerate(labels)
    )
    np.testing.assert_allclose(value, want, rtol=1e-6)
    assert np.isfinite(slopes[0]).all() and np.isfinite(slopes[1][:, 1:]).all()


# Columns in place of a kernel; embedding tables.


@each_loss
def test_embedding_tables(name):
    hidden, kernel, bias = layer()
    labels, samples, *_ = candidates("T labels")

    def run(kernel, class_axis):
        f = functools.partial(LOSSES[name], labels=labels, samples=samples, bias=bias, class_axis=class_axis)
        return jax.value_and_grad(lambda h, k: f(h, k).sum(), (0, 1))(hidden, kernel)

    (value, (dh, dk)), (want, (want_h, want_k)) = compiled(lambda k: (run(k.T, 0), run(k, -1)))(
        jnp.asarray(kernel)
    )
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(dh, want_h, rtol=1e-6)
    np.testing.assert_allclose(dk.T, want_k, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hits", [True, False])
def test_statistics_of_candidates(kind, hits):
    """Rank and entropy among the true class and the samples; and any softmax loss."""
    hidden, kernel, bias = layer()
    labels, samples, of_labels, of_samples = candidates(kind)
    counts = {"log_expected_counts": of_samples, "label_log_expected_counts": of_labels}
    options = {"bias": bias, "remove_accidental_hits": hits} | counts
    where = np.arange(N) != 2
    hidden[2] = np.nan

    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def f(hidden, kernel):
        found = jaxent.candidate_logits(hidden, kernel, labels, samples, where=where, **options)
        loss = jaxent.softmax_cross_entropy(**found._asdict(), where=where)
        return jnp.sum(loss), (found, jaxent.softmax_statistics(**found._asdict(), where=where), loss)

    slopes, (found, s, loss) = compiled(f)(hidden, kernel)
    assert all(np.all(np.isfinite(slope)) for slope in slopes)
    want = jaxent.sampled_softmax_cross_entropy(hidden, kernel, labels, samples, where=where, **options)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    z = np.where(found.class_mask, np.float64(found.logits), -np.inf)[where]
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), 1)
    np.testing.assert_allclose(s.entropy[where], entropy, rtol=1e-5)
    assert (s.rank is None) == ("T" in kind)
    if s.rank is not None:
        np.testing.assert_array_equal(s.rank[where], np.sum(z > z[:, :1], 1))
        bad = jaxent.candidate_logits(hidden, kernel, jnp.array([0, 1, 2, V, -1, 3]), samples)
        np.testing.assert_array_equal(bad.labels, [0, 0, 0, -1, -1, 0])


@each_loss
def test_transformations(name):
    hidden, kernel, bias = map(jnp.asarray, layer())
    labels, samples, of_labels, of_samples = map(jnp.asarray, candidates("T labels"))
    counts = {"log_expected_counts": of_samples, "label_log_expected_counts": of_labels}
    ct = jnp.cos(jnp.arange(N, dtype=jnp.float32))

    def ours(h, k):
        return LOSSES[name](h, k, labels, samples, bias=bias, **counts)

    def plain(h, k):
        z = h @ k + bias
        hit = (labels[:, :, None] == samples[None, None]).any(1)
        drawn = z[:, samples] - of_samples
        z = jnp.concatenate([jnp.take_along_axis(z, labels, -1) - of_labels, jnp.where(hit, -1e4, drawn)], -1)
        t = jnp.where(jnp.arange(T + S) < T, 1 / T, 0) * jnp.ones_like(z)
        if name == "softmax":
            return -jnp.sum(t * jax.nn.log_softmax(z), -1)
        return -jnp.sum(t * jax.nn.log_sigmoid(z) + (1 - t) * jax.nn.log_sigmoid(-z), -1)

    def everything(f):
        total = lambda h, k: jnp.sum(ct * f(h, k))  # noqa: E731
        x, dx = (hidden, kernel), (jnp.cos(hidden), jnp.sin(kernel))
        along = lambda g: lambda *x: jax.jvp(g, x, dx)[1]  # noqa: E731
        return {
            "jvp": along(f)(*x),
            "grad of checkpoint": jax.grad(jax.checkpoint(total), (0, 1))(*x),
            "jvp of grad": along(jax.grad(total, (0, 1)))(*x),
            "grad of jvp": jax.grad(lambda *x: along(total)(*x), (0, 1))(*x),
            "scan": jax.grad(
                lambda h: jax.lax.scan(lambda c, h: (c + total(h, kernel), None), 0.0, h[None])[0]
            )(hidden),
        }

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        found, want = compiled(lambda: (everything(ours), everything(plain)))()
    for key, x in found.items():
        for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(want[key]), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=key)
    rows = jax.vmap(
        lambda h, y, q: LOSSES[name](
            h, kernel, y, samples, bias=bias, log_expected_counts=of_samples, label_log_expected_counts=q
        )
    )
    np.testing.assert_allclose(rows(hidden, labels, of_labels), ours(hidden, kernel), rtol=1e-6)


@each_loss
@pytest.mark.parametrize(
    ("arguments", "options", "kind", "words"),
    [
        ({"hidden": np.zeros((N, D), int)}, {}, TypeError, "`hidden` must be a floating point array"),
        ({"kernel": np.zeros((V, D), F32)}, {}, ValueError, "`kernel` must be of shape [5, V]"),
        ({}, {"class_axis": 0}, ValueError, "`kernel` must be of shape [V, 5]"),
        ({}, {"class_axis": 1}, ValueError, "`class_axis` must be -1 or 0, but is 1"),
        ({"labels": np.zeros((N, 2, 1), int)}, {}, ValueError, "`labels` must be of shape [6, K]"),
        ({"labels": np.zeros(N, F32)}, {}, TypeError, "`labels` must be integers"),
        ({"samples": np.zeros((2, S), int)}, {}, ValueError, "`samples` must be of shape [6, K]"),
        ({"samples": np.zeros(S, F32)}, {}, TypeError, "`samples` must be integers"),
        ({}, {"bias": np.zeros(3, F32)}, ValueError, "`bias` must be of shape [20]"),
        (
            {},
            {"log_expected_counts": np.zeros(S, F32)},
            ValueError,
            "`label_log_expected_counts` must be given",
        ),
        (
            {},
            {"label_log_expected_counts": np.zeros(N, F32)},
            ValueError,
            "`log_expected_counts` must be given",
        ),
        ({}, {"label_smoothing": 1.5}, ValueError, "`label_smoothing` must be"),
        ({}, {"reduction": "avg"}, ValueError, "`reduction` must be"),
        ({}, {"where": np.ones(N, int)}, TypeError, "`where` must be a bool array"),
        ({"labels": np.zeros((N, T), int)}, {"ignore_index": -1}, ValueError, "`ignore_index` must be"),
    ],
)
def test_errors(name, arguments, options, kind, words):
    hidden, kernel, _ = layer()
    labels, samples, *_ = candidates("one label")
    given = {"hidden": hidden, "kernel": kernel, "labels": labels, "samples": samples} | arguments
    with pytest.raises(kind) as error:
        LOSSES[name](*given.values(), **options)
    assert words in str(error.value)
