"""Tokens per second, MFU and memory of a training step in several variants, next to transformers + torch.compile.

    python benchmarks/train_step.py configs/recipes/smollm2_135m.gin --batch 32 --peer transformers \
      --variant microbatches=1 --variant microbatches=1,xla_gpu_enable_triton_gemm=false

A variant is a list of field=value: fields of ExecutionConfig, `batch` and `length`, and XLA's own options by their
names, which replace those of slmjax/train/compiler.py. Each runs in a process of its own. Tokens are random; the mask
is causal over whole rows, or with --documents over packed documents of lognormal lengths with that mean. FLOPs per
token are those of `slmjax show` (docs/guides/train.md), the same number for both sides; the peak is that of
slmjax/train/throughput.py. Steps are dispatched as training does, without waiting for each; the time is the median over
blocks of ten.
"""

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

BLOCK = 10


class Prepared(NamedTuple):
    """A compiled step, what it takes, and what it cost to make."""

    step: Any
    state: Any
    batch: Any
    compile_seconds: float
    flops_per_token: float


def document_lengths(rows: int, length: int, mean: int, seed: int = 0) -> np.ndarray:
    """Returns document ids (rows, length): lognormal lengths with this mean, sigma 1; 0 is one document a row."""
    if mean == 0:
        return np.ones((rows, length), np.int32)
    rng = np.random.default_rng(seed)
    ids = np.zeros((rows, length), np.int32)
    for row in ids:
        start = document = 0
        while start < length:
            document += 1
            end = start + max(1, int(rng.lognormal(np.log(mean) - 0.5, 1.0)))
            row[start:end], start = document, end
    return ids


def make_batch(vocab_size: int, rows: int, length: int, *, documents: int | None) -> Any:
    """Returns a Batch of random tokens; `documents` is the mean length of packed documents, None passes no ids."""
    from slmjax.data.batch import Batch

    tokens = np.random.default_rng(0).integers(3, vocab_size, (rows, length + 1), dtype=np.int32)
    ids = document_lengths(rows, length, documents or 0)
    index = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    starts = np.maximum.accumulate(np.where(np.diff(ids, axis=1, prepend=0) != 0, index, 0), axis=1)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=np.ones((rows, length), np.float32),
        documents=None if documents is None else ids,
        positions=index - starts,
    )


def configured(run, variant: dict, documents: int | None):
    """Returns `run` as the variant says."""
    fields = {field.name for field in dataclasses.fields(run.execution)}
    unknown = {name for name in variant if name not in fields | {"batch", "length"} and not name.startswith("xla_")}
    if unknown:
        raise ValueError(f"a variant names fields of ExecutionConfig, batch, length or xla_...; got {sorted(unknown)}")
    return dataclasses.replace(
        run,
        input=dataclasses.replace(
            run.input,
            batch_size=variant["batch"],
            sequence_length=variant["length"],
            document_isolation=documents is not None,
        ),
        execution=dataclasses.replace(run.execution, **{k: v for k, v in variant.items() if k in fields}),
    )


def xla_options(run, variant: dict, platform: str) -> dict | None:
    """Returns the options that training compiles with, and those of the variant in their place."""
    from slmjax.train.compiler import compiler_options

    return (
        compiler_options(platform, run.execution) | {k: v for k, v in variant.items() if k.startswith("xla_")} or None
    )


