"""A linear layer's cross-entropy on up to 512 devices, compiled and never run: python benchmarks/scaling.py --out docs

Each program is the value and gradients of the mean over all tokens, in `jax.shard_map`, for a mesh of data x vocab:
the rows are split over the data axis, the classes over the vocab axis. What is read from it is exact: what it sends,
holds and multiplies on each device. CPU devices are enough for that, as many as one likes; time they do not tell, so
that part is a model on paper, with the constants below. Needs matplotlib.
"""

import argparse
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxent
from common import readable_bytes, surroundings, table
from compiled import collectives, matmul_operations
from jaxent._logits.plan import Sizes, plan, plan_by_classes

# Not 2**24: jax 0.12 dies compiling an all-reduce of 2**36 bfloat16 numbers for CPUs.
CLASSES = [2**17, 2**20, 2**24 - 2**13]
DEVICES = [8, 64, 512]
WIDTHS = [1, 8, 64, 512]  # of the vocab axis
FEATURES = 4096
TOKENS = 4096  # on each device: 2 million a step on 512, a usual batch; more devices are more tokens
BLOCK_BYTES = 2 * 2**30  # of 80 GB; the smaller the blocks, the more often the operands are read
TOKENS_COMPARED = [512, 1024, 2048, 4096, 8192, 16384]
BLOCKS_COMPARED = [2**27, 2**29, 2**31]
ITEMSIZE = 2  # bfloat16
ADAM = 12  # bytes a parameter: its float32 copy and two moments
DKERNEL, DHIDDEN, DEVICE = "all-reduce of dkernel", "all-reduce of dhidden", "matmuls or memory"
COLORS = {DEVICE: "#4a4e69", DHIDDEN: "#edae49", DKERNEL: "#d1495b"}


class Machine(NamedTuple):
    """H100 SXM: NVIDIA's data sheet, and 400 Gbit/s of network for each of the 8 in a node, as in a DGX H100."""

    operations: float = 989e12  # bf16 without sparsity, a second
    memory_bandwidth: float = 3.35e12  # bytes a second
    memory: float = 80e9
    fast: float = 450e9  # bytes a second and direction, NVLink
    slow: float = 50e9  # bytes a second and direction, between nodes
    node: int = 8


class Head(NamedTuple):
    """The last layer of a model, its batch and its mesh."""

    classes: int
    data: int
    vocab: int
    features: int = FEATURES
    tokens: int = TOKENS  # on each device
    block_bytes: int = BLOCK_BYTES

    @property
    def rows(self) -> int:
        """Of hidden, on each device: the vocab axis works on the same ones."""
        return self.tokens * self.vocab

    @property
    def classes_here(self) -> int:
        return self.classes // self.vocab

    @property
    def matmul(self) -> int:
        """Operations of one product on each device; the mesh does not change them."""
        return 2 * self.rows * self.features * self.classes_here

    @property
    def name(self) -> str:
        return (
            f"{count(self.classes)}, {self.data * self.vocab} devices: data {self.data} x vocab {self.vocab}"
        )


class Measured(NamedTuple):
    """Of the compiled program, on each device, in bytes; all-reduces by the size of their result."""

    dkernel: int
    dhidden: int
    others: int
    in_loops: int
    kinds: set[str]
    matmuls: float  # in units of one product
    arguments: int
    results: int
    temporaries: int


class Modelled(NamedTuple):
    """On paper; seconds."""

    matmuls: int
    operations: float
    traffic: float
    dkernel: float
    dhidden: float

    @property
    def parts(self) -> dict[str, float]:
        return {
            DEVICE: max(self.operations, self.traffic),
            DHIDDEN: self.dhidden,
            DKERNEL: self.dkernel,
        }

    @property
    def total(self) -> float:
        return sum(self.parts.values())


# What is compiled.


