"""Personal data and secrets in texts, found by their form and replaced by what they are."""

import bisect
import ipaddress
import re
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from data_pipelines.stages import alphabet
from data_pipelines.stages.ranges import Ranges
from data_pipelines.stages.texts import Texts
from slmjax.config.filters import MaskPersonalDataConfig

# Where several overlap, the first of these wins.
_PLACEHOLDERS: dict[str, bytes] = {
    "secret": b"<SECRET>",
    "email": b"<EMAIL>",
    "ip": b"<IP>",
    "card": b"<CARD>",
    "phone": b"<PHONE>",
}

_TOKEN = re.compile(
    rb"(?<![A-Za-z0-9_\x80-\xff-])(?:"
    rb"(?:AKIA|ASIA|AGPA|AIDA|AROA|AIPA|ANPA|ANVA)[A-Z0-9]{16}"  # Amazon Web Services
    rb"|gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{22,255}|glpat-[A-Za-z0-9_-]{20,}"
    rb"|xox[abeoprs]-[A-Za-z0-9-]{15,}"  # Slack
    rb"|[rs]k_(?:live|test)_[A-Za-z0-9]{16,}"  # Stripe
    rb"|AIza[A-Za-z0-9_-]{35}"  # Google
    rb"|sk-(?:ant-|proj-)?(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{20,}"  # OpenAI, Anthropic
    rb"|hf_[A-Za-z0-9]{30,}|npm_[A-Za-z0-9]{36}|pypi-AgEI[A-Za-z0-9_-]{50,}"
    rb"|SG\.[A-Za-z0-9_-]{16,32}\.[A-Za-z0-9_-]{16,64}"  # SendGrid
    rb"|eyJ[A-Za-z0-9_-]{13,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"  # JSON web token
    rb")(?![A-Za-z0-9_\x80-\xff-])"
)
# The first three bytes of all but SendGrid's.
_BEGINNINGS = np.array(
    [
        int.from_bytes(beginning, "big")
        for beginning in (
            *(b"AKI", b"ASI", b"AGP", b"AID", b"ARO", b"AIP", b"ANP", b"ANV", b"AIz", b"rk_", b"sk_", b"sk-", b"eyJ"),
            *(b"ghp", b"gho", b"ghu", b"ghs", b"ghr", b"git", b"glp", b"xox", b"hf_", b"npm", b"pyp"),
        )
    ],
    np.uint32,
)
_LOGIN = re.compile(rb"""(?<=://)[^\s:/@<>"'`]{1,64}:[^\s/@<>"'`]{1,64}(?=@[A-Za-z0-9])""")
_PRIVATE_KEY = re.compile(
    rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----.{0,20000}?"
    rb"-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----",
    re.DOTALL,
)
_LOCAL = rb"A-Za-z0-9._%+-"
_EMAIL = re.compile(
    rb"(?<![A-Za-z0-9\x80-\xff])[A-Za-z0-9][" + _LOCAL + rb"]{0,63}@"
    rb"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![A-Za-z0-9\x80-\xff])"
)
_OCTET = rb"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = re.compile(
    rb"(?<![A-Za-z0-9_.\x80-\xff-])(?:" + _OCTET + rb"\.){3}" + _OCTET + rb"(?![A-Za-z0-9_\x80-\xff-]|\.[0-9])"
)
# The addresses that are given to anyone start with 2 or 3, those of private and local networks with f.
_IPV6 = re.compile(
    rb"(?<![A-Za-z0-9_.:\x80-\xff-])[23Ff][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,}(?![A-Za-z0-9_\x80-\xff-])", re.ASCII
)
_CARD = re.compile(
    rb"(?<![A-Za-z0-9_.+\x80-\xff-])(?:[0-9]{13,19}|[0-9]{4}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{4}(?:\1[0-9]{3})?"
    rb"|3[47][0-9]{2}([ -])[0-9]{6}\2[0-9]{5})(?![A-Za-z0-9_\x80-\xff-]|[.,][0-9])"
)
_PHONE = re.compile(
    rb"(?<![A-Za-z0-9_.+\x80-\xff-])(?:"
    rb"\+[1-9][0-9]{0,2}[ .-]?(?:\([0-9]{1,4}\)[ .-]?)?(?:[0-9][ .-]?){5,12}[0-9]"
    rb"|(?:1[ .-])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[ .-])[2-9][0-9]{2}[ .-][0-9]{4}"
    rb")(?![A-Za-z0-9_\x80-\xff-]|\.[0-9])"
)
# First digits and lengths of the cards of American Express, Diners, Discover, JCB, Maestro, Mastercard and Visa.
_ISSUERS = re.compile(
    r"3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}|6(?:011|5\d\d|4[4-9]\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}"
    r"|(?:5018|5020|5038|6304|6759|676[1-3])\d{8,15}"
    r"|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|4\d{12}(?:\d{3}){0,2}"
)

