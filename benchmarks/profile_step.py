"""Where the time of a training step goes, by kind of kernel and part of the model.

    python benchmarks/profile_step.py configs/recipes/smollm2_135m.gin --batch 32 --variant microbatches=1
    python benchmarks/profile_step.py configs/recipes/smollm2_135m.gin --batch 32 --variant microbatches=1 --paper

The first runs a few steps under jax's profiler and joins the device's events with the compiled program. CUDA graphs
are off, because kernels within one do not say which instruction they are; the last line gives the time of a step with
the options as configured, to see what that costs. The second needs no GPU: it compiles for Hopper and prices every
kernel at --gigabytes and --teraflops a second, whichever takes longer; attention and other kernels of ours, products
with activations too, whose FLOPs XLA does not know, are priced by their bytes alone.
"""

import argparse
import collections
import dataclasses
import glob
import os
import re
import tempfile
from collections.abc import Iterable

import hlo
import train_step

KINDS = ("matmul", "attention", "own kernel", "elementwise", "reduction", "scatter", "copy", "collective", "unknown")
# Lines of a device's plane that hold kernels; the others are sums over them ("XLA Ops", "Framework Name Scope", ...).
STREAM = re.compile(r"^Stream #|^XLAEigen|^tf_XLA")


@dataclasses.dataclass
class Profile:
    """Device time of some steps: nanoseconds and number of events by HLO instruction, time busy and time in all."""

    nanoseconds: dict[str, float]
    events: dict[str, int]
    busy: float
    span: float


def read_trace(data, module: str) -> Profile:
    """Sums the events of the first device in `data`, a jax.profiler.ProfileData, that belong to the HLO `module`.

    Events of other modules are left out; those of no module (memory copies, kernels in CUDA graphs) are kept under
    their own names.
    """
    planes = sorted((plane for plane in data.planes if plane.name.startswith("/device:GPU")), key=lambda p: p.name)
    planes = planes[:1] or [plane for plane in data.planes if plane.name == "/host:CPU"]
    on_device = bool(planes) and planes[0].name.startswith("/device")
    nanoseconds: dict[str, float] = collections.defaultdict(float)
    events: dict[str, int] = collections.Counter()
    intervals = []
    for plane in planes:
        for line in plane.lines:
            if not STREAM.match(line.name):
                continue
            for event in line.events:
                stats = dict(event.stats)
                of_module, operation = stats.get("hlo_module"), stats.get("hlo_op")
                if (of_module is None and not on_device) or (of_module is not None and of_module != module):
                    continue
                name = str(operation or event.name)
                nanoseconds[name] += event.duration_ns
                events[name] += 1
                intervals.append((event.start_ns, event.start_ns + event.duration_ns))
    if not intervals:
        raise ValueError(
            f"no events of {module} in the trace; planes and lines are "
            f"{ {plane.name: [line.name for line in plane.lines] for plane in data.planes} }"
        )
    return Profile(dict(nanoseconds), dict(events), *_busy(intervals))


