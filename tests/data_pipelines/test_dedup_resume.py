"""Stages over the whole corpus in a pipeline: workers, memory and being killed change nothing in what comes out."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orjson
import pytest
from all_stages import with_worker_bytes
from rich.console import Console

from data_pipelines import tasks
from data_pipelines.manifest import Manifest
from data_pipelines.run import run
from slmjax.config import (
    DecontaminationConfig,
    EvaluationTextConfig,
    ExactDedupConfig,
    FilesSourceConfig,
    NearDedupConfig,
    PassageDedupConfig,
    PipelineConfig,
    SubstringDedupConfig,
    TrainTokenizerConfig,
)

STAGES = ("exact_dedup", "near_dedup", "passage_dedup", "substring_dedup", "decontamination")


def sentence(rng: np.random.Generator, num_words: int) -> str:
    return " ".join(f"{'bdfgklmn'[word % 8]}{'aeiou'[word // 8 % 5]}{'lmnrst'[word // 40]}o" for word in
                    rng.integers(0, 240, num_words))  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """In in/: 60 documents, copies, near copies, documents with a line, or a run of words, or an item of others."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("corpus")
    texts = ["\n".join(sentence(rng, 20) for _ in range(4)) for _ in range(60)]
    line, item = sentence(rng, 15), sentence(rng, 20)
    run_of_words = sentence(rng, 12)
    texts += [texts[i].upper() for i in (0, 30)]
    texts += [texts[i] + " end" for i in (1, 31)]
    for i in (2, 32, 50):
        texts[i] += f"\n{line}"
        texts[i + 1] += f" {run_of_words} {sentence(rng, 3)}"
    texts[4] += f"\n{item}"
    rows = [orjson.dumps({"id": str(i), "text": text}) for i, text in enumerate(texts)]
    rows.append(rows[5])  # the same id again
    (folder / "in").mkdir()
    for part in range(3):
        (folder / f"in/{part}.jsonl").write_bytes(b"\n".join(rows[part::3]))
    (folder / "items.jsonl").write_bytes(orjson.dumps({"text": item}))
    return folder


def config_of(folder: Path, output_dir: Path, **changes) -> PipelineConfig:
    evaluation = EvaluationTextConfig(paths=(str(folder / "items.jsonl"),), name="quiz")
    config = PipelineConfig(
        output_dir=str(output_dir),
        sources=(FilesSourceConfig(paths=(str(folder / "in"),), id_field="id"),),
        stages=(
            ExactDedupConfig(),
            NearDedupConfig(),
            PassageDedupConfig(unit="line"),
            SubstringDedupConfig(words=10),
            DecontaminationConfig(evaluations=(evaluation,)),
        ),
        tokenizer=TrainTokenizerConfig(vocab_size=330),
        num_workers=1,
        shard_bytes=6000,
    )
    worker_bytes = changes.pop("worker_bytes", 20_000)
    return with_worker_bytes(dataclasses.replace(config, **changes), worker_bytes)


