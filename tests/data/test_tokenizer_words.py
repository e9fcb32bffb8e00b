"""Encoding by words against SentencePiece on whole texts."""

import itertools
import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slmjax.data import sentencepieces, tokenizer_words
from slmjax.data.tokenizer import Tokenizer, train_tokenizer
from slmjax.data.tokenizer_words import gathered

SOURCE = '''def push(self, item, *, limit=1024):
    """Adds an item -- "naïve" and Ünïcode, Привет мир, 你好世界。 — at 3.14159 and 0xdeadbeef."""
    if len(self.items) >= limit:  # ------------ too many ------------
        raise ValueError("too many items: don't push items")
\treturn self.items.append(item)

'''
VARIANTS = {
    "bpe": {},
    "unigram": {"model_type": "unigram"},
    "across": {"pieces_across_words": True},
    "digits": {"split_digits": False},
    "symbols": {"user_symbols": ["= limit", "\u2581", "n's", "\uee00", " -"]},
    "unigram_symbols": {"model_type": "unigram", "user_symbols": ["f(", "\u2581x"], "pieces_across_words": True},
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "t.model"
    return {
        name: train_tokenizer([SOURCE * 4], path, vocab_size=372, character_coverage=0.999, **settings)
        for name, settings in VARIANTS.items()
    }


@pytest.fixture(scope="module", autouse=True)
def short_texts_too():
    """Short texts are encoded by words, too, and the cache is full now and then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentencepieces, "_SHORT_BYTES", -1)
        patch.setattr(tokenizer_words, "_CACHE_WORDS", 100)
        yield


def whole(tokenizer, texts):
    return tokenizer._model._encode([text.encode() for text in texts])


def by_words(tokenizer, text):
    """The plain reference: cuts a text wherever no piece reaches across, and encodes the words; not for escapes."""
    pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab_size) if tokenizer.kind(i) in ("piece", "symbol")]
    inside = {pair for piece in pieces for pair in itertools.pairwise(piece.replace("\u2581", " ").encode())}
    words = [""]
    for char in text:
        if words[-1] and (words[-1].encode()[-1], char.encode()[0]) not in inside:
            words.append("")
        words[-1] += char
    ids = tokenizer._model._processor.encode(words, num_threads=1)
    return list(itertools.chain(*ids))


words = st.sampled_from(
    [
        *SOURCE.split(" "),
        " ",
        "  ",
        "\n",
        "\n    ",
        "\n\n\n ",
        "\t",
        "\r\n",
        "\0",
        "12",
        "7",
        "\u2581",
        "\uee00",
        "\uee001",
    ]
)
texts = st.lists(st.lists(words | st.text(max_size=6), max_size=15).map("".join), max_size=5)
NASTY = ["", " ", "\u2581 \uee00\u2581 ", "", "x\n" + " " * 77 + "y\n\n\n\n\n z  ", "----" * 9, "a", ""]


@pytest.mark.parametrize("name", [name for name in VARIANTS if "unigram" not in name])
@settings(max_examples=120, deadline=None)
@given(texts=texts)
@example(texts=NASTY)
@example(texts=["".join(map(chr, [*range(0xD800), *range(0xE000, 0xF900)]))])
@example(texts=[SOURCE * 50])
def test_the_ids_of_a_bpe_are_those_of_sentencepiece(tokenizers, name, texts):
    tokenizer = tokenizers[name]
    encoded = tokenizer.encode_arrays(texts)
    assert encoded.lists() == whole(tokenizer, texts)
    assert encoded.ids.dtype == tokenizer.dtype
    framed = tokenizer.encode_arrays(texts, framed=True).lists()
    assert framed == [[tokenizer.bos_id, *row, tokenizer.eos_id] for row in encoded.lists()]


@pytest.mark.parametrize("name", ["unigram", "unigram_symbols"])
@settings(max_examples=120, deadline=None)
@given(texts=texts)
@example(texts=NASTY)
def test_the_ids_of_a_unigram_are_those_of_its_words_and_as_likely_as_those_of_whole_texts(tokenizers, name, texts):
    tokenizer = tokenizers[name]
    rows = tokenizer.encode_arrays(texts).lists()
    scores = tokenizer._model._processor.get_score
    for text, row, at_once in zip(texts, rows, whole(tokenizer, texts), strict=True):
        assert tokenizer.decode(row) == text
        assert sum(map(scores, row)) == pytest.approx(sum(map(scores, at_once)), rel=1e-5, abs=1e-3)
    unescaped = [text for text in texts if not {"\u2581", "\uee00"} & set(text)]
    assert tokenizer.encode_batch(unescaped) == [by_words(tokenizer, text) for text in unescaped]


def test_ids_of_a_unigram_do_not_depend_on_what_stands_before(tokenizers):
    tokenizer = tokenizers["unigram"]
    alone = tokenizer.encode("-" * 37)
    for before in range(0, 60, 7):
        assert tokenizer.encode("item)\n" * before + "-" * 37)[-len(alone) :] == alone


def test_arrow_arrays_are_read_where_they_lie(tokenizers):
    tokenizer = tokenizers["bpe"]
    texts = [f"{SOURCE} {i}" for i in range(9)]
    for kind in (pa.string(), pa.large_string()):
        assert tokenizer.encode_arrays(pa.array(texts, kind).slice(2, 5)).lists() == tokenizer.encode_batch(texts[2:7])
        assert tokenizer.encode_arrays(pa.array([], kind)).lists() == []


def test_a_model_that_must_see_whole_texts_is_given_them(tokenizers, tmp_path):
    """Without bytes unknown characters in a row are one id; with a prefix or trimmed spaces words differ."""
    model = (tmp_path / "t.model").with_name("w.model")
    train_tokenizer([SOURCE * 4], model, vocab_size=372, character_coverage=0.999)
    for changed in ("add_dummy_prefix", "remove_extra_whitespaces"):
        proto = sentencepieces.ModelProto.FromString(model.read_bytes())
        setattr(proto.normalizer_spec, changed, True)
        tokenizer = Tokenizer(proto.SerializeToString())
        texts = ["a  b", " x", SOURCE]
        assert tokenizer.encode_batch(texts) == whole(tokenizer, texts) != tokenizers["bpe"].encode_batch(texts)
    proto = sentencepieces.ModelProto.FromString(model.read_bytes())
    proto.trainer_spec.byte_fallback = False
    kept = [piece for piece in proto.pieces if piece.type != proto.SentencePiece.BYTE]
    del proto.pieces[:]
    proto.pieces.extend(kept)
    tokenizer = Tokenizer(proto.SerializeToString())
    assert tokenizer.encode("ŒŒ ŒŒ") == whole(tokenizer, ["ŒŒ ŒŒ"])[0]
    assert tokenizer.encode("ŒŒ").count(1) == 1


def test_large_vocabularies_need_larger_numbers(tokenizers, tmp_path):
    model = tmp_path / "l.model"
    train_tokenizer([SOURCE * 4], model, vocab_size=360)
    proto = sentencepieces.ModelProto.FromString(model.read_bytes())
    for i in range(1 << 16):
        proto.pieces.add(piece=f"\u4e00{i}", score=-1e6 - i)
    tokenizer = Tokenizer(proto.SerializeToString())
    ids = tokenizer.encode_arrays([SOURCE, "\u4e0065535"], framed=True)
    assert ids.ids.dtype == np.uint32
    assert ids.lists()[0][1:-1] == whole(tokenizer, [SOURCE])[0]


def test_a_pickled_tokenizer_leaves_its_words_behind(tokenizers):
    tokenizer = tokenizers["bpe"]
    fresh = len(pickle.dumps(pickle.loads(pickle.dumps(tokenizer))))
    tokenizer.encode(SOURCE * 3)
    assert len(pickle.dumps(tokenizer)) == fresh
    assert pickle.loads(pickle.dumps(tokenizer)).encode(SOURCE) == tokenizer.encode(SOURCE)


def test_rows_as_arrays():
    encoded = gathered([[1, 2], [], [3]], np.dtype(np.uint16))
    assert encoded.lists() == [[1, 2], [], [3]]
    assert gathered([], np.dtype(np.uint32)).lists() == []
