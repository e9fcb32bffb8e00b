"""A small pipeline with one of everything: documents dropped for every kind of reason, masked, cut, hostile, broken."""

import io
from pathlib import Path

import numpy as np
import orjson
from rich.console import Console

from data_pipelines.run import run
from slmjax.config import (
    DecontaminationConfig,
    EvaluationTextConfig,
    ExactDedupConfig,
    FilesSourceConfig,
    LengthFilterConfig,
    MaskPersonalDataConfig,
    NearDedupConfig,
    PassageDedupConfig,
    PipelineConfig,
    SplitConfig,
    TrainTokenizerConfig,
)

NUM_GOOD = 24
HOSTILE = "\x1b]0;owned\x07\x1b[31m [bold]loud[/bold] \u202eback\u202c\r\nnext "
SHARED = "this paragraph of a licence stands in two documents, and is cut from the second one"


def text_of(i: int, words: int = 60) -> str:
    rng = np.random.default_rng(i)
    found = [f"{'bdfgklmnprst'[w % 12]}{'aeiou'[w // 12 % 5]}{'lmnrst'[w // 60]}o" for w in rng.integers(0, 360, words)]
    return "\n".join(" ".join(found[start : start + 10]) for start in range(0, words, 10))


def config_of(root: Path, **changes) -> PipelineConfig:
    stages = (
        LengthFilterConfig(min_words=20, max_words=5000),
        MaskPersonalDataConfig(),
        ExactDedupConfig(),
        NearDedupConfig(similarity=0.6),
        DecontaminationConfig(
            evaluations=(EvaluationTextConfig(name="exam", paths=(str(root / "exam.jsonl"),), id_field="id"),)
        ),
        PassageDedupConfig(unit="paragraph"),
    )
    fields = {
        "output_dir": str(root / "out"),
        "sources": (
            FilesSourceConfig(name="good", paths=(str(root / "good.jsonl"),), id_field="id"),
            FilesSourceConfig(name="bad", paths=(str(root / "bad.jsonl"),)),
        ),
        "stages": stages,
        "tokenizer": TrainTokenizerConfig(vocab_size=330),
        "split": SplitConfig(held_out_fraction=0.3),
        "num_workers": 1,
        "shard_bytes": 4000,
    }
    return PipelineConfig(**{**fields, **changes})


def build(root: Path) -> Path:
    """Writes the inputs and runs the pipeline; returns its output directory."""
    good = [{"id": f"doc{i}", "text": text_of(i)} for i in range(NUM_GOOD)]
    good[5]["text"] += f"\n\n{SHARED}\n"
    good[9]["text"] = f"{SHARED}\n\n{good[9]['text']}"
    near = text_of(3).split()
    near[30] = "changed"
    bad = [
        {"text": text_of(0).upper()},
        {"text": " ".join(near)},
        {"text": "tiny"},
        {"text": "write to someone@example.com today " + text_of(100)},
        {"text": HOSTILE + text_of(101)},
        {"text": f"{text_of(102)}\n{text_of(200, 20)}\nend"},
    ]
    (root / "good.jsonl").write_bytes(b"\n".join(map(orjson.dumps, good)))
    (root / "bad.jsonl").write_bytes(b"\n".join([*map(orjson.dumps, bad), b'{"broken', b'{"no": "text"}']))
    (root / "exam.jsonl").write_bytes(orjson.dumps({"id": "q1", "text": text_of(200, 20)}))
    run(config_of(root), console=Console(file=io.StringIO()))
    return root / "out"
