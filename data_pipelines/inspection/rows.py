"""Rows and columns of parquet files, of which no more is read than is asked for."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def take(path: Path, rows: Sequence[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Some rows of a file, in the order of `rows`; reads the row groups that hold them."""
    found: dict[int, dict[str, Any]] = {}
    wanted = sorted(set(rows))
    start = 0
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            here = [row for row in wanted if start <= row < end]
            if here:
                table = file.read_row_group(group, columns=columns, use_threads=False)
                picked = table.take(pa.array([row - start for row in here])).to_pylist()
                found.update(zip(here, picked, strict=True))
            start = end
    return [found[row] for row in rows]


def groups_between(path: Path, name: str, low: str, high: str) -> Iterator[tuple[int, pa.Array]]:
    """The row groups whose statistics let a text column hold values in [low, high]: first row, and the column."""
    start = 0
    with pq.ParquetFile(path) as file:
        leaf = next(i for i in range(file.metadata.num_columns) if file.schema.column(i).path == name)
        for group in range(file.num_row_groups):
            described = file.metadata.row_group(group)
            statistics = described.column(leaf).statistics
            if statistics is None or _may_hold(statistics, described.num_rows, low, high):
                table = file.read_row_group(group, columns=[name], use_threads=False)
                yield start, table.column(0).combine_chunks()
            start += described.num_rows


def _may_hold(statistics: pq.Statistics, rows: int, low: str, high: str) -> bool:
    if statistics.null_count == rows:
        return False
    return not statistics.has_min_max or (statistics.min <= high and statistics.max >= low)


def is_shown(field: pa.Field) -> bool:
    """Whether an attribute is a value that people and conditions can look at: a number, a text, or a few numbers.

    Unsigned numbers are hashes.
    """
    kind: Any = field.type
    if pa.types.is_fixed_size_list(kind):
        kind = kind.value_type if kind.list_size <= 16 else pa.null()
    signed = pa.types.is_signed_integer(kind) or pa.types.is_floating(kind)
    return field.name != "id" and (signed or pa.types.is_boolean(kind) or pa.types.is_string(kind))
