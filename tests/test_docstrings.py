"""The form of the documentation: its sections, their order, and that a parameter is described alike everywhere.

Doctest runs the examples; what documentation says of values, gradients, memory and errors is tested where these are.
"""

import dataclasses
import doctest
import graphlib
import inspect
import itertools
import re
import textwrap

import pytest

import jaxent
from test_architecture import CLASSES, FUNCTIONS, PUBLIC
from test_readme import PAGES

LOSSES = [name for name in FUNCTIONS if "reduction" in inspect.signature(getattr(jaxent, name)).parameters]

SECTIONS = ["Args", "Returns", "Gradients", "Numerics", "Cost", "Raises", "Example", "Source"]
# `diagnose` looks at arrays from outside: it has no gradient, no arithmetic to account for, no paper.
OUTSIDE = ["Args", "Returns", "Cost", "Raises", "Example"]
# What users make has what a function has, but returns itself; what they are given has fields.
MADE = {"LinearLogits", "SparseDistribution"}
SECTIONS_OF = {name: ["Attributes"] for name in CLASSES} | {
    "diagnose": OUTSIDE,
    "SparseDistribution": [title for title in SECTIONS if title != "Returns"],
    "LinearLogits": ["Args", "Attributes", *SECTIONS[2:]],
}
TITLES = {*SECTIONS, "Attributes"}
WITH_ARGS = [*FUNCTIONS, *sorted(MADE)]

# What the description of a parameter says, wherever there is one of that name: shape, dtype, range.
ROWS = r"`\[(\.\.\.|N)\]`"
NUMBER = r"number.* or an array `\[\]`"
SAYS = {
    "logits": (r"`\[\.\.\.(, V)?\]`, floating point",),
    "target_logits": ("the shape of `logits`",),
    "probs": (r"`\[\.\.\.(, [VK])?\]`", "float"),
    "log_probs": (r"`\[\.\.\., V\]`, floating point",),
    "target_probs": (r"`\[\.\.\., V\]`, floating point", ">= 0"),
    "losses": (ROWS, "floating point"),
    "hidden": (r"`\[\.\.\., D\]`, floating point",),
    "kernel": (r"`\[D, V\]`, floating point",),
    "bias": (r"`\[V\]`|" + NUMBER,),
    "x": (r"`\[N, D\]`, floating point",),
    "y": (r"`\[N, D\]`", r"`\[M, D\]`"),
    "labels": (r"`\[\.\.\.\]`", "integers", r"\[0, V\)|\[0, 1\]"),
    "samples": (r"integers `\[S\]` or `\[\.\.\., S\]`", r"\[0, V\)"),
    "key": (r"`jax\.random`",),
    "counts": (r"real `\[V\]`, >= 0",),
    "number": ("S, how many", "> 0"),
    "classes": (r"integers `\[\.\.\., K\]`.*\[0, V\)|V, how many.*> 0",),
    "where": (rf"^bool {ROWS}",),
    "weights": (rf"^real {ROWS}",),
    "ignore_index": ("int.* label",),
    "class_weights": (r"^real `\[V\]`",),
    "class_mask": (r"^bool `\[V\]` or the shape of `logits`",),
    "axis": ("^the class axis",),
    "class_axis": (r"of the kernel: -1 for `\[D, V\]`, 0 for",),
    "pos_weight": (">= 0", r"number, or an array `\[\]`, `\[V\]`.* or\s+`\[\.\.\.\]`"),
    "label_smoothing": (r"in \[0, 1\]", NUMBER),
    "z_loss": (">= 0", NUMBER),
    "gamma": (">= 0", NUMBER),
    "gamma_negative": (">= 0", NUMBER),
    "gamma_positive": (">= 0", NUMBER),
    "epsilon": (">= -1", NUMBER),
    "alpha": (r">= 0|in \[0, 1\]", r"array\s+`\[\]`", r"`\[V\]`"),
    "clip": (r"in \[0, 1\)", "number"),
    "temperature": ("T > 0", NUMBER, r"`\[\.\.\.\]`, one per row"),
    "softcap": ("> 0", NUMBER),
    "beta": (r"in \[0, 1\]", NUMBER, r"`\[\.\.\.\]`, one per row"),
    "scale": ("> 0", NUMBER),
    "ids": (r"integers `\[N\]`", r"`\[M\]`"),
    "rest": ('"bucket"', '"ignore"'),
    "log_expected_counts": ("real, the shape of `samples`",),
    "label_log_expected_counts": ("real, the shape of `labels`",),
    "reduction": ('"none".*, "sum" or "mean"',),
    "class_axis_name": ("^of a mapped axis .*classes",),
    "batch_axis_name": ("^of a mapped axis .*(rows|pairs) are split",),
    "axis_name": ("^of a mapped axis .*rows are split",),
    "block_bytes": ("> 0", "memory", "None"),
}
# Any array is right there: it is what `diagnose` is asked about.
ANYTHING = {("diagnose", "logits"), ("diagnose", "labels")}
WORK = r"\d{4}|docs/\w+\.md|\b(torch|tf|keras|optax|TensorFlow|MaxText|fairseq|TRL)\b"  # a paper or a system


