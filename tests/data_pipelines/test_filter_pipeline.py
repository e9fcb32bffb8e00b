"""Filters in a pipeline: measured in one pass, texts that they change, what is counted, what is measured again."""

import dataclasses
import json
import string
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from data_pipelines.manifest import Manifest
from data_pipelines.run import run
from slmjax.config import (
    BoilerplateFilterConfig,
    C4FilterConfig,
    ConversationFilesSourceConfig,
    ExactDedupConfig,
    ExistingTokenizerConfig,
    FilesSourceConfig,
    FineWebFilterConfig,
    GopherFilterConfig,
    LengthFilterConfig,
    MaskPersonalDataConfig,
    NormaliseConfig,
    PipelineConfig,
    RepetitionFilterConfig,
    SplitConfig,
)
from slmjax.data.tokenizer import train_tokenizer

GOOD = [
    f"Document number {i} is about the house. It has a second sentence, for {i} of reasons.\nsubscribe\n"
    f"Ask person{i}@example.com about it. The server is 8.8.8.{i}. That is all there is to say."
    for i in range(40)
]
STAGES = (
    RepetitionFilterConfig(),
    GopherFilterConfig(min_words=10),
    C4FilterConfig(),
    FineWebFilterConfig(max_newlines_per_word=None),
    MaskPersonalDataConfig(),
    ExactDedupConfig(),
)


