import json
import lzma
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import zstandard

from slmjax import config as c
from slmjax.data.token_store import TokenStoreWriter
from slmjax.data.tokenizer import Tokenizer
from slmjax.evaluate import baselines


def witten_bell(train: bytes, context: bytes, symbol: int) -> float:
    """The definition, one byte at a time, with dictionaries."""
    followers = defaultdict(Counter)
    for end in range(len(train)):
        for order in range(min(4, end) + 1):
            followers[train[end - order : end]][train[end]] += 1
    probability = 1 / 256
    for order in range(min(4, len(context)) + 1):
        counts = followers.get(context[len(context) - order :])
        if counts:
            types = len(counts)
            probability = (counts[symbol] + types * probability) / (counts.total() + types)
    return probability


@pytest.mark.parametrize(
    "train", [b"abracadabra, abracadabra!", b"a", b"", bytes(range(256)) + b"\xff\xff\x00\x00\xff"]
)
def test_byte_model_is_the_definition(train):
    text = b"abra cadabra \xff\xff\x00 zz abracadabra"
    expected = [witten_bell(train, text[:end], text[end]) for end in range(len(text))]
    np.testing.assert_allclose(baselines.byte_model_probabilities(train, text), expected, rtol=1e-12)


def test_probabilities_of_the_next_byte_sum_to_one():
    train = b"the cat sat on the mat; the cat ate."
    for context in (b"", b"t", b"the cat", b"xyz", b"qthe"):
        last = [baselines.byte_model_probabilities(train, context + bytes([b]))[-1] for b in range(256)]
        assert math.isclose(sum(last), 1.0, rel_tol=1e-12)
        assert min(last) > 0


def test_bits_per_byte_of_known_cases():
    assert baselines.byte_model_bits_per_byte(b"", b"anything") == 8.0
    text = b"spam and eggs " * 50
    assert baselines.byte_model_bits_per_byte(text, text) < 1.0
    sizes = baselines.compressor_bits_per_byte(text)
    assert list(sizes) == ["gzip -9", "zstd -19", "xz -9"]
    assert sizes["xz -9"] == 8 * len(lzma.compress(text, preset=9)) / len(text)


def test_empty_text_is_refused():
    for measure in (baselines.compressor_bits_per_byte, lambda text: baselines.byte_model_bits_per_byte(b"abc", text)):
        with pytest.raises(ValueError, match="held-out text is empty"):
            measure(b"")


def test_reads_jsonl_with_and_without_zstd(tmp_path):
    lines = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in ("héllo\n", "", "wörld"))
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    for name in ("a.jsonl", "a.jsonl.zst"):
        assert baselines.read_text(tmp_path / name) == "héllo\nwörld".encode()
    assert baselines.read_text(tmp_path / "a.jsonl", max_bytes=3) == "hé".encode()


@pytest.mark.parametrize("content", [b'{"text": 3}\n', b"[]\n", b"not json\n", b'{"text": "\xff"}\n'])
def test_a_bad_line_is_named(tmp_path, content):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "good"}\n' + content)
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: "):
        baselines.read_text(tmp_path / "bad.jsonl")


def test_a_file_that_is_no_zstd_is_a_clear_error(tmp_path):
    (tmp_path / "bad.jsonl.zst").write_bytes(b"plain")
    with pytest.raises(ValueError, match="cannot be read"):
        baselines.read_text(tmp_path / "bad.jsonl.zst")


class LetterTokenizer(Tokenizer):
    """1 is "a", 2 is "b", ...; 0 begins and ends a document."""

    def __init__(self):
        self.sha256 = "0" * 64

    def decode(self, ids):
        return "".join(chr(96 + i) for i in ids if i > 0)


def write_store(path, *texts, weights=False):
    identity = {"tokenizer_sha256": "0" * 64, "config_sha256": "1" * 64}
    with TokenStoreWriter(path, vocab_size=30, with_weights=weights, **identity) as writer:
        for text in texts:
            ids = [0, *(ord(letter) - 96 for letter in text), 0]
            writer.add(ids, len(text), [1] * len(ids) if weights else None)
    return str(path)


def test_reads_whole_documents_of_a_token_store_up_to_max_tokens(tmp_path):
    write_store(tmp_path / "store", "ab", "cde")

    def read(**limits):
        return baselines.read_text(tmp_path / "store", tokenizer=LetterTokenizer(), **limits)

    assert read() == b"abcde"
    assert [read(max_tokens=n) for n in (1, 4, 8, 9)] == [b"ab", b"ab", b"ab", b"abcde"]
    assert read(max_bytes=4) == b"abcd"
    with pytest.raises(ValueError, match="needs the tokenizer"):
        baselines.read_text(tmp_path / "store")


def run_config(train, eval_sets):
    layer = c.LayerConfig(
        mixer=c.AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=2, rope=None),
        feed_forward=c.FeedForwardConfig(hidden=2),
        norm=c.RMSNormConfig(),
    )
    sources = tuple(c.TokenSourceConfig(path=path) for path in train)
    return c.RunConfig(
        output_dir="unused",
        steps=1,
        model=c.ModelConfig(vocab_size=30, width=2, pattern=(layer,), repeats=1, final_norm=c.RMSNormConfig()),
        input=c.InputConfig(
            tokenizer="", stages=(c.MixtureStageConfig(sources=sources),), batch_size=1, sequence_length=8
        ),
        optimizer=c.AdamWConfig(peak_lr=1.0),
        schedule=c.ConstantScheduleConfig(),
        checkpoint=c.CheckpointConfig(every_steps=1),
        evaluation=c.EvaluationConfig(
            sets=tuple(
                c.EvalSetConfig(name=name, source=c.TokenSourceConfig(path=path), max_tokens=max_tokens)
                for name, path, max_tokens in eval_sets
            )
        ),
    )


def test_baselines_of_a_run(tmp_path):
    train = [write_store(tmp_path / "train", "abcabcabd"), write_store(tmp_path / "chats", "zzz", weights=True)]
    held_out = write_store(tmp_path / "data" / "held_out", "abcab", "zz")
    talk = write_store(tmp_path / "data" / "talk", "abc", weights=True)
    elsewhere = write_store(tmp_path / "elsewhere", "xyz")
    sets = [("all", held_out, None), ("first", held_out, 7), ("talk", talk, None), ("far", elsewhere, None)]
    found = baselines.run_baselines(run_config(train, sets), LetterTokenizer(), tmp_path / "data")
    assert list(found) == ["all", "first"]
    for name, text in (("all", b"abcabzz"), ("first", b"abcab")):
        expected = baselines.byte_model_bits_per_byte(b"abcabcabd", text)
        assert found[name] == {**baselines.compressor_bits_per_byte(text), "order-4 bytes": expected}
    without_text = baselines.run_baselines(run_config(train[1:], sets), LetterTokenizer(), tmp_path / "data")
    assert list(without_text["all"]) == ["gzip -9", "zstd -19", "xz -9"]
    with pytest.raises(ValueError, match=r"no evaluation set of plain text lies in .*; the run has talk"):
        baselines.run_baselines(run_config(train, sets[2:3]), LetterTokenizer(), tmp_path / "data")
