"""What the report is made of: counts that add up, histograms, highlights, differences, clusters."""

import collections
import io
import re
import xml.etree.ElementTree as ET

import numpy as np
import orjson
import pytest
from all_stages import with_worker_bytes
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from data_pipelines.report import bounds, differences, highlights, stage_section
from data_pipelines.report.excerpts import pieces
from data_pipelines.report.histogram import Line, draw
from data_pipelines.report.samples import Kind, choose, merge
from data_pipelines.report.sketch import Sketch
from data_pipelines.report.summary import Attribute
from data_pipelines.run import run
from slmjax import config as c

NUMBERS = st.lists(st.floats(allow_nan=True, allow_infinity=True, width=64), max_size=50)


@given(NUMBERS, NUMBERS)
def test_sketches_of_parts_add_up_to_that_of_the_whole(a, b):
    both = Sketch.of(np.array(a)) + Sketch.of(np.array(b))
    assert both == Sketch.of(np.array(a + b))
    assert Sketch.load(orjson.loads(orjson.dumps(both.content()))) == both
    finite = [x for x in a + b if np.isfinite(x)]
    assert both.count == len(finite)
    assert both.missing == len(a) + len(b) - len(finite)


@given(st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=60), st.floats(0, 1))
def test_a_quantile_is_within_a_sixty_fourth_of_the_true_one(numbers, share):
    rank = max(int(np.ceil(share * len(numbers))) - 1, 0)
    true = sorted(numbers)[rank]
    near = {sorted(numbers)[min(max(i, 0), len(numbers) - 1)] for i in (rank, rank + 1)}  # rounding of share * count
    assert any(abs(Sketch.of(np.array(numbers)).quantile(share) - each) <= abs(each) / 64 for each in {true, *near})


@given(st.lists(st.one_of(st.integers(-5, 300), st.floats(-1e9, 1e9)), min_size=1, max_size=40), st.booleans())
def test_a_histogram_of_any_numbers_is_well_formed_and_inside_its_frame(numbers, bounded):
    kept, dropped = Sketch.of(np.array(numbers[::2])), Sketch.of(np.array(numbers[1::2]))
    lines = [Line("min <3>", 3.0), Line("max", 70.0, True)] if bounded else []
    svg = ET.fromstring(draw("a <title>", kept, dropped, lines))
    for path in svg.iter("path"):
        for x, y in re.findall(r"M(\S+) (\S+?)[vHV]", path.get("d") or ""):
            assert 0 <= float(x) <= 360
            assert 0 <= float(y) <= 168
    assert len([each for each in svg.iter("path") if each.get("class") == "bound"]) == len(lines)


def bars(svg: str) -> int:
    return sum((path.get("d") or "").count("z") for path in ET.fromstring(svg).iter("path"))


def test_whole_numbers_have_a_bar_each_and_long_tails_a_logarithmic_axis():
    assert bars(draw("few", Sketch.of(np.array([1, 1, 2, 4, 9])), Sketch())) == 4
    long = draw("many", Sketch.of(np.array([0, 0, 3, 50, 700, 20_000])), Sketch())
    labels = [text.text for text in ET.fromstring(long).iter("text")]
    assert bars(long) == 5
    assert {"10", "100", "1k", "10k"} <= set(labels)


def test_a_share_that_is_nowhere_more_than_zero_is_drawn_as_a_share():
    svg = ET.fromstring(draw("share", Sketch.of(np.zeros(9)), Sketch(), [Line("max 0.3", 0.3, True)]))
    labels = {text.text for text in svg.iter("text") if text.get("class") == "tick"}
    assert {"0.1", "0.2"} <= labels
    (line,) = [path.get("d") or "" for path in svg.iter("path") if path.get("class") == "bound"]
    assert float(line[1:].split(" ")[0]) > 330


def test_samples_are_the_same_however_the_documents_lie_in_shards():
    hashes = np.random.default_rng(0).integers(0, 1 << 63, 100).astype(np.uint64)
    kind = Kind("dropped", "stage", "rule")
    whole = choose(kind, 0, np.arange(100), hashes)
    parts = [choose(kind, part, np.arange(25), hashes[25 * part : 25 * part + 25]) for part in range(4)]
    merged = merge(kind, [sample for part in parts for sample in part])
    assert [sample.row for sample in whole] == [25 * sample.part + sample.row for sample in merged]
    (other,) = choose(Kind("kept", "a"), 0, np.arange(100), hashes)
    assert other.row != whole[0].row


