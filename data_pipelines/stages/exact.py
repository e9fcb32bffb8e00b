"""Exact duplicates, by a 128-bit hash of the text without letter case and with single spaces."""

import hashlib

import numpy as np
import pyarrow as pa


def measure(texts: list[str]) -> dict[str, pa.Array]:
    """The hash of each document."""
    digests = [hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=16).digest() for text in texts]
    return {"digest": pa.array(digests, pa.binary(16))}


def first_of_each(digests: pa.Array) -> np.ndarray:
    """Index, for every document, of the first document with its digest."""
    codes = digests.dictionary_encode().indices.to_numpy()
    return np.unique(codes, return_index=True)[1][codes]
