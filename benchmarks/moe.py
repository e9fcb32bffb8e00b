"""How fast mixtures of experts are on this GPU: their matrix products, what lies between them, and the whole.

    python benchmarks/moe.py                      the products, ours in the default blocks
    python benchmarks/moe.py --candidates         ours in every division of the work that is worth measuring

Baselines in the same run: jax.lax.ragged_dot, and one dense product of as many FLOPs (for the whole layer: a dense
gated feed-forward of k * F hidden numbers). Assignments are drawn from uneven probabilities, as a trained router's are.
Times are medians over repetitions of the mean of several calls, each repetition waited for.
"""

import argparse
import functools
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import timing

from slmjax.kernels.hopper.grouped_matmul import grouped_matmul
from slmjax.kernels.hopper.ring import CANDIDATES, MatmulBlocks
from slmjax.kernels.hopper.transposed_grouped_matmul import transposed_grouped_matmul
from slmjax.ops import grouped_matmul as ops
from slmjax.ops.activation import activate
from slmjax.ops.mixture import moe_feed_forward, sort_by_expert


class Layer(NamedTuple):
    name: str
    tokens: int
    experts: int
    k: int
    width: int
    hidden: int


LAYERS = (
    Layer("OLMoE-1B-7B", tokens=32_768, experts=64, k=8, width=2_048, hidden=1_024),
    Layer("olmoe_small", tokens=32_768, experts=64, k=8, width=1_024, hidden=256),
    Layer("eight experts", tokens=65_536, experts=8, k=2, width=768, hidden=1_536),
)


def seconds(function, *arrays, calls: int = 10, repetitions: int = 7) -> float:
    """Median time of a call, compiled before; nan if it does not fit."""
    try:
        compiled = jax.jit(function).lower(*arrays).compile()
        jax.block_until_ready(compiled(*arrays))
    except Exception as error:  # a baseline that runs out of memory must not lose the rest
        print(f"failed: {str(error)[:200]}", file=sys.stderr)
        return float("nan")
    return timing.seconds(compiled, *arrays, calls=calls, repetitions=repetitions)


