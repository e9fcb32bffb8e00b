"""Runs a pipeline: read, measure and decide for every stage, select, tokenise. The order of everything is here."""

import collections
import contextlib
import dataclasses
import gc
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, assert_never

from rich.console import Console

from data_pipelines import (
    decontaminate,
    deduplicate,
    filtering,
    measuring,
    reading,
    report,
    selecting,
    stages,
    tasks,
    tokenising,
)
from data_pipelines.documents import Shard
from data_pipelines.engines import Engine, system_memory
from data_pipelines.engines.local import LocalEngine
from data_pipelines.engines.ray import RayEngine
from data_pipelines.manifest import FORMAT_VERSION, Count, Manifest, SplitCounts, StepCounts, count_step
from data_pipelines.progress import Reporter, Step
from data_pipelines.quality import scorers, selection
from data_pipelines.stages import normalise
from slmjax import files
from slmjax.config import (
    DecontaminationConfig,
    ExactDedupConfig,
    ExistingTokenizerConfig,
    LocalEngineConfig,
    PipelineConfig,
    RayEngineConfig,
)
from slmjax.config.pipeline import StageConfig
from slmjax.config.resolved import to_json
from slmjax.data.exclusive import only_user
from slmjax.data.tokenizer import Tokenizer

_OF_NO_ACCOUNT = ("output_dir", "engine", "num_workers", "worker_bytes")  # for what comes out


def run(config: PipelineConfig, *, console: Console | None = None) -> Manifest:
    """Makes the corpus that `config` describes, going on from whatever an earlier run had finished.

    In output_dir: train/ and held_out/ (token stores), held_out.jsonl.zst, tokenizer.model (where it is trained),
    documents/ (the selected text), quarantine/, manifest.json, timings.json, and work/, which is only for resuming.

    Raises:
      ValueError: nothing to read or nothing left, or another process works in output_dir.
      OSError: an output cannot be written.
    """
    for stage in config.stages:  # a scorer that cannot be used is known before an hour of reading
        if isinstance(stage, scorers.QualityStageConfig):
            scorers.measured_content(stage)
    deduplicate.check(_named(config.stages))
    stages.check_installed(config.stages)
    normalise.check_installed(config.normalise)
    root = Path(os.path.expandvars(config.output_dir)).expanduser().absolute()
    with only_user(root), _engine(config, root) as engine, _frozen(), system_memory():
        reporter = Reporter(console or Console(), root / "timings.json")
        manifest = _Run(config, root, engine, reporter).all_steps()
        files.remove_partial(root)
        manifest.save(root / "manifest.json")
        reporter.summary(manifest, root)
    return manifest


