"""Pipelines at scale: two workers against one, memory as the corpus grows, and being killed or out of disk anywhere.

    python benchmarks/data_scale.py speed TEXTS [--megabytes 60] [--repeats 5] [--workers 1 2] [--engine ray]
    python benchmarks/data_scale.py tasks TEXTS [--megabytes 60]
    python benchmarks/data_scale.py memory TEXTS [--megabytes 12] [--scales 1 4 16]
    python benchmarks/data_scale.py kill [--engine ray] [--rounds 10] [--kills 3]
    python benchmarks/data_scale.py disk DIRECTORY [--rounds 10]

TEXTS is anything that FilesSourceConfig reads. Corpora of any size are made of it: copies have the words of each line
in another order, so that they are no duplicates. `speed` alternates the numbers of workers and says how busy the
machine was; `tasks` predicts from the CPU time of every task how long some workers would take, which other work on the
machine disturbs less. `kill` kills workers and drivers at random moments of a small pipeline with every kind of stage,
runs it to its end and compares every byte with one that was never stopped; `disk` does so on a small file system that
is full at random moments (as root: mount -t tmpfs -o size=20m none DIRECTORY).
"""

import argparse
import dataclasses
import heapq
import json
import os
import pickle
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

COUNTS = (1, 2, 4, 8, 16)  # of workers
SUPPORT = Path(__file__).parents[1] / "tests" / "support"


def make_corpus(texts: str, output: Path, num_bytes: int) -> None:
    """Writes a jsonl of at least so many bytes of text."""
    import numpy as np
    import orjson
    from dedup import documents_of

    originals = [document.text for document in documents_of(texts)]
    rng = np.random.default_rng(0)
    written = number = 0
    with open(output, "wb") as file:
        while written < num_bytes:
            text = originals[number % len(originals)]
            if number >= len(originals):
                text = "\n".join(" ".join(rng.permutation(line.split(" "))) for line in text.split("\n"))
            file.write(orjson.dumps({"text": text}) + b"\n")
            written += len(text.encode())
            number += 1


def config_of(corpus: Path, output: Path, **changes) -> Any:
    """Language, all heuristics, personal data, exact and near duplicates, decontamination, tokenising."""
    from slmjax import config

    items = config.EvaluationTextConfig(paths=(str(corpus.with_name("items.jsonl")),), name="items")
    fields = {
        "output_dir": str(output),
        "sources": (config.FilesSourceConfig(paths=(str(corpus),)),),
        "stages": (
            config.LanguageFilterConfig(),
            config.RepetitionFilterConfig(),
            config.GopherFilterConfig(),
            config.C4FilterConfig(require_terminal=False),
            config.FineWebFilterConfig(),
            config.MaskPersonalDataConfig(),
            config.ExactDedupConfig(),
            config.NearDedupConfig(),
            config.DecontaminationConfig(evaluations=(items,)),
        ),
        "tokenizer": config.ExistingTokenizerConfig(path=str(corpus.with_name("tokenizer.model"))),
        "shard_bytes": 4 << 20,
        "worker_bytes": 64 << 20,
    }
    return config.PipelineConfig(**{**fields, **changes})


def prepare(texts: str, folder: Path, num_bytes: int) -> Path:
    """Makes a corpus, and beside it a tokenizer and an evaluation set."""
    import numpy as np
    import orjson
    from dedup import documents_of

    from slmjax.data.tokenizer import train_tokenizer

    corpus = folder / "corpus.jsonl"
    make_corpus(texts, corpus, num_bytes)
    if not (folder / "tokenizer.model").exists():
        originals = [document.text for document in documents_of(texts)]
        train_tokenizer(originals[:300], folder / "tokenizer.model", vocab_size=8192, max_passages=3000)
        words = sorted({word for text in originals[:100] for word in text.split()})
        rng = np.random.default_rng(1)
        lines = [orjson.dumps({"text": " ".join(rng.choice(words, 40))}) for _ in range(1000)]
        (folder / "items.jsonl").write_bytes(b"\n".join(lines))
    return corpus


def start(config: Any, folder: Path, mode: str = "run") -> subprocess.Popen:
    """Runs a pipeline in a process of its own, which writes to run.log and measured.json in `folder`."""
    (folder / "config.pickle").write_bytes(pickle.dumps(config))
    with open(folder / "run.log", "wb") as log:
        command = [sys.executable, __file__, "--child", mode, str(folder)]
        environment = {"NUMPY_MADVISE_HUGEPAGE": "0"} | os.environ  # as `slmjax data` sets it
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def child(mode: str, folder: Path) -> None:
    """What `start` starts."""
    from data_pipelines import run as pipeline

    config = pickle.loads((folder / "config.pickle").read_bytes())
    maps: list[tuple[str, list[float]]] = []
    if mode == "tasks":
        pipeline.LocalEngine = lambda _: Recording(maps)
    began, before = time.perf_counter(), time.process_time()
    try:
        pipeline.run(config)
    except OSError as error:  # in a line, as the command line has it: the log, too, may have a limit
        sys.exit(str(error))
    measured = {
        "wall": time.perf_counter() - began,
        "driver_cpu": time.process_time() - before,
        "cpu": sum(os.times()[:4]),
        "maps": maps,
    }
    (folder / "measured.json").write_text(json.dumps(measured))


