"""`slmjax data explain` tells the whole path of a document, and reads no more than it must to find it."""

import json

import pyarrow.parquet as pq
import pytest
from inspected_output import HOSTILE, SHARED, build, text_of
from typer.testing import CliRunner

from data_pipelines.inspection import rows
from data_pipelines.inspection.changes import agreement, changes
from data_pipelines.inspection.find import exactly, find
from data_pipelines.inspection.output import Output
from slmjax import cli
from slmjax.data.token_store import TokenStore
from slmjax.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return build(tmp_path_factory.mktemp("explained"))


def explain(*arguments, status=0):
    done = CliRunner().invoke(cli.app, ["data", "explain", *map(str, arguments)], env={"COLUMNS": "140"})
    assert done.exit_code == status, done.output
    return done.output if status == 0 else str(done.exception)


def told(output, name, *arguments):
    return json.loads(explain(output, name, *arguments, "--json"))


def stages_of(path):
    return {stage["stage"]: stage for stage in path["stages"]}


def test_a_kept_document_is_found_in_its_store(output):
    tokenizer = Tokenizer.load(output / "tokenizer.model")
    sides = set()
    for i in (0, 1, 2, 7, 23):
        path = told(output, f"good/doc{i}")
        selected = path["selected"]
        sides.add(selected["side"])
        store = TokenStore.open(selected["store"])
        ids = store.document(selected["document"])
        assert tokenizer.decode(ids.tolist()) == text_of(i)
        assert len(ids) == selected["tokens"]
        start = selected["offset"]  # of one shard: positions in the shard are those of the store
        assert store.tokens(start, start + len(ids)).tolist() == ids.tolist()
        assert (selected["shard"], selected["document_in_shard"]) == ("00000", selected["document"])
        assert {stage["outcome"] for stage in path["stages"]} == {"kept"}
        (words,) = [each for each in stages_of(path)["length_filter"]["attributes"] if each["name"] == "words"]
        assert words["value"] == 60
        assert [(each["rule"], each["bound"], each["holds"]) for each in words["bounds"]] == [
            ("min_words", "≥ 20", True),
            ("max_words", "≤ 5000", True),
        ]
    assert sides == {"train", "held_out"}


def test_where_it_was_read_and_what_normalising_changed(output):
    path = told(output, "good/doc7")
    assert path["read"]["file"].endswith("good.jsonl")
    assert path["read"]["item"] == 8
    assert path["read"]["changes"]["number"] == 0
    path = told(output, "bad/bad.jsonl#5")
    assert path["read"]["normalised"] == {"line_ends": 1, "control_characters": 1}
    removed = "".join(change["removed"] for change in path["read"]["changes"]["shown"])
    assert {"\x1b", "\x07", "\r"} <= set(removed)
    shown = explain(output, "bad/bad.jsonl#5")
    assert not {"\x1b", "\x07", "\u202e"} & set(shown)
    assert "\\x1b" in shown
    assert "normalised: " in shown
    assert "file" not in told(output, "good/doc7", "--no-original")["read"]
    assert HOSTILE[0] == "\x1b"


def test_what_a_bound_dropped(output):
    path = told(output, "bad/bad.jsonl#3")
    stages = stages_of(path)
    assert (stages["length_filter"]["outcome"], stages["length_filter"]["rule"]) == ("dropped", "min_words")
    (words,) = [each for each in stages["length_filter"]["attributes"] if each["name"] == "words"]
    assert [each["holds"] for each in words["bounds"]] == [False, True]
    assert {stages[name]["outcome"] for name in ("mask_personal_data", "near_dedup")} == {"dropped before"}
    assert path["selected"] == {"side": None}
    shown = explain(output, "bad/bad.jsonl#3")
    assert "length_filter  dropped: min_words" in shown
    assert "words 1  ≥ 20 fail  ≤ 5000 pass" in shown


def test_what_was_masked_and_cut(output):
    change = stages_of(told(output, "bad/bad.jsonl#4"))["mask_personal_data"]["changes"]
    assert change["number"] == 1
    assert (change["shown"][0]["removed"], change["shown"][0]["added"]) == ("someone@example.com", "<EMAIL>")
    shown = explain(output, "bad/bad.jsonl#4")
    assert "write to [-someone@example.com-]{+<EMAIL>+} today" in shown
    (cut,) = stages_of(told(output, "good/doc9"))["passage_dedup"]["cuts"]
    assert cut["text"].strip() == SHARED
    assert stages_of(told(output, "good/doc5"))["passage_dedup"]["cuts"] == []


