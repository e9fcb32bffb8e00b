"""Short parts of the documents that a report shows, with what a stage found in them."""

import bisect
import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from data_pipelines import stages, tasks
from data_pipelines.documents import Shard, column
from data_pipelines.measuring import measure_path
from data_pipelines.report import bounds, highlights
from data_pipelines.report.highlights import Span
from data_pipelines.report.samples import Kind
from data_pipelines.stages.texts import Texts
from data_pipelines.verdicts import Verdicts
from slmjax.config import MaskPersonalDataConfig
from slmjax.config.filters import RewriteConfig
from slmjax.config.pipeline import StageConfig

_SHOWN_CHARS = 700
_BEFORE_CHARS = 120  # of them before the first place
_SEARCHED_CHARS = 50_000
_COMPARED_CHARS = 20_000

Piece = tuple[str, bool]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A document of a shard, and what to show of it: the fate of a sample, or "compare" for how it begins."""

    row: int
    kind: Kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExcerptTask(tasks.Task):
    """Reads what is wanted of one shard."""

    shard: Shard
    stages: tuple[tuple[str, StageConfig], ...]
    wanted: tuple[Wanted, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocateTask(tasks.Task):
    """Looks for documents with some ids in one shard."""

    shard: Shard
    ids: tuple[str, ...]


def locate(task: LocateTask) -> tasks.Done:
    """The result has the rows of the ids that are there."""
    started = time.monotonic()
    path = _decisions(task)
    wanted, rows = set(task.ids), {}
    for row, name in enumerate(column(path, "id").to_pylist()):
        if name in wanted:
            rows.setdefault(name, row)
    return tasks.finish(task, [], {"rows": rows}, started=started)


def read(task: ExcerptTask) -> tasks.Done:
    """The result has an excerpt for each document that is wanted, in order."""
    started = time.monotonic()
    rows = sorted({wanted.row for wanted in task.wanted})
    found = _rows(task.root / "work" / "read" / f"{task.shard.name}.parquet", rows, ["text"])
    texts = {row: each["text"] for row, each in zip(rows, found, strict=True)}
    decisions = dict(zip(rows, _rows(_decisions(task), rows, ["id", "duplicate_of"]), strict=True))
    measured = {
        stage: _attributes(task, stage, sorted({wanted.row for wanted in task.wanted if wanted.kind.stage == stage}))
        for stage in {wanted.kind.stage for wanted in task.wanted if wanted.kind.fate != "compare"}
    }
    states = _states(task, {row: text[:_SEARCHED_CHARS] for row, text in texts.items()})
    shown = [_shown(task, wanted, states) for wanted in task.wanted]
    masked = iter(_masked(task.stages, list(itertools.chain.from_iterable(shown))))
    excerpts = []
    for wanted, each in zip(task.wanted, shown, strict=True):
        row = measured.get(wanted.kind.stage, {}).get(wanted.row, {})
        excerpt = _excerpt(task, wanted, each, list(itertools.islice(masked, len(each))), row)
        excerpts.append({**decisions[wanted.row], **excerpt})
    return tasks.finish(task, [], {"excerpts": excerpts}, started=started)


def _decisions(task: ExcerptTask | LocateTask) -> Path:
    return task.root / "work" / "decisions" / f"{task.shard.name}.parquet"


def _number(task: ExcerptTask, wanted: Wanted) -> int:
    """Of the stage."""
    return [name for name, _ in task.stages].index(wanted.kind.stage)


def _states(task: ExcerptTask, texts: dict[int, str]) -> list[dict[int, str]]:
    """The texts by row: as they were, after the first stage, after the second, as far as they are wanted."""
    last = {wanted.row: -1 for wanted in task.wanted}
    for wanted in task.wanted:
        last[wanted.row] = max(last[wanted.row], _number(task, wanted))
    states = [texts]
    for number, (_, config) in enumerate(task.stages):
        rows = [row for row in texts if last[row] >= number]
        after = _rewritten([config], [states[-1][row] for row in rows])
        states.append(dict(zip(rows, after, strict=True)))
    return states


def _shown(task: ExcerptTask, wanted: Wanted, states: list[dict[int, str]]) -> list[str]:
    """The texts of which something is shown: that which reached the stage, that which left it, or both."""
    number = _number(task, wanted)
    config, text = task.stages[number][1], states[number][wanted.row]
    if wanted.kind.fate == "compare":
        return [text[:_COMPARED_CHARS]]
    if wanted.kind.fate == "changed" and isinstance(config, RewriteConfig):
        after = states[number + 1][wanted.row]
        return [after] if isinstance(config, MaskPersonalDataConfig) else [text, after]
    return [text]


def _excerpt(
    task: ExcerptTask, wanted: Wanted, shown: list[str], masked: list[str], row: dict[str, Any]
) -> dict[str, Any]:
    """What a page has of a document; `masked` is what is `shown` without personal data."""
    config = task.stages[_number(task, wanted)][1]
    if wanted.kind.fate == "compare":
        return {"text": masked[0]}
    facts = _facts(config, wanted.kind, row)
    if len(shown) > 1:
        return {"facts": facts, "pieces": pieces(masked[0], highlights.removed_lines(*masked))}
    cuts = _cuts(task, wanted, shown[0]) if not row else []
    if cuts:  # their places are those of the text as it is
        return {"facts": facts, "pieces": pieces(shown[0], cuts)}
    found = highlights.find(config, wanted.kind.rule, masked[0], row) if wanted.kind.fate != "kept" else []
    return {"facts": facts, "pieces": pieces(masked[0], found)}


def pieces(text: str, spans: Sequence[Span]) -> list[Piece]:
    """The part of a text with the most of the spans, cut where these start and end: (text, is a span)."""
    start = max(0, _densest(spans) - _BEFORE_CHARS)
    start = text.rfind("\n", 0, start) + 1 if start - text.rfind("\n", 0, start) < _BEFORE_CHARS else start
    end = min(len(text), start + _SHOWN_CHARS)
    found: list[Piece] = [("… ", False)] if start else []
    position = start
    for first, last in spans:
        if last <= start or first >= end:
            continue
        first = max(first, start)
        found += [(text[position:first], False), (text[first : min(last, end)], True)]
        position = min(last, end)
    found.append((text[position:end] + (" …" if end < len(text) else ""), False))
    return [piece for piece in found if piece[0]]


def _densest(spans: Sequence[Span]) -> int:
    """Where the span starts from which on an excerpt holds the most of all spans; the first such."""
    room, best, most = _SHOWN_CHARS - _BEFORE_CHARS, 0, -1
    last = held = 0
    for first, (start, end) in enumerate(spans):
        while last < len(spans) and spans[last][0] < start + room:
            held += spans[last][1] - spans[last][0]
            last += 1
        if held > most:
            best, most = start, held
        held -= end - start
        last = max(last, first + 1)
    return best


def _rewritten(configs: Iterable[StageConfig], texts: list[str]) -> list[str]:
    """The texts after those of the stages that change them."""
    for config in configs:
        if isinstance(config, RewriteConfig) and texts:
            texts = stages.rewrite(config, Texts.of(texts))[0].strings
    return texts


def _masked(all_stages: Sequence[tuple[str, StageConfig]], texts: list[str]) -> list[str]:
    """Without personal data where the corpus is to have none: reports go further than corpora."""
    return _rewritten((config for _, config in all_stages if isinstance(config, MaskPersonalDataConfig)), texts)


def _facts(config: StageConfig, kind: Kind, row: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Attribute, its value and bound, and whether that is why the document was dropped."""
    values = bounds.values(row)
    if kind.fate == "changed":
        return [(name, _spelled(value), False) for name, value in values.items() if name.startswith(_CHANGES) and value]
    facts = []
    for bound in bounds.of(config):
        if bound.attribute in values and (kind.fate == "kept" or bound.rule == kind.rule):
            value = values[bound.attribute]
            broken = not bound.holds(value)
            if broken or kind.fate == "kept":
                facts.append((bound.attribute, f"{_spelled(value)}, {bound.spelled}", broken))
    if not facts and "score" in values:
        facts.append(("score", _spelled(values["score"]), kind.fate == "dropped"))
    return facts


