"""How fast are the filters on one core, and do they decide as datatrove does on the same documents?

    python benchmarks/filters.py DOCUMENTS.jsonl.zst [--passes 5]

Where datatrove (with spaCy) can be imported, its filters run on the same documents, and the decisions are compared: run
it with the Python of an environment that has both, and PYTHONPATH=. for this project. Times are CPU times of the
process; ours are the least of several passes over each part of the documents, since other work empties the caches.
"""

import argparse
import collections
import io
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import zstandard

from data_pipelines import stages
from data_pipelines.stages.normalise import normalise
from data_pipelines.stages.texts import Texts
from slmjax.config import (
    BadWordFilterConfig,
    BoilerplateFilterConfig,
    C4FilterConfig,
    C4ParagraphFilterConfig,
    CharacterFilterConfig,
    EncodedDataFilterConfig,
    FineWebFilterConfig,
    GopherFilterConfig,
    LanguageFilterConfig,
    LengthFilterConfig,
    LineFilterConfig,
    MarkerFilterConfig,
    MaskPersonalDataConfig,
    MathFilterConfig,
    NormaliseConfig,
    RepetitionFilterConfig,
)
from slmjax.config.filters import FilterConfig

PART_BYTES = 512 << 10  # as in the pipeline

ALONE: dict[str, FilterConfig] = {
    "length": LengthFilterConfig(),
    "lines": LineFilterConfig(),
    "characters": CharacterFilterConfig(),
    "markers": MarkerFilterConfig(),
    "language": LanguageFilterConfig(),
    "Gopher quality": GopherFilterConfig(),
    "Gopher repetition": RepetitionFilterConfig(),
    "C4": C4FilterConfig(),
    "mC4 paragraphs": C4ParagraphFilterConfig(),
    "FineWeb": FineWebFilterConfig(),
    "boilerplate": BoilerplateFilterConfig(),
    "bad words (400)": BadWordFilterConfig(words=tuple(f"bad{i}word" for i in range(400))),
    "encoded data": EncodedDataFilterConfig(),
    "mathematics": MathFilterConfig(),
    "personal data": MaskPersonalDataConfig(),
    "Gopher quality, words of datatrove": GopherFilterConfig(splitter="datatrove"),
    "Gopher quality, Unicode words": GopherFilterConfig(splitter="unicode"),
}
ALL = (
    LanguageFilterConfig(),
    RepetitionFilterConfig(counting="datatrove"),
    GopherFilterConfig(),
    C4FilterConfig(require_terminal=False),
    FineWebFilterConfig(),
    MaskPersonalDataConfig(),
)
CHAIN = (GopherFilterConfig(), C4FilterConfig(), FineWebFilterConfig())
COMPATIBLE: dict[str, tuple[FilterConfig, ...]] = {
    "Gopher quality": (GopherFilterConfig(splitter="datatrove"),),
    "Gopher repetition": (RepetitionFilterConfig(splitter="datatrove", counting="datatrove"),),
    "C4": (C4FilterConfig(sentences="datatrove"),),
    "C4 as in FineWeb": (C4FilterConfig(sentences="datatrove", require_terminal=False),),
    "FineWeb": (FineWebFilterConfig(splitter="datatrove"),),
    "Gopher + C4 + FineWeb": (
        GopherFilterConfig(splitter="datatrove"),
        C4FilterConfig(sentences="datatrove"),
        FineWebFilterConfig(splitter="datatrove"),
    ),
}
DEFAULT: dict[str, tuple[FilterConfig, ...]] = {
    "Gopher quality": (GopherFilterConfig(),),
    "Gopher repetition": (RepetitionFilterConfig(counting="datatrove"),),
    "C4": (C4FilterConfig(),),
    "C4 as in FineWeb": (C4FilterConfig(require_terminal=False),),
    "FineWeb": (FineWebFilterConfig(),),
    "Gopher + C4 + FineWeb": CHAIN,
}


def read(path: Path) -> list[str]:
    """The texts of a jsonl file, perhaps compressed."""
    with open(path, "rb") as file:
        stream = zstandard.ZstdDecompressor().stream_reader(file) if path.suffix == ".zst" else file
        return [json.loads(line)["text"] for line in io.TextIOWrapper(stream, encoding="utf-8")]


def parts_of(texts: Sequence[str]) -> list[pa.Array]:
    """Columns of about PART_BYTES."""
    parts, part, size = [], [], 0
    for text in texts:
        part.append(text)
        size += len(text.encode())
        if size >= PART_BYTES:
            parts.append(pa.array(part))
            part, size = [], 0
    return [*parts, pa.array(part)] if part else parts


def run(configs: Sequence[FilterConfig], column: pa.Array) -> list[str]:
    """The first rule that each document breaks."""
    texts = Texts.from_array(column)
    reasons = [""] * len(column)
    for config in configs:
        if isinstance(config, stages.RewriteConfig):
            texts, attributes = stages.rewrite(config, texts)
        else:
            attributes = stages.attributes(config, texts)
        rules = stages.failed_rules(config, pa.record_batch(attributes))
        reasons = [before or rule for before, rule in zip(reasons, rules.tolist(), strict=True)]
    return reasons