Span = tuple[int, int, str]


def mask(config: MaskPersonalDataConfig, texts: Texts) -> tuple[Texts, dict[str, pa.Array]]:
    """Returns the texts with placeholders, and how many of each kind there are in each."""
    spans = _first_of_overlapping(_find(config, texts))
    counts: dict[str, np.ndarray] = {kind: np.zeros(len(texts), np.int64) for kind in config.kinds}
    documents = texts.starts.searchsorted([start for start, _, _ in spans], side="right") - 1
    for document, (_, _, kind) in zip(documents.tolist(), spans, strict=True):
        counts[kind][document] += 1
    changed = texts.replaced([(start, end, _PLACEHOLDERS[kind]) for start, end, kind in spans])
    return changed, {f"masked_{kind}": pa.array(number) for kind, number in counts.items()}


def find_plainly(config: MaskPersonalDataConfig, text: str) -> list[Span]:
    """The same as `mask` finds, in the bytes of one text, by looking at every word and every line."""
    spans: list[Span] = []
    content = text.encode()
    if "secret" in config.kinds:
        spans += [(found.start(), found.end(), "secret") for found in _PRIVATE_KEY.finditer(content)]
    for found in re.finditer(r"\S+", text):
        start = len(text[: found.start()].encode())
        spans += [(start + a, start + b, kind) for a, b, kind in _in_word(config, found.group().encode())]
    start = 0
    for line in content.split(b"\n"):
        spans += [(start + a, start + b, kind) for a, b, kind in _in_line(config, line)]
        start += len(line) + 1
    return _first_of_overlapping(spans)


def _in_word(config: MaskPersonalDataConfig, word: bytes) -> Iterator[Span]:
    if "secret" in config.kinds:
        for pattern in (_TOKEN, _LOGIN):
            yield from ((found.start(), found.end(), "secret") for found in pattern.finditer(word))
    if "email" in config.kinds and b"@" in word:
        yield from ((found.start(), found.end(), "email") for found in _EMAIL.finditer(word))
    if "ip" in config.kinds:
        for pattern in (_IPV4, _IPV6):
            for found in pattern.finditer(word):
                end = found.end() - (found.group().endswith(b":") and not found.group().endswith(b"::"))
                if _is_address(word[found.start() : end], public_only=config.public_ips_only):
                    yield found.start(), end, "ip"


def _in_line(config: MaskPersonalDataConfig, line: bytes) -> Iterator[Span]:
    if "card" in config.kinds:
        for found in _CARD.finditer(line):
            if _is_card(found.group().translate(None, b" -").decode()):
                yield found.start(), found.end(), "card"
    if "phone" in config.kinds:
        for found in _PHONE.finditer(line):
            if _is_phone(found.group()):
                yield found.start(), found.end(), "phone"


def _is_address(address: bytes, *, public_only: bool) -> bool:
    try:
        found = ipaddress.ip_address(address.decode())
    except ValueError:
        return False
    return found.is_global or not public_only