def quiet(config: PipelineConfig) -> Manifest:
    return run(config, console=Console(file=io.StringIO()))


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file but the timings."""
    files = (path for path in root.rglob("*") if path.is_file() and path.name != "timings.json")
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("finished") / "out"
    quiet(config_of(folder, root))
    return root


def test_each_stage_finds_what_was_planted(finished):
    manifest = Manifest.load(finished / "manifest.json")
    assert [(step.step, step.dropped) for step in manifest.steps] == [
        ("read", {}),
        ("unique_ids", {"duplicate_id": 1}),
        ("exact_dedup", {"duplicate": 2}),
        ("near_dedup", {"near_duplicate": 2}),
        ("passage_dedup", {}),
        ("substring_dedup", {}),
        ("decontamination", {"max_matches": 1}),
    ]
    sizes = [step.kept.bytes for step in manifest.steps]
    assert sizes[4] == sizes[3] - 2 * len(sentence(np.random.default_rng(), 15))  # a line of 15 words, twice
    assert sizes[5] == sizes[4] - 2 * len(sentence(np.random.default_rng(), 12) + " ")
    assert manifest.steps[5].changes == {"cut_bytes": sizes[4] - sizes[5]}
    assert sum(split.bytes for split in manifest.splits.values()) == sizes[-1]


def test_nothing_depends_on_workers_and_memory(folder, finished, tmp_path):
    quiet(config_of(folder, tmp_path / "two", num_workers=2))
    assert snapshot(tmp_path / "two") == snapshot(finished)
    quiet(config_of(folder, tmp_path / "large", worker_bytes=1 << 30))
    assert snapshot(tmp_path / "large") == snapshot(finished)


def test_nothing_passed_between_tasks_is_left(finished):
    assert not (finished / "work/shuffle").exists()
    assert sorted(path.name for path in (finished / "work/verdicts").iterdir()) == sorted(["unique_ids", *STAGES])


@pytest.mark.parametrize(
    "step",
    [
        "evaluations",
        "verdicts/unique_ids",
        "shuffle/exact_dedup/meet",
        "shuffle/near_dedup/scatter",
        "shuffle/near_dedup/small_star_1",
        "shuffle/near_dedup/members",
        "shuffle/near_dedup/verify",
        "verdicts/near_dedup",
        "shuffle/passage_dedup/meet",
        "verdicts/substring_dedup",
        "contamination/decontamination",
    ],
)
def test_stopping_in_any_phase_and_running_again_gives_the_same_bytes(folder, finished, tmp_path, monkeypatch, step):
    finish = tasks.finish
    seen: list[str] = []

    def stop(task, outputs, result, *, started):
        if step in seen or (task.step == step and step == "evaluations"):
            raise KeyboardInterrupt  # in the middle of the phase: outputs are there, the marker is not
        seen.append(task.step)
        return finish(task, outputs, result, started=started)

    monkeypatch.setattr(tasks, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        quiet(config_of(folder, tmp_path / "out"))
    monkeypatch.setattr(tasks, "finish", finish)
    quiet(config_of(folder, tmp_path / "out"))
    assert snapshot(tmp_path / "out") == snapshot(finished)


SCRIPT = """
import sys
from pathlib import Path
from test_dedup_resume import config_of, quiet

if __name__ == "__main__":
    quiet(config_of(Path(sys.argv[1]), Path(sys.argv[2]), num_workers=2))
"""


def start(tmp_path: Path, folder: Path) -> subprocess.Popen:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    here = Path(__file__).parent
    return subprocess.Popen(
        [sys.executable, str(script), str(folder), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (here, here.parent / "support", here.parents[1])))},
    )


def children_of(process: subprocess.Popen) -> list[int]:
    """Worker processes; the first child is multiprocessing's resource tracker."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    commands = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in listed}
    return [child for child, command in commands.items() if b"spawn_main" in command]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["driver", "worker"])
def test_killing_the_driver_or_a_worker_costs_nothing_but_time(folder, finished, tmp_path, victim):
    """Killed again and again, each time a little further; what is there in the end is what was always to be there."""
    phases = [
        "attributes/near_dedup",
        "shuffle/exact_dedup/scatter",
        "shuffle/near_dedup/scatter",
        "shuffle/near_dedup/label",
        "shuffle/near_dedup/verify",
        "shuffle/substring_dedup/meet",
        "verdicts/decontamination",
    ]
    killed = 0
    for phase in phases:
        with start(tmp_path, folder) as process:
            waited = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < waited:
                if (tmp_path / "out/work" / phase).exists() and children_of(process):
                    break
                time.sleep(0.002)
            if process.poll() is None:
                os.kill(process.pid if victim == "driver" else children_of(process)[0], signal.SIGKILL)
            output = process.communicate()[0]
        killed += process.returncode != 0
        assert process.returncode in ({-signal.SIGKILL, 0} if victim == "driver" else {0, 1})
        assert process.returncode != 1 or "a worker process was killed" in output
    assert killed >= 4  # a phase may be over before it is seen
    quiet(config_of(folder, tmp_path / "out"))
    assert snapshot(tmp_path / "out") == snapshot(finished)
