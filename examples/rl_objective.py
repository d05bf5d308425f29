"""Reinforcement learning of a language model's head, with logits that are never built: GRPO through `softmax_loss`.

    python examples/rl_objective.py

The prompt is a number n; the answer should be n numbers, each larger than the one before, and then the end token.
The reward of an answer is the share of its n + 1 places that are right, which a program can verify. Rewards are
compared within a group of answers to one prompt (GRPO); the clipped surrogate of PPO, an entropy bonus and a KL
penalty to the policy of the start are one function of a token's statistics. At the end this objective is checked
against its dense forms: values, gradients, memory. Curves go to --out.

Shapes: B = P prompts x G answers each, T places of an answer, D features, H hidden units, V tokens.
"""

import argparse
import sys
import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import jaxent

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PROMPTS = np.arange(2, 7)  # [P] n
G, T, D, H, V = 24, 8, 32, 128, 4096
END = 0  # the token that ends an answer; the other tokens are the numbers 1 ... V - 1
EPOCHS, LEARNING_RATE, CLIP, KL, ENTROPY = 3, 3e-3, 0.2, 1e-2, 1e-2
BLOCK = 128  # tokens whose logits exist at a time


class Batch(NamedTuple):
    """Answers, and what the policy that gave them said of each token."""

    prompts: jax.Array  # [B] n
    actions: jax.Array  # [B, T] tokens
    mask: jax.Array  # [B, T] False after the end token
    advantage: jax.Array  # [B, T] the same for all tokens of an answer
    old_log_prob: jax.Array  # [B, T]
    reference_log_prob: jax.Array  # [B, T] of the policy of the start


# ---------------------------------------------------------------------------------------------- the policy


def init(key, tokens=V):
    k1, k2, k3, k4, k5 = jax.random.split(key, 5)
    value = jnp.arange(tokens)[:, None] / tokens  # [V, 1]
    numbers = jnp.cos(jnp.pi * jnp.arange(D) * value)  # [V, D]
    return {
        # numbers of similar size are similar tokens, as after pretraining; in and out, the same embedding
        "embedding": numbers.at[END].set(jax.random.normal(k5, D)),  # [V, D]
        # the end of an answer is about as likely as it should be, not 1 in V
        "bias": jnp.zeros(tokens).at[END].set(np.log(tokens / T)),  # [V]
        "prompt": jax.random.normal(k1, (PROMPTS[-1] + 1, D)),  # [n, D]
        "place": jax.random.normal(k2, (T, D)),  # [T, D]
        "w1": jax.random.normal(k3, (D, H)) * np.sqrt(2 / D),  # [D, H]
        "w2": jax.random.normal(k4, (H, D)) * 0.01,  # [H, D] small: any number is likely at first
    }


def policy(params, prompts, previous, place):
    """The logits of the next token, `[..., V]`: a linear layer that is left open."""
    x = params["embedding"][previous] + params["prompt"][prompts] + params["place"][place]  # [..., D]
    hidden = jax.nn.relu(x @ params["w1"]) @ params["w2"]  # [..., D]
    block_bytes = 2 * 4 * BLOCK * len(params["bias"])  # logits and their gradient, float32
    return jaxent.LinearLogits(
        hidden, params["embedding"], params["bias"], class_axis=0, block_bytes=block_bytes
    )


def policy_of_answers(params, prompts, actions):
    """The logits of all tokens of given answers, `[B, T, V]`."""
    return policy(params, prompts[:, None], shift(actions), jnp.arange(T))


def shift(actions):
    """The token before each token; END before the first one. [B, T] -> [B, T]."""
    return jnp.pad(actions, ((0, 0), (1, 0)), constant_values=END)[:, :-1]


def sample(key, params, prompts):
    """Answers `[B, T]`. Each step needs its own logits, [B, V]; those of all steps never exist."""

    def step(previous, place):
        logits = policy(params, prompts, previous, place).dense()  # [B, V]
        token = jax.random.categorical(jax.random.fold_in(key, place), logits)  # [B]
        return token, token

    _, actions = jax.lax.scan(step, jnp.full(len(prompts), END), jnp.arange(T))  # [T, B]
    return actions.T


# ---------------------------------------------------------------------------------------------- the reward


def until_end(actions):
    """[B, T] -> bool [B, T]: True up to and with the first end token."""
    ends = jnp.cumsum(actions == END, -1)  # [B, T] how many so far
    return ends - (actions == END) == 0


