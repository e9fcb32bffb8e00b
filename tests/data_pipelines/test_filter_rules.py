"""The rules of papers: each with documents on both sides of its bound, and against plain Python."""

# ruff: noqa: RUF001 (typographic characters are what is tested)
import dataclasses
import re
from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import stages
from data_pipelines.stages.texts import Texts
from slmjax.config import (
    BadWordFilterConfig,
    BoilerplateFilterConfig,
    C4FilterConfig,
    C4ParagraphFilterConfig,
    EncodedDataFilterConfig,
    FineWebFilterConfig,
    GopherFilterConfig,
    LineFilterConfig,
    MathFilterConfig,
    RepetitionFilterConfig,
)
from slmjax.gin_loader import load

SETTINGS = settings(deadline=None, max_examples=60)


def only(config_class, **fields):
    """A config without any bound but those of `fields`."""
    names = [field.name for field in dataclasses.fields(config_class)]
    bounds = {name: None for name in names if name.startswith(("min_", "max_", "only_"))}
    return config_class(**{**bounds, **fields})


def measured(config, *texts: str) -> list[dict]:
    return pa.record_batch(stages.attributes(config, Texts.of(texts))).to_pylist()


def failed(config, *texts: str) -> list[str]:
    return stages.failed_rules(config, pa.record_batch(stages.attributes(config, Texts.of(texts)))).tolist()


def rewritten(config, *texts: str) -> list[str]:
    return stages.rewrite(config, Texts.of(texts))[0].strings


LINE = "x" * 10  # of a repetition test
LONG = "y" * 200


@pytest.mark.parametrize(
    ("config", "kept", "dropped"),
    [
        (only(GopherFilterConfig, min_words=3), "one two - three", "one two - ."),
        (only(GopherFilterConfig, max_words=2), "one - two", "one two three"),
        (only(GopherFilterConfig, min_mean_word_chars=3.0), "ab abcd !", "ab abc !!!!!!!!"),
        (only(GopherFilterConfig, max_mean_word_chars=3.0), "éàü abc !!!!!!!!!", "abc abcd"),
        (only(GopherFilterConfig, max_hashes_per_word=0.5), "# a b # c", "# a #"),
        (only(GopherFilterConfig, max_ellipses_per_word=0.5), "a... b… c d", "a... b… c…"),
        (only(GopherFilterConfig, max_bullet_line_share=0.5), "- a\nb\n • c\n\n", "- a\nb\n• c"),
        (only(GopherFilterConfig, max_ellipsis_line_share=0.5), "a...\nb", "a... \nb…\nc"),
        (only(GopherFilterConfig, min_alphabetic_word_share=0.5), "a1 22", "ab 1 2"),
        (only(GopherFilterConfig, min_stop_words=2), "the cat of the house", "The the cat"),
        (only(FineWebFilterConfig, min_terminal_line_share=0.5), "a.\nb\n\n", "a.\nb\nc. "),
        (only(FineWebFilterConfig, max_short_line_share=0.5), "a" * 31 + "\n" + "é" * 30, "a" * 31 + "\nb\nc"),
        (only(FineWebFilterConfig, max_duplicate_line_char_share=0.25), "ab\ncccc\nab", "ab\nccc\nab"),
        (only(FineWebFilterConfig, max_newlines_per_word=0.5), "a b\nc d\n", "a\nb\n"),
        (only(C4FilterConfig, min_sentences=3), "A a one. A b two!\nA a three?", 'A a one. A b two!"\nA no end here'),
        (only(C4FilterConfig, max_lorem_ipsum=1), "Some Lorem Ipsum.\n", "Some lorem ipsum.\nMore LOREM IPSUM."),
        (only(C4FilterConfig, max_curly_brackets=0), "Too {\nshort here it is.", "Here is a { bracket."),
        (
            only(C4ParagraphFilterConfig, min_long_line_chars=200),
            f"{LONG}\n{LONG}\n{LONG}\na",
            f"{LONG}\n{LONG}\n{LONG[1:]}",
        ),
        (only(C4ParagraphFilterConfig, min_long_line_chars=1), "a\nb\nc", "a\nb"),
        (only(BoilerplateFilterConfig, max_removed_word_share=0.25), "one two three\nalone", "one two\nalone"),
        (BadWordFilterConfig(words=("darn",)), "darning undarn", "oh DARN!"),
        (BadWordFilterConfig(words=("darn", "oh no"), max_bad_words=1), "Oh no, it", "Oh no, darn it"),
        (only(EncodedDataFilterConfig, max_encoded_chars=64), "x " + "A" * 64, "x " + "A" * 65),
        (only(EncodedDataFilterConfig, max_encoded_share=0.5), "." * 64 + "A" * 64, "." * 63 + "A" * 64),
        (only(MathFilterConfig, min_math_marks=2), r"$x$ and \alpha", r"$x$ and \notacommand"),
        (only(MathFilterConfig, min_formulas=2), r"$x$ and \( y \)", "$x$ and 5$"),
        (only(MathFilterConfig, min_latex_commands=1), r"\frac{1}{2}", r"\fracture"),
        (only(MathFilterConfig, max_accented_share=0.5), "éa", "éà"),
        (only(LineFilterConfig, max_lines=2), "a\n\nb\n", "a\nb\nc"),
        (only(LineFilterConfig, min_lines=2), "a\nb", "a\n\n "),
        (only(RepetitionFilterConfig, counting="datatrove", max_duplicate_line_share=0.25), "a\nb\nc\n\na", "a\nb\na"),
        (
            only(RepetitionFilterConfig, counting="datatrove", max_top_ngram_share=(0.5, 1.0, 1.0)),
            "ab cd efgh",
            "ab cd efg",
        ),
    ],
)
def test_each_rule_allows_its_bound_and_drops_what_is_beyond(config, kept, dropped):
    names = [field.name for field in dataclasses.fields(config)]
    rules = [name for name in names if name.startswith(("min_", "max_")) and getattr(config, name) is not None]
    assert failed(config, kept, dropped) == ["", rules[0]]


