"""Tokens of shards and stores against loops over documents."""

import numpy as np
import pyarrow as pa
import pytest

from data_pipelines import tokenising
from data_pipelines.documents import CONVERSATION_SCHEMA, TEXT_SCHEMA, Shard, parquet_writer
from data_pipelines.selecting import documents_path
from slmjax.data.conversations import learned_bytes, render
from slmjax.data.token_store import TokenStore, TokenStoreWriter
from slmjax.data.tokenizer import Tokenizer, train_tokenizer
from slmjax.data.tokenizer_json import import_tokenizer

TEXTS = [f"Document {i} says \u2581 häufig:\n    return {i * 37}\n" * (i % 5 + 1) for i in range(40)]
HELD_OUT = [i % 7 == 0 for i in range(len(TEXTS))]
TALKS = [[{"role": "user", "content": text}, {"role": "assistant", "content": f"{text[:9]}!"}] for text in TEXTS]


def json_model():
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return import_tokenizer(library.to_str().encode(), {})[0]


@pytest.fixture(scope="module", params=["tokenizer.model", "tokenizer.json"])
def tokenizer_path(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / request.param
    if path.suffix == ".json":
        path.write_bytes(json_model())
    else:
        train_tokenizer(TEXTS, path, vocab_size=330)
    return path


def write_documents(root, *, conversations):
    """Two shards, each of two row groups, the last one without a held-out document."""
    schema = (CONVERSATION_SCHEMA if conversations else TEXT_SCHEMA).append(pa.field("held_out", pa.bool_()))
    shards = []
    for name, rows in (("a", range(25)), ("b", range(25, len(TEXTS)))):
        shard = Shard(name=name, source="s", documents=len(rows), bytes=0)
        path = documents_path(root, shard)
        path.parent.mkdir(exist_ok=True)
        with parquet_writer(path, schema) as writer:
            for group in (rows[:10], rows[10:]):
                columns = [[str(i) for i in group]] * 2
                columns += [[len(TEXTS[i].encode()) for i in group], [TEXTS[i] for i in group]]
                columns += [[TALKS[i] for i in group]] if conversations else []
                columns += [[HELD_OUT[i] for i in group]]
                writer.write_batch(pa.record_batch(columns, schema=schema))
        shards.append(shard)
    return shards


@pytest.mark.parametrize("conversations", [False, True])
def test_stores_are_those_of_a_loop_over_documents(tmp_path, tokenizer_path, conversations):
    tokenizer = Tokenizer.load(tokenizer_path)
    (tmp_path / "work/tokens").mkdir(parents=True)
    shards = write_documents(tmp_path, conversations=conversations)
    common = {"root": tmp_path, "fingerprint": "", "conversations": conversations, "tokenizer_sha256": tokenizer.sha256}
    counted = []
    for shard in shards:
        done = tokenising.tokenise_shard(
            tokenising.TokeniseTask(step="tokenise", name=shard.name, shard=shard, tokenizer=tokenizer_path, **common)
        )
        counted.append(done.result["tokens"])
    for name, held_out in (("train", False), ("held_out", True)):
        tokenising.write_store(
            tokenising.StoreTask(
                step="stores", name=name, shards=shards, vocab_size=tokenizer.vocab_size, config_sha256="c", **common
            )
        )
        identity = {"tokenizer_sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "config_sha256": "c"}
        with TokenStoreWriter(tmp_path / "loop" / name, **identity, with_weights=conversations) as writer:
            for text, talk, is_held_out in zip(TEXTS, TALKS, HELD_OUT, strict=True):
                if is_held_out == held_out and conversations:
                    ids, weights = render(talk, tokenizer)
                    writer.add(ids, learned_bytes(talk), weights)
                elif is_held_out == held_out:
                    ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
                    writer.add(ids, len(text.encode()))
        store = TokenStore.open(tmp_path / name)
        assert store.metadata == TokenStore.open(tmp_path / "loop" / name).metadata
        assert store.num_documents == HELD_OUT.count(held_out)
        assert store.num_tokens == sum(tokens[name] for tokens in counted)
        store.verify()


def test_a_tokenizer_that_changed_meanwhile_is_refused(tmp_path, tokenizer_path):
    shard = write_documents(tmp_path, conversations=False)[0]
    task = tokenising.TokeniseTask(
        root=tmp_path,
        step="tokenise",
        name="a",
        fingerprint="",
        shard=shard,
        tokenizer=tokenizer_path,
        tokenizer_sha256="0" * 64,
        conversations=False,
    )
    with pytest.raises(ValueError, match="changed while it was used"):
        tokenising.tokenise_shard(task)


def test_ids_keep_their_type_and_place_as_bytes():
    for dtype in (np.uint16, np.uint32):
        encoded = tokenising.Encoded(np.arange(6, dtype=dtype), np.array([0, 2, 2, 6]))
        column = tokenising._binary(encoded)
        ids, offsets = tokenising._encoded(column.slice(1), np.dtype(dtype))
        assert ids.tolist() == [2, 3, 4, 5]
        assert offsets.tolist() == [0, 0, 4]