def lower(head: Head) -> jax.stages.Lowered:
    sizes = {name: size for name in ("data", "vocab") if (size := getattr(head, name)) > 1}
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=jax.devices()[: head.data * head.vocab])
    data, vocab = (name if name in sizes else None for name in ("data", "vocab"))

    def loss(hidden, kernel, labels):
        logits = jaxent.LinearLogits(hidden, kernel, block_bytes=head.block_bytes)
        axes = {"class_axis_name": vocab, "batch_axis_name": data}
        return jaxent.softmax_cross_entropy(logits, labels, reduction="mean", **axes)

    rows = head.tokens * head.data * head.vocab
    layer_specs, label_spec = (P(data), P(None, vocab)), P(data)
    step = jax.shard_map(
        jax.value_and_grad(loss, (0, 1)),
        mesh=mesh,
        in_specs=(*layer_specs, label_spec),
        out_specs=(P(), layer_specs),
    )

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    hidden = array((rows, head.features), jnp.bfloat16, layer_specs[0])
    kernel = array((head.features, head.classes), jnp.bfloat16, layer_specs[1])
    return jax.jit(step).lower(hidden, kernel, array((rows,), jnp.int32, label_spec))


def measure(head: Head) -> Measured:
    program = lower(head).compile()
    sent = collectives(program)
    # XLA may send several arrays together: what an array is, its shape says
    sizes = {"dkernel": 0, "dhidden": 0, "others": 0}
    names = {(head.features, head.classes_here): "dkernel", (head.rows, head.features): "dhidden"}
    for collective in sent:
        for array in collective.shapes:
            alone = collective._replace(shapes=(array,))
            sizes[names.get(array[1], "others")] += collective.times * alone.bytes
    memory = program.memory_analysis()
    return Measured(
        **sizes,
        in_loops=sum(c.bytes * c.times for c in sent if c.in_loop),
        kinds={c.kind for c in sent},
        matmuls=matmul_operations(program) / head.matmul,
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
    )


# What is modelled.


