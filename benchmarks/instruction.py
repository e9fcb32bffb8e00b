"""What the tools for instruction data find of noise that is planted among real questions and answers.

    python benchmarks/instruction.py plant gsm8k_train.jsonl --root runs/instruction
    slmjax data runs/instruction/all.gin && slmjax train runs/instruction/tuned.gin
    python benchmarks/instruction.py score --root runs/instruction
    python benchmarks/instruction.py report --root runs/instruction
    python benchmarks/instruction.py ablate gsm8k_train.jsonl --root runs/instruction --steps 200

`plant` writes noisy.jsonl, truth.jsonl (what was done to each line) and the configs. One answer in 25 is changed in
each of the ways of KINDS. `score` runs everything on them with the checkpoint; `report` prints which share of each kind
every method drops, and how well each score tells it from clean conversations. `ablate` tunes the same new model on the
half that was selected and on a random half, three seeds each, and measures both on clean questions that none has seen.
"""

import argparse
import collections
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from slmjax.config.resolved import to_json
from slmjax.gin_loader import load
from slmjax.train.loop import train

ROOT = Path(__file__).parents[1]
SHARE = 0.04
KINDS = ("shuffled", "truncated", "duplicate", "template", "boilerplate", "copied")
LEFTOVERS = ("<|im_end|>", "[/INST]", "### Response:", "{{answer}}", "[INSERT NUMBER HERE]", "<|eot_id|>")
BOILERPLATE = (
    "I'm sorry, but I can't help with that.",
    "As an AI language model, I cannot do arithmetic reliably. Please consult a teacher.",
    "I cannot assist with this request.",
)

ALL = """\
PipelineConfig.output_dir = "{root}/all"
PipelineConfig.sources = (@ConversationFilesSourceConfig(),)
ConversationFilesSourceConfig.paths = ("{root}/noisy.jsonl",)
PipelineConfig.tokenizer = @TrainTokenizerConfig()
TrainTokenizerConfig.vocab_size = 2048
PipelineConfig.shard_bytes = 1_500_000
"""

TUNED = """\
include "{configs}/model/quickstart.gin"
include "{configs}/optim/adamw.gin"
include "{configs}/execution/cpu.gin"
RunConfig.output_dir = "{root}/tuned"
RunConfig.steps = {steps}
RunConfig.model = @ModelConfig()
ModelConfig.vocab_size = 2048
ModelConfig.width = 64
ModelConfig.repeats = 4
AttentionConfig.num_heads = 2
AttentionConfig.num_kv_heads = 1
FeedForwardConfig.hidden = 176
RunConfig.input = @InputConfig()
InputConfig.tokenizer = "{root}/all/tokenizer.model"
InputConfig.batch_size = 8
InputConfig.sequence_length = 512
InputConfig.stages = (@MixtureStageConfig(),)
MixtureStageConfig.sources = (@TokenSourceConfig(),)
TokenSourceConfig.path = "{root}/all/train"
TokenSourceConfig.rows = "whole"
AdamWConfig.peak_lr = 0.006
RunConfig.schedule = @CosineScheduleConfig()
CosineScheduleConfig.warmup = @WarmupConfig()
WarmupConfig.steps = 20
RunConfig.evaluation = @EvaluationConfig()
EvaluationConfig.sets = (@EvalSetConfig(),)
EvalSetConfig.name = "held_out"
EvalSetConfig.source = @held_out/TokenSourceConfig()
held_out/TokenSourceConfig.path = "{root}/all/held_out"
held_out/TokenSourceConfig.rows = "whole"
RunConfig.checkpoint = @CheckpointConfig()
CheckpointConfig.every_steps = {steps}
"""

FILTERED = """\
include "{configs}/data/instruction.gin"
PipelineConfig.output_dir = "{root}/{name}"
PipelineConfig.sources = (@ConversationFilesSourceConfig(),)
ConversationFilesSourceConfig.paths = ("{root}/noisy.jsonl",)
PipelineConfig.tokenizer = @ExistingTokenizerConfig()
ExistingTokenizerConfig.path = "{root}/all/tokenizer.model"
PipelineConfig.shard_bytes = 1_500_000
"""
ENDING = r"""
ConversationFilterConfig.ending = "#### -?[\\d,.]+"
"""

