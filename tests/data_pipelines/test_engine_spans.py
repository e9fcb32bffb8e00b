"""A large file is cut into spans: every line or row is read once, under its own number, wherever the cuts fall."""

import dataclasses
import io
import tempfile

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from data_pipelines.documents import read_batches
from data_pipelines.readers.inputs import list_inputs
from data_pipelines.readers.spans import count_lines, cut, read_span, spans
from data_pipelines.readers.tables import cut as cut_table
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
    markers = tmp_path / "cut" / "work/markers/lines"
    assert len(list(markers.iterdir())) >= 5
    pipeline(tmp_path / "in", tmp_path / "cut", 1 << 20)
    assert not any(markers.iterdir())


def write_table(path, num_rows=100, group_rows=7):
    """A table of several row groups, with a null, a text that is too long, and a page of its fourth group damaged."""
    texts: list[str | None] = [f"row {i} of some words " * (1 + i % 7) for i in range(num_rows)]
    texts[17], texts[60] = None, "long " * 1800
    table = pa.table({"n": range(num_rows), "text": texts, "title": [f"title of {i}" for i in range(num_rows)]})
    pq.write_table(table, path, row_group_size=group_rows, compression="none", use_dictionary=False)
    page = pq.ParquetFile(path).metadata.row_group(3).column(1).data_page_offset
    content = bytearray(path.read_bytes())
    content[page : page + 30] = b"\xff" * 30
    path.write_bytes(content)


@pytest.mark.parametrize("shard_bytes", [700, 3000])
def test_row_groups_are_read_as_if_by_one(tmp_path, shard_bytes):
    (tmp_path / "in").mkdir()
    write_table(tmp_path / "in/a.parquet")
    pq.write_table(pa.table({"other": ["no text"] * 900}), tmp_path / "in/b.parquet", row_group_size=90)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "in/c.parquet")
    pipeline(tmp_path / "in", tmp_path / "whole", 1 << 20)
    pipeline(tmp_path / "in", tmp_path / "cut", shard_bytes)
    whole, cut_up = documents(tmp_path / "whole"), documents(tmp_path / "cut")
    assert whole[0] == cut_up[0]
    assert (whole[1], len(whole[0])) == (1, 91)
    assert cut_up[1] >= 5
    assert len(list((tmp_path / "cut" / "work/markers/read").iterdir())) >= 5
    assert [row["id"] for row in cut_up[0][-2:]] == ["files/a.parquet#99", "files/a.parquet#100"]
    assert rejects(tmp_path / "whole") == rejects(tmp_path / "cut")
    found = [(row["file"], row["record"], row["reason"]) for row in rejects(tmp_path / "cut")]
    assert found == [
        ("a.parquet", 18, "missing_field"),
        ("a.parquet", 22, "damaged_parquet"),
        ("a.parquet", 61, "too_long"),
        ("b.parquet", 0, "missing_field"),
        ("c.parquet", 0, "empty_file"),
    ]
    assert not (tmp_path / "cut" / "work/markers/lines").exists()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 4000))
def test_row_groups_of_all_spans_are_those_of_the_file(groups, span_bytes):
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/a.parquet"
        schema = pa.schema([("text", pa.string())])
        with pq.ParquetWriter(path, schema) as writer:
            for number, rows in enumerate(groups):
                writer.write_table(pa.table({"text": [f"{number} and {row}" for row in range(rows)]}, schema))
        (file,) = list_inputs(FilesSourceConfig(paths=(path,)))
        pieces = cut_table(file, span_bytes)
    assert sum(piece.size for piece in pieces) == pytest.approx(file.size, abs=len(pieces))
    if pieces == [file]:
        assert len(groups) == 1 or file.size <= span_bytes + 1
        return
    found = [(piece.size, piece.span) for piece in pieces if piece.span is not None]
    assert [group for _, span in found for group in range(span.start, span.stop)] == list(range(len(groups)))
    assert [span.first_line for _, span in found] == [1 + sum(groups[: span.start]) for _, span in found]
    assert all(size <= span_bytes + 1 or span.stop == span.start + 1 for size, span in found)


def test_what_cannot_be_cut_is_read_at_once(tmp_path):
    write_table(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-50])
    whole, damaged = list_inputs(FilesSourceConfig(paths=(str(tmp_path),)))
    assert len(cut_table(whole, 1000)) > 5
    assert cut_table(damaged, 1000) == [damaged]
    assert cut_table(dataclasses.replace(whole, address=str(tmp_path / "gone")), 1000)[0].span is None
