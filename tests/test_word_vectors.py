"""Word vectors are learned by three losses; a sparse step is that of the dense gradient, and reads a few rows alone."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("optax")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import jax
import jax.numpy as jnp
import language_model
import optax
import word_vectors

import jaxent
from programs import avals

pytestmark = pytest.mark.usefixtures("as_users_run")

V, N, D, S = 300, 64, 16, 40
METHODS = list(word_vectors.METHODS)
SPARSE = METHODS[:2]


def test_a_short_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(word_vectors, "HELD_OUT", 1000)
    monkeypatch.setattr(word_vectors, "EVALUATIONS", 3)
    out = tmp_path / "word_vectors.png"
    small = ["--files=40", "--vocabulary=2000", "--batch=256", "--features=16", "--samples=64", "--steps=200"]
    found = word_vectors.main([*small, "--out", str(out), "--cache", str(tmp_path)])
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    text = capsys.readouterr().out
    for method, result in found["results"].items():
        assert f"\n{method} " in text
        assert result["curve"].shape == (200,)
        assert result["curve"][-20:].mean() < 0.95 * result["curve"][:20].mean()
        first, middle, last = result["validation"][:, 1]
        assert last < middle < first - 0.2
        assert last < first - 0.5
        assert result["seconds"] > 0
    assert found["results"][word_vectors.NCE]["validation"][-1, 2] == pytest.approx(0, abs=0.5)
    for (word, _), names in found["nearest"].items():
        assert len({word, *names}) == 1 + word_vectors.NEAREST
    for claim in ("of N x V logits", "unigram", "Nearest by cosine, of the 500 commonest", f"drawn in {out}"):
        assert claim in text


def test_pairs():
    tokens, documents = np.array([1, 2, 3, 9, 4, 5, 6]), np.array([0, 0, 0, 0, 0, 1, 1])
    one = {(1, 2), (2, 3), (5, 6)}  # 9 is <unk>, and 4 -> 5 goes from one file to the next
    two = one | {(1, 3), (3, 4)}
    for window, expected in (1, one), (2, two):
        found = word_vectors.pairs(tokens, documents, 10, window).tolist()
        assert sorted(map(tuple, found)) == sorted([*expected, *((b, a) for a, b in expected)])


def test_texts_are_those_of_the_classes(tmp_path):
    contents = ["a = b\n", "", "b = b\n"]
    files = [tmp_path / f"{i}.py" for i in range(3)]
    for path, content in zip(files, contents, strict=True):
        path.write_text(content)
    tokens = [language_model.read(path) for path in files]
    words = sorted({x for of_file in tokens for x in of_file}, reverse=True)
    ids = np.array([words.index(x) for of_file in tokens for x in of_file])
    starts = np.cumsum([0, *map(len, tokens)])
    assert word_vectors.texts(ids, starts, files, len(words)) == words
    assert word_vectors.texts(ids, starts, files, 2) == words[:2]


def test_nearest():
    table = np.array([[1, 0], [-2, 0.1], [5, 1], [0.1, 0.2], [1, 0]])
    assert word_vectors.nearest(table, list("abcd"), "a", 2) == ["c", "d"]  # of the first four alone
    assert word_vectors.nearest(table, list("abcd"), "b", 3) == ["d", "c", "a"]


@pytest.fixture
def problem(as_users_run):
    """Tables and squares that are some way along, and pairs with tokens that come many times."""
    keys = jax.random.split(jax.random.key(0), 5)
    tables = {name: jax.random.normal(k, (V, D)) for name, k in zip(("input", "output"), keys, strict=False)}
    squares = {name: jax.random.uniform(keys[2], (V, D)) / N for name in tables}
    batch = jax.random.randint(keys[3], (N, 2), 0, V // 10)
    bias = jax.nn.log_softmax(jax.random.normal(keys[4], (V,)))
    return tables, squares, batch, bias


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_that_of_the_dense_gradient(method, problem):
    tables, squares, batch, bias = problem
    key, index, steps = jax.random.key(1), 3, 12
    rate = word_vectors.LEARNING_RATE * (1 - index / steps)
    found = jax.jit(partial(word_vectors.step, method, S))(tables, squares, batch, index, steps, key, bias)

    def dense(tables):
        samples = jaxent.log_uniform_sampler(jax.random.fold_in(key, index), V, S)
        hidden, labels = tables["input"][batch[:, 0]], batch[:, 1]
        return word_vectors.objective(method, hidden, tables["output"], labels, samples, bias)

    value, gradient = jax.jit(jax.value_and_grad(dense))(tables)
    state = optax.ScaleByRssState(squares)
    update, state = optax.scale_by_rss(eps=0).update(gradient, state)
    expected = jax.tree.map(lambda x, u: x - rate * u, tables, update)
    np.testing.assert_allclose(found[2], value, rtol=1e-6)
    for name in tables:
        np.testing.assert_allclose(found[0][name], expected[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[1][name], state.sum_of_squares[name], rtol=1e-5)
        moved = jnp.any(found[0][name] != tables[name], -1)  # [V]
        assert 0 < moved.sum() <= (V if (name, method) == ("output", word_vectors.FULL) else N + S)


def arguments(vocabulary, rows, features):
    batch = np.random.default_rng(0).integers(vocabulary, size=(rows, 2), dtype=np.int32)
    state = jax.eval_shape(
        partial(word_vectors.init, vocabulary=vocabulary, features=features), jax.random.key(0)
    )
    return *state, batch, 0, 1, jax.random.key(0), jnp.zeros(vocabulary)


@pytest.mark.parametrize("method", METHODS)
def test_no_logits_are_built(method):
    step = jax.make_jaxpr(partial(word_vectors.step, method, S))(*arguments(16_384, 512, D))
    sizes = [np.prod(x.shape) for x in avals(step.jaxpr) if hasattr(x, "shape")]
    assert max(sizes) < 512 * 16_384


def test_memory():
    """With samples it does not depend on V: the tables are changed in place, and nothing else has their size."""
    rows, vocabulary = 512, 16_384
    for method in METHODS:
        small, large = (
            word_vectors.compiled_step(method, 64, *arguments(v, rows, D)).memory_analysis()
            for v in (vocabulary, 4 * vocabulary)
        )
        assert large.alias_size_in_bytes >= 4 * 4 * 4 * vocabulary * D  # two tables and their squares
        found = small.temp_size_in_bytes / (4 * rows * vocabulary)  # of the logits
        assert found < (0.1 if method in SPARSE else 0.6), method
        if method in SPARSE:
            assert large.temp_size_in_bytes == pytest.approx(small.temp_size_in_bytes, rel=0.01), method
