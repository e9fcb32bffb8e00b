"""The whole path of one document through a pipeline, as JSON values: read, every stage, split, tokens, store."""

import collections
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from data_pipelines import stages
from data_pipelines.decontaminate.index import texts_path
from data_pipelines.deduplicate.verify import similarity
from data_pipelines.documents import Document, column, read_batches
from data_pipelines.inspection.changes import changes
from data_pipelines.inspection.find import Place, duplicates, exactly
from data_pipelines.inspection.output import Output
from data_pipelines.inspection.rows import take
from data_pipelines.measuring import measure_path
from data_pipelines.readers.inputs import InputFile, list_inputs
from data_pipelines.readers.sources import read_documents
from data_pipelines.readers.spans import Span
from data_pipelines.reading import shard_path
from data_pipelines.stages import hashed_words, minhash
from data_pipelines.stages.normalise import normalise
from data_pipelines.stages.texts import Texts
from data_pipelines.verdicts import verdicts_path
from slmjax.config import NearDedupConfig
from slmjax.config.filters import RewriteConfig
from slmjax.data.token_store import TokenStore

_NAMED = 10  # of the documents that gave way to one
_EXCERPT = 200  # characters of what was cut


def explain(output: Output, place: Place, *, original: bool = True) -> dict[str, Any]:
    """What happened to a document; with `original` its input is read again, to say what normalising changed."""
    (row,) = take(shard_path(output.root, place.shard), [place.row], ["key", "bytes", "text"])
    read: dict[str, Any] = {"shard": place.shard.name, "row": place.row, "bytes": row["bytes"]}
    read |= _original(output, place, row["text"]) if original else {}
    return {
        "id": place.id,
        "source": place.shard.source,
        "read": read,
        "stages": _stages(output, place, row["text"]),
        "selected": _selected(output, place, row["key"]),
    }


def _original(output: Output, place: Place, text: str) -> dict[str, Any]:
    """Where the document was read from, and what of it was changed."""
    config = output.config
    source = next((each for each in config.sources if each.name == place.shard.source), None) if config else None
    if config is None or source is None:
        return {"problem": "the config that made this is not known to this version of the program"}
    try:
        raw: list[str] = []
        kinds: collections.Counter[str] = collections.Counter()

        def clean(text: str) -> str:
            raw.append(text)
            return normalise(config.normalise, text, kinds)

        for file in _files(output, place):
            number = file.span.first_line - 1 if file.span else 0
            for item in read_documents(source, file, clean):
                number += 1
                if isinstance(item, Document) and item.id == place.id and item.text == text:
                    found = {"file": file.address, "item": number, "normalised": dict(kinds)}
                    return {**found, "changes": changes("\n\n".join(raw), text)}
                raw.clear()
                kinds.clear()
    except (ValueError, OSError, ImportError) as error:
        return {"problem": str(error)}
    return {"problem": "its input has changed since it was read"}


def _files(output: Output, place: Place) -> Iterator[InputFile]:
    """The inputs of the unit of work that the document's shard is from."""
    assert output.config is not None
    unit = output.markers("read")[place.shard.name.rpartition("-")[0]]
    source = next(each for each in output.config.sources if each.name == place.shard.source)
    listed = {file.name: file for file in list_inputs(source)}
    for name, span in unit["files"]:
        if name not in listed:
            raise ValueError(f"its input {name} is not there any more")
        # The id of a document without one of its own begins with the file's name.
        named = place.id.removeprefix(f"{place.shard.source}/").rpartition("#")[0]
        if named in listed and named != name:
            continue
        yield dataclasses.replace(listed[name], span=Span(**span)) if span else listed[name]


def _stages(output: Output, place: Place, text: str) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    texts = Texts.of([text])
    before: dict[str, Any] = {"reason": None, "cuts": []}
    last = output.decided[-1] if output.decided else None
    given_way = collections.defaultdict(list)
    if last is not None:
        for other in duplicates(output, last, place.id):
            (why,) = take(verdicts_path(output.root, last, other.shard), [other.row], ["reason"])
            given_way[why["reason"].partition(".")[0]].append(other)
    for name, config in output.stages.items():
        decided = name in output.finished  # else what lies there is of an earlier run
        stage: dict[str, Any] = {"stage": name, "attributes": _attributes(output, name, place) if decided else []}
        told.append(stage)
        if isinstance(config, RewriteConfig):
            changed = stages.rewrite(config, texts)[0]
            stage["changes"] = changes(texts.strings[0], changed.strings[0])
            texts = changed
        if not decided:
            stage["outcome"] = "not yet decided"
            continue
        (verdict,) = take(verdicts_path(output.root, name, place.shard), [place.row])
        if before["reason"] is not None:
            stage["outcome"] = "dropped before"
        else:
            stage["outcome"] = "kept" if verdict["reason"] is None else "dropped"
            stage["rule"] = verdict["reason"] and verdict["reason"].partition(".")[2]
            content = texts.strings[0].encode()
            new = [(cut["start"], cut["end"]) for cut in verdict["cuts"] or () if cut not in (before["cuts"] or ())]
            stage["cuts"] = [
                {"start": start, "end": end, "text": content[start:end].decode(errors="replace")[:_EXCERPT]}
                for start, end in new
            ]
            if verdict["reason"] is not None and verdict["duplicate_of"] is not None:
                stage["duplicate_of"] = _keeper(output, config, verdict["duplicate_of"], texts)
            stage["matches"] = _matches(output, name, place)
        if others := given_way[name]:
            named = [_like(output, config, other, texts) for other in others[:_NAMED]]
            stage["kept_instead_of"] = {"number": len(others), "shown": named}
        before = verdict
    return told


