"""Deduplication and decontamination: speed on one core, what is found of planted near duplicates, memory.

    python benchmarks/dedup.py speed [TEXTS] [--items ITEMS.jsonl --fields question answer]
    python benchmarks/dedup.py planted
    python benchmarks/dedup.py memory [TEXTS] [--scales 1 4 16] [--megabytes 20]

TEXTS is anything that FilesSourceConfig reads (jsonl with the field text, parquet, txt); without it Python's standard
library. Speed is CPU time of the process: of measuring alone, then of whole stages from shards to verdicts, reading and
writing files included. Memory is the largest resident size of a process that does everything itself.
"""

import argparse
import dataclasses
import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
from rich.console import Console

from data_pipelines import decontaminate, deduplicate, filtering, stages, tasks
from data_pipelines.documents import Document, Shard, column, read_batches, small_batches, write_shards
from data_pipelines.engines.local import LocalEngine
from data_pipelines.progress import Reporter
from data_pipelines.readers.inputs import list_inputs
from data_pipelines.readers.sources import read_documents
from data_pipelines.stages import hashed_words
from data_pipelines.stages.texts import Texts
from data_pipelines.verdicts import Verdicts
from slmjax import files
from slmjax.config import (
    DecontaminationConfig,
    EvaluationTextConfig,
    ExactDedupConfig,
    FilesSourceConfig,
    NearDedupConfig,
    PassageDedupConfig,
    PythonLibrarySourceConfig,
    SubstringDedupConfig,
)

WORKER_BYTES = 64 << 20
SHARD_BYTES = 8 << 20


def documents_of(texts: str | None) -> list[Document]:
    source = FilesSourceConfig(paths=(texts,)) if texts else PythonLibrarySourceConfig()
    found = [item for file in list_inputs(source) for item in read_documents(source, file, lambda text: text)]
    return [item for item in found if isinstance(item, Document)]


