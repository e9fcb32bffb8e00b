import itertools
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmjax.data.packing import StreamRows, WholeRows, best_fit, empty_batch, merge_documents, row_of
from slmjax.data.token_store import TokenStore, TokenStoreWriter

BOS, EOS = 2, 3


def make_store(path, lengths, *, weights=None, shard_tokens=64):
    """Documents of unique tokens between bos and eos, so that a target tells which token of which document it is."""
    with TokenStoreWriter(
        path,
        tokenizer_sha256="t",
        vocab_size=1 << 17,
        config_sha256="c",
        with_weights=weights is not None,
        shard_tokens=shard_tokens,
    ) as writer:
        first = 10
        for i, length in enumerate(lengths):
            ids = [BOS, *range(first, first + length - 2), EOS][:length]
            first += length
            writer.add(ids, 100 + i, None if weights is None else weights[i])
    return TokenStore.open(path)


def read_all(rows, row_length, epoch=0):
    batch = empty_batch(rows.num_rows, row_length)
    for i in range(rows.num_rows):
        rows.read(i, epoch, row_of(batch, i))
    return batch


def learned(batch):
    """Sorted (previous token, token) pairs of every target that has weight, one entry each time it has."""
    return sorted(zip(batch.tokens[batch.weights > 0].tolist(), batch.targets[batch.weights > 0].tolist(), strict=True))


def all_pairs(store, documents=None):
    pairs = []
    for i in range(store.num_documents) if documents is None else documents:
        ids = store.document(i).tolist()
        pairs += itertools.pairwise(ids)
    return sorted(pairs)


def check_rows(batch):
    """The contract of a batch: documents in blocks from 1, padding at the end, positions rising in each."""
    for tokens, targets, weights, documents, positions in zip(*batch, strict=True):
        padding = documents == 0
        assert not padding[: np.count_nonzero(documents)].any()
        assert not tokens[padding].any()
        assert not weights[padding].any()
        assert set(np.diff(documents[~padding])) <= {0, 1}
        assert documents[~padding][0] == 1
        same = documents[1:] == documents[:-1]
        kept = same & ~padding[1:]
        np.testing.assert_array_equal(np.diff(positions)[kept], 1)
        assert not positions[1:][~same & ~padding[1:]].any()
        np.testing.assert_array_equal((positions == 0) & ~padding, (tokens == BOS) & ~padding)
        learns = weights[:-1] > 0
        np.testing.assert_array_equal(targets[:-1][learns & same], tokens[1:][learns & same])
    assert [field.dtype for field in batch] == [np.int32, np.int32, np.float32, np.int32, np.int32]


lengths_lists = st.lists(st.integers(2, 25), min_size=1, max_size=15)


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_lists, row_length=st.integers(1, 30))
def test_stream_learns_every_token_exactly_once(tmp_path_factory, lengths, row_length):
    store = make_store(tmp_path_factory.mktemp("s") / "s", lengths)
    rows = StreamRows(store, row_length)
    batch = read_all(rows, row_length)
    check_rows(batch)
    assert learned(batch) == all_pairs(store)
    assert rows.tokens_per_row * rows.num_rows == np.count_nonzero(batch.documents)
    assert np.count_nonzero(batch.documents) in (store.num_tokens, store.num_tokens - 1)


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_lists, row_length=st.integers(1, 30), data=st.data())
def test_overlapping_rows_learn_every_token_once_with_enough_context(tmp_path_factory, lengths, row_length, data):
    stride = data.draw(st.integers(1, row_length))
    num_documents = data.draw(st.integers(1, len(lengths)))
    store = make_store(tmp_path_factory.mktemp("s") / "s", lengths)
    rows = StreamRows(store, row_length, stride=stride, num_documents=num_documents)
    batch = read_all(rows, row_length)
    check_rows(batch)
    assert learned(batch) == all_pairs(store, range(num_documents))
    assert not batch.weights[1:, : row_length - stride].any()
    assert rows.num_bytes == sum(100 + i for i in range(num_documents))


