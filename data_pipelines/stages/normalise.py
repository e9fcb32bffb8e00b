r"""Normalisation of a text: \n line ends, no control characters, one Unicode form."""

import re
import unicodedata

from slmjax.config import NormaliseConfig

# C0 without tab and line feed, delete, C1.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def normalise(config: NormaliseConfig | None, text: str) -> str:
    """Returns the text cleaned; applying it again changes nothing."""
    if config is None:
        return text
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if _CONTROL.search(text):
        text = _CONTROL.sub("", text)
    text = text.removeprefix("\ufeff")
    if config.unicode_form is not None and not text.isascii():
        text = unicodedata.normalize(config.unicode_form, text)
    return text
