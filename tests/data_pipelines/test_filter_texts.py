# ruff: noqa: RUF001 (typographic characters are what is tested)
"""Words, lines and paragraphs as arrays are what plain Python finds, whatever the text and the batch."""

import re
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipelines.stages import alphabet, splitting
from data_pipelines.stages.counting import count
from data_pipelines.stages.ranges import Ranges, group
from data_pipelines.stages.repetition import occurred
from data_pipelines.stages.texts import Texts

# Characters on which the rules turn, more often than chance would have them.
_PIECES = st.sampled_from(
    [
        *(" ", "  ", "\t", "\n", "\n\n", "\r", "\r\n", "\x0b", "\x1c", "\x85", "\xa0", "\u2028", "\u3000", "\0"),
        *(
            "a",
            "b",
            "It's",
            "the",
            "of",
            "word",
            "naïve",
            "’",
            "don’t",
            "...",
            "…",
            ".",
            "!",
            "-",
            "•",
            "#",
            "{",
            "123",
        ),
        *("日本", "ไทย", "e\u0301", "🙂", "x" * 8, "x" * 9, "y" * 16, "z" * 17, "w" * 60, "v" * 130, "é" * 30),
    ]
)
TEXT = st.one_of(
    st.lists(_PIECES, max_size=40).map("".join), st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
)
BATCH = st.lists(TEXT, max_size=6)
SETTINGS = settings(deadline=None, max_examples=80)


def strings_of(ranges) -> list[list[str]]:
    """The ranges of each document."""
    found = ranges.strings(np.arange(len(ranges)))
    return [found[a:b] for a, b in zip(ranges.first[:-1], ranges.first[1:], strict=True)]


@SETTINGS
@given(BATCH)
@example([])
@example(["", "", "a", ""])
@example(["a\r", "\r\nb\r\n", "\n", "\r"])
def test_words_and_lines_are_those_of_str(texts):
    batch = Texts.of(texts)
    assert batch.strings == texts
    assert strings_of(batch.words("whitespace")) == [text.split() for text in texts]
    assert strings_of(batch.lines) == [text.split("\n") for text in texts]
    lines = strings_of(batch.text_lines)
    assert [found[:number] for found, number in zip(lines, batch.num_text_lines, strict=True)] == [
        text.splitlines() for text in texts
    ]
    assert all("".join(found[number:]) == "" for found, number in zip(lines, batch.num_text_lines, strict=True))
    assert strings_of(batch.paragraphs) == [re.split("\n{2,}", text.strip()) for text in texts]
    assert strings_of(batch.lines.stripped) == [[line.strip() for line in text.split("\n")] for text in texts]
    assert batch.num_chars.tolist() == [len(text) for text in texts]


@SETTINGS
@given(BATCH)
def test_counts_of_each_document(texts):
    batch = Texts.of(texts)
    assert batch.ellipses.tolist() == [text.count("...") + text.count("…") for text in texts]
    assert batch.hash_signs.tolist() == [text.count("#") for text in texts]
    assert batch.count_kind(alphabet.SPACE).tolist() == [sum(map(str.isspace, text)) for text in texts]
    assert batch.count_kind(alphabet.LETTER).tolist() == [sum(map(str.isalpha, text)) for text in texts]
    lines = batch.lines
    assert lines.num_words.tolist() == [len(line.split()) for text in texts for line in text.split("\n")]
    assert lines.chars.tolist() == [len(line) for text in texts for line in text.split("\n")]
    for prefixes in (("•", "-"), ("the", "日")):
        expected = [line.lstrip().startswith(prefixes) for text in texts for line in text.split("\n")]
        assert lines.start_with(prefixes).tolist() == expected
    suffixes = ("...", "…", "ไทย")
    assert lines.end_with(suffixes).tolist() == [
        line.rstrip().endswith(suffixes) for text in texts for line in text.split("\n")
    ]
    phrases = ("the", "x" * 9, "it's", "of", "#", "yyyyyyyyyyyyyyyyy")
    assert lines.contain(phrases).tolist() == [
        any(phrase in line.lower() for phrase in phrases)
        for text in texts
        for line in re.sub("[^\x00-\x7f]", "?", text).split("\n")
    ]
    assert lines.have("{").tolist() == ["{" in line for text in texts for line in text.split("\n")]


@pytest.mark.parametrize("splitter", ["whitespace", "unicode", "datatrove"])
@SETTINGS
@given(BATCH)
def test_what_is_known_of_words(splitter, texts):
    words = Texts.of(texts).words(splitter)
    found = strings_of(words)
    flat = [word for document in found for word in document]
    assert words.per_document.tolist() == list(map(len, found))
    assert words.document.tolist() == [i for i, document in enumerate(found) for _ in document]
    # Equal words, and no others, have equal hashes, in all batches.
    assert len(set(words.hashes.tolist())) == len(set(flat))
    again = Texts.of(list(reversed(texts))).words(splitter)
    pairs = zip([w for document in strings_of(again) for w in document], again.hashes.tolist(), strict=True)
    assert dict(pairs) == dict(zip(flat, words.hashes.tolist(), strict=True))
    before = words.chars_before(np.arange(len(words) + 1))
    assert np.diff(before).tolist() == list(map(len, flat))
    assert words.sum(words.bytes).tolist() == [len("".join(document).encode()) for document in found]


