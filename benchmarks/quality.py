"""Speed and accuracy of the quality models on Python source, which every machine with Python has.

    python benchmarks/quality.py [TEXTS.jsonl.zst]

Texts are pieces of about 1,500 bytes: of the standard library, and of what is installed beside it. The classifier, DSIR
and the language model of words tell the two apart; regression and preferences learn the share of a piece that is
docstring and comment. Held out are whole files. Speed is measured on one core (CPU time) on TEXTS if given, else on the
same Python source, as whole documents. scikit-learn is measured, too, where it is installed.
"""

import argparse
import hashlib
import io
import random
import re
import sysconfig
import tempfile
import time
import tokenize
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import zstandard
from rich.console import Console

from data_pipelines.quality import model_files
from data_pipelines.quality.features import grams, read_words
from data_pipelines.quality.importance import count_buckets, divergence
from data_pipelines.quality.metrics import area_under_curve, calibration_error, rank_correlation
from data_pipelines.quality.scorers import gumbel
from data_pipelines.quality.training import train
from slmjax.config import (
    FilesSourceConfig,
    PreferenceFilesSourceConfig,
    QualityTrainingConfig,
    ScoredFilesSourceConfig,
    TrainClassifierConfig,
    TrainImportanceConfig,
    TrainNgramModelConfig,
    TrainPreferenceConfig,
    TrainRegressionConfig,
)

PIECE_BYTES = 1500
CORPUS_BYTES = 6_000_000


