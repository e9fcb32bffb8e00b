import dataclasses
import itertools

import numpy as np
import pytest

from slmjax.config import EvalSetConfig, InputConfig, MixtureStageConfig, TokenSourceConfig
from slmjax.data.batch import Batch
from slmjax.data.loader import eval_batches, eval_bytes, make_loader
from slmjax.data.token_store import TokenStore, TokenStoreWriter

BOS, EOS = 2, 3


def make_store(path, lengths, *, first_id=10):
    with TokenStoreWriter(
        path, tokenizer_sha256="t", vocab_size=1 << 17, config_sha256="c", shard_tokens=500
    ) as writer:
        for i, length in enumerate(lengths):
            writer.add([BOS, *range(first_id, first_id + length - 2), EOS], 100 + i)
            first_id += length
    return str(path)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    root = tmp_path_factory.mktemp("stores")
    return {
        "code": make_store(root / "code", [2 + 37 * i % 58 for i in range(90)]),
        "prose": make_store(root / "prose", [2 + 41 * i % 58 for i in range(30)], first_id=20_000),
        "chat": make_store(root / "chat", [9 + i % 5 for i in range(50)], first_id=40_000),
    }


@pytest.fixture(scope="module")
def config(stores):
    code, prose = (
        TokenSourceConfig(path=stores["code"], weight=0.7),
        TokenSourceConfig(path=stores["prose"], weight=0.3),
    )
    chat = TokenSourceConfig(path=stores["chat"], rows="whole", weight=0.5)
    return InputConfig(
        tokenizer="unused",
        stages=(
            MixtureStageConfig(sources=(code, prose)),
            MixtureStageConfig(start_step=7, sources=(chat, code)),
        ),
        batch_size=8,
        sequence_length=32,
    )


def load(config, *, start_step=0, steps=12, seed=3, **kwargs):
    return list(make_loader(config, seed=seed, start_step=start_step, steps=steps, **kwargs))


def shares(batch_size, process_count):
    """Which rows each process reads, as on a mesh whose devices lie in the order of the processes."""
    return np.split(np.arange(batch_size), process_count)


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        for field, other_field in zip(batch, other, strict=True):
            assert field.dtype == other_field.dtype
            np.testing.assert_array_equal(field, other_field)


def concatenated(batches):
    return Batch(*(np.concatenate(fields) for fields in zip(*batches, strict=True)))


def test_resuming_at_any_step_equals_never_having_stopped(config):
    whole = load(config)
    assert len(whole) == 12
    for start_step in (0, 1, 6, 7, 8, 11):
        assert_same(load(config, start_step=start_step), whole[start_step:])
    assert load(config, start_step=12) == []


def test_steps_to_come_do_not_depend_on_the_number_of_steps(config):
    assert_same(load(config, steps=9), load(config, steps=20)[:9])


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_any_number_of_processes_reads_the_same_global_batches(config, process_count):
    parts = [load(config, rows=rows.tolist()) for rows in shares(config.batch_size, process_count)]
    assert_same([concatenated(step) for step in zip(*parts, strict=True)], load(config))


def test_order_of_the_data_is_the_same_everywhere_and_in_every_version(config):
    """A change here changes what runs read after a resume: make it only on purpose, and say so in the changelog."""
    last = concatenated(load(config)).tokens[::8].max(axis=1).tolist()
    assert last == [2734, 20638, 2568, 20030, 72, 1544, 456, 1960, 40547, 1128, 40511, 1512]


def one_source(config, path, **changes):
    stages = (MixtureStageConfig(sources=(TokenSourceConfig(path=path),)),)
    return dataclasses.replace(config, stages=stages, **changes)


