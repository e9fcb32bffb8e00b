"""Samples of a trained run: printed, and kept in <output_dir>/samples.jsonl."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.text import Text

from slmjax.config import RunConfig
from slmjax.data.conversations import render_prompt
from slmjax.data.tokenizer import END
from slmjax.generate.decode import Generator
from slmjax.generate.text import printable
from slmjax.train.restore import LoadedRun, load_run, params_sha256


def sample(
    run_config: RunConfig,
    prompts: Sequence[str],
    *,
    instruct: bool = False,
    seed: int = 0,
    step: int | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Continues `prompts`, prints each with its continuation, and appends them to the run's samples.jsonl.

    Args:
      run_config: a trained run; its `generation` says how to draw, its sequence length limits prompt and continuation.
      prompts: texts to continue; "" begins a new document.
      instruct: each prompt is a user's turn, and the assistant answers.
      seed: of the draws.
      step: checkpoint to use; None is the newest whole one.
      console: where to print.

    Returns:
      The records written: prompt, completion, how it was drawn, prompt_id, checkpoint_step, checkpoint_sha256.

    Raises:
      ValueError: the run has no checkpoint, or a prompt is too long.
    """
    console = console or Console(highlight=False)
    loaded = load_run(run_config, step=step)
    generator = make_generator(loaded, run_config)
    tokenizer, generation = loaded.tokenizer, run_config.generation
    if instruct:
        ids = [render_prompt([{"role": "user", "content": prompt}], tokenizer) for prompt in prompts]
    else:
        ids = [[tokenizer.bos_id, *text_ids] for text_ids in tokenizer.encode_batch(prompts)]
    completions = generator.generate(
        ids, config=generation, key=jax.random.key(seed), stop_ids=stop_ids(loaded, instruct=instruct)
    )
    checkpoint = params_sha256(loaded.params)
    records = [
        {
            "prompt": prompt,
            "completion": tokenizer.decode(completion),
            "instruct": instruct,
            "prompt_id": hashlib.sha256(prompt.encode()).hexdigest()[:16],
            "checkpoint_step": loaded.step,
            "checkpoint_sha256": checkpoint,
            "temperature": generation.temperature,
            "top_k": generation.top_k,
            "top_p": generation.top_p,
            "seed": seed,
            "tokens": len(completion),
        }
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    with open(Path(run_config.output_dir) / "samples.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    for record in records:
        text = Text(printable(record["prompt"]), style="bold")
        text.append("\n" if instruct else "").append(printable(record["completion"]), style="not bold")
        console.rule(f"step {loaded.step}, temperature {generation.temperature:g}")
        console.print(text, soft_wrap=True)
    return records


def make_generator(loaded: LoadedRun, run_config: RunConfig, *, chunk_tokens: int = 16) -> Generator:
    """Returns a generator for a trained run, with the sequence length it was trained at as its context."""
    return Generator(
        loaded.params,
        loaded.model_config,
        context_length=run_config.input.sequence_length,
        execution=run_config.execution,
        num_ids=loaded.tokenizer.vocab_size,
        chunk_tokens=chunk_tokens,
    )


def stop_ids(loaded: LoadedRun, *, instruct: bool) -> tuple[int, ...]:
    """Returns the tokens that end a document, or the assistant's turn."""
    tokenizer = loaded.tokenizer
    return (tokenizer.eos_id, tokenizer.control_id(END)) if instruct else (tokenizer.eos_id,)
