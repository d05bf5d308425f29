"""The language model learns Python, the same with and without logits in memory, and knows what it must not learn."""

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("optax")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import jax
import language_model

pytestmark = pytest.mark.usefixtures("as_users_run")

SMALL = ["--files", "40", "--vocabulary", "2000", "--batch", "4", "--length", "32", "--features", "16"]


def rows(tokens, documents, vocabulary=10, batch=1, length=4):
    tokens, documents = np.array(tokens, np.int32), np.array(documents, np.int32)
    return list(language_model.batches(tokens, documents, vocabulary, batch, length))


@pytest.mark.exhaustive
def test_a_short_run_of_both(tmp_path, capsys):
    out = tmp_path / "language_model.png"
    found = language_model.main(
        [*SMALL, "--dense", "--steps", "40", "--out", str(out), "--cache", str(tmp_path)]
    )
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert found["difference"] <= 1e-4
    for result in found["results"].values():
        assert result["curve"].shape == (40,)
        assert result["curve"][0] == pytest.approx(np.log(2000), abs=0.1)
        assert result["validation"][-1, 1] < 0.8 * result["validation"][0, 1]
        assert 0 < result["rise"] < result["peak"]
        assert result["seconds"] > 0
    text = capsys.readouterr().out
    for claim in ("LinearLogits", "built logits", "unigram", "perplexity", f"drawn in {out}"):
        assert claim in text


def test_this_library_has_the_vocabulary():
    assert language_model.VOCABULARY >= 50_000
    tokens = set()
    for path in language_model.source_files():  # as far as needed
        tokens.update(language_model.read(path))
        if len(tokens) > language_model.VOCABULARY:
            return
    pytest.fail(f"only {len(tokens)} different tokens")


@pytest.fixture(scope="module")
def value_and_gradient():
    return jax.jit(jax.value_and_grad(language_model.loss), static_argnums=2)


def test_the_loss_is_that_of_built_logits(value_and_gradient):
    params = language_model.init(jax.random.key(0), 1000, 16)
    tokens, documents = np.random.default_rng(0).integers(1000, size=65), np.repeat(np.arange(5), 13)
    (batch, *_) = rows(tokens, documents, vocabulary=1000, batch=4, length=16)
    fused, dense = (value_and_gradient(params, batch, which) for which in (False, True))
    np.testing.assert_allclose(fused[0], dense[0], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(fused[1]), jax.tree.leaves(dense[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_what_is_not_there_to_be_learned():
    first, second = rows([1, 2, 3, 4, 5, 9, 6], [0, 0, 0, 1, 1, 1, 1])
    assert first["tokens"].tolist() == [[1, 2, 3, 4]]
    assert first["targets"].tolist() == [[2, 3, 4, 5]]
    assert first["mask"].tolist() == [[True, True, False, True]]  # 3 -> 4 goes from one file to the next
    assert second["targets"][0, :2].tolist() == [9, 6]
    assert second["mask"].tolist() == [[False, True, False, False]]  # 9 is <unk>, then padding


def test_a_hidden_target_contributes_nothing(value_and_gradient):
    params = language_model.init(jax.random.key(0), 1000, 16)
    (batch,) = rows(np.arange(64), np.repeat([0, 1], 32), vocabulary=1000, batch=4, length=16)
    assert not batch["mask"][1, 15]
    other = batch | {"targets": np.where(batch["mask"], batch["targets"], batch["targets"] + 1)}
    for dense in (False, True):
        one, two = (value_and_gradient(params, each, dense) for each in (batch, other))
        assert all((a == b).all() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True))


def test_a_token_sees_its_own_file_and_no_future():
    params = language_model.init(jax.random.key(0), 10, 16)
    tokens, segments = np.arange(16)[None] % 9, np.repeat([0, 1], 8)[None]
    before = language_model.hidden(params, tokens, segments)
    changed = tokens.copy()
    changed[0, 4] = 9
    moved = np.any(before != language_model.hidden(params, changed, segments), -1)[0]
    assert moved.tolist() == [False] * 4 + [True] * 4 + [False] * 8


def test_too_few_tokens():
    with pytest.raises(ValueError, match="7 tokens are too few for 3 rows of 4"):
        rows(range(7), [0] * 7, batch=3)


def test_the_unigram_entropy():
    batch, _ = rows([0, 1, 0, 1, 1], [0] * 5, vocabulary=3)
    entropy = language_model.unigram_entropy(np.array([0, 0, 0, 1, 2]), 3, [batch])
    assert entropy == pytest.approx(-(3 * np.log(2 / 6) + np.log(4 / 6)) / 4)


def test_bad_syntax_is_no_token(tmp_path):
    path = tmp_path / "bad.py"
    path.write_bytes(b"x = (1\n")
    assert language_model.read(path) == []
    path.write_bytes(b"# coding: no such\n")
    assert language_model.read(path) == []
    path.write_bytes(b"if x:\n    y  # why\n")
    marks = "<begin> if x : <newline> <indent> y | # why | <newline> <dedent> <end>"
    found = language_model.read(path)
    assert [
        text for part in marks.split("|") for text in ([part.strip()] if "#" in part else part.split())
    ] == found