def quiet(config: PipelineConfig) -> Manifest:
    with open("/dev/null", "w") as nowhere:
        return run(config, console=Console(file=nowhere))


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "input.jsonl"
    texts = [
        *GOOD,
        "This stays short.",
        "No line here ends well\n" * 9,
        "In the middle of it is a { like this. " + GOOD[0],
        "a\u0301 \x07 text",
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module", autouse=True)
def tokenizer(tmp_path_factory):
    """Configs name it by an environment variable, so that what a pipeline writes does not depend on where it is."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer([*GOOD, string.printable, "für"] * 2, path, vocab_size=420)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FILTER_TOKENIZER", str(path))
        yield


def config_of(corpus: Path, root: Path, **fields) -> PipelineConfig:
    config = PipelineConfig(
        output_dir=str(root / "out"),
        sources=(FilesSourceConfig(paths=(str(corpus),)),),
        tokenizer=ExistingTokenizerConfig(path="$FILTER_TOKENIZER"),
        stages=STAGES,
        split=SplitConfig(held_out_fraction=0.2),
        num_workers=1,
        shard_bytes=2000,
    )
    return dataclasses.replace(config, **fields)


def documents(root: Path) -> list[dict]:
    files = sorted((root / "out" / "documents").glob("*.parquet"))
    return [row for path in files for row in pq.read_table(path).to_pylist()]


def test_texts_are_changed_and_what_changed_is_counted(corpus, tmp_path):
    manifest = quiet(config_of(corpus, tmp_path))
    steps = {row.step: row for row in manifest.steps}
    assert steps["read"].changes == {"control_characters": 1, "unicode_form": 1}
    assert steps["repetition_filter"].dropped == {"max_duplicate_line_share": 1}
    assert steps["gopher_filter"].dropped == {"min_words": 2}
    assert steps["c4_filter"].dropped == {"max_curly_brackets": 1}
    assert steps["c4_filter"].changes["removed_unfinished_lines"] == 41
    assert steps["c4_filter"].changes["removed_short_lines"] == 0
    assert steps["mask_personal_data"].changes == {
        "masked_secret": 0,
        "masked_email": 40,
        "masked_ip": 40,
        "masked_card": 0,
        "masked_phone": 0,
    }
    rows = documents(tmp_path)
    assert len(rows) == 40
    assert rows[7]["text"] == (
        "Document number 7 is about the house. It has a second sentence, for 7 of reasons.\n"
        "Ask <EMAIL> about it. The server is <IP>. That is all there is to say."
    )
    assert all(row["bytes"] == len(row["text"].encode()) for row in rows)
    assert steps["exact_dedup"].kept.bytes == sum(row["bytes"] for row in rows)
    assert sum(split.bytes for split in manifest.splits.values()) == steps["exact_dedup"].kept.bytes
    assert Manifest.load(tmp_path / "out" / "manifest.json") == manifest


def measured_at(root: Path) -> dict[str, set[int]]:
    """When the attributes of each stage were written."""
    attributes = root / "out" / "work" / "attributes"
    return {stage.name: {path.stat().st_mtime_ns for path in stage.iterdir()} for stage in attributes.iterdir()}


def test_only_what_changed_is_measured_again(corpus, tmp_path):
    quiet(config_of(corpus, tmp_path))
    first = measured_at(tmp_path)
    # Other bounds: nothing.
    loose = dataclasses.replace(GopherFilterConfig(min_words=5))
    quiet(config_of(corpus, tmp_path, stages=(STAGES[0], loose, *STAGES[2:])))
    assert measured_at(tmp_path) == first
    # Another filter: only that one.
    quiet(config_of(corpus, tmp_path, stages=(LengthFilterConfig(), *STAGES)))
    again = measured_at(tmp_path)
    assert {name: again[name] for name in first} == first
    assert again.keys() - first.keys() == {"length_filter"}
    # Another change of the texts: what comes after it.
    other = dataclasses.replace(C4FilterConfig(), require_terminal=False)
    quiet(config_of(corpus, tmp_path, stages=(*STAGES[:2], other, *STAGES[3:])))
    changed = measured_at(tmp_path)
    unchanged = {name for name in first if changed[name] == first[name]}
    assert unchanged == {"repetition_filter", "gopher_filter"}
    assert any("subscribe" not in row["text"] for row in documents(tmp_path))


def test_texts_of_an_earlier_config_do_not_stay(corpus, tmp_path):
    quiet(config_of(corpus, tmp_path))
    quiet(config_of(corpus, tmp_path, stages=(LengthFilterConfig(min_words=10),)))
    assert any("@example.com" in row["text"] for row in documents(tmp_path))


def test_messages_of_conversations_are_masked_one_by_one(tmp_path):
    path = tmp_path / "pairs.jsonl"
    pairs = [{"question": f"Who is person{i}@example.com?", "answer": f"Somebody {i} at 8.8.8.{i}."} for i in range(40)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = config_of(
        path,
        tmp_path,
        sources=(ConversationFilesSourceConfig(paths=(str(path),)),),
        stages=(LengthFilterConfig(min_words=1), MaskPersonalDataConfig()),
    )
    quiet(config)
    row = documents(tmp_path)[3]
    assert [message["content"] for message in row["messages"]] == ["Who is <EMAIL>?", "Somebody 3 at <IP>."]
    assert row["text"] == "Who is <EMAIL>?\n\nSomebody 3 at <IP>."
    assert row["bytes"] == len(row["text"])


def test_two_workers_write_the_same(corpus, tmp_path):
    one = config_of(corpus, tmp_path / "one")
    two = config_of(corpus, tmp_path / "two", num_workers=2)
    assert quiet(one) == quiet(two)
    for kind in ("documents", "work/attributes", "work/text"):
        roots = [tmp_path / name / "out" / kind for name in ("one", "two")]
        first, second = (
            {path.relative_to(root): path.read_bytes() for path in root.rglob("*.parquet")} for root in roots
        )
        assert first == second


def test_what_changes_texts_comes_first_and_leaves_conversations_whole(corpus, tmp_path):
    with pytest.raises(ValueError, match="MaskPersonalDataConfig changes texts and must come before ExactDedupConfig"):
        config_of(corpus, tmp_path, stages=(ExactDedupConfig(), MaskPersonalDataConfig()))
    for stage in (C4FilterConfig(), BoilerplateFilterConfig()):
        with pytest.raises(ValueError, match=f"{type(stage).__name__} would tear conversations apart"):
            config_of(corpus, tmp_path, sources=(ConversationFilesSourceConfig(paths=("x",)),), stages=(stage,))


def test_mojibake_is_repaired_where_asked(tmp_path):
    pytest.importorskip("ftfy")
    path = tmp_path / "input.jsonl"
    texts = ["fÃ¼r immer und ewig", "für immer und ewig, richtig", "plain ASCII it is"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = config_of(path, tmp_path, stages=(), split=SplitConfig(held_out_fraction=0.0))
    manifest = quiet(dataclasses.replace(config, normalise=NormaliseConfig(repair_mojibake=True)))
    assert manifest.steps[0].changes == {"mojibake": 1}
    assert [row["text"] for row in documents(tmp_path)] == ["für immer und ewig", *texts[1:]]
    manifest = quiet(config)
    assert manifest.steps[0].changes == {}
    assert [row["text"] for row in documents(tmp_path)] == texts
