"""Words of a whole batch of documents at once, as hashes and places in the text, without a Python object for any.

The same on every machine and in every process.
"""

import dataclasses
import functools
import hashlib

import numpy as np

from data_pipelines.stages import alphabet
from data_pipelines.stages.compiled import compiled
from data_pipelines.stages.texts import Texts

# Odd constants with well mixed bits: Knuth's golden ratio (TAOCP 3, 6.4) and those of MurmurHash3's finaliser.
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_SHIFT = np.uint64(33)

_LONG_WORD = 64
# Of a character: it separates words, it is a word, its code point without letter case.
_SEPARATES, _ALONE, _POINT = 1 << 30, 1 << 29, (1 << 29) - 1


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


def split(texts: Texts, *, punctuation: bool) -> Words:
    """Splits documents into words; letter case never matters.

    Args:
      texts: the documents.
      punctuation: whether punctuation and symbols are part of words, so that only white space separates them;
        otherwise words are runs of letters, marks, digits and underscores. In scripts without spaces every character
        is a word.
    """
    starts, ends, hashes, plain = _split(texts.data, _characters(punctuation))
    for word in np.flatnonzero(ends - starts > _LONG_WORD):  # such as encoded images
        digest = hashlib.blake2b(plain[starts[word] : ends[word]].tobytes(), digest_size=8).digest()
        hashes[word] = int.from_bytes(digest, "little")
    first = np.append(np.searchsorted(starts, texts.starts), len(starts))
    return Words(texts=texts, hashes=hashes, starts=starts, ends=ends, first=first)


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

    That of words 0 to n - 1 is sum_i hashes[i] * C**(n - 1 - i) mod 2**64.
    """
    if len(hashes) < n:
        return np.zeros(0, np.uint64)
    return runs_within(hashes, np.array([0]), np.array([len(hashes)]), n)[0]


def runs_within(hashes: np.ndarray, starts: np.ndarray, ends: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Those of `runs` in each range of words, and how many each has: of fewer words than `n`, all together are one."""
    counts = np.minimum(np.maximum(ends - starts - n + 1, 1), ends - starts)
    return _runs(hashes, starts, ends, n, power(n), int(counts.sum())), counts


@functools.cache
def power(exponent: int) -> np.uint64:
    """The multiplier to some power, mod 2**64."""
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


@compiled
def _split(data: np.ndarray, characters: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Starts, ends and hashes of words in UTF-8 that ends with nine separators, and its bytes without letter case.

    A hash takes in eight bytes at a time, the lowest first, by bijections: sums of hashes times odd numbers have all
    bits of all words in their upper bits.
    """
    edges, plain = np.empty(len(data) + 1, np.int64), np.empty(len(data), np.uint8)
    number, inside, unknown = np.uint64(0), False, len(characters) - 1
    for position in range(len(data)):
        byte = data[position]
        if byte < 0x80:  # no branch for the ends of words, which a processor cannot foretell
            plain[position] = characters[byte]
            edges[number] = position
            number += np.uint64((characters[byte] < _SEPARATES) != inside)
            inside = characters[byte] < _SEPARATES
        elif byte >= 0xC0:
            size = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2
            point = np.int64(byte) & (0x7F >> size)
            for i in range(1, size):
                point = point << 6 | np.int64(data[position + i]) & 0x3F
            character = np.int64(characters[min(point, unknown)])
            word = character < _SEPARATES and not character & _ALONE
            edges[number] = position
            number += np.uint64(word != inside)
            inside = word
            if character & _ALONE:
                edges[number], edges[number + np.uint64(1)] = position, position + size
                number += np.uint64(2)
            small = character & _POINT if point < unknown else point
            for i in range(size - 1, 0, -1):
                plain[position + i] = 0x80 | small & 0x3F
                small >>= 6
            plain[position] = (0xFF00 >> size) & 0xFF | small
    words = np.int64(number) // 2
    starts, ends, hashes = np.empty(words, np.int64), np.empty(words, np.int64), np.empty(words, np.uint64)
    for word in range(words):
        position, end, value = edges[2 * word], edges[2 * word + 1], np.uint64(0)
        starts[word], ends[word] = position, end
        while position < end:
            part = np.uint64(0)
            for i in range(8):
                part |= np.uint64(plain[np.uint64(position + i)]) << np.uint64(8 * i)
            position += 8
            if position > end:
                part = part << np.uint64(8 * (position - end)) >> np.uint64(8 * (position - end))
            value = (value + part) * MULTIPLIER
            value ^= value >> _SHIFT
        hashes[word] = value
    return starts, ends, hashes, plain


@compiled
def _runs(
    hashes: np.ndarray, starts: np.ndarray, ends: np.ndarray, n: int, power: np.uint64, number: int
) -> np.ndarray:
    """`number` hashes of `n` words in a row; `power` is the `n`-th of the multiplier."""
    runs, done = np.empty(number, np.uint64), 0
    for row in range(len(starts)):
        some = hashes[starts[row] : ends[row]]
        size, total = min(n, len(some)), np.uint64(0)
        for i in range(len(some)):
            total = total * MULTIPLIER + some[i]
            if i >= size:
                total -= some[i - size] * power
            if i >= size - 1:
                runs[done] = total
                done += 1
    return runs


@functools.cache
def _characters(punctuation: bool) -> np.ndarray:
    """int32 of each code point: as it is without letter case, where that is as long in UTF-8, and flags."""
    kinds = alphabet.KINDS.all
    points = np.arange(len(kinds), dtype=np.int32)
    for point in (point for point in range(len(points) - 1) if not 0xD800 <= point < 0xE000):
        character = chr(point)
        lower = character.lower()
        if len(lower) == 1 and len(lower.encode()) == len(character.encode()):
            points[point] = ord(lower)
    separates = (kinds & alphabet.SPACE) != 0 if punctuation else (kinds & alphabet.WORD) == 0
    points[separates] |= _SEPARATES
    points[~separates & ((kinds & alphabet.IDEOGRAPH) != 0)] |= _ALONE
    return points
