import pickle

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slmjax.config.pipeline import FIXED_PIECES
from slmjax.data import sentencepieces
from slmjax.data.tokenizer import ASSISTANT, END, SYSTEM, USER, Tokenizer, train_tokenizer

SOURCE = '''class Stack:
    """A last-in, first-out list; see also `queue`."""

    def __init__(self, items=()):
        self.items = list(items)
        if len(self.items) > 1024:
            raise ValueError("too many items")

    def push(self, item):
        self.items.append(item)
\treturn 3.14159
'''
CONTROLS = [SYSTEM, USER, ASSISTANT, END, "<pad>", "<unk>", "<s>", "</s>"]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer([SOURCE * 3], path, vocab_size=400)
    return path


@pytest.fixture(scope="module")
def tokenizer(model_path):
    return Tokenizer.load(model_path)


nasty = st.lists(
    st.one_of(
        st.text(max_size=10),  # no surrogates, by default
        st.sampled_from(
            ["\t", "\r\n", "\n\n   ", "\0", "\u2581", "\ue000", "\uee00", "\uee001", "\uee000", " ", "é", "😀"]
        ),
        st.sampled_from([*CONTROLS, "<0x0A>", "▅", "\ufeff", "\ufffd", "\u2028", "def f(self):\n        return"]),
    ),
    max_size=12,
).map("".join)


@settings(max_examples=400, deadline=None)
@given(text=nasty)
@example(text="\u2581 \uee00\u2581 ")
@example(text="x\n" + " " * 77 + "y\n\n\n\n\n z  ")
@example(text="".join(chr(c) for c in range(0x3000)))
def test_round_trip_is_lossless_and_text_never_becomes_control_ids(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {tokenizer.control_id(name) for name in CONTROLS if name != "<unk>"}
    assert all(8 <= token_id < tokenizer.vocab_size for token_id in ids)


def test_long_texts_are_cut_without_changing_tokens_at_line_breaks(tokenizer, monkeypatch):
    text = SOURCE * 5 + "\n\n\n" * 4 + SOURCE
    whole = tokenizer.encode(text)
    monkeypatch.setattr(sentencepieces, "_MAX_BYTES", 200)
    assert tokenizer.encode(text) == whole
    line = "\n\n" + "word \u2581" * 200
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch([line, text])] == [line, text]


def test_a_line_break_with_indentation_is_one_piece_and_digits_are_single(tokenizer):
    pieces = [tokenizer.piece(token_id) for token_id in tokenizer.encode(":\n        return 1024")]
    assert pieces[:2] == [":", "\n" + "\u2581" * 7]
    assert pieces[2].startswith("\u2581r")  # the space belongs to the word
    assert pieces[-4:] == list("1024")


def test_special_ids_are_distinct_and_decode_to_nothing(tokenizer):
    ids = [tokenizer.control_id(name) for name in (SYSTEM, USER, ASSISTANT, END)]
    specials = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, *ids]
    assert len(set(specials)) == 7
    assert tokenizer.decode([*specials, *tokenizer.encode("a"), *specials]) == "a"
    with pytest.raises(ValueError, match=r"no control symbol 'return'"):
        tokenizer.control_id("return")


def test_training_is_deterministic_and_the_hash_is_of_the_file(tmp_path, model_path, tokenizer):
    again = train_tokenizer([SOURCE * 3], tmp_path / "again.model", vocab_size=400)
    assert (tmp_path / "again.model").read_bytes() == model_path.read_bytes()
    assert again.sha256 == tokenizer.sha256
    other = train_tokenizer([SOURCE * 3], tmp_path / "other.model", vocab_size=399)
    assert other.sha256 != again.sha256
    texts = [f"{word * 5} {i}" for i, word in enumerate(SOURCE.split() * 20)]
    samples = [
        train_tokenizer(texts, tmp_path / "s.model", vocab_size=360, max_passages=50, seed=seed) for seed in (1, 1, 2)
    ]
    assert samples[0].sha256 == samples[1].sha256 != samples[2].sha256


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_options_keep_the_round_trip(tmp_path, model_type):
    tokenizer = train_tokenizer(
        [SOURCE * 3, "\u2581 and a \u2585 and \t"],
        tmp_path / "t.model",
        vocab_size=360,
        model_type=model_type,
        user_symbols=["= list", "\u2581"],
        pieces_across_words=True,
    )
    ids = tokenizer.encode(SOURCE + "\u2581")
    assert tokenizer.decode(ids) == SOURCE + "\u2581"
    assert "=\u2581list" in [tokenizer.piece(token_id) for token_id in ids]


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([SOURCE], 5000, r"gives at most \d+\. Lower vocab_size, or take more text\.$"),
        ([SOURCE], 310, r"need 3\d\d\. Raise vocab_size or lower character_coverage\.$"),
        ([SOURCE], FIXED_PIECES, f"vocab_size must be more than {FIXED_PIECES}, which .* got {FIXED_PIECES}$"),
        ([SOURCE], 1, r"vocab_size must be more than 300, .* got 1$"),
        ([SOURCE], 2**31, r"and less than 2\*\*31, got 2147483648$"),
        ([], 400, r"the text is empty\.$"),
        (["\ud800"], 400, "surrogate"),
    ],
)
def test_training_errors_say_what_to_change(tmp_path, texts, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts, tmp_path / "t.model", vocab_size=vocab_size)
    assert not (tmp_path / "t.model").exists()


def test_bad_files_and_lone_surrogates_are_refused(tmp_path, tokenizer):
    path = tmp_path / "bad.model"
    with pytest.raises(ValueError, match=r"bad\.model.*No such file"):
        Tokenizer.load(path)
    path.write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"bad\.model is not a SentencePiece model"):
        Tokenizer.load(path)
    with pytest.raises(ValueError, match=r"lone surrogate.*at character 2"):
        tokenizer.encode("ab\ud800")


def test_pickles(tokenizer):
    assert pickle.loads(pickle.dumps(tokenizer)).encode(SOURCE) == tokenizer.encode(SOURCE)
