"""Loops over bytes and words, compiled to machine code by numba.

What is compiled is kept on disk beside the module, and is made anew only when that one file changes. So a compiled
function calls none of another module, and takes the constants of another module as arguments.
"""

from collections.abc import Callable
from typing import Any

try:
    from numba import njit
except ImportError as error:
    raise ImportError(
        "the data pipeline compiles its loops with numba, which is absent: pip install -e '.[data]' -c constraints.txt"
    ) from error


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function when it is first called with some types. Integers wrap around, indices are not checked."""
    try:
        return njit(cache=True)(function)
    except RuntimeError:  # no directory to keep it in may be written to
        return njit(function)
