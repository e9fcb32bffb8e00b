"""The last steps: the tokenizer, the tokens of every shard, and the two token stores."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import zstandard

from data_pipelines import tasks
from data_pipelines.documents import Shard, parquet_writer, read_batches
from data_pipelines.selecting import documents_path, of_side, read_side
from slmjax import files
from slmjax.config import TrainTokenizerConfig
from slmjax.data.conversations import learned_bytes, render
from slmjax.data.token_store import TokenStore, TokenStoreWriter
from slmjax.data.tokenizer import Tokenizer, train_tokenizer
from slmjax.data.tokenizer_words import Encoded, gathered, ids_dtype

_BYTES = pa.large_binary()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainTokenizerTask(tasks.Task):
    """Trains <root>/tokenizer.model on the training side."""

    config: TrainTokenizerConfig
    shards: Sequence[Shard]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokeniseTask(tasks.Task):
    """Tokenises the selected documents of one shard."""

    shard: Shard
    tokenizer: Path
    tokenizer_sha256: str
    conversations: bool

    @property
    def extent(self) -> tasks.Extent:
        """The shard."""
        return tasks.Extent(self.shard.bytes, self.shard.documents)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreTask(tasks.Task):
    """Writes the documents of one side, "train" or "held_out" (the task's name), as the token store <root>/<name>."""

    shards: Sequence[Shard]
    conversations: bool
    tokenizer_sha256: str
    vocab_size: int
    config_sha256: str


def train(task: TrainTokenizerTask) -> tasks.Done:
    """Trains the tokenizer."""
    started = time.monotonic()
    output = task.root / "tokenizer.model"
    rows = read_side(task.root, task.shards, held_out=False, columns=["text"])
    settings = {field.name: getattr(task.config, field.name) for field in dataclasses.fields(task.config)}
    with files.naming(output):
        train_tokenizer((row["text"] for row in rows), output, **settings)
    return tasks.finish(task, [output], {}, started=started)


def _tokens_path(root: Path, shard: Shard) -> Path:
    return root / "work" / "tokens" / f"{shard.name}.parquet"


def tokenise_shard(task: TokeniseTask) -> tasks.Done:
    """Writes ids (with bos and eos), learned bytes, side and, for conversations, weights of a shard's documents.

    The result counts the tokens of each side.
    """
    started = time.monotonic()
    output = _tokens_path(task.root, task.shard)
    tokenizer = _load(task.tokenizer, task.tokenizer_sha256)
    fields = [("ids", _BYTES), ("bytes", pa.int64()), ("learned_bytes", pa.int64()), ("held_out", pa.bool_())]
    schema = pa.schema([*fields, ("weights", _BYTES)] if task.conversations else fields)
    num_bytes = 0
    tokens = {"train": 0, "held_out": 0}
    with parquet_writer(output, schema, compression="none") as writer:
        for batch in read_batches(documents_path(task.root, task.shard)):
            sizes = learned = batch.column("bytes")
            weight_columns = []
            if task.conversations:
                conversations = batch.column("messages").to_pylist()
                rows, weights = zip(*(render(messages, tokenizer) for messages in conversations), strict=True)
                encoded = gathered(rows, tokenizer.dtype)
                learned = pa.array(map(learned_bytes, conversations), pa.int64())
                weight_columns = [_binary(gathered(weights, np.dtype(np.uint8)))]
            else:
                encoded = tokenizer.encode_arrays(batch.column("text"), framed=True)
            columns = [_binary(encoded), sizes, learned, batch.column("held_out"), *weight_columns]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            num_bytes += int(sizes.to_numpy().sum())
            held_out = batch.column("held_out").to_numpy(zero_copy_only=False)
            of_held_out = int(np.diff(encoded.offsets)[held_out].sum())
            tokens["held_out"] += of_held_out
            tokens["train"] += len(encoded.ids) - of_held_out
    return tasks.finish(task, [output], {"bytes": num_bytes, "tokens": tokens}, started=started)


@functools.lru_cache(maxsize=1)
def _load(path: Path, sha256: str) -> Tokenizer:
    """One a process, not one a task; another when the file has changed."""
    tokenizer = Tokenizer.load(path)
    if tokenizer.sha256 != sha256:
        raise ValueError(f"{path} changed while it was used; run the same command again")
    return tokenizer


def _binary(encoded: Encoded) -> pa.LargeBinaryArray:
    """Ids as bytes, a third of the time of lists of numbers in parquet."""
    buffers = [None, pa.py_buffer(encoded.offsets * encoded.ids.itemsize), pa.py_buffer(encoded.ids)]
    return pa.LargeBinaryArray.from_buffers(_BYTES, len(encoded.offsets) - 1, buffers)


def _encoded(column: pa.LargeBinaryArray, dtype: np.dtype) -> Encoded:
    _, offsets, content = column.buffers()
    bounds = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    ids = np.frombuffer(content or b"", np.uint8)[bounds[0] : bounds[-1]].view(dtype)
    return Encoded(ids, (bounds - bounds[0]) // dtype.itemsize)


def write_store(task: StoreTask) -> tasks.Done:
    """Writes one token store, documents in the order of the shards; of the held-out side also the text itself."""
    started = time.monotonic()
    store = task.root / task.name
    held_out = task.name == "held_out"
    if (store / "metadata.json").exists():  # of an earlier config; anything else there is not ours to remove
        files.remove_directory(store)
    writer = TokenStoreWriter(
        store,
        tokenizer_sha256=task.tokenizer_sha256,
        vocab_size=task.vocab_size,
        config_sha256=task.config_sha256,
        with_weights=task.conversations,
    )
    dtype = ids_dtype(task.vocab_size)
    text_bytes = 0
    with files.naming(store), writer:
        for shard in task.shards:
            for batch in read_batches(_tokens_path(task.root, shard)):
                side = of_side(batch, held_out=held_out)
                if len(side) == 0:
                    continue
                encoded, weights = _encoded(side.column("ids"), dtype), None
                if task.conversations:
                    weights = _encoded(side.column("weights"), np.dtype(np.uint8)).ids
                writer.add_batch(*encoded, side.column("learned_bytes").to_numpy(), weights)
                text_bytes += int(side.column("bytes").to_numpy().sum())
    metadata = TokenStore.open(store).metadata
    outputs = sorted(store.iterdir())
    if held_out:
        outputs.append(_write_text(task))
    result = {
        "documents": metadata.num_documents,
        "bytes": text_bytes,
        "tokens": metadata.num_tokens,
        "learned_bytes": metadata.num_bytes,
    }
    return tasks.finish(task, outputs, result, started=started)


def _write_text(task: StoreTask) -> Path:
    """Writes held_out.jsonl.zst, for whatever wants the held-out text rather than its tokens."""
    output = task.root / "held_out.jsonl.zst"
    columns = ["id", "text", *(["messages"] if task.conversations else [])]
    with (
        files.replacing(output) as partial,
        open(partial, "wb") as file,
        zstandard.ZstdCompressor().stream_writer(file) as stream,
    ):
        for row in read_side(task.root, task.shards, held_out=True, columns=columns):
            stream.write(orjson.dumps(row) + b"\n")
    return output
