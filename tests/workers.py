"""What test_processes.py runs in several processes."""

import os
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxent
from harness import QUICK

N, D, V = 12, 5, 48
SOURCES = ("dense", "linear")
DEVICES = 2  # of each process
SPECS = {
    "hidden": P("rows"),  # [N, D]
    "kernel": P(None, "classes"),  # [D, V]
    "bias": P("classes"),  # [V]
    "labels": P("rows"),  # [N]
    "where": P("rows"),  # [N]
    "class_weights": P("classes"),  # [V]
}


def arrays():
    rng = np.random.default_rng(3)
    return {
        "hidden": 2 * rng.normal(size=(N, D)).astype(np.float32),
        "kernel": rng.normal(size=(D, V)).astype(np.float32),
        "bias": rng.normal(size=V).astype(np.float32),
        "labels": rng.integers(V, size=N),
        "where": np.arange(N) % 4 != 1,
        "class_weights": rng.uniform(0.5, 2, size=V).astype(np.float32),
    }


def value_and_gradients(source, x, **axis_names):
    """Of a mean with several options at once; gradients by hidden, kernel and bias."""

    def loss(layer):
        logits = jaxent.LinearLogits(**layer)
        return jaxent.softmax_cross_entropy(
            logits.dense() if source == "dense" else logits,
            x["labels"],
            where=x["where"],
            class_weights=x["class_weights"],
            label_smoothing=0.1,
            z_loss=0.01,
            reduction="mean",
            **axis_names,
        )

    value, gradients = jax.value_and_grad(loss)({name: x[name] for name in ("hidden", "kernel", "bias")})
    return {"value": value, **gradients}


def join(address, processes, index):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.distributed.initialize(address, processes, index, initialization_timeout=30)


def split_classes(out, address, processes, index):
    """The loss and gradients of each source, into the folder `out`."""
    join(address, processes, index)
    # a row of the mesh has a device of each process: what goes over classes goes from one process to the other
    mesh = Mesh(np.array(jax.devices()).reshape(processes, DEVICES).T, ("rows", "classes"))
    assert [[device.process_index for device in row] for row in mesh.devices] == [[0, 1], [0, 1]]
    x = {
        name: jax.make_array_from_callback(x.shape, NamedSharding(mesh, SPECS[name]), x.__getitem__)
        for name, x in arrays().items()
    }
    for source in SOURCES:
        f = partial(value_and_gradients, source, class_axis_name="classes", batch_axis_name="rows")
        out_specs = {"value": P(), **{name: SPECS[name] for name in ("hidden", "kernel", "bias")}}
        f = jax.jit(
            jax.shard_map(f, mesh=mesh, in_specs=(SPECS,), out_specs=out_specs), compiler_options=QUICK
        )
        found = multihost_utils.process_allgather(f(x), tiled=True)
        if index == 0:
            np.savez(out / source, **found)


def lose_one(address, processes, index):
    """Process 1 dies where process 0 waits for it."""
    join(address, processes, index)
    if index == 1:
        os._exit(7)
    mesh = Mesh(np.array(jax.devices()), "classes")
    total = jax.shard_map(
        lambda: jax.lax.psum(jnp.ones(()), "classes"), mesh=mesh, in_specs=(), out_specs=P()
    )
    jax.block_until_ready(jax.jit(total)())


def never_end(address, processes, index):
    while index == 1:
        time.sleep(1)
