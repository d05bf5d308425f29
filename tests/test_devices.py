"""Runs tests/devices on eight CPU devices, in a process of its own: jax counts its devices once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "devices"
DAILY, EXHAUSTIVE = "not exhaustive", "exhaustive"


@pytest.mark.parametrize("which", [DAILY, pytest.param(EXHAUSTIVE, marks=pytest.mark.exhaustive)])
def test_eight_devices(which):
    options = ["-q", "-n0", "-p", "no:cacheprovider", "-m", which]
    command = [sys.executable, "-m", "pytest", *options, str(FOLDER)]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    environment.pop("PYTEST_ADDOPTS", None)
    run = subprocess.run(
        command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True, timeout=3600
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout
