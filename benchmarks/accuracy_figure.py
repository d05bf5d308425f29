"""The figure of benchmarks/accuracy.py: errors beside what is measured, a line for each contestant."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

import accuracy_contestants as contestants
from accuracy_cases import DTYPES, LABEL, LOSS

STEPS = 2  # to a factor of two
DASHES = [(3 * i, (3, 9)) for i in range(4)]  # what lies on one line is seen in turn


def add(lines: dict[int, float], size: np.ndarray, error: np.ndarray) -> None:
    """The largest error of each order of size."""
    size, error = np.asarray(size, np.float64), np.asarray(error, np.float64)
    error = np.where(np.isnan(error), np.inf, error)
    ok = (size > 0) & np.isfinite(size)
    orders = np.floor(STEPS * np.log2(size[ok])).astype(int)
    for order in np.unique(orders):
        lines[int(order)] = max(lines[int(order)], float(error[ok][orders == order].max()))


def line(panel: Any, lines: dict[int, float], name: str, least: float, most: float) -> None:
    orders = sorted(lines)
    x = 2.0 ** ((np.array(orders) + 0.5) / STEPS)
    y = np.clip([lines[order] for order in orders], least, most)
    style = "-" if name == contestants.JAXENT else DASHES[list(contestants.COLORS).index(name) % len(DASHES)]
    panel.plot(x, y, color=contestants.COLORS[name], linewidth=2.2, linestyle=style)


def draw(softmax: Any, by_exponent: Any, path: Path, caption: str) -> None:
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(13, 9))
    (of_loss, of_label), (of_sigmoid, of_dtypes) = panels
    for panel in panels.flat:
        panel.set_yscale("log")
    for panel, quantity, what in (
        (of_loss, LOSS, "loss"),
        (of_label, LABEL, "gradient at the label (1 - p)"),
    ):
        for name in contestants.SOFTMAX:
            line(panel, softmax.by_size[quantity, name], name, 1e-9, 1.0)
        panel.set_xlim(1e-36, 1e3 if quantity == LOSS else 2)
        panel.set_ylim(1e-9, 3)
        panel.set_xlabel(what)
        panel.set_ylabel("largest relative error (1: nothing left)")
        panel.set_title(f"Softmax cross-entropy, float32: {what}", fontsize=11)
    for name in contestants.SIGMOID:
        line(of_sigmoid, by_exponent["gradient", name], name, 0.1, 2.0**24)
    of_sigmoid.set_xlim(2.0**-10, 2.0**7)
    of_sigmoid.set_ylim(0.1, 2.0**25)
    of_sigmoid.set_xlabel("logit")
    of_sigmoid.set_ylabel("largest error, ulp")
    of_sigmoid.set_title(
        "Sigmoid cross-entropy at label 1, float32: gradient, 65,536 logits of each exponent", fontsize=11
    )
    for panel in (of_loss, of_label, of_sigmoid):
        panel.set_xscale("log")
    bars(of_dtypes, softmax)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#eeeeee")
        panel.set_axisbelow(True)
    names = {f"{name}, {other}" if other != name else name: name for name, other in labels().items()}
    handles = [plt.Rectangle((0, 0), 1, 1, color=contestants.COLORS[name]) for name in names.values()]
    figure.legend(
        handles, names, ncols=len(handles), loc="lower center", bbox_to_anchor=(0.5, 0.025), frameon=False
    )
    figure.text(0.5, 0.012, caption, ha="center", fontsize=8, color="#666666")
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def labels() -> dict[str, str]:
    """Names in the panels of softmax, and in that of sigmoid."""
    c = contestants
    renamed = {c.LOG_SOFTMAX: c.LOG_SIGMOID, c.NAIVE: c.NAIVE_SIGMOID}
    return {name: renamed.get(name, name) for name in c.SOFTMAX}


def bars(panel: Any, softmax: Any) -> None:
    """Relative errors of ordinary rows, by dtype."""
    names = list(contestants.SOFTMAX)
    for k, name in enumerate(names):
        for i, dtype in enumerate(DTYPES):
            found = [
                r.error.relative
                for r in softmax.records
                if (r.quantity, r.contestant, r.setting["dtype"]) == (LOSS, name, dtype)
                and r.setting["scale"] == 1
                and r.setting["margin"] is None
            ]
            if found:
                x = i + (k - (len(names) - 1) / 2) * 0.16
                panel.bar(x, min(max(found), 1), 0.15, color=contestants.COLORS[name])
    panel.set_xticks(range(len(DTYPES)), DTYPES)
    panel.set_ylim(1e-17, 3)
    panel.set_ylabel("largest relative error of the loss")
    panel.set_title(
        "Softmax cross-entropy, logits of standard deviation 1, offsets up to 10,000", fontsize=11
    )
