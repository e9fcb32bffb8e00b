"""A tokenizer.json of Hugging Face becomes a tokenizer of slmjax."""

import os
from collections.abc import Mapping
from pathlib import Path

from data_pipelines.tokenizers.samples import Samples
from slmjax.data.tokenizer import Tokenizer, write_model
from slmjax.data.tokenizer_json import import_tokenizer


def import_file(
    source: Path, output: Path, names: Mapping[str, str], *, samples: Samples | None = None, lossy: bool = False
) -> str:
    """Writes `output`, as `slmjax.data.tokenizer_json.import_tokenizer` makes it; returns what was decided.

    Raises:
      ValueError: as that, or `source` cannot be read, or `output` does not end with .json.
    """
    if output.suffix != ".json":
        raise ValueError(f"the file to write must end with .json, got {output}")
    source = Path(os.path.expandvars(source)).expanduser()
    try:
        model = source.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {source}: {error.strerror}") from error
    texts = () if samples is None else samples.texts()
    try:
        imported, said = import_tokenizer(model, names, texts=texts, lossy=lossy)
    except ValueError as error:
        raise ValueError(f"{source} {error}") from error
    write_model(imported, output)
    tokenizer = Tokenizer.load(output)
    lines = [f"{role}: {what}" for role, what in said.items()]
    return "\n".join([*lines, f"Wrote {output}: {tokenizer.vocab_size:,} ids, sha256 {tokenizer.sha256}"])
