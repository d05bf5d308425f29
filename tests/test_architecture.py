"""The house rules that a reader relies on: who imports whom, what is public, how it is named."""

import ast
import dataclasses
import inspect
import sys
from pathlib import Path

import pytest

import jaxent
from jaxent._rows import Options

PACKAGE = Path(jaxent.__file__).parent

# From the bottom up. A module imports from lower layers only; modules of one layer do not know each other,
# except inside _logits. A new module is a line here, and a decision.
LAYERS = [
    {"_mapped"},
    {"_numerics", "_derivatives", "_devices", "_explained"},
    {"_contracts", "_chosen", "_divergence_terms"},
    {"_rows", "_samplers", "_yes_no"},
    {"_sparse"},
    {"_block"},
    {"_others"},
    {"_statistics"},
    {"_gradient"},
    {"_row_function"},
    {"_logits"},
    {"_log_ratio", "_objective", "_pairs"},
    {"_sparse_divergence"},
    {"_candidate_logits", "_softmax", "_general", "_sigmoid", "_probability", "_divergences"},
    {"_candidates", "_pair_losses"},
    {"_contrastive"},
    {"_diagnose"},
    {"__init__"},
]
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}
# Narrower than its layer: the doctor looks at arrays from outside and shares nothing with the losses.
ONLY = {"_diagnose": {"_contracts", "_sparse"}}
EXTERNAL = {"jax", "numpy"} | sys.stdlib_module_names

FILES = sorted(PACKAGE.rglob("*.py"))


def unit(path: Path) -> str:
    """The name in LAYERS that a file belongs to: a top-level module, or the folder it is in."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> tuple[set[str], set[str]]:
    """(units of jaxent, other top-level packages) that a file imports, anywhere in it."""
    own, others = set(), set()
    package = ("jaxent", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            # `from . import _contracts` names a module, `from ._contracts import fail` one in it
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for parts in names:
            if parts[0] == "jaxent":
                own.add(parts[1] if len(parts) > 1 else "__init__")
            else:
                others.add(parts[0])
    return own, others


def files(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(PACKAGE)))


@files(FILES)
def test_module_has_a_layer(path):
    assert unit(path) in RANK, f"say in LAYERS who may import jaxent/{path.relative_to(PACKAGE)}"


@files(FILES)
def test_imports_run_downward(path):
    me = unit(path)
    own, _ = imports(path)
    if me == "_logits":
        own -= {"_logits"}
    wrong = {module for module in own if RANK[module] >= RANK[me]}
    assert not wrong, f"{me} imports {sorted(wrong)}, which is not below it"
    assert own <= ONLY.get(me, own), f"{me} may import {sorted(ONLY[me])} only"


@files(FILES)
def test_imports_from_outside(path):
    _, others = imports(path)
    allowed = EXTERNAL | ({"chex"} if unit(path) == "_contracts" else set())
    assert others <= allowed


@files(FILES)
def test_file_is_short_and_says_what_it_is(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "the first line of a module says what it is"
    assert len(text.splitlines()) <= 450, "files near 400 lines want splitting"


@files(FILES)
def test_private_functions_take_few_arguments(path):
    """What belongs together travels in one record."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name not in FUNCTIONS:
            a = node.args
            number = len(a.posonlyargs + a.args + a.kwonlyargs) + bool(a.vararg) + bool(a.kwarg)
            assert number <= 6, f"{node.name} takes {number}"


def test_init_is_the_list_of_public_names():
    docstring, *statements = ast.parse((PACKAGE / "__init__.py").read_text()).body
    assert isinstance(docstring, ast.Expr)
    for node in statements:
        if isinstance(node, ast.Assign):  # __all__, __version__
            assert all(isinstance(t, ast.Name) and t.id.startswith("__") for t in node.targets)
            continue
        assert isinstance(node, ast.ImportFrom), "nothing but names"
        assert node.level == 1
        assert all(alias.asname == alias.name for alias in node.names), "`import x as x` makes x public"


def public_names() -> list[str]:
    """What `__init__` re-exports; the submodules are private."""
    return sorted(name for name in vars(jaxent) if not name.startswith("_"))


PUBLIC = public_names()
FUNCTIONS = [name for name in PUBLIC if inspect.isfunction(getattr(jaxent, name))]
CLASSES = [name for name in PUBLIC if inspect.isclass(getattr(jaxent, name))]


def test_public_names_are_functions_and_classes():
    assert set(PUBLIC) == set(FUNCTIONS) | set(CLASSES)
    assert set(getattr(jaxent, "__all__", PUBLIC)) - {"__version__"} == set(PUBLIC)


# The whole vocabulary: one meaning, one name, one default. A second default needs a line that says why.
ARRAYS = {
    "logits", "labels", "target_logits", "probs", "log_probs", "target_probs", "losses", "fn", "row_args",
    "hidden", "kernel", "samples", "x", "y",
}  # fmt: skip
OPTIONS: dict[str, set] = {
    "axis": {-1},
    "where": {None},
    "ignore_index": {None},
    "weights": {None},
    "class_weights": {None},
    "class_mask": {None},
    "classes": {None},
    "pos_weight": {None},
    "label_smoothing": {0.0},
    "z_loss": {0.0},
    "rest": {"bucket"},
    "temperature": {1.0},
    "beta": {0.5},
    "gamma": {2.0},
    "gamma_negative": {4.0},
    "gamma_positive": {1.0},
    "clip": {0.05},
    "generalized": {False},
    "alpha": {None},
    "epsilon": {1.0},
    # "mean" where the value is asked for, and not that of rows: an objective of one's own, and losses of a whole batch
    "reduction": {"none", "mean"},
    "has_aux": {False},
    "class_axis_name": {None},
    "batch_axis_name": {None},
    "axis_name": {None},
    "loss": {"softmax_cross_entropy"},
    "names": {None},
    "bias": {None, inspect.Parameter.empty},
    "scale": {1.0, inspect.Parameter.empty},
    "symmetric": {True},
    "ids": {None},
    "block_bytes": {None},
    "log_expected_counts": {None},
    "label_log_expected_counts": {None},
    "remove_accidental_hits": {True},
    "class_axis": {-1},
    "unique": {True},
}
SAMPLERS = {"key", "classes", "counts", "number"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parameters_are_named_alike(name):
    parameters = inspect.signature(getattr(jaxent, name)).parameters.values()
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            assert parameter.name in OPTIONS, f"`{parameter.name}`: a new word for the vocabulary"
            assert parameter.default in OPTIONS[parameter.name], parameter
        else:
            allowed = SAMPLERS if name.endswith("_sampler") else ARRAYS
            assert parameter.name in allowed, f"`{parameter.name}`: options are keyword-only"
            assert parameter.default in (inspect.Parameter.empty, None), parameter
    order = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    common = [option for option in ("axis", "where", "weights", "reduction") if option in order]
    assert common == [option for option in order if option in common], "the shared options in one order"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_shared_options_are_in_the_order_of_their_record(name):
    """`Options` is made of them by position."""
    order = [
        option for option in inspect.signature(getattr(jaxent, name)).parameters if option in Options._fields
    ]
    assert order == [option for option in Options._fields if option in order]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_reduction_of_the_losses(name):
    reduction = inspect.signature(getattr(jaxent, name)).parameters.get("reduction")
    if reduction is not None:
        assert reduction.default == ("mean" if name == "softmax_loss" or "contrastive" in name else "none")


def test_dataclasses_are_frozen():
    for name in CLASSES:
        cls = getattr(jaxent, name)
        if dataclasses.is_dataclass(cls):
            assert cls.__dataclass_params__.frozen, f"{name} is a value"
