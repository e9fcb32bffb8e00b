"""How fast is the whole pipeline on one core: from a jsonl of real text to token stores, and every step of it?

    python benchmarks/data_end_to_end.py DOCUMENTS.jsonl.zst --items EVALUATION.jsonl --fields question answer
    python benchmarks/data_end_to_end.py --local 40 --items EVALUATION.jsonl --fields question answer

--local makes a corpus of so many MB of this machine's /usr/share/doc and of Python's standard library, and of Python in
the folders of --modules. With --keep-all everything is measured as before and no filter drops anything, so that the
steps after them go through all of the text.

Each run is a process of its own on one core, with no threads of Arrow's, as workers have it; other work on the machine
disturbs CPU seconds (user and system) least. What a process makes once, such as tables of characters and the model of
languages, is measured apart. Filters share what they find, and the first that wants it pays for it.
"""

import argparse
import contextlib
import dataclasses
import gzip
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa


def local_documents(more: Sequence[Path] = ()) -> Iterator[dict[str, str]]:
    """The readable texts of /usr/share/doc, the modules of the standard library, and those in more folders."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(Path("/usr/share/doc").rglob("*")) if path.is_file() and not path.is_symlink()]
    paths += [path for path in sorted(library.rglob("*.py")) if "site-packages" not in path.parts]
    paths += [path for folder in more for path in sorted(folder.rglob("*.py"))]
    for path in paths:
        try:
            content = path.read_bytes()
            text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
        except (UnicodeDecodeError, gzip.BadGzipFile):
            continue
        if text.strip() and "\0" not in text:
            yield {"id": str(path), "text": text}


def spread(found: list[dict[str, str]], num_bytes: float) -> list[dict[str, str]]:
    """As many documents from all over the list as have so many bytes."""
    total = sum(len(document["text"].encode()) for document in found)
    step = max(1, round(total / num_bytes))
    return found[::step]


def without_bounds(stage: Any) -> Any:
    """The stage with nothing that a document can fail."""
    bounds = [field.name for field in dataclasses.fields(stage) if field.name.startswith(("min_", "max_", "only_"))]
    return dataclasses.replace(stage, **dict.fromkeys(bounds))


def pipeline(options: argparse.Namespace, documents: Path, output: Path) -> Any:
    """The config: all kinds of stages, in the order of the ready ones."""
    from slmjax import config

    evaluation = config.EvaluationTextConfig(paths=(str(options.items),), name="items", fields=tuple(options.fields))
    stages = (
        config.LanguageFilterConfig(),
        config.RepetitionFilterConfig(),
        config.GopherFilterConfig(),
        config.C4FilterConfig(require_terminal=False),
        config.FineWebFilterConfig(),
        config.LineFilterConfig(),
        config.CharacterFilterConfig(),
        config.MaskPersonalDataConfig(),
        config.ExactDedupConfig(),
        config.NearDedupConfig(),
        config.DecontaminationConfig(evaluations=(evaluation,)),
    )
    return config.PipelineConfig(
        output_dir=str(output),
        sources=(config.FilesSourceConfig(paths=(str(documents),)),),
        stages=tuple(map(without_bounds, stages)) if options.keep_all else stages,
        tokenizer=config.ExistingTokenizerConfig(path=str(options.tokenizer)),
        split=config.SplitConfig(held_out_fraction=0.05),  # something, even of the few documents that may be left
        num_workers=1,
    )


def child(options: argparse.Namespace) -> None:
    """One run; prints what it took as JSON."""
    import io

    from rich.console import Console

    from data_pipelines import filtering, progress, run

    os.sched_setaffinity(0, {options.core})
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    found: dict[str, Any] = {"steps": {}}

    class Timed(progress.Reporter):
        @contextlib.contextmanager
        def step(self, name: str, *args: Any):
            started = time.process_time()
            with super().step(name, *args) as step:
                yield step
            found["steps"][name] = time.process_time() - started

    measure = filtering.measure

    def measured(*args: Any) -> filtering.Filtered:
        result = measure(*args)
        found["filters"] = {name: sum(task.seconds or 0 for task in done) for name, done in result.attributes.items()}
        return result

    run.Reporter, filtering.measure = Timed, measured
    root, quiet = Path(options.output), Console(file=io.StringIO())
    started = time.process_time()
    small = root / "small.jsonl"
    small.write_bytes(b"\n".join(options.documents.read_bytes().split(b"\n")[:40]))
    warming = pipeline(options, small, root / "small")
    stages, split = (
        tuple(map(without_bounds, warming.stages)),
        dataclasses.replace(warming.split, held_out_fraction=0.0),
    )
    run.run(dataclasses.replace(warming, stages=stages, split=split), console=quiet)
    found["once"] = time.process_time() - started
    found["steps"] = {}
    wall, started = time.monotonic(), time.process_time()
    manifest = run.run(pipeline(options, options.documents, root / "run"), console=quiet)
    found |= {"cpu": time.process_time() - started, "wall": time.monotonic() - wall}
    found["kept"] = {row.step: row.kept.bytes for row in manifest.steps}
    found["tokens"] = sum(split.tokens for split in manifest.splits.values())
    print(json.dumps(found))


def one_run(options: argparse.Namespace, documents: Path, tokenizer: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        command = [sys.executable, __file__, str(documents), "--child", "--output", folder, "--core", str(options.core)]
        command += ["--tokenizer", str(tokenizer), "--items", str(options.items), "--fields", *options.fields]
        command += ["--keep-all"] * options.keep_all
        environment = {"NUMPY_MADVISE_HUGEPAGE": "0"} | os.environ  # as `slmjax data` sets it
        return json.loads(subprocess.check_output(command, text=True, env=environment))


def report(runs: Sequence[dict[str, Any]], normalising: float, count: int, num_bytes: int) -> None:
    """The medians as Markdown."""
    megabytes = num_bytes / 1e6
    rows: list[tuple[str, float]] = []
    for name in runs[0]["steps"]:
        seconds = statistics.median(each["steps"][name] for each in runs)
        if name == "read":
            rows += [("read and write shards", seconds - normalising), ("normalise", normalising)]
        elif name == "measure":
            filters = {
                which: statistics.median(each["filters"][which] for each in runs) for which in runs[0]["filters"]
            }
            rows += [*filters.items(), ("read shards, write texts", seconds - sum(filters.values()))]
        else:
            rows.append((name + (": decide" if name in runs[0]["filters"] else ""), seconds))
    cpu, wall, once = (statistics.median(each[name] for each in runs) for name in ("cpu", "wall", "once"))
    rows.append(("the rest", statistics.median(each["cpu"] - sum(each["steps"].values()) for each in runs)))
    print(f"{count:,} documents, {megabytes:.1f} MB; {runs[0]['tokens']:,} tokens; median of {len(runs)}\n")
    print("| step | CPU seconds | MB/s | share |\n|---|---|---|---|")
    for name, seconds in rows:
        rate = f"{megabytes / seconds:,.0f}" if seconds > 1e-3 else ""
        print(f"| {name} | {seconds:.3f} | {rate} | {seconds / cpu:.1%} |")
    print(f"| **all** | **{cpu:.2f}** (wall {wall:.2f}) | **{megabytes / cpu:.1f}** (wall {megabytes / wall:.1f}) | |")
    spread = ", ".join(f"{megabytes / each['cpu']:.1f}" for each in runs)
    print(f"\nMB/s of each run: {spread}. Once for a process: {once:.2f} s.")
    print("MB left after each step: " + ", ".join(f"{name} {kept / 1e6:.1f}" for name, kept in runs[0]["kept"].items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=Path, nargs="?")
    parser.add_argument("--local", type=float, metavar="MEGABYTES")
    parser.add_argument("--modules", type=Path, nargs="+", default=(), help="--local: Python in these folders, too")
    parser.add_argument("--keep-all", action="store_true")
    parser.add_argument("--items", type=Path, required=True)
    parser.add_argument("--fields", nargs="+", default=["text"])
    parser.add_argument("--tokenizer", type=Path, help="a SentencePiece model; without it one of 8,192 is trained")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--directory", help="where to work")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    from benchmarks.filters import read
    from data_pipelines.stages.normalise import normalise
    from slmjax.config import NormaliseConfig
    from slmjax.data.tokenizer import train_tokenizer

    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        if (options.local is None) == (options.documents is None):
            parser.error("name a file of documents, or --local")
        documents = Path(folder, "documents.jsonl")
        if options.local is None:
            found = [{"text": text} for text in read(options.documents)]
        else:
            found = spread(list(local_documents(options.modules)), options.local * 1e6)
        documents.write_bytes(b"\n".join(orjson.dumps(document) for document in found))
        texts = read(documents)
        tokenizer = options.tokenizer
        if tokenizer is None:
            tokenizer = Path(folder, "tokenizer.model")
            train_tokenizer(texts, tokenizer, vocab_size=8192, max_passages=4000)
        times = []
        for _ in range(options.runs):
            started = time.process_time()
            for text in texts:
                normalise(NormaliseConfig(), text)
            times.append(time.process_time() - started)
        runs = [one_run(options, documents, tokenizer) for _ in range(options.runs)]
        report(runs, statistics.median(times), len(texts), sum(len(text.encode()) for text in texts))


if __name__ == "__main__":
    main()
