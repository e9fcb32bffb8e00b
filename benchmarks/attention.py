"""How fast, and how exact, fused attention is on this GPU: ours next to cuDNN and the deprecated Pallas-Triton kernel.

    python benchmarks/attention.py                        every shape, dense, packed and windowed
    python benchmarks/attention.py --shape 16,2048,9,3,64 --triton --torch

Packed rows hold documents of lognormal lengths with a mean of an eighth of the row; cuDNN and Triton cannot keep them
apart and are always timed on the whole causal triangle. Ours has the tilings that it would choose. TFLOP/s count what
the mask keeps: 4 H a pair of query and key forward, 10 H backward. Times are medians over repetitions of the mean of
several calls, each repetition waited for; cuDNN is reached through jax, with --torch through torch. Errors are norms
of the difference to float32 over the norm, on a smaller batch.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing

from slmjax.kernels.hopper.attention import hopper_attention
from slmjax.kernels.hopper.attention_tiling import AttentionTiling, MaskKind, choose_tiling
from slmjax.kernels.tiles import IntArray
from slmjax.ops.attention import AttentionMask
from slmjax.ops.attention_reference import attention_reference
from slmjax.ops.mask import ranges, static_ranges

# Rows, length, query heads, key/value heads, head_dim.
SHAPES = (
    (16, 2048, 9, 3, 64),
    (16, 2048, 32, 8, 64),
    (8, 4096, 9, 3, 64),
    (4, 8192, 9, 3, 64),
    (8, 4096, 16, 8, 128),
    (4, 8192, 16, 8, 128),
)
WINDOW = 512
CUDNN_WIDEST = 128
KINDS: dict[str, MaskKind] = {"causal": "causal", "packed": "documents", f"window {WINDOW}": "window"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="rows,length,heads,key/value heads,head_dim")
    parser.add_argument("--triton", action="store_true", help="the Pallas-Triton kernel, too")
    parser.add_argument("--torch", action="store_true", help="cuDNN through torch, too")
    parser.add_argument("--no-errors", action="store_true", help="speed alone")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        sys.exit("benchmarks/attention.py measures kernels for NVIDIA GPUs, and there is none here")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}\n")
    print("| shape | mask | kept | what | forward ms | TFLOP/s | backward ms | TFLOP/s | both ms | cuDNN dense / it |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    shapes = [tuple(int(n) for n in shape.split(",")) for shape in args.shape or ()] or SHAPES
    for shape in shapes:
        measure(shape, triton=args.triton, torch=args.torch)
    if not args.no_errors:
        print("\n| shape | mask | what | out | dq | dk | dv |\n|---|---|---|---|---|---|---|", flush=True)
        for shape in shapes:
            compare(shape)


def measure(shape: tuple[int, ...], *, triton: bool, torch: bool) -> None:
    B, T, _, _, H = shape
    *qkv, dout_BTNH = inputs(shape)
    baseline = time_both(cudnn(H), qkv, dout_BTNH) if H <= CUDNN_WIDEST else None
    if baseline is not None:
        report(shape, "causal", 1.0, "cuDNN", baseline, baseline)
    if triton:
        report(shape, "causal", 1.0, "Pallas-Triton", time_both(pallas_triton(H), qkv, dout_BTNH), baseline)
    if torch:
        report(shape, "causal", 1.0, "cuDNN through torch", torch_cudnn(shape), baseline)
    for name, mask in masks(B, T).items():
        start_XT, end_XT = spans(mask, B, T)
        kept = float(np.mean(np.asarray(end_XT) - np.asarray(start_XT))) * 2 / T
        for what, deterministic in (("ours", False), ("ours, deterministic", True)):
            attend = ours(H, start_XT, end_XT, chosen(shape, name, deterministic=deterministic))
            report(shape, name, kept, what, time_both(attend, qkv, dout_BTNH), baseline)


def compare(shape: tuple[int, ...]) -> None:
    _, T, N, K, H = shape
    shape = (2, min(T, 2048), N, K, H)
    B, T = shape[:2]
    *qkv, dout_BTNH = inputs(shape)
    for name, mask in masks(B, T).items():
        start_XT, end_XT = spans(mask, B, T)

        def reference(q, k, v, mask=mask):
            return attention_reference(q, k, v, mask, scale=H**-0.5)

        with jax.default_matmul_precision("highest"):
            want = both(reference)(*(x.astype(jnp.float32) for x in (*qkv, dout_BTNH)))
        results = {
            what: both(ours(H, start_XT, end_XT, chosen(shape, name, deterministic=bool(what))))(*qkv, dout_BTNH)
            for what in ("", "deterministic")
        }
        if name == "causal" and H <= CUDNN_WIDEST:
            results["cuDNN"] = both(cudnn(H))(*qkv, dout_BTNH)
        for what, got in results.items():
            errors = " | ".join(f"{timing.difference(a, b):.2e}" for a, b in zip(got, want, strict=True))
            print(f"| {shape} | {name} | {what or 'ours'} | {errors} |", flush=True)


def masks(B: int, T: int) -> dict[str, AttentionMask]:
    documents_BT = jnp.asarray(lognormal_documents(B, T, mean=T / 8))
    return {
        "causal": AttentionMask(),
        "packed": AttentionMask(q_documents_BT=documents_BT, k_documents_BS=documents_BT),
        f"window {WINDOW}": AttentionMask(window=WINDOW),
    }


def lognormal_documents(B: int, T: int, *, mean: float) -> np.ndarray:
    """Ids of documents of lognormal lengths, the underlying normal of standard deviation 1, that fill rows of T."""
    generator = np.random.default_rng(0)
    documents_BT = np.zeros((B, T), np.int32)
    for row_T in documents_BT:
        start, document = 0, 1
        while start < T:
            end = start + max(1, int(generator.lognormal(np.log(mean) - 0.5, 1.0)))
            row_T[start:end] = document
            start, document = end, document + 1
    return documents_BT


def spans(mask: AttentionMask, B: int, T: int) -> tuple[IntArray, IntArray]:
    """The keys that each query sees: numbers known beforehand where all rows of any batch see the same."""
    if mask.q_documents_BT is not None:
        return jax.jit(ranges, static_argnums=(1, 2, 3))(mask, B, T, T)
    start_T, end_T = static_ranges(mask, T, T)
    return start_T[None], end_T[None]


def ours(H: int, start_XT: IntArray, end_XT: IntArray, tiling: AttentionTiling) -> Callable[..., jax.Array]:
    return lambda q, k, v: hopper_attention(q, k, v, start_XT, end_XT, scale=H**-0.5, tiling=tiling)


def cudnn(H: int) -> Callable[..., jax.Array]:
    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, scale=H**-0.5, is_causal=True, implementation="cudnn")


def pallas_triton(H: int) -> Callable[..., jax.Array]:
    from jax.experimental.pallas.ops.gpu import attention as triton  # deprecated, and only wanted on request

    def attend(q, k, v):
        groups = q.shape[2] // k.shape[2]
        return triton.mha(
            *(q, jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)), None, sm_scale=H**-0.5, causal=True
        )

    return attend


def chosen(shape: tuple[int, ...], mask: str, *, deterministic: bool = False) -> AttentionTiling:
    _, T, N, K, H = shape
    return choose_tiling(
        device_kind=jax.devices()[0].device_kind,
        head_dim=H + -H % 16,
        heads_per_group=N // K,
        mask=KINDS[mask],
        length=T,
        deterministic=deterministic,
    )


def torch_cudnn(shape: tuple[int, ...]) -> tuple[float, float]:
    """As `time_both`."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    B, T, N, K, H = shape
    q, k, v = (
        torch.randn(B, T, heads, H, dtype=torch.bfloat16, device="cuda").transpose(1, 2).requires_grad_()
        for heads in (N, K, K)
    )
    dout = torch.randn_like(q)

    def forward():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=N != K)

    def both():
        return torch.autograd.grad(forward(), (q, k, v), dout)

    def forward_alone():
        with torch.no_grad():
            return forward()

    def wait(_: Any) -> None:
        torch.cuda.synchronize()

    return milliseconds(forward_alone, wait=wait), milliseconds(both, wait=wait)


