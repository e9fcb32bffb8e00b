"""Scores in a pipeline: selection by value, quantile and sample, scores made elsewhere, generated text and its gate."""

import dataclasses
import io
import json
import sys
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from data_pipelines.manifest import Manifest
from data_pipelines.quality.score_files import score_files
from data_pipelines.quality.training import train
from data_pipelines.run import run
from slmjax import cli
from slmjax.config import (
    ExactDedupConfig,
    FastTextModelConfig,
    FilesSourceConfig,
    GeneratedFilesSourceConfig,
    LengthFilterConfig,
    PipelineConfig,
    QualityFilterConfig,
    QualityModelConfig,
    QualitySampleConfig,
    QualityTrainingConfig,
    ScoreFilesConfig,
    SplitConfig,
    TrainNgramModelConfig,
    TrainTokenizerConfig,
)

NUM_DOCUMENTS = 60
QUIET = Console(file=io.StringIO())


def text_of(i):
    """A text of which the share of words in a random order grows with i."""
    rng = np.random.default_rng(i)
    words = [f"{'bdfgklmnpr'[word % 10]}{'aeiou'[word // 10]}n" for word in range(50)] * 3
    moved = rng.permutation(len(words))[: len(words) * i // NUM_DOCUMENTS]
    words = np.array(words)
    words[np.sort(moved)] = words[moved]
    return " ".join(words)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    rows = [{"id": f"doc{i:02d}", "text": text_of(i)} for i in range(NUM_DOCUMENTS)]
    rows.insert(7, {"id": "short", "text": "tiny"})
    (root / "a.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return str(root / "a.jsonl")


@pytest.fixture(scope="module")
def model(tmp_path_factory, corpus):
    """A model of the words of the corpus in their order."""
    root = tmp_path_factory.mktemp("model")
    rows = [{"text": text_of(0) + f" {i}"} for i in range(40)]
    (root / "ordered.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    config = QualityTrainingConfig(
        output_dir=str(root / "model"),
        model=TrainNgramModelConfig(sources=(FilesSourceConfig(paths=(str(root / "ordered.jsonl"),)),), bits=12),
    )
    train(config, console=QUIET)
    return QualityModelConfig(path=str(root / "model"))


def config_of(corpus, output_dir, *stages, **changes):
    config = PipelineConfig(
        output_dir=str(output_dir),
        sources=(FilesSourceConfig(paths=(corpus,), id_field="id"),),
        stages=(LengthFilterConfig(min_words=5), *stages),
        tokenizer=TrainTokenizerConfig(vocab_size=340),
        split=SplitConfig(held_out_fraction=0.3),
        num_workers=1,
        shard_bytes=8000,
    )
    return dataclasses.replace(config, **changes)


def reasons(config):
    """Runs the pipeline; returns {id: reason or None}, and the scores by id."""
    run(config, console=QUIET)
    root = Path(config.output_dir)
    rows = [row for path in sorted((root / "work/decisions").iterdir()) for row in pq.read_table(path).to_pylist()]
    return {row["id"].removeprefix("files/"): row["reason"] for row in rows}


def scores(output_dir, step="quality_filter"):
    rows = [
        row
        for path in sorted((output_dir / "work/attributes" / step).iterdir())
        for row in pq.read_table(path).to_pylist()
    ]
    return {row["id"].removeprefix("files/"): row["score"] for row in rows}


def kept(found):
    return {name for name, reason in found.items() if reason is None}


def test_top_middle_and_bottom_by_quantiles_of_what_is_alive(corpus, model, tmp_path):
    def keep(low, high):
        stage = QualityFilterConfig(scorer=model, min_score_quantile=low, max_score_quantile=high)
        return kept(reasons(config_of(corpus, tmp_path, stage)))

    middle = keep(0.25, 0.75)
    by_score = scores(tmp_path)
    ordered = sorted((name for name in by_score if name != "short"), key=by_score.get)
    assert len(set(by_score.values())) == NUM_DOCUMENTS + 1
    assert middle == set(ordered[15:45])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work/attributes").rglob("*.parquet")}
    assert keep(0.7, None) == set(ordered[42:])
    assert keep(None, 0.1) == set(ordered[:6])
    # Other bounds: nothing is measured again.
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work/attributes").rglob("*.parquet")} == before
    # Where the words are in order, the score is low.
    assert (
        np.mean([int(name[3:]) for name in ordered[:15]]) < 15 < 40 < np.mean([int(name[3:]) for name in ordered[45:]])
    )


def test_values_and_quantiles_name_the_rule_that_dropped(corpus, model, tmp_path):
    found = reasons(config_of(corpus, tmp_path, QualityFilterConfig(scorer=model)))  # measures only
    assert set(found.values()) == {None, "length_filter.min_words"}
    values = sorted(score for name, score in scores(tmp_path).items() if name != "short")
    stage = QualityFilterConfig(scorer=model, min_score=values[10], max_score=values[50], max_score_quantile=0.5)
    found = reasons(config_of(corpus, tmp_path, stage))
    dropped = [reason for reason in found.values() if reason]
    assert {reason: dropped.count(reason) for reason in dropped} == {
        "length_filter.min_words": 1,
        "quality_filter.min_score": 10,
        "quality_filter.max_score": 9,
        "quality_filter.max_score_quantile": 21,
    }
    manifest = Manifest.load(tmp_path / "manifest.json")
    assert manifest.steps[-1].dropped == {"max_score": 9, "max_score_quantile": 21, "min_score": 10}


def test_samples_are_nested_and_follow_the_temperature(corpus, model, tmp_path):
    def sample(fraction, temperature=0.5, **changes):
        stage = QualitySampleConfig(scorer=model, fraction=fraction, temperature=temperature, seed=3)
        return kept(reasons(config_of(corpus, tmp_path, stage, **changes)))

    small, large = sample(0.2), sample(0.5)
    assert (len(small), len(large)) == (12, 30)
    assert small < large
    by_score = scores(tmp_path, "quality_sample")
    ordered = sorted((name for name in by_score if name != "short"), key=by_score.get)
    assert sample(0.2, temperature=0.0) == set(ordered[-12:])
    assert sample(0.2, temperature=1e6) != set(ordered[-12:])
    assert sample(0.2, shard_bytes=3000) == small  # the draw is by id, not by place


def test_the_result_does_not_depend_on_the_number_of_workers(corpus, model, tmp_path):
    stages = (
        QualityFilterConfig(scorer=model, min_score_quantile=0.2),
        QualitySampleConfig(scorer=model, fraction=0.5),
    )
    for name, workers in (("one", 1), ("two", 2)):
        run(config_of(corpus, tmp_path / name, *stages, num_workers=workers), console=QUIET)
    files = [path for path in (tmp_path / "one").rglob("*") if path.is_file() and path.name != "timings.json"]
    assert len(files) > 20
    for path in files:
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_another_model_in_the_same_place_is_noticed(corpus, model, tmp_path):
    copy = tmp_path / "model"
    copy.mkdir()
    for path in Path(model.path).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    stage = QualityFilterConfig(scorer=QualityModelConfig(path=str(copy)), min_score_quantile=0.5)
    run(config_of(corpus, tmp_path / "out", stage), console=QUIET)
    before = scores(tmp_path / "out")
    texts = tmp_path / "other.jsonl"
    texts.write_bytes(b"".join(orjson.dumps({"text": text_of(59 - i)}) + b"\n" for i in range(40)))
    source = FilesSourceConfig(paths=(str(texts),))
    train(
        QualityTrainingConfig(output_dir=str(copy), model=TrainNgramModelConfig(sources=(source,), bits=12)),
        console=QUIET,
    )
    run(config_of(corpus, tmp_path / "out", stage), console=QUIET)
    assert scores(tmp_path / "out") != before


def test_scores_made_elsewhere(corpus, tmp_path):
    """The pipeline's survivors are scored in files of their own, which a stage at its end then reads."""
    data = tmp_path / "data"
    run(config_of(corpus, data), console=QUIET)
    calls = []

    def score(texts):
        calls.append(len(texts))
        return {"loss": np.array([float(hash_of(text)) for text in texts])}

    score_files(data / "documents", tmp_path / "scores", score, identity="a", console=QUIET)
    assert sum(calls) == NUM_DOCUMENTS
    num_calls = len(calls)
    killed = tmp_path / "scores/.0.parquet.host.1.partial"  # of a call that was killed
    killed.write_bytes(b"PAR1")
    score_files(data / "documents", tmp_path / "scores", score, identity="a", console=QUIET)
    assert len(calls) == num_calls  # nothing to do
    assert not killed.exists()
    stage = QualityFilterConfig(
        scorer=ScoreFilesConfig(path=str(tmp_path / "scores"), column="loss"), max_score_quantile=0.5
    )
    found = reasons(config_of(corpus, data, stage))
    expected = sorted((hash_of(text_of(i)), f"doc{i:02d}") for i in range(NUM_DOCUMENTS))[:30]
    assert kept(found) == {name for _, name in expected}
    # Without the length filter a document without a score reaches the stage.
    with pytest.raises(ValueError, match=r"1 documents of shard .* have no score, the first one files/short"):
        run(dataclasses.replace(config_of(corpus, data), stages=(stage,)), console=QUIET)
    other = QualityFilterConfig(scorer=ScoreFilesConfig(path=str(tmp_path / "scores"), column="bits"))
    with pytest.raises(ValueError, match="must be parquet with the columns id and bits"):
        run(config_of(corpus, data, other), console=QUIET)
    absent = sorted((tmp_path / "scores").glob("*.parquet"))[1]
    absent.unlink()
    with pytest.raises(ValueError, match=f"no scores for the documents of shard {absent.stem}"):
        run(config_of(corpus, data, stage), console=QUIET)


def hash_of(text):
    return int.from_bytes(text.encode(), "little") % 1009


def test_scoring_says_what_it_cannot_read(tmp_path):
    (tmp_path / "documents").mkdir()

    def attempt(output="scores", **kwargs):
        score_files(tmp_path / "documents", tmp_path / output, lambda texts: {}, identity="", console=QUIET, **kwargs)

    with pytest.raises(ValueError, match="has no parquet files"):
        attempt()
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "documents/a.parquet")
    with pytest.raises(ValueError, match="has no column text; it holds no documents"):
        attempt()
    with pytest.raises(ValueError, match="need a directory of their own"):
        attempt("documents")
    asked = [{"role": "user", "content": "and?"}]
    pq.write_table(pa.table({"id": ["a7"], "text": [None], "messages": [asked]}), tmp_path / "documents/a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: document a7: the conversation has no assistant message"):
        attempt(column="messages")
    with pytest.raises(ValueError, match=r"a\.parquet: texts must be strings, got null"):
        attempt()
    (tmp_path / "documents/a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet is not parquet, or is damaged"):
        attempt()
    assert not list((tmp_path / "scores").glob("*.parquet"))


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (QualityModelConfig(path="absent"), "is no quality model, model.json cannot be read"),
        (ScoreFilesConfig(path="absent"), "absent has no parquet files"),
        (FastTextModelConfig(path="absent", label="x"), "needs the package fasttext: pip install"),
    ],
)
def test_a_scorer_that_cannot_be_used_is_known_before_anything_is_read(corpus, tmp_path, monkeypatch, scorer, message):
    monkeypatch.setitem(sys.modules, "fasttext", None)
    with pytest.raises(ValueError, match=message):
        run(config_of(corpus, tmp_path / "out", QualityFilterConfig(scorer=scorer)), console=QUIET)
    assert not (tmp_path / "out").exists()