@SETTINGS
@given(st.lists(st.text(st.sampled_from("ab \n\t"), max_size=30), max_size=6))
def test_lines_and_paragraphs_have_the_same_hash_where_they_are_equal(texts):
    batch = Texts.of(texts)
    for parts in (batch.lines, batch.paragraphs):
        contents = parts.strings(np.arange(len(parts)))
        assert len(set(zip(contents, parts.hashes.tolist(), strict=True))) == len(set(contents))
        assert len(set(parts.hashes.tolist())) == len(set(contents))


@SETTINGS
@given(BATCH)
def test_words_by_datatrove_are_all_that_is_not_white_space(texts):
    found = strings_of(Texts.of(texts).words("datatrove"))
    assert ["".join(document) for document in found] == ["".join(text.split()) for text in texts]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's 1.5 km, isn’t it? snake_case", ["It's", "1", "5", "km", "isn’t", "it", "snake_case"]),
        ("'quoted' dogs' O'", ["quoted", "dogs", "O"]),
        ("naïve e\u0301tude", ["naïve", "e\u0301tude"]),
        ("日本語 and かな、漢字x", ["日", "本", "語", "and", "か", "な", "漢", "字", "x"]),
        ("", []),
        ("-- ... !", []),
    ],
)
def test_unicode_words(text, words):
    assert strings_of(Texts.of([text, "next"]).words("unicode")) == [words, ["next"]]


def test_flags_of_characters_are_pythons():
    points = [*range(0x3000), 0x3000, *range(0xFE00, 0x10000), *range(0x1D400, 0x1D800), 0x1F600, 0x20000, 0x10FFFF]
    characters = [chr(point) for point in points if not 0xD800 <= point < 0xE000]
    batch = Texts.of(characters)
    kinds = batch.kinds[batch.starts]
    for flag, method in ((alphabet.SPACE, str.isspace), (alphabet.LETTER, str.isalpha), (alphabet.DIGIT, str.isdigit)):
        assert ((kinds & flag) != 0).tolist() == list(map(method, characters))
    breaks = [len(f"a{character}b".splitlines()) == 2 for character in characters]
    assert ((kinds & alphabet.BREAK) != 0).tolist() == breaks
    marks = batch.marks[batch.starts]
    assert ((marks & alphabet.UPPER) != 0).tolist() == [character.isupper() for character in characters]
    punctuation = [unicodedata.category(character)[0] == "P" for character in characters]
    assert ((marks & alphabet.PUNCTUATION) != 0).tolist() == punctuation
    assert batch.marks_at(batch.ends - 1).tolist() == marks.tolist()
    assert not np.any(((kinds & alphabet.LETTER) != 0) & ((kinds & alphabet.MEANING) == 0))
    # Every byte of a character has its flags, and all but the first one more.
    for i in (200, 0x800, len(characters) - 1):
        flags = batch.kinds[batch.starts[i] : batch.ends[i]]
        assert (flags & 127 == kinds[i]).all()
        assert ((flags & alphabet.CONTINUES) != 0).tolist() == [False] + [True] * (len(flags) - 1)


@SETTINGS
@given(st.lists(st.integers(0, 255), max_size=300), st.integers(0, 255), st.data())
def test_flags_are_counted(flags, mask, data):
    array, places = np.array(flags, np.uint8), st.integers(0, len(flags))
    value = data.draw(st.integers(0, 255)) & mask
    starts, ends = zip(*data.draw(st.lists(st.tuples(places, places).map(sorted), min_size=1)), strict=True)
    counts = count(array, mask, value, np.array(starts), np.array(ends))
    assert counts.tolist() == [
        sum(flag & mask == value for flag in flags[a:b]) for a, b in zip(starts, ends, strict=True)
    ]


@SETTINGS
@given(st.lists(st.integers(0, 200), max_size=100).map(sorted), st.lists(st.integers(0, 220), max_size=50))
def test_the_first_range_at_or_after_positions(starts, positions):
    texts = Texts.of(["a" * 250])
    ranges = Ranges(texts, np.array(starts, np.int64), np.array(starts, np.int64))
    wanted = [sum(start < position for start in starts) for position in positions]
    assert ranges.index(np.array(positions, np.int64)).tolist() == wanted


@SETTINGS
@given(st.lists(st.lists(st.integers(0, 5) | st.integers(0, 2**64 - 1), max_size=40), max_size=4))
def test_keys_that_occurred_before_in_their_document(documents):
    keys = np.array([key for document in documents for key in document], np.uint64)
    first = np.append(0, np.cumsum([len(document) for document in documents], dtype=np.int64))
    wanted = [key in document[:i] for document in documents for i, key in enumerate(document)]
    assert occurred(keys, first).tolist() == wanted


