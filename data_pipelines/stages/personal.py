"""Personal data and secrets in texts, found by their form and replaced by what they are."""

import bisect
import ipaddress
import re
import string
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from data_pipelines.stages.compiled import compiled
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
_BEGINNINGS = np.frombuffer(
    b"AKIASIAGPAIDAROAIPANPANVAIzrk_sk_sk-eyJghpghoghughsghrgitglpxoxhf_npmpyp", np.uint8
).reshape(-1, 3)
# Of bytes, for _suspects.
_PART, _ALPHANUMERIC, _HEXADECIMAL, _PUBLIC, _DIGIT, _SPECIAL = 1, 2, 4, 8, 16, 32
_AT, _COLON, _STOP, _SPACE, _HYPHEN, _PLUS, _G = b"@:. -+G"


def _kinds() -> np.ndarray:
    kinds, alphanumeric = np.zeros(256, np.uint8), (string.ascii_letters + string.digits).encode()
    kinds[[*alphanumeric, *b"_-"]] |= _PART
    kinds[[*alphanumeric]] |= _ALPHANUMERIC
    kinds[[*string.hexdigits.encode()]] |= _HEXADECIMAL
    kinds[[*b"23Ff"]] |= _PUBLIC
    kinds[[*string.digits.encode()]] |= _DIGIT | _SPECIAL
    kinds[[_AT, _COLON]] |= _SPECIAL
    return kinds


_KINDS = _kinds()
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
# What is looked for in a word, and a part that all of it has.
_IN_WORDS = (
    ("secret", _TOKEN, b""),
    ("secret", _LOGIN, b"://"),
    ("email", _EMAIL, b"@"),
    ("ip", _IPV4, b"."),
    ("ip", _IPV6, b":"),
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
    for kind, pattern, part in _IN_WORDS:
        if kind not in config.kinds or part not in word:
            continue
        for found in pattern.finditer(word):
            end = found.end()
            if kind == "ip":
                end -= found.group().endswith(b":") and not found.group().endswith(b"::")
                if not _is_address(word[found.start() : end], public_only=config.public_ips_only):
                    continue
            yield found.start(), end, kind


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
    raw, words, lines = texts.raw, texts.words("whitespace"), texts.lines
    if "secret" in config.kinds:
        yield from _private_keys(texts)
    in_words, in_lines = _suspects(texts.data)
    for word in np.unique(words.starts.searchsorted(in_words, side="right") - 1).tolist():
        start, end = int(words.starts[word]), int(words.ends[word])
        for a, b, kind in _in_word(config, raw[start:end]):
            yield start + a, start + b, kind
    for line in np.unique(lines.ends.searchsorted(in_lines)).tolist():
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


@compiled
def _suspects(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions in words where a secret or address may be, and in lines where a card or telephone number may be.

    In words: sixteen letters, digits, _ and - in a row that begin like a token; @ between what is no white space and a
    letter or digit; a colon after a group of an IPv6 address; four numbers with full stops between them. In lines: the
    end of a North American number, or the first groups of a card's, which are 3 or 4 digits, a separator, 4 or more;
    a number after +, and one of 13 digits.
    """
    in_words, in_lines = np.empty(len(data), np.int64), np.empty(len(data), np.int64)
    words = lines = row = end = before = dotted = 0
    for at in range(1, len(data) - 1):
        byte = data[at]
        kind = _KINDS[byte]
        row = (row + 1) * (kind & _PART)
        if row == 16 and _begins_token(data, at - 15):
            in_words[words] = at
            words += 1
        if not kind & _SPECIAL:
            continue
        if byte == _AT:
            found = data[at - 1] > 32 and _KINDS[data[at + 1]] & _ALPHANUMERIC != 0
        elif byte == _COLON:
            group = _KINDS[data[at - 3]] & _KINDS[data[at - 2]] & _KINDS[data[at - 1]]
            found = at > 4 and _KINDS[data[at - 4]] & _PUBLIC != 0 and group & _HEXADECIMAL != 0
        elif at < end:  # in a number
            found = False
        else:
            separator, joined, size = data[at - 1], at == end + 1, 1  # to the number before
            while _KINDS[data[at + size]] & _DIGIT:
                size += 1
            dotted = dotted + 1 if joined and separator == _STOP else 0
            found = dotted >= 3
            joined &= separator in (_STOP, _SPACE, _HYPHEN)
            if separator == _PLUS or size >= 13 or (joined and 3 <= before <= 4 <= size):
                in_lines[lines] = at
                lines += 1
            before, end = size, at + size
        in_words[words] = at
        words += found
    return in_words[:words], in_lines[:lines]


@compiled
def _begins_token(data: np.ndarray, start: int) -> bool:
    found = data[start - 1] == _STOP and data[start - 2] == _G
    for beginning in _BEGINNINGS:
        found |= data[start] == beginning[0] and data[start + 1] == beginning[1] and data[start + 2] == beginning[2]
    return found
