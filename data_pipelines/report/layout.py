"""The page: its sections in order, and its style."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.manifest import Manifest
from data_pipelines.report import corpus_sections, texts
from data_pipelines.report.funnel import funnel
from data_pipelines.report.samples import Kind
from data_pipelines.report.stage_section import stage
from data_pipelines.report.summary import Summary
from slmjax import page
from slmjax.config.pipeline import StageConfig
from slmjax.page import Html, element, joined

_STYLE = """
:root { --kept: #3d85b8; --dropped: #d55e00; --hit: #ffd9b8; --out: #ffd0cc; --in: #c8ecd2; }
@media (prefers-color-scheme: dark) { :root { --kept: #4f9bd0; --dropped: #e8803c; --hit: #6b3f14; --out: #6b2a24;
  --in: #1d5230; } }
body { overflow-wrap: break-word; } h1 { overflow-wrap: anywhere; } h2, h3 { scroll-margin-top: 1rem; }
td bdi { display: inline-block; max-width: 18rem; }
.funnel td:last-child { min-width: 17rem; } .share, th { white-space: nowrap; }
nav { display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; margin-bottom: 1rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: 0.8rem; }
.cards div { background: var(--panel); border-radius: 6px; padding: 0.7rem 0.9rem; }
.cards strong { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.plots.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); margin: 0.8rem 0; }
figure { margin: 0; padding: 0.7rem; background: var(--panel); border-radius: 6px; min-width: 0; }
figure .scroll { max-height: 20rem; overflow: auto; } figure th, figure td { padding-right: 0.7rem; }
figcaption { font-size: 0.85rem; color: var(--dim); overflow-wrap: anywhere; }
figcaption strong { color: var(--text); font-size: 0.95rem; }
.plots.small svg { overflow: visible; padding: 0; margin-top: 0.3rem; background: none; display: block; }
svg .kept { fill: var(--kept); } svg .dropped { fill: var(--dropped); }
svg .axis { stroke: var(--dim); fill: none; }
svg .tick { fill: var(--dim); font: 10px system-ui, sans-serif; }
path.bound { stroke: var(--text); stroke-width: 1.3; stroke-dasharray: 4 3; fill: none; }
text.bound { fill: var(--text); font: 600 10px system-ui, sans-serif; }
.key { display: inline-block; width: 0.8em; height: 0.8em; border-radius: 2px; margin: 0 0.3em 0 0.8em; }
.track { display: inline-flex; width: 10rem; height: 0.8em; background: var(--line); border-radius: 2px;
  overflow: hidden; }
.track .left, .key.kept { background: var(--kept); } .track .lost, .key.dropped { background: var(--dropped); }
details { margin: 0.35rem 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
.sample { border-left: 3px solid var(--line); padding-left: 0.8rem; margin: 0.6rem 0 1.2rem; }
.sample p { margin: 0.3rem 0; overflow-wrap: anywhere; } .id { font: 13px ui-monospace, monospace; }
.sample pre { max-height: 22rem; overflow: auto; margin: 0.3rem 0; }
pre { unicode-bidi: plaintext; tab-size: 4; }
mark { background: var(--hit); } del { background: var(--out); } ins { background: var(--in); text-decoration: none; }
.fact { display: inline-block; margin-right: 0.9rem; color: var(--dim); font-size: 0.9rem; }
.fact.broken { color: var(--warn); font-weight: 600; }
@media (max-width: 40rem) { body { padding: 0.9rem; } .track { width: 6rem; } th, td { padding-right: 0.7rem; }
  .funnel thead, .funnel td:nth-child(5), .funnel td:nth-child(6) { display: none; }
  .funnel table, .funnel tbody { display: block; } .funnel td { border: 0; padding: 0; }
  .funnel tr { display: flex; flex-wrap: wrap; gap: 0 0.8rem; padding: 0.4rem 0; border-bottom: 1px solid var(--line); }
  .funnel td:first-child, .funnel td:last-child { flex-basis: 100%; min-width: 0; }
  .funnel td:first-child { font-weight: 600; } .funnel td:nth-child(7):not(:empty)::before { content: "dropped "; } }
"""

_LEGEND = joined(
    [
        element("span", class_="key kept"),
        "kept by the stage",
        element("span", class_="key dropped"),
        "dropped by it. Of the documents that reached the stage; dashed lines are bounds, quantiles are good to 1.6 %.",
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that the page shows.

    Attributes:
      manifest: of the run.
      stages: by name.
      summary: of all shards.
      tokens: by source and side of the split.
      samples: excerpts of each kind.
      survivors: what was kept instead of a duplicate, by stage and id.
      clusters: of duplicates, by stage.
      members: of the largest of these, by stage and rank.
      contamination: by stage, the sums and some matches.
      quarantine: examples by reason.
    """

    manifest: Manifest
    stages: Mapping[str, StageConfig]
    summary: Summary
    tokens: Mapping[str, Mapping[str, int]]
    samples: Mapping[Kind, Sequence[dict[str, Any]]]
    survivors: Mapping[tuple[str, str], dict[str, Any]]
    clusters: Mapping[str, Mapping[str, Any]]
    members: Mapping[tuple[str, int], Sequence[dict[str, Any]]]
    contamination: Mapping[str, tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]]
    quarantine: Mapping[str, Sequence[Mapping[str, Any]]]


def render(report: Report) -> str:
    """Returns the page."""
    manifest, summary = report.manifest, report.summary
    read = [step for step in manifest.steps if step.step == "read"]
    sections: list[tuple[str, Html]] = [("Funnel", funnel(manifest.steps))]
    if report.stages:
        parts = [element("p", _LEGEND)] if summary.attributes else []
        before = "read"
        for name, config in report.stages.items():
            dropped: dict[str, int] = {}
            for step in manifest.steps:
                for rule, count in step.dropped.items() if step.step == name else ():
                    dropped[rule] = dropped.get(rule, 0) + count
            attributes = summary.attributes.get(name, {})
            reached = any(step.kept.documents for step in manifest.steps if step.step == before)
            parts.append(stage(name, config, attributes, dropped, report.samples, report.survivors, reached=reached))
            before = name
        sections.append(("Stages", joined(parts)))
    if report.clusters:
        body = corpus_sections.duplicates(report.clusters, report.stages, report.members, report.survivors)
        sections.append(("Duplicates", body))
    if summary.lengths["read"].count:
        sections.append(("Lengths", corpus_sections.lengths(summary.lengths)))
    if manifest.splits:
        sections.append(("Tokens", corpus_sections.tokens(summary.selected, report.tokens)))
    if report.contamination:
        parts = []
        for name, (sums, found) in report.contamination.items():
            parts += [element("h3", name), corpus_sections.contamination(sums, found)]
        sections.append(("Contamination", joined(parts)))
    if any(step.dropped for step in read):
        sections.append(("Quarantine", corpus_sections.quarantine(read, report.quarantine)))
    sections.append(("Configuration", _configuration(manifest)))
    sources = [step.source for step in read]
    title = f"Data report: {', '.join(sources[:3])}{' and others' if len(sources) > 3 else ''}"
    body = [
        element("h1", texts.name(title)),
        element("nav", *(element("a", name, href=f"#{name.lower()}") for name, _ in sections)),
        _cards(manifest),
    ]
    for name, content in sections:
        body += [element("h2", name, id=name.lower()), content]
    return page.document(title, joined(body), style=_STYLE)


def _cards(manifest: Manifest) -> Html:
    read = [step for step in manifest.steps if step.step == "read"]
    last = [step for step in manifest.steps if step.step == manifest.steps[-1].step]
    came, rejected = sum(step.kept.documents for step in read), sum(sum(step.dropped.values()) for step in read)
    left, left_bytes = sum(step.kept.documents for step in last), sum(step.kept.bytes for step in last)
    all_tokens, all_bytes = (
        sum(getattr(side, name) for side in manifest.splits.values()) for name in ("tokens", "bytes")
    )
    cards = [
        (f"{came + rejected:,}", f"records came in, {rejected:,} of them unreadable"),
        (f"{left:,}", f"documents selected, {left / max(came + rejected, 1):.1%}"),
        (f"{left_bytes / 1e6:,.1f} MB", f"of {sum(step.kept.bytes for step in read) / 1e6:,.1f} MB of text"),
    ]
    if manifest.splits:
        each = all_bytes / max(all_tokens, 1)
        cards.append((f"{all_tokens:,}", f"tokens, {each:.3f} bytes each, of {manifest.vocab_size:,} pieces"))
    return element("div", *(element("div", element("strong", value), label) for value, label in cards), class_="cards")


def _configuration(manifest: Manifest) -> Html:
    hashes = [("config_sha256", manifest.config_sha256), ("tokenizer_sha256", manifest.tokenizer_sha256)]
    return joined(
        [
            page.folded("Config", element("pre", texts.visible(json.dumps(manifest.config, indent=1)))),
            page.folded("Versions", page.facts([*manifest.versions.items(), *hashes])),
        ]
    )