def test_positions_and_documents_of_a_row_that_starts_inside_a_document(tmp_path):
    store = make_store(tmp_path / "s", [7, 4, 3])
    batch = read_all(StreamRows(store, 5), 5)
    np.testing.assert_array_equal(batch.documents, [[1, 1, 1, 1, 1], [1, 1, 2, 2, 2], [1, 2, 2, 2, 0]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 3, 4], [5, 6, 0, 1, 2], [3, 0, 1, 2, 0]])
    np.testing.assert_array_equal(batch.weights, [[1, 1, 1, 1, 1], [1, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
    merged = merge_documents(batch)
    assert merged.documents is None
    np.testing.assert_array_equal(merged.positions, [[0, 1, 2, 3, 4]] * 3)
    assert merged.weights is batch.weights


def test_weights_of_the_store_are_weights_of_targets(tmp_path):
    store = make_store(tmp_path / "s", [5, 4], weights=[[0, 0, 1, 1, 0], [0, 1, 0, 1]])
    stream = read_all(StreamRows(store, 9), 9)
    np.testing.assert_array_equal(stream.weights, [[0, 1, 1, 0, 0, 1, 0, 1, 0]])
    whole = read_all(WholeRows(store, 7, seed=0), 7)
    np.testing.assert_array_equal(whole.weights, [[0, 1, 1, 0, 1, 0, 1]])


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_lists, epoch=st.integers(0, 3))
def test_whole_documents_are_learned_once_and_never_split(tmp_path_factory, lengths, epoch):
    row_length = 24
    store = make_store(tmp_path_factory.mktemp("s") / "s", lengths)
    rows = WholeRows(store, row_length, seed=5)
    batch = read_all(rows, row_length, epoch)
    check_rows(batch)
    assert learned(batch) == all_pairs(store)
    assert rows.tokens_per_row * rows.num_rows == np.count_nonzero(batch.documents)
    starts = (np.diff(batch.documents, axis=1, prepend=0) > 0) & (batch.documents > 0)
    assert (batch.tokens[starts] == BOS).all()


def test_each_epoch_packs_anew_into_rows_filled_alike(tmp_path):
    store = make_store(tmp_path / "s", [5, 9, 5, 9, 6] * 20)
    rows = WholeRows(store, 16, seed=1)
    epochs = [read_all(rows, 16, epoch) for epoch in (0, 1, 0)]
    np.testing.assert_array_equal(epochs[0].documents, epochs[1].documents)
    assert (epochs[0].tokens != epochs[1].tokens).any()
    np.testing.assert_array_equal(epochs[0].tokens, epochs[2].tokens)
    again = read_all(WholeRows(store, 16, seed=1), 16, 1)
    np.testing.assert_array_equal(again.tokens, epochs[1].tokens)
    other = read_all(WholeRows(store, 16, seed=2), 16, 1)
    assert (other.tokens != epochs[1].tokens).any()


def test_long_documents_lose_their_end_or_are_left_out_and_counted(tmp_path, caplog):
    weights = [[0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1], [0, 1, 1]]
    store = make_store(tmp_path / "s", [7, 7, 3], weights=weights)
    with caplog.at_level(logging.WARNING):
        rows = WholeRows(store, 4, seed=0)
    assert "of 3 documents, 2 are longer than the row of 4; 1 of these lose their end, 1 are left out" in caplog.text
    batch = read_all(rows, 4)
    assert learned(batch) == sorted([(BOS, 10), (10, 11), (11, 12), (12, 13), *all_pairs(store, [2])])
    exact = WholeRows(store, 4, seed=0, truncate=False)
    assert learned(read_all(exact, 4)) == all_pairs(store, [2])
    assert exact.num_bytes == 102
    with pytest.raises(ValueError, match="no document has anything to learn within rows of 1 tokens"):
        WholeRows(store, 1, seed=0, truncate=False)


def test_a_store_without_anything_to_learn_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds 0 tokens"):
        StreamRows(make_store(tmp_path / "empty", []), 4)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=60))
def test_best_fit_equals_its_definition(lengths):
    lengths, capacity = sorted(lengths, reverse=True), 12
    room, rows = [], best_fit(np.array(lengths), capacity)
    for length, row in zip(lengths, rows.tolist(), strict=True):
        fitting = [r for r in room if r >= length]
        if fitting:
            assert room[row] == min(fitting)
        else:
            assert row == len(room)
            room.append(capacity)
        room[row] -= length
    assert min(room) >= 0
