"""How fast are texts encoded and stores written on one core, against SentencePiece and Hugging Face tokenizers?

    python benchmarks/tokenizer.py DOCUMENTS.jsonl.zst [--models DIRECTORY] [--passes 5] [--output RESULT.json]

Times are CPU times of the process, all its threads together; medians of several passes, rates of the same texts.
"first" is a tokenizer that was just loaded, "again" one that has seen the texts, as after much text of their kind.
The models are trained on a sample of the same documents and kept in DIRECTORY.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

os.environ["RAYON_NUM_THREADS"] = "1"  # of Hugging Face tokenizers; before they are imported

import pyarrow as pa
import sentencepiece
import tokenizers
import zstandard
from tokenizers import decoders, models, pre_tokenizers, trainers

from data_pipelines import tokenising
from data_pipelines.documents import TEXT_SCHEMA, Shard, parquet_writer
from data_pipelines.selecting import documents_path
from slmjax.data.tokenizer import Tokenizer, train_tokenizer

BATCH_BYTES = 8 << 20  # as a row group of the pipeline
Kind = Literal["bpe", "unigram"]
SLOW_DOCUMENTS = 300  # those that the others encode; their speed does not depend on how many
SIZES = (4096, 16384, 32768)


def read(path: str) -> list[str]:
    with open(path, "rb") as file:
        content = zstandard.ZstdDecompressor().stream_reader(file).read()
    return [json.loads(line)["text"] for line in content.splitlines()]


def batches(texts: list[str]) -> list[list[str]]:
    parts, size = [[]], 0
    for text in texts:
        if size > BATCH_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(text)
        size += len(text.encode())
    return parts


def seconds(call: Callable[[], object], passes: int, prepare: Callable[[], object] = lambda: None) -> float:
    times = []
    for _ in range(passes):
        prepare()
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def hugging_face(
    kind: Kind, size: int, texts: list[str], processor: sentencepiece.SentencePieceProcessor
) -> tokenizers.Tokenizer:
    """A byte-level BPE of the same size, or a unigram model with the same pieces."""
    if kind == "bpe":
        library = tokenizers.Tokenizer(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
        library.train_from_iterator(texts, trainer)
        return library
    vocabulary = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(size)]
    library = tokenizers.Tokenizer(models.Unigram(vocabulary, 1, True))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    return library


def measure_encoding(kind: Kind, size: int, texts: list[str], path: Path, passes: int) -> dict[str, float]:
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    parts = batches(texts)
    arrays = [pa.array(part) for part in parts]
    state: dict[str, Any] = {}

    def load():
        state["tokenizer"] = Tokenizer.load(path)

    def ours():
        state["ids"] = [state["tokenizer"].encode_arrays(array) for array in arrays]

    first = seconds(ours, passes, prepare=load)
    again = seconds(ours, passes)
    rows = [row for encoded in state["ids"] for row in encoded.lists()]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))

    plain = [row for part in parts for row in processor.encode(part, num_threads=1)]
    some = texts[:SLOW_DOCUMENTS]
    some_megabytes, some_tokens = sum(len(text.encode()) for text in some) / 1e6, sum(map(len, rows[:SLOW_DOCUMENTS]))
    sentence_piece = seconds(lambda: processor.encode(some, num_threads=1), passes)
    library = hugging_face(kind, size, some, processor)

    def theirs():
        state["theirs"] = [len(row.ids) for row in library.encode_batch_fast(some, add_special_tokens=False)]

    hugging = seconds(theirs, passes)
    num_tokens = sum(map(len, rows))
    return {
        "vocab_size": size,
        "bytes_per_token": 1e6 * megabytes / num_tokens,
        "first_MB_s": megabytes / first,
        "again_MB_s": megabytes / again,
        "again_Mtokens_s": num_tokens / again / 1e6,
        "sentencepiece_MB_s": some_megabytes / sentence_piece,
        "sentencepiece_Mtokens_s": some_tokens / sentence_piece / 1e6,
        "tokenizers_MB_s": some_megabytes / hugging,
        "tokenizers_Mtokens_s": sum(state["theirs"]) / hugging / 1e6,
        "documents_with_other_ids": sum(a != b for a, b in zip(rows, plain, strict=True)),
        "tokens_more": num_tokens - sum(map(len, plain)),
    }


def measure_store(texts: list[str], path: Path, passes: int) -> dict[str, float]:
    """The tasks of the pipeline: documents on disk to ids on disk, these to a token store."""
    tokenizer = Tokenizer.load(path)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    schema = TEXT_SCHEMA.append(pa.field("held_out", pa.bool_()))
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        shard = Shard(name="s", source="s", documents=len(texts), bytes=0)
        documents_path(root, shard).parent.mkdir()
        (root / "work/tokens").mkdir(parents=True)
        with parquet_writer(documents_path(root, shard), schema) as writer:
            for part in batches(texts):
                names = [str(i) for i in range(len(part))]
                columns = [names, names, [len(text.encode()) for text in part], part, [False] * len(part)]
                writer.write_batch(pa.record_batch(columns, schema=schema))
        common = {"root": root, "fingerprint": "", "conversations": False, "tokenizer_sha256": tokenizer.sha256}
        tokenise = tokenising.TokeniseTask(step="tokenise", name="s", shard=shard, tokenizer=path, **common)
        store = tokenising.StoreTask(
            step="stores", name="train", shards=[shard], vocab_size=tokenizer.vocab_size, config_sha256="", **common
        )
        first = seconds(lambda: tokenising.tokenise_shard(tokenise), passes, tokenising._load.cache_clear)
        again = seconds(lambda: tokenising.tokenise_shard(tokenise), passes)
        write = seconds(lambda: tokenising.write_store(store), passes)
    return {
        "tokenise_first_MB_s": megabytes / first,
        "tokenise_MB_s": megabytes / again,
        "store_MB_s": megabytes / write,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents")
    parser.add_argument("--models", default="tokenizer_models", type=Path)
    parser.add_argument("--passes", default=5, type=int)
    parser.add_argument("--passages", default=25_000, type=int, help="of at most 4,000 characters, to train on")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    pa.set_cpu_count(1)
    texts = read(arguments.documents)
    results = []
    for kind in get_args(Kind):
        for size in SIZES:
            path = arguments.models / f"{kind}{size}.model"
            result: dict[str, Any] = {"kind": kind}
            if not path.exists():
                start = time.process_time()
                train_tokenizer(texts, path, vocab_size=size, model_type=kind, max_passages=arguments.passages)
                result["train_seconds"] = time.process_time() - start
            result.update(measure_encoding(kind, size, texts, path, arguments.passes))
            result.update(measure_store(texts, path, arguments.passes))
            results.append(result)
            print(
                json.dumps({name: round(v, 2) if isinstance(v, float) else v for name, v in result.items()}), flush=True
            )
            if arguments.output is not None:
                arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
