import itertools
import json
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmjax.data.token_store import TokenStore, TokenStoreWriter, check_tokenizer


def write(path, documents, *, vocab_size=1000, with_weights=False, **kwargs):
    with TokenStoreWriter(
        path, tokenizer_sha256="t", vocab_size=vocab_size, config_sha256="c", with_weights=with_weights, **kwargs
    ) as writer:
        for i, ids in enumerate(documents):
            writer.add(ids, 10 + i, np.asarray(ids) % 2 if with_weights else None)
    return TokenStore.open(path)


DOCUMENTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [11]]


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), max_size=12),
    shard_tokens=st.integers(1, 30),
    vocab_size=st.sampled_from([1 << 16, 1 << 17]),
    with_weights=st.booleans(),
)
def test_reads_back_what_was_written_across_shards(tmp_path_factory, lengths, shard_tokens, vocab_size, with_weights):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, vocab_size, n) for n in lengths]
    path = tmp_path_factory.mktemp("stores") / "store"
    store = write(path, documents, vocab_size=vocab_size, with_weights=with_weights, shard_tokens=shard_tokens)
    stream = np.concatenate([np.zeros(0, np.int64), *documents])
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    assert (store.num_tokens, store.num_documents) == (len(stream), len(documents))
    assert store.metadata.num_bytes == sum(10 + i for i in range(len(documents)))
    np.testing.assert_array_equal(store.document_starts, starts)
    np.testing.assert_array_equal(store.document_bytes, 10 + np.arange(len(documents)))
    for start in range(0, len(stream) + 1, 3):
        for stop in (start, start + 1, start + 7, len(stream) + 5):
            np.testing.assert_array_equal(store.tokens(start, stop), stream[start:stop])
            expected = stream[start:stop] % 2 if with_weights else np.ones(len(stream[start:stop]))
            np.testing.assert_array_equal(store.weights(start, stop), expected)
    for position in range(len(stream)):
        assert store.document_of(position) == np.searchsorted(starts, position, side="right") - 1
    for i, document in enumerate(documents):
        np.testing.assert_array_equal(store.document(i), document)
        np.testing.assert_array_equal(store.starts(i, i + 2), starts[i : i + 2])
    assert store.tokens(0, 4).dtype == (np.uint16 if vocab_size == 1 << 16 else np.uint32)
    store.verify()


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), max_size=20),
    cuts=st.lists(st.integers(0, 20), max_size=4),
    shard_tokens=st.integers(1, 30),
    with_weights=st.booleans(),
)
def test_documents_added_in_batches_make_the_same_store(tmp_path_factory, lengths, cuts, shard_tokens, with_weights):
    documents = [np.arange(n) + n for n in lengths]
    root = tmp_path_factory.mktemp("stores")
    one_by_one = write(root / "a", documents, with_weights=with_weights, shard_tokens=shard_tokens)
    identity = {"tokenizer_sha256": "t", "vocab_size": 1000, "config_sha256": "c", "with_weights": with_weights}
    bounds = [0, *sorted(min(cut, len(documents)) for cut in cuts), len(documents)]
    with TokenStoreWriter(root / "b", **identity, shard_tokens=shard_tokens) as writer:
        for first, last in itertools.pairwise(bounds):
            ids = np.concatenate([np.zeros(0, np.uint16), *documents[first:last]]).astype(np.uint16)
            offsets = np.concatenate([[0], np.cumsum(lengths[first:last], dtype=np.int64)])
            writer.add_batch(ids, offsets, 10 + np.arange(first, last), ids % 2 if with_weights else None)
    assert TokenStore.open(root / "b").metadata == one_by_one.metadata


def test_a_bad_batch_adds_nothing(tmp_path):
    with TokenStoreWriter(tmp_path / "s", tokenizer_sha256="t", vocab_size=9, config_sha256="c") as writer:
        for ids, offsets, message in (
            ([1, 2], [0, 1, 1], "at least one token"),
            ([1, 2], [0, 1], "offsets from 0 to 1"),
            ([1, 2], [1, 2], "offsets from 1 to 2"),
            ([1, 9], [0, 2], r"ids must lie in \[0, 9\), got 1 to 9"),
        ):
            with pytest.raises(ValueError, match=message):
                writer.add_batch(np.array(ids), np.array(offsets), np.ones(len(offsets) - 1))
        with pytest.raises(ValueError, match="weights must not be given"):
            writer.add_batch(np.array([1]), np.array([0, 1]), np.ones(1), np.ones(1))
        writer.add([3, 4], 7)
    store = TokenStore.open(tmp_path / "s")
    assert (store.num_documents, store.tokens(0, 9).tolist(), store.metadata.num_bytes) == (1, [3, 4], 7)


def test_indices_outside_are_errors(tmp_path):
    store = write(tmp_path / "s", DOCUMENTS)
    for call in (store.document, store.document_of):
        for index in (-1, 11):
            with pytest.raises(IndexError):
                call(index)


