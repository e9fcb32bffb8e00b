"""Texts of web pages: from a record of a web archive to the text that people read on the page."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from data_pipelines.readers.archives import ArchiveRecord, read_archive
from data_pipelines.readers.inputs import InputFile
from data_pipelines.readers.items import Reject, Skip, too_long
from slmjax.config import WarcSourceConfig

_TYPES = ("response", "resource", "conversion")
_HTML = ("text/html", "application/xhtml+xml")
_MAIN_TYPES = frozenset(["application", "audio", "font", "image", "message", "model", "multipart", "text", "video"])
_MARKS = {b"\xef\xbb\xbf": "utf-8", b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}
# Finding the main content looks, for every element, at all of these that it is in: it could take minutes.
_NESTED = re.compile(r"<(/?)(?:div|article)\b", re.IGNORECASE)
_DEEP = 30
_MAX_STEPS = 4_000_000  # about a second


class Page(NamedTuple):
    """A page with its text; number and offset as in Reject."""

    number: int
    url: str
    text: str
    offset: int


def read_pages(source: WarcSourceConfig, file: InputFile) -> Iterator[Page | Reject | Skip]:
    """Pages of an archive in order; records that are no page with text are passed over."""
    for item in read_archive(file, _TYPES, source.max_record_bytes):
        yield _page(source, item) if isinstance(item, ArchiveRecord) else item


def _page(source: WarcSourceConfig, item: ArchiveRecord) -> Page | Reject | Skip:
    from fastwarc.warc import WarcRecord

    url = item.header.get("warc-target-uri", "").strip("<>")
    try:
        record = WarcRecord.from_bytes(item.content)
        charset = content_type = None
        if record.is_http:
            record.parse_http(auto_decode="all", quirks_mode=True)
            status = record.http_headers.status_code if record.http_headers else None
            if status is None:
                return Reject(item.number, "damaged_http", "no HTTP status", url, item.offset)
            if status != 200:
                return Skip("http_status")
            content_type, charset = record.http_content_type, record.http_charset
        else:
            content_type, _, parameters = item.header.get("content-type", "").partition(";")
            charset = parameters.partition("charset=")[2].strip("\"' ")
        content_type = (content_type or "").strip().lower()
        if content_type not in (*_HTML, "text/plain"):
            main = content_type.partition("/")[0]
            return Skip(f"content_type_{main if main in _MAIN_TYPES else 'unknown'}")
        content = record.reader.read(source.max_record_bytes + 1) if record.reader else b""
    except (OSError, ValueError) as error:
        return Reject(item.number, "damaged_http", str(error), url, item.offset)
    if len(content) > source.max_record_bytes:  # it was compressed
        return too_long(item.number, url, source.max_record_bytes, item.offset)
    text = _decode(content, charset, html=content_type in _HTML)
    if content_type in _HTML:
        if source.main_content and _steps(text) > _MAX_STEPS:
            return Reject(item.number, "too_deep", "elements nested so deep that it would take long", url, item.offset)
        try:
            text = _extract(text, main_content=source.main_content)
        except ValueError as error:
            return Reject(item.number, "damaged_html", str(error), url, item.offset)
    return Page(item.number, url, text, item.offset)


def _decode(content: bytes, charset: str | None, *, html: bool) -> str:
    """By the mark at the beginning, else as the server or the page says, else by what the bytes look like."""
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), None)
    if encoding is None and charset:
        encoding = map_encoding_to_html5(charset, fallback_utf8=False)
    if encoding is None:
        encoding = detect_encoding(content, from_html_meta=html)
    try:
        return bytes_to_str(content, encoding or "utf-8", errors="replace")
    except LookupError:  # an encoding of browsers that Python does not have
        return bytes_to_str(content, "utf-8", errors="replace")


def _steps(text: str) -> int:
    """About how many steps finding the main content takes for what is nested more than a few elements deep."""
    depth = steps = last = 0
    for mark in _NESTED.finditer(text):
        if depth > _DEEP:
            steps += depth * text.count("<", last, mark.start())
        depth, last = max(depth - 1, 0) if mark[1] else depth + 1, mark.start()
    return steps + (depth * text.count("<", last) if depth > _DEEP else 0)


def _extract(text: str, *, main_content: bool) -> str:
    from resiliparse.extract.html2text import extract_plain_text

    return extract_plain_text(text, main_content=main_content, preserve_formatting=True, alt_texts=False)
