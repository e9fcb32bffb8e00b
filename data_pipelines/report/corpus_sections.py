"""The sections on the corpus as a whole: lengths, tokens, duplicates, contamination, quarantine."""

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.manifest import StepCounts
from data_pipelines.report import histogram, texts
from data_pipelines.report.sketch import Sketch
from data_pipelines.report.stage_section import compared
from slmjax import page
from slmjax.config.pipeline import StageConfig
from slmjax.page import Html, element, joined, number

_MOST_SOURCES = 25
_SIDES = ("train", "held_out")


def lengths(sketches: Mapping[str, Sketch]) -> Html:
    """Bytes of a document, as read and as selected."""
    titles = {"read": "as read", "selected": "selected"}
    shares = (("least", 0.0), ("1 %", 0.01), ("10 %", 0.1), ("median", 0.5), ("90 %", 0.9), ("99 %", 0.99))
    rows, plots = [], []
    for when, sketch in sketches.items():
        if not sketch.count:
            continue
        quantiles = [sketch.low if share == 0 else float(f"{sketch.quantile(share):.3g}") for _, share in shares]
        rows.append((titles[when], sketch.count, *quantiles, sketch.high))
        caption = element("figcaption", element("strong", f"bytes a document, {titles[when]}"))
        plots.append(element("figure", caption, histogram.draw(f"length {titles[when]}", sketch, Sketch())))
    header = ("bytes a document", "documents", *(label for label, _ in shares), "greatest")
    return joined([element("div", *plots, class_="plots small"), page.table(header, rows)])


def tokens(selected: Mapping[str, Mapping[str, Sequence[int]]], counts: Mapping[str, Mapping[str, int]]) -> Html:
    """Documents, bytes and tokens by source and side of the split; sources beyond the largest together."""
    order = sorted(selected, key=lambda source: (-sum(counts[source].values()), source))
    rows: list[tuple[str, list[tuple[int, int, int]]]] = []
    for source in order:
        sides = [(*selected[source][side], counts[source].get(side, 0)) for side in _SIDES]
        rows.append((source, [(each[0], each[1], each[2]) for each in sides]))
    if len(rows) > _MOST_SOURCES:
        rest = [sides for _, sides in rows[_MOST_SOURCES:]]
        rows = [*rows[:_MOST_SOURCES], (f"{len(rest):,} other sources", _summed(rest))]
    everything = _summed([sides for _, sides in rows])
    most = max(1, *(sum(side[2] for side in sides) for _, sides in rows))
    cells = [_token_row(texts.name(source), sides, most) for source, sides in rows]
    if len(rows) > 1:
        cells.append(_token_row(element("strong", "all"), everything, 0))
    header = ["source", "tokens", "", "bytes a token"]
    header += [f"{side}: {what}" for side in ("training", "held out") for what in ("documents", "MB", "tokens")]
    return page.table(header, cells)


def _summed(rows: Sequence[Sequence[tuple[int, int, int]]]) -> list[tuple[int, int, int]]:
    return [
        (sum(row[side][0] for row in rows), sum(row[side][1] for row in rows), sum(row[side][2] for row in rows))
        for side in range(len(_SIDES))
    ]


def _token_row(name: Html, sides: Sequence[tuple[int, int, int]], most: int) -> tuple[Any, ...]:
    all_bytes, all_tokens = sum(side[1] for side in sides), sum(side[2] for side in sides)
    cells: list[Any] = [name, all_tokens, page.bar(all_tokens / most) if most else ""]
    cells.append(round(all_bytes / all_tokens, 3) if all_tokens else "")
    for documents, num_bytes, number_of_tokens in sides:
        cells += [documents, round(num_bytes / 1e6, 3), number_of_tokens]
    return tuple(cells)


def duplicates(
    found: Mapping[str, Mapping[str, Any]],
    stages: Mapping[str, StageConfig],
    members: Mapping[tuple[str, int], Sequence[dict[str, Any]]],
    survivors: Mapping[tuple[str, str], dict[str, Any]],
) -> Html:
    """Clusters of each stage: how many of which size, and the largest; `members` of these, by stage and rank."""
    parts: list[Html] = []
    for stage, clusters in found.items():
        classes: dict[int, list[int]] = {}
        for size, count in clusters["sizes"].items():
            of_class = classes.setdefault((int(size) - 1).bit_length(), [0, 0])
            of_class[0] += count
            of_class[1] += count * (int(size) - 1)
        most = max(count for count, _ in classes.values())
        rows = [
            (_size_class(exponent), count, page.bar(count / most), dropped)
            for exponent, (count, dropped) in sorted(classes.items())
        ]
        number_of = sum(count for count, _ in classes.values())
        dropped = sum(dropped for _, dropped in classes.values())
        parts.append(element("h3", f"{stage}: {number_of:,} clusters, {dropped:,} documents dropped"))
        parts.append(page.table(("documents in a cluster", "clusters", "", "dropped"), rows))
        for rank, (size, _, _) in enumerate(clusters["largest"]):
            listed = members[stage, rank]
            title = Html(f"a cluster of {-size:,}: {texts.name(listed[0]['duplicate_of'])}")
            more = -size - 1 - len(listed)
            names = [element("li", texts.name(member["id"])) for member in listed]
            names += [element("li", f"{more:,} more", class_="dim")] if more else []
            body = [element("p", "Dropped:"), element("ul", *names)]
            survivor = survivors.get((stage, listed[0]["duplicate_of"]))
            body.append(compared(listed[0], survivor, stages[stage], of="The first of them against what is kept"))
            parts.append(page.folded(title, element("div", *body, class_="sample")))
    return joined(parts)


def _size_class(exponent: int) -> str:
    low, high = (1 << exponent >> 1) + 1, 1 << exponent
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def contamination(sums: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> Html:
    """What of evaluation sets was found, and the matches of the most n-grams."""
    rows = [
        (texts.name(name), each["texts"], each["texts_found"], each["items_found"], each["documents"])
        for name, each in sums.items()
    ]
    header = ("evaluation set", "texts", "found", "items found", "in documents")
    parts = [page.table(header, rows)]
    for match in found:
        title = joined(
            [
                texts.name(match["evaluation"]),
                texts.name(match["item"]),
                f"{match['field']}: {match['ngrams']:,} n-grams, {match['share']:.0%} of the text, in a document "
                f"that is {'dropped' if match['dropped'] else 'kept'}",
            ]
        )
        body = [element("p", texts.name(match["document"]), class_="id"), texts.excerpt([(match["ngram"], True)])]
        parts.append(page.folded(title, element("div", *body, class_="sample")))
    return joined(parts)


def quarantine(steps: Sequence[StepCounts], examples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Html:
    """Records that could not be read, by reason."""
    totals: dict[str, int] = {}
    for step in steps:
        for reason, count in step.dropped.items():
            totals[reason] = totals.get(reason, 0) + count
    parts = []
    for reason, count in sorted(totals.items(), key=lambda item: (-item[1], item[0])):
        shown = []
        for record in examples.get(reason, ()):
            place = [texts.name(f"{record['source']}: {record['file']}"), f", record {number(record['record'])}"]
            detail = element("p", texts.visible(record["detail"]), class_="dim") if record["detail"] else ""
            text = texts.excerpt([(record["excerpt"], False)]) if record["excerpt"] else ""
            shown.append(element("div", element("p", *place, class_="id"), detail, text, class_="sample"))
        parts.append(page.folded(Html(f"{element('strong', reason)} {count:,}"), joined(shown)))
    return joined(parts)
