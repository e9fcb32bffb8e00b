"""Texts to measure tokenizers on, each with its source and language."""

import collections
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from data_pipelines.readers.inputs import InputFile, list_inputs
from data_pipelines.readers.items import Reject
from data_pipelines.readers.records import read_records, read_text
from slmjax.config import FilesSourceConfig


class Sample(NamedTuple):
    """A text, and where it belongs; language is "" where nothing says it."""

    source: str
    language: str
    text: str


class Samples:
    """The texts of files: those a pipeline selected (its `documents`), jsonl, tables, or whole texts.

    The source is the field `source_field`, else what the id begins with, as a pipeline's ids do, else the file.

    Attributes:
      rejected: how much could not be read, by reason, once the samples were read.

    Raises:
      ValueError: a path names no file.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        text_field: str = "text",
        source_field: str = "source",
        language_field: str = "language",
    ):
        self._config = FilesSourceConfig(paths=tuple(paths), text_field=text_field)
        self._files = list(list_inputs(self._config))
        self._fields = (text_field, source_field, language_field)
        self.rejected: collections.Counter[str] = collections.Counter()

    def __iter__(self) -> Iterator[Sample]:
        self.rejected.clear()
        for file in self._files:
            yield from self._of_text(file) if file.format == "text" else self._of_records(file)

    def texts(self) -> Iterator[str]:
        """The texts alone."""
        return (sample.text for sample in self)

    def text_batches(self) -> Iterator[list[str]]:
        """The texts of `batches`."""
        return ([sample.text for sample in batch] for batch in self.batches())

    def batches(self, batch_bytes: int = 4 << 20) -> Iterator[list[Sample]]:
        """Samples in lists that hold about as much text."""
        batch, size = [], 0
        for sample in self:
            batch.append(sample)
            size += len(sample.text)
            if size >= batch_bytes:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _of_text(self, file: InputFile) -> Iterator[Sample]:
        text = read_text(file, self._config.max_record_bytes)
        if isinstance(text, Reject):
            self.rejected[text.reason] += 1
        else:
            yield Sample(file.name, "", text)

    def _of_records(self, file: InputFile) -> Iterator[Sample]:
        columns = [*self._fields, "id"]
        for item in read_records(file, columns, self._config.max_record_bytes, needs=self._config.text_field):
            if isinstance(item, Reject):
                self.rejected[item.reason] += 1
                continue
            text, source, language = (item.fields.get(name) for name in self._fields)
            if not isinstance(text, str):
                self.rejected["missing_field" if text is None else "wrong_type"] += 1
                continue
            if not isinstance(source, str):
                begin, slash, _ = str(item.fields.get("id", "")).partition("/")
                source = begin if slash else file.name
            yield Sample(source, language if isinstance(language, str) else "", text)
