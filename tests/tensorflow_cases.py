"""Cases of sampled softmax and NCE that TensorFlow is asked about.

`python tests/tensorflow_cases.py`, where it is installed, writes down what it says of the first few, in
tensorflow_values.json; test_candidates_tensorflow.py has them all where it finds TensorFlow. Of NumPy alone, but for
`of_tensorflow`.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

STORED = Path(__file__).with_name("tensorflow_values.json")
CASES, KEPT = 20, 3
NAMES = ("sampled_softmax_loss", "nce_loss")


class Case(NamedTuple):
    hidden: np.ndarray  # [N, D]
    table: np.ndarray  # [V, D]
    bias: np.ndarray  # [V]
    labels: np.ndarray  # int64 [N, T]
    samples: np.ndarray  # int64 [S]
    expected: tuple[np.ndarray, np.ndarray]  # counts of labels and of samples
    remove_accidental_hits: bool


def case(seed):
    rng = np.random.default_rng(seed)
    n, d, v = rng.integers(1, 7), rng.integers(1, 6), rng.integers(5, 30)
    t, s = rng.integers(1, 4), rng.integers(1, 12)
    hidden, table, bias = (rng.normal(size=size).astype(np.float32) for size in ((n, d), (v, d), (v,)))
    labels = np.stack([rng.choice(v, size=t, replace=False) for _ in range(n)])
    samples = rng.choice(v, size=min(s, v), replace=False)  # of a class that comes twice it removes one hit
    expected = tuple(rng.uniform(0.01, 2, size=x.shape).astype(np.float32) for x in (labels, samples))
    return Case(hidden, table, bias, labels, samples, expected, bool(seed % 2))


def of_tensorflow(name, x):
    """Losses `[N]`, and the gradients of their sum by hidden, table and bias."""
    import tensorflow as tf

    arrays = [tf.Variable(a) for a in (x.hidden, x.table, x.bias)]
    with tf.GradientTape() as tape:
        losses = getattr(tf.nn, name)(
            weights=arrays[1],
            biases=arrays[2],
            labels=x.labels,
            inputs=arrays[0],
            num_sampled=len(x.samples),
            num_classes=len(x.table),
            num_true=x.labels.shape[1],
            sampled_values=(x.samples, *x.expected),
            remove_accidental_hits=x.remove_accidental_hits,
        )
        total = tf.reduce_sum(losses)
    gradients = [tf.convert_to_tensor(g).numpy() for g in tape.gradient(total, arrays)]
    return losses.numpy(), gradients


def main():
    import tensorflow as tf

    found = {"tensorflow": tf.__version__}
    for name in NAMES:
        for seed in range(KEPT):
            losses, gradients = of_tensorflow(name, case(seed))
            found[f"{name} {seed}"] = [x.tolist() for x in (losses, *gradients)]
    STORED.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