class Recording:
    """An engine that is this process, and notes the CPU time of every task."""

    def __init__(self, maps: list[tuple[str, list[float]]]):
        self._maps = maps

    def __enter__(self) -> "Recording":
        return self

    def __exit__(self, *_) -> None:
        pass

    def map(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
        seconds: list[float] = []
        self._maps.append((function.__name__, seconds))
        for task in tasks:
            before = time.process_time()
            result = function(task)
            seconds.append(time.process_time() - before)
            yield result


def measure(config: Any, folder: Path, mode: str = "run") -> dict[str, Any]:
    """Runs a pipeline from nothing; returns what it measured, and the largest sizes of its processes in MB."""
    shutil.rmtree(config.output_dir, ignore_errors=True)
    peaks: dict[int, float] = {}
    busy = busy_seconds()
    began = time.perf_counter()
    process = start(config, folder, mode)
    done = threading.Event()
    sampler = threading.Thread(target=sample, args=(process.pid, peaks, done))
    sampler.start()
    status = process.wait()
    done.set()
    sampler.join()
    if status:
        raise SystemExit((folder / "run.log").read_text())
    measured = json.loads((folder / "measured.json").read_text())
    seconds = time.perf_counter() - began
    driver = peaks.pop(process.pid)
    return {
        **measured,
        "others": max(0.0, busy_seconds() - busy - measured["cpu"]) / seconds,
        "driver_peak": driver,
        "worker_peak": max(peaks.values(), default=0.0),
        "timings": json.loads(Path(config.output_dir, "timings.json").read_text()),
    }


def sample(process: int, peaks: dict[int, float], done: threading.Event) -> None:
    while not done.wait(0.1):
        for each in [process, *descendants(process)]:
            try:
                status = Path(f"/proc/{each}/status").read_text()
                command = Path(f"/proc/{each}/cmdline").read_bytes()
            except OSError:
                continue
            if "VmHWM" in status and (each == process or is_worker(command)):
                peaks[each] = int(status.split("VmHWM:")[1].split()[0]) / 1024


def is_worker(command: bytes) -> bool:
    return b"spawn_main" in command or command.startswith(b"ray::_call") or command.startswith(b"ray::IDLE")


def descendants(process: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children = [int(child) for child in path.read_text().split()]
        except OSError:
            continue
        for each in children:
            found += [each, *descendants(each)]
    return found


def workers(process: int) -> list[int]:
    found = []
    for each in descendants(process):
        try:
            if is_worker(Path(f"/proc/{each}/cmdline").read_bytes()):
                found.append(each)
        except OSError:
            continue
    return found


def busy_seconds() -> float:
    """CPU seconds of all processes of this machine since it started."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _, _, interrupts, soft = map(int, fields[:7])
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def engine_of(args: argparse.Namespace) -> Any:
    from slmjax.config import LocalEngineConfig, RayEngineConfig

    return RayEngineConfig() if args.engine == "ray" else LocalEngineConfig()


def speed(args: argparse.Namespace, folder: Path) -> None:
    """Wall time with some numbers of workers, one after the other, again and again."""
    corpus = prepare(args.texts, folder, int(args.megabytes * 1e6))
    config = config_of(corpus, folder / "out", engine=engine_of(args))
    runs: dict[int, list[dict[str, Any]]] = {number: [] for number in args.workers}
    for _ in range(args.repeats):
        for number in args.workers:
            measured = measure(dataclasses.replace(config, num_workers=number), folder)
            runs[number].append(measured)
            print(
                f"{number} workers: {measured['wall']:.1f} s wall, {measured['cpu']:.1f} s CPU, "
                f"processors used by others: {measured['others']:.2f}",
                flush=True,
            )
    walls = {number: statistics.median(run["wall"] for run in of) for number, of in runs.items()}
    first = args.workers[0]
    print(f"\n{args.megabytes:.0f} MB of text, medians of {args.repeats}")
    print("| workers | wall, s | times | CPU, s | used by others |\n|---|---|---|---|---|")
    for number, of in runs.items():
        cpu, others = (statistics.median(run[name] for run in of) for name in ("cpu", "others"))
        print(f"| {number} | {walls[number]:.1f} | {walls[first] / walls[number]:.2f} | {cpu:.1f} | {others:.2f} |")
    print(f"\n| step | {' | '.join(f'{number}, s' for number in args.workers)} | times |")
    print(f"|---|{'---|' * (len(args.workers) + 1)}")
    for step in runs[first][0]["timings"]:
        seconds = [statistics.median(run["timings"][step]["seconds"] for run in of) for of in runs.values()]
        times = f"{seconds[0] / seconds[-1]:.2f}" if seconds[-1] > 0.3 else ""
        print(f"| {step} | {' | '.join(f'{each:.2f}' for each in seconds)} | {times} |")


def tasks(args: argparse.Namespace, folder: Path) -> None:
    """CPU time of every task, and what it says of workers: tasks of a step run at once, steps one after the other."""
    corpus = prepare(args.texts, folder, int(args.megabytes * 1e6))
    measured = measure(config_of(corpus, folder / "out", num_workers=1), folder, mode="tasks")
    maps = measured["maps"]
    serial = measured["driver_cpu"] - sum(sum(seconds) for _, seconds in maps)
    print(f"{args.megabytes:.0f} MB of text, CPU seconds in tasks, and between them in the driver\n")
    print(f"| tasks | number | {' | '.join(map(str, COUNTS))} workers |\n|---|---|{'---|' * len(COUNTS)}")
    totals = [serial] * len(COUNTS)
    for name in dict.fromkeys(name for name, _ in maps):
        of = [seconds for other, seconds in maps if other == name]
        spans = [sum(makespan(seconds, number) for seconds in of) for number in COUNTS]
        totals = [total + span for total, span in zip(totals, spans, strict=True)]
        if spans[0] > 0.05:
            print(f"| {name} | {sum(map(len, of))} | {' | '.join(f'{span:.2f}' for span in spans)} |")
    print(f"| driver | | {' | '.join([f'{serial:.2f}'] * len(COUNTS))} |")
    print(f"| together | | {' | '.join(f'{total:.2f}' for total in totals)} |")
    print(f"| times | | {' | '.join(f'{totals[0] / total:.2f}' for total in totals)} |")


def makespan(seconds: Sequence[float], number: int) -> float:
    """How long workers take that each begin the next task when they are free."""
    free = [0.0] * number
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def memory(args: argparse.Namespace, folder: Path) -> None:
    """Peaks of the driver and of the largest worker, of a pipeline with every kind of stage."""
    from slmjax import config as configs

    print("| text, MB | shards | documents | driver, MB | largest worker, MB |\n|---|---|---|---|---|")
    for scale in args.scales:
        corpus = prepare(args.texts, folder, int(scale * args.megabytes * 1e6))
        config = config_of(
            corpus,
            folder / "out",
            num_workers=2,
            engine=engine_of(args),
            worker_bytes=16 << 20,
            shard_bytes=2 << 20,
            tokenizer=configs.TrainTokenizerConfig(vocab_size=2048, max_passages=2000),
        )
        passages = (configs.PassageDedupConfig(unit="line"), configs.SubstringDedupConfig())
        stages = (*config.stages, *passages)
        measured = measure(dataclasses.replace(config, stages=stages), folder)
        manifest = json.loads((folder / "out/manifest.json").read_text())
        read = manifest["steps"][0]["kept"]
        shards = len(list((folder / "out/documents").iterdir()))
        print(
            f"| {read['bytes'] / 1e6:.0f} | {shards} | {read['documents']:,} | {measured['driver_peak']:.0f} | "
            f"{measured['worker_peak']:.0f} |",
            flush=True,
        )


def reference(folder: Path, root: Path) -> dict[str, bytes]:
    """What a small pipeline with every kind of stage writes that is never stopped."""
    sys.path.insert(0, str(SUPPORT))
    import all_stages

    all_stages.write_corpus(folder / "corpus")
    all_stages.quiet(all_stages.config_of(folder / "corpus", root))
    written = all_stages.snapshot(root)
    shutil.rmtree(root)
    return written


def compare(root: Path, expected: dict[str, bytes]) -> None:
    import all_stages

    found = all_stages.snapshot(root)
    wrong = [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(expected)} files differ: {sorted(wrong)[:10]}")


def kill_once(config: Any, folder: Path, victim: str, num_done: int) -> str:
    """Starts a pipeline and kills its driver or a worker once so many tasks are done; says where."""
    process = start(config, folder)
    while process.poll() is None and done_tasks(config) < num_done:
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.05))
    found = workers(process.pid)
    where = step_of(Path(config.output_dir))
    if process.poll() is None:
        os.kill(random.choice(found) if victim == "worker" and found else process.pid, signal.SIGKILL)
    status = process.wait()
    log = (folder / "run.log").read_text()
    lost = "a worker process was killed" in " ".join(log.split())
    if status not in (0, -signal.SIGKILL) and not (status == 1 and lost):
        raise SystemExit(f"a run ended with status {status}:\n{log}")
    deadline = time.monotonic() + 60
    while any(is_alive(each) for each in found):
        if time.monotonic() > deadline:
            raise SystemExit(f"of the killed run are left {[each for each in found if is_alive(each)]}")
        time.sleep(0.02)
    return f"{where}, went on" if status == 0 else where


def is_alive(process: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


def step_of(root: Path) -> str:
    """The step that wrote last."""
    stamps = []
    # Directories come and go meanwhile, which os.walk passes over and rglob does not.
    for path in (Path(folder, name) for folder, _, names in os.walk(root / "work") for name in names):
        try:
            stamps.append((path.stat().st_mtime_ns, path))
        except OSError:
            continue
    return str(max(stamps)[1].parent.relative_to(root / "work")) if stamps else "start"


def done_tasks(config: Any) -> int:
    """Tasks that are done, by their markers."""
    return sum(
        name.endswith(".json") for _, _, names in os.walk(Path(config.output_dir, "work/markers")) for name in names
    )


def finish(config: Any, folder: Path) -> None:
    if start(config, folder).wait():
        raise SystemExit((folder / "run.log").read_text())


def kill(args: argparse.Namespace, folder: Path) -> None:
    """Rounds of kills at random moments; every round ends with a run that nobody stops, and a comparison."""
    root = folder / "out"
    expected = reference(folder, root)
    import all_stages

    config = all_stages.config_of(folder / "corpus", root, num_workers=2, engine=engine_of(args))
    finish(config, folder)
    compare(root, expected)
    total = done_tasks(config)
    random.seed(args.seed)
    places: list[str] = []
    for number in range(args.rounds):
        shutil.rmtree(root)
        for _ in range(args.kills):
            if done_tasks(config) >= total - 1:  # every task is done; an engine that does lost ones again gets there
                finish(config, folder)
                compare(root, expected)
                shutil.rmtree(root)
            victim = random.choice(args.victims)
            place = kill_once(config, folder, victim, random.randint(done_tasks(config), total - 1))
            places.append(place)
            print(f"round {number}: {victim} killed in {place}", flush=True)
        finish(config, folder)
        compare(root, expected)
    on = sum(place.endswith("went on") for place in places)
    print(f"\n{len(places)} kills in {len(set(places))} places, after {on} of which the run went on by itself")
    print(f"after each of {args.rounds} rounds all {len(expected)} files are the same")


def disk(args: argparse.Namespace, folder: Path) -> None:
    """Rounds in which a file leaves little room on a small file system, more and more of it."""
    root, ballast = Path(args.directory) / "out", Path(args.directory) / "ballast"
    expected = reference(folder, root)
    import all_stages

    config = all_stages.config_of(folder / "corpus", root, num_workers=args.workers[0])
    random.seed(args.seed)
    full = 0
    for number in range(args.rounds):
        shutil.rmtree(root, ignore_errors=True)
        for share in sorted(random.uniform(0.0, 1.0) for _ in range(args.kills)):
            room = shutil.disk_usage(args.directory)
            kept = int(share * 2 * sum(map(len, expected.values())))
            with open(ballast, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, room.free - kept))
            process = start(config, folder)
            status = process.wait()
            log = " ".join((folder / "run.log").read_text().split())
            ballast.unlink()
            if status not in (0, 1) or (status == 1 and "make room and run the same command again" not in log):
                raise SystemExit(f"status {status}: {(folder / 'run.log').read_text()}")
            full += status
            print(f"round {number}: {kept:,} bytes of room, {'full' if status else 'enough'}", flush=True)
        finish(config, folder)
        compare(root, expected)
    print(f"\nout of room {full} times; after each of {args.rounds} rounds all {len(expected)} files are the same")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2], Path(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = {"speed": speed, "tasks": tasks, "memory": memory, "kill": kill, "disk": disk}
    parser.add_argument("verb", choices=verbs)
    parser.add_argument("texts", nargs="?", help="of disk: a directory on a small file system")
    parser.add_argument("--megabytes", type=float)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--scales", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--engine", choices=["local", "ray"], default="local")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--victims", nargs="+", default=["driver", "worker"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.directory = args.texts
    args.megabytes = args.megabytes or (12 if args.verb == "memory" else 60)
    with tempfile.TemporaryDirectory() as folder:
        verbs[args.verb](args, Path(folder))


if __name__ == "__main__":
    main()
