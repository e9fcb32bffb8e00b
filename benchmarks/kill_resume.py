"""Kills a run with SIGKILL at random steps, starts it again each time, and compares it with one that was never stopped.

    python benchmarks/kill_resume.py configs/quickstart.gin --kills 10 --set RunConfig.steps=60 \\
      --set CheckpointConfig.every_steps=7

Both runs go to a temporary directory. Compared are all metrics of all steps but those of the clock, the batches as the
loop took them (also by processes that were killed), and the checksums of the last checkpoint's arrays, bit for bit.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CLOCK = {"tokens_per_second", "tokens_per_second_per_device", "step_seconds", "input_wait_share", "goodput", "mfu"}
CLOCK |= {"peak_memory_gib"}


def train(batches_path: str) -> None:
    """Is the `slmjax` command, but for a line in `batches_path` for every batch that the loop takes."""
    import numpy as np

    from slmjax import cli
    from slmjax.train import loop

    make_loader = loop.make_loader

    def recorded(*args, start_step, **kwargs):
        with open(batches_path, "a", buffering=1) as file:
            for step, batch in enumerate(make_loader(*args, start_step=start_step, **kwargs), start_step):
                arrays = [np.ascontiguousarray(each).tobytes() for each in batch if each is not None]
                file.write(f"{step} {hashlib.sha256(b''.join(arrays)).hexdigest()}\n")
                yield batch

    loop.make_loader = recorded
    cli.main()


def start(arguments: list[str], run_dir: Path, overrides: list[str]) -> subprocess.Popen:
    overrides = [*overrides, "TrackingConfig.log_every_steps=1", f"RunConfig.output_dir={str(run_dir)!r}"]
    command = [sys.executable, __file__, "--child", str(run_dir) + ".batches", "train", *arguments]
    for override in overrides:
        command += ["--set", override]
    with open(f"{run_dir}.log", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def logged_step(run_dir: Path) -> int:
    """Returns the last step of which metrics.jsonl has a whole line."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def checkpoint_steps(run_dir: Path) -> list[int]:
    directory = run_dir / "checkpoints"
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal()) if directory.exists() else []


def kill_at(process: subprocess.Popen, run_dir: Path, step: int, delay: float) -> int:
    """Kills once `step` is logged and `delay` seconds have passed; returns the last step that was logged."""
    while logged_step(run_dir) < step:
        if process.poll() is not None:
            raise SystemExit(f"the run ended with status {process.returncode}; see {run_dir}.log")
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.wait()
    return logged_step(run_dir)


def metrics(run_dir: Path) -> dict[tuple[int, str], float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], name): value for line in lines for name, value in line.items() if name not in CLOCK}


def batches(run_dir: Path) -> list[tuple[int, str]]:
    """Returns (step, hash) of every batch that any process of the run took."""
    lines = Path(f"{run_dir}.batches").read_text().splitlines()
    return [(int(step), content) for step, content in (line.split() for line in lines)]


def arrays(run_dir: Path) -> dict[str, dict]:
    """Returns shape, type and checksum of every array in the last checkpoint."""
    record = run_dir / "checkpoints" / str(checkpoint_steps(run_dir)[-1]) / "record" / "metadata"
    return json.loads(record.read_text())["leaves"]


def compare(what: str, found: dict, expected: dict) -> bool:
    same = sum(found.get(key) == value for key, value in expected.items())
    print(f"{what}: {same} of {len(expected)} identical, {len(found.keys() - expected.keys())} too many")
    return found == expected


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        batches_path, sys.argv = sys.argv[2], ["slmjax", *sys.argv[3:]]
        return train(batches_path)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="+")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="BINDING")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    from slmjax.gin_loader import load

    steps = load(args.config, args.overrides).config.steps
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as root:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{root}/compiled")
        whole, killed = Path(root) / "whole", Path(root) / "killed"
        began = time.perf_counter()
        if start(args.config, whole, args.overrides).wait() != 0:
            raise SystemExit(Path(f"{whole}.log").read_text())
        print(f"never stopped: {steps} steps, {time.perf_counter() - began:.0f} s\n")
        print("| kill | after step | newest checkpoint | steps made again |")
        print("|---|---|---|---|")
        for number, step in enumerate(sorted(rng.sample(range(1, steps), args.kills)), 1):
            process = start(args.config, killed, args.overrides)
            last = kill_at(process, killed, step, delay=rng.random() * 0.05)
            saved = max(checkpoint_steps(killed), default=0)
            print(f"| {number} | {last} | {saved or 'none'} | {last - saved} |", flush=True)
        if start(args.config, killed, args.overrides).wait() != 0:
            raise SystemExit(Path(f"{killed}.log").read_text())
        print()
        taken, expected = batches(killed), dict(batches(whole))
        wrong = [step for step, content in taken if content != expected[step]]
        print(f"batches taken by all processes: {len(taken)}, of them not what the other run took: {len(wrong)}")
        same = [
            compare("batches", dict(taken), expected),
            compare("metrics", metrics(killed), metrics(whole)),
            compare("arrays of the last checkpoint", arrays(killed), arrays(whole)),
        ]
    raise SystemExit(0 if all(same) and not wrong else "the runs differ")


if __name__ == "__main__":
    main()
