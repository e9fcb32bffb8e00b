"""Whole pipelines: what comes out, resuming, independence of workers, errors."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest
import zstandard
from rich.console import Console

from data_pipelines import tasks
from data_pipelines.engines.local import LocalEngine
from data_pipelines.manifest import Manifest
from data_pipelines.run import run
from data_pipelines.selecting import is_held_out
from slmjax.config import (
    ConversationFilesSourceConfig,
    ExactDedupConfig,
    ExistingTokenizerConfig,
    FilesSourceConfig,
    LengthFilterConfig,
    NearDedupConfig,
    PipelineConfig,
    RepetitionFilterConfig,
    SplitConfig,
    TrainTokenizerConfig,
)
from slmjax.data.exclusive import only_user
from slmjax.data.token_store import TokenStore
from slmjax.data.tokenizer import Tokenizer

NUM_DOCUMENTS = 60


def text_of(i: int) -> str:
    rng = np.random.default_rng(i)
    words = [
        f"{'bdfgklmnprst'[word % 12]}{'aeiou'[word // 12 % 5]}{'lmnrst'[word // 60]}o"
        for word in rng.integers(0, 360, 80)
    ]
    return "\n".join(" ".join(words[start : start + 10]) for start in range(0, 80, 10))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Three files: 60 good documents, two copies, one near copy, one short document, one broken line."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = [{"id": f"doc{i}", "text": text_of(i)} for i in range(NUM_DOCUMENTS)]
    lines = [orjson.dumps(row) for row in rows]
    lines.insert(25, orjson.dumps({"id": "copy", "text": text_of(0).upper()}))
    lines.insert(30, b'{"broken')
    lines.append(orjson.dumps({"id": "copy2", "text": text_of(59)}))
    lines.append(orjson.dumps({"id": "near", "text": text_of(3).replace("\n", " \n") + " end"}))
    lines.append(orjson.dumps({"id": "short", "text": "tiny"}))
    for part in range(3):
        size = len(lines) // 3 + 1
        (folder / f"{part}.jsonl").write_bytes(b"\n".join(lines[part * size : (part + 1) * size]))
    return folder


def config_of(corpus: Path, output_dir: Path, **changes) -> PipelineConfig:
    config = PipelineConfig(
        output_dir=str(output_dir),
        sources=(FilesSourceConfig(paths=(str(corpus),), id_field="id"),),
        stages=(LengthFilterConfig(min_words=20), RepetitionFilterConfig(), ExactDedupConfig(), NearDedupConfig()),
        tokenizer=TrainTokenizerConfig(vocab_size=360),
        split=SplitConfig(held_out_fraction=0.2),
        num_workers=1,
        shard_bytes=4000,
    )
    return dataclasses.replace(config, **changes)


def quiet(config: PipelineConfig) -> Manifest:
    return run(config, console=Console(file=io.StringIO()))


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file but the timings."""
    files = (path for path in root.rglob("*") if path.is_file() and path.name != "timings.json")
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("finished") / "out"
    quiet(config_of(corpus, root))
    return root


