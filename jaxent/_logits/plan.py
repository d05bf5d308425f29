"""How logits that are never built are cut into blocks: by counting operations and bytes."""

from typing import NamedTuple

# Operations in the time of one byte from memory: about 10 on CPUs. GPUs and TPUs do some hundreds, but there a
# `block_bytes` that suits the memory makes either plan good.
OPERATIONS_PER_BYTE = 10


class Plan(NamedTuple):
    """Rows and classes of a block: one of them is whole."""

    rows: int
    classes: int


def plan(rows: int, features: int, classes: int, block_bytes: int, itemsize: int = 4) -> Plan:
    """Blocks of rows with all classes, or of classes with all rows, whichever takes less.

    A block holds the logits and their gradient. With n blocks of rows: 3 matmuls; each block reads the kernel twice
    and reads and writes its gradient. With n blocks of classes: 4 matmuls; the kernel is read twice and its
    gradient written once in all, and each block reads `hidden` three times and reads and writes its gradient.
    """
    by_rows = Plan(rows_of_a_block(rows, classes, block_bytes, itemsize), classes)
    by_classes = Plan(rows, rows_of_a_block(classes, rows, block_bytes, itemsize))
    matmul = 2 * rows * features * classes
    kernel, hidden = features * classes * itemsize, rows * features * itemsize
    cost_by_rows = 3 * matmul + OPERATIONS_PER_BYTE * 4 * kernel * -(-rows // by_rows.rows)
    blocks = -(-classes // by_classes.classes)
    cost_by_classes = 4 * matmul + OPERATIONS_PER_BYTE * (3 * kernel + 5 * hidden * blocks)
    return by_rows if cost_by_rows <= cost_by_classes else by_classes


def rows_of_a_block(rows: int, classes: int, block_bytes: int, itemsize: int = 4) -> int:
    """How many of `rows` fit, in blocks that are as even as possible."""
    most = max(block_bytes // (2 * itemsize * max(classes, 1)), 1)
    blocks = max(-(-rows // most), 1)
    return max(-(-rows // blocks), 1)