def sections(name: str) -> dict[str, str]:
    """Title -> body; "" has what comes before the first."""
    pieces = re.split(r"^([A-Z]\w+):$", inspect.getdoc(getattr(jaxent, name)) or "", flags=re.MULTILINE)
    return dict(zip(["", *pieces[1::2]], pieces[::2], strict=True))


def described(name: str, title: str) -> dict[str, str]:
    """Parameter or field -> its description, on one line."""
    lines = textwrap.dedent(sections(name)[title].strip("\n"))
    pieces = re.split(r"^(\*{0,2}\w+): ", lines, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], [" ".join(text.split()) for text in pieces[2::2]], strict=True))


def parameters(name: str) -> list[str]:
    """As they are written: `*row_args`."""
    found = inspect.signature(getattr(jaxent, name)).parameters.values()
    return [f"*{p.name}" if p.kind is p.VAR_POSITIONAL else p.name for p in found]


def fields(cls: type) -> list[str]:
    """Of a record, then its properties."""
    own = cls._fields if hasattr(cls, "_fields") else [field.name for field in dataclasses.fields(cls)]
    return [*own, *(name for name, x in vars(cls).items() if isinstance(x, property))]


@pytest.mark.parametrize("name", PUBLIC)
def test_one_line_then_the_sections_in_their_order(name):
    found = sections(name)
    first, _, rest = found[""].partition("\n")
    assert first.endswith(".") and not rest.partition("\n")[0], "one line, and a paragraph"
    titles = [title for title in found if title]
    assert titles == SECTIONS_OF.get(name, SECTIONS)
    assert all(found[title].strip() for title in titles)


@pytest.mark.parametrize("name", LOSSES)
def test_formula_comes_with_mask_and_denominator(name):
    formula = " ".join(sections(name)[""].split())
    lines = sections(name)[""].splitlines()
    assert any(line.startswith("    ") and " = " in line for line in lines), "on a line of its own"
    assert re.search(r"/ sum\((where|weights)|mean divides as there", formula), "what a mean divides by"
    assert re.search(r"that count|\(where w|mean divides as there", formula), "which rows it is of"


@pytest.mark.parametrize("name", WITH_ARGS)
def test_args_are_the_parameters_with_shape_dtype_and_range(name):
    args = described(name, "Args")
    assert list(args) == parameters(name)
    for parameter, text in args.items():
        for words in SAYS.get(parameter, ()):
            if (name, parameter) not in ANYTHING:
                assert re.search(words, text), f"{parameter}: {text}"


def test_what_is_said_alike_is_a_parameter_of_many():
    used = {parameter for name in WITH_ARGS for parameter in parameters(name)}
    # these have one place each, or no shape: a function, pytrees, names, switches
    free = {
        "fn", "*row_args", "names", "loss", "has_aux", "generalized", "symmetric", "unique", "precision",
        "remove_accidental_hits",
    }  # fmt: skip
    assert used - free == set(SAYS)


def test_parameters_are_in_one_order_over_the_api():
    """There is an order of all names of which each signature is a part."""
    after = graphlib.TopologicalSorter()
    for name in FUNCTIONS:
        for before, parameter in itertools.pairwise(parameters(name)):
            after.add(parameter, before)
    after.prepare()  # CycleError names those that are in two orders


@pytest.mark.parametrize("name", LOSSES)
def test_returns_of_a_loss(name):
    text = " ".join(sections(name)["Returns"].split())
    assert re.search(ROWS, text) and "scalar" in text
    if name != "softmax_loss":  # whose function may give anything
        assert "in nats" in text
        assert "float32" in text and "float64" in text


@pytest.mark.parametrize("name", sorted({*FUNCTIONS} - {*LOSSES}))
def test_returns_of_what_is_no_loss(name):
    text = sections(name)["Returns"]
    records = [x for x in CLASSES if f"`{x}`" in text]
    assert records or "scalar" in text
    if name != "diagnose":
        assert re.search("int32|float32|dtype", text)
        assert not records or re.search(r"`\[.*\]`", text), "the shape"