def held_out_rows(root: Path) -> list[dict]:
    with open(root / "held_out.jsonl.zst", "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        return [orjson.loads(line) for line in stream.read().splitlines()]


def test_the_funnel_counts_every_document_once(finished):
    manifest = Manifest.load(finished / "manifest.json")
    assert [(step.step, step.kept.documents, step.dropped) for step in manifest.steps] == [
        ("read", 64, {"invalid_json": 1}),
        ("unique_ids", 64, {}),
        ("length_filter", 63, {"min_words": 1}),
        ("repetition_filter", 63, {}),
        ("exact_dedup", 61, {"duplicate": 2}),
        ("near_dedup", 60, {"near_duplicate": 1}),
    ]
    assert manifest.steps[-1].kept.bytes == sum(len(text_of(i).encode()) for i in range(NUM_DOCUMENTS))
    assert sum(split.documents for split in manifest.splits.values()) == 60
    assert sum(split.bytes for split in manifest.splits.values()) == manifest.steps[-1].kept.bytes
    quarantined = [
        json.loads(line) for path in (finished / "quarantine").iterdir() for line in path.read_text().splitlines()
    ]
    assert [(row["file"], row["reason"], row["excerpt"]) for row in quarantined] == [
        ("1.jsonl", "invalid_json", '{"broken')
    ]


def test_every_decision_is_recorded(finished):
    rows = [row for path in sorted((finished / "work/decisions").iterdir()) for row in pq.read_table(path).to_pylist()]
    assert len(rows) == 64
    assert {row["id"]: row["reason"] for row in rows if row["reason"]} == {
        "files/copy": "exact_dedup.duplicate",
        "files/copy2": "exact_dedup.duplicate",
        "files/near": "near_dedup.near_duplicate",
        "files/short": "length_filter.min_words",
    }


def test_stores_hold_the_documents_of_their_side_in_order(finished):
    tokenizer = Tokenizer.load(finished / "tokenizer.model")
    split = SplitConfig(held_out_fraction=0.2)
    for name, side in (("train", False), ("held_out", True)):
        store = TokenStore.open(finished / name)
        store.verify()
        expected = [text_of(i) for i in range(NUM_DOCUMENTS) if is_held_out(split, f"doc{i}") == side]
        documents = [store.document(i) for i in range(store.num_documents)]
        assert [tokenizer.decode(ids) for ids in documents] == expected
        assert all(ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id for ids in documents)
        assert store.document_bytes.tolist() == [len(text.encode()) for text in expected]
        assert store.metadata.tokenizer_sha256 == tokenizer.sha256
    assert [row["text"] for row in held_out_rows(finished)] == expected


def test_output_does_not_depend_on_the_number_of_workers(corpus, finished, tmp_path):
    quiet(config_of(corpus, tmp_path / "elsewhere", num_workers=2))
    assert snapshot(tmp_path / "elsewhere") == snapshot(finished)


def test_a_second_run_does_nothing(corpus, tmp_path, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name not in _REWRITTEN}
    first = quiet(config_of(corpus, finished))
    assert first == Manifest.load(finished / "manifest.json")
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name not in _REWRITTEN} == before
    timings = json.loads((finished / "timings.json").read_text())
    assert timings["length_filter"]["tasks_done_before"] == 0  # the timings of the run that did the work stay


_REWRITTEN = {"manifest.json", "timings.json", "out"}


@pytest.mark.parametrize("done", [0.0, 0.1, 0.3, 0.5, 0.7, 0.85, 0.95, 1.0])
def test_stopping_after_any_task_and_running_again_gives_the_same_bytes(corpus, finished, tmp_path, monkeypatch, done):
    finished_tasks = int(done * (len(list((finished / "work/markers").rglob("*.json"))) - 1))
    calls, finish = [], tasks.finish

    def stop(task, outputs, result, *, started):
        calls.append(task)
        if len(calls) > finished_tasks:
            raise KeyboardInterrupt  # outputs are there, the marker is not
        return finish(task, outputs, result, started=started)

    monkeypatch.setattr(tasks, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        quiet(config_of(corpus, tmp_path))
    monkeypatch.setattr(tasks, "finish", finish)
    quiet(config_of(corpus, tmp_path))
    assert snapshot(tmp_path) == snapshot(finished)


SCRIPT = """
import resource, sys
from data_pipelines.run import run
from slmjax.config import *

if __name__ == "__main__":
    corpus, root, workers, limit = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run(PipelineConfig(
        output_dir=root,
        sources=(FilesSourceConfig(paths=(corpus,), id_field="id"),),
        stages=(LengthFilterConfig(min_words=20), RepetitionFilterConfig(), ExactDedupConfig(), NearDedupConfig()),
        tokenizer=TrainTokenizerConfig(vocab_size=360),
        split=SplitConfig(held_out_fraction=0.2),
        num_workers=workers,
        shard_bytes=4000,
    ))
"""


def start(tmp_path: Path, corpus: Path, *, workers: int, file_limit: int = 0) -> subprocess.Popen:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), str(corpus), str(tmp_path / "out"), str(workers), str(file_limit)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def test_killing_the_driver_leaves_no_workers_and_the_next_run_finishes(corpus, finished, tmp_path):
    markers = tmp_path / "out/work/markers"
    for step in ("repetition_filter", "tokenise"):
        with start(tmp_path, corpus, workers=2) as process:
            while process.poll() is None and not (markers / step).exists():
                time.sleep(0.005)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        assert process.returncode == -signal.SIGKILL
        assert len(children) >= 2
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(Path(f"/proc/{child}").exists() for child in children)
    quiet(config_of(corpus, tmp_path / "out"))
    assert snapshot(tmp_path / "out") == snapshot(finished)