def modules(root: Path, skipped: tuple[str, ...]) -> list[tuple[str, str]]:
    """Path and text of modules in a random order, until there is enough."""
    paths = [path for path in sorted(root.rglob("*.py")) if not any(part in skipped for part in path.parts)]
    random.Random(0).shuffle(paths)
    found, total = [], 0
    for path in paths:
        try:
            text = path.read_text("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        found.append((str(path), text))
        total += min(len(text), 6 * PIECE_BYTES)
        if total > CORPUS_BYTES:
            break
    return found


def pieces(text: str) -> list[str]:
    """The first six pieces of a text, each of whole lines."""
    found, lines, size = [], [], 0
    for line in text.split("\n"):
        lines.append(line)
        size += len(line) + 1
        if size >= PIECE_BYTES:
            found.append("\n".join(lines))
            lines, size = [], 0
    return found[:6]


def prose_share(text: str) -> float:
    """Share of the characters in comments and strings of several lines; pieces need not be whole modules."""
    prose = 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            several = token.type == tokenize.STRING and token.start[0] != token.end[0]
            prose += len(token.string) if several or token.type == tokenize.COMMENT else 0
    except (tokenize.TokenError, IndentationError, SyntaxError):
        pass
    return prose / len(text)


def is_test(path: str) -> bool:
    return hashlib.md5(path.encode()).digest()[0] < 256 // 5


def save(path: Path, rows: list[dict]) -> tuple[str, ...]:
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return (str(path),)


class Bench:
    def __init__(self, root: Path):
        self.root = root

    def train(self, name: str, config):
        began = time.process_time()
        train(
            QualityTrainingConfig(output_dir=str(self.root / name), model=config), console=Console(file=io.StringIO())
        )
        seconds = time.process_time() - began
        return (
            model_files.load(self.root / name),
            seconds,
            sum(path.stat().st_size for path in (self.root / name).iterdir()),
        )


def speed(function, texts: pa.Array) -> float:
    """MB/s of CPU time, the best of three."""
    best = min(measured(lambda: function(texts)) for _ in range(3))
    return texts.nbytes / 1e6 / best


def measured(function) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="?", help="jsonl.zst whose field text is scored for the speeds")
    arguments = parser.parse_args()
    library = modules(Path(sysconfig.get_path("stdlib")), ("site-packages", "test", "tests"))
    installed = modules(Path(sysconfig.get_path("purelib")), ())
    parts = {
        (kind, test): [piece for path, text in files if is_test(path) == test for piece in pieces(text)]
        for kind, files in (("library", library), ("installed", installed))
        for test in (False, True)
    }
    if arguments.texts:
        with open(arguments.texts, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
            whole = [orjson.loads(line)["text"] for line in stream.read().splitlines()]
    else:
        whole = [text for _, text in (*library, *installed)]
    whole = pa.array(whole)
    print(f"pieces to train on: {len(parts['library', False])} and {len(parts['installed', False])}; to test with: "
          f"{len(parts['library', True])} and {len(parts['installed', True])}")  # fmt: skip
    print(f"speed on {len(whole)} texts, {whole.nbytes / 1e6:.1f} MB\n")
    with tempfile.TemporaryDirectory() as folder:
        run(Bench(Path(folder)), parts, whole)


def run(bench: Bench, parts: dict[tuple[str, bool], list[str]], whole: pa.Array) -> None:
    root = bench.root
    paths = {
        kind: (FilesSourceConfig(paths=save(root / f"{kind}.jsonl", [{"text": text} for text in parts[kind, False]])),)
        for kind in ("library", "installed")
    }
    tested = [*parts["library", True], *parts["installed", True]]
    is_library = np.arange(len(tested)) < len(parts["library", True])
    training_mb = sum(len(text) for kind in paths for text in parts[kind, False]) / 1e6
    print("| model | quality on held-out files | training MB/s | scoring MB/s | file |")
    print("|---|---|---|---|---|")

    def row(name, quality, seconds, megabytes, scoring, size):
        print(f"| {name} | {quality} | {megabytes / seconds:.1f} | {scoring:.0f} | {size / 1e6:.2f} MB |", flush=True)

    words = speed(lambda texts: [len(piece.hashes) for piece in read_words(texts)], whole)
    both = speed(lambda texts: [grams(piece, ngram=2, bits=18) for piece in read_words(texts)], whole)
    for bits in (14, 18, 20):
        config = TrainClassifierConfig(positive=paths["library"], negative=paths["installed"], bits=bits)
        model, seconds, size = bench.train(f"classifier{bits}", config)
        scores = model.score(pa.array(tested))
        quality = (
            f"AUC {area_under_curve(scores, is_library):.4f}, calibration error "
            f"{calibration_error(scores, is_library.astype(float)):.3f}"
        )
        row(f"classifier, 2^{bits}", quality, seconds, training_mb, speed(model.score, whole), size)

    rng = np.random.default_rng(0)
    training = [*parts["library", False], *parts["installed", False]]
    shares = [prose_share(text) for text in training]
    truth = np.array([prose_share(text) for text in tested])
    rows = [{"text": text, "score": share} for text, share in zip(training, shares, strict=True)]
    source = ScoredFilesSourceConfig(paths=save(root / "scored.jsonl", rows))
    model, seconds, size = bench.train("regression", TrainRegressionConfig(sources=(source,)))
    scores = model.score(pa.array(tested))
    fit = 1 - ((scores - truth) ** 2).sum() / ((truth - truth.mean()) ** 2).sum()
    quality = f"R^2 {fit:.3f}, rank correlation {rank_correlation(scores, truth):.3f}"
    row("regression", quality, seconds, training_mb, speed(model.score, whole), size)

    pairs = [sorted(pair, key=lambda i: -shares[i]) for pair in rng.integers(0, len(training), (20_000, 2)).tolist()]
    rows = [{"preferred": training[a], "other": training[b]} for a, b in pairs if shares[a] != shares[b]]
    source = PreferenceFilesSourceConfig(paths=save(root / "pairs.jsonl", rows))
    model, seconds, size = bench.train("preference", TrainPreferenceConfig(sources=(source,)))
    scores = model.score(pa.array(tested))
    a, b = rng.integers(0, len(tested), (2, 20_000))
    a, b = a[truth[a] != truth[b]], b[truth[a] != truth[b]]
    right = ((scores[a] > scores[b]) == (truth[a] > truth[b])).mean()
    quality = f"pairs in order {right:.3f}, rank correlation {rank_correlation(scores, truth):.3f}"
    row(f"preference, {len(rows)} pairs", quality, seconds, training_mb, speed(model.score, whole), size)

    for bits in (20, 22):
        model, seconds, size = bench.train(f"ngram{bits}", TrainNgramModelConfig(sources=paths["library"], bits=bits))
        real = model.score(pa.array(parts["library", True]))
        mixed = [" ".join(rng.permutation(re.findall(r"\w+|[^\w\s]+", text))) for text in parts["library", True]]
        shuffled = model.score(pa.array(mixed))
        order = area_under_curve(np.append(shuffled, real), np.arange(2 * len(real)) < len(real))
        other = area_under_curve(-model.score(pa.array(tested)), is_library)
        quality = f"AUC of a random order of words {order:.4f}, of installed {other:.4f}, {real.mean():.2f} nats a word"
        half = sum(len(text) for text in parts["library", False]) / 1e6
        row(f"words, order 3, 2^{bits}", quality, seconds, half, speed(model.score, whole), size)

    config = TrainImportanceConfig(target=paths["library"], raw=paths["installed"], per="document")
    model, seconds, size = bench.train("importance", config)
    pool = [*parts["installed", False], *parts["library", False][::4]]
    from_library = np.arange(len(pool)) >= len(parts["installed", False])
    keys = model.score(pa.array(pool)) + np.array([gumbel(0, str(i)) for i in range(len(pool))])
    chosen = np.argsort(keys)[-int(from_library.sum()) :]
    drawn = rng.choice(len(pool), len(chosen), replace=False)
    counts = {
        name: count_buckets(read_words(pa.array(texts)), ngram=2, bits=14)
        for name, texts in (
            ("target", parts["library", True]),
            ("chosen", [pool[i] for i in chosen]),
            ("drawn", [pool[i] for i in drawn]),
        )
    }
    quality = (
        f"KL(target, sample) {divergence(counts['target'], counts['drawn']):.3f} drawn evenly, "
        f"{divergence(counts['target'], counts['chosen']):.3f} resampled; share of the target's kind "
        f"{from_library[drawn].mean():.2f}, {from_library[chosen].mean():.2f}"
    )
    row("importance (DSIR)", quality, seconds, training_mb, speed(model.score, whole), size)
    print(f"\nwords alone {words:.0f} MB/s, with 2-grams in buckets {both:.0f} MB/s")
    peer(parts, tested, is_library, training_mb, whole)


def peer(parts, tested, is_library, training_mb, whole) -> None:
    texts = [*parts["library", False], *parts["installed", False]]
    labels = np.arange(len(texts)) < len(parts["library", False])
    try:
        from sklearn.feature_extraction.text import HashingVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        print("scikit-learn is not installed")
        return
    vectorizer = HashingVectorizer(
        ngram_range=(1, 2), n_features=1 << 18, alternate_sign=False, token_pattern=r"\w+|[^\w\s]+"
    )
    began = time.process_time()
    model = LogisticRegression(C=100, max_iter=300).fit(vectorizer.transform(texts), labels)
    seconds = time.process_time() - began
    auc = area_under_curve(model.decision_function(vectorizer.transform(tested)), is_library)
    rate = speed(lambda array: model.decision_function(vectorizer.transform(array.to_pylist())), whole)
    print(f"scikit-learn, hashing + logistic regression: AUC {auc:.4f}, {training_mb / seconds:.1f}, {rate:.1f} MB/s")


if __name__ == "__main__":
    main()
