"""The worst inputs that benchmarks/accuracy.py has found, replayed: what docs/numerics.md promises holds for them, too.

Compiled as they were when they were found; the first quantity of a case also without jit, one row by itself.
"""

import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import accuracy
import accuracy_cases
import oracle_elementwise
from accuracy_promises import CASES
from harness import FULL

PATH = Path(__file__).parent / "worst_cases.json"
WORST = json.loads(PATH.read_text())
compiled = functools.partial(jax.jit, compiler_options=FULL)


def at_once(f):
    return f


def name(worst):
    more = [f"{key} {x}" for key, x in worst["setting"].items() if key in ("classes", "label")]
    return ", ".join([worst["case"], worst["quantity"], *more])


@pytest.mark.parametrize("worst", WORST, ids=name)
def test_keeps_its_promise(worst):
    case, quantity, number = CASES[worst["case"]], worst["quantity"], worst["number"]
    bound, unit = case.promises[quantity]
    assert (bound, unit) == (worst["bound"], worst["unit"]) and worst["error"] <= bound
    forms = [(compiled, worst["rows"]), (at_once, 1)]
    for jit, rows in forms if quantity == next(iter(case.promises)) else forms[:1]:
        errors = case.run(jit, np.full(rows, number), **worst["setting"])
        error = np.max(case.promises[quantity].of(errors[quantity]))
        assert error <= bound, f"{error:.3g} {unit}"


def sure(name):
    """Where formulas that cancel are at their worst, and jaxent's is not: (numbers, settings)."""
    settings = [
        x for x in CASES[name].settings if x.get("classes", 10) == 10 and x.get("margin", 9) is not None
    ]
    if name.startswith("softmax"):
        return np.arange(200), settings
    dtype = settings[0]["dtype"]
    z = np.array([0.0, 1e-4, 1.0, 6.0, 9.0, 14.0, 17.0, 30.0, 60.0, 80.0])
    z = np.concatenate([z, -z]).astype(accuracy_cases.DTYPES[dtype])
    return z.view(f"uint{8 * z.itemsize}").astype(int), settings


@pytest.mark.parametrize("name", [x for x in CASES if x.startswith(("softmax_cross", "sigmoid", "two"))])
def test_sure_rows(name):
    case, (numbers, settings) = CASES[name], sure(name)
    assert settings
    for setting in settings:
        for quantity, error in case.run(compiled, numbers, **setting).items():
            bound, unit = case.promises[quantity]
            worst = np.max(case.promises[quantity].of(error))
            assert worst <= bound, f"{quantity}, {setting}: {worst:.3g} {unit}"


def test_every_promise_has_its_worst_input():
    found = {(worst["case"], worst["quantity"]) for worst in WORST}
    assert found == {(name, quantity) for name, case in CASES.items() for quantity in case.promises}


@pytest.mark.parametrize("loss, oracle", [
    ("cross-entropy", oracle_elementwise.sigmoid_loss), ("focal", oracle_elementwise.sigmoid_focal_loss),
    ("focal, gamma 5", functools.partial(oracle_elementwise.sigmoid_focal_loss, gamma=5.0)),
    ("asymmetric", oracle_elementwise.sigmoid_asymmetric_loss),
])  # fmt: skip
def test_the_reference_of_all_inputs(loss, oracle):
    """In float64, beside the oracle's longdouble."""
    for dtype in ("float32", "bfloat16", "float16"):
        numbers = {x["number"] for x in WORST if x["case"] == f"sigmoid {loss}, {dtype}"}
        z = accuracy_cases.widened(accuracy_cases.numbers_as(np.array(sorted(numbers)), dtype))
        z = z[np.abs(z) < 300]
        for label, half in zip((1.0, 0.0), accuracy_cases.exact_sigmoids(z)[loss], strict=True):
            want = oracle(z, np.full(z.shape, label))
            for got, w in zip(half, want[:2], strict=True):
                np.testing.assert_allclose(np.longdouble(got), w, rtol=2e-15)


@pytest.mark.parametrize("only", ["bfloat16", pytest.param("", marks=pytest.mark.exhaustive)])
def test_the_benchmark_runs(only, tmp_path, monkeypatch, capsys, as_users_run):
    figure, worst = tmp_path / "accuracy.png", tmp_path / "worst.json"
    options = ["--quick", f"--only={only}", "--figure", str(figure), "--worst", str(worst)]
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *options])
    accuracy.main()
    printed = capsys.readouterr().out
    assert "two classes, bfloat16" in printed and "sigmoid focal, bfloat16" in printed
    assert figure.stat().st_size > 10_000
    found = json.loads(worst.read_text())
    assert all(x["error"] <= x["bound"] for x in found)
    assert {x["case"] for x in found} == {case for case in CASES if only in case}
