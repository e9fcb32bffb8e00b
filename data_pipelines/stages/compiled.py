"""Loops over bytes and words, compiled to machine code by numba.

What is compiled is kept on disk beside the module, and is made anew only when that one file changes. So a compiled
function calls none of another module, and takes the constants of another module as arguments.
"""

import contextlib
from collections.abc import Callable
from typing import Any

try:
    from numba import njit
    from numba.core.caching import FunctionCache
except ImportError as error:
    raise ImportError(
        "the data pipeline compiles its loops with numba, which is absent: pip install -e '.[data]' -c constraints.txt"
    ) from error


class _Kept(FunctionCache):
    """Machine code on disk. What cannot be read is compiled again, and what cannot be written is not kept."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Code for arguments of some types; None where there is none."""
        try:
            found = super().load_overload(sig, target_context)
        except Exception:  # whatever comes of half a file, as a machine leaves them that loses its power
            with contextlib.suppress(OSError):
                self.flush()
            return None
        # Of processes that keep code for different types at the same time, one may overwrite that of another.
        return found if found is not None and tuple(found.signature.args) == tuple(sig) else None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keeps code, if the disk has room."""
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function when it is first called with some types. Integers wrap around, indices are not checked."""
    dispatcher: Any = njit(function)
    # Without a directory that may be written to, it is compiled in every process.
    with contextlib.suppress(RuntimeError):
        dispatcher._cache = _Kept(function)
    return dispatcher
