"""Words of a whole batch of bytes are those that a plain loop over characters finds; equal words hash alike."""

import hashlib
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.stages import alphabet, hashed_words
from data_pipelines.stages.texts import Texts

PRIME = 0x9E3779B97F4A7C15

# Letters of one to four bytes, capitals among them, marks, digits, punctuation, white space, scripts without spaces.
CHARACTERS = "abcXYZ019_'-.,!?#@/ \t\n\x0b\x85\xa0éÉßñŁłΣσςЖжאبकि́ँ中文字かナไทย语。、「」\u3000🙂😀𝔸𝕬𠀀𠮷ﬁẞİK"  # noqa: RUF001
fuzzed = settings(deadline=None, max_examples=100)
texts = st.lists(st.text(CHARACTERS, max_size=80) | st.text(max_size=20), max_size=6)


def plain_words(text: str, *, punctuation: bool) -> list[str]:
    """Words of one document as a loop over its characters finds them."""
    words: list[str] = []
    inside = False
    for character in text:
        kind = alphabet.KINDS.all[min(ord(character), len(alphabet.KINDS.all) - 1)]
        separates = character.isspace() if punctuation else not kind & alphabet.WORD
        alone = not separates and kind & alphabet.IDEOGRAPH
        if separates or alone or not inside:
            words += [] if separates else [character]
        else:
            words[-1] += character
        inside = not separates and not alone
    return words


def found(documents: list[str], *, punctuation: bool) -> tuple[list[list[str]], hashed_words.Words]:
    words = hashed_words.split(Texts.of(documents), punctuation=punctuation)
    spelled = [words.texts.raw[start:end].decode() for start, end in zip(words.starts, words.ends, strict=True)]
    return [spelled[a:b] for a, b in zip(words.first[:-1], words.first[1:], strict=True)], words


@pytest.mark.parametrize("punctuation", [True, False])
@fuzzed
@given(documents=texts)
def test_words_are_those_of_a_plain_loop(punctuation, documents):
    spelled, words = found(documents, punctuation=punctuation)
    assert spelled == [plain_words(text, punctuation=punctuation) for text in documents]
    assert words.counts.tolist() == [len(part) for part in spelled]


@fuzzed
@given(documents=texts)
def test_equal_words_have_equal_hashes_and_others_do_not(documents):
    spelled, words = found(documents, punctuation=False)
    by_word: dict[str, set[int]] = {}
    for word, value in zip([word for part in spelled for word in part], words.hashes.tolist(), strict=True):
        by_word.setdefault(small(word), set()).add(value)
    assert all(len(values) == 1 for values in by_word.values())
    assert len({value for values in by_word.values() for value in values}) == len(by_word)


def small(word: str) -> str:
    """A word without letter case, as far as that does not change its length in UTF-8."""
    return "".join(
        lower if len(lower := c.lower()) == 1 and len(lower.encode()) == len(c.encode()) else c for c in word
    )


@pytest.mark.parametrize("punctuation", [True, False])
@fuzzed
@given(documents=st.lists(st.text(CHARACTERS, max_size=80) | st.text("aÉ中", max_size=90) | st.text(), max_size=6))
def test_hashes_are_those_of_a_plain_loop(punctuation, documents):
    spelled, words = found(documents, punctuation=punctuation)
    assert words.hashes.tolist() == [plain_hash(word) for part in spelled for word in part]


def plain_hash(word: str) -> int:
    content, value = small(word).encode(), 0
    if len(content) > 64:
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
    for i in range(0, len(content), 8):
        value = (value + int.from_bytes(content[i : i + 8], "little")) * PRIME % 2**64
        value ^= value >> 33
    return value


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 66, 1000])
def test_every_byte_of_a_long_word_counts(length):
    word = "".join(chr(ord("a") + i % 26) for i in range(length))
    others = [word[:i] + "1" + word[i + 1 :] for i in range(length)] + [word + "a", word[:-1]]
    hashes = hashed_words.split(Texts.of([word, *others]), punctuation=False).hashes
    assert hashes[0] not in hashes[1:]
    assert hashes[0] == hashed_words.split(Texts.of(["x " + word.upper()]), punctuation=False).hashes[1]


def test_the_hash_of_a_word_does_not_depend_on_the_batch_it_is_in():
    alone = hashed_words.split(Texts.of(["Straße"]), punctuation=False).hashes
    others = hashed_words.split(Texts.of(["中文", "a b", "", "straße 🙂"]), punctuation=False)
    assert others.hashes[others.first[3] :].tolist() == alone.tolist()


@fuzzed
@given(st.lists(st.integers(0, 2**64 - 1), max_size=40), st.integers(1, 20))
def test_runs_are_polynomials_of_the_words_in_them(values, n):
    hashes = np.array(values, np.uint64)
    expected = [
        sum(values[i + j] * pow(PRIME, n - 1 - j, 2**64) for j in range(n)) % 2**64 for i in range(len(values) - n + 1)
    ]
    assert hashed_words.runs(hashes, n).tolist() == expected
    assert hashed_words.runs_at(hashes, np.arange(len(expected)), n).tolist() == expected


@fuzzed
@given(st.lists(st.lists(st.integers(0, 2**64 - 1), max_size=9), max_size=5), st.integers(1, 12))
def test_runs_within_documents_are_of_all_words_where_these_are_too_few(documents, n):
    edges = np.cumsum([0, *map(len, documents)])
    hashes = np.array([value for values in documents for value in values], np.uint64)
    expected = [hashed_words.runs(np.array(values, np.uint64), min(n, len(values))) for values in documents if values]
    values, counts = hashed_words.runs_within(hashes, edges[:-1], edges[1:], n)
    assert values.tolist() == [value for part in expected for value in part.tolist()]
    assert counts[counts > 0].tolist() == [len(part) for part in expected]


@fuzzed
@given(st.integers(0, 2**64 - 1))
def test_mixing_is_that_of_murmurhash(value):
    mixed = value
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        mixed = (mixed ^ mixed >> 33) * factor % 2**64
    assert hashed_words.mix(np.array([value], np.uint64)).tolist() == [mixed ^ mixed >> 33]


@fuzzed
@given(st.lists(st.integers(0, 9), max_size=8), st.integers(1, 6))
def test_runs_stay_within_documents(counts, n):
    first = np.cumsum([0, *counts])
    expected = [start + i for start, count in zip(first, counts, strict=False) for i in range(count - n + 1)]
    assert hashed_words.run_starts(first, n).tolist() == expected


def test_marks_belong_to_their_word():
    word = unicodedata.normalize("NFD", "Éclair")
    assert found([f"«{word}»"], punctuation=False)[0] == [[word]]
