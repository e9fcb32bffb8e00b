"""The command line: one verb a function, each of which loads a config and calls one function of the library.

Heavy imports stand inside the verbs, so that `slmjax --help` answers at once and `show` needs no device.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from slmjax.cli import data as data_verbs
from slmjax.cli import tokenizer as tokenizer_verbs
from slmjax.cli.options import INTERRUPTED, Files, Overrides, Step, load, load_run, start_jax

app = typer.Typer(
    help="Train small language models from scratch in JAX. SLMJAX_TRACEBACK=1 shows where an error comes from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_verbs.app, name="data")
app.add_typer(tokenizer_verbs.app, name="tokenizer")


def main() -> None:
    """Runs the command line; errors of the user's making are one line on stderr and status 1."""
    logging.basicConfig(level=logging.INFO, format="%(levelname).1s %(name)s: %(message)s", stream=sys.stderr)
    for noisy in ("absl", "jax", "orbax", "grain"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        app()
    except (ValueError, OSError, RuntimeError, ImportError, OverflowError, MemoryError) as error:
        if os.environ.get("SLMJAX_TRACEBACK"):
            raise
        print(f"slmjax: {error}", file=sys.stderr)
        sys.exit(1)


@app.command()
def train(files: Files, overrides: Overrides = []) -> None:  # noqa: B006
    """Train, or go on with, the run that a RunConfig describes; status 75 if a signal stopped it."""
    loaded = load_run(files, overrides)
    start_jax()
    from slmjax.config.resolved import to_json
    from slmjax.train.loop import train

    outcome = train(loaded.config, config_text=loaded.text, config_json=to_json(loaded.config))
    if outcome.interrupted:
        raise typer.Exit(INTERRUPTED)


@app.command("eval")
def evaluate(
    files: Files,
    overrides: Overrides = [],  # noqa: B006
    step: Step = None,
    baselines: Annotated[
        Path | None, typer.Option(help="Data directory whose held-out text is also measured with gzip, xz and n-grams.")
    ] = None,
) -> None:
    """Evaluate a trained run on its evaluation sets; writes <output_dir>/evaluation.json."""
    loaded = load_run(files, overrides)
    start_jax()
    from slmjax.evaluate.run import evaluate_run

    evaluate_run(loaded.config, step=step, baselines_dir=baselines)


@app.command()
def sample(
    files: Files,
    overrides: Overrides = [],  # noqa: B006
    prompt: Annotated[list[str], typer.Option(help="Text to continue; may be given several times.")] = [],  # noqa: B006
    instruct: Annotated[bool, typer.Option(help="Each prompt is a user's turn of a conversation.")] = False,
    seed: int = 0,
    step: Step = None,
) -> None:
    """Generate text from a trained run; prints it and appends to <output_dir>/samples.jsonl."""
    loaded = load_run(files, overrides)
    start_jax()
    from slmjax.generate.sample import sample

    sample(loaded.config, prompt or [""], instruct=instruct, seed=seed, step=step)


@app.command()
def chat(files: Files, overrides: Overrides = [], seed: int = 0, step: Step = None) -> None:  # noqa: B006
    """Talk to an instruction-tuned run on the terminal."""
    loaded = load_run(files, overrides)
    start_jax()
    from slmjax.generate.chat import chat

    chat(loaded.config, seed=seed, step=step)


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(help="Run directories, in the order they should be shown.")],
    output: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    data: Annotated[list[Path], typer.Option(help="Data directories whose funnel is shown.")] = [],  # noqa: B006
) -> None:
    """Write one self-contained HTML file: losses, learning rate, throughput, data funnel, samples."""
    from slmjax.report.report import write_report

    print(write_report(run_dirs, output, data_dirs=data))


@app.command()
def show(
    files: Files,
    overrides: Overrides = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print the resolved config as JSON only.")] = False,
) -> None:
    """Print the resolved config; of a run also its size and FLOPs, of a model its size. Uses no device."""
    from slmjax.config import ModelConfig, RunConfig
    from slmjax.config.resolved import to_json

    loaded = load(files, overrides)
    if as_json:
        print(json.dumps(to_json(loaded.config), indent=1))
        return
    print(loaded.text.rstrip())
    if isinstance(loaded.config, ModelConfig):
        print()
        print(_summary_of_model(loaded.config))
    elif isinstance(loaded.config, RunConfig):
        print()
        print(_summary_of_model(loaded.config.model))
        print(_summary_of_run(loaded.config))


def _summary_of_model(config: Any) -> str:
    from slmjax import model

    count = model.count_parameters(config)
    return (
        f"# parameters        {count.total:,} (embedding {count.embedding:,}, active per token {count.active:,})\n"
        f"# layers            {config.num_layers} executed, {config.num_stored_layers} stored"
    )


def _summary_of_run(run: Any) -> str:
    from slmjax import model

    length = run.input.sequence_length
    flops = model.flops_per_token(run.model, lambda window: model.causal_visible_keys(length, window))
    tokens = run.steps * run.input.tokens_per_step
    return "\n".join(
        (
            f"# training FLOPs    {flops:,.0f} per token at length {length}, causal",
            f"# tokens            {run.input.tokens_per_step:,} a step, {tokens:,} in {run.steps:,} steps",
            f"# training compute  {flops * tokens:.3g} FLOPs",
        )
    )