_CHANGES = ("removed_", "masked_")


def _spelled(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _cuts(task: ExcerptTask, wanted: Wanted, text: str) -> list[Span]:
    """What a stage that cuts passages, or one before it, cuts from a document, in characters."""
    cuts = Verdicts.load(task.root, wanted.kind.stage, task.shard).cuts
    here = slice(*np.searchsorted(cuts.rows, [wanted.row, wanted.row + 1]))
    content = text.encode()
    return [
        (len(content[:start].decode()), len(content[:end].decode(errors="ignore")))
        for start, end in zip(cuts.starts[here].tolist(), cuts.ends[here].tolist(), strict=True)
        if start < len(content)
    ]


def _attributes(task: ExcerptTask, stage: str, rows: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Those of some documents by row; none where the stage measures none."""
    path = measure_path(task.root, stage, task.shard)
    if not path.is_file():
        return {}
    return dict(zip(rows, _rows(path, rows), strict=True))


def _rows(path: Path, rows: Sequence[int], columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The columns of some rows, which are in order; all but long hashes where none are named."""
    with pq.ParquetFile(path, pre_buffer=False) as file:
        columns = columns or [name for name in file.schema_arrow.names if name not in ("bands", "digest")]
        start = 0
        for number in range(file.num_row_groups):
            end = start + file.metadata.row_group(number).num_rows
            here = rows[bisect.bisect_left(rows, start) : bisect.bisect_left(rows, end)]
            if here:
                table = file.read_row_group(number, columns=columns, use_threads=False)
                yield from table.take([row - start for row in here]).to_pylist()
            start = end
