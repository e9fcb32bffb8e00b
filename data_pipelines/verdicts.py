"""What the stages up to one of them decided: of every document why it was dropped, its duplicate, what is cut from it.

Each stage writes the verdicts of a shard anew, from those of the stage before, so that the last ones say everything.
"""

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipelines.documents import Shard, column, parquet_writer

# Of the UTF-8 text: what stands at [start, end) is replaced.
_EDIT = pa.struct([("start", pa.int64()), ("end", pa.int64()), ("replacement", pa.string())])
_SCHEMA = pa.schema([("reason", pa.string()), ("duplicate_of", pa.string()), ("edits", pa.list_(_EDIT))])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edits:
    """Changes of texts, sorted by row and start: the bytes [start, end) of the text of a row give way to a replacement.

    Those of one row do not overlap.
    """

    rows: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    replacements: np.ndarray

    @classmethod
    def none(cls) -> "Edits":
        """No changes."""
        empty = np.zeros(0, np.int64)
        return cls(rows=empty, starts=empty, ends=empty, replacements=np.zeros(0, object))

    def union(self, other: "Edits") -> "Edits":
        """Both; where they overlap, one from the first start to the last end with the first replacement."""
        both = [np.concatenate(columns) for columns in zip(self._columns(), other._columns(), strict=True)]
        order = np.lexsort((both[2], both[1], both[0]))
        rows, starts, ends, replacements = (column[order] for column in both)
        if len(rows) == 0:
            return self
        # Ends so far, in each row: rows lie further apart than any text is long.
        far = int(ends.max()) + 1
        reached = np.maximum.accumulate(rows * far + ends)
        first = np.ones(len(rows), bool)
        first[1:] = rows[1:] * far + starts[1:] >= reached[:-1]
        begins = np.flatnonzero(first)
        last = np.append(begins[1:], len(rows)) - 1
        return Edits(
            rows=rows[begins],
            starts=starts[begins],
            ends=reached[last] - rows[begins] * far,
            replacements=replacements[begins],
        )

    def of(self, row: int) -> list[tuple[int, int, str]]:
        """Start, end and replacement of each change of one text."""
        first, last = np.searchsorted(self.rows, [row, row + 1])
        columns = (self.starts, self.ends, self.replacements)
        return list(zip(*(column[first:last].tolist() for column in columns), strict=True))

    def added_bytes(self, num_documents: int) -> np.ndarray:
        """How much longer each text becomes; less than zero where it becomes shorter."""
        added = [len(text.encode()) for text in self.replacements] - (self.ends - self.starts)
        return np.bincount(self.rows, added, num_documents).astype(np.int64)

    def _columns(self) -> tuple[np.ndarray, ...]:
        return self.rows, self.starts, self.ends, self.replacements


def edited(text: str, changes: Sequence[tuple[int, int, str]]) -> str:
    """Returns the text with changes made, each (start, end, replacement), in order."""
    content, pieces, position = text.encode(), [], 0
    for start, end, replacement in changes:
        pieces += [content[position:start], replacement.encode()]
        position = end
    return b"".join([*pieces, content[position:]]).decode()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdicts:
    """Of the documents of one shard, in order.

    Attributes:
      reasons: "<step>.<rule>" that dropped the document, "" while it is alive.
      duplicate_of: id of the document that was kept instead, None where there is none.
      edits: of the texts.
    """

    reasons: np.ndarray
    duplicate_of: np.ndarray
    edits: Edits

    @classmethod
    def load(cls, root: Path, step: str | None, shard: Shard) -> "Verdicts":
        """Reads the verdicts that `step` left; all are alive where it is None."""
        if step is None:
            nothing = np.full(shard.documents, None, object)
            return cls(reasons=np.full(shard.documents, "", object), duplicate_of=nothing, edits=Edits.none())
        path = verdicts_path(root, step, shard)
        lists = column(path, "edits")
        changes = lists.flatten()
        rows = np.repeat(np.arange(len(lists)), lists.value_lengths().to_numpy())
        starts, ends, replacements = (changes.field(i).to_numpy(zero_copy_only=False) for i in range(3))
        return cls(
            reasons=column(path, "reason").fill_null("").to_numpy(zero_copy_only=False),
            duplicate_of=column(path, "duplicate_of").to_numpy(zero_copy_only=False),
            edits=Edits(rows=rows, starts=starts, ends=ends, replacements=replacements.astype(object)),
        )

    @property
    def alive(self) -> np.ndarray:
        """Which documents no stage has dropped."""
        return self.reasons == ""

    def after(
        self, step: str, rules: np.ndarray, duplicate_of: np.ndarray | None = None, edits: Edits | None = None
    ) -> "Verdicts":
        """Returns the verdicts after `step`.

        Args:
          step: name of the stage.
          rules: of each document the rule that drops it, "" to keep it; of no account where it was dropped before.
          duplicate_of: of each document that is dropped, the one that is kept instead, or None.
          edits: to be made besides those of earlier steps.
        """
        dropped = self.alive & (rules != "")
        reasons, originals = self.reasons.copy(), self.duplicate_of.copy()
        reasons[dropped] = [f"{step}.{rule}" for rule in rules[dropped]]
        if duplicate_of is not None:
            originals[dropped] = duplicate_of[dropped]
        return Verdicts(
            reasons=reasons,
            duplicate_of=originals,
            edits=self.edits if edits is None else self.edits.union(edits),
        )

    def save(self, path: Path) -> None:
        """Writes the verdicts, a row for each document."""
        changes = pa.StructArray.from_arrays(
            [
                pa.array(self.edits.starts, pa.int64()),
                pa.array(self.edits.ends, pa.int64()),
                pa.array(self.edits.replacements, pa.string()),
            ],
            fields=list(_EDIT),
        )
        offsets = np.searchsorted(self.edits.rows, np.arange(len(self.reasons) + 1)).astype(np.int32)
        columns = [
            pa.array([reason or None for reason in self.reasons], pa.string()),
            pa.array(self.duplicate_of, pa.string()),
            pa.ListArray.from_arrays(offsets, changes, type=_SCHEMA.field("edits").type),
        ]
        with parquet_writer(path, _SCHEMA) as writer:
            writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))

    def counts(self, step: str, sizes: np.ndarray) -> dict[str, Any]:
        """What is kept, and what `step` dropped by rule, as JSON values; `sizes` are the bytes of the texts as read."""
        alive = self.alive
        kept_bytes = int((sizes + self.edits.added_bytes(len(sizes)))[alive].sum())
        dropped = collections.Counter(
            reason.removeprefix(f"{step}.") for reason in self.reasons if reason.startswith(f"{step}.")
        )
        return {"kept": int(alive.sum()), "kept_bytes": kept_bytes, "dropped": dict(sorted(dropped.items()))}


def verdicts_path(root: Path, step: str, shard: Shard) -> Path:
    """Where the verdicts after a step are."""
    return root / "work" / "verdicts" / step / f"{shard.name}.parquet"
