"""Losses of pairs and of sampled classes beside plain jax: python benchmarks/candidates.py

Value and gradients of means, by x, y and what is learned beside them. Run here, contestants in turn: times as ratios to
the first in the same rounds; and temporaries, also of what is too large to be run. Over eight devices: temporaries and
bytes sent, of each. And compiled for a TPU and an H100, as benchmarks/accelerators.py does it: cycles are those of the
TPU's compiler, a model (gathers, which a SparseCore makes, have none).

Needs optax; TensorFlow takes part where it is installed.
"""

import argparse
import functools
import importlib.util
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from machines import MACHINES, compile_for, mesh, missing

import jax  # isort: skip
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxent
from common import readable_bytes, surroundings, table
from compiled import Program

FEATURES = 512
BATCHES = (1024, 8192, 65_536)
FEW = 256  # pairs of an NT-Xent that is run
LARGE_TILE = 128 * 2**20
DEVICES = 8
TEMPERATURE = 0.1
CLASSES, ROWS, SAMPLES = 131_072, 1024, (64, 1024)
COMPILED_ROWS = 8192
Step = Callable[..., Any]


# Pairs.


def products(x, y, scale):
    return scale * jnp.einsum("nd,md->nm", x, y, preferred_element_type=jnp.float32)


def plain_clip(x, y, scale, _):
    z = products(x, y, scale)
    log_probs = (jnp.mean(jnp.diagonal(jax.nn.log_softmax(z, axis))) for axis in (0, 1))
    return -sum(log_probs) / 2


def lean_clip(x, y, scale, _):
    """Without a gradient that is scattered along a diagonal."""
    z = products(x, y, scale)
    of_pairs = jnp.einsum("nd,nd->n", x, y, preferred_element_type=jnp.float32)
    log_sums = (jnp.mean(jax.nn.logsumexp(z, axis)) for axis in (0, 1))
    return sum(log_sums) / 2 - jnp.mean(scale * of_pairs)


def clip(x, y, scale, _, **options):
    return jaxent.softmax_contrastive_loss(x, y, scale=scale, **options)


def plain_siglip(x, y, scale, bias):
    signs = 2 * jnp.eye(len(x)) - 1
    return -jnp.mean(jnp.sum(jax.nn.log_sigmoid(signs * (products(x, y, scale) + bias)), -1))


def siglip(x, y, scale, bias, **options):
    return jaxent.sigmoid_contrastive_loss(x, y, scale=scale, bias=bias, **options)


def optax_ntxent(x, y, *_):
    pairs = len(x)
    return optax.losses.ntxent(jnp.concatenate([x, y]), jnp.arange(2 * pairs) % pairs, TEMPERATURE)


def ntxent(x, y, *_, **options):
    """The same: optax makes the rows of length 1, and each row is no negative of itself."""
    pairs, z = len(x), jnp.concatenate([x, y])
    z = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
    options |= {"scale": 1 / TEMPERATURE, "symmetric": False, "ids": jnp.arange(2 * pairs) % pairs}
    return jaxent.softmax_contrastive_loss(z, jnp.roll(z, pairs, 0), **options)


