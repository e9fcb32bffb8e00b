"""`slmjax data inspect`: a summary of what lies in a place, or some of its documents."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from data_pipelines.inspection import summary, terminal
from data_pipelines.inspection.corpora import Corpus, PipelineCorpus, QuarantineCorpus, StoreCorpus
from data_pipelines.inspection.files import FilesCorpus
from data_pipelines.inspection.output import Output
from data_pipelines.inspection.query import Query, resolve, select
from data_pipelines.inspection.visible import visible
from slmjax.data.tokenizer import Tokenizer


def open_output(place: str) -> Output | None:
    """The pipeline's output that a place is, None where it is something else."""
    path = Path(place).expanduser()
    is_output = (path / "work" / "plan.json").is_file() and not (path / "metadata.json").is_file()
    return Output(path) if is_output else None


def open_corpus(
    place: str, *, step: str | None = None, tokenizer: Path | None = None, text_field: str | None = None
) -> Corpus:
    """The documents of a place. Raises ValueError where there are none."""
    path = Path(place).expanduser()
    if (output := open_output(place)) is not None:
        if step == "quarantine":
            return QuarantineCorpus(output)
        if step in (None, *output.decided):
            return PipelineCorpus(output, step)
        known = ["quarantine", *output.decided]
        if step in output.stages:
            raise ValueError(f"the last run in {place} did not come to {step}, only to {', '.join(known)}")
        raise ValueError(f"{place} has no stage {step!r}, only {', '.join(known)}")
    if (path / "metadata.json").is_file():
        corpus = StoreCorpus(path, tokenizer)
    elif (path / "manifest.json").is_file() and (path / "documents").is_dir():  # work was removed
        corpus = FilesCorpus(str(path / "documents"), text_field)
    else:
        corpus = FilesCorpus(place, text_field)
    if step is not None:
        raise ValueError(f"--step is for the output of a pipeline with its directory work, which {place} is not")
    return corpus


def show_summary(
    place: str, console: Console, *, as_json: bool, tokenizer: Path | None, text_field: str | None
) -> None:
    """Prints what lies in a place."""
    if (output := open_output(place)) is not None:
        stages = summary.of_stages(output)
        if not as_json:
            terminal.show_output(console, output, stages)
            return
        content: dict[str, Any] = {
            "finished": output.manifest is not None,
            "state": output.state,
            "steps": output.finished,
            "funnel": [dataclasses.asdict(row) for row in output.funnel()],
            "attributes": {
                stage: {name: each._asdict() for name, each in found.items()} for stage, found in stages.items()
            },
            "bounds": {stage: {bound.rule: bound.allowed for bound in output.bounds(stage)} for stage in stages},
        }
    else:
        corpus = open_corpus(place, tokenizer=tokenizer, text_field=text_field)
        found = summary.of_corpus(corpus)
        described = corpus.metadata() if isinstance(corpus, StoreCorpus) else {}
        if isinstance(corpus, FilesCorpus):
            described = {"files": len(corpus.files), "documents": corpus.num_documents, **corpus.problems}
        if not as_json:
            for name, value in described.items():
                console.print(f"{name:<20} {terminal.number(value)}", markup=False, highlight=False, soft_wrap=True)
            terminal.show_ranges(console, place, found)
            return
        content = {**described, "attributes": {name: each._asdict() for name, each in found.items()}}
    print(json.dumps(content))


def show_documents(
    place: str,
    query: Query,
    console: Console,
    *,
    step: str | None,
    as_json: bool,
    tokenizer: Path | None,
    text_field: str | None,
) -> None:
    """Prints the documents that a query asks for."""
    corpus = open_corpus(place, step=step, tokenizer=tokenizer, text_field=text_field)
    if isinstance(corpus, PipelineCorpus):
        if query.source is not None:
            corpus.require_source(query.source)
        if query.reason is not None:
            corpus.require_rule(query.reason)
    loaded = Tokenizer.load(tokenizer) if tokenizer is not None else None
    records = select(corpus, query, loaded)
    if as_json:
        for record in records:
            print(json.dumps(terminal.as_json(record), default=str))
    else:
        _print(records, console, _shown(corpus, query, step))
    if isinstance(corpus, FilesCorpus) and corpus.hint and not as_json:
        console.print(Text(visible(corpus.hint), style="yellow"), soft_wrap=True)
    if corpus.problems and not as_json:
        told = ", ".join(f"{count:,} {reason}" for reason, count in corpus.problems.most_common())
        console.print(f"records that cannot be read: {told}", markup=False, highlight=False)


def _print(records: Iterator[Any], console: Console, shown: list[str]) -> None:
    first = next(records, None)
    if first is None:
        console.print("no document is like this")
        return
    for record in itertools.chain([first], records):
        terminal.show_record(console, record, shown)


def _shown(corpus: Corpus, query: Query, step: str | None) -> list[str]:
    """The attributes that matter: those that the query names; of one step, or of files, all."""
    if step is not None or not isinstance(corpus, PipelineCorpus):
        return list(corpus.attributes)
    named = [query.sort] if query.sort else []
    named += [condition.split("<")[0].split(">")[0].split("=")[0].split("!")[0].strip() for condition in query.where]
    return [resolve(corpus, name) for name in named]
