"""What the benchmarks share: how figures are written down, and where they were taken."""

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import jax


def readable_seconds(rounds: list[float]) -> str:
    """The median, and how quiet the machine was."""
    low, middle, high = (1e3 * f(rounds) for f in (min, statistics.median, max))
    return f"{middle:.3g} ms ({low:.3g} to {high:.3g})"


def readable_bytes(count: int | None) -> str:
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A markdown table whose columns line up in a terminal too."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells):
        first, *rest = cells
        padded = [first.ljust(widths[0])] + [c.rjust(w) for c, w in zip(rest, widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join(map(line, [header, rule, *rows]))


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(source tree)"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def surroundings(packages: Sequence[str]) -> str:
    """The machine and the versions, for a caption."""
    device = jax.devices()[0]
    where = f"{processor()}, {cores()} cores" if device.platform == "cpu" else device.device_kind
    versions = ", ".join(f"{p} {version(p)}" for p in packages)
    return f"{where}; Python {platform.python_version()}, {versions}"
