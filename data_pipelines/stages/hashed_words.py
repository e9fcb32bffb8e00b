"""Words of a whole batch of documents at once, as hashes and places in the text, without a Python object for any.

The same on every machine and in every process. Speed comes from working on bytes: tables, eight bytes at a time.
"""

import dataclasses
import functools
import hashlib
import sys

import numpy as np
import pyarrow as pa

from data_pipelines.stages import alphabet
from data_pipelines.stages.texts import Texts

# Odd constants with well mixed bits: Knuth's golden ratio (TAOCP 3, 6.4) and those of MurmurHash3's finaliser.
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_SHIFT = np.uint64(33)

_LONG_WORD = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words:
    """Of the documents of a batch, one document after the other.

    Attributes:
      hashes: uint64, of each word without letter case.
      starts: of each word in the bytes of the whole batch.
      ends: one past its last byte.
      first: index of the first word of each document, and the number of words.
      offsets: of each document in the bytes of the batch, and their number.
    """

    hashes: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    first: np.ndarray
    offsets: np.ndarray

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """Words of each document."""
        return np.diff(self.first)

    def select(self, chosen: np.ndarray) -> "Words":
        """Some of the words, by a mask."""
        before = np.concatenate([[0], np.cumsum(chosen)])
        return dataclasses.replace(
            self,
            hashes=self.hashes[chosen],
            starts=self.starts[chosen],
            ends=self.ends[chosen],
            first=before[self.first],
        )


def split(texts: pa.StringArray, *, punctuation: bool) -> Words:
    """Splits documents into words; letter case never matters.

    Args:
      texts: the documents.
      punctuation: whether punctuation and symbols are part of words, so that only white space separates them;
        otherwise words are runs of letters, marks, digits and underscores. In scripts without spaces every character
        is a word.
    """
    data = content(texts)
    offsets = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    offsets = offsets - offsets[0]
    plain = np.frombuffer(data.tobytes().translate(_ascii(punctuation)), np.uint8)
    forced = offsets[:-1]
    if len(plain) and plain.max() >= 0x80:
        plain, alone = _beyond_ascii(plain, punctuation)
        forced = np.concatenate([forced, alone])
    inside = np.zeros(len(plain) + 2, bool)
    np.not_equal(plain, 32, out=inside[1:-1])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, ends = edges[::2].copy(), edges[1::2].copy()
    # Where one word ends and the next starts without a separator, between documents for one.
    touching = np.unique(forced[inside[forced] & inside[forced + 1]])
    if len(touching):
        starts, ends = np.sort(np.concatenate([starts, touching])), np.sort(np.concatenate([ends, touching]))
    return Words(
        hashes=_hashes(plain, starts, ends),
        starts=starts,
        ends=ends,
        first=np.searchsorted(starts, offsets),
        offsets=offsets,
    )


def content(texts: pa.StringArray) -> np.ndarray:
    """The bytes of all documents."""
    _, offsets, data = texts.buffers()
    first, last = np.frombuffer(offsets, np.int32)[[texts.offset, texts.offset + len(texts)]]
    return np.frombuffer(data, np.uint8)[first:last] if last > first else np.zeros(0, np.uint8)


