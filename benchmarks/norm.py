"""How fast the gradient of a norm that is folded into a projection is on this GPU, added to that of the residual.

    python benchmarks/norm.py                                  all shapes, ours in the default blocks
    python benchmarks/norm.py --shapes SmolLM2-135M --candidates

The baseline in the same run: the same formula by XLA, which reads x and its gradient once for the sums and once for the
result. The error is the norm of the difference from XLA's result over its own, at most a few 1e-4: both round once.
The rate is that of the bytes that must be read and written, the same for both. Times are medians over repetitions of
the mean of several calls, each repetition waited for.
"""

import argparse
import functools
import time
from typing import Any, NamedTuple

import jax
from timing import difference, normal, seconds

from slmjax.kernels.hopper.norm_gradient import CANDIDATES, norm_gradient
from slmjax.ops.norm import norm_gradient_reference


class Shape(NamedTuple):
    name: str
    tokens: int
    width: int


SHAPES = (
    Shape("SmolLM2-135M", 65_536, 576),
    Shape("Qwen3-0.6B", 32_768, 1_024),
    Shape("SmolLM2-1.7B", 32_768, 2_048),
    Shape("SmolLM2-360M", 49_152, 960),
)


def plain(dx_XD, x_XD, factor_X, dresidual_XD):
    return norm_gradient_reference(dx_XD, x_XD, factor_X[:, None], dresidual_XD)


def measure(shape: Shape, candidates: bool) -> None:
    X, D = shape.tokens, shape.width
    factor_X = jax.random.uniform(jax.random.key(3), (X,), minval=0.5, maxval=2.0)
    arrays = normal(0, X, D), normal(1, X, D), factor_X, normal(2, X, D)
    moved = 8 * X * D + 4 * X
    print(f"\n{shape.name}: {X} tokens, D {D}\n")
    print("| what | division of the work | ms | GB/s | error |\n|---|---|---|---|---|")

    def row(what: str, function: Any, *, division: str = "", want: Any = None):
        try:
            compiled = jax.jit(function).lower(*arrays).compile()
            took = seconds(compiled, *arrays, calls=50, repetitions=7)
            wrong = "" if want is None else f"{difference(compiled(*arrays), want):.1e}"
        except Exception as failed:  # one that does not fit must not lose the rest
            print(f"| {what} | {division} | failed: {str(failed)[:200]!r} | | |", flush=True)
            return
        print(f"| {what} | {division} | {took * 1e3:.4f} | {moved / took / 1e9:.0f} | {wrong} |", flush=True)

    row("XLA", plain)
    want_XD = jax.jit(plain)(*arrays)
    for blocks in CANDIDATES if candidates else CANDIDATES[:1]:
        resident = "" if blocks.resident is None else f", {blocks.resident} resident"
        row(
            "ours",
            functools.partial(norm_gradient, blocks=blocks),
            division=f"{blocks.rows} of a warp, {blocks.warpgroups} warpgroups{resident}",
            want=want_XD,
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
