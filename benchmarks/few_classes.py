"""Losses of a few classes of each row beside plain jax: python benchmarks/few_classes.py

Value and gradients of means. Compiled for a TPU and an H100, as benchmarks/accelerators.py does it: cycles are those
of the TPU's compiler, a model (gathers, which a SparseCore makes, have none); temporaries are exact. And run here,
smaller, contestants in turn: times as ratios to plain jax in the same rounds.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from machines import MACHINES, compile_for, mesh, missing

from accelerators import Problem, read  # isort: skip
import jax
import jax.numpy as jnp

import jaxent
from common import readable_bytes, surroundings, table, version

SLOTS = 16
PLAIN = "plain jax, KL and a rest"
LARGE = {"dense": Problem("dense", 4096, 0, 131_072), "linear": Problem("linear", 8192, 2048, 131_072)}
HERE = {"dense": Problem("dense", 512, 0, 32_768), "linear": Problem("linear", 1024, 256, 32_768)}


def renormalized(logits, classes, probs):
    """Cross-entropy within the classes of the teacher, as MaxText and tunix have it."""
    few = jnp.take_along_axis(logits.astype(jnp.float32), classes, -1)
    return -jnp.mean(jnp.sum(probs * jax.nn.log_softmax(few), -1))


def plain(logits, classes, probs):
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), classes, -1)
    rest, rest_of_p = 1 - jnp.sum(probs, -1), 1 - jnp.sum(jnp.exp(log_p), -1)
    kl = jnp.sum(probs * (jnp.log(probs) - log_p), -1) + rest * (jnp.log(rest) - jnp.log(rest_of_p))
    return jnp.mean(kl)


def of_target(loss: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    def mean(logits, classes, probs):
        return loss(logits, jaxent.SparseDistribution(classes, probs), reduction="mean", **options)

    return mean


def class_index(logits, classes, _):
    return jaxent.softmax_cross_entropy(logits, classes[..., 0], reduction="mean")


LOSSES = {
    PLAIN: plain,
    "plain jax, renormalized": renormalized,
    "jaxent, class indices": class_index,
    "jaxent, cross-entropy": of_target(jaxent.softmax_cross_entropy),
    "jaxent, KL and a rest": of_target(jaxent.softmax_kl_divergence),
    "jaxent, JS": of_target(jaxent.softmax_js_divergence),
}


def step_of(name: str, kind: str) -> tuple[Callable[..., Any], int]:
    """A step, and how many of its arguments are differentiated."""
    loss, is_plain = LOSSES[name], name.startswith("plain")
    if kind == "dense":
        return jax.value_and_grad(loss), 1

    def of_layer(hidden, kernel, classes, probs):
        logits = jaxent.LinearLogits(hidden, kernel)
        return loss(logits.dense() if is_plain else logits, classes, probs)

    return jax.value_and_grad(of_layer, (0, 1)), 2


def arguments(kind: str, problem: Problem, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    n, d, v, array = problem.rows, problem.features, problem.classes, jax.ShapeDtypeStruct
    scores = [array((n, v), dtype)] if kind == "dense" else [array((n, d), dtype), array((d, v), dtype)]
    return *scores, array((n, SLOTS), jnp.int32), array((n, SLOTS), jnp.float32)


def compiled(machine: str) -> str:
    rows = []
    for kind, problem in LARGE.items():
        found = {
            name: read(
                compile_for(mesh(machine), step_of(name, kind)[0], *arguments(kind, problem, jnp.bfloat16)),
                problem,
            )
            for name in LOSSES
        }
        base = found[PLAIN]
        for name, x in found.items():
            cycles = [f"{x.cycles / 1e6:.1f}", f"{x.cycles / base.cycles:.2f}"] if base.cycles else ["-", "-"]
            rows.append([f"{kind}: {name}", *cycles, readable_bytes(x.temporaries)])
    return table(["", "M cycles", "ratio", "temporaries"], rows)


def run(rounds: int) -> str:
    rows = []
    for kind, problem in HERE.items():
        *scores, _, _ = arguments(kind, problem, jnp.float32)
        keys = jax.random.split(jax.random.key(0), len(scores) + 1)
        arrays = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, scores, strict=False)]
        teacher = jax.nn.softmax(2 * jax.random.normal(keys[-1], (problem.rows, problem.classes)))
        probs, classes = jax.lax.top_k(teacher, SLOTS)
        programs = {
            name: jax.jit(step_of(name, kind)[0]).lower(*arrays, classes, probs).compile() for name in LOSSES
        }
        seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
        for i in range(rounds + 1):
            for name, program in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(program(*arrays, classes, probs))
                if i:
                    seconds[name].append(time.perf_counter() - start)
        for name, program in programs.items():
            ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds[PLAIN], strict=True))
            held = program.memory_analysis().temp_size_in_bytes
            rows.append([f"{kind}: {name}", f"{ratio:.2f}", readable_bytes(held)])
    return table(["", "time", "temporaries"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--machines", nargs="*", choices=MACHINES, default=["v6e", "H100"])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    packages = ("jax", "jaxlib", "libtpu", "jax-cuda12-pjrt", "jaxent")
    print(f"`python benchmarks/few_classes.py {' '.join(sys.argv[1:])}`".replace(" `", "`"))
    print(f"Python {sys.version.split()[0]}, " + ", ".join(f"{p} {version(p)}" for p in packages))
    for machine in options.machines:
        what = ", ".join(
            f"{kind} {p.shape if p.features else [p.rows, p.classes]}" for kind, p in LARGE.items()
        )
        why = missing(machine)
        print(f"\n{machine}, bf16, {what}, K = {SLOTS}\n\n{why or compiled(machine)}", flush=True)
    what = ", ".join(f"{kind} {p.shape if p.features else [p.rows, p.classes]}" for kind, p in HERE.items())
    print(f"\n{surroundings(packages[:1])}, f32, {what}, K = {SLOTS}\n\n{run(options.rounds)}")


if __name__ == "__main__":
    main()
