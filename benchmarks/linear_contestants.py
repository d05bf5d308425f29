"""Who takes part in benchmarks/linear.py, and what they are given: a call of each, in one of four modes.

A peer is added here: its loss, a name, a line in `contestants`.
"""

import logging
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

# Before jax starts: torch needs its share of a GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxent

try:
    import torch
except ImportError:
    torch = None
try:
    import tokamax
except ImportError:
    tokamax = None
logging.getLogger("absl").setLevel(logging.ERROR)  # tokamax: that it was not tuned for this machine

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
COUNTED = 0.4  # of the rows, where 60 % are masked
BASE = "optax, unfused"
HALF = "optax, unfused, bf16 logits"
JAXENT = "jaxent"
TOKAMAX = {"tokamax xla": "xla", "tokamax chunked_xla": "chunked_xla"}
TORCH = "torch"
CHUNKED_TORCH = "torch, chunked"
MATMUL = "bare matmul"


class Problem(NamedTuple):
    hidden: jax.Array  # [N, D]
    kernel: jax.Array  # [D, V]
    labels: jax.Array  # [N]
    where: jax.Array  # bool [N]

    @property
    def name(self) -> str:
        (n, d), v = self.hidden.shape, self.kernel.shape[1]
        short = {"float32": "f32", "bfloat16": "bf16"}[str(self.hidden.dtype)]
        return f"{short} [{n}, {d}] x [{d}, {v}]"


class Outputs(NamedTuple):
    loss: Any
    hidden: Any = None  # the gradients
    kernel: Any = None


class Contestant(NamedTuple):
    call: Callable[[], tuple[float, Outputs]]  # one call: seconds, and what came out
    temporaries: int | None


