"""Gathers what a report shows, a shard or a bucket at a time, and writes report.html."""

import collections
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from data_pipelines import tasks
from data_pipelines.documents import Shard
from data_pipelines.engines import Engine
from data_pipelines.manifest import Manifest
from data_pipelines.progress import Reporter, Step
from data_pipelines.report import clusters, excerpts, findings, layout, summary
from data_pipelines.report.excerpts import Wanted
from data_pipelines.report.samples import Kind, Sample
from data_pipelines.report.summary import Summary, SummaryTask
from slmjax import files
from slmjax.config import DecontaminationConfig, ExactDedupConfig, NearDedupConfig
from slmjax.config.pipeline import StageConfig

Place = tuple[int, int]  # shard and row


def write(
    root: Path,
    engine: Engine,
    reporter: Reporter,
    stages: Mapping[str, StageConfig],
    shards: Sequence[Shard],
    manifest: Manifest,
    *,
    worker_bytes: int,
) -> None:
    """Writes <root>/report.html from the files of a run that has selected; the same bytes for the same run.

    Args:
      root: the pipeline's output directory.
      engine: where to run.
      reporter: of the run.
      stages: in order, by name.
      shards: as the stages left them.
      manifest: of the run; where nothing was left to tokenise, without splits.
      worker_bytes: as in PipelineConfig.
    """
    with reporter.step("report", len(shards), sum(shard.bytes for shard in shards)) as step:
        gathering = _Gathering(root, engine, step, stages, shards, worker_bytes)
        content = layout.render(gathering.report(manifest))
        path = root / "report.html"
        if not path.is_file() or path.read_text(encoding="utf-8") != content:
            files.write_text(path, content)
        step.note = f"{path.name}, {path.stat().st_size / 1e6:.2f} MB"


