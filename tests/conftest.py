"""Eight CPU devices, strict rank promotion and no persistent compilation cache, for every test and what it starts.

The tests alone, not what they start, also find the compilers for Hopper and TPU that launch/install.sh set apart.
"""

import os
import sys
from pathlib import Path

sys.path.append(str(Path(sys.prefix) / "compilers"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
os.environ.setdefault("WANDB_MODE", "offline")
