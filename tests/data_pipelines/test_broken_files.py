"""Broken files of every kind: no crash, every record read or rejected with its reason, the same bytes every time."""

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from archives import packed, page
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from data_pipelines.documents import Document
from data_pipelines.readers.inputs import list_inputs
from data_pipelines.readers.items import Skip
from data_pipelines.readers.sources import read_documents
from data_pipelines.run import run
from slmjax.config import (
    FilesSourceConfig,
    PipelineConfig,
    SourceTreeConfig,
    SplitConfig,
    TrainTokenizerConfig,
    WarcSourceConfig,
)

TEXT = "Some words that are in every good record of these files, and a number: "
LINES = [orjson.dumps({"text": f"{TEXT}{number}"}) + b"\n" for number in range(20)]
GOOD = b"".join(LINES)


def table() -> pa.Table:
    return pa.table({"text": [f"{TEXT}{number}" for number in range(20)]})


def parquet(**options) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table(), sink, row_group_size=5, **options)
    return sink.getvalue()


def arrow(make) -> bytes:
    sink = io.BytesIO()
    with make(sink, table().schema) as writer:
        writer.write_table(table(), max_chunksize=5)
    return sink.getvalue()


WHOLE = {
    "a.jsonl": GOOD,
    "a.jsonl.gz": gzip.compress(GOOD[:700], mtime=0) + gzip.compress(GOOD[700:], mtime=0),
    "a.jsonl.zst": zstandard.compress(GOOD[:700]) + zstandard.compress(GOOD[700:]),
    "a.txt": GOOD,
    "a.md.gz": gzip.compress(GOOD, mtime=0),
    "a.parquet": parquet(),
    "b.parquet": parquet(compression="none", use_dictionary=False),
    "file.arrow": arrow(pa.ipc.new_file),
    "stream.arrow": arrow(pa.ipc.new_stream),
    "a.warc": packed([page(number) for number in range(4)], ""),
    "a.warc.gz": packed([page(number) for number in range(4)], ".gz"),
    "a.warc.zst": packed([page(number) for number in range(4)], ".zst"),
    "a.py": b"def function():\n    return 1\n" * 9,
}


def source_of(path: Path, name: str):
    if ".warc" in name:
        return WarcSourceConfig(paths=(str(path),))
    if name.endswith(".py"):
        return SourceTreeConfig(paths=(str(path),))
    return FilesSourceConfig(paths=(str(path),), max_record_bytes=1 << 20)


def read(path: Path):
    """Documents and rejects; reading again gives the same, and every reject can be written down."""
    source = source_of(path, path.name)
    items, again = (
        [item for file in list_inputs(source) for item in read_documents(source, file, lambda text: text)]
        for _ in range(2)
    )
    assert items == again
    documents = [item for item in items if isinstance(item, Document)]
    rejects = [item for item in items if not isinstance(item, Document | Skip)]
    assert documents or rejects or any(isinstance(item, Skip) for item in items)
    assert len({document.id for document in documents}) == len(documents)
    for document in documents:
        document.text.encode()
    for reject in rejects:
        orjson.dumps(reject._asdict())
        assert reject.reason
        assert len(reject.excerpt) <= 220
    return documents, rejects


@pytest.mark.parametrize("name", WHOLE)
def test_the_whole_files_are_good(tmp_path, name):
    (tmp_path / name).write_bytes(WHOLE[name])
    documents, rejects = read(tmp_path / name)
    assert not rejects
    assert len(documents) == (1 if name in ("a.txt", "a.md.gz", "a.py") else 4 if "warc" in name else 20)


FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """A good file with some bytes changed, cut out, doubled or put in."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.sampled_from([0, 1, 4, 40, 4000])))
        new = draw(st.one_of(st.just(b""), st.binary(min_size=1, max_size=8), st.just(content[start:stop] * 2)))
        if draw(st.booleans()):
            new = new.ljust(stop - start, b"\0")[: stop - start]  # of the same length
        content = content[:start] + new + content[stop:]
    return content


@pytest.mark.parametrize("name", WHOLE)
@settings(FUZZ, max_examples=25)
@given(data=st.data())
def test_damage_anywhere(tmp_path, name, data):
    (tmp_path / name).write_bytes(data.draw(damaged(WHOLE[name])))
    read(tmp_path / name)


@pytest.mark.parametrize("name", WHOLE)
@settings(FUZZ, max_examples=15)
@given(content=st.binary(max_size=400), keep=st.sampled_from([0, 4, 12, 200]))
def test_any_bytes(tmp_path, name, content, keep):
    (tmp_path / name).write_bytes(WHOLE[name][:keep] + content)
    read(tmp_path / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
@settings(FUZZ, max_examples=1500)
@given(data=st.data())
def test_damage_anywhere_at_length(tmp_path, name, data):
    (tmp_path / name).write_bytes(data.draw(damaged(WHOLE[name])))
    read(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "stream.arrow", "a.warc", "a.warc.gz", "a.warc.zst"]
)
@settings(FUZZ, max_examples=20)
@given(data=st.data())
def test_a_truncated_file_gives_what_is_before_its_end(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(WHOLE[name])
    whole = read(path)[0]
    path.write_bytes(WHOLE[name][: data.draw(st.integers(1, len(WHOLE[name]) - 1))])
    documents, _ = read(path)
    assert documents == whole[: len(documents)]


@settings(FUZZ, max_examples=60)
@given(
    lines=st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.recursive(
                st.none() | st.integers() | st.floats() | st.text(),
                lambda x: st.lists(x) | st.dictionaries(st.text(), x),
            ).map(lambda value: json.dumps({"text": value}).encode()),
            st.text().map(lambda text: json.dumps({"text": text}, ensure_ascii=False).encode(errors="surrogatepass")),
        ).map(lambda line: line.replace(b"\n", b" ")),
        max_size=8,
    )
)
def test_every_line_is_a_document_or_a_reject_where_it_is(tmp_path, lines):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    documents, rejects = read(path)
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    records = [number for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    found = [int(document.id.partition("#")[2]) for document in documents] + [reject.record for reject in rejects]
    assert sorted(found) == (records or [0])
    starts = [0]
    for line in path.read_bytes().split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    assert all(reject.offset == starts[reject.record - 1] for reject in rejects if reject.record)


def write_corpus(folder: Path) -> None:
    """Every kind of broken file, and good ones."""
    files = {
        "good.jsonl": GOOD,
        "bom.jsonl": b"\xef\xbb\xbf" + GOOD,
        "crlf.jsonl": GOOD.replace(b"\n", b"\r\n"),
        "no_end.jsonl": GOOD.rstrip(b"\n"),
        "utf16.jsonl": GOOD.decode().encode("utf-16"),
        "utf16.txt": TEXT.encode("utf-16"),
        "latin.txt": "café".encode("latin-1"),
        "mixed.jsonl": LINES[0] + '{"text": "café"}\n'.encode("latin-1") + LINES[1],
        "nulls.jsonl": LINES[0] + b"\0" * 5000 + b"\n" + b'{"text": "a\\u0000b"}\n' + LINES[1],
        "surrogates.jsonl": b'{"text": "\\ud800"}\n{"text": "\\udc00\\ud800"}\n{"text": "\xed\xa0\x80"}\n' + LINES[0],
        "deep.jsonl": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n" + b'{"a":' * 2000 + b"1" + b"}" * 2000,
        "numbers.jsonl": b'{"text": 7}\n{"text": 1e999}\n{"text": NaN}\n{"text": true}\n{"text": null}\n[]\n"text"\n',
        "huge_number.jsonl": b'{"text": ' + b"9" * 5000 + b"}\n" + LINES[0],
        "twice.jsonl": b'{"text": "first", "text": "second of one name"}\n',
        "empty.jsonl": b"",
        "blank.jsonl": b"\n \n\t\r\n",
        "empty.parquet": b"",
        "empty.arrow": b"",
        "empty.jsonl.gz": gzip.compress(b"", mtime=0),
        "empty.jsonl.zst": zstandard.compress(b""),
        "not.jsonl.gz": GOOD,
        "not.jsonl.zst": GOOD,
        "not.parquet": GOOD,
        "not.arrow": GOOD,
        "cut.jsonl.gz": WHOLE["a.jsonl.gz"][:-15],
        "cut.jsonl.zst": WHOLE["a.jsonl.zst"][:-15],
        "cut.arrow": WHOLE["stream.arrow"][:-400],
        "cut.parquet": WHOLE["a.parquet"][:-40],
        "middle.jsonl.gz": WHOLE["a.jsonl.gz"][:60] + b"\xff" * 8 + WHOLE["a.jsonl.gz"][68:],
        "footer.parquet": WHOLE["a.parquet"][:-60] + b"\xff" * 50 + WHOLE["a.parquet"][-10:],
        "padded.jsonl.gz": WHOLE["a.jsonl.gz"] + bytes(512),
        "image.png": b"\x89PNG",
    }
    tables = {
        "schema.parquet": pa.table({"body": ["x"]}),
        "numbers.parquet": pa.table({"text": [1, 2]}),
        "rows0.parquet": pa.table({"text": pa.array([], pa.string())}),
        "lists.parquet": pa.table({"text": [["a"], ["b"]]}),
        "nothing.parquet": pa.table({"text": pa.nulls(3)}),
        "no_columns.parquet": pa.table({}),
    }
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    for name, content in tables.items():
        pq.write_table(content, folder / name)
    (folder / "folder.jsonl").mkdir()
    (folder / "folder.jsonl/inside.jsonl").write_bytes(LINES[0])
    os.symlink(folder / "nothing", folder / "broken.jsonl")
    os.symlink(folder, folder / "loop.jsonl")
    os.mkfifo(folder / "pipe.jsonl")


def pipeline(folder: Path, output: Path, **changes) -> PipelineConfig:
    fields = {
        "output_dir": str(output),
        "sources": (
            FilesSourceConfig(paths=(str(folder),)),
            WarcSourceConfig(paths=(str(folder.parent / "web"),)),
            SourceTreeConfig(paths=(str(folder),), extensions=(".jsonl",)),
        ),
        "tokenizer": TrainTokenizerConfig(vocab_size=400),
        "split": SplitConfig(held_out_fraction=0.1),
        "num_workers": 1,
    }
    return PipelineConfig(**{**fields, **changes})


def snapshot(root: Path) -> dict[str, bytes]:
    paths = (path for path in root.rglob("*") if path.is_file() and path.name != "timings.json")
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def test_a_run_over_broken_files_counts_everything_and_gives_the_same_bytes_again(tmp_path):
    folder = tmp_path / "in"
    write_corpus(folder)
    (tmp_path / "web").mkdir()
    for name in ("a.warc", "a.warc.gz"):
        (tmp_path / "web" / name).write_bytes(WHOLE[name] + page(5, length=3) + WHOLE[name][:-200])
    quiet = Console(file=io.StringIO())
    manifest = run(pipeline(folder, tmp_path / "out"), console=quiet)
    run(pipeline(folder, tmp_path / "again", num_workers=2), console=quiet)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "again")
    files, web, code = manifest.steps
    rejects = [
        json.loads(line)
        for path in sorted((tmp_path / "out/quarantine").iterdir())
        for line in path.read_text("utf-8").splitlines()
    ]
    for step in (files, web):
        written = [row for row in rejects if row["source"] == step.source]
        assert sum(step.dropped.values()) == len(written)
    named = {row["file"] for row in rejects if row["source"] == "files"}
    good = {"good.jsonl", "bom.jsonl", "crlf.jsonl", "no_end.jsonl", "twice.jsonl", "folder.jsonl/inside.jsonl"}
    assert named == {str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "folder.jsonl"} - good
    reasons = {row["file"]: row["reason"] for row in rejects if row["source"] == "files"}
    assert {name: reasons[name] for name in ("broken.jsonl", "loop.jsonl", "pipe.jsonl")} == dict.fromkeys(
        ("broken.jsonl", "loop.jsonl", "pipe.jsonl"), "not_a_file"
    )
    assert {
        "damaged_arrow", "damaged_compression", "damaged_parquet", "empty_file", "invalid_json", "invalid_utf8",
        "missing_field", "not_a_file", "null_byte", "truncated_compression", "unsupported_extension", "wrong_type",
    } == set(reasons.values()) | {"null_byte"}  # fmt: skip
    assert files.kept.documents > 100
    assert web.kept.documents >= 8
    assert code.dropped["other_language"] > 5


def test_an_empty_run_says_what_was_wrong_first(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text('{"body": "x", "id": 1}\n' * 3)
    source = FilesSourceConfig(paths=(str(tmp_path / "in"),))
    message = r"3 missing_field\. The first: a\.jsonl, record 1: missing_field no field 'text', only \['body', 'id'\]$"
    with pytest.raises(ValueError, match=message):
        run(pipeline(tmp_path, tmp_path / "out", sources=(source,)), console=Console(file=io.StringIO()))


def test_a_source_of_nothing_but_outputs_is_an_error_that_says_so(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.jsonl").write_bytes(GOOD)
    config = PipelineConfig(
        output_dir=str(out),
        sources=(FilesSourceConfig(paths=(str(tmp_path),)),),
        tokenizer=TrainTokenizerConfig(vocab_size=330),
    )
    with pytest.raises(ValueError, match=f"source files: all its files lie in output_dir, {out}"):
        run(config, console=Console(quiet=True))


def test_links_to_files_are_read(tmp_path):
    (tmp_path / "blob").write_bytes(GOOD)
    (tmp_path / "in").mkdir()
    os.symlink(tmp_path / "blob", tmp_path / "in/a.jsonl")
    for path in (tmp_path / "in", tmp_path / "in/*.jsonl", tmp_path / "in/a.jsonl"):
        source = FilesSourceConfig(paths=(str(path),))
        (file,) = list_inputs(source)
        assert file.size == len(GOOD)
        assert len(list(read_documents(source, file, str))) == 20


def test_names_that_are_no_text_or_look_like_addresses(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in (b"\xffa.jsonl", b"x::y.jsonl"):
        Path(os.fsdecode(bytes(folder) + b"/" + name)).write_bytes(LINES[0])
    manifest = run(
        PipelineConfig(
            output_dir=str(tmp_path / "out"),
            sources=(FilesSourceConfig(paths=(str(folder),)),),
            tokenizer=TrainTokenizerConfig(vocab_size=340),
            split=SplitConfig(held_out_fraction=0.0),
        ),
        console=Console(quiet=True),
    )
    assert manifest.splits["train"].documents == 2
    (documents,) = (tmp_path / "out/documents").iterdir()
    assert pq.read_table(documents)["id"].to_pylist() == ["files/x::y.jsonl#1", r"files/\xffa.jsonl#1"]


def test_what_cannot_be_opened_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(ValueError, match=f"cannot read {path}: Permission denied"):
        read(path)


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_a_line_of_a_hundred_megabytes_stays_out_of_memory(tmp_path, compression):
    path = tmp_path / f"a.jsonl{compression}"
    pack = {"": open, ".gz": gzip.open, ".zst": zstandard.open}[compression]
    with pack(path, "wb") as file:
        file.write(LINES[0] + b'{"text": "')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n' + LINES[1])
    program = f"""
import resource
from data_pipelines.readers.inputs import list_inputs
from data_pipelines.readers.sources import read_documents
from slmjax.config import FilesSourceConfig
def read(path, bound):
    source = FilesSourceConfig(paths=(path,), max_record_bytes=bound)
    return [type(item).__name__ for item in read_documents(source, list_inputs(source)[0], str)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(*read({str(path)!r}, 1 << 20), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    *kinds, kilobytes = done.stdout.split()
    assert kinds == ["Document", "Reject", "Document"]
    assert int(kilobytes) < 50_000
