"""Fixtures that several test files use, and how programs are compiled where a test does not ask for more."""

import gc
import importlib.util
import os

import jax
import pytest

# Most programs run once, on a few numbers: nearly all of their time goes into compiling them. Where a test is about
# what a user's program computes, takes or holds, it says so: harness.FULL, harness.HLO.
FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
# later ones, and libtpu, may not know it, and XLA ends where it does not know a flag
if jax.__version_info__ < (0, 11) and importlib.util.find_spec("libtpu") is None:
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads wait for work by spinning

# What equinox and others promise: nothing is broadcast over ranks, or promoted to another dtype, but on purpose.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# tracing makes many objects that stay: a fifth of its time went into looking at them
gc.set_threshold(50_000)


def pytest_collection_modifyitems(items):
    """First what takes longest."""
    items.sort(key=lambda item: item.path.name != "test_devices.py")


@pytest.fixture
def x64():
    """float64 in jax, for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def as_users_run():
    """Without strict modes: examples, and what peers promote."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
