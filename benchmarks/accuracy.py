"""Errors of losses and gradients beside their peers and their promises, one command: python benchmarks/accuracy.py

Options: --quick (a few inputs), --effort N (N times as many rows where inputs are searched), --only PART (cases with
that in their name), --figure PATH, --worst PATH (the worst input of each case as JSON: tests/worst_cases.json).
Needs optax, matplotlib and mpmath; torch takes part where it is installed.

Where inputs are few, all are tried: every bfloat16 and float16 logit of the elementwise losses, every first of two
bfloat16 logits beside a second one, and 2^16 float32 logits of every sign and exponent. References are NumPy's, in
float64 for these and in longdouble elsewhere, and are themselves compared with 50 digits first.
"""

import argparse
import collections
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import mpmath as mp
import numpy as np

import accuracy_cases as cases
import accuracy_contestants as contestants
import accuracy_figure
from accuracy_cases import LABEL, LOSS, OTHERS, Case, Error
from accuracy_promises import CASES, CLASSES, EXHAUSTIVE, MARGINS, OFFSETS, SCALES, SEARCHED
from common import surroundings, table

COMPARED = {"classes": CLASSES, "scale": SCALES, "offset": OFFSETS}  # and margins, by the loss


def done(name: str) -> None:
    print(f"{name}: done after {time.process_time():.0f} s", file=sys.stderr, flush=True)


