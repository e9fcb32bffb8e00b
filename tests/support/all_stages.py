"""A small corpus, and a config with every kind of stage: what must hold for all of them is tested on it."""

import io
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from rich.console import Console

from data_pipelines.manifest import Manifest
from data_pipelines.quality.training import train
from data_pipelines.run import run
from slmjax.config import (
    C4FilterConfig,
    DecontaminationConfig,
    EvaluationTextConfig,
    ExactDedupConfig,
    FilesSourceConfig,
    GopherFilterConfig,
    LengthFilterConfig,
    MaskPersonalDataConfig,
    NearDedupConfig,
    PassageDedupConfig,
    PipelineConfig,
    QualityFilterConfig,
    QualityModelConfig,
    QualitySampleConfig,
    QualityTrainingConfig,
    RepetitionFilterConfig,
    SplitConfig,
    SubstringDedupConfig,
    TrainNgramModelConfig,
    TrainTokenizerConfig,
)

QUIET = Console(file=io.StringIO())


def sentence(rng: np.random.Generator, num_words: int) -> str:
    words = [f"{'bdfgklmn'[w % 8]}{'aeiou'[w // 8 % 5]}{'lmnrst'[w // 40]}o" for w in rng.integers(0, 240, num_words)]
    return f"The {' '.join(words)} of the end."


def write_corpus(folder: Path, num_documents: int = 80) -> None:
    """In folder/in: documents, copies, near copies, parts of others, an item, an address, broken lines, three formats.

    In folder/model: an n-gram model of such sentences. folder/items.jsonl is the evaluation set.
    """
    rng = np.random.default_rng(0)
    texts = ["\n".join(sentence(rng, 18) for _ in range(5)) for _ in range(num_documents)]
    line, run_of_words, item = sentence(rng, 15), sentence(rng, 12), sentence(rng, 20)
    texts += [texts[i].replace(" ", "  ") for i in (0, 30)] + [f"{texts[i]} end" for i in (1, 31)] + ["too short"]
    for i in (2, 32, 50):
        texts[i] += f"\n{line}"
        texts[i + 1] += f" {run_of_words} {sentence(rng, 3)}"
    texts[4] += f"\n{item}"
    texts[5] += "\nWrite to someone@example.org of the end."
    texts[6] += "\nno full stop"
    rows = [orjson.dumps({"id": str(i), "text": text}) for i, text in enumerate(texts)]
    rows += [rows[7], b'{"broken', b'{"id": "none"}']
    (folder / "in").mkdir(parents=True)
    (folder / "in/large.jsonl").write_bytes(b"\n".join(rows[::2]))
    (folder / "in/more.jsonl.zst").write_bytes(zstandard.compress(b"\n".join(rows[1::4])))
    table = pa.Table.from_pylist([orjson.loads(row) for row in rows[3::4] if not row.startswith(b'{"broken')])
    pq.write_table(table, folder / "in/table.parquet", row_group_size=5)
    (folder / "items.jsonl").write_bytes(orjson.dumps({"text": item}))
    likely = [orjson.dumps({"text": sentence(rng, 30)}) for _ in range(40)]
    (folder / "likely.jsonl").write_bytes(b"\n".join(likely))
    sources = (FilesSourceConfig(paths=(str(folder / "likely.jsonl"),)),)
    model = TrainNgramModelConfig(sources=sources, bits=12)
    train(QualityTrainingConfig(output_dir=str(folder / "model"), model=model), console=QUIET)


def config_of(folder: Path, output_dir: Path, **changes) -> PipelineConfig:
    """Every kind of stage: rewrites, filters, scores, deduplications of every kind, decontamination, sampling."""
    scorer = QualityModelConfig(path=str(folder / "model"))
    evaluation = EvaluationTextConfig(paths=(str(folder / "items.jsonl"),), name="quiz")
    fields = {
        "output_dir": str(output_dir),
        "sources": (FilesSourceConfig(paths=(str(folder / "in"),), id_field="id"),),
        "stages": (
            MaskPersonalDataConfig(),
            C4FilterConfig(min_sentences=1),
            LengthFilterConfig(min_words=20),
            GopherFilterConfig(min_words=20),
            RepetitionFilterConfig(),
            QualityFilterConfig(scorer=scorer, max_score_quantile=0.97),
            ExactDedupConfig(),
            NearDedupConfig(survivor="best", score="quality_filter.score"),
            PassageDedupConfig(unit="line"),
            SubstringDedupConfig(words=10),
            DecontaminationConfig(evaluations=(evaluation,)),
            QualitySampleConfig(scorer=scorer, fraction=0.9, temperature=1.0),
        ),
        "tokenizer": TrainTokenizerConfig(vocab_size=340),
        "split": SplitConfig(held_out_fraction=0.2),
        "num_workers": 1,
        "shard_bytes": 8000,
    }
    worker_bytes = changes.pop("worker_bytes", 20_000)
    return with_worker_bytes(PipelineConfig(**{**fields, **changes}), worker_bytes)


def with_worker_bytes(config: PipelineConfig, worker_bytes: int) -> PipelineConfig:
    """The config with less memory than one may ask for, so that a small corpus, too, is more than a worker holds."""
    object.__setattr__(config, "worker_bytes", worker_bytes)
    return config


def quiet(config: PipelineConfig) -> Manifest:
    return run(config, console=QUIET)


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file but the timings."""
    files = (path for path in root.rglob("*") if path.is_file() and path.name != "timings.json")
    return {str(path.relative_to(root)): path.read_bytes() for path in files}
