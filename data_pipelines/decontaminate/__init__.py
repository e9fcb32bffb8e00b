"""Decontamination: an index of evaluation sets before the documents are measured, and a report of what was found."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipelines import tasks
from data_pipelines.decontaminate.index import index_file, index_task, make_index, texts_path
from data_pipelines.decontaminate.report import ReportTask, write_report
from data_pipelines.documents import Shard
from data_pipelines.engines import Engine
from data_pipelines.progress import Reporter
from data_pipelines.stages.contamination import IndexFile
from slmjax import files
from slmjax.config import DecontaminationConfig, NormaliseConfig

__all__ = ["make_indices", "report"]


def make_indices(
    engine: Engine, reporter: Reporter, root: Path, named: Mapping[str, object], normalise: NormaliseConfig | None
) -> dict[str, IndexFile]:
    """Makes an index for every stage that is a decontamination, and returns it by the name of the stage."""
    planned = [
        index_task(root, name, stage, normalise)
        for name, stage in named.items()
        if isinstance(stage, DecontaminationConfig)
    ]
    names = [task.name for task in planned]
    files.remove_others(
        root / "work" / "evaluations", {f"{name}{end}" for name in names for end in (".parquet", ".npz")}
    )
    files.remove_others(root / "contamination", {f"{name}{end}" for name in names for end in (".jsonl", ".json")})
    if not planned:
        return {}
    with reporter.step("evaluations", len(planned)) as step:
        done = tasks.run_tasks(engine, make_index, planned, advance=step.advance)
        step.note = f"{sum(task.result['texts'] for task in done):,} texts"
    return {task.name: index_file(task, finished) for task, finished in zip(planned, done, strict=True)}


def report(
    engine: Engine,
    root: Path,
    stage_name: str,
    config: DecontaminationConfig,
    shards: tuple[Shard, ...],
    previous: str | None,
    inputs: Mapping[str, Sequence[str]],
) -> str:
    """Writes the report of a stage, and returns what was found in a line.

    `inputs` are hashes of what the verdicts of each shard depend on.
    """
    task = ReportTask(
        root=root,
        step=f"contamination/{stage_name}",
        name=stage_name,
        fingerprint=tasks.fingerprint(config, dict(inputs), files.sha256(texts_path(root, stage_name))),
        shards=shards,
        previous=previous,
    )
    (done,) = tasks.run_tasks(engine, write_report, [task], advance=lambda _: None)
    return ", ".join(
        f"{sums['documents']:,} documents hold {sums['texts_found']:,} of {sums['texts']:,} texts of {name}"
        for name, sums in done.result["found"].items()
    )
