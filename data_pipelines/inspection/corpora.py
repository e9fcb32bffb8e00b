"""Documents wherever they lie: a pipeline's output, parquet and jsonl files, a token store. All as blocks of columns.

A block is what is in memory at one time; of its columns and texts only those are read that are asked for.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from data_pipelines.documents import Shard, column
from data_pipelines.inspection.output import Output
from data_pipelines.inspection.rows import take
from data_pipelines.measuring import measure_path
from slmjax.data.token_store import TokenStore
from slmjax.data.tokenizer import Tokenizer

_STORE_DOCUMENTS = 4096  # of a token store, in one block


class Block:
    """Some documents.

    Attributes:
      num_documents: how many.
      present: which of them belong to what is looked at; None is all.
    """

    def __init__(
        self,
        num_documents: int,
        read: Callable[[str], pa.Array],
        texts: Callable[[Sequence[int]], list[str]],
        *,
        ids: Callable[[int], np.ndarray] | None = None,
        present: np.ndarray | None = None,
    ):
        self.num_documents = num_documents
        self.present = present
        self.texts = texts
        self.ids = ids  # of the tokens of a document, where they are known
        self._read = read
        self._columns: dict[str, pa.Array] = {}

    def column(self, name: str) -> pa.Array:
        """A column; it is read once."""
        if name not in self._columns:
            self._columns[name] = self._read(name)
        return self._columns[name]


class Corpus(Protocol):
    """Documents.

    Attributes:
      columns: what is known of every document: id and others.
      attributes: what stages measured, as "<stage>.<attribute>", or the other columns of a file.
      problems: records that could not be read, by reason; known once the blocks were gone through.
    """

    columns: list[str]
    attributes: list[str]
    problems: collections.Counter[str]

    def blocks(self) -> Iterator[Block]:
        """All documents, in order."""
        ...

    def tokenizer(self) -> Tokenizer | None:
        """The one that goes with the documents, where there is one."""
        ...


class PipelineCorpus:
    """The documents of a pipeline, with what its stages measured and decided.

    `step` shows those that reached this stage, and what it alone measured and decided.
    """

    def __init__(self, output: Output, step: str | None = None):
        self._output = output
        self._step = step
        self._last = step or (output.decided[-1] if output.decided else None)
        self.columns = ["id", "source", "bytes", "reason", "duplicate_of", "side"]
        if not output.shards:
            done = "read" in output.finished
            why = "could not read one: see --step quarantine" if done else "has not finished reading"
            raise ValueError(f"{output.root} has no documents: its last run {why}")
        first = output.shards[0]
        measured = [step] if step else output.decided
        self.attributes = [f"{stage}.{name}" for stage in measured for name in output.attributes(stage, first)]
        self.problems: collections.Counter[str] = collections.Counter()

    def require_source(self, name: str) -> None:
        """Raises ValueError where no source is called so."""
        names = sorted({shard.source for shard in self._output.shards})
        if name not in names:
            raise ValueError(f"{self._output.root} has no source {name!r}, only {', '.join(names)}")

    def require_rule(self, name: str) -> None:
        """Raises ValueError where no stage is called so, or has a rule of this name."""
        rules = self._output.rules()
        known = [f"{stage}.{rule}" for stage, own in rules.items() for rule in own]
        if name not in (*rules, *itertools.chain(*rules.values()), *known):
            raise ValueError(f"{self._output.root} has no stage or rule {name!r}, only {', '.join(known) or 'none'}")

    def blocks(self) -> Iterator[Block]:
        """A block for each shard."""
        before = self._output.before(self._step) if self._step else None
        for shard in self._output.shards:
            present = None
            if before is not None:
                present = self._output.verdicts(before, shard, "reason").is_null().to_numpy(zero_copy_only=False)
            yield Block(
                shard.documents,
                functools.partial(self._column, shard),
                functools.partial(self._texts, shard),
                present=present,
            )

    def _column(self, shard: Shard, name: str) -> pa.Array:
        if name == "source":
            return pa.repeat(pa.scalar(shard.source), shard.documents)
        if name in ("reason", "duplicate_of"):
            if self._last is None:
                return pa.nulls(shard.documents, pa.string())
            return self._output.verdicts(self._last, shard, name)
        if name == "side":
            return self._sides(shard)
        if name in ("id", "bytes"):
            return column(self._output.texts(shard), name)
        stage, _, attribute = name.partition(".")
        return column(measure_path(self._output.root, stage, shard), attribute)

    def _sides(self, shard: Shard) -> pa.Array:
        """Train or held_out for what is kept, once that is decided."""
        path = self._output.root / "work" / "decisions" / f"{shard.name}.parquet"
        if "select" not in self._output.finished:
            return pa.nulls(shard.documents, pa.string())
        reasons, sides = column(path, "reason").to_pylist(), column(path, "held_out").to_pylist()
        names = (None if why else "held_out" if side else "train" for why, side in zip(reasons, sides, strict=True))
        return pa.array(names, pa.string())

    def _texts(self, shard: Shard, rows: Sequence[int]) -> list[str]:
        return [row["text"] for row in take(self._output.texts(shard), rows, ["text"])]

    def tokenizer(self) -> Tokenizer | None:
        """The one that was trained here, or that the config names."""
        config = self._output.config
        named = Path(getattr(config.tokenizer, "path", "")).expanduser() if config else Path()
        found = [path for path in (self._output.root / "tokenizer.model", named) if path.is_file()]
        return Tokenizer.load(found[0]) if found else None


class QuarantineCorpus:
    """Records that a pipeline could not use."""

    def __init__(self, output: Output):
        self._output = output
        self.columns = ["id", "source", "reason"]
        self.attributes = ["record", "detail"]
        self.problems: collections.Counter[str] = collections.Counter()

    def blocks(self) -> Iterator[Block]:
        """Blocks of a thousand."""
        for rows in chunks(self._output.quarantine(), 1000):
            rows = [{**row, "id": f"{row['file']}:{row['record']}"} for row in rows]
            yield block_of(rows, "excerpt")

    def tokenizer(self) -> None:
        """There is none."""
        return None


class StoreCorpus:
    """The documents of a token store, decoded; ids are their numbers."""

    def __init__(self, path: Path, tokenizer: Path | None = None):
        self._store = TokenStore.open(path)
        beside = path.resolve().parent / "tokenizer.model"
        plan = path.resolve().parent / "work" / "plan.json"
        if tokenizer is not None:
            self._tokenizer = Tokenizer.load(tokenizer)
        elif beside.is_file():
            self._tokenizer = Tokenizer.load(beside)
        else:
            self._tokenizer = PipelineCorpus(Output(plan.parents[1])).tokenizer() if plan.is_file() else None
        wanted = self._store.metadata.tokenizer_sha256
        if self._tokenizer is None or self._tokenizer.sha256 != wanted:
            raise ValueError(
                f"{path} was written with the tokenizer {wanted[:16]}..., which is not beside it: name its model with "
                "--tokenizer"
            )
        self.columns = ["id", "tokens"]
        self.attributes: list[str] = []
        self.problems: collections.Counter[str] = collections.Counter()

    def blocks(self) -> Iterator[Block]:
        """Blocks of a few thousand documents."""
        for first in range(0, self._store.num_documents, _STORE_DOCUMENTS):
            starts = self._store.starts(first, min(first + _STORE_DOCUMENTS, self._store.num_documents) + 1)
            columns = {
                "id": pa.array([str(first + i) for i in range(len(starts) - 1)]),
                "tokens": pa.array(np.diff(starts)),
            }
            yield Block(
                len(starts) - 1,
                columns.__getitem__,
                functools.partial(self._texts, first),
                ids=functools.partial(self._ids, first),
            )

    def _ids(self, first: int, row: int) -> np.ndarray:
        return self._store.document(first + row)

    def _texts(self, first: int, rows: Sequence[int]) -> list[str]:
        assert self._tokenizer is not None
        return [self._tokenizer.decode(self._ids(first, row).tolist()) for row in rows]

    def tokenizer(self) -> Tokenizer | None:
        """The one that the store was written with."""
        return self._tokenizer

    def metadata(self) -> dict[str, Any]:
        """What the store says of itself."""
        described = self._store.metadata
        names = ("num_documents", "num_tokens", "num_bytes", "vocab_size", "dtype", "with_weights", "tokenizer_sha256")
        return {name: getattr(described, name) for name in names} | {"shards": len(described.shards)}


def chunks(rows: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Rows, so many at one time."""
    chunk: list[dict[str, Any]] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def block_of(rows: list[dict[str, Any]], text: str) -> Block:
    """A block of records that are in memory; values of differing types become text."""

    def read(name: str) -> pa.Array:
        values = [row.get(name) for row in rows]
        try:
            return pa.array(values)
        except pa.ArrowException:
            return pa.array([None if value is None else str(value) for value in values], pa.string())

    return Block(len(rows), read, lambda wanted: [as_text(rows[row].get(text)) for row in wanted])


def as_text(value: Any) -> str:
    """A text, or a conversation as one."""
    if isinstance(value, list):  # messages
        return "\n\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in value if isinstance(turn, dict))
    return "" if value is None else str(value)
