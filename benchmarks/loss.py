"""Output projection and cross-entropy, value and gradients: ours in chunks next to whole logits and the bare products.

    python benchmarks/loss.py --tokens 65536 --width 576 --vocab 49152

With --whole also what needs whole logits: JAX's own gradient, and the three products alone that any implementation
needs, a bound. Times are medians of single calls, each waited for.

With --chunk instead only what lies between the products, for the logits of one chunk, from memory to memory: XLA's
statistics and gradient next to the kernel for Hopper in each of its candidate configurations (a minute at most):

    python benchmarks/loss.py --chunk 8192 --vocab 49152 --dtype bfloat16
"""

import argparse
import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp
from jax import lax

from slmjax.ops.loss import cross_entropy_reference, linear_cross_entropy, linear_cross_entropy_reference

_CALLS = 20  # of a chunk in one program, so that what a program costs to start does not count


def bare_products(hidden_BTD, table_VD, dlogits_BTV):
    table_VD = table_VD.astype(hidden_BTD.dtype)
    logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, table_VD)
    return (
        logits_BTV,
        jnp.einsum("BTV,VD->BTD", dlogits_BTV, table_VD),
        jnp.einsum("BTV,BTD->VD", dlogits_BTV, hidden_BTD, preferred_element_type=jnp.float32),
    )


def with_gradients(function, **options):
    def loss(hidden_BTD, table_VD, targets_BT, weights_BT):
        return function(hidden_BTD, table_VD, targets_BT, weights_BT, **options).loss

    return jax.value_and_grad(loss, argnums=(0, 1))


def median_ms(function, arguments, repeats: int) -> tuple[float, float]:
    """Returns milliseconds of a call and GiB of temporaries."""
    compiled = jax.jit(function).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds), compiled.memory_analysis().temp_size_in_bytes / 2**30


def repeated(function):
    """The function over and over in one program, its gradient being the next logits, in the same memory."""

    def loop(logits_XV, targets_X, weights_X):
        def once(_, carry):
            logits_XV, sums_X = carry
            lse_X, target_X, gradient_XV = function(logits_XV, targets_X, weights_X)
            return gradient_XV.astype(logits_XV.dtype), sums_X + lse_X - target_X

        return lax.fori_loop(0, _CALLS, once, (logits_XV, jnp.zeros_like(weights_X)))

    return jax.jit(loop, donate_argnums=0)


def chunk(tokens: int, vocab: int, logits_dtype: str, dtype: str, repeats: int) -> None:
    from slmjax.kernels.hopper import cross_entropy as kernel

    keys = jax.random.split(jax.random.key(0))
    logits_XV = jax.random.normal(keys[0], (tokens, vocab), logits_dtype)
    targets_X, weights_X = jax.random.randint(keys[1], (tokens,), 0, vocab), jnp.ones(tokens)
    one_reading_and_writing = logits_XV.size * (logits_XV.dtype.itemsize + jnp.dtype(dtype).itemsize)
    functions = {"XLA": functools.partial(cross_entropy_reference, dtype=jnp.dtype(dtype))}
    for blocks in kernel.CANDIDATES:
        functions[str(dataclasses.asdict(blocks))] = functools.partial(kernel.cross_entropy, dtype=dtype, blocks=blocks)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {tokens} x {vocab}, {logits_dtype} to {dtype}")
    print("| what | ms | GB/s of one reading and one writing |")
    print("|---|---|---|")
    for name, function in functions.items():
        try:
            loop, seconds = repeated(function), []
            for _ in range(repeats + 1):
                began = time.perf_counter()
                logits_XV, _ = jax.block_until_ready(loop(logits_XV, targets_X, weights_X))
                seconds.append((time.perf_counter() - began) / _CALLS)
        except (jax.errors.JaxRuntimeError, ValueError) as error:  # one that fails must not lose the others
            print(f"| {name} | failed: {str(error)[:200]} | |", flush=True)
            continue
        median = statistics.median(seconds[1:])
        print(f"| {name} | {1e3 * median:.3f} | {one_reading_and_writing / median / 1e9:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--whole", action="store_true", help="also what needs whole logits")
    parser.add_argument("--chunk", type=int, help="instead, the softmax and gradient alone, of so many tokens")
    parser.add_argument("--logits-dtype", default="bfloat16", help="with --chunk")
    args = parser.parse_args()
    if args.chunk:
        chunk(args.chunk, args.vocab, args.logits_dtype, args.dtype, args.repeats)
        return
    shape = (args.rows, args.tokens // args.rows)
    keys = jax.random.split(jax.random.key(0), 3)
    hidden_BTD = jax.random.normal(keys[0], (*shape, args.width), args.dtype)
    table_VD = jax.random.normal(keys[1], (args.vocab, args.width)) * args.width**-0.5
    targets_BT = jax.random.randint(keys[2], shape, 0, args.vocab)
    arguments = (hidden_BTD, table_VD, targets_BT, jnp.ones(shape))
    cases = [
        (f"chunks of {chunk}, {dtype} logits", dict(chunk_tokens=chunk, logits_dtype=dtype))
        for chunk in (4096, 8192, 16384)
        for dtype in ("float32", "bfloat16")
    ]
    jobs = [(name, with_gradients(linear_cross_entropy, **options), arguments) for name, options in cases]
    if args.whole:
        jobs.append(("whole logits, differentiated by JAX", with_gradients(linear_cross_entropy_reference), arguments))
        dlogits_BTV = jnp.zeros((*shape, args.vocab), args.dtype)
        jobs.append(("the three products alone", bare_products, (hidden_BTD, table_VD, dlogits_BTV)))
    flops = 6 * args.tokens * args.width * args.vocab
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.tokens} x {args.width} x {args.vocab}")
    print("| what | ms | TFLOP/s | GiB of temporaries |")
    print("|---|---|---|---|")
    for name, function, given in jobs:
        try:
            milliseconds, gib = median_ms(function, given, args.repeats)
        except jax.errors.JaxRuntimeError as error:  # one that runs out of memory must not lose the others
            print(f"| {name} | failed: {str(error)[:80]} | | |", flush=True)
            continue
        print(f"| {name} | {milliseconds:.2f} | {flops / milliseconds / 1e9:.0f} | {gib:.2f} |", flush=True)


if __name__ == "__main__":
    main()