class FastText:
    """In the place of the package, whose training stops at NaN now and then: knows the words good and bad."""

    @classmethod
    def load_model(cls, path):
        if Path(path).read_bytes() != b"a model":
            raise ValueError(f"{path} has wrong file format!")
        return cls()

    def get_labels(self):
        return ["__label__hq", "__label__rest"]

    def predict(self, text, k):
        assert "\n" not in text, "predict processes one line at a time"
        probability = 1.00001 if "good" in text.split() else 0.2
        return ("__label__hq", "__label__rest")[:k], np.array([probability, 1 - probability])


def test_fasttext_scores(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fasttext", FastText)
    (tmp_path / "model.bin").write_bytes(b"a model")
    rows = [{"id": str(i), "text": f"a {'good' if i < 5 else 'bad'}\nword or five words {i}"} for i in range(20)]
    (tmp_path / "a.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    scorer = FastTextModelConfig(path=str(tmp_path / "model.bin"), label="__label__hq")

    def attempt(**changes):
        stage = QualityFilterConfig(scorer=dataclasses.replace(scorer, **changes), min_score=0.5)
        return kept(reasons(config_of(str(tmp_path / "a.jsonl"), tmp_path / "out", stage)))

    assert attempt() == {str(i) for i in range(5)}
    assert set(scores(tmp_path / "out").values()) == {1.0, 0.2}
    with pytest.raises(ValueError, match="has no label 'hq'; its labels are __label__hq, __label__rest"):
        attempt(label="hq")
    with pytest.raises(ValueError, match="there is no fastText model"):
        attempt(path=str(tmp_path / "absent.bin"))
    (tmp_path / "other.bin").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"other.bin is no fastText model: .* wrong file format"):
        attempt(path=str(tmp_path / "other.bin"))


GENERATED = [
    {"completion": text_of(3), "checkpoint_sha256": "abc", "prompt_id": "p1"},
    {"completion": text_of(0), "checkpoint_sha256": "abc", "prompt_id": "p1"},  # a document of the corpus
    {"completion": text_of(58) + " or not", "checkpoint_sha256": "abc", "prompt_id": 2},
    {"completion": text_of(5) + " but", "prompt_id": "p3"},
    {"completion": text_of(6) + " but", "checkpoint_sha256": "", "prompt_id": "p3"},
    {"completion": 7, "checkpoint_sha256": "abc", "prompt_id": "p3"},
    {"text": "field of another name", "checkpoint_sha256": "abc", "prompt_id": "p3"},
]


def test_generated_text_enters_through_the_gates_with_its_provenance(corpus, model, tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in GENERATED))
    real = FilesSourceConfig(paths=(corpus,), id_field="id")
    generated = GeneratedFilesSourceConfig(paths=(str(path),))
    stages = (ExactDedupConfig(), QualityFilterConfig(scorer=model, max_score_quantile=0.9))
    config = config_of(corpus, tmp_path / "out", *stages, sources=(real, generated))
    found = reasons(config)
    assert {name: reason for name, reason in found.items() if name.startswith("generated")} == {
        "generated/abc/p1#samples.jsonl:1": "exact_dedup.duplicate",
        "generated/abc/p1#samples.jsonl:2": "exact_dedup.duplicate",
        "generated/abc/2#samples.jsonl:3": "quality_filter.max_score_quantile",
    }
    quarantined = [
        json.loads(line) for file in (tmp_path / "out/quarantine").iterdir() for line in file.read_text().splitlines()
    ]
    assert [(row["record"], row["reason"]) for row in quarantined] == [
        (4, "missing_provenance"),
        (5, "missing_provenance"),
        (6, "wrong_type"),
        (7, "missing_field"),
    ]
    funnel = Manifest.load(tmp_path / "out/manifest.json").steps
    assert [step.kept.documents for step in funnel if step.source == "generated"] == [3, 3, 3, 1, 0]
    # Of one prompt, all texts are on one side of the split.
    rows = [row for file in (tmp_path / "out/work/read").iterdir() for row in pq.read_table(file).to_pylist()]
    assert [row["key"] for row in rows if row["id"].startswith("generated")] == ["p1", "p1", "2"]


