"""Two processes that hold half of the classes each; and what happens if one of them dies or never ends."""

import multiprocessing
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("optax")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from sharded import launch

import workers
from harness import QUICK


def test_a_class_axis_across_processes(tmp_path):
    launch(partial(workers.split_classes, tmp_path), processes=2, limit=60)
    for source in workers.SOURCES:
        f = jax.jit(partial(workers.value_and_gradients, source), compiler_options=QUICK)
        expected = f(workers.arrays())
        with np.load(tmp_path / f"{source}.npz") as file:
            found = dict(file)
        assert sorted(found) == sorted(expected)
        for name, x in expected.items():
            atol = 1e-6 * np.max(np.abs(x))
            np.testing.assert_allclose(found[name], x, rtol=1e-6, atol=atol, err_msg=f"{source} {name}")


@pytest.mark.parametrize(
    ("function", "limit", "error", "message"),
    [
        (workers.lose_one, 60, ChildProcessError, "^process 1 exited with code 7$"),
        (workers.never_end, 3, TimeoutError, "^after 3 s, process (0 and )?1 still ran$"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_no_process_is_left_behind(function, limit, error, message):
    start = time.monotonic()
    with pytest.raises(error, match=message):
        launch(function, processes=2, limit=limit)
    assert time.monotonic() - start < limit + 5
    assert not multiprocessing.active_children()