@pytest.mark.parametrize("path", ["documents/00000-0000.parquet", "tokenizer.model", "train/00000.tokens.bin"])
def test_a_full_disk_is_a_clear_error_and_costs_nothing_finished(corpus, finished, tmp_path, path):
    """A limit on the size of files stands in for the disk: the first file as large as this one cannot be written."""
    with start(tmp_path, corpus, workers=1, file_limit=(finished / path).stat().st_size - 1) as process:
        output = " ".join(process.communicate()[0].split())
    assert process.returncode == 1
    assert f"cannot write {tmp_path}/out/" in output
    assert "File too large. What is finished stays; make room and run the same command again" in output
    assert "Exception ignored" not in output
    whole = {name: content for name, content in snapshot(tmp_path / "out").items() if not name.endswith(".partial")}
    assert whole.items() <= snapshot(finished).items()
    quiet(config_of(corpus, tmp_path / "out"))
    assert snapshot(tmp_path / "out") == snapshot(finished)


def kill_self(task):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(task):
    raise ValueError(f"task {task} is wrong")


def test_a_killed_worker_and_a_failed_task_are_clear_errors():
    with (
        LocalEngine(2) as engine,
        pytest.raises(RuntimeError, match="a worker process was killed, perhaps for want of memory"),
    ):
        list(engine.map(kill_self, [1]))
    with LocalEngine(2) as engine, pytest.raises(ValueError, match="task 1 is wrong"):
        list(engine.map(fail, [1, 2]))


def test_two_runs_never_write_the_same_directory_at_once(corpus, tmp_path):
    out = tmp_path / "out"
    with only_user(out), pytest.raises(ValueError, match=f"another process is writing {out}; wait for it"):
        quiet(config_of(corpus, out))
    assert not any(out.iterdir())
    quiet(config_of(corpus, out))
    quiet(config_of(corpus, out))  # the lock has gone with the run


@pytest.mark.parametrize("below", ["", "deeper"])
def test_an_output_directory_that_cannot_be_is_a_clear_error(corpus, tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=f"cannot make the output directory {tmp_path / 'file' / below}: "):
        quiet(config_of(corpus, tmp_path / "file" / below))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"fingerprint": 1, "outputs": 2}'])
def test_damaged_markers_and_timings_only_cost_time(corpus, finished, tmp_path, content):
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out/timings.json").write_text(content)
    for marker in (tmp_path / "out/work/markers/read").iterdir():
        marker.write_text(content)
    quiet(config_of(corpus, tmp_path / "out"))
    assert snapshot(tmp_path / "out") == snapshot(finished)


