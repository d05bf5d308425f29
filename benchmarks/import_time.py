"""What `import jaxent` costs beyond `import jax, chex`, in fresh processes: python benchmarks/import_time.py

The budget is 50 ms: a library of losses should not be felt.
"""

import statistics
import subprocess
import sys

PROBE = """
import time
import jax, chex
start = time.perf_counter()
import jaxent
print(time.perf_counter() - start)
"""
BUDGET = 0.050
ROUNDS = 9


def seconds() -> float:
    done = subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True, text=True)
    return float(done.stdout)


def main() -> None:
    seconds()  # warms the file cache and the bytecode
    found = sorted(seconds() for _ in range(ROUNDS))
    median = statistics.median(found)
    print(f"import jaxent beyond jax and chex: median {1e3 * median:.1f} ms of {ROUNDS} processes, ", end="")
    print(f"{1e3 * found[0]:.1f} to {1e3 * found[-1]:.1f} ms; budget {1e3 * BUDGET:.0f} ms")
    sys.exit(median > BUDGET)


if __name__ == "__main__":
    main()
