"""What a report says of numbers: counted shard by shard, and added up."""

import collections
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines import tasks
from data_pipelines.documents import Shard, column, read_batches
from data_pipelines.measuring import measure_path
from data_pipelines.report import bounds
from data_pipelines.report.samples import Kind, Sample, choose, merge
from data_pipelines.report.sketch import Sketch
from data_pipelines.selecting import documents_path
from data_pipelines.stages.ranges import Ranges
from data_pipelines.stages.texts import Texts
from data_pipelines.verdicts import verdicts_path
from slmjax import files
from slmjax.config import PassageDedupConfig, SubstringDedupConfig
from slmjax.config.pipeline import StageConfig

_CHOSEN = pa.schema([("bytes", pa.int64()), ("held_out", pa.bool_())])
_CHANGES = ("removed_", "masked_")
_NO_MEASUREMENT = ("id", "noise")
_MOST_VALUES = 200  # of an attribute that is a word; the rest count together


@dataclasses.dataclass(frozen=True, kw_only=True)
class SummaryTask(tasks.Task):
    """Summarises one shard, the one with the number `part`. `stages` are all of them in order, by name."""

    shard: Shard
    part: int
    stages: tuple[tuple[str, StageConfig], ...]

    @property
    def extent(self) -> tasks.Extent:
        """The shard."""
        return tasks.Extent(self.shard.bytes, self.shard.documents)


@dataclasses.dataclass
class Attribute:
    """An attribute, over the documents that reached the stage that measures it.

    Attributes:
      kept, dropped: numbers, by what the stage did with the document.
      outside: documents beyond each bound, by rule.
      values: of an attribute that is a word, how many documents have each and how many of these are selected.
    """

    kept: Sketch = dataclasses.field(default_factory=Sketch)
    dropped: Sketch = dataclasses.field(default_factory=Sketch)
    outside: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    values: dict[str, list[int]] = dataclasses.field(default_factory=dict)

    def add(self, content: dict[str, Any]) -> None:
        """Adds what a shard has of it."""
        self.kept += Sketch.load(content["kept"])
        self.dropped += Sketch.load(content["dropped"])
        self.outside.update(content["outside"])
        for value, counts in content["values"].items():
            before = self.values.get(value, [0, 0])
            self.values[value] = [a + b for a, b in zip(before, counts, strict=True)]
        if len(self.values) > 10 * _MOST_VALUES:
            self.values = _most_frequent(self.values)


@dataclasses.dataclass
class Summary:
    """Of the corpus.

    Attributes:
      attributes: by stage and name.
      lengths: bytes of the documents as they were "read" and as they are "selected".
      selected: documents and bytes by source and side of the split.
      duplicates: how many documents were dropped for another.
      samples: of each kind.
    """

    attributes: dict[str, dict[str, Attribute]] = dataclasses.field(default_factory=dict)
    lengths: dict[str, Sketch] = dataclasses.field(default_factory=lambda: {"read": Sketch(), "selected": Sketch()})
    selected: dict[str, dict[str, list[int]]] = dataclasses.field(default_factory=dict)
    duplicates: int = 0
    samples: dict[Kind, list[Sample]] = dataclasses.field(default_factory=dict)

    def add(self, shard: Shard, content: dict[str, Any]) -> None:
        """Adds a shard."""
        for stage, measured in content["attributes"].items():
            of_stage = self.attributes.setdefault(stage, {})
            for name, counts in measured.items():
                of_stage.setdefault(name, Attribute()).add(counts)
        for when, counts in content["lengths"].items():
            self.lengths[when] += Sketch.load(counts)
        sides = self.selected.setdefault(shard.source, {"train": [0, 0], "held_out": [0, 0]})
        for side, counts in content["selected"].items():
            sides[side] = [a + b for a, b in zip(sides[side], counts, strict=True)]
        self.duplicates += content["duplicates"]
        for names, found in content["samples"]:
            kind = Kind(*names)
            self.samples[kind] = merge(kind, [*self.samples.get(kind, []), *(Sample(*each) for each in found)])


def summary_path(root: Path, shard: Shard) -> Path:
    """Where the summary of a shard is."""
    return root / "work" / "report" / f"{shard.name}.json"


