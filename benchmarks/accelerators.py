"""Losses compiled for TPUs and an H100, on a machine that has neither: python benchmarks/accelerators.py --out docs

Nothing is run. What is counted in a compiled program is exact: its temporaries, its matmuls and their dtypes, what it
reads and writes of arrays of rows by classes, what it sends. Cycles are those that the TPU's compiler expects of each
instruction (`estimated_cycles`), loops multiplied: a model, of which only ratios on one machine mean something. The
base is the unfused loss, optax on float32 logits `hidden @ kernel`. `--detail` names the dearest parts of a program.

Needs optax and matplotlib, and what benchmarks/machines.py says; tokamax takes part where it is installed.
"""

import argparse
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from machines import H100, MACHINES, compile_for, mesh, missing

import jax  # isort: skip
import jax.numpy as jnp
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxent
from common import readable_bytes, table, version
from compiled import Program, Shape

try:
    import tokamax
except ImportError:
    tokamax = None

QUARTERS = 4  # of a block: the matmuls take so many of them as hold rows that count
SMALL = 0.1  # of the temporaries of the unfused loss, where little memory is given
COUNTED = 0.4  # of the rows, where 60 % are masked
BASE, JAXENT = "unfused", "jaxent"
HIGHEST = 2.1  # bar of the plot; what is above is cut
SPLIT = {"data": 2, "vocab": 2}