def prepare(run, variant: dict, documents: int | None) -> Prepared:
    """Compiles the step of `run` as `variant` says, and makes its state and a batch."""
    import jax

    from slmjax import model
    from slmjax.parallel.mesh import make_mesh, on_mesh
    from slmjax.parallel.rules import constrain, host_batch_to_global
    from slmjax.train.state import abstract_state, build_optimizer, init_state
    from slmjax.train.step import make_train_step

    run = configured(run, variant, documents)
    mesh = make_mesh(run.mesh)
    optimizer, schedule = build_optimizer(run)
    abstract = abstract_state(run, optimizer, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    state = jax.jit(lambda: init_state(run, optimizer), out_shardings=shardings)()
    step = jax.jit(
        on_mesh(mesh, make_train_step(run, optimizer, schedule, constrain(mesh))),
        donate_argnums=0,
        out_shardings=(shardings, None),
    )
    host_batch = make_batch(run.model.vocab_size, variant["batch"], variant["length"], documents=documents)
    batch = host_batch_to_global(host_batch, mesh)
    began = time.perf_counter()
    options = xla_options(run, variant, jax.default_backend())
    compiled = step.lower(state, batch).compile(compiler_options=options)
    seconds = time.perf_counter() - began

    def visible(window: int | None) -> float:
        if documents is None:
            return model.causal_visible_keys(variant["length"], window)
        return model.packed_visible_keys(host_batch.documents, window)

    return Prepared(compiled, state, batch, seconds, model.flops_per_token(run.model, visible))


def timed(step: Callable[[], Any], *, warm: int, steps: int) -> tuple[float, list[float]]:
    """Returns the seconds of one step, the median over blocks, and the first and the last loss."""
    first = float(step())
    for _ in range(warm):
        last = step()
    float(last)
    seconds = []
    for _ in range(max(1, steps // BLOCK)):
        began = time.perf_counter()
        for _ in range(BLOCK):
            last = step()
        final = float(last)
        seconds.append((time.perf_counter() - began) / BLOCK)
    return statistics.median(seconds), [first, final]


def slmjax_step(run, variant: dict, documents: int | None, warm: int, steps: int) -> dict:
    import jax

    prepared = prepare(run, variant, documents)
    state = prepared.state

    def step():
        nonlocal state
        state, metrics = prepared.step(state, prepared.batch)
        return metrics["loss"]

    seconds, losses = timed(step, warm=warm, steps=steps)
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "step_seconds": seconds,
        "compile_seconds": prepared.compile_seconds,
        "peak_gib": stats.get("peak_bytes_in_use", 0) / 2**30,
        "losses": losses,
        "flops_per_token": prepared.flops_per_token,
    }


def transformers_step(run, variant: dict, documents: int | None, warm: int, steps: int) -> dict:
    """The usual PyTorch recipe: bf16 autocast, fp32 weights, SDPA, torch.compile, fused AdamW, clipping."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layer = run.model.pattern[0]
    config = LlamaConfig(
        vocab_size=run.model.vocab_size,
        hidden_size=run.model.width,
        intermediate_size=layer.feed_forward.hidden,
        num_hidden_layers=run.model.num_layers,
        num_attention_heads=layer.mixer.num_heads,
        num_key_value_heads=layer.mixer.num_kv_heads,
        head_dim=layer.mixer.head_dim,
        max_position_embeddings=variant["length"],
        tie_word_embeddings=run.model.tied_embeddings,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    module = LlamaForCausalLM(config).cuda()
    compiled = torch.compile(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    tokens = torch.randint(3, run.model.vocab_size, (variant["batch"], variant["length"]), device="cuda")
    torch.cuda.reset_peak_memory_stats()

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    began = time.perf_counter()
    float(step())
    compile_seconds = time.perf_counter() - began
    seconds, losses = timed(step, warm=warm, steps=steps)
    return {
        "step_seconds": seconds,
        "compile_seconds": compile_seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "losses": losses,
    }


def parse_variant(text: str) -> dict:
    """Reads field=value,...; numbers and booleans as such, since XLA's options have types too."""
    words = {"true": True, "false": False}
    pairs = (pair.partition("=") for pair in filter(None, text.split(",")))
    return {name: int(value) if value.isdigit() else words.get(value, value) for name, _, value in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--batch", type=int, default=32, help="rows, where a variant does not say")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--warm", type=int, default=20, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, default=30, help="timed steps, a multiple of ten")
    parser.add_argument("--peer", choices=["transformers"], default=None)
    parser.add_argument("--peer-batch", type=int, default=None, help="rows of the peer's batch, if it needs fewer")
    parser.add_argument("--variant", action="append", default=[], help="field=value,...: one more variant to time")
    parser.add_argument("--documents", type=int, default=None, help="mean length of packed documents; 0 is whole rows")
    parser.add_argument("--json", default=None, help="append the rows to this file")
    args = parser.parse_args()

    from slmjax.gin_loader import load

    run = load([args.config]).config
    defaults = {"batch": args.batch, "length": args.length}
    jobs: list[tuple[Callable, str, dict]] = [
        (slmjax_step, text, defaults | parse_variant(text)) for text in args.variant or [""]
    ]
    if args.peer:
        peer = defaults | {"batch": args.peer_batch or args.batch}
        jobs.insert(0, (transformers_step, "transformers + torch.compile", peer))
    # A process each, so that memory peaks and allocators do not meet.
    context = multiprocessing.get_context("spawn")
    rows = []
    for function, name, variant in jobs:
        try:
            with context.Pool(1) as pool:
                measured = pool.apply(function, (run, variant, args.documents, args.warm, args.steps))
            rows.append({"what": name or "as configured", **variant, **measured})
        except Exception as error:  # one variant that runs out of memory must not lose the others
            print(f"failed: {name}: {str(error)[:300]}", flush=True)
    import jax

    from slmjax.train.throughput import peak_flops

    flops = next((row["flops_per_token"] for row in rows if "flops_per_token" in row), None)
    nominal = peak_flops(jax.devices()[0].device_kind)
    peak = nominal and nominal * jax.device_count()
    documents = "" if args.documents is None else f", documents of {args.documents or 'whole rows'}"
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}, {args.config}{documents}")
    print("| what | rows x length | tokens/s | ms | MFU | peak GiB | compile s | loss first -> last |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        row["tokens_per_second"] = row["batch"] * row["length"] / row["step_seconds"]
        mfu = row["tokens_per_second"] * flops / peak if peak and flops else float("nan")
        print(
            f"| {row['what']} | {row['batch']} x {row['length']} | {row['tokens_per_second']:,.0f} | "
            f"{1e3 * row['step_seconds']:.1f} | {mfu:.1%} | {row['peak_gib']:.1f} | {row['compile_seconds']:.0f} | "
            f"{row['losses'][0]:.3f} -> {row['losses'][1]:.3f} |",
            flush=True,
        )
        if args.json:
            with open(args.json, "a") as file:
                file.write(json.dumps({"config": args.config, "documents": args.documents, **row}) + "\n")


if __name__ == "__main__":
    main()
