"""What the stages up to one of them decided: of every document why it was dropped, its duplicate, what is cut from it.

Each stage writes the verdicts of a shard anew, from those of the stage before, so that the last ones say everything.
"""

import collections
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipelines.documents import Shard, columns, parquet_writer

_CUT = pa.struct([("start", pa.int64()), ("end", pa.int64())])
_SCHEMA = pa.schema([("reason", pa.string()), ("duplicate_of", pa.string()), ("cuts", pa.list_(_CUT))])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cuts:
    """What is cut from texts: the bytes [start, end) of a row's. Sorted by row and start; no two overlap or touch."""

    rows: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> "Cuts":
        """Cuts from any that may overlap, in any order."""
        order = np.lexsort((starts, rows))
        rows, starts, ends = rows[order], starts[order], ends[order]
        far = int(ends.max(initial=0)) + 1  # rows lie further apart than any text is long
        reached = np.maximum.accumulate(rows * far + ends)
        first = np.ones(len(rows), bool)
        first[1:] = rows[1:] * far + starts[1:] > reached[:-1]
        begins = np.flatnonzero(first)
        last = np.append(begins[1:], len(rows))[: len(begins)] - 1
        return cls(rows=rows[begins], starts=starts[begins], ends=reached[last] - rows[begins] * far)

    @classmethod
    def none(cls) -> "Cuts":
        """Nothing is cut."""
        empty = np.zeros(0, np.int64)
        return cls(rows=empty, starts=empty, ends=empty)

    def __or__(self, other: "Cuts") -> "Cuts":
        mine, others = (self.rows, self.starts, self.ends), (other.rows, other.starts, other.ends)
        return Cuts.of(*(np.concatenate(pair) for pair in zip(mine, others, strict=True)))

    def bytes(self, num_documents: int) -> np.ndarray:
        """How much is cut from each text."""
        return np.bincount(self.rows, self.ends - self.starts, num_documents).astype(np.int64)

    def apply(self, row: int, text: str) -> str:
        """Returns what is left of the text of a row."""
        first, last = np.searchsorted(self.rows, [row, row + 1])
        content, pieces, position = text.encode(), [], 0
        for start, end in zip(self.starts[first:last].tolist(), self.ends[first:last].tolist(), strict=True):
            pieces.append(content[position:start])
            position = end
        return b"".join([*pieces, content[position:]]).decode()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdicts:
    """Of the documents of one shard, in order.

    Attributes:
      reasons: "<step>.<rule>" that dropped the document, "" while it is alive.
      duplicate_of: id of the document that was kept instead, None where there is none.
      cuts: from the texts.
    """

    reasons: np.ndarray
    duplicate_of: np.ndarray
    cuts: Cuts

    @classmethod
    def load(cls, root: Path, step: str | None, shard: Shard) -> "Verdicts":
        """Reads the verdicts that `step` left; all are alive where it is None."""
        if step is None:
            nothing = np.full(shard.documents, None, object)
            return cls(reasons=np.full(shard.documents, "", object), duplicate_of=nothing, cuts=Cuts.none())
        path = verdicts_path(root, step, shard)
        lists, reasons, originals = columns(path, ["cuts", "reason", "duplicate_of"])
        rows = np.repeat(np.arange(len(lists)), lists.value_lengths().to_numpy())
        starts, ends = (lists.flatten().field(i).to_numpy() for i in range(2))
        return cls(
            reasons=reasons.fill_null("").to_numpy(zero_copy_only=False),
            duplicate_of=originals.to_numpy(zero_copy_only=False),
            cuts=Cuts(rows=rows, starts=starts, ends=ends),
        )

    @property
    def alive(self) -> np.ndarray:
        """Which documents no stage has dropped."""
        return self.reasons == ""

    def after(
        self, step: str, rules: np.ndarray, duplicate_of: np.ndarray | None = None, cuts: Cuts | None = None
    ) -> "Verdicts":
        """Returns the verdicts after `step`.

        Args:
          step: name of the stage.
          rules: of each document the rule that drops it, "" to keep it; of no account where it was dropped before.
          duplicate_of: of each document that is dropped, the one that is kept instead, or None.
          cuts: besides those of earlier steps.
        """
        dropped = self.alive & (rules != "")
        reasons, originals = self.reasons.copy(), self.duplicate_of.copy()
        reasons[dropped] = [f"{step}.{rule}" for rule in rules[dropped]]
        if duplicate_of is not None:
            originals[dropped] = duplicate_of[dropped]
        return Verdicts(
            reasons=reasons,
            duplicate_of=originals,
            cuts=self.cuts if cuts is None else self.cuts | cuts,
        )

    def save(self, path: Path) -> None:
        """Writes the verdicts, a row for each document."""
        bounds = [pa.array(self.cuts.starts, pa.int64()), pa.array(self.cuts.ends, pa.int64())]
        cuts = pa.StructArray.from_arrays(bounds, fields=list(_CUT))
        offsets = np.searchsorted(self.cuts.rows, np.arange(len(self.reasons) + 1)).astype(np.int32)
        columns = [
            pa.array(self.reasons, pa.string(), mask=self.alive),
            pa.array(self.duplicate_of, pa.string()),
            pa.ListArray.from_arrays(offsets, cuts, type=_SCHEMA.field("cuts").type),
        ]
        with parquet_writer(path, _SCHEMA) as writer:
            writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))

    def counts(self, step: str, sizes: np.ndarray) -> dict[str, Any]:
        """What is kept, and what `step` dropped by rule, as JSON values; `sizes` are the bytes of the texts as read."""
        alive = self.alive
        kept_bytes = int((sizes - self.cuts.bytes(len(sizes)))[alive].sum())
        dropped = {
            reason.removeprefix(f"{step}."): number
            for reason, number in sorted(collections.Counter(self.reasons).items())
            if reason.startswith(f"{step}.")
        }
        return {"kept": int(alive.sum()), "kept_bytes": kept_bytes, "dropped": dropped}


def verdicts_path(root: Path, step: str, shard: Shard) -> Path:
    """Where the verdicts after a step are."""
    return root / "work" / "verdicts" / step / f"{shard.name}.parquet"
