"""What there is, in numbers: the range of every attribute beside its bounds, in one pass and in little memory."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from data_pipelines.inspection.corpora import Block, Corpus, PipelineCorpus
from data_pipelines.inspection.output import Output
from data_pipelines.stages.hashed_words import mix

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_SAMPLE = 1 << 16  # documents whose values are remembered; of more, a random half, quarter, ...


class Range(NamedTuple):
    """Of one number of the documents that have it.

    Attributes:
      exact: whether the quantiles are those of all documents, not of a sample.
    """

    documents: int
    low: float
    high: float
    quantiles: tuple[float, ...]
    exact: bool


class _Values:
    """Values of one attribute, all of them or a random part that depends on the documents' numbers alone."""

    def __init__(self) -> None:
        self._documents = 0
        self._low, self._high = np.inf, -np.inf
        self._kept: list[tuple[np.ndarray, np.ndarray]] = []
        self._ceiling = np.uint64(0xFFFFFFFFFFFFFFFF)

    def add(self, numbers: np.ndarray, values: np.ndarray) -> None:
        known = ~np.isnan(values)
        values, draws = values[known], mix(numbers[known].astype(np.uint64))
        if not len(values):
            return
        self._documents += len(values)
        self._low, self._high = min(self._low, values.min()), max(self._high, values.max())
        chosen = draws <= self._ceiling
        self._kept.append((draws[chosen], values[chosen]))
        while sum(len(draws) for draws, _ in self._kept) > _SAMPLE:
            self._ceiling >>= np.uint64(1)
            whole = [np.concatenate(part) for part in zip(*self._kept, strict=True)]
            chosen = whole[0] <= self._ceiling
            self._kept = [(whole[0][chosen], whole[1][chosen])]

    def range(self) -> Range | None:
        if not self._documents:
            return None
        values = np.concatenate([values for _, values in self._kept])
        quantiles = tuple(np.quantile(values, QUANTILES, method="nearest").tolist())
        return Range(self._documents, float(self._low), float(self._high), quantiles, len(values) == self._documents)


def ranges(blocks: Iterator[tuple[Block, np.ndarray | None]], names: Mapping[str, None]) -> dict[str, Range]:
    """Ranges of the numbers among some columns; each block with the rows that count, None for all."""
    values: dict[str, _Values] = {}
    start = 0
    for block, present in blocks:
        numbers = np.arange(start, start + block.num_documents)
        start += block.num_documents
        for name in names:
            for part, column in _numbers(name, block.column(name)):
                rows = slice(None) if present is None else present
                values.setdefault(part, _Values()).add(numbers[rows], column[rows])
    found = {name: each.range() for name, each in values.items()}
    return {name: each for name, each in found.items() if each is not None}


def _numbers(name: str, column: pa.Array) -> Iterator[tuple[str, np.ndarray]]:
    kind: Any = column.type
    if pa.types.is_fixed_size_list(kind):
        flat = column.flatten().cast(pa.float64()).to_numpy(zero_copy_only=False)
        if len(flat) == len(column) * kind.list_size:
            for i in range(kind.list_size):
                yield f"{name}[{i}]", flat[i :: kind.list_size]
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        yield name, column.cast(pa.float64()).to_numpy(zero_copy_only=False)


def of_corpus(corpus: Corpus) -> dict[str, Range]:
    """Ranges of the numbers of all documents."""
    return ranges(((block, block.present) for block in corpus.blocks()), dict.fromkeys(_countable(corpus)))


def _countable(corpus: Corpus) -> list[str]:
    return [name for name in (*corpus.columns, *corpus.attributes) if name not in ("id", "source", "reason", "side")]


def of_stages(output: Output) -> dict[str, dict[str, Range]]:
    """Of each stage that the last run has finished, the ranges of what it measured of the documents that reached it."""
    found: dict[str, dict[str, Range]] = {}
    for stage in output.decided:
        corpus = PipelineCorpus(output, stage)
        blocks = ((block, block.present) for block in corpus.blocks())
        of_stage = ranges(blocks, dict.fromkeys(corpus.attributes))
        found[stage] = {name.removeprefix(f"{stage}."): each for name, each in of_stage.items()}
    return found
