"""Samplers: which classes they draw how often, and TensorFlow's formulas for expected counts."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import harness
import jaxent

V, S = 40, 8
COUNTS = np.float32([0, 3, 1, 0, 9, 2, 0.5, 4] * 5)
P = {
    "log-uniform": np.log((np.arange(V) + 2) / (np.arange(V) + 1)) / math.log(V + 1),
    "uniform": np.full(V, 1 / V),
    "learned": COUNTS / COUNTS.sum(),
}
MANY = 20_000
each = pytest.mark.parametrize("name", P)
compiled = functools.partial(jax.jit, compiler_options=harness.QUICK)


def sample(name, key, unique=True, number=S):
    if name == "learned":
        return jaxent.learned_sampler(key, COUNTS, number, unique=unique)
    f = {"log-uniform": jaxent.log_uniform_sampler, "uniform": jaxent.uniform_sampler}[name]
    return f(key, V, number, unique=unique)


@functools.cache
def many(name, unique):
    keys = jax.random.split(jax.random.key(1), MANY)
    return compiled(jax.vmap(lambda key: sample(name, key, unique)))(keys)


@each
def test_draws(name):
    """Independent ones, as often as P says: within 5 standard deviations."""
    samples = many(name, False)
    assert samples.classes.dtype == jnp.int32 and samples.classes.shape == (MANY, S)
    found = np.bincount(np.ravel(samples.classes), minlength=V) / (MANY * S)
    assert (np.abs(found - P[name]) <= 5 * np.sqrt(P[name] / (MANY * S)) + 1e-12).all()
    assert (found[P[name] == 0] == 0).all()
    assert (samples.tries == S).all()
    np.testing.assert_allclose(np.exp(samples.log_expected_counts), S * P[name][samples.classes], rtol=1e-5)


@each
def test_different_ones(name):
    """Each class is in a set as often as expected counts say, on the mean over sets, and no class is twice."""
    samples = many(name, True)
    classes = np.asarray(samples.classes)
    assert (np.diff(np.sort(classes), axis=-1) > 0).all() and (classes >= 0).all()
    found = np.bincount(np.ravel(classes), minlength=V) / MANY
    expected = np.exp(compiled(jax.vmap(lambda s: s.log_expected_counts_of(jnp.arange(V))))(samples))
    assert (np.asarray(samples.tries) > (0 if name == "learned" else S - 1)).all()
    # the formula takes the number of draws as given, but they ended with a new class
    np.testing.assert_allclose(found, expected.mean(0), rtol=0.1, atol=0.005)
    assert found.sum() == pytest.approx(S)


@each
def test_tries(name):
    """How many draws it takes, or at what time the last of S arrives, as when it is played with NumPy."""
    rng, played = np.random.default_rng(0), []
    for _ in range(2000):
        if name == "learned":
            with np.errstate(divide="ignore"):
                played.append(np.sort(rng.exponential(size=V) / P[name])[S - 1])
            continue
        draws = rng.choice(V, size=1000, p=P[name] / P[name].sum())
        first = np.sort(np.unique(draws, return_index=True)[1])
        played.append(first[S - 1] + 1)
    tries = np.asarray(many(name, True).tries)
    error = np.std(played) / math.sqrt(len(played))
    assert abs(tries.mean() - np.mean(played)) < 5 * error
    assert tries.std() == pytest.approx(np.std(played), rel=0.15)


@each
def test_sequential_sampling(name):
    """The first class is one of P, and the second one of P without the first: of sets in the order of the draws."""
    classes = np.asarray(many(name, True).classes)
    p = P[name]
    assert np.abs(np.bincount(classes[:, 0], minlength=V) / MANY - p).max() < 5 * math.sqrt(p.max() / MANY)
    second = p * (p / (1 - p)).sum() - p**2 / (1 - p)  # sum over first i != j of p_i p_j / (1 - p_i)
    assert np.abs(np.bincount(classes[:, 1], minlength=V) / MANY - second).max() < 5 * math.sqrt(
        p.max() / MANY
    )


@pytest.mark.parametrize("name", ["log-uniform", "uniform"])
def test_formula_of_tensorflow(name):
    """1 - (1 - P)^T of T draws: as tf.random.log_uniform_candidate_sampler."""
    p, labels = P[name], np.arange(V)
    for seed in range(20):
        samples = sample(name, jax.random.key(seed), number=3)
        tries = int(samples.tries)
        want = np.log(1 - (1 - p) ** tries)
        np.testing.assert_allclose(
            samples.log_expected_counts_of(jnp.asarray(labels)), want, rtol=1e-5, atol=1e-6
        )
        classes, counts = samples
        np.testing.assert_allclose(counts, want[np.asarray(classes)], rtol=1e-5, atol=1e-6)


@each
def test_all_classes(name):
    number = int((P[name] > 0).sum())
    samples = compiled(lambda key: sample(name, key, number=number))(jax.random.key(3))
    assert sorted(np.asarray(samples.classes).tolist()) == np.flatnonzero(P[name]).tolist()
    assert np.isfinite(samples.log_expected_counts).all()


def test_fewer_classes_than_samples():
    samples = jaxent.learned_sampler(jax.random.key(0), np.float32([0, 2, 0, 1]), 3)
    assert sorted(np.asarray(samples.classes).tolist()) == [-1, 1, 3]
    assert np.isneginf(samples.log_expected_counts).tolist() == (np.asarray(samples.classes) == -1).tolist()


def test_a_large_vocabulary():
    """Rare classes are drawn one by one, none of them left out: u alone has 2^23 values."""
    classes = 2**20
    found = np.asarray(
        compiled(lambda key: jaxent.log_uniform_sampler(key, classes, 2**18, unique=False).classes)(
            jax.random.key(0)
        )
    )
    assert found.min() == 0 and found.max() > 0.99 * classes
    upper = found[found >= classes // 2]  # 5 % of the draws
    odd = (upper % 2).mean()
    assert abs(upper.size / found.size - math.log(2) / math.log(classes)) < 0.002 and abs(odd - 0.5) < 0.02
    counted = np.float32(1 / np.arange(1, classes + 1))
    found = np.asarray(
        compiled(lambda key, c: jaxent.learned_sampler(key, c, 2**12, unique=False).classes)(
            jax.random.key(0), counted
        )
    )
    total = np.log(classes) + 0.5772
    assert abs((found == 0).mean() - 1 / total) < 5 * math.sqrt(1 / total / found.size)
    assert abs((found >= classes // 2).mean() - math.log(2) / total) < 5 * math.sqrt(0.05 / found.size)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 3), "`classes` must be a positive int, but is 0"),
        ((10, 0), "`number` must be a positive int, but is 0"),
        ((10, 2.0), "`number` must be a positive int, but is 2.0"),
        ((10, 11), "`number` must be at most 10, the number of classes, but is 11"),
    ],
)
def test_errors(arguments, words):
    for f in (jaxent.log_uniform_sampler, jaxent.uniform_sampler):
        with pytest.raises(ValueError) as error:
            f(jax.random.key(0), *arguments)
        assert words in str(error.value)


def test_errors_of_counts():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"`counts` must be of shape \[V\], but is float32\[2, 3\]"):
        jaxent.learned_sampler(key, np.ones((2, 3), np.float32), 2)
    with pytest.raises(ValueError, match="`number` must be at most 3"):
        jaxent.learned_sampler(key, np.ones(3, np.float32), 4)
    with pytest.raises(TypeError, match="`counts` must be"):
        jaxent.learned_sampler(key, np.ones(3, np.complex64), 2)
