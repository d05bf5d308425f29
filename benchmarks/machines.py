"""Accelerators that programs are compiled for on a machine that has none. Import it before jax starts.

TPUs: `pip install libtpu`. An H100: `pip install --no-deps jax-cuda12-plugin==J jax-cuda12-pjrt==J`, with the J of
`jax.__version__`; the rest of CUDA is not needed to compile.
"""

# ruff: noqa: E402
import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

for name, value in {
    "TPU_SKIP_MDS_QUERY": "1",  # or libtpu asks the network which machine it is on
    "TPU_ACCELERATOR_TYPE": "v6e-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "-1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}.items():
    os.environ.setdefault(name, value)

import jax
import numpy as np
from jax.experimental.topologies import get_topology_desc
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

jax.config.update("jax_platforms", "cpu")
TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "Ironwood": "tpu7x:2x2x1"}
H100 = "H100"
MACHINES = (*TPUS, H100)
# Its data sheet, in the words of XLA.
H100_SXM = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 1 patch: 1 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def missing(machine: str) -> str:
    """Why programs cannot be compiled for it here; "" where they can."""
    package = "libtpu" if machine in TPUS else "jax_plugins.xla_cuda12"
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        found = None
    return "" if found else f"{machine} needs {package}: see benchmarks/machines.py"


@functools.cache
def devices(machine: str) -> list[Any]:
    """Four of them."""
    jax.devices()  # plugins are found when jax starts
    if machine in TPUS:
        return get_topology_desc(TPUS[machine], platform="tpu").devices
    return get_topology_desc(platform="cuda", topology="1x1x4", target_config=H100_SXM).devices


def mesh(machine: str, shape: dict[str, int] | None = None, kind: AxisType = AxisType.Auto) -> Mesh:
    """Of so many of its devices; of one."""
    shape = shape or {"one": 1}
    some = np.asarray(devices(machine)[: np.prod(list(shape.values()))]).reshape(tuple(shape.values()))
    return Mesh(some, tuple(shape), axis_types=(kind,) * len(shape))


def compile_for(mesh: Mesh, f: Callable[..., Any], *arguments: Any, specs: Any = None) -> Any:
    """`jax.jit(f)` of arrays of these shapes and dtypes, split as `specs` say (on one device: whole), compiled."""
    specs = jax.tree.map(lambda _: P(), arguments) if specs is None else specs

    def placed(x: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    arguments = jax.tree.map(placed, arguments, specs)
    # without a card there is nothing to try kernels on
    options = {"xla_gpu_autotune_level": 0} if mesh.devices.flat[0].platform == "gpu" else None
    anew = lambda *x: f(*x)  # noqa: E731  (jax would take the trace that it has, of another machine)
    with jax.set_mesh(mesh):
        return jax.jit(anew).lower(*arguments).compile(options)
