"""What `slmjax data inspect` shows of pipelines, files and token stores."""

import dataclasses
import io
import json
import shutil

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inspected_output import NUM_GOOD, build, config_of, text_of
from rich.console import Console
from typer.testing import CliRunner

from data_pipelines import decontaminate, filtering, selecting, tokenising
from data_pipelines import run as pipeline
from data_pipelines.inspection import summary
from data_pipelines.inspection.corpora import Block
from data_pipelines.inspection.output import Bound, Output
from data_pipelines.inspection.visible import visible
from data_pipelines.run import run
from slmjax import cli
from slmjax.config import (
    FilesSourceConfig,
    LengthFilterConfig,
    RepetitionFilterConfig,
    SplitConfig,
    TrainTokenizerConfig,
)
from slmjax.data.exclusive import only_user
from slmjax.data.token_store import TokenStore


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return build(tmp_path_factory.mktemp("inspected"))


def inspect(*arguments, status=0):
    done = CliRunner().invoke(cli.app, ["data", "inspect", *map(str, arguments)], env={"COLUMNS": "140"})
    assert done.exit_code == status, done.output
    return done.output if status == 0 else str(done.exception)


def documents(*arguments):
    return [json.loads(line) for line in inspect(*arguments, "--json").splitlines()]


def test_the_summary_has_funnel_attributes_bounds_and_places(output):
    shown = inspect(output)
    lines = shown.splitlines()
    assert lines[1] == "finished"
    assert any(line.split() == ["train", "token", "store"] for line in lines)
    (row,) = [line for line in lines if "length_filter" in line and "bad" in line]
    assert "1 min_words" in row
    (words,) = [line.split() for line in lines if line.startswith("words ")]
    assert words[1] == "1"
    assert words[8:] == ["≥", "20,", "≤", "5000", "1"]
    told = json.loads(inspect(output, "--json"))
    assert told["finished"] is True
    assert told["bounds"]["length_filter"] == {"min_words": 20, "max_words": 5000}
    chars = told["attributes"]["length_filter"]["chars"]
    lengths = sorted(document["attributes"]["length_filter.chars"] for document in documents(output, "--limit", 0))
    assert (chars["documents"], chars["low"], chars["high"]) == (len(lengths), lengths[0], lengths[-1])
    assert chars["quantiles"] == np.quantile(lengths, summary.QUANTILES, method="nearest").tolist()
    # Of what a stage measured those documents count that reached it.
    assert told["attributes"]["near_dedup"]["ngrams"]["documents"] == len(lengths) - 2


def test_what_was_dropped_kept_and_by_which_rule(output):
    everything = documents(output, "--limit", 0)
    assert len(everything) == NUM_GOOD + 6
    kept, dropped = documents(output, "--kept", "--limit", 0), documents(output, "--dropped", "--limit", 0)
    assert {row["reason"] for row in kept} == {None}
    assert {row["side"] for row in kept} == {"train", "held_out"}
    assert [row["reason"] for row in dropped] == [
        "exact_dedup.duplicate",
        "near_dedup.near_duplicate",
        "length_filter.min_words",
        "decontamination.max_matches",
    ]
    assert len(kept) + len(dropped) == len(everything)
    for reason in ("near_duplicate", "near_dedup", "near_dedup.near_duplicate"):
        (near,) = documents(output, "--reason", reason)
        assert (near["id"], near["duplicate_of"]) == ("bad/bad.jsonl#2", "good/doc3")
    assert documents(output, "--reason", "max_words") == []  # a rule that no document broke
    for reason in ("max_words", "length_filter.max_words", "mask_personal_data.empty", "passage_dedup.nothing_left"):
        assert "no document is like this" in inspect(output, "--reason", reason)
    assert {row["source"] for row in documents(output, "--source", "bad", "--limit", 0)} == {"bad"}
    shown = inspect(output, "--reason", "min_words")
    assert "bad/bad.jsonl#3" in shown
    assert "length_filter.min_words" in shown
    assert "length_filter.words 1" in shown  # the attribute that was out of bounds
    assert "tiny" in shown


