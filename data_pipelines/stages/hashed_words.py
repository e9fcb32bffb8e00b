"""Words of a whole batch of documents at once, as hashes and places in the text, without a Python object for any.

The same on every machine and in every process. Speed comes from working on bytes: tables, eight bytes at a time.
"""

import dataclasses
import functools
import hashlib
import sys

import numpy as np

from data_pipelines.stages import alphabet
from data_pipelines.stages.texts import Texts

# Odd constants with well mixed bits: Knuth's golden ratio (TAOCP 3, 6.4) and those of MurmurHash3's finaliser.
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_SHIFT = np.uint64(33)

_FIRST_BYTES = np.array([(1 << 8 * used) - 1 for used in range(9)], np.uint64)
_LONG_WORD = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words:
    """Of the documents of a batch, one document after the other.

    Attributes:
      texts: the documents.
      hashes: uint64, of each word without letter case.
      starts, ends: of each word in the bytes of `texts`.
      first: index of the first word of each document, and the number of words.
    """

    texts: Texts
    hashes: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    first: np.ndarray

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


def split(texts: Texts, *, punctuation: bool) -> Words:
    """Splits documents into words; letter case never matters.

    Args:
      texts: the documents.
      punctuation: whether punctuation and symbols are part of words, so that only white space separates them;
        otherwise words are runs of letters, marks, digits and underscores. In scripts without spaces every character
        is a word.
    """
    plain = np.frombuffer(texts.raw.translate(_ascii(punctuation)), np.uint8)
    touching = np.zeros(0, np.int64)
    if texts.beyond is not None:
        plain, alone = _beyond_ascii(plain, texts.beyond, punctuation)
        # Where one word ends and the next starts without a separator.
        touching = np.unique(alone[(plain[alone] != 32) & (plain[alone - 1] != 32)])
    inside = plain != 32  # the text begins and ends with separators
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    starts, ends = edges[::2].copy(), edges[1::2].copy()
    if len(touching):
        starts, ends = np.sort(np.concatenate([starts, touching])), np.sort(np.concatenate([ends, touching]))
    first = np.append(np.searchsorted(starts, texts.starts), len(starts))
    return Words(texts=texts, hashes=_hashes(plain, starts, ends), starts=starts, ends=ends, first=first)


@functools.lru_cache(maxsize=1)
def of(texts: Texts) -> Words:
    """Words without punctuation; those of the last texts are kept, since several stages want them."""
    return split(texts, punctuation=False)


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 after which every bit depends on all (Appleby's MurmurHash3 finaliser)."""
    values = values ^ (values >> _SHIFT)
    values *= _MIX_1
    values ^= values >> _SHIFT
    values *= _MIX_2
    values ^= values >> _SHIFT
    return values


def runs(hashes: np.ndarray, n: int) -> np.ndarray:
    """Hash of every `n` words in a row, from those of the words; it depends on their order. Use its upper bits.

    That of words 0 to n - 1 is sum_i hashes[i] * C**(n - 1 - i) mod 2**64. Runs double in length, so that the cost is
    that of log2(n) steps.
    """
    if len(hashes) < n:
        return np.zeros(0, np.uint64)
    total, covered = None, 0  # of the words from the last bit of n up
    doubled, length = hashes, 1
    for bit in range(n.bit_length()):
        if n >> bit & 1:
            if total is None:
                total, covered = doubled, length
            else:  # `length` words, then the `covered` ones
                count = len(hashes) - length - covered + 1
                joined = doubled[:count] * _power(covered)
                joined += total[length : length + count]
                total, covered = joined, length + covered
        if n >> (bit + 1):
            twice = doubled[:-length] * _power(length)
            twice += doubled[length:]
            doubled, length = twice, 2 * length
    assert total is not None
    return total


@functools.cache
def _power(exponent: int) -> np.uint64:
    return np.uint64(pow(int(MULTIPLIER), exponent, 1 << 64))


def runs_at(hashes: np.ndarray, starts: np.ndarray, n: int) -> np.ndarray:
    """Those of `runs` that start at some words."""
    total = hashes[starts]
    for i in range(1, n):
        total = total * MULTIPLIER + hashes[starts + i]
    return total


def run_starts(first: np.ndarray, n: int) -> np.ndarray:
    """Index of the first word of every `n` words in a row that lie in one document."""
    inside = np.ones(int(first[-1]), bool)
    counts = np.diff(first)
    for back in range(1, min(n, int(counts.max(initial=0)) + 1)):
        inside[first[1:][counts >= back] - back] = False
    return np.flatnonzero(inside)


def _hashes(plain: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Hash of the bytes [start, end) for each word; no byte is zero, and eight or more follow the last word."""
    eights = np.ndarray((len(plain) - 7,), "<u8", buffer=plain, strides=(1,))  # eight bytes from every place
    lengths = ends - starts
    hashes = eights[starts]
    hashes &= _FIRST_BYTES[np.minimum(lengths, 8)]
    _mix_word(hashes)
    longer = np.flatnonzero(lengths > 8)
    longest = longer[lengths[longer] > _LONG_WORD]
    at, rest, mixed = starts[longer], lengths[longer], hashes[longer]
    for _ in range(8, _LONG_WORD, 8):
        at += 8
        rest -= 8
        mixed += eights[at] & _FIRST_BYTES[np.minimum(rest, 8)]
        _mix_word(mixed)
        hashes[longer] = mixed
        more = rest > 8
        longer, at, rest, mixed = longer[more], at[more], rest[more], mixed[more]
    for word in longest:  # such as encoded images: not a round for every eight bytes
        digest = hashlib.blake2b(plain[starts[word] : ends[word]].tobytes(), digest_size=8).digest()
        hashes[word] = int.from_bytes(digest, "little")
    return hashes


def _mix_word(values: np.ndarray) -> None:
    """A bijection; sums of such values times odd numbers have all bits of all words in their upper bits."""
    values *= MULTIPLIER
    values ^= values >> _SHIFT


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


def _beyond_ascii(plain: np.ndarray, found: alphabet.Beyond, punctuation: bool) -> tuple[np.ndarray, np.ndarray]:
    """The bytes with characters beyond ASCII without letter case, separators as spaces; and where words must start."""
    plain = plain.copy()
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
