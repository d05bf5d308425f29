"""What is in this folder needs eight devices: tests/test_devices.py starts it."""

import os

collect_ignore_glob = [] if os.environ.get("JAX_NUM_CPU_DEVICES") == "8" else ["*.py"]
