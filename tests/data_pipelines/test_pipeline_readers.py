"""Readers: every format, and every kind of damage counted and named, never a crash."""

import gzip
import json
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipelines.documents import Document
from data_pipelines.readers import python_functions
from data_pipelines.readers.inputs import list_inputs, units
from data_pipelines.readers.sources import read_documents
from data_pipelines.stages.normalise import normalise
from slmjax.config import (
    ConversationFilesSourceConfig,
    FilesSourceConfig,
    NormaliseConfig,
    PythonFunctionsSourceConfig,
    PythonLibrarySourceConfig,
)


def read(source) -> tuple[list[Document], list]:
    items = [
        item
        for file in list_inputs(source)
        for item in read_documents(source, file, lambda text: normalise(NormaliseConfig(), text))
    ]
    return [i for i in items if isinstance(i, Document)], [i for i in items if not isinstance(i, Document)]


def read_paths(*paths, **fields):
    return read(FilesSourceConfig(paths=tuple(map(str, paths)), **fields))


def line(text, **fields) -> bytes:
    return orjson.dumps({"text": text, **fields}) + b"\n"


CONTENT = line("first") + b"\n" + line("second")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", CONTENT),
        ("a.jsonl", b"\xef\xbb\xbf" + CONTENT.rstrip()),
        ("a.ndjson", CONTENT),
        ("a.jsonl.gz", gzip.compress(CONTENT, mtime=0)),
        ("a.jsonl.gz", gzip.compress(line("first"), mtime=0) + gzip.compress(line("second"), mtime=0)),
        ("a.jsonl.zst", zstandard.compress(CONTENT)),
        ("a.jsonl.zst", zstandard.compress(CONTENT[:9]) + zstandard.compress(CONTENT[9:])),
    ],
)
def test_json_lines_in_every_wrapping(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    documents, rejects = read_paths(tmp_path / name)
    assert [document.text for document in documents] == ["first", "second"]
    assert not rejects


def test_text_files_and_parquet(tmp_path):
    (tmp_path / "a.md").write_text("\ufeff# Title\r\nbody\x0c\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"plain"))
    table = pa.table({"text": ["row", None, "other"], "id": [7, 8, 9], "unused": [1, 2, 3]})
    pq.write_table(table, tmp_path / "c.parquet")
    documents, rejects = read_paths(tmp_path, id_field=None)
    assert [(d.id, d.text) for d in documents] == [
        ("files/a.md", "# Title\nbody\n"),
        ("files/b.txt.gz", "plain"),
        ("files/c.parquet#1", "row"),
        ("files/c.parquet#3", "other"),
    ]
    assert [(r.record, r.reason) for r in rejects] == [(2, "missing_field")]


def test_a_field_that_is_null_is_not_called_absent(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null, "id": 1}\n{"id": 2}\n')
    _, rejects = read_paths(tmp_path / "a.jsonl")
    assert [r.detail for r in rejects] == ["'text' is null", "no field 'text', only ['id']"]


def test_paths_may_be_directories_globs_and_addresses(tmp_path, monkeypatch):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("in/b.txt", "in/deep/a.txt", "in/.hidden.txt", "other.txt"):
        (tmp_path / name).write_text(name)
    monkeypatch.setenv("CORPUS", str(tmp_path))
    for path in ("$CORPUS/in", f"{tmp_path}/in/", f"file://{tmp_path}/in", "$CORPUS/in/**/*.txt"):
        assert [d.id for d in read_paths(path)[0]] == ["files/b.txt", "files/deep/a.txt"]
    assert [d.id for d in read_paths("$CORPUS/in/b.txt", "$CORPUS/other.txt")[0]] == [
        "files/in/b.txt",
        "files/other.txt",
    ]
    assert [d.id for d in read_paths("$CORPUS/in/b.txt", "$CORPUS/in/*.txt")[0]] == ["files/b.txt"]  # once
    assert [d.id for d in read_paths(tmp_path / "in/.hidden.txt")[0]] == ["files/.hidden.txt"]
    assert [d.id for d in read_paths("$CORPUS/*.txt", format="text")[0]] == ["files/other.txt"]


def test_an_address_of_another_file_system(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/a.jsonl", CONTENT)
    memory.pipe("/corpus/b.txt", b"third")
    documents, rejects = read_paths("memory://corpus")
    assert [d.id for d in documents] == ["files/a.jsonl#1", "files/a.jsonl#3", "files/b.txt"]
    assert not rejects


def damaged(tmp_path) -> dict[str, bytes]:
    """File contents by the reason that they must give."""
    big = line("x" * 20_000) + line("kept")
    table = tmp_path / "whole.parquet"
    pq.write_table(pa.table({"text": ["a" * 1000] * 10}), table)
    return {
        "invalid_json a.jsonl": line("kept") + b'{"text": "cut\n' + line("kept"),
        "wrong_type b.jsonl": line("kept") + b"[1, 2]\n" + line("kept"),
        "wrong_type c.jsonl": line("kept") + line(7) + line("kept"),
        "missing_field d.jsonl": line("kept") + b'{"body": "x"}\n' + line("kept"),
        "missing_field e.jsonl": line("kept") + line(None) + line("kept"),
        "invalid_utf8 f.jsonl": line("kept") + b'{"text": "\xff"}\n' + line("kept"),
        "invalid_utf8 g.txt": b"caf\xe9",
        "null_byte h.jsonl": line("kept") + line("a\0b") + line("kept"),
        "null_byte i.txt": "utf-16".encode("utf-16-be"),
        "invalid_json j.jsonl": line("kept") + b'{"text": "\\ud800"}\n' + line("kept"),
        "invalid_json k.jsonl": line("kept") + b"[" * 5000 + b"\n" + line("kept"),
        "invalid_json l.jsonl": line("kept") + b"\0\0\0\n" + line("kept"),
        "too_long m.jsonl": line("kept") + big,
        "too_long n.txt": b"x" * 20_000,
        "empty_text o.jsonl": line("kept") + line(" \n\x07") + line("kept"),
        "empty_file p.jsonl": b"",
        "empty_file q.txt": b"",
        "empty_file r.parquet": b"",
        "empty_text s.txt": b" \n",
        "unsupported_extension t.docx": b"PK",
        "unsupported_extension u": b"x",
        "truncated_compression v.jsonl.zst": zstandard.compress(line("kept") + big + big)[:-5],
        "truncated_compression w.jsonl.gz": gzip.compress(line("kept") * 2)[:-9],
        "damaged_compression x.jsonl.gz": b"\x1f\x8bnonsense, not deflate",
        "damaged_compression y.txt.zst": b"nonsense",
        "damaged_parquet z.parquet": table.read_bytes()[:-40],
        "damaged_parquet z2.parquet": b"PAR1" + bytes(100) + b"PAR1",
    }


def test_damage_is_rejected_with_its_reason_and_the_rest_is_kept(tmp_path):
    for name, content in damaged(tmp_path).items():
        reason, _, file_name = name.partition(" ")
        folder = tmp_path / "in"
        folder.mkdir(exist_ok=True)
        path = folder / file_name
        path.write_bytes(content)
        documents, rejects = read_paths(path, max_record_bytes=10_000)
        assert {r.reason for r in rejects} >= {reason}, name
        assert all(len(r.excerpt) <= 220 for r in rejects)
        assert all(d.text == "kept" for d in documents), name
        if file_name.endswith(".jsonl") and content:
            assert len(documents) == 2, name
            assert [r.record for r in rejects] == [2], name


def test_columns_of_a_wrong_type_in_parquet(tmp_path):
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    pq.write_table(pa.table({"other": ["x", "y"]}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "rows0.parquet")
    bad = pa.StringArray.from_buffers(1, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xff"))
    pq.write_table(pa.table({"text": bad}), tmp_path / "utf8.parquet")
    documents, rejects = read_paths(tmp_path)
    assert not documents
    assert [r.reason for r in rejects] == ["wrong_type", "wrong_type", "missing_field", "empty_file", "invalid_utf8"]
    assert rejects[2].detail == "no column text, only ['other']"


def test_one_line_of_fifty_megabytes(tmp_path):
    path = tmp_path / "long.jsonl"
    with open(path, "wb") as file:
        file.write(line("before") + b'{"text": "' + b"x" * 50_000_000 + b'"}\n' + line("after"))
    documents, rejects = read_paths(path)
    assert [d.text for d in documents] == ["before", "after"]
    assert [(r.record, r.reason) for r in rejects] == [(2, "too_long")]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.sampled_from(["jsonl", "txt", "parquet", "jsonl.gz", "jsonl.zst"]))
def test_arbitrary_bytes_never_crash(tmp_path, content, extension):
    path = tmp_path / f"x.{extension}"
    path.write_bytes(content)
    documents, rejects = read_paths(path)
    assert documents or rejects


def test_nothing_matches_is_an_error_that_names_the_path(tmp_path):
    for path in (tmp_path / "absent.jsonl", tmp_path / "*.jsonl", tmp_path):
        with pytest.raises(ValueError, match=f"cannot list {path}".replace("*", r"\*")):
            read_paths(path)
    with pytest.raises(ValueError, match="paths holds an empty string"):
        read_paths("")
    with pytest.raises(ValueError, match="cannot list nowhere://x: Protocol not known"):
        read_paths("nowhere://x")


def test_an_unreadable_file_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(CONTENT)
    source = FilesSourceConfig(paths=(str(path),))
    files = list_inputs(source)
    path.unlink()
    with pytest.raises(ValueError, match=f"cannot read {path}: No such file"):
        list(read_documents(source, files[0], str))


def test_units_keep_order_and_size(tmp_path):
    for i, size in enumerate((10, 20, 100, 5, 5)):
        (tmp_path / f"{i}.txt").write_bytes(b"x" * size)
    files = list_inputs(FilesSourceConfig(paths=(str(tmp_path),)))
    assert [[file.size for file in unit] for unit in units(files, 30)] == [[10, 20], [100], [5, 5]]


def test_the_key_is_the_identifier_or_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(line("same", id="one") + line("same", id="two") + line("same", id=["x"]))
    by_id, rejects = read_paths(tmp_path / "a.jsonl", id_field="id")
    assert [(d.id, d.key) for d in by_id] == [("files/one", "one"), ("files/two", "two")]
    assert [r.reason for r in rejects] == ["wrong_type"]
    by_text = read_paths(tmp_path / "a.jsonl")[0]
    assert len({d.key for d in by_text}) == 1


def test_conversations_of_every_form(tmp_path):
    turns = [{"role": "user", "content": "hi\r\n"}, {"role": "assistant", "content": "hello"}]
    records = [
        {"messages": turns},
        {"instruction": "add", "input": "1 2", "output": "3"},
        {"question": "why", "answer": "because"},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"messages": [{"role": "robot", "content": "hi"}]},
        {"messages": "hi"},
        {"messages": [{"role": "user", "content": "\x07"}, {"role": "assistant", "content": "hello"}]},
        {"other": 1},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    documents, rejects = read(ConversationFilesSourceConfig(paths=(str(tmp_path / "a.jsonl"),)))
    assert [[m["content"] for m in d.messages or ()] for d in documents] == [
        ["hi\n", "hello"],
        ["add\n\n1 2", "3"],
        ["why", "because"],
    ]
    assert documents[0].text == "hi\n\n\nhello"
    assert [r.reason for r in rejects] == ["bad_conversation"] * 5
    assert "robot" in rejects[1].detail


def test_a_text_file_has_no_conversations_unless_its_format_is_named(tmp_path):
    (tmp_path / "a.txt").write_text(json.dumps({"question": "why", "answer": "because"}))
    paths = (str(tmp_path / "a.txt"),)
    assert [r.reason for r in read(ConversationFilesSourceConfig(paths=paths))[1]] == ["unsupported_extension"]
    assert len(read(ConversationFilesSourceConfig(paths=paths, format="jsonl"))[0]) == 1


def test_conversation_fields_can_be_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"q": "why", "a": "because"}))
    source = ConversationFilesSourceConfig(paths=(str(tmp_path / "a.jsonl"),), instruction_field="q", output_field="a")
    assert read(source)[0][0].text == "why\n\nbecause"
    (tmp_path / "b.jsonl").write_text(json.dumps({"chat": [{"role": "user", "content": "x"}] * 1}))
    source = ConversationFilesSourceConfig(paths=(str(tmp_path / "b.jsonl"),), messages_field="chat")
    assert read(source)[1][0].detail == "no turn is the assistant's"


def test_the_same_question_has_the_same_key(tmp_path):
    pairs = [{"question": "why", "answer": "a"}, {"question": "why", "answer": "b"}, {"question": "how", "answer": "b"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    keys = [d.key for d in read(ConversationFilesSourceConfig(paths=(str(tmp_path / "a.jsonl"),)))[0]]
    assert keys[0] == keys[1] != keys[2]


def test_the_standard_library_without_tests():
    files = {file.name for file in list_inputs(PythonLibrarySourceConfig())}
    assert {"os.py", "json/decoder.py"} <= files
    assert not any({"site-packages", "test", "tests", "__pycache__"} & set(Path(name).parts) for name in files)
    assert len(list_inputs(PythonLibrarySourceConfig(include_tests=True))) >= len(files)


MODULE = '''
"""Module docstring."""
import os


def plain(a, b=2, *, c: int = 3) -> int:
    """Adds things.

    At length.
    """

    total = a + b
    return total + c


class Box:
    @property
    def size(self):
        "The size."
        return len(self._items)

    def no_docstring(self):
        return 1

    def only_docstring(self):
        """Nothing else."""


if os.name == "nt":
    def twice():
        """First."""
        return 1
else:
    def twice():
        """Second."""
        return 2


def one_line(): "Says."; return 1


def margin():
    """Has a string at the margin."""
    return """
text
"""
'''


def test_functions_become_pairs():
    pairs = list(python_functions.pairs(MODULE, PythonFunctionsSourceConfig()))
    assert [name for name, _, _ in pairs] == ["plain", "Box.size", "twice", "twice.2", "margin"]
    _, question, answer = pairs[0]
    assert question == "Write a Python function.\ndef plain(a, b=2, *, c: int=3) -> int:\nAdds things."
    assert answer == "def plain(a, b=2, *, c: int = 3) -> int:\n    total = a + b\n    return total + c"
    assert pairs[1][2] == "def size(self):\n    return len(self._items)"
    assert pairs[3][2] == "def twice():\n    return 2"


def test_pairs_keep_within_their_lengths_and_bad_source_has_none():
    short = PythonFunctionsSourceConfig(max_answer_chars=50)
    assert "plain" not in [name for name, _, _ in python_functions.pairs(MODULE, short)]
    assert list(python_functions.pairs("def f(:", PythonFunctionsSourceConfig())) == []
    assert list(python_functions.pairs("x = " + "-" * 100_000 + "1", PythonFunctionsSourceConfig())) == []


def test_functions_carry_the_key_of_their_module():
    source = PythonFunctionsSourceConfig()
    file = next(file for file in list_inputs(source) if file.name == "json/decoder.py")
    documents = [item for item in read_documents(source, file, str) if isinstance(item, Document)]
    assert {d.key for d in documents} == {"json/decoder.py"}
    assert any(d.id == "python_functions/json/decoder.py:JSONDecoder.decode" for d in documents)


def test_normalisation():
    config = NormaliseConfig()
    assert normalise(config, "\ufeffa\r\nb\rc\td\x0c\x7f\x85e") == "a\nb\nc\tde"
    assert normalise(config, "e\u0301") == "\u00e9"
    assert normalise(NormaliseConfig(unicode_form=None), "e\u0301") == "e\u0301"
    assert normalise(NormaliseConfig(unicode_form="NFKC"), "\ufb01") == "fi"
    assert normalise(None, "a\r\n") == "a\r\n"


@given(st.text())
def test_normalisation_is_idempotent(text):
    once = normalise(NormaliseConfig(), text)
    assert normalise(NormaliseConfig(), once) == once