def _is_card(digits: str) -> bool:
    """Whether the digits are an issuer's and their Luhn checksum is right: every second one from the right doubled."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return bool(_ISSUERS.fullmatch(digits)) and (sum(doubled) + sum(map(int, digits[-1::-2]))) % 10 == 0


def _is_phone(number: bytes) -> bool:
    """Of 8 to 15 digits (ITU-T E.164); at least 10 where nothing separates them, since +12345678 may be a number."""
    digits = sum(48 <= byte <= 57 for byte in number)
    separated = len(number) > digits + number.startswith(b"+")
    return (8 if separated else 10) <= digits <= 15


def _first_of_overlapping(spans: Iterable[Span]) -> list[Span]:
    """Those that overlap none of a kind that comes first, in the order of the text."""
    chosen: list[Span] = []
    kinds = list(_PLACEHOLDERS)
    for span in sorted(spans, key=lambda span: (kinds.index(span[2]), span[0], span[1])):
        at = bisect.bisect_left(chosen, span)
        before = at == 0 or chosen[at - 1][1] <= span[0]
        after = at == len(chosen) or chosen[at][0] >= span[1]
        if before and after:
            chosen.insert(at, span)
    return chosen


def _find(config: MaskPersonalDataConfig, texts: Texts) -> Iterator[Span]:
    """Looks at the words and lines in which there may be something, in the positions of the batch."""
    raw, words, kinds = texts.raw, texts.words("whitespace"), set(config.kinds)
    suspects = np.zeros(len(words), bool)
    if "secret" in kinds:
        yield from _private_keys(texts)
        suspects[_words_at(words, _with_tokens(texts))] = True
    if kinds & {"secret", "email"}:
        suspects[_words_at(words, _addressed(texts))] = True
    if "ip" in kinds:
        suspects[_words_at(words, _with_addresses(texts))] = True
    for word in np.flatnonzero(suspects).tolist():
        start, end = int(words.starts[word]), int(words.ends[word])
        for a, b, kind in _in_word(config, raw[start:end]):
            yield start + a, start + b, kind
    if kinds & {"card", "phone"}:
        lines = texts.lines
        for line in np.unique(lines.ends.searchsorted(_with_numbers(texts))).tolist():
            start, end = int(lines.starts[line]), int(lines.ends[line])
            for a, b, kind in _in_line(config, raw[start:end]):
                yield start + a, start + b, kind


def _private_keys(texts: Texts) -> Iterator[Span]:
    resume = at = texts.raw.find(b"PRIVATE KEY")
    while at >= 0:
        document = int(texts.starts.searchsorted(at, side="right")) - 1
        start = texts.raw.rfind(b"-----BEGIN ", max(int(texts.starts[document]), at - 40), at)
        found = _PRIVATE_KEY.match(texts.raw, start, int(texts.ends[document])) if start >= 0 else None
        resume = at + 1
        if found:
            yield found.start(), found.end(), "secret"
            resume = found.end()
        at = texts.raw.find(b"PRIVATE KEY", resume)


def _words_at(words: Ranges, positions: np.ndarray) -> np.ndarray:
    """Index of the word that holds each position."""
    return words.index(positions + 1) - 1


def _addressed(texts: Texts) -> np.ndarray:
    """Where @ stands between what is no white space and a letter or digit."""
    at = np.flatnonzero(texts.data == ord("@"))
    before = (texts.kinds[at - 1] & alphabet.SPACE) == 0
    after = texts.data[at + 1]
    return at[before & (after < 128) & ((texts.kinds[at + 1] & (alphabet.LETTER | alphabet.DIGIT)) != 0)]


def _with_tokens(texts: Texts) -> np.ndarray:
    """Where sixteen letters, digits, _ and - in a row begin like a token."""
    part = (texts.kinds & alphabet.WORD) != 0
    part |= texts.data == ord("-")
    row = part[1:-1] & part[2:]
    for size in (2, 4, 8):
        row = row[:-size] & row[size:]
    row &= ~part[: len(row)]
    at = np.flatnonzero(row) + 1
    data = texts.data
    first, second, third = (data[at + i].astype(np.uint32) for i in range(3))
    after_dot = at[(data[at - 1] == ord(".")) & (data[at - 2] == ord("G"))]
    return np.concatenate([at[np.isin((first << 16) | (second << 8) | third, _BEGINNINGS)], after_dot])


def _with_addresses(texts: Texts) -> np.ndarray:
    """Where four numbers have full stops between them, or a colon follows a group of an IPv6 address."""
    data, (starts, ends) = texts.data, texts.digits
    joined = (starts[1:] == ends[:-1] + 1) & (data[ends[:-1]] == ord("."))
    numbers = starts[:-3][joined[:-2] & joined[1:-1] & joined[2:]] if len(starts) > 3 else starts[:0]
    colons = np.flatnonzero(data == ord(":"))
    colons = colons[colons > 4]
    for before in (1, 2, 3, 4):
        lower = data[colons - before] | 0x20
        hexadecimal = ((lower - np.uint8(48)) < 10) | ((lower - np.uint8(97)) < 6)
        colons = colons[hexadecimal]
    first = data[colons - 4] | 0x20
    return np.concatenate([numbers, colons[(first == ord("2")) | (first == ord("3")) | (first == ord("f"))]])


def _with_numbers(texts: Texts) -> np.ndarray:
    """Positions in the lines where a telephone or card number may be."""
    data, (starts, ends) = texts.data, texts.digits
    sizes = ends - starts
    # The end of a North American number, or the first groups of a card's: 3 or 4 digits, a separator, 4 or more.
    separator = data[ends[:-1]]
    joined = (starts[1:] == ends[:-1] + 1) & (
        (separator == ord(" ")) | (separator == ord("-")) | (separator == ord("."))
    )
    groups = joined & ((sizes[:-1] == 3) | (sizes[:-1] == 4)) & (sizes[1:] >= 4)
    return np.concatenate([starts[:-1][groups], starts[data[starts - 1] == ord("+")], starts[sizes >= 13]])
