"""`slmjax data explain`: the path of a document on the terminal."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from data_pipelines.inspection.explain import explain
from data_pipelines.inspection.find import Place, find
from data_pipelines.inspection.output import Output
from data_pipelines.inspection.terminal import number
from data_pipelines.inspection.visible import visible

_INDENT = "  "


def show(root: Path, name: str, console: Console, *, as_json: bool, original: bool) -> None:
    """Prints the path of a document, or of a record in quarantine. Raises ValueError where there is none."""
    if not (root / "work" / "plan.json").is_file():
        raise ValueError(f"{root} is not the output of a pipeline with its directory work, from which paths are read")
    output = Output(root)
    for found in find(output, name):
        placed = isinstance(found, Place)
        told = explain(output, found, original=original) if placed else {"quarantined": found}
        if as_json:
            print(json.dumps(told, default=str))
        elif "quarantined" in told:
            _rejected(console, told["quarantined"])
        else:
            _path(console, told)


def _rejected(console: Console, record: dict[str, Any]) -> None:
    _line(console, f"{record['file']}:{record['record']}", "bold", indent=0)
    _line(console, f"source {record['source']}")
    _line(console, f"not usable: {record['reason']}", "red")
    for name in ("detail", "offset", "excerpt"):
        if record.get(name) not in (None, ""):
            _line(console, f"{name} {number(record[name])}")


def _path(console: Console, told: dict[str, Any]) -> None:
    _line(console, told["id"], "bold", indent=0)
    read = told["read"]
    _line(console, "read", "bold", indent=0)
    if "file" in read:
        _line(console, f"{read['file']}, item {read['item']:,}")
        kinds = ", ".join(read["normalised"])
        _line(console, f"normalised: {kinds}" if kinds else "normalising changed nothing")
        _changes(console, read["changes"])
    elif "problem" in read:
        _line(console, f"the original cannot be shown: {read['problem']}", "yellow")
    _line(console, f"{read['bytes']:,} bytes, row {read['row']:,} of shard {read['shard']}, source {told['source']}")
    for stage in told["stages"]:
        _stage(console, stage)
    _selected(console, told["selected"])


def _stage(console: Console, stage: dict[str, Any]) -> None:
    outcome = stage["outcome"]
    style = {"kept": "green", "dropped": "bold red"}.get(outcome, "dim")
    line = Text(visible(stage["stage"]), style="bold").append("  ")
    told = f"dropped: {visible(stage['rule'])}" if outcome == "dropped" else outcome
    line.append(told, style=style)
    console.print(line)
    plain = [f"{each['name']} {number(each['value'])}" for each in stage["attributes"] if not each["bounds"]]
    for each in stage["attributes"]:
        if each["bounds"]:
            line = Text(f"{_INDENT}{visible(each['name'])} {number(each['value'])}  ")
            for bound in each["bounds"]:
                holds = bound["holds"]
                line.append(f"{visible(bound['bound'])} ")
                line.append({True: "pass", False: "fail", None: ""}[holds], style="green" if holds else "red").append(
                    "  "
                )
            console.print(line)
    if plain:
        _line(console, " · ".join(plain), "dim", soft_wrap=False)
    _changes(console, stage.get("changes", {"number": 0, "shown": []}))
    for cut in stage.get("cuts", ()):
        _line(console, f"cut bytes {cut['start']:,} to {cut['end']:,}: {cut['text']}", "red", soft_wrap=False)
    if keeper := stage.get("duplicate_of"):
        where = f" of {keeper['corpus']}" if keeper.get("corpus") else ""
        _line(console, f"duplicate of {keeper['id']}{where}{_alike(keeper)}")
    if others := stage.get("kept_instead_of"):
        _line(console, f"kept instead of {others['number']:,}:")
        for other in others["shown"]:
            _line(console, f"{other['id']}{_alike(other)}", indent=2)
    for match in stage.get("matches", ()):
        item = f"{match['evaluation']} {match['item']} {match['field']}"
        _line(console, f"holds {match['ngrams']:,} n-grams ({match['share']:.0%}) of {item}", "red")
        _line(console, match["ngram"], "dim", indent=2, soft_wrap=False)


def _selected(console: Console, selected: dict[str, Any]) -> None:
    _line(console, "selected", "bold", indent=0)
    if selected.get("side"):
        _line(console, f"{selected['side']}, by the split key {selected['key']}")
    if "store" in selected:
        _line(
            console,
            f"{selected['tokens']:,} tokens, document {selected['document']:,} of {selected['store']}: shard "
            f"{selected['shard']}, document {selected['document_in_shard']:,}, token {selected['offset']:,}",
        )
    if "problem" in selected:
        _line(console, selected["problem"], "yellow")
    if selected.get("side", "") is None:
        _line(console, "no")


def _changes(console: Console, changes: dict[str, Any]) -> None:
    if not changes["number"]:
        return
    for change in changes["shown"]:
        line = Text(_INDENT + visible(change["before"]), style="dim")
        line.append(f"[-{visible(change['removed'])}-]" if change["removed"] else "", style="not dim red")
        line.append(f"{{+{visible(change['added'])}+}}" if change["added"] else "", style="not dim green")
        console.print(line.append(visible(change["after"])))
    if changes["number"] > len(changes["shown"]):
        _line(console, f"and {changes['number'] - len(changes['shown']):,} more", "dim")


def _alike(other: dict[str, Any]) -> str:
    return "" if other.get("similarity") is None else f", similarity {other['similarity']:.3f}"


def _line(console: Console, text: str, style: str = "", *, indent: int = 1, soft_wrap: bool = True) -> None:
    console.print(Text(_INDENT * indent + visible(text), style=style), soft_wrap=soft_wrap)