def both_tiles(loss: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {"jaxent": loss, "jaxent, 128 MiB": functools.partial(loss, block_bytes=LARGE_TILE)}


# name -> (which arguments have gradients, contestants)
PAIRS: dict[str, tuple[tuple[int, ...], dict[str, Callable[..., Any]]]] = {
    "CLIP": (
        (0, 1, 2),
        {"plain, log_softmax": plain_clip, "plain, logsumexp": lean_clip, **both_tiles(clip)},
    ),
    "SigLIP": ((0, 1, 2, 3), {"plain, log_sigmoid": plain_siglip, **both_tiles(siglip)}),
    "NT-Xent": ((0, 1), {"optax": optax_ntxent, **both_tiles(ntxent)}),
}


def pairs(batch: int, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    array = jax.ShapeDtypeStruct
    side, number = array((batch, FEATURES), dtype), array((), jnp.float32)
    return side, side, number, number


def pairs_like(shapes: tuple[jax.ShapeDtypeStruct, ...]) -> tuple[jax.Array, ...]:
    """Of length 1; partners have a cosine of 0.7."""
    rows, noise = (
        jax.random.normal(key, shapes[0].shape) / FEATURES**0.5 for key in jax.random.split(jax.random.key(0))
    )
    x, y = (z / jnp.linalg.norm(z, axis=-1, keepdims=True) for z in (rows, rows + noise))
    return x, y, jnp.float32(10), jnp.float32(-10)


def contrastive(batches: list[int], rounds: int, longest: int) -> str:
    out = []
    for loss, (which, contestants) in PAIRS.items():
        few = [FEW] if loss == "NT-Xent" else []
        for batch in few + batches:
            # optax's NT-Xent has arrays of 2 B x 2 B x D
            runs = batch <= longest and (not few or batch == FEW)
            shapes = pairs(batch, jnp.float32)
            arguments = pairs_like(shapes) if runs else shapes
            programs = {
                name: jax.jit(jax.value_and_grad(f, which)).lower(*arguments).compile()
                for name, f in contestants.items()
            }
            steps = {name: functools.partial(x, *arguments) for name, x in programs.items()}
            ratios = in_turn(steps, rounds) if runs else dict.fromkeys(programs, "-")
            for name, x in programs.items():
                held = x.memory_analysis().temp_size_in_bytes
                out.append([f"{loss}, B = {batch}: {name}", ratios[name], readable_bytes(held)])
    return table(["", "time", "temporaries"], out)


def in_turn(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, str]:
    """Times as ratios to the first; the values agree."""
    values = [float(step()[0]) for step in steps.values()]
    np.testing.assert_allclose(values, values[0], rtol=1e-4)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step())
            seconds[name].append(time.perf_counter() - start)
    first, *_ = seconds.values()
    ratios = {name: [a / b for a, b in zip(these, first, strict=True)] for name, these in seconds.items()}
    found = {name: f"{statistics.median(x):.2f} ({min(x):.2f} to {max(x):.2f})" for name, x in ratios.items()}
    return found | {next(iter(found)): f"{1e3 * statistics.median(first):.3g} ms"}


# Pairs over devices.


def gathered_clip(x, y, scale, _):
    """open_clip, with `gather_with_grad` and `local_loss`: each device has its rows of both directions."""
    all_x, all_y = (jax.lax.all_gather(z, "data", tiled=True) for z in (x, y))
    here = jax.lax.axis_index("data") * len(x) + jnp.arange(len(x))
    losses = (
        optax.losses.softmax_cross_entropy_with_integer_labels(products(a, b, scale), here)
        for a, b in ((x, all_y), (y, all_x))
    )
    return jax.lax.pmean(jnp.mean(sum(losses)) / 2, "data")


OVER_DEVICES = {
    "CLIP: plain, gathered": gathered_clip,
    "CLIP: jaxent": functools.partial(clip, batch_axis_name="data"),
    "CLIP: jaxent, 128 MiB": functools.partial(clip, batch_axis_name="data", block_bytes=LARGE_TILE),
    "SigLIP: jaxent": functools.partial(siglip, batch_axis_name="data"),
}

# of the bytes of its result, what a device receives of others, around a ring
RECEIVED = {
    "all-gather": 1 - 1 / DEVICES,
    "reduce-scatter": DEVICES - 1,
    "all-reduce": 2 * (1 - 1 / DEVICES),
    "collective-permute": 1,
}


def devices(batches: list[int]) -> str:
    over, specs = jax.make_mesh((DEVICES,), ("data",)), (P("data"), P("data"), P(), P())
    out = []
    for batch in batches:
        shapes = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(over, spec))
            for x, spec in zip(pairs(batch, jnp.float32), specs, strict=True)
        ]
        for name, loss in OVER_DEVICES.items():
            step = jax.value_and_grad(loss, (0, 1, 2))
            mapped = jax.shard_map(step, mesh=over, in_specs=specs, out_specs=(P(), specs[:3]))
            program = jax.jit(mapped).lower(*shapes).compile()
            sent: dict[str, float] = {}
            for x in Program(program).collectives():
                sent[x.kind] = sent.get(x.kind, 0) + x.times * x.bytes * RECEIVED[x.kind]
            kinds = ", ".join(f"{kind} {readable_bytes(n)}" for kind, n in sent.items() if n > 1000)
            held = readable_bytes(program.memory_analysis().temp_size_in_bytes)
            out.append([f"B = {batch}, {name}", held, readable_bytes(sum(sent.values())), kinds])
    return table(["", "temporaries", "received", "by"], out)


# Sampled classes.


def candidate_logits(hidden, of_labels, of_samples, labels, samples, counts):
    own = jnp.einsum("nd,nd->n", hidden, of_labels, preferred_element_type=jnp.float32) - counts[0]
    z = jnp.einsum("nd,sd->ns", hidden, of_samples, preferred_element_type=jnp.float32) - counts[1]
    return own, z, samples == labels[:, None]


def plain_sampled(*arguments):
    own, z, hits = candidate_logits(*arguments)
    z = jnp.concatenate([own[:, None], jnp.where(hits, -jnp.inf, z)], -1)
    return -jnp.mean(jax.nn.log_softmax(z)[:, 0])


def plain_nce(*arguments):
    own, z, hits = candidate_logits(*arguments)
    return jnp.mean(jax.nn.softplus(-own) + jnp.sum(jnp.where(hits, 0, jax.nn.softplus(z)), -1))