class Problem(NamedTuple):
    """A last layer and its batch."""

    name: str
    rows: int
    features: int
    classes: int

    @property
    def shape(self) -> str:
        return f"[{self.rows}, {self.features}] x [{self.features}, {self.classes}]"

    @property
    def matmul(self) -> int:
        return 2 * self.rows * self.features * self.classes

    def arguments(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """hidden, kernel, labels, where."""
        n, d, v = self.rows, self.features, self.classes
        half, array = jnp.bfloat16, jax.ShapeDtypeStruct
        return array((n, d), half), array((d, v), half), array((n,), jnp.int32), array((n,), jnp.bool_)

    def is_logits(self, shape: Shape) -> bool:
        """An array of rows by classes, or a piece of it: not of the layer."""
        dims = [n for n in shape.dims if n > 1]
        large = shape.size >= self.rows * self.classes / 1000 and len(dims) >= 2
        return large and self.features not in dims


PROBLEMS = [
    Problem("Llama-3 8B", 8192, 4096, 131_072),
    Problem("Gemma-2 2B", 8192, 2304, 256_000),
    Problem("Qwen 2.5", 8192, 3584, 152_064),
    Problem("GPT-2", 16_384, 768, 50_257),
    Problem("16k rows", 16_384, 4096, 128_256),
    Problem("V = 1M", 4096, 1024, 1_000_000),
    Problem("few rows", 128, 4096, 128_256),
    Problem("D = 8192", 4096, 8192, 128_256),
]


class Measured(NamedTuple):
    cycles: int
    temporaries: int
    matmuls: float  # of 2 N D V operations
    operands: str
    passes: float  # over N x V elements
    bytes: float | None
    collectives: tuple[int, int]  # outside and inside of loops
    parts: list[tuple[int, int, str, str, str]]


def steps_where_a_share_counts(once: Program, problem: Problem, share: float) -> Callable[[int, bool], int]:
    """How often loops run, and which branch is taken, where the rows that count are so many: by whole quarters.

    From the sizes of the matmuls: how many rows a piece and a block have.
    """
    d, v = problem.features, problem.classes
    of_pieces = [m.result.size // v for m in once.matmuls() if m.terms == d and m.result.size % v == 0]
    of_blocks = [m.terms for m in once.matmuls() if m.result.size == d * v]
    piece, block = max(of_pieces, default=1), max(of_blocks, default=1)
    blocks = math.ceil(share * problem.rows / block)
    quarters = math.ceil(QUARTERS * min(share * problem.rows / block, 1))

    def steps(branches: int, is_outer: bool) -> int:
        if branches:
            return math.ceil(quarters * branches / QUARTERS)
        if is_outer or block == piece:
            return blocks
        return math.ceil(quarters * block / (QUARTERS * piece))

    return steps


def read(program: Any, problem: Problem, share: float = 1.0, devices: int = 1) -> Measured:
    """Of loops and branches that depend on which rows count, those of a share."""
    text = Program(
        program,
        steps_where_a_share_counts(Program(program, lambda branches, _: branches or 1), problem, share),
    )
    sent = text.collectives()
    found = text.matmuls()
    operands = {
        f"{m.lhs.dtype} x {m.rhs.dtype}" if m.lhs.dtype != m.rhs.dtype else m.lhs.dtype for m in found
    }
    costs = program.cost_analysis() or {}
    parts = [
        (
            step.times * x.cycles,
            step.times,
            x.name,
            str(x.shapes[0].dtype) + str(list(x.shapes[0].dims)),
            x.where,
        )
        for step in text.steps()
        if (x := step.instruction).cycles
    ]
    return Measured(
        text.cycles,
        program.memory_analysis().temp_size_in_bytes,
        devices * sum(m.operations for m in found) / max(problem.matmul, 1),
        ", ".join(sorted(operands)),
        devices * text.accesses(problem.is_logits) / (problem.rows * problem.classes),
        costs.get("bytes accessed"),
        tuple(sum(c.times for c in sent if c.in_loop == in_loop) for in_loop in (False, True)),
        sorted(parts, reverse=True),
    )


# What is compiled.


def unfused_loss(hidden: Any, kernel: Any, labels: Any, where: Any = None) -> Any:
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses) if where is None else jnp.sum(jnp.where(where, losses, 0)) / jnp.sum(where)


def jaxent_loss(hidden: Any, kernel: Any, labels: Any, where: Any = None, **options: Any) -> Any:
    logits = jaxent.LinearLogits(hidden, kernel, **options)
    return jaxent.softmax_cross_entropy(logits, labels, where=where, reduction="mean")


def tokamax_loss(hidden: Any, kernel: Any, labels: Any, where: Any = None) -> Any:
    loss = tokamax.linear_softmax_cross_entropy_loss
    return loss(hidden, labels, kernel, reduction="mean", implementation="chunked_xla")


def gradients(loss: Callable[..., Any], *which: int) -> Callable[..., Any]:
    return lambda hidden, kernel, labels, where: jax.value_and_grad(loss, which)(hidden, kernel, labels)


def masked(loss: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: jax.value_and_grad(loss, (0, 1))(*arguments)


def contestants(temporaries: int | None = None) -> dict[str, tuple[Callable[..., Any], float]]:
    """What is compiled, and the share of rows that count."""
    found = {BASE: (gradients(unfused_loss, 0, 1), 1.0)}
    if tokamax is not None:
        found["tokamax chunked_xla"] = gradients(tokamax_loss, 0, 1), 1.0
    found[JAXENT] = gradients(jaxent_loss, 0, 1), 1.0
    if temporaries is not None:
        small = functools.partial(jaxent_loss, block_bytes=int(SMALL * temporaries))
        found["jaxent, little memory"] = gradients(small, 0, 1), 1.0
    found["jaxent, frozen kernel"] = gradients(jaxent_loss, 0), 1.0
    found["jaxent, a mask, all rows count"] = masked(jaxent_loss), 1.0
    found["jaxent, 60 % masked"] = masked(jaxent_loss), COUNTED
    found["unfused, frozen kernel"] = gradients(unfused_loss, 0), 1.0
    found["jaxent, forward"] = lambda hidden, kernel, labels, where: jaxent_loss(hidden, kernel, labels), 1.0
    return found


def linear(machine: str, problem: Problem) -> dict[str, Measured]:
    on_one, arguments = mesh(machine), problem.arguments()
    base = compile_for(on_one, contestants()[BASE][0], *arguments)
    found = {BASE: read(base, problem)}
    for name, (f, share) in contestants(found[BASE].temporaries).items():
        if name != BASE:
            try:
                found[name] = read(compile_for(on_one, f, *arguments), problem, share)
            except Exception as error:
                if "tokamax" not in name:
                    raise
                print(f"{machine}, {problem.name}: {name} does not compile: {str(error)[:100]}")
    return found


DENSE = [("bf16", 4096, 131_072), ("bf16", 16_384, 8192), ("f32", 16_384, 1000)]
DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}


def dense(machine: str) -> dict[str, dict[str, Measured]]:
    """Value and gradient of the mean, of logits that are an array; and of the KL divergence to another array."""

    def optax_mean(logits, labels):
        f = optax.losses.softmax_cross_entropy_with_integer_labels
        return jnp.mean(f(logits.astype(jnp.float32), labels))

    def jaxent_mean(logits, labels):
        return jaxent.softmax_cross_entropy(logits, labels, reduction="mean")

    def optax_kl(logits, target):
        log_p, log_q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (logits, target))
        return jnp.mean(optax.losses.kl_divergence_with_log_targets(log_p, log_q))

    def jaxent_kl(logits, target):
        return jaxent.softmax_kl_divergence(logits, target, reduction="mean")

    on_one, found = mesh(machine), {}
    for dtype, n, v in DENSE:
        problem, logits = Problem("", n, 0, v), jax.ShapeDtypeStruct((n, v), DTYPES[dtype])
        for what, pair, other in (
            ("cross-entropy", (optax_mean, jaxent_mean), jax.ShapeDtypeStruct((n,), jnp.int32)),
            ("KL", (optax_kl, jaxent_kl), logits),
        ):
            found[f"{what}, {dtype} [{n}, {v}]"] = {
                name: read(compile_for(on_one, jax.value_and_grad(f), logits, other), problem)
                for name, f in zip(("optax", JAXENT), pair, strict=True)
            }
    return found


