"""Documents in parquet, jsonl and text files that no pipeline of ours has made."""

import collections
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.inspection.corpora import Block, as_text, block_of, chunks
from data_pipelines.inspection.rows import is_shown
from data_pipelines.readers.inputs import InputFile, list_inputs
from data_pipelines.readers.items import Record, Reject
from data_pipelines.readers.records import read_records, read_text
from slmjax.config import FilesSourceConfig

_ROWS = 10_000  # of a parquet file, in one block: their columns but not their texts
_RECORDS = 500  # of a jsonl file, in one block
_TEXTS = ("text", "content", "messages", "excerpt")


class FilesCorpus:
    """Every row or line is a document. `id` and `source` are columns of these names, or file and number, and file."""

    def __init__(self, path: str, text_field: str | None = None):
        listed = list_inputs(FilesSourceConfig(paths=(path,)))
        self.files = [file for file in listed if file.format in ("parquet", "jsonl", "text")]
        if not self.files:
            raise ValueError(
                f"{path} holds no parquet, jsonl or text file, nor is it a pipeline's output or token store"
            )
        self.problems: collections.Counter[str] = collections.Counter()
        self.num_documents = 0  # that the blocks which were gone through hold
        self._text_field = text_field
        fields = list(self._fields(self.files[0]))
        texts = [text_field] if text_field else [name for name in _TEXTS if name in fields]
        if text_field and text_field not in fields:
            raise ValueError(f"{self.files[0].address} has no field {text_field!r}, only {sorted(fields)}")
        self._text = texts[0] if texts else "text"
        told = ", ".join(sorted(set(fields) - {"id", "source"})) or "no other"
        # Said where documents are shown; measures alone, as of scores, are looked at too.
        self.hint = "" if texts or not fields else f"no field is the text: name it with --text-field; there is {told}"
        self.columns = ["id", "source"]
        self.attributes = [name for name in fields if name not in ("id", "source", self._text)]

    def _fields(self, file: InputFile) -> list[str]:
        if file.format == "text":
            return ["text", "bytes"]
        if file.format == "parquet":
            with file.open() as opened, _Naming(file), pq.ParquetFile(opened) as parquet:
                kept = [field.name for field in parquet.schema_arrow if is_shown(field)]
                return kept + [name for name in ("id", *_TEXTS) if name in parquet.schema_arrow.names]
        for item in read_records(file, (), 1 << 30):
            if isinstance(item, Record):
                simple = (str, int, float, bool)
                return [name for name, value in item.fields.items() if isinstance(value, simple) or name in _TEXTS]
        return []

    def blocks(self) -> Iterator[Block]:
        """The files one after the other."""
        self.num_documents = 0
        self.problems.clear()
        for block in self._blocks():
            self.num_documents += block.num_documents
            yield block

    def _blocks(self) -> Iterator[Block]:
        for file in self.files:
            if file.format == "parquet":
                yield from self._parquet_blocks(file)
            else:
                for rows in chunks(self._records(file), _RECORDS):
                    yield block_of(rows, self._text)

    def _records(self, file: InputFile) -> Iterator[dict[str, Any]]:
        if file.format == "text":
            text = read_text(file, 1 << 30)
            if isinstance(text, Reject):
                self.problems[text.reason] += 1
            else:
                yield {"id": file.name, "source": file.name, self._text: text, "bytes": len(text.encode())}
            return
        for item in read_records(file, (), 1 << 30):
            if isinstance(item, Reject):
                self.problems[item.reason] += 1
            else:
                name = item.fields.get("id", f"{file.name}#{item.number}")
                yield {"source": file.name, **item.fields, "id": str(name)}

    def _parquet_blocks(self, file: InputFile) -> Iterator[Block]:
        with file.open() as opened, _Naming(file), pq.ParquetFile(opened) as parquet:
            start = 0
            for group in range(parquet.num_row_groups):
                rows = parquet.metadata.row_group(group).num_rows
                for first in range(0, rows, _ROWS):
                    read = functools.partial(self._parquet_column, file, parquet, group, first, start)
                    texts = functools.partial(self._parquet_texts, parquet, group, first)
                    yield Block(min(_ROWS, rows - first), read, texts)
                start += rows

    def _parquet_column(
        self, file: InputFile, parquet: pq.ParquetFile, group: int, first: int, start: int, name: str
    ) -> pa.Array:
        number = min(_ROWS, parquet.metadata.row_group(group).num_rows - first)
        if name not in parquet.schema_arrow.names:
            if name == "id":
                return pa.array([f"{file.name}#{start + first + i + 1}" for i in range(number)])
            return pa.array([file.name] * number) if name == "source" else pa.nulls(number, pa.float64())
        values = parquet.read_row_group(group, columns=[name], use_threads=False).column(0).combine_chunks()
        values = values.slice(first, number)
        return values.cast(pa.string()) if name == "id" else values

    def _parquet_texts(self, parquet: pq.ParquetFile, group: int, first: int, rows: Sequence[int]) -> list[str]:
        if self._text not in parquet.schema_arrow.names or not rows:
            return [""] * len(rows)
        found: dict[int, str] = {}
        start = -first
        for batch in parquet.iter_batches(256, [group], [self._text], use_threads=False):
            for row in rows:
                if start <= row < start + len(batch):
                    found[row] = as_text(batch.column(0)[row - start].as_py())
            start += len(batch)
            if start > max(rows):
                break
        return [found[row] for row in rows]

    def tokenizer(self) -> None:
        """There is none."""
        return None


class _Naming:
    """Says which file is damaged."""

    def __init__(self, file: InputFile):
        self._file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, pa.ArrowException | OSError):
            raise ValueError(f"cannot read {self._file.address}: {error}") from error
