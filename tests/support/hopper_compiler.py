"""Compiling for a Hopper GPU that need not be there, and what its assembler says; skips where there is no compiler."""

import re

import jax
import pytest

from slmjax.kernels.targets import compile_for, hopper_devices


def compiled_for_hopper(function, *arguments):
    """Returns `function` compiled for an H100, from arguments of which only shapes and dtypes count."""
    try:
        devices = hopper_devices()
    except RuntimeError as error:
        pytest.skip(str(error))
    return compile_for(devices, function, *arguments)


def text_of_assembler(function, *arguments, capfd, monkeypatch) -> str:
    """Compiles likewise, and returns what the assembler says."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    jax.clear_caches()
    compiled_for_hopper(function, *arguments)
    return "".join(capfd.readouterr())


def spilled_bytes(text: str) -> int:
    """Returns the most bytes that a function spills, by what the assembler says."""
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    assert spills, "the assembler reported nothing"
    return max(int(number) for pair in spills for number in pair)
