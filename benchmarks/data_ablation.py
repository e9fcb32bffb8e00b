"""Does the pipeline help? The same small model, the same number of tokens, on kept, random and dropped documents.

    python benchmarks/data_ablation.py [TEXTS.jsonl.zst] --size cpu

Of clean texts (the field text of TEXTS, or the modules of this Python's standard library) some are held out and some
are what the quality models know to be good. The rest becomes a corpus of which half is noise: texts with their words in
a random order, texts in invented languages, boilerplate, and copies with a few words changed. The pipeline (near
duplicates, likelihood under a model of words, classifier) sees no more than the corpus and the good texts. Then a model
is trained on each of three sets of documents, three seeds each, and measured on the clean held-out texts.

Sizes: "cpu" is for two cores and twenty minutes, "gpu" for one H200 and four minutes, "smoke" only shows that it runs.
"""

import argparse
import collections
import dataclasses
import hashlib
import io
import json
import re
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import orjson
import pyarrow.parquet as pq
import zstandard
from rich.console import Console

from data_pipelines.quality.training import train as train_quality
from data_pipelines.run import run as run_pipeline
from slmjax.config import (
    ExistingTokenizerConfig,
    FilesSourceConfig,
    NearDedupConfig,
    PipelineConfig,
    QualityFilterConfig,
    QualityModelConfig,
    QualityTrainingConfig,
    RunConfig,
    SplitConfig,
    TrainClassifierConfig,
    TrainNgramModelConfig,
)
from slmjax.config.resolved import to_json
from slmjax.data.token_store import TokenStore
from slmjax.data.tokenizer import train_tokenizer
from slmjax.gin_loader import load

ROOT = Path(__file__).parents[1]
KINDS = ("clean", "shuffled words", "other language", "boilerplate", "near duplicate")
PIECE_CHARS = 2500


@dataclasses.dataclass(frozen=True)
class Size:
    clean_bytes: int
    vocab_size: int
    steps: int
    config: str
    overrides: tuple[str, ...]


SIZES = {
    "smoke": Size(
        400_000,
        512,
        20,
        "quickstart.gin",
        ("ModelConfig.width=32", "ModelConfig.repeats=1", "AttentionConfig.head_dim=8", "FeedForwardConfig.hidden=64",
         "WarmupConfig.steps=2", "InputConfig.batch_size=4", "InputConfig.sequence_length=64",
         "EvalSetConfig.stride=None"),
    ),
    "cpu": Size(6_000_000, 4096, 200, "quickstart.gin", ()),
    "gpu": Size(
        30_000_000,
        4096,
        320,
        "quickstart_gpu.gin",
        ("ModelConfig.width=256", "ModelConfig.repeats=8", "FeedForwardConfig.hidden=704", "InputConfig.batch_size=16",
         "InputConfig.sequence_length=512", "MuonConfig.weight_decay=0.1", "EvalSetConfig.stride=None"),
    ),
}  # fmt: skip


def read_texts(path: str | None) -> list[str]:
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        paths = [path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts]
        return [path.read_text("utf-8", errors="ignore").replace("\0", "") for path in paths]
    with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        return [orjson.loads(line)["text"] for line in stream.read().splitlines()]


def pieces(text: str) -> list[str]:
    """A text in pieces of whole paragraphs."""
    found, size = [[]], 0
    for paragraph in text.split("\n\n"):
        found[-1].append(paragraph)
        size += len(paragraph)
        if size >= PIECE_CHARS:
            found.append([])
            size = 0
    return [joined for joined in map("\n\n".join, found) if joined.strip()]


def place(text: str) -> float:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") / 2**64


def shuffled(text: str, rng: np.random.Generator) -> str:
    """The same words in another order, the same white space between them."""
    words, spaces = text.split(), re.findall(r"\s+", text.strip())
    return "".join(word + space for word, space in zip(rng.permutation(words), [*spaces, ""], strict=True))


