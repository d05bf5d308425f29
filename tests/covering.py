"""Which combinations are tested, generated: options as factors, each of them alone and every pair of them.

A case is one level of each factor of its table; None is an option that is not given. What cannot be together is a
pair of levels, so a pair that makes sense is one that is not forbidden. `python tests/covering.py` counts.
"""

import functools
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

Level = tuple[str, Any]  # of a factor
Levels = frozenset[Level]


class Case(NamedTuple):
    table: str
    levels: tuple[Level, ...]

    def __getitem__(self, factor: str) -> Any:  # type: ignore[override]
        return dict(self.levels).get(factor)

    def __str__(self) -> str:
        said = (f"{name}={x}" if name in OPTIONS else str(x) for name, x in self.levels if x is not None)
        return " ".join(said)


class Table(NamedTuple):
    """What describes a case, its options, and which options each loss takes."""

    factors: dict[str, tuple[Any, ...]]
    options: dict[str, tuple[Any, ...]]
    of_loss: dict[str, set[str]]


REDUCTIONS = ("none", "sum", "mean")
DTYPES = ("float32", "bfloat16", "float16")
LAYERS = ("rows", "classes")  # linear logits, in blocks of these
PER_ELEMENT = "[...]"  # an array like the logits, of elementwise losses
OPTIONS: dict[str, tuple[Any, ...]] = {
    "where": ("given",),
    "weights": ("given",),
    "ignore_index": (-100,),
    "class_weights": ("given",),
    "class_mask": ("[V]", "[..., V]"),
    "axis": ("moved",),
    "label_smoothing": (0.2,),
    "z_loss": (0.01,),
    "gamma": (0.5,),
    "epsilon": (2.0,),
    "alpha": (0.3, "[V]", PER_ELEMENT),
    "gamma_negative": (3.0,),
    "gamma_positive": (0.5,),
    "clip": (0.1,),
    "pos_weight": (2.5, "[V]", PER_ELEMENT),
    "temperature": (1.5,),
    "beta": (0.25, 0.0, 1.0),
    "rest": ("ignore",),
    "classes": ("given",),
    # of layers
    "bias": ("given",),
    "softcap": (3.0,),
    "layer_temperature": (0.75,),
    "class_axis": (0,),
}
COMMON = {"where", "weights"}
OF_LAYERS = {"bias", "softcap", "layer_temperature", "class_axis"}
OF_SOFTMAX = {"class_mask", "axis", *COMMON, *OF_LAYERS}
OF_LABELS = {"ignore_index", "class_weights", "label_smoothing", "z_loss", *OF_SOFTMAX}
OF_DIVERGENCES = {"temperature", "rest", *OF_SOFTMAX}
OF_SIGMOID = {"pos_weight", "label_smoothing", "axis", "ignore_index", *COMMON}


def table(of_loss: dict[str, set[str]], elementwise: bool = False, **factors: tuple[Any, ...]) -> Table:
    taken = set.union(*of_loss.values())
    options = {
        name: tuple(x for x in levels if elementwise or x != PER_ELEMENT)
        for name, levels in OPTIONS.items()
        if name in taken
    }
    factors = {
        "loss": tuple(of_loss),
        "reduction": REDUCTIONS,
        "dtype": DTYPES,
        "shape": ("N", "BT"),
        **factors,
    }
    return Table(factors, options, of_loss)


TABLES = {
    "softmax": table(
        {
            "softmax_cross_entropy": OF_LABELS,
            "softmax_focal_loss": {"gamma", "alpha", *OF_LABELS},
            "softmax_poly_loss": {"epsilon", *OF_LABELS},
            "softmax_loss": {"ignore_index", "classes", *OF_SOFTMAX},
            "softmax_entropy": OF_SOFTMAX,
        },
        labels=("index", "distribution", "sparse", "no labels"),
        source=("dense", *LAYERS),
    ),
    "divergences": table(
        {
            "softmax_kl_divergence": OF_DIVERGENCES,
            "softmax_js_divergence": {"beta", *OF_DIVERGENCES},
        },
        target=("logits", "sparse"),
        source=("dense", "layers", "a layer and an array", "classes"),
    ),
    "sigmoid": table(
        {
            "sigmoid_cross_entropy": OF_SIGMOID,
            "sigmoid_focal_loss": {"gamma", "alpha", *OF_SIGMOID},
            "sigmoid_asymmetric_loss": {"gamma_negative", "gamma_positive", "clip", *OF_SIGMOID},
        },
        elementwise=True,
        labels=("bool", "integer", "float"),
    ),
    "probability": table(
        {
            "categorical_cross_entropy": {"axis", *COMMON},
            "binary_cross_entropy": COMMON,
            "nll_loss": {"axis", "ignore_index", "class_weights", *COMMON},
            "kl_divergence": {"axis", *COMMON},
            "mean": COMMON,
        },
        labels=("index", "distribution", "bool", "integer", "float", "no labels"),
    ),
}
LABELS = {
    "softmax_cross_entropy": {"index", "distribution", "sparse"},
    "softmax_focal_loss": {"index", "distribution", "sparse"},
    "softmax_poly_loss": {"index", "distribution", "sparse"},
    "softmax_loss": {"index", "distribution", "sparse", "no labels"},
    "softmax_entropy": {"no labels"},
    "binary_cross_entropy": {"bool", "integer", "float"},
    "kl_divergence": {"distribution"},
    "mean": {"no labels"},
}
# Rows over two devices, classes over four; "unlike": the logits by both, and what stands beside them otherwise
DEVICES = {
    "mode": ("auto mesh", "explicit mesh", "explicit mesh, set_mesh", "shard_map"),
    "split": ("by rows", "by classes", "by both", "unlike"),
}
ALONE = "alone"  # a factor whose levels are those of all options, but
# what a layer makes of its product is alone in one table; and on a mesh what is an array, or moves or adds up some
OF_PRODUCTS = {"softmax"}
ON_A_MESH = {"where", "weights", "ignore_index", "class_weights", "class_mask", "axis", "pos_weight", "bias"}
ON_A_MESH |= {"classes", "alpha"}
ON_A_MESH |= {"label_smoothing", "z_loss"}