def seconds(work: Callable[[pa.Array], object], parts: Sequence[pa.Array], passes: int) -> float:
    """CPU time of one pass: the least of each part."""
    least = [float("inf")] * len(parts)
    for _ in range(passes):
        for i, part in enumerate(parts):
            started = time.process_time()
            work(part)
            least[i] = min(least[i], time.process_time() - started)
    return sum(least)


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints Markdown."""
    print("\n| " + " | ".join(headings) + " |")
    print("|" + "---|" * len(headings))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def ours(parts: Sequence[pa.Array], num_bytes: int, passes: int) -> None:
    """The rate of each filter by itself, and of several together, which share what they find."""
    clean = NormaliseConfig()
    rows = [("normalise", seconds(lambda part: [normalise(clean, text) for text in part.to_pylist()], parts, passes))]
    rows += [(name, seconds(lambda part, c=config: run((c,), part), parts, passes)) for name, config in ALONE.items()]
    rows.append(("Gopher + C4 + FineWeb", seconds(lambda part: run(CHAIN, part), parts, passes)))
    names = "language, repetition, Gopher, C4, FineWeb, personal data"
    rows.append((names, seconds(lambda part: run(ALL, part), parts, passes)))
    table(
        ("filter", "MB/s", "ns a byte"),
        [(n, f"{num_bytes / s / 1e6:.0f}", f"{s / num_bytes * 1e9:.1f}") for n, s in rows],
    )


def datatrove_filters() -> dict[str, list]:
    """The same filters of datatrove."""
    from datatrove.pipeline import filters

    gopher, c4, fineweb = filters.GopherQualityFilter(), filters.C4QualityFilter(), filters.FineWebQualityFilter()
    return {
        "Gopher quality": [gopher],
        "Gopher repetition": [filters.GopherRepetitionFilter()],
        "C4": [c4],
        "C4 as in FineWeb": [filters.C4QualityFilter(filter_no_terminal_punct=False)],
        "FineWeb": [fineweb],
        "Gopher + C4 + FineWeb": [gopher, c4, fineweb],
    }


def theirs(chain: list, texts: Sequence[str]) -> tuple[list[str], float]:
    """Why datatrove drops each document, and the CPU time."""
    from datatrove.data import Document
    from datatrove.utils.text import split_into_parts

    split_into_parts.cache_clear()
    reasons = []
    started = time.process_time()
    for text in texts:
        document, why = Document(text=text, id=""), ""
        for one in chain:
            verdict = one.filter(document)
            if verdict is not True:
                why = verdict[1]
                break
        reasons.append(why)
    return reasons, time.process_time() - started


def compare(texts: Sequence[str], parts: Sequence[pa.Array], num_bytes: int, passes: int) -> None:
    """Decisions and rates beside datatrove's."""
    rows, differences = [], []
    for name, chain in datatrove_filters().items():
        expected, their_seconds = theirs(chain, texts)
        found = [reason for part in parts for reason in run(COMPATIBLE[name], part)]
        same = sum(bool(a) == bool(b) for a, b in zip(found, expected, strict=True))
        differences += [
            (name, i, a, b) for i, (a, b) in enumerate(zip(found, expected, strict=True)) if bool(a) != bool(b)
        ]
        rates = [
            seconds(lambda part, c=configs[name]: run(c, part), parts, passes) for configs in (COMPATIBLE, DEFAULT)
        ]
        other = [reason for part in parts for reason in run(DEFAULT[name], part)]
        rows.append(
            (
                name,
                f"{num_bytes / their_seconds / 1e6:.2f}",
                *(f"{num_bytes / s / 1e6:.1f} ({their_seconds / s:.0f} x)" for s in rates),
                f"{sum(not why for why in expected)}, {sum(not why for why in found)}",
                f"{same} of {len(texts)} ({same / len(texts):.2%})",
                f"{sum(bool(a) == bool(b) for a, b in zip(other, expected, strict=True)) / len(texts):.1%}",
            )
        )
        print(f"{name}: {collections.Counter(filter(None, expected)).most_common()}", flush=True)
    headings = (
        "filter",
        "datatrove, MB/s",
        "as datatrove counts, MB/s",
        "white-space words, MB/s",
        "kept: theirs, ours",
    )
    table((*headings, "the same decision", "the same with white-space words"), rows)
    for difference in differences:
        print("differs:", *difference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("documents", type=Path)
    parser.add_argument("--passes", type=int, default=5)
    options = parser.parse_args()
    texts = read(options.documents)
    parts = parts_of(texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    print(f"{len(texts)} documents, {num_bytes / 1e6:.1f} MB")
    for config in (*ALONE.values(), *(config for chain in COMPATIBLE.values() for config in chain)):
        run((config,), parts[0])  # tables of characters, the tokenizer's rules, the language model
    try:
        import datatrove  # noqa: F401
    except ImportError:
        print("datatrove is not installed: no comparison")
    else:
        compare(texts, parts, num_bytes, options.passes)
    ours(parts, num_bytes, options.passes)


if __name__ == "__main__":
    main()
