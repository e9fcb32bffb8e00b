"""Words of a whole batch of documents at once, as hashes and places in the text, without a Python object for any.

The same on every machine and in every process. Speed comes from working on bytes: tables, eight bytes at a time.
"""

import dataclasses
import functools
import hashlib
import sys
import unicodedata

import numpy as np
import pyarrow as pa

# Odd constants with well mixed bits: Knuth's golden ratio (TAOCP 3, 6.4) and those of MurmurHash3's finaliser.
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_SHIFT = np.uint64(33)

# What a character is to words.
_SEPARATES, _JOINS, _ALONE = 0, 1, 2
# Characters of scripts without spaces between words are words by themselves: Thai and Lao, Myanmar, Khmer, kana, Chinese.
_ALONE_RANGES = (
    (0x0E00, 0x0F00), (0x1000, 0x10A0), (0x1780, 0x1800), (0x3040, 0x3100), (0x31F0, 0x3200), (0x3400, 0x4DC0),
    (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x32400),
)  # fmt: skip
_TABLE_END = 0x32400  # no word has characters from here on: private use, tags, unassigned
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
        otherwise words are runs of letters, marks and digits.
    """
    offsets = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    content = np.zeros(0, np.uint8)
    if offsets[-1] > offsets[0]:
        content = np.frombuffer(texts.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
    offsets = offsets - offsets[0]
    plain = np.frombuffer(content.tobytes().translate(_ascii(punctuation)), np.uint8)
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
    eights = np.ndarray((len(plain) + 1,), "<u8", buffer=padded, strides=(1,))
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
    kinds = [_kind(chr(code), punctuation) for code in range(128)]
    ascii_part = [ord(chr(code).lower()) if kind == _JOINS else 32 for code, kind in enumerate(kinds)]
    return bytes([*ascii_part, *range(128, 256)])


def _kind(character: str, punctuation: bool) -> int:
    code = ord(character)
    separates = character.isspace() if punctuation else unicodedata.category(character)[0] not in "LMN"
    if separates:
        return _SEPARATES
    return _ALONE if any(start <= code < end for start, end in _ALONE_RANGES) else _JOINS


@functools.cache
def _tables(punctuation: bool) -> tuple[np.ndarray, np.ndarray]:
    """Kind of every code point, and what it is without letter case where that is as long in UTF-8."""
    kinds = np.zeros(_TABLE_END, np.uint8)
    small = np.arange(_TABLE_END, dtype=np.uint32)
    for code in (code for code in range(0x80, _TABLE_END) if not 0xD800 <= code < 0xE000):
        character = chr(code)
        kinds[code] = _kind(character, punctuation)
        lower = character.lower()
        if lower != character and len(lower) == 1 and len(lower.encode()) == len(character.encode()):
            small[code] = ord(lower)
    return kinds, small


def _beyond_ascii(plain: np.ndarray, punctuation: bool) -> tuple[np.ndarray, np.ndarray]:
    """The bytes with characters beyond ASCII without letter case, separators as spaces; where a word must start."""
    kinds, small = _tables(punctuation)
    plain = plain.copy()
    forced = []
    leads = np.flatnonzero(plain >= 0xC0)
    first = plain[leads]
    for length, low, high in ((2, 0xC0, 0xE0), (3, 0xE0, 0xF0), (4, 0xF0, 0xF8)):
        places = leads[(first >= low) & (first < high)]
        codes = (plain[places] & (0xFF >> (length + 1))).astype(np.uint32)
        for i in range(1, length):
            codes = codes << np.uint32(6) | (plain[places + i] & 0x3F)
        codes = np.minimum(codes, _TABLE_END - 1)  # unassigned, and separates
        kind, lower = kinds[codes], small[codes]
        separators = places[kind == _SEPARATES]
        for i in range(length):
            plain[separators + i] = 32
        changed = places[lower != codes]
        values = lower[lower != codes]
        for i in reversed(range(1, length)):
            plain[changed + i] = 0x80 | (values & np.uint32(0x3F))
            values = values >> np.uint32(6)
        lead_mark = (0xFF00 >> length) & 0xFF
        plain[changed] = lead_mark | values
        alone = places[kind == _ALONE]
        forced += [alone, alone + length]
    return plain, np.concatenate(forced)


assert sys.byteorder == "little", "words are hashed eight bytes at a time, lowest byte first"
