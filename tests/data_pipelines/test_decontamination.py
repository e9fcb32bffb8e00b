"""Text of evaluation sets is found, in long and short pieces, as a plain search finds it, and the report says where."""

import dataclasses
import io
import json
import string
import tempfile
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from data_pipelines.decontaminate import index
from data_pipelines.manifest import Manifest
from data_pipelines.run import run
from data_pipelines.stages import contamination
from data_pipelines.stages.contamination import IndexFile
from data_pipelines.stages.texts import Texts
from slmjax.config import (
    DecontaminationConfig,
    EvaluationTextConfig,
    ExactDedupConfig,
    FilesSourceConfig,
    LengthFilterConfig,
    PipelineConfig,
    SplitConfig,
    TrainTokenizerConfig,
)

fuzzed = settings(deadline=None, max_examples=60)
ANY = EvaluationTextConfig(paths=("unused",), name="any")


def search(items: list[str], documents: list[str], **config) -> list[dict]:
    """The attributes of documents, and how each item is looked for."""
    made, ways = index.build(DecontaminationConfig(evaluations=(ANY,), **config), items)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "index.npz")
        made.save(path)
        measured = contamination.measure(IndexFile(path=path, sha256=folder), Texts.of(documents))
    rows = pa.record_batch(measured).to_pylist()
    return [{**row, "ways": ways} for row in rows]


def plain_words(text: str) -> list[str]:
    return "".join(c if c.isalnum() or c == "_" else " " for c in text.lower()).split()


def plain_search(items: list[str], document: str, n: int, shortest: int) -> tuple[int, dict[int, int]]:
    """Places where n-grams of items start in a document, and how many n-grams of each item it has."""
    words = plain_words(document)
    places, found = set(), {}
    for number, item in enumerate(items):
        its = plain_words(item)
        length = min(n, len(its))
        if len(its) < shortest:
            runs = {tuple(its)} if its and words == its else set()
        else:
            runs = {tuple(its[i : i + length]) for i in range(len(its) - length + 1)}
        runs = {run for run in runs if any(c.isalpha() for word in run for c in word)}
        starts = {i for i in range(len(words) - length + 1) if tuple(words[i : i + length]) in runs} if runs else set()
        places |= starts
        if starts:
            found[number] = len({tuple(words[i : i + length]) for i in starts})
    return len(places), found


words_of_items = st.lists(st.sampled_from(["a", "B", "cc", "1", "22", "é", "x_y"]), max_size=9).map(" ".join)


@fuzzed
@given(
    items=st.lists(words_of_items, max_size=5),
    documents=st.lists(st.text("aB 1é,.\n", max_size=40) | words_of_items, min_size=1, max_size=4),
    n=st.integers(1, 6),
    shortest=st.integers(1, 6),
)
def test_what_is_found_is_what_a_plain_search_finds(items, documents, n, shortest):
    rows = search(items, documents, ngram=n, shortest_words=shortest)
    for row, document in zip(rows, documents, strict=True):
        matches, found = plain_search(items, document, n, min(shortest, n))
        assert row["matches"] == matches
        assert {match["text"]: match["ngrams"] for match in row["found"]} == found
        assert all(0 < match["share"] <= 1 for match in row["found"])
        assert row["item_share"] == max((match["share"] for match in row["found"]), default=0)


QUESTION = "A farmer has twelve red hens and seven brown ones; on Sunday a fox takes five. How many hens are left?"
WORDS = plain_words(QUESTION)


def test_thirteen_words_in_a_row_are_enough_and_twelve_are_not():
    assert len(WORDS) == 21
    documents = [f"before {' - '.join(WORDS[4:17]).upper()}\nafter", f"before {' '.join(WORDS[4:16])} after", QUESTION]
    rows = search([QUESTION], documents)
    assert [row["matches"] for row in rows] == [1, 0, 9]
    assert [row["item_share"] for row in rows] == [pytest.approx(1 / 9), 0, 1]
    (match,) = rows[0]["found"]
    assert match["ngram"] == " - ".join(WORDS[4:17]).upper()
    assert rows[0]["ways"] == ["ngrams"]


def test_short_items_are_looked_for_whole_and_the_shortest_as_documents():
    whole, tiny = " ".join(WORDS[:9]), "The answer is red."
    documents = [f"so: {whole}!", " ".join(WORDS[:8]), "the answer is red", "I say the answer is red", "red"]
    rows = search([whole, tiny], documents)
    assert rows[0]["ways"] == ["whole", "document"]
    assert [[match["text"] for match in row["found"]] for row in rows] == [[0], [], [1], [], []]
    assert rows[2]["found"][0]["ngram"] == "the answer is red"


def test_numbers_alone_are_no_contamination():
    numbers = " ".join(map(str, range(40)))
    rows = search([numbers, f"{numbers} x"], [numbers, f"{numbers} X {numbers}"])
    assert [row["matches"] for row in rows] == [0, 1]
    assert rows[0]["ways"] == ["not", "ngrams"]


def test_ngrams_do_not_span_documents():
    rows = search([QUESTION], [" ".join(WORDS[:10]), " ".join(WORDS[10:])])
    assert [row["matches"] for row in rows] == [0, 0]


def test_an_index_of_nothing_finds_nothing():
    assert search([], ["a text", ""])[0] | {"ways": 0} == {"matches": 0, "item_share": 0.0, "found": [], "ways": 0}