def test_defaults_are_those_of_the_papers():
    assert GopherFilterConfig() == GopherFilterConfig(
        min_words=50, max_words=100_000, min_mean_word_chars=3, max_mean_word_chars=10, max_hashes_per_word=0.1,
        max_ellipses_per_word=0.1, max_bullet_line_share=0.9, max_ellipsis_line_share=0.3,
        min_alphabetic_word_share=0.8, min_stop_words=2,
    )  # fmt: skip
    assert FineWebFilterConfig() == FineWebFilterConfig(
        min_terminal_line_share=0.12, max_short_line_share=0.67, max_duplicate_line_char_share=0.01,
        max_newlines_per_word=0.3, short_line_chars=30,
    )  # fmt: skip
    assert C4FilterConfig() == C4FilterConfig(min_sentences=5, line_words=3, word_chars=1000, require_terminal=True)
    assert BoilerplateFilterConfig() == BoilerplateFilterConfig(max_removed_word_share=0.05, uppercase_share=0.5)
    assert EncodedDataFilterConfig() == EncodedDataFilterConfig(max_encoded_chars=1024, max_encoded_share=0.5)


@pytest.mark.parametrize(
    ("config", "text", "left"),
    [
        (C4FilterConfig(), "A line here.\n  Another fine one!  \n\nShort one.", "A line here.\nAnother fine one!"),
        (C4FilterConfig(), "What is this...\nSaid 'so it is'\nAnd \"end here\"", "Said 'so it is'\nAnd \"end here\""),
        (C4FilterConfig(require_terminal=False), "no end at all\ntwo words", "no end at all"),
        (C4FilterConfig(), "You need JavaScript here.\nThis site uses Cookies, it is.\nWe stay here.", "We stay here."),
        (C4FilterConfig(word_chars=5), "éééééé so it is.\nfive5 so it.", "five5 so it."),
        (C4FilterConfig(), "It was[1] so[citation needed], and [12]more.[edit]", "It was so, and more."),
        (C4FilterConfig(), "It was so. [1]\nIt was so.", "It was so."),  # as in C4, a space at the end remains
        (C4FilterConfig(remove_citations=False), "It was[1] so.", "It was[1] so."),
        (C4FilterConfig(remove_javascript=False, policy_phrases=()), "On javascript and use of cookies.", None),
        (C4FilterConfig(), "So it was.\u2028So it is.\rSo it will be.", "So it was.\nSo it is.\nSo it will be."),
        (C4FilterConfig(), "nothing is\n\nleft", ""),
        (BoilerplateFilterConfig(), "MOSTLY CAPITALs\nHALF half\n\nSo it is", "HALF half\n\nSo it is"),
        (BoilerplateFilterConfig(), "12345\nHere\twe\n1,234 Likes\n• 3.4k followers!\n3 apples", "Here\twe\n3 apples"),
        (BoilerplateFilterConfig(), "one\ntwo words\n\n\nthree\n", "two words"),
        (BoilerplateFilterConfig(), "Sign-in to see\nSo it is Read more...\nNo items in cart", "to see\nSo it is\nNo"),
        (BoilerplateFilterConfig(), "Read more...\nA b", "A b"),
        (BoilerplateFilterConfig(), "a b c d e f g h i j Read more...", None),
    ],
)  # fmt: skip
def test_what_is_left_of_lines(config, text, left):
    assert rewritten(config, "before it.", text, "after it.")[1] == (text if left is None else left)


