"""`import jaxent` costs its users nothing but jax, chex, numpy and the standard library."""

import subprocess
import sys

PROBE = """
import sys
import chex, jax, numpy
before = set(sys.modules)
import jaxent
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
print(*[name for name in ("optax", "sklearn", "matplotlib", "torch", "pytest") if name in sys.modules])
"""


def test_import_brings_in_nothing_else():
    done = subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True, text=True)
    new, unwanted = done.stdout.split("\n")[:2]
    # jax loads parts of itself, and of what it depends on, when they are first asked for
    brought = {"jaxent", "jax", "jaxlib", "chex", "numpy", "scipy", "ml_dtypes", "opt_einsum"}
    assert set(new.split()) <= brought | sys.stdlib_module_names
    assert not unwanted


def test_import_starts_no_backend():
    """Whoever sets the platform or the number of devices after `import jaxent` is still heard."""
    probe = "import jaxent, jax; jax.config.update('jax_num_cpu_devices', 3); print(len(jax.devices('cpu')))"
    done = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "3"
