"""What a call costs beside its arithmetic, of which there is none: python benchmarks/call.py

Of a jitted training step: a model of many small arrays, so that time is what jax does per call and per array. An effect
in the program (a debug check, a callback) would show here: jax then calls it from Python, array by array.

Outside of jit, as in a notebook: the first call, which compiles all that was not compiled for this shape, and those
after it.
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


EAGER_ROUNDS = 5
OUTSIDE_OF_JIT = {
    "cross-entropy, its mean": (
        lambda z: jaxent.softmax_cross_entropy(z, jnp.zeros(len(z), jnp.int32), reduction="mean"),
        lambda z: LOSSES["optax"](z, jnp.zeros(len(z), jnp.int32)).mean(),
    ),
    "KL divergence": (
        lambda z: jaxent.softmax_kl_divergence(z, 2 * z, reduction="mean"),
        lambda z: optax.losses.kl_divergence(jax.nn.log_softmax(z), jax.nn.softmax(2 * z)).mean(),
    ),
    "sigmoid cross-entropy": (
        lambda z: jaxent.sigmoid_cross_entropy(z, z > 0, reduction="mean"),
        lambda z: optax.losses.sigmoid_binary_cross_entropy(z, z > 0).mean(),
    ),
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


def first_and_then(f: Callable) -> tuple[float, float]:
    """Seconds of a call that compiles all it needs, and of one after it."""
    z = jax.random.normal(jax.random.key(0), (64, 10))
    jax.clear_caches()
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        jax.block_until_ready(f(z))
        times.append(time.perf_counter() - start)
    return times[0], statistics.median(times[1:])


def outside_of_jit() -> str:
    rows = []
    for name, losses in OUTSIDE_OF_JIT.items():
        for of, fs in (name, losses), (f"its gradient: {name}", [jax.grad(f) for f in losses]):
            rounds = [[first_and_then(f) for f in fs] for _ in range(EAGER_ROUNDS)]
            (first, then), (first_of_optax, then_of_optax) = (
                [statistics.median(times) for times in zip(*calls, strict=True)]
                for calls in zip(*rounds, strict=True)
            )
            times = (f"{1e3 * t:.3g} ms" for t in (first, first_of_optax, then, then_of_optax))
            rows.append([of, *times])
    return table(["outside of jit", "jaxent, first", "optax, first", "jaxent, then", "optax, then"], rows)


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
    print(table(["a step of a model of", *steps, "jaxent / optax"], rows), end="\n\n")
    print(outside_of_jit())


if __name__ == "__main__":
    main()
