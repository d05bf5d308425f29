"""What `import jaxent` costs beyond `import jax, chex`, in fresh processes: python benchmarks/import_time.py

The budget is 50 ms: a library of losses should not be felt.
"""

import os
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
    # bytecode is cached, as in every installation; compiling it anew would be most of the time
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True, text=True, env=env)
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