@functools.cache
def forbidden(name: str, a: Level, b: Level) -> bool:
    if a[0] == ALONE or b[0] == ALONE:
        a, b = (x[1] or x if x[0] == ALONE else x for x in (a, b))
    return _forbidden(name, *a, *b) or _forbidden(name, *b, *a)


def _forbidden(name: str, factor: str, x: Any, other: str, y: Any) -> bool:
    if x is None or y is None:
        return False
    if factor == "loss":
        if other in OPTIONS:
            return other not in TABLES[name].of_loss[x]
        if other == "labels" and name != "sigmoid":
            return y not in LABELS.get(x, {"index", "distribution"})
        if x == "mean":  # the reduction is its own, and there are no classes
            return (other == "reduction" and y != "none") or (
                other == "split" and y in ("by classes", "by both")
            )
    if factor == "labels":
        return other == "ignore_index" and x not in ("index", "integer")
    if (
        factor == "target"
    ):  # blocks of classes are of one layer; of logits and a target that is not sparse of rows
        if x == "logits":
            return other == "rest" or (other == "source" and y == "classes")
        return other == "source" and y == "a layer and an array"
    if factor == "source":  # the class axis of a layer is its last
        return other in (OF_LAYERS if x == "dense" else {"axis"})
    if factor == "mode" and x == "shard_map" and name in ("sigmoid", "probability"):
        # they take no names of axes, so a mean is that of `mean`, and classes are whole
        whole = name == "probability" and y in ("by classes", "by both")
        return (other == "reduction" and y == "mean") or (other == "split" and (whole or y == "unlike"))
    if factor == "mode":
        return other == "split" and y == "unlike" and not x.startswith("explicit")
    return False


def factors_of(name: str, placed: bool) -> dict[str, tuple[Any, ...]]:
    """All but the options, the loss first: what may be together with what follows from these."""
    return TABLES[name].factors | (DEVICES if placed else {})


def options_of(name: str) -> dict[str, tuple[Any, ...]]:
    return {option: (None, *levels) for option, levels in TABLES[name].options.items()}


def covering(
    name: str, factors: dict[str, tuple[Any, ...]], also: Iterable[Levels] = (), seed: int = 0
) -> list[dict[str, Any]]:
    """A few rows of `factors` that have every pair of levels that may be together, and what `also` asks for.

    Greedy: each row starts from what no row has yet, and takes the levels that add most; the best of some such rows.
    """
    rng = random.Random(seed)

    def complete(row: dict[str, Any], left: list[str], missing: dict[Levels, None]) -> dict[str, Any] | None:
        if not left:
            return row
        factor, *rest = left
        set_already = list(row.items())

        def gain(x: Any) -> float:
            new = sum(frozenset(((factor, x), level)) in missing for level in set_already)
            return new + rng.random() * (0.9 if x == factors[factor][0] else 0.5)  # the first is the plainest

        allowed = [
            x for x in factors[factor] if not any(forbidden(name, (factor, x), y) for y in set_already)
        ]
        for x in sorted(allowed, key=gain, reverse=True):
            found = complete(row | {factor: x}, rest, missing)
            if found is not None:
                return found
        return None

    def candidate(start: Levels, missing: dict[Levels, None]) -> dict[str, Any] | None:
        left = [factor for factor in factors if factor not in dict(start)]  # the loss first: it decides most
        if any(forbidden(name, a, b) for a, b in itertools.combinations(start, 2)):
            return None
        return complete(dict(start), left, missing)

    levels = [(factor, x) for factor, of in factors.items() for x in of]
    pairs = [frozenset(pair) for pair in itertools.combinations(levels, 2) if pair[0][0] != pair[1][0]]
    # a dict and not a set, whose order is not the same each time
    missing = dict.fromkeys(x for x in [*pairs, *also] if candidate(x, {}) is not None)
    rows = []
    while missing:
        starts = rng.sample(list(missing), min(4, len(missing)))
        rows.append(
            max(
                (candidate(x, missing) for x in starts),
                key=lambda row: sum(x <= row.items() for x in missing),
            )
        )
        missing = {x: None for x in missing if not x <= rows[-1].items()}
    return rows


