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
from data_pipelines.stages.compiled import compiled
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
    counts = np.zeros(len(texts), np.int64)
    nothing = np.zeros(0, np.uint64)
    found = [(nothing, nothing, np.zeros(0, np.int64))]
    for start in range(0, len(texts), _BATCH):
        batch = Texts.of(texts[start : start + _BATCH])
        words = hashed_words.of(batch)
        counts[start : start + len(words.counts)] = words.counts
        lettered = count(batch.kinds, alphabet.LETTER, alphabet.LETTER, words.starts, words.ends) > 0
        found.append(_runs(words.hashes, lettered, words.first, config.ngram, prefix, hashed_words.MULTIPLIER, start))
    grams, keys, owners = map(np.concatenate, zip(*found, strict=True))
    lengths = np.minimum(counts, config.ngram)[owners]
    short = lengths < prefix
    grams[short] = whole_document(grams[short])
    keys = buckets.distinct(keys[~short])
    grams, order = _sorted(grams)
    owners = owners.take(order)  # of each gram its texts come in order
    new = np.append(True, grams[1:] != grams[:-1])[: len(grams)]
    once = new | np.append(True, owners[1:] != owners[:-1])[: len(grams)]
    owners = owners.compress(once)
    sizes = np.bincount(owners, minlength=len(texts))
    index = Index(
        lengths=np.flatnonzero(np.bincount(lengths[~short])),
        prefix=np.array(prefix),
        keys=keys,
        bits=_bits(keys, SECOND, max(16, (_BITS_PER_KEY * len(keys)).bit_length())),
        grams=grams.compress(new),
        starts=np.append(np.flatnonzero(new.compress(once)), len(owners)),
        owners=owners,
        sizes=sizes,
    )
    ways = np.select([sizes == 0, counts >= config.ngram, counts >= prefix], ["not", "ngrams", "whole"], "document")
    return index, ways.tolist()


@compiled
def _runs(hashes, lettered, first, longest, prefix, multiplier, start):
    """Runs of `longest` words with a letter in each text, of a shorter text all of it, as `hashed_words.runs` has them.

    Returns the hash of each, that of its first `prefix` words, and its text; the first text has the number `start`.
    """
    runs = np.empty(len(hashes), np.uint64)
    heads = np.empty(len(hashes), np.uint64)
    owners = np.empty(len(hashes), np.int64)
    found = 0
    for text in range(len(first) - 1):
        begin, end = first[text], first[text + 1]
        length = min(longest, end - begin)
        later = max(length - prefix, 0)  # words after the first ones
        leaves, leaves_head = np.uint64(1), np.uint64(1)  # factors of the words that a hash goes past
        for i in range(length):
            leaves *= multiplier
            if i < length - later:
                leaves_head *= multiplier
        run, head, letters = np.uint64(0), np.uint64(0), 0
        for i in range(begin, end):
            run = run * multiplier + hashes[i]
            letters += lettered[i]
            if i - begin >= length:
                run -= hashes[i - length] * leaves
                letters -= lettered[i - length]
            if i - begin >= later:
                head = head * multiplier + hashes[i - later]
            if i - begin >= length:
                head -= hashes[i - length] * leaves_head
            if i - begin >= length - 1 and letters > 0:
                runs[found], heads[found], owners[found] = run, head, start + text
                found += 1
    return runs[:found], heads[:found], owners[:found]


def _sorted(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint64 values in order, and which each was; of equal ones the first comes first.

    Their upper bits are sorted together with their index, which is several times as fast.
    """
    low = np.uint64((1 << len(values).bit_length()) - 1)
    packed = values & ~low
    packed |= np.arange(len(values), dtype=np.uint64)
    packed.sort()
    packed &= low
    order = packed.view(np.int64)
    ordered = values.take(order)
    if not (ordered[1:] >= ordered[:-1]).all():
        order = np.argsort(values, kind="stable")
        ordered = values[order]
    return ordered, order


@compiled
def _bits(keys, second, width):
    """The filter of an index, of 2**width bits."""
    bits = np.zeros(1 << (width - 3), np.uint8)
    for key in keys:
        for value in (key, key * second):
            place = value >> np.uint64(64 - width)
            bits[place >> np.uint64(3)] |= np.uint8(1 << (place & np.uint64(7)))
    return bits


def _read(evaluation: EvaluationTextConfig) -> Iterator[tuple[str, str, str]]:
    """Item, field and text of everything in an evaluation set.

    Raises:
      ValueError: a record is malformed, has none of the fields, or something else than text in one.
    """
    columns = [*evaluation.fields, *([evaluation.id_field] if evaluation.id_field else [])]
    for file in list_inputs(evaluation):
        where = f"evaluation set {evaluation.name}, {file.address}"
        for item in read_records(file, columns, evaluation.max_record_bytes):
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
