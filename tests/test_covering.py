"""Every option alone and every pair of them, in every family and source of logits, on one device.

tests/devices/test_covering.py runs the sets of eight devices; that both sets cover what they should is shown here.
"""

import functools
import itertools

import numpy as np
import pytest

import covering
import covering_numbers
import covering_run
import oracle
import oracle_complex
from tables import some

in_each_table = pytest.mark.parametrize("table", covering.TABLES)
on_both = pytest.mark.parametrize("placed", [False, True], ids=["one device", "eight devices"])


@pytest.mark.parametrize("table", some(["softmax", "sigmoid", "probability"], covering.TABLES))
def test_cases(table):
    covering_run.check(covering.cases(table, placed=False))


@on_both
@in_each_table
def test_every_pair_that_makes_sense(table, placed):
    wanted = covering.sensible_pairs(table, placed)
    assert {("where", "given"), ("weights", "given")} in wanted
    found = set()
    for case in covering.cases(table, placed):
        found |= {frozenset(pair) for pair in itertools.combinations(case.levels, 2)}
    assert found == wanted
    run, all_of_them = len(covering.cases(table, placed)), covering.full_product(table, placed)
    print(f"\n{run} of {all_of_them:,} combinations run")
    assert run * 10 < all_of_them


@on_both
@in_each_table
def test_every_option_alone(table, placed):
    """In each loss that takes it, with each reduction, source and kind of mesh."""
    factors = [x for x in ("loss", "reduction", "source", "mode") if x in covering.factors_of(table, placed)]
    alone = set()
    for case in covering.cases(table, placed):
        options = [(name, x) for name, x in case.levels if name in covering.OPTIONS and x is not None]
        if len(options) == 1:  # also of what is not asked for
            alone |= {(*options, (factor, case[factor])) for factor in factors}
    options = covering.alone_of(table, placed)
    assert {name for name, _ in options} >= {"where", "weights"}
    pairs = covering.sensible_pairs(table, placed)
    of_factors = [(factor, x) for factor in factors for x in covering.factors_of(table, placed)[factor]]
    assert alone >= {pair for pair in itertools.product(options, of_factors) if frozenset(pair) in pairs}


@pytest.mark.parametrize("table", ["softmax", "divergences"])
def test_two_oracles(table):
    """Complex steps here, derivations there; what is hidden is garbage to the other one."""
    checked = 0
    for case in covering.cases(table, placed=False):
        few = "sparse" in (case["labels"], case["target"])  # which the other one does not know
        if case["source"] != "dense" or case["loss"] == "softmax_loss" or few:
            continue
        built = covering_numbers.build(case)
        inputs = {
            name: x.astype(np.float64) if x.dtype.kind in "fV" else x for name, x in built.inputs.items()
        }
        positional = [inputs.pop(name) for name in ("logits", "labels", "target_logits") if name in inputs]
        options = covering_numbers.static_options(case) | inputs | {"reduction": case["reduction"]}
        f = getattr(oracle, case["loss"])
        ct = {"cotangent": built.cotangent}
        with np.errstate(invalid="ignore"):
            np.testing.assert_allclose(
                f(*positional, **options), built.value, rtol=1e-12, atol=1e-13, err_msg=str(case)
            )
            found = f(*positional, **options, **ct)
        for name, g in zip(
            ("logits", "target_logits" if table == "divergences" else "labels"), found, strict=False
        ):
            if g is not None:
                np.testing.assert_allclose(
                    g, built.gradients[name], rtol=1e-11, atol=1e-12, err_msg=f"{case} {name}"
                )
        checked += 1
    assert checked >= 10


@pytest.mark.parametrize("table", ["softmax", "divergences"])
def test_two_oracles_of_few_classes(table):
    """To the other one labels are a dense distribution; and of a target it takes K + 1 classes, each as it is."""
    checked = 0
    for case in covering.cases(table, placed=False):
        few = "target" if case["target"] == "sparse" else "labels"
        if case["source"] != "dense" or case["loss"] == "softmax_loss" or case[few] != "sparse":
            continue
        built = covering_numbers.build(case)
        x = {name: a.astype(np.float64) if a.dtype.kind in "fV" else a for name, a in built.inputs.items()}
        options = covering_numbers.static_options(case) | {"reduction": case["reduction"]}
        axis = options.pop("axis", -1)
        z, force = oracle.class_last(x.pop("logits"), axis, x.pop("class_mask", None))
        probs, classes = (np.moveaxis(x.pop(name), axis, -1) for name in (few, f"classes_of_{few}"))
        at = (np.arange(covering_numbers.V) == classes[..., None]) & (probs != 0)[..., None]
        q = np.where(at, probs[..., None], 0).sum(-2)
        if few == "target":
            if options.pop("rest", None):  # which is no divergence
                continue
            with np.errstate(all="ignore"):
                named, p = at.any(-2), oracle.Softmax(z / options.pop("temperature", 1)).p
                rest = np.where(named, 0, p).sum(-1), 1 - q.sum(-1)
                parts = zip((np.where(named, p, 0), q), rest, strict=True)
                z, q = (np.log(np.append(a, b[..., None], -1)) for a, b in parts)
        f = functools.partial(getattr(oracle, case["loss"]), z, q, **options, **x)
        if few == "labels":
            f = functools.partial(f, class_mask=force)
        np.testing.assert_allclose(f(), built.value, rtol=1e-12, atol=1e-13, err_msg=str(case))
        if few == "labels":
            dz, dq = f(cotangent=built.cotangent)
            of_slots = np.where(at, dq[..., None, :], 0).sum(-1)
            for name, g in ("logits", dz), ("labels", of_slots):
                want = np.moveaxis(built.gradients[name], axis, -1)
                want = np.where(probs == 0, 0, want) if name == "labels" else want
                np.testing.assert_allclose(g, want, rtol=1e-11, atol=1e-12, err_msg=f"{case} {name}")
        checked += 1
    assert checked > 5


def test_class_weights_with_smoothing():
    """The numbers are those of torch.nn.functional.cross_entropy: a class weight of 0 leaves what is smoothed."""
    z = np.array([[0.3, -1.2, 0.7], [1.0, 0.5, -0.25], [-0.5, 2.0, 0.125]])
    class_weights, force = np.array([0.0, 1, 2]), np.ones((3, 3), bool)
    options = {"class_weights": class_weights, "label_smoothing": 0.3}
    rows = [0.3696325978847649, 1.2881816024124846, 3.3594261617695738]
    found = oracle_complex.softmax("softmax_cross_entropy", z, np.eye(3), force, class_weights, options)
    np.testing.assert_allclose(found, rows, rtol=1e-14)
    found = oracle.softmax_cross_entropy(z, np.arange(3), **options)
    np.testing.assert_allclose(found.astype(float), rows, rtol=1e-14)
    mean = oracle.softmax_cross_entropy(z, np.arange(3), **options, reduction="mean")
    np.testing.assert_allclose(float(mean), 1.6724134540222744, rtol=1e-14)
