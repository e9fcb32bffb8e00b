"""Web archives: which records are pages, what their text is, and that damage costs the record that it is in."""

import gzip
import sys

import pytest
import zstandard
from archives import answer, packed, page, record
from resiliparse.parse.html.exception import HTMLParserException

from data_pipelines.documents import Document
from data_pipelines.readers.inputs import list_inputs
from data_pipelines.readers.items import Reject, Skip
from data_pipelines.readers.sources import read_documents
from slmjax.config import FilesSourceConfig, WarcSourceConfig

COMPRESSIONS = ["", ".gz", ".zst"]


def read(*paths, **fields) -> tuple[list[Document], list[Reject], list[str]]:
    source = WarcSourceConfig(paths=tuple(map(str, paths)), **fields)
    items = [item for file in list_inputs(source) for item in read_documents(source, file, lambda text: text)]
    return (
        [item for item in items if isinstance(item, Document)],
        [item for item in items if isinstance(item, Reject)],
        [item.reason for item in items if isinstance(item, Skip)],
    )


def read_records(path, *records: bytes, **fields):
    path.write_bytes(b"".join(records))
    return read(path, **fields)


def text_of(tmp_path, block: bytes, **fields) -> str:
    documents, rejects, _ = read_records(tmp_path / "a.warc", record(block), **fields)
    assert not rejects
    return documents[0].text


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_pages_are_documents_and_all_else_is_counted(tmp_path, compression):
    records = [
        record(b"software: test", kind="warcinfo", content_type="application/warc-fields"),
        record(b"GET / HTTP/1.1\r\n\r\n", kind="request"),
        page(1),
        record(answer(b"\x89PNG", "image/png")),
        record(answer(b"<p>gone", status="404 Not Found")),
        record(answer(b"plain words", "text/plain")),
        record(answer(b"%PDF", "application/pdf")),
        record(b"", kind="revisit"),
        record(answer(b"<script>only()</script>")),
        record(b"converted words", kind="conversion", content_type="text/plain"),
        record(b"x", kind="odd"),
        record(answer(b"x", "nonsense")),
    ]
    path = tmp_path / f"a.warc{compression}"
    path.write_bytes(packed(records, compression))
    documents, rejects, skipped = read(path)
    assert not rejects
    assert [d.id for d in documents] == [f"web/a.warc{compression}#{number}" for number in (3, 6, 10)]
    assert documents[0].text.startswith("Text of page 1 café word1x0")
    assert [d.text for d in documents[1:]] == ["plain words", "converted words"]
    assert documents[0].key == "http://example.org/1"
    assert sorted(skipped) == [
        "content_type_application",
        "content_type_image",
        "content_type_unknown",
        "http_status",
        "page_without_text",
        "record_type_request",
        "record_type_revisit",
        "record_type_unknown",
        "record_type_warcinfo",
    ]


def test_main_content_or_all_that_a_page_shows(tmp_path):
    (tmp_path / "a.warc").write_bytes(page(1))
    assert "Menu" not in read(tmp_path)[0][0].text
    assert "Menu" in read(tmp_path, main_content=False)[0][0].text


def test_addresses_as_ids(tmp_path):
    (tmp_path / "a.warc").write_bytes(page(1) + page(2))
    assert [d.id for d in read(tmp_path, url_ids=True)[0]] == ["web/http://example.org/1", "web/http://example.org/2"]


@pytest.mark.parametrize(
    ("encoding", "content_type", "meta"),
    [
        ("utf-8", "text/html", ""),
        ("utf-8", "text/html; charset=utf-8", ""),
        ("shift_jis", "text/html; charset=Shift_JIS", ""),
        ("koi8-r", "text/html", "<meta charset=koi8-r>"),
        ("utf-16", "text/html", ""),
        ("utf-8-sig", "text/html; charset=iso-8859-1", ""),
        ("cp1251", "text/html; charset=no-such", "<meta charset=windows-1251>"),
    ],
)
def test_encodings(tmp_path, encoding, content_type, meta):
    words = (
        "日本語のテキストがここにあります。" if encoding == "shift_jis" else "Привет, это обычный русский текст." * 3
    )
    body = f"<html><head>{meta}</head><body><main><p>{words}</p></main></body></html>".encode(encoding)
    assert text_of(tmp_path, answer(body, content_type)) == words