def write_corpus(root: Path, documents: Iterable[Document], shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    directory = root / "work" / "read"
    return list(write_shards(documents, directory, prefix="00000", source="texts", shard_bytes=shard_bytes))


def decontamination(root: Path, documents: Sequence[Document], args: argparse.Namespace) -> DecontaminationConfig:
    """Against the items given, or against 2,000 pieces of other text than the documents have."""
    if args.items:
        evaluation = EvaluationTextConfig(paths=(args.items,), name="items", fields=tuple(args.fields))
        return DecontaminationConfig(evaluations=(evaluation,))
    rng = np.random.default_rng(0)
    words = sorted({word for document in documents[:200] for word in document.text.split()})
    lines = [orjson.dumps({"text": " ".join(rng.choice(words, 60))}) for _ in range(2000)]
    (root / "items.jsonl").write_bytes(b"\n".join(lines))
    evaluation = EvaluationTextConfig(paths=(str(root / "items.jsonl"),), name="items")
    return DecontaminationConfig(evaluations=(evaluation,))


def cpu_seconds(function: Callable[[], object], repeats: int) -> float:
    """The least CPU time of some calls."""
    times = []
    for _ in range(repeats):
        hashed_words.of.cache_clear()
        started = time.process_time()
        function()
        times.append(time.process_time() - started)
    return min(times)


def speed(args: argparse.Namespace) -> None:
    documents = documents_of(args.texts)
    megabytes = sum(len(document.text.encode()) for document in documents) / 1e6
    print(f"{len(documents):,} documents, {megabytes:.1f} MB\n")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shards = write_corpus(root, documents)
        stage = decontamination(root, documents, args)
        reporter = Reporter(Console(file=io.StringIO()), root / "timings.json")
        with LocalEngine(1) as engine:
            (contaminated,) = decontaminate.make_indices(engine, reporter, root, {"items": stage}, None).values()
        paths = [root / "work" / "read" / f"{shard.name}.parquet" for shard in shards]
        groups = [group for path in paths for group in read_batches(path)]
        batches = [Texts.of(b.column("text").to_pylist()) for group in groups for b in small_batches(group)]
        measured = {"exact": ExactDedupConfig(), "MinHash": NearDedupConfig(), "decontamination": contaminated}
        for texts in batches:
            texts.strings  # noqa: B018 (as the filters before would have made them)
        print("| measuring, texts in memory | MB/s |\n|---|---|")
        rate = megabytes / cpu_seconds(lambda: [*map(hashed_words.of, batches)], args.repeats)
        print(f"| words and their hashes | {rate:.0f} |")
        for name, config in measured.items():
            rate = megabytes / cpu_seconds(
                lambda config=config: [stages.attributes(config, t) for t in batches], args.repeats
            )
            print(f"| {name} | {rate:.0f} |")
        together = lambda: [stages.attributes(config, t) for t in batches for config in measured.values()]  # noqa: E731
        print(f"| all three together | {megabytes / cpu_seconds(together, args.repeats):.0f} |\n")
        print("| whole stages, from shards to verdicts | MB/s | of which measuring |\n|---|---|---|")
        named = {"exact": ExactDedupConfig(), "MinHash": NearDedupConfig(), "decontamination": stage}
        named |= {
            "lines": PassageDedupConfig(unit="line"),
            "paragraphs": PassageDedupConfig(unit="paragraph"),
            "runs of 50 words": SubstringDedupConfig(),
        }
        for name, config in named.items():
            if isinstance(config, DecontaminationConfig):
                continue  # a filter: its verdicts take no time to speak of
            taken = [whole_stage(root, shards, name, config) for _ in range(args.repeats)]
            total, measuring = min(taken)
            part = f"{megabytes / measuring:.0f}" if stages.is_measured(config) else ""
            print(f"| {name} | {megabytes / total:.0f} | {part} |")
        together_stages = {"exact": ExactDedupConfig(), "MinHash": NearDedupConfig()}
        times = []
        for _ in range(args.repeats):
            clear(root)
            started = time.process_time()
            run_stages(root, shards, together_stages, extra={"decontamination": contaminated})
            times.append(time.process_time() - started)
        print(f"| exact, MinHash and decontamination together | {megabytes / min(times):.0f} | |")


def clear(root: Path) -> None:
    for name in ("markers", "attributes", "verdicts", "shuffle"):
        shutil.rmtree(root / "work" / name, ignore_errors=True)


def whole_stage(root: Path, shards: Sequence[Shard], name: str, config) -> tuple[float, float]:
    """CPU seconds of a stage, and of its measuring."""
    clear(root)
    started = time.process_time()
    measuring = run_stages(root, shards, {name: config})
    return time.process_time() - started, measuring


def run_stages(root: Path, shards: Sequence[Shard], named: dict, extra: dict | None = None, worker_bytes=WORKER_BYTES):
    """Runs stages one after the other in this process; returns the CPU seconds of measuring."""
    hashes = {shard.name: files.sha256(root / "work" / "read" / f"{shard.name}.parquet") for shard in shards}
    reporter = Reporter(Console(file=io.StringIO()), root / "timings.json")
    measured = {name: config for name, config in (named | (extra or {})).items() if stages.is_measured(config)}
    started = time.process_time()
    with LocalEngine(1) as engine, reporter.step("stages", len(shards)) as shown:
        filtering.measure(engine, shown, root, measured, shards, hashes)
        measuring = time.process_time() - started
        previous, before = None, ""
        for name, config in named.items():
            before = tasks.fingerprint(before, config, hashes)
            step = deduplicate.GlobalStep(
                root=root,
                engine=engine,
                name=name,
                shards=tuple(shards),
                previous=previous,
                fingerprint=before,
                worker_bytes=worker_bytes,
                shown=shown,
            )
            deduplicate.decide(config, step)
            previous = name
    return measuring


def planted(args: argparse.Namespace) -> None:
    """Pairs of documents of random words, one edited: what is found, what the theory says, and what of it is right."""
    for config in (NearDedupConfig(), NearDedupConfig(bands=40, rows=4, similarity=0.3)):
        print(
            f"{config.bands} bands of {config.rows} rows, word {config.ngram}-grams, {args.pairs} pairs at each rate\n"
        )
        print(f"| edits a word | mean J | pairs with J >= {config.similarity} | found | theory | band, 2 s.d. ", end="")
        print("| dropped, not similar | precision |\n|---|---|---|---|---|---|---|---|")
        rng = np.random.default_rng(args.seed)
        for percent in (1, 2, 3, 4, 5, 7, 10, 15, 20):
            planted_at(percent, [make_pair(rng, percent / 100) for _ in range(args.pairs)], config)
        print()


def planted_at(percent: int, pairs: Sequence[tuple[list[str], list[str]]], config: NearDedupConfig) -> None:
    texts = [words for pair in pairs for words in pair]
    documents = [Document(str(i), "", " ".join(words)) for i, words in enumerate(texts)]
    with tempfile.TemporaryDirectory() as folder:
        shards = write_corpus(Path(folder), documents, shard_bytes=200_000)
        run_stages(Path(folder), shards, {"near": config})
        verdicts = [Verdicts.load(Path(folder), "near", shard) for shard in shards]
    kept = np.concatenate([each.duplicate_of for each in verdicts])
    similarities = np.array([jaccard(*pair) for pair in pairs])
    similar = similarities >= config.similarity
    chances = np.where(similar, 1 - (1 - similarities**config.rows) ** config.bands, 0)
    dropped = [(i, int(original)) for i, original in enumerate(kept) if original is not None]
    wrong = sum(jaccard(texts[i], texts[j]) < config.similarity for i, j in dropped)
    deviation = 2 * np.sqrt((chances * (1 - chances)).sum())
    precision = f"{1 - wrong / len(dropped):.3f}" if dropped else "-"
    found, expected = sum(original is not None for original in kept[1::2]), chances.sum()
    print(
        f"| {percent} % | {similarities.mean():.2f} | {similar.sum()} | {found} | {expected:.0f} | "
        f"{expected - deviation:.0f}-{expected + deviation:.0f} | {wrong} | {precision} |"
    )


def make_pair(rng: np.random.Generator, rate: float, num_words: int = 400) -> tuple[list[str], list[str]]:
    """Words, and the same with words replaced, left out and put in, a third each."""
    words = [f"w{word}" for word in rng.integers(0, 20_000, num_words)]
    edited: list[str] = []
    for word in words:
        kind = rng.integers(3) if rng.random() < rate else -1
        new = f"new{rng.integers(20_000)}"
        edited += {-1: [word], 0: [new], 1: [], 2: [word, new]}[int(kind)]
    return words, edited


def jaccard(one: list[str], other: list[str], n: int = 5) -> float:
    """Similarity of the sets of n-grams, as strings."""
    a, b = ({tuple(words[i : i + n]) for i in range(len(words) - n + 1)} for words in (one, other))
    return len(a & b) / len(a | b)


def memory(args: argparse.Namespace) -> None:
    """Corpora of one size, and of four and sixteen times as much, each in a process of its own."""
    stages_of = {
        "exact": "ExactDedupConfig()",
        "MinHash": "NearDedupConfig()",
        "lines": "PassageDedupConfig(unit='line')",
        "runs of 50 words": "SubstringDedupConfig()",
    }
    names = ["imports alone", *stages_of]
    print(f"| | {' | '.join(f'{scale}x' for scale in args.scales)} |\n|---|{'---|' * len(args.scales)}")
    with tempfile.TemporaryDirectory() as folder:
        rows: dict[str, list[str]] = {name: [] for name in ["MB of text", "documents", "duplicates", *names]}
        for scale in args.scales:
            root = Path(folder, str(scale))
            documents = documents_of(args.texts)
            wanted = int(scale * args.megabytes * 1e6)
            shards = write_corpus(root, varied(documents, wanted))
            rows["MB of text"].append(f"{sum(shard.bytes for shard in shards) / 1e6:.0f}")
            rows["documents"].append(f"{sum(shard.documents for shard in shards):,}")
            (root / "shards.json").write_text(json.dumps([dataclasses.asdict(shard) for shard in shards]))
            for name in names:
                code = stages_of.get(name, "None")
                script = f"from benchmarks.dedup import *; child({str(root)!r}, {name!r}, {code})"
                result = json.loads(subprocess.check_output([sys.executable, "-c", script], text=True))
                rows[name].append(f"{result['megabytes']:.0f} MB")
                if name == "MinHash":
                    rows["duplicates"].append(f"{result['dropped']:,}")
            shutil.rmtree(root)
        for name, values in rows.items():
            print(f"| {name} | {' | '.join(values)} |")


def varied(documents: Sequence[Document], num_bytes: int) -> Iterable[Document]:
    """Documents with the words of every line in another order, and of each fifth one a near copy, up to a size."""
    written, i = 0, 0
    rng = np.random.default_rng(0)
    while written < num_bytes:
        text = documents[i % len(documents)].text
        if i >= len(documents):
            text = "\n".join(" ".join(rng.permutation(line.split())) for line in text.split("\n"))
        for name, copy in ((f"{i}", text), *([(f"{i}-copy", text + f"\ncopy {i}")] if i % 5 == 0 else [])):
            written += len(copy.encode())
            yield Document(name, name, copy)
        i += 1


def child(root: str, name: str, config) -> None:
    """In a process of its own: runs a stage, and prints its largest resident size and how many documents it dropped."""
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    shards = [Shard(**fields) for fields in json.loads(Path(root, "shards.json").read_text())]
    dropped = 0
    if config is not None:
        run_stages(Path(root), shards, {name: config})
        paths = sorted(Path(root, "work/verdicts", name).iterdir())
        dropped = sum(len(column(path, "reason")) - column(path, "reason").null_count for path in paths)
    # Not getrusage: its largest size is also that of the parent when it forked.
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"megabytes": int(peak.split()[1]) / 1024, "dropped": dropped}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    of_speed = verbs.add_parser("speed")
    of_speed.add_argument("texts", nargs="?")
    of_speed.add_argument("--items")
    of_speed.add_argument("--fields", nargs="+", default=["text"])
    of_speed.add_argument("--repeats", type=int, default=5)
    of_planted = verbs.add_parser("planted")
    of_planted.add_argument("--pairs", type=int, default=500)
    of_planted.add_argument("--seed", type=int, default=0)
    of_memory = verbs.add_parser("memory")
    of_memory.add_argument("texts", nargs="?")
    of_memory.add_argument("--scales", type=int, nargs="+", default=[1, 4, 16])
    of_memory.add_argument("--megabytes", type=float, default=20)
    args = parser.parse_args()
    {"speed": speed, "planted": planted, "memory": memory}[args.verb](args)


if __name__ == "__main__":
    main()
