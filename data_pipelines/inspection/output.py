"""A pipeline's output directory as it lies on disk: finished or not, made by whatever config."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.documents import Shard, column
from data_pipelines.inspection.rows import is_shown
from data_pipelines.manifest import Count, Manifest, StepCounts, count_step
from data_pipelines.measuring import measure_path
from data_pipelines.reading import shard_path
from data_pipelines.verdicts import verdicts_path
from slmjax.config import (
    DecontaminationConfig,
    ExactDedupConfig,
    NearDedupConfig,
    PassageDedupConfig,
    PipelineConfig,
    QualitySampleConfig,
    SubstringDedupConfig,
    TrainTokenizerConfig,
)
from slmjax.config.filters import RewriteConfig
from slmjax.config.resolved import from_json
from slmjax.config.typed import ConfigError
from slmjax.data.exclusive import is_used


@dataclasses.dataclass(frozen=True)
class Bound:
    """A rule of a stage: its name, and what is allowed."""

    rule: str
    attribute: str
    allowed: Any

    @classmethod
    def of(cls, rule: str, allowed: Any) -> "Bound":
        """The rule min_x, max_x or only_x, or of a quantile of x."""
        return cls(rule, rule.partition("_")[2].removesuffix("_quantile"), allowed)

    def __str__(self) -> str:
        sign = {"min": "≥", "max": "≤"}.get(self.rule.partition("_")[0], "one of")
        allowed = self.allowed if isinstance(self.allowed, tuple) else (self.allowed,)
        told = ", ".join(f"{each:g}" if isinstance(each, float) else str(each) for each in allowed)
        return f"{sign} {'quantile ' if self.rule.endswith('_quantile') else ''}{told}"

    def holds(self, value: Any) -> bool | None:
        """Whether a value, or each of several, is allowed; None where it depends on the corpus."""
        if self.rule.endswith("_quantile"):
            return None
        kind = self.rule.partition("_")[0]
        if kind == "only":
            return value in self.allowed
        values = value if isinstance(value, list) else [value]
        bounds = self.allowed if isinstance(self.allowed, tuple) else (self.allowed,) * len(values)
        pairs = list(zip(values, bounds, strict=False))
        return all(each >= bound if kind == "min" else each <= bound for each, bound in pairs)


_AGAIN = "if no pipeline is at work there, it is damaged: run the pipeline again"


@contextlib.contextmanager
def naming(place: Path | str) -> Iterator[None]:
    """Says of damaged files where they are."""
    try:
        yield
    except pa.ArrowException as error:
        raise ValueError(f"{place} cannot be read ({error}); {_AGAIN}") from error


class Output:
    """What the last run in a directory has left.

    Attributes:
      root: the directory.
      stages: config by name, in order; None for one that this version of the program does not know.
      finished: names of the steps that the last run has finished, in order.
    """

    def __init__(self, root: Path):
        self.root = root
        try:
            plan = json.loads((root / "work" / "plan.json").read_text(encoding="utf-8"))
            self._config, configs = plan["config"], dict(plan["stages"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{root / 'work' / 'plan.json'} cannot be read ({error}); run the pipeline again"
            ) from error
        self.stages = {name: _config(content) for name, content in configs.items()}
        timings = _json(root / "timings.json")
        self.finished: list[str] = list(timings) if isinstance(timings, dict) else []

    @functools.cached_property
    def manifest(self) -> Manifest | None:
        """That of the last run; None where it has not come to its end, and manifest.json is of an earlier one."""
        path = self.root / "manifest.json"
        if not {"stores", "report"} <= set(self.finished) or not path.is_file():
            return None
        manifest = Manifest.load(path)
        return manifest if manifest.config == self._config else None  # else stopped just before it was saved

    @property
    def state(self) -> Literal["finished", "empty", "running", "unfinished"]:
        """What became of the last run; empty is one that ended with its report, as there was nothing to train on."""
        if self.manifest is not None:
            return "finished"
        if "report" in self.finished and "stores" not in self.finished:
            return "empty"
        return "running" if is_used(self.root) else "unfinished"

    @property
    def steps(self) -> list[str]:
        """Names of the steps that the config of the last run has, in order; counting lines is a part of reading."""
        evaluations = any(isinstance(stage, DecontaminationConfig) for stage in self.stages.values())
        trained = self.config is not None and isinstance(self.config.tokenizer, TrainTokenizerConfig)
        optional = {"evaluations": evaluations, "tokenizer": trained}
        names = ["read", "evaluations", "measure", *self.stages, "select", "tokenizer", "tokenise", "stores", "report"]
        return [name for name in names if optional.get(name, True)]

    @functools.cached_property
    def config(self) -> PipelineConfig | None:
        """That of the last run; None where this version of the program does not know it."""
        return _config({**self._config, "output_dir": str(self.root)})

    @functools.cached_property
    def shards(self) -> list[Shard]:
        """As they were read, in order."""
        return [Shard(**shard) for unit in self.markers("read").values() for shard in unit["shards"]]

    def markers(self, step: str) -> dict[str, dict[str, Any]]:
        """Results of the finished tasks of a step, in order of their names."""
        directory = self.root / "work" / "markers" / step
        found = {path.stem: _json(path) for path in sorted(directory.glob("*.json"))}
        return {name: marker["result"] for name, marker in found.items() if marker}

    def results(self, step: str) -> list[dict[str, Any]]:
        """Those of a finished step with a task for each shard, in the order of the shards."""
        found = self.markers(step)
        missing = [shard.name for shard in self.shards if shard.name not in found]
        if missing:
            raise ValueError(f"{self.root / 'work' / 'markers' / step} lacks {missing[0]}.json; {_AGAIN}")
        return [found[shard.name] for shard in self.shards]

    @property
    def decided(self) -> list[str]:
        """The stages that the last run has finished."""
        return [name for name in self.stages if name in self.finished]

    @property
    def rewritten(self) -> bool:
        """Whether there are texts that stages changed."""
        changes = any(isinstance(stage, RewriteConfig) for stage in self.stages.values())
        return changes and "measure" in self.finished

    def texts(self, shard: Shard) -> Path:
        """The documents of a shard as the stages left them, cuts apart."""
        return shard_path(self.root, dataclasses.replace(shard, directory="text") if self.rewritten else shard)

    def verdicts(self, step: str, shard: Shard, name: str) -> pa.Array:
        """A column of the verdicts after a stage."""
        return column(verdicts_path(self.root, step, shard), name)

    def attributes(self, stage: str, shard: Shard) -> dict[str, pa.Field]:
        """What people can look at of what a stage measured; none where it measures nothing."""
        path = measure_path(self.root, stage, shard)
        if not path.is_file():
            return {}
        return {field.name: field for field in pq.read_schema(path) if is_shown(field)}

    def before(self, stage: str) -> str | None:
        """Name of the stage before."""
        names = list(self.stages)
        place = names.index(stage)
        return names[place - 1] if place else None

    def bounds(self, stage: str) -> list[Bound]:
        """The rules of a stage that are in force."""
        config = self.stages[stage]
        if config is None:
            return []
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        return [
            Bound.of(rule, allowed)
            for rule, allowed in fields.items()
            if rule.startswith(("min_", "max_", "only_")) and allowed not in (None, ())
        ]

    def rules(self) -> dict[str, list[str]]:
        """By which rules each stage can drop documents: those in force, and those by which it has dropped some."""
        found = {
            stage: dict.fromkeys([*_own_rules(config), *(bound.rule for bound in self.bounds(stage))])
            for stage, config in self.stages.items()
        }
        for row in self.funnel():
            if row.step in found:
                found[row.step] |= dict.fromkeys(row.dropped)
        return {stage: list(rules) for stage, rules in found.items()}

    def funnel(self) -> list[StepCounts]:
        """A row for each finished step and source, as in the manifest."""
        if self.manifest is not None:
            return list(self.manifest.steps)
        sources: dict[str, list[dict[str, Any]]] = {}
        for name, unit in self.markers("read").items():
            sources.setdefault(self._source(name, unit), []).append(unit)
        rows = [StepCounts(step="read", source=name, **_sums(units)) for name, units in sources.items()]
        for stage in self.decided:
            rows += count_step(stage, self.shards, self.results(f"verdicts/{stage}"))
        return rows

    def _source(self, name: str, unit: dict[str, Any]) -> str:
        if unit["shards"]:
            return unit["shards"][0]["source"]
        return next((record["source"] for record in self.quarantine(name)), "?")

    def quarantine(self, unit: str = "*") -> Iterator[dict[str, Any]]:
        """Records that could not be used."""
        for path in sorted((self.root / "quarantine").glob(f"{unit}.jsonl")):
            with open(path, encoding="utf-8") as lines:
                yield from map(json.loads, lines)


def _own_rules(config: Any) -> list[str]:
    """Rules that are not bounds of a stage's attributes."""
    match config:
        case ExactDedupConfig(by=by):
            return ["duplicate" if by == "text" else f"duplicate_{by}"]
        case NearDedupConfig():
            return ["near_duplicate"]
        case PassageDedupConfig() | SubstringDedupConfig():
            return ["nothing_left"]
        case QualitySampleConfig():
            return ["not_sampled"]
        case _:
            return ["empty"] if isinstance(config, RewriteConfig) else []


def _sums(units: list[dict[str, Any]]) -> dict[str, Any]:
    counted: dict[str, dict[str, int]] = {"quarantined": {}, "changes": {}}
    for unit in units:
        for kind, sums in counted.items():
            for name, number in unit[kind].items():
                sums[name] = sums.get(name, 0) + number
    shards = [shard for unit in units for shard in unit["shards"]]
    kept = Count(documents=sum(each["documents"] for each in shards), bytes=sum(each["bytes"] for each in shards))
    return {"kept": kept, "dropped": counted["quarantined"], "changes": counted["changes"]}


def _config(content: dict[str, Any]) -> Any:
    try:
        return from_json(content)
    except (ConfigError, ValueError):  # of another version of the program
        return None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