def test_the_texts_with_most_ngrams_are_named_first_and_no_more_than_can_be_read(monkeypatch):
    monkeypatch.setattr(contamination, "_NAMED", 2)
    other = " ".join(WORDS[:15])
    rows = search([other, QUESTION, other], ["nothing", QUESTION])
    assert [match["text"] for match in rows[1]["found"]] == [1, 0]
    assert rows[1]["matches"] == 9


def text_of(i: int) -> str:
    rng = np.random.default_rng(i)
    letters = rng.choice(list(string.ascii_lowercase), (80, 4))
    return " ".join(map("".join, letters))


@pytest.fixture
def pipeline(tmp_path) -> PipelineConfig:
    """Sixty documents: two with a question of an evaluation set in them, of which one is too short anyway."""
    texts = {f"doc{i}": text_of(i) for i in range(60)}
    texts["doc7"] += "\n" + QUESTION
    texts["doc8"] = QUESTION
    (tmp_path / "in").mkdir()
    rows = [orjson.dumps({"id": name, "text": text}) for name, text in texts.items()]
    (tmp_path / "in/a.jsonl").write_bytes(b"\n".join(rows))
    items = [
        {"q": QUESTION, "choices": ["five", text_of(1000)], "name": "hens"},
        {"q": text_of(1001), "choices": [], "name": "other"},
    ]
    (tmp_path / "items.jsonl").write_bytes(b"\n".join(map(orjson.dumps, items)))
    evaluation = EvaluationTextConfig(
        paths=(str(tmp_path / "items.jsonl"),), name="quiz", fields=("q", "choices"), id_field="name"
    )
    return PipelineConfig(
        output_dir=str(tmp_path / "out"),
        sources=(FilesSourceConfig(paths=(str(tmp_path / "in"),), id_field="id"),),
        stages=(LengthFilterConfig(min_words=50), DecontaminationConfig(evaluations=(evaluation,)), ExactDedupConfig()),
        tokenizer=TrainTokenizerConfig(vocab_size=360),
        split=SplitConfig(held_out_fraction=0.0),
        num_workers=1,
        shard_bytes=4000,
    )


def test_a_pipeline_drops_them_and_reports_what_it_found(pipeline):
    root = Path(pipeline.output_dir)
    screen = io.StringIO()
    run(pipeline, console=Console(file=screen, width=200))
    funnel = {step.step: step for step in Manifest.load(root / "manifest.json").steps}
    assert funnel["decontamination"].dropped == {"max_matches": 1}
    assert funnel["decontamination"].kept.documents == 58
    assert "1 documents hold 1 of 4 texts of quiz" in screen.getvalue()
    lines = [json.loads(line) for line in (root / "contamination/decontamination.jsonl").read_text().splitlines()]
    assert lines == [
        {
            "document": "files/doc7",
            "dropped": True,
            "matches": 9,
            "evaluation": "quiz",
            "item": "hens",
            "field": "q",
            "ngrams": 9,
            "share": 1.0,
            "ngram": " ".join(QUESTION.split()[:13]),
        }
    ]
    sums = json.loads((root / "contamination/decontamination.json").read_text())
    assert sums == {
        "quiz": {
            "texts": 4,
            "looked_for": {"ngrams": 3, "document": 1},
            "texts_found": 1,
            "items_found": 1,
            "documents": 1,
        }
    }
    decisions = pq.read_table(root / "work/decisions").to_pylist()
    assert [row["id"] for row in decisions if row["reason"] == "decontamination.max_matches"] == ["files/doc7"]
    # Another bound costs no new measurement; another item does.
    before = {path: path.stat().st_mtime_ns for path in (root / "work/attributes/decontamination").iterdir()}
    length, stage, exact = pipeline.stages
    loose = dataclasses.replace(stage, max_matches=None, max_item_share=1.0)
    manifest = run(dataclasses.replace(pipeline, stages=(length, loose, exact)), console=Console(file=io.StringIO()))
    assert {step.step: step for step in manifest.steps}["decontamination"].dropped == {}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with open(stage.evaluations[0].paths[0], "ab") as file:
        file.write(b"\n" + orjson.dumps({"q": text_of(3), "name": "new"}))
    manifest = run(pipeline, console=Console(file=io.StringIO()))
    assert {step.step: step for step in manifest.steps}["decontamination"].dropped == {"max_matches": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"broken', "record 2: invalid_json"),
        (b'{"other": 1}', r"record 1: no field \('text',\), only \['other'\]"),
        (b'{"text": 3}', "record 1: 'text' is neither a text nor a list of texts"),
        (b'{"text": [["a"]]}', "record 1: 'text' is neither a text nor a list of texts"),
    ],
)
def test_a_damaged_evaluation_set_is_an_error(tmp_path, content, message):
    (tmp_path / "items.jsonl").write_bytes(content)
    evaluation = EvaluationTextConfig(paths=(str(tmp_path / "items.jsonl"),), name="quiz")
    task = index.index_task(tmp_path, "decontamination", DecontaminationConfig(evaluations=(evaluation,)), None)
    with pytest.raises(ValueError, match=rf"evaluation set quiz, .*items.jsonl, {message}"):
        index.make_index(task)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="evaluations needs at least one"):
        DecontaminationConfig(evaluations=())
    with pytest.raises(ValueError, match="names of evaluations must differ"):
        DecontaminationConfig(evaluations=(ANY, ANY))
    with pytest.raises(ValueError, match="max_matches is -1"):
        DecontaminationConfig(evaluations=(ANY,), max_matches=-1)
    with pytest.raises(ValueError, match="fields needs the name"):
        EvaluationTextConfig(paths=("a",), name="x", fields=())