def make_problem(dtype: str, n: int, d: int, v: int) -> Problem:
    """Logits of standard deviation 3."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((n, d), np.float32)
    kernel = (3 / np.sqrt(d, dtype=np.float32)) * rng.standard_normal((d, v), np.float32)
    labels = rng.integers(0, v, n, np.int32)
    where = rng.permutation(n) < max(round(COUNTED * n), 1)
    as_given = (jnp.asarray(x, DTYPES[dtype]) for x in (hidden, kernel))
    return Problem(*as_given, jnp.asarray(labels), jnp.asarray(where))


# The contestants: scalar losses of (hidden, kernel, labels, where), with where=None for all rows.


def mean(losses, where):
    if where is None:
        return jnp.mean(losses)
    return jnp.sum(jnp.where(where, losses, 0)) / jnp.sum(where)


def optax_loss(hidden, kernel, labels, where):
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    return mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels), where)


def optax_half_loss(hidden, kernel, labels, where):
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels)
    return mean(losses.astype(jnp.float32), where)


def jaxent_loss(hidden, kernel, labels, where):
    logits = jaxent.LinearLogits(hidden, kernel)
    return jaxent.softmax_cross_entropy(logits, labels, where=where, reduction="mean")


def tokamax_loss(implementation: str):
    def loss(hidden, kernel, labels, where):
        reduction = "mean" if where is None else "none"  # it knows no mask
        found = tokamax.linear_softmax_cross_entropy_loss(
            hidden, labels, kernel, reduction=reduction, implementation=implementation
        )
        return found if where is None else mean(found, where)

    return loss


def jax_contestant(loss, problem: Problem, mode: str) -> Contestant:
    def function(hidden, kernel, labels, where):
        def of_layer(hidden, kernel):
            return loss(hidden, kernel, labels, where if mode == "masked" else None)

        if mode == "forward":
            return Outputs(of_layer(hidden, kernel))
        if mode == "frozen":
            return Outputs(*jax.value_and_grad(of_layer)(hidden, kernel))
        value, gradients = jax.value_and_grad(of_layer, (0, 1))(hidden, kernel)
        return Outputs(value, *gradients)

    compiled = jax.jit(function).lower(*problem).compile()

    def call() -> tuple[float, Outputs]:
        start = time.perf_counter()
        out = jax.block_until_ready(compiled(*problem))
        return time.perf_counter() - start, out

    return Contestant(call, compiled.memory_analysis().temp_size_in_bytes)


def matmul_contestant(problem: Problem) -> Contestant:
    def function(hidden, kernel):
        return Outputs(hidden @ kernel)

    compiled = jax.jit(function).lower(problem.hidden, problem.kernel).compile()

    def call() -> tuple[float, Outputs]:
        start = time.perf_counter()
        out = jax.block_until_ready(compiled(problem.hidden, problem.kernel))
        return time.perf_counter() - start, out

    return Contestant(call, None)


def torch_device() -> str | None:
    """Where torch takes part: on the device that jax has, or not at all."""
    if torch is None or not hasattr(torch.nn.functional, "linear_cross_entropy"):
        return None
    if jax.default_backend() == "cpu":
        return "cpu"
    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else None


def to_torch(problem: Problem) -> dict[str, Any]:
    """hidden [N, D], weight [V, D] (its own layout), labels, and labels with -100 in masked rows."""
    dtype = getattr(torch, str(problem.hidden.dtype))

    def tensor(x, dtype):
        return torch.from_numpy(np.array(x, np.float32, order="C")).to(torch_device(), dtype)

    labels = torch.from_numpy(np.array(problem.labels, np.int64)).to(torch_device())
    where = torch.from_numpy(np.array(problem.where)).to(torch_device())
    return {
        "hidden": tensor(problem.hidden, dtype),
        "weight": tensor(np.asarray(problem.kernel).T, dtype),
        "labels": labels,
        "masked": torch.where(where, labels, -100),
    }


def torch_contestant(tensors: dict[str, Any], chunked: bool, mode: str) -> Contestant:
    hidden, weight = tensors["hidden"], tensors["weight"]
    labels = tensors["masked" if mode == "masked" else "labels"]
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None

    def call() -> tuple[float, Outputs]:
        hidden.grad = weight.grad = None
        hidden.requires_grad_(mode != "forward")
        weight.requires_grad_(mode not in ("forward", "frozen"))
        start = time.perf_counter()
        loss = torch.nn.functional.linear_cross_entropy(hidden, weight, labels, options=options)
        if mode != "forward":
            loss.backward()
        value = loss.item()  # waits for a GPU
        seconds = time.perf_counter() - start
        out = Outputs(value, hidden.grad, weight.grad)
        hidden.grad = weight.grad = None
        return seconds, out

    return Contestant(call, torch_temporaries(call))


def torch_temporaries(call: Callable[[], tuple[float, Outputs]]) -> int | None:
    """The most that one call held beyond its arguments and results; known on a GPU."""
    if torch_device() != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _, out = call()
    results = sum(x.nbytes for x in (out.hidden, out.kernel) if x is not None)
    return max(torch.cuda.max_memory_allocated() - before - results, 0)


def contestants(problem: Problem, bare: bool) -> dict[str, Callable[[str], Contestant]]:
    """What makes each contestant for a mode."""
    losses = {BASE: optax_loss}
    if problem.hidden.dtype == jnp.bfloat16:
        losses[HALF] = optax_half_loss
    if tokamax is not None:
        losses |= {name: tokamax_loss(implementation) for name, implementation in TOKAMAX.items()}
    losses[JAXENT] = jaxent_loss

    def of_jax(loss):
        return lambda mode: jax_contestant(loss, problem, mode)

    found = {name: of_jax(loss) for name, loss in losses.items()}
    if torch_device() is not None:
        tensors = to_torch(problem)
        found[TORCH] = lambda mode: torch_contestant(tensors, False, mode)
        found[CHUNKED_TORCH] = lambda mode: torch_contestant(tensors, True, mode)
    if bare:
        found[MATMUL] = lambda mode: matmul_contestant(problem)
    return found