def test_a_step_shows_what_reached_it_and_what_it_decided(output):
    reached = documents(output, "--step", "near_dedup", "--limit", 0)
    assert len(reached) == NUM_GOOD + 6 - 2  # without the short one and the exact copy
    assert set(reached[0]["attributes"]) == {"near_dedup.ngrams"}
    assert [row["id"] for row in reached if row["reason"]] == ["bad/bad.jsonl#2"]
    assert {row["reason"] for row in documents(output, "--step", "length_filter", "--limit", 0)} == {
        None,
        "length_filter.min_words",
    }


def test_records_in_quarantine(output):
    rows = documents(output, "--step", "quarantine")
    assert [(row["id"], row["reason"]) for row in rows] == [
        ("bad.jsonl:7", "invalid_json"),
        ("bad.jsonl:8", "missing_field"),
    ]
    assert '{"broken' in inspect(output, "--step", "quarantine")


def test_order_and_conditions_agree_with_all_documents(output):
    everything = documents(output, "--limit", 0)
    by_size = sorted(everything, key=lambda row: row["bytes"])
    assert [row["id"] for row in documents(output, "--sort", "bytes", "--limit", 5)] == [
        row["id"] for row in by_size[:5]
    ]
    longest = documents(output, "--sort", "chars", "--descending", "--limit", 3)
    sizes = sorted((row["attributes"]["length_filter.chars"] for row in everything), reverse=True)
    assert [row["attributes"]["length_filter.chars"] for row in longest] == sizes[:3]
    found = documents(output, "--where", "words<61", "--where", "length_filter.words>=60", "--limit", 0)
    wanted = [row["id"] for row in everything if row["attributes"]["length_filter.words"] == 60]
    assert [row["id"] for row in found] == wanted
    assert [row["id"] for row in documents(output, "--where", "masked_email=1")] == ["bad/bad.jsonl#4"]
    assert {row["source"] for row in documents(output, "--where", "source!=good", "--limit", 0)} == {"bad"}


def test_a_sample_depends_on_the_seed_and_the_ids_alone(output, tmp_path):
    first, again, other = (
        [row["id"] for row in documents(output, "--sample", seed, "--limit", 6)] for seed in (1, 1, 2)
    )
    assert first == again
    assert len(set(first)) == 6
    assert first != other
    ids = [row["id"] for row in documents(output, "--limit", 0)]
    pq.write_table(pa.table({"id": ids[::-1], "text": ids[::-1]}), tmp_path / "reversed.parquet", row_group_size=7)
    assert [row["id"] for row in documents(tmp_path, "--sample", 1, "--limit", 6)] == first


def test_hostile_text_cannot_drive_the_terminal(output, tmp_path):
    shown = inspect(output, "--where", "id=bad/bad.jsonl#5")
    assert "[bold]loud[/bold] \\u202eback\\u202c↵next" in shown
    (tmp_path / "raw.jsonl").write_bytes(orjson.dumps({"id": "\x1b[2J[red]", "text": "\x1b]0;x\x07\u009b1m\u2028ok"}))
    shown = inspect(tmp_path / "raw.jsonl", "--limit", 1)
    assert "\\x1b[2J[red]" in shown
    assert "\\x1b]0;x\\x07\\x9b1m\\u2028ok" in shown
    (tmp_path / "names.jsonl").write_bytes(orjson.dumps({"text": "", "\x1bfield": 1, "\x9bother": "\x1b[0m"}))
    names = inspect(tmp_path / "names.jsonl", "--limit", 1)
    assert "\\x1bfield 1 · \\x9bother \\x1b[0m" in names
    wrong = inspect(tmp_path / "names.jsonl", "--sort", "nothing", status=1)
    summed = inspect(tmp_path / "names.jsonl")
    assert "\\x1bfield" in summed
    for text in (shown, names, wrong, summed, inspect(output, "--limit", 0), inspect(output, "--limit", 0, "--json")):
        assert not {"\x1b", "\x07", "\x9b", "\u202e", "\u2028"} & set(text)
    assert visible("a\tb\nc\U000e0001é") == "a⇥b↵c\\U000e0001é"


