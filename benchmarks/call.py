"""What calling a jitted training step costs beside its arithmetic, of which there is none: python benchmarks/call.py

A model of many small arrays, so that time is what jax does per call and per array. An effect in the program (a debug
check, a callback) would show here: jax then calls it from Python, array by array.
"""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

import jaxent
from common import surroundings, table

ARRAYS = (1, 30, 300)
ROUNDS, CALLS = 15, 50
LOSSES = {
    "optax": optax.losses.softmax_cross_entropy_with_integer_labels,
    "jaxent": jaxent.softmax_cross_entropy,
}


def step_of(losses: Callable) -> Callable:
    @jax.jit
    def step(params: list[jax.Array], logits: jax.Array, labels: jax.Array) -> list[jax.Array]:
        gradients = jax.grad(lambda params: losses(logits * sum(params), labels).mean())(params)
        return [p - 0.1 * g for p, g in zip(params, gradients, strict=True)]

    return step


def seconds_of_a_call(step: Callable, arrays: int) -> float:
    params, logits, labels = [jnp.ones(8)] * arrays, jnp.ones((4, 8)), jnp.zeros(4, jnp.int32)
    params = jax.block_until_ready(step(params, logits, labels))
    start = time.perf_counter()
    for _ in range(CALLS):
        params = step(params, logits, labels)
    jax.block_until_ready(params)
    return (time.perf_counter() - start) / CALLS


def main() -> None:
    print(f"`python benchmarks/call.py`\n{surroundings(['jax', 'jaxent', 'optax'])}; {ROUNDS} rounds\n")
    steps = {name: step_of(losses) for name, losses in LOSSES.items()}
    rows = []
    for arrays in ARRAYS:
        rounds = [
            {name: seconds_of_a_call(step, arrays) for name, step in steps.items()} for _ in range(ROUNDS)
        ]
        times = [statistics.median(1e6 * r[name] for r in rounds) for name in steps]
        ratio = statistics.median(r["jaxent"] / r["optax"] for r in rounds)
        rows.append([f"{arrays} arrays", *(f"{t:.0f} us" for t in times), f"{ratio:.2f}"])
    print(table(["a step of a model of", *steps, "jaxent / optax"], rows))


if __name__ == "__main__":
    main()
