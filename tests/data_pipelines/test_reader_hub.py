"""Datasets of the hub, on a file system that answers as the hub's does, with its files on this machine."""

import dataclasses
import io
import sys
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

from data_pipelines.documents import Document
from data_pipelines.readers.inputs import list_inputs
from data_pipelines.readers.sources import read_documents
from slmjax.config import FilesSourceConfig, HubSourceConfig, WarcSourceConfig

CONVERTED = "@refs%2Fconvert%2Fparquet"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder whose files the address hf:// names."""

    class FakeHub(DirFileSystem):
        protocol = "hf"
        cachable = False

        def __init__(self, **options):
            super().__init__(path=str(tmp_path), fs=LocalFileSystem())

    monkeypatch.setitem(_registry, "hf", FakeHub)
    assert isinstance(fsspec.filesystem("hf"), FakeHub)
    return tmp_path


def put(hub: Path, name: str, *texts: str) -> None:
    path = hub / "datasets/owner" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"id": [f"{text}-id" for text in texts], "text": list(texts)}), path)
    else:
        path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))


def read(source) -> tuple[dict[str, str], list]:
    items = [item for file in list_inputs(source) for item in read_documents(source, file, lambda text: text)]
    return {i.id: i.text for i in items if isinstance(i, Document)}, [i for i in items if not isinstance(i, Document)]


def texts(**fields) -> list[str]:
    documents, rejects = read(HubSourceConfig(dataset="owner/name", **fields))
    assert not rejects
    return list(documents.values())


def test_the_converted_split(hub):
    put(hub, f"name{CONVERTED}/default/train/0000.parquet", "a", "b")
    put(hub, f"name{CONVERTED}/default/train/0001.parquet", "c")
    put(hub, f"name{CONVERTED}/default/test/0000.parquet", "d")
    put(hub, "name/data.jsonl", "original")
    documents, _ = read(HubSourceConfig(dataset="owner/name"))
    assert documents == {"hub/0000.parquet#1": "a", "hub/0000.parquet#2": "b", "hub/0001.parquet#1": "c"}
    assert texts(split="test") == ["d"]
    assert list(read(HubSourceConfig(dataset="owner/name", split="test", id_field="id"))[0]) == ["hub/d-id"]
    with pytest.raises(ValueError, match=r"has the splits \['test', 'train'\], got 'validation'"):
        texts(split="validation")


def test_configs(hub):
    put(hub, f"name{CONVERTED}/en/train/0000.parquet", "a")
    assert texts() == ["a"]  # the only one
    put(hub, f"name{CONVERTED}/fr/train/0000.parquet", "b")
    assert texts(config="fr") == ["b"]
    for config in (None, "de"):
        with pytest.raises(ValueError, match=rf"owner/name has the configs \['en', 'fr'\], not {config!r}"):
            texts(config=config)


def test_a_split_that_was_converted_in_part_only_is_read_from_the_repository(hub):
    put(hub, f"name{CONVERTED}/default/partial-train/0000.parquet", "part")
    put(hub, "name/data/train-00000-of-00002.parquet", "a")
    put(hub, "name/data/train-00001-of-00002.parquet", "b")
    put(hub, "name/data/test-00000-of-00001.parquet", "c")
    put(hub, "name/README.md", "x")
    assert texts() == ["a", "b"]
    assert texts(split="partial-train") == ["part"]


def test_files_of_the_repository(hub):
    put(hub, "name/en/train.jsonl", "a")
    put(hub, "name/fr/train.jsonl", "b")
    put(hub, "name/fr/test.jsonl", "c")
    put(hub, "name/training_notes.csv", "x")
    assert texts() == ["a", "b"]
    assert texts(config="fr") == ["b"]
    assert texts(split="test") == ["c"]
    assert texts(files=("fr/*.jsonl",)) == ["c", "b"]
    with pytest.raises(ValueError, match="owner/name has no file for config None, split 'dev' that can be read"):
        texts(split="dev")


def test_without_splits_all_files_are_for_training(hub):
    put(hub, "name/part1.jsonl", "a")
    put(hub, "name/part2.jsonl", "b")
    assert texts() == ["a", "b"]


def test_a_revision_is_of_the_repository(hub):
    put(hub, f"name{CONVERTED}/default/train/0000.parquet", "converted")
    put(hub, "name/train.jsonl", "newest")
    put(hub, "name@v1/train.jsonl", "first")
    put(hub, "name@refs%2Fpr%2F1/train.jsonl", "proposed")
    assert texts() == ["converted"]
    assert texts(revision="v1") == ["first"]
    assert texts(revision="refs/pr/1") == ["proposed"]


def test_plain_addresses(hub):
    put(hub, "name/data/a.jsonl", "a")
    put(hub, "name/data/b.parquet", "b")
    for path in ("hf://datasets/owner/name", "hf://datasets/owner/name/data/*"):
        assert read(FilesSourceConfig(paths=(path,)))[0] == {"files/a.jsonl#1": "a", "files/b.parquet#1": "b"}


def test_what_is_not_there(hub):
    put(hub, "other/a.jsonl", "a")
    with pytest.raises(ValueError, match="cannot list the dataset owner/name: "):
        texts()
    with pytest.raises(ValueError, match="cannot list hf://datasets/owner/none: it matches no file"):
        read(FilesSourceConfig(paths=("hf://datasets/owner/none",)))


class Lost(io.BytesIO):
    """A file whose server went away."""

    def __init__(self):
        super().__init__(b"x" * 1000)

    def read(self, size=-1):
        raise RuntimeError("no route to host")


def test_errors_of_the_network_are_one_line(hub, monkeypatch):
    put(hub, "name/a.jsonl", "a")
    source = FilesSourceConfig(paths=("hf://datasets/owner/name/a.jsonl",))
    (file,) = list_inputs(source)

    def fail(*arguments, **options):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(DirFileSystem, "open", fail)
    with pytest.raises(ValueError, match=r"cannot read hf://datasets/owner/name/a\.jsonl: no route to host"):
        list(read_documents(source, file, str))
    monkeypatch.setattr(DirFileSystem, "open", lambda *arguments, **options: Lost())
    for kind, archive in (("parquet", False), ("arrow", False), ("jsonl", False), ("warc", True)):
        named = dataclasses.replace(file, format=kind)
        reader = WarcSourceConfig(paths=source.paths) if archive else source
        with pytest.raises(ValueError, match=r"^cannot read hf://datasets/owner/name/a\.jsonl: no route to host$"):
            list(read_documents(reader, named, str))
    for name in ("ls", "find", "isfile", "isdir"):
        monkeypatch.setattr(DirFileSystem, name, fail)
    with pytest.raises(ValueError, match=r"cannot list hf://datasets/owner/name/a\.jsonl: no route to host"):
        list_inputs(source)
    with pytest.raises(ValueError, match="cannot list the dataset owner/name: no route to host"):
        list_inputs(HubSourceConfig(dataset="owner/name"))


def test_an_absent_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for source in (HubSourceConfig(dataset="owner/name"), FilesSourceConfig(paths=("hf://datasets/owner/name",))):
        with pytest.raises(ValueError, match=r"need the package huggingface_hub: pip install -e '.\[hub\]'"):
            list_inputs(source)


@pytest.mark.parametrize("dataset", ["name", "a/b/c", "/x", ""])
def test_a_dataset_is_an_owner_and_a_name(dataset):
    with pytest.raises(ValueError, match='dataset must be "owner/name"'):
        HubSourceConfig(dataset=dataset)
