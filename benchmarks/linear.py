"""Cross-entropy of a linear layer beside its peers, one process, interleaved rounds: python benchmarks/linear.py

Needs optax and matplotlib; tokamax (Python 3.12 and later) and torch (2.13 and later) take part where they are
installed. Absolute times on a shared machine mean little, so each round times every contestant, in an order that
rotates, and what is reported is the median over rounds of the ratio to the unfused loss of that round: optax on
`hidden @ kernel`, which builds the N x V logits.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import jaxent
from common import cores, readable_bytes, readable_seconds, surroundings, table
from jaxent._logits import sources
from linear_contestants import (
    BASE,
    CHUNKED_TORCH,
    COUNTED,
    DTYPES,
    HALF,
    JAXENT,
    MATMUL,
    TOKAMAX,
    TORCH,
    Contestant,
    Outputs,
    Problem,
    contestants,
    make_problem,
    tokamax,
    torch,
    torch_device,
)

SHAPES = [(2048, 512, 32_000), (1024, 256, 128_000), (32, 64, 1_000_000)]
GPU_SHAPES = [(8192, 4096, 131_072), (8192, 2304, 256_000)]
# and how many matmuls of 2 N D V operations the mathematics needs
MODES = {
    "forward": ("forward", 1.0),
    "grad": ("value_and_grad", 3.0),
    "masked": ("60 % of rows masked", 3 * COUNTED),
    "frozen": ("frozen kernel", 2.0),
}
ONLY = {
    MATMUL: "forward",
    CHUNKED_TORCH: "grad",
}  # chunks are torch's way with gradients, and take long on CPUs
COLORS = {
    BASE: "#4a4e69",
    HALF: "#c9c9c9",
    "tokamax xla": "#edae49",
    "tokamax chunked_xla": "#66a182",
    TORCH: "#8d99ae",
    CHUNKED_TORCH: "#5b8fb9",
    JAXENT: "#d1495b",
}


class Measured(NamedTuple):
    seconds: dict[str, dict[str, list[float]]]  # by mode and contestant, one per round
    temporaries: dict[str, dict[str, int | None]]  # by mode and contestant
    errors: dict[str, Outputs]  # by contestant
    failures: list[str]
    plan: str


# The truth.


def exact(problem: Problem) -> tuple[jax.Array, jax.Array, jax.Array]:
    """In float64: losses [N], the gradients of their sum by hidden and of their mean by kernel."""
    n, v = problem.hidden.shape[0], problem.kernel.shape[1]
    size = next(s for s in range(min(n, max(2**25 // v, 1)), 0, -1) if n % s == 0)

    def function(hidden, kernel, labels):
        kernel = kernel.astype(jnp.float64)

        def step(d_kernel, block):
            hidden, labels = block[0].astype(jnp.float64), block[1]
            z = hidden @ kernel
            lse = jax.nn.logsumexp(z, axis=1)
            rows = jnp.arange(size)
            dz = jnp.exp(z - lse[:, None]).at[rows, labels].add(-1)
            return d_kernel + hidden.T @ dz, (lse - z[rows, labels], dz @ kernel.T)

        blocks = hidden.reshape(-1, size, hidden.shape[1]), labels.reshape(-1, size)
        d_kernel, (losses, d_hidden) = jax.lax.scan(step, jnp.zeros_like(kernel), blocks)
        return losses.reshape(n), d_hidden.reshape(hidden.shape), d_kernel / n

    with jax.enable_x64(True):
        return jax.block_until_ready(jax.jit(function)(problem.hidden, problem.kernel, problem.labels))


@jax.jit
def distance(found, truth):
    """The relative error in norm."""
    difference = found.astype(jnp.float64) - truth
    return jnp.sqrt(jnp.sum(difference**2) / jnp.sum(truth**2))


def error(out: Outputs, mode: str, problem: Problem, truth: tuple[jax.Array, ...]) -> Outputs:
    losses, d_hidden, d_kernel = truth

    def of(found, truth, transposed=False):
        if torch is not None and isinstance(found, torch.Tensor):
            found = found.detach().float().cpu().numpy()
        found = jnp.asarray(found)
        return float(distance(found.T if transposed else found, truth))

    with jax.enable_x64(True):
        counts = problem.where if mode == "masked" else jnp.ones_like(problem.where)
        weights = counts / jnp.sum(counts)
        loss = of(out.loss, jnp.sum(weights * losses))
        hidden = None if out.hidden is None else of(out.hidden, weights[:, None] * d_hidden)
        if mode != "grad":
            return Outputs(loss, hidden)
        return Outputs(loss, hidden, of(out.kernel, d_kernel, out.kernel.shape != d_kernel.shape))


def largest(errors: list[Outputs]) -> Outputs:
    return Outputs(
        *(max((e for e in column if e is not None), default=None) for column in zip(*errors, strict=True))
    )


# Measuring.


def plan_of(problem: Problem) -> str:
    """The blocks that jaxent chooses."""
    cut = sources.cut(jaxent.LinearLogits(problem.hidden, problem.kernel), masked=False)
    (n, _), width, best = problem.hidden.shape, cut.classes.width, cut.by_rows
    rows = n if best is None else best.rows * best.pieces
    blocks = -(-n // rows) * -(-problem.kernel.shape[1] // width)
    return f"{blocks} block{'s' * (blocks > 1)} of {rows} rows x {width} classes"


def measure(problem: Problem, rounds: int, budget: float, bare: bool) -> Measured:
    """Each contestant takes part in as many rounds as its budget of seconds allows, but in one."""
    makers = contestants(problem, bare)
    truth = exact(problem)
    entries: dict[tuple[str, str], Contestant] = {}
    calls, rounds_of = {}, {}
    errors: dict[str, list[Outputs]] = {}
    failures = []
    for mode, (title, _) in MODES.items():
        for name, make in makers.items():
            if mode != ONLY.get(name, mode):
                continue
            try:
                contestant = make(mode)
                seconds, out = contestant.call()  # its results are looked at, its time is not reported
                if name != MATMUL:
                    errors.setdefault(name, []).append(error(out, mode, problem, truth))
                del out
                if seconds < 1:
                    seconds = contestant.call()[0]
            except Exception as problem_of_its_own:  # whatever a library raises, the others go on
                lines = str(problem_of_its_own).strip().splitlines() or [""]
                kind = type(problem_of_its_own).__name__
                failures.append(f"{name}, {problem.name}, {title}: {kind}: {lines[0][:200]}")
                continue
            # Short calls are repeated, so that every entry of a round is of a length that the clock can tell.
            calls[mode, name] = max(1, min(50, round(0.03 / max(seconds, 1e-6))))
            rounds_of[mode, name] = max(1, min(rounds, int(budget / (seconds * calls[mode, name]))))
            entries[mode, name] = contestant
    del truth
    gc.collect()

    measured: dict[str, dict[str, list[float]]] = {mode: {} for mode in MODES}
    for r in range(rounds):
        for mode in MODES:
            names = [name for m, name in entries if m == mode]
            for name in names[r % len(names) :] + names[: r % len(names)] if names else []:
                if r < rounds_of[mode, name]:
                    found = [entries[mode, name].call()[0] for _ in range(calls[mode, name])]
                    measured[mode].setdefault(name, []).append(statistics.median(found))
    temporaries = {
        mode: {name: entry.temporaries for (m, name), entry in entries.items() if m == mode} for mode in MODES
    }
    of_all = {name: largest(found) for name, found in errors.items()}
    return Measured(measured, temporaries, of_all, failures, plan_of(problem))


# What is printed and drawn.


def ratios(seconds: list[float] | None, base: list[float] | None) -> list[float]:
    """Round by round, for the rounds in which both took part."""
    return [a / b for a, b in zip(seconds or [], base or [], strict=False)]


def readable_ratio(found: list[float]) -> str:
    if not found:
        return "-"
    middle = f"{statistics.median(found):.2f}"
    return middle if len(found) == 1 else f"{middle} ({min(found):.2f} to {max(found):.2f})"


def time_row(problem: str, measured: Measured, name: str) -> list[str]:
    row = [f"{problem}, {name}"]
    for of_mode in measured.seconds.values():
        if name == BASE or BASE not in of_mode:  # without a base, what there is
            row.append(readable_seconds(of_mode[name]) if name in of_mode else "-")
        else:
            row.append(readable_ratio(ratios(of_mode.get(name), of_mode[BASE])))
    full = measured.seconds["grad"].get(name)
    for mode in ("masked", "frozen"):
        found = ratios(measured.seconds[mode].get(name), full)
        row.append(f"{statistics.median(found):.2f}" if found else "-")
    return row + ["-" if e is None else f"{e:.1e}" for e in measured.errors.get(name, Outputs(None))]


def share_row(problem: Problem, measured: Measured, name: str) -> list[str]:
    operations = 2 * problem.hidden.size * problem.kernel.shape[1]
    row = [f"{problem.name}, {name}"]
    bare = measured.seconds["forward"].get(MATMUL)
    for mode, (_, matmuls) in MODES.items():
        seconds = measured.seconds[mode].get(name)
        if not seconds:
            row.append("-")
            continue
        rate = matmuls * operations / statistics.median(seconds) / 1e12
        share = [matmuls / x for x in ratios(seconds, bare)]
        percent = f" ({100 * statistics.median(share):.0f} %)" if share and name != MATMUL else ""
        row.append(f"{rate:.3g}{percent}")
    return row


def draw(results: dict[str, Measured], path: Path, caption: str) -> None:
    """value_and_grad by problem: time relative to the unfused loss, and temporaries."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    def times_of(measured: Measured) -> dict[str, float]:
        seconds = measured.seconds["grad"]
        found = {name: ratios(seconds.get(name), seconds.get(BASE)) for name in COLORS if name != BASE}
        return {name: statistics.median(x) for name, x in found.items() if x}

    def bytes_of(measured: Measured) -> dict[str, float]:
        found = measured.temporaries["grad"]
        return {name: found[name] for name in COLORS if found.get(name) is not None}

    def write_ratio(x: float) -> str:
        return f"{x:.2f}" if x < 10 else f"{x:.3g}"

    titles = {
        "Time relative to optax on hidden @ kernel": (times_of, write_ratio),
        "Temporaries of the compiled program": (bytes_of, readable_bytes),
    }
    shown = [
        n for n in COLORS if any({**times_of(m), **bytes_of(m)}.get(n) is not None for m in results.values())
    ]
    if not shown:
        return
    counts = [max(len(times_of(m)), len(bytes_of(m)), 2) for m in results.values()]
    # a problem's middle: one bar a contestant, and the space of one between problems
    ends = np.cumsum([c + 1.2 for c in counts])
    middles = ends - np.array(counts) / 2
    height = 1.9 + ends[-1] * 0.21
    figure, panels = plt.subplots(1, len(titles), figsize=(13, height), sharey=True)
    for panel, (title, (of, write)) in zip(panels, titles.items(), strict=True):
        values = [x for measured in results.values() for x in of(measured).values()] or [1.0]
        values += [0.5, 2.0] if of is times_of else []
        low, high = max(0.7 * min(values), 1e-3), max(values)
        panel.set_xscale("log")
        panel.set_xlim(low, high * (high / low) ** 0.2)
        for middle, measured in zip(middles, results.values(), strict=True):
            bars = of(measured)
            for k, (name, value) in enumerate(bars.items()):
                y = middle + k - (len(bars) - 1) / 2
                panel.barh(y, value - low, 0.88, left=low, color=COLORS[name])
                weight = "bold" if name == JAXENT else "normal"
                box = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
                offset = {"textcoords": "offset points", "xytext": (4, 0), "va": "center"}
                panel.annotate(write(value), (value, y), fontsize=8, weight=weight, bbox=box, **offset)
        panel.xaxis.set_minor_locator(NullLocator())
        if of is times_of:
            panel.axvline(1, color="#333333", linewidth=1, linestyle=(0, (4, 3)))
            ticks = [x for x in 2.0 ** np.arange(-6, 11) if low < x < 1.2 * high]
            panel.xaxis.set_major_locator(FixedLocator(ticks))
            panel.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
        else:
            panel.xaxis.set_major_locator(LogLocator(10, (1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
            panel.xaxis.set_major_formatter(lambda x, _: readable_bytes(x))
        panel.set_title(title, fontsize=11)
        panel.tick_params(left=False)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.grid(axis="x", color="#eeeeee")
        panel.set_axisbelow(True)
    labels = []
    for problem, measured in results.items():
        base = measured.seconds["grad"].get(BASE)
        labels.append(f"{problem}\n1x: {1e3 * statistics.median(base):.3g} ms" if base else problem)
    panels[0].set_yticks(middles, labels)
    panels[0].set_ylim(ends[-1] + 0.2, 0.6)
    figure.suptitle("Cross-entropy of a linear layer, value_and_grad by both operands (less is better)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[name]) for name in shown]
    figure.legend(
        handles, shown, ncols=len(shown), loc="lower center", bbox_to_anchor=(0.5, 0.25 / height), frameon=False,
        fontsize=9, columnspacing=1.4, handlelength=1.4,
    )  # fmt: skip
    figure.text(0.5, 0.1 / height, caption, ha="center", fontsize=8, color="#666666")
    figure.tight_layout(rect=(0, 0.62 / height, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_json(results: dict[str, Measured], path: Path, caption: str) -> None:
    found = {
        problem: {**measured._asdict(), "errors": {k: e._asdict() for k, e in measured.errors.items()}}
        for problem, measured in results.items()
    }
    path.write_text(json.dumps({"caption": caption, "problems": found}, indent=1) + "\n")


def shape(text: str) -> tuple[int, int, int]:
    n, d, v = map(int, text.split("x"))
    return n, d, v


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="at most; default: 5")
    parser.add_argument("--seconds", type=float, default=3, help="for all rounds of a contestant; default: 3")
    parser.add_argument("--shapes", type=shape, nargs="+", help="as 2048x512x32000: N x D x V")
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", help="default: both, on a GPU bf16")
    parser.add_argument("--matmul", action="store_true", help="time a bare matmul too; on a GPU always")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for linear.png")
    parser.add_argument("--json", type=Path, help="file for every round's seconds")
    args = parser.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    shapes = args.shapes or (SHAPES if on_cpu else GPU_SHAPES)
    dtypes = args.dtypes or (list(DTYPES) if on_cpu else ["bf16"])
    bare = args.matmul or not on_cpu

    packages = ["jax", "jaxent", "optax", "numpy"]
    packages += [p for p, there in (("tokamax", tokamax), ("torch", torch)) if there is not None]
    caption = f"{surroundings(packages)}; at most {args.rounds} rounds"
    command = " ".join(["python", "benchmarks/linear.py", *sys.argv[1:]])
    print(f"`{command}`\n{caption}\n")
    if tokamax is None:
        print("tokamax is not installed: it takes no part.\n")
    if torch is None:
        print("torch is not installed: it takes no part.\n")
    elif not hasattr(torch.nn.functional, "linear_cross_entropy"):
        print("This torch has no linear_cross_entropy: it takes no part.\n")
    elif torch_device() is None:
        print("torch does not see the device that jax has: it takes no part.\n")
    if torch is not None:
        torch.set_num_threads(cores())  # as many as jax uses

    results: dict[str, Measured] = {}
    times, memory, shares, failures = [], [], [], []
    for n, d, v in shapes:
        for dtype in dtypes:
            start = time.perf_counter()
            problem = make_problem(dtype, n, d, v)
            measured = measure(problem, args.rounds, args.seconds, bare)
            results[problem.name] = measured
            failures += measured.failures
            names = [BASE, HALF, *TOKAMAX, TORCH, CHUNKED_TORCH, JAXENT]
            for name in names:
                if any(name in of_mode for of_mode in measured.seconds.values()):
                    times.append(time_row(problem.name, measured, name))
            found = measured.temporaries
            for name in names:
                if any(of_mode.get(name) is not None for of_mode in found.values()):
                    sizes = [readable_bytes(of_mode.get(name)) for of_mode in found.values()]
                    memory.append([f"{problem.name}, {name}", *sizes])
            if bare:
                shares += [
                    share_row(problem, measured, name)
                    for name in [MATMUL, *names]
                    if name in found["forward"]
                ]
            print(f"{problem.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            del problem
            gc.collect()

    modes = [title for title, _ in MODES.values()]
    print(
        "Time and error. Time: the unfused loss as median (and range) of the rounds, the others as ratios to it;"
    )
    print(
        "then the time with masked rows, and with a frozen kernel, over the contestant's own value_and_grad."
    )
    print(
        "Error: relative, against float64: of the loss and of the gradient by hidden (in norm) the largest of the"
    )
    print(
        "four cases, of the gradient by kernel that of value_and_grad. Gradients have the dtype of the operands:"
    )
    print("rounding them to bf16 is an error of about 2e-03.\n")
    header = ["", *modes, "masked / full", "frozen / full", "error: loss", "by hidden", "by kernel"]
    print(table(header, times))
    print("\nMemory: temporaries of the program, beyond arguments and results.\n")
    print(table(["", *modes], memory))
    print("\njaxent's blocks:\n")
    for name, measured in results.items():
        print(f"- {name}: {measured.plan}")
    if bare:
        print(
            "\nTFLOP/s, and the share of what a bare matmul (result in the dtype of its operands) reaches. Counted"
        )
        print(
            "are the matmuls that the mathematics needs: 1 forward, 3 with gradients, 2 with a frozen kernel, and of"
        )
        print("masked rows none.\n")
        print(table(["", *modes], shares))
    if failures:
        print("\nWhat failed:\n")
        print("\n".join(f"- {line}" for line in failures))
    if args.json is not None:
        write_json(results, args.json, caption)
    path = args.out / "linear.png"
    draw(results, path, caption)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
