"""The examples run, say what they promise, and draw their pictures."""

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("optax")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import confusions
import digits

from tables import some

pytestmark = pytest.mark.usefixtures("as_users_run")


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("problem", some(["ten"], digits.OUTPUTS))
def test_a_few_steps_of_each_problem(problem, tmp_path, capsys):
    out = tmp_path / "digits.png"
    results = digits.main(["--problem", problem, "--steps", "60", "--out", str(out)])
    assert is_png(out)
    assert results["curve"].shape == (60,)
    assert results["curve"][-10:].mean() < 0.7 * results["curve"][0]
    text = capsys.readouterr().out
    assert "no mistake found" in text
    assert f"drawn in {out}" in text
    if problem.startswith("parity"):  # sigmoid(z) = softmax([0, z])[1]
        assert results["difference"] <= 1e-6


def test_ten_digits_are_told_apart(tmp_path):
    results = digits.main(["--out", str(tmp_path / "digits.png")])
    assert results["test_accuracy"] >= 0.97
    assert results["train_accuracy"] >= 0.97


def test_questions_are_about_digits():
    assert len(digits.QUESTIONS) == 10
    answers = digits.make_labels("multilabel", np.arange(10))
    assert len(np.unique(answers, axis=0)) == 10  # ten different rows: the answers name the digit


@pytest.mark.exhaustive
def test_confusions(tmp_path, capsys):
    out = tmp_path / "confusions.png"
    diagnoses = confusions.main(["--out", str(out)])
    assert is_png(out)
    assert [[finding.name for finding in diagnosis.findings] for diagnosis in diagnoses.values()] == [
        ["softmax-twice"],
        ["saturated-probabilities"],
        ["one-hot-rows"],
        ["one-class"],
        ["float-indices"],
        ["integer-one-hot"],
        ["one-based"],
        [],
    ]
    text = capsys.readouterr().out
    for claim in ("exactly twice", "loss 0 all along, 'accuracy' 100%", "4,000,000,000,000 bytes"):
        assert claim in text
