"""Encoding by distinct words: texts are cut where no piece of the vocabulary can reach across, and no word twice."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_BLOCK = 1 << 16  # bytes whose pairs are looked up at one time, so that they stay in a processor's cache
_CACHE_WORDS = 1 << 18
_CACHE_BYTES = 1 << 24
# Looking words up costs a hash table of all words in the cache; encoding one costs as much as this many of its entries.
_ENTRIES_A_WORD = 16


class Encoded(NamedTuple):
    """Ids of texts, one after another: those of text i are `ids[offsets[i] : offsets[i + 1]]`.

    `ids` are uint16, or uint32 where the vocabulary needs it; `offsets` are int64, one more than texts.
    """

    ids: np.ndarray
    offsets: np.ndarray

    def lists(self) -> list[list[int]]:
        """The ids of each text."""
        ids, offsets = self.ids.tolist(), self.offsets.tolist()
        return [ids[start:stop] for start, stop in itertools.pairwise(offsets)]


def ids_dtype(vocab_size: int) -> np.dtype:
    """The type of ids in arrays: uint16, or uint32 where the vocabulary needs it."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def gathered(rows: Sequence[Sequence[int]], dtype: np.dtype) -> Encoded:
    """Rows of ids as arrays."""
    offsets = np.append(0, np.fromiter(map(len, rows), np.int64, len(rows)).cumsum())
    return Encoded(np.fromiter(itertools.chain.from_iterable(rows), dtype, offsets[-1]), offsets)


def joined_pairs(pieces: Iterable[bytes], escapes: Mapping[str, str]) -> np.ndarray:
    """Which pairs of bytes stand next to each other within a piece or a character, at index first + 256 * second.

    Args:
      pieces: in UTF-8.
      escapes: characters that texts hold and pieces do not, and the strings that are encoded in their place.
    """
    parts = list(pieces)
    data = np.frombuffer(b"".join(parts), np.uint8)
    inside = np.ones(len(data), bool)
    inside[np.cumsum([len(part) for part in parts], dtype=np.int64) - 1] = False
    joined = np.zeros(1 << 16, bool)
    at = np.flatnonzero(inside)
    joined[data[at] | data[at + 1].astype(np.uint16) << 8] = True
    by_second = joined.reshape(256, 256)
    for mark, written in escapes.items():
        # What would be joined to the escape is joined to the character that it stands for.
        by_second[mark.encode()[0]] |= by_second[written.encode()[0]]
        by_second[:, mark.encode()[-1]] |= by_second[:, written.encode()[-1]]
    by_second[0x80:0xC0] = True  # the second byte continues a character
    return joined


class _Cache(NamedTuple):
    words: pa.LargeBinaryArray
    encoded: Encoded


def _no_words(dtype: np.dtype) -> _Cache:
    return _Cache(pa.array([], pa.large_binary()), gathered([], dtype))


