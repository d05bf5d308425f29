"""How logits that are never built are cut into blocks: by counting operations and bytes, for the machine at hand.

The formulas, and what they were checked against, are in docs/architecture.md.
"""

from typing import NamedTuple

# Matmul operations in the time that one byte takes from memory: measured on a CPU, from data sheets of accelerators.
OPERATIONS_PER_BYTE = {"cpu": 20}
OPERATIONS_PER_BYTE_OF_ACCELERATORS = 300
BLOCK_BYTES_ON_CPU = 128 * 2**20
# On accelerators the gradient of the logits may take as much memory as two float32 moments of the kernel, but has no
# more rows than it takes to hide how the kernel's gradient is read and written; float32 logits in its place no more.
BYTES_PER_PARAMETER = 8
ROW_BYTES_PER_CLASS = 2 * 8192
PIECE = 512  # rows whose logits are made by one matmul that does not wait for the kernel
ROWS, LANES = 16, 128  # rows, and classes, of an array of half precision come in so many at a time
# With fewer features a TPU makes the gradient of the logits as a part of one matmul, or of two, in less time than it
# writes and reads it.
FEATURES = 3072, 1024
# A block of classes this wide reads `hidden` seldom enough; a wider one only takes memory.
CLASSES = {"cpu": 8192}
CLASSES_ON_ACCELERATORS = 5120


class Plan(NamedTuple):
    """Rows and classes whose logits exist at a time: one of them is whole.

    `pieces` of so many rows are a block, of which the gradient of the logits exists for the matmuls that follow. If
    these are no more than `fused`, each of them makes it instead.
    """

    rows: int
    classes: int
    pieces: int = 1
    fused: int = 0


class Sizes(NamedTuple):
    """Of a linear layer, or several to the same classes, on one device; bytes per element."""

    rows: int
    features: int
    classes: int
    itemsize: int = 4  # of the operands
    logits: int = 4  # of what exists of a piece, beside the gradient of the logits
    gradient: int = 4  # of the logits, as operands of two matmuls


def plan(sizes: Sizes, block_bytes: int | None = None, platform: str = "cpu") -> Plan:
    """Blocks of rows with all classes, or of classes with all rows, whichever is less work.

    Blocks of rows: 3 matmuls; each piece reads the kernel, and each block reads it again, and reads and writes its
    gradient, which a single block writes only. Blocks of classes: 4 matmuls; the kernel is read twice and its gradient
    written once in all, but each block reads `hidden` three times, and reads and writes its gradient.
    """
    rows, features, classes, itemsize, logits = sizes[:5]
    by_rows = plan_by_rows(sizes, block_bytes, platform)
    by_classes = Plan(rows, plan_by_classes(sizes, block_bytes, platform))
    per_byte = OPERATIONS_PER_BYTE.get(platform, OPERATIONS_PER_BYTE_OF_ACCELERATORS)
    matmul = 2 * rows * features * classes
    kernel, hidden = features * classes, rows * features

    pieces = -(-rows // by_rows.rows)
    blocks = -(-pieces // by_rows.pieces)
    sums = itemsize if blocks == 1 else 2 * logits * blocks  # accesses of the kernel's gradient, in bytes
    # a TPU makes the gradient of the logits in the matmul that makes the logits again
    more = logits * rows * classes if platform == "tpu" else 0
    cost_by_rows = 3 * matmul + per_byte * (kernel * (itemsize * (pieces + blocks) + sums) + more)

    blocks = -(-classes // by_classes.classes)
    copies = 0 if platform == "cpu" else 2  # of slices of the kernel
    accesses = (3 + copies) * itemsize * kernel + (3 * itemsize + 2 * logits) * hidden * blocks
    cost_by_classes = 4 * matmul + per_byte * accesses
    return by_rows if cost_by_rows <= cost_by_classes else by_classes


def plan_by_rows(sizes: Sizes, block_bytes: int | None = None, platform: str = "cpu") -> Plan:
    """How many rows fit with all their classes, in blocks and pieces as even as can be."""
    rows, classes, logits, gradient = sizes.rows, sizes.classes, sizes.logits, sizes.gradient
    fused = sum(sizes.features < features for features in FEATURES) if platform == "tpu" else 0
    if platform == "cpu":
        block_bytes = BLOCK_BYTES_ON_CPU if block_bytes is None else block_bytes
        most = block = max(block_bytes // ((logits + gradient) * classes), 1)
    elif block_bytes is None and fused == 2:
        most = block = max(ROW_BYTES_PER_CLASS // logits, 1)
    elif block_bytes is None:
        block = max(min(BYTES_PER_PARAMETER * sizes.features, ROW_BYTES_PER_CLASS) // gradient, 1)
        most = min(block, PIECE)
    else:
        most = max(min(block_bytes // ((logits + gradient) * classes), PIECE), 1)
        block = max((block_bytes - most * logits * classes) // (gradient * classes), most)
    blocks = max(-(-rows // block), 1)
    block = max(-(-rows // blocks), 1)
    pieces = -(-block // most)
    piece = -(-block // pieces)
    if pieces > 1 and piece > ROWS:
        piece = -(-piece // ROWS) * ROWS
    return Plan(piece, classes, pieces, fused)


def plan_by_classes(sizes: Sizes, block_bytes: int | None = None, platform: str = "cpu") -> int:
    """How many classes fit with all rows: logits, their gradient, and what the kernel and its gradient have there."""
    rows, features, classes = sizes[:3]
    if block_bytes is None:
        parameters = features * classes
        block_bytes = BLOCK_BYTES_ON_CPU if platform == "cpu" else BYTES_PER_PARAMETER * parameters
    most = max(block_bytes // ((sizes.logits + sizes.gradient) * (rows + features)), 1)
    most = min(most, CLASSES.get(platform, CLASSES_ON_ACCELERATORS))
    if most >= classes:
        return classes
    return most // LANES * LANES or most