def test_a_directory_of_files(output, tmp_path):
    shown = inspect(output / "documents")
    kept = len(documents(output, "--kept", "--limit", 0))
    assert shown.splitlines()[1].split() == ["documents", str(kept)]
    assert [row["id"] for row in documents(output / "documents", "--limit", 2)] == ["good/doc0", "good/doc1"]
    lines = [{"id": i, "text": text_of(i), "score": i / 2, "kind": "ab"[i % 2]} for i in range(9)]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([b"{broken", *map(orjson.dumps, lines)]))
    (tmp_path / "y.txt").write_text("a whole file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/long.jsonl").write_bytes(orjson.dumps({"text": "short", "notes": "n" * 300}))
    assert f"notes {'n' * 100}" in inspect(tmp_path / "other", "--limit", 1).replace("\n", "")
    assert "n" * 201 not in inspect(tmp_path / "other", "--limit", 1).replace("\n", "")
    shutil.rmtree(tmp_path / "other")
    rows = documents(tmp_path, "--sort", "score", "--descending", "--limit", 2)
    assert [(row["id"], row["attributes"]["score"]) for row in rows] == [("8", 4.0), ("7", 3.5)]
    assert [row["id"] for row in documents(tmp_path, "--where", "kind=b", "--limit", 0)] == ["1", "3", "5", "7"]
    assert "records that cannot be read: 1 invalid_json" in inspect(tmp_path, "--limit", 0)
    assert [row["text"] for row in documents(f"{tmp_path}/*.txt", "--limit", 1)] == ["a whole file"]
    # Rows are found across row groups and blocks.
    table = pa.table({"text": [f"text {i}" for i in range(50)], "n": range(50)})
    pq.write_table(table, tmp_path / "z.parquet", row_group_size=11)
    rows = documents(tmp_path / "z.parquet", "--where", "n>=21", "--limit", 3)
    assert [(row["id"], row["text"]) for row in rows] == [(f"z.parquet#{i + 1}", f"text {i}") for i in (21, 22, 23)]


def test_numbers_without_a_bound_are_shown(tmp_path):
    values = [1.5, float("inf"), float("-inf"), 2.0]
    pq.write_table(pa.table({"id": list("abcd"), "ifd": values}), tmp_path / "scores.parquet")
    (row,) = [line.split() for line in inspect(tmp_path).splitlines() if line.startswith("ifd")]
    assert (row[1], row[-1]) == ("-inf", "inf")
    assert "ifd inf" in inspect(tmp_path, "--sort", "ifd", "--descending", "--limit", 1)


def test_a_narrow_terminal_folds_long_names_before_the_bounds(tmp_path):
    (tmp_path / "good.jsonl").write_bytes(b"\n".join(orjson.dumps({"text": text_of(i)}) for i in range(NUM_GOOD)))
    sources = (FilesSourceConfig(paths=(str(tmp_path / "good.jsonl"),)),)
    config = config_of(
        tmp_path, sources=sources, stages=(RepetitionFilterConfig(max_top_ngram_share=(0.51, 0.52, 0.53)),)
    )
    run(config, console=Console(file=io.StringIO()))
    done = CliRunner().invoke(cli.app, ["data", "inspect", str(tmp_path / "out")], env={"COLUMNS": "54"})
    assert all(f"≤ {bound}" in done.output for bound in config.stages[0].max_top_ngram_share), done.output


def test_a_token_store_decoded_with_and_without_its_tokens(output):
    store = TokenStore.open(output / "train")
    assert json.loads(inspect(output / "train", "--json"))["num_documents"] == store.num_documents
    rows = documents(output / "train", "--tokens", "--limit", 0, "--excerpt", 10_000)
    kept = [row for row in documents(output, "--kept", "--limit", 0, "--excerpt", 10_000) if row["side"] == "train"]
    assert [row["ids"] for row in rows] == [store.document(i).tolist() for i in range(store.num_documents)]
    cut = {"good/doc9"}  # a paragraph of it is cut when documents are selected
    pairs = [(row["text"], other["text"]) for row, other in zip(rows, kept, strict=True) if other["id"] not in cut]
    assert all(text == other for text, other in pairs)
    assert rows[0]["pieces"][0] == "<s>"
    shown = inspect(output / "train", "--tokens", "--limit", 1)
    assert "<s>|" in shown
    encoded = documents(output, "--tokens", "--limit", 1, "--excerpt", 40)[0]
    assert "".join(encoded["pieces"]).replace("\u2581", " ").replace("<0x0A>", "\n") == encoded["text"]