def combinations_of(factors: dict[str, tuple[Any, ...]]) -> list[Levels]:
    return [frozenset(zip(factors, x, strict=True)) for x in itertools.product(*factors.values())]


def alone_of(name: str, placed: bool) -> tuple[Level, ...]:
    left_out = set() if name in OF_PRODUCTS else OF_LAYERS
    return tuple(
        (option, x)
        for option, levels in TABLES[name].options.items()
        for x in levels
        if option not in left_out and (option in ON_A_MESH or not placed)
    )


@functools.cache
def cases(name: str, placed: bool) -> tuple[Case, ...]:
    """Every option alone, with every level of every other factor; then every pair of options and of factors."""
    factors, alone = factors_of(name, placed), alone_of(name, placed)
    also = []
    if (
        placed and name == "softmax"
    ):  # what three factors decide: a mean's own arrays, and what is split where
        also = combinations_of({x: factors[x] for x in ("mode", "split", "reduction")})
        also += combinations_of({x: factors[x] for x in ("mode", "split", "source")})
    few = {"target": ("sparse",), "mode": factors.get("mode", ())}
    if placed and name == "divergences":  # a target that is never split as the logits are
        also += combinations_of({**few, "split": factors["split"]})
        also += combinations_of({**few, "source": factors["source"]})
    if placed and name != "divergences":  # which take half a second each
        also += combinations_of({"mode": factors["mode"], ALONE: alone, "reduction": ("mean",)})
    rows = covering(name, factors | {ALONE: (None, *alone)}, also)
    rows = [{**row, **dict([row[ALONE]] if row[ALONE] else [])} for row in rows]
    # a class weight of 0 hides its rows, but not with smoothing
    both = {"class_weights": ("given",), "label_smoothing": (0.2,), "labels": ("index",)}
    more = combinations_of({"loss": factors["loss"], **both}) if name == "softmax" else []
    if placed and name == "divergences":  # less the largest logit of all devices
        more += combinations_of(
            {**few, "source": ("dense",), "split": ("by classes",), "temperature": (1.5,)}
        )
    rows += covering(name, factors | options_of(name), more)
    return tuple(Case(name, tuple((f, row.get(f)) for f in {**factors, **options_of(name)})) for row in rows)


def worlds(name: str, placed: bool) -> Iterator[tuple[Levels, Levels]]:
    """Everything that is not an option, in all ways, each with the levels of options that may stand beside it."""
    factors = factors_of(name, placed)
    options = frozenset((option, x) for option, of in options_of(name).items() for x in of)
    banned = {
        (factor, x): frozenset(level for level in options if forbidden(name, (factor, x), level))
        for factor, of in factors.items()
        for x in of
    }
    rows: list[tuple[Level, ...]] = [()]
    for factor, of in factors.items():
        more = itertools.product(rows, ((factor, x) for x in of))
        rows = [
            (*row, level) for row, level in more if not any(forbidden(name, level, other) for other in row)
        ]
    for row in rows:
        yield frozenset(row), options.difference(*(banned[level] for level in row))


def sensible_pairs(name: str, placed: bool) -> set[Levels]:
    """Those that some world holds; found without `covering`, which completes what it starts from."""
    held = {row | options for row, options in worlds(name, placed)}
    factors = factors_of(name, placed) | options_of(name)
    levels = [[(factor, x) for x in of] for factor, of in factors.items()]
    pairs = {
        frozenset(pair) for a, b in itertools.combinations(levels, 2) for pair in itertools.product(a, b)
    }
    return {pair for pair in pairs if any(pair <= world for world in held)}


def full_product(name: str, placed: bool) -> int:
    """How many combinations there are."""
    counts = (Counter(option for option, _ in options) for _, options in worlds(name, placed))
    return sum(math.prod(count.values()) for count in counts)


def counted() -> str:
    lines = []
    for placed, name in itertools.product((False, True), TABLES):
        where = "eight devices" if placed else "one device"
        lines.append(
            f"{name:12} {where:14}{full_product(name, placed):12,} combinations, {len(cases(name, placed))} run"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(counted())