def test_bytes_that_are_in_no_encoding_are_still_a_text(tmp_path):
    text = text_of(tmp_path, answer(b"caf\xe9 \x81 ok, " + "naïve".encode(), "text/plain; charset=utf-8"))
    assert "ok, " in text


def test_transfer_encodings(tmp_path):
    body = b"<main><p>Some words.</p></main>"
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    assert text_of(tmp_path, answer(chunks, Transfer_Encoding="chunked")) == "Some words."
    assert text_of(tmp_path, answer(gzip.compress(body), Content_Encoding="gzip")) == "Some words."
    for content, header in ((b"zz\r\nhello", "Transfer_Encoding"), (body, "Content_Encoding")):
        value = {"Transfer_Encoding": "chunked", "Content_Encoding": "gzip"}[header]
        _, rejects, _ = read_records(tmp_path / "a.warc", record(answer(content, **{header: value})), page(2))
        assert [(r.record, r.reason, r.offset) for r in rejects] == [(1, "damaged_http", 0)]


def test_a_small_answer_that_unpacks_to_a_large_one_is_too_long(tmp_path):
    bomb = answer(gzip.compress(b"<p>" + b"x" * 10_000_000), Content_Encoding="gzip")
    _, rejects, _ = read_records(tmp_path / "a.warc", record(bomb), max_record_bytes=100_000)
    assert [r.reason for r in rejects] == ["too_long"]


@pytest.mark.parametrize("deep", [b"<div>" * 5000 + b"x", b"<DIV>" * 500 + b"<p>x</p>" * 10_000])
def test_markup_that_is_nested_too_deeply_is_rejected(tmp_path, deep):
    documents, rejects, _ = read_records(tmp_path / "a.warc", record(answer(deep)), page(2))
    assert [(r.record, r.reason) for r in rejects] == [(1, "too_deep")]
    assert len(documents) == 1
    assert text_of(tmp_path, answer(deep), main_content=False).startswith("x")
    closed = b"<div>x</div>" * 10_000 + b"<div>" * 300 + b"</div>" * 300
    assert text_of(tmp_path, answer(b"<main>" + closed)).startswith("x")


def test_markup_that_cannot_be_parsed_is_rejected(tmp_path, monkeypatch):
    def fail(text, **options):
        raise HTMLParserException("no tree")

    monkeypatch.setattr("resiliparse.extract.html2text.extract_plain_text", fail)
    documents, rejects, _ = read_records(tmp_path / "a.warc", page(1))
    assert not documents
    assert [(r.record, r.reason, r.detail, r.excerpt) for r in rejects] == [
        (1, "damaged_html", "no tree", "http://example.org/1")
    ]


