"""How fast gated feed-forwards (SwiGLU) are on this GPU, where their activations are computed within the products.

    python benchmarks/gated.py                                  all shapes, ours in the default blocks
    python benchmarks/gated.py --shapes SmolLM2-135M --candidates

Baselines in the same run: the same by XLA (a product, then the activation or its gradient), and its product alone. The
error is the norm of the difference from XLA's results over theirs: about 1e-3 where both round to bfloat16, more in the
gradient, since XLA rounds it twice. Rates are FLOPs of the product, and bytes that must be read and written, by time.
Times are medians over repetitions of the mean of several calls, each repetition waited for.
"""

import argparse
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from timing import difference, normal, seconds

from slmjax.kernels.hopper import gated_matmul as forward
from slmjax.kernels.hopper import gated_matmul_gradient as backward
from slmjax.kernels.hopper.gated_matmul import gated_matmul
from slmjax.kernels.hopper.gated_matmul_gradient import gated_matmul_gradient


class Shape(NamedTuple):
    name: str
    tokens: int
    width: int
    hidden: int


SHAPES = (
    Shape("SmolLM2-135M", 65_536, 576, 1_536),
    Shape("SmolLM2-1.7B", 32_768, 2_048, 8_192),
    Shape("SmolLM2-360M", 49_152, 960, 2_560),
    Shape("Qwen3-0.6B", 32_768, 1_024, 3_072),
)


def hidden(in_XG, factor_X):
    gate_XF, up_XF = jnp.split(factor_X[:, None] * in_XG.astype(jnp.float32), 2, axis=1)
    return (jax.nn.silu(gate_XF) * up_XF).astype(in_XG.dtype)


def plain(x_XD, w_DG, factor_X):
    in_XG = x_XD @ w_DG
    return in_XG, hidden(in_XG, factor_X)


def plain_gradient(dy_XD, w_FD, in_XG, factor_X, *, with_hidden):
    dh_XF = dy_XD @ w_FD.T
    h_XF, pull_back = jax.vjp(lambda in_XG: hidden(in_XG, factor_X), in_XG)
    (din_XG,) = pull_back(dh_XF)
    return (din_XG, h_XF) if with_hidden else din_XG


def measure(shape: Shape, candidates: bool) -> None:
    X, D, F = shape.tokens, shape.width, shape.hidden
    x_XD, w_DG, w_FD = normal(0, X, D), normal(1, D, 2 * F, scale=D**-0.5), normal(2, F, D, scale=D**-0.5)
    in_XG, factor_X = normal(3, X, 2 * F), jax.random.uniform(jax.random.key(4), (X,), minval=0.5, maxval=2.0)
    print(f"\n{shape.name}: {X} tokens, D {D}, F {F}\n")
    print("| what | division of the work | ms | TFLOP/s | GB/s | error |\n|---|---|---|---|---|---|")

    def row(what: str, function: Any, arrays: Any, *, flops: int, moved: int, division: str = "", want: Any = None):
        try:
            compiled = jax.jit(function).lower(*arrays).compile()
            took = seconds(compiled, *arrays, calls=10, repetitions=7)
            wrong = "" if want is None else f"{difference(compiled(*arrays), want):.1e}"
        except Exception as failed:  # one that does not fit must not lose the rest
            print(f"| {what} | {division} | failed: {str(failed)[:200]!r} | | | |", flush=True)
            return
        rates = f"{flops / took / 1e12:.0f} | {moved / took / 1e9:.0f}"
        print(f"| {what} | {division} | {took * 1e3:.3f} | {rates} | {wrong} |", flush=True)

    def compare(what: str, ours: Any, plain: Any, alone: Any, arrays: Any, *, tried: Any, flops: int, moved: int):
        row(f"{what}, XLA's product alone", alone, arrays, flops=flops, moved=0)
        row(f"{what}, XLA", plain, arrays, flops=flops, moved=moved)
        want = jax.jit(plain)(*arrays)
        for blocks in tried if candidates else tried[:1]:
            divided = f"{blocks.rows} x {blocks.columns} x {blocks.contracted}, {blocks.stages}, {blocks.teams}"
            function = functools.partial(ours, blocks=blocks)
            row(f"{what}, ours", function, arrays, flops=flops, moved=moved, division=divided, want=want)

    compare(
        *("forward", gated_matmul, plain, lambda x_XD, w_DG, _: x_XD @ w_DG, (x_XD, w_DG, factor_X)),
        tried=forward.CANDIDATES,
        flops=4 * X * D * F,
        moved=2 * (X * (D + 3 * F) + 2 * D * F),
    )
    for with_hidden in (False, True):
        compare(
            "gradient and hidden" if with_hidden else "gradient",
            functools.partial(gated_matmul_gradient, with_hidden=with_hidden),
            functools.partial(plain_gradient, with_hidden=with_hidden),
            lambda dy_XD, w_FD, *_: dy_XD @ w_FD.T,
            (x_XD, w_FD, in_XG, factor_X),
            tried=backward.CANDIDATES_WITH_HIDDEN if with_hidden else backward.CANDIDATES,
            flops=2 * X * D * F,
            moved=2 * (X * (D + (5 if with_hidden else 4) * F) + D * F),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", action="store_true", help="measure every division of the work")
    parser.add_argument("--shapes", nargs="*", choices=[shape.name for shape in SHAPES], help="default all")
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}")
    for shape in SHAPES:
        if args.shapes is None or shape.name in args.shapes:
            measure(shape, args.candidates)


if __name__ == "__main__":
    main()