@pytest.mark.parametrize("name", WITH_ARGS)
def test_raises_says_which_error(name):
    errors = re.findall(r"\b\w+Error\b", sections(name)["Raises"])
    assert {*errors} <= {"TypeError", "ValueError"}
    assert errors or sections(name)["Raises"].strip().startswith("As `")


@pytest.mark.parametrize("name", PUBLIC)
def test_what_another_page_says_stands_there(name):
    """`As x`, in a section: x has that section, and words of its own in it."""
    for title in TITLES - {"Args", "Attributes"}:
        for other in re.findall(r"\b(?:[Aa]s|[Tt]hat of) `(\w+)`", sections(name).get(title, "")):
            if other in PUBLIC:
                theirs = sections(other)[title].strip()
                assert not re.fullmatch(r"As `\w+`\.", theirs), f"{title} of {other}"
                assert f"As `{name}`" not in theirs, "in a circle"


@pytest.mark.parametrize("name", PUBLIC)
def test_pages_it_leads_to_speak_of_it(name):
    for page in re.findall(r"docs/(\w+\.md)", inspect.getdoc(getattr(jaxent, name))):
        assert name in PAGES[page] or page == "architecture.md"


@pytest.mark.parametrize("name", WITH_ARGS)
def test_parameters_that_are_as_elsewhere_are_there(name):
    left = parameters(name)
    for text in described(name, "Args").values():
        for other in re.findall(r"as in\s+`(\w+)`", text):
            same = left if "all that follow" in text else left[:1]
            assert {*same} <= {*parameters(other)}, f"{text} ({other})"
        left = left[1:]


@pytest.mark.parametrize("name", WITH_ARGS)
def test_example_prints_something(name):
    found = sections(name)
    assert f"jaxent.{name}(" in found["Example"]
    examples = doctest.DocTestParser().get_examples(found["Example"])
    assert examples[-1].want, "one without output would promise nothing"
    assert all(example.want for example in examples if example.source.startswith("print("))


@pytest.mark.parametrize("name", sorted({*WITH_ARGS} - {"diagnose"}))
def test_source_is_a_paper_or_a_system(name):
    assert re.search(WORK, sections(name)["Source"])


@pytest.mark.parametrize("name", CLASSES)
def test_class_says_what_it_holds(name):
    cls = getattr(jaxent, name)
    own = fields(cls)
    described_fields = {**(described(name, "Args") if name in MADE else {})}
    if "Attributes" in SECTIONS_OF[name]:
        described_fields |= described(name, "Attributes")
    assert list(described_fields) == own
    hints = getattr(cls, "__annotations__", {})
    for field in own:
        if "Array" in str(hints.get(field, "")) and field not in SAYS:
            assert re.search(r"`\[.*\]`", described_fields[field]), f"the shape of {field}"


@pytest.mark.parametrize("name", CLASSES)
def test_methods_are_documented(name):
    cls = getattr(jaxent, name)
    methods = [
        x for x in vars(cls).items() if inspect.isroutine(x[1]) and not x[0].startswith(("_", "tree_"))
    ]
    for method, f in methods:
        assert inspect.getdoc(f), method


def told(name: str, title: str) -> str:
    """A section, with those of others that it refers to."""
    text = sections(name)[title]
    others = re.findall(r"\b(?:[Aa]s(?: in)?|[Tt]hat of|those of) `(\w+)`", text)
    return " ".join([text, *(told(other, title) for other in others if other in PUBLIC and other != name)])


@pytest.mark.parametrize("name", LOSSES)
def test_numerics_and_gradients_of_a_loss(name):
    """What it is summed in, and what becomes of inf, of NaN, of rows that are hidden; of which dtype gradients are."""
    numerics = told(name, "Numerics")
    assert "float32" in numerics and "inf" in numerics and "NaN" in numerics
    hidden = described(name, "Args")["where"] + told(name, "Args") + numerics
    assert re.search("gone|do not count|contribute exactly 0", hidden)
    assert "dtype" in told(name, "Gradients")


@pytest.mark.parametrize("name", WITH_ARGS)
def test_cost_is_in_sizes(name):
    """Of N, D, V, S or K, or of what is given; and in matmuls where there is one."""
    cost = told(name, "Cost")
    assert re.search(r"\b[NDVSK]\b|result|arrays?\b|One pass", cost)
    if {"kernel", "x"} & {*parameters(name)} and name != "candidate_columns":
        assert re.search(r"\d matmuls?", cost)
