"""How long a document is."""

import pyarrow as pa

from data_pipelines.stages.texts import Texts
from slmjax.config.filters import LengthFilterConfig


def measure(config: LengthFilterConfig, texts: Texts) -> dict[str, pa.Array]:
    """Characters and words."""
    return {"chars": pa.array(texts.num_chars), "words": pa.array(texts.words(config.splitter).per_document)}