def translated(text: str, language: int) -> str:
    """Every word of letters becomes a word of an invented language, always the same one."""
    onsets, nuclei = (("kh", "z", "v", "r", "sh", "d"), ("aa", "ou", "i", "ya"), ("tl", "qu", "x", "ch", "n", "p"),
                      ("e", "oa", "u", "ii"))[2 * language : 2 * language + 2]  # fmt: skip

    def word(match: re.Match) -> str:
        digest = hashlib.blake2b(match.group().encode(), digest_size=8).digest()
        syllables = 1 + len(match.group()) // 3
        return "".join(onsets[digest[i] % 6] + nuclei[digest[i] // 64] for i in range(min(syllables, 8)))

    return re.sub(r"[A-Za-z]+", word, text)


def boilerplate(rng: np.random.Generator) -> str:
    """Lines as they stand around the text of web pages, with numbers that make each one another."""
    lines = (
        "Accept all cookies | Reject all | Manage preferences", "Home > Products > Category {a} > Item {b}",
        "Share on Facebook Share on Twitter Pin it {a} comments", "Log in to rate this page ({a} votes, {b} views)",
        "Copyright {a} All rights reserved. Terms of use. Privacy policy.", "Read more: Related article no. {b}",
        "Sign up for our newsletter and save {a} %!", "Page {a} of {b} Next > Last >>", "Add to cart ${a}.{b} In stock",
        "Posted by user{b} on 2019-{a} Reply Report", "Your browser does not support JavaScript (error {b}).",
        "Sponsored: {a} ways to win {b} points today",
    )  # fmt: skip
    chosen = rng.integers(0, len(lines), PIECE_CHARS // 45)
    return "\n".join(lines[i].format(a=rng.integers(1, 99), b=rng.integers(100, 99_999)) for i in chosen)


def edited(text: str, rng: np.random.Generator) -> str:
    """A copy of which one word in a hundred is another."""
    words = re.split(r"(\s+)", text)
    for i in rng.choice(len(words), max(1, len(words) // 200), replace=False):
        if words[i].strip():
            words[i] = f"changed{rng.integers(1000)}"
    return "".join(words)


def make_corpus(texts: list[str], clean_bytes: int) -> tuple[list[dict], list[dict], list[dict]]:
    """The corpus with planted noise, the texts known to be good, and those held out; whole texts are in one of them."""
    pool, good, held_out, total = [], [], [], 0
    for text in sorted(texts, key=place):
        where = place("where " + text)
        side = held_out if where < 0.05 else good if where < 0.15 else pool
        for i, piece in enumerate(pieces(text)):
            side.append({"id": f"{place(text)}-{i}", "text": piece})
        total += len(text)
        if total > clean_bytes:
            break
    rng = np.random.default_rng(0)
    order = rng.permutation(len(pool))
    third = len(pool) // 6
    clean = [pool[i]["text"] for i in order[2 * third :]]
    copied = clean[:: max(1, len(clean) // max(1, third // 8))]  # each about eight times
    made = {
        "clean": clean,
        "shuffled words": [shuffled(pool[i]["text"], rng) for i in order[:third]],
        "other language": [translated(pool[i]["text"], int(i) % 2) for i in order[third : 2 * third]],
        "boilerplate": [boilerplate(rng) for _ in range(third)],
        "near duplicate": [edited(copied[i % len(copied)], rng) for i in range(third)],
    }
    corpus = [{"id": f"{kind}/{i}", "text": text} for kind in KINDS for i, text in enumerate(made[kind])]
    return [corpus[i] for i in rng.permutation(len(corpus))], good, held_out


def save(path: Path, rows: list[dict]) -> tuple[FilesSourceConfig, ...]:
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return (FilesSourceConfig(paths=(str(path),), id_field="id"),)


def select(root: Path, corpus: list[dict], good: list[dict], tokenizer: ExistingTokenizerConfig) -> dict[str, str]:
    """Trains the quality models, runs the pipeline; returns why each document was dropped, "" where it was kept."""
    sources, known = save(root / "corpus.jsonl", corpus), save(root / "good.jsonl", good)
    models = {
        "words": TrainNgramModelConfig(sources=known, bits=20),
        "classifier": TrainClassifierConfig(positive=known, negative=sources),
    }
    for name, model in models.items():
        about = train_quality(QualityTrainingConfig(output_dir=str(root / name), model=model), console=quiet())
        print(f"{name}: AUC {about['held_out']['area_under_curve']:.3f} on held-out texts of its own", flush=True)
    stages = (
        NearDedupConfig(),
        QualityFilterConfig(scorer=QualityModelConfig(path=str(root / "words")), max_score_quantile=0.6),
        QualityFilterConfig(scorer=QualityModelConfig(path=str(root / "classifier")), min_score_quantile=0.1),
    )
    run_pipeline(
        PipelineConfig(
            output_dir=str(root / "selected"),
            sources=sources,
            stages=stages,
            tokenizer=tokenizer,
            split=SplitConfig(held_out_fraction=0.0),
        ),
        console=quiet(),
    )
    rows = [
        row
        for path in (root / "selected" / "work/decisions").glob("*.parquet")
        for row in pq.read_table(path, columns=["id", "reason"]).to_pylist()
    ]
    return {row["id"].removeprefix("files/"): row["reason"] or "" for row in rows}


def tokenised(root: Path, name: str, rows: list[dict], tokenizer: ExistingTokenizerConfig) -> TokenStore:
    config = PipelineConfig(
        output_dir=str(root / name),
        sources=save(root / f"{name}.jsonl", rows),
        tokenizer=tokenizer,
        split=SplitConfig(held_out_fraction=0.0),
    )
    run_pipeline(config, console=quiet())
    return TokenStore.open(root / name / "train")


def quiet() -> Console:
    return Console(file=io.StringIO())


def print_decisions(reasons: dict[str, str]) -> None:
    counts = collections.Counter((name.partition("/")[0], reason.partition(".")[0]) for name, reason in reasons.items())
    steps = ["", *sorted({step for _, step in counts} - {""})]
    print(f"\n| documents | {' | '.join(step or 'kept' for step in steps)} |\n|---|{'---|' * len(steps)}")
    for kind in KINDS:
        print(f"| {kind} | {' | '.join(str(counts[kind, step]) for step in steps)} |")


def configured(size: Size, root: Path, group: str, seed: int, steps: int) -> RunConfig:
    overrides = (
        *size.overrides,
        f"ModelConfig.vocab_size={size.vocab_size}",
        f"RunConfig.output_dir='{root}/runs/{group}-{seed}'",
        f"RunConfig.seed={seed}",
        f"RunConfig.steps={steps}",
        f"InputConfig.tokenizer='{root}/tokenizer.model'",
        f"train/TokenSourceConfig.path='{root}/{group}/train'",
        f"held_out/TokenSourceConfig.path='{root}/held_out/train'",
        "EvaluationConfig.every_steps=None",
        f"CheckpointConfig.every_steps={steps}",
        "TrackingConfig.console=False",
        "RunConfig.tracking=@TrackingConfig()",
    )
    return load([ROOT / "configs" / size.config], overrides).config


def train(run: RunConfig) -> float:
    """Returns held-out bits per byte after the last step."""
    from slmjax.train.loop import train

    train(run, config_text="", config_json=to_json(run))
    lines = [json.loads(line) for line in (Path(run.output_dir) / "metrics.jsonl").read_text().splitlines()]
    return next(line["held_out/bits_per_byte"] for line in reversed(lines) if "held_out/bits_per_byte" in line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="?", help="jsonl.zst with clean texts in the field text")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="directory to keep; a temporary one if not given")
    arguments = parser.parse_args()
    if arguments.output is not None:
        arguments.output.mkdir(parents=True)
        measure(arguments.output, arguments)
    else:
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), arguments)


def measure(root: Path, arguments: argparse.Namespace) -> None:
    import jax

    # Nine runs of one program: compiled once.
    jax.config.update("jax_compilation_cache_dir", str(root / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    size, began = SIZES[arguments.size], time.monotonic()
    corpus, good, held_out = make_corpus(read_texts(arguments.texts), size.clean_bytes)
    tokenizer = ExistingTokenizerConfig(path=str(root / "tokenizer.model"))
    train_tokenizer((row["text"] for row in good), tokenizer.path, vocab_size=size.vocab_size)
    reasons = select(root, corpus, good, tokenizer)
    print_decisions(reasons)
    groups = {
        "kept": [row for row in corpus if not reasons[row["id"]]],
        "random": sorted(corpus, key=lambda row: place(row["id"]))[: len(corpus) // 2],
        "dropped": [row for row in corpus if reasons[row["id"]]],
    }
    stores = {name: tokenised(root, name, rows, tokenizer) for name, rows in groups.items()}
    tokenised(root, "held_out", held_out, tokenizer)
    tokens = {name: store.num_tokens for name, store in stores.items()}
    per_step = configured(size, root, "kept", 0, size.steps).input.tokens_per_step
    steps = min(size.steps, min(tokens.values()) // per_step)  # nobody reads a document twice
    print(f"\n{len(corpus)} documents; tokens: {tokens}; each run reads {steps * per_step:,} in {steps} steps; "
          f"{time.monotonic() - began:.0f} s so far\n")  # fmt: skip
    print(f"| trained on | held-out bits per byte, {arguments.seeds} seeds | mean |\n|---|---|---|")
    for name in groups:
        scores = [train(configured(size, root, name, seed, steps)) for seed in range(arguments.seeds)]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        shown = ", ".join(f"{score:.4f}" for score in scores)
        print(f"| {name} | {shown} | {statistics.mean(scores):.4f} ± {spread:.4f} |", flush=True)
    print(f"\n{time.monotonic() - began:.0f} s on {jax.devices()[0].device_kind}")


if __name__ == "__main__":
    main()
