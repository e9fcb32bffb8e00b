"""The section of one stage: its attributes as histograms, and examples of what it dropped, changed and kept."""

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.report import bounds, differences, histogram, texts
from data_pipelines.report.histogram import Line
from data_pipelines.report.samples import Kind
from data_pipelines.report.summary import Attribute
from slmjax import page
from slmjax.config import NearDedupConfig, QualityFilterConfig
from slmjax.config.pipeline import StageConfig
from slmjax.page import Html, element, joined, number

_MOST_RULES = 40
_MOST_VALUES = 20


def stage(
    name: str,
    config: StageConfig,
    attributes: Mapping[str, Attribute],
    dropped: Mapping[str, int],
    samples: Mapping[Kind, Sequence[dict[str, Any]]],
    survivors: Mapping[tuple[str, str], dict[str, Any]],
    *,
    reached: bool,
) -> Html:
    """Returns the section of a stage that documents have `reached` or not.

    `dropped` counts documents by rule, the other two are excerpts.
    """
    shown, others, constant = [], [], []
    bounded = {bound.attribute for bound in bounds.of(config)} | {"score"}
    for attribute, found in attributes.items():
        both = found.kept + found.dropped
        if found.values:
            shown.append(_values(attribute, found, config))
        elif both.count and (attribute in bounded or both.low < both.high):
            (shown if attribute in bounded else others).append(_histogram(attribute, found, config))
        elif both.count:
            constant.append(f"{attribute} {number(both.low)}")
    parts = [element("h3", name, id=f"stage-{name}"), element("p", type(config).__name__, class_="dim")]
    if not reached:
        parts.append(element("p", "No document reached it."))
    if shown:
        parts.append(element("div", *shown, class_="plots small"))
    if others:
        title = f"{len(others)} attribute{'s' * (len(others) > 1)} without a bound"
        parts.append(page.folded(title, element("div", *others, class_="plots small")))
    if constant:
        parts.append(element("p", f"The same in all documents: {', '.join(constant)}", class_="dim"))
    ordered = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
    for rule, count in ordered[:_MOST_RULES]:
        found = samples.get(Kind("dropped", name, rule), ())
        title = Html(f"dropped: {element('strong', rule)} {count:,}")
        parts.append(page.folded(title, joined(_sample(each, name, config, survivors) for each in found)))
    if len(ordered) > _MOST_RULES:
        parts.append(element("p", f"{len(ordered) - _MOST_RULES:,} more reasons", class_="dim"))
    for fate, title in (("changed", "changed and kept"), ("kept", "kept")):
        found = samples.get(Kind(fate, name), ())
        if found:
            parts.append(page.folded(title, joined(_sample(each, name, config, survivors) for each in found)))
    return element("section", joined(parts))


def compared(old: dict[str, Any], new: dict[str, Any] | None, config: StageConfig, *, of: str = "Kept instead") -> Html:
    """What tells a duplicate, `old`, from the document that was kept, which is None where that is not in the corpus."""
    kept = old["duplicate_of"]
    line = [f"{of}: ", texts.name(kept)]
    if new is None:
        return joined([element("p", *line, " (of an earlier corpus)"), texts.excerpt([(old["text"][:700], False)])])
    if isinstance(config, NearDedupConfig):
        found = differences.resemblance(old["text"], new["text"], ngram=config.ngram)
        line.append(f"; similarity of how they begin {found:.2f}, duplicates from {config.similarity:g} on")
    changes = differences.compare(old["text"], new["text"])
    if all(kind == "same" for kind, _ in changes):
        line.append("; the texts begin alike")
    else:
        line += [". ", element("del", "Only in the dropped one"), ", ", element("ins", "only in the kept one"), "."]
    return joined([element("p", *line), texts.difference(_shortened(changes))])


def _shortened(changes: Sequence[differences.Change]) -> list[differences.Change]:
    """The first of them, of long ones the beginning."""
    short: list[differences.Change] = []
    room = 900
    for kind, text in changes:
        if room <= 0:
            break
        cut = text if len(text) <= room else text[:room] + " …"
        short.append((kind, cut))
        room -= len(cut)
    return short


def _sample(
    sample: dict[str, Any], name: str, config: StageConfig, survivors: Mapping[tuple[str, str], dict[str, Any]]
) -> Html:
    head = element("p", texts.name(sample["id"]), class_="id")
    if "text" in sample:
        other = survivors.get((name, sample["duplicate_of"]))
        return element("div", head, compared(sample, other, config), class_="sample")
    facts = [
        element("span", f"{attribute} {value}", class_="fact broken" if broken else "fact")
        for attribute, value, broken in sample["facts"]
    ]
    return element("div", head, element("p", *facts) if facts else "", texts.excerpt(sample["pieces"]), class_="sample")


def _histogram(name: str, attribute: Attribute, config: StageConfig) -> Html:
    both = attribute.kept + attribute.dropped
    lines, facts = [], []
    for bound in bounds.of(config):
        if bound.attribute == name and bound.side != "only":
            outside = attribute.outside[bound.rule]
            lines.append(Line(f"{bound.side} {number(bound.value)}", bound.value, bound.side == "max"))
            share = f" ({outside / both.count:.1%})" if outside else ""
            facts.append(f"{bound.spelled}: {outside:,} outside{share}")
    if isinstance(config, QualityFilterConfig) and attribute.kept.count:
        for quantile, value in (
            (config.min_score_quantile, attribute.kept.low),
            (config.max_score_quantile, attribute.kept.high),
        ):
            if quantile is not None:
                lines.append(Line(f"quantile {quantile:g}", value))
                facts.append(f"quantile {quantile:g} is {number(value)}")
    middle = [f"{label} {number(_rounded(both.quantile(share)))}" for label, share in _QUANTILES]
    facts.append(", ".join(middle))
    if both.missing:
        facts.append(f"{both.missing:,} without a value")
    caption = element("figcaption", element("strong", name), *(element("div", fact) for fact in facts))
    return element("figure", caption, histogram.draw(name, attribute.kept, attribute.dropped, lines))


_QUANTILES = (("1 %", 0.01), ("median", 0.5), ("99 %", 0.99))


def _rounded(value: float) -> float:
    """To the three digits that a sketch knows."""
    return float(f"{value:.3g}")


def _values(name: str, attribute: Attribute, config: StageConfig) -> Html:
    """An attribute that is a word: before this stage and among what is selected in the end."""
    allowed = {value for bound in bounds.of(config) if bound.attribute == name for value in bound.value}
    ordered = sorted(attribute.values.items(), key=lambda item: (-item[1][0], item[0]))
    totals = [sum(counts[i] for counts in attribute.values.values()) for i in range(2)]
    rows = [_value_row(value, counts, totals, allowed) for value, counts in ordered[:_MOST_VALUES]]
    rest = ordered[_MOST_VALUES:]
    if rest:
        counts = [sum(each[i] for _, each in rest) for i in range(2)]
        rows.append(_value_row(f"{len(rest):,} more", counts, totals, set()))
    header = ("", "before", "share", "selected", "share")
    caption = element(
        "figcaption", element("strong", name), element("div", "before the stage, and of what is selected")
    )
    return element("figure", caption, page.table(header, rows))


def _value_row(value: str, counts: Sequence[int], totals: Sequence[int], allowed: set[str]) -> tuple[Any, ...]:
    shown = texts.name(value)
    cells: list[Any] = [element("strong", shown) if value in allowed else shown]
    for count, total in zip(counts, totals, strict=True):
        share = count / max(total, 1)
        cells += [count, element("span", page.bar(share / 4), f" {share:.1%}", class_="share")]
    return tuple(cells)
