"""Finding one document by its id, or by the beginning of it: of every shard no more than the ids is read."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines.documents import Shard, column
from data_pipelines.inspection.changes import agreement
from data_pipelines.inspection.output import Output
from data_pipelines.inspection.rows import groups_between
from data_pipelines.inspection.visible import visible
from data_pipelines.reading import shard_path
from data_pipelines.verdicts import verdicts_path

_NAMED = 5
_ALIKE = 3  # characters in common


class Place(NamedTuple):
    """A document of a pipeline: the row of a shard."""

    shard: Shard
    row: int
    id: str


def find(output: Output, name: str) -> list[Place] | list[dict[str, Any]]:
    """The document with this id, or the only one whose id begins so; else records in quarantine, as <file>:<record>.

    The name of the source may be left out. Several documents may have one id where none were removed for it.

    Raises:
      ValueError: there is none, or several ids begin so.
    """
    name = name.encode(errors="surrogateescape").decode(errors="backslashreplace")  # as ids have what is no UTF-8
    sources = sorted({shard.source for shard in output.shards})
    file, _, record = name.rpartition(":")
    names = [name, *(f"{source}/{name}" for source in sources)]
    if file and record.isdigit():
        names += [f"{each}#{record}" for each in (file, *(f"{source}/{file}" for source in sources))]
    for each in names:
        if found := list(exactly(output, each)):
            return found
    if rejected := [each for each in output.quarantine() if _is_called(each, name)]:
        return rejected
    for each in names:
        found = list(_beginning(output, each))
        ids = sorted({place.id for place in found})
        if len(ids) == 1:
            return found
        if ids:
            more = f" and {len(ids) - _NAMED:,} more" if len(ids) > _NAMED else ""
            raise ValueError(f"{len(ids):,} ids begin with {visible(each)}: {_spelled(ids[:_NAMED])}{more}")
    alike = _alike(output, name)
    hint = f"; alike are {_spelled(alike)}" if alike else ""
    raise ValueError(f"no document of {output.root} has the id {visible(name)}{hint}")


def exactly(output: Output, name: str) -> Iterator[Place]:
    """The documents with this id, in order."""
    for shard in output.shards:
        for start, ids in groups_between(shard_path(output.root, shard), "id", name, name):
            for row in _rows(pc.call_function("equal", [ids, pa.scalar(name)])):
                yield Place(shard, start + row, name)


def duplicates(output: Output, step: str, name: str) -> Iterator[Place]:
    """The documents that gave way to this one, in order."""
    for shard in output.shards:
        for start, kept in groups_between(verdicts_path(output.root, step, shard), "duplicate_of", name, name):
            rows = [start + row for row in _rows(pc.call_function("equal", [kept, pa.scalar(name)]))]
            if rows:
                ids = column(shard_path(output.root, shard), "id")
                yield from (Place(shard, row, ids[row].as_py()) for row in rows)


def _beginning(output: Output, name: str) -> Iterator[Place]:
    for shard in output.shards:
        for start, ids in groups_between(shard_path(output.root, shard), "id", name, name + "\U0010ffff"):
            found = pc.call_function("starts_with", [ids], pc.MatchSubstringOptions(name))
            yield from (Place(shard, start + row, ids[row].as_py()) for row in _rows(found))


def _alike(output: Output, name: str) -> list[str]:
    """Ids that hold the name; without any, those that begin like it for longest, or end in something that does."""
    holding: list[str] = []
    nearest: list[tuple[int, str]] = []
    for shard in output.shards:
        ids = column(shard_path(output.root, shard), "id")
        options = pc.MatchSubstringOptions(name, ignore_case=True)
        holding += [ids[row].as_py() for row in _rows(pc.call_function("match_substring", [ids], options))]
        if len(holding) >= _NAMED:
            return holding[:_NAMED]
        scored = [(-max(agreement(name, each), agreement(_last(name), _last(each))), each) for each in ids.to_pylist()]
        nearest = sorted([*nearest, *scored])[:3]
    return holding or [each for same, each in nearest if same <= -_ALIKE]


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _is_called(record: dict[str, Any], name: str) -> bool:
    called = f"{record['file']}:{record['record']}"
    whole = [record["file"]] if record["record"] == 0 else []
    return name in (called, f"{record['source']}/{called}", *whole)


def _rows(found: Any) -> list[int]:
    return pc.call_function("indices_nonzero", [found.fill_null(False)]).to_pylist()


def _spelled(ids: list[str]) -> str:
    return ", ".join(map(visible, ids))
