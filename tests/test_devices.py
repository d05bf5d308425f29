"""Runs tests/devices on eight CPU devices: each file in a process of its own, as jax counts its devices once."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

FOLDER = Path(__file__).parent / "devices"
FILES = sorted(FOLDER.glob("test_*.py"))
if jax.__version_info__ >= (0, 11):  # the whole table once, on the oldest jax: it takes a minute
    FILES.remove(FOLDER / "test_cases.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_eight_devices(file):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    environment.pop("PYTEST_ADDOPTS", None)
    run = subprocess.run(
        command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout
