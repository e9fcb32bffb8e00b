"""How long a document is."""

import pyarrow as pa


def measure(texts: list[str]) -> dict[str, pa.Array]:
    """Characters, and words separated by white space."""
    return {
        "chars": pa.array([len(text) for text in texts], pa.int64()),
        "words": pa.array([len(text.split()) for text in texts], pa.int64()),
    }
