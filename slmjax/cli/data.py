"""`slmjax data`: raw text to token stores, and what one asks of them."""

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
    step: Step = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows at one time; the evaluation's if not given.")] = None,
) -> None:
    """Score documents by their likelihood under a trained run (RunConfig): loss a token, bits per byte."""
    loaded = load_run(files, overrides)
    start_jax()
    from data_pipelines.quality.score_files import score_files
    from slmjax.evaluate.documents import DocumentScorer

    scorer = DocumentScorer(loaded.config, step=step, batch_size=batch_size)
    score_files(documents, output, scorer.score, identity=scorer.identity)


@app.command()
def train_quality(files: Files, overrides: Overrides = []) -> None:  # noqa: B006
    """Train a model that gives documents a score (QualityTrainingConfig)."""
    from data_pipelines.quality.training import train
    from slmjax.config import QualityTrainingConfig

    train(load(files, overrides, root=QualityTrainingConfig).config)