def test_pickling_drops_the_memory_maps(tmp_path):
    store = write(tmp_path / "s", DOCUMENTS * 1000)
    store.tokens(0, 5)
    pickled = pickle.dumps(store)
    assert len(pickled) < 2000
    np.testing.assert_array_equal(pickle.loads(pickled).document(3), DOCUMENTS[3])


def test_a_store_is_whole_or_absent(tmp_path):
    path = tmp_path / "s"
    writer = TokenStoreWriter(path, tokenizer_sha256="t", vocab_size=9, config_sha256="c")
    writer.add([1, 2], 1)
    assert not path.exists()
    with pytest.raises(ValueError, match="not a token store"):
        TokenStore.open(path)
    writer.abort()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError), TokenStoreWriter(path, tokenizer_sha256="t", vocab_size=9, config_sha256="c"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".s.partial").mkdir()
    (tmp_path / ".s.partial" / "00009.tokens.bin").write_bytes(b"left by a writer that was killed")
    write(path, DOCUMENTS)
    assert sorted(os.listdir(path)) == ["00000.bytes.npy", "00000.offsets.npy", "00000.tokens.bin", "metadata.json"]
    assert os.listdir(tmp_path) == ["s"]
    with pytest.raises(ValueError, match="exists and is not empty"):
        TokenStoreWriter(path, tokenizer_sha256="t", vocab_size=9, config_sha256="c")


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path):
    writer = TokenStoreWriter(tmp_path / "s", tokenizer_sha256="t", vocab_size=9, config_sha256="c")
    writer._tokens_file.close()
    writer._tokens_file = open("/dev/full", "wb")  # noqa: SIM115 (abort closes it)
    with pytest.raises(OSError, match="No space left"), writer:
        writer.add([1] * 100_000, 1)
    assert list(tmp_path.iterdir()) == []


def test_an_id_outside_the_vocabulary_is_never_read(tmp_path):
    store = write(tmp_path / "s", DOCUMENTS)
    file = tmp_path / "s" / "00000.tokens.bin"
    content = file.read_bytes()
    file.write_bytes(content[:4] + b"\xff\xff" + content[6:])
    store = TokenStore.open(store.path)
    assert len(store.tokens(0, 2)) == 2
    with pytest.raises(ValueError, match=r"holds the id 65535 near token 1, .* the store is damaged"):
        store.tokens(1, 4)


def test_damage_is_found(tmp_path):
    path = tmp_path / "s"
    store = write(path, DOCUMENTS, with_weights=True)
    for name in ("tokens.bin", "offsets.npy", "bytes.npy", "weights.bin"):
        file = path / f"00000.{name}"
        content = file.read_bytes()
        file.write_bytes(content[:-1])
        with pytest.raises(ValueError, match=f"{name} has {len(content) - 1} bytes, expected {len(content)}"):
            TokenStore.open(path)
        file.unlink()
        with pytest.raises(ValueError, match=f"{name} is missing"):
            TokenStore.open(path)
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ValueError, match=f"{name} does not have the sha256"):
            TokenStore.open(path).verify()
        file.write_bytes(content)
    store.verify()
    metadata = json.loads((path / "metadata.json").read_text())
    for change, message in (
        ({"format_version": 99}, "version 99"),
        ({"surplus": 1}, "surplus"),
        ({"shards": None}, "None"),
        ({"dtype": "float99"}, "float99"),
        ({"shards": [{**metadata["shards"][0], "num_documents": "x"}]}, "cannot be used"),
    ):
        (path / "metadata.json").write_text(json.dumps({**metadata, **change}))
        with pytest.raises(ValueError, match=message):
            TokenStore.open(path)


@pytest.mark.parametrize(
    ("ids", "weights", "message"),
    [
        ([], [], "at least one token"),
        ([1, 9], [0, 0], r"\[0, 9\), got 1 to 9"),
        ([-1], [0], "got -1"),
        ([1, 2], None, "must be given"),
        ([1, 2], [1], "2 times 0 or 1"),
        ([1, 2], [1, 2], "2 times 0 or 1"),
    ],
)
def test_writer_refuses_what_does_not_fit(tmp_path, ids, weights, message):
    writer = TokenStoreWriter(tmp_path / "s", tokenizer_sha256="t", vocab_size=9, config_sha256="c", with_weights=True)
    with pytest.raises(ValueError, match=message):
        writer.add(ids, 1, weights)
    writer.add([8, 0], 1, [0, 1])
    assert writer.close().num_tokens == 2


def test_tokenizer_mismatch_names_both_hashes(tmp_path):
    store = write(tmp_path / "s", DOCUMENTS)
    check_tokenizer(store, "t")
    with pytest.raises(ValueError, match=r"tokenizer t, the run's tokenizer is other"):
        check_tokenizer(store, "other")


def test_paths_expand(tmp_path, monkeypatch):
    monkeypatch.setenv("STORES", str(tmp_path))
    write("$STORES/s", DOCUMENTS)
    assert TokenStore.open("${STORES}/s").num_documents == 5