INFLUENCE = """\
InfluenceConfig.targets = (@TargetConfig(),)
TargetConfig.name = "gsm8k"
TargetConfig.path = "{root}/target"
TargetConfig.max_documents = 100
InfluenceConfig.dimensions = 1024
InfluenceConfig.rank = 4
"""

# No duplicates, IFD at most 1, and of these the half with the highest influence; and as many at random.
HALF = """\
PipelineConfig.output_dir = "{root}/half_{name}"
PipelineConfig.sources = (@ConversationFilesSourceConfig(),)
PipelineConfig.tokenizer = @ExistingTokenizerConfig()
ExistingTokenizerConfig.path = "{root}/all/tokenizer.model"
PipelineConfig.split = @SplitConfig()
SplitConfig.held_out_fraction = 0.03
PipelineConfig.shard_bytes = 1_500_000
"""
CLEAN = """\
ConversationFilesSourceConfig.paths = ("{source}",)
"""
SELECTED = """\
ConversationFilesSourceConfig.paths = ("{root}/noisy.jsonl",)
PipelineConfig.stages = (@ConversationFilterConfig(), @ExactDedupConfig(), @ifd/QualityFilterConfig(),
                         @influence/QualityFilterConfig())
ExactDedupConfig.by = "question"
ifd/QualityFilterConfig.scorer = @ifd/ScoreFilesConfig()
ifd/ScoreFilesConfig.path = "{root}/ifd"
ifd/ScoreFilesConfig.column = "ifd"
ifd/QualityFilterConfig.max_score = 1.0
influence/QualityFilterConfig.scorer = @influence/ScoreFilesConfig()
influence/ScoreFilesConfig.path = "{root}/influence"
influence/ScoreFilesConfig.column = "influence"
influence/QualityFilterConfig.min_score_quantile = 0.4
"""
RANDOM = """\
ConversationFilesSourceConfig.paths = ("{root}/noisy.jsonl",)
PipelineConfig.stages = (@QualitySampleConfig(),)
QualitySampleConfig.scorer = @ScoreFilesConfig()
ScoreFilesConfig.path = "{root}/ifd"
ScoreFilesConfig.column = "tokens"
QualitySampleConfig.temperature = 1e9
QualitySampleConfig.fraction = 0.5
"""


def damaged(kind: str, row: dict, others: list[dict], rng: random.Random) -> dict:
    """A record with its answer changed; of a duplicate, with another word before the question."""
    question, answer = row["question"], row["answer"]
    match kind:
        case "shuffled":
            answer = rng.choice(others)["answer"]
        case "truncated":
            answer = answer[: int(len(answer) * rng.uniform(0.3, 0.8))].rstrip()
        case "duplicate":
            question = rng.choice(("", "Now: ", "Please answer. ")) + question
        case "template":
            answer = f"{answer} {rng.choice(LEFTOVERS)}"
        case "boilerplate":
            answer = rng.choice(BOILERPLATE)
        case "copied":
            answer = question
    return {"question": question, "answer": answer}


def plant(source: Path, root: Path, steps: int) -> None:
    rng = random.Random(0)
    clean = [json.loads(line) for line in source.read_text("utf-8").splitlines()]
    rows = [("clean", row) for row in clean]
    chosen = rng.sample(range(len(clean)), int(SHARE * len(clean)) * len(KINDS))
    for i, index in enumerate(chosen):
        kind = KINDS[i % len(KINDS)]
        changed = (kind, damaged(kind, clean[index], clean, rng))
        if kind == "duplicate":
            rows.append(changed)
        else:
            rows[index] = changed
    rng.shuffle(rows)
    root.mkdir(parents=True, exist_ok=True)
    (root / "noisy.jsonl").write_text("".join(json.dumps(row) + "\n" for _, row in rows), "utf-8")
    (root / "truth.jsonl").write_text("".join(json.dumps(kind) + "\n" for kind, _ in rows), "utf-8")
    for name, text in (("all", ALL), ("tuned", TUNED)):
        (root / f"{name}.gin").write_text(text.format(configs=ROOT / "configs", root=root, steps=steps), "utf-8")


