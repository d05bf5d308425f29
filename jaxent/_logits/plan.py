"""How logits that are never built are cut into blocks: by counting operations and bytes."""

from typing import NamedTuple

# Matmul operations in the time that one byte takes from memory. A CPU was measured; the other figure is what the data
# sheets of accelerators say. Both plans are right anywhere, so the platform that jax would choose is good enough.
OPERATIONS_PER_BYTE = {"cpu": 20}
OPERATIONS_PER_BYTE_OF_ACCELERATORS = 200
# A block of classes this wide reads `hidden` seldom enough; a wider one only takes memory.
CLASSES = 8192


class Plan(NamedTuple):
    """Rows and classes of a block: one of them is whole."""

    rows: int
    classes: int


def plan(
    rows: int, features: int, classes: int, block_bytes: int, itemsize: int = 4, platform: str = "cpu"
) -> Plan:
    """Blocks of rows with all classes, or of classes with all rows, whichever is less work.

    With n blocks of rows: 3 matmuls; each block reads the kernel twice, and reads and writes its gradient. With n
    blocks of classes: 4 matmuls; the kernel is read twice and its gradient written once in all, but each block
    reads `hidden` three times, and reads and writes its gradient.
    """
    by_rows = Plan(rows_of_a_block(rows, classes, block_bytes, itemsize), classes)
    by_classes = Plan(rows, classes_of_a_block(rows, features, classes, block_bytes, itemsize))
    per_byte = OPERATIONS_PER_BYTE.get(platform, OPERATIONS_PER_BYTE_OF_ACCELERATORS)
    matmul = 2 * rows * features * classes
    kernel, hidden = features * classes * itemsize, rows * features * itemsize
    cost_by_rows = 3 * matmul + per_byte * 4 * kernel * -(-rows // by_rows.rows)
    blocks = -(-classes // by_classes.classes)
    cost_by_classes = 4 * matmul + per_byte * (3 * kernel + 5 * hidden * blocks)
    return by_rows if cost_by_rows <= cost_by_classes else by_classes


def rows_of_a_block(rows: int, classes: int, block_bytes: int, itemsize: int = 4, arrays: int = 2) -> int:
    """How many rows fit with all their classes, in blocks as even as can be.

    `arrays` of the block's size exist at a time: the logits and their gradient.
    """
    most = max(block_bytes // (arrays * itemsize * classes), 1)
    blocks = max(-(-rows // most), 1)
    return max(-(-rows // blocks), 1)


def classes_of_a_block(rows: int, features: int, classes: int, block_bytes: int, itemsize: int = 4) -> int:
    """How many classes fit with all rows: logits, their gradient, and what the kernel and its gradient have there."""
    most = max(block_bytes // (2 * itemsize * (rows + features)), 1)
    most = min(most, CLASSES)
    if most >= classes:
        return classes
    return most // 128 * 128 or most