def _attributes(output: Output, stage: str, place: Place) -> list[dict[str, Any]]:
    names = list(output.attributes(stage, place.shard))
    if not names:
        return []
    (values,) = take(measure_path(output.root, stage, place.shard), [place.row], names)
    told = []
    for name in names:
        bounds = [
            {"rule": bound.rule, "bound": str(bound), "holds": bound.holds(values[name])}
            for bound in output.bounds(stage)
            if bound.attribute == name
        ]
        told.append({"name": name, "value": values[name], "bounds": bounds})
    return told


def _keeper(output: Output, config: Any, name: str, texts: Texts) -> dict[str, Any]:
    """The document that was kept instead, and how similar it is; it may be one of an earlier corpus."""
    for other in exactly(output, name):
        return _like(output, config, other, texts)
    for directory in getattr(config, "against", ()):
        for path in sorted((Path(directory).expanduser() / "documents").glob("*.parquet")):
            for batch in read_batches(path, ["id", "text"]):
                ids = batch.column("id").to_pylist()
                if name in ids:
                    other = batch.column("text")[ids.index(name)].as_py()
                    return {"id": name, "corpus": directory, "similarity": _similarity(config, texts, other)}
    return {"id": name, "similarity": None}


def _like(output: Output, config: Any, other: Place, texts: Texts) -> dict[str, Any]:
    (row,) = take(output.texts(other.shard), [other.row], ["text"])
    return {"id": other.id, "similarity": _similarity(config, texts, row["text"])}


def _similarity(config: Any, texts: Texts, other: str) -> float | None:
    """The share of n-grams that two texts have in common, as near deduplication counts it; None elsewhere."""
    if not isinstance(config, NearDedupConfig):
        return None
    words = hashed_words.split(Texts.of([texts.strings[0], other]), punctuation=False)
    hashes, counts = minhash.ngrams(config, words)
    both = (np.unique(hashes[rows] >> np.uint64(32)) for rows in (slice(0, counts[0]), slice(counts[0], None)))
    return round(similarity(*both), 4)


def _matches(output: Output, stage: str, place: Place) -> list[dict[str, Any]]:
    """What of evaluation sets was found in the document."""
    path, table = measure_path(output.root, stage, place.shard), texts_path(output.root, stage)
    if not (path.is_file() and table.is_file()) or "found" not in pq.read_schema(path).names:
        return []
    (row,) = take(path, [place.row], ["found"])
    texts = take(table, [match["text"] for match in row["found"]], ["evaluation", "item", "field"])
    return [{**text, **match} for text, match in zip(texts, row["found"], strict=True)]


def _selected(output: Output, place: Place, key: str) -> dict[str, Any]:
    """Side of the split, tokens, and where they lie."""
    if "select" not in output.finished:
        return {"problem": "the last run has not come to the selection"}
    path = output.root / "work" / "decisions" / f"{place.shard.name}.parquet"
    kept = column(path, "reason").is_null().to_numpy(zero_copy_only=False)
    if not kept[place.row]:
        return {"side": None}
    sides = column(path, "held_out").to_numpy(zero_copy_only=False)
    side = "held_out" if sides[place.row] else "train"
    told: dict[str, Any] = {"side": side, "key": key}
    if "stores" not in output.finished:
        return {**told, "problem": "the last run has not come to the token stores"}
    earlier = output.results("select")[: output.shards.index(place.shard)]
    same_side = kept & (sides == sides[place.row])
    number = sum(counts[side] for counts in earlier) + int(same_side[: place.row].sum())
    return {**told, **_stored(output.root / side, number)}


def _stored(path: Path, number: int) -> dict[str, Any]:
    store = TokenStore.open(path)
    start, end = store.starts(number, number + 2).tolist()
    first_document = first_token = 0
    for shard in store.metadata.shards:
        if number < first_document + shard.num_documents:
            break
        first_document, first_token = first_document + shard.num_documents, first_token + shard.num_tokens
    return {
        "store": str(path),
        "document": number,
        "tokens": end - start,
        "shard": shard.name,
        "document_in_shard": number - first_document,
        "offset": start - first_token,
    }