def test_what_was_removed_is_counted():
    text = (
        "It stays here.\nNot ended here\nToo short.\nOn javascript here.\n\nRead the privacy policy, please.\n"
        + "x" * 1001
        + " is too long.\nA [1] citation here.\n"
    )
    (row,) = measured(C4FilterConfig(), text)
    assert {name: row[name] for name in row if name.startswith("removed_")} == {
        "removed_long_word_lines": 1,
        "removed_unfinished_lines": 2,  # the blank one
        "removed_short_lines": 1,
        "removed_javascript_lines": 1,
        "removed_policy_lines": 1,
        "removed_citations": 1,
    }
    assert row["bytes"] == len("It stays here.\nA  citation here.")
    (row,) = measured(BoilerplateFilterConfig(), "ALL CAPS\n12 34\n1234\n12 views\nalone\nSign-in now then\nso it is")
    assert {name: row[name] for name in row if name.startswith("removed_")} == {
        "removed_word_share": pytest.approx(7 / 14),
        "removed_uppercase_lines": 1,
        "removed_numeric_lines": 1,
        "removed_counter_lines": 1,
        "removed_single_word_lines": 1,
        "removed_phrases": 1,
    }


def test_a_text_of_which_nothing_is_left_is_empty():
    assert failed(only(C4FilterConfig), "no end", "It ends here.") == ["empty", ""]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", (3, 3)),
        ('He said "go." She went.', (2, 2)),
        ("It costs 3.5 dollars, e.g. now", (2, 1)),  # spaCy knows the abbreviation
        ("No end", (1, 1)),
        ("Wait... what", (2, 1)),  # to spaCy ... is no stop
        ("Ends.  ", (1, 1)),
        ("Space.  More", (2, 2)),
        ("Odd .  )", (2, 2)),
        ("“Quoted.” Next", (2, 2)),
    ],
)  # fmt: skip
def test_sentences(text, sentences):
    for rule, expected in zip(("punctuation", "datatrove"), sentences, strict=True):
        config = C4FilterConfig(sentences=rule, require_terminal=False, line_words=1)
        assert measured(config, text)[0]["sentences"] == expected, rule


