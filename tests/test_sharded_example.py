"""The sharded example: several devices, also of two processes, train as one does, and send no logits."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("optax")
pytest.importorskip("matplotlib")
EXAMPLE = Path(__file__).parents[1] / "examples" / "sharded.py"

V, B, T, D, K, H = 2048, 4, 32, 16, 8, 256
SMALL = [f"--vocabulary={V}", f"--batch={B}", f"--length={T}", f"--features={D}", "--files=40", "--steps=4"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.exhaustive
@pytest.mark.parametrize("processes", [1, 2])
def test_two_by_four(processes, cache):
    options = [*SMALL, "--mesh=2x4", f"--processes={processes}", f"--cache={cache}"]
    command = [sys.executable, "-W", "error", str(EXAMPLE), *options]
    # programs that run four times: most of the time goes into compiling them
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = re.findall(r"^ +(\d)  +(\S+)  +(\S+)  +\S+$", done.stdout, flags=re.MULTILINE)
    assert [step for step, *_ in losses] == list("1234")
    for _, sharded, single in losses:
        assert float(sharded) == pytest.approx(float(single), rel=1e-5)
    assert float(losses[-1][1]) < float(losses[0][1])
    assert "They agree" in done.stdout.splitlines()[-1]

    # of gradients what has no class axis and a quarter of the rest; of each token its features, forth and back, and
    # three numbers; the loss and its weight
    common, of_classes, tokens = K * D * H + H + H * D + D, V * (D + D + 1), B * T // 2
    total = 4 * (common + of_classes // 4 + tokens * (2 * D + 3) + 2)
    assert f"Communication per step: {total:,} bytes on each device" in done.stdout
    sharded, single = (
        [float(x) for x in re.search(rf"^{name} +(\S+) MiB +(\S+) MiB$", done.stdout, flags=re.M).groups()]
        for name in ("2 x 4 devices", "one device")
    )
    assert 0 < sharded[0] < single[0] and 0 < sharded[1] < single[1]