def test_an_epoch_is_every_row_once_and_the_next_has_another_order(config, stores):
    store = TokenStore.open(stores["code"])
    num_rows = -(-(store.num_tokens - 1) // 32)
    batches = concatenated(load(one_source(config, stores["code"], batch_size=1), steps=2 * num_rows))
    first, second = batches.tokens[:num_rows].tolist(), batches.tokens[num_rows:].tolist()
    assert sorted(first) == sorted(second)
    assert first != second
    pairs = sorted(pair for i in range(store.num_documents) for pair in itertools.pairwise(store.document(i).tolist()))
    learns = batches.weights[:num_rows] > 0
    seen = zip(batches.tokens[:num_rows][learns].tolist(), batches.targets[:num_rows][learns].tolist(), strict=True)
    assert sorted(seen) == pairs


def test_seeds_give_different_orders(config):
    first, second = (concatenated(load(config, seed=seed)).tokens for seed in (3, 4))
    assert (first != second).any()


def test_sources_have_their_shares_of_tokens_and_continue_across_stages(config):
    batches = load(config, steps=150)
    tokens = concatenated(batches[:7]).tokens
    assert np.mean(tokens[tokens >= 10] >= 20_000) == pytest.approx(0.3, abs=0.06)
    later = concatenated(batches[7:])
    real = later.documents > 0
    of_chat = (np.max(later.tokens, axis=1) >= 40_000)[:, None]
    # chat's rows are packed and partly padding, yet its tokens are 0.5 of 1.2: weights count what survives packing.
    assert np.mean(real[of_chat[:, 0]]) < 0.99
    assert np.count_nonzero(real & of_chat) / np.count_nonzero(real) == pytest.approx(0.5 / 1.2, abs=0.01)
    # code does not begin anew at step 7: its first epoch has every row once.
    rows = [tuple(row) for row in concatenated(batches).tokens.tolist() if 10 <= max(row) < 20_000]
    num_rows = len(set(rows))
    assert len(set(rows[:num_rows])) == num_rows > np.count_nonzero(np.max(tokens, axis=1) < 20_000)


def test_without_isolation_a_row_is_one_document(config):
    isolated = concatenated(load(config))
    batches = load(dataclasses.replace(config, document_isolation=False))
    assert all(batch.documents is None for batch in batches)
    for field in ("tokens", "weights"):
        merged = np.concatenate([getattr(batch, field) for batch in batches])
        np.testing.assert_array_equal(merged, getattr(isolated, field))
    for batch in batches:
        np.testing.assert_array_equal(batch.positions, np.tile(np.arange(32), (len(batch.tokens), 1)))


def test_wrong_tokenizer_and_doubled_source_are_refused(config, stores):
    assert len(load(config, tokenizer_sha256="t")) == 12
    with pytest.raises(ValueError, match="written with the tokenizer t, the run's tokenizer is x"):
        load(config, tokenizer_sha256="x")
    twice = (MixtureStageConfig(sources=(TokenSourceConfig(path=stores["code"]),) * 2),)
    with pytest.raises(ValueError, match="same source twice"):
        load(dataclasses.replace(config, stages=twice))


def pairs_learned(batch):
    learns = batch.weights > 0
    return sorted(zip(batch.tokens[learns].tolist(), batch.targets[learns].tolist(), strict=True))


@pytest.mark.parametrize(("stride", "rows"), [(None, "stream"), (8, "stream"), (32, "stream"), (None, "whole")])
@pytest.mark.parametrize("max_tokens", [None, 1, 200])
def test_evaluation_scores_every_token_once_and_knows_its_bytes(stores, stride, rows, max_tokens):
    source = TokenSourceConfig(path=stores["prose"], rows=rows)
    eval_set = EvalSetConfig(name="held_out", source=source, stride=stride, max_tokens=max_tokens)
    store = TokenStore.open(stores["prose"])
    ends = store.document_starts[1:]
    documents = [i for i in range(store.num_documents) if max_tokens is None or i == 0 or ends[i] <= max_tokens]
    if rows == "whole":
        documents = [i for i in documents if len(store.document(i)) - 1 <= 64]
    batches = list(eval_batches(eval_set, batch_size=4, sequence_length=64, tokenizer_sha256="t"))
    assert all(batch.tokens.shape == (4, 64) for batch in batches)
    expected = sorted(pair for i in documents for pair in itertools.pairwise(store.document(i).tolist()))
    assert pairs_learned(concatenated(batches)) == expected
    assert eval_bytes(eval_set, sequence_length=64) == sum(100 + i for i in documents)
    parts = [
        eval_batches(eval_set, batch_size=4, sequence_length=64, local_rows=rows.tolist()) for rows in shares(4, 2)
    ]
    assert_same([concatenated(step) for step in zip(*parts, strict=True)], batches)


def test_evaluation_leaves_out_whole_documents_that_do_not_fit(stores):
    source = TokenSourceConfig(path=stores["prose"], rows="whole")
    eval_set = EvalSetConfig(name="held_out", source=source)
    store = TokenStore.open(stores["prose"])
    fitting = [i for i in range(store.num_documents) if len(store.document(i)) - 1 <= 20]
    assert 0 < len(fitting) < store.num_documents
    batch = concatenated(list(eval_batches(eval_set, batch_size=4, sequence_length=20)))
    assert pairs_learned(batch) == sorted(
        pair for i in fitting for pair in itertools.pairwise(store.document(i).tolist())
    )
    assert eval_bytes(eval_set, sequence_length=20) == sum(100 + i for i in fitting)


def test_evaluation_without_isolation_and_with_too_long_a_stride(stores):
    eval_set = EvalSetConfig(name="held_out", source=TokenSourceConfig(path=stores["code"]), stride=40)
    batch = next(eval_batches(eval_set, batch_size=2, sequence_length=64, document_isolation=False))
    assert batch.documents is None
    np.testing.assert_array_equal(batch.positions, np.tile(np.arange(64), (2, 1)))
    with pytest.raises(ValueError, match="stride 40 of evaluation set 'held_out' exceeds the sequence_length 32"):
        eval_batches(eval_set, batch_size=2, sequence_length=32)
