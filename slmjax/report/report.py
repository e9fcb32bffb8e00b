"""Writes the report: what was trained, on what, how it went, how good it is and what it says."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slmjax import files, model, page
from slmjax.config import RunConfig
from slmjax.config.resolved import from_json
from slmjax.page import Html, element, joined, number
from slmjax.report.funnel import funnel_section
from slmjax.report.plots import COLOURS, Line, line_plot, smooth, thin
from slmjax.report.read import RunRecord, Series, read_data, read_run

_SHOWN_SAMPLES = 12
_SCORES = (("loss", "loss, nats a token"), ("perplexity", "perplexity"), ("bits_per_byte", "bits per byte"))


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run as the page needs it: its name, what was read, and its config if that is whole."""

    name: str
    record: RunRecord
    config: RunConfig | None


def write_report(
    run_dirs: Sequence[str | os.PathLike],
    output_path: str | os.PathLike,
    *,
    data_dirs: Sequence[str | os.PathLike] = (),
) -> Path:
    """Writes one HTML file about runs and the data they were made from, and returns its path.

    The file loads nothing from elsewhere. The same inputs give the same bytes.

    Args:
      run_dirs: run directories, in the order to show them; what is missing or damaged in them is said in the report.
      output_path: the file to write.
      data_dirs: output directories of data pipelines, whose manifests are shown as funnels.

    Raises:
      ValueError: there is nothing to report on, or a directory does not exist.
    """
    if not run_dirs and not data_dirs:
        raise ValueError("a report needs at least one run directory or data directory, got none")
    absent = [os.fspath(path) for path in (*run_dirs, *data_dirs) if not os.path.isdir(path)]
    if absent:
        raise ValueError(f"no such directory: {', '.join(absent)}; give the output_dir of a run or of a data pipeline")
    runs = [_open(Path(path)) for path in run_dirs]
    title = "Training report" if len(runs) != 1 else f"Training report: {runs[0].name}"
    body = joined(
        [
            element("h1", title),
            *([_overview(runs)] if len(runs) > 1 else []),
            *(funnel_section(read_data(Path(path))) for path in data_dirs),
            *(_run_section(run, f"run{i}") for i, run in enumerate(runs)),
        ]
    )
    output_path = Path(output_path)
    with files.replacing(output_path) as partial:
        # What UTF-8 cannot hold, a lone surrogate in a sample, is shown as its number.
        partial.write_text(page.document(title, body), encoding="utf-8", errors="backslashreplace")
    return output_path


def _open(path: Path) -> _Run:
    record = read_run(path)
    config = None
    if record.config:
        try:
            config = from_json(record.config)
        except (ValueError, TypeError) as error:
            record.problems.append(f"config.json is of another version of slmjax: {error}")
    return _Run(page.path_name(path), record, config if isinstance(config, RunConfig) else None)


def _overview(runs: Sequence[_Run]) -> Html:
    rows = []
    for i, run in enumerate(runs):
        scores = _scores(run.record)
        best = ", ".join(
            f"{name} {number(values['bits_per_byte'])}" for name, values in scores.items() if "bits_per_byte" in values
        )
        rows.append(
            (
                element("a", run.name, href=f"#run{i}"),
                "" if run.config is None else model.count_parameters(run.config.model).total,
                _last_step(run.record),
                _last(run.record, "loss"),
                best,
            )
        )
    return page.table(("run", "parameters", "steps", "last training loss", "held-out bits per byte"), rows)


def _run_section(run: _Run, anchor: str) -> Html:
    record = run.record
    return joined(
        [
            element("h2", run.name, id=anchor),
            *(element("p", problem, class_="warn") for problem in record.problems),
            page.facts(_facts(run)),
            element("h3", "Training"),
            _plots(record, anchor),
            element("h3", "Held-out evaluation"),
            _evaluation(record),
            element("h3", "Samples"),
            _samples(record),
            page.folded("Configuration", element("pre", json.dumps(record.config, indent=1))),
            page.folded("Versions", page.facts((name, str(value)) for name, value in record.versions.items())),
        ]
    )


def _facts(run: _Run) -> list[tuple[str, Any]]:
    config, record = run.config, run.record
    found: list[tuple[str, Any]] = []
    if config is not None:
        count = model.count_parameters(config.model)
        length = config.input.sequence_length
        flops = model.flops_per_token(config.model, lambda window: model.causal_visible_keys(length, window))
        active = f", {count.active:,} used by a token" if count.active != count.total else ""
        steps = _last_step(record) or 0
        tokens = config.input.tokens_per_step
        found = [
            ("parameters", f"{count.total:,} ({count.embedding:,} of them embeddings{active})"),
            (
                "model",
                f"{config.model.num_layers} layers, width {config.model.width}, vocabulary {config.model.vocab_size:,}",
            ),
            ("batch", f"{config.input.batch_size} rows of {length} tokens"),
            ("trained", f"{steps:,} of {config.steps:,} steps, {steps * tokens:,} tokens"),
            ("compute", f"{flops:.4g} training FLOPs a token at full length, {flops * steps * tokens:.3g} in all"),
        ]
    for name, label in (("tokens_per_second", "tokens a second, median"), ("mfu", "model FLOPs utilisation, median")):
        if name in record.metrics:
            median = float(np.median(record.metrics[name].values))
            found.append((label, f"{median:.1%}" if name == "mfu" else f"{median:,.0f}"))
    versions = record.versions
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("slmjax", "jax", "python") if name in versions)
    found += [("hardware", versions.get("devices")), ("software", libraries or None)]
    return found