def test_the_tokenizer_that_was_trained_here_can_be_kept(corpus, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    trained = tmp_path / "out/tokenizer.model"
    before = trained.read_bytes()
    (tmp_path / "text").write_text("no model")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        quiet(config_of(corpus, tmp_path / "out", tokenizer=ExistingTokenizerConfig(path=str(tmp_path / "text"))))
    assert trained.read_bytes() == before
    kept = quiet(config_of(corpus, tmp_path / "out", tokenizer=ExistingTokenizerConfig(path=str(trained))))
    assert trained.read_bytes() == before
    assert kept.tokenizer_sha256 == Tokenizer.load(trained).sha256
    quiet(config_of(corpus, tmp_path / "out", tokenizer=ExistingTokenizerConfig(path=str(finished / trained.name))))
    assert not trained.exists()  # it is of an earlier config


def test_other_thresholds_use_the_old_measurements(corpus, tmp_path):
    quiet(config_of(corpus, tmp_path))
    measured = {path: path.stat().st_mtime_ns for path in (tmp_path / "work/attributes").rglob("*.parquet")}
    stages = (LengthFilterConfig(min_words=1), RepetitionFilterConfig(), ExactDedupConfig(), NearDedupConfig())
    manifest = quiet(config_of(corpus, tmp_path, stages=stages))
    assert manifest.steps[-1].kept.documents == 61
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work/attributes").rglob("*.parquet")} == measured
    quiet(config_of(corpus, tmp_path / "fresh", stages=stages))
    assert snapshot(tmp_path / "fresh").items() <= snapshot(tmp_path).items()


def test_changed_input_and_config_leave_nothing_stale(corpus, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for path in corpus.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    quiet(config_of(folder, tmp_path / "out"))
    (folder / "1.jsonl").unlink()
    with open(folder / "2.jsonl", "ab") as file:
        file.write(b"\n" + orjson.dumps({"id": "new", "text": text_of(1000)}))
    changes = {"split": SplitConfig(held_out_fraction=0.0), "shard_bytes": 1_000_000}
    quiet(config_of(folder, tmp_path / "out", **changes))
    quiet(config_of(folder, tmp_path / "fresh", **changes))
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "fresh")
    assert not (tmp_path / "out/held_out").exists()


def test_repeated_stages_have_names_of_their_own(corpus, tmp_path):
    stages = (LengthFilterConfig(min_words=20), LengthFilterConfig(max_chars=10))
    with pytest.raises(
        ValueError, match="the stages dropped every document: 63 max_chars, 1 invalid_json, 1 min_words"
    ):
        quiet(config_of(corpus, tmp_path, stages=stages))
    assert {path.name for path in (tmp_path / "work/attributes").iterdir()} == {"length_filter", "length_filter_2"}


def test_nothing_readable_is_an_error_with_the_reasons(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n[]\n")
    (tmp_path / "b.pdf").write_text("x")
    with pytest.raises(
        ValueError, match=r"not one document could be read .*: 1 missing_field, 1 unsupported_extension, 1 wrong_type"
    ):
        quiet(config_of(tmp_path, tmp_path / "out"))


def test_what_is_printed_has_the_rejects_and_names_with_brackets(corpus, tmp_path):
    screen = io.StringIO()
    source = FilesSourceConfig(paths=(str(corpus),), name="[/files]")
    run(config_of(corpus, tmp_path / "[/out]", sources=(source,)), console=Console(file=screen, width=200))
    (read,) = (line for line in screen.getvalue().splitlines() if line.startswith("read "))
    assert "1 invalid_json" in read
    assert "[/files]" in screen.getvalue()
    assert "[/out]" in screen.getvalue()


def test_an_empty_side_of_the_split_is_an_error(corpus, tmp_path):
    with pytest.raises(
        ValueError, match="the held_out side of the split is empty: 60 documents with held_out_fraction"
    ):
        quiet(config_of(corpus, tmp_path, split=SplitConfig(held_out_fraction=1e-9)))
    with pytest.raises(ValueError, match="the train side of the split is empty"):
        quiet(config_of(corpus, tmp_path, split=SplitConfig(held_out_fraction=1 - 1e-9)))


def test_conversation_stores_learn_the_answers_only(corpus, finished, tmp_path):
    pairs = [{"question": f"what is number {i}?", "answer": text_of(i)[:40]} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_bytes(b"\n".join(map(orjson.dumps, pairs)))
    manifest = quiet(
        PipelineConfig(
            output_dir=str(tmp_path / "out"),
            sources=(ConversationFilesSourceConfig(paths=(str(tmp_path / "pairs.jsonl"),)),),
            stages=(ExactDedupConfig(),),
            tokenizer=ExistingTokenizerConfig(path=str(finished / "tokenizer.model")),
            split=SplitConfig(held_out_fraction=0.3),
            num_workers=1,
        )
    )
    tokenizer = Tokenizer.load(finished / "tokenizer.model")
    learned = []
    for name in ("train", "held_out"):
        store = TokenStore.open(tmp_path / "out" / name)
        starts = store.document_starts
        for i in range(store.num_documents):
            mask = store.weights(starts[i], starts[i + 1]).astype(bool)
            learned.append(tokenizer.decode(store.document(i)[mask].tolist()))
    assert sorted(learned) == sorted(pair["answer"] for pair in pairs)
    assert sum(split.learned_bytes for split in manifest.splits.values()) == 20 * 40
    assert [row["messages"][1]["content"] for row in held_out_rows(tmp_path / "out")] == learned[-6:][
        -len(held_out_rows(tmp_path / "out")) :
    ]


def test_shards_and_sources_with_nothing_left_do_no_harm(corpus, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        (folder / f"short{number}.jsonl").write_bytes(orjson.dumps({"id": f"s{number}", "text": f"too short {number}"}))
    (folder / "broken.jsonl").write_bytes(b"{")
    sources = (
        FilesSourceConfig(paths=(str(folder / "broken.jsonl"),), name="broken", id_field="id"),
        FilesSourceConfig(paths=(str(folder / "short*.jsonl"),), name="short", id_field="id"),
        FilesSourceConfig(paths=(str(corpus),), id_field="id"),
    )
    manifest = quiet(config_of(corpus, tmp_path / "out", sources=sources, shard_bytes=30))
    counts = {(step.step, step.source): step.kept.documents for step in manifest.steps}
    assert counts["read", "broken"] == 0
    assert counts["read", "short"] == 3
    assert counts["near_dedup", "short"] == 0
    assert counts["near_dedup", "files"] == NUM_DOCUMENTS
    with pytest.raises(ValueError, match="the stages dropped every document: 3 min_words, 1 invalid_json"):
        quiet(config_of(corpus, tmp_path / "none", sources=sources[:2]))


def test_a_source_never_reads_the_output(corpus, tmp_path):
    for path in corpus.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    first = quiet(config_of(tmp_path, tmp_path / "out"))
    assert quiet(config_of(tmp_path, tmp_path / "out")) == first
