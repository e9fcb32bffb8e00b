"""`slmjax data`: raw text to token stores, and what one asks of them."""

import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from slmjax.cli.options import INTERRUPTED, Files, Overrides, Step, load, load_run, start_jax


class _DataGroup(typer.core.TyperGroup):
    """`slmjax data CONFIG.gin` means `slmjax data run CONFIG.gin`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_DataGroup,
    help="Turn raw text into a tokenizer and token stores: slmjax data CONFIG.gin [--set BINDING]. Also: train quality "
    "models, score documents, show what a run will see.",
    no_args_is_help=True,
)


@app.command("run")
def run_pipeline(files: Files, overrides: Overrides = []) -> None:  # noqa: B006 -- typer copies it
    """Turn raw text into a tokenizer and token stores (PipelineConfig); status 75 if a signal stopped it."""
    # Before numpy is loaded, here and in workers: arrays that come and go do not get huge pages, which the kernel would
    # clear each time (5 % of a pipeline's CPU time).
    os.environ.setdefault("NUMPY_MADVISE_HUGEPAGE", "0")
    from data_pipelines import stopping
    from data_pipelines.run import run
    from slmjax.config import PipelineConfig

    config = load(files, overrides, root=PipelineConfig).config
    try:
        with stopping.on_signals():
            run(config)
    except stopping.Stopped as stopped:
        typer.echo(f"slmjax: {stopped}", err=True)
        raise typer.Exit(INTERRUPTED) from None


@app.command()
def inspect(
    place: Annotated[
        str, typer.Argument(metavar="DIR", help="A pipeline's output, parquet or jsonl files, or a token store.")
    ],
    step: Annotated[
        str | None, typer.Option(help="Documents that reached this stage; quarantine: records that were not usable.")
    ] = None,
    reason: Annotated[
        str | None, typer.Option(help="Dropped by this rule, stage or stage.rule.", metavar="RULE")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Of this source.", metavar="NAME")] = None,
    kept: Annotated[bool | None, typer.Option("--kept/--dropped", help="Only what was kept, or dropped.")] = None,
    sort: Annotated[str | None, typer.Option(help="Lowest first: bytes, words, ...", metavar="ATTRIBUTE")] = None,
    descending: Annotated[bool, typer.Option("--descending", help="Highest first.")] = False,
    limit: Annotated[int | None, typer.Option(help="So many documents; 0 is all.", min=0)] = None,
    sample: Annotated[int | None, typer.Option(help="Documents at random, by this seed.", metavar="SEED")] = None,
    where: Annotated[
        list[str],
        typer.Option(help="A condition such as 'words<100'; may be given several times.", metavar="CONDITION"),
    ] = [],  # noqa: B006
    tokens: Annotated[bool, typer.Option("--tokens", help="Show where tokens end.")] = False,
    tokenizer: Annotated[Path | None, typer.Option(help="Its model, where it is not found by itself.")] = None,
    text_field: Annotated[str | None, typer.Option(help="Of files: the field of the text.")] = None,
    excerpt: Annotated[int, typer.Option(help="Characters of each text.", min=1)] = 300,
    as_json: Annotated[bool, typer.Option("--json", help="Lines for programs.")] = False,
) -> None:
    """Show documents and what is known of them; without options a summary: funnel, attributes, where things lie."""
    from data_pipelines.inspection.inspect import show_documents, show_summary
    from data_pipelines.inspection.output import naming
    from data_pipelines.inspection.query import Query

    console = _console()
    asked = (step, reason, source, kept, sort, limit, sample)
    if not (any(each is not None for each in asked) or where or tokens):
        with naming(place):
            show_summary(place, console, as_json=as_json, tokenizer=tokenizer, text_field=text_field)
        return
    query = Query(
        kept=kept,
        reason=reason,
        source=source,
        where=tuple(where),
        sort=sort,
        descending=descending,
        sample=sample,
        limit=10 if limit is None else limit or None,
        excerpt=excerpt,
        tokens=tokens,
    )
    with naming(place):
        show_documents(place, query, console, step=step, as_json=as_json, tokenizer=tokenizer, text_field=text_field)


@app.command()
def explain(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A pipeline's output.")],
    document: Annotated[
        str, typer.Argument(metavar="ID", help="Of a document, or how it begins; FILE:RECORD for one in quarantine.")
    ],
    original: Annotated[
        bool, typer.Option(help="Read its input again, up to it, to show what normalising changed.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Tell a document's whole path: input, every stage with values and bounds, duplicates, split, tokens, store."""
    from data_pipelines.inspection.output import naming
    from data_pipelines.inspection.path import show

    with naming(directory):
        show(directory.expanduser(), document, _console(), as_json=as_json, original=original)


