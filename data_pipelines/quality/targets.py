"""Conversations of the targets that training data is compared with."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_pipelines.documents import read_batches
from data_pipelines.quality.model_files import expand
from slmjax.config import InfluenceConfig


def read_targets(config: InfluenceConfig) -> dict[str, list[list[dict[str, Any]]]]:
    """Reads the first conversations of every target, by name.

    Raises:
      ValueError: a target has no parquet files, or these no messages.
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
    if "messages" not in pq.read_schema(path).names:
        raise ValueError(f"{path} has no column messages; a target needs conversations")
    for batch in read_batches(path, ["messages"]):
        yield from batch.column(0).to_pylist()
