"""Process start-up: one process or many through the same call."""

import os

import jax

COORDINATOR = "SLMJAX_COORDINATOR"  # host:port of process 0
NUM_PROCESSES = "SLMJAX_NUM_PROCESSES"
PROCESS_ID = "SLMJAX_PROCESS_ID"  # 0 .. NUM_PROCESSES - 1
MODE = "SLMJAX_DISTRIBUTED"  # "auto": ask the cluster (Slurm, Cloud TPU, Kubernetes, Open MPI)


def initialise() -> None:
    """Joins the other processes of this run, if the environment says that there are any.

    The three variables that launch/local.sh sets name the run exactly; SLMJAX_DISTRIBUTED=auto leaves it to
    jax.distributed's cluster detection; with neither, this process is alone. Call it before anything asks JAX for a
    device; a second call does nothing.

    Raises:
      ValueError: only some of the three variables are set, or one does not parse.
    """
    if jax.distributed.is_initialized():
        return
    names = (COORDINATOR, NUM_PROCESSES, PROCESS_ID)
    given = [name for name in names if os.environ.get(name)]
    mode = os.environ.get(MODE, "")
    if mode not in ("", "auto"):
        raise ValueError(f'{MODE} must be "auto" or not set, got {mode!r}')
    if len(given) == len(names):
        num_processes, process_id = _integer(NUM_PROCESSES), _integer(PROCESS_ID)
        if not 0 <= process_id < num_processes:
            raise ValueError(f"{PROCESS_ID} must lie in 0 .. {NUM_PROCESSES} - 1, got {process_id} of {num_processes}")
        jax.distributed.initialize(os.environ[COORDINATOR], num_processes, process_id)
    elif given:
        missing = [name for name in names if name not in given]
        raise ValueError(f"{', '.join(given)} set but not {', '.join(missing)}; set all three, or none")
    elif mode == "auto":
        jax.distributed.initialize()


def _integer(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise ValueError(f"{name} must be a whole number, got {os.environ[name]!r}") from None
