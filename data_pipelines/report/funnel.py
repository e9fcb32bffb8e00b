"""The section on what came in, what each stage left and why it dropped the rest, in all and by source."""

import collections
from collections.abc import Sequence

from data_pipelines.manifest import Count, StepCounts
from slmjax import page
from slmjax.page import Html, element, joined

_MOST_SOURCES = 25
_MOST_REASONS = 12


def funnel(steps: Sequence[StepCounts]) -> Html:
    """Returns the section; sources beyond the largest are shown together."""
    sources = _largest_sources(steps)
    grouped = _grouped(steps, sources)
    parts = [_table(_summed(steps))]
    if len(grouped) > 1:
        parts += [element("h3", "By source"), _matrix(grouped)]
        parts += [
            page.folded(page.Html(f"{element('bdi', source)}: every stage"), _table(rows))
            for source, rows in grouped.items()
        ]
    return joined(parts)


def _table(steps: Sequence[StepCounts]) -> Html:
    came_in = steps[0].kept.documents + sum(steps[0].dropped.values())
    came_bytes = steps[0].kept.bytes
    rows, before = [], came_in
    for step in steps:
        left = step.kept.documents
        lost = before - left
        changes = ", ".join(f"{count:,} {kind}" for kind, count in sorted(step.changes.items()) if count)
        rows.append(
            (
                step.step,
                left,
                _bar(left, before, came_in),
                _percent(left, came_in),
                step.kept.bytes / 1e6,
                _percent(step.kept.bytes, came_bytes),
                f"{lost:,}" if lost else "",
                joined([_reasons(step, before), element("div", changes, class_="dim") if changes else ""]),
            )
        )
        before = left
    header = ("stage", "documents left", "", "of all", "MB", "of all", "dropped", "reasons, changes")
    return element("div", page.table(header, rows), class_="funnel")


def _bar(left: int, before: int, came_in: int) -> Html:
    """What is left, and after it what the stage dropped."""
    shares = (left / max(came_in, 1), (before - left) / max(came_in, 1))
    return element(
        "span",
        *(
            element("span", class_=kind, style=f"width: {100 * share:.2f}%")
            for kind, share in zip(("left", "lost"), shares, strict=True)
        ),
        class_="track",
    )


def _reasons(step: StepCounts, before: int) -> Html:
    ordered = sorted(step.dropped.items(), key=lambda item: (-item[1], item[0]))
    lines = [
        element("div", element("bdi", reason), f" {count:,} ({_percent(count, before)})")
        for reason, count in ordered[:_MOST_REASONS]
    ]
    rest = ordered[_MOST_REASONS:]
    if rest:
        lines.append(element("div", f"{len(rest):,} more reasons: {sum(count for _, count in rest):,}"))
    return joined(lines)


def _matrix(grouped: dict[str, list[StepCounts]]) -> Html:
    """A row for each source: which share of its documents each stage left; none of one that could not be read."""
    names = list(dict.fromkeys(step.step for steps in grouped.values() for step in steps))
    rows = []
    for source, steps in grouped.items():
        came_in = steps[0].kept.documents + sum(steps[0].dropped.values())
        left = {step.step: step.kept.documents for step in steps}
        shares = [element("span", _percent(left.get(name, 0), came_in), class_="share") for name in names]
        rows.append((element("bdi", source), came_in, steps[0].kept.bytes / 1e6, *shares, left.get(names[-1], 0)))
    return page.table(("source", "documents in", "MB", *names, "documents left"), rows)


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _largest_sources(steps: Sequence[StepCounts]) -> list[str]:
    read = [step for step in steps if step.step == steps[0].step]
    if len(read) <= _MOST_SOURCES:
        return [step.source for step in read]
    ordered = sorted(read, key=lambda step: (-step.kept.bytes, step.source))
    return [step.source for step in ordered[:_MOST_SOURCES]]


def _grouped(steps: Sequence[StepCounts], sources: Sequence[str]) -> dict[str, list[StepCounts]]:
    """Steps by source; those of other sources summed."""
    chosen = set(sources)
    grouped = {source: [step for step in steps if step.source == source] for source in sources}
    others = [step for step in steps if step.source not in chosen]
    if others:
        number = len({step.source for step in others})
        grouped[f"{number:,} other sources"] = _summed(others)
    return {source: rows for source, rows in grouped.items() if rows}


def _summed(steps: Sequence[StepCounts]) -> list[StepCounts]:
    """One row for each step, over all sources."""
    summed = []
    for name in dict.fromkeys(step.step for step in steps):
        rows = [step for step in steps if step.step == name]
        dropped: collections.Counter[str] = collections.Counter()
        changes: collections.Counter[str] = collections.Counter()
        for row in rows:
            dropped.update(row.dropped)
            changes.update(row.changes)
        kept = sum((row.kept for row in rows), Count())
        summed.append(StepCounts(step=name, source="", kept=kept, dropped=dict(dropped), changes=dict(changes)))
    return summed
