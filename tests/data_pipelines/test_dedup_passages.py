"""Passages that occurred before are cut and the first stays, as plain loops over the words of all documents say."""

import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from dedup_corpus import Verdict, decide, earlier_corpus, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.verdicts import Cuts
from slmjax.config import (
    ConversationFilesSourceConfig,
    PassageDedupConfig,
    PipelineConfig,
    SubstringDedupConfig,
    TrainTokenizerConfig,
)

fuzzed = settings(deadline=None, max_examples=15)
some_texts = st.lists(st.text("ab \n", max_size=60) | st.text("aB é-\t\n\n", max_size=60), min_size=1, max_size=8)


def cut(texts: list[str], stage, *, shard_bytes: int = 60, worker_bytes: int = 1000) -> list[Verdict]:
    with tempfile.TemporaryDirectory() as folder:
        shards = write_corpus(Path(folder), texts, shard_bytes=shard_bytes)
        return decide(Path(folder), shards, {"passage_dedup": stage}, worker_bytes=worker_bytes)


def left(found: list[Verdict]) -> list[str | None]:
    """What is left of each document; None of one that was dropped."""
    return [row.left if row.reason == "" else None for row in found]


def plain_cut(texts: list[str], unit: str, shortest_words: int) -> list[str | None]:
    """One passage after the other."""
    seen: set[tuple[str, ...]] = set()
    result: list[str | None] = []
    for text in texts:
        lines = re.findall(r"[^\n]*\n|[^\n]+$", text)
        units: list[list[str]] = []  # words, and the text to cut
        for i, line in enumerate(lines):
            goes_on = unit == "paragraph" and units and (not line.split() or lines[i - 1].split())
            if goes_on:
                units[-1].append(line)
            else:
                units.append([line])
        kept, any_cut = "", False
        for passage in map("".join, units):
            words = tuple(passage.lower().split())
            again = len(words) >= shortest_words and words in seen
            any_cut |= again
            kept += "" if again else passage
            seen.add(words)
        result.append(None if any_cut and not kept.strip() else kept)
    return result


@fuzzed
@given(texts=some_texts, unit=st.sampled_from(["line", "paragraph"]), shortest_words=st.integers(1, 3))
def test_lines_and_paragraphs(texts, unit, shortest_words):
    stage = PassageDedupConfig(unit=unit, shortest_words=shortest_words)
    assert left(cut(texts, stage)) == plain_cut(texts, unit, shortest_words)


def plain_cut_runs(texts: list[str], n: int) -> list[str | None]:
    """One run of words after the other; one that overlaps with the first like it stays."""
    seen: dict[tuple[str, ...], tuple[int, int]] = {}
    result: list[str | None] = []
    for number, text in enumerate(texts):
        words = list(re.finditer(r"\S+", text))
        gone = set()
        for i in range(len(words) - n + 1):
            run = tuple(word[0].lower() for word in words[i : i + n])
            document, first = seen.setdefault(run, (number, i))
            if (document, first) != (number, i) and (document != number or i >= first + n):
                end = words[i + n].start() if i + n < len(words) else words[i + n - 1].end()
                gone.update(range(words[i].start(), end))
        kept = "".join(character for i, character in enumerate(text) if i not in gone)
        result.append(None if gone and not kept.strip() else kept)
    return result


@fuzzed
@given(texts=some_texts, n=st.integers(1, 5))
def test_runs_of_words(texts, n):
    assert left(cut(texts, SubstringDedupConfig(words=n))) == plain_cut_runs(texts, n)


def test_every_run_of_words_is_left_somewhere():
    """What is cut occurs in what is kept, as long as nothing overlaps with itself."""
    texts = ["a b c d e f g", "x a b c d y", "c d e f g", "b c d e z"]
    found = left(cut(texts, SubstringDedupConfig(words=3)))
    assert found == ["a b c d e f g", "x y", None, "z"]


def test_a_long_repetition_within_a_document_is_cut_to_one():
    assert left(cut([" ".join(["go"] * 100)], SubstringDedupConfig(words=3))) == ["go go go "]


def test_short_passages_stay():
    text = "a line of five words\n}\na line of five words\n}\n"
    assert left(cut([text], PassageDedupConfig(unit="line", shortest_words=5))) == ["a line of five words\n}\n}\n"]


def test_a_document_of_which_too_much_goes_is_dropped():
    texts = [
        "one two three four\nfive six",
        "one two three four\nother",
        "one two three four\nx",
        "one two three four\n\n\n",
    ]
    stage = PassageDedupConfig(unit="line", shortest_words=4, max_cut_share=0.9)
    found = cut(texts, stage)
    assert [row.reason for row in found] == ["", "", "passage_dedup.max_cut_share", "passage_dedup.nothing_left"]
    stage = PassageDedupConfig(unit="line", shortest_words=4, max_cut_share=0.5)
    assert [row.reason for row in cut(texts, stage)][1] == "passage_dedup.max_cut_share"


def test_what_an_earlier_corpus_holds_is_cut(tmp_path):
    against = earlier_corpus(tmp_path / "old", {"old/a": "known to all of us\nsaid twice said twice"})
    texts = ["New words here now\nKNOWN to all of us\n", "new words here now\nand more"]
    shards = write_corpus(tmp_path / "new", texts, shard_bytes=20)
    stage = PassageDedupConfig(unit="line", shortest_words=3, against=(against,))
    found = decide(tmp_path / "new", shards, {"passage_dedup": stage})
    assert left(found) == ["New words here now\n", "and more"]


def test_cuts_of_two_stages_add_up(tmp_path):
    texts = [
        "one two three\nfour five six seven",
        "one two three\nx four five six seven",
        "one two three\nfour five six seven",
    ]
    shards = write_corpus(tmp_path, texts, shard_bytes=30)
    named = {
        "passage_dedup": PassageDedupConfig(unit="line", shortest_words=3),
        "substring_dedup": SubstringDedupConfig(words=4),
    }
    found = decide(tmp_path, shards, named)
    assert [row.reason for row in found] == ["", "", "passage_dedup.nothing_left"]
    assert left(found)[:2] == [texts[0], "x "]


@settings(deadline=None, max_examples=100)
@given(
    spans=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20), st.integers(0, 20)).filter(lambda s: s[1] < s[2])),
    more=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20), st.integers(0, 20)).filter(lambda s: s[1] < s[2])),
)
def test_cuts_are_a_union_of_bytes(spans, more):
    def cuts(rows):
        return Cuts.of(*np.array(rows, np.int64).reshape(-1, 3).T)

    both = cuts(spans) | cuts(more)
    text = "abcdefghijklmnopqrst"
    for row in range(4):
        gone = {i for r, start, end in spans + more if r == row for i in range(start, end)}
        assert both.apply(row, text) == "".join(c for i, c in enumerate(text) if i not in gone)
        assert both.bytes(4)[row] == len(gone)
    touching = (both.rows[1:] == both.rows[:-1]) & (both.starts[1:] <= both.ends[:-1])
    assert not touching.any()


@pytest.mark.parametrize("changes", [{"shortest_words": 0}, {"max_cut_share": 1.5}])
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        PassageDedupConfig(unit="line", **changes)


def test_conversations_are_not_cut():
    with pytest.raises(ValueError, match=r"\['SubstringDedupConfig'\] cut from texts, which would break conversations"):
        PipelineConfig(
            output_dir="x",
            sources=(ConversationFilesSourceConfig(paths=("x",)),),
            stages=(SubstringDedupConfig(),),
            tokenizer=TrainTokenizerConfig(vocab_size=400),
        )
