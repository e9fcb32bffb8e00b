"""What comes out depends neither on where the work is done nor on how many do it; engines by themselves."""

import contextlib
import importlib.util
import multiprocessing
import operator
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from all_stages import config_of, quiet, snapshot

from data_pipelines.engines.local import LocalEngine
from data_pipelines.engines.ray import RayEngine
from slmjax.config import RayEngineConfig

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
# What Ray itself does: sockets and log files that its processes are left to close.
quiet_ray = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


def test_every_kind_of_stage_has_something_to_do(corpus_folder, finished_run):
    manifest = quiet(config_of(corpus_folder, finished_run))
    dropped = {step.step: step.dropped for step in manifest.steps}
    idle = {"mask_personal_data", "length_filter", "gopher_filter", "repetition_filter", "passage_dedup"}
    idle |= {"substring_dedup"}
    assert {name for name in dropped if not dropped[name]} == idle
    changes = {step.step: step.changes for step in manifest.steps}
    assert changes["mask_personal_data"]["masked_email"] == 1
    assert changes["passage_dedup"]["cut_bytes"] > 0
    assert changes["substring_dedup"]["cut_bytes"] > 0
    assert len(list((finished_run / "work/markers/lines").iterdir())) > 2  # a file in spans
    assert len(list((finished_run / "work/read").iterdir())) > 4


def test_the_output_does_not_depend_on_the_number_of_workers(corpus_folder, finished_run, tmp_path):
    quiet(config_of(corpus_folder, tmp_path / "out", num_workers=2, worker_bytes=1 << 30))
    assert snapshot(tmp_path / "out") == snapshot(finished_run)


def kill(pid):
    with contextlib.suppress(ProcessLookupError):  # it may have ended before it could be stopped
        os.kill(pid, signal.SIGKILL)


def test_a_worker_that_is_killed_in_the_end_does_not_keep_the_others_from_ending():
    """One of the two waits for work with a lock, which it takes with it; which one, nobody knows."""
    before = set(multiprocessing.active_children())
    for number in range(2):
        with LocalEngine(2) as engine:
            assert list(engine.map(operator.neg, range(5))) == [0, -1, -2, -3, -4]
            ours = sorted(set(multiprocessing.active_children()) - before, key=lambda process: process.pid)
            assert len(ours) == 2
            victim = ours[number].pid
            os.kill(victim, signal.SIGSTOP)  # so that it still holds the lock when the end has come
            killing = threading.Timer(0.5, kill, (victim,))
            killing.start()
        killing.join()
        assert not set(multiprocessing.active_children()) - before


def test_without_ray_a_line_says_what_to_install(corpus_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"RayEngineConfig needs the package ray: pip install -e '.\[ray\]' -c constr"):
        quiet(config_of(corpus_folder, tmp_path / "out", engine=RayEngineConfig()))


@pytest.fixture(scope="class")
def ray_engine(tmp_path_factory):
    with RayEngine(RayEngineConfig(retries=1), 2, tmp_path_factory.mktemp("shared")) as engine:
        yield engine


@needs_ray
@quiet_ray
@pytest.mark.slow
class TestRay:
    def test_results_come_in_order_and_from_two_processes(self, ray_engine):
        def late(number):
            import os
            import time

            time.sleep(0.02 * (number % 3))
            return number, os.getpid()

        results = list(ray_engine.map(late, range(12)))
        assert [number for number, _ in results] == list(range(12))
        assert len({process for _, process in results}) == 2
        assert os.getpid() not in {process for _, process in results}
        assert list(ray_engine.map(late, [])) == []

    def test_an_error_of_a_task_is_what_it_would_be_here(self, ray_engine):
        def fail(number):
            if number == 1:
                raise ValueError(f"task {number} is wrong")
            return number

        for engine in (ray_engine, LocalEngine(1)):
            results = engine.map(fail, [0, 1, 2])
            assert next(results) == 0
            with pytest.raises(ValueError, match=r"^task 1 is wrong$") as caught:
                next(results)
            assert type(caught.value) is ValueError

    def test_a_task_whose_worker_was_killed_is_done_again_and_not_for_ever(self, ray_engine, tmp_path):
        mark = str(tmp_path / "mark")

        def die(times):
            import os
            import signal
            from pathlib import Path

            with open(mark, "a") as file:
                file.write(".")
            if len(Path(mark).read_text()) <= times:
                os.kill(os.getpid(), signal.SIGKILL)
            return "done"

        assert list(ray_engine.map(die, [1])) == ["done"]
        with pytest.raises(RuntimeError, match="a worker process was killed, perhaps for want of memory; run the same"):
            list(ray_engine.map(die, [9]))

    def test_it_listens_to_this_machine_alone(self, ray_engine):
        """Of all sockets that listen, those of Ray's processes are bound to loopback."""
        if not Path("/proc/net/tcp").exists():
            pytest.skip("no /proc/net/tcp to read sockets from")
        ours = descendants(os.getpid())
        assert len(ours) > 4
        inodes = set()
        for process in ours:
            for link in Path(f"/proc/{process}/fd").glob("*"):
                target = os.readlink(link) if link.is_symlink() else ""
                inodes.add(target.removeprefix("socket:[").removesuffix("]"))
        listening = []
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in inodes:
                    listening.append(fields[1].partition(":")[0])
        assert len(listening) > 4
        assert set(listening) <= {"0100007F", "0000000000000000FFFF00000100007F"}

    def test_sigterm_is_left_to_who_handled_it_before(self, ray_engine):
        assert "ray" not in getattr(signal.getsignal(signal.SIGTERM), "__module__", "")

    def test_a_worker_that_differs_from_the_driver_is_an_error(self, ray_engine, monkeypatch, tmp_path):
        here = ray_engine._expected
        with pytest.raises(ValueError, match=r"this process uses Ray already; call ray.shutdown\(\) before"):
            RayEngine(RayEngineConfig(), 2, tmp_path).__enter__()
        versions = {**here.versions, "numpy": "0.1"}
        monkeypatch.setattr(ray_engine, "_expected", type(here)(here.directory, here.current, versions))
        with pytest.raises(ValueError, match=r"has other versions than the driver: numpy .* for 0\.1; install"):
            list(ray_engine.map(str, [1]))
        elsewhere = type(here)(tmp_path / "absent", here.current, here.versions)
        monkeypatch.setattr(ray_engine, "_expected", elsewhere)
        with pytest.raises(ValueError, match=r"does not see .*absent; output_dir and all inputs must lie on a file"):
            list(ray_engine.map(str, [1]))


def descendants(process: int) -> list[int]:
    """Of a process, at any depth, itself left out."""
    found = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *descendants(child)]
    return found


@needs_ray
@quiet_ray
@pytest.mark.slow
def test_ray_writes_the_same_bytes_and_leaves_nothing_running(corpus_folder, finished_run, tmp_path):
    processes = descendants(os.getpid())
    quiet(config_of(corpus_folder, tmp_path / "out", num_workers=2, engine=RayEngineConfig()))
    assert snapshot(tmp_path / "out") == snapshot(finished_run)
    assert descendants(os.getpid()) == processes
    assert not {"RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED"} & os.environ.keys()


@needs_ray
@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "somewhere"])
def test_a_cluster_that_is_not_there_is_an_error_at_once(corpus_folder, tmp_path, address):
    config = config_of(corpus_folder, tmp_path / "out", engine=RayEngineConfig(address=address))
    with pytest.raises(ValueError, match=f"RayEngineConfig: cannot use Ray at address {address}: "):
        quiet(config)