def test_a_store_without_its_tokenizer_says_what_to_give(output, tmp_path):
    shutil.copytree(output / "train", tmp_path / "train")
    assert "name its model with --tokenizer" in inspect(tmp_path / "train", status=1)
    assert "\nnum_documents" in "\n" + inspect(tmp_path / "train", "--tokenizer", output / "tokenizer.model")


def test_an_unfinished_run_shows_what_it_came_to(tmp_path, monkeypatch):
    root = build(tmp_path)

    def stop(task):
        raise KeyboardInterrupt

    monkeypatch.setattr(selecting, "select_shard", stop)
    config = config_of(tmp_path)
    strict = dataclasses.replace(config, stages=(LengthFilterConfig(min_words=70), *config.stages[1:]))
    with pytest.raises(KeyboardInterrupt):
        run(strict, console=Console(file=io.StringIO()))
    shown = inspect(root)
    assert "unfinished: the last run came to select" in shown
    assert "are of an earlier run" in shown
    told = json.loads(inspect(root, "--json"))
    assert told["bounds"]["length_filter"]["min_words"] == 70
    assert told["steps"][-1] == "passage_dedup"
    kept = {row["source"]: row["kept"]["documents"] for row in told["funnel"] if row["step"] == "length_filter"}
    assert kept == {"good": 2, "bad": 1}  # those with 70 words or more
    assert {row["side"] for row in documents(root, "--limit", 0)} == {None}
    monkeypatch.setattr(filtering, "_filter_shard", stop)
    (root / "work/markers/length_filter").rename(tmp_path / "gone")
    with pytest.raises(KeyboardInterrupt):
        run(strict, console=Console(file=io.StringIO()))
    assert "unfinished: the last run came to measure" in inspect(root)
    assert "did not come to near_dedup, only to quarantine" in inspect(root, "--step", "near_dedup", status=1)
    assert {row["reason"] for row in documents(root, "--limit", 0)} == {None}


