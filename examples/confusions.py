"""What people get wrong with cross-entropy, on real data: how it fails, by how much, what `diagnose` says.

    python examples/confusions.py

Handwritten digits, as in digits.py beside this file. Prints figures, draws a panel per confusion in --out.
Shapes: N images, D = 64 pixels, V classes.
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from digits import init, load, model

import jaxent

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WRONG, RIGHT = "tab:red", "tab:blue"

# Compiled once for all panels. Uncompiled, a loss also checks the values of NumPy labels: see `error_of`.
softmax_cross_entropy = jax.jit(jaxent.softmax_cross_entropy)
sigmoid_cross_entropy = jax.jit(jaxent.sigmoid_cross_entropy)
softmax_entropy = jax.jit(jaxent.softmax_entropy)
softmax_kl_divergence = jax.jit(jaxent.softmax_kl_divergence)
nll_loss = jax.jit(jaxent.nll_loss)


def train(loss, labels, outputs, steps=100):
    """A network trained with `loss(logits, labels) -> scalar`: its parameters and its curve."""
    (pixels, _), _ = load()  # [N, D]
    batches = [jnp.asarray(x[:1408]).reshape(11, 128, *x.shape[1:]) for x in (pixels, labels)]  # [11, B, ...]
    params = init(jax.random.key(0), outputs)
    optimizer = optax.adam(1e-3)
    objective = jax.value_and_grad(lambda params, x, y: loss(model(params, x, "ten"), y))  # logits [B, V]

    def step(carry, index):
        params, state = carry
        value, gradient = objective(params, *(x[index % 11] for x in batches))
        update, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, update), state), value

    (params, _), curve = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))
    return params, np.asarray(curve)  # ..., [steps]


def error_of(call):
    """The error that jaxent raises, as text."""
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error")


# Each confusion draws its panel and returns lines to print and what `diagnose` says.


def probabilities_for_logits(ax, pixels, digits, trained):
    right = trained["curve"]

    def twice(logits, labels):
        return jaxent.softmax_cross_entropy(jax.nn.softmax(logits), labels, reduction="mean")

    _, wrong = train(twice, digits, 10)
    floor = np.log1p(9 / np.e)  # probabilities differ by 1 at most: -log(e / (e + 9))
    ax.plot(wrong, WRONG, label="softmax before the loss")
    ax.plot(right, RIGHT, label="logits")
    ax.axhline(floor, color="gray", linestyle=":", label=f"floor {floor:.3f}")
    ax.set(xlabel="step", ylabel="loss (nats)")
    ax.legend(frameon=False, fontsize="small")
    lines = [
        f"loss after {len(wrong)} steps: {wrong[-1]:.4f} with softmax twice, {right[-1]:.4f} on logits",
        f"the former cannot fall below log(1 + 9/e) = {floor:.4f}, however right the network is",
    ]
    return lines, jaxent.diagnose(jax.nn.softmax(trained["logits"]), digits)


def softmax_then_log(ax, pixels, digits, trained):
    margins = np.linspace(0, 40, 401, dtype=np.float32)  # the label's logit above the other one's
    pairs = jnp.stack([jnp.zeros_like(margins), margins], -1)  # [401, 2]
    ones = jnp.ones(len(margins), jnp.int32)
    naive = -jnp.log(jax.nn.softmax(pairs)[:, 1])
    ax.semilogy(margins, softmax_cross_entropy(pairs, ones), RIGHT, label="one function on logits")
    shown = np.where(naive > 0, naive, np.nan)  # 0 has no place on a log axis
    gone = margins[np.argmax(np.asarray(naive) == 0)]
    ax.semilogy(margins, shown, WRONG, linestyle="--", label="log(softmax), float32")
    ax.axvline(gone, color="gray", linestyle=":", label=f"0 from {gone:.1f} on")
    ax.set(xlabel="logit of the label above the other", ylabel="loss (nats)")
    ax.legend(frameon=False, fontsize="small")
    lines = []
    for scale in (1, 3, 10):
        logits = scale * trained["logits"]  # [N, 10], a network ever surer of itself
        probs = jax.nn.softmax(logits)  # [N, 10]
        naive = np.asarray(-jnp.log(probs))  # [N, 10], had each of the ten been the label
        ours = [softmax_cross_entropy(logits, jnp.full(len(digits), k)) for k in range(10)]
        ours = np.stack(ours, -1)  # [N, 10]
        lines.append(
            f"logits x {scale:<2d}: of {naive.size:,} losses, log(softmax) has {(naive == 0).sum():4d} zero "
            f"and {np.isinf(naive).sum():4d} inf, jaxent {(ours == 0).sum():3d} and {np.isinf(ours).sum()}"
        )
    return lines, jaxent.diagnose(probs, digits, loss="categorical_cross_entropy")


def elementwise_on_one_choice(ax, pixels, digits, trained):
    def losses(logits, labels):  # [N, V], [N] -> [N], [N]
        one_hot = jax.nn.one_hot(labels, logits.shape[-1])  # [N, V]
        binary = jaxent.binary_cross_entropy(jax.nn.softmax(logits), one_hot).sum(-1)
        return binary, softmax_cross_entropy(logits, labels)

    @jax.jit
    def ratio(logits, labels):  # of the losses [N], of the gradients [N, V]
        (binary, categorical), vjp = jax.vjp(lambda logits: losses(logits, labels), logits)
        one, zero = jnp.ones_like(binary), jnp.zeros_like(binary)
        return binary / categorical, vjp((one, zero))[0] / vjp((zero, one))[0]

    # a tempered network, so that the losses are far from rounding to 0
    logits = 0.2 * trained["logits"]  # [N, 10]
    ten, _ = ratio(logits, digits)
    two, two_gradient = ratio(logits[:, :2], digits % 2)
    bins = np.arange(1.4125, 2.2, 0.025)  # one bin around 2
    ax.hist(two, bins, color=RIGHT, label="2 classes")
    ax.hist(ten, bins, color=WRONG, label="10 classes")
    ax.set(xlabel="binary loss / categorical loss", ylabel="images")
    ax.legend(frameon=False, fontsize="small", loc="upper left")
    lines = [
        f"2 classes: binary / categorical is {two.min():.6f} to {two.max():.6f}, of the gradients "
        f"{two_gradient.min():.5f} to {two_gradient.max():.5f}: exactly twice",
        f"10 classes: {ten.min():.4f} to {ten.max():.4f}: another loss",
    ]
    one_hot = np.eye(10, dtype=np.float32)[digits]
    return lines, jaxent.diagnose(trained["logits"], one_hot, loss="sigmoid_cross_entropy")


def one_class(ax, pixels, digits, trained):
    odd = digits % 2  # [N]

    def softmax_of_one(logits, labels):  # logits [N, 1]: the only class there is has index 0
        return jaxent.softmax_cross_entropy(logits, jnp.zeros_like(labels), reduction="mean")

    def sigmoid(logits, labels):
        return jaxent.sigmoid_cross_entropy(logits[:, 0], labels.astype(jnp.float32), reduction="mean")

    wrong_params, wrong = train(softmax_of_one, odd, 1)
    right_params, right = train(sigmoid, odd, 1)
    ax.plot(wrong, WRONG, label="softmax over one output")
    ax.plot(right, RIGHT, label="sigmoid of one output")
    ax.set(xlabel="step", ylabel="loss (nats)")
    ax.legend(frameon=False, fontsize="small")
    found = [((model(p, pixels, "ten")[:, 0] > 0) == odd).mean() for p in (wrong_params, right_params)]
    logits = model(wrong_params, pixels, "ten")  # [N, 1]
    agreed = (logits.argmax(-1) == 0).mean()
    lines = [
        f"softmax over one output: loss {np.abs(wrong).max():g} all along, 'accuracy' {agreed:.0%}, "
        f"though it tells odd from even in {found[0]:.1%} of images only",
        f"sigmoid of one output: loss {right[-1]:.4f}, accuracy {found[1]:.1%}",
    ]
    return lines, jaxent.diagnose(logits, odd)


def values_for_indices(ax, pixels, digits, trained):
    logits, values = trained["logits"], digits.astype(np.float32)  # [N, 10], [N] floats
    naive = -(values[:, None] * jax.nn.log_softmax(logits)).sum(-1)  # [N]: a broadcast, and no error
    right = softmax_cross_entropy(logits, digits)  # [N]
    means = [
        [float(x[digits == k].mean()) for k in range(10)] for x in (np.asarray(naive), np.asarray(right))
    ]
    ax.bar(np.arange(10) - 0.2, means[0], 0.4, color=WRONG, label="-(y * log_softmax).sum()")
    ax.bar(np.arange(10) + 0.2, means[1], 0.4, color=RIGHT, label="jaxent, integers")
    ax.text(-0.2, 2e-3, "0", color=WRONG, ha="center")
    ax.set(yscale="log", ylim=(1e-3, 3e5), xlabel="digit", ylabel="mean loss (nats)", xticks=range(10))
    ax.legend(frameon=False, fontsize="small", loc="upper left")
    odd = (digits % 2).astype(np.float32)
    pair = softmax_cross_entropy(logits[:, :2], jnp.stack([1 - odd, odd], -1))  # [1 - y, y]
    same = sigmoid_cross_entropy(logits[:, 1] - logits[:, 0], odd)
    lines = [
        f"a broadcast of [N, 1] against [N, 10]: mean loss {naive.mean():.1f}, 0 for every zero",
        error_of(lambda: jaxent.softmax_cross_entropy(logits, values)),
        f"[y] stands for [1 - y, y]: {jnp.abs(pair - same).max():.1e} from sigmoid of the difference at most",
    ]
    return lines, jaxent.diagnose(logits, values)


def identity_table(ax, pixels, digits, trained):
    classes = 10.0 ** np.arange(1, 7)
    ax.loglog(classes, 4 * classes**2, WRONG, label="identity table, V x V")
    ax.loglog(classes, 4 * 32 * classes, "tab:orange", label="one-hot, 32 x V")
    ax.loglog(classes, 4 * 32 + 0 * classes, RIGHT, label="32 integers")
    ax.plot(1e6, 4e12, "o", color=WRONG)
    ax.annotate("4 TB", (1e6, 4e12), (-8, -2), textcoords="offset points", ha="right")
    ax.set(xlabel="classes V", ylabel="bytes of labels", ylim=(20, 1e16))
    ax.legend(frameon=False, fontsize="small", loc="upper left")
    one_hot = np.eye(10, dtype=np.int32)[digits]  # [N, 10]
    a = softmax_cross_entropy(trained["logits"], digits)  # [N]
    b = softmax_cross_entropy(trained["logits"], one_hot.astype(np.float32))  # [N]
    lines = [
        f"1,000,000 classes: table {4 * 10**12:,} bytes, 32 one-hot rows {4 * 32 * 10**6:,}, indices 128",
        f"integers and one-hot floats give the same loss, to {jnp.abs(a - b).max():.1e}",
        error_of(lambda: jaxent.softmax_cross_entropy(trained["logits"], one_hot)),
    ]
    return lines, jaxent.diagnose(trained["logits"], one_hot)


def counting_from_one(ax, pixels, digits, trained):
    losses = np.asarray(softmax_cross_entropy(trained["logits"], jnp.asarray(digits + 1)))  # [N]
    right = np.asarray(softmax_cross_entropy(trained["logits"], digits))
    means = [[x[digits == k].mean() for k in range(10)] for x in (losses, right)]
    ax.bar(np.arange(10) - 0.2, means[0], 0.4, color=WRONG, label="labels 1 .. 10")
    ax.bar(np.arange(10) + 0.2, means[1], 0.4, color=RIGHT, label="labels 0 .. 9")
    ax.text(8.8, 1.5e-3, "NaN", color=WRONG, ha="center", rotation=90)
    ax.set(yscale="log", ylim=(1e-3, 1e3), xlabel="digit", ylabel="mean loss (nats)", xticks=range(10))
    ax.legend(frameon=False, fontsize="small", loc="upper left", ncols=2)
    lines = [
        f"labels 1 .. 10 on the device: {int(np.isnan(losses).sum())} rows are NaN, none wraps to a class",
        error_of(lambda: jaxent.softmax_cross_entropy(trained["logits"], digits + 1)),
    ]
    return lines, jaxent.diagnose(trained["logits"], digits + 1)


def one_loss_many_names(ax, pixels, digits, trained):
    logits = 0.5 * trained["logits"]  # [N, 10], the model
    target_logits = 0.3 * trained["logits"] + jax.nn.one_hot(digits, 10)  # [N, 10], a teacher
    target = jax.nn.softmax(target_logits)  # [N, 10]
    cross_entropy = softmax_cross_entropy(logits, target)  # [N]
    entropy = softmax_entropy(target_logits)  # [N]
    divergence = softmax_kl_divergence(logits, target_logits)  # [N]
    likelihood = nll_loss(jax.nn.log_softmax(logits), digits)  # [N]
    gap = jnp.abs(cross_entropy - entropy - divergence).max()
    ax.plot(cross_entropy - entropy, divergence, ".", color=RIGHT, markersize=4)
    top = float(divergence.max())
    ax.plot([0, top], [0, top], color="gray", linestyle=":", label="equal")
    ax.locator_params(nbins=6)
    ax.set(xlabel="cross-entropy - entropy of the target", ylabel="KL divergence")
    ax.legend(frameon=False, fontsize="small")
    lines = [
        f"KL = cross-entropy - entropy of the target: {gap:.1e} apart at most in {len(digits)} images",
        "softmax cross-entropy of an index is the negative log-likelihood: "
        f"{jnp.abs(softmax_cross_entropy(logits, digits) - likelihood).max():.1e} apart at most",
    ]
    return lines, jaxent.diagnose(logits, target)


CONFUSIONS = {
    "Logits must be probabilities": probabilities_for_logits,
    "Softmax first, then log": softmax_then_log,
    "Binary loss for one of N": elementwise_on_one_choice,
    "A softmax over one class": one_class,
    "Label values for probabilities": values_for_indices,
    "One-hot from an identity table": identity_table,
    "Labels that count from 1": counting_from_one,
    "Cross-entropy, likelihood, KL": one_loss_many_names,
}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="confusions.png")
    options = parser.parse_args(argv)

    (pixels, digits), _ = load()  # [N, D], [N]
    params, curve = train(lambda z, y: jaxent.softmax_cross_entropy(z, y, reduction="mean"), digits, 10)
    trained = {"curve": curve, "logits": model(params, pixels, "ten")}  # [steps], [N, 10]

    figure, axes = plt.subplots(2, 4, figsize=(17, 8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    diagnoses = {}
    for ax, (title, confusion) in zip(axes.flat, CONFUSIONS.items(), strict=True):
        lines, diagnosis = confusion(ax, pixels, digits, trained)
        ax.set_title(title)
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
        print("\n".join([f"== {title}", *lines, "", str(diagnosis), ""]))
        diagnoses[title] = diagnosis
    figure.savefig(options.out, dpi=100)
    plt.close(figure)
    print(f"drawn in {options.out}")
    return diagnoses


if __name__ == "__main__":
    main()
