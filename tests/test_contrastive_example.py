"""The contrastive example: pairs on several devices train as on one, without labels, and in little memory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("optax")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
EXAMPLE = Path(__file__).parents[1] / "examples" / "contrastive.py"


def test_a_short_run(tmp_path):
    out = tmp_path / "contrastive.png"
    options = ["--devices=2", "--steps=100", "--batch=256", f"--out={out}"]
    # programs that run some tens of times: most of the time goes into compiling them
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    command = [sys.executable, "-W", "error", str(EXAMPLE), *options]
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert f"drawn in {out}" in done.stdout

    def numbers(pattern):
        [found] = re.findall(pattern, done.stdout, flags=re.MULTILINE)
        return [float(x.replace(",", "")) for x in found]

    untrained = numbers(r"^untrained +(\S+)% +(\S+)%$")
    assert min(numbers(r"^trained with the labels +(\S+)% +(\S+)%$")) > 50  # of ten digits, in so few steps
    for name in ("CLIP", "SigLIP"):
        pattern = rf"^{name}: gradients on 2 devices and on one are (\S+) apart; (.*)$"
        difference, sent = re.search(pattern, done.stdout, flags=re.MULTILINE).groups()
        assert float(difference) < 1e-5
        assert re.fullmatch(r"\d+ collective-permute, \d+ all-reduce", sent)  # nothing is gathered
        first, last = numbers(rf"^{name}: loss (\S+) at first, (\S+) at last; ")
        assert last < 0.8 * first
        frozen = numbers(rf"^{name} +(\S+)% +(\S+)%$")
        assert all(a > b + 1 for a, b in zip(frozen, untrained, strict=True))  # percent
        tiles, plain = numbers(rf"^{name} +(\S+) MiB +(\S+) MiB$")
        matrix = 4 * 16_384**2 / 2**20
        assert tiles < matrix / 8 < matrix < plain
