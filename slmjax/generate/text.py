"""Generated tokens as text for people."""

import re
from collections.abc import Iterable, Iterator, Sequence

from slmjax.data.tokenizer import Tokenizer

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_UNFINISHED = "\ufffd"  # what bytes that are no whole character decode to


def stream_text(pieces: Iterable[Sequence[int]], tokenizer: Tokenizer) -> Iterator[str]:
    """Yields the text of tokens that come in pieces; a character of several byte tokens waits until it is whole."""
    ids: list[int] = []
    shown = 0
    for piece in pieces:
        ids += piece
        text = tokenizer.decode(ids)
        whole = text.rstrip(_UNFINISHED)
        yield whole[shown:]
        shown = max(shown, len(whole))
    yield tokenizer.decode(ids)[shown:]


def printable(text: str) -> str:
    """Returns `text` without control characters, which a terminal would obey."""
    return _CONTROL.sub(_UNFINISHED, text)
