"""What of the evaluation sets was found in the corpus: contamination/<stage>.jsonl and its sums in <stage>.json."""

import collections
import dataclasses
import json
import time
from collections.abc import Iterator
from typing import Any

import orjson
import pyarrow.parquet as pq

from data_pipelines import tasks
from data_pipelines.decontaminate.index import texts_path
from data_pipelines.documents import Shard, read_batches
from data_pipelines.measuring import measure_path
from data_pipelines.verdicts import Verdicts
from slmjax import files

_NAMES = ("evaluation", "item", "field")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportTask(tasks.Task):
    """Writes the report of the stage that the task is called after; `previous` is the stage before or None."""

    shards: tuple[Shard, ...]
    previous: str | None


def write_report(task: ReportTask) -> tasks.Done:
    """Writes a line for every text of an evaluation set in every document that reached the stage, and the sums."""
    started = time.monotonic()
    outputs = [task.root / "contamination" / f"{task.name}{suffix}" for suffix in (".jsonl", ".json")]
    texts = pq.read_table(texts_path(task.root, task.name))
    found: set[int] = set()
    documents: collections.Counter[str] = collections.Counter()
    with files.replacing(outputs[0]) as partial, open(partial, "wb") as lines:
        for row in _rows(task):
            evaluations = set()
            for match in row["found"]:
                evaluation, item, field = (texts[name][match["text"]].as_py() for name in _NAMES)
                found.add(match["text"])
                evaluations.add(evaluation)
                line = {
                    "document": row["id"],
                    "dropped": row["dropped"],
                    "matches": row["matches"],
                    "evaluation": evaluation,
                    "item": item,
                    "field": field,
                    "ngrams": match["ngrams"],
                    "share": round(match["share"], 4),
                    "ngram": match["ngram"],
                }
                lines.write(orjson.dumps(line) + b"\n")
            documents.update(evaluations)
    sums: dict[str, dict[str, Any]] = {}
    items: dict[str, set[str]] = collections.defaultdict(set)
    names, ways = (texts[name].to_pylist() for name in ("evaluation", "looked_for"))
    for (name, way), number in collections.Counter(zip(names, ways, strict=True)).items():
        of_set = sums.setdefault(name, {"texts": 0, "looked_for": collections.Counter(), "texts_found": 0})
        of_set["texts"] += number
        of_set["looked_for"][way] += number
    for number in found:
        sums[names[number]]["texts_found"] += 1
        items[names[number]].add(texts["item"][number].as_py())
    for name, of_set in sums.items():
        of_set.update(items_found=len(items[name]), documents=documents[name])
    files.write_text(outputs[1], json.dumps(sums, indent=1) + "\n")
    return tasks.finish(task, outputs, {"found": sums}, started=started)


def _rows(task: ReportTask) -> Iterator[dict[str, Any]]:
    """Attributes of the documents that reached the stage and hold something, and whether it dropped them."""
    for shard in task.shards:
        before = Verdicts.load(task.root, task.previous, shard).alive
        after = Verdicts.load(task.root, task.name, shard).alive
        start = 0
        for batch in read_batches(measure_path(task.root, task.name, shard)):
            for i in batch.column("matches").to_numpy().nonzero()[0].tolist():
                if before[start + i]:
                    yield {**batch.slice(i, 1).to_pylist()[0], "dropped": not after[start + i]}
            start += len(batch)