def tied(machine: str, problem: Problem) -> dict[str, Measured]:
    """Value and gradients of the mean by `hidden` and an embedding table `[V, D]`."""
    hidden, kernel, labels, _ = problem.arguments()
    table = jax.ShapeDtypeStruct(kernel.shape[::-1], kernel.dtype)

    def transposed(loss):
        return lambda hidden, table, labels: loss(hidden, table.T, labels)

    losses = {
        BASE: transposed(unfused_loss),
        "jaxent, kernel=table.T": transposed(jaxent_loss),
        "jaxent, class_axis=0": functools.partial(jaxent_loss, class_axis=0),
    }
    steps = {name: jax.value_and_grad(loss, (0, 1)) for name, loss in losses.items()}
    return {
        name: read(compile_for(mesh(machine), step, hidden, table, labels), problem)
        for name, step in steps.items()
    }


def split(machine: str, problem: Problem) -> dict[str, Measured]:
    """Value and gradients of the mean, rows and classes over 2 x 2 devices; of each device."""
    hidden, kernel, labels, _ = problem.arguments()
    specs = P("data"), P(None, "vocab"), P("data")
    found = {}
    for name, kind, loss in (
        ("unfused, jit", AxisType.Auto, unfused_loss),
        ("jaxent, jit", AxisType.Auto, jaxent_loss),
        ("jaxent, explicit mesh", AxisType.Explicit, jaxent_loss),
    ):
        f = jax.value_and_grad(loss, (0, 1))
        program = compile_for(mesh(machine, SPLIT, kind), f, hidden, kernel, labels, specs=specs)
        found[name] = read(program, problem, devices=4)

    def in_shard_map(hidden, kernel, labels):
        def loss(hidden, kernel):
            logits = jaxent.LinearLogits(hidden, kernel)
            axes = {"class_axis_name": "vocab", "batch_axis_name": "data"}
            return jaxent.softmax_cross_entropy(logits, labels, reduction="mean", **axes)

        return jax.value_and_grad(loss, (0, 1))(hidden, kernel)

    four = mesh(machine, SPLIT)
    f = jax.shard_map(in_shard_map, mesh=four, in_specs=specs, out_specs=(P(), specs[:2]))
    found["jaxent, shard_map"] = read(
        compile_for(four, f, hidden, kernel, labels, specs=specs), problem, devices=4
    )
    return found


# What is reported.


def row(name: str, found: Measured, base: Measured) -> list[str]:
    def ratio(x, to):
        return "-" if not to else f"{x / to:.2f}"

    return [
        name,
        f"{found.cycles / 1e6:.1f}" if found.cycles else "-",
        ratio(found.cycles, base.cycles),
        readable_bytes(found.temporaries),
        ratio(found.temporaries, base.temporaries),
        f"{found.matmuls:.2f}" if found.matmuls else "-",
        found.operands or "-",
        f"{found.passes:.1f}",
        readable_bytes(found.bytes) if found.bytes else "-",
        f"{found.collectives[0]} / {found.collectives[1]}",
    ]


HEADER = [
    "",
    "M cycles",
    "ratio",
    "temporaries",
    "ratio",
    "matmuls",
    "operands",
    "N x V",
    "bytes",
    "collectives",
]


def tabulated(found: dict[str, Measured]) -> str:
    base = next(iter(found.values()))
    return table(HEADER, [row(name, x, base) for name, x in found.items()])


SUMMARY = (
    "Cycles, temporaries: over those of the unfused loss; of a frozen kernel over those of both gradients"
)


def summary(found: dict[str, dict[str, Measured]]) -> str:
    """Cycles and temporaries over those of the unfused loss; of the frozen kernel over those of jaxent itself."""
    names = ["tokamax chunked_xla", JAXENT, "jaxent, little memory", "jaxent, 60 % masked"]
    names = [name for name in names if any(name in these for these in found.values())]
    header = ["", "unfused", *names, "frozen / full"]

    def both(x: Measured, to: Measured) -> str:
        cycles = f"{x.cycles / to.cycles:.2f}, " if to.cycles else ""
        return f"{cycles}{x.temporaries / to.temporaries:.2f}"

    rows = []
    for problem, these in found.items():
        base, own = these[BASE], these[JAXENT]
        cycles = f"{base.cycles / 1e6:.1f} M, " if base.cycles else ""
        cells = [both(these[name], base) if name in these else "-" for name in names]
        frozen = both(these["jaxent, frozen kernel"], own)
        rows.append([problem, f"{cycles}{readable_bytes(base.temporaries)}", *cells, frozen])
    return table(header, rows)