def test_a_run_is_finished_once_its_own_manifest_is_written(output, tmp_path, monkeypatch):
    config = copy_of(output, tmp_path)
    strict = dataclasses.replace(config, stages=(LengthFilterConfig(min_words=20, max_words=70), *config.stages[1:]))

    def stop(*_, **__):
        raise KeyboardInterrupt

    for stopped, name, came in ((pipeline.report, "write", "report"), (pipeline.files, "remove_partial", "its end")):
        with monkeypatch.context() as patch:
            patch.setattr(stopped, name, stop)
            with pytest.raises(KeyboardInterrupt):
                run(strict, console=Console(file=io.StringIO()))
        shown = inspect(tmp_path / "out")
        assert f"unfinished: the last run came to {came};" in shown
        assert "are of an earlier run" in shown
        assert "\ntrain: " not in shown  # the sizes of the earlier run's stores
        told = json.loads(inspect(tmp_path / "out", "--json"))
        assert told["finished"] is False
        lost = [row["dropped"] for row in told["funnel"] if (row["step"], row["source"]) == ("length_filter", "bad")]
        assert lost == [{"max_words": 1, "min_words": 1}]  # and not as in the manifest of the earlier run
    run(strict, console=Console(file=io.StringIO()))
    assert inspect(tmp_path / "out").splitlines()[1] == "finished"
    with open(tmp_path / "good.jsonl", "ab") as file:
        file.write(b"\n" + orjson.dumps({"id": "new", "text": text_of(300)}))
    monkeypatch.setattr(pipeline.report, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        run(strict, console=Console(file=io.StringIO()))
    assert "unfinished: the last run came to report;" in inspect(tmp_path / "out")  # the config alone does not tell


def copy_of(output, tmp_path):
    """The output and its inputs at another place; returns its config."""
    shutil.copytree(output, tmp_path / "out")
    for name in ("good.jsonl", "bad.jsonl", "exam.jsonl"):
        shutil.copy(output.parent / name, tmp_path)
    return config_of(tmp_path)


def test_a_run_that_left_nothing_names_its_report(output, tmp_path):
    config = copy_of(output, tmp_path)
    strict = dataclasses.replace(config, stages=(LengthFilterConfig(min_words=500), *config.stages[1:]))
    with pytest.raises(ValueError, match="dropped every document"):
        run(strict, console=Console(file=io.StringIO()))
    lines = inspect(tmp_path / "out").splitlines()
    assert lines[1:3] == [
        "ended after select: no document was left; report.html shows why",
        "manifest.json, the tokenizer and the stores are of an earlier run",
    ]
    assert json.loads(inspect(tmp_path / "out", "--json"))["state"] == "empty"
    one_side = dataclasses.replace(config, split=SplitConfig(held_out_fraction=1e-9))
    with pytest.raises(ValueError, match="held_out side of the split is empty"):
        run(one_side, console=Console(file=io.StringIO()))
    assert "ended after select: one side of the split is empty; report.html" in inspect(tmp_path / "out")
    for name in ("good.jsonl", "bad.jsonl"):
        (tmp_path / name).write_text("{broken")
    with pytest.raises(ValueError, match="not one document could be read"):
        run(config, console=Console(file=io.StringIO()))
    assert "ended after read: no document was left; report.html" in inspect(tmp_path / "out")
    assert "could not read one: see --step quarantine" in inspect(tmp_path / "out", "--kept", status=1)


def test_a_run_at_work_is_told_from_one_that_was_stopped(output, tmp_path, monkeypatch):
    config = copy_of(output, tmp_path)
    for changed, module, function, came in (
        ({"tokenizer": TrainTokenizerConfig(vocab_size=331)}, tokenising, "train", "tokenizer"),
        ({"stages": (dataclasses.replace(config.stages[4], ngram=8),)}, decontaminate, "make_index", "evaluations"),
    ):
        during = []

        def stop(_, during=during):
            during.append(inspect(tmp_path / "out").splitlines()[1])
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(module, function, stop)
            with pytest.raises(KeyboardInterrupt):
                run(dataclasses.replace(config, **changed), console=Console(file=io.StringIO()))
        assert during == [f"running now: it has come to {came}"]
        assert inspect(tmp_path / "out").splitlines()[1] == (
            f"unfinished: the last run came to {came}; the same command goes on"
        )
    with only_user(tmp_path / "out"):
        told = json.loads(inspect(tmp_path / "out", "--json"))
        assert (told["finished"], told["state"]) == (False, "running")
    run(dataclasses.replace(config, stages=()), console=Console(file=io.StringIO()))
    with only_user(tmp_path / "out"):  # that has not begun with the first step
        assert inspect(tmp_path / "out").splitlines()[1] == "finished"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "nothing"], "has no stage 'nothing', only quarantine, unique_ids, length_filter"),
        (["--source", "nothing"], "has no source 'nothing', only bad, good"),
        (["--reason", "dup"], "has no stage or rule 'dup', only unique_ids.duplicate_id, length_filter.min_words, "),
        (["--reason", "length_filter.nope"], "'length_filter.nope', only unique_ids.duplicate_id, length_filter.min"),
        (["--reason", "near_dedup.min_words"], "has no stage or rule 'near_dedup.min_words', only"),
        (["--sort", "nothing"], "there is no attribute 'nothing', only id, source, bytes"),
        (["--where", "words"], "such as 'words<100'"),
        (["--where", "words<many"], "compares numbers with 'many'"),
        (["--sort", "bytes", "--sample", "1"], "give one of them"),
        (["--sort", "bytes", "--limit", "0"], "need a --limit"),
        (["--sort", "id", "--descending"], "is text"),
    ],
)
def test_a_wrong_question_is_one_line(output, arguments, message):
    said = inspect(output, *arguments, status=1)
    assert message in said
    assert "\n" not in said


