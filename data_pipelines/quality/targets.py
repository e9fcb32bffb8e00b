"""Conversations of the targets that training data is compared with."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipelines.documents import read_batches
from data_pipelines.quality.document_columns import require_columns, require_messages
from data_pipelines.quality.model_files import expand
from slmjax.config import InfluenceConfig
from slmjax.data.conversations import check_answered


def read_targets(config: InfluenceConfig) -> dict[str, list[list[dict[str, Any]]]]:
    """Reads the first conversations of every target, by name.

    Raises:
      ValueError: a target has no parquet files, or these are damaged, or hold anything but conversations with answers.
    """
    targets: dict[str, list[list[dict[str, Any]]]] = {}
    for target in config.targets:
        paths = sorted(expand(target.path).glob("*.parquet"))
        if not paths:
            raise ValueError(f"target {target.name!r}: {target.path} has no parquet files, as a pipeline's documents/")
        conversations = itertools.chain.from_iterable(map(_conversations, paths))
        targets[target.name] = list(itertools.islice(conversations, target.max_documents))
    return targets


def _conversations(path: Path) -> Iterator[list[dict[str, Any]]]:
    require_columns(path, ("id", "messages"), kind="conversations, which a target needs")
    for batch in read_batches(path, ["id", "messages"]):
        ids, messages = batch.column("id"), batch.column("messages")
        require_messages(path, ids, messages, check_answered)
        yield from messages.to_pylist()
