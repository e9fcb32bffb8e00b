"""What a language model has to beat in bits per byte: compressors and an interpolated order-4 byte model."""

import gzip
import io
import json
import lzma
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zstandard

from slmjax.config import RunConfig
from slmjax.data.token_store import TokenStore, check_tokenizer
from slmjax.data.tokenizer import Tokenizer

_ORDER = 4
# Counting takes about 60 bytes of memory for each byte of training text.
MAX_TRAIN_BYTES = 64 << 20


def compressor_bits_per_byte(text: bytes) -> dict[str, float]:
    """Returns bits per byte of `text` as one stream under gzip -9, zstd -19 and xz -9, by these names."""
    _require_text(text, "held-out")
    sizes = {
        "gzip -9": len(gzip.compress(text, compresslevel=9, mtime=0)),
        "zstd -19": len(zstandard.compress(text, level=19)),
        "xz -9": len(lzma.compress(text, preset=9)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def byte_model_bits_per_byte(train: bytes, held_out: bytes) -> float:
    """Returns the bits per byte of `held_out` under the byte model of `byte_model_probabilities`."""
    _require_text(held_out, "held-out")
    return float(-np.log2(byte_model_probabilities(train, held_out)).sum() / len(held_out))


def byte_model_probabilities(train: bytes, text: bytes) -> np.ndarray:
    """Returns the probability, float64, of each byte of `text` after the bytes before it.

    Counts of orders 0 to 4 are taken from `train` and do not adapt to `text`. Orders are interpolated by Witten & Bell
    1991: p_n(b | c) = (count(c b) + types(c) * p_{n-1}(b | c')) / (count(c) + types(c)), where types(c) is how many
    different bytes follow c, c' is c without its first byte, and p_{-1} = 1 / 256. Both texts are single streams.
    """
    train_bytes, text_bytes = np.frombuffer(train, np.uint8), np.frombuffer(text, np.uint8)
    probabilities = np.full(len(text_bytes), 1 / 256)
    for order in range(min(_ORDER, len(train_bytes) - 1, len(text_bytes) - 1) + 1):
        lower = probabilities[order:]  # bytes before have no context of this length; theirs stay
        seen, counts = np.unique(_packed(train_bytes, order), return_counts=True)
        first = np.flatnonzero(np.diff(seen >> 8, prepend=-1))  # where each context begins among the sorted keys
        contexts = seen[first] >> 8
        totals = np.add.reduceat(counts, first)
        types = np.diff(first, append=len(seen))

        keys = _packed(text_bytes, order)
        count = _look_up(seen, counts, keys)
        total, num_types = (_look_up(contexts, values, keys >> 8) for values in (totals, types))
        known = total > 0
        lower[known] = ((count + num_types * lower) / np.maximum(total + num_types, 1))[known]
    return probabilities


def _packed(stream: np.ndarray, order: int) -> np.ndarray:
    """One int64 for each byte from index `order` on: the `order` bytes before it, then the byte itself."""
    length = len(stream) - order
    keys = np.zeros(length, np.int64)
    for offset in range(order + 1):
        keys = keys << 8 | stream[offset : offset + length]
    return keys


def _look_up(sorted_keys: np.ndarray, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Returns the value of each key, 0 where it is absent."""
    places = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return np.where(sorted_keys[places] == keys, values[places], 0)


def run_baselines(run_config: RunConfig, tokenizer: Tokenizer, data_dir: Path) -> dict[str, dict[str, float]]:
    """Returns {evaluation set: {name: bits per byte}} for the run's evaluation sets of plain text under `data_dir`.

    The names are those of the compressors, and "order-4 bytes" for the byte model, trained on the run's training text
    (its first `MAX_TRAIN_BYTES`); there is none for a run that trains on conversations only. Conversations have no
    baselines: a model is scored on the assistant's words alone, given the others.

    Raises:
      ValueError: no evaluation set of plain text lies in `data_dir`.
    """
    inside = _expand(data_dir).resolve()
    sets = [
        eval_set
        for eval_set in run_config.evaluation.sets
        if _expand(eval_set.source.path).resolve().is_relative_to(inside) and _is_text(eval_set.source.path)
    ]
    if not sets:
        given = ", ".join(f"{eval_set.name} ({eval_set.source.path})" for eval_set in run_config.evaluation.sets)
        raise ValueError(f"no evaluation set of plain text lies in {data_dir}; the run has {given or 'none'}")
    paths = dict.fromkeys(source.path for stage in run_config.input.stages for source in stage.sources)
    train = bytearray()
    for path in filter(_is_text, paths):
        train += read_text(path, tokenizer=tokenizer, max_bytes=MAX_TRAIN_BYTES - len(train))
    baselines = {}
    for eval_set in sets:
        text = read_text(eval_set.source.path, tokenizer=tokenizer, max_tokens=eval_set.max_tokens)
        baselines[eval_set.name] = compressor_bits_per_byte(text)
        if train:
            baselines[eval_set.name]["order-4 bytes"] = byte_model_bits_per_byte(bytes(train), text)
    return baselines


def read_text(
    path: str | os.PathLike,
    *,
    tokenizer: Tokenizer | None = None,
    max_tokens: int | None = None,
    max_bytes: int | None = None,
) -> bytes:
    """Returns the documents under `path`, without anything between them, as one UTF-8 stream.

    Args:
      path: a jsonl or jsonl.zst file with a field `text`, or a token store.
      tokenizer: the one that wrote the token store.
      max_tokens: of a token store, read whole documents of no more than so many tokens, but at least one.
      max_bytes: cut the stream here; None is all of it.

    Raises:
      ValueError: the file cannot be read, or a line of it is no object with a text.
    """
    path = _expand(path)
    if path.is_dir():
        if tokenizer is None:
            raise ValueError(f"{path} is a token store: its text needs the tokenizer that wrote it")
        texts = _store_texts(path, tokenizer, max_tokens)
    else:
        texts = _json_texts(path)
    stream = bytearray()
    for text in texts:
        stream += text.encode()
        if max_bytes is not None and len(stream) >= max_bytes:
            break
    return bytes(stream[:max_bytes])


def _store_texts(path: Path, tokenizer: Tokenizer, max_tokens: int | None) -> Iterator[str]:
    store = TokenStore.open(path)
    check_tokenizer(store, tokenizer)
    num_documents = store.num_documents
    if max_tokens is not None:  # whole documents, as slmjax.data.loader.eval_batches reads them
        num_documents = max(1, int(np.searchsorted(store.document_starts, max_tokens, side="right")) - 1)
    for index in range(num_documents):
        yield tokenizer.decode(store.document(index).tolist())


def _json_texts(path: Path) -> Iterator[str]:
    try:
        with io.BufferedReader(zstandard.open(path)) if path.suffix == ".zst" else open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                yield _text_of(line, f"{path}:{number}")
    except (OSError, zstandard.ZstdError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _text_of(line: bytes, place: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{place}: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f"{place}: expected an object with the field text, got {line[:80]!r}")
    return record["text"]


def _is_text(path: str) -> bool:
    return not TokenStore.open(path).metadata.with_weights


def _expand(path: str | os.PathLike) -> Path:
    return Path(os.path.expandvars(path)).expanduser()


def _require_text(text: bytes, name: str) -> None:
    if not text:
        raise ValueError(f"the {name} text is empty: there is nothing to measure")
