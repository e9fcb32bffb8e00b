"""`slmjax tokenizer`: compare tokenizers on text, drop pieces, import those of others."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Compare tokenizers on text, drop pieces that a corpus does not use, import a tokenizer.json. `slmjax data` "
    "trains them.",
    no_args_is_help=True,
)

Data = Annotated[
    list[str],
    typer.Option("--data", help="Texts: file, directory (such as a pipeline's documents/) or glob; may be repeated."),
]
TextField = Annotated[str, typer.Option(help="Field of the text in jsonl and tables.")]


@app.command()
def evaluate(
    tokenizers: Annotated[list[Path], typer.Argument(help="Model files, compared side by side.")],
    data: Data,
    text_field: TextField = "text",
    source_field: Annotated[str, typer.Option(help="Field by which texts are counted as sources.")] = "source",
    language_field: Annotated[str, typer.Option(help="Field by which texts are counted as languages.")] = "language",
    output: Annotated[Path | None, typer.Option(help="JSON file to write, too.")] = None,
) -> None:
    """Bytes a token by source and language, tokens a word, failed round trips, byte tokens, unused pieces."""
    from rich.console import Console

    from data_pipelines.tokenizers.evaluation import evaluate, print_evaluations
    from data_pipelines.tokenizers.samples import Samples
    from slmjax.data.tokenizer import Tokenizer

    samples = Samples(data, text_field=text_field, source_field=source_field, language_field=language_field)
    evaluations = evaluate([Tokenizer.load(path) for path in tokenizers], samples)
    names = {path.name for path in tokenizers}
    shown = [path.name if len(names) == len(tokenizers) else str(path) for path in tokenizers]
    print_evaluations(shown, evaluations, Console())
    _print_rejected(samples.rejected)
    if output is not None:
        results = [{"path": str(p), **e.to_json()} for p, e in zip(tokenizers, evaluations, strict=True)]
        content = {"data": data, "rejected": samples.rejected, "tokenizers": results}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


@app.command()
def trim(
    model: Annotated[Path, typer.Argument(help="A SentencePiece model.")],
    output: Annotated[Path, typer.Argument(help="The smaller model to write.")],
    data: Data,
    vocab_size: Annotated[int | None, typer.Option(help="Ids to keep; by default all that the data use.")] = None,
    text_field: TextField = "text",
) -> None:
    """Drop the pieces that the data use least; ids change, so that stores must be made again."""
    from data_pipelines.tokenizers.samples import Samples
    from data_pipelines.tokenizers.trimming import trim_file

    samples = Samples(data, text_field=text_field)
    print(trim_file(model, output, samples, vocab_size=vocab_size))
    _print_rejected(samples.rejected)


@app.command("import")
def import_json(
    source: Annotated[Path, typer.Argument(help="A tokenizer.json of Hugging Face.")],
    output: Annotated[Path, typer.Argument(help="The file to write; it must end with .json.")],
    names: Annotated[
        list[str],
        typer.Option("--token", help='ROLE=TOKEN, such as bos=<|endoftext|> or "<|user|>=<|im_user|>".', metavar="R=T"),
    ] = [],  # noqa: B006
    data: Annotated[list[str], typer.Option("--data", help="Texts that must come back as they are.")] = [],  # noqa: B006
    lossy: Annotated[bool, typer.Option("--lossy", help="Take it even if it loses text.")] = False,
) -> None:
    """Make a tokenizer.json usable wherever a tokenizer is: bos, eos, pad, control symbols, no loss of text."""
    from data_pipelines.tokenizers.importing import import_file
    from data_pipelines.tokenizers.samples import Samples

    samples = Samples(data) if data else None
    print(import_file(source, output, dict(_role(name) for name in names), samples=samples, lossy=lossy))
    if samples is not None:
        _print_rejected(samples.rejected)


def _role(name: str) -> tuple[str, str]:
    # The name of a control symbol may hold no "=", the token may.
    role, equals, token = name.partition("=")
    if not equals or not token:
        raise ValueError(f"--token takes ROLE=TOKEN, got {name!r}")
    return role, token


def _print_rejected(rejected: dict[str, int]) -> None:
    if rejected:
        print("not read: " + ", ".join(f"{number:,} {reason}" for reason, number in sorted(rejected.items())))