def summarise(task: SummaryTask) -> tasks.Done:
    """Writes the summary of a shard."""
    started = time.monotonic()
    root, shard = task.root, task.shard
    decisions = root / "work" / "decisions" / f"{shard.name}.parquet"
    names = [name for name, _ in task.stages]
    codes, reasons = _reasons(column(decisions, "reason"))
    until = np.array([*(names.index(reason.partition(".")[0]) for reason in reasons), len(names)])[codes]
    alive = until == len(names)
    ids = Texts.from_array(column(decisions, "id"))
    hashes = Ranges(ids, ids.starts, ids.ends).hashes
    samples: list[tuple[Kind, list[Sample]]] = []
    for number, reason in enumerate(reasons):
        kind = Kind("dropped", *reason.split(".", 1))
        samples.append((kind, choose(kind, task.part, np.flatnonzero(codes == number), hashes)))
    attributes: dict[str, dict[str, Any]] = {}
    for number, (name, config) in enumerate(task.stages):
        reached, kept = until >= number, until > number
        changed = _cut(root, name, config, shard)
        path = measure_path(root, name, shard)
        if path.is_file():
            outside = bounds.of(config)
            attributes[name] = {}
            for attribute, values in _columns(path):
                if isinstance(values, np.ndarray):
                    attributes[name][attribute] = _numbers(attribute, values, reached, kept, outside)
                    if attribute.startswith(_CHANGES):
                        changed |= values > 0
                else:
                    attributes[name][attribute] = _words(values, reached, alive)
        for fate, rows in (("changed", kept & changed), ("kept", kept & ~changed)):
            if rows.any():
                kind = Kind(fate, name)
                samples.append((kind, choose(kind, task.part, np.flatnonzero(rows), hashes)))
    read = column(root / "work" / "read" / f"{shard.name}.parquet", "bytes").to_numpy()
    chosen = pa.Table.from_batches(read_batches(documents_path(root, shard), ["bytes", "held_out"]), _CHOSEN)
    sizes, held_out = (each.to_numpy() for each in chosen.columns)
    sides = {"train": sizes[~held_out], "held_out": sizes[held_out]}
    content = {
        "attributes": attributes,
        "lengths": {"read": Sketch.of(read).content(), "selected": Sketch.of(sizes).content()},
        "selected": {side: [len(of_side), int(of_side.sum())] for side, of_side in sides.items()},
        "duplicates": shard.documents - column(decisions, "duplicate_of").null_count,
        "samples": [(list(kind), [list(sample) for sample in found]) for kind, found in samples],
    }
    output = summary_path(root, shard)
    files.write_text(output, orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS).decode())
    return tasks.finish(task, [output], {}, started=started)


def _reasons(given: pa.Array) -> tuple[np.ndarray, list[str]]:
    """Number of the reason of each document, among the different ones in order; -1, which is the last, for none."""
    encoded = given.dictionary_encode()
    reasons = encoded.dictionary.to_pylist()
    order = sorted(range(len(reasons)), key=reasons.__getitem__)
    numbers = np.full(len(reasons) + 1, -1)
    numbers[order] = np.arange(len(reasons))
    codes = encoded.indices.fill_null(len(reasons)).to_numpy(zero_copy_only=False)
    return numbers[codes], sorted(reasons)


def _cut(root: Path, name: str, config: StageConfig, shard: Shard) -> np.ndarray:
    """From which documents a stage cut something."""
    if not isinstance(config, PassageDedupConfig | SubstringDedupConfig):
        return np.zeros(shard.documents, bool)
    return column(verdicts_path(root, name, shard), "cuts").value_lengths().to_numpy() > 0


def _columns(path: Path) -> Iterator[tuple[str, np.ndarray | pa.Array]]:
    """The attributes of a shard that are numbers, also several for a document, or words."""
    with pq.ParquetFile(path, pre_buffer=False) as file:
        fields = [field for field in file.schema_arrow if field.name not in _NO_MEASUREMENT]
        table = file.read([field.name for field in fields if _is_shown(field.type)], use_threads=False)
    for name in table.column_names:
        values = table.column(name).combine_chunks()
        if pa.types.is_string(values.type):
            yield name, values
        elif pa.types.is_fixed_size_list(values.type):
            rows = values.flatten().to_numpy().reshape(len(values), -1)
            for i, part in enumerate(bounds.columns(name, rows.shape[1])):
                yield part, rows[:, i]
        else:
            yield name, values.to_numpy(zero_copy_only=False)


def _is_shown(kind: pa.DataType) -> bool:
    if pa.types.is_fixed_size_list(kind):
        return pa.types.is_floating(kind.value_type)
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_string(kind)


def _numbers(
    name: str, values: np.ndarray, reached: np.ndarray, kept: np.ndarray, found: list[bounds.Bound]
) -> dict[str, Any]:
    outside = {
        bound.rule: int((reached & ~bound.holds(values)).sum())
        for bound in found
        if bound.attribute == name and bound.side != "only"
    }
    return {
        "kept": Sketch.of(values[kept]).content(),
        "dropped": Sketch.of(values[reached & ~kept]).content(),
        "outside": outside,
        "values": {},
    }


def _words(values: pa.Array, reached: np.ndarray, alive: np.ndarray) -> dict[str, Any]:
    encoded = values.fill_null("").dictionary_encode()
    codes, size = encoded.indices.to_numpy(), len(encoded.dictionary)
    counts = [np.bincount(codes[rows], minlength=size).tolist() for rows in (reached, alive)]
    words = {word: list(pair) for word, *pair in zip(encoded.dictionary.to_pylist(), *counts, strict=True) if pair[0]}
    nothing = Sketch().content()
    return {"kept": nothing, "dropped": nothing, "outside": {}, "values": _most_frequent(words)}


def _most_frequent(values: dict[str, list[int]]) -> dict[str, list[int]]:
    ordered = sorted(values.items(), key=lambda item: (-item[1][0], item[0]))
    rest = [counts for value, counts in ordered[_MOST_VALUES:] if value != "others"]
    kept = {value: counts for value, counts in ordered[:_MOST_VALUES]}
    if rest:
        before = kept.get("others", [0, 0])
        kept["others"] = [before[i] + sum(counts[i] for counts in rest) for i in range(2)]
    return kept
