"""Where arrays live: process start-up, the device mesh, and the rules from logical to mesh axes."""

from slmjax.parallel.distributed import initialise
from slmjax.parallel.mesh import make_mesh, on_mesh
from slmjax.parallel.rules import (
    ACTIVATION_RULES,
    FALLBACK_ORDER,
    PARAMETER_RULES,
    batch_sharding,
    constrain,
    host_batch_to_global,
    process_rows,
    sharding_for,
    tree_shardings,
)

__all__ = [
    "ACTIVATION_RULES",
    "FALLBACK_ORDER",
    "PARAMETER_RULES",
    "batch_sharding",
    "constrain",
    "host_batch_to_global",
    "initialise",
    "make_mesh",
    "on_mesh",
    "process_rows",
    "sharding_for",
    "tree_shardings",
]
