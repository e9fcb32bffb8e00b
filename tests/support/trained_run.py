"""A run directory with a checkpoint, as training leaves it, made without training."""

import jax
import jax.numpy as jnp
import numpy as np

from slmjax import config as c
from slmjax import model
from slmjax.data.conversations import learned_bytes, render
from slmjax.data.token_store import TokenStoreWriter
from slmjax.data.tokenizer import train_tokenizer
from slmjax.train.checkpoint import Checkpointer

VOCAB_SIZE = 340
TEXTS = [f"def add_{i}(x):\n    return x + {i}\n" for i in range(40)]


def make_trained_run(root, *, steps=(10, 20)):
    """Returns the RunConfig of a run in `root`/run, with random parameters at each of `steps`."""
    tokenizer = train_tokenizer(TEXTS, root / "tokenizer.model", vocab_size=VOCAB_SIZE)
    identity = {"tokenizer_sha256": tokenizer.sha256, "vocab_size": VOCAB_SIZE, "config_sha256": "0" * 64}
    for name, texts in (("train", TEXTS[:30]), ("held_out", TEXTS[30:])):
        with TokenStoreWriter(root / "corpus" / name, **identity) as writer:
            for text in texts:
                writer.add([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], len(text))
    with TokenStoreWriter(root / "corpus" / "talk", with_weights=True, **identity) as writer:
        for text in TEXTS[30:]:
            messages = [{"role": "user", "content": text[:9]}, {"role": "assistant", "content": text}]
            ids, weights = render(messages, tokenizer)
            writer.add(ids, learned_bytes(messages), weights)
    layer = c.LayerConfig(
        mixer=c.AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, rope=c.RopeConfig()),
        feed_forward=c.FeedForwardConfig(hidden=16),
        norm=c.RMSNormConfig(),
    )

    def source(name, rows="stream"):
        return c.TokenSourceConfig(path=str(root / "corpus" / name), rows=rows)

    run = c.RunConfig(
        output_dir=str(root / "run"),
        steps=max(steps),
        model=c.ModelConfig(vocab_size=384, width=16, pattern=(layer,), repeats=1, final_norm=c.RMSNormConfig()),
        input=c.InputConfig(
            tokenizer=str(root / "tokenizer.model"),
            stages=(c.MixtureStageConfig(sources=(source("train"),)),),
            batch_size=2,
            sequence_length=64,
        ),
        optimizer=c.AdamWConfig(peak_lr=1e-3),
        schedule=c.ConstantScheduleConfig(),
        checkpoint=c.CheckpointConfig(every_steps=10, keep_last=5, asynchronous=False),
        evaluation=c.EvaluationConfig(
            sets=(
                c.EvalSetConfig(name="text", source=source("held_out")),
                c.EvalSetConfig(name="talk", source=source("talk", rows="whole")),
            ),
            batch_size=2,
        ),
        mesh=c.MeshConfig(data=2, fsdp=-1),
        generation=c.GenerationConfig(max_new_tokens=8, temperature=1.0),
    )
    checkpointer = Checkpointer(root / "run" / "checkpoints", run.checkpoint)
    for step in steps:
        checkpointer.save(step, {"params": params_of(run, step), "step": jnp.array(step)}, extra={})
    checkpointer.close()
    return run


def params_of(run, step):
    """The parameters that `make_trained_run` saved at `step`."""
    rng = np.random.default_rng(step)
    return jax.tree.map(
        lambda spec: jnp.asarray(rng.normal(scale=0.3, size=spec.shape), jnp.float32), model.specs(run.model)
    )
