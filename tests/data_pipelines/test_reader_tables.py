"""Parquet, Arrow files and streams, and directories as `datasets` saves them: every type of text, every damage."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.documents import Document
from data_pipelines.readers.inputs import list_inputs
from data_pipelines.readers.sources import read_documents
from slmjax.config import ConversationFilesSourceConfig, FilesSourceConfig


def read(*paths, kind=FilesSourceConfig, **fields):
    source = kind(paths=tuple(map(str, paths)), **fields)
    items = [item for file in list_inputs(source) for item in read_documents(source, file, lambda text: text)]
    return [i for i in items if isinstance(i, Document)], [i for i in items if not isinstance(i, Document)]


def write(path, table, *, rows=None):
    match path.suffix, path.stem:
        case ".parquet", _:
            pq.write_table(table, path, row_group_size=rows)
        case _, "file":
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=rows)
        case _:
            with pa.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=rows)
    return path


FILES = ["a.parquet", "file.arrow", "stream.arrow"]
TYPES = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.dictionary(pa.int8(), pa.large_string()),
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_text_of_every_type(tmp_path, name, kind):
    texts = pa.array(["one", None, "three", "one"]).cast(kind)
    path = write(tmp_path / name, pa.table({"n": [1, 2, 3, 4], "text": texts}))
    documents, rejects = read(path)
    assert [(d.id, d.text) for d in documents] == [
        (f"files/{name}#{number}", text) for number, text in ((1, "one"), (3, "three"), (4, "one"))
    ]
    assert [(r.record, r.reason) for r in rejects] == [(2, "missing_field")]


@pytest.mark.parametrize("name", FILES)
def test_fields_inside_others(tmp_path, name):
    rows = [{"meta": {"id": 7, "page": {"text": "inner"}}, "other": 1}, {"meta": {"id": 8, "page": None}, "other": 1}]
    path = write(tmp_path / name, pa.Table.from_pylist(rows))
    documents, rejects = read(path, text_field="meta.page.text", id_field="meta.id")
    assert [(d.id, d.text) for d in documents] == [("files/7", "inner")]
    assert [(r.record, r.reason) for r in rejects] == [(2, "missing_field")]
    for absent in ("meta.page.body", "meta.text.x", "other.text", "none.text"):
        documents, rejects = read(path, text_field=absent)
        assert [(r.record, r.detail) for r in rejects] == [(0, f"no column {absent}, only ['meta', 'other']")]


def test_inner_fields_of_json_and_names_with_dots(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": {"b": "inner"}}\n{"a.b": "plain"}\n{"a": "x"}\n')
    documents, rejects = read(tmp_path / "a.jsonl", text_field="a.b")
    assert [d.text for d in documents] == ["inner", "plain"]
    assert [(r.record, r.reason, r.detail) for r in rejects] == [(3, "missing_field", "no field 'a.b', only ['a']")]


@pytest.mark.parametrize("name", FILES)
def test_an_absent_column_names_those_that_there_are(tmp_path, name):
    path = write(tmp_path / name, pa.table({"id": ["x"], "body": ["y"]}))
    documents, (reject,) = read(path, id_field="id")
    assert not documents
    assert reject[:3] == (0, "missing_field", "no column text, only ['id', 'body']")


@pytest.mark.parametrize("name", FILES)
def test_wrong_types_and_text_that_is_not_utf8(tmp_path, name):
    _, rejects = read(write(tmp_path / name, pa.table({"text": [1, 2]})))
    assert [r.detail for r in rejects] == ["'text' is not text but int"] * 2
    offsets = pa.array([0, 4, 5, 9], pa.int32()).buffers()[1]
    bad = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"good\xffgood"))
    documents, rejects = read(write(tmp_path / name, pa.table({"text": bad})))
    assert [d.id[-1] for d in documents] == ["1", "3"]
    assert [(r.record, r.reason) for r in rejects] == [(2, "invalid_utf8")]


@pytest.mark.parametrize("name", FILES)
def test_tables_without_rows(tmp_path, name):
    path = write(tmp_path / name, pa.table({"text": pa.array([], pa.string())}))
    assert [r.reason for r in read(path)[1]] == ["empty_file"]
    path.write_bytes(b"")
    assert [r.reason for r in read(path)[1]] == ["empty_file"]


def texts(count):
    return pa.table({"text": [f"text {number} " * 50 for number in range(1, count + 1)]})


def test_a_damaged_page_of_parquet_costs_its_row_group(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(texts(30), path, row_group_size=10, compression="none", use_dictionary=False)
    about = pq.read_metadata(path).row_group(1).column(0)
    content = bytearray(path.read_bytes())
    content[about.data_page_offset : about.data_page_offset + 40] = b"\xff" * 40
    path.write_bytes(content)
    documents, rejects = read(path)
    assert [int(d.id.partition("#")[2]) for d in documents] == [*range(1, 11), *range(21, 31)]
    assert [(r.record, r.reason) for r in rejects] == [(11, "damaged_parquet")]
    assert rejects[0].detail.endswith("; 10 rows are lost")


def test_a_damaged_batch_of_an_arrow_file_costs_itself(tmp_path):
    path = tmp_path / "file.arrow"
    values = texts(30)["text"].to_pylist()
    with pa.ipc.new_file(path, texts(30).schema) as writer:
        for start in (0, 10, 20):
            writer.write_batch(pa.record_batch({"text": values[start : start + 10]}))
    content = bytearray(path.read_bytes())
    place = content.index(b"text 11 ") - 44  # among the offsets of the second batch
    content[place : place + 20] = b"\x7f" * 20
    path.write_bytes(content)
    documents, rejects = read(path)
    assert len(documents) == 20
    assert [r.reason for r in rejects] == ["damaged_arrow"]


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow"])
def test_truncated_tables(tmp_path, name):
    path = write(tmp_path / name, texts(30), rows=10)
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 4])
    documents, rejects = read(path)
    assert len(documents) == (20 if name == "stream.arrow" else 0)
    assert [r.reason for r in rejects] == [f"damaged_{path.suffix[1:]}"]


def test_rows_longer_than_the_bound(tmp_path):
    table = pa.Table.from_pylist([{"a": {"b": ["x" * 300, "y" * 300]}, "text": "t"}, {"a": None, "text": "u"}])
    path = write(tmp_path / "a.parquet", table)
    assert len(read(path, max_record_bytes=500)[0]) == 2  # only what is read counts
    path = write(tmp_path / "b.parquet", pa.table({"text": ["x" * 600, "short"]}))
    documents, rejects = read(path, max_record_bytes=500)
    assert [d.text for d in documents] == ["short"]
    assert [(r.record, r.reason) for r in rejects] == [(1, "too_long")]


def save(folder, table, files=2):
    """As `Dataset.save_to_disk` does."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{files:05d}.arrow" for i in range(files)]
    for i, name in enumerate(names):
        rows = len(table) // files
        write(folder / name, table.slice(i * rows, rows), rows=2)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "x", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"text": {"dtype": "string"}}}))
    return folder


