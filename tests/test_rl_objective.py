"""The reinforcement learning example learns, agrees with its dense forms, and draws its picture."""

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("optax")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import rl_objective

pytestmark = pytest.mark.usefixtures("as_users_run")


@pytest.mark.exhaustive
def test_a_short_run(tmp_path, capsys):
    out = tmp_path / "rl.png"
    results = rl_objective.main(["--iterations", "12", "--out", str(out)])
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert results["reward"].shape == results["entropy"].shape == (12,)
    assert np.all(np.isfinite(results["reward"])) and np.all(np.isfinite(results["entropy"]))
    assert results["reward"][-3:].mean() > results["reward"][0] + 0.2  # 0.3 at first
    assert results["entropy"][-1] < results["entropy"][0]
    assert results["difference"] < 1e-5
    logits = 4 * 8192 * 65536  # bytes
    assert results["temporaries"]["fused"] < logits / 8 < logits < results["temporaries"]["dense"]
    text = capsys.readouterr().out
    for claim in ("fused and dense", "fused and log_softmax", "MiB of temporaries", f"drawn in {out}"):
        assert claim in text


def test_rewards_are_shares_of_right_places():
    end = rl_objective.END
    answers = {
        (3, 5, end, 1, 1, 1, 1, 1): 1.0,  # what comes after the end does not matter
        (5, 3, end, 1, 1, 1, 1, 1): 2 / 3,
        (5, end, 6, 7, 8, 9, 1, 1): 1 / 3,  # too short
        (3, 5, 7, end, 1, 1, 1, 1): 2 / 3,  # too long
        (end, 5, 7, 8, 9, 1, 1, 1): 0.0,
    }
    actions = np.array(list(answers))
    rewards = rl_objective.reward(np.full(len(actions), 2), actions)
    np.testing.assert_allclose(rewards, list(answers.values()), rtol=1e-6)
    np.testing.assert_array_equal(rl_objective.until_end(actions).sum(-1), [3, 3, 2, 4, 1])