class WordEncoder:
    """Encodes texts word by word. A word begins wherever no piece holds the two bytes on both sides.

    Nothing that a BPE merges or that a unigram model weighs can reach across such a place, so that the ids of a text
    are those of its words. Words that came before are looked up.

    Args:
      joined: of `joined_pairs`.
      encode: ids of each of some words, given in UTF-8.
      frame: ids of the token that begins a text and of the one that ends it.
      dtype: of ids.
    """

    def __init__(
        self,
        joined: np.ndarray,
        encode: Callable[[list[bytes]], list[list[int]]],
        *,
        frame: tuple[int, int],
        dtype: np.dtype,
    ):
        self._apart = ~joined
        self._encode = encode
        self._frame = np.array(frame, np.int64).astype(dtype)  # -1 of a model that lacks one of them
        self._dtype = dtype
        self._cache = _no_words(dtype)

    def __getstate__(self):
        return {
            **self.__dict__,
            "_cache": _Cache(self._cache.words[:0], Encoded(self._frame[:0], np.zeros(1, np.int64))),
        }

    def starts(self, content: bytes, bounds: np.ndarray) -> np.ndarray:
        """Where words start, int64, and last the length of `content`; text i is content[bounds[i] : bounds[i + 1]]."""
        data = np.frombuffer(content, np.uint8)
        first = np.empty(len(data) + 1, bool)
        pairs = np.empty(_BLOCK, np.uint16)
        for start in range(0, len(data) - 1, _BLOCK):
            block = data[start : start + _BLOCK + 1]
            num_pairs = len(block) - 1
            pairs[0:num_pairs:2] = block[: (num_pairs + 1) // 2 * 2].view("<u2")
            pairs[1:num_pairs:2] = block[1 : 1 + num_pairs // 2 * 2].view("<u2")
            # With mode="raise" numpy would copy the result once more.
            self._apart.take(pairs[:num_pairs], out=first[start + 1 : start + 1 + num_pairs], mode="clip")
        first[bounds] = True
        return np.flatnonzero(first)

    def encode(self, content: bytes, bounds: np.ndarray, *, framed: bool) -> Encoded:
        """Ids of texts in UTF-8; text i is content[bounds[i] : bounds[i + 1]], and the bounds begin with 0.

        Args:
          content: of all texts.
          bounds: int64.
          framed: put the token that begins a text and the one that ends it around each.
        """
        starts = self.starts(content, bounds)
        buffers = [None, pa.py_buffer(starts), pa.py_buffer(content)]
        words = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(starts) - 1, buffers).dictionary_encode()
        known, rows_of_distinct = self._known(words.dictionary)
        rows = rows_of_distinct.take(words.indices.to_numpy())
        ends = np.searchsorted(starts, bounds)  # words before each text
        if framed:
            known = Encoded(np.append(known.ids, self._frame), np.append(known.offsets, known.offsets[-1] + [1, 2]))
            places = np.stack([ends[:-1], ends[1:]], axis=1).ravel()
            frames = np.tile(np.array([-3, -2]) + len(known.offsets), len(bounds) - 1)
            rows = np.insert(rows, places, frames)
            ends = ends + 2 * np.arange(len(bounds))
        encoded = _taken(known, rows)
        return Encoded(encoded.ids, encoded.offsets[ends])

    def _known(self, distinct: pa.LargeBinaryArray) -> tuple[Encoded, np.ndarray]:
        """Encoded words, and which of them each of the distinct words is."""
        cache = self._cache  # another thread may put another one there
        if len(cache.words) > _ENTRIES_A_WORD * len(distinct):
            return gathered(self._encode(distinct.to_pylist()), self._dtype), np.arange(len(distinct))
        rows = pc.call_function("index_in", [distinct], pc.SetLookupOptions(cache.words)).fill_null(-1).to_numpy()
        rows = rows.astype(np.int64)
        unknown = np.flatnonzero(rows < 0)
        words = distinct.take(pa.array(unknown))
        new = gathered(self._encode(words.to_pylist()), self._dtype)
        rows[unknown] = len(cache.words) + np.arange(len(unknown))
        words = pa.concat_arrays([cache.words, words])
        encoded = Encoded(
            np.concatenate([cache.encoded.ids, new.ids]),
            np.concatenate([cache.encoded.offsets, cache.encoded.offsets[-1] + new.offsets[1:]]),
        )
        if len(words) <= _CACHE_WORDS and words.nbytes <= _CACHE_BYTES:
            self._cache = _Cache(words, encoded)
        elif len(distinct) <= _CACHE_WORDS and distinct.nbytes <= _CACHE_BYTES:  # full: begin again with these
            self._cache = _Cache(distinct, _taken(encoded, rows))
        return encoded, rows


def _taken(encoded: Encoded, rows: np.ndarray) -> Encoded:
    """Some of the texts, each as often as it is asked for."""
    # As strings of bytes, which Arrow gathers twice as fast as lists.
    size = encoded.ids.itemsize
    buffers = [None, pa.py_buffer(encoded.offsets * size), pa.py_buffer(encoded.ids)]
    taken = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(encoded.offsets) - 1, buffers).take(pa.array(rows))
    _, offsets, content = taken.buffers()
    bounds = np.frombuffer(offsets, np.int64, len(rows) + 1) // size
    return Encoded(np.frombuffer(content or b"", encoded.ids.dtype, bounds[-1]), bounds)


def require_utf8(text: str) -> None:
    """Raises ValueError for a lone surrogate, which UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds a lone surrogate, {error.object[error.start : error.end]!r} at character {error.start}, "
            "which UTF-8 cannot hold; remove it first"
        ) from error
