r"""Normalisation of a text: \n line ends, no control characters, one Unicode form, mojibake repaired where asked."""

import collections
import re
import unicodedata
from collections.abc import Iterator, Sequence

from slmjax.config import NormaliseConfig

# C0 without tab and line feed, and delete.
_CONTROL_BYTES = bytes({*range(32), 127} - {9, 10})
_C1 = re.compile("[\x80-\x9f]")


def check_installed(config: NormaliseConfig | None) -> None:
    """Raises ValueError with the command to run where `ftfy` is wanted and absent."""
    if config is None or not config.repair_mojibake:
        return
    try:
        import ftfy  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "NormaliseConfig.repair_mojibake needs the package ftfy: pip install -e '.[data]' -c constraints.txt, or "
            "set it to False"
        ) from error


def normalise(config: NormaliseConfig | None, text: str, changes: collections.Counter[str] | None = None) -> str:
    """Returns the text cleaned; doing it again changes nothing. `changes` counts texts by what was changed in them."""
    if config is None:
        return text
    for kind, cleaned in _steps(config, text):
        if changes is not None and cleaned is not text and cleaned != text:
            changes[kind] += 1
        text = cleaned
    return text


def normalise_all(config: NormaliseConfig | None, texts: Sequence[str]) -> list[str]:
    """Returns every text cleaned. ASCII is looked through all at once: most often there is nothing to clean."""
    plain = "".join(filter(str.isascii, texts)).encode()
    clean = len(plain.translate(None, _CONTROL_BYTES)) == len(plain)
    return [text if clean and text.isascii() else normalise(config, text) for text in texts]


def _steps(config: NormaliseConfig, text: str) -> Iterator[tuple[str, str]]:
    """Yields the text after each kind of change."""
    if config.repair_mojibake:
        text = _repair(text)
        yield "mojibake", text
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        yield "line_ends", text
    text = _remove_control(text)
    yield "control_characters", text
    if config.unicode_form is not None and not text.isascii():
        yield "unicode_form", unicodedata.normalize(config.unicode_form, text)


def _repair(text: str) -> str:
    """Undoes reading UTF-8 as another encoding, as in "fÃ¼r"."""
    if text.isascii():
        return text
    import ftfy

    return ftfy.fix_encoding(text)


def _remove_control(text: str) -> str:
    content = text.encode()
    left = content.translate(None, _CONTROL_BYTES)  # several times faster than a regular expression
    if len(left) < len(content):
        text = left.decode()
    if b"\xc2" in left and _C1.search(text):
        text = _C1.sub("", text)
    return text.removeprefix("\ufeff")