def _plots(record: RunRecord, anchor: str) -> Html:
    metrics = record.metrics
    plots = []
    if "loss" in metrics:
        lines = _averaged(metrics["loss"])
        held_out = sorted(name for name in metrics if name.endswith("/loss"))
        lines += [
            Line(
                f"held out: {name.removesuffix('/loss')}", metrics[name], "points", COLOURS[1 + i % (len(COLOURS) - 1)]
            )
            for i, name in enumerate(held_out)
        ]
        plots.append(line_plot(f"{anchor}-loss", "Loss, nats a token", lines))
    for name, title, log_scale in (
        ("learning_rate", "Learning rate", False),
        ("tokens_per_second", "Throughput, tokens a second", False),
        ("grad_norm", "Gradient norm before clipping", True),
    ):
        if name in metrics:
            exact = name == "learning_rate"
            lines = [Line(title, thin(metrics[name]), "smooth", COLOURS[0])] if exact else _averaged(metrics[name])
            plots.append(line_plot(f"{anchor}-{name}", title, lines, log_scale=log_scale))
    if not plots:
        return element("p", "No training metrics.", class_="dim")
    return element("div", *map(Html, plots), class_="plots")


def _averaged(series: Series) -> list[Line]:
    series = thin(series)
    return [
        Line("each logged step", series, "raw", COLOURS[0]),
        Line("smoothed", smooth(series), "smooth", COLOURS[0]),
    ]


def _evaluation(record: RunRecord) -> Html:
    scores = _scores(record)
    if not scores:
        return element("p", "Not evaluated.", class_="dim")
    baselines = record.evaluation.get("baselines")
    baselines = baselines if isinstance(baselines, dict) else {}
    parts = [
        page.table(
            ("set", *(label for _, label in _SCORES)),
            [(name, *(values.get(key, "") for key, _ in _SCORES)) for name, values in scores.items()],
        )
    ]
    for name, values in scores.items():
        others = baselines.get(name)
        if not isinstance(others, dict) or "bits_per_byte" not in values:
            continue
        rivals = {key: value for key, value in others.items() if isinstance(value, int | float)}
        rows = sorted([("this model", values["bits_per_byte"]), *rivals.items()], key=lambda row: row[1])
        worst = max(value for _, value in rows)
        parts.append(element("h3", f"Bits per byte of {name}, fewest first"))
        parts.append(
            page.table(
                ("", "bits per byte", ""),
                [
                    (element("strong", key) if key == "this model" else key, value, page.bar(value / worst))
                    for key, value in rows
                ],
            )
        )
    return joined(parts)


def _scores(record: RunRecord) -> dict[str, dict[str, float]]:
    """Returns {set: {score: value}}, from evaluation.json or else from the last evaluation during training."""
    metrics = record.evaluation.get("metrics")
    if not isinstance(metrics, dict):
        metrics = {name: float(series.values[-1]) for name, series in record.metrics.items()}
    scores: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        set_name, _, score = name.rpartition("/")
        if set_name and score in dict(_SCORES) and isinstance(value, int | float):
            scores.setdefault(set_name, {})[score] = value
    return scores


def _samples(record: RunRecord) -> Html:
    samples = [sample for sample in record.samples if isinstance(sample.get("completion"), str)][-_SHOWN_SAMPLES:]
    if not samples:
        return element("p", "No samples.", class_="dim")
    parts = []
    for sample in samples:
        settings = ", ".join(
            f"{label} {sample[key]}"
            for key, label in (("checkpoint_step", "step"), ("temperature", "temperature"), ("top_k", "top-k"))
            if sample.get(key) is not None
        )
        prompt = str(sample.get("prompt", ""))
        gap = "\n\n" if sample.get("instruct") else ""
        parts.append(element("p", settings, class_="dim"))
        parts.append(element("pre", element("mark", prompt) if prompt else "", gap, sample["completion"]))
    return joined(parts)


def _last_step(record: RunRecord) -> int | None:
    return max((int(series.steps[-1]) for series in record.metrics.values()), default=None)


def _last(record: RunRecord, name: str) -> float | str:
    return float(record.metrics[name].values[-1]) if name in record.metrics else ""
