"""How fast are the readers on one core?

    python benchmarks/readers.py DOCUMENTS.jsonl.zst --html DIRECTORY --code DIRECTORY [--passes 5]

The documents are written in every format, the HTML files below a directory as a web archive, a record each; the source
tree is read where it is. Times are CPU times of the process, the median of several passes: of reading alone, and of the
pipeline's whole step, which also normalises the texts and writes them as shards.
"""

import argparse
import gzip
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from data_pipelines.documents import Document, write_shards
from data_pipelines.readers.inputs import list_inputs
from data_pipelines.readers.items import Skip
from data_pipelines.readers.sources import read_documents
from data_pipelines.stages.normalise import normalise
from slmjax.config import FilesSourceConfig, NormaliseConfig, SourceTreeConfig, WarcSourceConfig
from slmjax.config.sources import TextSourceConfig


def write_tables(folder: Path, texts: Sequence[str]) -> None:
    lines = b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts)
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines, 6))
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    table = pa.table({"text": texts})
    pq.write_table(table, folder / "a.parquet", compression="zstd", row_group_size=1000)
    with pa.ipc.new_stream(folder / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    (folder / "text").mkdir()
    for number, text in enumerate(texts):
        (folder / "text" / f"{number}.txt").write_text(text, "utf-8")


def write_archive(folder: Path, pages: Sequence[bytes]) -> None:
    plain = io.BytesIO()
    with open(folder / "a.warc.gz", "wb") as packed:
        for number, page in enumerate(pages):
            answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n" % len(page) + page
            header = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://example.org/{number}\r\n"
            header += "WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-000000000000>\r\n"
            header += "WARC-Date: 2026-11-22T00:00:00Z\r\nContent-Type: application/http; msgtype=response\r\n"
            record = header.encode() + b"Content-Length: %d\r\n\r\n" % len(answer) + answer + b"\r\n\r\n"
            plain.write(record)
            packed.write(gzip.compress(record, 6))
    (folder / "a.warc").write_bytes(plain.getvalue())


def read(source: TextSourceConfig, clean: Callable[[str], str]):
    for file in list_inputs(source):
        yield from read_documents(source, file, clean)


def seconds(function: Callable[[], object], passes: int) -> float:
    times = []
    for _ in range(passes):
        started = time.process_time()
        function()
        times.append(time.process_time() - started)
    return statistics.median(times)


def measure(name: str, source: TextSourceConfig, folder: Path, passes: int) -> None:
    items = list(read(source, lambda text: text))
    documents = [item for item in items if isinstance(item, Document)]
    num_bytes = sum(len(document.text.encode()) for document in documents)
    rejects = sum(not isinstance(item, Document | Skip) for item in items)
    on_disk = sum(file.size for file in list_inputs(source))
    del items, documents

    def alone() -> None:
        for _ in read(source, lambda text: text):
            pass

    def step() -> None:
        cleaned = (
            item for item in read(source, lambda text: normalise(NormaliseConfig(), text)) if isinstance(item, Document)
        )
        list(write_shards(cleaned, folder / "out", prefix="0", source="x", shard_bytes=32 << 20))

    reading, whole = seconds(alone, passes), seconds(step, passes)
    rates = " | ".join(f"{value / 1e6:.0f}" for value in (num_bytes / reading, on_disk / reading, num_bytes / whole))
    print(f"| {name} | {on_disk / 1e6:.1f} | {num_bytes / 1e6:.1f} | {rejects} | {rates} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=Path)
    parser.add_argument("--html", type=Path, required=True)
    parser.add_argument("--code", type=Path, required=True)
    parser.add_argument("--passes", type=int, default=5)
    arguments = parser.parse_args()
    with zstandard.open(arguments.documents, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    pages = [path.read_bytes() for path in sorted(arguments.html.rglob("*.html")) if path.is_file()]
    print("| | MB on disk | MB of text | rejects | text MB/s | disk MB/s | whole step, text MB/s |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tables(folder, texts)
        write_archive(folder, pages)
        for file in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow", "text"):
            measure(file, FilesSourceConfig(paths=(str(folder / file),)), folder, arguments.passes)
        for file in ("a.warc", "a.warc.gz"):
            for main_content in (True, False):
                source = WarcSourceConfig(paths=(str(folder / file),), main_content=main_content)
                kind = "main content" if main_content else "all text"
                measure(f"{file}, {kind}", source, folder, arguments.passes)
        measure("source tree", SourceTreeConfig(paths=(str(arguments.code),)), folder, arguments.passes)


if __name__ == "__main__":
    main()