def model(head: Head, machine: Machine) -> Modelled:
    """No part overlaps another. Of memory, the operands and gradients of the matmuls are counted.

    The blocks are those that jaxent takes on an accelerator; the compiled program has those of a CPU.
    """
    hidden = head.rows * head.features
    kernel = head.features * head.classes_here
    sizes = Sizes(head.rows, head.features, head.classes_here, ITEMSIZE, 4, ITEMSIZE)
    best = plan(sizes, head.block_bytes, "gpu")
    if head.vocab == 1 and best.classes == head.classes:
        matmuls, pieces = 3, -(-head.rows // best.rows)
        blocks = -(-pieces // best.pieces)
        # a piece reads the kernel; a block does, reads and writes its float32 gradient, which a single one writes
        gradient = ITEMSIZE if blocks == 1 else 2 * 4 * blocks
        traffic = (ITEMSIZE * (pieces + blocks) + gradient) * kernel
    else:
        matmuls, blocks = 4, -(-head.classes_here // plan_by_classes(sizes, head.block_bytes, "gpu"))
        # a block reads hidden three times, reads and writes its float32 gradient; the kernel: 3 reads, 1 gradient
        traffic = blocks * (3 * ITEMSIZE + 2 * 4) * hidden + 4 * ITEMSIZE * kernel
    # devices next to each other are one group of the vocab axis
    vocab_in_node = min(head.vocab, machine.node)
    data_in_node = min(head.data, machine.node // vocab_in_node)
    return Modelled(
        matmuls,
        matmuls * head.matmul / machine.operations,
        traffic / machine.memory_bandwidth,
        all_reduce(ITEMSIZE * kernel, head.data, data_in_node, machine),
        all_reduce(ITEMSIZE * hidden, head.vocab, vocab_in_node, machine),
    )


def all_reduce(size: int, devices: int, in_node: int, machine: Machine) -> float:
    """Rings: a ring of n moves 2(n-1)/n of the bytes; the one between nodes, a node's share of them."""
    nodes = devices // in_node
    inside = 2 * (in_node - 1) / in_node * size / machine.fast
    return inside + 2 * (nodes - 1) / nodes * size / in_node / machine.slow


def held(head: Head, found: Measured) -> tuple[int, ...]:
    """Bytes on each device: arguments, results, temporaries, and what Adam has beside."""
    adam = ADAM * head.features * head.classes_here
    return found.arguments, found.results, found.temporaries, adam


# What is printed and drawn.


def count(number: int) -> str:
    """As 131072 -> 128k."""
    power = min((number.bit_length() - 1) // 10, 2)
    return f"{number / 2 ** (10 * power):.0f}{('', 'k', 'M')[power]}"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def compiled_row(head: Head, found: Measured, machine: Machine) -> list[str]:
    sizes = found.dkernel, found.dhidden, found.others, found.in_loops
    total = sum(held(head, found))
    return [
        head.name,
        *map(readable_bytes, sizes),
        f"{found.matmuls:.3f}",
        *map(readable_bytes, held(head, found)),
        readable_bytes(total) + ("" if total < machine.memory else " (!)"),
    ]


def modelled_row(head: Head, machine: Machine) -> list[str]:
    found = model(head, machine)
    parts = found.operations, found.traffic, found.dhidden, found.dkernel, found.total
    return [head.name, str(found.matmuls), *map(milliseconds, parts)]


def ratio_row(classes: int, devices: int, machine: Machine) -> list[str]:
    """The vocab axis as wide as a node, beside a kernel on every device; and the tokens at which they are equal."""

    def ratio(tokens: int) -> float:
        split = Head(classes, devices // machine.node, machine.node, tokens=tokens)
        whole = Head(classes, devices, 1, tokens=tokens)
        return model(split, machine).total / model(whole, machine).total

    most = TOKENS_COMPARED[-1]
    equal = next((str(t) for t in range(128, most + 1, 128) if ratio(t) >= 1), f"> {most}")
    return [f"{count(classes)}, {devices} devices", *(f"{ratio(t):.2f}" for t in TOKENS_COMPARED), equal]


def width_row(classes: int, devices: int, machine: Machine) -> list[str]:
    times = [model(Head(classes, devices // w, w), machine).total for w in widths(devices)]
    shown = [milliseconds(t) + " *" * (t == min(times)) for t in times]
    return [count(classes), *shown, f"{(classes / TOKENS) ** 0.5:.1f}"]


def widths(devices: int) -> list[int]:
    return [w for w in (2**k for k in range(devices.bit_length())) if devices % w == 0]


def block_row(head: Head, machine: Machine) -> list[str]:
    found = [model(head._replace(block_bytes=size), machine) for size in BLOCKS_COMPARED]
    return [head.name, *(f"{milliseconds(m.operations)}, {milliseconds(m.traffic)}" for m in found)]


def draw(results: dict[Head, Measured], machine: Machine, path: Path, caption: str) -> None:
    """By classes and mesh: the modelled time, and what each device holds."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    totals = {head: sum(held(head, found)) for head, found in results.items()}
    groups = {v: [h for h in results if h.classes == v] for v in dict.fromkeys(h.classes for h in results)}
    figure, panels = plt.subplots(
        len(groups), 2, figsize=(13, 1.6 + 2.9 * len(groups)), squeeze=False, sharey="row"
    )
    for (classes, heads), (times, memory) in zip(groups.items(), panels, strict=True):
        # a gap between numbers of devices
        gaps = {n: 0.7 * k for k, n in enumerate(dict.fromkeys(h.data * h.vocab for h in heads))}
        places = [k + gaps[h.data * h.vocab] for k, h in enumerate(heads)]
        # the worst mesh would leave no room for the others
        longest = 2e3 * statistics.median(model(h, machine).total for h in heads)
        for head, y in zip(heads, places, strict=True):
            found, left = model(head, machine), 0.0
            for part, seconds in found.parts.items():
                width = min(1e3 * seconds, longest - left)
                times.barh(y, width, 0.8, left=left, color=COLORS[part])
                left += width
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
            label = {
                "textcoords": "offset points",
                "xytext": (4, 0),
                "va": "center",
                "fontsize": 8,
                "bbox": box,
            }
            end = min(1e3 * found.total, longest)
            times.annotate(milliseconds(found.total) + " (cut)" * (end == longest), (end, y), **label)
            fits = totals[head] < machine.memory
            memory.barh(y, totals[head] / 1e9, 0.8, color="#66a182" if fits else "#c9c9c9")
            memory.annotate(readable_bytes(totals[head]), (totals[head] / 1e9, y), **label)
        names = [f"{h.data * h.vocab}: data {h.data} x vocab {h.vocab}" for h in heads]
        times.set_yticks(places, names, fontsize=9)
        times.set_ylim(max(places) + 0.6, -0.6)
        times.set_xlim(0, 1.15 * longest)
        times.set_title(f"V = {count(classes)}: modelled time, ms", fontsize=11)
        memory.set_xscale("log")
        memory.set_xlim(1, 4 * max(totals.values()) / 1e9)
        memory.axvline(machine.memory / 1e9, color="#333333", linewidth=1, linestyle=(0, (4, 3)))
        memory.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        memory.set_title(f"V = {count(classes)}: a device's memory, GB", fontsize=11)
        for panel in (times, memory):
            panel.tick_params(left=False)
            panel.spines[["top", "right", "left"]].set_visible(False)
            panel.grid(axis="x", color="#eeeeee")
            panel.set_axisbelow(True)
    colors = COLORS | {
        f"below {machine.memory / 1e9:g} GB with Adam": "#66a182",
        "above": "#c9c9c9",
    }
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    height = figure.get_figheight()
    figure.suptitle(
        f"Cross-entropy of a linear layer with gradients, {TOKENS} tokens on each device, by number of devices "
        "and mesh (less is better)"
    )
    figure.legend(
        handles, colors, ncols=len(colors), loc="lower center", bbox_to_anchor=(0.5, 0.28 / height),
        frameon=False, fontsize=9, columnspacing=1.4, handlelength=1.4,
    )  # fmt: skip
    figure.text(0.5, 0.12 / height, caption, ha="center", fontsize=8, color="#666666")
    figure.tight_layout(rect=(0, 0.6 / height, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def all_meshes(classes: Iterable[int], devices: Iterable[int], **sizes: int) -> list[Head]:
    """Every mesh of `WIDTHS`."""
    return [Head(v, n // w, w, **sizes) for v in classes for n in devices for w in WIDTHS if n % w == 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in Machine()._asdict().items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(default), default=default, help=f"default: {default:g}")
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES)
    parser.add_argument("--devices", type=int, nargs="+", default=DEVICES)
    parser.add_argument("--out", type=Path, default=Path(), help="folder for scaling.png")
    args = parser.parse_args()
    machine = Machine(*(getattr(args, name) for name in Machine._fields))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(args.devices))

    command = " ".join(["python", "benchmarks/scaling.py", *sys.argv[1:]])
    print(f"`{command}`\n{surroundings(['jax', 'jaxent'])}\n")
    print(
        f"{TOKENS} tokens on each device, D = {FEATURES}, bfloat16, blocks of {BLOCK_BYTES / 2**30:g} GiB; "
        "all figures are for one device.\n"
    )
    results = {head: measure(head) for head in all_meshes(args.classes, args.devices)}
    sent = set().union(*(found.kinds for found in results.values()))
    print(f"Compiled for CPUs, exact. All communication: {', '.join(sorted(sent))}. Matmuls: in units of")
    print("2 N D V / devices operations. (!): more than the memory of a device.\n")
    header = ["", "dkernel", "dhidden", "other all-reduces", "in loops", "matmuls"]
    header += ["arguments", "results", "temporaries", "Adam", "sum"]
    print(table(header, [compiled_row(head, found, machine) for head, found in results.items()]))
    print("\nModelled on paper, ms. Sum: the larger of operations and memory, and both all-reduces.\n")
    header = ["", "matmuls", "operations", "memory", DHIDDEN, DKERNEL, "sum"]
    print(table(header, [modelled_row(head, machine) for head in results]))
    wide = [n for n in args.devices if n % machine.node == 0]
    print(f"\nModelled on paper: vocab {machine.node} over vocab 1, by tokens on each device.\n")
    header = ["", *map(str, TOKENS_COMPARED), "equal at"]
    print(table(header, [ratio_row(v, n, machine) for v in args.classes for n in wide]))
    most = max(args.devices)
    print(f"\nModelled on paper: sum, ms, on {most} devices by the width of the vocab axis (*: the least).\n")
    header = ["", *map(str, widths(most)), "sqrt(V / tokens)"]
    print(table(header, [width_row(v, most, machine) for v in args.classes]))
    print("\nModelled on paper: operations and memory, ms, by the size of a block.\n")
    some = [head for head in results if head.data * head.vocab == min(args.devices)]
    print(table(["", *(f"{x // 2**20} MiB" for x in BLOCKS_COMPARED)], [block_row(h, machine) for h in some]))
    path = args.out / "scaling.png"
    draw(results, machine, path, surroundings(["jax", "jaxent"]))
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
