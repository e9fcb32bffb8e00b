"""manifest.json: what came in, what was dropped and why, and what came out. The same for the same input and config."""

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.documents import Shard
from slmjax import files

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Count:
    """Documents and the UTF-8 bytes of their text."""

    documents: int = 0
    bytes: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(documents=self.documents + other.documents, bytes=self.bytes + other.bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCounts:
    """What one step did to the documents of one source.

    Attributes:
      step: "read" or the name of a stage.
      dropped: documents by reason; for "read" records that went to quarantine or were passed over.
      changes: what was changed in the texts of the documents that reached the step, by kind.
    """

    step: str
    source: str
    kept: Count
    dropped: dict[str, int]
    changes: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitCounts:
    """One token store.

    Attributes:
      bytes: UTF-8 bytes of the documents; of conversations, of all turns.
      tokens: ids, with bos, eos and the marks of the turns.
      learned_bytes: bytes of the text that is learned; for conversations those of the assistant's turns.
    """

    documents: int
    bytes: int
    tokens: int
    learned_bytes: int

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for each id."""
        return self.bytes / self.tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a corpus that is not a measurement of time.

    Attributes:
      config: as JSON, with class names; without output_dir and num_workers, on which nothing depends.
      steps: the funnel, in order, a row for each step and source.
      splits: by the name of the store: train and held_out.
    """

    format_version: int
    config_sha256: str
    config: dict[str, Any]
    versions: dict[str, str]
    tokenizer_sha256: str
    vocab_size: int
    steps: tuple[StepCounts, ...]
    splits: dict[str, SplitCounts]

    def save(self, path: Path) -> None:
        """Writes the manifest as JSON; bytes_per_token is written beside the counts."""
        content = dataclasses.asdict(self)
        for name, split in self.splits.items():
            content["splits"][name]["bytes_per_token"] = round(split.bytes_per_token, 4)
        files.write_text(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """Reads what `save` wrote. Raises ValueError naming the file where it is damaged."""
        stored = path.read_bytes()
        try:
            content = json.loads(stored)
            content["steps"] = tuple(StepCounts(**{**step, "kept": Count(**step["kept"])}) for step in content["steps"])
            for split in content["splits"].values():
                del split["bytes_per_token"]
            content["splits"] = {name: SplitCounts(**split) for name, split in content["splits"].items()}
            return cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read ({error}); it is damaged: run the pipeline again") from error


def count_step(step: str, shards: Sequence[Shard], verdicts: Sequence[Mapping[str, Any]]) -> list[StepCounts]:
    """Sums, by source, the counts of the verdicts of each shard after a step."""
    kept: dict[str, Count] = collections.defaultdict(Count)
    dropped: Mapping[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    changes: Mapping[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for shard, counts in zip(shards, verdicts, strict=True):
        kept[shard.source] += Count(documents=counts["kept"], bytes=counts["kept_bytes"])
        dropped[shard.source].update(counts["dropped"])
        changes[shard.source].update(counts.get("changes", {}))
    return [
        StepCounts(
            step=step,
            source=source,
            kept=count,
            dropped=dict(sorted(dropped[source].items())),
            changes=dict(changes[source]),
        )
        for source, count in kept.items()
    ]
