"""Where the tasks of a pipeline run: a choice between these classes; what they write is the same."""

import dataclasses

from slmjax.config.check import not_negative, positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalEngineConfig:
    """Processes of this machine, with nothing to start."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RayEngineConfig:
    """Ray, on this machine or on a cluster whose machines share a file system; needs the extra `ray`.

    Attributes:
      address: of a cluster, "host:port", "ray://host:port" or "auto" for the one this machine is part of; None starts
        Ray on this machine alone, for this run.
      send_code: send this program to the workers; without it the same version is to be installed on every machine.
      task_cpus: processors that a task counts for.
      task_memory_bytes: memory that a task counts for; None lets processors alone decide how many run on a machine.
      retries: how often a task is run again whose worker was killed or whose machine was lost.
    """

    address: str | None = None
    send_code: bool = False
    task_cpus: float = 1.0
    task_memory_bytes: int | None = None
    retries: int = 3

    def __post_init__(self):
        positive(self, "task_cpus", "task_memory_bytes")
        not_negative(self, "retries")


EngineConfig = LocalEngineConfig | RayEngineConfig
