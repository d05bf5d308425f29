"""Fixtures that several test files use, and how programs are compiled where a test does not ask for more."""

import collections
import gc
import importlib.util
import os
import zlib

import jax
import numpy as np
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


# Files with tests whose every row compiles large programs: a row in two is exhaustive, in turn the first or the second.
# What is wrong shows in more than one of them as a rule, and all options and pairs of them are in test_covering.py.
EVERY_OTHER_ROW = {
    "test_aux",
    "test_candidates",
    "test_classes",
    "test_contrastive",
    "test_dense_on_cpu",
    "test_divergences",
    "test_divergences_second",
    "test_elementwise",
    "test_first_tries",
    "test_functions",
    "test_functions_of_a_row",
    "test_generalized_js",
    "test_kernel_layout",
    "test_linear_accuracy",
    "test_linear_functions",
    "test_linear_transformations",
    "test_sigmoid_classes",
    "test_sparse",
    "test_sparse_divergence_forms",
    "test_sparse_divergences",
    "test_split_classes",
    "test_transformations",
}


def pytest_collection_modifyitems(config, items):
    """First what takes longest; and rows that are exhaustive, but for one that is asked for."""
    items.sort(key=lambda item: item.path.name != "test_devices.py")
    if any("::" in argument for argument in config.args):
        return
    thinned = {item.obj for item in items if item.get_closest_marker("exhaustive")}  # by tables.py
    rows = collections.Counter()
    for item in items:
        sizes = [len(axis.args[1]) for axis in item.iter_markers("parametrize")]
        if item.path.stem in EVERY_OTHER_ROW and sizes and item.obj not in thinned:
            place = np.unravel_index(rows[item.obj], sizes)  # along each axis
            rows[item.obj] += 1
            if (sum(place) + zlib.crc32(item.originalname.encode())) % 2:
                item.add_marker(pytest.mark.exhaustive)


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