DAMAGE = {
    "wrong_length": page(2, length=10),
    "truncated_warc": page(2, length=10**9),
    "damaged_warc": page(2, length="many"),
    "too_long": record(answer(b"x" * 200_000), url="http://example.org/long"),
    "damaged_http": record(b"no answer of a server"),
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("reason", DAMAGE)
def test_reading_goes_on_after_a_damaged_record(tmp_path, compression, reason):
    good = packed([page(0), page(1)], compression)
    (tmp_path / f"a.warc{compression}").write_bytes(
        good + packed([DAMAGE[reason]], compression) + packed([page(3), page(4)], compression)
    )
    documents, rejects, _ = read(tmp_path, max_record_bytes=100_000 if reason == "too_long" else 2 << 30)
    assert [d.text.split()[3] for d in documents] == ["0", "1", "3", "4"]
    assert [(r.record, r.reason, r.offset) for r in rejects] == [(3, reason, len(good))]
    assert rejects[0].excerpt or reason == "damaged_http"


@pytest.mark.parametrize("length", [-1, 30, 600])
def test_a_length_that_swallows_other_records_costs_one_only(tmp_path, length):
    records = [page(0), page(1), page(2), page(3)]
    block = len(records[1]) - records[1].index(b"HTTP") - 4
    records[1] = page(1, length=block + length)
    documents, rejects, _ = read_records(tmp_path / "a.warc", *records)
    assert [d.text.split()[3] for d in documents] == ["0", "2", "3"]
    assert [(r.record, r.reason, r.offset) for r in rejects] == [(2, "wrong_length", len(records[0]))]


def test_garbage_between_records(tmp_path):
    documents, rejects, _ = read_records(tmp_path / "a.warc", page(0), b"not a record\r\n" * 9, page(1))
    assert len(documents) == 2
    assert [(r.record, r.reason, r.offset) for r in rejects] == [(2, "damaged_warc", len(page(0)))]


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_damaged_stream_costs_what_is_in_it(tmp_path, compression):
    first, second, third = (packed([page(i)], compression) for i in range(3))
    broken = second[:30] + bytes([byte ^ 0xFF for byte in second[30:60]]) + second[60:]
    (tmp_path / f"a.warc{compression}").write_bytes(first + broken + third)
    documents, rejects, _ = read(tmp_path)
    assert [d.text.split()[3] for d in documents] == ["0", "2"]
    assert [r.offset for r in rejects] == [len(first)]
    (tmp_path / f"a.warc{compression}").write_bytes(first + second[:-20])
    documents, rejects, _ = read(tmp_path)
    assert len(documents) == 1
    assert [(r.record, r.reason, r.offset) for r in rejects] == [(2, "truncated_compression", len(first))]


def test_one_stream_of_several_records(tmp_path):
    (tmp_path / "a.warc.gz").write_bytes(gzip.compress(page(0) + page(1) + page(2, length="?") + page(3)) + b"")
    documents, rejects, _ = read(tmp_path)
    assert len(documents) == 2
    assert [(r.record, r.reason, r.offset) for r in rejects] == [(3, "damaged_warc", 0)]


@pytest.mark.parametrize("packed_dictionary", [False, True])
def test_a_zstandard_dictionary_in_the_first_frame(tmp_path, packed_dictionary):
    samples = [page(i) for i in range(200)]
    dictionary = zstandard.train_dictionary(2000, samples)
    content = dictionary.as_bytes()
    content = zstandard.compress(content) if packed_dictionary else content
    frame = (0x184D2A5D).to_bytes(4, "little") + len(content).to_bytes(4, "little") + content
    compressor = zstandard.ZstdCompressor(dict_data=dictionary)
    (tmp_path / "a.warc.zst").write_bytes(frame + b"".join(map(compressor.compress, samples[:3])))
    documents, rejects, _ = read(tmp_path)
    assert len(documents) == 3
    assert not rejects


def test_truncated_and_empty_archives_and_other_files(tmp_path):
    _, rejects, _ = read_records(tmp_path / "a.warc", page(0), page(1)[:-100])
    assert [(r.record, r.reason) for r in rejects] == [(2, "truncated_warc")]
    for content in (b"", b"\r\n\r\n"):
        assert [r.reason for r in read_records(tmp_path / "a.warc", content)[1]] == ["empty_file"]
    (tmp_path / "b.txt").write_text("x")
    assert [r.reason for r in read(tmp_path)[1]] == ["empty_file", "unsupported_extension"]
    assert [r.reason for r in read(tmp_path / "b.txt", format="warc")[1]] == ["damaged_warc"]


def test_other_sources_name_the_source_that_reads_archives(tmp_path):
    (tmp_path / "a.warc.gz").write_bytes(packed([page(0)], ".gz"))
    source = FilesSourceConfig(paths=(str(tmp_path),))
    (reject,) = read_documents(source, list_inputs(source)[0], str)
    assert isinstance(reject, Reject)
    assert reject.detail == "WarcSourceConfig reads web archives"


def test_an_absent_package_is_named_before_anything_is_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastwarc", None)
    with pytest.raises(ValueError, match=r"WarcSourceConfig needs .* pip install -e '.\[warc\]' -c constraints.txt"):
        list_inputs(WarcSourceConfig(paths=("nowhere",)))