def from_table(loss: Callable[..., Any]) -> Step:
    def step(hidden, kernel, labels, samples, *counts):
        def f(hidden, kernel):
            return loss(hidden, kernel[labels], kernel[samples], labels, samples, counts)

        return jax.value_and_grad(f, (0, 1))(hidden, kernel)

    return step


def from_columns(loss: Callable[..., Any]) -> Step:
    """The gradient by the columns that were read."""

    def step(hidden, kernel, labels, samples, *counts):
        def f(hidden, columns):
            return loss(hidden, *columns, labels, samples, counts)

        return jax.value_and_grad(f, (0, 1))(hidden, (kernel[labels], kernel[samples]))

    return step


def of_jaxent(loss: Callable[..., Any], columns: bool = False) -> Step:
    def step(hidden, kernel, labels, samples, *counts):
        def f(hidden, kernel):
            expected = dict(zip(("label_log_expected_counts", "log_expected_counts"), counts, strict=True))
            return loss(hidden, kernel, labels, samples, class_axis=0, reduction="mean", **expected)

        if columns:
            kernel = jaxent.candidate_columns(kernel, labels, samples, class_axis=0)
        return jax.value_and_grad(f, (0, 1))(hidden, kernel)

    return step


def full(hidden, kernel, labels, *_):
    def f(hidden, kernel):
        logits = jaxent.LinearLogits(hidden, kernel.T)
        return jaxent.softmax_cross_entropy(logits, labels, reduction="mean")

    return jax.value_and_grad(f, (0, 1))(hidden, kernel)


SAMPLED = {
    "sampled softmax": {
        "plain": from_table(plain_sampled),
        "jaxent": of_jaxent(jaxent.sampled_softmax_cross_entropy),
    },
    "sampled softmax by columns": {
        "plain": from_columns(plain_sampled),
        "jaxent": of_jaxent(jaxent.sampled_softmax_cross_entropy, columns=True),
    },
    "NCE": {"plain": from_table(plain_nce), "jaxent": of_jaxent(jaxent.nce_loss)},
    "NCE by columns": {"plain": from_columns(plain_nce), "jaxent": of_jaxent(jaxent.nce_loss, columns=True)},
}
TENSORFLOW = {"sampled softmax by columns": "sampled_softmax_loss", "NCE by columns": "nce_loss"}
FULL = "jaxent, all classes"


def layer(rows: int, samples: int, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    array = jax.ShapeDtypeStruct
    scores = array((rows, FEATURES), dtype), array((CLASSES, FEATURES), dtype)
    return (
        *scores,
        array((rows,), jnp.int32),
        array((samples,), jnp.int32),
        array((rows,), jnp.float32),
        array((samples,), jnp.float32),
    )


def sampled(rounds: int) -> str:
    out = []
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (ROWS, FEATURES))
    kernel = jax.random.normal(keys[1], (CLASSES, FEATURES)) / FEATURES**0.5
    labels = jaxent.log_uniform_sampler(keys[2], CLASSES, ROWS, unique=False).classes
    for number in SAMPLES:
        samples = jaxent.log_uniform_sampler(keys[3], CLASSES, number)
        counts = samples.log_expected_counts_of(labels), samples.log_expected_counts
        arguments = hidden, kernel, labels, samples.classes, *counts
        for loss, steps in SAMPLED.items():
            programs = {name: jax.jit(f).lower(*arguments).compile() for name, f in steps.items()}
            calls = {name: functools.partial(x, *arguments) for name, x in programs.items()}
            held = {
                name: readable_bytes(x.memory_analysis().temp_size_in_bytes) for name, x in programs.items()
            }
            if importlib.util.find_spec("tensorflow") and loss in TENSORFLOW:
                calls["tensorflow"] = of_tensorflow(loss, arguments)
            ratios = in_turn(calls, rounds)
            if loss == "sampled softmax":
                # another value: the loss that is estimated
                whole = jax.jit(full).lower(*arguments).compile()
                held[FULL] = readable_bytes(whole.memory_analysis().temp_size_in_bytes)
                ratios[FULL] = beside(calls["plain"], functools.partial(whole, *arguments))
            out += [
                [f"{loss}, S = {number}: {name}", ratio, held.get(name, "-")]
                for name, ratio in ratios.items()
            ]
    found = table(["", "time", "temporaries"], out)
    why = "" if importlib.util.find_spec("tensorflow") else "\n\ntensorflow is not installed: it is left out"
    return found + why


def beside(base: Callable[[], Any], step: Callable[[], Any]) -> str:
    ratios = []
    for i in range(3):
        start = time.perf_counter()
        jax.block_until_ready(base())
        between = time.perf_counter()
        jax.block_until_ready(step())
        if i:
            ratios.append((time.perf_counter() - between) / (between - start))
    return f"{statistics.median(ratios):.0f}"


