"""report.html: what it shows is what happened, whatever the documents hold."""

import collections
import html
import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import orjson
import pyarrow.parquet as pq
import pytest
from all_stages import with_worker_bytes
from rich.console import Console

from data_pipelines.manifest import Count, Manifest, StepCounts
from data_pipelines.report.funnel import funnel
from data_pipelines.run import run
from slmjax.config import (
    BadWordFilterConfig,
    BoilerplateFilterConfig,
    DecontaminationConfig,
    EvaluationTextConfig,
    ExactDedupConfig,
    FilesSourceConfig,
    LengthFilterConfig,
    MaskPersonalDataConfig,
    NearDedupConfig,
    PassageDedupConfig,
    PipelineConfig,
    RepetitionFilterConfig,
    SplitConfig,
    TrainTokenizerConfig,
)

SCRIPT = "<script>document.title = 'taken'</script>"
HOSTILE = f"{SCRIPT} </pre></details><img src=x onerror=\"alert('1')\"> & &lt;b&gt; <!-- ]]> <svg onload=alert(2)>"
ARABIC = "هذا نص عربي طويل"
ADDRESS = "someone@example.org"


def words(seed: int, number: int = 60) -> str:
    """Text of its own, of two-letter syllables."""
    state, found = seed * 7919 + 17, []
    for _ in range(number):
        state = (state * 1103515245 + 12345) % 2**31
        found.append("".join("bdfglmnprst"[state // 7**i % 11] + "aeiou"[state // 5**i % 5] for i in range(3)))
    return "\n".join(" ".join(found[i : i + 10]) for i in range(0, number, 10))


def documents() -> list[dict[str, str]]:
    passage = words(900, 30).replace("\n", " ")
    texts = [words(i) for i in range(40)]
    texts[7] += f"\nWrite to {ADDRESS} about it."
    texts += [texts[0].upper(), texts[0], texts[1], *(f"{texts[2]} and {i}" for i in "xyz")]
    texts += [f"{words(60)}\n\n{passage}", f"{words(61)}\n\n{passage}"]
    texts += ["too short", f"\x07\u202e{ARABIC}", "same line here\n" * 12 + words(50)]
    texts += [f"{words(51)} a wicked <b>WORD</b> here {HOSTILE}"]
    texts += [f"{words(52)} {words(800, 20)} end", f"READ MORE...\n{words(53)}\nLOUD LINE OF CAPITALS"]
    return [{"id": f"doc {i} <i>{i}</i>", "text": text} for i, text in enumerate(texts)]


def config_of(folder: Path, output: Path, **changes) -> PipelineConfig:
    source = FilesSourceConfig(paths=(str(folder / "a.jsonl"),), id_field="id", name="a")
    other = FilesSourceConfig(paths=(str(folder / "b.jsonl"),), name="<b>&")
    fields = {
        "output_dir": str(output),
        "sources": (source, other),
        "stages": (
            LengthFilterConfig(min_words=5),
            RepetitionFilterConfig(max_top_ngram_share=None, max_duplicate_ngram_share=None),
            BoilerplateFilterConfig(max_removed_word_share=None),
            MaskPersonalDataConfig(),
            BadWordFilterConfig(words=("wicked <b>word",)),
            ExactDedupConfig(),
            NearDedupConfig(),
            PassageDedupConfig(unit="paragraph"),
            DecontaminationConfig(evaluations=(EvaluationTextConfig(paths=(str(folder / "e.jsonl"),), name="e<1>"),)),
        ),
        "tokenizer": TrainTokenizerConfig(vocab_size=400),
        "split": SplitConfig(held_out_fraction=0.2),
        "normalise": None,
        "num_workers": 1,
        "shard_bytes": 6000,
    }
    return PipelineConfig(**{**fields, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus")
    lines = [orjson.dumps(row) for row in documents()]
    lines.insert(3, b'{"broken <script>alert(3)</script>')
    (path / "a.jsonl").write_bytes(b"\n".join(lines))
    (path / "b.jsonl").write_bytes(b"\n".join(orjson.dumps({"text": words(i)}) for i in range(100, 110)))
    (path / "e.jsonl").write_bytes(orjson.dumps({"text": words(800, 20).replace("\n", " ")}))
    return path


def quiet(config: PipelineConfig) -> str:
    run(config, console=Console(file=io.StringIO()))
    return (Path(config.output_dir) / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("finished") / "out"
    quiet(config_of(folder, root))
    return root


class Page(HTMLParser):
    """Checks that every element is closed where it should be, and gathers what is in the page."""

    VOID = frozenset({"meta", "img", "br", "path", "input", "link"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self) -> str:
        """All text."""
        return "".join(data for _, data in self.texts)


@pytest.fixture(scope="module")
def page(finished) -> Page:
    return Page((finished / "report.html").read_text(encoding="utf-8"))


def test_nothing_in_a_document_becomes_part_of_the_page(page):
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "object", "link", "b", "i", "form", "base"}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") or name in ("src", "srcset", "action") for name in attributes), tag
        assert attributes.get("href", "#").startswith("#")
    assert any("default-src 'none'" in (each.get("content") or "") for tag, each in page.elements if tag == "meta")
    assert SCRIPT in page.text  # shown as it is
    assert "</pre></details><img src=x onerror=\"alert('1')\"> & &lt;b&gt;" in page.text


def test_writing_from_right_to_left_and_control_characters_stay_in_their_place(page):
    excerpts = [attributes for tag, attributes in page.elements if tag == "pre"]
    assert {attributes.get("dir") for attributes in excerpts} == {"auto", None}  # the config has no direction
    shown = [data for tag, data in page.texts if tag == "pre"]
    assert f"␇⟨U+202E⟩{ARABIC}" in shown
    assert not {"\u202e", "\x07", "\x00"} & set(page.text)


def test_personal_data_that_the_corpus_must_not_hold_is_not_in_the_report(page):
    assert "Write to <EMAIL> about" in page.text
    assert ("mark", "<EMAIL>") in page.texts
    assert ADDRESS not in page.text


def test_the_funnel_has_the_counts_of_the_manifest(finished, page):
    manifest = Manifest.load(finished / "manifest.json")
    last = manifest.steps[-1].step
    selected = sum(step.kept.documents for step in manifest.steps if step.step == last)
    read = sum(step.kept.documents for step in manifest.steps if step.step == "read")
    assert ("strong", f"{read + 1}") in page.texts
    assert ("strong", f"{selected}") in page.texts
    for step in manifest.steps:
        for reason, count in step.dropped.items():
            assert f"{reason} {count:,} (" in page.text
    assert sum(tag == "bdi" and data == "<b>&" for tag, data in page.texts) >= 2


def reasons(root: Path) -> dict[str, list[str]]:
    """Ids of dropped documents by reason."""
    found = collections.defaultdict(list)
    for path in sorted((root / "work/decisions").glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            if row["reason"]:
                found[row["reason"]].append(row["id"])
    return found


def test_every_reason_has_samples_of_documents_that_it_dropped(finished, page):
    dropped = reasons(finished)
    assert {reason.split(".")[0] for reason in dropped} == {
        "length_filter", "repetition_filter", "boilerplate_filter", "bad_word_filter", "exact_dedup", "near_dedup",
        "decontamination",
    }  # fmt: skip
    shown = {data for tag, data in page.texts if tag == "bdi"}
    for reason, ids in dropped.items():
        names = [name.removeprefix("a/") for name in ids]
        assert sum(any(name in each for each in shown) for name in names) >= min(3, len(names)), reason


@pytest.mark.parametrize(
    ("marked", "where"),
    [("same line here", "mark"), ("wicked <b>WORD", "mark"), ("LOUD LINE OF CAPITALS", "mark"), (" and x", "del")],
)
def test_the_reason_is_marked_in_the_text(page, marked, where):
    assert (where, marked) in page.texts


def test_what_passage_deduplication_cut_is_marked(page):
    marked = {data.strip() for tag, data in page.texts if tag == "mark"}
    assert words(900, 30).replace("\n", " ") in marked


def test_numbers_are_shown_with_the_bound_that_they_break(page):
    assert "words 2, at least 5" in page.text
    assert "words 4, at least 5" in page.text


def test_contamination_and_quarantine_are_shown(finished, page):
    sums = json.loads((finished / "contamination/decontamination.json").read_text())
    assert sums["e<1>"]["documents"] == 1
    assert ("bdi", "e<1>") in page.texts
    ngram = words(800, 20)[: len(" ".join(words(800, 20).split()[:13]))]
    assert ("mark", ngram) in page.texts
    assert ("strong", "invalid_json") in page.texts
    assert '{"broken <script>alert(3)</script>' in page.text


def test_the_same_bytes_whatever_the_workers_and_their_memory(folder, finished, tmp_path):
    again = quiet(with_worker_bytes(config_of(folder, tmp_path / "elsewhere", num_workers=2), 4096))
    assert again == (finished / "report.html").read_text(encoding="utf-8")
    assert not (tmp_path / "elsewhere" / "work/shuffle").exists()


def samples_of(text: str) -> list[str]:
    """Ids of all samples, without the sections on the config."""
    return sorted({data for tag, data in Page(text).texts if tag == "bdi" and data.startswith("a/doc")})


def test_the_samples_do_not_depend_on_shards(folder, finished, tmp_path):
    other = quiet(config_of(folder, tmp_path / "out", shard_bytes=1_000_000))
    mine = (finished / "report.html").read_text(encoding="utf-8")
    assert samples_of(other) == samples_of(mine)


def test_where_everything_is_dropped_the_report_shows_by_what(folder, finished, tmp_path):
    """Also where an earlier run had finished there, of which nothing is shown; and then that run is there again."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    stages = (ExactDedupConfig(), LengthFilterConfig(min_words=10**6), NearDedupConfig(), RepetitionFilterConfig())
    with pytest.raises(
        ValueError, match=r"^the stages dropped every document: \d+ min_words, .*; loosen the thresholds"
    ):
        quiet(config_of(folder, out, stages=stages))
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert {("h2", "Funnel"), ("h2", "Stages"), ("h2", "Quarantine"), ("strong", "0")} <= set(page.texts)
    assert ("h2", "Tokens") not in page.texts
    assert "at least 1,000,000" in page.text
    assert "dropped: min_words" in page.text
    headings = [text for tag, text in page.texts if tag == "h3" or text == "No document reached it."]
    missed = [headings[i - 1] for i, text in enumerate(headings) if text == "No document reached it."]
    assert missed == ["near_dedup", "repetition_filter"]  # and not of the stage that dropped the last ones
    assert "tokens" not in page.text.partition("Configuration")[0]
    rows = [row for path in (out / "work/decisions").iterdir() for row in pq.read_table(path)["reason"].to_pylist()]
    assert rows.count("length_filter.min_words") == len(rows) - rows.count("exact_dedup.duplicate")
    assert quiet(config_of(folder, out)) == (finished / "report.html").read_text(encoding="utf-8")


def test_where_nothing_can_be_read_the_report_shows_why(folder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"broken <b>')
    source = FilesSourceConfig(paths=(str(tmp_path / "a.jsonl"),))
    with pytest.raises(ValueError, match="not one document could be read"):
        quiet(config_of(folder, tmp_path / "out", sources=(source,)))
    page = Page((tmp_path / "out/report.html").read_text(encoding="utf-8"))
    assert [text for tag, text in page.texts if tag == "h2"] == ["Funnel", "Stages", "Quarantine", "Configuration"]
    assert '{"broken <b>' in page.text


def test_where_a_side_of_the_split_is_empty_there_is_a_report_too(folder, tmp_path):
    with pytest.raises(ValueError, match="the held_out side of the split is empty"):
        quiet(config_of(folder, tmp_path, split=SplitConfig(held_out_fraction=1e-9)))
    assert ("h2", "Lengths") in Page((tmp_path / "report.html").read_text(encoding="utf-8")).texts


def test_a_report_that_is_lost_or_changed_is_written_again_and_nothing_else_is(folder, finished):
    before = {path: path.stat().st_mtime_ns for path in (finished / "work").rglob("*") if path.is_file()}
    expected = (finished / "report.html").read_text(encoding="utf-8")
    (finished / "report.html").write_text("something else")
    assert quiet(config_of(folder, finished)) == expected
    assert {path: path.stat().st_mtime_ns for path in (finished / "work").rglob("*") if path.is_file()} == before


def test_one_document_and_no_stages(tmp_path):
    (tmp_path / "one.txt").write_text("a small text, and no more than that " * 40)
    config = PipelineConfig(
        output_dir=str(tmp_path / "out"),
        sources=(FilesSourceConfig(paths=(str(tmp_path / "one.txt"),)),),
        tokenizer=TrainTokenizerConfig(vocab_size=340),
        split=SplitConfig(held_out_fraction=0.0),
        num_workers=1,
    )
    page = Page(quiet(config))
    headings = [data for tag, data in page.texts if tag == "h2"]
    assert headings == ["Funnel", "Lengths", "Tokens", "Configuration"]


def test_another_config_leaves_nothing_of_the_report_before(folder, tmp_path):
    plain = {"stages": (LengthFilterConfig(min_words=5),)}
    quiet(config_of(folder, tmp_path / "out"))
    other = quiet(config_of(folder, tmp_path / "out", **plain))
    assert other == quiet(config_of(folder, tmp_path / "fresh", **plain))
    left = {
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out" / "work/markers/report").rglob("*.json")
    }
    assert left == {
        str(path.relative_to(tmp_path / "fresh"))
        for path in (tmp_path / "fresh" / "work/markers/report").rglob("*.json")
    }


def test_thousands_of_sources_are_shown_as_the_largest_and_the_rest():
    kept = [Count(documents=i + 1, bytes=10 * i + 10) for i in range(3000)]
    steps = [StepCounts(step="read", source=f"<s{i}>", kept=each, dropped={}) for i, each in enumerate(kept)]
    steps += [
        StepCounts(step="filter", source=f"<s{i}>", kept=Count(), dropped={f"<reason {i}>": i + 1}) for i in range(3000)
    ]
    text = str(funnel(steps))
    page = Page(text)
    assert len(text) < 200_000
    assert ("bdi", "2,975 other sources") in page.texts
    assert ("bdi", "<s2999>") in page.texts
    assert "2,988 more reasons" in page.text
    assert f"{sum(range(1, 3001)):,}" in page.text
    assert html.escape("<s2999>") in text


def test_a_source_of_which_nothing_could_be_read_has_a_row():
    steps = [
        StepCounts(step="read", source="broken", kept=Count(), dropped={"invalid_json": 2}),
        StepCounts(step="read", source="whole", kept=Count(documents=4, bytes=40), dropped={}),
        StepCounts(step="filter", source="whole", kept=Count(documents=1, bytes=10), dropped={"short": 3}),
    ]
    page = Page(str(funnel(steps)))
    assert {("bdi", "broken"), ("span", "0.0%"), ("span", "25.0%"), ("td", "66.7%")} <= set(page.texts)
