"""Dense softmax cross-entropy beside its peers, one process, interleaved rounds: python benchmarks/dense.py

Options: --quick (small shapes, 3 rounds), --rounds N, --out DIR (where dense.png goes, default: here).
Needs optax and matplotlib; torch takes part where it is installed.

Absolute times on a shared machine mean little, so each round times every contestant, in an order that
rotates, and what is reported is the median over rounds of the ratio to optax's integer loss of that round.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import jaxent
from common import readable_bytes, readable_seconds, surroundings, table

try:
    import torch
except ImportError:
    torch = None

SHAPES = [
    ("float32", 2048, 32_000),
    ("float32", 2048, 32_003),  # a prime
    ("bfloat16", 2048, 32_000),
    ("float32", 32, 1_000_000),
    ("float32", 16_384, 1000),
    ("float32", 4096, 1000),
    ("float32", 256, 1000),
    ("float32", 65_536, 10),
    ("float32", 65_536, 2),
]
QUICK = [
    ("float32", 128, 32_000),
    ("bfloat16", 128, 32_000),
    ("float32", 2, 1_000_000),
    ("float32", 2048, 1000),
    ("float32", 8192, 10),
]
MODES = {"forward": "forward", "grad": "value_and_grad", "donated": "value_and_grad, logits donated"}
BASE = "optax, integer labels"
ONE_HOT = "optax, one-hot"
TORCH = "torch"
PLAIN = "jaxent"
CONFIDENT = "jaxent, confident rows"
OPTIONS = "jaxent, smoothing + z-loss"
COLORS = {ONE_HOT: "#c9c9c9", TORCH: "#8d99ae", PLAIN: "#d1495b", CONFIDENT: "#edae49", OPTIONS: "#66a182"}


class Problem(NamedTuple):
    logits: jax.Array  # [N, V]
    labels: jax.Array  # [N]
    confident: jax.Array  # [N, V]: the label's logit is 40 higher in every fourth row

    @property
    def name(self) -> str:
        n, v = self.logits.shape
        short = {"float32": "f32", "bfloat16": "bf16"}[str(self.logits.dtype)]
        return f"{short} [{n}, {v}]"


def make_problem(dtype: str, n: int, v: int) -> Problem:
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((n, v), np.float32)
    labels = rng.integers(0, v, n, np.int32)
    confident = logits.copy()
    confident[np.arange(0, n, 4), labels[::4]] += 40
    return Problem(jnp.asarray(logits, dtype), jnp.asarray(labels), jnp.asarray(confident, dtype))


def one_hot_losses(logits, labels):
    return optax.losses.softmax_cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1]))


def jaxent_losses(logits, labels):
    return jaxent.softmax_cross_entropy(logits, labels)


def optioned_losses(logits, labels):
    return jaxent.softmax_cross_entropy(logits, labels, label_smoothing=0.1, z_loss=1e-4)


ROW_LOSSES = {
    BASE: optax.losses.softmax_cross_entropy_with_integer_labels,
    ONE_HOT: one_hot_losses,
    PLAIN: jaxent_losses,
    OPTIONS: optioned_losses,
}


def jax_contestant(losses, logits, labels, mode: str) -> tuple[Callable[[], float], int]:
    """(time one call in seconds, bytes of temporaries)."""

    def mean(logits, labels):
        return jnp.mean(losses(logits, labels).astype(jnp.float32))

    function = mean if mode == "forward" else jax.value_and_grad(mean)
    donate = (0,) if mode == "donated" else ()
    compiled = jax.jit(function, donate_argnums=donate).lower(logits, labels).compile()

    def timed() -> float:
        argument = jax.block_until_ready(jnp.copy(logits)) if donate else logits
        start = time.perf_counter()
        out = jax.block_until_ready(compiled(argument, labels))
        seconds = time.perf_counter() - start
        del out  # giving the memory back is not the loss's work
        return seconds

    return timed, compiled.memory_analysis().temp_size_in_bytes


def to_torch(logits, labels):
    z = torch.from_numpy(np.array(logits, np.float32)).to(getattr(torch, str(logits.dtype)))
    return z, torch.from_numpy(np.array(labels, np.int64))


def torch_contestant(logits, labels, mode: str) -> Callable[[], float]:
    z, y = to_torch(logits, labels)
    z.requires_grad_(mode != "forward")

    def timed() -> float:
        z.grad = None
        start = time.perf_counter()
        loss = torch.nn.functional.cross_entropy(z, y)
        if mode != "forward":
            loss.backward()
        loss.item()
        return time.perf_counter() - start

    return timed


def measure(problem: Problem, mode: str, rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each round and bytes of temporaries, by contestant."""
    timers: dict[str, Callable[[], float]] = {}
    temporaries = {}
    for name, losses in ROW_LOSSES.items():
        timers[name], temporaries[name] = jax_contestant(losses, problem.logits, problem.labels, mode)
    timers[CONFIDENT], temporaries[CONFIDENT] = jax_contestant(
        jaxent_losses, problem.confident, problem.labels, mode
    )
    if torch is not None and mode != "donated":
        timers[TORCH] = torch_contestant(problem.logits, problem.labels, mode)

    for timed in timers.values():
        timed()
    # Short calls are repeated, so that every entry of a round is of a length that the clock can tell.
    calls = {name: max(1, min(50, round(0.03 / max(timed(), 1e-6)))) for name, timed in timers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    names = list(timers)
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            seconds[name].append(statistics.median(timers[name]() for _ in range(calls[name])))
    return seconds, temporaries


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def exact_losses(logits: np.ndarray, labels: np.ndarray) -> Iterator[float]:
    """Row by row in float64, the label's class left out of the sum so that small losses keep their digits."""
    for row, label in zip(logits, labels, strict=True):
        z = row.astype(np.float64)
        others = np.delete(z, label)
        top = others.max()
        rest = top + np.log(np.exp(others - top).sum())  # log of the sum over the other classes
        yield np.logaddexp(0.0, rest - z[label])


def errors(problem: Problem) -> dict[str, tuple[float, float]]:
    """Max relative error of the row losses, by contestant: (ordinary rows, confident rows)."""
    logits, labels = np.asarray(problem.confident), np.asarray(problem.labels)
    exact = np.fromiter(exact_losses(logits, labels), np.float64, len(labels))
    sure = np.arange(len(labels)) % 4 == 0
    found = {}
    for name in (BASE, ONE_HOT, PLAIN):
        losses = jax.jit(ROW_LOSSES[name])(problem.confident, problem.labels)
        found[name] = np.asarray(losses.astype(jnp.float32), np.float64)
    if torch is not None:
        z, y = to_torch(problem.confident, labels)
        losses = torch.nn.functional.cross_entropy(z, y, reduction="none")
        found[TORCH] = losses.double().numpy()
    relative = {name: np.abs(losses - exact) / exact for name, losses in found.items()}
    return {name: (float(e[~sure].max()), float(e[sure].max())) for name, e in relative.items()}


def draw(results: dict[str, dict[str, dict[str, float]]], path: Path, caption: str) -> None:
    """results[mode][problem][contestant] = ratio to optax's integer loss."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, NullLocator

    contestants = [c for c in COLORS if any(c in r for rows in results.values() for r in rows.values())]
    problems = list(next(iter(results.values())))
    ratios = [x for rows in results.values() for r in rows.values() for x in r.values()]
    low, high = min(*ratios, 0.5) * 0.8, max(*ratios, 2.0) * 1.9
    height = 1.9 + len(problems) * len(contestants) * 0.21
    figure, panels = plt.subplots(1, len(results), figsize=(14, height), sharey=True)
    thickness = 0.84 / len(contestants)
    for panel, (mode, rows) in zip(panels, results.items(), strict=True):
        for i, problem in enumerate(problems):
            present = [c for c in contestants if c in rows[problem]]
            for k, contestant in enumerate(present):
                value = rows[problem][contestant]
                y = i + (k - (len(present) - 1) / 2) * thickness
                panel.barh(y, value - low, thickness * 0.9, left=low, color=COLORS[contestant])
                weight = "bold" if contestant == PLAIN else "normal"
                box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
                panel.text(value * 1.05, y, f"{value:.2f}", va="center", fontsize=8, weight=weight, bbox=box)
        panel.axvline(1, color="#333333", linewidth=1, linestyle=(0, (4, 3)))
        panel.set_xscale("log")
        panel.set_xlim(low, high)
        panel.xaxis.set_major_locator(FixedLocator([x for x in (0.1, 0.25, 0.5, 1, 2, 4, 8, 16) if x > low]))
        panel.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_title(MODES[mode], fontsize=11)
        panel.set_yticks(range(len(problems)), problems)
        panel.tick_params(left=False)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.grid(axis="x", color="#eeeeee")
        panel.set_axisbelow(True)
    panels[0].invert_yaxis()
    figure.suptitle("Time of softmax cross-entropy relative to optax with integer labels (less is better)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[c]) for c in contestants]
    figure.legend(
        handles, contestants, ncols=len(contestants), loc="lower center", bbox_to_anchor=(0.5, 0.25 / height),
        frameon=False,
    )  # fmt: skip
    figure.text(0.5, 0.1 / height, caption, ha="center", fontsize=8, color="#666666")
    figure.tight_layout(rect=(0, 0.62 / height, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, 3 rounds")
    parser.add_argument("--rounds", type=int, help="default: 7, with --quick 3")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for dense.png")
    args = parser.parse_args()
    rounds = args.rounds or (3 if args.quick else 7)

    caption = surroundings(["jax", "jaxent", "optax", "numpy"] + (["torch"] if torch is not None else []))
    caption = f"{caption}; {rounds} rounds"
    command = " ".join(["python", "benchmarks/dense.py", *sys.argv[1:]])
    print(f"`{command}`\n{caption}\n")
    if torch is None:
        print("torch is not installed: it takes no part.\n")
    elif jax.devices()[0].platform != "cpu":
        print("torch runs on the CPU here, the others do not: compare it with nothing.\n")

    ratios: dict[str, dict[str, dict[str, float]]] = {mode: {} for mode in MODES}
    speed, memory, accuracy = [], [], []
    names = [ONE_HOT, *([TORCH] if torch is not None else []), PLAIN, CONFIDENT, OPTIONS]
    for shape in QUICK if args.quick else SHAPES:
        problem = make_problem(*shape)
        for mode, title in MODES.items():
            seconds, temporaries = measure(problem, mode, rounds)
            found = {name: ratio(seconds, name, BASE) for name in names if name in seconds}
            ratios[mode][problem.name] = found
            speed.append(
                [f"{problem.name}, {title}", readable_seconds(seconds[BASE])]
                + [f"{found[name]:.2f}" if name in found else "-" for name in names]
                + [f"{ratio(seconds, OPTIONS, PLAIN):.2f}"]
            )
            memory.append(
                [f"{problem.name}, {title}"]
                + [readable_bytes(temporaries.get(name)) for name in (BASE, ONE_HOT, PLAIN, OPTIONS)]
            )
            print(f"{problem.name}, {title}: done", file=sys.stderr, flush=True)
            gc.collect()
        measured = errors(problem)
        for name, (ordinary, confident) in measured.items():
            accuracy.append([f"{problem.name}, {name}", f"{ordinary:.1e}", f"{confident:.1e}"])

    print("Time: optax as median (and range) of the rounds, the others as ratios to it; in the last column")
    print("smoothing + z-loss over plain jaxent.\n")
    print(table(["", BASE, *names, "options / plain"], speed))
    print("\nMemory: temporaries of the compiled program, beyond arguments and results.\n")
    print(table(["", BASE, ONE_HOT, PLAIN, OPTIONS], memory))
    print("\nAccuracy: largest relative error of a row's loss against float64 (1: nothing left of it).")
    print("Confident rows have the label's logit 40 higher.\n")
    print(table(["", "ordinary rows", "confident rows"], accuracy))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "dense.png"
    draw(ratios, path, caption)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