def test_bad_words_stand_alone_unless_the_language_has_no_spaces(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("heck\nfoo bar\n🖕\n\nünwort\n")
    config = BadWordFilterConfig(path=str(path), words=("x",))
    texts = ["Heck! heck", "checkheck", "a FOO bar's", "foo  bar", "so 🖕.", "ÜNWORT", "x_y x", "heck_", "a\nheck"]
    assert [row["bad_words"] for row in measured(config, *texts)] == [2, 0, 1, 0, 1, 1, 1, 0, 1]
    apart = BadWordFilterConfig(words=("heck", "悪"), whole_words=False)
    assert [row["bad_words"] for row in measured(apart, "checkheck", "極悪人")] == [2, 1]


@given(st.lists(st.text(st.sampled_from("abAB _-é\n"), max_size=30), max_size=4))
@SETTINGS
def test_bad_words_are_those_of_a_regular_expression(texts):
    words = ("a", "ab", "ba a", "bab-a", "-b", "aab_", "é")
    plain = [
        sum(len(re.findall(rf"(?<!\w)(?={re.escape(word)}(?!\w))", text.lower())) for word in words) for text in texts
    ]
    starts_apart = [word for word in words if not re.match(r"\w", word)]
    assert all(re.match(r"\W", word) for word in starts_apart)
    assert [row["bad_words"] for row in measured(BadWordFilterConfig(words=words), *texts)] == plain


def test_encoded_data():
    hexadecimal = " ".join(f"{i:02x}" for i in range(20))
    escapes = "".join(f"\\u{i:04x}" for i in range(9))
    rows = measured(
        EncodedDataFilterConfig(),
        "A" * 63, "so: " + "QUJD\n" * 20, f"bytes: {hexadecimal}.", "0x01,0x02,0x03,0x04,0x05,0x06,0x07,0x08,",
        f"'{escapes}'", "\\u12", "fine words, and no data", "",
    )  # fmt: skip
    assert [row["encoded_chars"] for row in rows] == [0, 100, 59, 40, 54, 0, 0, 0]


# --- plain Python, after datatrove 0.10.1 -----------------------------------------------------------------------------


def plain_gopher(text: str) -> dict[str, float]:
    words, lines = text.split(), text.splitlines()
    symbols = set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~…。、？！“”’•") - {"•"}
    meaning = [word for word in words if any(character not in symbols for character in word)]
    number = max(len(words), 1)
    return {
        "words": len(meaning),
        "mean_word_chars": sum(map(len, meaning)) / max(len(meaning), 1),
        "hashes_per_word": text.count("#") / number,
        "ellipses_per_word": (text.count("...") + text.count("…")) / number,
        "bullet_line_share": sum(line.lstrip().startswith(("•", "-")) for line in lines) / max(len(lines), 1),
        "ellipsis_line_share": sum(line.rstrip().endswith(("...", "…")) for line in lines) / max(len(lines), 1),
        "alphabetic_word_share": sum(any(map(str.isalpha, word)) for word in words) / number,
        "stop_words": len({"the", "of"} & set(words)),
    }


def plain_fineweb(text: str) -> dict[str, float]:
    lines = [line for line in text.split("\n") if line.strip()]
    again = [line for i, line in enumerate(lines) if line in lines[:i]]
    number = max(len(lines), 1)
    return {
        "terminal_line_share": sum(line.endswith((".", "!", "?", "。")) for line in lines) / number,
        "short_line_share": sum(len(line) <= 5 for line in lines) / number,
        "duplicate_line_char_share": len("".join(again)) / max(len(text.replace("\n", "")), 1),
        "newlines_per_word": text.count("\n") / max(len(text.split()), 1),
    }


def plain_repetition(text: str) -> dict[str, object]:
    def duplicates(parts):
        return [part for i, part in enumerate(parts) if part in parts[:i]]

    words, size = text.split(), max(len(text), 1)
    lines, paragraphs = re.split("\n+", text) if text else [], re.split("\n{2,}", text.strip())
    top, again = [], []
    for n in (2, 3, 4):
        grams = Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
        gram, times = grams.most_common(1)[0] if grams else ("", 0)
        top.append(min(1.0, len(gram) * times / size))
    for n in range(5, 11):
        seen, chars, i = set(), 0, 0
        while i <= len(words) - n:
            gram = tuple(words[i : i + n])
            chars += len("".join(gram)) if gram in seen else 0
            i += n if gram in seen else 1
            seen.add(gram)
        again.append(chars / size)
    return {
        "duplicate_line_share": len(duplicates(lines)) / max(len(lines), 1),
        "duplicate_line_char_share": len("".join(duplicates(lines))) / size,
        "duplicate_paragraph_share": len(duplicates(paragraphs)) / len(paragraphs),
        "duplicate_paragraph_char_share": len("".join(duplicates(paragraphs))) / size,
        "top_ngram_share": pytest.approx(top),
        "duplicate_ngram_share": pytest.approx(again),
    }


_WORDS = st.sampled_from(["the", "of", "cat", "naïve", "…", "...", "-", "•", "#", "a.", "12", "日本。", "longer-word!"])
_GAPS = st.sampled_from([" ", " ", " ", "\n", "\n\n", "  ", " \n", "\u2028", "\r\n"])
_SENTENCES = st.lists(st.tuples(_WORDS, _GAPS), max_size=60).map(lambda pairs: "".join(map("".join, pairs)))


@given(st.lists(_SENTENCES, max_size=4))
@SETTINGS
def test_gopher_and_fineweb_agree_with_plain_python(texts):
    for row, text in zip(measured(GopherFilterConfig(stop_words=("the", "of")), *texts), texts, strict=True):
        assert row == pytest.approx(plain_gopher(text))
    for row, text in zip(measured(FineWebFilterConfig(short_line_chars=5), *texts), texts, strict=True):
        assert row == pytest.approx(plain_fineweb(text))


@given(st.lists(_SENTENCES, max_size=3))
@SETTINGS
def test_repetition_counted_as_datatrove_does_agrees_with_plain_python(texts):
    for row, text in zip(measured(RepetitionFilterConfig(counting="datatrove"), *texts), texts, strict=True):
        expected = plain_repetition(text)
        assert row["top_ngram_share"] == expected.pop("top_ngram_share")
        assert row["duplicate_ngram_share"] == expected.pop("duplicate_ngram_share")
        shares = {name: row[name] for name in expected}
        assert shares == pytest.approx(expected)


# --- all filters ------------------------------------------------------------------------------------------------------

ALL = [
    GopherFilterConfig(), GopherFilterConfig(splitter="unicode"), FineWebFilterConfig(splitter="datatrove"),
    C4FilterConfig(), C4FilterConfig(sentences="datatrove", require_terminal=False, line_words=1),
    C4ParagraphFilterConfig(),
    BoilerplateFilterConfig(max_removed_word_share=1.0), BadWordFilterConfig(words=("a", "b c", "🙂")),
    EncodedDataFilterConfig(), MathFilterConfig(), RepetitionFilterConfig(splitter="unicode"), LineFilterConfig(),
    RepetitionFilterConfig(splitter="datatrove", counting="datatrove"),
]  # fmt: skip
_ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
_ODD = st.sampled_from(
    ["", "\0\0", "\n\n\n", "\r\n \x85", "$" * 9 + "\\", "[1][", "{", "\\u" * 9, "a" * 300, "\ufeff", "İ" * 9]
)


@pytest.mark.parametrize("config", ALL, ids=lambda config: type(config).__name__)
@given(texts=st.lists(_ANY | _ODD | _SENTENCES, max_size=5))
@settings(deadline=None, max_examples=40)
def test_any_text_is_measured_and_other_documents_do_not_matter(config, texts):
    alone = [row for text in texts for row in measured(config, text)]
    assert measured(config, *texts) == alone
    for row in alone:
        for value in row.values():
            numbers = value if isinstance(value, list) else [value]
            assert all(number >= 0 and number < float("inf") for number in numbers)
    if isinstance(config, stages.RewriteConfig):
        changed = rewritten(config, *texts)
        assert changed == [text for one in texts for text in rewritten(config, one)]
        assert [row["bytes"] for row in alone] == [len(text.encode()) for text in changed]


@pytest.mark.parametrize("config", ALL, ids=lambda config: type(config).__name__)
def test_ten_megabytes_in_one_line(config):
    assert len(measured(config, "word " * 2_000_000, "short")) == 2


def test_a_config_with_rewrites_loads(tmp_path):
    path = tmp_path / "config.gin"
    path.write_text(
        'PipelineConfig.output_dir = "x"\nPipelineConfig.sources = (@FilesSourceConfig(),)\n'
        'FilesSourceConfig.paths = ("x",)\nPipelineConfig.tokenizer = @TrainTokenizerConfig()\n'
        "TrainTokenizerConfig.vocab_size = 1000\n"
        "PipelineConfig.stages = (@C4FilterConfig(), @GopherFilterConfig(), @MaskPersonalDataConfig())\n"
        'GopherFilterConfig.splitter = "datatrove"\nMaskPersonalDataConfig.kinds = ("email", "ip")\n'
    )
    config = load([path]).config
    assert config.stages[1].splitter == "datatrove"
    assert config.stages[2].kinds == ("email", "ip")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GopherFilterConfig(stop_words=("two words",)), "stop_words must be words without white space"),
        (lambda: GopherFilterConfig(stop_words=tuple(map(str, range(1001)))), "stop_words must be at most 1,000 words"),
        (lambda: GopherFilterConfig(max_bullet_line_share=2.0), "max_bullet_line_share must lie between 0 and 1"),
        (lambda: C4FilterConfig(policy_phrases=("",)), "policy_phrases must be neither blank nor of several lines"),
        (lambda: C4FilterConfig(line_words=0), "line_words must be greater than 0"),
        (lambda: BadWordFilterConfig(), "words or path must name what to look for"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
