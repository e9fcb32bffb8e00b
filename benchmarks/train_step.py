"""Tokens per second and MFU of a training step, next to transformers + torch.compile in the same call.

    python benchmarks/train_step.py configs/recipes/smollm2_135m.gin --batch 32 --steps 300 --peer transformers

Tokens are random: speed does not depend on them, but for the mask, which is causal over whole rows. FLOPs per token are
those of `slmjax show` (docs/guides/train.md), the same number for both sides; the peak is that of
slmjax/train/throughput.py. Times are medians of single steps, each waited for.
"""

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import time

import numpy as np


def slmjax_step(run, batch_size: int, length: int, steps: int, overrides: dict) -> dict:
    import jax

    from slmjax import model
    from slmjax.data.batch import Batch
    from slmjax.parallel.mesh import make_mesh, on_mesh
    from slmjax.parallel.rules import constrain, host_batch_to_global
    from slmjax.train.state import abstract_state, build_optimizer, init_state
    from slmjax.train.step import make_train_step

    run = dataclasses.replace(
        run,
        input=dataclasses.replace(run.input, batch_size=batch_size, sequence_length=length),
        execution=dataclasses.replace(run.execution, **overrides),
    )
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
    tokens = np.random.default_rng(0).integers(3, run.model.vocab_size, (batch_size, length + 1), dtype=np.int32)
    packed = run.input.document_isolation
    batch = Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=np.ones((batch_size, length), np.float32),
        documents=np.ones((batch_size, length), np.int32) if packed else None,
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), (batch_size, length)),
    )
    batch = host_batch_to_global(batch, mesh)
    began = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - began
    seconds, losses = [], []
    for _ in range(steps):
        began = time.perf_counter()
        state, metrics = compiled(state, batch)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - began)
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "what": "slmjax " + " ".join(f"{k}={v}" for k, v in overrides.items()),
        "step_seconds": statistics.median(seconds[len(seconds) // 5 :]),
        "steps": steps,
        "compile_seconds": compile_seconds,
        "peak_gib": stats.get("peak_bytes_in_use", 0) / 2**30,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "flops_per_token": model.flops_per_token(run.model, lambda w: model.causal_visible_keys(length, w)),
    }


def transformers_step(run, batch_size: int, length: int, steps: int) -> dict:
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
        max_position_embeddings=length,
        tie_word_embeddings=run.model.tied_embeddings,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    module = LlamaForCausalLM(config).cuda()
    compiled = torch.compile(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    tokens = torch.randint(3, run.model.vocab_size, (batch_size, length), device="cuda")
    torch.cuda.reset_peak_memory_stats()

    def step() -> float:
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    began = time.perf_counter()
    losses = [step()]
    compile_seconds = time.perf_counter() - began
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        losses.append(step())
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {
        "what": "transformers + torch.compile",
        "step_seconds": statistics.median(seconds[len(seconds) // 5 :]),
        "steps": steps,
        "compile_seconds": compile_seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--peer", choices=["transformers"], default=None)
    parser.add_argument("--peer-batch", type=int, default=None, help="rows of the peer's batch, if it needs fewer")
    parser.add_argument(
        "--execution", action="append", default=[], help="field=value,...: one more variant of ExecutionConfig to time"
    )
    parser.add_argument("--packed", action="store_true", help="pass document ids, as training on packed text does")
    parser.add_argument("--json", default=None, help="append the rows to this file")
    args = parser.parse_args()

    from slmjax.gin_loader import load

    run = load([args.config]).config
    run = dataclasses.replace(run, input=dataclasses.replace(run.input, document_isolation=args.packed))
    rows = []
    # A process each, so that memory peaks and allocators do not meet.
    context = multiprocessing.get_context("spawn")
    jobs = []
    if args.peer:
        batch_size = args.peer_batch or args.batch
        jobs.append((transformers_step, (run, batch_size, args.length, args.steps)))
    for variant in args.execution or [""]:
        pairs = (pair.partition("=") for pair in filter(None, variant.split(",")))
        overrides = {name: int(value) if value.isdigit() else value for name, _, value in pairs}
        jobs.append((slmjax_step, (run, args.batch, args.length, args.steps, overrides)))
    for function, arguments in jobs:
        try:
            with context.Pool(1) as pool:
                rows.append((pool.apply(function, arguments), arguments[1]))
        except Exception as error:  # one variant that runs out of memory must not lose the others
            print(f"failed: {function.__name__} {arguments[-1]}: {str(error)[:300]}", flush=True)
    import jax

    from slmjax.train.throughput import peak_flops

    flops = next((row["flops_per_token"] for row, _ in rows if "flops_per_token" in row), None)
    nominal = peak_flops(jax.devices()[0].device_kind)
    peak = nominal and nominal * jax.device_count()
    print(
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}, "
        f"{args.config}, length {args.length}"
    )
    print("| what | batch | tokens/s | MFU | peak GiB | compile s | loss first -> last | steps |")
    print("|---|---|---|---|---|---|---|---|")
    for row, batch_size in rows:
        row["tokens_per_second"] = batch_size * args.length / row["step_seconds"]
        mfu = row["tokens_per_second"] * flops / peak if peak and flops else float("nan")
        print(
            f"| {row['what']} | {batch_size} | {row['tokens_per_second']:,.0f} | {mfu:.1%} | {row['peak_gib']:.1f} | "
            f"{row['compile_seconds']:.0f} | {row['first_loss']:.3f} -> {row['last_loss']:.3f} | {row['steps']} |",
            flush=True,
        )
        if args.json:
            with open(args.json, "a") as file:
                file.write(json.dumps({**row, "batch": batch_size, "config": args.config}) + "\n")


if __name__ == "__main__":
    main()
