"""Tasks on Ray, on this machine or a cluster. A task goes from files to files, so only its description travels.

Plain Ray tasks, not Ray Data: docs/decisions/0011-plain-ray-tasks.md.
"""

import contextlib
import functools
import importlib
import itertools
import os
import secrets
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import data_pipelines
import slmjax
from data_pipelines import tasks as resumable
from data_pipelines.engines import LOST_WORKER, num_processors, prepare_worker
from slmjax.config import RayEngineConfig

_OBJECT_STORE_BYTES = 80 << 20  # the least that Ray accepts: results are a few kilobytes


class RayEngine:
    """A context manager that connects to a cluster, or starts Ray on this machine and ends it.

    Args:
      config: where, and what a task needs.
      num_workers: tasks at the same time; None is as many as there are processors for.
      directory: all that tasks read and write lies on the file system of this; a worker that cannot see it fails.
    """

    def __init__(self, config: RayEngineConfig, num_workers: int | None, directory: Path):
        self._config = config
        self._num_workers = num_workers
        self._expected = _Surroundings(directory, Path.cwd(), resumable.versions())
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "RayEngine":
        local = self._config.address is None
        with contextlib.ExitStack() as stack:
            stack.enter_context(_environment({**_QUIET, **(_alone(self._config.retries) if local else {})}))
            ray = _import_ray()
            if ray.is_initialized():
                raise ValueError("RayEngineConfig: this process uses Ray already; call ray.shutdown() before")
            if local:
                temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
                self._slots = self._num_workers or num_processors()
                where = {
                    "address": "local",
                    "num_cpus": self._slots * self._config.task_cpus,
                    "include_dashboard": False,
                    "object_store_memory": _OBJECT_STORE_BYTES,
                    "_node_ip_address": "127.0.0.1",
                    "_temp_dir": temporary,
                }
            else:
                _check_reachable(self._config.address)
                where = {"address": self._config.address}
            packages = [slmjax.__path__[0], data_pipelines.__path__[0]]
            stack.callback(ray.shutdown)
            on_terminate = signal.getsignal(signal.SIGTERM)
            try:
                ray.init(
                    **where,
                    runtime_env={"py_modules": packages} if self._config.send_code else None,
                    log_to_driver=False,
                    logging_level="ERROR",
                )
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ValueError(
                    f"RayEngineConfig: cannot use Ray at address {self._config.address}: {error}"
                ) from error
            if threading.current_thread() is threading.main_thread() and on_terminate is not None:
                signal.signal(signal.SIGTERM, on_terminate)  # Ray takes it, and would end the process with status 15
            if local and ray.util.get_node_ip_address() != "127.0.0.1":
                raise RuntimeError(
                    "Ray would listen to other machines, since it was imported before the pipeline began; import it "
                    "after that, or start it yourself and give RayEngineConfig.address"
                )
            if not local:
                found = ray.cluster_resources().get("CPU", 1)
                self._slots = self._num_workers or max(1, int(found / self._config.task_cpus))
            self._ray = ray
            self._remote = ray.remote(_call).options(
                num_cpus=self._config.task_cpus,
                memory=self._config.task_memory_bytes,
                max_retries=self._config.retries,
                retry_exceptions=False,
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def map(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
        """Yields function(task) in the order of the tasks; a few more than can run wait at the workers."""
        # Twice as many as run at a time: a worker has its next task at once, and a cluster that grows sees demand.
        limit = self._num_workers if self._config.address and self._num_workers else 2 * self._slots
        waiting = enumerate(tasks)
        running: dict[Any, int] = {}
        finished: dict[int, Any] = {}
        for number in range(len(tasks)):
            while number not in finished:
                for later, task in itertools.islice(waiting, limit - len(running)):
                    running[self._remote.remote(self._expected, function, task)] = later
                (ready,), _ = self._ray.wait(list(running), num_returns=1)
                finished[running.pop(ready)] = ready
            yield self._result(finished.pop(number))

    def _result(self, reference: Any) -> Any:
        """What a task returned. Raises what it raised, as if it had run here."""
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except exceptions.RayTaskError as error:
            raise error.cause from error
        except (
            exceptions.WorkerCrashedError,
            exceptions.OutOfMemoryError,
            exceptions.NodeDiedError,
            exceptions.ObjectLostError,
            exceptions.RaySystemError,
        ) as error:
            raise RuntimeError(LOST_WORKER) from error


class _Surroundings:
    """What a worker must share with the driver.

    Attributes:
      directory: that both can see.
      current: the driver's working directory, which relative paths of a config start from.
      versions: of the program and its libraries.
    """

    def __init__(self, directory: Path, current: Path, versions: Mapping[str, str]):
        self.directory = directory
        self.current = current
        self.versions = versions

    def take(self) -> None:
        """Checks them in a worker. Raises ValueError where outputs would be lost, or be others."""
        host = socket.gethostname()
        if not self.directory.is_dir():
            raise ValueError(
                f"{host} does not see {self.directory}; output_dir and all inputs must lie on a file system that every "
                "machine of the cluster has under the same path"
            )
        here = resumable.versions()
        other = [name for name in {*here, *self.versions} if here.get(name) != self.versions.get(name)]
        if other:
            found = ", ".join(f"{name} {here.get(name)} for {self.versions.get(name)}" for name in sorted(other))
            raise ValueError(
                f"{host} has other versions than the driver: {found}; install the same on every machine, or set "
                "RayEngineConfig.send_code for slmjax itself"
            )
        with contextlib.suppress(OSError):  # of account for relative paths alone
            os.chdir(self.current)


def _call(surroundings: _Surroundings, function: Callable[[Any], Any], task: Any) -> Any:
    surroundings.take()
    prepare_worker()
    return function(task)


def _check_reachable(address: str | None) -> None:
    """Raises ValueError where nothing listens at an address; Ray itself would try again for minutes."""
    if address in (None, "auto"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"RayEngineConfig: cannot use Ray at address {address}: {error}; it is 'auto', 'host:port' as `ray start` "
            "prints it, or 'ray://host:port'"
        ) from error


def _import_ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ValueError(
            "RayEngineConfig needs the package ray: pip install -e '.[ray]' -c constraints.txt, or use "
            f"LocalEngineConfig ({error})"
        ) from error


_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def _alone(retries: int) -> dict[str, str]:
    """Variables that keep a Ray of this run to this machine and to who knows its token."""
    return {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on any system: listen on loopback only
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": _token(),
        "RAY_task_oom_retries": str(retries),
    }


@functools.cache
def _token() -> str:
    """One for the process, since Ray reads it only once."""
    return os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
