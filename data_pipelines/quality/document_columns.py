"""Columns of documents that are scored, checked: an error names the file and the document."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def require_columns(path: Path, columns: Collection[str], *, kind: str = "documents") -> None:
    """Raises ValueError where `path` is no parquet file with these columns, and so holds nothing of this kind."""
    try:
        names = pq.read_schema(path).names
    except pa.ArrowException as error:
        raise ValueError(f"{path} is not parquet, or is damaged: {error}") from error
    if missing := set(columns) - set(names):
        raise ValueError(f"{path} has no column {' and no '.join(sorted(missing))}; it holds no {kind}")


def require_messages(path: Path, ids: pa.Array, messages: pa.Array, check: Callable[[Any], None]) -> None:
    """Raises ValueError where `check`, such as `check_messages`, raises it for a conversation of `path`."""
    for name, conversation in zip(ids.to_pylist(), messages.to_pylist(), strict=True):
        try:
            check(conversation)
        except ValueError as error:
            raise ValueError(f"{path}: document {name}: {error}") from error


def require_texts(path: Path, ids: pa.Array, texts: pa.Array) -> None:
    """Raises ValueError where a document of `path` has no text."""
    if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
        raise ValueError(f"{path}: texts must be strings, got {texts.type}")
    if texts.null_count:
        raise ValueError(f"{path}: document {ids.filter(texts.is_null())[0]} has no text")