def run_verb(*arguments: object) -> None:
    started = os.times()
    subprocess.run([sys.executable, "-m", "slmjax", "data", *map(str, arguments)], check=True, cwd=ROOT)
    used = os.times()
    print(f"{arguments[0]}: {used.children_user - started.children_user:.0f} s of CPU time", flush=True)


def score(root: Path) -> None:
    for name, config in pipelines(root).items():
        (root / f"{name}.gin").write_text(config, "utf-8")
        run_verb(root / f"{name}.gin")
    targets = root / "target"
    targets.mkdir(exist_ok=True)
    truth = read_truth(root)
    rows = [row for path in documents(root) for row in pq.read_table(path).to_pylist()]
    clean = [row for row in rows if truth[number_of(row["id"])] == "clean"]
    chosen = random.Random(1).sample(clean, 100)
    table = pa.Table.from_pylist(chosen, schema=pq.read_schema(next(documents(root))))
    pq.write_table(table, targets / "target.parquet")
    (root / "influence.gin").write_text(INFLUENCE.format(root=root), "utf-8")
    for name, metric in (("ifd", "ifd"), ("embedding", "embedding"), ("influence", root / "influence.gin")):
        where = ("--documents", root / "all/documents", "--output", root / name)
        run_verb("score", root / "tuned.gin", *where, "--metric", metric)
    for name, binding in (("words", 'text = "question"'), ("embedding", f'embeddings = "{root}/embedding"')):
        config = f'DiversityConfig.documents = "{root}/all/documents"\nDiversityConfig.{binding}\n'
        (root / f"order_{name}.gin").write_text(f'{config}DiversityConfig.output_dir = "{root}/order_{name}"\n')
        run_verb("diversity", root / f"order_{name}.gin")


def pipelines(root: Path) -> dict[str, str]:
    """Configs of the rules, alone and with the ending that all answers of GSM8K have."""
    filtered = FILTERED.format(configs=ROOT / "configs", root=root, name="filtered")
    ending = FILTERED.format(configs=ROOT / "configs", root=root, name="filtered_ending")
    return {"filtered": filtered, "filtered_ending": ending + ENDING}


def documents(root: Path) -> Iterator[Path]:
    yield from sorted((root / "all/documents").glob("*.parquet"))


def number_of(name: str) -> int:
    return int(name.rpartition("#")[2]) - 1


def read_truth(root: Path) -> np.ndarray:
    return np.array([json.loads(line) for line in (root / "truth.jsonl").read_text("utf-8").splitlines()])


def read_column(directory: Path, column: str, number: int) -> np.ndarray:
    """A column of score files or decisions by the line of the conversation."""
    found = np.full(number, None, object)
    for path in directory.glob("*.parquet"):
        for row in pq.read_table(path, columns=["id", column]).to_pylist():
            found[number_of(row["id"])] = row[column]
    return found


