"""Summaries and documents on a terminal. Everything from outside goes through `visible`, nothing through markup."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_pipelines.inspection.output import Bound, Output
from data_pipelines.inspection.query import Record
from data_pipelines.inspection.summary import QUANTILES, Range
from data_pipelines.inspection.visible import visible
from data_pipelines.manifest import StepCounts

_LONGEST = 200  # characters of a value


def number(value: Any) -> str:
    """A value as people write it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:,.3g}"
    if isinstance(value, list):
        return " ".join(map(number, value))
    text = str(value)
    return visible(text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ...")


def show_record(console: Console, record: Record, shown: Sequence[str]) -> None:
    """One document: a line on what it is, one on what was measured, and how it begins.

    Of the attributes those in `shown`, and those of the rule that dropped it.
    """
    known = record.known
    console.print(Text(visible(known["id"]), style="bold"), soft_wrap=True)
    facts = [visible(known["source"])] if known.get("source") else []
    facts += [f"{known[name]:,} {name}" for name in ("bytes", "tokens") if known.get(name) is not None]
    line = Text(" · ".join(facts))
    if known.get("reason"):
        line.append(" · " if facts else "").append(visible(known["reason"]), style="red")
        line.append(f" of {visible(known['duplicate_of'])}" if known.get("duplicate_of") else "")
    elif "reason" in known:
        line.append(" · ").append("kept" + (f", {known['side']}" if known.get("side") else ""), style="green")
    rows = [line] if line.plain else []
    stage, _, rule = (known.get("reason") or "").partition(".")
    broken = f"{stage}.{Bound.of(rule, None).attribute}"
    names = [name for name in record.attributes if name in shown or name == broken]
    if names:
        rows.append(
            Text(" · ".join(f"{visible(name)} {number(record.attributes[name])}" for name in names), style="cyan")
        )
    rows.append(_excerpt(record))
    for row in rows:
        console.print(row)
    console.print()


def _excerpt(record: Record) -> Text:
    if record.pieces is None:
        return Text(visible(record.excerpt) + (" ..." if record.shortened else ""), style="dim")
    text = Text()
    for i, piece in enumerate(record.pieces):
        text.append(visible(piece.replace("\u2581", " ")), style="reverse" if i % 2 else "")
        text.append("|", style="dim")
    return text


def as_json(record: Record) -> dict[str, Any]:
    """The same for programs."""
    tokens = {} if record.ids is None else {"ids": record.ids, "pieces": record.pieces}
    text = {"text": record.excerpt, "shortened": record.shortened}
    return {**record.known, "attributes": record.attributes, **text, **tokens}


def show_output(console: Console, output: Output, stages: dict[str, dict[str, Range]]) -> None:
    """The summary of a pipeline's output: where things lie, funnel, what was measured."""
    _line(console, visible(output.root), "bold")
    funnel = output.funnel()
    _line(console, *_state(output, funnel))
    if output.manifest is None and (output.root / "manifest.json").is_file():
        empty = output.state == "empty"  # it has a report of its own
        what = ", the tokenizer and the stores" if empty else " and what comes from that step on"
        _line(console, f"manifest.json{what} are of an earlier run", "yellow")
    for name, what in _PLACES.items():
        if (output.root / name).exists():
            _line(console, f"  {name:<20} {what}")
    console.print()
    console.print(funnel_table(funnel))
    dropped = collections.Counter()
    for row in funnel:
        dropped.update({f"{row.step}.{rule}": count for rule, count in row.dropped.items()})
    for stage, found in stages.items():
        if found:
            console.print(_ranges(console.width, found, stage, output, dropped))
    if not all(each.exact for found in stages.values() for each in found.values()):
        _line(console, "quantiles are those of a sample of some 50,000 documents", "dim")
    if output.manifest is not None:
        for name, split in output.manifest.splits.items():
            _line(
                console,
                f"{name}: {split.documents:,} documents, {split.bytes / 1e6:,.2f} MB, {split.tokens:,} tokens, "
                f"{split.bytes_per_token:.2f} bytes a token",
            )


def _state(output: Output, funnel: Sequence[StepCounts]) -> tuple[str, str]:
    """What became of the last run, and the style of the line."""
    left = [step for step in output.steps if step not in output.finished]
    came = left[0] if left else "its end"
    match output.state:
        case "finished":
            return "finished", ""
        case "running":
            return f"running now: it has come to {came}", "green"
        case "unfinished":
            return f"unfinished: the last run came to {came}; the same command goes on", "yellow"
        case "empty":
            kept = sum(row.kept.documents for row in funnel if row.step == funnel[-1].step)
            why = "one side of the split is empty" if kept else "no document was left"
            last = "select" if "select" in output.finished else "read"
            return f"ended after {last}: {why}; report.html shows why", "yellow"


_PLACES = {
    "train": "token store",
    "held_out": "token store",
    "tokenizer.model": "trained here",
    "held_out.jsonl.zst": "held-out text",
    "documents": "selected documents, parquet",
    "quarantine": "records that could not be used: --step quarantine",
    "contamination": "what was found of evaluation sets",
    "report.html": "report for people",
    "manifest.json": "config, funnel, sizes",
}


def funnel_table(steps: Iterable[StepCounts]) -> Table:
    """What each step kept, and what it dropped or changed."""
    table = Table(title="Funnel", title_justify="left")
    for heading in ("step", "source", "documents", "MB", "dropped, changed"):
        table.add_column(heading, justify="right" if heading in ("documents", "MB") else "left", overflow="fold")
    for step in steps:
        told = [f"{count:,} {name}" for name, count in (*step.dropped.items(), *step.changes.items()) if count]
        kept = step.kept
        cells = (step.step, step.source, f"{kept.documents:,}", f"{kept.bytes / 1e6:,.2f}", ", ".join(told))
        table.add_row(*(Text(visible(cell)) for cell in cells))
    return table


def _ranges(
    width: int, found: dict[str, Range], stage: str, output: Output, dropped: collections.Counter[str]
) -> Table:
    table = _range_table(width, stage)
    table.add_column("bounds", overflow="fold")
    table.add_column("dropped", justify="right", no_wrap=True)
    bounds = collections.defaultdict(list)
    for bound in output.bounds(stage):
        bounds[bound.attribute].append(bound)
    for name, each in found.items():
        mine = bounds.get(name.partition("[")[0], [])
        lost = sum(dropped[f"{stage}.{bound.rule}"] for bound in mine)
        again = "[" in name and not name.endswith("[0]")  # the rule is one for all of several numbers
        told = ", ".join(str(_of_element(bound, name)) for bound in mine)
        table.add_row(
            *_cells(width, name, each), Text(visible(told), style="yellow"), f"{lost:,}" if mine and not again else ""
        )
    return table


def _of_element(bound: Bound, name: str) -> Bound:
    """The bound on one of several numbers, x[1]."""
    place = name.partition("[")[2].rstrip("]")
    if not place or not isinstance(bound.allowed, tuple):
        return bound
    return dataclasses.replace(bound, allowed=bound.allowed[int(place)])


def show_ranges(console: Console, title: str, found: dict[str, Range]) -> None:
    """Ranges of the numbers of any documents."""
    if not found:
        return
    _line(console, visible(title), "bold")
    table = _range_table(console.width, None)
    for name, each in found.items():
        table.add_row(*_cells(console.width, name, each))
    console.print(table)


def _range_table(width: int, title: str | None) -> Table:
    table = Table(
        title=title and Text(visible(title), style="bold"), title_justify="left", box=None, padding=(0, 1, 0, 0)
    )
    table.add_column("", overflow="fold")  # the longest cells give way on a narrow terminal
    for heading in ("min", *(f"{QUANTILES[i]:.0%}" for i in _quantiles(width)), "max"):
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _quantiles(width: int) -> tuple[int, ...]:
    return (0, 1, 2, 3, 4) if width >= 110 else (0, 2, 4)


def _cells(width: int, name: str, each: Range) -> list[Text]:
    values = (each.low, *(each.quantiles[i] for i in _quantiles(width)), each.high)
    return [Text(visible(name)), *(Text(number(value)) for value in values)]


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=style), soft_wrap=True)