def reward(prompts, actions):
    """The share of the n + 1 places that are right: [B], [B, T] -> [B] in [0, 1]."""
    place, n = jnp.arange(T), prompts[:, None]  # [T], [B, 1]
    number = (place < n) & (actions > shift(actions))  # [B, T] END is smaller than any number
    end = (place == n) & (actions == END)  # [B, T]
    return jnp.sum((number | end) & until_end(actions), -1) / (prompts + 1)


def group_advantage(rewards):
    """Each reward in standard deviations from the mean of its group: [P * G] -> [P * G]."""
    groups = rewards.reshape(-1, G)  # [P, G]
    centered = groups - groups.mean(-1, keepdims=True)
    return (centered / (groups.std(-1, keepdims=True) + 1e-3)).reshape(-1)


# ------------------------------------------------------------------------------------------- the objective


def objective(params, entropy_weight, batch, dense=False):
    """The loss, a mean over tokens; `dense` builds the logits, as a check."""

    def of_token(s, advantage, old_log_prob, reference_log_prob):
        # All arguments are scalars, those of one token: `softmax_loss` maps this over tokens, so that the logits of a
        # block of them, their losses and their gradients are made in one go. What is closed over may be traced.
        ratio = jnp.exp(s.log_prob - old_log_prob)
        gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantage)
        gap = reference_log_prob - s.log_prob
        kl = jnp.expm1(gap) - gap  # >= 0, and its mean over actions is the KL divergence ("k3")
        return -gain + KL * kl - entropy_weight * s.entropy

    logits = policy_of_answers(params, batch.prompts, batch.actions)  # a LinearLogits of shape [B, T, V]
    if dense:
        logits = logits.dense()
    of_rows = (batch.advantage, batch.old_log_prob, batch.reference_log_prob)  # each [B, T]
    return jaxent.softmax_loss(of_token, logits, batch.actions, *of_rows, where=batch.mask)


def plain_objective(params, entropy_weight, batch):
    """The same in plain JAX, as a check."""
    logits = policy_of_answers(params, batch.prompts, batch.actions).dense()  # [B, T, V]
    log_probs = jax.nn.log_softmax(logits)  # [B, T, V]
    log_prob = jnp.take_along_axis(log_probs, batch.actions[..., None], -1)[..., 0]  # [B, T]
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, -1)  # [B, T]
    ratio = jnp.exp(log_prob - batch.old_log_prob)
    clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    gain = jnp.minimum(ratio * batch.advantage, clipped * batch.advantage)
    gap = batch.reference_log_prob - log_prob
    losses = -gain + KL * (jnp.expm1(gap) - gap) - entropy_weight * entropy  # [B, T]
    return jnp.sum(losses, where=batch.mask) / jnp.sum(batch.mask)


# --------------------------------------------------------------------------------------------- training


def collect(key, params, reference):
    """A batch of answers, their mean reward and the mean entropy of their tokens."""
    prompts = jnp.repeat(PROMPTS, G)  # [B]
    actions = sample(key, params, prompts)  # [B, T]
    mask, rewards = until_end(actions), reward(prompts, actions)  # [B, T], [B]
    advantage = jnp.broadcast_to(group_advantage(rewards)[:, None], actions.shape)  # [B, T]
    logits = policy_of_answers(params, prompts, actions)
    old = jaxent.softmax_statistics(logits, actions, names=("log_prob", "entropy"), where=mask)
    logits = policy_of_answers(reference, prompts, actions)
    start = jaxent.softmax_statistics(logits, actions, names=("log_prob",), where=mask)
    batch = Batch(prompts, actions, mask, advantage, old.log_prob, start.log_prob)
    return batch, rewards.mean(), jnp.mean(old.entropy, where=mask)


def train(iterations, seed):
    """The policy, its last batch, and the curves of reward and entropy."""
    key, key_of_init = jax.random.split(jax.random.key(seed))
    params = reference = jax.jit(init)(key_of_init)
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, iterations * EPOCHS)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    state = optimizer.init(params)

    @jax.jit
    def iterate(params, state, index):
        batch, mean_reward, entropy = collect(jax.random.fold_in(key, index), params, reference)
        entropy_weight = ENTROPY * (1 - index / iterations)  # traced: it changes, the program does not

        def epoch(carry, _):
            params, state = carry
            gradient = jax.grad(objective)(params, entropy_weight, batch)
            update, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, update), state), None

        (params, state), _ = jax.lax.scan(epoch, (params, state), length=EPOCHS)
        return params, state, batch, mean_reward, entropy

    curves = []
    for index in range(iterations):
        params, state, batch, *figures = iterate(params, state, index)
        curves.append([float(x) for x in figures])
        progress(index + 1, iterations, "reward {:.3f}  entropy {:.2f} nats".format(*curves[-1]))
    return params, batch, np.array(curves).T  # ..., ..., [2, iterations]


