"""The texts of evaluation sets, and the index of their n-grams."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipelines import tasks
from data_pipelines.deduplicate import buckets
from data_pipelines.documents import parquet_writer
from data_pipelines.readers.inputs import list_inputs
from data_pipelines.readers.records import Reject, read_records
from data_pipelines.stages import alphabet, hashed_words
from data_pipelines.stages.contamination import SECOND, Index, IndexFile, whole_document
from data_pipelines.stages.counting import count
from data_pipelines.stages.normalise import normalise_all
from data_pipelines.stages.texts import Texts
from slmjax.config import DecontaminationConfig, EvaluationTextConfig, NormaliseConfig

_SCHEMA = pa.schema(
    [("evaluation", pa.string()), ("item", pa.string()), ("field", pa.string()), ("looked_for", pa.string())]
)
_BATCH = 1000  # texts
_BITS_PER_KEY = 16
_HALF, _LOWER = np.uint64(32), np.uint64(0xFFFFFFFF)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexTask(tasks.Task):
    """Makes the index of the evaluation sets of a config. `normalise` is done to the texts, as to the documents."""

    config: DecontaminationConfig
    normalise: NormaliseConfig | None


def texts_path(root: Path, stage_name: str) -> Path:
    """A table with a row for every text of the evaluation sets: its set, item and field, and how it is looked for."""
    return root / "work" / "evaluations" / f"{stage_name}.parquet"


def index_task(root: Path, stage_name: str, config: DecontaminationConfig, form: NormaliseConfig | None) -> IndexTask:
    """The task; another where a file of the evaluation sets has changed. Raises ValueError where there is none."""
    inputs = [
        [evaluation.name, file.name, file.size, file.version]
        for evaluation in config.evaluations
        for file in list_inputs(evaluation)
    ]
    measured = [config.evaluations, config.ngram, config.shortest_words, form]
    return IndexTask(
        root=root,
        step="evaluations",
        name=stage_name,
        fingerprint=tasks.fingerprint(measured, inputs),
        config=config,
        normalise=form,
    )


def index_file(task: IndexTask, done: tasks.Done) -> IndexFile:
    """The index that a task made."""
    path = texts_path(task.root, task.name).with_suffix(".npz")
    return IndexFile(path=path, sha256=done.outputs[str(path.relative_to(task.root))])


def make_index(task: IndexTask) -> tasks.Done:
    """Writes the index and the table of texts."""
    started = time.monotonic()
    rows, texts = [], []
    for evaluation in task.config.evaluations:
        for item, field, text in _read(evaluation):
            rows.append((evaluation.name, item, field))
            texts.append(text)
    texts = normalise_all(task.normalise, texts)
    index, looked_for = build(task.config, texts)
    output = texts_path(task.root, task.name)
    index.save(output.with_suffix(".npz"))
    columns = [*zip(*rows, strict=True), looked_for] if rows else [[]] * len(_SCHEMA)
    with parquet_writer(output, _SCHEMA) as writer:
        writer.write_batch(pa.record_batch([pa.array(column, pa.string()) for column in columns], schema=_SCHEMA))
    return tasks.finish(task, [output, output.with_suffix(".npz")], {"texts": len(texts)}, started=started)


def build(config: DecontaminationConfig, texts: list[str]) -> tuple[Index, list[str]]:
    """Returns the index, and of each text whether it is looked for by "ngrams", "whole", as a "document" or "not"."""
    prefix = min(config.shortest_words, config.ngram)
    found: list[_Grams] = []
    counts = np.zeros(len(texts), np.int64)
    for start in range(0, len(texts), _BATCH):
        batch = Texts.of(texts[start : start + _BATCH])
        words = hashed_words.of(batch)
        counts[start : start + len(words.counts)] = words.counts
        with_letters = count(batch.kinds, alphabet.LETTER, alphabet.LETTER, words.starts, words.ends) > 0
        before = np.append(0, np.cumsum(with_letters))
        for length in buckets.distinct(np.minimum(words.counts, config.ngram)).tolist():
            if length:
                found.append(_grams(before, words, length, exactly=length < config.ngram, start=start))
    hashes = [whole_document(each.hashes) if each.length < prefix else each.hashes for each in found]
    grams = np.concatenate([np.zeros(0, np.uint64), *hashes])
    owners = np.concatenate([np.zeros(0, np.int64), *(each.owners for each in found)])
    order = _order(grams)
    grams = grams[order]
    new = np.append(True, grams[1:] != grams[:-1])[: len(grams)]
    numbers = np.cumsum(new, dtype=np.uint64) << _HALF
    pairs = buckets.distinct(numbers | owners[order].view(np.uint64))  # of a gram and a text that has it, each once
    grams, owners = grams.compress(new), (pairs & _LOWER).view(np.int64)
    of_gram = pairs >> _HALF
    starts = np.flatnonzero(np.append(True, of_gram[1:] != of_gram[:-1])[: len(pairs)])
    runs = [each for each in found if each.length >= prefix and len(each.hashes)]
    keys = buckets.distinct(np.concatenate([np.zeros(0, np.uint64), *(each.keys(prefix) for each in runs)]))
    sizes = np.bincount(owners, minlength=len(texts))
    index = Index(
        lengths=np.unique(np.array([each.length for each in runs], np.int64)),
        prefix=np.array(prefix),
        keys=keys,
        bits=_bits(keys),
        grams=grams,
        starts=np.append(starts, len(owners)),
        owners=owners,
        sizes=sizes,
    )
    ways = np.select([sizes == 0, counts >= config.ngram, counts >= prefix], ["not", "ngrams", "whole"], "document")
    return index, ways.tolist()


@dataclasses.dataclass(frozen=True)
class _Grams:
    """Runs of `length` words in some texts: their hashes, the texts, and where they start among `words`."""

    length: int
    hashes: np.ndarray
    owners: np.ndarray
    places: np.ndarray
    words: hashed_words.Words

    def keys(self, prefix: int) -> np.ndarray:
        """Hashes of the first words of each."""
        return _runs(self.words, self.places, prefix)


def _grams(before: np.ndarray, words: hashed_words.Words, length: int, *, exactly: bool, start: int) -> _Grams:
    """Those with a letter, of texts of `length` words exactly or at least; the first text has the number `start`.

    `before` is the number of words with letters before each word.
    """
    enough = words.counts == length if exactly else words.counts >= length
    counts = np.where(enough, words.counts - length + 1, 0)
    owners = np.repeat(np.arange(len(counts)), counts)
    places = np.arange(len(owners)) + np.repeat(words.first[:-1] - (np.cumsum(counts) - counts), counts)
    lettered = before[places + length] > before[places]
    places, owners = places[lettered], owners[lettered]
    return _Grams(length, _runs(words, places, length), owners + start, places, words)


def _runs(words: hashed_words.Words, places: np.ndarray, length: int) -> np.ndarray:
    """Hashes of the runs at some places; where these are most of them, from those of all."""
    if 4 * len(places) < len(words.hashes):
        return hashed_words.runs_at(words.hashes, places, length)
    return hashed_words.runs(words.hashes, length)[places]


def _order(values: np.ndarray) -> np.ndarray:
    """What sorts uint64 values: numbers of their upper bits and their index are sorted, several times as fast."""
    low = np.uint64((1 << len(values).bit_length()) - 1)
    packed = np.sort((values & ~low) | np.arange(len(values), dtype=np.uint64))
    order = (packed & low).view(np.int64)
    ordered = values[order]
    return order if (ordered[1:] >= ordered[:-1]).all() else np.argsort(values)


def _bits(keys: np.ndarray) -> np.ndarray:
    """The filter of an index."""
    size = max(16, (_BITS_PER_KEY * len(keys)).bit_length())
    flags = np.zeros(1 << size, bool)
    for values in (keys, np.sort(keys * SECOND)):  # in order, so that they are set from one end to the other
        flags[values >> np.uint64(64 - size)] = True
    return np.packbits(flags, bitorder="little")


def _read(evaluation: EvaluationTextConfig) -> Iterator[tuple[str, str, str]]:
    """Item, field and text of everything in an evaluation set.

    Raises:
      ValueError: a record is malformed, has none of the fields, or something else than text in one.
    """
    columns = [*evaluation.fields, *([evaluation.id_field] if evaluation.id_field else [])]
    for file in list_inputs(evaluation):
        for item in read_records(file, columns, evaluation.max_record_bytes):
            where = f"evaluation set {evaluation.name}, {file.address}"
            if isinstance(item, Reject):
                raise ValueError(f"{where}, record {item.record}: {item.reason} {item.detail}")
            number, record, _ = item
            if not any(field in record for field in columns[: len(evaluation.fields)]):
                raise ValueError(f"{where}, record {number}: no field {evaluation.fields}, only {sorted(record)}")
            name = record.get(evaluation.id_field) if evaluation.id_field else f"{file.name}#{number}"
            for field in evaluation.fields:
                value = record.get(field)
                texts = [value] if isinstance(value, str) else value or []
                if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
                    raise ValueError(f"{where}, record {number}: {field!r} is neither a text nor a list of texts")
                for text in texts:
                    yield str(name), field, text
