"""The data funnel: how many documents each step of a pipeline kept, and why it dropped the others."""

from typing import Any

from slmjax import page
from slmjax.page import Html, element, joined
from slmjax.report.read import DataRecord


def funnel_section(record: DataRecord) -> Html:
    """Returns the section of one data directory; a manifest of another form is said, not fatal."""
    name = page.path_name(record.path)
    problems = [f"{name}: {problem}" for problem in record.problems]
    parts = []
    if record.manifest:
        try:
            parts = [_steps(record.manifest["steps"]), _splits(record.manifest)]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            problems.append(f"{name}: manifest.json has an unknown form ({type(error).__name__}: {error})")
    warnings = [element("p", problem, class_="warn") for problem in problems]
    return joined([element("h2", f"Data: {name}"), *warnings, *parts])


def _steps(steps: list[dict[str, Any]]) -> Html:
    """One table for each source; the bar is the share of the documents that came in."""
    tables = []
    for source in dict.fromkeys(step["source"] for step in steps):
        rows, came_in = [], 0
        before = None
        for step in (each for each in steps if each["source"] == source):
            kept, dropped = step["kept"], step["dropped"]
            if before is None:
                before = came_in = kept["documents"] + sum(dropped.values())
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(dropped.items(), key=_most_first))
            lost = before - kept["documents"]
            rows.append(
                (
                    step["step"],
                    kept["documents"],
                    page.bar(kept["documents"] / max(came_in, 1)),
                    kept["bytes"] / 1e6,
                    f"{lost:,} ({lost / before:.1%})" if lost else "",
                    reasons,
                )
            )
            before = kept["documents"]
        header = ("step", "documents left", "", "text, MB", "dropped", "reasons")
        tables += [element("h3", f"Source {source}: {came_in:,} records"), page.table(header, rows)]
    return joined(tables)


def _most_first(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


def _splits(manifest: dict[str, Any]) -> Html:
    rows = [
        (
            name,
            split["documents"],
            split["bytes"] / 1e6,
            split["tokens"],
            split["bytes"] / max(split["tokens"], 1),
        )
        for name, split in manifest["splits"].items()
    ]
    header = ("split", "documents", "text, MB", "tokens", "bytes a token")
    return joined(
        [
            element("h3", f"Token stores, vocabulary {manifest['vocab_size']:,}"),
            page.table(header, rows),
        ]
    )