def test_duplicates_both_ways(output):
    near = stages_of(told(output, "bad/bad.jsonl#2"))["near_dedup"]
    assert near["outcome"] == "dropped"
    assert near["duplicate_of"]["id"] == "good/doc3"
    words, grams = text_of(3).split(), 5
    other = [*words[:30], "changed", *words[31:]]
    sets = [{tuple(each[i : i + grams]) for i in range(len(each) - grams + 1)} for each in (words, other)]
    wanted = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    assert near["duplicate_of"]["similarity"] == pytest.approx(wanted, abs=1e-4)
    assert stages_of(told(output, "good/doc3"))["near_dedup"]["kept_instead_of"] == {
        "number": 1,
        "shown": [{"id": "bad/bad.jsonl#2", "similarity": near["duplicate_of"]["similarity"]}],
    }
    exact = stages_of(told(output, "bad/bad.jsonl#1"))["exact_dedup"]
    assert exact["duplicate_of"] == {"id": "good/doc0", "similarity": None}
    assert "duplicate of good/doc3, similarity 0.8" in explain(output, "bad/bad.jsonl#2")
    assert "kept instead of 1:" in explain(output, "good/doc0")


def test_what_of_evaluation_sets_it_holds(output):
    stage = stages_of(told(output, "bad/bad.jsonl#6"))["decontamination"]
    assert (stage["outcome"], stage["rule"]) == ("dropped", "max_matches")
    (match,) = stage["matches"]
    assert (match["evaluation"], match["item"], match["field"], match["share"]) == ("exam", "q1", "text", 1.0)
    assert match["ngram"].split() == text_of(200, 20).split()[:13]
    assert "holds 8 n-grams (100%) of exam q1 text" in explain(output, "bad/bad.jsonl#6")


def test_records_in_quarantine(output):
    for name in ("bad.jsonl:7", "bad/bad.jsonl:7"):
        (record,) = [told(output, name)["quarantined"]]
        assert (record["reason"], record["excerpt"]) == ("invalid_json", '{"broken')
    assert "not usable: missing_field" in explain(output, "bad.jsonl:8")
    assert told(output, "bad.jsonl:4")["id"] == "bad/bad.jsonl#4"  # a record that was usable


def test_ids_by_their_beginning_and_without_their_source(output):
    assert told(output, "doc17")["id"] == "good/doc17"
    assert told(output, "good/doc1")["id"] == "good/doc1"  # not doc10 to doc19
    assert told(output, "good/doc17")["id"] == told(output, "doc17")["id"]
    said = explain(output, "good/doc", status=1)
    assert said.startswith("24 ids begin with good/doc: good/doc0, good/doc1, ")
    assert said.endswith("and 19 more")
    assert "alike are bad/bad.jsonl#1" in explain(output, "jsonl#", status=1)
    assert "alike are good/doc" in explain(output, "good/dox", status=1)
    said = explain(output, "zzz\x1b", status=1)
    assert said.endswith("has the id zzz\\x1b")


def test_a_wrong_place_is_one_line(tmp_path):
    assert "is not the output of a pipeline" in explain(tmp_path, "x", status=1)


def test_finding_reads_ids_and_of_these_only_where_they_can_be(output, monkeypatch):
    read = []

    class Watched(pq.ParquetFile):
        def read_row_group(self, i, columns=None, **options):
            read.append(columns)
            return super().read_row_group(i, columns=columns, **options)

    monkeypatch.setattr(rows.pq, "ParquetFile", Watched)
    found = list(exactly(Output(output), "good/doc0"))
    assert [place.row for place in found] == [0]
    assert read
    assert {tuple(columns) for columns in read} == {("id",)}
    assert len(read) < len(Output(output).shards)
    assert find(Output(output), "good/doc0") == found


def test_an_input_that_is_gone_or_changed_is_said(tmp_path):
    output = build(tmp_path)
    text = (tmp_path / "good.jsonl").read_text()
    (tmp_path / "good.jsonl").write_text(text.replace("doc7", "other"))
    assert "its input has changed since it was read" in explain(output, "good/doc7")
    (tmp_path / "good.jsonl").unlink()
    assert "the original cannot be shown: cannot list" in explain(output, "good/doc7")


def test_changes_say_what_was_removed_and_added():
    assert changes("same", "same") == {"number": 0, "shown": []}
    found = changes("one a@b.c two d@e.f three\nnext", "one X two Y three\nnext")
    assert [(each["removed"], each["added"]) for each in found["shown"]] == [("a@b.c", "X"), ("d@e.f", "Y")]
    assert found["shown"][1]["before"].endswith(" two ")
    found = changes("\n".join("abcdefghij"), "\n".join("abcdfghij"))
    assert found["number"] == 1
    assert found["shown"][0]["removed"].strip() == "e"
    many = changes("\n".join(f"x{i}" for i in range(50)), "\n".join(f"y{i}" for i in range(50)))
    assert (many["number"], len(many["shown"])) == (50, 5)
    long = changes("\n".join(map(str, range(5000))), "\n".join(map(str, range(1, 5000))))
    assert long["number"] == 1
    assert agreement("abcd", "abxd") == 2
    assert agreement("ab", "abc") == 2
    assert agreement("", "x") == 0