@app.command()
def mix(
    files: Files,
    overrides: Overrides = [],  # noqa: B006
    preview: Annotated[bool, typer.Option("--preview", help="Print stages, sources, tokens and epochs.")] = False,
) -> None:
    """Check the mixture of a RunConfig: status 1 where a source is repeated beyond its cap. Uses no device."""
    from slmjax.data.exposure import exposure, require_epochs, spell_exposure
    from slmjax.data.sources import open_mixture
    from slmjax.data.tokenizer import Tokenizer

    run = load_run(files, overrides).config
    mixed = open_mixture(run.input, seed=run.seed, tokenizer_sha256=Tokenizer.load(run.input.tokenizer).sha256)
    stages = exposure(mixed, run.input, steps=run.steps)
    if preview:
        print(spell_exposure(stages))
    require_epochs(stages)


@app.command()
def score(
    files: Files,
    documents: Annotated[
        Path, typer.Option(help="Directory of parquet files with id and text: a pipeline's documents/.")
    ],
    output: Annotated[Path, typer.Option(help="Directory for the scores, which ScoreFilesConfig reads.")],
    overrides: Overrides = [],  # noqa: B006
    metric: Annotated[
        str, typer.Option(help="likelihood, ifd, embedding, or a Gin file with an InfluenceConfig.")
    ] = "likelihood",
    step: Step = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows at one time; the evaluation's if not given.")] = None,
) -> None:
    """Score documents under a trained run (RunConfig): likelihood; of conversations also IFD, influence; embeddings."""
    run = load_run(files, overrides).config
    influence = None if metric in _METRICS else _load_influence(metric)
    start_jax()
    from data_pipelines.quality.score_files import score_files

    column = "messages" if influence is not None or metric == "ifd" else "text"
    scorer = _scorer(run, metric, influence, step=step, batch_size=batch_size)
    score_files(documents, output, scorer.score, identity=scorer.identity, column=column)


_METRICS = ("likelihood", "ifd", "embedding")


def _load_influence(metric: str) -> Any:
    from slmjax.config import InfluenceConfig

    if not metric.endswith(".gin"):
        raise ValueError(f"--metric must be {', '.join(_METRICS)} or a Gin file with InfluenceConfig, got {metric!r}")
    return load([Path(metric)], [], root=InfluenceConfig).config


def _scorer(run: Any, metric: str, influence: Any, *, step: int | None, batch_size: int | None) -> Any:
    if influence is not None:
        from data_pipelines.quality.targets import read_targets
        from slmjax.evaluate.influence import InfluenceScorer

        return InfluenceScorer(run, influence, read_targets(influence), step=step, batch_size=batch_size)
    match metric:
        case "ifd":
            from slmjax.evaluate.conversations import AnswerScorer as Scorer
        case "embedding":
            from slmjax.evaluate.embeddings import Embedder as Scorer
        case _:
            from slmjax.evaluate.documents import DocumentScorer as Scorer
    return Scorer(run, step=step, batch_size=batch_size)


@app.command()
def diversity(files: Files, overrides: Overrides = []) -> None:  # noqa: B006
    """Order documents so that every next one is unlike those before (DiversityConfig)."""
    from data_pipelines.quality.diversity import write_order
    from slmjax.config import DiversityConfig

    write_order(load(files, overrides, root=DiversityConfig).config)


@app.command()
def train_quality(files: Files, overrides: Overrides = []) -> None:  # noqa: B006
    """Train a model that gives documents a score (QualityTrainingConfig)."""
    from data_pipelines.quality.training import train
    from slmjax.config import QualityTrainingConfig

    train(load(files, overrides, root=QualityTrainingConfig).config)


def _console() -> Any:
    """A console that writes any text, whatever the encoding of the terminal."""
    from rich.console import Console

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return Console(highlight=False)
