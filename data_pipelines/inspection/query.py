"""Which documents to show: conditions, an order or a sample, a number of them; in one pass, with little in memory."""

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines.inspection.corpora import Block, Corpus
from data_pipelines.inspection.visible import visible
from slmjax.data.tokenizer import Tokenizer

_CONDITION = re.compile(r"\s*([^<>=!\s]+)\s*(<=|>=|!=|==|=|<|>)\s*(.+?)\s*")
_OPERATORS = {"<": "less", "<=": "less_equal", ">": "greater", ">=": "greater_equal", "!=": "not_equal"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Query:
    """What is asked for.

    Attributes:
      kept: only documents that no stage dropped; False only dropped ones, None both.
      reason: the rule that dropped them, or stage and rule.
      source: of this source.
      where: conditions such as "words<100", all of which must hold.
      sort: an attribute or column; its lowest values come first.
      descending: its highest values come first.
      sample: a random sample that depends on this seed and on the ids alone.
      limit: at most so many; None is all, which goes with neither sort nor sample.
      excerpt: characters of the text.
      tokens: with the pieces of the text.
    """

    kept: bool | None = None
    reason: str | None = None
    source: str | None = None
    where: tuple[str, ...] = ()
    sort: str | None = None
    descending: bool = False
    sample: int | None = None
    limit: int | None = 10
    excerpt: int = 300
    tokens: bool = False

    def __post_init__(self):
        if self.sort is not None and self.sample is not None:
            raise ValueError("--sort and --sample are two orders; give one of them")
        if self.limit is None and (self.sort is not None or self.sample is not None):
            raise ValueError("--sort and --sample need a --limit: what is shown is held in memory")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One document: what is known of it, what was measured, and how its text begins."""

    known: dict[str, Any]
    attributes: dict[str, Any]
    excerpt: str
    shortened: bool
    pieces: tuple[str, ...] | None
    ids: tuple[int, ...] | None


def select(corpus: Corpus, query: Query, tokenizer: Tokenizer | None = None) -> Iterator[Record]:
    """The documents that a query asks for. Raises ValueError for a name that is not known."""
    chosen = _Chosen(corpus, query)
    tokenizer = tokenizer or corpus.tokenizer()
    if query.tokens and tokenizer is None:
        raise ValueError("--tokens needs the model of a tokenizer: name it with --tokenizer")
    if chosen.key is None:
        number = 0
        for block in corpus.blocks():
            rows = np.flatnonzero(chosen.mask(block))
            rows = rows if query.limit is None else rows[: query.limit - number]
            number += len(rows)
            for first in range(0, len(rows), 64):  # texts of so many at one time
                yield from _records(corpus, block, rows[first : first + 64].tolist(), query, tokenizer)
            if query.limit is not None and number >= query.limit:
                return
        return
    best: list[tuple[Any, int, Record]] = []
    seen = 0
    for block in corpus.blocks():
        rows = np.flatnonzero(chosen.mask(block))
        keys, rows = chosen.keys(block, rows)
        assert query.limit is not None
        order = np.argsort(keys, kind="stable")[: query.limit]
        if len(best) == query.limit:
            order = order[keys[order] < best[-1][0]]
        picked = rows[order].tolist()
        records = _records(corpus, block, picked, query, tokenizer)
        added = [(keys[i], seen + row, record) for i, row, record in zip(order, picked, records, strict=True)]
        best = sorted([*best, *added], key=lambda each: each[:2])[: query.limit]
        seen += block.num_documents
    yield from (record for _, _, record in best)


class _Chosen:
    """Decides on the rows of blocks."""

    def __init__(self, corpus: Corpus, query: Query):
        self._query = query
        self._conditions = [_condition(corpus, text) for text in query.where]
        for name, wanted in (("reason", query.kept is not None or query.reason), ("source", query.source)):
            if wanted and name not in corpus.columns:
                raise ValueError(f"of these documents no {name} is known; --{name} is for the output of a pipeline")
        self.key = "id" if query.sample is not None else query.sort and resolve(corpus, query.sort)

    def mask(self, block: Block) -> np.ndarray:
        """Which documents of a block are wanted."""
        wanted = np.ones(block.num_documents, bool) if block.present is None else block.present.copy()
        if self._query.kept is not None or self._query.reason is not None:
            reasons = block.column("reason")
            if self._query.kept is not None:
                wanted &= reasons.is_null().to_numpy(zero_copy_only=False) == self._query.kept
            if self._query.reason is not None:
                wanted &= _names_rule(reasons, self._query.reason)
        if self._query.source is not None:
            wanted &= _true(pc.call_function("equal", [block.column("source"), pa.scalar(self._query.source)]))
        for name, operator, value in self._conditions:
            if wanted.any():
                wanted &= _holds(block.column(name), operator, value)
        return wanted

    def keys(self, block: Block, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the rows are ordered by, lowest first; rows without a value are left out."""
        assert self.key is not None
        values = block.column(self.key).take(pa.array(rows))
        if self._query.sample is not None:
            return np.array([_draw(self._query.sample, name) for name in values.to_pylist()], np.uint64), rows
        if pa.types.is_fixed_size_list(values.type):
            values = pa.array([None if each is None else max(each) for each in values.to_pylist()], pa.float64())
        known = ~values.is_null(nan_is_null=True).to_numpy(zero_copy_only=False)
        if pa.types.is_string(values.type):
            if self._query.descending:
                raise ValueError(f"{self.key} is text, which --descending does not sort")
            return values.filter(pa.array(known)).to_numpy(zero_copy_only=False), rows[known]
        numbers = values.filter(pa.array(known)).cast(pa.float64()).to_numpy(zero_copy_only=False)
        return (-numbers if self._query.descending else numbers), rows[known]


def resolve(corpus: Corpus, name: str) -> str:
    """The column or attribute that a name, perhaps without its stage, stands for."""
    known = [*corpus.columns, *corpus.attributes]
    if name in known:
        return name
    ending = [each for each in known if each.endswith(f".{name}")]
    if len(ending) == 1:
        return ending[0]
    if ending:
        raise ValueError(f"{name!r} was measured by several stages, say which: {visible(', '.join(ending))}")
    raise ValueError(f"there is no attribute {name!r}, only {visible(', '.join(known))}")


def _condition(corpus: Corpus, text: str) -> tuple[str, str, Any]:
    parts = _CONDITION.fullmatch(text)
    if parts is None:
        raise ValueError(
            f"--where takes an attribute, one of < <= > >= = != and a value, such as 'words<100'; got {text!r}"
        )
    name, operator, value = parts.groups()
    try:
        return resolve(corpus, name), operator, float(value)
    except ValueError:
        return resolve(corpus, name), operator, value


def _holds(values: pa.Array, operator: str, wanted: Any) -> np.ndarray:
    """Of a few numbers one is enough; of what is not known nothing holds."""
    if pa.types.is_null(values.type):
        return np.zeros(len(values), bool)
    if pa.types.is_fixed_size_list(values.type):
        size = values.type.list_size
        each = _holds(values.flatten(), operator, wanted)
        return np.logical_or.reduce(each.reshape(-1, size), axis=1)
    textual = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    if textual != isinstance(wanted, str):
        if textual:
            wanted = f"{wanted:g}"
        elif pa.types.is_boolean(values.type) and wanted in ("true", "false"):
            wanted = float(wanted == "true")
        else:
            raise ValueError(f"--where compares numbers with {wanted!r}, which is none")
    if not textual:
        values = values.cast(pa.float64())
    return _true(pc.call_function(_OPERATORS.get(operator, "equal"), [values, pa.scalar(wanted)]))


def _names_rule(reasons: pa.Array, wanted: str) -> np.ndarray:
    """Whether each reason is `wanted`, or is a rule of this name, or of a stage of this name."""
    unique = [name.as_py() for name in reasons.unique()]
    fits = [name for name in unique if name and wanted in (name, *name.split(".", 1))]
    return _true(pc.call_function("is_in", [reasons], pc.SetLookupOptions(pa.array(fits, pa.string()))))


def _true(found: Any) -> np.ndarray:
    return found.fill_null(False).to_numpy(zero_copy_only=False).astype(bool)


def _draw(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest(), "little")


def _records(
    corpus: Corpus, block: Block, rows: Sequence[int], query: Query, tokenizer: Tokenizer | None
) -> list[Record]:
    if not rows:
        return []
    where = pa.array(rows)
    known = {name: block.column(name).take(where).to_pylist() for name in corpus.columns}
    attributes = {name: block.column(name).take(where).to_pylist() for name in corpus.attributes}
    records = []
    for i, text in enumerate(block.texts(rows)):
        ids = None
        if query.tokens and tokenizer is not None:
            # A token has at least one character of the excerpt, so that no more are needed.
            found = block.ids(rows[i]) if block.ids else tokenizer.encode(text[: query.excerpt])
            ids = tuple(int(each) for each in found[: query.excerpt])
        records.append(
            Record(
                known={name: values[i] for name, values in known.items()},
                attributes={name: values[i] for name, values in attributes.items()},
                excerpt=text[: query.excerpt],
                shortened=len(text) > query.excerpt,
                pieces=None if ids is None or tokenizer is None else tuple(map(tokenizer.piece, ids)),
                ids=ids,
            )
        )
    return records