def _busy(intervals: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Returns the length of the union of the intervals, and from the first start to the last end."""
    intervals = sorted(intervals)
    busy, reached = 0.0, intervals[0][0]
    for start, end in intervals:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy, reached - intervals[0][0]


@dataclasses.dataclass
class Row:
    """Kernels of one signature, per step."""

    kernel: hlo.Kernel
    milliseconds: float = 0.0
    calls: float = 0.0
    bytes: float = 0.0
    flops: float = 0.0


def measured_rows(profile: Profile, kernels: dict[str, hlo.Kernel], steps: int) -> list[Row]:
    """Joins events with the program's kernels; what is not found there is of kind "unknown"."""
    by_symbol = {name.replace(".", "_").replace("-", "_"): kernel for name, kernel in kernels.items()}
    rows: dict[tuple, Row] = {}
    for name, nanoseconds in profile.nanoseconds.items():
        kernel = kernels.get(name) or by_symbol.get(name.replace(".", "_").replace("-", "_"))
        if kernel is None:
            kind = "copy" if re.match(r"mem(cpy|set)", name, re.IGNORECASE) else "unknown"
            kernel = hlo.Kernel(name, kind, "other", "forward", name, "", 1, 0, 0)
        calls = profile.events[name] / steps
        row = rows.setdefault(kernel.signature, Row(kernel))
        row.milliseconds += nanoseconds / steps / 1e6
        row.calls += calls
        # One instruction may be several kernels (a split matrix product): its bytes count once.
        row.bytes += min(calls, kernel.times) * kernel.bytes
        row.flops += min(calls, kernel.times) * kernel.flops
    return list(rows.values())


def paper_rows(kernels: dict[str, hlo.Kernel], gigabytes: float, teraflops: float) -> list[Row]:
    """Prices every kernel at these rates."""
    rows: dict[tuple, Row] = {}
    for kernel in kernels.values():
        row = rows.setdefault(kernel.signature, Row(kernel))
        seconds = max(kernel.bytes / (gigabytes * 1e9), kernel.flops / (teraflops * 1e12))
        row.milliseconds += 1e3 * seconds * kernel.times
        row.calls += kernel.times
        row.bytes += kernel.times * kernel.bytes
        row.flops += kernel.times * kernel.flops
    return list(rows.values())


def print_tables(rows: list[Row], top: int) -> None:
    """Prints milliseconds a step: parts of the model by kinds of kernel, then the heaviest operations."""
    total = sum(row.milliseconds for row in rows)
    cells: dict[tuple[str, str], float] = collections.defaultdict(float)
    for row in rows:
        label = f"{row.kernel.part}, {row.kernel.direction}"
        for keys in ((label, row.kernel.kind), (label, "all"), ("all", row.kernel.kind), ("all", "all")):
            cells[keys] += row.milliseconds
    labels = sorted({label for label, _ in cells}, key=lambda label: -cells[label, "all"])
    kinds = [kind for kind in KINDS if ("all", kind) in cells]
    print(f"\n| ms a step | all | share | {' | '.join(kinds)} |")
    print("|---" * (3 + len(kinds)) + "|")
    for label in labels:
        columns = [f"{cells[label, kind]:.2f}" if (label, kind) in cells else "" for kind in kinds]
        print(f"| {label} | {cells[label, 'all']:.2f} | {cells[label, 'all'] / total:.1%} | {' | '.join(columns)} |")
    print("\n| ms | calls | GB/s | TFLOP/s | kind | part | operation | result | one of them |")
    print("|---" * 9 + "|")
    for row in sorted(rows, key=lambda row: -row.milliseconds)[:top]:
        seconds = max(row.milliseconds, 1e-9) / 1e3
        kernel = row.kernel
        operation = re.sub(r"jit\((train_step|_?\w+)\)/?", "", kernel.op_name)[-60:].replace("|", "/")
        print(
            f"| {row.milliseconds:.2f} | {row.calls:.0f} | {row.bytes / seconds / 1e9:.0f} | "
            f"{row.flops / seconds / 1e12:.0f} | {kernel.kind} | {kernel.part}, {kernel.direction} | {operation} | "
            f"{re.sub(r'{[^}]*}', '', kernel.type)[:48]} | {kernel.name} |"
        )


def profile(run, variant: dict, documents: int | None, steps: int, directory: str) -> tuple[Profile, str]:
    """Runs `steps` steps under the profiler; returns their device time and the compiled program's text."""
    import jax

    prepared = train_step.prepare(run, variant, documents)
    state = prepared.state
    for _ in range(3):
        state, metrics = prepared.step(state, prepared.batch)
    jax.block_until_ready(metrics)
    with jax.profiler.trace(directory):
        for _ in range(steps):
            state, metrics = prepared.step(state, prepared.batch)
        jax.block_until_ready(metrics)
    text = prepared.step.as_text()
    newest = max(glob.glob(os.path.join(directory, "**", "*.xplane.pb"), recursive=True), key=os.path.getmtime)
    module = re.match(r"HloModule ([\w.-]+)", text)
    data = jax.profiler.ProfileData.from_file(newest)
    return read_trace(data, module.group(1) if module else "jit_train_step"), text


def compile_for_hopper(run, variant: dict, documents: int | None):
    """Returns the step compiled for a GPU that need not be there."""
    import jax

    from slmjax.kernels.targets import compiling_for_hopper, hopper_devices
    from slmjax.train.state import build_optimizer, init_state
    from slmjax.train.step import make_train_step

    run = train_step.configured(run, variant, documents)
    optimizer, schedule = build_optimizer(run)
    state = jax.eval_shape(lambda: init_state(run, optimizer))
    batch = train_step.make_batch(run.model.vocab_size, variant["batch"], variant["length"], documents=documents)
    sharding = jax.sharding.SingleDeviceSharding(hopper_devices()[0])
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (state, batch))
    step = jax.jit(make_train_step(run, optimizer, schedule), donate_argnums=0)
    with compiling_for_hopper():
        lowered = step.trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.compile(compiler_options=train_step.xla_options(run, variant, "gpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--top", type=int, default=25)
    parser.add_argument("--variant", default="", help="as for train_step.py")
    parser.add_argument("--documents", type=int, default=None, help="as for train_step.py")
    parser.add_argument("--directory", default=None, help="keep the trace and the program's text here")
    parser.add_argument("--paper", action="store_true", help="compile for Hopper and price, without a GPU")
    parser.add_argument("--gigabytes", type=float, default=4000.0, help="bytes a second of --paper, in 1e9")
    parser.add_argument("--teraflops", type=float, default=650.0, help="FLOP a second of --paper, in 1e12")
    args = parser.parse_args()

    from slmjax.gin_loader import load

    run = load([args.config]).config
    variant = {"batch": args.batch, "length": args.length} | train_step.parse_variant(args.variant)
    directory = args.directory or tempfile.mkdtemp()
    os.makedirs(directory, exist_ok=True)
    if args.paper:
        compiled = compile_for_hopper(run, variant, args.documents)
        text = compiled.as_text()
        rows = paper_rows(hlo.kernels(text), args.gigabytes, args.teraflops)
        milliseconds, calls = sum(row.milliseconds for row in rows), sum(row.calls for row in rows)
        print(f"priced {milliseconds:.1f} ms a step; {calls:.0f} kernels")
        memory = compiled.memory_analysis()
        gib = [size / 2**30 for size in (memory.argument_size_in_bytes, memory.temp_size_in_bytes)]
        print(f"arguments {gib[0]:.2f} GiB, temporary {gib[1]:.2f} GiB")
    else:
        graphs_off = {"xla_gpu_enable_command_buffer": ""}
        found, text = profile(run, graphs_off | variant, args.documents, args.steps, directory)
        rows = measured_rows(found, hlo.kernels(text), args.steps)
        print(
            f"{found.span / args.steps / 1e6:.2f} ms a step under the profiler, of which the device is idle "
            f"{(found.span - found.busy) / args.steps / 1e6:.2f}; {sum(row.calls for row in rows):.0f} kernels a step"
        )
    with open(os.path.join(directory, "program.txt"), "w") as file:
        file.write(text)
    print_tables(rows, args.top)
    if not args.paper:
        measured = train_step.slmjax_step(run, variant, args.documents, 10, 20)
        print(f"\n{1e3 * measured['step_seconds']:.2f} ms a step without the profiler, options as configured")


if __name__ == "__main__":
    main()
