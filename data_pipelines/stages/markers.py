"""Phrases at the top of a file that say it was generated."""

import pyarrow as pa

from slmjax.config import MarkerFilterConfig


def measure(config: MarkerFilterConfig, texts: list[str]) -> dict[str, pa.Array]:
    """How many of the markers stand in the first lines."""
    markers = [marker.lower() for marker in config.markers]
    heads = ["\n".join(text.split("\n", config.first_lines)[: config.first_lines]).lower() for text in texts]
    return {"markers": pa.array([sum(marker in head for marker in markers) for head in heads], pa.int64())}