def progress(done, total, text, width=30):
    """One line that writes over itself; in a log file only the last one."""
    if sys.stdout.isatty() or done == total:
        bar = "#" * (done * width // total)
        print(f"\r{bar:.<{width}} {done:5d}/{total}  {text}", end="\n" if done == total else "", flush=True)


# ------------------------------------------------------------------------------------------------ the check


def check(params, batch, entropy_weight=ENTROPY):
    """The fused objective against its dense forms: the largest relative difference of values and gradients."""

    def of(function):
        # the second gradient is that of the coefficient, which `of_token` closes over
        value_and_grad = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))
        value, (gradients, of_weight) = value_and_grad(params, entropy_weight, batch)
        found = {"loss": value, "entropy_weight": of_weight, **gradients}
        return {key: np.asarray(x) for key, x in found.items()}

    fused = of(objective)
    worst = 0.0
    for name, function in {"dense": partial(objective, dense=True), "log_softmax": plain_objective}.items():
        differences = {}
        for key, expected in of(function).items():
            # the loss is near 0, a mean of terms of both signs: it is compared with their size
            size = 1 if key == "loss" else np.max(np.abs(expected))
            differences[key] = np.max(np.abs(fused[key] - expected)) / size
        print(f"fused and {name}, apart by:", ", ".join(f"{key} {x:.0e}" for key, x in differences.items()))
        worst = np.max([worst, *differences.values()])  # unlike max, np.max does not lose a NaN
    if not worst < 1e-5:
        raise ArithmeticError("one objective in three forms: the values and gradients must agree")
    return worst


def temporaries(answers=1024, tokens=65536):
    """The bytes that value and gradients need beside arguments and results, at a larger vocabulary."""
    params = jax.eval_shape(partial(init, tokens=tokens), jax.random.key(0))
    rows = {
        name: jax.ShapeDtypeStruct((answers, T), dtype)
        for name, dtype in {"actions": jnp.int32, "mask": jnp.bool_}.items()
    }
    floats = jax.ShapeDtypeStruct((answers, T), jnp.float32)
    prompts = jax.ShapeDtypeStruct((answers,), jnp.int32)
    batch = Batch(prompts, **rows, advantage=floats, old_log_prob=floats, reference_log_prob=floats)
    found = {}
    for name, dense in {"fused": False, "dense": True}.items():
        function = jax.jit(jax.value_and_grad(partial(objective, dense=dense)))
        analysis = function.lower(params, ENTROPY, batch).compile().memory_analysis()  # nothing is run
        found[name] = analysis.temp_size_in_bytes
        print(f"{name}: {found[name] / 2**20:,.0f} MiB of temporaries for {answers * T} tokens of {tokens}")
    return found


# ---------------------------------------------------------------------------------------------- pictures


def draw(curves, out):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    labels = ("mean reward", "mean entropy (nats)")
    for axis, curve, label, color in zip(axes, curves, labels, ("tab:blue", "tab:orange"), strict=True):
        axis.plot(curve, color=color)
        axis.set(xlabel="iteration", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes[1].axhline(np.log(V), color="black", linewidth=0.8, linestyle=":")
    axes[1].annotate(f"log {V}", (0, np.log(V)), (0, -3), textcoords="offset points", va="top")
    figure.savefig(out, dpi=120)
    plt.close(figure)


def show(params, seed):
    """One answer to each prompt."""
    actions = jax.jit(sample)(jax.random.key(seed), params, PROMPTS)  # [P, T]
    answers = zip(PROMPTS, np.asarray(actions), np.asarray(until_end(actions)), strict=True)
    for n, answer, mask in answers:
        print(f"{n}:", *("end" if token == END else token for token in answer[mask]))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="rl_objective.png")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    params, batch, curves = train(options.iterations, options.seed)
    seconds = time.perf_counter() - start
    show(params, options.seed)
    worst, found = check(params, batch), temporaries()
    draw(curves, options.out)
    print(f"{seconds:.1f} s of training, seed {options.seed}, drawn in {options.out}")
    return {"reward": curves[0], "entropy": curves[1], "difference": float(worst), "temporaries": found}


if __name__ == "__main__":
    main()