def marked(config, rule, text, row=None):
    return [text[start:end] for start, end in highlights.find(config, rule, text, row or {})]


LINES = "one two\nthree\none two\n\n- four...\n# five\nEND."


@pytest.mark.parametrize(
    ("config", "rule", "text", "expected"),
    [
        (c.RepetitionFilterConfig(), "max_duplicate_line_share", LINES, ["one two"]),
        (c.RepetitionFilterConfig(), "max_duplicate_paragraph_share", "a b\n\nc\n\na b\n\nd", ["a b"]),
        (c.FineWebFilterConfig(), "max_duplicate_line_char_share", LINES, ["one two"]),
        (
            c.FineWebFilterConfig(short_line_chars=5),
            "max_short_line_share",
            "three\nmuch longer\nten",
            ["three", "ten"],
        ),
        (c.FineWebFilterConfig(), "min_terminal_line_share", "ends.\nnot", ["not"]),
        (c.GopherFilterConfig(), "max_bullet_line_share", LINES, ["- four..."]),
        (c.GopherFilterConfig(), "max_ellipsis_line_share", LINES, ["- four..."]),
        (c.GopherFilterConfig(), "max_hashes_per_word", "## a #b", ["##", "#"]),
        (c.GopherFilterConfig(), "min_words", LINES, []),
        (c.LineFilterConfig(long_line_chars=6), "max_long_line_share", LINES, ["one two", "one two", "- four..."]),
        (c.C4FilterConfig(), "max_curly_brackets", "f() { x }", ["{"]),
        (c.MarkerFilterConfig(first_lines=1), "max_markers", "Do not EDIT it\ndo not edit", ["Do not EDIT"]),
        (c.BadWordFilterConfig(words=("bad", "a.b")), "max_bad_words", "BAD badly a.b axb", ["BAD", "a.b"]),
        (c.BadWordFilterConfig(words=("悪",), whole_words=False), "max_bad_words", "最悪だ", ["悪"]),
        (c.MaskPersonalDataConfig(), "", "to <EMAIL> or <IP>", ["<EMAIL>", "<IP>"]),
        (c.EncodedDataFilterConfig(), "max_encoded_chars", "see " + "QUJD" * 20 + " end", ["QUJD" * 20]),
    ],
)
def test_the_place_of_a_reason_is_found(config, rule, text, expected):
    assert marked(config, rule, text) == expected


def test_the_n_grams_that_break_a_bound_are_found():
    config = c.RepetitionFilterConfig()
    text = "a b c d e f a b c d e f x a b c"
    row = {"top_ngram_share": [0.1, 0.5, 0.1], "duplicate_ngram_share": [0.0, 0.9, 0.0, 0.0, 0.0, 0.0]}
    assert marked(config, "max_top_ngram_share", text, row) == ["a b c", "a b c", "a b c"]
    assert marked(config, "max_duplicate_ngram_share", text, row) == ["a b c d e f"]
    evaluations = (c.EvaluationTextConfig(paths=("x",), name="x"),)
    found = {"found": [{"ngram": "d e f x"}]}
    assert marked(c.DecontaminationConfig(evaluations=evaluations), "max_matches", text, found) == ["d e f x"]


def test_bounds_are_those_of_the_config_with_a_value_for_each_n_gram():
    found = {(bound.rule, bound.attribute): bound.spelled for bound in bounds.of(c.RepetitionFilterConfig())}
    assert found["max_top_ngram_share", "top_ngram_share (3-grams)"] == "at most 0.18"
    assert found["max_duplicate_ngram_share", "duplicate_ngram_share (10-grams)"] == "at most 0.1"
    language = bounds.of(c.LanguageFilterConfig(only_language=("en", "de")))
    assert [bound.spelled for bound in language] == ["one of en, de", "at least 0.5"]
    assert [bound.holds("fr") for bound in language if bound.side == "only"] == [False]
    assert bounds.of(c.PassageDedupConfig(unit="line")) == []