@functools.lru_cache(maxsize=1)
def of(texts: Texts) -> Words:
    """Words without punctuation; those of the last texts are kept, since several stages want them."""
    return split(texts.array, punctuation=False)


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 after which every bit depends on all (Appleby's MurmurHash3 finaliser)."""
    values = values ^ (values >> _SHIFT)
    values *= _MIX_1
    values ^= values >> _SHIFT
    values *= _MIX_2
    values ^= values >> _SHIFT
    return values


def runs(hashes: np.ndarray, n: int) -> np.ndarray:
    """Hash of every `n` words in a row, from those of the words; it depends on their order.

    That of words 0 to n - 1 is sum_i hashes[i] * C**(n - 1 - i) mod 2**64, mixed. Runs double in length, so that the
    cost is that of log2(n) steps.
    """
    if len(hashes) < n:
        return np.zeros(0, np.uint64)
    power, length, doubled = int(MULTIPLIER), 1, hashes
    total, covered = None, 0  # of the words from the last bit of n up
    for bit in range(n.bit_length()):
        if n >> bit & 1:
            if total is None:
                total, covered = doubled, length
            else:  # `length` words, then the `covered` ones
                count = len(hashes) - length - covered + 1
                shift = np.uint64(pow(int(MULTIPLIER), covered, 1 << 64))
                total, covered = doubled[:count] * shift + total[length : length + count], length + covered
        if n >> (bit + 1):
            doubled = doubled[:-length] * np.uint64(power) + doubled[length:]
            power, length = power * power % (1 << 64), 2 * length
    assert total is not None
    return mix(total)


def runs_at(hashes: np.ndarray, starts: np.ndarray, n: int) -> np.ndarray:
    """Those of `runs` that start at some words."""
    total = hashes[starts]
    for i in range(1, n):
        total = total * MULTIPLIER + hashes[starts + i]
    return mix(total)


def run_starts(first: np.ndarray, n: int) -> np.ndarray:
    """Index of the first word of every `n` words in a row that lie in one document."""
    inside = np.ones(int(first[-1]), bool)
    counts = np.diff(first)
    for back in range(1, n):
        inside[first[1:][counts >= back] - back] = False
    return np.flatnonzero(inside)


def _hashes(plain: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Hash of the bytes [start, end) for each word; none of them is zero."""
    padded = np.concatenate([plain, np.zeros(8, np.uint8)])
    eights = np.ndarray((len(plain) + 1,), "<u8", buffer=padded, strides=(1,))  # eight bytes from every place
    lengths = ends - starts
    masks = np.array([(1 << 8 * used) - 1 for used in range(9)], np.uint64)
    hashes = eights[starts]
    hashes &= masks[np.minimum(lengths, 8)]
    _mix_word(hashes)
    longer, position = np.flatnonzero(lengths > 8), 8
    longest = longer[lengths[longer] > _LONG_WORD]
    while len(longer) and position < _LONG_WORD:
        starts_here, rest = starts[longer] + position, lengths[longer] - position
        more = hashes[longer] + (eights[starts_here] & masks[np.minimum(rest, 8)])
        _mix_word(more)
        hashes[longer] = more
        position += 8
        longer = longer[rest > 8]
    for word in longest:  # such as encoded images: not a round for every eight bytes
        digest = hashlib.blake2b(plain[starts[word] : ends[word]].tobytes(), digest_size=8).digest()
        hashes[word] = int.from_bytes(digest, "little")
    return hashes


def _mix_word(values: np.ndarray) -> None:
    values *= MULTIPLIER
    values ^= values >> _SHIFT
    values *= _MIX_1


@functools.cache
def _ascii(punctuation: bool) -> bytes:
    """Table of bytes: capital letters become small, what separates words becomes a space; others stay."""
    kinds = np.frombuffer(alphabet.KINDS.ascii, np.uint8)[:128]
    small = np.frombuffer(bytes(range(256)).lower(), np.uint8).copy()
    small[:128][_separates(kinds, punctuation)] = 32
    return small.tobytes()


def _separates(kinds: np.ndarray, punctuation: bool) -> np.ndarray:
    return (kinds & alphabet.SPACE) != 0 if punctuation else (kinds & alphabet.WORD) == 0


@functools.cache
def _small() -> np.ndarray:
    """Every code point without letter case where that is as long in UTF-8, else itself."""
    points = np.arange(len(alphabet.KINDS.all), dtype=np.uint32)
    for point in (point for point in range(0x80, len(points)) if not 0xD800 <= point < 0xE000):
        character = chr(point)
        lower = character.lower()
        if len(lower) == 1 and len(lower.encode()) == len(character.encode()):
            points[point] = ord(lower)
    return points


def _beyond_ascii(plain: np.ndarray, punctuation: bool) -> tuple[np.ndarray, np.ndarray]:
    """The bytes with characters beyond ASCII without letter case, separators as spaces; and where words must start."""
    plain = plain.copy()
    found = alphabet.Beyond.of(plain)
    last = len(alphabet.KINDS.all) - 1  # of all unknown characters
    points = np.minimum(found.points, last)
    kinds, small = alphabet.KINDS.all[points], _small()[points]
    separates = _separates(kinds, punctuation)
    alone = ~separates & ((kinds & alphabet.IDEOGRAPH) != 0)
    changed = (small != points) & (points < last)
    for size in (2, 3, 4):
        here = found.sizes == size
        separators = found.positions[here & separates]
        capitals, values = found.positions[here & changed], small[here & changed]
        for i in reversed(range(size)):
            plain[separators + i] = 32
            mark = 0x80 if i else (0xFF00 >> size) & 0xFF
            plain[capitals + i] = mark | (values & np.uint32(0x3F if i else 0x7F >> size))
            values = values >> np.uint32(6)
    edges = [found.positions[alone], found.positions[alone] + found.sizes[alone]]
    return plain, np.concatenate(edges)


assert sys.byteorder == "little", "words are hashed eight bytes at a time, the lowest first"