@contextlib.contextmanager
def _frozen() -> Iterator[None]:
    """Takes what is in memory already out of what the garbage collector looks through again and again."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclasses.dataclass(frozen=True)
class _Run:
    config: PipelineConfig
    root: Path
    engine: Engine
    reporter: Reporter

    @property
    def content(self) -> dict[str, Any]:
        """The config as JSON, without what the output does not depend on."""
        content = to_json(self.config)
        return {name: content[name] for name in content if name not in _OF_NO_ACCOUNT}

    def all_steps(self) -> Manifest:
        shards, hashes, funnel = self.read()
        shards, hashes, last, verdicts = self.filter(shards, hashes, funnel)
        hashes = self.select(shards, hashes, last, verdicts, funnel)
        tokenizer_path = self.tokenizer(shards, hashes)
        tokenizer = Tokenizer.load(tokenizer_path)
        splits = self.tokenise(shards, hashes, tokenizer_path, tokenizer)
        manifest = self.manifest(
            funnel, tokenizer_sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size, splits=splits
        )
        self.report(shards, manifest)
        return manifest

    def manifest(self, funnel: list[StepCounts], **tokenised: Any) -> Manifest:
        """What is known after all steps, or where `tokenised` is empty, before there is a tokenizer."""
        before: dict[str, Any] = {"tokenizer_sha256": "", "vocab_size": 0, "splits": {}}
        return Manifest(
            format_version=FORMAT_VERSION,
            config_sha256=tasks.sha256_of(self.content),
            config=self.content,
            versions=tasks.versions(),
            steps=tuple(funnel),
            **{**before, **tokenised},
        )

    def report(self, shards: list[Shard], manifest: Manifest) -> None:
        """Writes report.html."""
        report.write(
            self.root,
            self.engine,
            self.reporter,
            self.named_stages(),
            shards,
            manifest,
            worker_bytes=self.config.worker_bytes,
        )

    def step(self, name: str, function: Callable[[Any], tasks.Done], planned: Sequence[tasks.Task]) -> list[tasks.Done]:
        with self.reporter.step(name, len(planned), sum(task.extent.bytes for task in planned)) as step:
            done = tasks.run_tasks(self.engine, function, planned, advance=step.advance)
            step.note = _spelled(task.result.get("quarantined", {}) for task in done)
        return done

    def write_plan(self) -> None:
        """Writes work/plan.json, by which others understand what lies there, also before the run has finished."""
        named = {name: to_json(stage) for name, stage in self.named_stages().items()}
        text = json.dumps({"config": self.content, "stages": named}, indent=1) + "\n"
        path = self.root / "work" / "plan.json"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            files.write_text(path, text)

    def read(self) -> tuple[list[Shard], dict[str, str], list[StepCounts]]:
        """Returns the shards, the sha256 of each by name, and the first rows of the funnel."""
        planned = reading.plan(self.config, self.root, self.step)
        self.write_plan()
        done = self.step("read", reading.read_unit, planned)
        kept: dict[str, Count] = {source.name: Count() for source in self.config.sources}
        quarantined: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in kept}
        changes: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in kept}
        shards: list[Shard] = []
        for task, unit in zip(planned, done, strict=True):
            quarantined[task.source.name].update(unit.result["quarantined"])
            changes[task.source.name].update(unit.result["changes"])
            for shard in (Shard(**fields) for fields in unit.result["shards"]):
                kept[shard.source] += Count(documents=shard.documents, bytes=shard.bytes)
                shards.append(shard)
        outputs = {Path(name): digest for unit in done for name, digest in unit.outputs.items()}
        for directory in ("work/read", "quarantine"):
            files.remove_others(
                self.root / directory, {path.name for path in outputs if path.parent == Path(directory)}
            )
        funnel = [
            StepCounts(
                step="read",
                source=name,
                kept=kept[name],
                dropped=dict(sorted(quarantined[name].items())),
                changes=dict(sorted(changes[name].items())),
            )
            for name in kept
        ]
        if not shards:
            self.report([], self.manifest(funnel))
            first = reading.first_reject(self.root / "quarantine")
            raise ValueError(f"not one document could be read (see {self.root / 'quarantine'}): {_why(funnel)}{first}")
        return shards, {path.stem: digest for path, digest in outputs.items() if path.suffix == ".parquet"}, funnel

    def filter(
        self, read: list[Shard], read_hashes: dict[str, str], funnel: list[StepCounts]
    ) -> tuple[list[Shard], dict[str, str], str | None, dict[str, str]]:
        """Runs the stages; extends the funnel.

        Returns the shards as the stages left them, the sha256 of each by name, the name of the last stage, and the
        sha256 of its verdicts on each shard.
        """
        named = self.named_stages()
        indices = decontaminate.make_indices(self.engine, self.reporter, self.root, named, self.config.normalise)
        together = {name: stage for name, stage in (named | indices).items() if stages.is_measured(stage)}
        rewrites = [name for name in together if isinstance(together[name], stages.RewriteConfig)]
        with self.reporter.step("measure", len(read), sum(shard.bytes for shard in read)) as step:
            filtered = filtering.measure(self.engine, step, self.root, together, read, read_hashes)
            step.note = filtering.rates(filtered)
        shards, hashes = (read, read_hashes) if rewrites else (filtered.shards, filtered.hashes)
        previous, before = None, dict.fromkeys(read_hashes, "")
        attributes: dict[str, list[list[str]]] = {}  # hashes of those of each stage, for each shard
        for name, stage in named.items():
            if rewrites and name == rewrites[-1]:
                shards, hashes = filtered.shards, filtered.hashes
            with self.reporter.step(name, len(shards), sum(shard.bytes for shard in shards)) as step:
                measured: list[tasks.Done] = []
                if name in together:
                    measured = filtered.attributes[name]
                elif isinstance(stage, measuring.AloneConfig):
                    planned = self.measurements(name, stage, shards, hashes)
                    measured = tasks.run_tasks(self.engine, measuring.measure_shard, planned, advance=step.advance)
                attributes[name] = [list(done.outputs.values()) for done in measured]
                used = [attributes[other] for other in (name, deduplicate.scored_by(stage)) if attributes.get(other)]
                inputs = {
                    shard.name: [before[shard.name], hashes[shard.name], *itertools.chain(*(each[i] for each in used))]
                    for i, shard in enumerate(shards)
                }
                decided = self.decide(name, stage, shards, inputs, previous, step)
                counts = count_step(name, shards, [done.result for done in decided])
                step.note = _why(counts)
                if isinstance(stage, DecontaminationConfig):
                    step.note = decontaminate.report(
                        self.engine, self.root, name, stage, tuple(shards), previous, inputs
                    )
            for kind in ("attributes", "verdicts"):
                files.remove_others(self.root / "work" / kind / name, {f"{shard.name}.parquet" for shard in shards})
            funnel += counts
            previous, before = name, {shard.name: _only(done) for shard, done in zip(shards, decided, strict=True)}
        for directory in ("work/shuffle", "work/markers/shuffle"):  # of stages that an earlier config had
            shutil.rmtree(self.root / directory, ignore_errors=True)
        return shards, hashes, previous, before

    def named_stages(self) -> dict[str, StageConfig]:
        """Those of the config, and one of our own where ids are the corpus's: nothing else makes sure of them."""
        named = _named(self.config.stages)
        given = any(getattr(source, "given_ids", False) for source in self.config.sources)
        return {"unique_ids": ExactDedupConfig(by="id"), **named} if given else named

    def measurements(
        self,
        name: str,
        stage: measuring.AloneConfig,
        shards: list[Shard],
        hashes: dict[str, str],
    ) -> list[measuring.MeasureTask]:
        """The tasks that measure the attributes of a stage by itself."""
        measured = measuring.measured_content(stage)
        return [
            measuring.MeasureTask(
                root=self.root,
                step=name,
                name=shard.name,
                fingerprint=tasks.fingerprint(type(stage).__name__, measured, hashes[shard.name]),
                stage=stage,
                shard=shard,
            )
            for shard in shards
        ]

    def decide(
        self,
        name: str,
        stage: StageConfig,
        shards: list[Shard],
        inputs: dict[str, list[str]],
        previous: str | None,
        shown: Step,
    ) -> list[tasks.Done]:
        """Writes the verdicts after a stage; `inputs` are the hashes of what the verdicts of each shard depend on."""
        if isinstance(stage, stages.BoundedConfig):
            planned = [
                measuring.DecideTask(
                    root=self.root,
                    step=f"verdicts/{name}",
                    name=shard.name,
                    fingerprint=tasks.fingerprint(stage, inputs[shard.name]),
                    stage_name=name,
                    stage=stage,
                    shard=shard,
                    previous=previous,
                )
                for shard in shards
            ]
            return tasks.run_tasks(self.engine, measuring.decide_shard, planned, advance=shown.advance)
        step = deduplicate.GlobalStep(
            root=self.root,
            engine=self.engine,
            name=name,
            shards=tuple(shards),
            previous=previous,
            fingerprint=tasks.fingerprint(stage, inputs),
            worker_bytes=self.config.worker_bytes,
            shown=shown,
        )
        if isinstance(stage, scorers.QualityStageConfig):
            return selection.decide(stage, step)
        return deduplicate.decide(stage, step)

    def select(
        self,
        shards: list[Shard],
        hashes: dict[str, str],
        last: str | None,
        verdicts: dict[str, str],
        funnel: list[StepCounts],
    ) -> dict[str, str]:
        """Writes the documents alive after the stage `last` and returns the sha256 of their shards.

        Where there is nothing to train on it writes the report, which shows why, and raises ValueError.
        """
        planned = [
            selecting.SelectTask(
                root=self.root,
                step="select",
                name=shard.name,
                fingerprint=tasks.fingerprint(self.config.split, hashes[shard.name], verdicts[shard.name]),
                shard=shard,
                conversations=self.config.conversations,
                split=self.config.split,
                last=last,
            )
            for shard in shards
        ]
        done = self.step("select", selecting.select_shard, planned)
        for directory in ("documents", "work/decisions"):
            files.remove_others(self.root / directory, {f"{shard.name}.parquet" for shard in shards})
        fraction = self.config.split.held_out_fraction
        kept = sum(task.result["train"] + task.result["held_out"] for task in done)
        for side, wanted in (("train", True), ("held_out", fraction > 0)):
            if wanted and not any(task.result[side] for task in done):
                self.report(shards, self.manifest(funnel))
                if kept == 0:
                    raise ValueError(
                        f"the stages dropped every document: {_why(funnel)}; loosen the thresholds, which "
                        f"{self.root / 'report.html'} shows with what they met"
                    )
                raise ValueError(
                    f"the {side} side of the split is empty: {kept} documents with held_out_fraction = {fraction}; "
                    "change the fraction, or the salt"
                )
        return {
            shard.name: task.outputs[f"documents/{shard.name}.parquet"]
            for shard, task in zip(shards, done, strict=True)
        }

    def tokenizer(self, shards: list[Shard], hashes: dict[str, str]) -> Path:
        """Returns the path of the tokenizer, trained if the config says so."""
        config = self.config.tokenizer
        trained = self.root / "tokenizer.model"
        if isinstance(config, ExistingTokenizerConfig):
            existing = Path(os.path.expandvars(config.path)).expanduser()
            Tokenizer.load(existing)
            if existing.resolve() != trained.resolve():
                trained.unlink(missing_ok=True)  # of an earlier config
            return existing
        task = tokenising.TrainTokenizerTask(
            root=self.root,
            step="tokenizer",
            name="tokenizer",
            fingerprint=tasks.fingerprint(config, hashes),
            config=config,
            shards=shards,
        )
        self.step("tokenizer", tokenising.train, [task])
        return trained

    def tokenise(
        self,
        shards: list[Shard],
        hashes: dict[str, str],
        tokenizer_path: Path,
        tokenizer: Tokenizer,
    ) -> dict[str, SplitCounts]:
        """Writes the stores and held_out.jsonl.zst."""
        planned = [
            tokenising.TokeniseTask(
                root=self.root,
                step="tokenise",
                name=shard.name,
                fingerprint=tasks.fingerprint(tokenizer.sha256, hashes[shard.name]),
                shard=shard,
                tokenizer=tokenizer_path,
                tokenizer_sha256=tokenizer.sha256,
                conversations=self.config.conversations,
            )
            for shard in shards
        ]
        done = self.step("tokenise", tokenising.tokenise_shard, planned)
        files.remove_others(self.root / "work" / "tokens", {f"{shard.name}.parquet" for shard in shards})
        outputs = [task.outputs for task in done]
        config_sha256 = tasks.sha256_of(self.content)
        names = ["train", "held_out"] if self.config.split.held_out_fraction > 0 else ["train"]
        stores = [
            tokenising.StoreTask(
                root=self.root,
                step="stores",
                name=name,
                fingerprint=tasks.fingerprint(config_sha256, tokenizer.sha256, outputs, hashes),
                shards=shards,
                conversations=self.config.conversations,
                tokenizer_sha256=tokenizer.sha256,
                vocab_size=tokenizer.vocab_size,
                config_sha256=config_sha256,
            )
            for name in names
        ]
        written = self.step("stores", tokenising.write_store, stores)
        if len(names) == 1:  # what an earlier config held out
            if (self.root / "held_out").exists():
                files.remove_directory(self.root / "held_out")
            (self.root / "held_out.jsonl.zst").unlink(missing_ok=True)
        return {name: SplitCounts(**task.result) for name, task in zip(names, written, strict=True)}


def _engine(config: PipelineConfig, root: Path) -> LocalEngine | RayEngine:
    match config.engine:
        case LocalEngineConfig():
            return LocalEngine(config.num_workers)
        case RayEngineConfig():
            return RayEngine(config.engine, config.num_workers, root)
        case _:
            assert_never(config.engine)


def _named(configs: Sequence[StageConfig]) -> dict[str, StageConfig]:
    """Step names: the class's, numbered from the second of a class on."""
    named: dict[str, StageConfig] = {}
    for config in configs:
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(config).__name__.removesuffix("Config")).lower()
        count = sum(isinstance(other, type(config)) for other in named.values())
        named[f"{name}_{count + 1}" if count else name] = config
    return named


def _only(done: tasks.Done) -> str:
    (digest,) = done.outputs.values()
    return digest


def _why(counts: Sequence[StepCounts]) -> str:
    """Reasons and their numbers, over all of `counts`."""
    return _spelled(row.dropped for row in counts)


def _spelled(counts: Iterable[Mapping[str, int]]) -> str:
    total = sum(map(collections.Counter, counts), collections.Counter())
    return ", ".join(f"{number:,} {reason}" for reason, number in total.most_common())
