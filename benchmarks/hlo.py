"""What a compiled program consists of: its kernels, their bytes and FLOPs, read from XLA's text.

Only what the tables of profile_step.py need. Bytes are those of operands and results, a fusion that slices an operand
counted with the slice, one that updates a slice in place with the update: what a kernel must move at least if nothing
stays in the cache.
"""

import dataclasses
import math
import re

_TYPES = {"pred": 1, "s8": 1, "u8": 1, "f8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
_TYPES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8}
_ARRAY = re.compile(r"\b(pred|bf16|f8|[sufc]\d+)(?:e\w+)?\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.-]+) \(")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.-]+) = ")
_FREE = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "after-all", "partition-id", "replica-id"}
_MOVES = _FREE | {"copy", "transpose", "slice", "concatenate", "reshape", "broadcast", "convert", "iota", "pad"}
_MOVES |= {"dynamic-slice", "dynamic-update-slice", "copy-start", "copy-done", "fusion"}
_SLICES = {"slice", "dynamic-slice", "gather"}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective")
# Scopes that the train step names (jax.named_scope), the innermost first.
PARTS = ("rope", "qk_norm", "attention", "experts", "norm", "mixer", "feed_forward", "embed", "loss", "optimizer")


@dataclasses.dataclass
class Instruction:
    """One line of a computation; `times` is how often one run of the program executes it."""

    name: str
    type: str
    opcode: str
    operands: list[str]
    attributes: str
    root: bool
    times: int = 1

    @property
    def op_name(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    @property
    def target(self) -> str:
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    def called(self, attribute: str) -> str | None:
        found = re.search(rf"\b{attribute}=%([\w.-]+)", self.attributes)
        return found.group(1) if found else None


@dataclasses.dataclass
class Kernel:
    """A priced instruction: kind is what it does, part where in the model it belongs."""

    name: str
    kind: str
    part: str
    direction: str
    op_name: str
    type: str
    times: int
    bytes: int
    flops: int

    @property
    def signature(self) -> tuple[str, ...]:
        """The same for the same operation of each unrolled layer."""
        return (self.kind, self.part, self.direction, self.op_name, re.sub(r"\{[^}]*\}", "", self.type))


def kernels(text: str) -> dict[str, Kernel]:
    """Returns by name the instructions that take time, of the entry and of the loops and branches that it calls."""
    computations, entry = _parse(text)
    found: dict[str, Kernel] = {}

    def visit(computation: str, times: int) -> None:
        table = {each.name: each for each in computations[computation]}
        for each in computations[computation]:
            each.times = times
            if each.opcode == "while":
                count = re.search(r'"known_trip_count":\{"n":"(\d+)"', each.attributes)
                visit(each.called("body") or "", times * (int(count.group(1)) if count else 1))
            elif each.opcode in ("call", "async-start"):
                visit(each.called("to_apply") or each.called("calls") or "", times)
            elif each.opcode == "conditional":
                for name in re.findall(r"%([\w.-]+)", each.attributes.partition("branch_computations={")[2]):
                    if name in computations:
                        visit(name, times)
            elif each.opcode not in _FREE:
                kernel = _priced(each, table, computations)
                found[kernel.name] = kernel

    visit(entry, 1)
    return found


def array_bytes(type_text: str) -> int:
    """Returns the bytes of all arrays in the text of a type."""
    return sum(
        _TYPES[kind] * math.prod(int(size) for size in dims.split(",") if size)
        for kind, dims in _ARRAY.findall(type_text)
    )


def _elements(type_text: str) -> int:
    return sum(math.prod(int(size) for size in dims.split(",") if size) for _, dims in _ARRAY.findall(type_text))


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
        elif start := _INSTRUCTION.match(line):
            rest = line[start.end() :]
            type_end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
            type_text, rest = rest[:type_end], rest[type_end:].lstrip()
            opcode, _, rest = rest.partition("(")
            end = _closing("(" + rest)
            operands = re.findall(r"%([\w.-]+)", rest[: end - 1])
            current.append(Instruction(start.group(2), type_text, opcode, operands, rest[end:], bool(start.group(1))))
    return computations, entry


def _closing(text: str) -> int:
    """Returns the index of the bracket that closes the one at the start."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return index
    raise ValueError(f"unbalanced brackets in {text[:80]!r}")


def _priced(instruction: Instruction, table: dict[str, Instruction], computations: dict) -> Kernel:
    body = _flattened(instruction, computations)
    # A kernel that is no fusion but reads a slice of an array: the device's events have its own name.
    wrapped = next((each for each in body if each.opcode == "custom-call"), instruction)
    op_name = instruction.op_name or next((each.op_name for each in reversed(body) if each.op_name), "")
    part = next((part for part in PARTS if re.search(rf"\b{part}\b", op_name)), "other")
    recomputed = "rematted_computation" in op_name
    direction = "recomputed" if recomputed else "backward" if "transpose(" in op_name else "forward"
    return Kernel(
        name=wrapped.name,
        kind=_kind(wrapped, op_name, body),
        part=part,
        direction=direction,
        op_name=op_name,
        type=instruction.type,
        times=instruction.times,
        bytes=_bytes(instruction, table, computations),
        flops=_flops(wrapped, table, body),
    )


def _flattened(instruction: Instruction, computations: dict) -> list[Instruction]:
    """Returns the instructions of a fusion, of the fusions within it too."""
    body = []
    for each in computations.get(instruction.called("calls") or "", []):
        body += [each, *_flattened(each, computations)]
    return body


def _kind(instruction: Instruction, op_name: str, body: list[Instruction]) -> str:
    opcodes = {instruction.opcode, *(each.opcode for each in body)} - {"fusion"}
    target = instruction.target
    if "fmha" in target or (target and re.search(r"mosaic|triton", target, re.IGNORECASE)):
        return "attention" if "fmha" in target or "attention" in op_name else "own kernel"
    if target.startswith("__cublas") or opcodes & {"dot", "convolution"}:
        return "matmul"
    if any(opcode.startswith(_COLLECTIVES) for opcode in opcodes):
        return "collective"
    if opcodes <= _MOVES:
        return "copy"
    if "scatter" in opcodes:
        return "scatter"
    return "reduction" if opcodes & {"reduce", "reduce-window", "sort"} else "elementwise"


def _bytes(instruction: Instruction, table: dict[str, Instruction], computations: dict) -> int:
    if instruction.opcode.endswith("-done"):
        return 0
    written = array_bytes(instruction.type)
    body = computations.get(instruction.called("calls") or "", [])
    if not body:
        return written + sum(array_bytes(table[name].type) for name in instruction.operands if name in table)
    users: dict[str, list[Instruction]] = {}
    for each in body:
        for name in each.operands:
            users.setdefault(name, []).append(each)

    def uses(name: str) -> list[tuple[str, Instruction]]:
        """Returns (name as used, user), looking through what reads no more of an operand than its own user does."""
        found = []
        for user in users.get(name, []):
            found += uses(user.name) if user.opcode in ("bitcast", "convert") and not user.root else [(name, user)]
        return found

    types = {each.name: each.type for each in body}
    read = 0
    for parameter in body:
        if parameter.opcode != "parameter":
            continue
        whole, found = array_bytes(parameter.type), uses(parameter.name)
        first = [user for name, user in found if user.operands[0] == name]
        if len(first) == len(found) and all(user.opcode == "dynamic-update-slice" for user in first):
            # In place: neither read nor written but for the update.
            written += sum(array_bytes(types[user.operands[1]]) - whole for user in first)
        elif len(first) == len(found) and all(user.opcode in _SLICES for user in first):
            read += min(whole, sum(_elements(user.type) for user in first) * whole // _elements(parameter.type))
        else:
            read += whole
    return written + read


def _flops(instruction: Instruction, table: dict[str, Instruction], body: list[Instruction]) -> int:
    types = {each.name: each.type for each in body} | {each.name: each.type for each in table.values()}
    if instruction.target.startswith("__cublas"):
        config = instruction.attributes.partition("dot_dimension_numbers")[2]
        found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', config)
        contracting = [int(dim) for dim in re.findall(r"\d+", found.group(1))] if found else []
        return _dot_flops(_first(instruction.type), types[instruction.operands[0]], contracting)
    total = 0
    for each in [instruction, *body]:
        if each.opcode == "dot":
            found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.attributes)
            contracting = [int(dim) for dim in found.group(1).split(",") if dim] if found else []
            total += _dot_flops(each.type, types[each.operands[0]], contracting)
    return total


def _first(type_text: str) -> str:
    """Returns the first array of a tuple: a cuBLAS call also returns its workspace."""
    found = _ARRAY.search(type_text)
    return found.group(0) if found else ""


def _dot_flops(out: str, lhs: str, contracting: list[int]) -> int:
    sizes = [[int(size) for size in _ARRAY.search(text).group(2).split(",") if size] for text in (out, lhs)]
    return 2 * math.prod(sizes[0]) * math.prod(sizes[1][dim] for dim in contracting)
