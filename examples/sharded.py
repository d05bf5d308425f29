"""The language model on several devices: the rows of a batch split over some, the vocabulary over others.

    python examples/sharded.py                  # 2 x 4 CPU devices: the rows in 2 parts, the classes in 4
    python examples/sharded.py --mesh 1x8       # any data x vocab
    python examples/sharded.py --processes 2    # the same devices, half of them in each of two processes

The model of language_model.py is trained with `jax.shard_map`, and once more on one device, from the same start on the
same batches: the losses must agree. What the devices send each other is read from the compiled step: gradients of what
they hold in common, and of each token its features and a few numbers, but never logits.
Shapes: B rows of T tokens, D features, H hidden units, V classes; a device has B' of the rows and V' of the classes.
"""

import argparse
import itertools
import math
import multiprocessing
import multiprocessing.connection
import re
import socket
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import language_model
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxent

TOLERANCE = 1e-5  # between two losses, relative: the sums have another order, and training carries it on
LEARNING_RATE, MOMENTUM = 0.05, 0.9
LIMIT = 600  # seconds that several processes may take

# What has a class axis is split along it; the embedding too, or each device would send the gradient of all of it.
SPECS = {
    "embedding": P("vocab"),  # [V, D]
    "w1": P(),  # [K D, H]
    "b1": P(),  # [H]
    "w2": P(),  # [H, D]
    "b2": P(),  # [D]
    "kernel": P(None, "vocab"),  # [D, V]
    "bias": P("vocab"),  # [V]
}


# ---------------------------------------------------------------------------------------------- the model


def embed(embedding, tokens):
    """The tokens' rows of an embedding that is split: each is on one device, and 0 on the others."""
    first = jax.lax.axis_index("vocab") * len(embedding)
    rows = embedding.at[tokens - first].get(
        mode="fill", fill_value=0, wrap_negative_indices=False
    )  # [B', T, D]
    return jax.lax.psum(rows, "vocab")


def loss(params, batch):
    """`language_model.loss` on one of the devices, of the rows and classes of all."""
    tokens = batch["tokens"]  # [B', T]
    x = embed(params["embedding"], tokens)  # [B', T, D]
    # `hidden` looks them up once more, in a table of these tokens alone, as they come
    params = params | {"embedding": x.reshape(-1, x.shape[-1])}  # [B' T, D]
    numbers = jnp.arange(tokens.size).reshape(tokens.shape)  # [B', T]
    x = language_model.hidden(params, numbers, batch["segments"])  # [B', T, D]
    logits = jaxent.LinearLogits(
        x.reshape(-1, x.shape[-1]),  # [B' T, D]
        params["kernel"],  # [D, V']
        params["bias"],  # [V']
        block_bytes=language_model.BLOCK_BYTES,
    )
    return jaxent.softmax_cross_entropy(
        logits,
        batch["targets"].ravel(),  # [B' T], counted over all V classes
        where=batch["mask"].ravel(),  # [B' T]
        reduction="mean",
        class_axis_name="vocab",
        batch_axis_name="data",
    )


# --------------------------------------------------------------------------------------------- training


def train(value_and_gradient, params, batches):
    """Yields the loss of each step and the compiled step."""
    # not Adam, which divides by the size of a gradient: it would learn the same from one that is wrong by a factor
    optimizer = optax.sgd(LEARNING_RATE, MOMENTUM)
    state = optimizer.init(params)  # split as the parameters are

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        value, gradient = value_and_gradient(params, batch)
        update, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, update), state, value

    compiled = None
    for batch in batches:
        compiled = compiled or step.lower(params, state, batch).compile()
        params, state, value = compiled(params, state, batch)
        yield float(value), compiled


def batches(options):
    """The same in each call, and in each process."""
    ids, starts = language_model.load(options.cache, options.files)  # [M], [F + 1]
    training = language_model.split(ids, starts, options.vocabulary, validation=False)
    rng = np.random.default_rng(options.seed)
    rows = language_model.batches(*training, options.vocabulary, options.batch, options.length, rng)
    return itertools.islice(rows, options.steps)