def choices(layer: Layer) -> jax.Array:
    """The k experts of every token."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 0.3, layer.experts) + rng.gumbel(size=(layer.tokens, layer.experts))
    return jnp.array(np.argsort(-logits, axis=1)[:, : layer.k].astype(np.int32))


def products(layer: Layer, sizes_E: jax.Array, candidates: bool) -> None:
    """The six products of a layer: gate and up together, and down; forward and both gradients."""
    A, E, D, F = layer.tokens * layer.k, layer.experts, layer.width, layer.hidden
    columns = ["division of the work", "ours", "ragged_dot", "dense"]
    print(f"\n{layer.name}: {layer.tokens} tokens, {E} experts, top {layer.k}, D {D}, F {F}; TFLOP/s\n")
    print(f"| product | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, rows, columns in (("gate and up", D, 2 * F), ("down", F, D)):
        x, w, dy = timing.normal(0, A, rows), timing.normal(1, E, rows, columns), timing.normal(2, A, columns)
        flops = 2 * A * rows * columns
        for kind in ("forward", "inputs", "weights"):
            transposed = kind == "inputs"
            a, b = (x, dy) if kind == "weights" else (dy if transposed else x, w)
            if kind == "weights":
                ours: Any = transposed_grouped_matmul
                ragged: Any = functools.partial(ops.transposed_grouped_matmul, implementation="ragged_dot")
                dense = seconds(functools.partial(jnp.einsum, "XD,XF->DF"), x, dy)
            else:
                ours = functools.partial(grouped_matmul, transposed=transposed)
                ragged = functools.partial(ops.grouped_matmul, transposed=transposed, implementation="ragged_dot")
                dense = seconds(functools.partial(jnp.einsum, "XF,DF->XD" if transposed else "XD,DF->XF"), a, w[0])
            baseline = seconds(ragged, a, b, sizes_E, calls=2, repetitions=3)
            for blocks in CANDIDATES if candidates else (MatmulBlocks(),):
                took = seconds(functools.partial(ours, blocks=blocks), a, b, sizes_E)
                divided = f"{blocks.rows} x {blocks.columns} x {blocks.contracted}, {blocks.stages}, {blocks.teams}"
                rates = " | ".join(f"{flops / each / 1e12:.0f}" for each in (took, baseline, dense))
                print(f"| {name}, {kind} | {divided} | {rates} |", flush=True)


def whole(layer: Layer, ids_XK: jax.Array) -> None:
    """The layer from tokens to tokens, its pieces, and a dense one."""
    X, E, k, D, F = layer.tokens, layer.experts, layer.k, layer.width, layer.hidden
    x_XD, dy_XD = timing.normal(0, X, D), timing.normal(1, X, D)
    weights_XK = jnp.full((X, k), 1 / k, jnp.float32)
    experts = timing.normal(2, E, D, F), timing.normal(3, E, D, F), timing.normal(4, E, F, D)

    def mixture(implementation, x_XD, weights_XK, w_gate_EDF, w_up_EDF, w_down_EFD):
        matrices = {"w_gate_EDF": w_gate_EDF, "w_up_EDF": w_up_EDF, "w_down_EFD": w_down_EFD}
        return moe_feed_forward(x_XD, ids_XK, weights_XK, **matrices, activation="silu", implementation=implementation)

    def dense(x_XD, w_in_DG, w_out_FD):
        gate_XF, up_XF = jnp.split(x_XD @ w_in_DG, 2, axis=-1)
        return (activate("silu", gate_XF) * up_XF) @ w_out_FD

    def both(function):
        def run(dy_XD, *arrays):
            y_XD, pull_back = jax.vjp(function, *arrays)
            return y_XD, pull_back(dy_XD)

        return run

    forward_flops = 2 * X * k * 3 * D * F
    print(f"\n{layer.name}, the whole layer\n")
    print("| what | forward ms | TFLOP/s | forward and backward ms | TFLOP/s |\n|---|---|---|---|---|")
    rows = [
        ("mixture, ours", functools.partial(mixture, "hopper"), (x_XD, weights_XK, *experts)),
        ("mixture, ragged_dot", functools.partial(mixture, "ragged_dot"), (x_XD, weights_XK, *experts)),
        ("dense, as many FLOPs", dense, (x_XD, timing.normal(5, D, 2 * k * F), timing.normal(6, k * F, D))),
    ]
    for name, function, arrays in rows:
        calls = 2 if "ragged" in name else 10
        one = seconds(function, *arrays, calls=calls, repetitions=5)
        two = seconds(both(function), dy_XD, *arrays, calls=calls, repetitions=5)
        rates = [forward_flops / one / 1e12, 3 * forward_flops / two / 1e12]
        print(f"| {name} | {one * 1e3:.3f} | {rates[0]:.0f} | {two * 1e3:.3f} | {rates[1]:.0f} |", flush=True)

    order = jax.jit(functools.partial(sort_by_expert, num_experts=E))(ids_XK)
    token_A = order.assignment_A // k
    y_AD, in_AG = x_XD[token_A], timing.normal(7, X * k, 2 * F)

    def hidden(in_AG):
        gate_AF, up_AF = jnp.split(in_AG.astype(jnp.float32), 2, axis=-1)
        return (activate("silu", gate_AF) * up_AF).astype(jnp.bfloat16)

    def summed(y_AD, place_XK):
        return sum(y_AD[place_XK[:, i]].astype(jnp.float32) for i in range(k)).astype(jnp.bfloat16)

    pieces = [
        ("sorting by expert", functools.partial(sort_by_expert, num_experts=E), (ids_XK,), 0),
        ("sorting, keys of 8 bits", lambda ids_XK: jnp.argsort(ids_XK.reshape(-1).astype(jnp.uint8)), (ids_XK,), 0),
        ("sorting, keys of 32 bits", lambda ids_XK: jnp.argsort(ids_XK.reshape(-1)), (ids_XK,), 0),
        ("gathering rows", lambda x_XD, token_A: x_XD[token_A], (x_XD, token_A), 2 * D * (X + X * k)),
        ("activation", hidden, (in_AG,), 2 * X * k * 3 * F),
        ("summing a token's rows", summed, (y_AD, order.place_XK), 2 * D * (X + X * k)),
    ]
    print("\n| piece | ms | GB/s |\n|---|---|---|")
    for name, function, arrays, moved in pieces:
        took = seconds(function, *arrays)
        print(f"| {name} | {took * 1e3:.3f} | {moved / took / 1e9:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", action="store_true", help="measure every division of the work")
    parser.add_argument("--layers", nargs="*", default=None, help="names of layers; default all")
    parser.add_argument("--skip-products", action="store_true")
    parser.add_argument("--skip-whole", action="store_true")
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}")
    for layer in LAYERS:
        if args.layers is not None and layer.name not in args.layers:
            continue
        ids_XK = choices(layer)
        if not args.skip_products:
            products(layer, jnp.bincount(ids_XK.reshape(-1), length=layer.experts).astype(jnp.int32), args.candidates)
        if not args.skip_whole:
            whole(layer, ids_XK)


if __name__ == "__main__":
    main()