@pytest.mark.parametrize(
    "stages",
    [
        (),
        (ExactDedupConfig(),),
        (QualitySampleConfig(scorer=QualityModelConfig(path="m"), fraction=0.5),),
        (ExactDedupConfig(), QualityFilterConfig(scorer=QualityModelConfig(path="m"))),  # drops nothing
    ],
)
def test_generated_text_without_its_gates_is_an_error_of_the_config(corpus, tmp_path, stages):
    source = GeneratedFilesSourceConfig(paths=("samples.jsonl",))
    with pytest.raises(ValueError, match="enters only through deduplication and a quality stage"):
        config_of(corpus, tmp_path, *stages, sources=(source,))


REFUSED = {
    "min_score must be less than max_score, got 2 and 1": lambda: QualityFilterConfig(
        scorer=ScoreFilesConfig(path="s"), min_score=2, max_score=1
    ),
    "min_score_quantile must be less than max_score_quantile": lambda: QualityFilterConfig(
        scorer=ScoreFilesConfig(path="s"), min_score_quantile=0.5, max_score_quantile=0.5
    ),
    "min_score_quantile must lie between 0 and 1": lambda: QualityFilterConfig(
        scorer=ScoreFilesConfig(path="s"), min_score_quantile=30
    ),
    "fraction must lie in": lambda: QualitySampleConfig(scorer=ScoreFilesConfig(path="s"), fraction=0),
    "temperature must not be negative": lambda: QualitySampleConfig(
        scorer=ScoreFilesConfig(path="s"), fraction=0.5, temperature=-1
    ),
    "label must name": lambda: FastTextModelConfig(path="s", label=""),
    "bits must lie between 8 and 28, got 40": lambda: TrainNgramModelConfig(
        sources=(FilesSourceConfig(paths=("a",)),), bits=40
    ),
    "ngram must lie between 1 and 8, got 0": lambda: TrainNgramModelConfig(
        sources=(FilesSourceConfig(paths=("a",)),), ngram=0
    ),
    "sources needs at least one source": lambda: TrainNgramModelConfig(sources=()),
    "held_out_fraction must lie between 0 and 1, both excluded": lambda: QualityTrainingConfig(
        output_dir="m", model=TrainNgramModelConfig(sources=(FilesSourceConfig(paths=("a",)),)), held_out_fraction=0.0
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_configs_that_cannot_be_meant(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_the_verbs_of_data(corpus, tmp_path, monkeypatch):
    """From gin files: a model is trained, and a config without a verb runs the pipeline that uses it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gin").write_text(f"""
        QualityTrainingConfig.output_dir = "model"
        QualityTrainingConfig.model = @TrainNgramModelConfig()
        TrainNgramModelConfig.sources = (@FilesSourceConfig(),)
        TrainNgramModelConfig.bits = 12
        FilesSourceConfig.paths = ("{corpus}",)
    """)
    (tmp_path / "corpus.gin").write_text(f"""
        PipelineConfig.output_dir = "out"
        PipelineConfig.sources = (@FilesSourceConfig(),)
        FilesSourceConfig.paths = ("{corpus}",)
        PipelineConfig.stages = (@QualityFilterConfig(),)
        QualityFilterConfig.scorer = @QualityModelConfig()
        QualityModelConfig.path = "model"
        PipelineConfig.tokenizer = @TrainTokenizerConfig()
        PipelineConfig.num_workers = 1
        PipelineConfig.split = @SplitConfig()
        SplitConfig.held_out_fraction = 0.3
        TrainTokenizerConfig.vocab_size = 340
    """)

    def slmjax(*arguments):
        done = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
        assert done.exit_code == 0
        return done.output

    assert "area_under_curve" in slmjax("data", "train-quality", "model.gin", "--set", "QualityTrainingConfig.seed=1")
    assert json.loads((tmp_path / "model/model.json").read_text())["config"]["seed"] == 1
    assert "QualityTrainingConfig.output_dir" in slmjax("show", "model.gin")
    slmjax("data", "corpus.gin", "--set", "QualityFilterConfig.max_score_quantile=0.5")
    assert Manifest.load(tmp_path / "out/manifest.json").steps[-1].kept.documents == 31
    assert "done before" in slmjax("data", "run", "corpus.gin", "--set", "QualityFilterConfig.max_score_quantile=0.25")
    assert Manifest.load(tmp_path / "out/manifest.json").steps[-1].kept.documents == 16
