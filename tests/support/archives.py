"""Web archives for tests: records as a crawler writes them, whole or with a length that is wrong."""

import gzip

import zstandard


def answer(
    body: bytes, content_type: str = "text/html; charset=utf-8", status: str = "200 OK", **headers: str
) -> bytes:
    """What a server answered."""
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {content_type}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def record(
    block: bytes,
    *,
    kind: str = "response",
    url: str = "http://example.org/",
    content_type: str = "application/http; msgtype=response",
    length: int | str | None = None,
) -> bytes:
    """A record with `block`; `length` in place of its true one."""
    lines = [
        "WARC/1.0",
        f"WARC-Type: {kind}",
        "WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-000000000000>",
        "WARC-Date: 2026-11-22T00:00:00Z",
        f"WARC-Target-URI: {url}",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(block) if length is None else length}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + block + b"\r\n\r\n"


def page(number: int, **fields) -> bytes:
    """A record with a page of a menu, a paragraph "Text of page <number> …" and advertisements."""
    words = " ".join(f"word{number}x{i}" for i in range(40))
    body = f"<title>T</title><nav><a href=/>Menu</a></nav><main><p>Text of page {number} café {words}.</p></main>"
    return record(answer(body.encode()), url=f"http://example.org/{number}", **fields)


def packed(records: list[bytes], compression: str) -> bytes:
    """An archive; where it is compressed, every record by itself."""
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[compression]
    return b"".join(map(pack, records))