def of_tensorflow(name: str, arguments: tuple[jax.Array, ...]) -> Callable[[], Any]:
    """Its gradient of the table is tf.IndexedSlices: of the columns that were read."""
    import tensorflow as tf

    hidden, kernel, labels, samples, *counts = map(np.asarray, arguments)
    loss = getattr(tf.nn, TENSORFLOW[name])
    hidden, kernel, bias = tf.Variable(hidden), tf.Variable(kernel), tf.zeros(CLASSES)
    labels = tf.constant(np.int64(labels)[:, None])
    expected = np.exp(counts[0])[:, None], np.exp(counts[1])
    drawn = tf.constant(np.int64(samples)), *map(tf.constant, expected)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            options = {"sampled_values": drawn, "remove_accidental_hits": True}
            losses = loss(kernel, bias, labels, hidden, len(samples), CLASSES, **options)
            mean = tf.reduce_mean(losses)
        of_hidden, of_kernel = tape.gradient(mean, (hidden, kernel))
        return mean, of_hidden, of_kernel.values

    return lambda: [x.numpy() for x in step()]


# Compiled for accelerators.


def compiled(machine: str) -> str:
    out = []

    def add(title: str, steps: dict[str, Step], arguments: tuple[jax.ShapeDtypeStruct, ...]) -> None:
        base = 0
        for name, step in steps.items():
            try:
                program = compile_for(mesh(machine), step, *arguments)
            except jax.errors.JaxRuntimeError as error:
                needed = re.search(r"temporaries \(([\d.]+)G\)", str(error))
                if needed is None:
                    raise
                out.append([f"{title}: {name}", "-", "-", f"{needed[1]} GiB: too many"])
                continue
            cycles, held = Program(program).cycles, program.memory_analysis().temp_size_in_bytes
            base = base or cycles
            model = [f"{cycles / 1e6:.2f}", f"{cycles / base:.2f}"] if cycles else ["-", "-"]
            out.append([f"{title}: {name}", *model, readable_bytes(held)])

    for batch in BATCHES[1:]:
        for loss in ("CLIP", "SigLIP"):
            which, contestants = PAIRS[loss]
            # their tiles are of 128 MiB without being told
            steps = {
                name: jax.value_and_grad(f, which) for name, f in contestants.items() if "MiB" not in name
            }
            add(f"{loss}, B = {batch}", steps, pairs(batch, jnp.bfloat16))
    for number in SAMPLES:
        for loss in ("sampled softmax", "sampled softmax by columns"):
            steps = SAMPLED[loss] | ({FULL: full} if loss == "sampled softmax" else {})
            add(f"{loss}, S = {number}", steps, layer(COMPILED_ROWS, number, jnp.bfloat16))
    return table(["", "M cycles", "ratio", "temporaries"], out)


PARTS = ("contrastive", "devices", "sampled", "compiled")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--machines", nargs="*", choices=MACHINES, default=["v6e", "H100"])
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), help="pairs")
    parser.add_argument("--longest", type=int, default=1024, help="more pairs are compiled, not run")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if "devices" in options.parts and jax.device_count() < DEVICES:
        # alone: how much memory blocks take may depend on how many devices there are
        command = [sys.executable, __file__, "--parts", "devices", "--batches", *map(str, options.batches)]
        beside_it = os.environ | {"JAX_NUM_CPU_DEVICES": str(DEVICES)}
        over_devices = subprocess.run(
            command, env=beside_it, check=True, capture_output=True, text=True
        ).stdout
    elif "devices" in options.parts:
        title = f"f32, D = {FEATURES}, over {DEVICES} devices; of each device"
        print(f"\n{title}\n\n{devices(options.batches)}", flush=True)
        return
    packages = ("jax", "jaxlib", "libtpu", "jax-cuda12-pjrt", "jaxent", "optax")
    print(f"`python benchmarks/candidates.py {' '.join(sys.argv[1:])}`".replace(" `", "`"))
    print(f"{surroundings(packages)}; {options.rounds} rounds", flush=True)
    if "contrastive" in options.parts:
        found = contrastive(options.batches, options.rounds, options.longest)
        print(f"\nf32, D = {FEATURES}\n\n{found}", flush=True)
    if "devices" in options.parts:
        print(over_devices.rstrip(), flush=True)
    if "sampled" in options.parts:
        what = f"f32 [{ROWS}, {FEATURES}] x [{FEATURES}, {CLASSES}]"
        print(f"\n{what}, an embedding table\n\n{sampled(options.rounds)}", flush=True)
    for machine in options.machines if "compiled" in options.parts else []:
        why = missing(machine)
        what = f"bf16, D = {FEATURES}; sampled softmax {COMPILED_ROWS} rows, {CLASSES} classes"
        print(f"\n{machine}, {what}\n\n{why or compiled(machine)}", flush=True)


if __name__ == "__main__":
    main()