@SETTINGS
@given(st.lists(st.integers(0, 5) | st.integers(0, 2**64 - 1), max_size=60))
def test_group_keeps_the_order_of_equal_keys(keys):
    order, runs = group(np.array(keys, np.uint64))
    groups = [part.tolist() for part in np.split(order, runs[1:])] if keys else []
    assert sorted(position for part in groups for position in part) == list(range(len(keys)))
    assert all(part == sorted(part) for part in groups)
    assert [{keys[position] for position in part} for part in groups] == [{keys[part[0]]} for part in groups]
    assert len({keys[part[0]] for part in groups}) == len(groups)


def test_group_of_keys_that_agree_in_what_is_sorted_by():
    # Keys whose products with the multiplier differ in the lowest bits only, where their places are written.
    inverse = pow(0x9E3779B97F4A7C15, -1, 2**64)
    keys = np.array([(low * inverse) % 2**64 for low in (1, 2, 1, 2, 3, 1)], np.uint64)
    order, runs = group(keys)
    assert sorted(part.tolist() for part in np.split(order, runs[1:])) == [[0, 2, 5], [1, 3], [4]]


@SETTINGS
@given(st.lists(TEXT, min_size=1, max_size=4), st.data())
def test_replacing_parts_and_choosing_lines(texts, data):
    batch = Texts.of(texts)
    lines = batch.lines
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=len(lines), max_size=len(lines))))
    changed = {
        row: f" <{row}> {'x' * row} ".encode() for row in data.draw(st.sets(st.integers(0, len(lines) - 1), max_size=3))
    }
    picked = batch.of_lines(lines, chosen, changed)
    plain, row = [], 0
    for text in texts:
        kept = []
        for line in text.split("\n"):
            kept += [changed[row].decode() if row in changed else line] * bool(chosen[row])
            row += 1
        plain.append("\n".join(kept))
    assert picked.strings == plain
    assert strings_of(picked.lines) == [text.split("\n") for text in plain]
    # Hashes of words go over from the texts before.
    assert strings_of(picked.words("whitespace")) == [text.split() for text in plain]
    assert (picked.words("whitespace").hashes == Texts.of(plain).words("whitespace").hashes).all()
    words = batch.words("whitespace")
    some = sorted(data.draw(st.sets(st.integers(0, len(words) - 1), max_size=5))) if len(words) else []
    edits = [(int(words.starts[i]), int(words.ends[i]), b"EDIT") for i in some]
    expected = [word for i, word in enumerate(words.strings(np.arange(len(words)))) if i not in some]
    edited = batch.replaced(edits)
    assert [word for text in edited.strings for word in text.split() if word != "EDIT"] == [
        word for word in expected if word != "EDIT"
    ]
    assert [len(text) for text in edited.strings] == edited.num_chars.tolist()


def test_slices_of_columns_and_large_documents():
    column = pa.array(["left out", "ab é", "", "last one", "left out too"])
    batch = Texts.from_array(column.slice(1, 3))
    assert batch.strings == ["ab é", "", "last one"]
    assert strings_of(batch.words("whitespace")) == [["ab", "é"], [], ["last", "one"]]
    long = Texts.of(["x" * 10_000_000, "y"])
    assert long.words("whitespace").bytes.tolist() == [10_000_000, 1]
    assert len(set(long.words("whitespace").hashes.tolist())) == 2
    assert long.words("datatrove").per_document.tolist() == [1, 1]


# Blocks that were looked for until their hash was that of the longer string: 600,000 bytes, 200,008 pieces.
_COLLIDING = "xxxxxxxxRsEwsBOvCNy7nQUwj4tU76onsOJfIp5Ozzzzzzzz"


def test_a_string_that_has_the_hash_of_a_longer_one_gets_no_words_outside_of_it():
    longer = "(a-b)." * 100_000
    assert len(set(Texts.of([longer, _COLLIDING]).words("whitespace").hashes.tolist())) == 1
    Texts.of([longer]).words("datatrove")  # and remembers how it is cut
    words = Texts.of([f"text {_COLLIDING}"]).words("datatrove")
    assert words.starts[0] == 1
    assert words.ends[-1] == words.texts.ends[0]
    assert (words.starts <= words.ends).all()
    assert (words.ends[:-1] <= words.starts[1:]).all()


def test_what_is_remembered_of_strings_of_many_pieces_is_bounded(monkeypatch):
    batches = [" ".join(f"({i}-{k}a)." * 40 for i in range(10)) for k in range(6)]
    wanted = [strings_of(Texts.of([text]).words("datatrove")) for text in batches]
    cuts = splitting._Cuts()
    monkeypatch.setattr(splitting, "_cuts", lambda: cuts)
    monkeypatch.setattr(splitting, "_MAX_PIECES", 1000)
    sizes = []
    for text, words in zip(batches, wanted, strict=True):
        assert strings_of(Texts.of([text]).words("datatrove")) == words
        sizes.append(len(cuts.offsets))
    assert max(sizes) < 2 * 1000 + len(wanted[0][0])
    assert min(sizes[1:]) < max(sizes)