def area_under_curve(scores: np.ndarray, wanted: np.ndarray, others: np.ndarray) -> float:
    """How often a wanted one has a higher score than another, ties counting half."""
    both = np.concatenate([scores[wanted], scores[others]])
    _, inverse, counts = np.unique(both, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    number = int(wanted.sum())
    return (ranks[:number].sum() - number * (number + 1) / 2) / (number * int(others.sum()))


def report(root: Path) -> None:
    truth = read_truth(root)
    rows = [json.loads(line) for line in (root / "noisy.jsonl").read_text("utf-8").splitlines()]
    questions: dict[str, list[int]] = collections.defaultdict(list)
    for i, row in enumerate(rows):
        questions[row["question"].removeprefix("Now: ").removeprefix("Please answer. ")].append(i)
    pairs = [group for group in questions.values() if any(truth[i] == "duplicate" for i in group)]
    kinds = [kind for kind in KINDS if kind != "duplicate"]
    dropped: dict[str, np.ndarray] = {}
    for name in ("filtered", "filtered_ending"):
        reasons = read_column(root / name / "work/decisions", "reason", len(truth))
        for stage in ("conversation_filter", "exact_dedup", "near_dedup"):
            dropped[f"{name}: {stage}"] = np.array([str(reason).startswith(stage) for reason in reasons])
    for name, bound in (("words", 0.2), ("embedding", 0.01)):
        distances = read_column(root / f"order_{name}", "distance", len(truth)).astype(float)
        dropped[f"distance < {bound} ({name})"] = distances < bound
    ifd = read_column(root / "ifd", "ifd", len(truth)).astype(float)
    dropped["ifd > 1"] = ifd > 1
    print(f"| dropped by | {' | '.join(kinds)} | pairs of duplicates | clean | noise among the dropped |")
    print("|---" * (len(kinds) + 4) + "|")
    in_pairs = np.isin(np.arange(len(truth)), [i for pair in pairs for i in pair])
    for name, gone in dropped.items():
        shares = [f"{gone[truth == kind].mean():.3f}" for kind in kinds]
        resolved = np.mean([gone[pair].any() for pair in pairs])
        clean = gone[(truth == "clean") & ~in_pairs]
        noise = (gone & ((truth != "clean") | in_pairs)).sum() / max(gone.sum(), 1)
        print(f"| {name} | {' | '.join(shares)} | {resolved:.3f} | {clean.mean():.4f} | {noise:.3f} |")
    scores = {f"ifd {name}": read_column(root / "ifd", name, len(truth)) for name in ("ifd", "loss", "answer_loss")}
    scores["influence"] = read_column(root / "influence", "influence", len(truth))
    print(f"\n| area under the curve against clean | {' | '.join(kinds)} |")
    print("|---" * (len(kinds) + 1) + "|")
    target = {row["id"] for row in pq.read_table(root / "target/target.parquet", columns=["id"]).to_pylist()}
    others = (truth == "clean") & ~np.isin(np.arange(len(truth)), [number_of(name) for name in target])
    for name, values in scores.items():
        values = values.astype(float)
        areas = [f"{area_under_curve(values, truth == kind, others):.3f}" for kind in kinds]
        print(f"| {name} | {' | '.join(areas)} |")


def ablate(root: Path, source: Path, steps: int) -> None:
    """Trains on halves; prints the held-out bits per byte of clean answers."""
    common = {"root": root, "source": source}
    for name in ("clean", "selected", "random"):
        parts = {"clean": CLEAN, "selected": SELECTED, "random": RANDOM}
        (root / f"half_{name}.gin").write_text((HALF + parts[name]).format(name=name, **common), "utf-8")
        run_verb(root / f"half_{name}.gin")
    for seed in range(3):
        for name in ("selected", "random"):
            bindings = (
                f"RunConfig.output_dir={root}/half_{name}_{seed}_{steps}", f"RunConfig.seed={seed}",
                f"RunConfig.steps={steps}", f"CheckpointConfig.every_steps={steps}",
                f"TokenSourceConfig.path={root}/half_{name}/train",
                f"held_out/TokenSourceConfig.path={root}/half_clean/held_out", "TrackingConfig.console=False",
            )  # fmt: skip
            loaded = load([root / "tuned.gin"], [*bindings, "RunConfig.tracking=@TrackingConfig()"])
            train(loaded.config, config_text=loaded.text, config_json=to_json(loaded.config))
            lines = (Path(loaded.config.output_dir) / "metrics.jsonl").read_text().splitlines()
            found = [json.loads(line) for line in lines if "held_out/bits_per_byte" in line][-1]
            print(f"{name} seed {seed}: {found['held_out/bits_per_byte']:.4f} bits per byte", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["plant", "score", "report", "ablate"])
    parser.add_argument("source", type=Path, nargs="?", help="jsonl with question and answer; for plant and ablate")
    parser.add_argument("--root", type=Path, default=Path("runs/instruction"))
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    root = args.root.resolve()
    match args.what:
        case "plant":
            plant(args.source, root, args.steps)
        case "score":
            score(root)
        case "report":
            report(root)
        case "ablate":
            ablate(root, args.source.resolve(), args.steps)


if __name__ == "__main__":
    main()
