"""A training run of seconds: a corpus of small functions, its tokenizer, two token stores and a Gin file."""

import json
import random

from slmjax.config.resolved import to_json
from slmjax.data.token_store import TokenStoreWriter
from slmjax.data.tokenizer import train_tokenizer
from slmjax.gin_loader import load

VOCAB_SIZE = 340

CONFIG = """\
RunConfig.output_dir = "{root}/run"
RunConfig.steps = 12
RunConfig.model = @ModelConfig()
ModelConfig.vocab_size = 352
ModelConfig.width = 16
ModelConfig.pattern = (@LayerConfig(),)
ModelConfig.repeats = 2
ModelConfig.final_norm = @RMSNormConfig()
LayerConfig.mixer = @AttentionConfig()
LayerConfig.feed_forward = @FeedForwardConfig()
LayerConfig.norm = @RMSNormConfig()
FeedForwardConfig.hidden = 32
AttentionConfig.num_heads = 2
AttentionConfig.num_kv_heads = 1
AttentionConfig.head_dim = 8
AttentionConfig.rope = @RopeConfig()

RunConfig.input = @InputConfig()
InputConfig.tokenizer = "{root}/tokenizer.model"
InputConfig.batch_size = 8
InputConfig.sequence_length = 32
InputConfig.stages = (@first/MixtureStageConfig(), @second/MixtureStageConfig())
first/MixtureStageConfig.sources = (@a/TokenSourceConfig(), @b/TokenSourceConfig())
second/MixtureStageConfig.sources = (@b/TokenSourceConfig(),)
second/MixtureStageConfig.start_step = 5
a/TokenSourceConfig.path = "{root}/a"
a/TokenSourceConfig.weight = 2.0
b/TokenSourceConfig.path = "{root}/b"

RunConfig.optimizer = @AdamWConfig()
AdamWConfig.peak_lr = 0.01
# Another rate at every step, but no other program for another number of steps: less to compile.
RunConfig.schedule = @InverseSqrtScheduleConfig()
InverseSqrtScheduleConfig.warmup = @WarmupConfig()
InverseSqrtScheduleConfig.timescale_steps = 20
WarmupConfig.steps = 2

RunConfig.evaluation = @EvaluationConfig()
EvaluationConfig.sets = (@EvalSetConfig(),)
EvaluationConfig.every_steps = 4
EvalSetConfig.name = "held_out"
EvalSetConfig.source = @held_out/TokenSourceConfig()
held_out/TokenSourceConfig.path = "{root}/held_out"

RunConfig.checkpoint = @CheckpointConfig()
CheckpointConfig.every_steps = 3
RunConfig.tracking = @TrackingConfig()
TrackingConfig.log_every_steps = 1
TrackingConfig.console = False
"""


def write_config(root):
    """Writes {root}/run.gin, and nothing that it names; returns its path."""
    path = root / "run.gin"
    path.write_text(CONFIG.format(root=root))
    return path


def write_tiny_run(root, *, num_texts=90):
    """Writes {root}/run.gin and all that it names; returns its path."""
    rng = random.Random(0)
    words = ("add", "sub", "mul", "pow", "join", "split", "total", "first")
    texts = [f"def {rng.choice(words)}_{i}(x):\n    return x + {rng.randrange(99)}\n" for i in range(num_texts)]
    tokenizer = train_tokenizer(texts, root / "tokenizer.model", vocab_size=VOCAB_SIZE)
    third = num_texts // 3
    for name, start in (("a", 0), ("b", third), ("held_out", 2 * third)):
        write_store(root / name, texts[start : start + third], tokenizer)
    return write_config(root)


def write_store(path, texts, tokenizer, *, tokenizer_sha256=None):
    """Writes a token store of `texts`, if asked with another tokenizer's name."""
    sha256 = tokenizer_sha256 or tokenizer.sha256
    with TokenStoreWriter(path, tokenizer_sha256=sha256, vocab_size=VOCAB_SIZE, config_sha256="0" * 64) as writer:
        for text in texts:
            writer.add([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], len(text))


def train_here(path, *overrides):
    """Trains in this process as `slmjax train PATH --set OVERRIDE...` does; returns the outcome."""
    from slmjax.train.loop import train

    loaded = load([path], overrides)
    return train(loaded.config, config_text=loaded.text, config_json=to_json(loaded.config))


def read_metrics(run_dir):
    """Returns the lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# What depends on the clock or the machine and not on the computation.
_CLOCK = {"tokens_per_second", "tokens_per_second_per_device", "step_seconds", "input_wait_share", "goodput"}


def read_losses(run_dir):
    """Returns {(step, metric): value} of all that must come out the same, bit for bit, if the run is made again."""
    return {
        (line["step"], name): value
        for line in read_metrics(run_dir)
        for name, value in line.items()
        if name not in _CLOCK
    }