def test_an_excerpt_is_round_the_place_with_the_most_marks():
    text = "x " * 400 + "MARK" + " y" * 1000 + "MARK MARK MARK" + " z" * 500
    spans = [found.span() for found in re.finditer("MARK", text)]
    shown = pieces(text, spans)
    assert [piece for piece, is_marked in shown if is_marked] == ["MARK"] * 3
    assert len("".join(piece for piece, _ in shown)) <= 710
    assert "".join(piece for piece, _ in shown).strip("… ") in text
    assert pieces("", []) == []
    assert pieces("short", []) == [("short", False)]


@given(st.text("ab \n", max_size=40), st.text("ab \n", max_size=40))
def test_a_difference_gives_both_texts(a, b):
    changes = differences.compare(a, b)
    assert "".join(text for kind, text in changes if kind != "added") == a
    assert "".join(text for kind, text in changes if kind != "removed") == b


def test_a_difference_far_inside_is_found():
    common = "word " * 5000
    changes = differences.compare(common + "left end", common + "right end")
    assert ("removed", "left") in changes
    assert ("added", "right") in changes
    assert len(changes) < 8


def test_resemblance_is_the_share_of_common_n_grams():
    assert differences.resemblance("One two, three four", "one two three FIVE", ngram=2) == 2 / 4
    assert differences.resemblance("a", "a", ngram=5) == 1.0
    assert differences.resemblance("", "b", ngram=5) == 0.0


def test_scores_are_shown_with_the_line_where_the_quantile_was():
    scores = np.linspace(0, 1, 101)
    attribute = Attribute(kept=Sketch.of(scores[70:]), dropped=Sketch.of(scores[:70]))
    config = c.QualityFilterConfig(scorer=c.QualityModelConfig(path="x"), min_score_quantile=0.7)
    dropped = {"min_score_quantile": 70}
    section = stage_section.stage("quality_filter", config, {"score": attribute}, dropped, {}, {}, reached=True)
    assert "quantile 0.7 is 0.7" in section
    svg = ET.fromstring(section[section.index("<svg") : section.index("</svg>") + 6])
    assert [text.text for text in svg.iter("text") if text.get("class") == "bound"] == ["quantile 0.7"]
    (line,) = [path.get("d") or "" for path in svg.iter("path") if path.get("class") == "bound"]
    (beginning,) = [path.get("d") or "" for path in svg.iter("path") if path.get("class") == "kept"]
    first_kept = float(beginning[1:].split(" ")[0])
    assert abs(float(line[1:].split(" ")[0]) - first_kept) < 352 / 48 + 1  # within the bin that both share


def test_removed_lines_are_those_that_the_other_text_lacks():
    before = "keep\n  spaced \ngone\nkeep\nkeep\n\ngone"
    spans = highlights.removed_lines(before, "keep\nspaced\nkeep")
    assert [before[start:end] for start, end in spans] == ["gone", "keep", "gone"]


def test_clusters_are_counted_as_they_are(tmp_path):
    texts = [f"the text of number {i} and a few more words" for i in range(12) for _ in range(1 + i // 3)]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(orjson.dumps({"text": text}) for text in texts))
    for number, (shard_bytes, worker_bytes) in enumerate([(1 << 20, 1 << 20), (100, 64)]):
        config = c.PipelineConfig(
            output_dir=str(tmp_path / str(number)),
            sources=(c.FilesSourceConfig(paths=(str(tmp_path / "in.jsonl"),)),),
            stages=(c.ExactDedupConfig(),),
            tokenizer=c.TrainTokenizerConfig(vocab_size=360),
            split=c.SplitConfig(held_out_fraction=0.0),
            num_workers=1,
            shard_bytes=shard_bytes,
        )
        with_worker_bytes(config, worker_bytes)
        run(config, console=Console(file=io.StringIO()))
        marker = orjson.loads((tmp_path / str(number) / "work/markers/report/clusters/clusters.json").read_bytes())
        found = marker["result"]["exact_dedup"]
        sizes = collections.Counter(str(count) for count in collections.Counter(texts).values() if count > 1)
        assert found["sizes"] == dict(sizes)
        assert [-size for size, _, _ in found["largest"]] == [4, 4, 4, 3, 3]