class Effort(NamedTuple):
    rounds: int = 1
    thin: int = 1  # of settings, inputs and rows one in so many
    only: str = ""

    def of(self, table: dict[str, Case], start: str = "") -> Iterator[tuple[str, Case]]:
        return ((name, case) for name, case in table.items() if self.only in name and name.startswith(start))

    def rows(self, case: Case, setting: dict[str, Any]) -> int:
        return max(case.count(setting) // self.thin, 2)

    def settings(self, case: Case) -> tuple[dict[str, Any], ...]:
        return case.settings[:: self.thin]


class Worst:
    """The worst input of each case, quantity, and kind of setting."""

    def __init__(self) -> None:
        self.found: dict[tuple, dict[str, Any]] = {}
        self.tried: collections.Counter = collections.Counter()

    def add(self, name: str, setting: dict[str, Any], numbers: np.ndarray, errors: dict[str, Error]) -> None:
        for quantity, e in errors.items():
            promise = CASES[name].promises[quantity]
            of_rows = promise.of(e).astype(np.float64)
            of_rows = np.where(np.isnan(of_rows), np.inf, of_rows)
            at = int(of_rows.argmax())
            self.tried[name, quantity] += len(numbers)
            key = name, quantity, setting.get("classes"), setting.get("label")
            if key not in self.found or of_rows[at] > self.found[key]["error"]:
                self.found[key] = {
                    "case": name,
                    "quantity": quantity,
                    "bound": promise.bound,
                    "unit": promise.unit,
                    "error": float(of_rows[at]),
                    "number": int(numbers[at]),
                    "rows": len(numbers),
                    "setting": setting,
                }

    def write(self, path: Path) -> None:
        """A line each, errors in four digits."""
        lines = [
            json.dumps(x | {"error": float(f"{x['error']:.4g}")}, sort_keys=False)
            for x in self.found.values()
        ]
        path.write_text("[\n" + ",\n".join(lines) + "\n]\n")

    def table(self) -> str:
        rows = []
        for (name, quantity), tried in self.tried.items():
            all_of_it = [x for key, x in self.found.items() if key[:2] == (name, quantity)]
            x = max(all_of_it, key=lambda x: x["error"])
            how = "exhaustive" if name in EXHAUSTIVE else "searched"
            measured = f"{x['error']:.4g} {x['unit']}"
            rows.append([name, quantity, f"{x['bound']:g} {x['unit']}", measured, how, f"{tried:,}"])
        return table(["case", "quantity", "promise", "measured", "how", "inputs"], rows)


# References.


def check_references() -> str:
    """The largest relative errors of the two references beside mpmath."""
    numbers = np.arange(200)
    z = np.concatenate([8 * cases.normal(numbers, 1)[:, 0], [0.0, 1e-8, 87.0, -87.0]])
    off = []
    with mp.workdps(50):
        for name, halves in cases.exact_sigmoids(z).items():
            for i, x in enumerate(z):
                q = 1 / (1 + mp.exp(mp.mpf(x)))
                p, a = 1 / (1 + mp.exp(-mp.mpf(x))), mp.log1p(mp.exp(-mp.mpf(x)))
                gamma = {"cross-entropy": 0, "focal": 2, "focal, gamma 5": 5, "asymmetric": 1}[name]
                want = q**gamma * a, -(q**gamma) * (gamma * p * a + q)
                off += [abs(mp.mpf(float(g[i])) / w - 1) for g, w in zip(halves[0], want, strict=True)]
        of_float64 = float(max(off))
        off = []
        for margin in (None, *MARGINS):
            rows, labels = cases.logits_and_labels(numbers[:20], 10, 3.0, 100.0, margin, "float32")
            exact = cases.exact_cross_entropy(rows, labels, "float64")
            for row, label, loss, gradient in zip(rows, labels, *exact[:2], strict=True):
                e = [mp.exp(mp.mpf(x)) for x in row]
                p = [x / mp.fsum(e) for x in e]
                rest = mp.fsum(x for j, x in enumerate(p) if j != label)
                want = [-mp.log1p(-rest), *(-rest if j == label else x for j, x in enumerate(p))]
                off += [abs(mp.mpf(str(g)) / w - 1) for g, w in zip([loss, *gradient], want, strict=True)]
        return f"References beside 50 digits: relative {of_float64:.1e} (float64), {float(max(off)):.1e} (longdouble)"


# Softmax cross-entropy, searched, beside its peers.


class Record(NamedTuple):
    setting: dict[str, Any]
    quantity: str
    contestant: str
    error: Error  # the largest


class Softmax(NamedTuple):
    records: list[Record]
    by_size: dict[tuple[str, str], dict[int, float]]  # of float32, by the binary order of what is measured


def softmax(worst: Worst, effort: Effort) -> Softmax:
    records, by_size = [], collections.defaultdict(lambda: collections.defaultdict(float))
    first = 0
    for name, case in effort.of(SEARCHED, "softmax_cross_entropy"):
        for setting in effort.settings(case):
            for _ in range(effort.rounds):
                numbers = np.arange(first, first := first + effort.rows(case, setting))
                z, labels = cases.logits_and_labels(numbers, **setting)
                exact = cases.exact_cross_entropy(z, labels, setting["dtype"])
                at_label = np.abs(np.take_along_axis(exact.gradient, labels[:, None], -1)[:, 0])
                for contestant, f in contestants.SOFTMAX.items():
                    errors = cases.of_softmax(*f(z, labels, setting["dtype"]), labels, exact)
                    if contestant == contestants.JAXENT:
                        worst.add(name, setting, numbers, errors)
                    for quantity, e in errors.items():
                        records.append(Record(setting, quantity, contestant, cases.largest(e)))
                    if setting["dtype"] == "float32":
                        for quantity, size in ((LOSS, exact.loss), (LABEL, at_label)):
                            accuracy_figure.add(
                                by_size[quantity, contestant], size, errors[quantity].relative
                            )
        done(name)
    return Softmax(records, by_size)


def cell(errors: list[Error]) -> str:
    """ulp, and relative."""
    if not errors:
        return "-"
    ulp, relative = (max(x) for x in zip(*errors, strict=True))
    return f"{ulp:.2g} ({relative:.0e})" if ulp < 1e4 else f"{ulp:.0e} ({relative:.0e})"


def softmax_table(records: list[Record], quantity: str) -> str:
    """Each row fixes one thing, and has the largest error over all others."""
    rows = []
    for dtype in cases.DTYPES:
        here = [r for r in records if r.quantity == quantity and r.setting["dtype"] == dtype]
        groups = [
            (f"{name} {x:,g}", [r for r in here if r.setting[name] == x and r.setting["margin"] is None])
            for name, xs in COMPARED.items()
            for x in xs
        ]
        groups += [
            (f"loss about {loss}", [r for r in here if r.setting["margin"] == margin])
            for margin, loss in MARGINS.items()
        ]
        for title, group in groups:
            cells = [cell([r.error for r in group if r.contestant == c]) for c in contestants.SOFTMAX]
            if group:
                rows.append([f"{dtype}, {title}", *cells])
    return table(["", *contestants.SOFTMAX], rows)


# Elementwise losses and two classes, exhaustive.


def all_inputs(dtype: str, effort: Effort) -> Iterator[np.ndarray]:
    """Bits; of float32, for each sign and exponent, 2^16 mantissas: one in each 2^-16, anywhere there."""
    if dtype != "float32":
        yield np.arange(0, 2**16, effort.thin)
        return
    i = np.arange(0, 2**16, effort.thin)
    mantissas = (i << 7) | (cases.bits(i, 1)[:, 0] & np.uint64(127)).astype(np.int64)
    for sign in (0, 1):
        for exponent in range(0, 255, effort.thin):
            yield (sign << 31) | (exponent << 23) | mantissas
    yield np.array([0x7F800000, 0xFF800000, 0x7FC00000])  # inf, -inf, NaN


class Elementwise(NamedTuple):
    rows: list[list[str]]
    by_exponent: dict[tuple[str, str], dict[int, float]]  # float32 cross-entropy at label 1, in ulp


def elementwise(worst: Worst, effort: Effort) -> Elementwise:
    rows, by_exponent = [], collections.defaultdict(lambda: collections.defaultdict(float))
    for name, case in effort.of(EXHAUSTIVE, "sigmoid"):
        dtype, loss = case.settings[0]["dtype"], case.settings[0]["loss"]
        found = collections.defaultdict(list)
        for numbers in all_inputs(dtype, effort):
            for setting in case.settings:
                worst.add(name, setting, numbers, case.run(jax.jit, numbers, **setting))
            z = cases.numbers_as(numbers, dtype)
            wide = cases.widened(z)
            want = cases.with_label(1, *cases.exact_sigmoids(wide)[loss])
            for contestant, f in contestants.ELEMENTWISE[loss].items():
                errors = cases.of_sigmoid(*f(z, np.ones(z.shape), dtype), *want)
                kept = np.isfinite(wide)  # what peers make of infinite logits is no question of digits
                for quantity, e in errors.items():
                    found[quantity, contestant].append(cases.largest(e, kept))
                    if name == "sigmoid cross-entropy, float32":
                        accuracy_figure.add(by_exponent[quantity, contestant], np.where(kept, wide, 0), e.ulp)
        for quantity in (LOSS, "gradient"):
            cells = [cell(found[quantity, c]) for c in contestants.SIGMOID]
            rows.append([f"{loss}, {dtype}, {quantity}", *cells])
        done(name)
    return Elementwise(rows, by_exponent)


def two_classes(worst: Worst, effort: Effort) -> list[list[str]]:
    found, others = collections.defaultdict(list), {}
    for name, setting in ((name, x) for name, case in effort.of(EXHAUSTIVE, "two") for x in case.settings):
        others[setting["other"]] = None
        (numbers,) = all_inputs("bfloat16", effort)
        worst.add(name, setting, numbers, EXHAUSTIVE[name].run(jax.jit, numbers, **setting))
        first = cases.widened(cases.numbers_as(numbers, "bfloat16"))
        first = first[np.isfinite(first)]
        z = np.stack([first, np.full_like(first, setting["other"])], -1)
        labels = np.full(first.shape, setting["label"], np.int32)
        exact = cases.exact_two_classes(z, setting["label"])
        for contestant, f in contestants.SOFTMAX.items():
            errors = cases.of_softmax(*f(z, labels, "bfloat16"), labels, exact)
            for quantity, e in errors.items():
                found[setting["other"], quantity, contestant].append(cases.largest(e))
    return [
        [f"beside {other:g}, {quantity}", *(cell(found[other, quantity, c]) for c in contestants.SOFTMAX)]
        for other in others
        for quantity in (LOSS, LABEL)
    ]


def other_promises(worst: Worst, effort: Effort) -> None:
    for name, case in effort.of(SEARCHED):
        if name.startswith("softmax_cross_entropy"):
            continue
        for i, setting in enumerate(effort.settings(case)):
            for k in range(effort.rounds):
                rows = effort.rows(case, setting)
                numbers = np.arange(rows) + (i * effort.rounds + k) * rows
                worst.add(name, setting, numbers, case.run(jax.jit, numbers, **setting))
        done(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few inputs of each kind")
    parser.add_argument("--effort", type=int, default=1, help="how many times as many rows are searched")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--figure", type=Path, help="where accuracy.png goes")
    parser.add_argument("--worst", type=Path, help="where worst_cases.json goes")
    args = parser.parse_args()
    effort = Effort(args.effort, 64 if args.quick else 1, args.only)
    start = time.perf_counter()

    packages = ["jax", "jaxent", "optax", "numpy"] + (["torch"] if contestants.torch is not None else [])
    caption = surroundings(packages)
    print(f"`{' '.join(['python', 'benchmarks/accuracy.py', *sys.argv[1:]])}`\n{caption}\n")
    if contestants.torch is None:
        print("torch is not installed: it takes no part.\n")
    print(check_references())

    worst = Worst()
    of_softmax = softmax(worst, effort)
    print(
        "\nSoftmax cross-entropy, integer labels: the largest error in ulp of the result's dtype (and relative)."
    )
    print(
        "A row fixes one thing; of the scales and offsets, rows without a lead of the label's logit. jaxent's losses"
    )
    print("of bfloat16 and float16 logits are float32, the others' are of the logits' dtype.")
    for quantity in (LOSS, LABEL, OTHERS):
        print(f"\n{quantity}\n\n{softmax_table(of_softmax.records, quantity)}")
    of_elements = elementwise(worst, effort)
    print("\nElementwise, label 1, all finite inputs (float32: 2^16 of each sign and exponent): likewise.\n")
    print(table(["", *contestants.SIGMOID], of_elements.rows))
    of_two = two_classes(worst, effort)
    print("\nTwo classes, every finite bfloat16 logit beside one of these: likewise.\n")
    print(table(["", *contestants.SOFTMAX], of_two))
    other_promises(worst, effort)
    print("\nWhat is promised and what was found. Rows: how many there may be, and 1 if there is one.\n")
    print(worst.table())
    print(f"\n{time.perf_counter() - start:.0f} s")
    if args.figure:
        accuracy_figure.draw(of_softmax, of_elements.by_exponent, args.figure, caption)
        print(f"wrote {args.figure}")
    if args.worst:
        worst.write(args.worst)
        print(f"wrote {args.worst}")


if __name__ == "__main__":
    main()
