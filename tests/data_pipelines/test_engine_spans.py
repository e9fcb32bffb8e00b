"""A large file of lines is cut into spans: every line is read once, under its own number, wherever the cuts fall."""

import io

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from data_pipelines.documents import read_batches
from data_pipelines.readers.spans import count_lines, cut, read_span, spans
from data_pipelines.run import run
from slmjax.config import FilesSourceConfig, PipelineConfig, SplitConfig, TrainTokenizerConfig


def split(content: bytes) -> list[bytes]:
    lines = content.split(b"\n")
    return lines if lines[-1] else lines[:-1]


@given(
    st.lists(st.sampled_from([b"a", b"bc ", b" ", b"\n"]), min_size=1, max_size=40).map(b"".join),
    st.integers(1, 30),
    st.integers(1, 9),
)
def test_the_lines_of_all_spans_are_those_of_the_file(content, span_bytes, chunk_bytes):
    pieces = cut(len(content), span_bytes)
    assert all(0 < stop - start <= span_bytes for start, stop in pieces)
    counted = [count_lines(io.BytesIO(content), start, stop, chunk_bytes) for start, stop in pieces]
    for (start, stop), lines in zip(pieces, counted, strict=True):
        assert not lines.blank or not content[start:stop].strip()
    found = []
    for span in spans(counted, len(content)):
        lines = split(b"".join(read_span(io.BytesIO(content), span, chunk_bytes)))
        assert lines
        found += enumerate(lines, span.first_line)
    assert found == list(enumerate(split(content), 1))


def pipeline(folder, output, shard_bytes):
    config = PipelineConfig(
        output_dir=str(output),
        sources=(FilesSourceConfig(paths=(str(folder),), max_record_bytes=5000),),
        tokenizer=TrainTokenizerConfig(vocab_size=340),
        split=SplitConfig(held_out_fraction=0.2),
        num_workers=1,
        shard_bytes=shard_bytes,
    )
    return run(config, console=Console(file=io.StringIO()))


def documents(output):
    paths = sorted((output / "work/read").glob("*.parquet"))
    return [row for path in paths for batch in read_batches(path) for row in batch.to_pylist()], len(paths)


def rejects(output):
    lines = (line for path in sorted((output / "quarantine").iterdir()) for line in path.read_bytes().splitlines())
    return [orjson.loads(line) for line in lines]


@pytest.mark.parametrize("shard_bytes", [700, 3000])
def test_ids_and_rejects_do_not_depend_on_the_spans(tmp_path, shard_bytes):
    lines = [orjson.dumps({"text": f"number {i} of some words " * (1 + i % 7)}) for i in range(100)]
    lines[17] = b'{"broken'
    lines[40] = b""
    lines[60] = orjson.dumps({"text": "long " * 1800})  # over several spans, and over max_record_bytes
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    (tmp_path / "in/blank.jsonl").write_bytes(b" \n" * 2000)
    pipeline(tmp_path / "in", tmp_path / "whole", 1 << 20)
    pipeline(tmp_path / "in", tmp_path / "cut", shard_bytes)
    whole, cut_up = documents(tmp_path / "whole"), documents(tmp_path / "cut")
    assert whole[0] == cut_up[0]
    assert whole[1] == 1
    assert cut_up[1] >= 5
    assert [row["id"] for row in whole[0][-2:]] == ["files/a.jsonl#99", "files/a.jsonl#100"]
    assert rejects(tmp_path / "whole") == rejects(tmp_path / "cut")
    reasons = [(row["file"], row["record"], row["reason"]) for row in rejects(tmp_path / "cut")]
    assert reasons == [("a.jsonl", 18, "invalid_json"), ("a.jsonl", 61, "too_long"), ("blank.jsonl", 0, "empty_file")]
    markers = tmp_path / "cut/work/markers/lines"
    assert len(list(markers.iterdir())) >= 5
    pipeline(tmp_path / "in", tmp_path / "cut", 1 << 20)
    assert not any(markers.iterdir())
