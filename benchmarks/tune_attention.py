"""Measures tilings of attention on this Hopper GPU and writes the fastest into the table that the kernels read.

    python benchmarks/tune_attention.py --prune survivors.json      on any machine with the extra `compile`
    python benchmarks/tune_attention.py --survivors survivors.json  on the GPU

The first compiles every tiling down to machine code, needs no GPU, and keeps those that fit the shared memory and spill
no registers; without --survivors the second does it as well. Each tiling is measured at one length, and the fastest few
of each kind of mask at the others. Rows of documents are as in benchmarks/attention.py. Times are medians over
repetitions of the mean of several calls.
"""

import argparse
import concurrent.futures
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from attention import KINDS, inputs, masks, milliseconds

from slmjax.kernels.hopper import attention_tiling as tilings
from slmjax.kernels.hopper.attention_backward_fused import FusedTiling, attention_backward_fused
from slmjax.kernels.hopper.attention_backward_split import SplitTiling, attention_backward_split
from slmjax.kernels.hopper.attention_forward import attention_forward
from slmjax.kernels.targets import compile_for, hopper_devices
from slmjax.ops.mask import ranges

TABLE = Path(tilings.__file__).with_name("attention_tilings.json")
# Heads of queries, and of keys and values, by how many share.
HEADS = {1: (8, 8), 3: (9, 3), 4: (12, 3)}
TOKENS = 1 << 15  # in a batch, whatever the length
FIRST_LENGTH = 4096
KEPT = 3  # of each kind of mask, after the first length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 80, 96, 128, 256])
    parser.add_argument(
        "--groups",
        type=int,
        nargs="+",
        default=list(HEADS),
        choices=list(HEADS),
        help="heads that share keys and values",
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 8192], help=f"besides {FIRST_LENGTH}")
    parser.add_argument("--prune", type=Path, help="write the tilings that compile well to this file, and stop")
    parser.add_argument("--survivors", type=Path, help="a file of --prune")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at one time")
    parser.add_argument("--output", type=Path, default=TABLE)
    parser.add_argument("--compile", help=argparse.SUPPRESS)  # one tiling, in a process of its own
    args = parser.parse_args()
    if args.compile:
        compile_one(*json.loads(args.compile))
        return
    survivors = (
        json.loads(args.survivors.read_text()) if args.survivors else prune(args.head_dims, args.groups, args.jobs)
    )
    if args.prune:
        args.prune.write_text(json.dumps(survivors, indent=1) + "\n")
        return
    if jax.default_backend() != "gpu":
        sys.exit("benchmarks/tune_attention.py measures on Hopper GPUs, and there is none here; --prune needs none")
    kind = jax.devices()[0].device_kind
    print(f"{kind}, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}\n")
    print("| head_dim | heads | mask | length | forward ms | / default | backward ms | / default | deterministic ms |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for head_dim in args.head_dims:
        for group in args.groups:
            rows = tune(head_dim, group, args.lengths, survivors[f"{head_dim},{group}"], args.jobs)
            write(args.output, kind, rows)


def candidates(head_dim: int, heads_per_group: int) -> list[Any]:
    """Tilings of both directions, in a fixed order."""
    return [*tilings.forward_tilings(head_dim, heads_per_group=heads_per_group), *tilings.backward_tilings(head_dim)]


def prune(head_dims: list[int], groups: list[int], jobs: int) -> dict[str, list[int]]:
    """Of each head_dim and number of heads, the indices of the candidates that compile well."""
    cases = [
        (head_dim, group, index)
        for head_dim in head_dims
        for group in groups
        for index in range(len(candidates(head_dim, group)))
    ]
    survivors: dict[str, list[int]] = {f"{head_dim},{group}": [] for head_dim in head_dims for group in groups}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for (head_dim, group, index), why_not in zip(cases, pool.map(judge, cases), strict=True):
            if why_not is None:
                survivors[f"{head_dim},{group}"].append(index)
            else:
                print(f"head_dim {head_dim}: {candidates(head_dim, group)[index]}: {why_not}", flush=True)
    return survivors


def judge(case: tuple[int, int, int]) -> str | None:
    """Why a candidate is not worth measuring, or None."""
    environment = os.environ | {"MOSAIC_GPU_DUMP_PTXAS": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--compile", json.dumps(case)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    report = result.stdout + result.stderr
    if result.returncode:
        return report.strip().splitlines()[-1]
    spilled = [
        int(number) for pair in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill", report) for number in pair
    ]
    if not spilled:
        sys.exit(f"the assembler said nothing of {case}: {report}")
    return f"{max(spilled)} bytes of registers spilled" if any(spilled) else None


def compile_one(head_dim: int, heads_per_group: int, index: int) -> None:
    query_heads, heads = HEADS[heads_per_group]
    q_BTNH, k_BSKH = (jax.ShapeDtypeStruct((2, 1024, n, head_dim), jnp.bfloat16) for n in (query_heads, heads))
    stats_BNT = jax.ShapeDtypeStruct((2, query_heads, 1024), jnp.float32)
    range_BT = jax.ShapeDtypeStruct((2, 1024), jnp.int32)
    tiling = candidates(head_dim, heads_per_group)[index]
    if isinstance(tiling, tilings.ForwardTiling):
        arguments = (q_BTNH, k_BSKH, k_BSKH, range_BT, range_BT)
    else:
        arguments = (q_BTNH, k_BSKH, k_BSKH, q_BTNH, stats_BNT, stats_BNT, range_BT, range_BT)
    compile_for(hopper_devices(), kernel(tiling, head_dim), *arguments)


def kernel(tiling: Any, head_dim: int):
    options = {"scale": head_dim**-0.5, "softcap": None, "tiling": tiling}
    match tiling:
        case FusedTiling():
            return lambda *arrays: attention_backward_fused(*arrays, **options)
        case SplitTiling():
            return lambda *arrays: attention_backward_split(*arrays, **options)
        case _:
            return lambda *arrays: attention_forward(*arrays, None, **options)


def tune(
    head_dim: int, heads_per_group: int, lengths: list[int], indices: list[int], jobs: int
) -> list[tilings.Measured]:
    """Measures the candidates at every length and returns the fastest of each kind of mask and length."""
    all_of_them = candidates(head_dim, heads_per_group)
    default = tilings.default_tiling(head_dim, heads_per_group=heads_per_group)
    steady = tilings.default_tiling(head_dim, heads_per_group=1, deterministic=True)
    chosen = {all_of_them[i]: None for i in indices} | {
        default.forward: None,
        default.backward: None,
        steady.backward: None,
    }
    rows = []
    wanted: dict[str, set[Any]] = {mask: set(chosen) for mask in KINDS.values()}
    for length in [FIRST_LENGTH, *lengths]:
        measured = times(head_dim, heads_per_group, length, wanted, jobs)
        for mask, of_mask in measured.items():
            ranked = sorted(of_mask, key=of_mask.__getitem__)
            groups = [[t for t in ranked if group(t)] for group in (is_forward, is_backward, is_split)]
            forward, backward, deterministic = (of_group[0] for of_group in groups)
            wanted[mask] = {t for of_group in groups for t in of_group[:KEPT]} | {default.forward, default.backward}
            rows.append(
                tilings.Measured(
                    head_dim=head_dim,
                    heads_per_group=heads_per_group,
                    mask=mask,
                    length=length,
                    forward=forward,
                    backward=backward,
                    deterministic=deterministic,
                )
            )
            best = [of_mask[t] for t in (forward, backward, deterministic)]
            usual = [of_mask[t] for t in (default.forward, default.backward)]
            print(
                f"| {head_dim} | {'/'.join(map(str, HEADS[heads_per_group]))} | {mask} | {length} | {best[0]:.3f} | "
                f"{best[0] / usual[0]:.2f} | {best[1]:.3f} | {best[1] / usual[1]:.2f} | {best[2]:.3f} |",
                flush=True,
            )
    return rows


def is_forward(tiling: Any) -> bool:
    return isinstance(tiling, tilings.ForwardTiling)


def is_backward(tiling: Any) -> bool:
    return not is_forward(tiling)


def is_split(tiling: Any) -> bool:
    return isinstance(tiling, SplitTiling)


def times(
    head_dim: int, heads_per_group: int, length: int, wanted: dict[str, set[Any]], jobs: int
) -> dict[Any, dict[Any, float]]:
    """Milliseconds of the tilings wanted of each kind of mask; each is compiled once, several at one time."""
    B = max(TOKENS // length, 1)
    q_BTNH, k_BSKH, v_BSKH, dout_BTNH = inputs((B, length, *HEADS[heads_per_group], head_dim))
    default = tilings.default_tiling(head_dim, heads_per_group=heads_per_group)
    forward = jax.jit(kernel(default.forward, head_dim))
    cases = {}
    for name, mask in KINDS.items():
        span = ranges(masks(B, length)[name], B, length, length)
        out_BTNH, lse_BNT = forward(q_BTNH, k_BSKH, v_BSKH, *span)
        delta_BNT = jnp.sum(out_BTNH.astype(jnp.float32) * dout_BTNH.astype(jnp.float32), axis=-1).swapaxes(1, 2)
        cases[mask] = (span, lse_BNT, delta_BNT)

    def arguments(tiling: Any, mask: str) -> tuple[jax.Array, ...]:
        span, lse_BNT, delta_BNT = cases[mask]
        saved = () if is_forward(tiling) else (dout_BTNH, lse_BNT, delta_BNT)
        return (q_BTNH, k_BSKH, v_BSKH, *saved, *span)

    def compiled(tiling: Any):
        return jax.jit(kernel(tiling, head_dim)).lower(*arguments(tiling, "causal")).compile()

    every = sorted(set().union(*wanted.values()), key=str)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        functions = list(pool.map(compiled, every))
    return {
        mask: {
            tiling: milliseconds(function, *arguments(tiling, mask), calls=10, repetitions=3)
            for tiling, function in zip(every, functions, strict=True)
            if tiling in wanted[mask]
        }
        for mask in KINDS.values()
    }


def write(path: Path, kind: str, rows: list[tilings.Measured]) -> None:
    """Replaces the rows of the same cases; the others stay."""
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    by_case = {case(row): row for row in [*map(tilings.Measured.from_json, table.get(kind, ())), *rows]}
    table[kind] = [by_case[key].to_json() for key in sorted(by_case)]
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def case(row: tilings.Measured) -> tuple[Any, ...]:
    return row.head_dim, row.heads_per_group, row.mask, row.length


if __name__ == "__main__":
    main()
