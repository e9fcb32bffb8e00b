import json
import lzma
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import zstandard

from slmjax.data.token_store import TokenStoreWriter
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
    with pytest.raises(ValueError, match="held-out text is empty"):
        baselines.baselines(b"abc", b"")


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


class LetterTokenizer:
    sha256 = "0" * 64

    def decode(self, ids):
        return "".join(chr(96 + i) for i in ids if i > 0)


def test_reads_a_token_store_up_to_max_tokens(tmp_path):
    identity = {"tokenizer_sha256": "0" * 64, "config_sha256": "1" * 64}
    with TokenStoreWriter(tmp_path / "store", vocab_size=30, **identity) as writer:
        writer.add([0, 1, 2, 0], 2)
        writer.add([0, 3, 4, 5, 0], 3)
    read = lambda **limits: baselines.read_text(tmp_path / "store", tokenizer=LetterTokenizer(), **limits)  # noqa: E731
    assert read() == b"abcde"
    assert read(max_tokens=6) == b"abc"
    assert read(max_bytes=4) == b"abcd"
    with pytest.raises(ValueError, match="needs the tokenizer"):
        baselines.read_text(tmp_path / "store")