def test_a_wrong_place_is_one_line(output, tmp_path):
    assert "it matches no file" in inspect(tmp_path / "nowhere", status=1)
    (tmp_path / "a.bin").write_bytes(b"\0")
    assert "holds no parquet, jsonl or text file" in inspect(tmp_path, status=1)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and nothing else")
    assert "cannot read" in inspect(tmp_path / "b.parquet", status=1)
    assert "no reason is known" in inspect(output / "train", "--kept", status=1)


def test_files_without_a_text_say_which_field_to_name(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"id": 1, "body": "some words", "\\u009bn": 2}')
    hint = "no field is the text: name it with --text-field; there is body, \\x9bn"
    assert hint in inspect(tmp_path, "--limit", 1)
    told = inspect(tmp_path, "--limit", 1, "--text-field", "body")
    assert "some words" in told
    assert "no field" not in told
    pq.write_table(pa.table({"id": ["a"], "ifd": [1.5]}), tmp_path / "scores.parquet")
    assert "there is ifd\n" in inspect(tmp_path / "scores.parquet", "--limit", 1)


def test_bounds_know_what_holds():
    assert Bound.of("min_words", 3).holds(3) is True
    assert Bound.of("max_share", (0.2, 0.1)).holds([0.2, 0.2]) is False
    assert Bound.of("only_language", ("en", "de")).holds("fr") is False
    assert str(Bound.of("max_share", (0.25, 1))) == "≤ 0.25, 1"
    quantile = Bound.of("min_score_quantile", 0.1)
    assert (quantile.attribute, quantile.holds(0.5), str(quantile)) == ("score", None, "≥ quantile 0.1")


def test_quantiles_of_many_values_come_from_a_sample_of_bounded_size():
    values = np.random.default_rng(0).permutation(300_000).astype(float)

    def blocks():
        for start in range(0, len(values), 10_000):
            part = pa.array(values[start : start + 10_000])
            yield Block(10_000, lambda name, part=part: part, lambda rows: []), None

    (found,) = summary.ranges(blocks(), {"x": None}).values()
    assert (found.documents, found.low, found.high, found.exact) == (300_000, 0, 299_999, False)
    np.testing.assert_allclose(found.quantiles, np.array(summary.QUANTILES) * 300_000, atol=2000)
    assert found == next(iter(summary.ranges(blocks(), {"x": None}).values()))


def test_outputs_of_other_versions_are_understood_as_far_as_possible(output, tmp_path):
    shutil.copytree(output, tmp_path / "out")
    path = tmp_path / "out" / "work/plan.json"
    plan = json.loads(path.read_text())
    plan["stages"]["length_filter"]["class"] = "FilterOfAnotherVersionConfig"
    path.write_text(json.dumps(plan))
    assert Output(tmp_path / "out").bounds("length_filter") == []
    assert "length_filter" in inspect(tmp_path / "out")
    path.write_text("{")
    assert "run the pipeline again" in inspect(tmp_path / "out", status=1)
    shutil.rmtree(tmp_path / "out/work")  # only for resuming
    assert "documents" in inspect(tmp_path / "out")


def test_an_id_that_is_no_text_is_looked_for(output):
    explained = CliRunner().invoke(cli.app, ["data", "explain", str(output), "good/\udcff"])
    assert r"has the id good/\xff" in str(explained.exception)


def test_damage_is_one_line_that_says_where(output, tmp_path):
    shutil.copytree(output, tmp_path / "out")
    (path, *_) = sorted((tmp_path / "out" / "work/attributes/length_filter").iterdir())
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    explained = CliRunner().invoke(cli.app, ["data", "explain", str(tmp_path / "out"), "good/doc0"])
    for said in (inspect(tmp_path / "out", status=1), str(explained.exception)):
        assert said.startswith(f"{tmp_path}/out cannot be read (")
        assert said.endswith("it is damaged: run the pipeline again")
        assert "\n" not in said
    path.write_bytes(whole)
    manifest = tmp_path / "out/manifest.json"
    manifest.write_text('{"steps": [')
    assert inspect(tmp_path / "out", status=1).startswith(f"{manifest} cannot be read (")
    shutil.rmtree(tmp_path / "out" / "work/markers/verdicts/near_dedup")
    manifest.unlink()
    assert "near_dedup lacks 00000-0000.json" in inspect(tmp_path / "out", status=1)