def compare(options):
    """Trains on the mesh and on one device, side by side."""
    mesh = jax.make_mesh(options.mesh, ("data", "vocab"))
    rows = NamedSharding(mesh, P("data"))

    def init():
        return language_model.init(jax.random.key(options.seed), options.vocabulary, options.features)

    def spread(batch):  # each process takes what its own devices need
        return {key: jax.make_array_from_callback(x.shape, rows, x.__getitem__) for key, x in batch.items()}

    # no device ever holds all parameters
    params = jax.jit(init, out_shardings={key: NamedSharding(mesh, spec) for key, spec in SPECS.items()})()
    # No psum of gradients is needed: shard_map knows which parameters several devices have in common.
    value_and_gradient = jax.shard_map(
        jax.value_and_grad(loss), mesh=mesh, in_specs=(SPECS, P("data")), out_specs=(P(), SPECS)
    )
    sharded = train(value_and_gradient, params, map(spread, batches(options)))
    if jax.process_index() > 0:  # the first process compares and prints
        return list(sharded)
    single = train(jax.value_and_grad(language_model.loss), jax.jit(init)(), batches(options))

    names = (f"{options.mesh[0]} x {options.mesh[1]} devices", "one device")
    print("step  {:>14s}  {:>14s}    difference".format(*names))
    losses = []
    for pair in zip(sharded, single, strict=True):
        (a, b), programs = zip(*pair, strict=True)
        losses.append((a, b))
        print(f"{len(losses):4d}  {a:14.6f}  {b:14.6f}  {abs(a - b):12.1e}", flush=True)
    report(dict(zip(names, programs, strict=True)), mesh)
    a, b = np.array(losses).T  # [steps], [steps]
    difference = np.max(np.abs(a - b) / b)
    verdict = f"the losses of {len(a)} steps are at most {difference:.1e} apart, relative"
    if not difference <= TOLERANCE:
        raise ArithmeticError(f"{verdict}: more than {TOLERANCE:.0e}")
    print(f"\nThey agree: {verdict} (allowed: {TOLERANCE:.0e})", flush=True)


# ---------------------------------------------------------------------------------------------- results


def communication(program, mesh):
    """The collectives of a compiled program: over which axis, of what kind, the results on a device, their bytes.

    Each runs once per step: none is in a loop.
    """
    numbers = np.arange(mesh.size).reshape(mesh.devices.shape)
    first_groups = {"data": numbers[:, 0], "vocab": numbers[0]}
    # who takes part is written as an axis, {'vocab'}, or as the devices of each group, {{0,1,2,3},{4,5,6,7}}
    written = {
        name: ("{'" + name + "'}", "{{" + ",".join(map(str, group)) + "}")
        for name, group in first_groups.items()
    }
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    found = []
    for results, kind, line in re.findall(rf" = (\(.*?\)|\S+) ({kinds})(?:-start)?\((.*)", program.as_text()):
        axis = next((name for name, forms in written.items() if any(x in line for x in forms)), "all")
        if mesh.shape.get(axis) == 1:
            continue  # nobody to send to
        shapes = re.findall(r"[a-z]+\d+\[[\d,]*\]", results)  # e.g. f32[64,8192]
        bits = sum(math.prod(map(int, re.findall(r"\d+", shape))) for shape in shapes)  # e.g. 32 x 64 x 8192
        found.append((axis, kind, shapes, bits // 8))
    return found


def report(programs, mesh):
    sharded, _ = programs.values()
    found = communication(sharded, mesh)
    print(f"\nCommunication per step: {sum(size for *_, size in found):,} bytes on each device")
    for axis, kind, shapes, size in found:
        print(f"{size:12,}  {kind} over {axis}: {', '.join(shapes)}")
    print("\nMemory of a device        arguments    temporaries")
    for name, program in programs.items():
        memory = program.memory_analysis()
        sizes = (memory.argument_size_in_bytes, memory.temp_size_in_bytes)
        print(f"{name:20s}", *(f"{size / 2**20:10,.1f} MiB" for size in sizes))


# -------------------------------------------------------------------------------------------- processes


def launch(function, processes, limit):
    """Calls function(address, processes, index) in so many processes, which can find each other at the address.

    If one fails, or not all are done in `limit` seconds, all are killed, and the error says which it was. (Whoever
    waits for a dead one waits for ever, and jax catches SIGTERM.)
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=function, args=(address, processes, i)) for i in range(processes)]
    deadline = time.monotonic() + limit
    for worker in workers:
        worker.start()
    try:
        while True:
            running = [index for index, worker in enumerate(workers) if worker.is_alive()]
            for index, worker in enumerate(workers):
                if worker.exitcode:
                    raise ChildProcessError(f"process {index} exited with code {worker.exitcode}")
            if not running:
                return
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"after {limit} s, process {' and '.join(map(str, running))} still ran")
            multiprocessing.connection.wait([workers[index].sentinel for index in running], left)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def work(options, address=None, processes=1, index=0):
    """What each process does."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", math.prod(options.mesh) // processes)
    if processes > 1:
        jax.distributed.initialize(address, processes, index, initialization_timeout=60)
    compare(options)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mesh", type=lambda text: tuple(map(int, text.split("x"))), default=(2, 4))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16, help="rows")
    parser.add_argument("--length", type=int, default=language_model.LENGTH, help="tokens in a row")
    parser.add_argument("--features", type=int, default=language_model.FEATURES)
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--files", type=int, default=200, help="read only so many files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=language_model.CACHE)
    options = parser.parse_args(argv)

    if math.prod(options.mesh) % options.processes:
        parser.error("each process has the same number of devices")
    language_model.load(options.cache, options.files)  # which reads the files, if they were not read yet
    if options.processes > 1:
        launch(partial(work, options), options.processes, LIMIT)
    else:
        work(options)


if __name__ == "__main__":
    main()