def test_a_saved_dataset(tmp_path):
    folder = save(tmp_path / "set", texts(8))
    write(folder / "cache-0123.arrow", texts(3))  # what a transformation left
    documents, rejects = read(folder)
    assert not rejects
    assert [d.text.split()[1] for d in documents] == [str(number) for number in range(1, 9)]
    assert documents[4].id == "files/data-00001-of-00002.arrow#1"
    assert read(folder / "*.arrow", format="arrow")[0][0].text.split()[1] == "1"


def test_a_saved_dictionary_of_splits(tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        save(tmp_path / "sets" / split, texts(count))
    (tmp_path / "sets/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    documents, rejects = read(tmp_path / "sets")
    assert not rejects
    assert [d.id.split("/")[1] for d in documents] == ["test"] * 2 + ["train"] * 4
    assert len(read(tmp_path / "sets/train")[0]) == 4


def test_saved_datasets_that_are_not_whole(tmp_path):
    folder = save(tmp_path / "set", texts(8))
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match=r"cannot list .*set: a saved dataset without its file .*00001-of-00002.arrow"):
        read(folder)
    for content, message in (
        ("{", "state.json is damaged"),
        ("[]", "state.json is damaged"),
        ('{"_indices_data_files": [{"filename": "indices.arrow"}]}', "chooses its rows by an index"),
    ):
        (folder / "state.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read(folder)


def test_a_state_of_something_else_is_just_a_file(tmp_path):
    (tmp_path / "state.json").write_text("{")
    write(tmp_path / "stream.arrow", texts(2))
    documents, rejects = read(tmp_path)
    assert len(documents) == 2
    assert [r.reason for r in rejects] == ["unsupported_extension"]


def test_conversations_from_arrow(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path = write(tmp_path / "stream.arrow", pa.Table.from_pylist([{"messages": turns}]))
    documents, rejects = read(path, kind=ConversationFilesSourceConfig)
    assert not rejects
    assert documents[0].text == "hi\n\nhello"
