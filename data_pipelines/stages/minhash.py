"""Near duplicates by MinHash (Broder 1997) and locality-sensitive hashing; the signatures are `rensa`'s."""

import string
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from data_pipelines.stages.words import combine, ngram_hashes, word_hashes
from slmjax.config import NearDedupConfig

_NO_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))


def check_installed() -> None:
    """Raises ValueError with the command to run where `rensa` is absent."""
    try:
        import rensa  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "NearDedupConfig needs the package rensa: pip install -e '.[data]' -c constraints.txt, or leave it out"
        ) from error


def measure(config: NearDedupConfig, texts: list[str]) -> dict[str, pa.Array]:
    """A 64-bit hash of each band of each document's signature: band_00, band_01, ...

    Elements are n-grams of words without letter case and ASCII punctuation.
    """
    from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue] (compiled, without annotations)

    words = [text[: config.signature_bytes].lower().translate(_NO_PUNCTUATION).split() for text in texts]
    grams = [ngram_hashes(word_hashes(document), config.ngram) for document in words]
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(grams),
        np.cumsum([0, *map(len, grams)]).astype(np.uint64),
        config.bands * config.rows,
        config.seed,
    )
    signatures = np.array(matrix.to_rows(), np.uint64).reshape(len(texts), config.bands, config.rows)
    bands = combine([signatures[:, :, row] for row in range(config.rows)])
    return {f"band_{band:02d}": pa.array(bands[:, band]) for band in range(config.bands)}


def first_of_each(bands: Iterable[np.ndarray]) -> np.ndarray:
    """Index, for every document, of the first document of its cluster.

    Documents are of one cluster where a chain of equal band hashes joins them. One band is in memory at a time.
    """
    parents = np.zeros(0, np.int64)
    for band in bands:
        if len(parents) == 0:
            parents = np.arange(len(band))
        order = np.argsort(band, kind="stable")
        same = np.flatnonzero(band[order][1:] == band[order][:-1])
        for a, b in zip(order[same].tolist(), order[same + 1].tolist(), strict=True):
            a, b = _root(parents, a), _root(parents, b)
            parents[max(a, b)] = min(a, b)
    return np.array([_root(parents, i) for i in range(len(parents))], np.int64)


def _root(parents: np.ndarray, i: int) -> int:
    while parents[i] != i:
        parents[i] = parents[parents[i]]
        i = int(parents[i])
    return i