def dearest(found: dict[str, Measured], number: int) -> str:
    lines = []
    for name, measured in found.items():
        lines.append(name)
        for cycles, times, instruction, result, where in measured.parts[:number]:
            lines.append(f"  {cycles / 1e6:7.2f}  x{times:<4} {result:28} {instruction:44} {where[-70:]}")
    return "\n".join(lines)


def draw(found: dict[str, dict[str, dict[str, Measured]]], path: Path) -> None:
    """Cycles and temporaries over those of the unfused loss, by machine and problem."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = ["jaxent", "jaxent, little memory", "tokamax chunked_xla"]
    colors = {"jaxent": "#d1495b", "jaxent, little memory": "#edae49", "tokamax chunked_xla": "#66a182"}
    machines = [m for m in found if m != H100] or list(found)
    figure, axes = plt.subplots(
        2, len(machines), figsize=(4.2 * len(machines), 7), sharex="col", squeeze=False
    )
    for column, machine in zip(axes.T, machines, strict=True):
        problems = list(found[machine])
        for ax, what in zip(column, ("cycles", "temporaries"), strict=True):
            ax.axhline(1, color="#4a4e69", linewidth=1)
            present = [name for name in names if any(name in x for x in found[machine].values())]
            for i, name in enumerate(present):
                places, heights = [], []
                for j, problem in enumerate(problems):
                    these = found[machine][problem]
                    if name in these and getattr(these[BASE], what):
                        places.append(j + 0.26 * (i - (len(present) - 1) / 2))
                        heights.append(getattr(these[name], what) / getattr(these[BASE], what))
                ax.bar(places, heights, 0.24, color=colors[name], label=name)
                for x, height in zip(places, heights, strict=True):
                    if height > HIGHEST:
                        ax.text(x, HIGHEST, f"{height:.1f}", ha="center", va="bottom", fontsize=7)
            ax.set_ylim(0, HIGHEST)
            ax.set_ylabel(f"{what} / unfused")
            ax.set_xticks(range(len(problems)), problems, rotation=35, ha="right")
            ax.spines[["top", "right"]].set_visible(False)
        column[0].set_title(f"{machine}, modelled", pad=16)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncol=3, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--machines", nargs="+", choices=MACHINES, default=list(MACHINES))
    parser.add_argument("--problems", nargs="+", default=[p.name for p in PROBLEMS], metavar="NAME")
    parser.add_argument(
        "--detail", type=int, default=0, metavar="N", help="the N dearest parts of each program"
    )
    parser.add_argument("--only", choices=["linear", "tied", "dense", "split"], help="one kind of program")
    parser.add_argument("--out", type=Path, help="where the plot goes")
    options = parser.parse_args()
    problems = [p for p in PROBLEMS if p.name in options.problems]

    packages = ("jax", "jaxlib", "libtpu", "jax-cuda12-pjrt", "jaxent", "optax", "tokamax")
    print(f"`python benchmarks/accelerators.py {' '.join(sys.argv[1:])}`".replace(" `", "`"))
    print(
        f"Compiled, not run; Python {sys.version.split()[0]}, "
        + ", ".join(f"{p} {version(p)}" for p in packages)
    )
    all_found: dict[str, dict[str, dict[str, Measured]]] = {}

    def report(title, found):
        print(f"\n{title}\n\n{tabulated(found)}", flush=True)
        if options.detail:
            print(f"\n{dearest(found, options.detail)}", flush=True)

    for machine in options.machines:
        if why := missing(machine):
            print(f"\n{why}")
            continue
        print(f"\n### {machine}")
        if options.only in (None, "linear"):
            for problem in problems:
                found = linear(machine, problem)
                all_found.setdefault(machine, {})[problem.name] = found
                report(f"{problem.name}: bf16 {problem.shape}", found)
        if machine in all_found:
            print(f"\n{SUMMARY}\n\n{summary(all_found[machine])}", flush=True)
        if options.only in (None, "tied"):
            for problem in problems:
                title = f"{problem.name}, an embedding table, bf16 {problem.shape}"
                report(title, tied(machine, problem))
        if options.only in (None, "dense"):
            for title, found in dense(machine).items():
                report(title, found)
        if options.only in (None, "split"):
            report(
                f"2 x 2 devices: {problems[0].name}, bf16 {problems[0].shape}", split(machine, problems[0])
            )
    if options.out and all_found:
        draw(all_found, options.out / "accelerators.png")


if __name__ == "__main__":
    main()
