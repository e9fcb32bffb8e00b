"""Where a pipeline's scores come from: a quality model, a fastText model, or files of scores made elsewhere."""

import functools
import hashlib
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipelines.quality import model_files
from slmjax import files
from slmjax.config import (
    FastTextModelConfig,
    QualityFilterConfig,
    QualityModelConfig,
    QualitySampleConfig,
    ScoreFilesConfig,
)
from slmjax.config.quality import ScorerConfig

QualityStageConfig = QualityFilterConfig | QualitySampleConfig


def measured_content(config: QualityStageConfig) -> dict[str, Any]:
    """What the attributes depend on besides the documents: what the scorer's files hold, and the seed of a sample.

    Raises:
      ValueError: the scorer cannot be used: no such model, a package is missing, no files.
    """
    scorer = config.scorer
    match scorer:
        case QualityModelConfig():
            content = {"model": model_files.identity(scorer.path)}
        case FastTextModelConfig():
            _fasttext()
            content = {"model": files.sha256(_file(scorer.path)), "label": scorer.label}
        case ScoreFilesConfig():
            digest = hashlib.sha256()
            for path in _score_files(scorer):
                digest.update(f"{path.name} {files.sha256(path)}\n".encode())
            content = {"files": digest.hexdigest(), "column": scorer.column}
    return content | ({"seed": config.seed} if isinstance(config, QualitySampleConfig) else {})


def measure(config: QualityStageConfig, batch: pa.RecordBatch, *, shard_name: str) -> pa.RecordBatch:
    """Returns the attributes of a batch of documents: id, score (NaN where there is none) and, for a sample, noise."""
    columns = {"id": batch.column("id"), "score": pa.array(_score(config.scorer, batch, shard_name), pa.float64())}
    if isinstance(config, QualitySampleConfig):
        columns["noise"] = pa.array([gumbel(config.seed, name) for name in batch.column("id").to_pylist()])
    return pa.record_batch(columns)


def gumbel(seed: int, name: str) -> float:
    """A draw from the standard Gumbel distribution that depends on a seed and a name alone."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    uniform = ((int.from_bytes(digest, "little") >> 12) + 0.5) / 2**52
    return float(-np.log(-np.log(uniform)))


def _score(scorer: ScorerConfig, batch: pa.RecordBatch, shard_name: str) -> np.ndarray:
    match scorer:
        case QualityModelConfig():
            return _model(scorer.path, model_files.identity(scorer.path)).score(batch.column("text"))
        case FastTextModelConfig():
            return _score_with_fasttext(scorer, batch.column("text"))
        case ScoreFilesConfig():
            return read_scores(scorer, batch.column("id"), shard_name)


def read_scores(scorer: ScoreFilesConfig, ids: pa.Array, shard_name: str) -> np.ndarray:
    """Scores of the documents of one shard with these ids, NaN where there is none."""
    path = model_files.expand(scorer.path) / f"{shard_name}.parquet"
    if not path.is_file():
        raise ValueError(f"there are no scores for the documents of shard {shard_name}: {path} is missing")
    known, scores = _read_scores(path, scorer.column, path.stat().st_mtime_ns)
    places = pc.index_in(ids, value_set=known)  # pyright: ignore[reportAttributeAccessIssue]
    return scores.take(places).to_numpy(zero_copy_only=False)


@functools.lru_cache(maxsize=2)
def _model(path: str, identity: str) -> model_files.QualityModel:
    """One a process, not one a batch; another when the files have changed."""
    del identity
    return model_files.load(path)


@functools.lru_cache(maxsize=2)
def _read_scores(path: Path, column: str, modified: int) -> tuple[pa.Array, pa.Array]:
    """Ids and scores of one file."""
    del modified
    try:
        table = pq.read_table(path, columns=["id", column])
        ids = table.column("id").combine_chunks().cast(pa.string())
        return ids, table.column(column).combine_chunks().cast(pa.float64())
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ValueError(f"{path} must be parquet with the columns id and {column} (a number): {error}") from error


def _score_files(scorer: ScoreFilesConfig) -> list[Path]:
    found = sorted(model_files.expand(scorer.path).glob("*.parquet"))
    if not found:
        raise ValueError(f"{scorer.path} has no parquet files; `slmjax data score` makes them, one for every shard")
    return found


def _file(path: str) -> Path:
    expanded = model_files.expand(path)
    if not expanded.is_file():
        raise ValueError(f"there is no fastText model {expanded}")
    return expanded


def _fasttext() -> Any:
    try:
        return importlib.import_module("fasttext")  # of an extra, whose distribution has another name
    except ImportError as error:
        raise ValueError(
            "FastTextModelConfig needs the package fasttext: pip install -e '.[quality]' -c constraints.txt"
        ) from error


@functools.lru_cache(maxsize=1)
def _load_fasttext(path: Path, modified: int) -> Any:
    del modified
    try:
        return _fasttext().load_model(str(path))
    except ValueError as error:
        raise ValueError(f"{path} is no fastText model: {error}") from error


def _score_with_fasttext(scorer: FastTextModelConfig, texts: pa.Array) -> np.ndarray:
    path = _file(scorer.path)
    model = _load_fasttext(path, path.stat().st_mtime_ns)
    labels = model.get_labels()
    if scorer.label not in labels:
        raise ValueError(f"{path} has no label {scorer.label!r}; its labels are {', '.join(labels[:20])}")
    scores = np.empty(len(texts))
    for row, text in enumerate(texts.to_pylist()):
        names, probabilities = model.predict(text.replace("\n", " "), k=len(labels))
        scores[row] = dict(zip(names, probabilities, strict=True)).get(scorer.label, 0.0)
    return scores.clip(0.0, 1.0)  # fastText's sums of float32 exceed 1 by some 1e-5