class _Gathering:
    """The tasks of a report."""

    def __init__(
        self,
        root: Path,
        engine: Engine,
        step: Step,
        stages: Mapping[str, StageConfig],
        shards: Sequence[Shard],
        worker_bytes: int,
    ):
        self._root = root
        self._engine = engine
        self._step = step
        self._stages = dict(stages)
        self._shards = shards
        self._worker_bytes = worker_bytes
        self._inputs = [self._hashes(shard) for shard in shards]

    def report(self, manifest: Manifest) -> layout.Report:
        """Everything that the page shows."""
        found = self._summary()
        tokens: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for shard in self._shards if manifest.splits else ():  # else what an earlier run has tokenised
            tokens[shard.source].update(self._marker("tokenise", shard.name)["result"]["tokens"])
        groups = self._clusters(found.duplicates)
        ranked = {
            (stage, rank): [(part, row) for part, row in places]
            for stage, each in groups.items()
            for rank, (_, _, places) in enumerate(each["largest"])
        }
        wanted = [(self._shown(kind), _place(sample)) for kind, chosen in found.samples.items() for sample in chosen]
        wanted += [(Kind("compare", stage), place) for (stage, _), places in ranked.items() for place in places]
        read = self._excerpts("report/excerpts", wanted)
        samples = {
            kind: [read[self._shown(kind), _place(sample)] for sample in chosen]
            for kind, chosen in found.samples.items()
        }
        return layout.Report(
            manifest=manifest,
            stages=self._stages,
            summary=found,
            tokens=tokens,
            samples=samples,
            survivors=self._survivors(
                {(kind.stage, each["duplicate_of"]) for (kind, _), each in read.items() if kind.fate == "compare"}
            ),
            clusters=groups,
            members={key: [read[Kind("compare", key[0]), place] for place in places] for key, places in ranked.items()},
            contamination=self._contamination(),
            quarantine=self._quarantine(),
        )

    def _shown(self, kind: Kind) -> Kind:
        """What to read of a sample: of a duplicate what it takes to compare it."""
        is_duplicate = isinstance(self._stages[kind.stage], ExactDedupConfig | NearDedupConfig)
        return Kind("compare", kind.stage) if is_duplicate and kind.fate == "dropped" else kind

    def _summary(self) -> Summary:
        planned = [
            SummaryTask(
                root=self._root,
                step="report/summary",
                name=shard.name,
                fingerprint=tasks.fingerprint(list(self._stages.items()), self._inputs[part], part),
                shard=shard,
                part=part,
                stages=tuple(self._stages.items()),
            )
            for part, shard in enumerate(self._shards)
        ]
        self._run("report/summary", summary.summarise, planned)
        files.remove_others(self._root / "work" / "report", {f"{shard.name}.json" for shard in self._shards})
        found = Summary()
        for shard in self._shards:  # one after the other: only their sum is in memory
            found.add(shard, orjson.loads(summary.summary_path(self._root, shard).read_bytes()))
        return found

    def _clusters(self, duplicates: int) -> dict[str, dict[str, Any]]:
        if duplicates == 0:
            self._run("report/clusters", summary.summarise, [])
            return {}
        return clusters.find(
            self._engine,
            self._root,
            self._shards,
            tuple(self._stages),
            duplicates=duplicates,
            worker_bytes=self._worker_bytes,
            fingerprint=tasks.fingerprint(list(self._stages), self._inputs),
            phase=self._phase,
        )

    def _survivors(self, wanted: set[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Any]]:
        """How the documents begin that were kept, by stage and id, where they are in the corpus."""
        ids = tuple(sorted({name for _, name in wanted}))
        planned = [
            excerpts.LocateTask(
                root=self._root,
                step="report/locate",
                name=shard.name,
                fingerprint=tasks.fingerprint(ids, self._inputs[part]),
                shard=shard,
                ids=ids,
            )
            for part, shard in enumerate(self._shards if ids else ())
        ]
        places: dict[str, Place] = {}
        for part, done in enumerate(self._run("report/locate", excerpts.locate, planned)):
            for name, row in done.result["rows"].items():
                places.setdefault(name, (part, row))
        known = sorted(key for key in wanted if key[1] in places)
        read = self._excerpts("report/survivors", [(Kind("compare", stage), places[name]) for stage, name in known])
        return {(stage, name): read[Kind("compare", stage), places[name]] for stage, name in known}

    def _excerpts(self, step: str, wanted: Sequence[tuple[Kind, Place]]) -> dict[tuple[Kind, Place], dict[str, Any]]:
        by_shard: dict[int, list[Wanted]] = collections.defaultdict(list)
        for kind, (part, row) in sorted(set(wanted)):
            by_shard[part].append(Wanted(row, kind))
        planned = [
            excerpts.ExcerptTask(
                root=self._root,
                step=step,
                name=self._shards[part].name,
                fingerprint=tasks.fingerprint(
                    list(self._stages.items()), self._inputs[part], [[each.row, *each.kind] for each in by_shard[part]]
                ),
                shard=self._shards[part],
                stages=tuple(self._stages.items()),
                wanted=tuple(by_shard[part]),
            )
            for part in sorted(by_shard)
        ]
        read: dict[tuple[Kind, Place], dict[str, Any]] = {}
        for part, done in zip(sorted(by_shard), self._run(step, excerpts.read, planned), strict=True):
            for each, excerpt in zip(by_shard[part], done.result["excerpts"], strict=True):
                read[each.kind, (part, each.row)] = excerpt
        return read

    def _quarantine(self) -> dict[str, list[dict[str, Any]]]:
        paths = sorted((self._root / "quarantine").glob("*.jsonl"))
        planned = [self._list_task("report/quarantine", path) for path in paths]
        return findings.merge([done.result for done in self._run("report/quarantine", findings.quarantined, planned)])

    def _contamination(self) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
        names = [name for name, stage in self._stages.items() if isinstance(stage, DecontaminationConfig)]
        names = names if self._shards else []  # else what an earlier run has found
        folder = self._root / "contamination"
        planned = [self._list_task("report/contamination", folder / f"{name}.jsonl") for name in names]
        done = self._run("report/contamination", findings.contaminated, planned)
        return {
            name: (json.loads((folder / f"{name}.json").read_text(encoding="utf-8")), each.result["found"])
            for name, each in zip(names, done, strict=True)
        }

    def _list_task(self, step: str, path: Path) -> findings.ListTask:
        fingerprint = tasks.fingerprint(files.sha256(path))
        return findings.ListTask(root=self._root, step=step, name=path.stem, fingerprint=fingerprint, path=path)

    def _run(self, step: str, function: Callable[[Any], tasks.Done], planned: Sequence[tasks.Task]) -> list[tasks.Done]:
        """Runs the tasks of a step; of one without tasks nothing stays from an earlier run."""
        if not planned:
            files.remove_others(self._root / "work" / "markers" / step, set())
            return []
        name = step.partition("/")[2]
        return tasks.run_tasks(self._engine, function, planned, advance=self._phase(name, planned))

    def _phase(self, name: str, planned: Sequence[tasks.Task]) -> Callable[[tasks.Done], None]:
        self._step.phase(name, planned)
        return self._step.advance

    def _hashes(self, shard: Shard) -> list[str]:
        """Of everything that is shown of a shard: what was read, measured, decided and selected."""
        name = f"work/read/{shard.name}.parquet"
        hashes = [self._marker("read", shard.name.rpartition("-")[0])["outputs"][name]["sha256"]]
        for step in (*self._stages, *(f"verdicts/{stage}" for stage in self._stages), "select"):
            outputs = self._marker(step, shard.name).get("outputs", {})
            hashes += [outputs[output]["sha256"] for output in sorted(outputs)]
        return hashes

    def _marker(self, step: str, name: str) -> dict[str, Any]:
        """What a finished task has said; nothing of a stage that measures nothing."""
        path = self._root / "work" / "markers" / step / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _place(sample: Sample) -> Place:
    return sample.part, sample.row
