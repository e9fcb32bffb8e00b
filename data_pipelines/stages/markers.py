"""Phrases at the top of a file that say it was generated."""

import numpy as np
import pyarrow as pa

from data_pipelines.stages.texts import Texts
from slmjax.config.filters import MarkerFilterConfig


def measure(config: MarkerFilterConfig, texts: Texts) -> dict[str, pa.Array]:
    """How many of the markers stand in the first lines."""
    markers = [marker.lower() for marker in config.markers]
    lines = texts.lines
    last = np.minimum(lines.first[:-1] + config.first_lines, lines.first[1:]) - 1
    edges = zip(texts.starts.tolist(), lines.ends[last].tolist(), strict=True)
    heads = [texts.raw[start:end].decode().lower() for start, end in edges]
    return {"markers": pa.array([sum(marker in head for marker in markers) for head in heads], pa.int64())}
