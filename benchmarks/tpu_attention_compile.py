"""What the TPU's compiler makes of the attention kernels, with no TPU: time, memory, and length of its schedules.

    python benchmarks/tpu_attention_compile.py
    python benchmarks/tpu_attention_compile.py --schedules   # slower: the compiler writes down what it does

For each target and shape forward and backward are compiled for one device with the tiling of that device, bfloat16,
causal: once with ranges known in advance, once with ranges that follow the batch. VMEM is what the compiler says each
kernel uses, next to what it was granted. A schedule is the number of instruction bundles of one step of the grid, where
no key is masked / where some are; a bundle takes a cycle or, where a unit is busy, more.
"""

import argparse
import itertools
import os
import re
import tempfile
import time
from pathlib import Path

TARGETS = {"v5e:2x2": "TPU v5 lite", "v5p:2x2x1": "TPU v5", "v6e:2x2": "TPU v6 lite", "tpu7x:2x2x1": "TPU7x"}
SHAPES = [  # B, T, N, K, H
    (4, 4096, 9, 3, 64),
    (4, 4096, 32, 8, 64),
    (4, 4096, 16, 8, 128),
    (4, 8192, 16, 8, 128),
    (4, 4096, 8, 4, 256),
]
MIB = 2**20


def compile_gradients(target, tiling, shape, *, static):
    """Returns (compiled, seconds)."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from slmjax.kernels.targets import compile_for, tpu_devices
    from slmjax.kernels.tpu.attention import tpu_attention

    B, T, N, K, H = shape
    k_end_1T = np.arange(1, T + 1, dtype=np.int32)[None]
    ranges = [] if static else [jax.ShapeDtypeStruct((B, T), jnp.int32)] * 2
    q, k = (jax.ShapeDtypeStruct((B, T, n, H), jnp.bfloat16) for n in (N, K))

    def gradients(q_BTNH, k_BSKH, v_BSKH, dout_BTNH, *ranges):
        bounds = ranges or (np.zeros_like(k_end_1T), k_end_1T)

        def attend(q_BTNH, k_BSKH, v_BSKH):
            return tpu_attention(q_BTNH, k_BSKH, v_BSKH, *bounds, scale=H**-0.5, tiling=tiling)

        out_BTNH, pullback = jax.vjp(attend, q_BTNH, k_BSKH, v_BSKH)
        return out_BTNH, *pullback(dout_BTNH)

    devices = tpu_devices(target)
    start = time.perf_counter()
    compiled = compile_for(devices, gradients, q, k, k, q, *ranges)
    return compiled, time.perf_counter() - start


def vmem(compiled):
    """Returns "used of granted" MiB of each kernel, forward first, without operands that XLA keeps in VMEM."""
    lines = [line for line in compiled.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    sizes = {}
    for line in lines:
        name = "forward" if "tpu_attention_forward" in line.split("custom-call(")[0] else "backward"
        config = r'"{}":\[{{"memory_space":"1","offset":"(\d+)","size":"(\d+)"'
        first, granted = map(int, re.search(config.format("scoped_memory_configs"), line).groups())
        last = int(re.search(config.format("used_scoped_memory_configs"), line)[2])
        sizes[name] = f"{(last - first) / MIB:.1f} of {granted / MIB:.0f}"
    return sizes["forward"], sizes["backward"]


def schedules(directory: Path):
    """Returns "interior / edge" bundles of each kernel, the two longest pieces of straight code in it; empties it."""
    lengths = {}
    for path in directory.glob("*tpu_attention_*-final_bundles.txt"):
        if "schedule-analysis" in path.name:
            continue
        marks = [int(mark, 16) for mark in re.findall(r"^ *(0x[0-9a-f]+) *(?:LB|PF|LH|LE|PB):", path.read_text(), re.M)]
        longest = sorted(b - a for a, b in itertools.pairwise(marks))[-2:]
        lengths["forward" if "forward" in path.name else "backward"] = " / ".join(map(str, longest))
    for path in directory.iterdir():
        path.unlink()
    return lengths.get("forward", ""), lengths.get("backward", "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", action="store_true", help="also count instruction bundles")
    options = parser.parse_args()
    dump = Path(tempfile.mkdtemp())
    if options.schedules:  # before libtpu is loaded
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    from slmjax.kernels.tpu.attention import choose_tiling

    print(f"jax {jax.__version__}\n")
    print(
        "| target | B, T, N, K, H | ranges | heads, tiles (q x k) | compile s | HBM temp MiB | VMEM fwd | VMEM bwd |",
        end="",
    )
    print(" bundles fwd | bundles bwd |" if options.schedules else "")
    print("|---" * (10 if options.schedules else 8) + "|")
    for target, device_kind in TARGETS.items():
        for B, T, N, K, H in SHAPES:
            tiling = choose_tiling(device_kind=device_kind, head_dim=H, group=N // K, T=T, S=T)
            for static in (True,) if options.schedules else (True, False):
                compiled, seconds = compile_gradients(target, tiling, (B, T, N, K, H), static=static)
                tiles = ", ".join(f"{tile.q}x{tile.k}" for tile in (tiling.forward, tiling.backward))
                temp = compiled.memory_analysis().temp_size_in_bytes / MIB
                cells = [target, f"{B}, {T}, {N}, {K}, {H}", "constant" if static else "by row"]
                cells += [f"{tiling.heads}; {tiles}", f"{seconds:.1f}", f"{temp:.1f}", *vmem(compiled)]
                print("| " + " | ".join(cells + list(schedules(dump)) * options.schedules) + " |", flush=True)


if __name__ == "__main__":
    main()