def inputs(shape: tuple[int, ...]) -> list[jax.Array]:
    B, T, N, K, H = shape
    keys = jax.random.split(jax.random.key(0), 4)
    return [
        jax.random.normal(key, (B, T, heads, H), jnp.bfloat16) for key, heads in zip(keys, (N, K, K, N), strict=True)
    ]


def both(attend: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    def run(q, k, v, dout):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(dout)

    return jax.jit(run)


def time_both(attend: Callable[..., jax.Array], qkv: list[jax.Array], dout: jax.Array) -> tuple[float, float]:
    """Milliseconds of the forward pass alone and of both passes."""
    return milliseconds(jax.jit(attend), *qkv), milliseconds(both(attend), *qkv, dout)


def milliseconds(
    function: Callable[..., Any], *arguments: Any, calls: int = 15, repetitions: int = 5, **options: Any
) -> float:
    return 1e3 * timing.seconds(function, *arguments, calls=calls, repetitions=repetitions, **options)


def report(
    shape, mask: str, kept: float, what: str, times: tuple[float, float], baseline: tuple[float, float] | None
) -> None:
    B, T, N, _, H = shape
    forward, total = times
    backward = total - forward
    flops = 4 * B * N * T * T * H / 2 * kept
    ratios = ""
    if baseline is not None:
        each = (baseline[0] / forward, (baseline[1] - baseline[0]) / backward, baseline[1] / total)
        ratios = ", ".join(f"{ratio:.2f}" for ratio in each)
    print(
        f"| {','.join(map(str, shape))} | {mask} | {kept:.3f} | {what} | {forward:.3f} | {flops / forward / 1e9:.0f} "
        f"| {backward:.3f} | {2.5 * flops / backward / 1e9:.0f} | {total:.3f} "
        f"| {ratios} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
